// Portable kernel: tables of float32 partial sums, one look-up a byte of sign codes or an index.
//
// A byte of sign codes names one of 256 sums of eight scores; an index names a score. In both cases
// logits[v] = sum_j table[j][codes[v, j]]. Four rows lie interleaved in a table, so that one load
// of a code and one vector load of the table serve all four.
#pragma once

#include <algorithm>
#include <memory>

#include "coding.h"
#include "parallel.h"

namespace vqlogits::plain {

// Rows that share a load of codes.
constexpr int kRows = 4;
// Tokens of a task: a table that is read from the second-level cache serves them all.
constexpr int64_t kTokens = 1024;
// Floats of the tables in use at a time: 24 KB of a 32 KB cache.
constexpr int64_t kTableFloats = 6144;
// Floats of the tables that are built before they are used: 4 MB.
constexpr int64_t kBatchFloats = 1 << 20;

inline int64_t entries(const Coding& coding) { return coding.sign ? 256 : coding.codewords; }

// tables [codes per token][entries][ROWS] of ROWS rows of scores.
template <int ROWS>
void build(const Coding& coding, const float* scores, float* tables) {
  const int64_t size = entries(coding), columns = coding.codes_per_token();
  for (int row = 0; row < ROWS; row++) {
    const float* s = scores + row * coding.scores_per_row();
    for (int64_t j = 0; j < columns; j++) {
      float* t = tables + j * size * ROWS + row;
      if (!coding.sign) {
        for (int64_t k = 0; k < size; k++) t[k * ROWS] = s[j * size + k];
        continue;
      }
      t[0] = 0.0f;
      for (int bit = 0; bit < 8; bit++) {  // doubling: 2^bit sums become 2^(bit + 1)
        const int half = 1 << bit;
        const int64_t r = j * 8 + bit;
        // Bits that only fill the last byte add nothing.
        const float score = r < coding.codebooks ? s[r] : 0.0f;
        for (int i = 0; i < half; i++) {
          t[(half + i) * ROWS] = t[i * ROWS] + score;
          t[i * ROWS] -= score;
        }
      }
    }
  }
}

// The values of ROWS rows side by side. Four floats fill the vector registers that every x86-64
// (SSE2) and aarch64 (NEON) processor has; spelt out, because GCC 12 does not vectorise the sums of
// four rows by itself (R = 500, 4 rows: 3.7 to 2.2 ms).
template <int ROWS>
struct Lanes;
template <>
struct Lanes<1> {
  using type = float;
};
template <>
struct Lanes<4> {
  using type = float __attribute__((vector_size(16)));
};

inline float value(float values, int) { return values; }
inline float value(Lanes<4>::type values, int row) { return values[row]; }

// partial[token][ROWS] += the look-ups of codes [begin, end) of `count` tokens.
template <int ROWS, typename Code>
void add_columns(const Coding& coding, const Code* codes, const float* tables, int64_t begin,
                 int64_t end, int64_t count, typename Lanes<ROWS>::type* partial) {
  using Values = typename Lanes<ROWS>::type;
  const int64_t size = entries(coding), columns = coding.codes_per_token();
  constexpr int kTogether = 4;  // tokens at a time: one sum alone would wait for each addition
  int64_t v = 0;
  for (; v + kTogether <= count; v += kTogether) {
    const Code* code = codes + v * columns;
    Values sums[kTogether];
    for (int i = 0; i < kTogether; i++) sums[i] = partial[v + i];
    for (int64_t j = begin; j < end; j++) {
      const Values* table = reinterpret_cast<const Values*>(tables) + j * size;
      for (int i = 0; i < kTogether; i++) sums[i] += table[code[i * columns + j]];
    }
    for (int i = 0; i < kTogether; i++) partial[v + i] = sums[i];
  }
  for (; v < count; v++) {
    for (int64_t j = begin; j < end; j++) {
      partial[v] += (reinterpret_cast<const Values*>(tables) + j * size)[codes[v * columns + j]];
    }
  }
}

// Logits of ROWS rows and of the tokens of one task.
template <int ROWS, typename Code>
void expand_task(const Coding& coding, const Code* codes, const float* tables, int64_t task,
                 float* out) {
  const int64_t first = task * kTokens;
  const int64_t count = std::min(kTokens, coding.vocabulary - first);
  const int64_t columns = coding.codes_per_token();
  const int64_t step = std::max<int64_t>(1, kTableFloats / (entries(coding) * ROWS));
  typename Lanes<ROWS>::type partial[kTokens] = {};
  for (int64_t begin = 0; begin < columns; begin += step) {
    add_columns<ROWS>(coding, codes + first * columns, tables, begin,
                      std::min(columns, begin + step), count, partial);
  }
  for (int row = 0; row < ROWS; row++) {
    float* logits = out + row * coding.vocabulary + first;
    for (int64_t v = 0; v < count; v++) logits[v] = value(partial[v], row);
  }
}

// scores [N, ...] float32, codes as stored -> out [N, V] float32.
template <typename Code>
void expand(const Coding& coding, const float* scores, const Code* codes, int64_t rows, float* out,
            int threads) {
  const int64_t per_row = coding.scores_per_row();
  const int64_t table_floats = coding.codes_per_token() * entries(coding);
  const int64_t tasks = (coding.vocabulary + kTokens - 1) / kTokens;
  const int64_t batch = std::max<int64_t>(kRows, kBatchFloats / table_floats / kRows * kRows);
  const std::unique_ptr<float[]> tables(new float[std::min(batch, rows) * table_floats]);
  for (int64_t first = 0; first < rows; first += batch) {
    const int64_t now = std::min(batch, rows - first), groups = now / kRows, singles = now % kRows;
    const float* s = scores + first * per_row;
    float* o = out + first * coding.vocabulary;
    parallel_for(groups + singles, threads, [&](int64_t i) {
      const int64_t row = i < groups ? i * kRows : groups * kRows + (i - groups);
      float* t = tables.get() + row * table_floats;
      if (i < groups) {
        build<kRows>(coding, s + row * per_row, t);
      } else {
        build<1>(coding, s + row * per_row, t);
      }
    });
    parallel_for(tasks, threads, [&](int64_t task) {
      int64_t row = 0;
      for (; row + kRows <= now; row += kRows) {
        expand_task<kRows>(coding, codes, tables.get() + row * table_floats, task,
                           o + row * coding.vocabulary);
      }
      for (; row < now; row++) {
        expand_task<1>(coding, codes, tables.get() + row * table_floats, task,
                       o + row * coding.vocabulary);
      }
    });
  }
}

}  // namespace vqlogits::plain

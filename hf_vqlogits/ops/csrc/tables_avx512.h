// AVX-512 kernel: 32-entry tables of 16-bit partial sums, 32 look-ups an instruction (vpermw).
//
// The idea is that of T-MAC (arXiv 2407.00088) and of Faiss's fast scan: a table that fits a
// register, and a permute instruction that does the look-ups. The code of a token is cut into
// fields of 5 bits: five sign bits, or as many whole indices as fit. A field names one of 32
// partial sums, three fields make a 16-bit word, 32 tokens make a block, and
//
//   logits[v] = offset + sum over segments of
//                        scale * (sum over the segment's fields of entries[field][field of v])
//
// Precision. Entries are 16-bit integers; each row and segment has a scale of its own, and the
// middle of each table goes into the row's offset. 16-bit sums are modulo 2^16, so no partial sum
// need fit, only the sum of a whole segment: with b the sum over its F tables of half their range,
// scale = b / (32700 - F / 2) is enough for every code there can be. A look-up is off by at most
// scale / 2, a logit by at most the sum over segments of F * scale / 2. Segments of 9, 17, 34 and
// all 67 words leave, at R = 1,000 and normal scores, an error of 0.04, 0.08, 0.16 and 0.32% of the
// logits' standard deviation (the largest of 50,257 tokens and 24 rows: 0.2, 0.4, 0.8, 1.5%), and
// 24 rows take 5.6, 5.2, 5.0 and 5.0 ms on one core.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cstring>
#include <limits>
#include <vector>

#include "coding.h"
#include "parallel.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define VQLOGITS_AVX512 1
#include <immintrin.h>
// The library is compiled for any x86-64; the functions marked so are called only where the
// processor has what they need.
#define VQLOGITS_TARGET __attribute__((target("avx512f,avx512bw")))
#if defined(__GNUC__) && !defined(__clang__)
// False alarms from the intrinsics of GCC 12, its bug 105593.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#else
#define VQLOGITS_AVX512 0
#endif

namespace vqlogits::wide {

constexpr int kFieldBits = 5, kEntries = 32, kFieldsPerWord = 3, kLanes = 32;
constexpr int64_t kMaxSegmentWords = 17;
constexpr int64_t kMaxSegmentFields = kMaxSegmentWords * kFieldsPerWord;
// Blocks of a task. At R = 1,000 their codes are 68 KB, well inside a core's cache when the second
// group of rows comes to them, and V = 50,257 gives 99 tasks to share among threads.
constexpr int64_t kBlocks = 16;
constexpr int64_t kTaskTokens = kBlocks * kLanes;
// Rows whose tables are built before they are used: at R = 1,000 these are 0.8 MB.
constexpr int64_t kBatchRows = 64;

// How the code of a token is cut into fields, words and segments.
struct Fields {
  int index_bits;  // bits of one index
  int indices;     // indices in a field
  int64_t words, segment_words, segments, tasks;

  explicit Fields(const Coding& coding) : index_bits(1) {
    while ((int64_t{1} << index_bits) < coding.codewords) index_bits++;
    indices = kFieldBits / index_bits;
    const int64_t per_word = int64_t{indices} * kFieldsPerWord;
    words = (coding.codebooks + per_word - 1) / per_word;
    const int64_t wanted = (words + kMaxSegmentWords - 1) / kMaxSegmentWords;
    segment_words = (words + wanted - 1) / wanted;
    segments = (words + segment_words - 1) / segment_words;
    tasks = (coding.vocabulary + kTaskTokens - 1) / kTaskTokens;
  }
  int64_t tile_words() const { return tasks * kTaskTokens * words; }
  int64_t row_entries() const { return words * kFieldsPerWord * kEntries; }
  int64_t segment_begin(int64_t segment) const { return segment * segment_words; }
  int64_t segment_end(int64_t segment) const {
    return std::min(words, (segment + 1) * segment_words);
  }
};

inline bool fits(const Coding& coding) { return coding.codewords <= kEntries; }

// Second codes of some tokens, `Fine` in ops/cpu.py. They name partial sums of the same tables. Each
// task has those of its own tokens, in whole blocks, and adds their logits while its own are still in
// the core's cache: a pass of its own over the logits took 90 us of 400 (one row, R = 1,000, a tenth
// of 50,257 tokens).
struct Fine {
  const int32_t* ids;     // [F], ascending
  const int64_t* begins;  // [tasks + 1]: the ids of a task
  const int64_t* blocks;  // [tasks + 1]: its blocks of 32
  const uint16_t* tiles;  // [task][segment][block][word of the segment][32 ids]
  float factor;           // on what the second codes add up to
};

// Word `w` of a token: three fields, the first in the low bits.
inline uint16_t word_of(const Coding& coding, const Fields& fields, const void* codes, int64_t v,
                        int64_t w) {
  if (coding.sign) {  // fifteen bits of the token's row, which may begin in the middle of a byte
    const int64_t bytes = coding.codes_per_token(), first = w * 15 / 8;
    const uint8_t* row = static_cast<const uint8_t*>(codes) + v * bytes;
    uint32_t bits = 0;
    for (int64_t i = 0; i < 3 && first + i < bytes; i++) {
      bits |= uint32_t{row[first + i]} << (8 * i);
    }
    return static_cast<uint16_t>((bits >> (w * 15 % 8)) & 0x7fff);
  }
  uint32_t word = 0;
  for (int field = 0; field < kFieldsPerWord; field++) {
    for (int index = 0; index < fields.indices; index++) {
      const int64_t g = (w * kFieldsPerWord + field) * fields.indices + index;
      if (g >= coding.codebooks) break;
      const int64_t at = v * coding.codebooks + g;
      const uint32_t code = coding.code_bytes == 1 ? static_cast<const uint8_t*>(codes)[at]
                                                   : static_cast<const int32_t*>(codes)[at];
      word |= code << (field * kFieldBits + index * fields.index_bits);
    }
  }
  return static_cast<uint16_t>(word);
}

// Rows [begin, end) of the codes as stored -> `blocks` blocks [segment][block][word of the
// segment][32 tokens]: in the order in which they are read.
inline void tile_rows(const Coding& coding, const Fields& fields, const void* codes, int64_t begin,
                      int64_t end, int64_t blocks, uint16_t* to) {
  for (int64_t segment = 0; segment < fields.segments; segment++) {
    for (int64_t block = 0; block < blocks; block++) {
      for (int64_t w = fields.segment_begin(segment); w < fields.segment_end(segment); w++) {
        for (int64_t lane = 0; lane < kLanes; lane++) {
          const int64_t v = begin + block * kLanes + lane;
          *to++ = v < end ? word_of(coding, fields, codes, v, w) : 0;
        }
      }
    }
  }
}

// codes as stored -> tiles [task][segment][block][word of the segment][32 tokens].
inline void tile(const Coding& coding, const void* codes, uint16_t* tiles, int threads) {
  const Fields fields(coding);
  parallel_for(fields.tasks, threads, [&](int64_t task) {
    tile_rows(coding, fields, codes, task * kTaskTokens, coding.vocabulary, kBlocks,
              tiles + task * kTaskTokens * fields.words);
  });
}

// Second codes as stored, in the order of `fine.ids` -> `tiles`.
inline void tile_fine(const Coding& coding, const Fine& fine, const void* codes, uint16_t* tiles,
                      int threads) {
  const Fields fields(coding);
  parallel_for(fields.tasks, threads, [&](int64_t task) {
    tile_rows(coding, fields, codes, fine.begins[task], fine.begins[task + 1],
              fine.blocks[task + 1] - fine.blocks[task],
              tiles + fine.blocks[task] * kLanes * fields.words);
  });
}

enum class Output : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

#if VQLOGITS_AVX512

// The tables of a batch of rows.
class Tables {
 public:
  Tables(const Fields& fields, int64_t rows)
      : scales(rows * fields.segments),
        offsets(rows),
        storage_(rows * fields.row_entries() + kEntries) {
    // A table fills a cache line; across two of them every look-up would load twice.
    const auto address = reinterpret_cast<uintptr_t>(storage_.data());
    entries = storage_.data() + (-address % 64) / sizeof(int16_t);
  }

  int16_t* entries;            // [rows][fields][32]
  std::vector<float> scales;   // [rows][segments]
  std::vector<float> offsets;  // [rows]

 private:
  std::vector<int16_t> storage_;
};

// The 32 partial sums of a field of sign codes; returns the largest of them.
VQLOGITS_TARGET inline float sign_sums(const Coding& coding, const float* scores, int64_t field,
                                       float* sums) {
  float s[kFieldBits] = {};  // codebooks that only fill the last field add nothing
  for (int i = 0; i < kFieldBits && field * kFieldBits + i < coding.codebooks; i++) {
    s[i] = scores[field * kFieldBits + i];
  }
  // Bit i of the lane number is the sign of score i.
  __m512 sum = _mm512_setzero_ps();
  constexpr __mmask16 kBit[4] = {0xaaaa, 0xcccc, 0xf0f0, 0xff00};
  for (int i = 0; i < 4; i++) {
    const __m512 score = _mm512_set1_ps(s[i]);
    sum = _mm512_mask_add_ps(_mm512_sub_ps(sum, score), kBit[i], sum, score);
  }
  _mm512_storeu_ps(sums, _mm512_sub_ps(sum, _mm512_set1_ps(s[4])));
  _mm512_storeu_ps(sums + 16, _mm512_add_ps(sum, _mm512_set1_ps(s[4])));
  float largest = 0.0f;
  for (int i = 0; i < kFieldBits; i++) largest += s[i] < 0 ? -s[i] : s[i];
  return largest;
}

// The partial sums of a field of index codes, less the middle of their range; returns half the
// range.
VQLOGITS_TARGET inline float index_sums(const Coding& coding, const Fields& fields,
                                        const float* scores, int64_t field, float* sums,
                                        float* middle) {
  const int codewords = 1 << fields.index_bits;
  int size = 1;
  sums[0] = 0.0f;
  for (int index = 0; index < fields.indices; index++) {
    const int64_t g = field * fields.indices + index;
    if (g >= coding.codebooks) break;
    for (int k = codewords - 1; k >= 0; k--) {  // downwards: k = 0 overwrites what the others read
      // No code holds an index of K or more; any score serves that widens no range.
      const float score = scores[g * coding.codewords + std::min<int64_t>(k, coding.codewords - 1)];
      for (int i = 0; i < size; i++) sums[k * size + i] = sums[i] + score;
    }
    size *= codewords;
  }
  for (int i = size; i < kEntries; i++) sums[i] = sums[0];  // never looked up
  const __m512 a = _mm512_loadu_ps(sums), b = _mm512_loadu_ps(sums + 16);
  const float low = _mm512_reduce_min_ps(_mm512_min_ps(a, b));
  const float high = _mm512_reduce_max_ps(_mm512_max_ps(a, b));
  *middle = 0.5f * low + 0.5f * high;
  _mm512_storeu_ps(sums, _mm512_sub_ps(a, _mm512_set1_ps(*middle)));
  _mm512_storeu_ps(sums + 16, _mm512_sub_ps(b, _mm512_set1_ps(*middle)));
  return 0.5f * high - 0.5f * low;
}

// Whether no score is NaN or infinite. These have all bits of the exponent set, and integers are
// compared many at a time.
VQLOGITS_TARGET inline bool all_finite(const float* scores, int64_t count) {
  uint32_t largest = 0;
  for (int64_t i = 0; i < count; i++) {
    uint32_t bits;
    std::memcpy(&bits, scores + i, sizeof bits);
    largest = std::max(largest, bits & 0x7fffffffu);
  }
  return largest < 0x7f800000u;
}

// Tables, scales and offset of one row of scores. A row with a score that is not finite becomes NaN
// as a whole: which tokens it concerns, integers cannot say.
VQLOGITS_TARGET inline void build_row(const Coding& coding, const Fields& fields,
                                      const float* scores, int16_t* entries, float* scales,
                                      float* offset) {
  float sums[kMaxSegmentFields][kEntries];
  double middles = 0.0;
  const bool finite = all_finite(scores, coding.scores_per_row());
  for (int64_t segment = 0; segment < fields.segments; segment++) {
    const int64_t first = fields.segment_begin(segment) * kFieldsPerWord;
    const int64_t count = fields.segment_end(segment) * kFieldsPerWord - first;
    double bound = 0.0;
    for (int64_t f = 0; f < count; f++) {
      float middle = 0.0f;
      bound += coding.sign ? sign_sums(coding, scores, first + f, sums[f])
                           : index_sums(coding, fields, scores, first + f, sums[f], &middle);
      middles += middle;
    }
    // Scores that are all zero, or too small for a normal scale, give entries of zero and no NaN.
    const float scale = std::max(static_cast<float>(bound / (32700.0 - 0.5 * count)), FLT_MIN);
    scales[segment] = scale;
    const __m512 inverse = _mm512_set1_ps(1.0f / scale);
    for (int64_t f = 0; f < count; f++) {
      for (int half = 0; half < kEntries; half += 16) {
        const __m512i entry =
            _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(sums[f] + half), inverse));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(entries + (first + f) * kEntries + half),
                            _mm512_cvtepi32_epi16(entry));
      }
    }
  }
  *offset = finite ? static_cast<float>(middles) : std::numeric_limits<float>::quiet_NaN();
}

// partial[row][token] += scale * sum of the look-ups of one segment, for ROWS rows and BLOCKS
// blocks of tokens. The rows share each load of codes, the blocks each load of a table. Scales and
// partial sums of the rows stand `row_scales` and kTaskTokens apart.
template <int ROWS, int BLOCKS>
VQLOGITS_TARGET inline void add_segment(const uint16_t* codes, int64_t words,
                                        const int16_t* entries, int64_t row_entries,
                                        const float* scales, int64_t row_scales, float* partial) {
  __m512i sums[ROWS][BLOCKS];
  for (int n = 0; n < ROWS; n++) {
    for (int b = 0; b < BLOCKS; b++) sums[n][b] = _mm512_setzero_si512();
  }
  for (int64_t w = 0; w < words; w++) {
    __m512i field[BLOCKS][kFieldsPerWord];
    for (int b = 0; b < BLOCKS; b++) {
      const uint16_t* code = codes + (b * words + w) * kLanes;
      // One row waits for the codes to come from memory: asking for them 4 KB ahead took it from
      // 410 to 330 us (R = 1,000, one thread). A prefetch past the end of the tiles does nothing.
      if (ROWS < 4) _mm_prefetch(reinterpret_cast<const char*>(code) + 4096, _MM_HINT_T0);
      field[b][0] = _mm512_loadu_si512(code);
      field[b][1] = _mm512_srli_epi16(field[b][0], kFieldBits);
      field[b][2] = _mm512_srli_epi16(field[b][0], 2 * kFieldBits);
    }
    for (int n = 0; n < ROWS; n++) {
      for (int f = 0; f < kFieldsPerWord; f++) {
        const __m512i table =
            _mm512_loadu_si512(entries + n * row_entries + (w * kFieldsPerWord + f) * kEntries);
        for (int b = 0; b < BLOCKS; b++) {  // vpermw reads no more than the low 5 bits of an index
          sums[n][b] = _mm512_add_epi16(sums[n][b], _mm512_permutexvar_epi16(field[b][f], table));
        }
      }
    }
  }
  for (int n = 0; n < ROWS; n++) {
    const __m512 scale = _mm512_set1_ps(scales[n * row_scales]);
    for (int b = 0; b < BLOCKS; b++) {
      float* to = partial + n * kTaskTokens + b * kLanes;
      const __m512i low = _mm512_cvtepi16_epi32(_mm512_castsi512_si256(sums[n][b]));
      const __m512i high = _mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(sums[n][b], 1));
      _mm512_storeu_ps(to, _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(low), _mm512_loadu_ps(to)));
      _mm512_storeu_ps(to + 16,
                       _mm512_fmadd_ps(scale, _mm512_cvtepi32_ps(high), _mm512_loadu_ps(to + 16)));
    }
  }
}

// out[at, at + count) = logits in the type asked for, rounded to nearest even.
VQLOGITS_TARGET inline void store(const float* logits, int64_t count, Output type, void* out,
                                  int64_t at) {
  for (int64_t v = 0; v < count; v += 16) {
    const int left = static_cast<int>(std::min<int64_t>(count - v, 16));
    const __mmask16 mask = static_cast<__mmask16>((1 << left) - 1);
    const __m512 value = _mm512_loadu_ps(logits + v);
    if (type == Output::kFloat32) {
      _mm512_mask_storeu_ps(static_cast<float*>(out) + at + v, mask, value);
      continue;
    }
    __m512i half;
    if (type == Output::kFloat16) {
      half = _mm512_cvtepu16_epi32(
          _mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    } else {
      const __m512i bits = _mm512_castps_si512(value);
      const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
      half = _mm512_srli_epi32(
          _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
    }
    _mm512_mask_cvtepi32_storeu_epi16(static_cast<uint16_t*>(out) + at + v, mask, half);
  }
}

// partial[row][token] += what the tables of ROWS rows, the first of them `row`, add up to for `used`
// of `blocks` blocks of tiled codes.
template <int ROWS, int BLOCKS>
VQLOGITS_TARGET inline void add_blocks(const Fields& fields, const uint16_t* tiles, int64_t blocks,
                                       int64_t used, const Tables& tables, int64_t row,
                                       float* partial) {
  for (int64_t segment = 0; segment < fields.segments; segment++) {
    const int64_t begin = fields.segment_begin(segment);
    const int64_t words = fields.segment_end(segment) - begin;
    const uint16_t* codes = tiles + begin * blocks * kLanes;
    for (int64_t block = 0; block < used; block += BLOCKS) {
      add_segment<ROWS, BLOCKS>(
          codes + block * words * kLanes, words,
          tables.entries + row * fields.row_entries() + begin * kFieldsPerWord * kEntries,
          fields.row_entries(), tables.scales.data() + row * fields.segments + segment,
          fields.segments, partial + block * kLanes);
    }
  }
}

// The same for the tokens of a task that have second codes, times their factor.
template <int ROWS>
VQLOGITS_TARGET inline void add_fine(const Fields& fields, const Fine& fine, const Tables& tables,
                                     int64_t row, int64_t task, float* partial) {
  const int64_t begin = fine.begins[task], count = fine.begins[task + 1] - begin;
  const int64_t blocks = fine.blocks[task + 1] - fine.blocks[task];
  alignas(64) float sums[ROWS * kTaskTokens];
  for (int n = 0; n < ROWS; n++) std::fill_n(sums + n * kTaskTokens, blocks * kLanes, 0.0f);
  add_blocks<ROWS, 1>(fields, fine.tiles + fine.blocks[task] * kLanes * fields.words, blocks, blocks,
                      tables, row, sums);
  for (int n = 0; n < ROWS; n++) {
    for (int64_t i = 0; i < count; i++) {
      const int64_t token = fine.ids[begin + i] - task * kTaskTokens;
      partial[n * kTaskTokens + token] += fine.factor * sums[n * kTaskTokens + i];
    }
  }
}

// Logits of ROWS rows, the first of them `row`, for the tokens of one task.
template <int ROWS, int BLOCKS>
VQLOGITS_TARGET inline void expand_task(const Coding& coding, const Fields& fields,
                                        const uint16_t* tiles, const Fine* fine,
                                        const Tables& tables, int64_t row, int64_t task,
                                        Output type, void* out) {
  alignas(64) float partial[ROWS * kTaskTokens];
  for (int n = 0; n < ROWS; n++) {
    std::fill_n(partial + n * kTaskTokens, kTaskTokens, tables.offsets[row + n]);
  }
  const int64_t first = task * kTaskTokens;
  const int64_t count = std::min(kTaskTokens, coding.vocabulary - first);
  const int64_t used = (count + kLanes * BLOCKS - 1) / (kLanes * BLOCKS) * BLOCKS;
  add_blocks<ROWS, BLOCKS>(fields, tiles + first * fields.words, kBlocks, used, tables, row,
                           partial);
  if (fine) add_fine<ROWS>(fields, *fine, tables, row, task, partial);
  for (int n = 0; n < ROWS; n++) {
    store(partial + n * kTaskTokens, count, type, out, (row + n) * coding.vocabulary + first);
  }
}

// scores [N, ...] float32, codes as tiles, second codes or null -> out [N, V] of the given type.
inline void expand(const Coding& coding, const float* scores, const uint16_t* tiles,
                   const Fine* fine, int64_t rows, Output type, void* out, int threads) {
  const Fields fields(coding);
  const int64_t row_bytes = coding.vocabulary * (type == Output::kFloat32 ? 4 : 2);
  Tables tables(fields, std::min(rows, kBatchRows));
  for (int64_t first = 0; first < rows; first += kBatchRows) {
    const int64_t now = std::min(kBatchRows, rows - first);
    const float* s = scores + first * coding.scores_per_row();
    char* o = static_cast<char*>(out) + first * row_bytes;
    parallel_for(now, threads, [&](int64_t row) {
      build_row(coding, fields, s + row * coding.scores_per_row(),
                tables.entries + row * fields.row_entries(),
                tables.scales.data() + row * fields.segments, tables.offsets.data() + row);
    });
    parallel_for(fields.tasks, threads, [&](int64_t task) {
      int64_t row = 0;
      for (; row + 4 <= now; row += 4) {
        expand_task<4, 1>(coding, fields, tiles, fine, tables, row, task, type, o);
      }
      for (; row + 2 <= now; row += 2) {
        expand_task<2, 2>(coding, fields, tiles, fine, tables, row, task, type, o);
      }
      for (; row < now; row++) {
        expand_task<1, 2>(coding, fields, tiles, fine, tables, row, task, type, o);
      }
    });
  }
}

#endif  // VQLOGITS_AVX512

}  // namespace vqlogits::wide

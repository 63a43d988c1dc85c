// Codes in the order in which a kernel with tables in registers reads them.
//
// The code of a token is cut into fields of some bits: so many sign bits, or as many whole indices
// as fit. A field names one of 2^bits partial sums; a few fields make a word, 32 tokens make a block:
//
//   logits[v] = offset + sum over segments of
//                        scale * (sum over the segment's fields of entries[field][field of v])
//
// This is the idea of T-MAC (arXiv 2407.00088) and of Faiss's fast scan: a table that fits a
// register, and an instruction that looks up many entries of it at a time.
#pragma once

#include <algorithm>
#include <cstdint>

#include "coding.h"
#include "numbers.h"
#include "parallel.h"

namespace vqlogits {

constexpr int kLanes = 32;  // tokens of a block
// Blocks of a task. At R = 1,000 their codes are 68 KB, well inside a core's cache when the second
// group of rows comes to them, and V = 50,257 gives 99 tasks to share among threads.
constexpr int64_t kBlocks = 16;
constexpr int64_t kTaskTokens = kBlocks * kLanes;

// What an instruction looks up: fields of BITS bits, FIELDS of them in a word.
template <int BITS, int FIELDS, typename WORD>
struct Shape {
  using Word = WORD;
  static constexpr int kFieldBits = BITS, kEntries = 1 << BITS, kFieldsPerWord = FIELDS;
  // Why no more: see the precision in tables_kernel.h.
  static constexpr int64_t kMaxSegmentWords = 51 / FIELDS;
  static constexpr int64_t kMaxSegmentFields = kMaxSegmentWords * FIELDS;

  static bool fits(const Coding& coding) { return coding.codewords <= kEntries; }
};
using Words = Shape<5, 3, uint16_t>;  // 32 entries of 16 bits: a register of AVX-512
using Bytes = Shape<4, 2, uint8_t>;   // 16 entries, low bytes and high bytes: AVX2 and NEON

// How the code of a token is cut into fields, words and segments.
template <typename S>
struct Fields {
  int index_bits;  // bits of one index
  int indices;     // indices in a field
  int64_t words, segment_words, segments, tasks;

  explicit Fields(const Coding& coding) : index_bits(1) {
    while ((int64_t{1} << index_bits) < coding.codewords) index_bits++;
    indices = S::kFieldBits / index_bits;
    const int64_t per_word = int64_t{indices} * S::kFieldsPerWord;
    words = (coding.codebooks + per_word - 1) / per_word;
    const int64_t wanted = (words + S::kMaxSegmentWords - 1) / S::kMaxSegmentWords;
    segment_words = (words + wanted - 1) / wanted;
    segments = (words + segment_words - 1) / segment_words;
    tasks = (coding.vocabulary + kTaskTokens - 1) / kTaskTokens;
  }
  int64_t tile_words() const { return tasks * kTaskTokens * words; }
  int64_t row_entries() const { return words * S::kFieldsPerWord * S::kEntries; }
  int64_t segment_begin(int64_t segment) const { return segment * segment_words; }
  int64_t segment_end(int64_t segment) const {
    return std::min(words, (segment + 1) * segment_words);
  }
};

// Second codes of some tokens, `Fine` in ops/cpu.py. They name partial sums of the same tables. Each
// task has those of its own tokens, in whole blocks, and adds their logits while its own are still in
// the core's cache: a pass of its own over the logits took 90 us of 400 (one row, R = 1,000, a tenth
// of 50,257 tokens).
struct Fine {
  const int32_t* ids;     // [F], ascending
  const int64_t* begins;  // [tasks + 1]: the ids of a task
  const int64_t* blocks;  // [tasks + 1]: its blocks of 32
  const void* tiles;      // [task][segment][block][word of the segment][32 ids]
  float factor;           // on what the second codes add up to
};

// Word `w` of a token, its first field in the low bits.
template <typename S>
typename S::Word word_of(const Coding& coding, const Fields<S>& fields, const void* codes, int64_t v,
                         int64_t w) {
  constexpr int kBits = S::kFieldBits * S::kFieldsPerWord;
  if (coding.sign) {  // so many bits of the token's row, which may begin in the middle of a byte
    const int64_t bytes = coding.codes_per_token(), first = w * kBits / 8;
    const uint8_t* row = static_cast<const uint8_t*>(codes) + v * bytes;
    uint32_t bits = 0;
    for (int64_t i = 0; i < 3 && first + i < bytes; i++) {
      bits |= uint32_t{row[first + i]} << (8 * i);
    }
    return static_cast<typename S::Word>((bits >> (w * kBits % 8)) & ((1u << kBits) - 1));
  }
  uint32_t word = 0;
  for (int field = 0; field < S::kFieldsPerWord; field++) {
    for (int index = 0; index < fields.indices; index++) {
      const int64_t g = (w * S::kFieldsPerWord + field) * fields.indices + index;
      if (g >= coding.codebooks) break;
      const int64_t at = v * coding.codebooks + g;
      const uint32_t code = coding.code_bytes == 1 ? static_cast<const uint8_t*>(codes)[at]
                                                   : static_cast<const int32_t*>(codes)[at];
      word |= code << (field * S::kFieldBits + index * fields.index_bits);
    }
  }
  return static_cast<typename S::Word>(word);
}

// Rows [begin, end) of the codes as stored -> `blocks` blocks [segment][block][word of the
// segment][32 tokens]: in the order in which they are read.
template <typename S>
void tile_rows(const Coding& coding, const Fields<S>& fields, const void* codes, int64_t begin,
               int64_t end, int64_t blocks, typename S::Word* to) {
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
template <typename S>
void tile(const Coding& coding, const void* codes, void* tiles, int threads) {
  const Fields<S> fields(coding);
  parallel_for(fields.tasks, threads, [&](int64_t task) {
    tile_rows(coding, fields, codes, task * kTaskTokens, coding.vocabulary, kBlocks,
              static_cast<typename S::Word*>(tiles) + task * kTaskTokens * fields.words);
  });
}

// Second codes as stored, in the order of `fine.ids` -> `tiles`.
template <typename S>
void tile_fine(const Coding& coding, const Fine& fine, const void* codes, void* tiles, int threads) {
  const Fields<S> fields(coding);
  parallel_for(fields.tasks, threads, [&](int64_t task) {
    tile_rows(coding, fields, codes, fine.begins[task], fine.begins[task + 1],
              fine.blocks[task + 1] - fine.blocks[task],
              static_cast<typename S::Word*>(tiles) + fine.blocks[task] * kLanes * fields.words);
  });
}

// How scores come from hidden states, `_Scoring` in ops/cpu.py:
// scale * (hidden . codebook + bias).
struct Scoring {
  const float* hidden;   // [N, d]
  const void* codebook;  // [scores of a row, d]
  const void* bias;      // [scores of a row]
  int64_t size;          // d
  float scale;
  Type type;  // of codebook and bias
};

}  // namespace vqlogits

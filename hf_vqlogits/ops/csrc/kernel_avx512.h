// AVX-512: 32-entry tables of 16-bit partial sums, 32 look-ups an instruction (vpermw).
#pragma once

#include <algorithm>
#include <cfloat>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "layout.h"
#include "numbers.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define VQLOGITS_X86 1
#include <immintrin.h>
#if defined(__GNUC__) && !defined(__clang__)
// False alarms from the intrinsics of GCC 12, its bug 105593.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

// The library is compiled for any x86-64; the functions marked so are called only where the
// processor has what they need.
#define VQLOGITS_TARGET __attribute__((target("avx512f,avx512bw")))
#define VQLOGITS_PATH avx512

namespace vqlogits::avx512 {

using S = Words;
constexpr int kRows = 4, kPairBlocks = 2, kSingleBlocks = 2;

struct FieldScores {
  float of[S::kFieldBits];
};

// The 32 partial sums of a field of sign codes; returns the largest of them.
VQLOGITS_TARGET inline float sign_sums(const FieldScores& scores, float* sums) {
  // Bit i of the lane number is the sign of score i.
  __m512 sum = _mm512_setzero_ps();
  constexpr __mmask16 kBit[4] = {0xaaaa, 0xcccc, 0xf0f0, 0xff00};
  for (int i = 0; i < 4; i++) {
    const __m512 score = _mm512_set1_ps(scores.of[i]);
    sum = _mm512_mask_add_ps(_mm512_sub_ps(sum, score), kBit[i], sum, score);
  }
  _mm512_storeu_ps(sums, _mm512_sub_ps(sum, _mm512_set1_ps(scores.of[4])));
  _mm512_storeu_ps(sums + 16, _mm512_add_ps(sum, _mm512_set1_ps(scores.of[4])));
  float largest = 0.0f;
  for (const float score : scores.of) largest += score < 0 ? -score : score;
  return largest;
}

// sums * factor, rounded -> a table as it is looked up.
VQLOGITS_TARGET inline void put_entries(const float* sums, float factor, int16_t* to) {
  for (int half = 0; half < S::kEntries; half += 16) {
    const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(sums + half), _mm512_set1_ps(factor));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + half),
                        _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(scaled)));
  }
}

// 16 floats -> float16.
VQLOGITS_TARGET inline void store_half(const float* values, uint16_t* to) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_cvtps_ph(_mm512_loadu_ps(values),
                                      _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}

// 16 floats -> bfloat16. What is cut off rounds up from 0x8000 on, or from behind it where the last
// digit that stays is even.
VQLOGITS_TARGET inline void store_bfloat16(const float* values, uint16_t* to) {
  const __m512i bits = _mm512_castps_si512(_mm512_loadu_ps(values));
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(sum, 16)));
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
    __m512i field[BLOCKS][S::kFieldsPerWord];
    for (int b = 0; b < BLOCKS; b++) {
      const uint16_t* code = codes + (b * words + w) * kLanes;
      // One row waits for the codes to come from memory: asking for them 4 KB ahead took it from
      // 410 to 330 us (R = 1,000, one thread). A prefetch past the end of the tiles does nothing.
      if (ROWS < 4) _mm_prefetch(reinterpret_cast<const char*>(code) + 4096, _MM_HINT_T0);
      field[b][0] = _mm512_loadu_si512(code);
      field[b][1] = _mm512_srli_epi16(field[b][0], S::kFieldBits);
      field[b][2] = _mm512_srli_epi16(field[b][0], 2 * S::kFieldBits);
    }
    for (int n = 0; n < ROWS; n++) {
      for (int f = 0; f < S::kFieldsPerWord; f++) {
        const __m512i table = _mm512_loadu_si512(
            entries + n * row_entries + (w * S::kFieldsPerWord + f) * S::kEntries);
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

}  // namespace vqlogits::avx512

#include "tables_kernel.h"
#undef VQLOGITS_TARGET
#undef VQLOGITS_PATH

#else
#define VQLOGITS_X86 0
#endif

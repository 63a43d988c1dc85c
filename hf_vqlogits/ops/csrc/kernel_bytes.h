// AVX2 and NEON: 16-entry tables of 16-bit partial sums, low bytes and high bytes apart, as many
// look-ups an instruction as a register has bytes (pshufb, tbl).
//
// Sums are modulo 2^16, so those of the high bytes are needed modulo 2^8 only and are kept in bytes.
// Those of the low bytes need 16 bits: taken two tokens at a time as 16-bit numbers, the sum of the
// pairs and that of their upper halves tell both. No byte is widened in the loop.
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
#include <immintrin.h>
#define VQLOGITS_BYTES 1
#define VQLOGITS_TARGET __attribute__((target("avx2,fma,f16c")))

namespace vqlogits::bytes {

// Sums of 32 tokens.
struct Sums {
  __m256i pairs, odd, high;
};
using Field = __m256i;

VQLOGITS_TARGET inline Sums zero() {
  const __m256i none = _mm256_setzero_si256();
  return {none, none, none};
}

VQLOGITS_TARGET inline void split(const uint8_t* codes, Field* first, Field* second) {
  const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes));
  const __m256i mask = _mm256_set1_epi8(15);
  *first = _mm256_and_si256(both, mask);
  *second = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
}

VQLOGITS_TARGET inline void look_up(const int16_t* entries, Field field, Sums* sums) {
  const auto* table = reinterpret_cast<const __m128i*>(entries);
  const __m256i low =
      _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(table)), field);
  const __m256i high =
      _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128(table + 1)), field);
  sums->pairs = _mm256_add_epi16(sums->pairs, low);
  sums->odd = _mm256_add_epi16(sums->odd, _mm256_srli_epi16(low, 8));
  sums->high = _mm256_add_epi8(sums->high, high);
}

VQLOGITS_TARGET inline void add_eight(__m128i sums, __m256 scale, float* to) {
  const __m256 values = _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(sums));
  _mm256_storeu_ps(to, _mm256_fmadd_ps(scale, values, _mm256_loadu_ps(to)));
}

VQLOGITS_TARGET inline void add_scaled(const Sums& sums, float scale, float* to) {
  const __m256i even =
      _mm256_add_epi16(sums.pairs, _mm256_slli_epi16(_mm256_sub_epi16(sums.high, sums.odd), 8));
  const __m256i odd = _mm256_add_epi16(
      sums.odd, _mm256_and_si256(sums.high, _mm256_set1_epi16(static_cast<int16_t>(0xff00))));
  const __m256i low = _mm256_unpacklo_epi16(even, odd);   // tokens 0 to 7 and 16 to 23
  const __m256i high = _mm256_unpackhi_epi16(even, odd);  // 8 to 15 and 24 to 31
  const __m256 factor = _mm256_set1_ps(scale);
  add_eight(_mm256_castsi256_si128(low), factor, to);
  add_eight(_mm256_castsi256_si128(high), factor, to + 8);
  add_eight(_mm256_extracti128_si256(low, 1), factor, to + 16);
  add_eight(_mm256_extracti128_si256(high, 1), factor, to + 24);
}

VQLOGITS_TARGET inline void prefetch(const uint8_t* codes) {
  _mm_prefetch(reinterpret_cast<const char*>(codes), _MM_HINT_T0);
}

// 16 floats -> float16.
VQLOGITS_TARGET inline void store_half(const float* values, uint16_t* to) {
  for (int i = 0; i < 16; i += 8) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(values + i),
                                     _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
}

// 16 floats -> bfloat16, as in kernel_avx512.h.
VQLOGITS_TARGET inline void store_bfloat16(const float* values, uint16_t* to) {
  for (int i = 0; i < 16; i += 8) {
    const __m256i bits = _mm256_castps_si256(_mm256_loadu_ps(values + i));
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i high = _mm256_srli_epi32(sum, 16);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                     _mm_packus_epi32(_mm256_castsi256_si128(high),
                                      _mm256_extracti128_si256(high, 1)));
  }
}

}  // namespace vqlogits::bytes

#elif defined(__aarch64__) && (defined(__GNUC__) || defined(__clang__))
#include <arm_neon.h>
#define VQLOGITS_BYTES 1
#define VQLOGITS_TARGET  // every aarch64 processor has NEON

namespace vqlogits::bytes {

// Sums of 32 tokens, in two registers each.
struct Sums {
  uint16x8_t pairs[2], odd[2];
  uint8x16_t high[2];
};
struct Field {
  uint8x16_t half[2];
};

inline Sums zero() {
  const uint16x8_t none = vdupq_n_u16(0);
  return {{none, none}, {none, none}, {vdupq_n_u8(0), vdupq_n_u8(0)}};
}

inline void split(const uint8_t* codes, Field* first, Field* second) {
  for (int h = 0; h < 2; h++) {
    const uint8x16_t both = vld1q_u8(codes + 16 * h);
    first->half[h] = vandq_u8(both, vdupq_n_u8(15));
    second->half[h] = vshrq_n_u8(both, 4);
  }
}

inline void look_up(const int16_t* entries, const Field& field, Sums* sums) {
  const auto* table = reinterpret_cast<const uint8_t*>(entries);
  const uint8x16_t low = vld1q_u8(table), high = vld1q_u8(table + 16);
  for (int h = 0; h < 2; h++) {
    const uint16x8_t pairs = vreinterpretq_u16_u8(vqtbl1q_u8(low, field.half[h]));
    sums->pairs[h] = vaddq_u16(sums->pairs[h], pairs);
    sums->odd[h] = vsraq_n_u16(sums->odd[h], pairs, 8);
    sums->high[h] = vaddq_u8(sums->high[h], vqtbl1q_u8(high, field.half[h]));
  }
}

inline void add_eight(uint16x8_t sums, float scale, float* to) {
  const int16x8_t values = vreinterpretq_s16_u16(sums);
  const float32x4_t low = vcvtq_f32_s32(vmovl_s16(vget_low_s16(values)));
  const float32x4_t high = vcvtq_f32_s32(vmovl_s16(vget_high_s16(values)));
  vst1q_f32(to, vfmaq_n_f32(vld1q_f32(to), low, scale));
  vst1q_f32(to + 4, vfmaq_n_f32(vld1q_f32(to + 4), high, scale));
}

inline void add_scaled(const Sums& sums, float scale, float* to) {
  for (int h = 0; h < 2; h++) {
    const uint16x8_t high = vreinterpretq_u16_u8(sums.high[h]);
    const uint16x8_t even =
        vaddq_u16(sums.pairs[h], vshlq_n_u16(vsubq_u16(high, sums.odd[h]), 8));
    const uint16x8_t odd = vaddq_u16(sums.odd[h], vandq_u16(high, vdupq_n_u16(0xff00)));
    add_eight(vzip1q_u16(even, odd), scale, to + 16 * h);
    add_eight(vzip2q_u16(even, odd), scale, to + 16 * h + 8);
  }
}

inline void prefetch(const uint8_t* codes) { __builtin_prefetch(codes); }

// 16 floats -> float16.
inline void store_half(const float* values, uint16_t* to) {
  for (int i = 0; i < 16; i += 4) {
    vst1_u16(to + i, vreinterpret_u16_f16(vcvt_f16_f32(vld1q_f32(values + i))));
  }
}

// 16 floats -> bfloat16, as in kernel_avx512.h.
inline void store_bfloat16(const float* values, uint16_t* to) {
  for (int i = 0; i < 16; i += 4) {
    const uint32x4_t bits = vreinterpretq_u32_f32(vld1q_f32(values + i));
    const uint32x4_t odd = vandq_u32(vshrq_n_u32(bits, 16), vdupq_n_u32(1));
    const uint32x4_t sum = vaddq_u32(vaddq_u32(bits, vdupq_n_u32(0x7fff)), odd);
    vst1_u16(to + i, vshrn_n_u32(sum, 16));
  }
}

}  // namespace vqlogits::bytes

#else
#define VQLOGITS_BYTES 0
#endif

#if VQLOGITS_BYTES
#define VQLOGITS_PATH bytes

namespace vqlogits::bytes {

using S = Bytes;
constexpr int kRows = 4, kPairBlocks = 1, kSingleBlocks = 2;

struct FieldScores {
  float of[S::kFieldBits];
};

// The 16 partial sums of a field of sign codes, bit i of the entry being the sign of score i; returns
// the largest of them.
VQLOGITS_TARGET inline float sign_sums(const FieldScores& scores, float* sums) {
  float largest = 0.0f;
  sums[0] = 0.0f;
  for (int i = 0, size = 1; i < S::kFieldBits; i++, size *= 2) {
    const float score = scores.of[i];
    for (int entry = 0; entry < size; entry++) {
      sums[size + entry] = sums[entry] + score;
      sums[entry] -= score;
    }
    largest += score < 0 ? -score : score;
  }
  return largest;
}

// sums * factor, rounded -> a table as it is looked up: the low bytes, then the high ones.
VQLOGITS_TARGET inline void put_entries(const float* sums, float factor, int16_t* to) {
  auto* bytes = reinterpret_cast<uint8_t*>(to);
  for (int i = 0; i < S::kEntries; i++) {
    // Beside 1.5 * 2^23 the last bits of a float are those of the rounded integer.
    const float shifted = sums[i] * factor + 12582912.0f;
    uint32_t bits;
    std::memcpy(&bits, &shifted, sizeof bits);
    bytes[i] = static_cast<uint8_t>(bits);
    bytes[S::kEntries + i] = static_cast<uint8_t>(bits >> 8);
  }
}

// As in kernel_avx512.h.
template <int ROWS, int BLOCKS>
VQLOGITS_TARGET inline void add_segment(const uint8_t* codes, int64_t words, const int16_t* entries,
                                        int64_t row_entries, const float* scales,
                                        int64_t row_scales, float* partial) {
  Sums sums[ROWS][BLOCKS];
  for (int n = 0; n < ROWS; n++) {
    for (int b = 0; b < BLOCKS; b++) sums[n][b] = zero();
  }
  for (int64_t w = 0; w < words; w++) {
    Field field[BLOCKS][S::kFieldsPerWord];
    for (int b = 0; b < BLOCKS; b++) {
      const uint8_t* code = codes + (b * words + w) * kLanes;
      if (ROWS < 4) prefetch(code + 2048);
      split(code, &field[b][0], &field[b][1]);
    }
    for (int n = 0; n < ROWS; n++) {
      for (int f = 0; f < S::kFieldsPerWord; f++) {
        const int16_t* table =
            entries + n * row_entries + (w * S::kFieldsPerWord + f) * S::kEntries;
        for (int b = 0; b < BLOCKS; b++) look_up(table, field[b][f], &sums[n][b]);
      }
    }
  }
  for (int n = 0; n < ROWS; n++) {
    for (int b = 0; b < BLOCKS; b++) {
      add_scaled(sums[n][b], scales[n * row_scales], partial + n * kTaskTokens + b * kLanes);
    }
  }
}

}  // namespace vqlogits::bytes

#include "tables_kernel.h"
#undef VQLOGITS_TARGET
#undef VQLOGITS_PATH
#endif

// How fast the processor looks up 16-bit partial sums in registers, with nothing else to do: the
// permutation and the addition of the kernel, on codes that are there already.
#include <chrono>
#include <cstdint>
#if defined(__AVX512BW__) || defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {
constexpr int kChains = 8;  // enough to hide the latency of both instructions
}

// Look-ups a second of one thread; 0 where there is no kernel for the processor.
extern "C" double lookups_per_second(std::int64_t rounds) {
  const auto begin = std::chrono::steady_clock::now();
#if defined(__AVX512BW__)
  constexpr double kEach = 32;
  __m512i sums[kChains], codes = _mm512_set1_epi16(3), table = _mm512_set1_epi16(5);
  for (auto& sum : sums) sum = _mm512_setzero_si512();
  for (std::int64_t i = 0; i < rounds; ++i) {
    for (auto& sum : sums) {
      asm volatile("" : "+v"(codes));
      sum = _mm512_add_epi16(sum, _mm512_permutexvar_epi16(codes, table));
    }
  }
  for (auto& sum : sums) asm volatile("" : "+v"(sum));
#elif defined(__AVX2__)
  constexpr double kEach = 32;  // two shuffles of bytes: the low and the high half of a sum
  __m256i low[kChains], high[kChains], codes = _mm256_set1_epi8(3), table = _mm256_set1_epi8(5);
  for (int c = 0; c < kChains; ++c) low[c] = high[c] = _mm256_setzero_si256();
  for (std::int64_t i = 0; i < rounds; ++i) {
    for (int c = 0; c < kChains; ++c) {
      asm volatile("" : "+x"(codes));
      low[c] = _mm256_add_epi16(low[c], _mm256_shuffle_epi8(table, codes));
      asm volatile("" : "+x"(codes));
      high[c] = _mm256_add_epi16(high[c], _mm256_shuffle_epi8(table, codes));
    }
  }
  for (int c = 0; c < kChains; ++c) asm volatile("" : "+x"(low[c]), "+x"(high[c]));
#elif defined(__aarch64__)
  constexpr double kEach = 16;
  uint8x16_t low[kChains], high[kChains], codes = vdupq_n_u8(3), table = vdupq_n_u8(5);
  for (int c = 0; c < kChains; ++c) low[c] = high[c] = vdupq_n_u8(0);
  for (std::int64_t i = 0; i < rounds; ++i) {
    for (int c = 0; c < kChains; ++c) {
      asm volatile("" : "+w"(codes));
      low[c] = vaddq_u8(low[c], vqtbl1q_u8(table, codes));
      asm volatile("" : "+w"(codes));
      high[c] = vaddq_u8(high[c], vqtbl1q_u8(table, codes));
    }
  }
  for (int c = 0; c < kChains; ++c) asm volatile("" : "+w"(low[c]), "+w"(high[c]));
#else
  constexpr double kEach = 0;
  (void)rounds;
#endif
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
  return kEach * kChains * static_cast<double>(rounds) / seconds.count();
}

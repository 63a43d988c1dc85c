// Numbers of the types that PyTorch hands over, and sums of their products.
#pragma once

#include <cstdint>
#include <cstring>

namespace vqlogits {

enum class Output : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct BFloat16 {
  uint16_t bits;
};
inline float to_float(float value) { return value; }
inline float to_float(BFloat16 value) {
  const uint32_t bits = uint32_t{value.bits} << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

constexpr uint32_t kNaN = 0x7fc0;  // of bfloat16; to round one could make it a zero
inline void set(float* to, float value) { *to = value; }
inline void set(BFloat16* to, float value) {  // rounded to nearest even, as in kernel_avx512.h
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits = value == value ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : kNaN;
  to->bits = static_cast<uint16_t>(bits);
}

// Four at a time, by what GCC and Clang have for any processor.
constexpr int kFour = 4;
typedef float Floats __attribute__((vector_size(kFour * sizeof(float))));
typedef uint32_t Words32 __attribute__((vector_size(kFour * sizeof(uint32_t))));
typedef uint16_t Words16 __attribute__((vector_size(kFour * sizeof(uint16_t))));

inline Floats load_four(const float* from) {
  Floats result;
  std::memcpy(&result, from, sizeof result);
  return result;
}
inline Floats load_four(const BFloat16* from) {
  Words16 halves;
  std::memcpy(&halves, from, sizeof halves);
  const Words32 bits = __builtin_convertvector(halves, Words32) << 16;
  Floats result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}
inline void set_four(float* to, Floats values) { std::memcpy(to, &values, sizeof values); }
inline void set_four(BFloat16* to, Floats values) {
  Words32 bits;
  std::memcpy(&bits, &values, sizeof bits);
  const Words32 none = {kNaN, kNaN, kNaN, kNaN};
  bits = values == values ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : none;
  const Words16 halves = __builtin_convertvector(bits, Words16);
  std::memcpy(to, &halves, sizeof halves);
}

// A vector in either type, read here and there, `_Numbers` in ops/cpu_refining.py.
struct Numbers {
  const void* data;
  int32_t half;  // 1: bfloat16, 0: float32

  float operator[](int64_t i) const {
    return half ? to_float(static_cast<const BFloat16*>(data)[i]) : static_cast<const float*>(data)[i];
  }
};

// A dot product, in 16 sums. Always inlined, to be compiled for the processor that its caller is.
template <typename T>
__attribute__((always_inline)) inline float dot(const float* a, const T* b, int64_t size) {
  float sums[16] = {}, sum = 0.0f;
  int64_t i = 0;
  for (; i + 16 <= size; i += 16) {
    for (int lane = 0; lane < 16; lane++) sums[lane] += a[i + lane] * to_float(b[i + lane]);
  }
  for (int lane = 0; lane < 16; lane++) sum += sums[lane];
  for (; i < size; i++) sum += a[i] * to_float(b[i]);
  return sum;
}

}  // namespace vqlogits

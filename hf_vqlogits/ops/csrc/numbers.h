// Numbers of the types that PyTorch hands over, and sums of their products.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace vqlogits {

// `TYPES` in ops/cpu.py.
enum class Type : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

// Float16 as float32, of any kind of numbers and words: F one or some floats, W as many words. Their
// exponents differ by 112; infinity and NaN have the largest of either.
template <typename F, typename W>
F widened(W bits) {
  const W sign = (bits & 0x8000u) << 16, rest = (bits & 0x7fffu) << 13;
  F value;
  std::memcpy(&value, &rest, sizeof value);
  value *= 0x1p112f;
  W result;
  std::memcpy(&result, &value, sizeof result);
  result |= sign | (rest >= 0x0f800000u ? (rest & 0) | 0x7f800000u : rest & 0);
  std::memcpy(&value, &result, sizeof value);
  return value;
}
// The reverse, rounded to nearest even.
template <typename F, typename W>
W narrowed(F value) {
  W bits;
  std::memcpy(&bits, &value, sizeof bits);
  const W sign = bits & 0x80000000u, size = bits ^ sign;
  // Too small for a normal number: beside 0.5 the last digits of a float are those wanted.
  F small;
  std::memcpy(&small, &size, sizeof small);
  small += 0.5f;
  W small_bits;
  std::memcpy(&small_bits, &small, sizeof small_bits);
  const W none = bits & 0;
  const W normal = (size - 0x37fff001u + ((size >> 13) & 1u)) >> 13;
  const W special = size > 0x7f800000u ? none | 0x7e00u : none | 0x7c00u;
  W result = size < 0x38800000u ? small_bits - 0x3f000000u : normal;
  result = size >= 0x47800000u ? special : result;
  return result | (sign >> 16);
}

inline float to_float(float value) { return value; }
inline float to_float(BFloat16 value) {
  const uint32_t bits = uint32_t{value.bits} << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}
inline float to_float(Float16 value) { return widened<float, uint32_t>(value.bits); }

constexpr uint32_t kNaN = 0x7fc0;  // of bfloat16; to round one could make it a zero
inline void set(float* to, float value) { *to = value; }
inline void set(BFloat16* to, float value) {  // rounded to nearest even, as in kernel_avx512.h
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits = value == value ? (bits + 0x7fff + ((bits >> 16) & 1)) >> 16 : kNaN;
  to->bits = static_cast<uint16_t>(bits);
}
inline void set(Float16* to, float value) {
  to->bits = static_cast<uint16_t>(narrowed<float, uint32_t>(value));
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
inline Floats load_four(const Float16* from) {
  Words16 halves;
  std::memcpy(&halves, from, sizeof halves);
  return widened<Floats, Words32>(__builtin_convertvector(halves, Words32));
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
inline void set_four(Float16* to, Floats values) {
  const Words16 halves = __builtin_convertvector(narrowed<Floats, Words32>(values), Words16);
  std::memcpy(to, &halves, sizeof halves);
}

// Calls `function` with a null pointer to the numbers of a type.
template <typename Function>
auto with_type(Type type, const Function& function) {
  switch (type) {
    case Type::kBFloat16:
      return function(static_cast<BFloat16*>(nullptr));
    case Type::kFloat16:
      return function(static_cast<Float16*>(nullptr));
    default:
      return function(static_cast<float*>(nullptr));
  }
}

// A vector in any type, read here and there, `_Numbers` in ops/cpu_refining.py.
struct Numbers {
  const void* data;
  Type type;

  float operator[](int64_t i) const {
    return with_type(type, [&](auto* of) {
      return to_float(static_cast<const std::remove_pointer_t<decltype(of)>*>(data)[i]);
    });
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

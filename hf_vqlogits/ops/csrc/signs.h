// Packed signs written out as numbers, for products with the matrix that they stand for.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "parallel.h"

namespace vqlogits {

// Numbers of eight signs for each byte, the lowest bit first. `Number` is the bit pattern of one.
template <typename Number>
struct SignsOfBytes {
  alignas(64) Number rows[256][8];

  SignsOfBytes(Number minus, Number plus) {
    for (int byte = 0; byte < 256; byte++) {
      for (int bit = 0; bit < 8; bit++) rows[byte][bit] = byte >> bit & 1 ? plus : minus;
    }
  }
};

constexpr int64_t kUnpackBytes = 1 << 14;  // of codes a task

// codes [bytes] -> out [8 bytes] of +1 and -1.
template <typename Number>
void unpack(const SignsOfBytes<Number>& signs, const uint8_t* codes, int64_t bytes, Number* out,
            int threads) {
  const int64_t tasks = (bytes + kUnpackBytes - 1) / kUnpackBytes;
  parallel_for(tasks, threads, [=, &signs](int64_t task) {
    const int64_t end = std::min(bytes, (task + 1) * kUnpackBytes);
    for (int64_t i = task * kUnpackBytes; i < end; i++) {
      std::memcpy(out + 8 * i, signs.rows[codes[i]], sizeof signs.rows[0]);
    }
  });
}

}  // namespace vqlogits

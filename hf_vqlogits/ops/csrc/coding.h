// What the kernels know about the codes of one head.
//
// Letters as everywhere in the package: N rows, V vocabulary, G codebooks (R for sign codes), K
// codewords.
#pragma once

#include <cstdint>

namespace vqlogits {

// Mirrored field by field by `_Coding` in ops/cpu.py.
struct Coding {
  int64_t vocabulary;  // V
  int64_t codebooks;   // R for sign codes, G for index codes
  int64_t codewords;   // 2 for sign codes, K for index codes
  int32_t sign;        // 1: codes are bits [V, ceil(R / 8)]; 0: codes are indices [V, G]
  int32_t code_bytes;  // 1 (uint8) or 4 (int32)

  // Scores are [N, R] for sign codes, [N, G, K] for index codes.
  int64_t scores_per_row() const { return sign ? codebooks : codebooks * codewords; }
  int64_t codes_per_token() const { return sign ? (codebooks + 7) / 8 : codebooks; }
};

}  // namespace vqlogits

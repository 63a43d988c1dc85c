// Compares the NEON path with the portable one; for processors of another kind than the one at hand,
// run by tests/ops/test_neon.py in an emulator. Prints what is wrong and returns 1.
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "../../hf_vqlogits/ops/csrc/expand.cpp"

namespace {

int failures = 0;

void check(bool right, const char* what, int64_t rows, int64_t vocabulary, int64_t codebooks) {
  if (right) return;
  failures++;
  std::printf("%s: N %d, V %d, R or G %d\n", what, static_cast<int>(rows),
              static_cast<int>(vocabulary), static_cast<int>(codebooks));
}

void compare(int64_t rows, int64_t vocabulary, int64_t codebooks, int64_t codewords) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  const bool sign = codewords == 2;
  const Coding coding{vocabulary, codebooks, codewords, sign, 1};
  std::vector<float> scores(rows * coding.scores_per_row());
  for (float& score : scores) score = normal(random);
  std::vector<uint8_t> codes(vocabulary * coding.codes_per_token());
  for (uint8_t& code : codes) code = static_cast<uint8_t>(sign ? random() : random() % codewords);
  if (sign && codebooks % 8) {
    for (int64_t v = 0; v < vocabulary; v++) {
      codes[(v + 1) * coding.codes_per_token() - 1] &= (1 << codebooks % 8) - 1;
    }
  }
  std::vector<uint8_t> tiles(vqlogits_tile_bytes(kNeon, &coding));
  vqlogits_tile(kNeon, &coding, codes.data(), tiles.data(), 2);
  std::vector<float> want(rows * vocabulary), got(rows * vocabulary);
  std::vector<uint16_t> half(rows * vocabulary), brain(rows * vocabulary);
  vqlogits_expand_plain(&coding, scores.data(), codes.data(), rows, want.data(), 2);
  vqlogits_expand_tiles(kNeon, &coding, scores.data(), tiles.data(), nullptr, rows, 0, got.data(), 2);
  vqlogits_expand_tiles(kNeon, &coding, scores.data(), tiles.data(), nullptr, rows, 2, half.data(), 2);
  vqlogits_expand_tiles(kNeon, &coding, scores.data(), tiles.data(), nullptr, rows, 1, brain.data(), 2);
  // Half a scale for each of the look-ups, and the scale is at most their whole sum over 32,675.
  for (int64_t n = 0; n < rows; n++) {
    double sum = 0;
    for (int64_t i = 0; i < coding.scores_per_row(); i++) {
      sum += std::fabs(scores[n * coding.scores_per_row() + i]);
    }
    for (int64_t v = 0; v < vocabulary; v++) {
      const float one = want[n * vocabulary + v], other = got[n * vocabulary + v];
      check(std::fabs(one - other) <= sum * 25 / 32675 + 1e-5, "error", rows, vocabulary, codebooks);
      __fp16 rounded;
      std::memcpy(&rounded, &half[n * vocabulary + v], sizeof rounded);
      check(static_cast<float>(rounded) == static_cast<float>(static_cast<__fp16>(other)),
            "float16", rows, vocabulary, codebooks);
      uint32_t bits;
      std::memcpy(&bits, &other, sizeof bits);
      check(brain[n * vocabulary + v] == (bits + 0x7fff + (bits >> 16 & 1)) >> 16, "bfloat16", rows,
            vocabulary, codebooks);
    }
  }
}

}  // namespace

int main() {
  if (!vqlogits_has(kNeon)) return 2;
  const int64_t shapes[][4] = {{1, 515, 7, 2},   {7, 333, 31, 2},  {3, 77, 983, 2},
                               {2, 1500, 491, 2}, {5, 600, 40, 3}, {6, 300, 12, 16}};
  for (const auto& shape : shapes) compare(shape[0], shape[1], shape[2], shape[3]);
  return failures ? 1 : 0;
}

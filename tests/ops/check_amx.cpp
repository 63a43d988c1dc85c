// Compares the AMX path, its tile instructions replaced by portable code, with the portable path; for
// processors with AVX-512 alone, run by tests/ops/test_amx.py. Prints what is wrong and returns 1.
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

namespace tiles {

struct Tile {
  int rows, row_bytes;
  uint8_t data[1024];
};
thread_local Tile registers[8];
thread_local bool configured = false;
bool misused = false;

void load_config(const void* from) {
  const uint8_t* bytes = static_cast<const uint8_t*>(from);
  for (int t = 0; t < 8; t++) {
    uint16_t row_bytes;
    std::memcpy(&row_bytes, bytes + 16 + 2 * t, 2);
    registers[t].row_bytes = row_bytes;
    registers[t].rows = bytes[48 + t];
    misused |= row_bytes > 64 || registers[t].rows > 16 || bytes[0] != 1;
  }
  configured = true;
}

void release() { configured = false; }

void zero(int t) { std::memset(registers[t].data, 0, sizeof registers[t].data); }

void load(int t, const void* from, int64_t stride) {
  misused |= !configured;
  for (int row = 0; row < registers[t].rows; row++) {
    std::memcpy(registers[t].data + 64 * row, static_cast<const char*>(from) + row * stride,
                registers[t].row_bytes);
  }
}

void store(int t, void* to, int64_t stride) {
  misused |= !configured;
  for (int row = 0; row < registers[t].rows; row++) {
    std::memcpy(static_cast<char*>(to) + row * stride, registers[t].data + 64 * row,
                registers[t].row_bytes);
  }
}

// c[m][n] += sum over k of a[m][k] b[k / 4][n][k % 4], signed bytes.
void multiply(int c, int a, int b) {
  misused |= !configured || registers[a].rows != registers[c].rows ||
             registers[a].row_bytes != 4 * registers[b].rows ||
             registers[b].row_bytes != registers[c].row_bytes;
  for (int m = 0; m < registers[c].rows; m++) {
    for (int n = 0; n < registers[c].row_bytes / 4; n++) {
      int32_t sum;
      std::memcpy(&sum, registers[c].data + 64 * m + 4 * n, 4);
      for (int k = 0; k < registers[a].row_bytes; k++) {
        sum += static_cast<int8_t>(registers[a].data[64 * m + k]) *
               static_cast<int8_t>(registers[b].data[64 * (k / 4) + 4 * n + k % 4]);
      }
      std::memcpy(registers[c].data + 64 * m + 4 * n, &sum, 4);
    }
  }
}

}  // namespace tiles

#undef _tile_loadconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbssd
#define _tile_loadconfig tiles::load_config
#define _tile_release tiles::release
#define _tile_zero tiles::zero
#define _tile_loadd tiles::load
#define _tile_stored tiles::store
#define _tile_dpbssd tiles::multiply

#include "../../hf_vqlogits/ops/csrc/expand.cpp"

namespace {

int failures = 0;

void check(bool right, const char* what, int64_t rows, int64_t vocabulary, int64_t codebooks) {
  if (right) return;
  failures++;
  std::printf("%s: N %d, V %d, R %d\n", what, static_cast<int>(rows), static_cast<int>(vocabulary),
              static_cast<int>(codebooks));
}

std::vector<uint8_t> random_codes(std::mt19937& random, int64_t tokens, const Coding& coding) {
  std::vector<uint8_t> codes(tokens * coding.codes_per_token());
  for (uint8_t& code : codes) code = static_cast<uint8_t>(random());
  return codes;
}

// Every third token has a second code.
void compare(int64_t rows, int64_t vocabulary, int64_t codebooks) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  const Coding coding{vocabulary, codebooks, 2, 1, 1};
  std::vector<float> scores(rows * codebooks);
  for (float& score : scores) score = normal(random);
  const auto codes = random_codes(random, vocabulary, coding);
  std::vector<uint64_t> tiles(vqlogits_tile_bytes(kAmx, &coding) / 8);
  vqlogits_tile(kAmx, &coding, codes.data(), tiles.data(), 2);

  const int64_t tasks = (vocabulary + 511) / 512;
  std::vector<int32_t> ids;
  std::vector<int64_t> begins{0}, blocks{0};
  for (int64_t task = 0; task < tasks; task++) {
    for (int64_t v = task * 512; v < std::min(vocabulary, task * 512 + 512); v++) {
      if (v % 3 == 0) ids.push_back(static_cast<int32_t>(v));
    }
    begins.push_back(static_cast<int64_t>(ids.size()));
    blocks.push_back(blocks.back() + (begins[task + 1] - begins[task] + 31) / 32);
  }
  const auto second = random_codes(random, static_cast<int64_t>(ids.size()), coding);
  std::vector<uint64_t> second_tiles(tiles.size() / (tasks * 512) * 32 * blocks.back());
  const Fine fine{ids.data(), begins.data(), blocks.data(), second_tiles.data(), 0.5f};
  vqlogits_tile_fine(kAmx, &coding, &fine, second.data(), second_tiles.data(), 2);

  std::vector<float> want(rows * vocabulary), got(want.size()), add(rows * ids.size());
  vqlogits_expand_plain(&coding, scores.data(), codes.data(), rows, want.data(), 2);
  Coding of_second = coding;
  of_second.vocabulary = static_cast<int64_t>(ids.size());
  vqlogits_expand_plain(&of_second, scores.data(), second.data(), rows, add.data(), 2);
  for (const Fine* with : {static_cast<const Fine*>(nullptr), &fine}) {
    vqlogits_expand_tiles(kAmx, &coding, scores.data(), tiles.data(), with, rows, 0, got.data(), 2);
    for (int64_t n = 0; n < rows; n++) {
      float largest = 0;
      for (int64_t r = 0; r < codebooks; r++) {
        largest = std::max(largest, std::fabs(scores[n * codebooks + r]));
      }
      for (size_t i = 0; with && i < ids.size(); i++) {
        want[n * vocabulary + ids[i]] += 0.5f * add[n * ids.size() + i];
      }
      const float bound = 1.5f * static_cast<float>(codebooks) * largest * (0.5f / 32639 + 1e-6f);
      for (int64_t v = 0; v < vocabulary; v++) {
        const float error = got[n * vocabulary + v] - want[n * vocabulary + v];
        check(std::fabs(error) <= bound, with ? "second codes" : "codes", rows, vocabulary,
              codebooks);
      }
    }
  }
}

}  // namespace

int main() {
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw")) return 77;
  for (int64_t rows : {1, 16, 17, 130}) {
    for (int64_t vocabulary : {1, 70, 1100}) {
      for (int64_t codebooks : {1, 64, 500, 513}) compare(rows, vocabulary, codebooks);
    }
  }
  if (tiles::misused) std::printf("tiles of shapes that do not fit, or without a configuration\n");
  if (tiles::configured) std::printf("tiles are still configured\n");
  return failures || tiles::misused || tiles::configured;
}

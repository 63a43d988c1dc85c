// AMX: sign codes of many rows as products of tiles of 8-bit integers.
//
// Tables cost a look-up for five bits of each token and row. From some rows on a product with the
// +-1 matrix costs less, where the processor multiplies a tile of 16 rows, 64 codebooks and 16 tokens
// in the time of 16 look-ups: signs are written out once for all rows of a batch, from bits, and stay
// in the core's cache. V 50,257, R = 500, 2 cores, ms beside those with tables: 1.7 and 2.4 for 32
// rows, 3.8 and 5.5 for 64, 7.3 and 12.5 for 128. A core has one unit for such products, whatever the
// number of its threads: while others used it, 3.3 and 3.6, 5.6 and 7.1, 11.6 and 13.9.
//
// Precision. A row's scores become integers of up to 32,639 = 127 * 256 + 127 steps of a scale of its
// own, each the sum of 256 times one 8-bit integer and another, and both are multiplied exactly. A
// logit is off by at most R * scale / 2 = R * (largest score) / 65,278, with normal scores by some
// 3e-5 of the deviation of a row's logits. With fitted heads, whose first scores are by far the
// largest, it is about what tables lose (docs/kernels.md).
#pragma once

#include "kernel_avx512.h"

#if VQLOGITS_X86 && defined(__linux__) && (defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11)
#define VQLOGITS_AMX 1
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#define VQLOGITS_AMX_TARGET __attribute__((target("avx512f,avx512bw,amx-tile,amx-int8")))

namespace vqlogits::amx {

constexpr int64_t kSide = 16;   // rows, and tokens, of a tile
constexpr int64_t kDepth = 64;  // codebooks of a tile
constexpr int64_t kTile = kSide * kDepth;
// Of codebooks, whose products are summed as integers: their sums times 256 are exact in float32.
constexpr int64_t kChunkTiles = 8;
constexpr int64_t kGroupBlocks = 4;  // of 16 tokens, whose signs are written out at a time
constexpr int64_t kGroupTokens = kGroupBlocks * kSide;
constexpr int64_t kPair = kLanes / kSide;  // blocks that are multiplied together, and `Fine` counts
constexpr int64_t kBatchRows = 128;
constexpr float kLargest = 127 * 256 + 127;

// Whether the processor has it and the system lets this process use it.
inline bool available() {
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  constexpr unsigned kTileAndInt8 = 1u << 24 | 1u << 25;
  if ((edx & kTileAndInt8) != kTileAndInt8) return false;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw")) return false;
  constexpr long kAskForPermission = 0x1023, kTileData = 18;  // of arch_prctl
  return syscall(SYS_arch_prctl, kAskForPermission, kTileData) == 0;
}

inline int64_t depth_tiles(const Coding& coding) { return (coding.codebooks + kDepth - 1) / kDepth; }
inline int64_t tasks_of(const Coding& coding) {
  return (coding.vocabulary + kTaskTokens - 1) / kTaskTokens;
}

// Rows [begin, end) of packed signs -> `blocks` blocks [block][tile of codebooks][16 words]: word r
// holds bits 4 r to 4 r + 3 of 16 tokens, in the order of a tile's row.
inline void tile_rows(const Coding& coding, const uint8_t* codes, int64_t begin, int64_t end,
                      int64_t blocks, uint64_t* to) {
  const int64_t bytes = coding.codes_per_token();
  for (int64_t block = 0; block < blocks; block++) {
    for (int64_t byte = 0; byte < depth_tiles(coding) * kDepth / 8; byte++, to += 2) {
      to[0] = to[1] = 0;
      for (int64_t lane = 0; lane < kSide && byte < bytes; lane++) {
        const int64_t v = begin + block * kSide + lane;
        const uint64_t bits = v < end ? codes[v * bytes + byte] : 0;
        to[0] |= (bits & 15) << (4 * lane);
        to[1] |= (bits >> 4) << (4 * lane);
      }
    }
  }
}

// Scores of a batch of rows as integers.
struct Planes {
  int64_t rows, panels, panel_rows, tiles;
  std::vector<int8_t> parts;  // [panel][tile of codebooks][times 256, times 1][16 rows][64]
  std::vector<float> scales;  // [panels * panel_rows], NaN where a score is not finite

  Planes(const Coding& coding, int64_t rows)
      : rows(rows),
        panels((rows + kSide - 1) / kSide),
        panel_rows((rows + panels - 1) / panels),
        tiles(depth_tiles(coding)),
        parts(panels * tiles * 2 * kTile),
        scales(panels * panel_rows) {}

  const int8_t* part(int64_t panel, int64_t tile) const {
    return parts.data() + (panel * tiles + tile) * 2 * kTile;
  }

  VQLOGITS_AMX_TARGET void set(const Coding& coding, int64_t row, const float* scores) {
    if (!avx512::all_finite(scores, coding.codebooks)) {
      scales[row] = std::numeric_limits<float>::quiet_NaN();
      return;
    }
    __m512 largest = _mm512_setzero_ps();
    for (int64_t r = 0; r < coding.codebooks; r += 16) {
      largest = _mm512_max_ps(largest, _mm512_abs_ps(some_scores(coding, scores, r)));
    }
    // Scores that are all zero, or too small for a normal scale, give zeros and no NaN.
    scales[row] = std::max(_mm512_reduce_max_ps(largest) / kLargest, FLT_MIN);
    const __m512 factor = _mm512_set1_ps(1.0f / scales[row]);
    int8_t* to = parts.data() + row / panel_rows * tiles * 2 * kTile + row % panel_rows * kDepth;
    for (int64_t r = 0; r < coding.codebooks; r += 16) {
      const __m512i steps =
          _mm512_cvtps_epi32(_mm512_mul_ps(some_scores(coding, scores, r), factor));
      const __m512i high = _mm512_srai_epi32(_mm512_add_epi32(steps, _mm512_set1_epi32(128)), 8);
      const __m512i low = _mm512_sub_epi32(steps, _mm512_slli_epi32(high, 8));
      auto* at = reinterpret_cast<__m128i*>(to + r / kDepth * 2 * kTile + r % kDepth);
      _mm_storeu_si128(at, _mm512_cvtepi32_epi8(high));
      _mm_storeu_si128(at + kTile / 16, _mm512_cvtepi32_epi8(low));
    }
  }

 private:
  // Scores r to r + 15, zero behind the last.
  VQLOGITS_AMX_TARGET static __m512 some_scores(const Coding& coding, const float* scores,
                                                int64_t r) {
    const int64_t left = std::min<int64_t>(coding.codebooks - r, 16);
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << left) - 1), scores + r);
  }
};

// What a thread needs beside tile registers.
struct Room {
  alignas(64) int8_t signs[kChunkTiles * kGroupBlocks * kTile];  // [tile of codebooks][block]
  alignas(64) int32_t sums[4][kSide * kSide];
  alignas(64) float fine[kBatchRows * kGroupTokens];
  alignas(64) float logits[kBatchRows * kTaskTokens];
};
inline thread_local Room room_of_thread;

struct alignas(64) Shapes {
  uint8_t palette = 1, start = 0, unused[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

VQLOGITS_AMX_TARGET inline void configure(int64_t panel_rows) {
  Shapes shapes;
  for (int tile = 0; tile < 8; tile++) {  // sums 0 to 3, scores 4 and 5, signs 6 and 7
    shapes.row_bytes[tile] = kDepth;
    shapes.rows[tile] = static_cast<uint8_t>(tile < 6 ? panel_rows : kSide);
  }
  _tile_loadconfig(&shapes);
}

// Words of `blocks` blocks, one tile of codebooks after the other from `first` -> room.signs.
VQLOGITS_AMX_TARGET inline void write_signs(const uint64_t* words, int64_t blocks, int64_t tiles,
                                            int64_t first, int64_t count, Room& room) {
  const __m512i minus = _mm512_set1_epi8(-1), plus = _mm512_set1_epi8(1);
  for (int64_t block = 0; block < blocks; block++) {
    const uint64_t* from = words + (block * tiles + first) * kSide;
    for (int64_t tile = 0; tile < count; tile++) {
      int8_t* to = room.signs + (tile * kGroupBlocks + block) * kTile;
      for (int64_t r = 0; r < kSide; r++) {
        _mm512_store_si512(to + r * kDepth,
                           _mm512_mask_blend_epi8(from[tile * kSide + r], minus, plus));
      }
    }
  }
}

// to[row][token] = or += what a panel's scores of some tiles of codebooks add up to for 32 tokens,
// whose signs are in room.signs from `block` on.
VQLOGITS_AMX_TARGET inline void multiply(const Planes& planes, int64_t panel, int64_t first,
                                         int64_t count, int64_t block, Room& room, float* to,
                                         int64_t stride) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const int8_t* scores = planes.part(panel, first);
  const int8_t* signs = room.signs + block * kTile;
  for (int64_t tile = 0; tile < count; tile++) {
    _tile_loadd(4, scores, kDepth);
    _tile_loadd(6, signs, kDepth);
    _tile_dpbssd(0, 4, 6);
    _tile_loadd(7, signs + kTile, kDepth);
    _tile_dpbssd(1, 4, 7);
    _tile_loadd(5, scores + kTile, kDepth);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
    scores += 2 * kTile;
    signs += kGroupBlocks * kTile;
  }
  _tile_stored(0, room.sums[0], 4 * kSide);
  _tile_stored(1, room.sums[1], 4 * kSide);
  _tile_stored(2, room.sums[2], 4 * kSide);
  _tile_stored(3, room.sums[3], 4 * kSide);
  const int64_t row = panel * planes.panel_rows;
  for (int64_t n = 0; n < planes.panel_rows; n++) {  // those behind the last row are zero
    const __m512 scale = _mm512_set1_ps(planes.scales[row + n]);
    for (int half = 0; half < 2; half++) {
      const __m512 high = _mm512_cvtepi32_ps(_mm512_load_si512(room.sums[half] + n * kSide));
      const __m512 low = _mm512_cvtepi32_ps(_mm512_load_si512(room.sums[2 + half] + n * kSide));
      const __m512 sum = _mm512_fmadd_ps(high, _mm512_set1_ps(256.0f), low);
      float* at = to + (row + n) * stride + half * kSide;
      _mm512_storeu_ps(at, first ? _mm512_fmadd_ps(sum, scale, _mm512_loadu_ps(at))
                                 : _mm512_mul_ps(sum, scale));
    }
  }
}

// to[row][token] = sums of all rows for `blocks` blocks, an even number and at most a group's.
VQLOGITS_AMX_TARGET inline void multiply_group(const Planes& planes, const uint64_t* words,
                                               int64_t blocks, Room& room, float* to,
                                               int64_t stride) {
  for (int64_t first = 0; first < planes.tiles; first += kChunkTiles) {
    const int64_t count = std::min(kChunkTiles, planes.tiles - first);
    write_signs(words, blocks, planes.tiles, first, count, room);
    for (int64_t panel = 0; panel < planes.panels; panel++) {
      for (int64_t block = 0; block < blocks; block += kPair) {
        multiply(planes, panel, first, count, block, room, to + block * kSide, stride);
      }
    }
  }
}

// Logits of all rows for the tokens of one task.
VQLOGITS_AMX_TARGET inline void expand_task(const Coding& coding, const Planes& planes,
                                            const uint64_t* words, const Fine* fine, int64_t task,
                                            const avx512::Store& store) {
  Room& room = room_of_thread;
  configure(planes.panel_rows);
  const int64_t first = task * kTaskTokens, block_words = planes.tiles * kSide;
  const int64_t count = std::min(kTaskTokens, coding.vocabulary - first);
  const uint64_t* own = words + first / kSide * block_words;
  for (int64_t v = 0; v < count; v += kGroupTokens) {
    multiply_group(planes, own + v / kSide * block_words, kGroupBlocks, room, room.logits + v,
                   kTaskTokens);
  }
  if (fine) {
    const int64_t begin = fine->begins[task], seconds = fine->begins[task + 1] - begin;
    own = static_cast<const uint64_t*>(fine->tiles) + fine->blocks[task] * kPair * block_words;
    for (int64_t i = 0; i < seconds; i += kGroupTokens) {
      const int64_t some = std::min(kGroupTokens, seconds - i);
      multiply_group(planes, own + i / kSide * block_words, (some + kLanes - 1) / kLanes * kPair, room,
                     room.fine, kGroupTokens);
      for (int64_t n = 0; n < planes.rows; n++) {
        for (int64_t token = 0; token < some; token++) {
          room.logits[n * kTaskTokens + fine->ids[begin + i + token] - first] +=
              fine->factor * room.fine[n * kGroupTokens + token];
        }
      }
    }
  }
  _tile_release();
  for (int64_t n = 0; n < planes.rows; n++) store(n, first, count, room.logits + n * kTaskTokens);
}

// Logits of up to kBatchRows rows.
inline void expand_batch(const Coding& coding, const float* scores, const void* tiles,
                         const Fine* fine, int64_t rows, const avx512::Store& store, int threads) {
  Planes planes(coding, rows);
  const auto make_planes = [&](int64_t row) {
    planes.set(coding, row, scores + row * coding.codebooks);
  };
  const auto make_logits = [&](int64_t task) {
    expand_task(coding, planes, static_cast<const uint64_t*>(tiles), fine, task, store);
  };
  Phase prepared(planes.rows, make_planes);
  Phase expanded(tasks_of(coding), make_logits);
  parallel_phases(threads, prepared, expanded);
}

// How many bytes tiled codes take.
inline int64_t tile_bytes(const Coding& coding) {
  return tasks_of(coding) * kTaskTokens * depth_tiles(coding) * (kDepth / 8);
}

// codes as stored -> tiles [task][block][tile of codebooks][16 words].
inline void tile(const Coding& coding, const void* codes, void* tiles, int threads) {
  const int64_t task_words = kTaskTokens * depth_tiles(coding);
  parallel_for(tasks_of(coding), threads, [&](int64_t task) {
    tile_rows(coding, static_cast<const uint8_t*>(codes), task * kTaskTokens, coding.vocabulary,
              kTaskTokens / kSide, static_cast<uint64_t*>(tiles) + task * task_words);
  });
}

// Second codes as stored, in the order of `fine.ids` -> `tiles`.
inline void tile_fine(const Coding& coding, const Fine& fine, const void* codes, void* tiles,
                      int threads) {
  parallel_for(tasks_of(coding), threads, [&](int64_t task) {
    const int64_t first = fine.blocks[task], blocks = fine.blocks[task + 1] - first;
    tile_rows(coding, static_cast<const uint8_t*>(codes), fine.begins[task], fine.begins[task + 1],
              blocks * kPair,
              static_cast<uint64_t*>(tiles) + first * kLanes * depth_tiles(coding));
  });
}

// What the interface calls (expand.cpp), as in tables_kernel.h.
struct Kernel {
  static void expand(const Coding& coding, const float* scores, const void* tiles, const Fine* fine,
                     int64_t rows, Type type, void* out, int threads) {
    const int64_t row_bytes = coding.vocabulary * (type == Type::kFloat32 ? 4 : 2);
    for (int64_t first = 0; first < rows; first += kBatchRows) {
      const avx512::Store store{type, static_cast<char*>(out) + first * row_bytes,
                                coding.vocabulary};
      expand_batch(coding, scores + first * coding.codebooks, tiles, fine,
                   std::min(kBatchRows, rows - first), store, threads);
    }
  }
};

}  // namespace vqlogits::amx

#else
#define VQLOGITS_AMX 0
#endif

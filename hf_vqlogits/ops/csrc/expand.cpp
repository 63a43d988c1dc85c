// The compiled kernels behind ops/cpu.py: a plain C interface, loaded by ctypes, without Python or
// torch headers.
//
// Functions return 0, or kNoMemory when a table could not be allocated; nothing is thrown across
// the interface.
#include <cstdint>
#include <new>

#include "coding.h"
#include "parallel.h"
#include "tables_avx512.h"
#include "tables_plain.h"

using vqlogits::Coding;
using vqlogits::wide::Fine;

namespace {

// `_INTERFACE` in ops/cpu.py; to be raised with every change of the functions below.
constexpr int32_t kInterface = 2;
constexpr int32_t kNoMemory = -1;

// Below this many look-ups a loop is over before other threads have woken up.
constexpr int64_t kLookupsPerThread = 1 << 17;

int useful_threads(const Coding& coding, int64_t rows, int threads) {
  const int64_t lookups =
      rows * coding.vocabulary * ((coding.codes_per_token() * (coding.sign ? 8 : 1) + 4) / 5);
  const int64_t useful = 1 + lookups / kLookupsPerThread;
  return static_cast<int>(useful < threads ? useful : threads);
}

}  // namespace

extern "C" {

int32_t vqlogits_interface() { return kInterface; }

// 1 when this build and this processor have the AVX-512 kernel.
int32_t vqlogits_has_avx512() {
#if VQLOGITS_AVX512
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
#else
  return 0;
#endif
}

// The address of GOMP_parallel in the OpenMP runtime that the process already uses, see parallel.h.
void vqlogits_use_openmp(void* gomp_parallel) {
  vqlogits::gomp_parallel.store(reinterpret_cast<vqlogits::GompParallel>(gomp_parallel));
}

// How many tokens a task of the AVX-512 kernel has, and a block of it.
int64_t vqlogits_task_tokens() { return vqlogits::wide::kTaskTokens; }
int64_t vqlogits_block_tokens() { return vqlogits::wide::kLanes; }

// How many 16-bit words the tiled codes take; 0 when the AVX-512 kernel does not know such codes.
int64_t vqlogits_tile_words(const Coding* coding) {
  return vqlogits::wide::fits(*coding) ? vqlogits::wide::Fields(*coding).tile_words() : 0;
}

// codes as stored -> tiles [vqlogits_tile_words].
void vqlogits_tile(const Coding* coding, const void* codes, uint16_t* tiles, int32_t threads) {
  vqlogits::wide::tile(*coding, codes, tiles, threads);
}

// Second codes as stored, in the order of fine->ids -> tiles [32 fine->blocks[tasks] words].
void vqlogits_tile_fine(const Coding* coding, const Fine* fine, const void* codes, uint16_t* tiles,
                        int32_t threads) {
  vqlogits::wide::tile_fine(*coding, *fine, codes, tiles, threads);
}

// scores float32 [rows, ...], tiled codes, second codes or null -> out [rows, V]; type 0 float32,
// 1 bfloat16, 2 float16.
int32_t vqlogits_expand_avx512(const Coding* coding, const float* scores, const uint16_t* tiles,
                               const Fine* fine, int64_t rows, int32_t type, void* out,
                               int32_t threads) {
#if VQLOGITS_AVX512
  try {
    vqlogits::wide::expand(*coding, scores, tiles, fine, rows,
                           static_cast<vqlogits::wide::Output>(type), out,
                           useful_threads(*coding, rows, threads));
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
#else
  (void)coding, (void)scores, (void)tiles, (void)fine, (void)rows, (void)type, (void)out;
  (void)threads;
#endif
  return 0;
}

// scores float32 [rows, ...], codes as stored -> out float32 [rows, V].
int32_t vqlogits_expand_plain(const Coding* coding, const float* scores, const void* codes,
                              int64_t rows, float* out, int32_t threads) {
  threads = useful_threads(*coding, rows, threads);
  try {
    if (coding->code_bytes == 1) {
      vqlogits::plain::expand(*coding, scores, static_cast<const uint8_t*>(codes), rows, out,
                              threads);
    } else {
      vqlogits::plain::expand(*coding, scores, static_cast<const int32_t*>(codes), rows, out,
                              threads);
    }
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
  return 0;
}

}  // extern "C"

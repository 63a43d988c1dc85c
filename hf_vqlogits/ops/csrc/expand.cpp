// The compiled kernels behind ops/cpu.py and ops/cpu_refining.py: a plain C interface, loaded by
// ctypes (ops/library.py), without Python or torch headers.
//
// Functions return 0, or kNoMemory when tables or candidates could not be allocated; nothing is
// thrown across the interface.
#include <algorithm>
#include <cstdint>
#include <new>
#include <type_traits>

#include "coding.h"
#include "kernel_amx.h"
#include "kernel_avx512.h"
#include "kernel_bytes.h"
#include "largest.h"
#include "layout.h"
#include "numbers.h"
#include "pages.h"
#include "parallel.h"
#include "refine.h"
#include "signs.h"
#include "tables_plain.h"

#if VQLOGITS_X86
#include <cpuid.h>
#endif

using vqlogits::Coding;
using vqlogits::Fine;
using vqlogits::Refining;
using vqlogits::Rule;
using vqlogits::Scoring;
using vqlogits::Type;

namespace {

// `_INTERFACE` in ops/library.py; to be raised with every change of the functions below.
constexpr int32_t kInterface = 9;
constexpr int32_t kNoMemory = -1;

// `_PATHS` in ops/cpu.py.
enum Path : int32_t { kPlain = 0, kAvx512 = 1, kAvx2 = 2, kNeon = 3, kAmx = 4 };

// Below this many look-ups a loop is over before other threads have woken up.
constexpr int64_t kLookupsPerThread = 1 << 17;
// Likewise of logits among which the largest are sought.
constexpr int64_t kLogitsPerThread = 1 << 14;

int useful_threads(int64_t work, int64_t of_a_thread, int threads) {
  return static_cast<int>(std::min<int64_t>(1 + work / of_a_thread, threads));
}

int useful_threads(const Coding& coding, int64_t rows, int threads) {
  const int64_t lookups =
      rows * coding.vocabulary * ((coding.codes_per_token() * (coding.sign ? 8 : 1) + 4) / 5);
  return useful_threads(lookups, kLookupsPerThread, threads);
}

// `function` of the shape of a path's look-ups.
template <typename Function>
auto with_shape(int32_t path, const Function& function) {
  return path == kAvx512 ? function(vqlogits::Words()) : function(vqlogits::Bytes());
}

// Calls `function` with the kernel of a path with tables that this build has.
template <typename Function>
int32_t with_tables([[maybe_unused]] int32_t path, [[maybe_unused]] const Function& function) {
  try {
#if VQLOGITS_X86
    if (path == kAvx512) function(vqlogits::avx512::Kernel());
#endif
#if VQLOGITS_BYTES
    if (path != kAvx512) function(vqlogits::bytes::Kernel());
#endif
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
  return 0;
}

// Likewise with the kernel of any path that reads tiled codes.
template <typename Function>
int32_t with_kernel(int32_t path, const Function& function) {
#if VQLOGITS_AMX
  if (path == kAmx) {
    try {
      function(vqlogits::amx::Kernel());
    } catch (const std::bad_alloc&) {
      return kNoMemory;
    }
    return 0;
  }
#endif
  return with_tables(path, function);
}

#if VQLOGITS_X86
// By the processor's own word: Clang 14 does not know this name of a feature.
bool has_f16c() {
  unsigned eax, ebx, ecx = 0, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & 1u << 29);
}
#endif

}  // namespace

extern "C" {

int32_t vqlogits_interface() { return kInterface; }

// Whether this build and this processor have a path.
int32_t vqlogits_has(int32_t path) {
  switch (path) {
    case kPlain:
      return 1;
#if VQLOGITS_X86
    case kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw");
    case kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
#elif VQLOGITS_BYTES
    case kNeon:
      return 1;
#endif
#if VQLOGITS_AMX
    case kAmx:
      return vqlogits::amx::available();
#endif
    default:
      return 0;
  }
}

// The address of GOMP_parallel in the OpenMP runtime that the process already uses, see parallel.h.
void vqlogits_use_openmp(void* gomp_parallel) {
  vqlogits::gomp_parallel.store(reinterpret_cast<vqlogits::GompParallel>(gomp_parallel));
}

// How many tokens a task of the kernels with tables in registers has, and a block of it.
int64_t vqlogits_task_tokens() { return vqlogits::kTaskTokens; }
int64_t vqlogits_block_tokens() { return vqlogits::kLanes; }

// How many bytes the tiled codes of a path take; 0 when it does not know such codes.
int64_t vqlogits_tile_bytes(int32_t path, const Coding* coding) {
#if VQLOGITS_AMX
  if (path == kAmx) return vqlogits::amx::tile_bytes(*coding);
#endif
  return with_shape(path, [&](auto shape) -> int64_t {
    using S = decltype(shape);
    return S::fits(*coding) ? vqlogits::Fields<S>(*coding).tile_words() * sizeof(typename S::Word)
                            : 0;
  });
}

// codes as stored -> tiles [vqlogits_tile_bytes].
void vqlogits_tile(int32_t path, const Coding* coding, const void* codes, void* tiles,
                   int32_t threads) {
#if VQLOGITS_AMX
  if (path == kAmx) return vqlogits::amx::tile(*coding, codes, tiles, threads);
#endif
  with_shape(path, [&](auto shape) {
    vqlogits::tile<decltype(shape)>(*coding, codes, tiles, threads);
    return 0;
  });
}

// Second codes as stored, in the order of fine->ids -> tiles [32 fine->blocks[tasks] words].
void vqlogits_tile_fine(int32_t path, const Coding* coding, const Fine* fine, const void* codes,
                        void* tiles, int32_t threads) {
#if VQLOGITS_AMX
  if (path == kAmx) return vqlogits::amx::tile_fine(*coding, *fine, codes, tiles, threads);
#endif
  with_shape(path, [&](auto shape) {
    vqlogits::tile_fine<decltype(shape)>(*coding, *fine, codes, tiles, threads);
    return 0;
  });
}

// scores float32 [rows, ...], tiled codes, second codes or null -> out [rows, V]; type 0 float32,
// 1 bfloat16, 2 float16.
int32_t vqlogits_expand_tiles(int32_t path, const Coding* coding, const float* scores,
                              const void* tiles, const Fine* fine, int64_t rows, int32_t type,
                              void* out, int32_t threads) {
  vqlogits::want_large_pages(out, rows * coding->vocabulary * (type == 0 ? 4 : 2));
  return with_kernel(path, [&](auto kernel) {
    kernel.expand(*coding, scores, tiles, fine, rows, static_cast<Type>(type), out,
                  useful_threads(*coding, rows, threads));
  });
}

// Hidden states of a few rows -> out [rows, V]; the rest as above.
int32_t vqlogits_logits_tiles(int32_t path, const Coding* coding, const Scoring* scoring,
                              const void* tiles, const Fine* fine, int64_t rows, int32_t type,
                              void* out, int32_t threads) {
  return with_tables(path, [&](auto kernel) {
    kernel.logits(*coding, *scoring, tiles, fine, rows, static_cast<Type>(type), out,
                  useful_threads(*coding, rows, threads));
  });
}

// logits [rows, V] of a `Type` -> values and tokens [rows, k], the k largest of each row.
int32_t vqlogits_largest(const void* logits, int32_t type, int64_t rows, int64_t vocabulary,
                         int64_t k, float* values, int64_t* tokens, int32_t threads) {
  threads = useful_threads(rows * vocabulary, kLogitsPerThread, threads);
  try {
    vqlogits::with_type(static_cast<Type>(type), [&](auto* of) {
      const auto* typed = static_cast<decltype(of)>(const_cast<void*>(logits));
      vqlogits::largest(typed, rows, vocabulary, k, values, tokens, threads);
    });
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
  return 0;
}

// logits [N, V] of a `Type`, in place; `weight_type` is that of the dense weight. `rule` may be null.
int32_t vqlogits_refine(const Refining* given, const Rule* rule, int32_t weight_type, int32_t type,
                        void* logits, int32_t threads) {
  threads = useful_threads(given->rows * given->vocabulary, kLogitsPerThread, threads);
  try {
    vqlogits::with_type(static_cast<Type>(weight_type), [&](auto* of) {
      using W = std::remove_pointer_t<decltype(of)>;
      vqlogits::with_type(static_cast<Type>(type), [&](auto* to) {
        vqlogits::refine<W>(*given, rule, static_cast<decltype(to)>(logits), threads);
      });
    });
  } catch (const std::bad_alloc&) {
    return kNoMemory;
  }
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

// codes [bytes] of packed signs -> out [8 bytes] of +1 and -1; type 0 float32, 1 bfloat16.
void vqlogits_unpack(const uint8_t* codes, int64_t bytes, int32_t type, void* out,
                     int32_t threads) {
  static const vqlogits::SignsOfBytes<uint32_t> full(0xBF800000u, 0x3F800000u);
  static const vqlogits::SignsOfBytes<uint16_t> half(0xBF80u, 0x3F80u);
  if (type == 0) {
    vqlogits::unpack(full, codes, bytes, static_cast<uint32_t*>(out), threads);
  } else {
    vqlogits::unpack(half, codes, bytes, static_cast<uint16_t*>(out), threads);
  }
}

}  // extern "C"

// Tabu search over the sign codes of each token.
//
// With codebook C (R x D), target x and metric I + m m^T, the error of a token with signs s is
//
//     |x - C^T s|^2 + (m . (x - C^T s))^2,
//
// a quadratic in s. Let e = x - C^T s, u = C m, Gram A = C C^T and g = C e + u (m . e), half the slope. Flipping
// bit k changes the error by 4 (s_k g_k + A_kk + u_k^2), and afterwards g += 2 s_k (A_k + u_k u): one row of A a
// flip, which stays in cache. Plain C interface, so that building needs no torch and no Python headers.
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <exception>
#include <limits>
#include <new>
#include <thread>
#include <vector>

namespace {

constexpr int kAlign = 64;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Vectors of 16, 32 or 64 bytes, spelled out because g++ ignores a vector_size that depends on a template.
template <int LANES> struct Vectors;
template <> struct Vectors<4> {
  typedef float Floats __attribute__((vector_size(16)));
  typedef int32_t Ints __attribute__((vector_size(16)));
  typedef float Unaligned __attribute__((vector_size(16), aligned(4)));
};
template <> struct Vectors<8> {
  typedef float Floats __attribute__((vector_size(32)));
  typedef int32_t Ints __attribute__((vector_size(32)));
  typedef float Unaligned __attribute__((vector_size(32), aligned(4)));
};
template <> struct Vectors<16> {
  typedef float Floats __attribute__((vector_size(64)));
  typedef int32_t Ints __attribute__((vector_size(64)));
  typedef float Unaligned __attribute__((vector_size(64), aligned(4)));
};

struct Problem {
  int64_t tokens, bits, padded;  // padded: `bits` rounded up to a multiple of 16
  const float* gram;             // [bits, padded]
  const float* slope;            // [tokens, bits], g of the start
  const float* context;          // [tokens, bits], u
  int8_t* signs;                 // [tokens, bits], in place
  float* change;                 // [tokens], of the error, <= 0
  int64_t flips, tenure, patience;
  uint64_t seed;
  int64_t first_token;
};

// Buffers of one thread, each `padded` floats, and the flips of the token at hand.
struct Workspace {
  explicit Workspace(const Problem& p) : history(p.flips) {
    const size_t bytes = 5 * p.padded * sizeof(float);
    memory = static_cast<float*>(::operator new(bytes, std::align_val_t(kAlign)));
    g = memory, u = g + p.padded, s = u + p.padded, diagonal = s + p.padded, free_at = diagonal + p.padded;
  }
  ~Workspace() { ::operator delete(memory, std::align_val_t(kAlign)); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  float *memory, *g, *u, *s, *diagonal, *free_at;
  std::vector<int32_t> history;
};

uint64_t mix(uint64_t x) {  // splitmix64: neighbouring seeds give unrelated streams
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return x ^ (x >> 31);
}

// One step: g += f (row + fu / f u), then the cheapest flip that is free, or that would give a new best.
// Lanes are written out because compilers do not vectorise a search for the smallest index by themselves.
template <int LANES>
inline __attribute__((always_inline)) float step(const Workspace& w, int64_t padded, const float* row, float f, float fu,
                                                 float now, float new_best, int32_t* index) {
  using Floats = typename Vectors<LANES>::Floats;
  using Ints = typename Vectors<LANES>::Ints;
  using Unaligned = typename Vectors<LANES>::Unaligned;
  Floats least;
  Ints where, here;
  for (int l = 0; l < LANES; l++) least[l] = kInfinity, where[l] = 0, here[l] = l;
  Floats infinite = least;
  for (int64_t j = 0; j < padded; j += LANES) {
    Floats g = *reinterpret_cast<const Floats*>(w.g + j);
    g += f * *reinterpret_cast<const Unaligned*>(row + j) + fu * *reinterpret_cast<const Floats*>(w.u + j);
    *reinterpret_cast<Floats*>(w.g + j) = g;
    const Floats cost = *reinterpret_cast<const Floats*>(w.s + j) * g + *reinterpret_cast<const Floats*>(w.diagonal + j);
    const Floats limit = *reinterpret_cast<const Floats*>(w.free_at + j) > now ? new_best + Floats{} : infinite;
    const Floats allowed = cost < limit ? cost : infinite;
    where = allowed < least ? here : where;
    least = allowed < least ? allowed : least;
    here += LANES;
  }
  float smallest = kInfinity;
  *index = -1;
  for (int l = 0; l < LANES; l++) {
    if (least[l] < smallest || (least[l] == smallest && smallest < kInfinity && where[l] < *index)) {
      smallest = least[l], *index = where[l];
    }
  }
  return smallest;
}

template <int LANES>
inline __attribute__((always_inline)) void search_token(const Problem& p, Workspace& w, int64_t token) {
  int8_t* signs = p.signs + token * p.bits;
  for (int64_t j = 0; j < p.bits; j++) {
    w.g[j] = p.slope[token * p.bits + j];
    w.u[j] = p.context[token * p.bits + j];
    w.s[j] = signs[j];
    w.diagonal[j] = p.gram[j * p.padded + j] + w.u[j] * w.u[j];
    w.free_at[j] = 0;
  }
  for (int64_t j = p.bits; j < p.padded; j++) w.g[j] = w.u[j] = w.s[j] = w.free_at[j] = 0, w.diagonal[j] = kInfinity;
  uint64_t random = mix(p.seed ^ mix(p.first_token + token));
  float sum = 0, best = 0;  // changes so far, in units of 4
  int64_t best_flips = 0, done = 0;
  int32_t k;
  float cost = step<LANES>(w, p.padded, p.gram, 0, 0, 0, 0, &k);
  while (done < p.flips && k >= 0) {
    if (p.tenure == 0 && !(cost < 0)) break;
    const float f = 2 * w.s[k];
    w.s[k] = -w.s[k];
    sum += cost;
    w.history[done++] = k;
    // Below the rounding error of the sum, a "new best" is noise, and would never end the search.
    if (sum < best - 1e-6f * (w.diagonal[k] - best)) best = sum, best_flips = done;
    if (done - best_flips > p.patience) break;
    if (p.tenure > 0) {
      random = mix(random);
      w.free_at[k] = static_cast<float>(done + p.tenure + static_cast<int64_t>(random % p.tenure));
    }
    cost = step<LANES>(w, p.padded, p.gram + k * p.padded, f, f * w.u[k], static_cast<float>(done), best - sum, &k);
  }
  while (done > best_flips) w.s[w.history[--done]] *= -1;
  for (int64_t j = 0; j < p.bits; j++) signs[j] = w.s[j] > 0 ? 1 : -1;
  p.change[token] = 4 * best;
}

#define SEARCH(NAME, LANES, TARGET)                                      \
  TARGET void NAME(const Problem& p, Workspace& w, int64_t from, int64_t to) { \
    for (int64_t token = from; token < to; token++) search_token<LANES>(p, w, token); \
  }

using Search = void (*)(const Problem&, Workspace&, int64_t, int64_t);

SEARCH(search_plain, 4, )
#if defined(__x86_64__)
SEARCH(search_avx2, 8, __attribute__((target("avx2,fma"))))
SEARCH(search_avx512, 16, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))))

Search choose() {
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return search_avx512;
  }
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? search_avx2 : search_plain;
}
#else
Search choose() { return search_plain; }
#endif

}  // namespace

// Returns 0, or 1 when there is no memory for the buffers. A token's result does not depend on the threads.
extern "C" int hf_vqlogits_sign_search(int64_t tokens, int64_t bits, int64_t padded, const float* gram,
                                       const float* slope, const float* context, int8_t* signs, float* change,
                                       int64_t flips, int64_t tenure, int64_t patience, uint64_t seed,
                                       int64_t first_token, int64_t threads) {
  const Problem problem{tokens, bits,  padded, gram,     slope, context,    signs,
                        change, flips, tenure, patience, seed,  first_token};
  static const Search search = choose();
  constexpr int64_t kBatch = 32;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  const auto work = [&] {
    try {
      Workspace workspace(problem);
      for (int64_t from; (from = next.fetch_add(kBatch)) < tokens;) {
        search(problem, workspace, from, std::min(from + kBatch, tokens));
      }
    } catch (const std::bad_alloc&) {
      failed = true;
    }
  };
  std::vector<std::thread> helpers;
  try {
    for (int64_t i = 1; i < threads; i++) helpers.emplace_back(work);
  } catch (const std::exception&) {
    // The system gives no further thread: those that started share the work.
  }
  work();
  for (std::thread& helper : helpers) helper.join();
  // One thread without memory leaves its share to the others; only if all failed is work left.
  return failed && next.load() < tokens ? 1 : 0;
}

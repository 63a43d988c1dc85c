// Quantised logits made nearly those of the dense layer: the largest are scored again by its rows, as
// far as a rule lets them through. What it means stands in ops/refining.py.
#pragma once

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cmath>
#include <cstdint>
#include <new>
#include <vector>

#include "largest.h"
#include "numbers.h"
#include "parallel.h"

namespace vqlogits {

// `_Refining` in ops/cpu_refining.py.
struct Refining {
  const float* hidden;  // [N, d]
  const void* weight;   // [V, d], of the dense layer
  Numbers bias;         // [V]
  Numbers common;       // [d]
  Numbers common_bias;  // [1]
  int64_t rows;         // N
  int64_t vocabulary;   // V
  int64_t size;         // d
  int64_t top_k;        // T
  float logit_scale;
  float softcap;  // 0: none
};

// `_Rule` there.
struct Rule {
  Numbers error;   // [V]
  Numbers mean;    // [d]
  Numbers spread;  // [d]
  float deviations;

  // How far out a hidden state lies.
  float rho(const float* hidden, int64_t size) const {
    double squares = 0.0;
    for (int64_t i = 0; i < size; i++) {
      const float out = (hidden[i] - mean[i]) / spread[i];
      squares += double{out} * out;
    }
    return static_cast<float>(std::sqrt(squares / static_cast<double>(size)));
  }
  bool lets_through(const Candidate& best, const Candidate& other, float rho) const {
    const float deviation = rho * std::hypot(error[best.token], error[other.token]);
    return (best.value - other.value) / std::max(deviation, FLT_MIN) <= deviations;
  }
};

constexpr int64_t kTokensOfSlice = 1 << 13;  // that are shifted as a task
constexpr int64_t kCandidatesOfTask = 8;

// logits [N, V], in place. W is the type of the weight. Threads start once for all of it.
template <typename W, typename T>
void refine(const Refining& given, const Rule* rule, T* logits, int threads) {
  const int64_t vocabulary = given.vocabulary, size = given.size, top_k = given.top_k;
  const Chunks chunks(vocabulary, top_k);
  const int64_t chunks_of_slice = std::max<int64_t>(1, kTokensOfSlice / chunks.chunk);
  const int64_t slices = (chunks.count + chunks_of_slice - 1) / chunks_of_slice;
  std::vector<float> common(size), peaks(given.rows * chunks.peaks());
  for (int64_t i = 0; i < size; i++) common[i] = given.common[i];
  constexpr int64_t kNone = -1;
  std::vector<int64_t> tokens(given.rows * top_k, kNone);  // that are scored
  std::atomic<bool> no_memory{false};  // for nothing may be thrown out of a thread

  const auto shift = [&](int64_t task) {
    const int64_t n = task / slices, first = task % slices * chunks_of_slice;
    const float offset =
        dot(given.hidden + n * size, common.data(), size) + given.common_bias[0];
    for (int64_t c = first; c < std::min(first + chunks_of_slice, chunks.count); c++) {
      T* chunk = logits + n * vocabulary + chunks.begin(c);
      const int64_t count = chunks.end(c) - chunks.begin(c);
      int64_t i = 0;
      for (; i + kFour <= count; i += kFour) set_four(chunk + i, load_four(chunk + i) - offset);
      for (; i < count; i++) set(chunk + i, to_float(chunk[i]) - offset);
      find_peaks(chunk, count, &peaks[n * chunks.peaks() + c * kPeaks]);
    }
  };
  const auto choose = [&](int64_t n) {
    try {
      const std::vector<Candidate> found = take_largest(
          logits + n * vocabulary, chunks, &peaks[n * chunks.peaks()], top_k);
      const float rho = rule ? rule->rho(given.hidden + n * size, size) : 0.0f;
      for (size_t i = 0; i < found.size(); i++) {
        if (rule && !rule->lets_through(found[0], found[i], rho)) continue;
        tokens[n * top_k + i] = found[i].token;
      }
    } catch (const std::bad_alloc&) {
      no_memory = true;
    }
  };
  const auto score = [&](int64_t task) {
    const int64_t begin = task * kCandidatesOfTask;
    const int64_t end = std::min(begin + kCandidatesOfTask, given.rows * top_k);
    const auto row_of = [&](int64_t token) {
      return static_cast<const W*>(given.weight) + token * size;
    };
    for (int64_t i = begin; i < end; i++) {  // rows lie anywhere: they are asked for together
      if (tokens[i] == kNone) continue;
      const auto* bytes = reinterpret_cast<const char*>(row_of(tokens[i]));
      for (size_t b = 0; b < size * sizeof(W); b += 64) __builtin_prefetch(bytes + b);
    }
    for (int64_t i = begin; i < end; i++) {
      const int64_t n = i / top_k, token = tokens[i];
      if (token == kNone) continue;
      const W* row = row_of(token);
      W raw;  // as the dense layer rounds it
      set(&raw, dot(given.hidden + n * size, row, size) + given.bias[token]);
      float logit = given.logit_scale * to_float(raw);
      if (given.softcap > 0.0f) logit = given.softcap * std::tanh(logit / given.softcap);
      set(logits + n * vocabulary + token, logit);
    }
  };
  Phase shifted(given.rows * slices, shift);
  Phase chosen(given.rows, choose);
  Phase scored((given.rows * top_k + kCandidatesOfTask - 1) / kCandidatesOfTask, score);
  parallel_phases(threads, shifted, chosen, scored);
  if (no_memory) throw std::bad_alloc();
}

}  // namespace vqlogits

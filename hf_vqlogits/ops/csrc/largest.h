// The largest logits of every row.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <new>
#include <vector>

#include "numbers.h"
#include "parallel.h"

namespace vqlogits {

struct Candidate {
  float value;
  int32_t token;
  // A total order: of equal logits the first tokens are taken.
  bool operator<(const Candidate& other) const {
    return value != other.value ? value > other.value : token < other.token;
  }
};

// A row is cut into chunks of kPeaks * depth logits, and a chunk into kPeaks groups that take turns
// in it, so that the largest of all groups, their peaks, are found many at a time. A deeper group
// makes fewer peaks, among which the k-th largest is sought, and more logits that are looked at one
// by one: of 49,152 logits the 64 largest take 20 us on one core at 16, 20 at 32, 18 at 64.
constexpr int64_t kPeaks = 16;
constexpr int64_t kLargestDepth = 64;

struct Chunks {
  int64_t vocabulary, chunk, count;

  Chunks(int64_t vocabulary, int64_t k)
      : vocabulary(vocabulary),
        chunk(kPeaks * std::clamp<int64_t>(vocabulary / (4 * k), 1, kLargestDepth)),
        count((vocabulary + chunk - 1) / chunk) {}
  int64_t begin(int64_t c) const { return c * chunk; }
  int64_t end(int64_t c) const { return std::min((c + 1) * chunk, vocabulary); }
  int64_t peaks() const { return count * kPeaks; }
};

// The peaks of a chunk of `count` logits.
template <typename T>
void find_peaks(const T* logits, int64_t count, float* peaks) {
  constexpr int kParts = kPeaks / kFour;
  Floats largest[kParts];
  for (Floats& part : largest) part = Floats{} - std::numeric_limits<float>::infinity();
  int64_t i = 0;
  for (; i + kPeaks <= count; i += kPeaks) {
    for (int p = 0; p < kParts; p++) {
      const Floats some = load_four(logits + i + p * kFour);
      largest[p] = some > largest[p] ? some : largest[p];  // NaN is not
    }
  }
  std::memcpy(peaks, largest, sizeof largest);
  for (; i < count; i++, peaks++) *peaks = std::max(*peaks, to_float(logits[i]));
}

// The k largest logits of a row of these peaks, descending; fewer where fewer are numbers.
template <typename T>
std::vector<Candidate> take_largest(const T* logits, const Chunks& chunks, const float* peaks,
                                    int64_t k) {
  // So many groups have a logit as large as the k-th largest peak, so that is no larger than the k-th
  // largest logit.
  float least = -std::numeric_limits<float>::infinity();
  if (k <= chunks.peaks()) {
    std::vector<float> order(peaks, peaks + chunks.peaks());
    std::nth_element(order.begin(), order.begin() + (k - 1), order.end(), std::greater<float>());
    least = order[k - 1];
  }
  std::vector<Candidate> found;
  for (int64_t group = 0; group < chunks.peaks(); group++) {
    if (peaks[group] < least) continue;
    const int64_t c = group / kPeaks;
    for (int64_t i = chunks.begin(c) + group % kPeaks; i < chunks.end(c); i += kPeaks) {
      const float logit = to_float(logits[i]);
      if (logit >= least) found.push_back({logit, static_cast<int32_t>(i)});
    }
  }
  const int64_t size = std::min<int64_t>(k, found.size());
  std::partial_sort(found.begin(), found.begin() + size, found.end());
  found.resize(size);
  return found;
}

// The k largest of every row of logits [rows, vocabulary], descending -> values, tokens [rows, k];
// where fewer are numbers, NaN of token 0 in the end.
template <typename T>
void largest(const T* logits, int64_t rows, int64_t vocabulary, int64_t k, float* values,
             int64_t* tokens, int threads) {
  const Chunks chunks(vocabulary, k);
  std::atomic<bool> no_memory{false};  // for nothing may be thrown out of a thread
  parallel_for(rows, threads, [&](int64_t n) {
    const T* row = logits + n * vocabulary;
    std::fill_n(values + n * k, k, std::numeric_limits<float>::quiet_NaN());
    std::fill_n(tokens + n * k, k, 0);
    try {
      std::vector<float> peaks(chunks.peaks());
      for (int64_t c = 0; c < chunks.count; c++) {
        find_peaks(row + chunks.begin(c), chunks.end(c) - chunks.begin(c), &peaks[c * kPeaks]);
      }
      int64_t i = n * k;
      for (const Candidate& candidate : take_largest(row, chunks, peaks.data(), k)) {
        values[i] = candidate.value;
        tokens[i++] = candidate.token;
      }
    } catch (const std::bad_alloc&) {
      no_memory = true;
    }
  });
  if (no_memory) throw std::bad_alloc();
}

}  // namespace vqlogits

// The largest logits of a row, found while they pass by.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <deque>
#include <limits>
#include <mutex>
#include <vector>

#include "layout.h"

namespace vqlogits {

struct Candidate {
  float value;
  int32_t token;
  // A total order, so that the result depends on no thread.
  bool operator<(const Candidate& other) const {
    return value != other.value ? value > other.value : token < other.token;
  }
};

// The k largest of a row. Tasks offer the logits of their tokens, in any order.
class Top {
 public:
  explicit Top(int64_t k) : k_(k) { best_.reserve(3 * k + kTaskTokens); }

  void offer(const float* logits, int64_t first, int64_t count) {
    Candidate found[kTaskTokens];
    const float least = least_.load(std::memory_order_relaxed);
    int64_t size = 0;
    for (int64_t i = 0; i < count; i++) {
      found[size] = {logits[i], static_cast<int32_t>(first + i)};
      size += logits[i] >= least;  // not NaN
    }
    if (!size) return;
    if (size > k_) {
      std::nth_element(found, found + k_, found + size);
      size = k_;
    }
    const std::lock_guard<std::mutex> lock(mutex_);
    best_.insert(best_.end(), found, found + size);
    if (static_cast<int64_t>(best_.size()) >= 2 * k_) keep();
  }

  // The largest in descending order; where fewer than k are numbers, NaN of token 0 in the end.
  void take(float* values, int64_t* tokens) {
    keep();
    std::sort(best_.begin(), best_.end());
    for (int64_t i = 0; i < k_; i++) {
      const bool there = i < static_cast<int64_t>(best_.size());
      values[i] = there ? best_[i].value : std::numeric_limits<float>::quiet_NaN();
      tokens[i] = there ? best_[i].token : 0;
    }
  }

 private:
  void keep() {
    if (static_cast<int64_t>(best_.size()) < k_) return;
    std::nth_element(best_.begin(), best_.begin() + (k_ - 1), best_.end());
    best_.resize(k_);
    least_.store(best_[k_ - 1].value, std::memory_order_relaxed);
  }

  const int64_t k_;
  std::atomic<float> least_{-std::numeric_limits<float>::infinity()};
  std::mutex mutex_;
  std::vector<Candidate> best_;
};

// What becomes of the logits of a task, where the largest of them are kept.
struct Offer {
  std::deque<Top>& tops;  // [rows]
  void operator()(int64_t row, int64_t first, int64_t count, const float* logits) const {
    tops[row].offer(logits, first, count);
  }
};

// The k largest logits of each row, descending -> values, tokens [rows, k]. `expand(first, count,
// sink)` makes those of rows [first, first + count), at most `batch_rows`.
template <typename Expand>
void keep_largest(int64_t rows, int64_t batch_rows, int64_t k, float* values, int64_t* tokens,
                  const Expand& expand) {
  for (int64_t first = 0; first < rows; first += batch_rows) {
    const int64_t count = std::min(batch_rows, rows - first);
    std::deque<Top> tops;
    for (int64_t n = 0; n < count; n++) tops.emplace_back(k);
    expand(first, count, Offer{tops});
    for (int64_t n = 0; n < count; n++) {
      tops[n].take(values + (first + n) * k, tokens + (first + n) * k);
    }
  }
}

}  // namespace vqlogits

// Pages of memory that an output is written to.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace vqlogits {

// Asks for pages of 2 MB under an output that is about to be written as a whole. Memory from this
// size on comes from the system with every allocation (glibc keeps what is smaller), and to get it in
// pages of 4 KB costs more than the logits: 256 rows of 50,257 in float32 took 44 ms, and 32 so.
inline void want_large_pages([[maybe_unused]] void* out, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kLeast = int64_t{32} << 20, kPage = int64_t{2} << 20;
  if (bytes < kLeast) return;
  const auto address = reinterpret_cast<uintptr_t>(out);
  const uintptr_t begin = (address + kPage - 1) / kPage * kPage;
  const uintptr_t end = (address + bytes) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // refused: as before
#endif
}

}  // namespace vqlogits

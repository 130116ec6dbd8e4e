// SPDX-License-Identifier: Apache-2.0
// Bookkeeping of byte ranges in a buffer that is never touched: best fit, neighbours merged on
// release.
#ifndef DELTAWEAVE_SRC_ALLOCATOR_H_
#define DELTAWEAVE_SRC_ALLOCATOR_H_

#include <cstdint>
#include <map>
#include <optional>

namespace dw {

class Allocator {
 public:
  explicit Allocator(uint64_t bytes);

  // Offset of `bytes` (rounded up to DW_ALIGNMENT), or nothing if no free range is long enough.
  std::optional<uint64_t> take(uint64_t bytes);
  void release(uint64_t offset, uint64_t bytes);
  // Adds bytes at the end.
  void extend(uint64_t bytes);

  uint64_t total() const { return total_; }
  uint64_t free_bytes() const;
  uint64_t largest_free() const;

 private:
  uint64_t total_;
  std::map<uint64_t, uint64_t> free_;  // offset -> bytes, never adjacent
};

}  // namespace dw

#endif  // DELTAWEAVE_SRC_ALLOCATOR_H_

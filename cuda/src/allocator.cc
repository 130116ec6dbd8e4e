// SPDX-License-Identifier: Apache-2.0
#include "allocator.h"

#include <algorithm>
#include <iterator>

#include "layout.h"

namespace dw {

Allocator::Allocator(uint64_t bytes) : total_(bytes / DW_ALIGNMENT * DW_ALIGNMENT) {
  if (total_ > 0) free_[0] = total_;
}

std::optional<uint64_t> Allocator::take(uint64_t bytes) {
  const uint64_t wanted = round_up(bytes, DW_ALIGNMENT);
  auto best = free_.end();
  for (auto range = free_.begin(); range != free_.end(); ++range) {
    if (range->second >= wanted && (best == free_.end() || range->second < best->second)) {
      best = range;
    }
  }
  if (best == free_.end()) return std::nullopt;
  const auto [offset, length] = *best;
  free_.erase(best);
  if (length > wanted) free_[offset + wanted] = length - wanted;
  return offset;
}

void Allocator::release(uint64_t offset, uint64_t bytes) {
  uint64_t length = round_up(bytes, DW_ALIGNMENT);
  auto next = free_.lower_bound(offset);
  if (next != free_.end() && offset + length == next->first) {
    length += next->second;
    next = free_.erase(next);
  }
  if (next != free_.begin()) {
    auto previous = std::prev(next);
    if (previous->first + previous->second == offset) {
      previous->second += length;
      return;
    }
  }
  free_[offset] = length;
}

void Allocator::extend(uint64_t bytes) {
  const uint64_t grown = bytes / DW_ALIGNMENT * DW_ALIGNMENT;
  if (grown <= total_) return;
  const uint64_t start = total_;
  total_ = grown;
  release(start, grown - start);
}

uint64_t Allocator::free_bytes() const {
  uint64_t sum = 0;
  for (const auto& range : free_) sum += range.second;
  return sum;
}

uint64_t Allocator::largest_free() const {
  uint64_t largest = 0;
  for (const auto& range : free_) largest = std::max(largest, range.second);
  return largest;
}

}  // namespace dw

// SPDX-License-Identifier: Apache-2.0
// Checks of single arguments; messages name the argument, what came and what was expected.
#ifndef DELTAWEAVE_SRC_CHECKS_H_
#define DELTAWEAVE_SRC_CHECKS_H_

#include <cstdint>

#include "status.h"

namespace dw {

inline dw_status check_range(const char* name, int64_t value, int64_t low, int64_t high) {
  if (value >= low && value <= high) return DW_OK;
  return fail(DW_ERROR_ARGUMENT, name, " ", value, ", expected ", low, " to ", high);
}

inline dw_status check_aligned(const char* name, const void* pointer, uintptr_t alignment) {
  if (pointer == nullptr) return fail(DW_ERROR_ARGUMENT, name, " is null");
  if (reinterpret_cast<uintptr_t>(pointer) % alignment == 0) return DW_OK;
  return fail(DW_ERROR_ARGUMENT, name, " is not aligned to ", alignment, " bytes");
}

}  // namespace dw

#endif  // DELTAWEAVE_SRC_CHECKS_H_

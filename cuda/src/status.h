// SPDX-License-Identifier: Apache-2.0
// Status codes with a message: `return fail(DW_ERROR_ARGUMENT, "rank ", rank, ", expected ...")`.
#ifndef DELTAWEAVE_SRC_STATUS_H_
#define DELTAWEAVE_SRC_STATUS_H_

#include <sstream>
#include <string>

#include "deltaweave.h"

namespace dw {

void set_last_error(const std::string& message);

template <typename... Parts>
dw_status fail(dw_status status, const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  set_last_error(message.str());
  return status;
}

// Passes a failed status on to the caller; its message stands.
#define DW_RETURN_IF_ERROR(expression)                        \
  do {                                                        \
    if (const dw_status failed = (expression)) return failed; \
  } while (false)

}  // namespace dw

#endif  // DELTAWEAVE_SRC_STATUS_H_

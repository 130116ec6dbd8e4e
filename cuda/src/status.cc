// SPDX-License-Identifier: Apache-2.0
#include "status.h"

namespace dw {
namespace {
thread_local std::string last_error;
}  // namespace

void set_last_error(const std::string& message) { last_error = message; }

}  // namespace dw

const char* dw_last_error(void) { return dw::last_error.c_str(); }
int32_t dw_abi_version(void) { return DW_ABI_VERSION; }

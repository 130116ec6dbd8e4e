// SPDX-License-Identifier: Apache-2.0
// The entry points of a library built without a CUDA compiler: its host logic works, its kernels
// say why they do not.
#include "status.h"

namespace {
dw_status refuse(const char* name) {
  return dw::fail(DW_ERROR_CUDA, name, ": this libdeltaweave was built without CUDA");
}
}  // namespace

int32_t dw_has_cuda(void) { return 0; }
dw_status dw_repack(const dw_repack_args*, void*) { return refuse("dw_repack"); }
dw_status dw_plan_tokens(const int32_t*, int32_t, int32_t, int32_t, void*, size_t, void*) {
  return refuse("dw_plan_tokens");
}
dw_status dw_delta_gemm(const dw_gemm*, void*) { return refuse("dw_delta_gemm"); }

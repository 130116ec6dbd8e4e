// SPDX-License-Identifier: Apache-2.0
// The entry points of a library built without a CUDA compiler: its host logic works, its kernels
// check their arguments and say why they go no further.
#include "batch_args.h"
#include "gemm_args.h"
#include "status.h"

namespace {
dw_status refuse(const char* name) {
  return dw::fail(DW_ERROR_CUDA, name, ": this libdeltaweave was built without CUDA");
}
}  // namespace

int32_t dw_has_cuda(void) { return 0; }
dw_status dw_plan_tokens(const int32_t*, int32_t, int32_t, int32_t, void*, size_t, void*) {
  return refuse("dw_plan_tokens");
}
dw_status dw_repack(const dw_repack_args* args, void*) {
  DW_RETURN_IF_ERROR(dw::check_repack(*args));
  return refuse("dw_repack");
}
dw_status dw_delta_gemm(const dw_gemm* args, void*) {
  DW_RETURN_IF_ERROR(dw::check_delta(*args));
  return refuse("dw_delta_gemm");
}
dw_status dw_delta_shrink(const dw_gemm* args, void*) {
  DW_RETURN_IF_ERROR(dw::check_half(*args, false));
  return refuse("dw_delta_shrink");
}
dw_status dw_delta_expand(const dw_gemm* args, void*) {
  DW_RETURN_IF_ERROR(dw::check_half(*args, true));
  return refuse("dw_delta_expand");
}
dw_status dw_gated_lora(const dw_gemm* args, void*) {
  DW_RETURN_IF_ERROR(dw::check_lora(*args));
  return refuse("dw_gated_lora");
}
dw_status dw_dense_gemm(const dw_gemm* args, void*) {
  DW_RETURN_IF_ERROR(dw::check_dense(*args));
  return refuse("dw_dense_gemm");
}
dw_status dw_rms_norm(const dw_norm* args, void*) {
  DW_RETURN_IF_ERROR(dw::check_norm(*args));
  return refuse("dw_rms_norm");
}
dw_status dw_add_bias(const dw_bias* args, void*) {
  DW_RETURN_IF_ERROR(dw::check_bias(*args));
  return refuse("dw_add_bias");
}
dw_status dw_embed(const dw_embedding* args, void*) {
  DW_RETURN_IF_ERROR(dw::check_embedding(*args));
  return refuse("dw_embed");
}
dw_status dw_gate_weights(const dw_gate* args, void*) {
  DW_RETURN_IF_ERROR(dw::check_gate(*args));
  return refuse("dw_gate_weights");
}

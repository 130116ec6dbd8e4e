// SPDX-License-Identifier: Apache-2.0
// The kernels' entry points: check, cut the workspace, launch.
#include "gemm_args.h"
#include "kernels.h"
#include "layout.h"
#include "payload.h"
#include "status.h"

namespace dw {

dw_status check_launch(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return DW_OK;
  return fail(DW_ERROR_CUDA, what, ": ", cudaGetErrorString(error));
}

int multiprocessors() {
  int device = 0, count = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count > 0 ? count : 1;
}

namespace {

// Stage 1 reads whole groups of 128 features, 16 bytes at a time: rows that are so need no copy.
bool readable_in_place(const dw_gemm& args) {
  return args.dtype == DW_FLOAT16 && reinterpret_cast<uintptr_t>(args.x) % 16 == 0 &&
         args.x_stride % 8 == 0 && args.in_features % kGroup == 0 && args.in_offset == 0;
}

Gemm describe(const dw_gemm& args, const Workspace& cut, bool in_place) {
  unsigned char* workspace = static_cast<unsigned char*>(args.workspace);
  Gemm gemm = {};
  gemm.arena = static_cast<const unsigned char*>(args.arena);
  gemm.directory = args.directory;
  gemm.slot_count = args.slot_count;
  gemm.token_count = args.token_count;
  gemm.in_groups = cut.padded_in / kGroup;
  gemm.x = in_place ? static_cast<const __half*>(args.x)
                    : reinterpret_cast<const __half*>(workspace + cut.x);
  gemm.x_stride = in_place ? args.x_stride : cut.padded_in;
  gemm.x_scale = in_place ? nullptr : reinterpret_cast<const float*>(workspace + cut.x_scale);
  gemm.plan = static_cast<const int*>(args.plan);
  gemm.h = reinterpret_cast<float*>(workspace + cut.h);
  gemm.h_max = reinterpret_cast<float*>(workspace + cut.h_max);
  gemm.ranks = cut.ranks;
  gemm.blocks = cut.blocks;
  gemm.slice_count = args.slice_count;
  for (int s = 0; s < args.slice_count; ++s) {
    const dw_slice& slice = args.slices[s];
    gemm.slices[s] = {slice.projection, slice.out_features,
                      slice.out_offset, group_count(slice.out_features, slice.out_offset),
                      slice.y,          slice.y_stride};
  }
  return gemm;
}

}  // namespace
}  // namespace dw

int32_t dw_has_cuda(void) { return 1; }

dw_status dw_plan_tokens(const int32_t* slots, int32_t token_count, int32_t slot_count,
                         int32_t chunk_tokens, void* plan, size_t plan_bytes, void* stream) {
  if (token_count < 1 || token_count > DW_MAX_TOKENS) {
    return dw::fail(DW_ERROR_ARGUMENT, "token_count ", token_count, ", expected 1 to ",
                    DW_MAX_TOKENS);
  }
  if (slots == nullptr || plan == nullptr || reinterpret_cast<uintptr_t>(plan) % 16 != 0) {
    return dw::fail(DW_ERROR_ARGUMENT,
                    "slots and plan must be device memory, the plan aligned to 16");
  }
  DW_RETURN_IF_ERROR(dw::check_chunk(chunk_tokens));
  if (plan_bytes < dw::plan_bytes(token_count)) {
    return dw::fail(DW_ERROR_ARGUMENT, "plan of ", plan_bytes, " bytes, needed ",
                    dw::plan_bytes(token_count));
  }
  const int chunk = dw::resolve_chunk(chunk_tokens, token_count);
  return dw::check_launch(
      dw::launch_plan(slots, token_count, slot_count, chunk, static_cast<int*>(plan),
                      static_cast<cudaStream_t>(stream)),
      "dw_plan_tokens");
}

dw_status dw_delta_gemm(const dw_gemm* args, void* stream_pointer) {
  if (args == nullptr) return dw::fail(DW_ERROR_ARGUMENT, "null argument");
  DW_RETURN_IF_ERROR(dw::check_sizes(*args));
  DW_RETURN_IF_ERROR(dw::check_pointers(*args));
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_pointer);
  const dw::Workspace cut = dw::cut_workspace(*args);
  const bool in_place = dw::readable_in_place(*args);
  const dw::Gemm gemm = dw::describe(*args, cut, in_place);
  const int chunk = dw::resolve_chunk(args->chunk_tokens, args->token_count);
  if (!in_place) {
    DW_RETURN_IF_ERROR(
        dw::check_launch(dw::launch_prepare(*args, cut.padded_in, const_cast<__half*>(gemm.x),
                                            const_cast<float*>(gemm.x_scale), stream),
                         "prepare"));
  }
  DW_RETURN_IF_ERROR(dw::check_launch(dw::launch_shrink(gemm, chunk, stream), "shrink"));
  return dw::check_launch(
      dw::launch_expand(gemm, chunk, static_cast<dw_dtype>(args->dtype), stream), "expand");
}

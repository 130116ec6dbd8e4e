// SPDX-License-Identifier: Apache-2.0
// The kernels' entry points: check, cut the workspace, launch.
#include <algorithm>

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

namespace {

int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, which, device);
  return value > 0 ? value : 1;
}

}  // namespace

int multiprocessors() { return attribute(cudaDevAttrMultiProcessorCount); }
int compute_major() { return attribute(cudaDevAttrComputeCapabilityMajor); }
int shared_bytes() { return attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor); }
int shared_bytes_a_block() { return attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin); }

namespace {

// Stage 1 reads whole groups of 128 features, 16 bytes at a time: rows that are so need no copy.
bool readable_in_place(const dw_gemm& args) {
  return reinterpret_cast<uintptr_t>(args.x) % 16 == 0 && args.x_stride % 8 == 0 &&
         args.in_features % kGroup == 0 && args.in_offset == 0;
}

Gemm describe(const dw_gemm& args, const Workspace& cut, bool in_place, dw_record_kind record) {
  unsigned char* workspace = static_cast<unsigned char*>(args.workspace);
  Gemm gemm = {};
  gemm.record = record;
  gemm.arena = static_cast<const unsigned char*>(args.arena);
  gemm.directory = args.directory;
  gemm.slot_count = args.slot_count;
  gemm.token_count = args.token_count;
  gemm.in_groups = cut.padded_in / kGroup;
  const bool lora = record == DW_LORA;
  gemm.tiles = lora ? cut.lora_tiles : cut.tiles;
  gemm.tile_groups = lora ? cut.lora_tile_groups : cut.tile_groups;
  gemm.x = in_place ? args.x : workspace + cut.x;
  gemm.x_dtype = in_place ? args.dtype : DW_FLOAT16;
  gemm.y_dtype = args.dtype;
  gemm.x_stride = in_place ? args.x_stride : cut.padded_in;
  gemm.x_scale = in_place ? nullptr : reinterpret_cast<const float*>(workspace + cut.x_scale);
  gemm.token_weights = args.weights;
  gemm.token_weights_stride = args.weights_stride;
  gemm.base_x = args.x;
  gemm.base_x_stride = args.x_stride;
  gemm.in_features = args.in_features;
  // Written where the call computes the base's product (step.cuh); others may have it read-only.
  gemm.plan = static_cast<int*>(const_cast<void*>(args.plan));
  gemm.chunk_tokens = resolve_chunk(args.chunk_tokens, args.token_count);
  gemm.h = reinterpret_cast<float*>(workspace + cut.h);
  gemm.ranks = cut.ranks;
  gemm.blocks = cut.blocks;
  gemm.x_image = workspace + cut.x_image;
  gemm.token_scales = reinterpret_cast<float2*>(workspace + cut.token_scales);
  gemm.h_image = workspace + cut.h_image;
  gemm.cuts = reinterpret_cast<int*>(workspace + cut.cuts);
  gemm.counters = reinterpret_cast<int*>(workspace + cut.counters);
  gemm.image_tiles = cut.image_tiles;
  gemm.rank_tiles = cut.rank_tiles;
  gemm.most_parts = cut.most_parts;
  gemm.slice_count = args.slice_count;
  for (int s = 0; s < args.slice_count; ++s) {
    const dw_slice& slice = args.slices[s];
    gemm.slices[s] = {slice.parameter,  slice.out_features,
                      slice.out_offset, group_count(slice.out_features, slice.out_offset),
                      slice.y,          slice.y_stride,
                      slice.base,       slice.base_stride};
  }
  gemm.base_blocks = base_blocks(gemm);
  gemm.shrink_blocks = shrink_blocks(gemm);
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

namespace dw {
namespace {

// Slots with few tokens, or all: both stages from packed codes.
dw_status run_shrink(const dw_gemm& args, const Workspace& cut, dw_record_kind record,
                     cudaStream_t stream) {
  const bool in_place = readable_in_place(args);
  if (!in_place) DW_RETURN_IF_ERROR(check_launch(launch_prepare(args, cut, stream), "prepare"));
  const Gemm gemm = describe(args, cut, in_place, record);
  if (record == DW_LORA) return check_launch(launch_lora_shrink(gemm, stream), "shrink of LoRAs");
  if (has_base(gemm)) {
    DW_RETURN_IF_ERROR(check_launch(launch_base(gemm, stream), "base"));
  }
  return check_launch(launch_shrink(gemm, stream), "shrink");
}

dw_status run_expand(const dw_gemm& args, const Workspace& cut, dw_record_kind record,
                     cudaStream_t stream) {
  const Gemm gemm = describe(args, cut, readable_in_place(args), record);
  if (record == DW_LORA) return check_launch(launch_lora_expand(gemm, stream), "expand of LoRAs");
  return check_launch(launch_expand(gemm, stream), "expand");
}

// Slots with many: both stages as products of packed codes, unpacked in registers, with 16-bit
// images of the tokens.
dw_status run_dense(const dw_gemm& args, const Workspace& cut, dw_record_kind record,
                    cudaStream_t stream) {
  const Gemm gemm = describe(args, cut, true, record);
  DW_RETURN_IF_ERROR(check_launch(prefill::launch_x_image(args, gemm, stream), "image of x"));
  DW_RETURN_IF_ERROR(check_launch(prefill::launch_stage1(gemm, stream), "prefill stage 1"));
  return check_launch(prefill::launch_stage2(gemm, stream), "prefill stage 2");
}

dw_status run(const dw_gemm& args, dw_record_kind record, void* stream_pointer) {
  const Workspace cut = cut_workspace(args);
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_pointer);
  if (cut.image_tiles > 0) DW_RETURN_IF_ERROR(run_dense(args, cut, record, stream));
  DW_RETURN_IF_ERROR(run_shrink(args, cut, record, stream));
  return run_expand(args, cut, record, stream);
}

}  // namespace
}  // namespace dw

dw_status dw_delta_gemm(const dw_gemm* args, void* stream) {
  if (args == nullptr) return dw::fail(DW_ERROR_ARGUMENT, "null argument");
  DW_RETURN_IF_ERROR(dw::check_delta(*args));
  return dw::run(*args, DW_FACTORED, stream);
}

dw_status dw_delta_shrink(const dw_gemm* args, void* stream) {
  if (args == nullptr) return dw::fail(DW_ERROR_ARGUMENT, "null argument");
  DW_RETURN_IF_ERROR(dw::check_half(*args, false));
  return dw::run_shrink(*args, dw::cut_workspace(*args), DW_FACTORED,
                        static_cast<cudaStream_t>(stream));
}

dw_status dw_delta_expand(const dw_gemm* args, void* stream) {
  if (args == nullptr) return dw::fail(DW_ERROR_ARGUMENT, "null argument");
  DW_RETURN_IF_ERROR(dw::check_half(*args, true));
  return dw::run_expand(*args, dw::cut_workspace(*args), DW_FACTORED,
                        static_cast<cudaStream_t>(stream));
}

// A fusion's experts are the bands of one factored product, weighed where sigma is: on its ranks.
dw_status dw_gated_lora(const dw_gemm* args, void* stream) {
  if (args == nullptr) return dw::fail(DW_ERROR_ARGUMENT, "null argument");
  DW_RETURN_IF_ERROR(dw::check_lora(*args));
  return dw::run(*args, DW_LORA, stream);
}

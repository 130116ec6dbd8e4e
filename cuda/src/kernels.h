// SPDX-License-Identifier: Apache-2.0
// Launchers of the kernels, one per file, and what they pass to the device.
#ifndef DELTAWEAVE_SRC_KERNELS_H_
#define DELTAWEAVE_SRC_KERNELS_H_

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "deltaweave.h"

namespace dw {

struct Slice {
  int projection, out_features, out_offset, groups;
  void* y;
  int64_t y_stride;
};

// One call of dw_delta_gemm as the device sees it.
struct Gemm {
  const unsigned char* arena;
  const int64_t* directory;
  int slot_count;
  int token_count, in_groups;
  const __half* x;  // [tokens, 128 * in_groups]
  int64_t x_stride;
  const float* x_scale;  // undoes x's power of two; null for 1
  const int* plan;
  float* h;
  float* h_max;
  int ranks, blocks;  // of h and h_max
  int slice_count;
  Slice slices[DW_MAX_SLICES];
};

dw_status check_launch(cudaError_t error, const char* what);
int multiprocessors();

cudaError_t launch_plan(const int32_t* slots, int tokens, int slot_count, int chunk, int* plan,
                        cudaStream_t stream);
cudaError_t launch_prepare(const dw_gemm& args, int padded_in, __half* x, float* x_scale,
                           cudaStream_t stream);
cudaError_t launch_shrink(const Gemm& gemm, int chunk, cudaStream_t stream);
cudaError_t launch_expand(const Gemm& gemm, int chunk, dw_dtype dtype, cudaStream_t stream);

}  // namespace dw

#endif  // DELTAWEAVE_SRC_KERNELS_H_

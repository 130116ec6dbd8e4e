// SPDX-License-Identifier: Apache-2.0
// Every token's own bias, for up to four outputs (q, k, v) in one launch:
//
//   y_s[t] += the tenant's float [features], rounded to y's dtype, or the base's, or nothing
//
//   y  fp16 or bf16 [tokens, features], read and written   base  y's dtype [features] or null
//
// Roofline: bytes, y read and written once. A thread takes eight neighbouring elements of a token.
#include "batch.cuh"
#include "batch_args.h"
#include "kernels.h"
#include "layout.h"
#include "status.h"

namespace dw {
namespace {

constexpr int kBlock = 128;  // threads

// Grid: tokens, blocks of 8 * kBlock features, slices.
template <typename T>
__global__ void __launch_bounds__(kBlock) add_bias_kernel(const __grid_constant__ dw_bias args) {
  const dw_bias_slice& slice = args.slices[blockIdx.z];
  const int first = (blockIdx.y * kBlock + threadIdx.x) * 8;
  if (first >= slice.features) return;
  const int token = blockIdx.x;
  const float* own = find_values(args.batch, slice.parameter, token);
  const T* base = static_cast<const T*>(slice.bias);
  if (own == nullptr && base == nullptr) return;
  T* y = static_cast<T*>(slice.y) + token * slice.y_stride;
  float bias[8], values[8];
  load_parameter(own, base, first, slice.features, bias);
  load_octet(y, first, slice.features, values);
#pragma unroll
  for (int i = 0; i < 8; ++i) values[i] += bias[i];
  store_octet(y, first, slice.features, values);
}

template <typename T>
cudaError_t launch(const dw_bias& args, cudaStream_t stream) {
  int features = 0;
  for (int s = 0; s < args.slice_count; ++s) {
    features = args.slices[s].features > features ? args.slices[s].features : features;
  }
  const dim3 grid(args.batch.token_count, ceil_div(features, 8 * kBlock), args.slice_count);
  add_bias_kernel<T><<<grid, kBlock, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace
}  // namespace dw

dw_status dw_add_bias(const dw_bias* args, void* stream_pointer) {
  if (args == nullptr) return dw::fail(DW_ERROR_ARGUMENT, "null argument");
  DW_RETURN_IF_ERROR(dw::check_bias(*args));
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_pointer);
  return dw::check_launch(args->batch.dtype == DW_BFLOAT16
                              ? dw::launch<__nv_bfloat16>(*args, stream)
                              : dw::launch<__half>(*args, stream),
                          "dw_add_bias");
}

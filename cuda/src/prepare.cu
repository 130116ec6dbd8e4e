// SPDX-License-Identifier: Apache-2.0
// Activations for the first product: fp16 rows in whole groups of 128, for inputs that stage 1
// cannot read where they are (rows not aligned to 16 bytes, features that end within a group).
//
//   x  [tokens, in_features] fp16 or bf16  ->  [tokens, padded_in] fp16, zeros in front of
//   in_offset and at the end x_scale  float [tokens]: bf16 rows are multiplied by a power of two
//   that brings their largest element to 2^13; the inverse goes here. Eight bits of bf16 mantissa
//   fit into fp16's eleven, so only elements 2^38 below it are lost.
//
// One block a token; reads and writes each row once more than the product itself.
#include <cuda_bf16.h>

#include "fragment.cuh"
#include "kernels.h"

namespace dw {
namespace {

__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ float block_max(float value) {
  __shared__ float partial[kWarps];
  for (int step = 16; step > 0; step /= 2) {
    value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, step));
  }
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) value = fmaxf(value, partial[w]);
  return value;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    prepare_kernel(const T* x, int64_t stride, int features, int offset, int padded, __half* out,
                   float* x_scale) {
  const T* row = x + blockIdx.x * stride;
  float scale = 1.f;
  if constexpr (!std::is_same_v<T, __half>) {
    float largest = 0.f;
    for (int k = threadIdx.x; k < features; k += kThreads) {
      largest = fmaxf(largest, fabsf(to_float(row[k])));
    }
    scale = normalizer<13>(block_max(largest));
  }
  if (threadIdx.x == 0) x_scale[blockIdx.x] = 1.f / scale;
  __half* to = out + static_cast<int64_t>(blockIdx.x) * padded;
  for (int k = threadIdx.x; k < padded; k += kThreads) {
    const int from = k - offset;
    const bool inside = from >= 0 && from < features;
    to[k] = inside ? __float2half_rn(to_float(row[from]) * scale) : __ushort_as_half(0);
  }
}

}  // namespace

cudaError_t launch_prepare(const dw_gemm& args, const Workspace& cut, cudaStream_t stream) {
  unsigned char* workspace = static_cast<unsigned char*>(args.workspace);
  __half* x = reinterpret_cast<__half*>(workspace + cut.x);
  float* x_scale = reinterpret_cast<float*>(workspace + cut.x_scale);
  const auto launch = [&](auto* typed) {
    prepare_kernel<<<args.token_count, kThreads, 0, stream>>>(
        typed, args.x_stride, args.in_features, args.in_offset, cut.padded_in, x, x_scale);
  };
  if (args.dtype == DW_BFLOAT16) {
    launch(static_cast<const __nv_bfloat16*>(args.x));
  } else {
    launch(static_cast<const __half*>(args.x));
  }
  return cudaGetLastError();
}

}  // namespace dw

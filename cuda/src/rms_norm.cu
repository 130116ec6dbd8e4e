// SPDX-License-Identifier: Apache-2.0
// RMSNorm with every token's own weight:
//
//   y[t, i] = cast(x[t, i] * rsqrt(mean(x[t, i]^2) + epsilon)) * weight[slot of t]
//
//   x, y  fp16 or bf16 [tokens, rows a token, features]   weight  the tenant's float [features],
//   rounded to x's dtype, or the base's in that dtype
//
// Rounded twice, as Hugging Face's LlamaRMSNorm does: the normalized value to x's dtype, then its
// product with the weight. Sums are fp32, in an order that depends on features alone.
//
// Roofline: bytes, x read and y written once (x's second reading comes from L1), plus the tenant's
// weight. A decode step is all latency: 8 KB a token at 4096 features.
//
// Up to 256 features a warp takes a row, beyond that a block of threads; a thread takes octets of
// neighbouring elements.
#include "batch.cuh"
#include "batch_args.h"
#include "kernels.h"
#include "layout.h"
#include "status.h"

namespace dw {
namespace {

constexpr int kBlock = 256;  // threads

// The sum over a row's threads, the same bits in all of them.
template <int kRowThreads>
__device__ __forceinline__ float sum_row(float value) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  if constexpr (kRowThreads == 32) return value;
  __shared__ float partial[kBlock / 32];
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  value = 0.f;
#pragma unroll
  for (int warp = 0; warp < kBlock / 32; ++warp) value += partial[warp];
  return value;
}

template <typename T, int kRowThreads>
__global__ void __launch_bounds__(kBlock)
    rms_norm_kernel(const __grid_constant__ dw_norm norm, int rows) {
  const int row = blockIdx.x * (kBlock / kRowThreads) + threadIdx.x / kRowThreads;
  if (row >= rows) return;
  const int token = row / norm.rows_per_token, place = row % norm.rows_per_token;
  const T* x =
      static_cast<const T*>(norm.x) + token * norm.x_token_stride + place * norm.x_row_stride;
  T* y = static_cast<T*>(norm.y) + token * norm.y_token_stride + place * norm.y_row_stride;
  const float* own = find_values(norm.batch, norm.parameter, token);
  const int start = threadIdx.x % kRowThreads * 8;
  float values[8], sum = 0.f;
  for (int first = start; first < norm.features; first += 8 * kRowThreads) {
    load_octet(x, first, norm.features, values);
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += values[i] * values[i];
  }
  const float scale = rsqrtf(sum_row<kRowThreads>(sum) / norm.features + norm.epsilon);
  const T* base = static_cast<const T*>(norm.weight);
  for (int first = start; first < norm.features; first += 8 * kRowThreads) {
    float weights[8];
    load_parameter(own, base, first, norm.features, weights);
    load_octet(x, first, norm.features, values);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      values[i] = to_float(rounded<T>(values[i] * scale)) * weights[i];
    }
    store_octet(y, first, norm.features, values);
  }
}

template <typename T, int kRowThreads>
cudaError_t launch(const dw_norm& args, cudaStream_t stream) {
  const int rows = args.batch.token_count * args.rows_per_token;
  rms_norm_kernel<T, kRowThreads>
      <<<ceil_div(rows, kBlock / kRowThreads), kBlock, 0, stream>>>(args, rows);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_typed(const dw_norm& args, cudaStream_t stream) {
  return args.features <= 256 ? launch<T, 32>(args, stream) : launch<T, kBlock>(args, stream);
}

}  // namespace
}  // namespace dw

dw_status dw_rms_norm(const dw_norm* args, void* stream_pointer) {
  if (args == nullptr) return dw::fail(DW_ERROR_ARGUMENT, "null argument");
  DW_RETURN_IF_ERROR(dw::check_norm(*args));
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_pointer);
  return dw::check_launch(args->batch.dtype == DW_BFLOAT16
                              ? dw::launch_typed<__nv_bfloat16>(*args, stream)
                              : dw::launch_typed<__half>(*args, stream),
                          "dw_rms_norm");
}

// SPDX-License-Identifier: Apache-2.0
// The operands of the prefill products as images (prefill.cuh): x before the first, h before the
// second.
//
//   x  fp16 or bf16 [tokens, in_features] -> image of [chunk's rows, 128 * in_groups] a chunk,
//   fp16;
//      x_scale float [tokens in plan order] undoes the power of two of bf16 rows
//   h  float [tiles, slices, tokens in plan order, ranks] -> its tiles' sum as an image of [chunk's
//      rows, ranks] a slice and chunk, fp16, times a power of two a token that brings the largest
//      to 2^7; h_scale float [slices, tokens] undoes it
//
// One block of threads a token. Bytes: both are read twice (the second time from cache) and written
// once.
#include <cuda_bf16.h>

#include "prefill.cuh"

namespace dw {
namespace prefill {
namespace {

constexpr int kRowThreads = 256;

__device__ float block_max(float value) {
  __shared__ float partial[kRowThreads / 32];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, step));
  }
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kRowThreads / 32; ++w) value = fmaxf(value, partial[w]);
  return value;
}

// Four consecutive values, 4c .. 4c + 3 of 16, to their places in a row of an image.
__device__ __forceinline__ void store_quad(unsigned char* image, int rows, int row, int k,
                                           const float (&v)[4]) {
  const int c = k / 4 % 4;
  unsigned char* to = image + static_cast<int64_t>(k / 16 * 2) * rows * 16 + row * 16 + 4 * c;
  *reinterpret_cast<__half2*>(to) = __floats2half2_rn(v[0], v[1]);
  *reinterpret_cast<__half2*>(to + static_cast<int64_t>(rows) * 16) = __floats2half2_rn(v[2], v[3]);
}

__device__ __forceinline__ float to_float(__half value) { return __half2float(value); }
__device__ __forceinline__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <typename T>
__global__ void __launch_bounds__(kRowThreads)
    x_kernel(const __grid_constant__ Gemm gemm, const T* x, int64_t stride, int features,
             int offset) {
  after_previous();
  let_next_begin();
  const int order = blockIdx.x;
  if (order >= placed_tokens(gemm)) return;
  const int token = token_at(gemm, order);
  const T* row = x + token * stride - offset;
  const auto value = [&](int k) {
    return k >= offset && k < offset + features ? to_float(row[k]) : 0.f;
  };
  float scale = 1.f;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    float largest = 0.f;
    for (int k = threadIdx.x; k < offset + features; k += kRowThreads) {
      largest = fmaxf(largest, fabsf(value(k)));
    }
    scale = normalizer<13>(block_max(largest));
  }
  if (threadIdx.x == 0) gemm.image_scale[order] = weight_of(gemm, token) / scale;
  const int4 chunk = chunk_of(gemm, chunk_at(gemm, order));
  const int width = kGroup * gemm.in_groups, rows = image_rows(chunk.z);
  unsigned char* image = gemm.image + static_cast<int64_t>(chunk.w) * width * 2;
  // Products take features 8c + 4 * half + r of 32: a quad of an image's 16 is half an eight.
  for (int i = threadIdx.x; i < width / 4; i += kRowThreads) {
    const int from = 4 * i, c = from % 32 / 8, half = from % 8 / 4;
    const int k = from / 32 * 32 + 16 * half + 4 * c;
    const float quad[4] = {value(from) * scale, value(from + 1) * scale, value(from + 2) * scale,
                           value(from + 3) * scale};
    store_quad(image, rows, order - chunk.y, k, quad);
  }
}

__global__ void __launch_bounds__(kRowThreads) h_kernel(const __grid_constant__ Gemm gemm) {
  after_previous();
  let_next_begin();
  const int order = blockIdx.x, slice = blockIdx.y;
  if (order >= placed_tokens(gemm)) return;
  const int4 chunk = chunk_of(gemm, chunk_at(gemm, order));
  const int64_t* row = directory_row(gemm, gemm.slices[slice].projection, chunk.x);
  if (!is_factored(row)) return;
  const int quads = static_cast<int>(row[DW_FIELD_PADDED_RANK]) / 4;
  float largest = 0.f;
  for (int quad = threadIdx.x; quad < quads; quad += kRowThreads) {
    largest = fmaxf(largest, largest_of(h_quad(gemm, slice, order, quad)));
  }
  const float scale = normalizer<7>(block_max(largest));  // of h times what x's image was scaled by
  const int64_t place = static_cast<int64_t>(slice) * gemm.token_count + order;
  if (threadIdx.x == 0) gemm.h_scale[place] = gemm.image_scale[order] / scale;
  const int rows = image_rows(chunk.z);
  unsigned char* image = h_image(gemm, slice, chunk);
  for (int quad = threadIdx.x; quad < quads; quad += kRowThreads) {
    const float4 v = h_quad(gemm, slice, order, quad);
    const float scaled[4] = {v.x * scale, v.y * scale, v.z * scale, v.w * scale};
    store_quad(image, rows, order - chunk.y, 4 * quad, scaled);
  }
}

}  // namespace

cudaError_t launch_x_image(const dw_gemm& args, const Gemm& gemm, cudaStream_t stream) {
  const auto launch = [&](auto kernel, auto* x) {
    return launch_dependent(kernel, dim3(gemm.token_count), kRowThreads, 0, stream, gemm, x,
                            args.x_stride, int{args.in_features}, int{args.in_offset});
  };
  if (args.dtype == DW_BFLOAT16) {
    return launch(x_kernel<__nv_bfloat16>, static_cast<const __nv_bfloat16*>(args.x));
  }
  return launch(x_kernel<__half>, static_cast<const __half*>(args.x));
}

cudaError_t launch_h_image(const Gemm& gemm, cudaStream_t stream) {
  return launch_dependent(h_kernel, dim3(gemm.token_count, gemm.slice_count), kRowThreads, 0,
                          stream, gemm);
}

}  // namespace prefill
}  // namespace dw

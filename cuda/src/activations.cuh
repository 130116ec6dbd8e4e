// SPDX-License-Identifier: Apache-2.0
// x as the tensor core's eight columns: what a warp of stage 1 multiplies one block of ranks after
// another with.
#ifndef DELTAWEAVE_SRC_ACTIVATIONS_CUH_
#define DELTAWEAVE_SRC_ACTIVATIONS_CUH_

#include <cuda_bf16.h>

#include <type_traits>

#include "fragment.cuh"
#include "step.cuh"

namespace dw {

// x of eight tokens and up to kGroups groups of 128 features, kStride groups apart.
template <int kGroups, int kStride>
struct Activations {
  uint4 of[kGroups][4];

  float inverse[2];  // of tokens 2c and 2c + 1: what undoes their rows' power of two, times weight

  // The first `count` groups from `first` on; `token` is the row of x of this lane's column, lane /
  // 4. A bf16 row's part is multiplied by a power of two that lets it fit into fp16.
  template <typename T>
  __device__ __forceinline__ void load(const Gemm& gemm, int64_t token, int first, int count) {
    const int lane = threadIdx.x % 32;
    const T* row =
        static_cast<const T*>(gemm.x) + token * gemm.x_stride + first * kGroup + 8 * (lane % 4);
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        of[g][i] = make_uint4(0, 0, 0, 0);
        if (g < count) {
          of[g][i] = __ldcg(reinterpret_cast<const uint4*>(row + g * kStride * kGroup + 32 * i));
        }
      }
    }
    float factor = gemm.x_scale == nullptr ? 1.f : __ldcg(gemm.x_scale + token);
    if constexpr (std::is_same_v<T, __nv_bfloat16>) factor = to_half();
    factor *= weight_of(gemm, token);
    inverse[0] = __shfl_sync(0xffffffffu, factor, 8 * (lane % 4));
    inverse[1] = __shfl_sync(0xffffffffu, factor, 8 * (lane % 4) + 4);
  }

  // The two registers of product f of a group.
  __device__ __forceinline__ uint2 columns(int g, int f) const {
    const uint4& four = of[g][f / 2];
    return f % 2 ? make_uint2(four.z, four.w) : make_uint2(four.x, four.y);
  }

 private:
  __device__ __forceinline__ float to_half() {
    __nv_bfloat162 most = __float2bfloat162_rn(0.f);
    for_all([&](uint32_t& pair) {
      most = __hmax2(most, __habs2(reinterpret_cast<__nv_bfloat162&>(pair)));
    });
    float largest = fmaxf(__low2float(most), __high2float(most));
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
    const float factor = normalizer<13>(largest);
    for_all([&](uint32_t& pair) {
      const float low = __uint_as_float(pair << 16), high = __uint_as_float(pair & 0xffff0000u);
      pair = bits_of(__floats2half2_rn(low * factor, high * factor));
    });
    return 1.f / factor;
  }

  template <typename Body>
  __device__ __forceinline__ void for_all(Body&& body) {
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        body(of[g][i].x);
        body(of[g][i].y);
        body(of[g][i].z);
        body(of[g][i].w);
      }
    }
  }
};

}  // namespace dw

#endif  // DELTAWEAVE_SRC_ACTIVATIONS_CUH_

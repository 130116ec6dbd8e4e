// SPDX-License-Identifier: Apache-2.0
// x as the tensor core's eight columns: what a warp of stage 1 multiplies one block of ranks after
// another with. Either a token a column, as halves, or two columns of signed bytes a token, for up
// to kFewTokens.
#ifndef DELTAWEAVE_SRC_ACTIVATIONS_CUH_
#define DELTAWEAVE_SRC_ACTIVATIONS_CUH_

#include <cuda_bf16.h>

#include <type_traits>

#include "batch.cuh"
#include "fragment.cuh"
#include "step.cuh"

namespace dw {

// x of eight tokens and up to kGroups groups of 128 features, kStride groups apart.
template <int kGroups, int kStride>
struct Activations {
  // Of a block of ranks: tokens 2c and 2c + 1 of rank 2q, and of rank 2q + 1.
  struct BlockSums {
    float of[4];
  };

  uint4 of[kGroups][4];
  float inverse[2];  // of tokens 2c and 2c + 1: what undoes their rows' power of two, times weight

  // Lays a block's sums, of ranks 2q and 2q + 1, out as [token, rank].
  template <int kBits>
  __device__ __forceinline__ void store(const BlockSums& acc, int tokens, int pitch,
                                        float* to) const {
    const int q = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (2 * c + i >= tokens) break;
      const float2 sums = make_float2(acc.of[i] * inverse[i], acc.of[2 + i] * inverse[i]);
      *reinterpret_cast<float2*>(to + (2 * c + i) * pitch + 2 * q) = sums;
    }
  }

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

// x of up to kFewTokens tokens as whole steps, hi * 256 + lo. Columns 2t and 2t + 1 are hi and lo
// of token t; the largest value of a token's part is kMostSteps steps.
template <int kGroups, int kStride>
struct IntegerActivations {
  // Of a block of ranks: token c of rank 2q, and of rank 2q + 1, times 2^most_place.
  struct BlockSums {
    float of[2];
  };

  uint32_t of[kGroups][8];  // this lane's operand of product f (integers() of fragment.cuh)
  float sum[kGroups];       // of token c, in steps
  float inverse;            // of token c: the size of a step, times weight

  using Scratch = uint32_t[kGroups][2][4][8];  // group, hi and lo, c, operand: of one token

  // Products f and f + 2 are multiplied together: the tensor core wants neighbouring registers.
  __device__ __forceinline__ uint32_t operand(int g, int f) const {
    return of[g][f / 4 * 4 + f % 2 * 2 + f / 2 % 2];
  }

  // The first `count` groups from `first` on, of `tokens` tokens from `order` in plan order on.
  template <typename T>
  __device__ __forceinline__ void load(const Gemm& gemm, int order, int tokens, int first,
                                       int count, Scratch& scratch) {
    const int lane = threadIdx.x % 32, q = lane / 4, c = lane % 4;
    inverse = 0.f;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      sum[g] = 0.f;
#pragma unroll
      for (int f = 0; f < 8; ++f) of[g][f] = 0;
    }
    __syncwarp();  // what lies in scratch has been read
    int64_t token = token_at(gemm, order);
    Raw raw = read<T>(gemm, token, first, count);
#pragma unroll 1  // code that was not run before is read from memory
    for (int t = 0; t < tokens; ++t) {
      const float size_weight = weight(gemm, token);
      const Raw now = raw;
      if (t + 1 < tokens) {
        token = token_at(gemm, order + t + 1);
        raw = read<T>(gemm, token, first, count);
      }
      const Steps steps = load_token<T>(now, t, scratch);
      if (c == t) inverse = steps.size * size_weight;
      __syncwarp();
      if (q / 2 == t) {
#pragma unroll
        for (int g = 0; g < kGroups; ++g) {
          const uint4* from = reinterpret_cast<const uint4*>(scratch[g][q % 2][c]);
          const uint4 low = from[0], high = from[1];
          const uint32_t words[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
          for (int f = 0; f < 8; ++f) of[g][f] = words[f];
        }
      }
      __syncwarp();
    }
  }

  // Lays a block's sums, of ranks 2q and 2q + 1, out as [token, rank].
  template <int kBits>
  __device__ __forceinline__ void store(const BlockSums& acc, int tokens, int pitch,
                                        float* to) const {
    const int q = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
    if (c >= tokens) return;
    const float2 sums = make_float2(acc.of[0] * inverse / (1 << most_place<kBits>(0)),
                                    acc.of[1] * inverse / (1 << most_place<kBits>(1)));
    *reinterpret_cast<float2*>(to + c * pitch + 2 * q) = sums;
  }

 private:
  struct Raw {
    uint2 of[kGroups];
  };

  template <typename T>
  static __device__ __forceinline__ Raw read(const Gemm& gemm, int64_t token, int first,
                                             int count) {
    const T* row = static_cast<const T*>(gemm.x) + token * gemm.x_stride + first * kGroup +
                   4 * (static_cast<int>(threadIdx.x) % 32);
    Raw raw = {};
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      if (g < count) raw.of[g] = __ldcg(reinterpret_cast<const uint2*>(row + g * kStride * kGroup));
    }
    return raw;
  }

  static __device__ __forceinline__ float weight(const Gemm& gemm, int64_t token) {
    return (gemm.x_scale == nullptr ? 1.f : __ldcg(gemm.x_scale + token)) * weight_of(gemm, token);
  }

  // Lane l has features 4l .. 4l + 3 of every group: product 2 * (l / 8) + l % 2 of c = l / 2 % 4.
  template <typename T>
  __device__ __forceinline__ Steps load_token(const Raw& raw, int t, Scratch& scratch) {
    const int lane = threadIdx.x % 32;
    float values[kGroups][4];
    uint32_t largest = 0;
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const T* typed = reinterpret_cast<const T*>(&raw.of[g]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        values[g][i] = to_float(typed[i]);
        largest = max(largest, __float_as_uint(values[g][i]) & 0x7fffffffu);
      }
    }
    const Steps steps(__reduce_max_sync(0xffffffffu, largest));
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      uint32_t n[4], own = 0;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        n[i] = Steps::bits(values[g][i], steps.in_one);
        own += n[i] - Steps::kOffset;
      }
      const int all = __reduce_add_sync(0xffffffffu, static_cast<int>(own));
      if (lane % 4 == t) sum[g] = static_cast<float>(all);
      uint32_t* to = &scratch[g][0][lane / 2 % 4][lane / 16 * 4 + lane % 2 * 2 + lane / 8 % 2];
      to[0] = __byte_perm(high_bytes(n[0], n[2]), high_bytes(n[1], n[3]), 0x5410);
      to[32] = __byte_perm(low_bytes(n[0], n[2]), low_bytes(n[1], n[3]), 0x5410);
    }
    return steps;
  }
};

}  // namespace dw

#endif  // DELTAWEAVE_SRC_ACTIVATIONS_CUH_

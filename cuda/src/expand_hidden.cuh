// SPDX-License-Identifier: Apache-2.0
// h as stage 2 multiplies it (expand.cu): made once a chunk and slice, for all its items.
#ifndef DELTAWEAVE_SRC_EXPAND_HIDDEN_CUH_
#define DELTAWEAVE_SRC_EXPAND_HIDDEN_CUH_

#include "fragment.cuh"
#include "step.cuh"

namespace dw {
namespace expand {

constexpr int kTokens = 8;  // of a chunk

// Consecutive groups of outputs of one chunk and slice.
struct Unit {
  int4 chunk;  // slot, first token in plan order, count
  int slice, first, last;
  const int64_t* row;  // of the directory
};

// Of h and of the widths, for all warps of a block of threads.
struct Numbers {
  int first_rank[DW_MAX_BANDS];             // of a band in h
  uint32_t largest[kTokens][DW_MAX_BANDS];  // |h|, as bits
  float factor[kTokens][DW_MAX_BANDS];      // what h is multiplied with to be stored,
  float inverse[kTokens][DW_MAX_BANDS];     // and what undoes it
  float undo;                               // u's power of two
  uint2 biases[9][8];  // bits, product: of its registers 0 and 1, of its registers 2 and 3
  float2 units[9][8];  // bits, product: of both rows 2^-place (integers() of fragment.cuh)
};

__device__ __forceinline__ int band_of(const Numbers& numbers, int quad) {
  int band = 0;
#pragma unroll
  for (int b = 1; b < DW_MAX_BANDS; ++b) band += 4 * quad >= numbers.first_rank[b];
  return band;
}

// Adds a warp's |h| to its bands' largest. All of its lanes call it, with bands in ascending order.
__device__ __forceinline__ void note_largest(Numbers& numbers, int token, int band, float4 v) {
  const uint32_t bits = largest_bits(v);
  const int first = __shfl_sync(0xffffffffu, band, 0), last = __shfl_sync(0xffffffffu, band, 31);
  for (int b = first; b <= last; ++b) {
    const uint32_t of_band = __reduce_max_sync(0xffffffffu, band == b ? bits : 0u);
    if (threadIdx.x % 32 == 0) atomicMax(&numbers.largest[token][b], of_band);
  }
}

// What h of a token and band is multiplied with. As integers |h'| must stay below 127, and h in
// fp16.
__device__ __forceinline__ void find_factor(Numbers& numbers, int token, int band, bool integers,
                                            float largest_scale) {
  uint32_t of_token = 0;
#pragma unroll
  for (int b = 0; b < DW_MAX_BANDS; ++b) of_token = max(of_token, numbers.largest[token][b]);
  float factor = normalizer<7>(__uint_as_float(of_token)), inverse = 1.f / factor;
  if (integers) {
    const float largest = __uint_as_float(numbers.largest[token][band]);
    const float most = fmaxf(largest * largest_scale, largest * (1.f / 128.f));
    factor = most > 1e-30f ? __fdividef(126.f, most) : 0.f;
    inverse = most * (1.f / 126.f);
    if (!(largest < __uint_as_float(0x7f800000u))) inverse = __uint_as_float(0x7fc00000u);
  }
  numbers.factor[token][band] = factor;
  numbers.inverse[token][band] = inverse;
}

// h of the unit's tokens as fp16 [token, pitch]; both passes read what stage 1 left in L2.
template <int kBlockThreads>
__device__ __forceinline__ void make_h(const Gemm& gemm, const Unit& unit, int pitch, __half* h,
                                       Numbers& numbers) {
  const int quads = static_cast<int>(unit.row[DW_FIELD_PADDED_RANK]) / 4;
  const float* header = reinterpret_cast<const float*>(gemm.arena + unit.row[DW_FIELD_HEADER]);
  // A thread a token and band.
  const int place = threadIdx.x, of_token = place / DW_MAX_BANDS, of_band = place % DW_MAX_BANDS;
  const float largest_scale = header[kHeaderBands + of_band];
  if (place == 0) numbers.undo = header[1];
  if (of_token < kTokens) numbers.largest[of_token][of_band] = 0;
  __syncthreads();
  // The first token's quads stay in registers: often it is the only one.
  constexpr int kKept = ceil_div((DW_MAX_RANK + 16 * DW_MAX_BANDS) / 4, kBlockThreads);
  float4 kept[kKept];
  const float4* sigma = reinterpret_cast<const float4*>(gemm.arena + unit.row[DW_FIELD_SIGMA]);
  const auto read = [&](int token, int quad) {
    const float4 s = __ldg(sigma + quad);
    const float4 v = h_quad(gemm, unit.slice, unit.chunk.y + token, quad, gemm.tiles);
    return make_float4(v.x * s.x, v.y * s.y, v.z * s.z, v.w * s.w);
  };
  for (int token = 0; token < unit.chunk.z; ++token) {
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const int quad = threadIdx.x + i * kBlockThreads;
      if (quad / 32 * 32 >= quads) break;
      float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
      if (quad < quads) v = read(token, quad);
      if (token == 0) kept[i] = v;
      note_largest(numbers, token, band_of(numbers, min(quad, quads - 1)), v);
    }
  }
  __syncthreads();
  if (of_token < unit.chunk.z) {
    find_factor(numbers, of_token, of_band, unit.chunk.z <= kFewTokens, largest_scale);
  }
  __syncthreads();
  for (int token = 0; token < unit.chunk.z; ++token) {
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const int quad = threadIdx.x + i * kBlockThreads;
      if (quad >= quads) break;
      const float4 v = token == 0 ? kept[i] : read(token, quad);
      const float factor = numbers.factor[token][band_of(numbers, quad)];
      *reinterpret_cast<uint2*>(h + token * pitch + 4 * quad) =
          make_uint2(bits_of(__floats2half2_rn(v.x * factor, v.y * factor)),
                     bits_of(__floats2half2_rn(v.z * factor, v.w * factor)));
    }
  }
}

}  // namespace expand
}  // namespace dw

#endif  // DELTAWEAVE_SRC_EXPAND_HIDDEN_CUH_

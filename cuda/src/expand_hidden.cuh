// SPDX-License-Identifier: Apache-2.0
// h as stage 2 multiplies it (expand.cu): made once a chunk and slice, for all items of a block of
// threads.
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

// A part's ranks of h, in quads, and bands.
struct Range {
  int first, last, first_band, last_band;
};

// Of the unit's record, and of h as it is stored, for all warps of a block of threads.
template <int kParts>
struct Numbers {
  int first_rank[DW_MAX_BANDS];  // of a band in h
  float largest_scale[DW_MAX_BANDS];
  float undo;                                    // u's power of two
  float inverse[kTokens][kParts][DW_MAX_BANDS];  // what undoes what h was multiplied with
};

// Reads what a record's header says. Threads of one warp call it, a lane a band.
template <int kParts>
__device__ __forceinline__ void read_header(const Gemm& gemm, const Unit& unit,
                                            Numbers<kParts>& numbers) {
  const int band = threadIdx.x % 32;
  const float* header = reinterpret_cast<const float*>(gemm.arena + unit.row[DW_FIELD_HEADER]);
  if (band < DW_MAX_BANDS) numbers.largest_scale[band] = header[kHeaderBands + band];
  if (band == DW_MAX_BANDS) numbers.undo = header[1];
}

// What h is multiplied with to be stored, and what undoes it.
struct Factor {
  float factor, inverse;

  // As halves: a power of two.
  __device__ __forceinline__ explicit Factor(float largest)
      : factor(normalizer<7>(largest)), inverse(1.f / factor) {}
  // As integers |h'| must stay below 127, and h in fp16.
  __device__ __forceinline__ Factor(float largest, float largest_scale) {
    const float most = fmaxf(largest * largest_scale, largest * (1.f / 128.f));
    factor = most > 1e-30f ? __fdividef(126.f, most) : 0.f;
    inverse = most * (1.f / 126.f);
    if (!(largest < __uint_as_float(0x7f800000u))) inverse = __uint_as_float(0x7fc00000u);
  }
};

// Makes h of a part's ranks ready, as fp16 [token, pitch], for every `step`-th token: a warp, so
// that a warp that multiplies nothing but its own part waits for no other. As integers every band
// of the part has a factor, as halves the part has one.
template <int kParts>
__device__ __forceinline__ void make_part(const Gemm& gemm, const Unit& unit, int part,
                                          const Range& range, int first_token, int step, int pitch,
                                          __half* h, Numbers<kParts>& numbers) {
  constexpr int kKept = kParts < 8 ? 8 : 2;  // quads a lane keeps; it reads others twice
  const int lane = threadIdx.x % 32, start = range.first + lane;
  const bool integers = unit.chunk.z <= kFewTokens;
  const float4* sigma = reinterpret_cast<const float4*>(gemm.arena + unit.row[DW_FIELD_SIGMA]);
#pragma unroll 1
  for (int token = first_token; token < unit.chunk.z; token += step) {
    const auto read = [&](int quad) {
      const float4 s = __ldg(sigma + quad);
      const float4 v = h_quad<8>(gemm, unit.slice, unit.chunk.y + token, quad, gemm.tiles);
      return make_float4(v.x * s.x, v.y * s.y, v.z * s.z, v.w * s.w);
    };
    const auto store = [&](int quad, float4 v, float factor) {
      *reinterpret_cast<uint2*>(h + token * pitch + 4 * quad) =
          make_uint2(bits_of(__floats2half2_rn(v.x * factor, v.y * factor)),
                     bits_of(__floats2half2_rn(v.z * factor, v.w * factor)));
    };
    float4 kept[kKept];
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      kept[i] = make_float4(0.f, 0.f, 0.f, 0.f);
      if (start + 32 * i < range.last) kept[i] = read(start + 32 * i);
    }
#pragma unroll 1
    for (int band = range.first_band; band <= range.last_band; ++band) {
      int low = range.first, high = range.last;
      if (integers) {
        low = max(low, numbers.first_rank[band] / 4);
        if (band < range.last_band) high = numbers.first_rank[band + 1] / 4;
      }
      uint32_t bits = 0;
#pragma unroll
      for (int i = 0; i < kKept; ++i) {
        const int quad = start + 32 * i;
        if (low <= quad && quad < high) bits = max(bits, largest_bits(kept[i]));
      }
#pragma unroll 1
      for (int quad = start + 32 * kKept; quad < high; quad += 32) {
        if (low <= quad) bits = max(bits, largest_bits(read(quad)));
      }
      const float largest = __uint_as_float(__reduce_max_sync(0xffffffffu, bits));
      const Factor found =
          integers ? Factor(largest, numbers.largest_scale[band]) : Factor(largest);
      if (lane == 0) numbers.inverse[token][part][integers ? band : 0] = found.inverse;
#pragma unroll
      for (int i = 0; i < kKept; ++i) {
        const int quad = start + 32 * i;
        if (low <= quad && quad < high) store(quad, kept[i], found.factor);
      }
#pragma unroll 1
      for (int quad = start + 32 * kKept; quad < high; quad += 32) {
        if (low <= quad) store(quad, read(quad), found.factor);
      }
      if (!integers) break;
    }
  }
}

}  // namespace expand
}  // namespace dw

#endif  // DELTAWEAVE_SRC_EXPAND_HIDDEN_CUH_

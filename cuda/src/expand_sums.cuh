// SPDX-License-Identifier: Apache-2.0
// What one warp of stage 2 sums over its blocks of ranks for 128 outputs of a chunk's tokens, as
// expand.cu says: as integers or as halves.
#ifndef DELTAWEAVE_SRC_EXPAND_SUMS_CUH_
#define DELTAWEAVE_SRC_EXPAND_SUMS_CUH_

#include "expand_hidden.cuh"
#include "expand_shares.cuh"
#include "fragment.cuh"

namespace dw {
namespace expand {

// By bits and product.
struct Widths {
  uint2 biases[9][8];  // of registers 0 and 1, of registers 2 and 3
  float2 units[9][8];  // of both rows 2^-place (integers() of fragment.cuh)

  template <int kBits>
  constexpr void set() {
    for (int f = 0; f < 8; ++f) {
      biases[kBits][f] = {bias_pair<kBits>(4 * f), bias_pair<kBits>(4 * f + 2)};
      units[kBits][f] = {1.f / (1 << place<kBits>(f, 0)), 1.f / (1 << place<kBits>(f, 1))};
    }
  }
};
constexpr Widths all_widths() {
  Widths widths = {};
  widths.set<1>();
  widths.set<2>();
  widths.set<3>();
  widths.set<4>();
  widths.set<8>();
  return widths;
}
__constant__ const Widths kWidths = all_widths();

// What a warp reads of a unit.
struct Hidden {
  const __half* of;  // [token, pitch]
  int pitch, tokens;
  const unsigned char* arena;
  const int64_t* row;    // of the directory
  const float* inverse;  // of the part: [token, band], tokens inverse_pitch apart
  int inverse_pitch;

  __device__ __forceinline__ const __half* levels(const Share& share) const {
    const int field = DW_FIELD_BANDS + share.band * DW_BAND_FIELDS + DW_BAND_LEVELS;
    return reinterpret_cast<const __half*>(arena + row[field]);
  }
};

// acc += consecutive blocks of `quads` quads of ranks each, times h from this lane's ranks of its
// column on; bias += what they must lose.
template <int kBits, bool kLevels, int kCount>
__device__ __forceinline__ void multiply_blocks(const unsigned char* codes, int quads,
                                                const __half* from, const __half* levels,
                                                float (&acc)[8][4], float (&bias)[4]) {
  const int lane = threadIdx.x % 32;
  const int quad = min(lane % 4, quads - 1), lane_at = lane / 4 * quads + quad;
  const int grid_at = u_code_bytes(kBits, 4 * quads) + 16 * quad;
  uint2 biases = make_uint2(0, 0);
  if constexpr (kBiased<kBits, kLevels>) biases = kWidths.biases[kBits][lane / 4];
#pragma unroll
  for (int m = 0; m < kCount; ++m) {
    const unsigned char* block = codes + m * whole_block_bytes(kBits);
    uint32_t words[2 * kBits];
    load_words<kBits>(words, block, lane_at, 8 * quads);
    // Absent ranks are those of the next block, which another warp may be making ready.
    const __half* present = from + m * block_ranks(kBits) + 4 * (quad - lane % 4);
    uint2 b = *reinterpret_cast<const uint2*>(present);
    if (kCount == 1 && lane % 4 >= quads) b = make_uint2(0, 0);
    uint32_t a[4];
    if constexpr (kBits != 16) {
      const uint4 grid = *reinterpret_cast<const uint4*>(block + grid_at);
      b.x = bits_of(__hmul2(pair_of(b.x), pair_of(grid.x)));
      b.y = bits_of(__hmul2(pair_of(b.y), pair_of(grid.z)));
      if constexpr (kBiased<kBits, kLevels>) {
        a[0] = biases.x;
        a[1] = grid.y;
        a[2] = biases.y;
        a[3] = grid.w;
        multiply(bias, a, b.x, b.y);
      }
    }
#pragma unroll
    for (int f = 0; f < 8; ++f) {
      fragment<kBits, kLevels>(a, words, f, levels);
      multiply(acc[f], a, b.x, b.y);
    }
  }
}

// A step's blocks as halves, from a rank of h on.
template <int kBits, bool kLevels>
__device__ __forceinline__ void multiply_halves(const unsigned char* codes, const Share& share,
                                                int rank, const Hidden& hidden, int token,
                                                float (&acc)[8][4], float (&bias)[4]) {
  constexpr int kMost = blocks_a_step(kBits), kRanks = block_ranks(kBits), kQuads = kRanks / 4;
  const __half* levels = kLevels ? hidden.levels(share) : nullptr;
  const __half* from = hidden.of + token * hidden.pitch + 4 * (threadIdx.x % 4) + rank;
  if (kMost == 4 && share.blocks == 4 && share.quads == kQuads) {
    multiply_blocks<kBits, kLevels, kMost>(codes, kQuads, from, levels, acc, bias);
    return;
  }
#pragma unroll 1
  for (int m = 1; m <= share.blocks; ++m) {
    const int quads = m < share.blocks ? kQuads : share.quads;
    multiply_blocks<kBits, kLevels, 1>(codes, quads, from, levels, acc, bias);
    codes += whole_block_bytes(kBits);
    from += kRanks;
  }
}

// Of up to eight tokens: columns are tokens. h has one power of two a token.
struct HalfSums {
  float acc[8][4] = {};
  float bias[4] = {};  // B[lane / 4] of two tokens, Z of the same

  template <int kBits, bool kLevels>
  __device__ __forceinline__ void add(const unsigned char* codes, const Share& share, int rank,
                                      const Hidden& hidden) {
    const int token = min(static_cast<int>(threadIdx.x) % 32 / 4, hidden.tokens - 1);
    multiply_halves<kBits, kLevels>(codes, share, rank, hidden, token, acc, bias);
  }
  __device__ __forceinline__ void end_band(const Share&, const Hidden&) {}

  // Calls body(token, its 16 outputs of this lane).
  template <typename Body>
  __device__ __forceinline__ void for_tokens(const Hidden& hidden, Body&& body) const {
    const int c = threadIdx.x % 4;
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      const int token = 2 * c + column;
      const float inverse = hidden.inverse[token * hidden.inverse_pitch];
      float outputs[16];
#pragma unroll
      for (int f = 0; f < 8; ++f) {
        const float loss = __shfl_sync(0xffffffffu, bias[column], 4 * f + c) + bias[2 + column];
        outputs[2 * f] = (acc[f][column] - loss) * inverse;
        outputs[2 * f + 1] = (acc[f][2 + column] - loss) * inverse;
      }
      body(token, outputs);
    }
  }
};

// Of up to kFewTokens: columns 2t and 2t + 1 are hi and lo of token t, h' = hi + lo / kLow, each at
// most 127: h has a factor a token and band that makes it so.
struct IntegerSums {
  static constexpr float kLow = 254.f;
  int acc[8][4] = {};    // of a band
  float lost[4] = {};    // of a band: Z of token lane % 4 in the last two (the first: no use)
  float sum[8][2] = {};  // of the bands before it and of what is no integers, of token lane % 4
  float loss = 0.f;      // Z of these

  template <int kBits, bool kLevels>
  __device__ __forceinline__ void add(const unsigned char* codes, const Share& share, int rank,
                                      const Hidden& hidden) {
    const int lane = threadIdx.x % 32, token = min(lane / 8, hidden.tokens - 1);
    if constexpr (kBiased<kBits, kLevels>) {
      add_integers<kBits>(codes, share, hidden.of + token * hidden.pitch + 4 * (lane % 4) + rank);
    } else {
      // The same registers as floats: between bands they are 0.
      float products[8][4], none[4];
      for_all([&](int f, int i) { products[f][i] = __int_as_float(acc[f][i]); });
      multiply_halves<kBits, kLevels>(codes, share, rank, hidden, token, products, none);
      for_all([&](int f, int i) { acc[f][i] = __float_as_int(products[f][i]); });
    }
  }

  // Behind the warp's last step of a band. One code for all widths: with few tokens a call's time
  // is that of reading its code.
  __device__ __forceinline__ void end_band(const Share& share, const Hidden& hidden) {
    const float inverse = hidden.inverse[threadIdx.x % 4 * hidden.inverse_pitch + share.band];
    if (share.bits == 16 || share.levels) {
#pragma unroll
      for (int f = 0; f < 8; ++f) {
        sum[f][0] = fmaf(__int_as_float(acc[f][0]), inverse, sum[f][0]);
        sum[f][1] = fmaf(__int_as_float(acc[f][2]), inverse, sum[f][1]);
      }
    } else {
#pragma unroll
      for (int f = 0; f < 8; ++f) {
        const float2 units = kWidths.units[share.bits][f];
        const float low = fmaf(static_cast<float>(acc[f][1]), 1.f / kLow, acc[f][0]);
        const float high = fmaf(static_cast<float>(acc[f][3]), 1.f / kLow, acc[f][2]);
        sum[f][0] = fmaf(low, units.x * inverse, sum[f][0]);
        sum[f][1] = fmaf(high, units.y * inverse, sum[f][1]);
      }
      loss = fmaf(lost[2], inverse, loss);
    }
    for_all([&](int f, int i) { acc[f][i] = 0; });
#pragma unroll
    for (int i = 0; i < 4; ++i) lost[i] = 0.f;
  }

  // As HalfSums.
  template <typename Body>
  __device__ __forceinline__ void for_tokens(const Hidden&, Body&& body) const {
    float outputs[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) outputs[i] = sum[i / 2][i % 2] - loss;
    body(static_cast<int>(threadIdx.x) % 4, outputs);
  }

 private:
  template <typename Body>
  static __device__ __forceinline__ void for_all(Body&& body) {
#pragma unroll
    for (int f = 0; f < 8; ++f) {
#pragma unroll
      for (int i = 0; i < 4; ++i) body(f, i);
    }
  }

  template <int kBits>
  __device__ __forceinline__ void add_integers(const unsigned char* codes, const Share& share,
                                               const __half* h) {
    constexpr int kMost = blocks_a_step(kBits), kWhole = whole_block_bytes(kBits);
    if (share.blocks == kMost && share.quads == 4) {
#pragma unroll
      for (int m = 0; m < kMost; m += 2) {
        uint32_t first[2 * kBits], second[2 * kBits] = {};
        uint32_t b1 = 0;
        const uint32_t b0 = load_block<kBits>(first, codes + m * kWhole, 4, h + 16 * m);
        if (m + 1 < kMost) {
          b1 = load_block<kBits>(second, codes + (m + 1) * kWhole, 4, h + 16 * (m + 1));
        }
        multiply_pair<kBits>(first, second, b0, b1);
      }
      return;
    }
#pragma unroll 1
    for (int m = 1; m <= share.blocks; ++m, codes += kWhole, h += 16) {
      uint32_t first[2 * kBits], none[2 * kBits] = {};
      const uint32_t b0 = load_block<kBits>(first, codes, m < share.blocks ? 4 : share.quads, h);
      multiply_pair<kBits>(first, none, b0, 0);
    }
  }

  template <int kBits>
  __device__ __forceinline__ void multiply_pair(const uint32_t (&first)[2 * kBits],
                                                const uint32_t (&second)[2 * kBits], uint32_t b0,
                                                uint32_t b1) {
#pragma unroll
    for (int f = 0; f < 8; ++f) {
      const uint32_t a[4] = {integers<kBits>(first, f, 0), integers<kBits>(first, f, 1),
                             integers<kBits>(second, f, 0), integers<kBits>(second, f, 1)};
      multiply(acc[f], a, b0, b1);
    }
  }

  // A block's codes; adds to Z; returns this lane's h': ranks 4c, 4c + 2, 4c + 1, 4c + 3
  // (integers() of fragment.cuh).
  template <int kBits>
  __device__ __forceinline__ uint32_t load_block(uint32_t (&words)[2 * kBits],
                                                 const unsigned char* block, int quads,
                                                 const __half* h) {
    const int lane = threadIdx.x % 32, quad = min(lane % 4, quads - 1);
    load_words<kBits>(words, block, lane / 4 * quads + quad, 8 * quads);
    const uint4 grid =
        *reinterpret_cast<const uint4*>(block + u_code_bytes(kBits, 4 * quads) + 16 * quad);
    uint2 four = *reinterpret_cast<const uint2*>(h);
    if (lane % 4 >= quads) four = make_uint2(0, 0);
    const __half2 low = __hmul2(pair_of(four.x), pair_of(grid.x));
    const __half2 high = __hmul2(pair_of(four.y), pair_of(grid.z));
    const uint32_t grids[4] = {grid.x, grid.y, grid.z, grid.w};  // zeros in rows 8-15
    multiply(lost, grids, bits_of(low), bits_of(high));
    return __byte_perm(bits_of(own_digit(low)), bits_of(own_digit(high)), 0x6240);
  }

  // hi or lo of two values, in the lowest byte of each.
  static __device__ __forceinline__ __half2 own_digit(__half2 value) {
    const bool is_low = threadIdx.x / 4 % 2 == 1;
    const __half2 shift = __float2half2_rn(1536.f);  // its sum with an integer ends in its bits
    const __half2 whole = __hsub2(__hadd2(value, shift), shift);
    const __half2 rest = __hfma2(whole, __float2half2_rn(is_low ? -1.f : 0.f), value);
    return __hfma2(rest, __float2half2_rn(is_low ? kLow : 1.f), shift);
  }
};

}  // namespace expand
}  // namespace dw

#endif  // DELTAWEAVE_SRC_EXPAND_SUMS_CUH_

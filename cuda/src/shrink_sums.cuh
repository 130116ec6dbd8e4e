// SPDX-License-Identifier: Apache-2.0
// What one warp of stage 1 sums over its groups of features for blocks of 16 ranks, as shrink.cu
// says: as integers or as halves.
#ifndef DELTAWEAVE_SRC_SHRINK_SUMS_CUH_
#define DELTAWEAVE_SRC_SHRINK_SUMS_CUH_

#include "activations.cuh"
#include "fragment.cuh"

namespace dw {
namespace shrink {

constexpr int kTeam = 8;  // warps of a block of threads
constexpr int kWarpGroups = kTileGroups / kTeam;

// What one stage holds, a warp: groups of 128 features of one block of ranks or of two.
DW_HD constexpr int groups_a_step(int bits) { return bits <= 4 ? 2 : 1; }
DW_HD constexpr int blocks_a_step(int bits) { return bits <= 2 ? 2 : 1; }

// Of a tile the warp-th of every eight groups.
using Columns = Activations<kWarpGroups, kTeam>;
using IntegerColumns = IntegerActivations<kWarpGroups, kTeam>;

// What sums of halves lose, by group and tokens 2c and 2c + 1.
struct Losses {
  float4 bias[kWarpGroups][4];  // -D of both tokens, twice: where sums start
  float2 sum[kWarpGroups][4];   // S of both
};

// A warp's own: of many tokens, or of few while x is read.
union WarpOnly {
  Losses losses;
  IntegerColumns::Scratch scratch;
};

template <int kBits>
__device__ __forceinline__ void find_losses(const Columns& x, Losses& losses) {
  constexpr uint32_t kOnes = 0x3c003c00u;
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int g = 0; g < kWarpGroups; ++g) {
    float found[4] = {};
#pragma unroll
    for (int f = 0; f < 8; ++f) {
      const uint32_t a[4] = {bias_pair<kBits>(4 * f), kOnes, bias_pair<kBits>(4 * f + 2), kOnes};
      const uint2 columns = x.columns(g, f);
      multiply(found, a, columns.x, columns.y);
    }
    if (lane < 4) {
      losses.bias[g][lane] = make_float4(-found[0], -found[1], -found[0], -found[1]);
      losses.sum[g][lane] = make_float2(found[2], found[3]);
    }
  }
  __syncwarp();
}

// Where a lane finds its codes and the (scale, zero) of its two ranks in a block.
struct Place {
  int bytes, lane, lanes, grid;

  __device__ __forceinline__ Place(int ranks, int bits) {
    const int pairs = ceil_div(ranks, 2),
              pair = min(static_cast<int>(threadIdx.x) % 32 / 4, pairs - 1);
    bytes = v_block_bytes(bits, ranks);
    lanes = 4 * pairs;
    lane = 4 * pair + threadIdx.x % 4;
    grid = v_code_bytes(bits, ranks) + 8 * pair;
  }
};

// What a lane's ranks are multiplied with, (scale, zero) of the first and of the second.
__device__ __forceinline__ void read_grid(const unsigned char* at, float2& low, float2& high) {
  const uint2 grid = *reinterpret_cast<const uint2*>(at);
  low = __half22float2(pair_of(grid.x));
  high = __half22float2(pair_of(grid.y));
}

// Where a warp's groups of a step begin, and how far apart its blocks of ranks and its groups are.
struct Codes {
  const unsigned char* first;
  int jump, stride;
};

// acc[b] += the warp's part of groups_a_step groups from `first` on, of blocks_a_step blocks of
// ranks. All are worked on together, so that no product waits for the one before it.
template <int kBits, bool kLevels>
__device__ __forceinline__ void add_groups(Columns::BlockSums (&acc)[blocks_a_step(kBits)],
                                           const Codes& codes, const Place& place, const Columns& x,
                                           int first, const Losses& losses, const __half* levels) {
  constexpr int kRankBlocks = blocks_a_step(kBits), kCount = groups_a_step(kBits);
  const float4* bias = &losses.bias[first][threadIdx.x % 4];
  const float2* sum = &losses.sum[first][threadIdx.x % 4];
  uint32_t words[kRankBlocks][kCount][2 * kBits];
  float product[kRankBlocks][kCount][4] = {};
#pragma unroll
  for (int b = 0; b < kRankBlocks; ++b) {
#pragma unroll
    for (int g = 0; g < kCount; ++g) {
      load_words<kBits>(words[b][g], codes.first + b * codes.jump + g * codes.stride, place.lane,
                        place.lanes);
      if constexpr (kBiased<kBits, kLevels>) {
        const float4 start = bias[4 * g];
        product[b][g][0] = start.x;
        product[b][g][1] = start.y;
        product[b][g][2] = start.z;
        product[b][g][3] = start.w;
      }
    }
  }
#pragma unroll
  for (int f = 0; f < 8; ++f) {
#pragma unroll
    for (int b = 0; b < kRankBlocks; ++b) {
#pragma unroll
      for (int g = 0; g < kCount; ++g) {
        uint32_t a[4];
        fragment<kBits, kLevels>(a, words[b][g], f, levels);
        const uint2 columns = kCount == 1 && first > 0 ? x.columns(1, f) : x.columns(g, f);
        multiply(product[b][g], a, columns.x, columns.y);
      }
    }
  }
#pragma unroll
  for (int b = 0; b < kRankBlocks; ++b) {
#pragma unroll
    for (int g = 0; g < kCount; ++g) {
      if constexpr (kBits == 16) {
#pragma unroll
        for (int j = 0; j < 4; ++j) acc[b].of[j] += product[b][g][j];
      } else {
        float2 low, high;
        read_grid(codes.first + b * codes.jump + g * codes.stride + place.grid, low, high);
        const float2 s = kBiased<kBits, kLevels> ? sum[4 * g] : make_float2(0.f, 0.f);
        acc[b].of[0] = fmaf(low.x, fmaf(-low.y, s.x, product[b][g][0]), acc[b].of[0]);
        acc[b].of[1] = fmaf(low.x, fmaf(-low.y, s.y, product[b][g][1]), acc[b].of[1]);
        acc[b].of[2] = fmaf(high.x, fmaf(-high.y, s.x, product[b][g][2]), acc[b].of[2]);
        acc[b].of[3] = fmaf(high.x, fmaf(-high.y, s.y, product[b][g][3]), acc[b].of[3]);
      }
    }
  }
}

// The i-th product of 32 features as integers: of which registers of x, and to which sum, since the
// codes of a sum are times one power of two.
struct Product {
  int part, first, second;
};
template <int kBits>
DW_HD constexpr Product product_of(int i) {
  if (kBits == 1) return {i, i, 4 + i};
  if (kBits == 3 && i >= 2) return {i == 3, 2 * i, 2 * i + 1};
  const int first = i / 2 * 4 + i % 2;  // the same pairs of registers wherever that is possible
  return {kBits == 2 ? i % 2 : 0, first, first + 2};
}
template <int kBits>
constexpr int kParts = kBits == 1   ? 4
                       : kBits <= 3 ? 2
                                    : 1;
// The first product of a part.
template <int kBits>
DW_HD constexpr Product first_of(int part) {
  return product_of<kBits>(kBits == 3 ? 3 * part : part);
}

// A row's sum of codes * x times 2^most_place, of the lane's token: whole, and less than 2^31.
template <int kBits>
__device__ __forceinline__ float joined(const int (&parts)[kParts<kBits>][4], int row) {
  int sum = 0;
#pragma unroll
  for (int p = 0; p < kParts<kBits>; ++p) {
    const int first = first_of<kBits>(p).first;
    const int factor = 1 << (most_place<kBits>(row) - place<kBits>(first, row));
    sum += (parts[p][2 * row] * 256 + parts[p][2 * row + 1]) * factor;
  }
  return static_cast<float>(sum);
}

template <int kBits, bool>
__device__ __forceinline__ void add_groups(IntegerColumns::BlockSums (&acc)[blocks_a_step(kBits)],
                                           const Codes& codes, const Place& place,
                                           const IntegerColumns& x, int first, const Losses&,
                                           const __half*) {
  constexpr int kRankBlocks = blocks_a_step(kBits), kCount = groups_a_step(kBits);
#pragma unroll
  for (int g = 0; g < kCount; ++g) {
    const bool second = kCount == 1 && first > 0;  // group
    const auto operand = [&](int f) { return second ? x.operand(1, f) : x.operand(g, f); };
    const float sum = second ? x.sum[1] : x.sum[g];
    uint32_t words[kRankBlocks][2 * kBits];
    int parts[kRankBlocks][kParts<kBits>][4] = {};
#pragma unroll
    for (int b = 0; b < kRankBlocks; ++b) {
      load_words<kBits>(words[b], codes.first + b * codes.jump + g * codes.stride, place.lane,
                        place.lanes);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Product product = product_of<kBits>(i);
#pragma unroll
      for (int b = 0; b < kRankBlocks; ++b) {
        const uint32_t a[4] = {integers<kBits>(words[b], product.first, 0),
                               integers<kBits>(words[b], product.first, 1),
                               integers<kBits>(words[b], product.second, 0),
                               integers<kBits>(words[b], product.second, 1)};
        multiply(parts[b][product.part], a, operand(product.first), operand(product.second));
      }
    }
    const float sums[2] = {sum * (1 << most_place<kBits>(0)), sum * (1 << most_place<kBits>(1))};
#pragma unroll
    for (int b = 0; b < kRankBlocks; ++b) {
      float2 low, high;
      read_grid(codes.first + b * codes.jump + g * codes.stride + place.grid, low, high);
      acc[b].of[0] = fmaf(low.x, fmaf(-low.y, sums[0], joined<kBits>(parts[b], 0)), acc[b].of[0]);
      acc[b].of[1] = fmaf(high.x, fmaf(-high.y, sums[1], joined<kBits>(parts[b], 1)), acc[b].of[1]);
    }
  }
}

}  // namespace shrink
}  // namespace dw

#endif  // DELTAWEAVE_SRC_SHRINK_SUMS_CUH_

// SPDX-License-Identifier: Apache-2.0
// A warp's part in unpacking packed factors (layout.h) to images (prefill.cuh): 16 ranks of one
// band in one group of 128 features, straight from memory to memory.
//
//   value = scale * (code - zero), in halves: code - zero is exact or rounded by 2^-11 of itself,
//   and so is the product
//
// Four kB written for 0.5 to 2 read. Of V^ a lane has eight neighbouring features, one vector of
// its image, eight times; of U^ four ranks of 16 outputs, half a vector each, and four lanes' are a
// whole sector.
#ifndef DELTAWEAVE_SRC_PREFILL_UNPACK_CUH_
#define DELTAWEAVE_SRC_PREFILL_UNPACK_CUH_

#include "prefill.cuh"

namespace dw {
namespace prefill {

constexpr int kUnit = 16;  // ranks

// A band of a factor, as its units are unpacked.
struct Factor {
  const unsigned char* from;  // the band's first block
  const __half* levels;
  unsigned char* image;
  int rank, first_row;  // of the band; its first rank's place among the record's
  int depth_tiles;      // of the image
};

// Pair j of a lane's codes as weights.
template <int kBits, bool kLevels>
__device__ __forceinline__ uint32_t weight(const uint32_t* words, int j, const __half* levels,
                                           __half2 scale, __half2 zero) {
  const __half2 code = pair_of(unpack<kBits, kLevels>(words, j, levels));
  if constexpr (kBits == 16) return bits_of(code);
  if constexpr (kLevels) return bits_of(__hmul2(code, scale));
  return bits_of(__hmul2(__hsub2(__hsub2(code, pair_of(bias_pair<kBits>(j))), zero), scale));
}

// Which of a unit's blocks holds a lane's ranks, and how many ranks that block has: a 16-bit unit
// is two blocks.
template <int kBits>
struct Place {
  int block, ranks;

  __device__ __forceinline__ Place(int rank, int unit, int rank_in_unit) {
    constexpr int kRanks = block_ranks(kBits);
    block = unit * (kUnit / kRanks) + rank_in_unit / kRanks;
    ranks = max(0, min(rank - block * kRanks, kRanks));
  }
};

template <int kBits, bool kLevels>
__device__ __forceinline__ void unpack_v(const Factor& v, int unit, int groups, int group) {
  const int lane = threadIdx.x % 32, q = lane / 4, c = lane % 4;
  const Place<kBits> place(v.rank, unit, 2 * q);
  const int rank = 2 * q % block_ranks(kBits), ranks = place.ranks;
  uint4 vectors[2][4] = {};  // of a rank, of a stretch of 32 features
  if (rank < ranks) {
    const unsigned char* block =
        v.from + static_cast<int64_t>(place.block) * groups * whole_block_bytes(kBits) +
        static_cast<int64_t>(group) * v_block_bytes(kBits, ranks);
    uint32_t words[2 * kBits];
    load_words<kBits>(words, block, 2 * rank + c, 4 * ceil_div(ranks, 2));
    uint2 grid = make_uint2(0, 0);
    if constexpr (kBits != 16) {
      grid = *reinterpret_cast<const uint2*>(block + v_code_bytes(kBits, ranks) + 4 * rank);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const __half2 entry = pair_of(i == 0 ? grid.x : grid.y);
      const __half2 scale = __low2half2(entry), zero = __high2half2(entry);
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const auto pair = [&](int f, int r) {
          return weight<kBits, kLevels>(words, 4 * f + 2 * r + i, v.levels, scale, zero);
        };
        vectors[i][k] =
            make_uint4(pair(2 * k, 0), pair(2 * k, 1), pair(2 * k + 1, 0), pair(2 * k + 1, 1));
      }
    }
  }
  const int row = v.first_row + kUnit * unit + 2 * q;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      *octet_at(v.image, v.depth_tiles, row + i, kGroup / 8 * group + 4 * k + c) = vectors[i][k];
    }
  }
}

template <int kBits, bool kLevels>
__device__ __forceinline__ void unpack_u(const Factor& u, int unit, int group) {
  const int lane = threadIdx.x % 32, q = lane / 4, c = lane % 4;
  const Place<kBits> place(u.rank, unit, 4 * c);
  const int rank = 4 * c % block_ranks(kBits), ranks = place.ranks;
  uint2 vectors[16] = {};  // of an output
  if (rank < ranks) {
    const int quads = ceil_div(ranks, 4);
    const unsigned char* block = u.from +
                                 static_cast<int64_t>(group) * u_group_bytes(kBits, u.rank) +
                                 static_cast<int64_t>(place.block) * whole_block_bytes(kBits);
    uint32_t words[2 * kBits];
    load_words<kBits>(words, block, q * quads + rank / 4, 8 * quads);
    uint4 grid = make_uint4(0, 0, 0, 0);
    if constexpr (kBits != 16) {
      grid = *reinterpret_cast<const uint4*>(block + u_code_bytes(kBits, ranks) + 4 * rank);
    }
#pragma unroll
    for (int k = 0; k < 16; ++k) {
      const int j = 4 * (k / 2) + k % 2;
      vectors[k] = make_uint2(
          weight<kBits, kLevels>(words, j, u.levels, pair_of(grid.x), pair_of(grid.z)),
          weight<kBits, kLevels>(words, j + 2, u.levels, pair_of(grid.y), pair_of(grid.w)));
    }
  }
  const int octet = (u.first_row + kUnit * unit) / 8 + c / 2;
#pragma unroll
  for (int k = 0; k < 16; ++k) {
    uint4* to = octet_at(u.image, u.depth_tiles, kGroup * group + output_place(16 * q + k), octet);
    reinterpret_cast<uint2*>(to)[c % 2] = vectors[k];
  }
}

// Zeros behind the last rank, to the end of a tile.
__device__ __forceinline__ void clear_u(const Factor& u, int unit, int group) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kGroup * 2 / 32; ++i) {
    const int index = 32 * i + lane;
    *octet_at(u.image, u.depth_tiles, kGroup * group + index / 2, 2 * unit + index % 2) =
        make_uint4(0, 0, 0, 0);
  }
}

}  // namespace prefill
}  // namespace dw

#endif  // DELTAWEAVE_SRC_PREFILL_UNPACK_CUH_

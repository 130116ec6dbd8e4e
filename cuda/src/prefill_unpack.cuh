// SPDX-License-Identifier: Apache-2.0
// A warp's part in unpacking packed factors (layout.h) to images (prefill.cuh): 16 ranks of one
// band in one group of 128 features, straight from memory to memory.
//
//   value = scale * (code - zero), in halves: code - zero is exact or rounded by 2^-11 of itself,
//   and so is the product
//
// Four kB written for 0.5 to 2 read. Of V^ a lane has eight neighbouring features, one vector of
// its image, eight times; of U^ four ranks of 16 outputs, half a vector each, and four lanes' are a
// whole sector. A lane asks for the codes of up to four groups at once.
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

// Blocks whose codes a lane asks for before it uses the first.
DW_HD constexpr int blocks_a_batch(int bits) { return bits <= 4 ? 4 : bits == 8 ? 2 : 1; }

// Groups first .. last - 1 of V^, of which there are `groups`.
template <int kBits, bool kLevels>
__device__ __forceinline__ void unpack_v(const Factor& v, int unit, int groups, int first,
                                         int last) {
  constexpr int kBatch = blocks_a_batch(kBits);
  const int lane = threadIdx.x % 32, q = lane / 4, c = lane % 4;
  const Place<kBits> place(v.rank, unit, 2 * q);
  const int rank = 2 * q % block_ranks(kBits), ranks = place.ranks;
  const int bytes = v_block_bytes(kBits, ranks);
  const unsigned char* blocks =
      v.from + static_cast<int64_t>(place.block) * groups * whole_block_bytes(kBits);
  unsigned char* to[2][2];  // of a rank, of the odd 32 features; of the first group
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    to[i / 2][i % 2] = reinterpret_cast<unsigned char*>(octet_at(
        v.image, v.depth_tiles, v.first_row + kUnit * unit + 2 * q + i / 2, 4 * (i % 2) + c));
  }
#pragma unroll 1
  for (int group = first; group < last; group += kBatch) {
    uint32_t words[kBatch][2 * kBits] = {};
    uint2 grid[kBatch] = {};
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (rank >= ranks || group + b >= last) continue;  // zeros
      const unsigned char* block = blocks + static_cast<int64_t>(group + b) * bytes;
      load_words<kBits>(words[b], block, 2 * rank + c, 4 * ceil_div(ranks, 2));
      if constexpr (kBits != 16) {
        grid[b] = *reinterpret_cast<const uint2*>(block + v_code_bytes(kBits, ranks) + 4 * rank);
      }
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (group + b >= last) break;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const __half2 entry = pair_of(i == 0 ? grid[b].x : grid[b].y);
        const __half2 scale = __low2half2(entry), zero = __high2half2(entry);
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const auto pair = [&](int f, int r) {
            return weight<kBits, kLevels>(words[b], 4 * (2 * k + f) + 2 * r + i, v.levels, scale,
                                          zero);
          };
          unsigned char* at = to[i][k % 2] + static_cast<int64_t>(2 * (group + b)) * kTileBytes;
          *reinterpret_cast<uint4*>(at + k / 2 * kTileBytes) =
              make_uint4(pair(0, 0), pair(0, 1), pair(1, 0), pair(1, 1));
        }
      }
    }
  }
}

// Groups first .. last - 1 of U^.
template <int kBits, bool kLevels>
__device__ __forceinline__ void unpack_u(const Factor& u, int unit, int first, int last) {
  constexpr int kBatch = blocks_a_batch(kBits);
  const int lane = threadIdx.x % 32, q = lane / 4, c = lane % 4;
  const Place<kBits> place(u.rank, unit, 4 * c);
  const int rank = 4 * c % block_ranks(kBits), ranks = place.ranks, quads = ceil_div(ranks, 4);
  const int group_bytes = u_group_bytes(kBits, u.rank);
  const unsigned char* blocks =
      u.from + static_cast<int64_t>(place.block) * whole_block_bytes(kBits);
  unsigned char* to[2][2];  // outputs k of 16, k / 8 and k % 2; the others' rows follow by eights
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int row = output_place(16 * q + i / 2 * 8 + i % 2);
    const int octet = (u.first_row + kUnit * unit) / 8 + c / 2;
    uint4* at = octet_at(u.image, u.depth_tiles, row, octet);
    to[i / 2][i % 2] = reinterpret_cast<unsigned char*>(at) + c % 2 * 8;
  }
#pragma unroll 1
  for (int group = first; group < last; group += kBatch) {
    uint32_t words[kBatch][2 * kBits] = {};
    uint4 grid[kBatch] = {};
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (rank >= ranks || group + b >= last) continue;  // zeros
      const unsigned char* block = blocks + static_cast<int64_t>(group + b) * group_bytes;
      load_words<kBits>(words[b], block, q * quads + rank / 4, 8 * quads);
      if constexpr (kBits != 16) {
        grid[b] = *reinterpret_cast<const uint4*>(block + u_code_bytes(kBits, ranks) + 4 * rank);
      }
    }
#pragma unroll
    for (int b = 0; b < kBatch; ++b) {
      if (group + b >= last) break;
      const int64_t tile = static_cast<int64_t>(group + b) * u.depth_tiles * kTileBytes;
#pragma unroll
      for (int k = 0; k < 16; ++k) {
        const int j = 4 * (k / 2) + k % 2;
        const uint4& entry = grid[b];
        *reinterpret_cast<uint2*>(to[k / 8][k % 2] + tile + k % 8 / 2 * 8 * 128) = make_uint2(
            weight<kBits, kLevels>(words[b], j, u.levels, pair_of(entry.x), pair_of(entry.z)),
            weight<kBits, kLevels>(words[b], j + 2, u.levels, pair_of(entry.y), pair_of(entry.w)));
      }
    }
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

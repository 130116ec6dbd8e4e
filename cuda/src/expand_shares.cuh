// SPDX-License-Identifier: Apache-2.0
// How stage 2 cuts an item, 128 outputs of a chunk over all ranks, into the parts of a team's warps
// (expand.cu).
#ifndef DELTAWEAVE_SRC_EXPAND_SHARES_CUH_
#define DELTAWEAVE_SRC_EXPAND_SHARES_CUH_

#include "expand_hidden.cuh"
#include "fragment.cuh"
#include "step.cuh"

namespace dw {
namespace expand {

constexpr int kMaxShares = 2 * DW_MAX_BANDS;

// Blocks of ranks that one stage holds.
DW_HD constexpr int blocks_a_step(int bits) { return bits <= 2 ? 4 : bits <= 4 ? 2 : 1; }

// Consecutive blocks of a band that a warp takes in steps which are alike.
struct __align__(16) Share {
  const unsigned char* u;            // of the first, in the first group of outputs
  int group_bytes;                   // to the next
  uint16_t steps, bytes;             // bytes: of a step
  uint16_t h_index;                  // the first rank
  uint8_t blocks, quads;             // of a step; quads: of the last block
  uint8_t bits, band, levels, last;  // last: of the warp's in its band
};
static_assert(sizeof(Share) <= 32, "two reads");

template <int kParts>
struct Parts {
  Share shares[kParts][kMaxShares];
  int share_count[kParts];

  __device__ __forceinline__ Range range(int part) const {
    if (share_count[part] == 0) return {};
    const Share &first = shares[part][0], &last = shares[part][share_count[part] - 1];
    const int end = last.h_index + last.steps * last.blocks * block_ranks(last.bits);
    return {first.h_index / 4, end / 4, first.band, last.band};
  }
};

// What a block of ranks costs a warp, in quarters of one of 2 bits.
DW_HD constexpr int cost_of(int bits, bool levels) {
  return levels ? 16 : bits == 16 ? 10 : bits == 8 ? 6 : bits <= 2 ? 4 : 5;
}

// Lists an item's shares, a thread a part: the item's blocks in the order of bands, cut into parts
// of equal cost.
template <int kParts>
__device__ __forceinline__ void list_shares(const Gemm& gemm, const int64_t* row,
                                            Parts<kParts>& parts, Numbers<kParts>& numbers) {
  const Shapes shapes = load_shapes(row);
  int cost = 0, ranks = 0;
#pragma unroll
  for (int b = 0; b < DW_MAX_BANDS; ++b) {
    const int bits = band_bits(shapes.of[b]), rank = band_rank(shapes.of[b]);
    if (threadIdx.x == 0) numbers.first_rank[b] = ranks;
    if (rank == 0) continue;  // no ranks lie behind the last band
    cost += block_count(bits, rank) * cost_of(bits, band_grid(shapes.of[b]) == DW_GRID_CODEBOOK);
    ranks += padded_rank(rank);
  }
  const float* sigma = reinterpret_cast<const float*>(gemm.arena + row[DW_FIELD_SIGMA]);
  for (int rank = 32 * static_cast<int>(threadIdx.x); rank < ranks; rank += 32 * blockDim.x) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(sigma + rank));
  }
  const int part = threadIdx.x;
  if (part >= kParts) return;
  int low = cost * part / kParts, high = cost * (part + 1) / kParts, count = 0, first_rank = 0;
#pragma unroll 1
  for (int b = 0; b < DW_MAX_BANDS && high > 0; ++b) {
    const int64_t* fields = row + DW_FIELD_BANDS + b * DW_BAND_FIELDS;
    const int64_t shape = fields[DW_BAND_SHAPE];
    const int bits = band_bits(shape), rank = band_rank(shape);
    if (rank == 0) break;
    const bool levels = band_grid(shape) == DW_GRID_CODEBOOK;
    const int each = cost_of(bits, levels), blocks = block_count(bits, rank);
    const int first = min(ceil_div(max(low, 0), each), blocks);
    const int stop = min(ceil_div(max(high, 0), each), blocks);
    const int most = blocks_a_step(bits), whole = whole_block_bytes(bits);
    // Of the last block some ranks may be absent.
    const int present = rank / block_ranks(bits), alike = max(0, min(stop, present) - first) / most;
    const auto set = [&](int at, int steps, int taken) {
      Share& share = parts.shares[part][count++];
      const int end = at + taken;
      const int left = end == blocks ? last_block_ranks(bits, rank) : block_ranks(bits);
      share.u = gemm.arena + fields[DW_BAND_U] + at * whole;
      share.group_bytes = u_group_bytes(bits, rank);
      share.steps = static_cast<uint16_t>(steps);
      share.bytes = static_cast<uint16_t>((taken - 1) * whole + u_block_bytes(bits, left));
      share.h_index = static_cast<uint16_t>(first_rank + at * block_ranks(bits));
      share.blocks = static_cast<uint8_t>(taken);
      share.quads = static_cast<uint8_t>(ceil_div(left, 4));
      share.bits = static_cast<uint8_t>(bits);
      share.band = static_cast<uint8_t>(b);
      share.levels = levels;
      share.last = at + steps * taken == stop;
    };
    int at = first;
    if (alike > 0) set(at, alike, most);
    at += alike * most;
    if (at < stop) set(at, 1, stop - at);
    low -= blocks * each;
    high -= blocks * each;
    first_rank += padded_rank(rank);
  }
  parts.share_count[part] = count;
}

}  // namespace expand
}  // namespace dw

#endif  // DELTAWEAVE_SRC_EXPAND_SHARES_CUH_

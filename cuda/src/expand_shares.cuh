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

// The sum up to and with this lane's of eight, and that of all.
__device__ __forceinline__ int sum_of_bands(int value) {
#pragma unroll
  for (int step = 1; step < DW_MAX_BANDS; step *= 2) {
    const int more = __shfl_up_sync(0xffffffffu, value, step, DW_MAX_BANDS);
    if (threadIdx.x % DW_MAX_BANDS >= step) value += more;
  }
  return value;
}
__device__ __forceinline__ int last_of_bands(int sum) {
  return __shfl_sync(0xffffffffu, sum, threadIdx.x % 32 | (DW_MAX_BANDS - 1));
}

// Lists an item's shares, a thread a part and band: the item's blocks in the order of bands, cut
// into parts of equal cost. All threads call it.
template <int kParts>
__device__ __forceinline__ void list_shares(const Gemm& gemm, const int64_t* row,
                                            Parts<kParts>& parts, Numbers<kParts>& numbers) {
  static_assert(DW_MAX_BANDS == 8, "lanes of a part");
  const int part = threadIdx.x / DW_MAX_BANDS, band = threadIdx.x % DW_MAX_BANDS;
  const int64_t* fields = row + DW_FIELD_BANDS + band * DW_BAND_FIELDS;
  const int64_t shape = fields[DW_BAND_SHAPE];
  const int bits = band_bits(shape), rank = band_rank(shape);
  const bool levels = band_grid(shape) == DW_GRID_CODEBOOK;
  // No ranks lie behind the last band.
  const int blocks = rank > 0 ? block_count(bits, rank) : 0, each = cost_of(bits, levels);
  const int cost_end = sum_of_bands(blocks * each), rank_end = sum_of_bands(padded_rank(rank));
  const int first_rank = rank_end - padded_rank(rank), cost_start = cost_end - blocks * each;
  const int cost = last_of_bands(cost_end), ranks = last_of_bands(rank_end);
  const float* sigma = reinterpret_cast<const float*>(gemm.arena + row[DW_FIELD_SIGMA]);
  for (int at = 32 * static_cast<int>(threadIdx.x); at < ranks; at += 32 * blockDim.x) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(sigma + at));
  }
  if (part == 0) numbers.first_rank[band] = first_rank;
  const int low = cost * part / kParts - cost_start, high = cost * (part + 1) / kParts - cost_start;
  const int first = min(ceil_div(max(low, 0), each), blocks);
  const int stop = min(ceil_div(max(high, 0), each), blocks);
  const int most = blocks_a_step(bits), whole = whole_block_bytes(bits);
  // Of the last block some ranks may be absent.
  const int present = rank / block_ranks(bits), alike = max(0, min(stop, present) - first) / most;
  const int at = first + alike * most, shares = (alike > 0) + (at < stop);
  const int share_end = sum_of_bands(shares);
  if (part >= kParts) return;
  const auto set = [&](int index, int from, int steps, int taken) {
    Share& share = parts.shares[part][index];
    const int end = from + taken;
    const int left = end == blocks ? last_block_ranks(bits, rank) : block_ranks(bits);
    share.u = gemm.arena + fields[DW_BAND_U] + from * whole;
    share.group_bytes = u_group_bytes(bits, rank);
    share.steps = static_cast<uint16_t>(steps);
    share.bytes = static_cast<uint16_t>((taken - 1) * whole + u_block_bytes(bits, left));
    share.h_index = static_cast<uint16_t>(first_rank + from * block_ranks(bits));
    share.blocks = static_cast<uint8_t>(taken);
    share.quads = static_cast<uint8_t>(ceil_div(left, 4));
    share.bits = static_cast<uint8_t>(bits);
    share.band = static_cast<uint8_t>(band);
    share.levels = levels;
    share.last = from + steps * taken == stop;
  };
  if (alike > 0) set(share_end - shares, first, alike, most);
  if (at < stop) set(share_end - 1, at, 1, stop - at);
  if (band == DW_MAX_BANDS - 1) parts.share_count[part] = share_end;
}

}  // namespace expand
}  // namespace dw

#endif  // DELTAWEAVE_SRC_EXPAND_SHARES_CUH_

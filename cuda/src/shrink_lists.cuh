// SPDX-License-Identifier: Apache-2.0
// How stage 1 finds a block of threads' share of the launch (shrink.cu): units are cut into quanta,
// a run of quanta into batches, and a batch into segments and steps, which are listed before its
// weights are asked for.
#ifndef DELTAWEAVE_SRC_SHRINK_LISTS_CUH_
#define DELTAWEAVE_SRC_SHRINK_LISTS_CUH_

#include "shrink_sums.cuh"
#include "step.cuh"

namespace dw {
namespace shrink {

constexpr int kUnits = 4;  // of a batch
constexpr int kSegments = kUnits * DW_MAX_BANDS;
constexpr int kQuanta = 1024;  // of a unit, whatever it costs
constexpr int kCost = 320;     // of a batch: no step costs less than two
constexpr int kSteps = kCost / 2 + kWarpGroups * kSegments;

// What a block of ranks costs, in halves of one of 2 bits.
DW_HD constexpr int cost_of(int bits, bool codebook) {
  return codebook ? 8 : bits <= 2 ? 2 : bits <= 4 ? 3 : 6;
}

// Consecutive blocks of ranks of one band, for one chunk of tokens, slice and tile.
struct Segment {
  const unsigned char* v;  // the band's
  const __half* levels;    // of a codebook
  float* h;                // of the chunk's first token and the band's first rank
  int order, tokens;       // first token in plan order, count
  int unit, tile;
  int first, last;  // blocks
  int pairs;        // of them that share a step
  int rank;         // of the band
  int bits;
  int first_group, groups;  // of the tile
  int first_step, steps;    // of a block
  bool codebook;

  __device__ __forceinline__ bool integers() const {
    return tokens <= kFewTokens && bits != 16 && !codebook;
  }
};

// What one stage holds: groups of a block of ranks and, if `next` is not 0, of the block that lies
// so many bytes further.
struct __align__(16) Step {
  const unsigned char* from;
  int bytes, next;
};

// What a batch consists of.
struct Lists {
  Step steps[kSteps];
  Segment segments[kSegments];
  int segment_count, step_count;
  int batch_end;  // in quanta
};

// Warp 0 lists the segments of the batch that begins a range of quanta: a lane a (unit, band). A
// block belongs to the batch in which its cost begins.
__device__ __forceinline__ void list_segments(const Gemm& gemm, Interval range, Lists& lists) {
  const int lane = threadIdx.x, band = lane % DW_MAX_BANDS;
  const int unit = range.first / kQuanta, own = unit + lane / DW_MAX_BANDS;
  Segment segment = {};
  int blocks = 0, padded = 0, each = 1;
  const int64_t* row = nullptr;
  if (own * kQuanta < range.last) {
    row = row_of(gemm, own / gemm.tiles);
    ask_for_bands(row);
    const int64_t loaded = band_shape(row, band);
    // Both loads are under way before one of them is looked at.
    const int64_t shape = is_served(gemm, row) ? loaded : 0;
    if (shape != 0) {
      segment.bits = band_bits(shape);
      segment.rank = band_rank(shape);
      segment.codebook = band_grid(shape) == DW_GRID_CODEBOOK;
      if (segment.rank > 0) blocks = block_count(segment.bits, segment.rank);
      padded = padded_rank(segment.rank);
      each = cost_of(segment.bits, segment.codebook);
    }
  }
  int cost_start = blocks * each, rank_start = padded;  // inclusive sums over the bands
#pragma unroll
  for (int step = 1; step < DW_MAX_BANDS; step *= 2) {
    const int more_cost = __shfl_up_sync(0xffffffffu, cost_start, step, DW_MAX_BANDS);
    const int more_ranks = __shfl_up_sync(0xffffffffu, rank_start, step, DW_MAX_BANDS);
    if (band >= step) {
      cost_start += more_cost;
      rank_start += more_ranks;
    }
  }
  const int cost = __shfl_sync(0xffffffffu, cost_start, lane | (DW_MAX_BANDS - 1));
  cost_start -= blocks * each;
  rank_start -= padded;
  const int most = max(1, static_cast<int>(__reduce_max_sync(0xffffffffu, cost)));
  const int end =
      min(min(range.last, (unit + kUnits) * kQuanta), range.first + max(1, kCost * kQuanta / most));
  const auto cost_at = [&](int quantum) {
    return min(max(quantum - own * kQuanta, 0), kQuanta) * cost / kQuanta - cost_start;
  };
  segment.first = ceil_div(max(cost_at(range.first), 0), each);
  segment.last = min(ceil_div(max(cost_at(end), 0), each), blocks);
  const bool valid = segment.first < segment.last;
  segment.tile = own % gemm.tiles;
  segment.first_group = segment.tile * gemm.tile_groups;
  segment.groups = min(gemm.tile_groups, gemm.in_groups - segment.first_group);
  segment.steps = ceil_div(ceil_div(segment.groups, kTeam), groups_a_step(segment.bits));
  // A band's last block may be a shorter one, which shares no step.
  const int whole = min(segment.last, segment.rank / block_ranks(segment.bits)) - segment.first;
  segment.pairs = blocks_a_step(segment.bits) == 2 ? max(whole, 0) / 2 : 0;
  const int turns = segment.last - segment.first - segment.pairs;
  const int steps = valid ? turns * segment.steps : 0;
  int stop = steps;  // inclusive sum over the segments
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int more = __shfl_up_sync(0xffffffffu, stop, step);
    if (lane >= step) stop += more;
  }
  segment.first_step = stop - steps;
  const unsigned all = __ballot_sync(0xffffffffu, valid);
  if (lane == 0) lists.segment_count = __popc(all);
  if (lane == 31) lists.step_count = stop;
  if (lane == 0) lists.batch_end = end;
  if (!valid) return;
  const int pair = own / gemm.tiles, slice = pair % gemm.slice_count;
  const int4 chunk = chunk_of(gemm, pair / gemm.slice_count);
  const int64_t* fields = row + DW_FIELD_BANDS + band * DW_BAND_FIELDS;
  segment.v = gemm.arena + fields[DW_BAND_V];
  segment.levels = reinterpret_cast<const __half*>(gemm.arena + fields[DW_BAND_LEVELS]);
  segment.order = chunk.y;
  segment.tokens = chunk.z;
  segment.unit = own;
  segment.h = h_row(gemm, segment.tile, slice, chunk.y) + rank_start;
  lists.segments[__popc(all & ((1u << lane) - 1))] = segment;
}

// Lists the steps of all segments, a thread a step.
__device__ __forceinline__ void list_steps(const Gemm& gemm, Lists& lists) {
  for (int index = threadIdx.x; index < lists.step_count; index += 32 * kTeam) {
    int s = 0;
    while (s + 1 < lists.segment_count && lists.segments[s + 1].first_step <= index) ++s;
    const Segment& segment = lists.segments[s];
    const int bits = segment.bits, place = index - segment.first_step;
    const int turn = place / segment.steps;
    const int block = segment.first + turn + min(turn, segment.pairs);
    const int first = place % segment.steps * groups_a_step(bits) * kTeam;
    const int count = min(groups_a_step(bits) * kTeam, segment.groups - first);
    const bool last = block == block_count(bits, segment.rank) - 1;
    const int whole = whole_block_bytes(bits);
    const int bytes = last ? v_block_bytes(bits, last_block_ranks(bits, segment.rank)) : whole;
    lists.steps[index] = {segment.v + static_cast<int64_t>(block) * gemm.in_groups * whole +
                              static_cast<int64_t>(segment.first_group + first) * bytes,
                          count * bytes, turn < segment.pairs ? gemm.in_groups * whole : 0};
  }
}

}  // namespace shrink
}  // namespace dw

#endif  // DELTAWEAVE_SRC_SHRINK_LISTS_CUH_

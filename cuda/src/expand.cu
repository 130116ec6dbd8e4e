// SPDX-License-Identifier: Apache-2.0
// Stage 2 of the delta product:  y[s, t, n] += sum_r U^[r, n] sigma[r] h[s, t, r]
//
//   h  float [tiles, slices, tokens in plan order, ranks], from stage 1
//   U^ packed (layout.h)
//   y  fp16 or bf16 [tokens, out]
//
// Roofline: bytes, as in stage 1; y is 2 * out bytes a token.
//
// Work item = (chunk of one tenant's tokens, slice, group of 128 out_features), all ranks. A block
// of threads takes a run of consecutive items. For each (chunk, slice) its warps first make h ready
// in shared memory, each for its own part of the ranks: the tiles' sum times sigma as fp16, times a
// power of two a token and part so that the largest becomes 2^7; U^'s scales are stored so that the
// largest is 2^6, and no product overflows or loses bits that matter. The scale varies along the
// reduction but is one number a (rank, group), so it goes into h: h' = h * scale. Outputs are the
// 16-row operand, tokens the 8 columns; a block of 16 ranks feeds eight products, one for every 16
// outputs (product f: outputs 2f, 2f + 1 of every 16).
//
// Chunks of up to kFewTokens tokens are multiplied as integers (fragment.cuh), two blocks at a
// time: h' = hi + lo / 254, for which h has a factor a part and band instead of the power of two,
// and
//
//     y[16q + 2f + i] = 2^-e * sum over bands (sum code * h' - Z) / factor,   Z = sum zero * h'
//
// Others, levels and 16 bits are multiplied as halves, h' = fp16(h * scale). One more product a
// block has the eight products' biases in rows 0-7 and the ranks' zeros in rows 8-15: what the sums
// must lose,
//
//     y[16q + 2f + i] = 2^-e * (sum code * h' - B[f] - Z),   B[f] = sum bias[f] * h'
//
// A team of warps shares an item: its blocks are cut into parts of equal cost, and a warp takes a
// part through a ring of its own (ring.cuh), another part in the next item. The sums of all parts
// are left in shared memory (Notes of stages.cuh), where the warp of the last part adds them in the
// order of parts while the others go on. What a part is depends on the band list and the launch's
// bucket of tokens alone.
#include <cuda_bf16.h>

#include <algorithm>

#include "expand_hidden.cuh"
#include "expand_shares.cuh"
#include "expand_sums.cuh"
#include "kernels.h"
#include "ring.cuh"
#include "stages.cuh"
#include "step.cuh"

namespace dw {
namespace {

using namespace expand;

constexpr int kStages = 3;
constexpr int kStageBytes = 2304;   // four blocks of 2 bits
constexpr int kRound = 2;           // tokens whose sums are left at a time
constexpr int kPitch = kGroup + 4;  // floats between tokens when sums meet
constexpr int kNotes = 2;
constexpr int kReservedBytes = 1024;  // of shared memory, a block of threads
// Blocks of threads a multiprocessor.
template <int kTeam, int kTeams>
constexpr int resident = 16 / (kTeam * kTeams);
static_assert(4 * whole_block_bytes(2) <= kStageBytes && kMaxBlockBytes <= kStageBytes &&
                  2 * whole_block_bytes(4) <= kStageBytes,
              "every step fits a stage");

using WarpRing = Ring<kStages, kStageBytes>;

template <int kTeam, int kTeams>
struct Shared {
  alignas(128) unsigned char stage[kTeams * kTeam][kStages][kStageBytes];
  uint64_t barriers[kTeams * kTeam][kStages];
  Parts<kTeam> parts;
  Numbers<kTeam> numbers;
  Notes<kNotes, 1, kTeam> notes[kTeams];
  alignas(16) float sums[kTeams][kNotes][kTeam][kRound * kPitch];
};

__device__ __forceinline__ Unit unit_at(const Gemm& gemm, int item, int end, int groups) {
  Unit unit;
  unit.chunk = chunk_of(gemm, item / groups);
  unit.first = item % groups;
  unit.slice = 0;
  while (unit.first >= gemm.slices[unit.slice].groups) {
    unit.first -= gemm.slices[unit.slice++].groups;
  }
  unit.last = min(gemm.slices[unit.slice].groups, end - item + unit.first);
  unit.row = directory_row(gemm, gemm.slices[unit.slice].projection, unit.chunk.x);
  return unit;
}

// One warp's part in its team's items of one unit.
template <typename T, int kTeam, int kTeams>
struct Run {
  using Mine = Shared<kTeam, kTeams>;

  const Gemm& gemm;
  const Unit& unit;
  Mine& shared;
  __half* h;
  int pitch;
  WarpRing& ring;
  int& place;          // in the ring, of the next step
  Turn<kNotes>& turn;  // of the team's notes
  bool& base_done;     // y may be read
  int lane, member, team;
  int ahead_group, ahead_share = 0, ahead_step = 0;

  __device__ __forceinline__ Run(const Gemm& gemm, const Unit& unit, Mine& shared, __half* h,
                                 int pitch, WarpRing& ring, int& place, Turn<kNotes>& turn,
                                 bool& base_done)
      : gemm(gemm),
        unit(unit),
        shared(shared),
        h(h),
        pitch(pitch),
        ring(ring),
        place(place),
        turn(turn),
        base_done(base_done),
        lane(threadIdx.x % 32),
        member(threadIdx.x / 32 % kTeam),
        team(threadIdx.x / 32 / kTeam),
        ahead_group(unit.first + team) {
#pragma unroll 1
    for (int s = 0; s < kStages - 1; ++s) fill(s);
  }

  // This warp's part of an item.
  __device__ __forceinline__ int part_of(int group) const {
    return (member + group / kTeams) % kTeam;
  }

  // Asks for the next step that was not asked for, to be used `ahead` steps later.
  __device__ __forceinline__ void fill(int ahead) {
    int part = part_of(ahead_group);
    while (ahead_group < unit.last && ahead_share == shared.parts.share_count[part]) {
      ahead_share = 0;
      ahead_group += kTeams;
      part = part_of(ahead_group);
    }
    if (ahead_group >= unit.last) return ring.skip();
    const Share& share = shared.parts.shares[part][ahead_share];
    const int to = place + ahead;
    ring.fill(
        to < kStages ? to : to - kStages,
        share.u + static_cast<int64_t>(ahead_group) * share.group_bytes + ahead_step * share.bytes,
        share.bytes, evicts_codes_first(gemm));
    if (++ahead_step < share.steps) return;
    ahead_step = 0;
    ++ahead_share;
  }

  // Makes h of the unit ready for this warp.
  __device__ __forceinline__ void make_h() {
    const int part = part_of(unit.first + team);
    make_part(gemm, unit, part, shared.parts.range(part), team, kTeams, pitch, h, shared.numbers);
    // Where a team has one item, a warp needs its own part alone.
    if (kTeams == 1 && unit.last - unit.first == 1) return __syncwarp();
    __syncthreads();
  }

  template <typename Sums>
  __device__ __forceinline__ void all_items() {
#pragma unroll 1
    for (int group = unit.first + team; group < unit.last; group += kTeams) {
      const int part = part_of(group), shares = shared.parts.share_count[part];
      const Hidden hidden = {h,
                             pitch,
                             unit.chunk.z,
                             gemm.arena,
                             unit.row,
                             shared.numbers.inverse[0][part],
                             kTeam * DW_MAX_BANDS};
      Sums sums;
#pragma unroll 1
      for (int s = 0; s < shares; ++s) {
        const Share share = shared.parts.shares[part][s];
        dispatch(share.bits, share.levels, [&]<int kBits, bool kLevels>() {
          const int ranks = share.blocks * block_ranks(kBits),
                    end = share.h_index + share.steps * ranks;
#pragma unroll 1
          for (int rank = share.h_index; rank < end; rank += ranks) {
            ring.wait(place);
            __syncwarp();  // all lanes have read what the next fill overwrites
            fill(kStages - 1);
            const unsigned char* codes = shared.stage[threadIdx.x / 32][place];
            sums.template add<kBits, kLevels>(codes, share, rank, hidden);
            place = place + 1 == kStages ? 0 : place + 1;
          }
        });
        if (share.last) sums.end_band(share, hidden);
      }
      finish(group, part, sums, hidden);
    }
  }

  // Before this warp reads y.
  __device__ __forceinline__ void wait_for_base() {
    if (lane == 0) wait_for_part(gemm, kBasePart, gemm.base_blocks);
    __syncwarp();
    base_done = true;
  }

  // Leaves a part's sums, a few tokens at a time; the last part's warp adds all and updates y, a
  // lane four outputs.
  template <typename Sums>
  __device__ __forceinline__ void finish(int group, int part, const Sums& sums,
                                         const Hidden& hidden) {
    const Slice& slice = gemm.slices[unit.slice];
    const int n = group * kGroup - slice.out_offset + 4 * lane;
    auto& notes = shared.notes[team];
#pragma unroll 1
    for (int round = 0; round < unit.chunk.z; round += kRound) {
      const auto& all = shared.sums[team][turn.place];
      notes.wait_empty(turn);
      sums.for_tokens(hidden, [&](int of, const float (&outputs)[16]) {
        const int token = of - round;
        if (token < 0 || token >= kRound || of >= unit.chunk.z) return;
        float* to = shared.sums[team][turn.place][part] + token * kPitch + 16 * (lane / 4);
#pragma unroll
        for (int i = 0; i < 16; i += 4) {
          *reinterpret_cast<float4*>(to + i) =
              make_float4(outputs[i], outputs[i + 1], outputs[i + 2], outputs[i + 3]);
        }
      });
      notes.publish(turn);
      if (part == kTeam - 1) {
        const int tokens = min(kRound, unit.chunk.z - round);
#pragma unroll 1
        for (int token = 0; token < tokens; ++token) {
          T* row = static_cast<T*>(slice.y) +
                   token_at(gemm, unit.chunk.y + round + token) * slice.y_stride;
          if (!base_done) wait_for_base();
          Outputs<T> outputs(row, n, slice.out_features);
          if (token == 0) notes.wait_full(turn);
          float delta[4] = {};
#pragma unroll
          for (int p = 0; p < kTeam; ++p) {
            const float4 sum = *reinterpret_cast<const float4*>(all[p] + token * kPitch + 4 * lane);
            delta[0] += sum.x;
            delta[1] += sum.y;
            delta[2] += sum.z;
            delta[3] += sum.w;
          }
#pragma unroll
          for (int i = 0; i < 4; ++i) delta[i] *= shared.numbers.undo;
          outputs.add_all(delta);
        }
        notes.release(turn);
      }
      turn.next();
    }
  }
};

// Stage 2's wait for stage 1; all threads call it.
__device__ __forceinline__ void begin_reading(const Gemm& gemm) {
  if (!has_base(gemm)) return after_previous();
  if (threadIdx.x == 0) wait_for_part(gemm, kShrinkPart, gemm.shrink_blocks);
  __syncthreads();
}

// Halves of h that a token takes: tokens 16 bytes apart in the banks' cycle of 128, so that eight
// lanes read different ones.
DW_HD constexpr int pitch_of(int ranks) { return ceil_div(ranks, 64) * 64 + 16; }

// `room`: for halves of h. Of a chunk that needs more, some tokens are taken at a time.
template <typename T, int kTeam, int kTeams>
__global__ void __launch_bounds__(32 * kTeam * kTeams, resident<kTeam, kTeams>)
    expand_kernel(const __grid_constant__ Gemm gemm, int groups, int room) {
  extern __shared__ __align__(128) unsigned char memory[];
  auto& shared = *reinterpret_cast<Shared<kTeam, kTeams>*>(memory);
  __half* h = reinterpret_cast<__half*>(memory + sizeof(shared));
  if (!has_base(gemm)) let_next_begin();
  WarpRing ring(shared.stage[threadIdx.x / 32][0], shared.barriers[threadIdx.x / 32]);
  Turn<kNotes> turn;
  int place = 0;
  if (threadIdx.x < kTeams) shared.notes[threadIdx.x].initialize();
  const Interval items = own_pieces(chunk_count(gemm) * groups);
  bool waited = false, base_done = !has_base(gemm);
  for (int item = items.first; item < items.last;) {
    Unit unit = unit_at(gemm, item, items.last, groups);
    item += unit.last - unit.first;
    ask_for_bands(unit.row);
    if (!is_served(gemm, unit.row)) continue;
    list_shares(gemm, unit.row, shared.parts, shared.numbers);
    if (threadIdx.x / 32 == kTeam * kTeams - 1) read_header(gemm, unit, shared.numbers);
    __syncthreads();
    const int pitch = pitch_of(static_cast<int>(unit.row[DW_FIELD_PADDED_RANK]));
    const int tokens = room / pitch;
    for (int left = unit.chunk.z; left > 0; left -= tokens, unit.chunk.y += tokens) {
      unit.chunk.z = min(left, tokens);
      Run<T, kTeam, kTeams> run(gemm, unit, shared, h, pitch, ring, place, turn, base_done);
      if (!waited) begin_reading(gemm);
      waited = true;
      run.make_h();
      if (unit.chunk.z <= kFewTokens) {
        run.template all_items<IntegerSums>();
      } else {
        run.template all_items<HalfSums>();
      }
      __syncthreads();
    }
  }
  if (has_base(gemm)) return end_call(gemm);
  if (!waited) after_previous();
}

// Room for h of all tokens of a chunk, or for as much of it as lets all resident blocks of threads
// run, whatever the highest rank; where that is none, for as much as one block may have.
template <int kTeam, int kTeams>
int room_for_h(const Gemm& gemm) {
  const int pitch = pitch_of(gemm.ranks), tokens = std::min(gemm.token_count, kTokens);
  const int fixed = static_cast<int>(sizeof(Shared<kTeam, kTeams>));
  const int own = (shared_bytes() / resident<kTeam, kTeams> - kReservedBytes - fixed) / 2;
  const int most = (shared_bytes_a_block() - fixed) / 2;
  return std::min(tokens * pitch, own >= pitch ? std::min(own, most) : most);
}

template <typename T, int kTeam, int kTeams>
cudaError_t launch(const Gemm& gemm, int groups, cudaStream_t stream) {
  static_assert(
      kTeam > 8 ||
          sizeof(Shared<kTeam, kTeams>) + 2 * pitch_of(intermediate_ranks(DW_MAX_RANK)) <= 99 << 10,
      "a token of the highest rank fits on sm_89 and sm_120");
  const int64_t most = static_cast<int64_t>(gemm.token_count) * groups;
  const int64_t all = static_cast<int64_t>(multiprocessors()) * resident<kTeam, kTeams>;
  const int grid = static_cast<int>(most < all ? most : all),
            room = room_for_h<kTeam, kTeams>(gemm);
  const int bytes = static_cast<int>(sizeof(Shared<kTeam, kTeams>)) + 2 * room;
  return launch_dependent(expand_kernel<T, kTeam, kTeams>, dim3(grid), 32 * kTeam * kTeams, bytes,
                          stream, gemm, groups, room);
}

// The more items there may be, the fewer warps share one.
template <typename T>
cudaError_t launch_typed(const Gemm& gemm, cudaStream_t stream) {
  int groups = 0;
  for (int s = 0; s < gemm.slice_count; ++s) groups += gemm.slices[s].groups;
  const int items = gemm.token_count * groups;
  // Beside the base's product there is room for eight warps.
  const bool fits = !has_base(gemm) && room_for_h<16, 1>(gemm) >= pitch_of(gemm.ranks);
  if (fits && items <= 64) return launch<T, 16, 1>(gemm, groups, stream);
  const bool few = gemm.token_count < 64 && items <= 16 * multiprocessors();
  if (few || gemm.token_count < 24) return launch<T, 8, 1>(gemm, groups, stream);
  if (gemm.token_count < 64) return launch<T, 4, 2>(gemm, groups, stream);
  return launch<T, 2, 4>(gemm, groups, stream);
}

}  // namespace

cudaError_t launch_expand(const Gemm& gemm, cudaStream_t stream) {
  return gemm.y_dtype == DW_BFLOAT16 ? launch_typed<__nv_bfloat16>(gemm, stream)
                                     : launch_typed<__half>(gemm, stream);
}

}  // namespace dw

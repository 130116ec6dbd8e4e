// SPDX-License-Identifier: Apache-2.0
// Stage 1 of the delta product:  h[tile, s, t, r] = sum over tile's k of V^[r, k] x[t, k]
//
// (times the token's weight)
//
//   x  fp16 or bf16 [tokens, in]   V^ packed (layout.h)   h  float [tiles, slices, tokens in plan
//   order, ranks]; stage 2 adds the tiles and multiplies by sigma
//
// Roofline: bytes. A tenant's V^ is read once from memory for up to 8 tokens; 2 * rank * in *
// tokens flops are nothing beside it. What must be avoided is the integer pipe: see fragment.cuh.
//
// A tile is at most 16 groups of 128 features; how a row is cut depends on in_features alone. The
// groups of a tile go to the 8 warps of a block of threads in turn; each keeps its part of x in
// registers, as the operand of the tensor core's 8 columns, while blocks of 16 ranks (the 16-row
// operand) stream through stages that all warps share (stages.cuh; a block's groups are
// contiguous). Of 1 and 2 bits a warp works on two groups of two blocks at a time, whose products
// do not wait for each other. The warps' sums of up to four blocks of ranks are left in shared
// memory (Notes of stages.cuh), where one warp adds them in warp order while the others go on. So a
// token's bits depend on nothing but its slot's tokens and x.
//
// Chunks of up to kFewTokens tokens are multiplied as integers (fragment.cuh): with P = sum of
// codes * x and S = sum of x, both whole, a block's sum is acc += scale * (P - zero * S). Others,
// levels and 16 bits are multiplied as halves: there P is the sum of biased codes * x, and starts
// at minus what the biases contribute, D. D and S come from one more product a group, with the
// biases in rows 0-7 and ones in rows 8-15, when x or the bit width changes.
//
// The launch's work is a unit for every (tokens of one tenant, slice, tile), all blocks of ranks of
// each cut into quanta of equal cost. A block of threads takes an equal run of quanta, in batches
// whose steps are listed first. Units count alike whatever they cost: nobody looks at all of them.
#include <algorithm>

#include "kernels.h"
#include "ring.cuh"
#include "shrink_lists.cuh"
#include "shrink_sums.cuh"
#include "stages.cuh"
#include "step.cuh"

namespace dw {
namespace {

using namespace shrink;

constexpr int kTeamThreads = 32 * kTeam;
constexpr int kResident = 2;  // blocks of threads a multiprocessor
constexpr int kStages = 3;
constexpr int kStageBytes = 8 * 2304;  // 32 blocks of 2 bits
constexpr int kTokens = 8;
constexpr int kRanks = 16;  // of a block
constexpr int kNotes = 2;
constexpr int kBatch = 4;  // blocks of ranks whose sums are handed over together

static_assert(4 * whole_block_bytes(2) * kTeam <= kStageBytes &&
                  2 * whole_block_bytes(4) * kTeam <= kStageBytes &&
                  kMaxBlockBytes * kTeam <= kStageBytes,
              "every step fits a stage");

// Where the sums of a block of ranks go: of its ranks some are present, and zeros are written
// behind them.
struct __align__(16) Block {
  float* h;  // of the first token and rank
  int tokens, present, written;
};

// What every warp adds to the sums of some blocks.
struct Sums {
  Block blocks[kBatch];
  float of[kBatch][kTeam][kTokens * kRanks];
};

struct Shared {
  unsigned char stage[kStages][kStageBytes];
  Stages<kStages, kTeam> stages;
  Lists lists;
  WarpOnly own[kTeam];
  Notes<kNotes, 1, kTeam> notes;
  Sums sums[kNotes];
};

static_assert(sizeof(Shared) <= 99 << 10, "what a block of threads may have on sm_89 and sm_120");

// One block of threads' run through its batches.
template <typename T>
struct Run {
  const Gemm& gemm;
  Shared& shared;
  int lane, warp;
  Turn<kStages> turn;  // of the stages, over all batches
  int step = 0;        // of the batch
  Turn<kNotes> note;   // of the sums
  int waiting = 0;     // blocks in the note
  int adder = 0;       // the warp that adds them up

  __device__ __forceinline__ Run(const Gemm& gemm, Shared& shared)
      : gemm(gemm), shared(shared), lane(threadIdx.x % 32), warp(threadIdx.x / 32) {}

  // Asks for a step of the batch, if there is one, `ahead` turns before its use.
  __device__ __forceinline__ void fill(int ahead) {
    if (step + ahead >= shared.lists.step_count) return;
    const Step next = shared.lists.steps[step + ahead];
    const Turn<kStages> to = turn.ahead(ahead);
    shared.stages.wait_empty(to);
    unsigned char* stage = shared.stage[to.place];
    shared.stages.expect(to, next.next == 0 ? next.bytes : 2 * next.bytes);
    const bool evict_first = evicts_codes_first(gemm);
    shared.stages.copy_wide(to, stage, next.from, next.bytes, evict_first);
    if (next.next != 0) {
      shared.stages.copy_wide(to, stage + next.bytes, next.from + next.next, next.bytes,
                              evict_first);
    }
    shared.stages.close(to);
  }

  __device__ __forceinline__ void begin_batch() {
    step = 0;
    if (warp < kStages - 1) fill(warp);
  }

  __device__ __forceinline__ void run_batch() {
    const Segment* segment = shared.lists.segments;
    const Segment* const end = segment + shared.lists.segment_count;
#pragma unroll 1
    while (segment < end) {
      if (segment->integers()) {
        const int unit = segment->unit;
        IntegerColumns x;
        x.load<T>(gemm, segment->order, segment->tokens, segment->first_group + warp,
                  own_groups(*segment), shared.own[warp].scratch);
#pragma unroll 1
        do {
          dispatch(segment->bits, segment->codebook, [&]<int kBits, bool kLevels>() {
            if constexpr (kBiased<kBits, kLevels>) blocks<kBits, kLevels>(*segment, x);
          });
        } while (++segment < end && segment->unit == unit && segment->integers());
      } else {
        Columns x;
        const int order = segment->order + min(lane / 4, segment->tokens - 1);
        x.template load<T>(gemm, token_at(gemm, order), segment->first_group + warp,
                           own_groups(*segment));
        dispatch(segment->bits, segment->codebook, [&]<int kBits, bool kLevels>() {
          if constexpr (kBiased<kBits, kLevels>) find_losses<kBits>(x, shared.own[warp].losses);
          blocks<kBits, kLevels>(*segment, x);
        });
        ++segment;
      }
    }
    if (waiting > 0) hand_over();
    __syncthreads();
  }

  // This warp's.
  __device__ __forceinline__ int own_groups(const Segment& segment) const {
    return max(0, ceil_div(segment.groups - warp, kTeam));
  }

  // One loop a width: code that a call runs once costs as much as its products.
  template <int kBits, bool kLevels, typename X>
  __device__ __forceinline__ void blocks(const Segment& segment, const X& x) {
    constexpr int kAtATime = blocks_a_step(kBits), kGroups = groups_a_step(kBits);
    const int tail = block_count(kBits, segment.rank) - 1, groups = own_groups(segment);
    const int single = segment.first + 2 * segment.pairs;  // the first that shares no step
    Place place(block_ranks(kBits), kBits);
    int count;
#pragma unroll 1
    for (int block = segment.first; block < segment.last; block += count) {
      count = kAtATime == 2 && block < single ? 2 : 1;
      if (block == tail) place = Place(last_block_ranks(kBits, segment.rank), kBits);
      typename X::BlockSums acc[kAtATime] = {};
#pragma unroll 1
      for (int start = 0; start * kTeam < segment.groups; start += kGroups) {
        if (warp == step % kTeam) fill(kStages - 1);
        shared.stages.wait_full(turn);
        if (start < groups) {
          // What is absent is done as if the first were there twice: of x it is 0, or not kept.
          const Codes codes = {shared.stage[turn.place] + warp * place.bytes,
                               count == 2 ? segment.groups * place.bytes : 0,
                               start + 1 < groups ? kTeam * place.bytes : 0};
          add_groups<kBits, kLevels>(acc, codes, place, x, start, shared.own[warp].losses,
                                     segment.levels);
        }
        shared.stages.release(turn);
        turn.next();
        ++step;
      }
      keep<kBits>(acc, count, segment, x, block);
    }
  }

  // Leaves the sums of one block or two; of enough, a warp adds all.
  template <int kBits, int kAtATime, typename X>
  __device__ __forceinline__ void keep(const typename X::BlockSums (&acc)[kAtATime], int count,
                                       const Segment& segment, const X& x, int block) {
    if (waiting == 0) shared.notes.wait_empty(note);
    Sums& sums = shared.sums[note.place];
#pragma unroll
    for (int i = 0; i < kAtATime; ++i) {
      // There is room for a second that is not counted.
      x.template store<kBits>(acc[i], segment.tokens, kRanks, sums.of[waiting + i][warp]);
      if (threadIdx.x == 0) {
        // A 16-bit block has eight ranks; zeros follow the last to the band's end.
        const int first = (block + i) * block_ranks(kBits), present = segment.rank - first;
        const int written =
            present > block_ranks(kBits) ? block_ranks(kBits) : padded_rank(segment.rank) - first;
        sums.blocks[waiting + i] = {segment.h + first, segment.tokens, present, written};
      }
    }
    waiting += count;
    if (waiting + 2 > kBatch) hand_over();
  }

  // One warp, another each time, adds the waiting blocks' sums while the others go on.
  __device__ __forceinline__ void hand_over() {
    shared.notes.publish(note);
    if (warp == adder) {
      shared.notes.wait_full(note);
#pragma unroll 1
      for (int place = lane / kRanks; place < waiting; place += 32 / kRanks) {
        add_all(shared.sums[note.place], place);
      }
      shared.notes.release(note);
    }
    adder = (adder + 1) % kTeam;
    note.next();
    waiting = 0;
  }

  // Adds the warps' sums of a block in warp order and writes h, a lane a rank.
  __device__ __forceinline__ void add_all(const Sums& sums, int place) const {
    const Block block = sums.blocks[place];
    const int rank = lane % kRanks;
    if (rank >= block.written) return;
#pragma unroll 1
    for (int token = 0; token < block.tokens; ++token) {
      float value = 0.f;
#pragma unroll
      for (int w = 0; w < kTeam; ++w) value += sums.of[place][w][token * kRanks + rank];
      block.h[static_cast<int64_t>(token) * gemm.ranks + rank] = rank < block.present ? value : 0.f;
    }
  }
};

// Behind the base's product x is there (step.cuh).
__device__ __forceinline__ void wait_for_input(const Gemm& gemm) {
  if (!has_base(gemm)) after_previous();
}

template <typename T>
__global__ void __launch_bounds__(kTeamThreads, kResident)
    shrink_kernel(const __grid_constant__ Gemm gemm) {
  extern __shared__ __align__(128) unsigned char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  let_next_begin();  // stage 2 waits for all of this before it reads h
  if (threadIdx.x == 0) {
    shared.stages.initialize();
    shared.notes.initialize();
  }
  const Interval range = own_pieces(chunk_count(gemm) * gemm.slice_count * gemm.tiles * kQuanta);
  Run<T> run(gemm, shared);
  bool waited = false;
  for (int first = range.first; first < range.last;) {
    if (threadIdx.x < 32) list_segments(gemm, {first, range.last}, shared.lists);
    __syncthreads();
    first = shared.lists.batch_end;
    list_steps(gemm, shared.lists);
    __syncthreads();
    run.begin_batch();
    if (!waited) wait_for_input(gemm);
    waited = true;
    run.run_batch();
  }
  if (!waited) wait_for_input(gemm);
  if (has_base(gemm)) end_part(gemm, kShrinkPart);
}

template <typename T>
cudaError_t launch(const Gemm& gemm, cudaStream_t stream) {
  return launch_dependent(shrink_kernel<T>, dim3(shrink_blocks(gemm)), kTeamThreads, sizeof(Shared),
                          stream, gemm);
}

}  // namespace

// With few tokens latency counts: room is left for stage 2 to begin beside this kernel's end. So it
// is beside the base's product: on some multiprocessors stage 2 waits from the start.
int shrink_blocks(const Gemm& gemm) {
  const int64_t most =
      static_cast<int64_t>(gemm.token_count) * gemm.slice_count * gemm.tiles * gemm.blocks;
  const int all = multiprocessors();
  const int own = has_base(gemm) ? all * 5 / 6 : gemm.token_count < 8 ? all : kResident * all;
  return static_cast<int>(std::min<int64_t>(most, own));
}

cudaError_t launch_shrink(const Gemm& gemm, cudaStream_t stream) {
  return gemm.x_dtype == DW_BFLOAT16 ? launch<__nv_bfloat16>(gemm, stream)
                                     : launch<__half>(gemm, stream);
}

}  // namespace dw

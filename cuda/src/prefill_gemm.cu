// SPDX-License-Identifier: Apache-2.0
// Both products of the prefill path, packed weights by images of tokens (prefill.cuh):
//
//   stage 1   h[s, t, r] = sigma[r] * sum_k V^[r, k] x[t, k]      image, times a power of two
//   stage 2   y[s, t, n] += sum_r U^[r, n] h[s, t, r]             fp16 or bf16 [tokens, out]
//
// The power of two follows from a bound on |h| (prefill.cuh), which stage 2 undoes. Of LORA h is
// multiplied by the expert's weight for the token.
//
// Roofline: the tensor cores, 2 * rank * (in + out) flops a token: for Llama-2-7B 3.3 ms of 512
// tokens at 990 TFLOP/s. 64 k of two tiles of 128 tokens and 128 weight rows are 1024 clocks of the
// tensor cores, and 32 kB and, of 2-bit weights, 2 kB from L2.
//
// Work item = (chunk of 128 tokens, in stage 2 on sm_90a two of a slot where items are many; slice;
// 128 ranks or outputs; in stage 1 a part of in_features), all k. Consecutive items are the chunks
// that share weights. A block of threads takes every gridDim-th: four warps look items up and copy
// both operands ahead into a ring of stages, over the ends of items; what multiplying needs to know
// of an item they hand over as a note. Two groups of four warps unpack 64 weight rows each to
// registers, 64 k at a time (prefill_weights.cuh), and multiply: wgmma with the weights from
// registers and the tokens from shared memory on sm_90a, while the next 64 k are unpacked; mma.sync
// elsewhere, with the same sums in the same registers. The block of threads that ends last of a
// tile's parts adds them up, in order. Sums run over k in order: a token's bits depend on nothing
// but its slot and x.
#include <cuda_bf16.h>

#include "prefill_stage1.cuh"
#include "prefill_stage2.cuh"

namespace dw {
namespace prefill {
namespace {

constexpr int kNotes = 2;  // of the item that is multiplied, and of the next

template <typename Stage, int kStages>
struct Shared {
  alignas(1024) unsigned char tokens[kStages][Stage::kTiles][Stage::kSteps][kTileBytes];
  unsigned char weights[kStages][Stage::kBlocks][kMaxBlockBytes];
  typename Stage::Note note[kNotes];
  Stages<kStages, kConsumers, kProducers> stages;
  Notes<kNotes, kConsumers, kProducers> notes;
  int arrived;  // parts of the item's tile that were ready before this one
};

// Which stage and which note are next.
template <int kStages>
struct Turns {
  Turn<kStages> stage;
  Turn<kNotes> note;
};

template <typename Stage, int kStages>
__device__ __forceinline__ void produce(const Stage& stage, const Item& item,
                                        Shared<Stage, kStages>& shared, Turns<kStages>& turns) {
  constexpr int kBytes = Stage::kSteps * kTileBytes;   // of a tile's tokens
  constexpr int kShare = Stage::kBlocks / kProducers;  // of a stage's packed blocks
  const int lane = threadIdx.x % 32, warp = static_cast<int>(threadIdx.x) / 32 - kConsumers;
  const int place = warp * kShare + min(lane, kShare - 1);
  const bool has_tile = warp < ceil_div(item.chunk.z, kTileRows);
  typename Stage::Source source(stage, item, place);
  after_previous();
  shared.notes.wait_empty(turns.note);
  stage.write(shared.note[turns.note.place], item, 32 * warp + lane);
  shared.notes.publish(turns.note);
  turns.note.next();
  const unsigned char* tokens = item.tokens + warp * stage.tile_pitch();
  Turn<kStages>& turn = turns.stage;
  for (int k = 0; k * Stage::kSteps < item.steps; ++k, turn.next(), tokens += kBytes) {
    const Block block = lane < kShare ? source.at(k) : Block{nullptr, 0};
    const int packed = __reduce_add_sync(0xffffffffu, block.bytes);
    shared.stages.wait_empty(turn);
    shared.stages.expect(turn, packed + (has_tile ? kBytes : 0));
    __syncwarp();
    if (has_tile) {
      unsigned char* to = shared.tokens[turn.place][warp % Stage::kTiles][0];
      shared.stages.copy_wide(turn, to, tokens, kBytes);
    }
    if (block.bytes > 0) {
      shared.stages.copy(turn, shared.weights[turn.place][place], block.from, block.bytes);
    }
    shared.stages.close(turn);
  }
  if (warp == kProducers - 1) stage.expect_y(item);
}

// Tells the warps that multiply that there are no more items.
template <typename Stage, int kStages>
__device__ __forceinline__ void end(Shared<Stage, kStages>& shared, Turns<kStages>& turns) {
  shared.notes.wait_empty(turns.note);
  if (threadIdx.x == 32 * kConsumers) shared.note[turns.note.place].item.steps = 0;
  shared.notes.publish(turns.note);
}

// While a step's products run, the next one's weights are unpacked: 64 k of 64 rows. They are
// multiplied with all of the item's tiles of tokens.
template <typename Stage, int kStages>
__device__ __forceinline__ void consume(const Stage& stage, const typename Stage::Note& note,
                                        Shared<Stage, kStages>& shared, Turn<kStages>& turn) {
  constexpr int kSteps = Stage::kSteps;
  typename Stage::Weights weights(stage, note);
  const int steps = note.item.steps;
  Sums sums[Stage::kTiles] = {};
  Fragments a[2] = {};
  Turn<kStages> read = turn;  // the first stage that may still be read
  for (int pair = 0; pair < steps; pair += 2) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int step = pair + i;
      if (step >= steps) break;
      const int half = kSteps == 2 ? i : 0;
      if (half == 0) shared.stages.wait_full(turn);
      wait_products<1>();  // the last but one have ended
      keep(a[i]);
      if (pair > 0 && (kSteps == 1 || i == 1)) {
        shared.stages.release(read);
        read.next();
      }
      weights.unpack(a[i], shared.weights[turn.place], step);
      __syncwarp();
      begin_products(sums, a[i], shared.tokens[turn.place][0][half], kSteps * kTileBytes);
      if (half == kSteps - 1) turn.next();
    }
  }
  wait_products<0>();
  keep(a[0]);
  keep(a[1]);
  while (read.place != turn.place || read.round != turn.round) {
    shared.stages.release(read);
    read.next();
  }
  stage.finish(note, weights, sums, shared.arrived);
}

template <typename Stage, int kStages>
__device__ __forceinline__ void run(const Gemm& gemm) {
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<Shared<Stage, kStages>*>(memory);
  if (threadIdx.x == 0) {
    shared.stages.initialize();
    shared.notes.initialize();
  }
  __syncthreads();
  let_next_begin();
  const Stage stage(gemm);
  Turns<kStages> turns;
  if (threadIdx.x / 32 >= kConsumers) {
    give_registers();
    for (int index = blockIdx.x; index < stage.items; index += gridDim.x) {
      const Item item = stage.at(index);
      if (item.steps > 0) produce(stage, item, shared, turns);
    }
    end(shared, turns);
  } else {
    take_registers();
    after_previous();
    for (;; turns.note.next()) {
      shared.notes.wait_full(turns.note);
      const auto& note = shared.note[turns.note.place];
      if (note.item.steps == 0) break;
      consume(stage, note, shared, turns.stage);
      shared.notes.release(turns.note);
    }
  }
  after_previous();  // also without items: the next kernel takes this one's end for all before it
}

// Stages where there is no wgmma: what 99 kB of shared memory hold.
template <typename Stage>
constexpr int kPlainStages = Stage::kSteps == 2 ? 2 : 3;

template <typename Stage, int kStages>
__global__ void __launch_bounds__(kThreads, 1) gemm_kernel(const __grid_constant__ Gemm gemm) {
#if !DW_WGMMA
  if constexpr (Stage::kTiles == 1 && kStages == kPlainStages<Stage>)
#endif
    run<Stage, kStages>(gemm);
}

template <typename Stage, int kStages>
cudaError_t launch(const Gemm& gemm, cudaStream_t stream) {
  return launch_dependent(gemm_kernel<Stage, kStages>, dim3(multiprocessors()), kThreads,
                          sizeof(Shared<Stage, kStages>), stream, gemm);
}

// Two tiles of tokens where there are registers for their sums and items for all multiprocessors.
template <typename T>
cudaError_t launch_stage2_of(const Gemm& gemm, cudaStream_t stream) {
  using One = Stage2<T, 1>;
  if (compute_major() != 9) return launch<One, kPlainStages<One>>(gemm, stream);
  // Where all items of one tile run at once, two tiles each would only leave some without.
  int groups = 0;
  for (int s = 0; s < gemm.slice_count; ++s) groups += gemm.slices[s].groups;
  const int items = groups * ceil_div(gemm.token_count, kTileRows);
  if (items <= multiprocessors()) return launch<One, 8>(gemm, stream);
  return launch<Stage2<T, 2>, 5>(gemm, stream);
}

}  // namespace

cudaError_t launch_stage1(const Gemm& gemm, cudaStream_t stream) {
  if (compute_major() == 9) return launch<Stage1, 4>(gemm, stream);
  return launch<Stage1, kPlainStages<Stage1>>(gemm, stream);
}

cudaError_t launch_stage2(const Gemm& gemm, cudaStream_t stream) {
  return gemm.y_dtype == DW_BFLOAT16 ? launch_stage2_of<__nv_bfloat16>(gemm, stream)
                                     : launch_stage2_of<__half>(gemm, stream);
}

}  // namespace prefill
}  // namespace dw

// SPDX-License-Identifier: Apache-2.0
// Grouping of a step's tokens by slot.
//
//   slots  int32 [tokens], -1 for the bare base       plan  layout.h: header, order, chunks
//
// order lists the tokens of slots >= 0, stably sorted by slot; a chunk is at most `chunk` (8 or
// 128) consecutive ones of a slot. One block of 1024 threads counts, for every token, who comes
// before it: tokens^2 comparisons in shared memory, a few microseconds in decode and 0.2 ms at 2048
// tokens, once a step. No sorting network, no scan, no host.
#include "kernels.h"
#include "layout.h"

namespace dw {
namespace {

constexpr int kPlanThreads = 1024;
constexpr int kPlanTokens = DW_MAX_TOKENS / kPlanThreads;  // a thread

__global__ void __launch_bounds__(kPlanThreads)
    plan_kernel(const int32_t* slots, int tokens, int slot_count, int chunk, int* plan) {
  __shared__ int slot_of[DW_MAX_TOKENS];
  __shared__ unsigned char starts[DW_MAX_TOKENS], rows[DW_MAX_TOKENS];  // rows: of an image
  __shared__ int chunks, invalid, placed;
  if (threadIdx.x == 0) chunks = invalid = placed = 0;
  __syncthreads();
  for (int t = threadIdx.x; t < tokens; t += kPlanThreads) {
    const int slot = slots[t];
    const bool known = slot >= -1 && slot < slot_count;
    if (!known) atomicAdd(&invalid, 1);
    slot_of[t] = known ? slot : -1;
    if (known && slot >= 0) atomicAdd(&placed, 1);
  }
  __syncthreads();

  int position[kPlanTokens], place[kPlanTokens], members[kPlanTokens];
  for (int i = 0; i < kPlanTokens; ++i) {
    const int t = threadIdx.x + i * kPlanThreads;
    position[i] = place[i] = members[i] = 0;
    if (t >= tokens) continue;
    const int slot = slot_of[t];
    for (int u = 0; u < tokens; ++u) {
      const int other = slot_of[u];
      position[i] += other >= 0 && other < slot;
      members[i] += other == slot;
      place[i] += other == slot && u < t;
    }
    position[i] += place[i];
    starts[t] = slot >= 0 && place[i] % chunk == 0;
    rows[t] = static_cast<unsigned char>(image_rows(min(chunk, members[i] - place[i])));
    if (slot >= 0) plan[plan_order(tokens) + position[i]] = t;
  }
  __syncthreads();

  int4* table = reinterpret_cast<int4*>(plan + plan_chunks(tokens));
  for (int i = 0; i < kPlanTokens; ++i) {
    const int t = threadIdx.x + i * kPlanThreads;
    if (t >= tokens || slot_of[t] < 0) continue;
    const int slot = slot_of[t];
    int index = 0, row = 0;
    for (int u = 0; u < tokens; ++u) {
      if (!starts[u] || slot_of[u] > slot || (slot_of[u] == slot && u >= t)) continue;
      ++index;
      row += rows[u];
    }
    const bool first = starts[t];
    if (!first) --index;  // its own chunk's start came before it
    plan[plan_chunk_at(tokens) + position[i]] = index;
    if (!first) continue;
    table[index] = make_int4(slot, position[i], min(chunk, members[i] - place[i]), row);
    atomicAdd(&chunks, 1);
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    plan[kPlanChunks] = chunks;
    plan[kPlanInvalid] = invalid;
    plan[kPlanChunkTokens] = chunk;
    plan[kPlanPlaced] = placed;
  }
}

}  // namespace

cudaError_t launch_plan(const int32_t* slots, int tokens, int slot_count, int chunk, int* plan,
                        cudaStream_t stream) {
  plan_kernel<<<1, kPlanThreads, 0, stream>>>(slots, tokens, slot_count, chunk, plan);
  return cudaGetLastError();
}

}  // namespace dw

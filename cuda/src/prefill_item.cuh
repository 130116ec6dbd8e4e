// SPDX-License-Identifier: Apache-2.0
// What both stages of the prefill product (prefill_gemm.cu) have in common: work items, and which
// tokens a thread has.
#ifndef DELTAWEAVE_SRC_PREFILL_ITEM_CUH_
#define DELTAWEAVE_SRC_PREFILL_ITEM_CUH_

#include "prefill.cuh"
#include "prefill_weights.cuh"

namespace dw {
namespace prefill {

constexpr int kConsumers = 8;  // warps that multiply
constexpr int kProducers = 4;  // warps that copy
constexpr int kThreads = 32 * (kConsumers + kProducers);
constexpr int kRows = 16 * kConsumers;  // weight rows of a block
static_assert(kRows == kGroup, "a block of stage 2 is a group of outputs");

struct Item {
  int4 chunk;  // slot, first token in plan order, count, place among the dense slots
  const int64_t* row;
  int slice, part, parts, tile;  // tile: the place of (chunk, slice, column) among all
  int column;                    // the first rank, or the first output's place in whole groups
  int first;                     // 128 k of in_features
  int steps;                     // of 64 k; none: nothing to do
  const unsigned char* tokens;   // first tile
};

// Which tokens items have: a chunk, or two neighbours of a slot as one chunk.
template <int kTiles>
struct Chunks {
  int chunks, count;  // count: of places, some without tokens

  __device__ __forceinline__ explicit Chunks(const Gemm& gemm) : chunks(dense_chunks(gemm)) {
    count = chunks;
    if (kTiles == 1 || chunks == 0) return;
    // Of two chunks of different slots the second has a place of its own.
    count = ceil_div(chunks, 2) * (dense_chunk(gemm, chunks - 1).w > 0 ? 2 : 1);
  }
  // The chunk of a place and its index.
  __device__ __forceinline__ int4 at(const Gemm& gemm, int place, int& index) const {
    index = place;
    if (kTiles == 1) return dense_chunk(gemm, place);
    const int pairs = ceil_div(chunks, 2);
    index = 2 * (place % pairs);
    int4 first = dense_chunk(gemm, index);
    int4 second = index + 1 < chunks ? dense_chunk(gemm, index + 1) : first;
    const bool alone = index + 1 == chunks, same = !alone && second.x == first.x;
    if (place < pairs) {
      if (same) first.z += second.z;
      return first;
    }
    ++index;
    if (alone || same) second.z = 0;
    return second;
  }
};

// A packed block that a lane of a copying warp copies; no bytes: none.
struct Block {
  const unsigned char* from;
  int bytes;
};

// The order of this thread's column of a chunk's tokens: two neighbours of every eight.
__device__ __forceinline__ int token_of(int j, int which) {
  return 8 * j + threadIdx.x % 4 * 2 + which;
}

// All threads that multiply.
__device__ __forceinline__ void wait_consumers() {
  asm volatile("bar.sync 1, %0;" ::"n"(32 * kConsumers) : "memory");
}

// What every lane of a warp needs of every token is found by one lane a token: its own_token(0 ..
// 3).
constexpr int kOwnTokens = kTileRows / 32;  // of a tile
__device__ __forceinline__ int own_token(const Item& item, int t) {
  return min(32 * t + static_cast<int>(threadIdx.x) % 32, item.chunk.z - 1);
}
template <typename V, int kCount>
__device__ __forceinline__ V from_owner(const V (&own)[kCount], int j, int which) {
  return __shfl_sync(0xffffffffu, own[j / 4], token_of(j % 4, which));
}

}  // namespace prefill
}  // namespace dw

#endif  // DELTAWEAVE_SRC_PREFILL_ITEM_CUH_

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
  int4 chunk;      // slot, first token in plan order, count, place among the dense slots
  int image_tile;  // of the images' row tiles: that of the (first) chunk
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

// A band as the warps that multiply need it.
struct alignas(16) Band {
  int end;    // the first unit behind it, of the record's
  int shape;  // bits, grid and rank (layout.h)
  const __half* levels;
};

// What the warps that multiply need of an item, found by those that copy: it comes ahead, as the
// operands do. No steps: there are no more items.
template <int kTiles>
struct ItemNote {
  Item item;
  Band bands[DW_MAX_BANDS];
  float scale[kTiles * kTileRows];  // of each token
};

// All threads that copy write a note, each its share; this one is the index-th.
template <int kTiles>
__device__ __forceinline__ void write_item(ItemNote<kTiles>& note, const Gemm& gemm,
                                           const Item& item, int index) {
  if (index == 0) note.item = item;
  if (index >= DW_MAX_BANDS) return;
  const Shapes shapes = load_shapes(item.row);
  Band band = {0, 0, nullptr};
#pragma unroll
  for (int b = 0; b < DW_MAX_BANDS; ++b) {
    if (b > index) break;
    band.shape = static_cast<int>(shapes.of[b]);
    band.end += padded_rank(band_rank(band.shape)) / kUnit;
  }
  if (band_grid(band.shape) == DW_GRID_CODEBOOK) {
    band.levels = reinterpret_cast<const __half*>(band_part(gemm, item.row, index, DW_BAND_LEVELS));
  }
  note.bands[index] = band;
}

// Goes through a record's units in order.
struct Walk {
  const Band* bands;
  int band = -1, first = 0, end = 0;  // units [first, end) are those of the band
  int bits = 2, rank = 0;
  const __half* levels = nullptr;

  __device__ __forceinline__ explicit Walk(const Band* bands) : bands(bands) {}

  // Finds the band of a unit; behind the last: one without ranks.
  __device__ __forceinline__ void to(int unit) {
    while (unit >= end && band < DW_MAX_BANDS) {
      first = end;
      if (++band == DW_MAX_BANDS) {
        bits = 2;
        rank = 0;
        levels = nullptr;
        return;
      }
      const Band now = bands[band];
      end = now.end;
      bits = band_bits(now.shape);
      rank = band_rank(now.shape);
      levels = now.levels;
    }
  }
  // Ranks of a unit of the band.
  __device__ __forceinline__ int ranks(int unit) const {
    return max(0, min(rank - kUnit * (unit - first), kUnit));
  }
  __device__ __forceinline__ Unit at(int unit) const {
    return {band, unit - first, bits, ranks(unit), levels != nullptr};
  }
};

}  // namespace prefill
}  // namespace dw

#endif  // DELTAWEAVE_SRC_PREFILL_ITEM_CUH_

// SPDX-License-Identifier: Apache-2.0
// Stage 2 of the prefill product (prefill_gemm.cu): y += U^ h.
#ifndef DELTAWEAVE_SRC_PREFILL_STAGE2_CUH_
#define DELTAWEAVE_SRC_PREFILL_STAGE2_CUH_

#include <cuda_bf16.h>

#include "prefill_item.cuh"

namespace dw {
namespace prefill {

// Two neighbouring outputs, of a thread alone: += rounded to T.
template <typename T>
__device__ __forceinline__ void add_pair(T* to, float first, float second);
template <>
__device__ __forceinline__ void add_pair(__half* to, float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  asm volatile("red.global.add.noftz.f16x2 [%0], %1;" ::"l"(to), "r"(bits_of(pair)) : "memory");
}
template <>
__device__ __forceinline__ void add_pair(__nv_bfloat16* to, float first, float second) {
#if DW_WGMMA
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  asm volatile("red.global.add.noftz.bf16x2 [%0], %1;" ::"l"(to),
               "r"(*reinterpret_cast<const uint32_t*>(&pair))
               : "memory");
#else
  auto* both = reinterpret_cast<__nv_bfloat162*>(to);
  __nv_bfloat162 sum = *both;
  sum.x = add(sum.x, first);
  sum.y = add(sum.y, second);
  *both = sum;
#endif
}

// y + row * pitch, a pitch in bytes, in one instruction: the compiler takes several.
template <typename T>
__device__ __forceinline__ T* row_at(T* y, int row, uint32_t pitch) {
  uint64_t address = 0;
  asm("mad.wide.u32 %0, %1, %2, %3;"
      : "=l"(address)
      : "r"(row), "r"(pitch), "l"(reinterpret_cast<uint64_t>(y)));
  return reinterpret_cast<T*>(address);
}

template <typename T, int kOfTokens>
struct Stage2 {
  static constexpr int kTiles = kOfTokens;
  static constexpr int kSteps = 1;                    // of a stage
  static constexpr int kBlocks = kTileDepth / kUnit;  // of a stage: units of ranks

  const Gemm& gemm;
  const Chunks<kTiles> chunks;
  int items;

  __device__ __forceinline__ explicit Stage2(const Gemm& gemm)
      : gemm(gemm), chunks(gemm), items(0) {
    for (int s = 0; s < gemm.slice_count; ++s) items += chunks.count * gemm.slices[s].groups;
  }

  __device__ __forceinline__ Item at(int index) const {
    Item item;
    item.chunk = chunks.at(gemm, index % chunks.count, item.image_tile);
    index /= chunks.count;
    item.slice = item.part = item.first = item.tile = 0;
    item.parts = 1;
    while (index >= gemm.slices[item.slice].groups) index -= gemm.slices[item.slice++].groups;
    item.column = index * kRows;
    item.row = directory_row(gemm, gemm.slices[item.slice].projection, item.chunk.x);
    item.steps = item.chunk.z > 0 ? rank_tiles(padded_ranks(gemm, item.row)) : 0;
    item.tokens = h_image(gemm, item.slice) +
                  static_cast<int64_t>(item.image_tile) * gemm.rank_tiles * kTileBytes;
    return item;
  }

  // Between the images of neighbouring chunks.
  __device__ __forceinline__ int64_t tile_pitch() const {
    return static_cast<int64_t>(gemm.rank_tiles) * kTileBytes;
  }

  // Where the `place`-th of a stage's packed blocks lies: of a band and group of outputs units lie
  // one behind the other, so that a band is looked up once.
  struct Source {
    const Gemm& gemm;
    const int64_t* row;
    int group, place;
    int band_first = 0, band_end = 0, bits = 2, rank = 0;
    const unsigned char* band = nullptr;

    __device__ __forceinline__ Source(const Stage2& stage, const Item& item, int place)
        : gemm(stage.gemm), row(item.row), group(item.column / kGroup), place(place) {}

    __device__ __forceinline__ Block at(int k) {
      const int unit = kBlocks * k + place;
      if (unit >= band_end) find(unit);
      const int within = unit - band_first, ranks = min(rank - kUnit * within, kUnit);
      if (ranks <= 0) return {nullptr, 0};
      return {band + within * whole_block_bytes(bits), u_block_bytes(bits, ranks)};
    }

    __device__ __forceinline__ void find(int unit) {
      Unit own = unit_at(load_shapes(row), unit);
      band_first = unit - own.index;
      band_end = unit + 1;
      rank = 0;  // nothing to copy
      if (!own.is_staged()) return;
      bits = own.bits;
      rank = band_rank(row[DW_FIELD_BANDS + own.band * DW_BAND_FIELDS + DW_BAND_SHAPE]);
      band_end = band_first + padded_rank(rank) / kUnit;
      own.index = 0;
      band = u_blocks(gemm, row, own, group);
    }
  };

  struct Note : ItemNote<kTiles> {  // scales: what undoes those of x, h and u, times the weight
    int token[kTiles * kTileRows];  // row of y
  };
  __device__ __forceinline__ void write(Note& note, const Item& item, int index) const {
    write_item(note, gemm, item, index);
    const float undo = reinterpret_cast<const float*>(gemm.arena + item.row[DW_FIELD_HEADER])[1];
    const float bound = h_bound(gemm, item.row);
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const int order = item.chunk.y + min(t * kTileRows + index, item.chunk.z - 1);
      const float2 own = __ldcg(gemm.token_scales + order);
      note.scale[t * kTileRows + index] = own.y * undo * inverse(h_scale(bound, own.x));
      note.token[t * kTileRows + index] = token_at(gemm, order);
    }
  }

  __device__ __forceinline__ T* y_row(const Item& item, int row) const {
    const Slice& slice = gemm.slices[item.slice];
    return static_cast<T*>(slice.y) + token_at(gemm, item.chunk.y + row) * slice.y_stride;
  }

  // A copying warp asks L2 for the item's part of y.
  __device__ __forceinline__ void expect_y(const Item& item) const {
    const Slice& slice = gemm.slices[item.slice];
    const int first = max(0, item.column - slice.out_offset);
    const int last = min(item.column + kRows - slice.out_offset, slice.out_features);
    for (int row = threadIdx.x % 32; row < item.chunk.z; row += 32) {
      const T* from = y_row(item, row);
      for (int n = first; n < last; n += 64) {
        asm volatile("prefetch.global.L2 [%0];" ::"l"(from + n));
      }
    }
  }

  // A warp's weights: the units of 64 ranks, of its 16 outputs.
  struct Weights {
    const Gemm& gemm;
    const int64_t* row;
    int group;
    Walk walk;

    __device__ __forceinline__ Weights(const Stage2& stage, const Note& note)
        : gemm(stage.gemm), row(note.item.row), group(note.item.column / kGroup), walk(note.bands) {
      walk.to(0);
    }

    __device__ __forceinline__ void unpack(Fragments& a,
                                           const unsigned char (&units)[kBlocks][kMaxBlockBytes],
                                           int step) {
      const int first = kBlocks * step, last = first + kBlocks - 1;
      if (last >= walk.end || walk.bits == 16) return unpack_each(a, units, first);
      const int last_ranks = walk.ranks(last);
      dispatch(walk.bits, walk.levels != nullptr, [&]<int kBits, bool kLevels>() {
        if constexpr (kBits != 16) {
#pragma unroll
          for (int i = 0; i < kBlocks; ++i) {
            unpack_u<kBits, kLevels>(a[i], units[i], i == kBlocks - 1 ? last_ranks : kUnit,
                                     walk.levels);
          }
        }
      });
      walk.to(last + 1);
    }

    // Units of several bands, or of 16 bits.
    __device__ __forceinline__ void unpack_each(
        Fragments& a, const unsigned char (&units)[kBlocks][kMaxBlockBytes], int first) {
      uint32_t unpacked[kBlocks][4];  // in local memory: one copy of the code for all units
#pragma unroll 1
      for (int i = 0; i < kBlocks; ++i) {
        const Unit own = walk.at(first + i);
        dispatch(own.bits, own.levels, [&]<int kBits, bool kLevels>() {
          if constexpr (kBits != 16) {
            unpack_u<kBits, kLevels>(unpacked[i], units[i], own.ranks, walk.levels);
          } else {
            read_u(unpacked[i], u_blocks(gemm, row, own, group), own.ranks);
          }
        });
        walk.to(first + i + 1);
      }
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) {
#pragma unroll
        for (int r = 0; r < 4; ++r) a[i][r] = unpacked[i][r];
      }
    }
  };

  // Lane 4q + c has outputs 2q and 2q + 1 of the warp's 16.
  __device__ __forceinline__ void finish(const Note& note, const Weights&, Sums (&sums)[kTiles],
                                         int&) const {
    const Slice& slice = gemm.slices[note.item.slice];
    const int begin = note.item.column - slice.out_offset;  // the item's first output
    const int first = begin + static_cast<int>(threadIdx.x) / 32 * 16 +
                      static_cast<int>(threadIdx.x) % 32 / 4 * 2;
    // Pairs are added as words, and their addresses are products of 32 bits.
    const bool pairs = reinterpret_cast<uintptr_t>(slice.y) % (2 * sizeof(T)) == 0 &&
                       slice.y_stride % 2 == 0 && slice.y_stride < 1 << 30 && begin >= 0 &&
                       begin % 2 == 0 && begin + kRows <= slice.out_features;
    T* y = static_cast<T*>(slice.y) + first;
    if (pairs) {
      add_pairs(note, sums, y, static_cast<uint32_t>(slice.y_stride * sizeof(T)));
    } else {
      add_each(note, sums, y, first);
    }
  }

  // y is added to where it lies, by the L2: nothing waits for it.
  __device__ __forceinline__ void add_pairs(const Note& note, const Sums (&sums)[kTiles], T* y,
                                            uint32_t pitch) const {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      const int count = note.item.chunk.z - t * kTileRows;
      if (count >= kTileRows) {
        add_tile<true>(note, sums[t], t, count, y, pitch);
      } else if (count > 0) {
        add_tile<false>(note, sums[t], t, count, y, pitch);
      }
    }
  }
  template <bool kWhole>
  __device__ __forceinline__ void add_tile(const Note& note, const Sums& sums, int t, int count,
                                           T* y, uint32_t pitch) const {
    const float2* scales =
        reinterpret_cast<const float2*>(note.scale + t * kTileRows) + threadIdx.x % 4;
    const int2* rows = reinterpret_cast<const int2*>(note.token + t * kTileRows) + threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < kTileRows / 8; ++j) {
      const float2 scale = scales[4 * j];
      const int2 row = rows[4 * j];
      if (kWhole || token_of(j, 0) < count) {
        add_pair(row_at(y, row.x, pitch), sums[j][0] * scale.x, sums[j][2] * scale.x);
      }
      if (kWhole || token_of(j, 1) < count) {
        add_pair(row_at(y, row.y, pitch), sums[j][1] * scale.y, sums[j][3] * scale.y);
      }
    }
  }

  // Outputs that end within the item, or lie at odd places.
  __device__ __forceinline__ void add_each(const Note& note, const Sums (&sums)[kTiles], T* y,
                                           int first) const {
    constexpr int kEights = kTileRows / 8;
    const Slice& slice = gemm.slices[note.item.slice];
    float kept[kTiles * kEights][4];  // in local memory: a short loop
#pragma unroll
    for (int j = 0; j < kTiles * kEights; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) kept[j][i] = sums[j / kEights][j % kEights][i];
    }
#pragma unroll 1
    for (int index = 0; index < 2 * kTiles * kEights; ++index) {
      const int j = index / 2, i = index % 2, token = token_of(j, i);
      if (token >= note.item.chunk.z) continue;
      T* row = y + note.token[token] * slice.y_stride;
#pragma unroll 1
      for (int n = 0; n < 2; ++n) {
        if (first + n < 0 || first + n >= slice.out_features) continue;
        row[n] = add(row[n], kept[j][2 * n + i] * note.scale[token]);
      }
    }
  }
};

}  // namespace prefill
}  // namespace dw

#endif  // DELTAWEAVE_SRC_PREFILL_STAGE2_CUH_

// SPDX-License-Identifier: Apache-2.0
// Stage 1 of the prefill product (prefill_gemm.cu): h = sigma * V^ x, to its image. Where its tiles
// do not fill the GPU, in_features are cut into parts; the block of threads that ends last of a
// tile's parts adds them up, in order.
#ifndef DELTAWEAVE_SRC_PREFILL_STAGE1_CUH_
#define DELTAWEAVE_SRC_PREFILL_STAGE1_CUH_

#include "prefill_item.cuh"

namespace dw {
namespace prefill {

struct Stage1 {
  static constexpr int kTiles = 1;            // of tokens
  static constexpr int kSteps = 2;            // of a stage: a packed block's 128 features
  static constexpr int kBlocks = kConsumers;  // of a stage: a unit of ranks a warp

  const Gemm& gemm;
  int chunks, items, tiles;  // tiles: of weight rows, of the record with the most ranks

  __device__ __forceinline__ explicit Stage1(const Gemm& gemm)
      : gemm(gemm), chunks(dense_chunks(gemm)), items(0), tiles(1) {
    after_previous();  // it has written the cuts
    if (chunks == 0) return;
    tiles = ceil_div(__ldcg(gemm.cuts), kRows);
    items = chunks * gemm.slice_count * tiles * __ldcg(gemm.cuts + 1);
  }

  __device__ __forceinline__ Item at(int index) const {
    Item item;
    const int chunk = index % chunks;
    index /= chunks;
    item.slice = index % gemm.slice_count;
    index /= gemm.slice_count;
    const int tile = index % tiles;
    item.column = tile * kRows;
    item.part = index / tiles;
    item.tile = (tile * gemm.slice_count + item.slice) * chunks + chunk;
    item.chunk = dense_chunk(gemm, chunk);
    item.row = directory_row(gemm, gemm.slices[item.slice].projection, item.chunk.x);
    const int each = ceil_div(gemm.in_groups, parts_of(gemm, item.slice, item.chunk.w));
    item.parts = ceil_div(gemm.in_groups, each);
    item.first = item.part * each;
    item.steps = item.column < padded_ranks(gemm, item.row)
                     ? 2 * max(0, min(each, gemm.in_groups - item.first))
                     : 0;
    item.tokens = gemm.x_image +
                  (static_cast<int64_t>(chunk) * input_tiles(gemm) + 2 * item.first) * kTileBytes;
    return item;
  }

  // Where the `place`-th of a stage's packed blocks lies: `bytes` behind that of the last stage.
  struct Source {
    Block block;

    __device__ __forceinline__ Source(const Stage1& stage, const Item& item, int place)
        : block{nullptr, 0} {
      const Unit unit = unit_at(load_shapes(item.row), item.column / kUnit + place);
      if (!unit.is_staged()) return;
      block.bytes = v_block_bytes(unit.bits, unit.ranks);
      block.from =
          v_blocks(stage.gemm, item.row, unit) + static_cast<int64_t>(item.first) * block.bytes;
    }
    __device__ __forceinline__ Block at(int k) const {
      return {block.from + static_cast<int64_t>(k) * block.bytes, block.bytes};
    }
  };
  __device__ __forceinline__ void expect_y(const Item&) const {}

  __device__ __forceinline__ int64_t tile_pitch() const { return 0; }

  // A warp's weights: one unit of ranks.
  struct Weights {
    const Gemm& gemm;
    const Item& item;
    Unit unit;
    const __half* levels;

    __device__ __forceinline__ Weights(const Stage1& stage, const Item& item)
        : gemm(stage.gemm),
          item(item),
          unit(unit_at(load_shapes(item.row),
                       item.column / kUnit + static_cast<int>(threadIdx.x) / 32)),
          levels(levels_of(gemm, item.row, unit)) {}

    __device__ __forceinline__ void unpack(Fragments& a,
                                           const unsigned char (&blocks)[kBlocks][kMaxBlockBytes],
                                           int step) const {
      if (unit.bits == 16) {
        return read_v(a, v_blocks(gemm, item.row, unit),
                      static_cast<int64_t>(gemm.in_groups) * whole_block_bytes(16),
                      item.first + step / 2, unit.ranks, step % 2);
      }
      const unsigned char* block = blocks[threadIdx.x / 32];
      dispatch(unit.bits, unit.levels, [&]<int kBits, bool kLevels>() {
        if constexpr (kBits != 16) {
          unpack_v<kBits, kLevels>(a, block, unit.ranks, step % 2, levels);
        }
      });
    }
  };

  // Adds the parts of the item's tile in order, if all the others are ready; else the one that ends
  // last does. Parts lie as the threads hold them.
  __device__ __forceinline__ bool gather(const Item& item, Sums& sums, int& arrived) const {
    constexpr int kQuads = kTileRows / 8;  // of sums, a thread
    constexpr int64_t kPitch = kRows * kTileRows / 4;
    float4* mine = reinterpret_cast<float4*>(gemm.h) +
                   static_cast<int64_t>(item.tile) * gemm.most_parts * kPitch + threadIdx.x;
    float4* to = mine + item.part * kPitch;
#pragma unroll
    for (int j = 0; j < kQuads; ++j, to += 32 * kConsumers) {
      __stcg(to, make_float4(sums[j][0], sums[j][1], sums[j][2], sums[j][3]));
    }
    __threadfence();
    wait_consumers();
    if (threadIdx.x == 0) arrived = atomicAdd(gemm.counters + item.tile, 1);
    wait_consumers();
    if (arrived != item.parts - 1) return false;
    __threadfence();
#pragma unroll
    for (int j = 0; j < kQuads; ++j) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[j][i] = 0.f;
    }
#pragma unroll 1
    for (int part = 0; part < item.parts; ++part) {
      const float4* from = mine + part * kPitch;
#pragma unroll
      for (int j = 0; j < kQuads; ++j, from += 32 * kConsumers) {
        const float4 more = __ldcg(from);
        sums[j][0] += more.x;
        sums[j][1] += more.y;
        sums[j][2] += more.z;
        sums[j][3] += more.w;
      }
    }
    return true;
  }

  // Lane 4q + c has ranks 2q and 2q + 1 of a unit.
  __device__ __forceinline__ void finish(const Item& item, Sums (&all)[kTiles],
                                         int& arrived) const {
    Sums& sums = all[0];
    if (item.parts > 1 && !gather(item, sums, arrived)) return;
    const int padded = padded_ranks(gemm, item.row), q = threadIdx.x % 32 / 4;
    const int end = rank_tiles(padded) * kTileDepth;  // zeros behind the last rank
    const float* sigma = reinterpret_cast<const float*>(gemm.arena + item.row[DW_FIELD_SIGMA]);
    const float bound = h_bound(gemm, item.row);
    unsigned char* image = h_image(gemm, item.slice);
    const int image_row =
        gemm.plan[plan_rows(gemm.token_count) + item.chunk.y];  // of the chunk's first token
    const int index = item.column / kUnit + static_cast<int>(threadIdx.x) / 32;
    const int rank = index * kUnit + 2 * q;
    const bool written = rank < end;
    const float2 factor = rank < padded ? __ldg(reinterpret_cast<const float2*>(sigma + rank))
                                        : make_float2(0.f, 0.f);
    const int band = unit_at(load_shapes(item.row), index).band;
    float scale[kOwnTokens];
#pragma unroll
    for (int t = 0; t < kOwnTokens; ++t) {
      const int order = item.chunk.y + own_token(item, t);
      scale[t] = h_scale(bound, __ldcg(gemm.token_scales + order).x);
      if (gemm.record == DW_LORA) scale[t] *= expert_weight(gemm, token_at(gemm, order), band);
    }
    uint32_t* to[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      unsigned char* octet =
          octet_at(image, gemm.rank_tiles, image_row + token_of(0, i), 2 * index + q % 2);
      to[i] = reinterpret_cast<uint32_t*>(octet) + q / 2;
    }
#pragma unroll
    for (int j = 0; j < kTileRows / 8; ++j) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float of_token = from_owner(scale, j, i);
        const uint32_t pair = bits_of(__floats2half2_rn(sums[j][i] * factor.x * of_token,
                                                        sums[j][2 + i] * factor.y * of_token));
        if (token_of(j, i) < item.chunk.z && written) to[i][j * 8 * 128 / 4] = pair;
      }
    }
  }
};

}  // namespace prefill
}  // namespace dw

#endif  // DELTAWEAVE_SRC_PREFILL_STAGE1_CUH_

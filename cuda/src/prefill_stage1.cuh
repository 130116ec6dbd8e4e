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
    item.image_tile = index % chunks;
    index /= chunks;
    item.slice = index % gemm.slice_count;
    index /= gemm.slice_count;
    const int tile = index % tiles;
    item.column = tile * kRows;
    item.part = index / tiles;
    item.tile = (tile * gemm.slice_count + item.slice) * chunks + item.image_tile;
    item.chunk = dense_chunk(gemm, item.image_tile);
    item.row = directory_row(gemm, gemm.slices[item.slice].projection, item.chunk.x);
    const int each = ceil_div(gemm.in_groups, parts_of(gemm, item.slice, item.chunk.w));
    item.parts = ceil_div(gemm.in_groups, each);
    item.first = item.part * each;
    item.steps = item.column < padded_ranks(gemm, item.row)
                     ? 2 * max(0, min(each, gemm.in_groups - item.first))
                     : 0;
    item.tokens =
        gemm.x_image +
        (static_cast<int64_t>(item.image_tile) * input_tiles(gemm) + 2 * item.first) * kTileBytes;
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

  using Note = ItemNote<kTiles>;  // scales: what keeps h within fp16
  __device__ __forceinline__ void write(Note& note, const Item& item, int index) const {
    write_item(note, gemm, item, index);
    const int order = item.chunk.y + min(index, item.chunk.z - 1);
    note.scale[index] = h_scale(h_bound(gemm, item.row), __ldcg(gemm.token_scales + order).x);
  }

  __device__ __forceinline__ int64_t tile_pitch() const { return 0; }

  // A warp's weights: one unit of ranks.
  struct Weights {
    const Gemm& gemm;
    const int64_t* row;
    int first;  // 128 k of in_features, the item's first
    Unit unit;
    const __half* levels;
    float2 sigma;  // of this lane's two ranks

    __device__ __forceinline__ Weights(const Stage1& stage, const Note& note)
        : gemm(stage.gemm), row(note.item.row), first(note.item.first) {
      Walk walk(note.bands);
      const int own = note.item.column / kUnit + static_cast<int>(threadIdx.x) / 32;
      walk.to(own);
      unit = walk.at(own);
      levels = walk.levels;
      const float* all = reinterpret_cast<const float*>(gemm.arena + row[DW_FIELD_SIGMA]);
      sigma = make_float2(0.f, 0.f);
      if (unit.ranks > 0) {
        const int rank = own * kUnit + static_cast<int>(threadIdx.x) % 32 / 4 * 2;
        sigma = __ldg(reinterpret_cast<const float2*>(all + rank));
      }
    }

    __device__ __forceinline__ void unpack(Fragments& a,
                                           const unsigned char (&blocks)[kBlocks][kMaxBlockBytes],
                                           int step) const {
      if (unit.bits == 16) {
        return read_v(a, v_blocks(gemm, row, unit),
                      static_cast<int64_t>(gemm.in_groups) * whole_block_bytes(16),
                      first + step / 2, unit.ranks, step % 2);
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
  __device__ __forceinline__ void finish(const Note& note, const Weights& weights,
                                         Sums (&all)[kTiles], int& arrived) const {
    const Item& item = note.item;
    Sums& sums = all[0];
    if (item.parts > 1 && !gather(item, sums, arrived)) return;
    const int q = threadIdx.x % 32 / 4, units = note.bands[DW_MAX_BANDS - 1].end;
    const int index = item.column / kUnit + static_cast<int>(threadIdx.x) / 32;
    // Behind the last unit sums are zeros, which the image's last tile needs.
    const bool written = index < ceil_div(units, kTileDepth / kUnit) * (kTileDepth / kUnit);
    float expert[kTileRows / 32];  // weights of LORA, of token 32 t + lane
    const bool lora = gemm.record == DW_LORA;
    if (lora) load_experts(item, weights.unit.band, expert);
    uint32_t* to[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      unsigned char* octet =
          octet_at(h_image(gemm, item.slice), gemm.rank_tiles,
                   item.image_tile * kTileRows + token_of(0, i), 2 * index + q % 2);
      to[i] = reinterpret_cast<uint32_t*>(octet) + q / 2;
    }
    const float2* scales = reinterpret_cast<const float2*>(note.scale) + threadIdx.x % 4;
#pragma unroll
    for (int j = 0; j < kTileRows / 8; ++j) {
      const float2 both = scales[4 * j];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float of_token = i == 0 ? both.x : both.y;
        if (lora) of_token *= __shfl_sync(0xffffffffu, expert[j / 4], token_of(j % 4, i));
        const uint32_t pair = bits_of(__floats2half2_rn(
            sums[j][i] * weights.sigma.x * of_token, sums[j][2 + i] * weights.sigma.y * of_token));
        if (token_of(j, i) < item.chunk.z && written) to[i][j * 8 * 128 / 4] = pair;
      }
    }
  }

  // A lane asks for the weights of its own tokens; a unit behind the last band takes any expert's.
  __device__ __forceinline__ void load_experts(const Item& item, int band,
                                               float (&expert)[kTileRows / 32]) const {
#pragma unroll
    for (int t = 0; t < kTileRows / 32; ++t) {
      const int own = min(32 * t + static_cast<int>(threadIdx.x) % 32, item.chunk.z - 1);
      expert[t] =
          expert_weight(gemm, token_at(gemm, item.chunk.y + own), min(band, DW_MAX_BANDS - 1));
    }
  }
};

}  // namespace prefill
}  // namespace dw

#endif  // DELTAWEAVE_SRC_PREFILL_STAGE1_CUH_

// SPDX-License-Identifier: Apache-2.0
// Stage 1 of the delta product for many tokens of a tenant:
//
//   h[part, s, t, r] = sigma[r] * sum over part's k of V^[r, k] x[t, k]
//
// (times the power of two that x's image has; the image of h undoes it)
//
//   x  image (prefill.cuh)   V^ packed (layout.h)   h  float [parts, slices, tokens in plan order,
//   ranks]; the image of h adds the parts
//
// Work item = (chunk, slice, 8 * kEach blocks of ranks, part of in_features). A warp has kEach
// blocks of 16 ranks; a stage holds 128 features: their part of x's image and a block of codes for
// each. The parts of in_features are cut by shape and launch alone, so that sums do not depend on
// other tenants. Two blocks a warp (with the registers of sm_90a) halve the reads of x's image from
// L2, which would otherwise need 7 TB/s.
#include "prefill.cuh"

namespace dw {
namespace prefill {
namespace {

constexpr int kImageBytes = kTokens * 2 * kGroup;

// A warp's block of ranks: codes of group g at from + g * bytes.
struct Block {
  const unsigned char* from;
  const __half* levels;
  const float* sigma;                        // of its first rank
  int bytes, bits, ranks, h_index, h_ranks;  // h_ranks: to be written, padding included
  bool codebook;
};

// The index-th block of a directory row; 0 bytes behind the last.
__device__ __forceinline__ Block find_block(const Gemm& gemm, const int64_t* row, int index) {
  Block block = {};
  int rank_start = 0;
  if (!is_factored(row)) return block;
  const Shapes shapes = load_shapes(row);
#pragma unroll
  for (int b = 0; b < DW_MAX_BANDS; ++b) {
    if (shapes.of[b] == 0) break;
    const int bits = band_bits(shapes.of[b]), rank = band_rank(shapes.of[b]);
    const int count = block_count(bits, rank), size = block_ranks(bits);
    if (index >= 0 && index < count) {
      const int64_t* fields = row + DW_FIELD_BANDS + b * DW_BAND_FIELDS;
      const bool last = index == count - 1;
      block.bits = bits;
      block.codebook = band_grid(shapes.of[b]) == DW_GRID_CODEBOOK;
      block.ranks = last ? last_block_ranks(bits, rank) : size;
      block.h_ranks = last ? padded_rank(rank) - index * size : size;
      block.bytes = v_block_bytes(bits, block.ranks);
      block.from = gemm.arena + fields[DW_BAND_V] +
                   static_cast<int64_t>(index) * gemm.in_groups * whole_block_bytes(bits);
      block.levels = reinterpret_cast<const __half*>(gemm.arena + fields[DW_BAND_LEVELS]);
      block.h_index = rank_start + index * size;
      block.sigma =
          reinterpret_cast<const float*>(gemm.arena + row[DW_FIELD_SIGMA]) + block.h_index;
    }
    index -= count;
    rank_start += padded_rank(rank);
  }
  return block;
}

struct Item {
  int4 chunk;  // slot, first token in plan order, count, first row of the image
  const int64_t* row;
  int slice, first_block, part, first_group, last_group;
};

__device__ __forceinline__ Item item_at(const Gemm& gemm, int index, int block_tiles, int blocks) {
  Item item;
  item.first_block = index % block_tiles * blocks;
  index /= block_tiles;
  item.part = index % gemm.tiles;
  const int pair = index / gemm.tiles;
  item.slice = pair % gemm.slice_count;
  item.chunk = chunk_of(gemm, pair / gemm.slice_count);
  item.row = row_of(gemm, pair);
  item.first_group = item.part * gemm.tile_groups;
  item.last_group = min(item.first_group + gemm.tile_groups, gemm.in_groups);
  return item;
}

template <int kStages, int kEach>
struct Shared {
  unsigned char stage[kStages][kImageBytes + kEach * kConsumers * kMaxBlockBytes];
  Stages<kStages, kConsumers> stages;
  int most;
};

template <int kStages, int kEach>
__device__ void produce(const Gemm& gemm, const Item& item, Shared<kStages, kEach>& shared,
                        Turn<kStages>& turn) {
  constexpr int kBlocks = kEach * kConsumers;
  const int lane = threadIdx.x % 32, rows = image_rows(item.chunk.z);
  const Block block = find_block(gemm, item.row, item.first_block + min(lane, kBlocks - 1));
  const int own = lane < kBlocks ? block.bytes : 0, image_bytes = rows * 2 * kGroup;
  const int all = image_bytes + __reduce_add_sync(0xffffffffu, own);
  const unsigned char* image =
      gemm.image + static_cast<int64_t>(item.chunk.w) * gemm.in_groups * 2 * kGroup;
  for (int group = item.first_group; group < item.last_group; ++group, turn.next()) {
    unsigned char* stage = shared.stage[turn.place];
    shared.stages.wait_empty(turn);
    shared.stages.expect(turn, all);
    __syncwarp();
    shared.stages.copy_wide(turn, stage, image + static_cast<int64_t>(group) * image_bytes,
                            image_bytes);
    if (own > 0) {
      shared.stages.copy(turn, stage + kImageBytes + lane * kMaxBlockBytes,
                         block.from + static_cast<int64_t>(group) * own, own);
    }
    shared.stages.close(turn);
  }
}

template <int kBits, bool kLevels>
__device__ __forceinline__ void load_weights(uint32_t (&a)[8][4], const unsigned char* codes,
                                             int ranks, const __half* levels) {
  const int lane = threadIdx.x % 32, pairs = ceil_div(ranks, 2), pair = min(lane / 4, pairs - 1);
  uint32_t words[2 * kBits];
  load_words<kBits>(words, codes, 4 * pair + lane % 4, 4 * pairs);
  __half2 scale[2] = {}, offset[2] = {};
  if constexpr (kBits != 16) {
    const uint2 grid =
        *reinterpret_cast<const uint2*>(codes + v_code_bytes(kBits, ranks) + 8 * pair);
    const __half2 entry[2] = {pair_of(grid.x), pair_of(grid.y)};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      scale[i] = __low2half2(entry[i]);
      offset[i] = __hneg2(__hmul2(scale[i], __high2half2(entry[i])));
    }
  }
#pragma unroll
  for (int f = 0; f < 8; ++f) {
#pragma unroll
    for (int r = 0; r < 4; ++r) {  // registers 0 and 2: the pair's first rank, 1 and 3: its second
      a[f][r] = weight<kBits, kLevels>(words, 4 * f + r, levels, scale[r % 2], offset[r % 2]);
    }
  }
}

// The warp's sums of one block: lane 4q + c has ranks 2q and 2q + 1 of tokens 8j + 2c and + 1.
__device__ __forceinline__ void write_h(const Gemm& gemm, const Item& item, const Block& block,
                                        const Sums& sums) {
  const int lane = threadIdx.x % 32, rank = 2 * (lane / 4);
  if (rank >= block.h_ranks) return;
  // A rank that the block lacks repeats another's codes: it must be zero.
  const bool first = rank < block.ranks, second = rank + 1 < block.ranks;
  const float low = first ? block.sigma[rank] : 0.f, high = second ? block.sigma[rank + 1] : 0.f;
  const int token = 2 * (lane % 4), left = item.chunk.z - token;
  float* to = h_row(gemm, item.part, item.slice, item.chunk.y + token) + block.h_index + rank;
#pragma unroll
  for (int j = 0; j < kColumns; ++j, to += 8 * static_cast<int64_t>(gemm.ranks)) {
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      if (8 * j + column >= left) continue;
      *reinterpret_cast<float2*>(to + column * gemm.ranks) = make_float2(
          first ? sums[j][column] * low : 0.f, second ? sums[j][2 + column] * high : 0.f);
    }
  }
}

template <int kStages, int kEach>
__device__ void consume(const Gemm& gemm, const Item& item, Shared<kStages, kEach>& shared,
                        Turn<kStages>& turn) {
  const int warp = threadIdx.x / 32, rows = image_rows(item.chunk.z);
  Block blocks[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    blocks[i] = find_block(gemm, item.row, item.first_block + i * kConsumers + warp);
  }
  float sums[kEach][kColumns][4] = {};
  for (int group = item.first_group; group < item.last_group; ++group, turn.next()) {
    const unsigned char* stage = shared.stage[turn.place];
    shared.stages.wait_full(turn);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      uint32_t a[8][4] = {};
      if (blocks[i].bytes > 0) {
        const unsigned char* codes = stage + kImageBytes + (i * kConsumers + warp) * kMaxBlockBytes;
        dispatch(blocks[i].bits, blocks[i].codebook, [&]<int kBits, bool kLevels>() {
          load_weights<kBits, kLevels>(a, codes, blocks[i].ranks, blocks[i].levels);
        });
      }
      __syncwarp();
      wait_products();
      keep_in_registers(a);
      begin_products();
#pragma unroll
      for (int f = 0; f < 8; ++f) {
        multiply_tile(sums[i], a[f], stage + f * 32 * rows, 16 * rows, rows);
      }
      end_products();
      keep_in_registers(a);
    }
    wait_products();
    shared.stages.release(turn);
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) write_h(gemm, item, blocks[i], sums[i]);
}

template <int kStages, int kEach>
__device__ __forceinline__ void run(const Gemm& gemm) {
  extern __shared__ __align__(128) unsigned char memory[];
  auto& shared = *reinterpret_cast<Shared<kStages, kEach>*>(memory);
  if (threadIdx.x == 0) shared.stages.initialize();
  const int most = most_blocks(gemm, &shared.most), blocks = kEach * kConsumers;
  const int block_tiles = ceil_div(most, blocks);
  const int items = chunk_count(gemm) * gemm.slice_count * gemm.tiles * block_tiles;
  after_previous();
  let_next_begin();
  Turn<kStages> turn;
  if (threadIdx.x / 32 >= kConsumers) {
    give_registers();
    if (threadIdx.x / 32 > kConsumers) return;
    for (int index = blockIdx.x; index < items; index += gridDim.x) {
      produce(gemm, item_at(gemm, index, block_tiles, blocks), shared, turn);
    }
  } else {
    take_registers();
    for (int index = blockIdx.x; index < items; index += gridDim.x) {
      consume(gemm, item_at(gemm, index, block_tiles, blocks), shared, turn);
    }
  }
}

template <int kStages, int kEach>
__global__ void __launch_bounds__(kThreads, 1) shrink_kernel(const __grid_constant__ Gemm gemm) {
#if !DW_WGMMA
  if constexpr (kEach == 1)  // two blocks a warp are launched on compute capability 9.0 alone
#endif
    run<kStages, kEach>(gemm);
}

template <int kStages, int kEach>
cudaError_t launch(const Gemm& gemm, cudaStream_t stream) {
  return launch_dependent(shrink_kernel<kStages, kEach>, dim3(multiprocessors()), kThreads,
                          sizeof(Shared<kStages, kEach>), stream, gemm);
}

}  // namespace

cudaError_t launch_shrink(const Gemm& gemm, cudaStream_t stream) {
  if (compute_major() == 9) return launch<3, 2>(gemm, stream);
  const int bytes = shared_bytes_a_block();
  return bytes >= static_cast<int>(sizeof(Shared<3, 1>)) ? launch<3, 1>(gemm, stream)
                                                         : launch<2, 1>(gemm, stream);
}

}  // namespace prefill
}  // namespace dw

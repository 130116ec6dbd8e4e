// SPDX-License-Identifier: Apache-2.0
// Stage 1 of the delta product:  h[s, t, r] = sigma[r] * sum_k V^[r, k] x[t, k]
//
//   x  fp16 [tokens, in]   V^ packed (layout.h)   h  float [slices, tokens in plan order, ranks]
//   h_max  float [slices, tokens, blocks]: max |h| of each block of ranks, for stage 2's scaling
//
// Roofline: bytes. A tenant's V^ is read once from memory for up to 8 * kTiles tokens; 2 * rank *
// in * tokens flops are nothing beside it until about 28 tokens a tenant. What must be avoided is
// the integer pipe: see fragment.cuh.
//
// Work item = (chunk of one tenant's tokens, slice, kBlocks blocks of 16 ranks), all in_features.
// Weights are the 16-row operand, tokens the 8 columns. The 8 warps take the groups of 128 features
// in turn (warp w: w, w + 8, ...), each with its own cp.async ring; per group the products of bare
// codes P and of ones S are formed in fp32, and acc += scale * (P - zero * S). The warps' sums meet
// in shared memory in warp order. Which warp sums what depends on in_features alone, so a token's
// bits depend on nothing but its slot and x.
#include "fragment.cuh"
#include "kernels.h"

namespace dw {
namespace {

constexpr int kRing = 12288;            // bytes a warp
constexpr int kActivationBytes = 2048;  // of 8 tokens and a group
constexpr uint32_t kOnes = 0x3c003c00u;

// Blocks of ranks of one band, for one chunk of tokens and one slice.
struct Item {
  int4 chunk;  // slot, first token, count
  int slice;
  int bits, blocks, ranks;  // ranks: of the item
  bool levels;
  const unsigned char* v;  // first block
  const __half* table;     // of a codebook
  const float* sigma;
  int h_index, block_index;
};

__device__ __forceinline__ int blocks_an_item(int bits, int blocks) {
  return bits >= 8 ? 1 : blocks;
}

__device__ __forceinline__ const int64_t* row_of(const Gemm& gemm, int slice, int slot) {
  const int64_t row = static_cast<int64_t>(gemm.slices[slice].projection) * gemm.slot_count + slot;
  return gemm.directory + row * DW_DIRECTORY_FIELDS;
}

__device__ __forceinline__ const int4* chunks_of(const Gemm& gemm) {
  return reinterpret_cast<const int4*>(gemm.plan + plan_chunks(gemm.token_count));
}

// Finds the `index`-th item of a (chunk, slice); false behind the last.
__device__ bool find_item(const Gemm& gemm, int pair, int index, int blocks, Item& item) {
  item.chunk = chunks_of(gemm)[pair / gemm.slice_count];
  item.slice = pair % gemm.slice_count;
  const int64_t* row = row_of(gemm, item.slice, item.chunk.x);
  const int bands = static_cast<int>(row[DW_FIELD_BAND_COUNT]);
  int h_index = 0, block_index = 0;
  for (int b = 0; b < bands; ++b) {
    const int64_t* band = row + DW_FIELD_BANDS + b * DW_BAND_FIELDS;
    const int64_t shape = band[DW_BAND_SHAPE];
    const int bits = band_bits(shape), rank = band_rank(shape);
    const int count = block_count(bits, rank), step = blocks_an_item(bits, blocks);
    const int items = ceil_div(count, step);
    if (index < items) {
      const int first = index * step;
      item.bits = bits;
      item.levels = band_grid(shape) == DW_GRID_CODEBOOK;
      item.blocks = min(step, count - first);
      item.ranks = min(rank - first * block_ranks(bits), item.blocks * block_ranks(bits));
      item.v = gemm.arena + band[DW_BAND_V] +
               static_cast<int64_t>(first) * gemm.in_groups * whole_block_bytes(bits);
      item.table = reinterpret_cast<const __half*>(gemm.arena + band[DW_BAND_LEVELS]);
      item.sigma = reinterpret_cast<const float*>(gemm.arena + row[DW_FIELD_SIGMA]);
      item.h_index = h_index + first * block_ranks(bits);
      item.block_index = block_index + first;
      return true;
    }
    index -= items;
    h_index += padded_rank(rank);
    block_index += count;
  }
  return false;
}

// An upper bound of the items of any (chunk, slice) of the launch.
__device__ int most_items(const Gemm& gemm, int pairs, int blocks) {
  __shared__ int most;
  if (threadIdx.x == 0) most = 0;
  __syncthreads();
  for (int pair = threadIdx.x; pair < pairs; pair += kThreads) {
    const int slot = chunks_of(gemm)[pair / gemm.slice_count].x;
    const int64_t* row = row_of(gemm, pair % gemm.slice_count, slot);
    int items = 0;
    for (int b = 0; b < row[DW_FIELD_BAND_COUNT]; ++b) {
      const int64_t shape = row[DW_FIELD_BANDS + b * DW_BAND_FIELDS + DW_BAND_SHAPE];
      const int bits = band_bits(shape);
      items += ceil_div(block_count(bits, band_rank(shape)), blocks_an_item(bits, blocks));
    }
    atomicMax(&most, items);
  }
  __syncthreads();
  return most;
}

// One warp's share of an item: its groups of features.
template <int kBits, bool kLevels, int kTiles, int kBlocks>
struct WarpProduct {
  static constexpr int kItemBlocks = kBits >= 8 ? 1 : kBlocks;
  static constexpr bool kStaged = kTiles == 1;  // activations ride in the ring
  static constexpr int kBlockAt = kStaged ? kActivationBytes : 0;
  static constexpr int kStage = kBlockAt + kItemBlocks * whole_block_bytes(kBits);
  static constexpr int kStages = kRing / kStage < 4 ? kRing / kStage : 4;
  static_assert(kStages >= 2, "the ring must hold two stages");

  const Gemm& gemm;
  const Item& item;
  unsigned char* ring;
  int warp, lane;
  const __half* x[kTiles];  // this lane's token rows
  bool present;             // of the first tile

  __device__ __forceinline__ WarpProduct(const Gemm& gemm, const Item& item, unsigned char* ring)
      : gemm(gemm), item(item), ring(ring), warp(threadIdx.x / 32), lane(threadIdx.x % 32) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int token = min(8 * tile + lane / 4, item.chunk.z - 1);
      const int row = gemm.plan[plan_order(gemm.token_count) + item.chunk.y + token];
      x[tile] = gemm.x + row * gemm.x_stride + 8 * (lane % 4);
    }
    present = lane / 4 < item.chunk.z;
  }

  __device__ __forceinline__ int block_size(int m) const {
    return v_block_bytes(kBits, min(item.ranks - m * 16, block_ranks(kBits)));
  }

  __device__ __forceinline__ bool readable(int feature) const {
    return feature >= gemm.x_from && feature < gemm.x_to;
  }

  __device__ __forceinline__ void issue(int step, int steps) const {
    if (step < steps) {
      const int group = warp + kWarps * step;
      unsigned char* stage = ring + step % kStages * kStage;
      if (kStaged && present) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int feature = group * kGroup + 32 * i;
          const bool valid = readable(feature + 8 * (lane % 4));
          copy_async(stage + i * 512 + lane * 16, valid ? x[0] + feature : gemm.x + gemm.x_from,
                     valid);
        }
      }
#pragma unroll
      for (int m = 0; m < kItemBlocks; ++m) {
        if (m >= item.blocks) break;
        const int bytes = block_size(m);
        const unsigned char* from =
            item.v + static_cast<int64_t>(m) * gemm.in_groups * whole_block_bytes(kBits) +
            static_cast<int64_t>(group) * bytes;
        copy_block(stage + kBlockAt + m * whole_block_bytes(kBits), from, bytes, lane);
      }
    }
    commit_copies();
  }

  // Eight features of a token, in the order of a lane's fragments.
  __device__ __forceinline__ uint4 activations(const unsigned char* stage, int tile, int group,
                                               int i) const {
    if (kStaged) return *reinterpret_cast<const uint4*>(stage + i * 512 + lane * 16);
    const int feature = group * kGroup + 32 * i;
    if (!readable(feature + 8 * (lane % 4))) return make_uint4(0, 0, 0, 0);
    return *reinterpret_cast<const uint4*>(x[tile] + feature);
  }

  __device__ __forceinline__ void consume(const unsigned char* stage, int group,
                                          float (&acc)[kBlocks][kTiles][4]) const {
    constexpr bool kGrid = kBits != 16;
    uint32_t words[kItemBlocks][2 * kBits];
    uint2 grid[kItemBlocks];
    float products[kItemBlocks][kTiles][4] = {};
    float sums[kTiles][4] = {};
#pragma unroll
    for (int m = 0; m < kItemBlocks; ++m) {
      const unsigned char* block = stage + kBlockAt + m * whole_block_bytes(kBits);
      const int ranks = max(1, min(item.ranks - m * 16, block_ranks(kBits)));
      const int pairs = ceil_div(ranks, 2);
      const int pair = min(lane / 4, pairs - 1);
      load_words<kBits>(words[m], block, 4 * pair + lane % 4, 4 * pairs);
      if (kGrid) {
        grid[m] = *reinterpret_cast<const uint2*>(block + v_code_bytes(kBits, ranks) + 8 * pair);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint4 b[kTiles];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) b[tile] = activations(stage, tile, group, i);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int m = 0; m < kItemBlocks; ++m) {
          uint32_t a[4];
          fragment<kBits, kLevels>(a, words[m], 2 * i + half, item.table);
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
            multiply(products[m][tile], a, half ? b[tile].z : b[tile].x,
                     half ? b[tile].w : b[tile].y);
          }
        }
        if (kGrid && !kLevels) {
          const uint32_t ones[4] = {kOnes, kOnes, kOnes, kOnes};
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
            multiply(sums[tile], ones, half ? b[tile].z : b[tile].x, half ? b[tile].w : b[tile].y);
          }
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kItemBlocks; ++m) {
      float2 low = make_float2(1.f, 0.f), high = low;
      if (kGrid) {
        low = grid_entry<kBits, kLevels>(grid[m].x);
        high = grid_entry<kBits, kLevels>(grid[m].y);
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const float2 entry = j < 2 ? low : high;
          acc[m][tile][j] += entry.x * (products[m][tile][j] - entry.y * sums[tile][j]);
        }
      }
    }
  }

  __device__ __forceinline__ void run(float (&acc)[kBlocks][kTiles][4]) const {
    const int steps = (gemm.in_groups - warp + kWarps - 1) / kWarps;
#pragma unroll
    for (int step = 0; step < kStages - 1; ++step) issue(step, steps);
    for (int step = 0; step < steps; ++step) {
      wait_copies<kStages - 2>();
      __syncwarp();
      issue(step + kStages - 1, steps);
      consume(ring + step % kStages * kStage, warp + kWarps * step, acc);
    }
    wait_copies<0>();
    __syncwarp();
  }
};

// Adds the warps' sums of one tile of tokens in warp order and writes h and h_max: warp = token,
// lane = rank.
template <int kBlocks>
__device__ void finish_tile(const Gemm& gemm, const Item& item, unsigned char* shared, int tile,
                            const float (&acc)[kBlocks][4]) {
  constexpr int kRanks = 16 * kBlocks, kPitch = kRanks + 4;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float* own = reinterpret_cast<float*>(shared + warp * kRing);
#pragma unroll
  for (int m = 0; m < kBlocks; ++m) {
    const int rank = 16 * m + 2 * (lane / 4);
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      float2* to = reinterpret_cast<float2*>(own + (2 * (lane % 4) + column) * kPitch + rank);
      *to = make_float2(acc[m][column], acc[m][2 + column]);
    }
  }
  __syncthreads();
  const int token = 8 * tile + warp;
  if (token < item.chunk.z) {
    const int present = item.blocks * block_ranks(item.bits);
    float value = 0.f;
    if (lane < item.ranks) {
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        value += reinterpret_cast<const float*>(shared + w * kRing)[warp * kPitch + lane];
      }
      value *= item.sigma[item.h_index + lane];
      if (gemm.x_scale != nullptr) {
        const int row = gemm.plan[plan_order(gemm.token_count) + item.chunk.y + token];
        value *= gemm.x_scale[row];
      }
    }
    const int64_t position =
        static_cast<int64_t>(item.slice) * gemm.token_count + item.chunk.y + token;
    if (lane < present) gemm.h[position * gemm.ranks + item.h_index + lane] = value;
    float largest = fabsf(value);
#pragma unroll
    for (int step = 8; step > 0; step /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
    }
    if (lane % 16 == 0 && lane / 16 < item.blocks) {
      gemm.h_max[position * gemm.blocks + item.block_index + lane / 16] = largest;
    }
  }
  __syncthreads();
}

template <int kTiles, int kBlocks>
__global__ void __launch_bounds__(kThreads, kTiles == 1 ? 2 : 1)
    shrink_kernel(const __grid_constant__ Gemm gemm) {
  extern __shared__ __align__(16) unsigned char shared[];
  unsigned char* ring = shared + threadIdx.x / 32 * kRing;
  const int pairs = gemm.plan[kPlanChunks] * gemm.slice_count;
  const int most = most_items(gemm, pairs, kBlocks);
  for (int index = blockIdx.x; index < pairs * most; index += gridDim.x) {
    Item item;
    if (!find_item(gemm, index / most, index % most, kBlocks, item)) continue;
    float acc[kBlocks][kTiles][4] = {};
    dispatch(item.bits, item.levels, [&]<int kBits, bool kLevels>() {
      WarpProduct<kBits, kLevels, kTiles, kBlocks>(gemm, item, ring).run(acc);
    });
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      float part[kBlocks][4];
#pragma unroll
      for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
        for (int j = 0; j < 4; ++j) part[m][j] = acc[m][tile][j];
      }
      finish_tile<kBlocks>(gemm, item, shared, tile, part);
    }
  }
}

template <int kTiles, int kBlocks>
cudaError_t launch(const Gemm& gemm, cudaStream_t stream) {
  const auto kernel = shrink_kernel<kTiles, kBlocks>;
  constexpr int kShared = kWarps * kRing;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (error != cudaSuccess) return error;
  const int64_t most = static_cast<int64_t>(gemm.token_count) * gemm.slice_count * gemm.blocks;
  const int64_t resident = multiprocessors() * (kTiles == 1 ? 2 : 1);
  kernel<<<static_cast<int>(most < resident ? most : resident), kThreads, kShared, stream>>>(gemm);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_shrink(const Gemm& gemm, int chunk, cudaStream_t stream) {
  if (chunk > 8) return launch<4, 2>(gemm, stream);
  return gemm.token_count < 8 ? launch<1, 1>(gemm, stream) : launch<1, 2>(gemm, stream);
}

}  // namespace dw

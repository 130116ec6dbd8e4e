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
// in turn (warp w: w, w + kTeam, ...), each with its own ring (ring.cuh). Per group, P = sum of
// biased codes * x, and one more product per step has the biases in rows 0-7 and ones in rows 8-15,
// which gives D = sum of biases * x and S = sum of x: acc += scale * (P - D - zero * S). The warps'
// sums meet in shared memory in warp order. Which warp sums what depends on in_features alone, so a
// token's bits depend on nothing but its slot and x.
#include "fragment.cuh"
#include "kernels.h"
#include "ring.cuh"

namespace dw {
namespace {

constexpr int kRing = 12288;                // bytes a warp
constexpr int kRowBytes = 2 * kGroup;       // of x, a token and group
constexpr int kRowPitch = 2 * kGroup + 64;  // so that eight lanes read different banks
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

// Blocks of an item: fewer of the wider ones, so that the ring holds two stages.
__device__ constexpr int blocks_an_item(int bits, int blocks) {
  return bits >= 8 ? 1 : bits == 4 && blocks > 2 ? 2 : blocks;
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
  const Shapes shapes = load_shapes(row);
  int found = -1, h_index = 0, block_index = 0;
#pragma unroll
  for (int b = 0; b < DW_MAX_BANDS; ++b) {
    if (shapes.of[b] == 0) break;
    const int bits = band_bits(shapes.of[b]), rank = band_rank(shapes.of[b]);
    const int count = block_count(bits, rank), step = blocks_an_item(bits, blocks);
    const int items = ceil_div(count, step), first = index * step;
    if (index >= 0 && index < items) {
      found = b;
      item.bits = bits;
      item.levels = band_grid(shapes.of[b]) == DW_GRID_CODEBOOK;
      item.blocks = min(step, count - first);
      item.ranks = min(rank - first * block_ranks(bits), item.blocks * block_ranks(bits));
      item.h_index = h_index + first * block_ranks(bits);
      item.block_index = block_index + first;
      item.v = gemm.arena + static_cast<int64_t>(first) * gemm.in_groups * whole_block_bytes(bits);
    }
    index -= items;
    h_index += padded_rank(rank);
    block_index += count;
  }
  if (found < 0) return false;
  const int64_t* band = row + DW_FIELD_BANDS + found * DW_BAND_FIELDS;
  item.v += band[DW_BAND_V];
  item.table = reinterpret_cast<const __half*>(gemm.arena + band[DW_BAND_LEVELS]);
  item.sigma = reinterpret_cast<const float*>(gemm.arena + row[DW_FIELD_SIGMA]);
  return true;
}

// An upper bound of the items of any (chunk, slice) of the launch.
__device__ int most_items(const Gemm& gemm, int pairs, int blocks) {
  __shared__ int most;
  if (threadIdx.x == 0) most = 0;
  __syncthreads();
  for (int pair = threadIdx.x; pair < pairs; pair += blockDim.x) {
    const int slot = chunks_of(gemm)[pair / gemm.slice_count].x;
    const int64_t* row = row_of(gemm, pair % gemm.slice_count, slot);
    const Shapes shapes = load_shapes(row);
    int items = 0;
#pragma unroll
    for (const int64_t shape : shapes.of) {
      if (shape == 0) break;
      const int bits = band_bits(shape);
      items += ceil_div(block_count(bits, band_rank(shape)), blocks_an_item(bits, blocks));
    }
    atomicMax(&most, items);
  }
  __syncthreads();
  return most;
}

// One warp's share of an item: its groups of features.
template <int kBits, bool kLevels, int kTiles, int kBlocks, int kTeam>
struct WarpProduct {
  static constexpr int kItemBlocks = blocks_an_item(kBits, kBlocks);
  static constexpr bool kStaged = kTiles == 1;  // activations ride in the ring
  static constexpr int kBlockAt = kStaged ? 8 * kRowPitch : 0;
  static constexpr int kWhole = whole_block_bytes(kBits);
  static constexpr int kStage = kBlockAt + kItemBlocks * kWhole;
  static constexpr int kStages = kRing / kStage < kMaxStages ? kRing / kStage : kMaxStages;
  static_assert(kStages >= 2, "the ring must hold two stages");

  const Item& item;
  Ring& ring;
  const unsigned char* memory;  // the ring's
  int lane, steps;
  const unsigned char* from[kItemBlocks];  // the next block to fill
  int bytes[kItemBlocks];
  const __half* next_row;      // lane t < 8: the next group of token t to fill
  const __half* rows[kTiles];  // tokens 8 * tile + lane / 4, not staged

  __device__ __forceinline__ WarpProduct(const Gemm& gemm, const Item& item, Ring& ring,
                                         const unsigned char* memory)
      : item(item), ring(ring), memory(memory), lane(threadIdx.x % 32) {
    const int warp = threadIdx.x / 32;
    steps = (gemm.in_groups - warp + kTeam - 1) / kTeam;
#pragma unroll
    for (int m = 0; m < kItemBlocks; ++m) {
      bytes[m] = v_block_bytes(kBits, max(0, min(item.ranks - m * 16, block_ranks(kBits))));
      from[m] = item.v + static_cast<int64_t>(m) * gemm.in_groups * kWhole + warp * bytes[m];
    }
    next_row = row_of_token(gemm, lane) + warp * kGroup;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      rows[tile] = row_of_token(gemm, 8 * tile + lane / 4) + warp * kGroup + 8 * (lane % 4);
    }
  }

  __device__ __forceinline__ const __half* row_of_token(const Gemm& gemm, int token) const {
    const int order = item.chunk.y + min(token, item.chunk.z - 1);
    return gemm.x + gemm.plan[plan_order(gemm.token_count) + order] * gemm.x_stride;
  }

  __device__ __forceinline__ void fill(int stage) {
    const int at = stage * kStage, tokens = kStaged ? item.chunk.z : 0;
    int all = tokens * kRowBytes;
#pragma unroll
    for (int m = 0; m < kItemBlocks; ++m) all += bytes[m];
    ring.open(stage, all);
    if (kStaged) ring.rows(at, kRowPitch, next_row, tokens, kRowBytes);
#pragma unroll
    for (int m = 0; m < kItemBlocks; ++m) {
      if (bytes[m] > 0) ring.block(at + kBlockAt + m * kWhole, from[m], bytes[m]);
      from[m] += kTeam * bytes[m];
    }
    next_row += kTeam * kGroup;
  }

  // Eight features of a token, in the order of a lane's fragments.
  __device__ __forceinline__ uint4 activations(const unsigned char* stage, int tile, int i) const {
    if (!kStaged) return *reinterpret_cast<const uint4*>(rows[tile] + 32 * i);
    return *reinterpret_cast<const uint4*>(stage + lane / 4 * kRowPitch + i * 64 + lane % 4 * 16);
  }

  // Products of one half of activations(): two registers of weights' columns.
  __device__ __forceinline__ static uint2 half_of(const uint4& b, int half) {
    return half ? make_uint2(b.z, b.w) : make_uint2(b.x, b.y);
  }

  __device__ __forceinline__ void consume(const unsigned char* stage,
                                          float (&acc)[kBlocks][kTiles][4]) const {
    uint32_t words[kItemBlocks][2 * kBits];
    uint2 grid[kItemBlocks];
    float products[kItemBlocks][kTiles][4] = {};
    float sums[kTiles][4] = {};  // D, D, S, S of two tokens
#pragma unroll
    for (int m = 0; m < kItemBlocks; ++m) {
      const unsigned char* block = stage + kBlockAt + m * kWhole;
      const int ranks = max(1, min(item.ranks - m * 16, block_ranks(kBits)));
      const int pairs = ceil_div(ranks, 2);
      const int pair = min(lane / 4, pairs - 1);
      load_words<kBits>(words[m], block, 4 * pair + lane % 4, 4 * pairs);
      if (kBits != 16) {
        grid[m] = *reinterpret_cast<const uint2*>(block + v_code_bytes(kBits, ranks) + 8 * pair);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint4 b[kTiles];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) b[tile] = activations(stage, tile, i);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int f = 2 * i + half;
#pragma unroll
        for (int m = 0; m < kItemBlocks; ++m) {
          uint32_t a[4];
          fragment<kBits, kLevels>(a, words[m], f, item.table);
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
            const uint2 columns = half_of(b[tile], half);
            multiply(products[m][tile], a, columns.x, columns.y);
          }
        }
        if constexpr (kBiased<kBits, kLevels>) {
          const uint32_t a[4] = {bias_pair<kBits>(4 * f), kOnes, bias_pair<kBits>(4 * f + 2),
                                 kOnes};
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
            const uint2 columns = half_of(b[tile], half);
            multiply(sums[tile], a, columns.x, columns.y);
          }
        }
      }
    }
#pragma unroll
    for (int m = 0; m < kItemBlocks; ++m) add_scaled(products[m], sums, grid[m], acc[m]);
  }

  __device__ __forceinline__ static void add_scaled(const float (&products)[kTiles][4],
                                                    const float (&sums)[kTiles][4], uint2 grid,
                                                    float (&acc)[kTiles][4]) {
    float2 entry[2] = {make_float2(1.f, 0.f), make_float2(1.f, 0.f)};  // (scale, zero) of two ranks
    if constexpr (kBits != 16) {
      entry[0] = __half22float2(pair_of(grid.x));
      entry[1] = __half22float2(pair_of(grid.y));
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float sum = products[tile][j];
        if constexpr (kBiased<kBits, kLevels>) {
          sum = sum - sums[tile][j % 2] - entry[j / 2].y * sums[tile][2 + j % 2];
        }
        acc[tile][j] += entry[j / 2].x * sum;
      }
    }
  }

  __device__ __forceinline__ void run(float (&acc)[kBlocks][kTiles][4]) {
    int filled = 0;
    for (; filled < kStages - 1; ++filled) {
      if (filled < steps) fill(filled);
      ring.close();
    }
    int stage = 0, spare = kStages - 1;
    for (int step = 0; step < steps; ++step) {
      ring.template wait<kStages - 2>(stage);
      if (step + kStages - 1 < steps) fill(spare);
      ring.close();
      consume(memory + stage * kStage, acc);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) rows[tile] += kTeam * kGroup;
      spare = stage;
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    ring.drain();
    __syncwarp();
  }
};

// Adds the warps' sums of one tile of tokens in warp order and writes h and h_max: a warp a token,
// a lane a rank.
template <int kBlocks, int kTeam>
__device__ void finish_tile(const Gemm& gemm, const Item& item, unsigned char* rings, int tile,
                            const float (&acc)[kBlocks][4]) {
  constexpr int kRanks = 16 * kBlocks, kPitch = kRanks + 4;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float* own = reinterpret_cast<float*>(rings + warp * kRing);
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
  const int count = min(8, item.chunk.z - 8 * tile);
  for (int column = warp; column < count; column += kTeam) {
    const int order = item.chunk.y + 8 * tile + column;
    const int64_t position = static_cast<int64_t>(item.slice) * gemm.token_count + order;
    float scale = 1.f;
    if (gemm.x_scale != nullptr) {
      scale = gemm.x_scale[gemm.plan[plan_order(gemm.token_count) + order]];
    }
    for (int rank = lane; rank < item.blocks * 16; rank += 32) {
      float value = 0.f;
      if (rank < item.ranks) {
#pragma unroll
        for (int w = 0; w < kTeam; ++w) {
          value += reinterpret_cast<const float*>(rings + w * kRing)[column * kPitch + rank];
        }
        value *= item.sigma[item.h_index + rank] * scale;
      }
      if (rank < item.blocks * block_ranks(item.bits)) {
        gemm.h[position * gemm.ranks + item.h_index + rank] = value;
      }
      float largest = fabsf(value);
      const unsigned half = 0xffffu
                            << (lane & 16);  // a block's lanes: the other half may have none
#pragma unroll
      for (int step = 8; step > 0; step /= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(half, largest, step));
      }
      if (lane % 16 == 0)
        gemm.h_max[position * gemm.blocks + item.block_index + rank / 16] = largest;
    }
  }
  Ring::release();
  __syncthreads();
}

template <int kTiles, int kBlocks, int kTeam>
constexpr int kResident = (kTiles == 1 ? 16 : 8) / kTeam;  // blocks of threads a multiprocessor

template <int kTiles, int kBlocks, int kTeam>
__global__ void __launch_bounds__(32 * kTeam, kResident<kTiles, kBlocks, kTeam>)
    shrink_kernel(const __grid_constant__ Gemm gemm) {
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ uint64_t barriers[kTeam][kMaxStages];
  unsigned char* memory = shared + threadIdx.x / 32 * kRing;
  Ring ring(memory, barriers[threadIdx.x / 32]);
  const int pairs = gemm.plan[kPlanChunks] * gemm.slice_count;
  const int most = most_items(gemm, pairs, kBlocks);
  for (int index = blockIdx.x; index < pairs * most; index += gridDim.x) {
    Item item;
    if (!find_item(gemm, index / most, index % most, kBlocks, item)) continue;
    float acc[kBlocks][kTiles][4] = {};
    dispatch(item.bits, item.levels, [&]<int kBits, bool kLevels>() {
      WarpProduct<kBits, kLevels, kTiles, kBlocks, kTeam>(gemm, item, ring, memory).run(acc);
    });
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      float part[kBlocks][4];
#pragma unroll
      for (int m = 0; m < kBlocks; ++m) {
#pragma unroll
        for (int j = 0; j < 4; ++j) part[m][j] = acc[m][tile][j];
      }
      finish_tile<kBlocks, kTeam>(gemm, item, shared, tile, part);
    }
  }
}

template <int kTiles, int kBlocks, int kTeam>
cudaError_t launch(const Gemm& gemm, cudaStream_t stream) {
  const auto kernel = shrink_kernel<kTiles, kBlocks, kTeam>;
  constexpr int kShared = kTeam * kRing;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (error != cudaSuccess) return error;
  const int64_t most = static_cast<int64_t>(gemm.token_count) * gemm.slice_count * gemm.blocks;
  const int64_t resident = multiprocessors() * kResident<kTiles, kBlocks, kTeam>;
  const int grid = static_cast<int>(most < resident ? most : resident);
  kernel<<<grid, 32 * kTeam, kShared, stream>>>(gemm);
  return cudaGetLastError();
}

}  // namespace

cudaError_t launch_shrink(const Gemm& gemm, int chunk, cudaStream_t stream) {
  if (gemm.token_count < 8) return launch<1, 1, 8>(gemm, stream);
  if (chunk > 8) return launch<4, 2, 4>(gemm, stream);
  return gemm.token_count < 16 ? launch<1, 2, 4>(gemm, stream) : launch<1, 4, 4>(gemm, stream);
}

}  // namespace dw

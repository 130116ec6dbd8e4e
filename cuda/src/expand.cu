// SPDX-License-Identifier: Apache-2.0
// Stage 2 of the delta product:  y[s, t, n] += sum_r U^[r, n] h[s, t, r]
//
//   h  float [slices, tokens in plan order, ranks], from stage 1   U^ packed (layout.h)   y  fp16
//   or bf16 [tokens, out]
//
// Roofline: bytes, as in stage 1; y is 2 * out bytes a token, h is read from L2 once a group of 128
// outputs.
//
// Work item = (chunk of one tenant's tokens, slice, group of 128 out_features), all ranks. U^'s
// scale varies along the reduction but is one number a (rank, group), so it goes into h: h' =
// fp16(h * scale * 2^e), with e chosen per token so that the largest |h * scale| becomes 2^13.
// Outputs are the 16-row operand, tokens the 8 columns; a block of 16 ranks feeds eight products,
// one for every 16 outputs (product f: outputs 2f, 2f + 1 of every 16). One more product per block
// has the eight products' biases in rows 0-7 and the ranks' zeros in rows 8-15: what the sums must
// lose,
//
//     y[16q + 2f + i] = 2^-e * (sum code * h' - B[f] - Z),   B[f] = sum bias[f] * h',   Z = sum
//     zero * h'
//
// The warps take blocks in turn over all bands (warp w: w, w + 8, ...), each with its own ring
// (ring.cuh); sums meet in shared memory in warp order. Which warp sums what depends on the band
// list alone.
#include <cuda_bf16.h>

#include "fragment.cuh"
#include "kernels.h"
#include "ring.cuh"

namespace dw {
namespace {

constexpr int kStages = 3;
constexpr int kCodesBytes = 2 * 1088;    // two blocks of 4 bits, or one of 8 or 16
constexpr int kInnerPitch = 2 * 16 * 4;  // bytes of h of a token and two blocks
constexpr int kStage = kCodesBytes + 8 * kInnerPitch;
constexpr int kRing = kStages * kStage;  // bytes a warp
constexpr int kPitch = kGroup + 4;       // floats between tokens when sums meet
static_assert(kMaxBlockBytes <= kCodesBytes, "every block fits a stage");
static_assert(8 * kPitch * 4 <= kRing, "the warps' sums use the ring");

struct Item {
  int4 chunk;  // slot, first token, count
  int slice, group;
  const int64_t* row;  // of the directory
};

// One or two consecutive blocks of ranks of the item's group, ready to be copied and multiplied.
struct __align__(16) Entry {
  const unsigned char* u;
  int h_index;  // of the first rank
  uint16_t bytes;
  uint8_t bits;
  uint8_t levels : 1, band : 3, quads : 3, two : 1;  // quads: of the last block
};
static_assert(sizeof(Entry) == 16, "one vector");

constexpr int kMaxSteps = (DW_MAX_RANK + 16 * DW_MAX_BANDS) / 8;

__device__ __forceinline__ int blocks_a_step(int bits) { return bits <= 4 ? 2 : 1; }

__device__ __forceinline__ int step_count(const Shapes& shapes) {
  int steps = 0;
#pragma unroll
  for (const int64_t shape : shapes.of) {
    if (shape == 0) break;
    const int bits = band_bits(shape);
    steps += ceil_div(block_count(bits, band_rank(shape)), blocks_a_step(bits));
  }
  return steps;
}

// What an item's threads share besides the rings.
template <int kTeam>
struct Shared {
  Entry steps[kMaxSteps];
  float loss[kTeam][8][8];  // warp, token, product: B + Z
  float norm[8];
  uint2 biases[9][8];  // bits, product: of its registers 0 and 1, of its registers 2 and 3
  uint64_t barriers[kTeam][kMaxStages];
};

template <int kBits>
__device__ __forceinline__ void store_biases(uint2 (&biases)[9][8]) {
#pragma unroll
  for (int f = 0; f < 8; ++f) {
    biases[kBits][f] = make_uint2(bias_pair<kBits>(4 * f), bias_pair<kBits>(4 * f + 2));
  }
}

__device__ __forceinline__ void store_all_biases(uint2 (&biases)[9][8]) {
  if (threadIdx.x != 0) return;
  store_biases<1>(biases);
  store_biases<2>(biases);
  store_biases<3>(biases);
  store_biases<4>(biases);
  store_biases<8>(biases);
}

// Lists the item's steps over all bands, one thread a step.
__device__ __forceinline__ void list_steps(const Gemm& gemm, const Item& item, const Shapes& shapes,
                                           int steps, Entry* entries) {
  for (int index = threadIdx.x; index < steps; index += blockDim.x) {
    int step = index, start = 0;
    Entry entry = {};
#pragma unroll
    for (int b = 0; b < DW_MAX_BANDS; ++b) {
      if (shapes.of[b] == 0) break;
      const int bits = band_bits(shapes.of[b]), rank = band_rank(shapes.of[b]);
      const int blocks = block_count(bits, rank), size = blocks_a_step(bits);
      const int count = ceil_div(blocks, size);
      if (step >= 0 && step < count) {
        const int first = step * size, last = min(first + size, blocks) - 1;
        const int ranks = min(rank - last * block_ranks(bits), block_ranks(bits));
        entry.u = gemm.arena + static_cast<int64_t>(item.group) * u_group_bytes(bits, rank) +
                  first * whole_block_bytes(bits);
        entry.h_index = start + first * block_ranks(bits);
        entry.bytes = static_cast<uint16_t>((last - first) * whole_block_bytes(bits) +
                                            u_block_bytes(bits, ranks));
        entry.bits = static_cast<uint8_t>(bits);
        entry.levels = band_grid(shapes.of[b]) == DW_GRID_CODEBOOK;
        entry.band = static_cast<uint8_t>(b);
        entry.quads = static_cast<uint8_t>(ceil_div(ranks, 4));
        entry.two = last > first;
      }
      step -= count;
      start += padded_rank(rank);
    }
    entry.u += item.row[DW_FIELD_BANDS + entry.band * DW_BAND_FIELDS + DW_BAND_U];
    entries[index] = entry;
  }
}

template <int kTiles, int kTeam>
struct WarpProduct {
  static constexpr bool kStaged = kTiles == 1;  // h rides in the ring

  const Gemm& gemm;
  const Item& item;
  const Shared<kTeam>& shared;
  Ring& ring;
  const unsigned char* memory;  // the ring's
  int lane;
  float norm[kTiles] = {};
  float bias[kTiles][4] = {};  // B[lane / 4] of two tokens, Z of the same

  __device__ __forceinline__ WarpProduct(const Gemm& gemm, const Item& item,
                                         const Shared<kTeam>& shared, Ring& ring,
                                         const unsigned char* memory)
      : gemm(gemm),
        item(item),
        shared(shared),
        ring(ring),
        memory(memory),
        lane(threadIdx.x % 32) {}

  __device__ __forceinline__ const float* row_of_token(int token) const {
    const int64_t order = item.chunk.y + min(token, item.chunk.z - 1);
    return gemm.h + (static_cast<int64_t>(item.slice) * gemm.token_count + order) * gemm.ranks;
  }

  // The power of two of every token this lane multiplies, from the largest |h| of all blocks.
  __device__ __forceinline__ void find_norms() {
    const float scale = *reinterpret_cast<const float*>(gemm.arena + item.row[DW_FIELD_HEADER]);
    const int blocks = static_cast<int>(item.row[DW_FIELD_ROW_BLOCKS]);
    const int64_t first = static_cast<int64_t>(item.slice) * gemm.token_count + item.chunk.y;
    for (int token = 0; token < min(8 * kTiles, item.chunk.z); ++token) {
      const float* maxima = gemm.h_max + (first + token) * gemm.blocks;
      float largest = 0.f;
      for (int block = lane; block < blocks; block += 32) largest = fmaxf(largest, maxima[block]);
#pragma unroll
      for (int step = 16; step > 0; step /= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, step));
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        if (token == 8 * tile + lane / 4) norm[tile] = normalizer(largest * scale);
      }
    }
  }

  __device__ __forceinline__ void fill(const Entry& entry, const float* row, int stage) {
    const int tokens = kStaged ? item.chunk.z : 0;
    const int row_bytes = 4 * block_ranks(entry.bits) * (1 + entry.two);
    const int at = stage * kStage;
    ring.open(stage, entry.bytes + tokens * row_bytes);
    ring.block(at, entry.u, entry.bytes);
    if (kStaged) ring.rows(at + kCodesBytes, kInnerPitch, row + entry.h_index, tokens, row_bytes);
  }

  // h of this lane's token and four ranks of a block; zeros for ranks that the block lacks.
  __device__ __forceinline__ float4 inner_values(const unsigned char* stage, int h_index, int block,
                                                 int tile, bool valid) const {
    if (!valid) return make_float4(0.f, 0.f, 0.f, 0.f);
    const float* from =
        kStaged ? reinterpret_cast<const float*>(stage + kCodesBytes + lane / 4 * kInnerPitch)
                : row_of_token(8 * tile + lane / 4) + h_index;
    return *reinterpret_cast<const float4*>(from + 16 * block + 4 * (lane % 4));
  }

  // Both blocks of a step.
  template <int kBits, bool kLevels>
  __device__ __forceinline__ void consume(const unsigned char* stage, const Entry& entry,
                                          float (&acc)[kTiles][8][4]) {
    const __half* table = nullptr;
    if (kLevels) {
      const int field = DW_FIELD_BANDS + entry.band * DW_BAND_FIELDS + DW_BAND_LEVELS;
      table = reinterpret_cast<const __half*>(gemm.arena + item.row[field]);
    }
    if (kBits <= 4 && entry.two) {
      multiply_block<kBits, kLevels>(stage, 0, 4, entry.h_index, table, acc);
    }
    multiply_block<kBits, kLevels>(stage, entry.two, entry.quads, entry.h_index, table, acc);
  }

  template <int kBits, bool kLevels>
  __device__ __forceinline__ void multiply_block(const unsigned char* stage, int block, int quads,
                                                 int h_index, const __half* table,
                                                 float (&acc)[kTiles][8][4]) {
    const unsigned char* codes = stage + block * whole_block_bytes(kBits);
    const int quad = min(lane % 4, quads - 1);
    uint32_t words[2 * kBits];
    load_words<kBits>(words, codes, lane / 4 * quads + quad, 8 * quads);
    float scale[4] = {1.f, 1.f, 1.f, 1.f};
    uint32_t a[4];
    if constexpr (kBits != 16) {
      const uint4 raw =
          *reinterpret_cast<const uint4*>(codes + u_code_bytes(kBits, 4 * quads) + 16 * quad);
      scale[0] = __low2float(pair_of(raw.x));
      scale[1] = __low2float(pair_of(raw.y));
      scale[2] = __low2float(pair_of(raw.z));
      scale[3] = __low2float(pair_of(raw.w));
      a[1] = __byte_perm(raw.x, raw.y, 0x7632);  // zeros of ranks 0 and 1
      a[3] = __byte_perm(raw.z, raw.w, 0x7632);
    }
    if constexpr (kBiased<kBits, kLevels>) {
      const uint2 biases = shared.biases[kBits][lane / 4];
      a[0] = biases.x;
      a[2] = biases.y;
    }
    uint32_t b[kTiles][2];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const float4 inner = inner_values(stage, h_index, block, tile, lane % 4 < quads);
      b[tile][0] = bits_of(
          __floats2half2_rn(inner.x * (norm[tile] * scale[0]), inner.y * (norm[tile] * scale[1])));
      b[tile][1] = bits_of(
          __floats2half2_rn(inner.z * (norm[tile] * scale[2]), inner.w * (norm[tile] * scale[3])));
      if constexpr (kBiased<kBits, kLevels>) multiply(bias[tile], a, b[tile][0], b[tile][1]);
    }
#pragma unroll
    for (int f = 0; f < 8; ++f) {
      fragment<kBits, kLevels>(a, words, f, table);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) multiply(acc[tile][f], a, b[tile][0], b[tile][1]);
    }
  }

  __device__ __forceinline__ void run(int steps, float (&acc)[kTiles][8][4]) {
    const int warp = threadIdx.x / 32;
    const float* row = row_of_token(lane);
    int ahead = warp;
    for (int stage = 0; stage < kStages - 1; ++stage, ahead += kTeam) {
      if (ahead < steps) fill(shared.steps[ahead], row, stage);
      ring.close();
    }
    find_norms();
    int stage = 0, spare = kStages - 1;
    for (int step = warp; step < steps; step += kTeam, ahead += kTeam) {
      ring.template wait<kStages - 2>(stage);
      if (ahead < steps) fill(shared.steps[ahead], row, spare);
      ring.close();
      const Entry entry = shared.steps[step];
      dispatch(entry.bits, entry.levels, [&]<int kBits, bool kLevels>() {
        consume<kBits, kLevels>(memory + stage * kStage, entry, acc);
      });
      spare = stage;
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    ring.drain();
    __syncwarp();
  }
};

template <typename T>
__device__ __forceinline__ T add(T value, float delta);
template <>
__device__ __forceinline__ __half add(__half value, float delta) {
  return __float2half_rn(__half2float(value) + delta);
}
template <>
__device__ __forceinline__ __nv_bfloat16 add(__nv_bfloat16 value, float delta) {
  return __float2bfloat16_rn(__bfloat162float(value) + delta);
}

// y[n .. n+3] += delta within [0, features).
template <typename T>
__device__ __forceinline__ void add_to_row(T* row, int n, int features, const float (&delta)[4]) {
  if (n >= 0 && n + 4 <= features && reinterpret_cast<uintptr_t>(row + n) % 8 == 0) {
    uint2 raw = *reinterpret_cast<const uint2*>(row + n);
    T* values = reinterpret_cast<T*>(&raw);
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = add(values[i], delta[i]);
    *reinterpret_cast<uint2*>(row + n) = raw;
    return;
  }
  for (int i = 0; i < 4; ++i) {
    if (n + i >= 0 && n + i < features) row[n + i] = add(row[n + i], delta[i]);
  }
}

// Adds the warps' sums of one tile of tokens in warp order and updates y: warp = token, lane = four
// outputs.
template <typename T, int kTeam>
__device__ void finish_tile(const Gemm& gemm, const Item& item, unsigned char* rings,
                            Shared<kTeam>& shared, int tile, const float (&acc)[8][4],
                            const float (&bias)[4], float norm) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float* own = reinterpret_cast<float*>(rings + warp * kRing);
  const int count = item.chunk.z - 8 * tile;
#pragma unroll
  for (int column = 0; column < 2; ++column) {
    const int token = 2 * (lane % 4) + column;
    if (token >= count) continue;
    float4* to = reinterpret_cast<float4*>(own + token * kPitch + 16 * (lane / 4));
#pragma unroll
    for (int f = 0; f < 8; f += 2) {
      to[f / 2] = make_float4(acc[f][column], acc[f][2 + column], acc[f + 1][column],
                              acc[f + 1][2 + column]);
    }
    shared.loss[warp][token][lane / 4] = bias[column] + bias[2 + column];
  }
  if (lane % 4 == 0 && warp == 0) shared.norm[lane / 4] = norm;
  __syncthreads();
  for (int column = warp; column < min(8, count); column += kTeam) {
    float delta[4] = {};
    float2 loss = make_float2(0.f, 0.f);
#pragma unroll
    for (int w = 0; w < kTeam; ++w) {
      const float* sums = reinterpret_cast<const float*>(rings + w * kRing) + column * kPitch;
      const float4 part = *reinterpret_cast<const float4*>(sums + 4 * lane);
      delta[0] += part.x;
      delta[1] += part.y;
      delta[2] += part.z;
      delta[3] += part.w;
      loss.x += shared.loss[w][column][2 * (lane % 4)];
      loss.y += shared.loss[w][column][2 * (lane % 4) + 1];
    }
    const float inverse = 1.f / shared.norm[column];
#pragma unroll
    for (int i = 0; i < 4; ++i) delta[i] = (delta[i] - (i < 2 ? loss.x : loss.y)) * inverse;
    const Slice& slice = gemm.slices[item.slice];
    const int order = plan_order(gemm.token_count) + item.chunk.y + 8 * tile + column;
    T* row = static_cast<T*>(slice.y) + gemm.plan[order] * slice.y_stride;
    add_to_row(row, item.group * kGroup - slice.out_offset + 4 * lane, slice.out_features, delta);
  }
  Ring::release();
  __syncthreads();
}

__device__ __forceinline__ Item find_item(const Gemm& gemm, int index, int groups) {
  Item item;
  const int* chunks = gemm.plan + plan_chunks(gemm.token_count);
  item.chunk = reinterpret_cast<const int4*>(chunks)[index / groups];
  item.group = index % groups;
  item.slice = 0;
  while (item.group >= gemm.slices[item.slice].groups) {
    item.group -= gemm.slices[item.slice++].groups;
  }
  const int64_t projection = gemm.slices[item.slice].projection;
  item.row = gemm.directory + (projection * gemm.slot_count + item.chunk.x) * DW_DIRECTORY_FIELDS;
  return item;
}

template <int kTiles, int kTeam>
constexpr int kResident = (kTiles == 1 ? 16 : 8) / kTeam;  // blocks of threads a multiprocessor

template <typename T, int kTiles, int kTeam>
__global__ void __launch_bounds__(32 * kTeam, kResident<kTiles, kTeam>)
    expand_kernel(const __grid_constant__ Gemm gemm, int groups) {
  extern __shared__ __align__(16) unsigned char rings[];
  __shared__ Shared<kTeam> shared;
  const int warp = threadIdx.x / 32;
  Ring ring(rings + warp * kRing, shared.barriers[warp]);
  store_all_biases(shared.biases);
  const int items = gemm.plan[kPlanChunks] * groups;
  for (int index = blockIdx.x; index < items; index += gridDim.x) {
    const Item item = find_item(gemm, index, groups);
    const Shapes shapes = load_shapes(item.row);
    const int steps = step_count(shapes);
    if (steps == 0) continue;
    list_steps(gemm, item, shapes, steps, shared.steps);
    __syncthreads();
    float acc[kTiles][8][4] = {};
    WarpProduct<kTiles, kTeam> product(gemm, item, shared, ring, rings + warp * kRing);
    product.run(steps, acc);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      finish_tile<T, kTeam>(gemm, item, rings, shared, tile, acc[tile], product.bias[tile],
                            product.norm[tile]);
    }
  }
}

template <typename T, int kTiles, int kTeam>
cudaError_t launch(const Gemm& gemm, cudaStream_t stream) {
  const auto kernel = expand_kernel<T, kTiles, kTeam>;
  constexpr int kShared = kTeam * kRing;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (error != cudaSuccess) return error;
  int groups = 0;
  for (int s = 0; s < gemm.slice_count; ++s) groups += gemm.slices[s].groups;
  const int64_t most = static_cast<int64_t>(gemm.token_count) * groups;
  const int64_t resident = multiprocessors() * kResident<kTiles, kTeam>;
  const int grid = static_cast<int>(most < resident ? most : resident);
  kernel<<<grid, 32 * kTeam, kShared, stream>>>(gemm, groups);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_typed(const Gemm& gemm, int chunk, cudaStream_t stream) {
  if (gemm.token_count < 8) return launch<T, 1, 8>(gemm, stream);
  return chunk > 8 ? launch<T, 4, 4>(gemm, stream) : launch<T, 1, 4>(gemm, stream);
}

}  // namespace

cudaError_t launch_expand(const Gemm& gemm, int chunk, dw_dtype dtype, cudaStream_t stream) {
  return dtype == DW_BFLOAT16 ? launch_typed<__nv_bfloat16>(gemm, chunk, stream)
                              : launch_typed<__half>(gemm, chunk, stream);
}

}  // namespace dw

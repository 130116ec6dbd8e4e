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
// fp16(h * scale * 2^e), with e chosen per token so that the largest |h * scale| becomes 2^13; y =
// 2^-e * (sum code * h' - sum zero * h * scale * 2^e). Outputs are the 16-row operand, tokens the 8
// columns; a block of 16 ranks feeds eight products, one for every 16 outputs. The warps take
// blocks in turn over all bands (warp w: w, w + 8, ...), each with its own cp.async ring; sums meet
// in shared memory in warp order. Which warp sums what depends on the band list alone.
#include <cuda_bf16.h>

#include "fragment.cuh"
#include "kernels.h"

namespace dw {
namespace {

constexpr int kStages = 4;
constexpr int kInnerBytes = 512;  // h of 8 tokens and a block of ranks
constexpr int kStage = kMaxBlockBytes + kInnerBytes;
constexpr int kRing = kStages * kStage;  // bytes a warp
constexpr int kPitch = kGroup + 4;       // floats between tokens when sums meet
static_assert(8 * kPitch * 4 <= kRing, "the warps' sums use the ring");

struct Item {
  int4 chunk;  // slot, first token, count
  int slice, group;
  const int64_t* row;  // of the directory
};

// Walks a warp's blocks through the bands.
struct Cursor {
  const Gemm& gemm;
  const Item& item;
  int band = -1, block = 0, blocks = 0;
  int bits, rank, h_index = 0;
  bool levels;
  const unsigned char* u;
  const __half* table;

  __device__ __forceinline__ Cursor(const Gemm& gemm, const Item& item, int warp)
      : gemm(gemm), item(item), block(warp) {
    settle();
  }

  __device__ __forceinline__ bool done() const { return band >= DW_MAX_BANDS; }

  __device__ __forceinline__ void advance() {
    block += kWarps;
    settle();
  }

  __device__ __forceinline__ int ranks() const {
    return min(rank - block * block_ranks(bits), block_ranks(bits));
  }

 private:
  // Moves on to the band that holds `block`.
  __device__ __forceinline__ void settle() {
    while (block >= blocks && !done()) {
      block -= blocks;
      if (blocks > 0) h_index += padded_rank(rank);
      if (++band >= item.row[DW_FIELD_BAND_COUNT]) {
        band = DW_MAX_BANDS;
        return;
      }
      const int64_t* fields = item.row + DW_FIELD_BANDS + band * DW_BAND_FIELDS;
      const int64_t shape = fields[DW_BAND_SHAPE];
      bits = band_bits(shape);
      rank = band_rank(shape);
      levels = band_grid(shape) == DW_GRID_CODEBOOK;
      blocks = block_count(bits, rank);
      u = gemm.arena + fields[DW_BAND_U] +
          static_cast<int64_t>(item.group) * u_group_bytes(bits, rank);
      table = reinterpret_cast<const __half*>(gemm.arena + fields[DW_BAND_LEVELS]);
    }
  }
};

template <int kTiles>
struct WarpProduct {
  static constexpr bool kStaged = kTiles == 1;  // h rides in the ring

  const Gemm& gemm;
  const Item& item;
  unsigned char* ring;
  int lane;
  const float* h[kTiles];  // this lane's tokens, 4 ranks of each block
  bool present;
  float norm[kTiles] = {};
  float offset[kTiles] = {};  // sum of zero * h'

  __device__ __forceinline__ WarpProduct(const Gemm& gemm, const Item& item, unsigned char* ring)
      : gemm(gemm), item(item), ring(ring), lane(threadIdx.x % 32) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      h[tile] = gemm.h + position(tile) * gemm.ranks + 4 * (lane % 4);
    }
    present = lane / 4 < item.chunk.z;
  }

  __device__ __forceinline__ int64_t position(int tile) const {
    const int token = min(8 * tile + lane / 4, item.chunk.z - 1);
    return static_cast<int64_t>(item.slice) * gemm.token_count + item.chunk.y + token;
  }

  __device__ __forceinline__ void find_norms() {
    const float scale = *reinterpret_cast<const float*>(gemm.arena + item.row[DW_FIELD_HEADER]);
    const int blocks = static_cast<int>(item.row[DW_FIELD_ROW_BLOCKS]);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const float* maxima = gemm.h_max + position(tile) * gemm.blocks;
      float largest = 0.f;
      for (int block = lane % 4; block < blocks; block += 4) {
        largest = fmaxf(largest, maxima[block]);
      }
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
      norm[tile] = normalizer(largest * scale);
    }
  }

  __device__ __forceinline__ void issue(Cursor& cursor, int step) const {
    if (!cursor.done()) {
      unsigned char* stage = ring + step % kStages * kStage;
      const unsigned char* from = cursor.u + cursor.block * whole_block_bytes(cursor.bits);
      copy_block(stage, from, u_block_bytes(cursor.bits, cursor.ranks()), lane);
      if (kStaged && present) {
        const int rank = cursor.h_index + cursor.block * block_ranks(cursor.bits);
        copy_async(stage + kMaxBlockBytes + lane * 16, h[0] + rank);
      }
      cursor.advance();
    }
    commit_copies();
  }

  template <int kBits, bool kLevels>
  __device__ __forceinline__ void consume(const unsigned char* stage, const Cursor& cursor,
                                          float (&acc)[kTiles][8][4]) {
    const int quads = ceil_div(cursor.ranks(), 4);
    const int quad = min(lane % 4, quads - 1);
    uint32_t words[2 * kBits];
    load_words<kBits>(words, stage, lane / 4 * quads + quad, 8 * quads);
    float2 grid[4];
    if constexpr (kBits == 16) {
#pragma unroll
      for (int r = 0; r < 4; ++r) grid[r] = make_float2(1.f, 0.f);
    } else {
      const uint4 raw =
          *reinterpret_cast<const uint4*>(stage + u_code_bytes(kBits, 4 * quads) + 16 * quad);
      grid[0] = grid_entry<kBits, kLevels>(raw.x);
      grid[1] = grid_entry<kBits, kLevels>(raw.y);
      grid[2] = grid_entry<kBits, kLevels>(raw.z);
      grid[3] = grid_entry<kBits, kLevels>(raw.w);
    }
    uint32_t b[kTiles][2];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const float4 inner = inner_values(stage, cursor, tile, lane % 4 < quads);
      const float scaled[4] = {inner.x * norm[tile] * grid[0].x, inner.y * norm[tile] * grid[1].x,
                               inner.z * norm[tile] * grid[2].x, inner.w * norm[tile] * grid[3].x};
#pragma unroll
      for (int r = 0; r < 4; ++r) offset[tile] += grid[r].y * scaled[r];
      b[tile][0] = bits_of(__floats2half2_rn(scaled[0], scaled[1]));
      b[tile][1] = bits_of(__floats2half2_rn(scaled[2], scaled[3]));
    }
#pragma unroll
    for (int f = 0; f < 8; ++f) {
      uint32_t a[4];
      fragment<kBits, kLevels>(a, words, f, cursor.table);
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) multiply(acc[tile][f], a, b[tile][0], b[tile][1]);
    }
  }

  // h of this lane's token and four ranks; zeros for ranks that the block lacks.
  __device__ __forceinline__ float4 inner_values(const unsigned char* stage, const Cursor& cursor,
                                                 int tile, bool valid) const {
    if (!valid) return make_float4(0.f, 0.f, 0.f, 0.f);
    if (kStaged) return *reinterpret_cast<const float4*>(stage + kMaxBlockBytes + lane * 16);
    const int rank = cursor.h_index + cursor.block * block_ranks(cursor.bits);
    return *reinterpret_cast<const float4*>(h[tile] + rank);
  }

  __device__ __forceinline__ void run(float (&acc)[kTiles][8][4]) {
    const int warp = threadIdx.x / 32;
    Cursor ahead(gemm, item, warp), cursor(gemm, item, warp);
#pragma unroll
    for (int step = 0; step < kStages - 1; ++step) issue(ahead, step);
    find_norms();
    for (int step = 0; !cursor.done(); ++step, cursor.advance()) {
      wait_copies<kStages - 2>();
      __syncwarp();
      issue(ahead, step + kStages - 1);
      dispatch(cursor.bits, cursor.levels, [&]<int kBits, bool kLevels>() {
        consume<kBits, kLevels>(ring + step % kStages * kStage, cursor, acc);
      });
    }
    wait_copies<0>();
    __syncwarp();
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      offset[tile] += __shfl_xor_sync(0xffffffffu, offset[tile], 1);
      offset[tile] += __shfl_xor_sync(0xffffffffu, offset[tile], 2);
    }
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

struct Meeting {
  float offset[kWarps][8];
  float norm[8];
};

// Adds the warps' sums of one tile of tokens in warp order and updates y: warp = token, lane = four
// outputs.
template <typename T>
__device__ void finish_tile(const Gemm& gemm, const Item& item, unsigned char* shared,
                            Meeting& meeting, int tile, const float (&acc)[8][4], float offset,
                            float norm) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float* own = reinterpret_cast<float*>(shared + warp * kRing);
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
  }
  if (lane % 4 == 0) meeting.offset[warp][lane / 4] = offset;
  if (lane % 4 == 0 && warp == 0) meeting.norm[lane / 4] = norm;
  __syncthreads();
  if (warp < count) {
    float delta[4] = {};
    float total = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float* sums = reinterpret_cast<const float*>(shared + w * kRing) + warp * kPitch;
      const float4 part = *reinterpret_cast<const float4*>(sums + 4 * lane);
      delta[0] += part.x;
      delta[1] += part.y;
      delta[2] += part.z;
      delta[3] += part.w;
      total += meeting.offset[w][warp];
    }
    const float inverse = 1.f / meeting.norm[warp];
#pragma unroll
    for (int i = 0; i < 4; ++i) delta[i] = (delta[i] - total) * inverse;
    const Slice& slice = gemm.slices[item.slice];
    const int order = plan_order(gemm.token_count) + item.chunk.y + 8 * tile + warp;
    T* row = static_cast<T*>(slice.y) + gemm.plan[order] * slice.y_stride;
    add_to_row(row, item.group * kGroup - slice.out_offset + 4 * lane, slice.out_features, delta);
  }
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

template <typename T, int kTiles>
__global__ void __launch_bounds__(kThreads, kTiles == 1 ? 2 : 1)
    expand_kernel(const __grid_constant__ Gemm gemm, int groups) {
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ Meeting meeting;
  unsigned char* ring = shared + threadIdx.x / 32 * kRing;
  const int items = gemm.plan[kPlanChunks] * groups;
  for (int index = blockIdx.x; index < items; index += gridDim.x) {
    const Item item = find_item(gemm, index, groups);
    if (item.row[DW_FIELD_BAND_COUNT] == 0) continue;
    float acc[kTiles][8][4] = {};
    WarpProduct<kTiles> product(gemm, item, ring);
    product.run(acc);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      finish_tile<T>(gemm, item, shared, meeting, tile, acc[tile], product.offset[tile],
                     product.norm[tile]);
    }
  }
}

template <typename T, int kTiles>
cudaError_t launch(const Gemm& gemm, cudaStream_t stream) {
  const auto kernel = expand_kernel<T, kTiles>;
  constexpr int kShared = kWarps * kRing;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (error != cudaSuccess) return error;
  int groups = 0;
  for (int s = 0; s < gemm.slice_count; ++s) groups += gemm.slices[s].groups;
  const int64_t most = static_cast<int64_t>(gemm.token_count) * groups;
  const int64_t resident = multiprocessors() * (kTiles == 1 ? 2 : 1);
  kernel<<<static_cast<int>(most < resident ? most : resident), kThreads, kShared, stream>>>(
      gemm, groups);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_typed(const Gemm& gemm, int chunk, cudaStream_t stream) {
  return chunk > 8 ? launch<T, 4>(gemm, stream) : launch<T, 1>(gemm, stream);
}

}  // namespace

cudaError_t launch_expand(const Gemm& gemm, int chunk, dw_dtype dtype, cudaStream_t stream) {
  return dtype == DW_BFLOAT16 ? launch_typed<__nv_bfloat16>(gemm, chunk, stream)
                              : launch_typed<__half>(gemm, chunk, stream);
}

}  // namespace dw

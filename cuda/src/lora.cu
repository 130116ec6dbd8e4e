// SPDX-License-Identifier: Apache-2.0
// Gated LoRAs in decode, of a record whose 16-bit bands are a fusion's experts (layout.h):
//
//   stage 1   h[tile, s, t, r] = w[t, expert of r] sigma[r] * sum over tile's k of A[r, k] x[t, k]
//   stage 2   y[s, t, n] += sum_r B[r, n] h[s, t, r],   h the tiles' sum
//
//   x, y  fp16 or bf16   A, B  fp16, in kernel order   w  float [tokens, 8]   h  float
//
// Roofline: bytes, 4 * rank * (in + out) a token's fusion and layer; with one fusion they are so
// few (k = 2, rank 64, 4096 x 4096: 1 MB a stage) that latency is all. So nothing is listed or
// staged as for a delta's many narrow bands: a warp takes 16 ranks x 128 features, 4 KB, straight
// into registers as the tensor core's 16-row operand, tokens being its 8 columns, and there are
// enough warps for a whole stage to be under way at once. Weights do not depend on what ran
// before: they are asked for first, so that stage 2's arrive while stage 1 runs.
//
// Sums meet in warp order, and which warp has what depends on the record alone: a token's bits
// depend on nothing but its slot and x.
#include <cuda_bf16.h>

#include "activations.cuh"
#include "fragment.cuh"
#include "kernels.h"
#include "ring.cuh"
#include "step.cuh"

namespace dw {
namespace {

constexpr int kTeam = 8;  // warps of a block of threads
constexpr int kTeamThreads = 32 * kTeam;
constexpr int kResident = 2;  // blocks of threads a multiprocessor
constexpr int kTokens = 8;
constexpr int kPieceRanks = 16;
constexpr int kTokenPitch = kPieceRanks + 4;  // floats between tokens when stage 1's sums meet
constexpr int kPitch = kGroup + 4;            // and stage 2's
// Blocks of threads that share stage 1's pieces of a (chunk, slice, tile).
constexpr int kSpread = 16;

// Sixteen ranks of one expert; its last may be fewer.
struct Piece {
  int band, rank;  // the expert's
  int first;       // of the piece, in the expert
};

// The experts' ranks, zeros behind the last.
struct Experts {
  int ranks[DW_MAX_BANDS];

  __device__ __forceinline__ explicit Experts(const int64_t* row) {
    const Shapes shapes = load_shapes(row);
#pragma unroll
    for (int b = 0; b < DW_MAX_BANDS; ++b) ranks[b] = band_rank(shapes.of[b]);
  }

  // A piece by its place among all; every expert's ranks begin with one.
  __device__ __forceinline__ Piece piece(int place) const {
    Piece found = {};
#pragma unroll
    for (int b = 0; b < DW_MAX_BANDS; ++b) {
      const int count = ceil_div(ranks[b], kPieceRanks);
      if (place >= 0 && place < count) found = {b, ranks[b], place * kPieceRanks};
      place -= count;
    }
    return found;
  }
};

// Of the two blocks of ranks that a piece consists of, the ranks that one has.
__device__ __forceinline__ int ranks_of(const Piece& piece, int block) {
  return max(0, min(block_ranks(16), piece.rank - block * block_ranks(16)));
}

// A lane's registers of eight products, zeros where there are no ranks.
struct Weights {
  uint4 of[8];

  __device__ __forceinline__ void load(const unsigned char* block, int lane, int lanes,
                                       bool present) {
#pragma unroll
    for (int f = 0; f < 8; ++f) {
      of[f] = make_uint4(0, 0, 0, 0);
      if (present) of[f] = __ldcs(reinterpret_cast<const uint4*>(block) + f * lanes + lane);
    }
  }

  // d += product f with the columns b.
  __device__ __forceinline__ void multiply_into(float (&d)[4], int f, uint2 b) const {
    const uint32_t a[4] = {of[f].x, of[f].y, of[f].z, of[f].w};
    multiply(d, a, b.x, b.y);
  }
};

__device__ __forceinline__ const int64_t* band_fields(const int64_t* row, const Piece& piece) {
  return row + DW_FIELD_BANDS + piece.band * DW_BAND_FIELDS;
}

// A of a piece and a group of in_features: rows 4..7 of the operand's halves are the second block.
__device__ __forceinline__ void load_a(Weights& weights, const Gemm& gemm, const int64_t* row,
                                       const Piece& piece, int group) {
  const int lane = threadIdx.x % 32, pair = lane / 4 % 4;
  const int block = piece.first / block_ranks(16) + lane / 16;
  const int ranks = ranks_of(piece, block), pairs = ceil_div(ranks, 2);
  const unsigned char* a = gemm.arena + band_fields(row, piece)[DW_BAND_V] +
                           static_cast<int64_t>(block) * gemm.in_groups * whole_block_bytes(16) +
                           static_cast<int64_t>(group) * v_block_bytes(16, ranks);
  weights.load(a, 4 * pair + lane % 4, 4 * pairs, pair < pairs);
}

// B of a piece and a group of out_features: its columns of ranks 8..15 are the second block.
__device__ __forceinline__ void load_b(Weights& weights, const Gemm& gemm, const int64_t* row,
                                       const Piece& piece, int group) {
  const int lane = threadIdx.x % 32, quad = lane % 2;
  const int block = piece.first / block_ranks(16) + lane % 4 / 2;
  const int quads = ceil_div(ranks_of(piece, block), 4);
  const unsigned char* b = gemm.arena + band_fields(row, piece)[DW_BAND_U] +
                           static_cast<int64_t>(group) * u_group_bytes(16, piece.rank) +
                           static_cast<int64_t>(block) * whole_block_bytes(16);
  weights.load(b, lane / 4 * quads + quad, 8 * quads, quad < quads);
}

// A chunk that may not exist: asked for together with the number of chunks.
__device__ __forceinline__ int4 chunk_at(const Gemm& gemm, int chunk) {
  return chunk_of(gemm, min(chunk, gemm.token_count - 1));
}

// Calls work(unit, chunk) for this block's units, every gridDim.x-th, whose slice has a fusion's
// record. Every warp looks at 32 units at a time, so that tenants without a fusion, which may be
// almost all of a step, cost no trip to memory each.
template <typename SliceOf, typename Work>
__device__ __forceinline__ void for_each_served(const Gemm& gemm, int chunk_units,
                                                const SliceOf& slice_of, const Work& work) {
  const int units = chunk_count(gemm) * chunk_units;
  for (int first = blockIdx.x;; first += 32 * gridDim.x) {
    const int own = first + threadIdx.x % 32 * gridDim.x;
    const int4 chunk = chunk_at(gemm, own / chunk_units);
    if (first >= units) return;
    bool served = false;
    if (own < units) {
      const int projection = gemm.slices[slice_of(own % chunk_units)].projection;
      served = is_served(gemm, directory_row(gemm, projection, chunk.x));
    }
    for (unsigned left = __ballot_sync(0xffffffffu, served); left != 0; left &= left - 1) {
      const int unit = first + (__ffs(left) - 1) * gridDim.x;
      work(unit % chunk_units, chunk_of(gemm, unit / chunk_units));
    }
  }
}

// Grid: units, chunk by chunk; a unit is every kSpread-th piece of a (chunk, slice, tile).
template <typename T>
__global__ void __launch_bounds__(kTeamThreads, kResident)
    lora_shrink_kernel(const __grid_constant__ Gemm gemm) {
  __shared__ float partial[kTeam][kTokens * kTokenPitch];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  bool waited = false;
  let_next_begin();  // stage 2 waits for all of this before it reads h
  const auto slice_of = [&](int unit) { return unit / kSpread / gemm.tiles; };
  const auto add_unit = [&](int unit, const int4& chunk) {
    const int tile = unit / kSpread % gemm.tiles, slice = slice_of(unit);
    const int64_t* row = directory_row(gemm, gemm.slices[slice].projection, chunk.x);
    const Experts experts(row);
    const int pieces = static_cast<int>(row[DW_FIELD_PADDED_RANK]) / kPieceRanks;
    const int64_t column = token_at(gemm, chunk.y + min(lane / 4, chunk.z - 1));
    const int first = tile * gemm.tile_groups + warp;
    const int last = min((tile + 1) * gemm.tile_groups, gemm.in_groups);
    // One of these is what this thread adds up: a token and a rank.
    const int token = threadIdx.x / kPieceRanks, rank = threadIdx.x % kPieceRanks;
    const bool adds = token < chunk.z;
    for (int place = unit % kSpread; place < pieces; place += kSpread) {
      const Piece piece = experts.piece(place);
      Weights weights;
      if (first < last) load_a(weights, gemm, row, piece, first);
      const float* sigma = reinterpret_cast<const float*>(gemm.arena + row[DW_FIELD_SIGMA]);
      float factor = adds ? __ldg(sigma + place * kPieceRanks + rank) : 0.f;
      if (!waited) {
        after_previous();
        waited = true;
      }
      if (adds) factor *= expert_weight(gemm, token_at(gemm, chunk.y + token), piece.band);
      float sums[4] = {};
      for (int group = first; group < last; group += kTeam) {
        if (group != first) load_a(weights, gemm, row, piece, group);
        Activations<1, 1> x;
        x.load<T>(gemm, column, group, 1);
        float product[4] = {};
#pragma unroll
        for (int f = 0; f < 8; ++f) weights.multiply_into(product, f, x.columns(0, f));
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[j] = fmaf(product[j], x.inverse[j % 2], sums[j]);
      }
      float* to = partial[warp] + 2 * (lane % 4) * kTokenPitch + 2 * (lane / 4);
      *reinterpret_cast<float2*>(to) = make_float2(sums[0], sums[2]);
      *reinterpret_cast<float2*>(to + kTokenPitch) = make_float2(sums[1], sums[3]);
      __syncthreads();
      if (adds) {
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < kTeam; ++w) sum += partial[w][token * kTokenPitch + rank];
        h_row(gemm, tile, slice, chunk.y + token)[place * kPieceRanks + rank] =
            piece.first + rank < piece.rank ? sum * factor : 0.f;
      }
      __syncthreads();
    }
  };
  for_each_served(gemm, gemm.slice_count * gemm.tiles * kSpread, slice_of, add_unit);
  if (!waited) after_previous();
}

// Grid: units, chunk by chunk; a unit is a (chunk, slice, group of 128 out_features).
template <typename T>
__global__ void __launch_bounds__(kTeamThreads, kResident)
    lora_expand_kernel(const __grid_constant__ Gemm gemm, int groups) {
  __shared__ float sums[kTeam][kTokens * kPitch];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  bool waited = false;
  let_next_begin();
  const auto slice_of = [&](int unit) {
    int s = 0;
    while (unit >= gemm.slices[s].groups) unit -= gemm.slices[s++].groups;
    return s;
  };
  const auto add_unit = [&](int unit, const int4& chunk) {
    const int s = slice_of(unit);
    int group = unit;
    for (int before = 0; before < s; ++before) group -= gemm.slices[before].groups;
    const Slice& slice = gemm.slices[s];
    const int64_t* row = directory_row(gemm, slice.projection, chunk.x);
    const Experts experts(row);
    const int pieces = static_cast<int>(row[DW_FIELD_PADDED_RANK]) / kPieceRanks;
    const float undo = reinterpret_cast<const float*>(gemm.arena + row[DW_FIELD_HEADER])[1];
    const int order = chunk.y + min(lane / 4, chunk.z - 1);
    Weights weights;
    if (warp < pieces) load_b(weights, gemm, row, experts.piece(warp), group);
    if (!waited) {
      after_previous();
      waited = true;
    }
    float acc[8][4] = {};
    for (int place = warp; place < pieces; place += kTeam) {
      if (place != warp) load_b(weights, gemm, row, experts.piece(place), group);
      // h of this lane's token and four ranks; as fp16, times a power of two a token and piece.
      const float4 h = h_quad(gemm, s, order, 4 * place + lane % 4, gemm.tiles);
      float largest = largest_of(h);
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
      const float factor = normalizer<7>(largest), inverse = 1.f / factor;
      const uint2 columns = make_uint2(bits_of(__floats2half2_rn(h.x * factor, h.y * factor)),
                                       bits_of(__floats2half2_rn(h.z * factor, h.w * factor)));
      const float low = __shfl_sync(0xffffffffu, inverse, 8 * (lane % 4));
      const float high = __shfl_sync(0xffffffffu, inverse, 8 * (lane % 4) + 4);
#pragma unroll
      for (int f = 0; f < 8; ++f) {
        float product[4] = {};
        weights.multiply_into(product, f, columns);
#pragma unroll
        for (int j = 0; j < 4; ++j) acc[f][j] = fmaf(product[j], j % 2 ? high : low, acc[f][j]);
      }
    }
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      float* to = sums[warp] + (2 * (lane % 4) + j) * kPitch + 16 * (lane / 4);
#pragma unroll
      for (int f = 0; f < 8; f += 2) {
        *reinterpret_cast<float4*>(to + 2 * f) =
            make_float4(acc[f][j], acc[f][2 + j], acc[f + 1][j], acc[f + 1][2 + j]);
      }
    }
    // A warp a token, a lane four outputs.
    const bool writes = warp < chunk.z;
    T* y = nullptr;
    if (writes) y = static_cast<T*>(slice.y) + token_at(gemm, chunk.y + warp) * slice.y_stride;
    Outputs<T> outputs(y, group * kGroup - slice.out_offset + 4 * lane,
                       writes ? slice.out_features : 0);
    __syncthreads();
    if (writes) {
      float delta[4] = {};
#pragma unroll
      for (int w = 0; w < kTeam; ++w) {
        const float4 part = *reinterpret_cast<const float4*>(sums[w] + warp * kPitch + 4 * lane);
        delta[0] += part.x;
        delta[1] += part.y;
        delta[2] += part.z;
        delta[3] += part.w;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) delta[i] *= undo;
      outputs.add_all(delta);
    }
    __syncthreads();
  };
  for_each_served(gemm, groups, slice_of, add_unit);
  if (!waited) after_previous();
}

int grid_of(int64_t most_units) {
  const int64_t resident = static_cast<int64_t>(multiprocessors()) * kResident;
  return static_cast<int>(most_units < resident ? most_units : resident);
}

template <typename X>
cudaError_t launch_first(const Gemm& gemm, cudaStream_t stream) {
  const int64_t units =
      static_cast<int64_t>(gemm.token_count) * gemm.slice_count * gemm.tiles * kSpread;
  return launch_dependent(lora_shrink_kernel<X>, dim3(grid_of(units)), kTeamThreads, 0, stream,
                          gemm);
}

template <typename Y>
cudaError_t launch_second(const Gemm& gemm, cudaStream_t stream) {
  int groups = 0;
  for (int s = 0; s < gemm.slice_count; ++s) groups += gemm.slices[s].groups;
  const int64_t units = static_cast<int64_t>(gemm.token_count) * groups;
  return launch_dependent(lora_expand_kernel<Y>, dim3(grid_of(units)), kTeamThreads, 0, stream,
                          gemm, groups);
}

}  // namespace

cudaError_t launch_lora_shrink(const Gemm& gemm, cudaStream_t stream) {
  return gemm.x_dtype == DW_BFLOAT16 ? launch_first<__nv_bfloat16>(gemm, stream)
                                     : launch_first<__half>(gemm, stream);
}

cudaError_t launch_lora_expand(const Gemm& gemm, cudaStream_t stream) {
  return gemm.y_dtype == DW_BFLOAT16 ? launch_second<__nv_bfloat16>(gemm, stream)
                                     : launch_second<__half>(gemm, stream);
}

}  // namespace dw

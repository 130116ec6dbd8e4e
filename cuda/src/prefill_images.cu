// SPDX-License-Identifier: Apache-2.0
// The tokens of the prefill products as an image (prefill.cuh).
//
//   x       fp16 or bf16 [tokens, in_features] -> fp16 image [token tiles, 128 * in_groups]
//   scales  float2 [tokens in plan order]: the sum of |x| of the image, of LORA times the largest
//           |weight| of an expert; and what undoes the power of two of bf16 rows, times the
//           token's weight
//
// A block of threads a token; one more says how stage 1 is cut. Roofline: bytes, 8 MB of 512
// tokens.
#include <cuda_bf16.h>

#include "batch.cuh"
#include "prefill.cuh"

namespace dw {
namespace prefill {
namespace {

// Of all threads of a block, by all; `join` is associative and commutative up to rounding.
template <typename Join>
__device__ float block_reduce(float value, Join join) {
  __shared__ float partial[kWarps];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    value = join(value, __shfl_xor_sync(0xffffffffu, value, step));
  }
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  value = partial[0];
  for (int w = 1; w < kWarps; ++w) value = join(value, partial[w]);
  __syncthreads();
  return value;
}

// ---- x ----------------------------------------------------------------------------------------

template <typename T>
struct Input {
  const T* x;
  int64_t stride;
  int features, offset;
};

// Four neighbouring lanes hold four words each; then lane i has the i-th of all four.
__device__ __forceinline__ uint4 transpose(const uint32_t (&words)[4]) {
  const bool odd = threadIdx.x % 2 == 1, high = threadIdx.x % 4 >= 2;
  uint32_t half[4];  // of the lane and its neighbour: words of its own parity
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t other = __shfl_xor_sync(0xffffffffu, odd ? words[i] : words[i + 1], 1);
    half[i] = odd ? other : words[i];
    half[i + 1] = odd ? words[i + 1] : other;
  }
  const uint32_t first = __shfl_xor_sync(0xffffffffu, high ? half[0] : half[2], 2);
  const uint32_t second = __shfl_xor_sync(0xffffffffu, high ? half[1] : half[3], 2);
  return high ? make_uint4(first, second, half[2], half[3])
              : make_uint4(half[0], half[1], first, second);
}

template <typename T>
__device__ void write_x(const Gemm& gemm, const Input<T>& input, int order, int token, int row) {
  const int octets = kGroup / 8 * gemm.in_groups;
  const T* from = input.x + token * input.stride;
  float scale = 1.f;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    float largest = 0.f;
    for (int octet = threadIdx.x; octet < octets; octet += kThreads) {
      float values[8];
      load_octet(from, 8 * octet - input.offset, input.features, values);
#pragma unroll
      for (int i = 0; i < 8; ++i) largest = fmaxf(largest, fabsf(values[i]));
    }
    scale = normalizer<13>(block_reduce(largest, fmaxf));
  }
  float sum = 0.f;
  const int whole_warps = static_cast<int>(round_up(octets, 32));  // all lanes exchange words
  for (int octet = threadIdx.x; octet < whole_warps; octet += kThreads) {
    float values[8] = {};
    if (octet < octets) load_octet(from, 8 * octet - input.offset, input.features, values);
    uint32_t pairs[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      sum += fabsf(values[2 * i]) + fabsf(values[2 * i + 1]);
      pairs[i] = bits_of(__floats2half2_rn(values[2 * i] * scale, values[2 * i + 1] * scale));
    }
    // Pair i of an octet lies in the i-th of four octets of the image, a lane's place apart.
    const uint4 own = transpose(pairs);
    if (octet < octets) {
      *reinterpret_cast<uint4*>(octet_at(gemm.x_image, input_tiles(gemm), row, octet)) = own;
    }
  }
  sum = block_reduce(sum, [](float a, float b) { return a + b; }) * scale;
  if (threadIdx.x > 0) return;
  if (gemm.record == DW_LORA) {
    float largest = 0.f;
    for (int expert = 0; expert < DW_MAX_BANDS; ++expert) {
      largest = fmaxf(largest, fabsf(expert_weight(gemm, token, expert)));
    }
    sum *= largest;
  }
  gemm.token_scales[order] = make_float2(sum, weight_of(gemm, token) / scale);
}

// ---- Kernels ----------------------------------------------------------------------------------

// Into how many parts stage 1 cuts in_features for a record: what ends first on a GPU of 132
// multiprocessors if all of the launch's tokens were its own. In clocks: what 128 k of a work item
// take, what an item costs beside, and to write its sums and read all parts'. By sizes and the
// record's own ranks alone: no neighbour changes the order of a sum.
__device__ __forceinline__ int best_parts(const Gemm& gemm, int padded) {
  const int tiles =
      ceil_div(padded, kGroup) * gemm.slice_count * ceil_div(gemm.token_count, kTileRows);
  int least = 0, best = 0;
  for (int parts = 1; parts <= min(gemm.most_parts, gemm.in_groups); ++parts) {
    const int depth = ceil_div(gemm.in_groups, parts) * 9 + 24 + (parts > 1 ? 13 * (1 + parts) : 0);
    const int clocks = ceil_div(tiles * parts, 132) * depth;
    if (best == 0 || clocks < least) {
      least = clocks;
      best = parts;
    }
  }
  return best;
}

// The dense slots of a launch.
struct Dense {
  int count, most_padded;
  int slots[DW_MAX_TOKENS / kDenseTokens];
  int padded[DW_MAX_TOKENS / kDenseTokens * DW_MAX_SLICES];  // ranks, [slots, slices]

  // All threads of a block call it.
  __device__ __forceinline__ void find(const Gemm& gemm) {
    const int chunks = dense_chunks(gemm);
    if (threadIdx.x == 0) {
      count = chunks > 0 ? dense_chunk(gemm, chunks - 1).w + 1 : 0;
      most_padded = 0;
    }
    for (int index = threadIdx.x; index < chunks; index += kThreads) {
      const int4 chunk = dense_chunk(gemm, index);
      slots[chunk.w] = chunk.x;
    }
    __syncthreads();
    for (int pair = threadIdx.x; pair < count * gemm.slice_count; pair += kThreads) {
      const int projection = gemm.slices[pair % gemm.slice_count].projection;
      padded[pair] =
          padded_ranks(gemm, directory_row(gemm, projection, slots[pair / gemm.slice_count]));
      atomicMax(&most_padded, padded[pair]);
    }
    __syncthreads();
  }
};

// How stage 1 is cut, and that no part of a tile is ready; one block of threads calls it.
__device__ void write_cuts(const Gemm& gemm, const Dense& dense) {
  __shared__ int most_parts;
  if (threadIdx.x == 0) most_parts = 0;
  __syncthreads();
  for (int pair = threadIdx.x; pair < dense.count * gemm.slice_count; pair += kThreads) {
    const int parts = best_parts(gemm, dense.padded[pair]);
    gemm.cuts[2 + pair] = parts;
    atomicMax(&most_parts, parts);
  }
  const int tiles = dense_chunks(gemm) * gemm.slice_count * ceil_div(dense.most_padded, kGroup);
  for (int tile = threadIdx.x; tile < tiles; tile += kThreads) gemm.counters[tile] = 0;
  __syncthreads();
  if (threadIdx.x > 0) return;
  gemm.cuts[0] = dense.most_padded;
  gemm.cuts[1] = most_parts;
}

template <typename T>
__global__ void __launch_bounds__(kThreads)
    x_kernel(const __grid_constant__ Gemm gemm, const Input<T> input) {
  after_previous();
  let_next_begin();
  if (blockIdx.x == 0) {
    __shared__ Dense dense;
    dense.find(gemm);
    write_cuts(gemm, dense);
    return;
  }
  // All that the plan says is asked for before any of it is looked at.
  const int order = static_cast<int>(blockIdx.x) - 1, placed = gemm.plan[kPlanPlaced];
  const int row = gemm.plan[plan_rows(gemm.token_count) + order], token = token_at(gemm, order);
  if (dense_chunks(gemm) > 0 && order < placed && row >= 0) {
    write_x(gemm, input, order, token, row);
  }
}

}  // namespace

cudaError_t launch_x_image(const dw_gemm& args, const Gemm& gemm, cudaStream_t stream) {
  const auto launch = [&](auto kernel, auto* x) {
    return launch_dependent(kernel, dim3(1 + args.token_count), kThreads, 0, stream, gemm,
                            {x, args.x_stride, args.in_features, args.in_offset});
  };
  if (args.dtype == DW_BFLOAT16) {
    return launch(x_kernel<__nv_bfloat16>, static_cast<const __nv_bfloat16*>(args.x));
  }
  return launch(x_kernel<__half>, static_cast<const __half*>(args.x));
}

}  // namespace prefill
}  // namespace dw

// SPDX-License-Identifier: Apache-2.0
// The operands of the prefill products as images (prefill.cuh), in two kernels.
//
//   operands   x  fp16 or bf16 [tokens, in_features] -> fp16 image [token tiles, 128 * in_groups];
//                 image_scale float [tokens in plan order] undoes the power of two of bf16 rows,
//                 times the token's weight
//              V^, U^ packed -> fp16 images, of every dense slot and slice
//   h_image    h  float [parts, slices, tokens in plan order, ranks] -> the sum of its parts (of
//              LORA times the expert's weight), fp16
//                 image [token tiles, ranks] a slice, times a power of two a token that brings the
//                 largest to 2^7; h_scale float [slices, tokens] undoes it and x's
//
// Roofline: bytes. Of a Llama-2-7B a tenant's 0.87 GB are read and 6.4 GB written, 1.7 ms at 4.3
// TB/s; a call's 16 to 90 MB stay in L2 for the product that follows at once. Operands' work items,
// in turn over a persistent grid: a row of x, a block of threads; or for eight warps each 16 ranks
// of four groups of a factor.
#include <cuda_bf16.h>

#include "batch.cuh"
#include "prefill_unpack.cuh"

namespace dw {
namespace prefill {
namespace {

constexpr int kResident = 2;  // blocks of threads a multiprocessor, of operands
constexpr int kRunGroups = 4;

__device__ float block_max(float value) {
  __shared__ float partial[kWarps];
#pragma unroll
  for (int step = 16; step > 0; step /= 2) {
    value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, step));
  }
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
  __syncthreads();
  for (int w = 0; w < kWarps; ++w) value = fmaxf(value, partial[w]);
  __syncthreads();
  return value;
}

__device__ __forceinline__ uint4 to_halves(const float (&v)[8], float scale) {
  return make_uint4(bits_of(__floats2half2_rn(v[0] * scale, v[1] * scale)),
                    bits_of(__floats2half2_rn(v[2] * scale, v[3] * scale)),
                    bits_of(__floats2half2_rn(v[4] * scale, v[5] * scale)),
                    bits_of(__floats2half2_rn(v[6] * scale, v[7] * scale)));
}

// ---- x ----------------------------------------------------------------------------------------

template <typename T>
struct Input {
  const T* x;
  int64_t stride;
  int features, offset;
};

template <typename T>
__device__ void write_x(const Gemm& gemm, const Input<T>& input, int order) {
  const int row = gemm.plan[plan_rows(gemm.token_count) + order];
  if (row < 0) return;
  const int token = token_at(gemm, order), octets = kGroup / 8 * gemm.in_groups;
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
    scale = normalizer<13>(block_max(largest));
  }
  if (threadIdx.x == 0) gemm.image_scale[order] = weight_of(gemm, token) / scale;
  for (int octet = threadIdx.x; octet < octets; octet += kThreads) {
    float values[8];
    load_octet(from, 8 * octet - input.offset, input.features, values);
    *octet_at(gemm.x_image, input_tiles(gemm), row, octet) = to_halves(values, scale);
  }
}

// ---- Factors ----------------------------------------------------------------------------------

// A warp's item: one unit of ranks of V^ or U^, in a run of groups.
struct Run {
  int dense, slice, unit, first, last;
  bool is_u;
};

// Runs of groups in all slices of a slot.
__device__ __forceinline__ int runs_a_slot(const Gemm& gemm) {
  int runs = 0;
  for (int s = 0; s < gemm.slice_count; ++s) {
    runs += ceil_div(gemm.in_groups, kRunGroups) + ceil_div(gemm.slices[s].groups, kRunGroups);
  }
  return runs;
}

__device__ __forceinline__ Run run_at(const Gemm& gemm, int index, int units, int slot_runs) {
  Run run = {};
  run.unit = index % units;
  int place = index / units % slot_runs;
  run.dense = index / units / slot_runs;
  int groups = gemm.in_groups;
  while (place >= ceil_div(groups, kRunGroups)) {
    place -= ceil_div(groups, kRunGroups);
    if (run.is_u) ++run.slice;
    run.is_u = !run.is_u;
    groups = run.is_u ? gemm.slices[run.slice].groups : gemm.in_groups;
  }
  run.first = place * kRunGroups;
  run.last = min(run.first + kRunGroups, groups);
  return run;
}

__device__ void unpack_run(const Gemm& gemm, const Run& run, int slot) {
  const int64_t* row = directory_row(gemm, gemm.slices[run.slice].projection, slot);
  Factor factor = {};
  factor.image =
      run.is_u ? u_image(gemm, run.slice, run.dense) : v_image(gemm, run.slice, run.dense);
  factor.depth_tiles = run.is_u ? gemm.rank_tiles : input_tiles(gemm);
  const Shapes shapes = load_shapes(row);
  int unit = run.unit;
#pragma unroll
  for (int b = 0; b < DW_MAX_BANDS; ++b) {
    factor.rank = band_rank(shapes.of[b]);
    const int units = padded_rank(factor.rank) / kUnit;
    if (unit < units) {
      const int64_t* fields = row + DW_FIELD_BANDS + b * DW_BAND_FIELDS;
      factor.from = gemm.arena + fields[run.is_u ? DW_BAND_U : DW_BAND_V];
      factor.levels = reinterpret_cast<const __half*>(gemm.arena + fields[DW_BAND_LEVELS]);
      const bool codebook = band_grid(shapes.of[b]) == DW_GRID_CODEBOOK;
      dispatch(band_bits(shapes.of[b]), codebook, [&]<int kBits, bool kLevels>() {
        if (run.is_u) {
          unpack_u<kBits, kLevels>(factor, unit, run.first, run.last);
        } else {
          unpack_v<kBits, kLevels>(factor, unit, gemm.in_groups, run.first, run.last);
        }
      });
      return;
    }
    unit -= units;
    factor.first_row += padded_rank(factor.rank);
  }
  if (!run.is_u) return;
  for (int group = run.first; group < run.last; ++group) clear_u(factor, run.unit, group);
}

// ---- Kernels ----------------------------------------------------------------------------------

// Into how many parts stage 1 cuts in_features for a record: what ends first on a GPU of 132
// multiprocessors if all of the launch's tokens were its own. In clocks: what a k tile of a work
// item takes, what an item costs beside, and 8 bytes a part for each sum. By sizes and the record's
// own ranks alone: no neighbour changes the order of a sum.
__device__ __forceinline__ int best_parts(const Gemm& gemm, int padded) {
  const int depth = input_tiles(gemm);
  const int tiles =
      ceil_div(padded, gemm.columns) * gemm.slice_count * ceil_div(gemm.token_count, kTileRows);
  const float sums = static_cast<float>(padded) * gemm.slice_count * gemm.token_count;
  float least = 0.f;
  int best = 0;
  for (int parts = 1; parts <= min(gemm.most_parts, depth); ++parts) {
    const int item = ceil_div(depth, parts) * (11 * gemm.columns / 2) + 16 * gemm.columns;
    const float clocks =
        static_cast<float>(ceil_div(tiles * parts, 132)) * item + parts * sums / 200;
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

// How stage 1 is cut; one block of threads calls it.
__device__ void write_cuts(const Gemm& gemm, const Dense& dense) {
  __shared__ int most_parts;
  if (threadIdx.x == 0) most_parts = 0;
  __syncthreads();
  for (int pair = threadIdx.x; pair < dense.count * gemm.slice_count; pair += kThreads) {
    const int parts = best_parts(gemm, dense.padded[pair]);
    gemm.cuts[2 + pair] = parts;
    atomicMax(&most_parts, parts);
  }
  __syncthreads();
  if (threadIdx.x > 0) return;
  gemm.cuts[0] = dense.most_padded;
  gemm.cuts[1] = most_parts;
}

template <typename T>
__global__ void __launch_bounds__(kThreads, kResident)
    operands_kernel(const __grid_constant__ Gemm gemm, const Input<T> input) {
  __shared__ Dense dense;
  dense.find(gemm);
  const int rows = dense.count > 0 ? gemm.plan[kPlanPlaced] : 0;
  const int units = rank_tiles(dense.most_padded) * kTileDepth / kUnit;
  const int slot_runs = runs_a_slot(gemm), runs = dense.count * slot_runs * units;
  after_previous();
  let_next_begin();
  if (blockIdx.x == gridDim.x - 1) write_cuts(gemm, dense);
  for (int item = blockIdx.x; item < rows + ceil_div(runs, kWarps); item += gridDim.x) {
    const int index = (item - rows) * kWarps + static_cast<int>(threadIdx.x) / 32;
    if (item < rows) {
      write_x(gemm, input, item);
    } else if (index < runs) {
      const Run run = run_at(gemm, index, units, slot_runs);
      const int padded = dense.padded[run.dense * gemm.slice_count + run.slice];
      if (run.unit * kUnit < rank_tiles(padded) * kTileDepth) {
        unpack_run(gemm, run, dense.slots[run.dense]);
      }
    }
  }
}

// The band that a rank lies in, padded ranks counted.
__device__ __forceinline__ int band_at(const Shapes& shapes, int rank) {
  int band = 0, end = 0;
#pragma unroll
  for (int b = 0; b < DW_MAX_BANDS; ++b) {
    end += padded_rank(band_rank(shapes.of[b]));
    if (rank >= end) band = b + 1;
  }
  return band;
}

__global__ void __launch_bounds__(kThreads, 5) h_kernel(const __grid_constant__ Gemm gemm) {
  constexpr int kKept = ceil_div((DW_MAX_RANK + 16 * DW_MAX_BANDS) / 4, kThreads);
  const int order = blockIdx.x, slice = blockIdx.y;
  after_previous();
  let_next_begin();
  if (dense_chunks(gemm) == 0 || order >= gemm.plan[kPlanPlaced]) return;
  const int image_row = gemm.plan[plan_rows(gemm.token_count) + order];
  if (image_row < 0) return;
  const int4 chunk = dense_chunk(gemm, image_row / kTileRows);
  const int64_t* row = directory_row(gemm, gemm.slices[slice].projection, chunk.x);
  const int padded = padded_ranks(gemm, row);
  const int parts = parts_of(gemm, slice, chunk.w);
  float4 kept[kKept] = {};
  float largest = 0.f;
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    const int quad = threadIdx.x + i * kThreads;
    if (4 * quad >= padded) break;
    kept[i] = h_quad(gemm, slice, order, quad, parts);
    if (gemm.record == DW_LORA) {
      const int expert = band_at(load_shapes(row), 4 * quad);
      const float weight = expert_weight(gemm, token_at(gemm, order), expert);
      kept[i] = make_float4(kept[i].x * weight, kept[i].y * weight, kept[i].z * weight,
                            kept[i].w * weight);
    }
    largest = fmaxf(largest, largest_of(kept[i]));
  }
  const float scale = normalizer<7>(block_max(largest));
  const int64_t place = static_cast<int64_t>(slice) * gemm.token_count + order;
  if (threadIdx.x == 0) gemm.h_scale[place] = gemm.image_scale[order] / scale;
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
    const int quad = threadIdx.x + i * kThreads;
    if (4 * quad >= rank_tiles(padded) * kTileDepth) break;  // zeros behind the last rank
    uint4* octet = octet_at(h_image(gemm, slice), gemm.rank_tiles, image_row, quad / 2);
    const float4 v = kept[i];
    reinterpret_cast<uint2*>(octet)[quad % 2] =
        make_uint2(bits_of(__floats2half2_rn(v.x * scale, v.y * scale)),
                   bits_of(__floats2half2_rn(v.z * scale, v.w * scale)));
  }
}

}  // namespace

cudaError_t launch_operands(const dw_gemm& args, const Gemm& gemm, cudaStream_t stream) {
  const auto launch = [&](auto kernel, auto* x) {
    return launch_dependent(kernel, dim3(kResident * multiprocessors()), kThreads, 0, stream, gemm,
                            {x, args.x_stride, args.in_features, args.in_offset});
  };
  if (args.dtype == DW_BFLOAT16) {
    return launch(operands_kernel<__nv_bfloat16>, static_cast<const __nv_bfloat16*>(args.x));
  }
  return launch(operands_kernel<__half>, static_cast<const __half*>(args.x));
}

cudaError_t launch_h_image(const Gemm& gemm, cudaStream_t stream) {
  return launch_dependent(h_kernel, dim3(gemm.token_count, gemm.slice_count), kThreads, 0, stream,
                          gemm);
}

}  // namespace prefill
}  // namespace dw

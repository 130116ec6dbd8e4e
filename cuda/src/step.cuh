// SPDX-License-Identifier: Apache-2.0
// What the kernels of a step find in the plan, the directory and the workspace.
#ifndef DELTAWEAVE_SRC_STEP_CUH_
#define DELTAWEAVE_SRC_STEP_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

#include "kernels.h"
#include "layout.h"
#include "ring.cuh"

namespace dw {

// Chunks of few-token slots of a plan that was made for this launch; none of another.
__device__ __forceinline__ int chunk_count(const Gemm& gemm) {
  return gemm.plan[kPlanChunkTokens] == gemm.chunk_tokens ? gemm.plan[kPlanFew] : 0;
}

// (slot, first token in plan order, count, place among the dense slots) of a chunk.
__device__ __forceinline__ int4 chunk_of(const Gemm& gemm, int chunk) {
  return reinterpret_cast<const int4*>(gemm.plan + plan_chunks(gemm.token_count))[chunk];
}

// The row of x and y of the token at a place of the plan's order.
__device__ __forceinline__ int token_at(const Gemm& gemm, int order) {
  return gemm.plan[plan_order(gemm.token_count) + order];
}

// What a token's delta is multiplied with.
__device__ __forceinline__ float weight_of(const Gemm& gemm, int64_t token) {
  if (gemm.token_weights == nullptr || gemm.record == DW_LORA) return 1.f;
  return __ldcg(gemm.token_weights + token * gemm.token_weights_stride);
}

// What a token's term of an expert is multiplied with; the experts are the record's bands.
__device__ __forceinline__ float expert_weight(const Gemm& gemm, int64_t token, int expert) {
  return __ldcg(gemm.token_weights + token * gemm.token_weights_stride + expert);
}

__device__ __forceinline__ const int64_t* directory_row(const Gemm& gemm, int projection,
                                                        int slot) {
  const int64_t row = static_cast<int64_t>(projection) * gemm.slot_count + slot;
  return gemm.directory + row * DW_DIRECTORY_FIELDS;
}

// The directory's row of a (chunk, slice).
__device__ __forceinline__ const int64_t* row_of(const Gemm& gemm, int pair) {
  const int slot = chunk_of(gemm, pair / gemm.slice_count).x;
  return directory_row(gemm, gemm.slices[pair % gemm.slice_count].projection, slot);
}

// The bands' fields lie in other lines than the row's kind, which is looked at first.
__device__ __forceinline__ void ask_for_bands(const int64_t* row) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(row + DW_FIELD_BANDS));
}
__device__ __forceinline__ int64_t band_shape(const int64_t* row, int band) {
  return row[DW_FIELD_BANDS + band * DW_BAND_FIELDS + DW_BAND_SHAPE];
}

// Whether the call adds a record's terms.
__device__ __forceinline__ bool is_served(const Gemm& gemm, const int64_t* row) {
  return row[DW_FIELD_KIND] == gemm.record + 1;
}

// Whether the second cache shall evict a record's codes first. With fewer tokens it was slower,
// with more, which read a tenant's codes more than four times, it was not measured (cuda/NOTES.md,
// section 20).
__device__ __forceinline__ bool evicts_codes_first(const Gemm& gemm) {
  return gemm.token_count >= 4 && gemm.token_count <= 32;
}

// h of a tile, slice and token.
__device__ __forceinline__ float* h_row(const Gemm& gemm, int tile, int slice, int order) {
  const int64_t rows = static_cast<int64_t>(tile * gemm.slice_count + slice) * gemm.token_count;
  return gemm.h + (rows + order) * gemm.ranks;
}

// Four ranks of h, the sum of the tiles of in_features, of which kAtATime are asked for together.
template <int kAtATime = 4>
__device__ __forceinline__ float4 h_quad(const Gemm& gemm, int slice, int order, int quad,
                                         int tiles) {
  const int64_t stride = static_cast<int64_t>(gemm.slice_count) * gemm.token_count * gemm.ranks;
  const float* from = h_row(gemm, 0, slice, order) + 4 * quad;
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
  for (int first = 0; first < tiles; first += kAtATime) {
    float4 part[kAtATime];
#pragma unroll
    for (int i = 0; i < kAtATime; ++i) {
      part[i] = make_float4(0.f, 0.f, 0.f, 0.f);
      if (first + i < tiles) {
        part[i] = __ldcg(reinterpret_cast<const float4*>(from + (first + i) * stride));
      }
    }
#pragma unroll
    for (int i = 0; i < kAtATime; ++i) {
      sum.x += part[i].x;
      sum.y += part[i].y;
      sum.z += part[i].z;
      sum.w += part[i].w;
    }
  }
  return sum;
}
__device__ __forceinline__ float largest_of(float4 v) {
  return fmaxf(fmaxf(fabsf(v.x), fabsf(v.y)), fmaxf(fabsf(v.z), fabsf(v.w)));
}
// The same as bits, of which those of what is not finite are the largest.
__device__ __forceinline__ uint32_t largest_bits(float4 v) {
  const auto magnitude = [](float value) { return __float_as_uint(value) & 0x7fffffffu; };
  return max(max(magnitude(v.x), magnitude(v.y)), max(magnitude(v.z), magnitude(v.w)));
}

// Consecutive pieces of a launch's work.
struct Interval {
  int first, last;
};

// A block of threads' own of `count` pieces: all have as many, or one more.
__device__ __forceinline__ Interval own_pieces(int count) {
  const int blocks = gridDim.x, own = blockIdx.x, each = count / blocks,
            more = count - each * blocks;
  const int first = own * each + min(own, more);
  return {first, first + each + (own < more)};
}

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

// Four neighbouring outputs of a token, those within [0, features); reads them when constructed.
template <typename T>
struct Outputs {
  T* row;
  int n, features;
  uint2 raw = {};

  __device__ __forceinline__ Outputs(T* row, int n, int features)
      : row(row), n(n), features(features) {
    if (whole()) raw = __ldcg(reinterpret_cast<const uint2*>(row + n));
  }

  __device__ __forceinline__ bool whole() const {
    return n >= 0 && n + 4 <= features && reinterpret_cast<uintptr_t>(row + n) % 8 == 0;
  }

  __device__ __forceinline__ void add_all(const float (&delta)[4]) {
    if (whole()) {
      T* values = reinterpret_cast<T*>(&raw);
#pragma unroll
      for (int i = 0; i < 4; ++i) values[i] = add(values[i], delta[i]);
      *reinterpret_cast<uint2*>(row + n) = raw;
      return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (n + i >= 0 && n + i < features) row[n + i] = add(row[n + i], delta[i]);
    }
  }
};

// A call that computes the base's product too has three kernels that run at the same time:
//
//   base      asks for weights, waits for the kernels before it, and only then lets the next begin
//   stage 1   finds x there when it begins
//   stage 2   waits for all of stage 1 before it reads h, for all of the base before it reads y
//
// Each begins when all blocks of threads of the one before it run. None waits for one to end: they
// count blocks that are done. So nobody waits for what cannot begin.
enum Part { kBasePart, kShrinkPart, kExpandPart };

__device__ __forceinline__ int* done_of(const Gemm& gemm, Part part) {
  return gemm.plan + kPlanDone + part;
}

// A block of threads has written all that others wait for.
__device__ __forceinline__ void end_part(const Gemm& gemm, Part part) {
  __syncthreads();
  if (threadIdx.x > 0) return;
  __threadfence();
  atomicAdd(done_of(gemm, part), 1);
}

// One thread's; what the part has written can be read by those that this thread meets behind it.
__device__ __forceinline__ void wait_for_part(const Gemm& gemm, Part part, int blocks) {
  int done;
  do {
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];"
                 : "=r"(done)
                 : "l"(done_of(gemm, part))
                 : "memory");
  } while (done < blocks);
}

// Stage 2 is done: the last block of threads leaves the counts as they were. The kernels behind it
// wait for it alone, so it waits for the others; and it lets none begin before, which would find
// this call's counts.
__device__ __forceinline__ void end_call(const Gemm& gemm) {
  __syncthreads();
  if (threadIdx.x > 0) return;
  wait_for_part(gemm, kBasePart, gemm.base_blocks);
  wait_for_part(gemm, kShrinkPart, gemm.shrink_blocks);
  if (atomicAdd(done_of(gemm, kExpandPart), 1) + 1 < static_cast<int>(gridDim.x)) return;
  for (int part = 0; part < kPlanParts; ++part) *done_of(gemm, static_cast<Part>(part)) = 0;
}

// Launches a kernel that may begin before its predecessor has ended (ring.cuh, after_previous).
template <typename... Parameters>
cudaError_t launch_dependent(void (*kernel)(Parameters...), dim3 grid, int threads,
                             int shared_bytes, cudaStream_t stream,
                             const std::type_identity_t<Parameters>&... arguments) {
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = compute_major() >= 9 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace dw

#endif  // DELTAWEAVE_SRC_STEP_CUH_

// SPDX-License-Identifier: Apache-2.0
// What every token gives the k experts of its fusion:
//
//   weights[t] = softmax(W x[t] / temperature) + b      or b, of a fusion with fixed weights
//
//   x  fp16 or bf16 [tokens, features]   W  float [k, features]   weights  float [tokens, 8], zeros
//   behind k and for tokens without a fusion
//
// Roofline: bytes, W (32 KB at k = 2 of a Llama-2-7B) and a row of x a token; in practice the
// launch and two trips to memory. One block of threads a token, a thread eight neighbouring
// features at a time; sums meet in warp order, so a token's bits depend on nothing but its slot and
// x.
#include "batch.cuh"
#include "batch_args.h"
#include "kernels.h"
#include "layout.h"
#include "ring.cuh"
#include "status.h"
#include "step.cuh"

namespace dw {
namespace {

constexpr int kBlock = 512;  // threads
constexpr int kBlockWarps = kBlock / 32;

// Eight neighbouring elements of a row of W; zeros behind its end.
__device__ __forceinline__ void load_weights(const float* row, int first, int features,
                                             float (&values)[8]) {
  if (first + 8 <= features && reinterpret_cast<uintptr_t>(row + first) % 16 == 0) {
    const float4 low = __ldg(reinterpret_cast<const float4*>(row + first));
    const float4 high = __ldg(reinterpret_cast<const float4*>(row + first + 4));
    const float all[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) values[i] = all[i];
    return;
  }
#pragma unroll
  for (int i = 0; i < 8; ++i) values[i] = first + i < features ? __ldg(row + first + i) : 0.f;
}

// This thread's part of W x.
template <typename T>
__device__ __forceinline__ void add_products(const dw_gate& args, const float* w, int experts,
                                             float (&sums)[DW_MAX_EXPERTS]) {
  const T* x = static_cast<const T*>(args.x) + blockIdx.x * args.x_stride;
  for (int first = 8 * threadIdx.x; first < args.features; first += 8 * kBlock) {
    float inputs[8], weights[DW_MAX_EXPERTS][8] = {};  // all are asked for before one is used
    load_octet(x, first, args.features, inputs);
#pragma unroll
    for (int e = 0; e < DW_MAX_EXPERTS; ++e) {
      const float* row = w + static_cast<int64_t>(e) * args.features;
      if (e < experts) load_weights(row, first, args.features, weights[e]);
    }
#pragma unroll
    for (int e = 0; e < DW_MAX_EXPERTS; ++e) {
#pragma unroll
      for (int i = 0; i < 8; ++i) sums[e] = fmaf(weights[e][i], inputs[i], sums[e]);
    }
  }
}

// The logits W x in shared memory, for all threads.
__device__ __forceinline__ void meet(const float (&sums)[DW_MAX_EXPERTS], int experts,
                                     float* logits) {
  __shared__ float partial[kBlockWarps][DW_MAX_EXPERTS];
#pragma unroll
  for (int e = 0; e < DW_MAX_EXPERTS; ++e) {
    float sum = sums[e];
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32][e] = sum;
  }
  __syncthreads();
  if (threadIdx.x < experts) {
    float logit = 0.f;
#pragma unroll
    for (int w = 0; w < kBlockWarps; ++w) logit += partial[w][threadIdx.x];
    logits[threadIdx.x] = logit;
  }
  __syncthreads();
}

__device__ __forceinline__ float softmax_at(const float* logits, int experts, float temperature,
                                            int expert) {
  float largest = logits[0], sum = 0.f;
  for (int e = 1; e < experts; ++e) largest = fmaxf(largest, logits[e]);
  for (int e = 0; e < experts; ++e) sum += expf((logits[e] - largest) / temperature);
  return expf((logits[expert] - largest) / temperature) / sum;
}

// Grid: tokens.
template <typename T>
__global__ void __launch_bounds__(kBlock) gate_kernel(const __grid_constant__ dw_gate args) {
  __shared__ float logits[DW_MAX_EXPERTS];
  after_previous();
  let_next_begin();
  const int64_t* row = find_row(args.batch, args.parameter, blockIdx.x);
  const bool mixed = row != nullptr && row[DW_FIELD_KIND] == DW_MIX + 1;
  const int experts = mixed ? static_cast<int>(row[DW_FIELD_ROWS]) : 0;
  const unsigned char* arena = find_arena(args.batch);
  const bool gated = mixed && row[DW_FIELD_VALUES] != 0;
  const int expert = threadIdx.x;
  float weight = 0.f, temperature = 1.f;
  if (expert < experts) {
    const float* numbers = reinterpret_cast<const float*>(arena + row[DW_FIELD_HEADER]);
    weight = __ldg(numbers + expert);
    temperature = __ldg(numbers + DW_MAX_EXPERTS);
  }
  if (gated) {
    float sums[DW_MAX_EXPERTS] = {};
    add_products<T>(args, reinterpret_cast<const float*>(arena + row[DW_FIELD_VALUES]), experts,
                    sums);
    meet(sums, experts, logits);
  }
  if (expert >= DW_MAX_EXPERTS) return;
  if (gated && expert < experts) weight += softmax_at(logits, experts, temperature, expert);
  args.weights[blockIdx.x * args.weights_stride + expert] = weight;
}

template <typename T>
cudaError_t launch(const dw_gate& args, cudaStream_t stream) {
  return launch_dependent(gate_kernel<T>, dim3(args.batch.token_count), kBlock, 0, stream, args);
}

}  // namespace
}  // namespace dw

dw_status dw_gate_weights(const dw_gate* args, void* stream_pointer) {
  if (args == nullptr) return dw::fail(DW_ERROR_ARGUMENT, "null argument");
  DW_RETURN_IF_ERROR(dw::check_gate(*args));
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_pointer);
  return dw::check_launch(args->batch.dtype == DW_BFLOAT16
                              ? dw::launch<__nv_bfloat16>(*args, stream)
                              : dw::launch<__half>(*args, stream),
                          "dw_gate_weights");
}

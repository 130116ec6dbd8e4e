// SPDX-License-Identifier: Apache-2.0
// The base's product of few tokens:  y[s, t, n] = sum_k W_s[n, k] x[t, k]
//
//   x  fp16 or bf16 [tokens, in]   W  the same [out, in], a row's octets aligned   y  the same
//
// Roofline: bytes. W is read once; for up to 8 tokens its products are nothing beside that.
//
// It is here, and not a library's, because stage 1 runs at the same time: the one is a steady
// stream from memory, the other short reads that wait for each other, and instructions. So this
// kernel takes one block of threads a multiprocessor and leaves registers and shared memory for one
// of stage 1 (shrink.cu), which begins as soon as x is there.
//
// A tile of 32 outputs (two of the tensor core's 16-row operands; tokens are its 8 columns) is read
// by all warps of a block of threads, each in turn 32 features of it: of a sum's terms any order
// will do, so a lane's 16 bytes are eight features of one row, and x is read alike. A warp has some
// such batches under way, the next tile's too, and W's first ones before the kernel in front has
// ended. The warps' sums meet in shared memory. A token's bits depend on x, W and the number of
// multiprocessors, which says with which features a tile begins.
#include <algorithm>

#include "batch.cuh"
#include "fragment.cuh"
#include "kernels.h"
#include "step.cuh"

namespace dw {
namespace {

constexpr int kRows = 16;        // of an operand; blocks of threads share these out
constexpr int kOperands = 2;     // of a tile
constexpr int kFeatures = 32;    // of a batch
constexpr int kTokenPitch = 36;  // of a tile's sums: lanes that write them hit different banks

// What a lane asks for comes into shared memory of its own: nobody else waits for it, and the first
// cache, which is small beside stage 1's shared memory, holds nothing of it.
constexpr int kOctets = 2 * kOperands + 1;  // of a lane and batch: rows q, q + 8, ..., and a token
using Batch = uint4[kOctets][32];

// kAhead: batches of a warp that are under way.
template <int kAhead>
struct Shared {
  Batch ahead[kWarps][kAhead];
  float sums[2][kWarps][kDecodeTokens][kTokenPitch];  // of this tile and of the last
};
constexpr int kMostAhead = 4;
static_assert(sizeof(Shared<kMostAhead>) <= 99 << 10,
              "what a block of threads may have on sm_89 and sm_120");

__device__ __forceinline__ void ask(uint4& to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(&to)), "l"(from)
               : "memory");
}
// W is read once, so the second cache shall evict it first. Four lanes ask for 64 bytes of a row,
// and the next warp for those behind: the cache is to ask memory for both at once.
__device__ __forceinline__ uint64_t evict_first_policy() {
  uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ void ask_for_weights(uint4& to, const void* from, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2;" ::"r"(
                   shared_address(&to)),
               "l"(from), "l"(policy)
               : "memory");
}
// What was asked for since the last call is a group; those up to `kLeft` groups ago have come.
__device__ __forceinline__ void end_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kLeft>
__device__ __forceinline__ void wait_for_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

template <typename T, int kAhead>
struct Product {
  const Gemm& gemm;
  Shared<kAhead>& shared;
  const Interval operands;
  const int lane, warp, turns;  // turns: batches of a warp and tile
  const unsigned char* x;       // of the lane's token
  const uint64_t policy = evict_first_policy();
  // Of what is asked for next: the tile's first operand, the first of kAhead turns, ...
  int operand, turn = 0;
  const unsigned char* row;  // q
  int rows;                  // of the lane's, how many are there
  int step;                  // bytes to row q + 8

  __device__ __forceinline__ Product(const Gemm& gemm, Shared<kAhead>& shared, Interval operands)
      : gemm(gemm),
        shared(shared),
        operands(operands),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32),
        turns(ceil_div(ceil_div(gemm.in_features, kFeatures * kWarps), kAhead) * kAhead),
        x(static_cast<const unsigned char*>(gemm.base_x) + 2 * (lane / 4) * gemm.base_x_stride),
        operand(operands.first) {
    point_at_rows();
  }

  // The slice of an operand, whose number becomes that within the slice.
  __device__ __forceinline__ const Slice& slice_of(int& operand) const {
    int s = 0;
    for (int all; operand >= (all = ceil_div(gemm.slices[s].out_features, kRows)); ++s) {
      operand -= all;
    }
    return gemm.slices[s];
  }

  // How many of a tile's operands there are from its first: of one slice, and of this block's.
  __device__ __forceinline__ int operands_at(int operand) const {
    int own = operand;
    const Slice& slice = slice_of(own);
    return min(min(kOperands, operands.last - operand), ceil_div(slice.out_features, kRows) - own);
  }

  __device__ __forceinline__ void point_at_rows() {
    int own = operand;
    const Slice& slice = slice_of(own);
    const int first = own * kRows + lane / 4;
    const int last = min(slice.out_features, (own + operands_at(operand)) * kRows);
    rows = ceil_div(max(last - first, 0), 8);
    step = static_cast<int>(16 * slice.base_stride);
    row = static_cast<const unsigned char*>(slice.base) + 2 * first * slice.base_stride;
  }

  __device__ __forceinline__ void advance() {
    if ((turn += kAhead) < turns) return;
    turn = 0;
    operand += operands_at(operand);
    rows = 0;
    if (operand < operands.last) point_at_rows();
  }

  // The feature of a batch of those that are asked for. Blocks of threads begin with different
  // ones: all would ask for the same few lines of x at a time.
  __device__ __forceinline__ int feature(int i) const {
    const int first = turn + blockIdx.x * kAhead % turns;
    return ((first < turns ? first : first - turns) + i) * kWarps * kFeatures + warp * kFeatures +
           kOctet * (lane % 4);
  }

  __device__ __forceinline__ void ask_rows(int i) const {
    // Behind the last feature x is zero, and what a row that is not there gives is not kept.
    const unsigned char* from = row + 2 * min(feature(i), gemm.in_features - kOctet);
#pragma unroll
    for (int r = 0; r < 2 * kOperands; ++r) {
      if (r < rows) ask_for_weights(shared.ahead[warp][i][r][lane], from + r * step, policy);
    }
  }

  __device__ __forceinline__ void ask_column(int i) const {
    if (lane / 4 >= gemm.token_count) return;  // what is summed up of such a column is not kept
    uint4& to = shared.ahead[warp][i][2 * kOperands][lane];
    if (feature(i) < gemm.in_features) {
      ask(to, x + 2 * feature(i));
    } else {
      to = make_uint4(0, 0, 0, 0);
    }
  }

  // Sums of rows q, q + 8 of every operand and tokens 2c, 2c + 1.
  __device__ __forceinline__ void add(float (&sums)[kOperands][4], int i) const {
    const Batch& batch = shared.ahead[warp][i];
    const uint4 column = batch[2 * kOperands][lane];
#pragma unroll
    for (int o = 0; o < kOperands; ++o) {
      const uint4 low = batch[2 * o][lane], high = batch[2 * o + 1][lane];
      multiply_as<T>(sums[o], {low.x, high.x, low.y, high.y}, column.x, column.y);
      multiply_as<T>(sums[o], {low.z, high.z, low.w, high.w}, column.z, column.w);
    }
  }

  // All warps': a thread an output and token adds the warps' sums in their order.
  __device__ __forceinline__ void finish(int operand, int count, const float (&sums)[kOperands][4],
                                         int place) const {
    auto& all = shared.sums[place];
    const int q = lane / 4, c = lane % 4;
#pragma unroll
    for (int o = 0; o < kOperands; ++o) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        all[warp][2 * c + i % 2][o * kRows + i / 2 * 8 + q] = sums[o][i];
      }
    }
    __syncthreads();
    if (warp >= gemm.token_count) return;
    const Slice& slice = slice_of(operand);
    const int n = operand * kRows + lane;
    if (n >= min(slice.out_features, (operand + count) * kRows)) return;
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += all[w][warp][lane];
    static_cast<T*>(slice.y)[warp * slice.y_stride + n] = rounded<T>(sum);
  }

  __device__ __forceinline__ void run() {
    int place = 0;
#pragma unroll 1
    for (int own = operands.first; own < operands.last;) {
      float sums[kOperands][4] = {};
#pragma unroll 1
      for (int done = 0; done < turns; done += kAhead) {
        advance();
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          wait_for_group<kAhead - 1>();
          add(sums, i);
          ask_rows(i);
          ask_column(i);
          end_group();
        }
      }
      const int count = operands_at(own);
      finish(own, count, sums, place);
      own += count;
      place ^= 1;
    }
  }
};

static_assert(kOperands * kRows == 32 && kWarps == kDecodeTokens, "finish() gives a thread a sum");

DW_HD int operand_count(const Gemm& gemm) {
  int all = 0;
  for (int s = 0; s < gemm.slice_count; ++s) all += ceil_div(gemm.slices[s].out_features, kRows);
  return all;
}

template <typename T, int kAhead>
__global__ void __launch_bounds__(kThreads, 2) base_kernel(const __grid_constant__ Gemm gemm) {
  extern __shared__ __align__(128) unsigned char memory[];
  auto& shared = *reinterpret_cast<Shared<kAhead>*>(memory);
  Product<T, kAhead> product(gemm, shared, own_pieces(operand_count(gemm)));
#pragma unroll
  for (int i = 0; i < kAhead; ++i) product.ask_rows(i);
  after_previous();
  let_next_begin();  // stage 1 takes x as there
#pragma unroll
  for (int i = 0; i < kAhead; ++i) {
    product.ask_column(i);
    end_group();
  }
  product.run();
  end_part(gemm, kBasePart);
}

template <typename T, int kAhead>
cudaError_t launch(const Gemm& gemm, cudaStream_t stream) {
  const auto kernel = base_kernel<T, kAhead>;
  // Else the multiprocessor is divided so that stage 1 finds no shared memory.
  const cudaError_t error = cudaFuncSetAttribute(
      kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  if (error != cudaSuccess) return error;
  return launch_dependent(kernel, dim3(base_blocks(gemm)), kThreads, sizeof(Shared<kAhead>), stream,
                          gemm);
}

// What is under way makes stage 1's reads wait: a short stream ends before it if there is too much
// (measured with 132 multiprocessors).
template <typename T>
cudaError_t launch_typed(const Gemm& gemm, cudaStream_t stream) {
  const int operands = operand_count(gemm) / base_blocks(gemm);  // of a block of threads
  if (operands >= 8) return launch<T, kMostAhead>(gemm, stream);
  return operands >= 4 ? launch<T, 3>(gemm, stream) : launch<T, 2>(gemm, stream);
}

}  // namespace

int base_blocks(const Gemm& gemm) { return std::min(operand_count(gemm), multiprocessors()); }

cudaError_t launch_base(const Gemm& gemm, cudaStream_t stream) {
  return gemm.y_dtype == DW_BFLOAT16 ? launch_typed<__nv_bfloat16>(gemm, stream)
                                     : launch_typed<__half>(gemm, stream);
}

}  // namespace dw

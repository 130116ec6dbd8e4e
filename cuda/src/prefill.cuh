// SPDX-License-Identifier: Apache-2.0
// What the two products of the prefill path share: tiles of 128 tokens against weights unpacked and
// scaled to fp16 in registers, streamed through shared memory by a warp of their own.
//
// Two groups of four warps multiply, weights on the 16-row side: wgmma with weights in registers on
// sm_90a, mma.sync elsewhere; both leave the same sums in the same registers. Roofline: the tensor
// cores, 2 * rank * (in + out) flops a token; a weight is unpacked once for 128 tokens, 16
// instructions for four registers of weights against 64 clocks of wgmma.
//
// The operand from shared memory is an image, made beforehand (prefill_images.cu). Of one chunk of
// tokens, `rows` of them (a multiple of 8), it holds, for every 8 consecutive k, rows x 16 bytes,
// so that any stretch of k is one contiguous copy and each 8 x 8 corner of it lies in 128
// consecutive bytes. Within 16 k their order is that of the unpacked weights: 4c + r at 8 * (r / 2)
// + 2c + r % 2.
#ifndef DELTAWEAVE_SRC_PREFILL_CUH_
#define DELTAWEAVE_SRC_PREFILL_CUH_

#include <cuda_fp16.h>

#include <cstdint>

#include "fragment.cuh"
#include "ring.cuh"
#include "stages.cuh"
#include "step.cuh"

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define DW_WGMMA 1
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 900
#error "compute capability 9.0 needs the target 90a (wgmma)"
#endif

namespace dw {
namespace prefill {

constexpr int kTokens = kPrefillTokens;
constexpr int kConsumers = 8;                    // warps that multiply
constexpr int kThreads = 32 * (kConsumers + 4);  // of the other four one copies
constexpr int kColumns = kTokens / 8;            // products of 8 tokens

// ---- Products -------------------------------------------------------------------------------

// Sums of 16 rows of weights a warp and kTokens columns: [column][4], as mma.m16n8k16 has them.
using Sums = float[kColumns][4];

#if DW_WGMMA

// Where the operand lies: 8 k are `stride` bytes apart, 8 rows 128.
__device__ __forceinline__ uint64_t describe(const void* image, int stride) {
  return static_cast<uint64_t>(shared_address(image) >> 4 & 0x3fff) |
         static_cast<uint64_t>(stride >> 4) << 16 | static_cast<uint64_t>(128 >> 4) << 32;
}

#define DW_SUM4(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
__device__ __forceinline__ void multiply_async(Sums& d, const uint32_t (&a)[4], uint64_t operand) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 "
      "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
      "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,"
      "%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,"
      "%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63},"
      "{%64,%65,%66,%67}, %68, 1, 1, 1, 0;"
      : DW_SUM4(0), DW_SUM4(1), DW_SUM4(2), DW_SUM4(3), DW_SUM4(4), DW_SUM4(5), DW_SUM4(6),
        DW_SUM4(7), DW_SUM4(8), DW_SUM4(9), DW_SUM4(10), DW_SUM4(11), DW_SUM4(12), DW_SUM4(13),
        DW_SUM4(14), DW_SUM4(15)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(operand));
}
#undef DW_SUM4

// Registers of sums and weights may be used by wgmma from here on.
__device__ __forceinline__ void begin_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
// They have begun; what they use may not change before wait_products().
__device__ __forceinline__ void end_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
}
// Divides the registers: consumers need more than an equal share, the others hardly any.
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
}
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
}
template <int kCount>
__device__ __forceinline__ void keep_in_registers(uint32_t (&weights)[kCount][4]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
#pragma unroll
    for (int r = 0; r < 4; ++r) asm volatile("" : "+r"(weights[i][r])::"memory");
  }
}

// d += weights * image[k .. k + 15]; `image` points at the first of two stretches of 8 k.
__device__ __forceinline__ void multiply_tile(Sums& d, const uint32_t (&a)[4],
                                              const unsigned char* image, int stride, int) {
  multiply_async(d, a, describe(image, stride));
}

#else

__device__ __forceinline__ void begin_products() {}
__device__ __forceinline__ void end_products() {}
__device__ __forceinline__ void wait_products() {}
__device__ __forceinline__ void take_registers() {}
__device__ __forceinline__ void give_registers() {}
template <int kCount>
__device__ __forceinline__ void keep_in_registers(uint32_t (&)[kCount][4]) {}

__device__ __forceinline__ void multiply_tile(Sums& d, const uint32_t (&a)[4],
                                              const unsigned char* image, int stride, int rows) {
  const int lane = threadIdx.x % 32;
  // Lanes 0-7 and 8-15 give the rows of both halves of k, lanes 16-31 those of the next 8 tokens.
  const uint32_t from =
      shared_address(image) + lane / 8 % 2 * stride + (lane / 16 * 8 + lane % 8) * 16;
#pragma unroll
  for (int j = 0; j < kColumns; j += 2) {
    if (8 * j >= rows) break;
    uint32_t b[4];
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
                 : "r"(from + j * 128));
    multiply(d[j], a, b[0], b[1]);
    multiply(d[j + 1], a, b[2], b[3]);
  }
}

#endif

// ---- Weights --------------------------------------------------------------------------------

// Pair j of a lane's codes as weights: scale * (code - zero) in fp16, both codes with their own
// scale and `offset` = -scale * zero.
template <int kBits, bool kLevels>
__device__ __forceinline__ uint32_t weight(const uint32_t* words, int j, const __half* levels,
                                           __half2 scale, __half2 offset) {
  const __half2 code = pair_of(unpack<kBits, kLevels>(words, j, levels));
  if constexpr (kBits == 16) return bits_of(code);
  if constexpr (kLevels) return bits_of(__hmul2(code, scale));
  // The bias goes first: it is exact, and scale * bias is not.
  return bits_of(__hfma2(__hsub2(code, pair_of(bias_pair<kBits>(j))), scale, offset));
}

}  // namespace prefill
}  // namespace dw

#endif  // DELTAWEAVE_SRC_PREFILL_CUH_

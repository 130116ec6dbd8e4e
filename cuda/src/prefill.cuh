// SPDX-License-Identifier: Apache-2.0
// What the prefill path's kernels share. Slots with many tokens (layout.h, kDenseTokens) have their
// factors unpacked in registers, as the tensor core's row operand; tokens are its columns and come
// as 16-bit images:
//
//     prefill_images.cu   x -> image
//     prefill_gemm.cu     x image -> sigma * V^ x -> image h      y += U^ h
//
// An image holds rows (tokens) x k halves as tiles of 128 rows by 64 k, [row tile][k tile], each
// tile as the tensor core reads it in shared memory: a row is 128 bytes, its 16-byte units permuted
// by the row (unit u of row r lies at u ^ r % 8), so that one bulk copy brings tiles and no two of
// eight rows' units share a bank. A row tile is a chunk of the plan. k are in the order that the
// packed blocks have them in a lane (layout.h): of x eight features, of h four ranks, are spread
// over the pairs of k that a lane of the tensor core holds.
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

constexpr int kTileRows = kPrefillTokens;
constexpr int kTileDepth = 64;  // k of a tile
constexpr int kTileBytes = kTileRows * kTileDepth * 2;
static_assert(kTileBytes == kImageTileBytes, "as the workspace was cut");

// ---- Images -----------------------------------------------------------------------------------

// Where eight k, from 8 * `octet` of the image's row on, lie.
__device__ __forceinline__ unsigned char* octet_at(unsigned char* image, int depth_tiles, int row,
                                                   int octet) {
  const int tile = row / kTileRows * depth_tiles + octet / 8, within = row % kTileRows;
  return image + static_cast<int64_t>(tile) * kTileBytes + within * 128 +
         (octet % 8 ^ within % 8) * 16;
}

__device__ __forceinline__ int input_tiles(const Gemm& gemm) { return 2 * gemm.in_groups; }
// k tiles of a record's ranks.
DW_HD int rank_tiles(int padded_rank) { return ceil_div(padded_rank, kTileDepth); }

__device__ __forceinline__ unsigned char* h_image(const Gemm& gemm, int slice) {
  return gemm.h_image +
         static_cast<int64_t>(slice) * gemm.image_tiles * gemm.rank_tiles * kTileBytes;
}

// ---- Dense chunks -----------------------------------------------------------------------------

__device__ __forceinline__ int dense_chunks(const Gemm& gemm) {
  if (gemm.plan[kPlanChunkTokens] != kPrefillTokens) return 0;
  return gemm.plan[kPlanChunks] - gemm.plan[kPlanFew];
}
// (slot, first token in plan order, count, place among the dense slots) of the index-th.
__device__ __forceinline__ int4 dense_chunk(const Gemm& gemm, int index) {
  return chunk_of(gemm, gemm.plan[kPlanFew] + index);
}
__device__ __forceinline__ int padded_ranks(const Gemm& gemm, const int64_t* row) {
  return is_served(gemm, row) ? static_cast<int>(row[DW_FIELD_PADDED_RANK]) : 0;
}

// Into how many parts stage 1 cuts the in_features of a dense slot's slice.
__device__ __forceinline__ int parts_of(const Gemm& gemm, int slice, int dense) {
  return __ldcg(gemm.cuts + 2 + dense * gemm.slice_count + slice);
}

// ---- Scales -----------------------------------------------------------------------------------

// |h| of a record and token is at most this times the token's scales.x (prefill_images.cu): the
// largest |sigma * v| there may be (layout.h, header) times the sum of |x|.
__device__ __forceinline__ float h_bound(const Gemm& gemm, const int64_t* row) {
  return reinterpret_cast<const float*>(gemm.arena + row[DW_FIELD_HEADER])[2];
}
// The power of two that keeps h within fp16.
__device__ __forceinline__ float h_scale(float bound, float sum) {
  return normalizer<13>(bound * sum);
}

// Of a power of two.
__device__ __forceinline__ float inverse(float power) {
  return __uint_as_float(0x7f000000u - __float_as_uint(power));
}

// ---- Products ---------------------------------------------------------------------------------

// Sums of 16 weight rows a warp and 128 tokens: [8 tokens][4], as mma.m16n8k16 has them.
using Sums = float[kTileRows / 8][4];
// A warp's weights of 16 rows and the k of a tile, as mma.m16n8k16 has them.
using Fragments = uint32_t[kTileDepth / 16][4];

#if DW_WGMMA

// A tile's rows from `image` on: 8 rows are 1024 bytes apart, swizzled within 128 bytes.
__device__ __forceinline__ uint64_t describe(const unsigned char* image) {
  return static_cast<uint64_t>(shared_address(image) >> 4 & 0x3fff) | uint64_t{1} << 16 |
         uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

#define DW_SUM4(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define DW_SUM16(j) DW_SUM4(j), DW_SUM4(j + 1), DW_SUM4(j + 2), DW_SUM4(j + 3)

// d += (64 rows x 16 k) * (128 tokens x 16 k)^T, a warp group.
__device__ __forceinline__ void multiply_async(Sums& d, const uint32_t (&a)[4], uint64_t tokens) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {"
      "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"
      "%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,"
      "%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63},"
      "{%64,%65,%66,%67}, %68, 1, 1, 1, 0;"
      : DW_SUM16(0), DW_SUM16(4), DW_SUM16(8), DW_SUM16(12)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(tokens));
}
#undef DW_SUM16
#undef DW_SUM4

// Keeps weights where an asynchronous product reads them.
__device__ __forceinline__ void keep(Fragments& weights) {
#pragma unroll
  for (int i = 0; i < kTileDepth / 16; ++i) {
#pragma unroll
    for (int r = 0; r < 4; ++r) asm volatile("" : "+r"(weights[i][r])::"memory");
  }
}

// Begins the products of weights and tiles of tokens, `pitch` bytes apart. Neither may change
// before they have ended.
template <int kTiles>
__device__ __forceinline__ void begin_products(Sums (&d)[kTiles], Fragments& weights,
                                               const unsigned char* tokens, int pitch) {
  const uint64_t tile = describe(tokens);
  keep(weights);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int i = 0; i < kTileDepth / 16; ++i) {
      multiply_async(d[t], weights[i], tile + t * (pitch >> 4) + 2 * i);
    }
  }
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// All but the last kLeft products that were begun have ended.
template <int kLeft>
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}
// Divides the registers: consumers need more than an equal share, the others hardly any.
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
}
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
}

#else

__device__ __forceinline__ void keep(Fragments&) {}

template <int kTiles>
__device__ __forceinline__ void begin_products(Sums (&all)[kTiles], Fragments& weights,
                                               const unsigned char* tokens, int) {
  static_assert(kTiles == 1, "registers for one tile of tokens");
  Sums& d = all[0];
  const int lane = threadIdx.x % 32;
  const unsigned char* row = tokens + (lane / 16 * 8 + lane % 8) * 128;
#pragma unroll
  for (int i = 0; i < kTileDepth / 16; ++i) {
#pragma unroll
    for (int j = 0; j < kTileRows / 8; j += 2) {
      uint32_t b[4];  // lanes 8m .. 8m + 7 give the rows of matrix m: k halves, then tokens
      asm volatile(
          "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
          : "=r"(b[0]), "=r"(b[1]), "=r"(b[2]), "=r"(b[3])
          : "r"(shared_address(row + j * 8 * 128 + ((2 * i + lane / 8 % 2) ^ lane % 8) * 16)));
      multiply(d[j], weights[i], b[0], b[1]);
      multiply(d[j + 1], weights[i], b[2], b[3]);
    }
  }
}
template <int kLeft>
__device__ __forceinline__ void wait_products() {}
__device__ __forceinline__ void take_registers() {}
__device__ __forceinline__ void give_registers() {}

#endif

}  // namespace prefill
}  // namespace dw

#endif  // DELTAWEAVE_SRC_PREFILL_CUH_

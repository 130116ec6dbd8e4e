// SPDX-License-Identifier: Apache-2.0
// What the prefill path's kernels share. Tenants with many tokens (layout.h, kDenseTokens) have
// their factors written out as fp16 once a call; both stages are then one plain product of 16-bit
// images, tokens on the tensor core's row side:
//
//     prefill_images.cu   x -> image;  V^, U^ -> images         h, float -> its parts' sum, image
//     prefill_gemm.cu     h = sigma * (x image) (V^ image)^T    y += (h image) (U^ image)^T
//
// An image holds rows x k halves as tiles of 128 rows by 64 k, [row tile][k tile], each tile as the
// tensor core reads it in shared memory: a row is 128 bytes, its 16-byte units permuted by the row
// (unit u of row r lies at u ^ r % 8), so that one bulk copy of 16 kB brings a tile and no two of
// eight rows' units share a bank. Rows of x and h: a tile a chunk of the plan. Rows of V^: ranks,
// every band padded to 16. Rows of U^: a tile a group of 128 outputs, within 32 in the order that
// leaves a lane of the product with eight neighbours (output_place).
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
static_assert(kTileBytes == kImageTileBytes && kTileRows == kGroup, "as the workspace was cut");

// ---- Images -----------------------------------------------------------------------------------

// Where eight consecutive k, from 8 * `octet` of the image's row on, lie.
__device__ __forceinline__ uint4* octet_at(unsigned char* image, int depth_tiles, int row,
                                           int octet) {
  const int tile = row / kTileRows * depth_tiles + octet / 8, within = row % kTileRows;
  return reinterpret_cast<uint4*>(image + static_cast<int64_t>(tile) * kTileBytes + within * 128 +
                                  (octet % 8 ^ within % 8) * 16);
}

// The row of U^'s image of an output of its group: lanes c of a product have columns 2c, 2c + 1 of
// every eight, and four of these pairs are the outputs 8c .. 8c + 7 of 32.
DW_HD int output_place(int output) {
  return output / 32 * 32 + output % 8 / 2 * 8 + output / 8 % 4 * 2 + output % 2;
}

__device__ __forceinline__ int input_tiles(const Gemm& gemm) { return 2 * gemm.in_groups; }
// k tiles of a whole record's ranks, and of the space for them.
DW_HD int rank_tiles(int padded_rank) { return ceil_div(padded_rank, kTileDepth); }

__device__ __forceinline__ unsigned char* v_image(const Gemm& gemm, int slice, int dense) {
  return gemm.weights + dense * gemm.weights_a_slot + gemm.slices[slice].v_image;
}
__device__ __forceinline__ unsigned char* u_image(const Gemm& gemm, int slice, int dense) {
  return gemm.weights + dense * gemm.weights_a_slot + gemm.slices[slice].u_image;
}
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

// ---- Products ---------------------------------------------------------------------------------

// Sums of a warp's 16 tokens and kColumns weights: [8 columns][4], as mma.m16n8k16 has them.
template <int kColumns>
using Sums = float[kColumns / 8][4];

#if DW_WGMMA

// A tile's rows from `image` on: 8 rows are 1024 bytes apart, swizzled within 128 bytes.
__device__ __forceinline__ uint64_t describe(const unsigned char* image) {
  return static_cast<uint64_t>(shared_address(image) >> 4 & 0x3fff) | uint64_t{1} << 16 |
         uint64_t{1024 >> 4} << 32 | uint64_t{1} << 62;
}

#define DW_SUM4(j) "+f"(d[j][0]), "+f"(d[j][1]), "+f"(d[j][2]), "+f"(d[j][3])
#define DW_SUM16(j) DW_SUM4(j), DW_SUM4(j + 1), DW_SUM4(j + 2), DW_SUM4(j + 3)
#define DW_NAMES_64                                                                          \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,"   \
  "%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45," \
  "%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"

// d += 64 tokens x 16 k * (columns x 16 k)^T, a warp group.
__device__ __forceinline__ void multiply_async(Sums<128>& d, uint64_t tokens, uint64_t weights) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {" DW_NAMES_64
               "}, %64, %65, 1, 1, 1, 0, 0;"
               : DW_SUM16(0), DW_SUM16(4), DW_SUM16(8), DW_SUM16(12)
               : "l"(tokens), "l"(weights));
}
__device__ __forceinline__ void multiply_async(Sums<256>& d, uint64_t tokens, uint64_t weights) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.f16.f16 {" DW_NAMES_64
      ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,"
      "%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,"
      "%107,%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,"
      "%125,%126,%127}, %128, %129, 1, 1, 1, 0, 0;"
      : DW_SUM16(0), DW_SUM16(4), DW_SUM16(8), DW_SUM16(12), DW_SUM16(16), DW_SUM16(20),
        DW_SUM16(24), DW_SUM16(28)
      : "l"(tokens), "l"(weights));
}
#undef DW_NAMES_64
#undef DW_SUM16
#undef DW_SUM4

// Begins a stage's products; the stage may be overwritten after wait_products<0>(), or after
// wait_products<1>() behind the next stage's beginning.
template <int kColumns>
__device__ __forceinline__ void begin_products(Sums<kColumns>& d, const unsigned char* tokens,
                                               const unsigned char* weights) {
  const int group = threadIdx.x / 128;  // of four warps
  const uint64_t a = describe(tokens + group * 64 * 128), b = describe(weights);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
  for (int i = 0; i < kTileDepth / 16; ++i) multiply_async(d, a + 2 * i, b + 2 * i);
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
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

// Four 8 x 8 matrices; lane 8m + r gives where row r of matrix m lies.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const unsigned char* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(shared_address(row)));
}

template <int kColumns>
__device__ __forceinline__ void begin_products(Sums<kColumns>& d, const unsigned char* tokens,
                                               const unsigned char* weights) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const unsigned char* a_row = tokens + (16 * warp + lane % 16) * 128;
  const unsigned char* b_row = weights + (lane / 16 * 8 + lane % 8) * 128;
#pragma unroll
  for (int i = 0; i < kTileDepth / 16; ++i) {
    uint32_t a[4];
    load_matrices(a, a_row + ((2 * i + lane / 16) ^ lane % 8) * 16);
#pragma unroll
    for (int j = 0; j < kColumns / 8; j += 2) {
      uint32_t b[4];
      load_matrices(b, b_row + j * 8 * 128 + ((2 * i + lane / 8 % 2) ^ lane % 8) * 16);
      multiply(d[j], a, b[0], b[1]);
      multiply(d[j + 1], a, b[2], b[3]);
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

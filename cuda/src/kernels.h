// SPDX-License-Identifier: Apache-2.0
// Launchers of the kernels, one per file, and what they pass to the device.
#ifndef DELTAWEAVE_SRC_KERNELS_H_
#define DELTAWEAVE_SRC_KERNELS_H_

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "deltaweave.h"
#include "gemm_args.h"
#include "layout.h"

namespace dw {

struct Slice {
  int projection, out_features, out_offset, groups;
  void* y;
  int64_t y_stride;
  const void* base;  // weight; null where y is there already
  int64_t base_stride;
};

// One call of dw_delta_gemm or dw_gated_lora as the device sees it.
struct Gemm {
  int record;  // the kind whose terms are added: DW_FACTORED or DW_LORA
  const unsigned char* arena;
  const int64_t* directory;
  int slot_count;
  int token_count, in_groups;
  int tiles, tile_groups;  // how in_groups are cut (layout.h)
  const void* x;           // [tokens, 128 * in_groups]
  int64_t x_stride;
  int x_dtype, y_dtype;        // dw_dtype
  const float* x_scale;        // undoes x's power of two, [tokens]; null for 1
  const float* token_weights;  // of token t at t * token_weights_stride, of LORA with a band's
                               // at its number behind it; null for 1
  int64_t token_weights_stride;
  int base_blocks, shrink_blocks;  // of threads, where the call computes the base's product too
  const void* base_x;              // as the caller has it
  int64_t base_x_stride;
  int in_features;
  int* plan;
  int chunk_tokens;
  float* h;           // [tiles, slices, tokens, ranks]
  int ranks, blocks;  // of h: its pitch, and the most blocks of ranks
  // Prefill (prefill.cuh): images of x and of h (one a slice), the tokens' scales in plan order.
  unsigned char *x_image, *h_image;
  float2* token_scales;
  int* cuts;      // most ranks and most parts of any, parts of each [dense slots, slices]
  int* counters;  // parts that are ready, of each tile of stage 1
  int image_tiles, rank_tiles, most_parts;  // rank_tiles: of 64, the space a record's ranks have
  int slice_count;
  Slice slices[DW_MAX_SLICES];
};

// Whether the call computes the base's product too.
DW_HD bool has_base(const Gemm& gemm) { return gemm.slices[0].base != nullptr; }

dw_status check_launch(cudaError_t error, const char* what);
int multiprocessors();
int compute_major();
int shared_bytes();  // of a multiprocessor
int shared_bytes_a_block();

// Of threads, in the kernels of a call that computes the base's product too.
int base_blocks(const Gemm& gemm);
int shrink_blocks(const Gemm& gemm);

cudaError_t launch_plan(const int32_t* slots, int tokens, int slot_count, int chunk, int* plan,
                        cudaStream_t stream);
cudaError_t launch_prepare(const dw_gemm& args, const Workspace& cut, cudaStream_t stream);
cudaError_t launch_base(const Gemm& gemm, cudaStream_t stream);
cudaError_t launch_shrink(const Gemm& gemm, cudaStream_t stream);
cudaError_t launch_expand(const Gemm& gemm, cudaStream_t stream);
cudaError_t launch_lora_shrink(const Gemm& gemm, cudaStream_t stream);
cudaError_t launch_lora_expand(const Gemm& gemm, cudaStream_t stream);

namespace prefill {
cudaError_t launch_x_image(const dw_gemm& args, const Gemm& gemm, cudaStream_t stream);
cudaError_t launch_stage1(const Gemm& gemm, cudaStream_t stream);
cudaError_t launch_stage2(const Gemm& gemm, cudaStream_t stream);
}  // namespace prefill

}  // namespace dw

#endif  // DELTAWEAVE_SRC_KERNELS_H_

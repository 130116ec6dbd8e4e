// SPDX-License-Identifier: Apache-2.0
// Checks of dw_gemm and the cut of its workspace, both pure host logic.
#ifndef DELTAWEAVE_SRC_GEMM_ARGS_H_
#define DELTAWEAVE_SRC_GEMM_ARGS_H_

#include <cstddef>

#include "deltaweave.h"

namespace dw {

// Byte offsets of the workspace's parts, and the sizes that follow from a call's arguments. What
// serves dense slots (layout.h) is 0 where there can be none.
struct Workspace {
  size_t x;        // half [tokens, padded_in]: x behind in_offset zeros, scaled by a power of two
  size_t x_scale;  // float [tokens]: what undoes that scale
  size_t h;        // decode: float [tiles, slices, tokens, ranks]: sigma * (V^ x), tokens in the
                   // plan's order; prefill: float, of each tile of stage 1 its parts
  size_t bytes;
  int padded_in, ranks, blocks;
  int tiles, tile_groups;            // how the groups of in_features are cut in stage 1 of decode
  int lora_tiles, lora_tile_groups;  // and of gated LoRAs

  // Images (prefill.cuh) of x and of h a slice; the tokens' scales; how stage 1 is cut.
  size_t x_image, h_image, token_scales, cuts, counters;
  int image_tiles, rank_tiles, most_parts;
};

int resolve_chunk(int chunk_tokens, int token_count);
dw_status check_chunk(int chunk_tokens);
dw_status check_sizes(const dw_gemm& args);
dw_status check_pointers(const dw_gemm& args, bool needs_y = true);
dw_status check_delta(const dw_gemm& args);
dw_status check_half(const dw_gemm& args, bool needs_y);
dw_status check_dense(const dw_gemm& args);
dw_status check_lora(const dw_gemm& args);
Workspace cut_workspace(const dw_gemm& args);
size_t plan_bytes(int token_count);

}  // namespace dw

#endif  // DELTAWEAVE_SRC_GEMM_ARGS_H_

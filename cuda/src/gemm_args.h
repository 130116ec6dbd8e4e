// SPDX-License-Identifier: Apache-2.0
// Checks of dw_gemm and the cut of its workspace, both pure host logic.
#ifndef DELTAWEAVE_SRC_GEMM_ARGS_H_
#define DELTAWEAVE_SRC_GEMM_ARGS_H_

#include <cstddef>

#include "deltaweave.h"

namespace dw {

// Byte offsets of the workspace's parts, and the sizes that follow from a call's arguments.
struct Workspace {
  size_t x;        // half [tokens, padded_in]: x behind in_offset zeros, scaled by a power of two;
                   // in prefill [image_rows, padded_in], as images
  size_t x_scale;  // float [tokens]: what undoes that scale
  size_t h;  // float [tiles, slices, tokens, ranks]: sigma * (V^ x), tokens in the plan's order
  size_t h_image;  // prefill: half [slices, image_rows, ranks]
  size_t h_scale;  // prefill: float [slices, tokens]
  size_t bytes;
  int padded_in, ranks, blocks;
  int tiles, tile_groups;  // how the groups of in_features are cut in stage 1
  int64_t image_rows;      // 0 in decode
};

int resolve_chunk(int chunk_tokens, int token_count);
dw_status check_chunk(int chunk_tokens);
dw_status check_sizes(const dw_gemm& args);
dw_status check_pointers(const dw_gemm& args);
dw_status check_dense(const dw_gemm& args);
Workspace cut_workspace(const dw_gemm& args);
size_t plan_bytes(int token_count);

}  // namespace dw

#endif  // DELTAWEAVE_SRC_GEMM_ARGS_H_

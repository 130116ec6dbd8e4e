// SPDX-License-Identifier: Apache-2.0
#include "gemm_args.h"

#include <algorithm>
#include <cstdint>

#include "checks.h"
#include "layout.h"
#include "payload.h"

namespace dw {
int resolve_chunk(int chunk_tokens, int token_count) {
  return chunk_tokens == 0 ? default_chunk(token_count) : chunk_tokens;
}

dw_status check_chunk(int chunk_tokens) {
  if (chunk_tokens == 0 || chunk_tokens == kDecodeTokens || chunk_tokens == kPrefillTokens) {
    return DW_OK;
  }
  return fail(DW_ERROR_ARGUMENT, "chunk_tokens ", chunk_tokens, ", expected 0, ", kDecodeTokens,
              " or ", kPrefillTokens);
}

dw_status check_sizes(const dw_gemm& args) {
  DW_RETURN_IF_ERROR(check_range("token_count", args.token_count, 1, DW_MAX_TOKENS));
  DW_RETURN_IF_ERROR(check_range("slice_count", args.slice_count, 1, DW_MAX_SLICES));
  DW_RETURN_IF_ERROR(check_range("max_rank", args.max_rank, 1, DW_MAX_RANK));
  DW_RETURN_IF_ERROR(check_range("dtype", args.dtype, DW_FLOAT16, DW_BFLOAT16));
  DW_RETURN_IF_ERROR(check_range("slot_count", args.slot_count, 1, INT32_MAX));
  DW_RETURN_IF_ERROR(check_range("parameter_count", args.parameter_count, 1, INT32_MAX));
  DW_RETURN_IF_ERROR(check_chunk(args.chunk_tokens));
  for (int s = 0; s < args.slice_count; ++s) {
    const dw_slice& slice = args.slices[s];
    DW_RETURN_IF_ERROR(
        check_range("parameter of a slice", slice.parameter, 0, args.parameter_count - 1));
    const dw_parameter parameter = {DW_LINEAR, args.in_features, slice.out_features, args.in_offset,
                                    slice.out_offset};
    DW_RETURN_IF_ERROR(check_parameter(parameter, slice.parameter));
  }
  return DW_OK;
}

namespace {

dw_status check_no_base(const dw_gemm& args, const char* product) {
  for (int s = 0; s < args.slice_count; ++s) {
    if (args.slices[s].base == nullptr) continue;
    return fail(DW_ERROR_ARGUMENT, "base of slice ", s, " of ", product, ", expected NULL");
  }
  return DW_OK;
}

dw_status check_multiple(const char* what, int64_t value, int64_t of) {
  if (value % of == 0) return DW_OK;
  return fail(DW_ERROR_ARGUMENT, what, " ", value, ", expected a multiple of ", of);
}

// What the base's kernel reads as it is, an octet at a time.
dw_status check_base(const dw_gemm& args) {
  if (args.slices[0].base == nullptr) return check_no_base(args, "a call whose first has none");
  DW_RETURN_IF_ERROR(check_range("token_count with a base", args.token_count, 1, DW_BASE_TOKENS));
  DW_RETURN_IF_ERROR(check_multiple("in_features with a base", args.in_features, kOctet));
  DW_RETURN_IF_ERROR(check_multiple("x_stride with a base", args.x_stride, kOctet));
  DW_RETURN_IF_ERROR(check_aligned("x with a base", args.x, 2 * kOctet));
  for (int s = 0; s < args.slice_count; ++s) {
    const dw_slice& slice = args.slices[s];
    DW_RETURN_IF_ERROR(check_aligned("base", slice.base, 2 * kOctet));
    DW_RETURN_IF_ERROR(
        check_range("base_stride", slice.base_stride, args.in_features, INT32_MAX / 16));
    DW_RETURN_IF_ERROR(check_multiple("base_stride", slice.base_stride, kOctet));
  }
  return DW_OK;
}

}  // namespace

dw_status check_dense(const dw_gemm& args) {
  DW_RETURN_IF_ERROR(check_range("slice_count of a dense product", args.slice_count, 1, 1));
  DW_RETURN_IF_ERROR(check_sizes(args));
  if (args.weights != nullptr) {
    return fail(DW_ERROR_ARGUMENT, "weights of a dense product, expected NULL");
  }
  DW_RETURN_IF_ERROR(check_no_base(args, "a dense product"));
  return check_pointers(args);
}

namespace {

dw_status check_decode(const dw_gemm& args, const char* lacking) {
  if (cut_workspace(args).image_tiles == 0) return DW_OK;
  return fail(DW_ERROR_ARGUMENT, args.token_count, " tokens with chunk_tokens ", args.chunk_tokens,
              " are prefill, which ", lacking);
}

}  // namespace

dw_status check_delta(const dw_gemm& args) {
  DW_RETURN_IF_ERROR(check_sizes(args));
  DW_RETURN_IF_ERROR(check_pointers(args));
  return check_base(args);
}

dw_status check_half(const dw_gemm& args, bool needs_y) {
  DW_RETURN_IF_ERROR(check_sizes(args));
  DW_RETURN_IF_ERROR(check_pointers(args, needs_y || args.slices[0].base != nullptr));
  DW_RETURN_IF_ERROR(check_base(args));
  return check_decode(args, "has no halves");
}

dw_status check_lora(const dw_gemm& args) {
  DW_RETURN_IF_ERROR(check_sizes(args));
  if (args.weights == nullptr) {
    return fail(DW_ERROR_ARGUMENT, "no weights, expected float [token_count, ", DW_MAX_EXPERTS,
                "]");
  }
  DW_RETURN_IF_ERROR(check_no_base(args, "LoRAs"));
  return check_pointers(args);
}

dw_status check_pointers(const dw_gemm& args, bool needs_y) {
  DW_RETURN_IF_ERROR(check_aligned("arena", args.arena, DW_ALIGNMENT));
  DW_RETURN_IF_ERROR(check_aligned("directory", args.directory, sizeof(int64_t)));
  DW_RETURN_IF_ERROR(check_aligned("plan", args.plan, 16));
  DW_RETURN_IF_ERROR(check_aligned("workspace", args.workspace, DW_ALIGNMENT));
  DW_RETURN_IF_ERROR(check_aligned("x", args.x, 2));
  DW_RETURN_IF_ERROR(check_range("x_stride", args.x_stride, args.in_features, INT64_MAX));
  for (int s = 0; needs_y && s < args.slice_count; ++s) {
    DW_RETURN_IF_ERROR(check_aligned("y", args.slices[s].y, 2));
    DW_RETURN_IF_ERROR(
        check_range("y_stride", args.slices[s].y_stride, args.slices[s].out_features, INT64_MAX));
  }
  if (args.weights != nullptr) {
    DW_RETURN_IF_ERROR(check_aligned("weights", args.weights, sizeof(float)));
    DW_RETURN_IF_ERROR(check_range("weights_stride", args.weights_stride, 0, INT64_MAX));
  }
  const Workspace workspace = cut_workspace(args);
  if (args.workspace_bytes < workspace.bytes) {
    return fail(DW_ERROR_ARGUMENT, "workspace of ", args.workspace_bytes, " bytes, needed ",
                workspace.bytes);
  }
  return DW_OK;
}

namespace {

// The most parts into which prefill cuts in_features: few where tokens and slices fill the GPU.
int most_parts(const dw_gemm& args) {
  return std::clamp(4096 / (args.token_count * args.slice_count), 1, 8);
}

}  // namespace

Workspace cut_workspace(const dw_gemm& args) {
  Workspace cut = {};
  const bool prefill = resolve_chunk(args.chunk_tokens, args.token_count) == kPrefillTokens;
  const int groups = group_count(args.in_features, args.in_offset);
  cut.padded_in = groups * kGroup;
  cut.ranks = intermediate_ranks(args.max_rank);
  cut.blocks = intermediate_blocks(args.max_rank);
  cut.tile_groups = tile_groups(groups);
  cut.tiles = ceil_div(groups, cut.tile_groups);
  cut.lora_tile_groups = prefill ? cut.tile_groups : kLoraTileGroups;
  cut.lora_tiles = ceil_div(groups, cut.lora_tile_groups);
  const size_t tokens = args.token_count;
  const size_t rows = tokens * args.slice_count;
  const auto advance = [&cut](size_t bytes) {
    const size_t start = cut.bytes;
    cut.bytes += round_up(bytes, DW_ALIGNMENT);
    return start;
  };
  const size_t dense_slots = prefill ? most_dense_slots(args.token_count, args.slot_count) : 0;
  cut.most_parts = dense_slots > 0 ? most_parts(args) : 0;
  cut.x = advance(tokens * cut.padded_in * 2);
  cut.x_scale = advance(tokens * sizeof(float));
  const size_t decode_sums = std::max(cut.tiles, cut.lora_tiles) * rows * cut.ranks;
  cut.image_tiles = dense_slots > 0 ? most_image_tiles(args.token_count, args.slot_count) : 0;
  const size_t images = size_t{1} * args.slice_count * cut.image_tiles;  // of h, of 128 tokens
  const size_t rank_groups = ceil_div(cut.ranks, kGroup);
  const size_t parts = cut.most_parts > 1 ? cut.most_parts : 0;
  const size_t part_sums = parts * images * rank_groups * kGroup * kPrefillTokens;
  cut.h = advance(std::max(decode_sums, part_sums) * sizeof(float));
  if (dense_slots == 0) return cut;
  cut.rank_tiles = static_cast<int>(2 * rank_groups);
  cut.x_image = advance(cut.image_tiles * 2 * groups * size_t{kImageTileBytes});
  cut.h_image = advance(images * 2 * rank_groups * kImageTileBytes);
  cut.token_scales = advance(tokens * 2 * sizeof(float));
  cut.cuts = advance((2 + dense_slots * args.slice_count) * sizeof(int));
  cut.counters = advance(images * rank_groups * sizeof(int));
  return cut;
}

size_t plan_bytes(int token_count) {
  return sizeof(int32_t) * (plan_chunks(token_count) + 4 * static_cast<size_t>(token_count));
}

}  // namespace dw

dw_status dw_plan_bytes(int32_t token_count, size_t* bytes) {
  DW_RETURN_IF_ERROR(dw::check_range("token_count", token_count, 1, DW_MAX_TOKENS));
  *bytes = dw::plan_bytes(token_count);
  return DW_OK;
}

dw_status dw_gemm_workspace_bytes(const dw_gemm* args, size_t* bytes) {
  DW_RETURN_IF_ERROR(dw::check_sizes(*args));
  *bytes = dw::cut_workspace(*args).bytes;
  return DW_OK;
}

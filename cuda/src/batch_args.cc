// SPDX-License-Identifier: Apache-2.0
#include "batch_args.h"

#include "checks.h"
#include "layout.h"
#include "payload.h"

namespace dw {
namespace {

dw_status check_batch(const dw_batch& batch) {
  DW_RETURN_IF_ERROR(check_range("token_count", batch.token_count, 1, INT32_MAX));
  DW_RETURN_IF_ERROR(check_range("dtype", batch.dtype, DW_FLOAT16, DW_BFLOAT16));
  DW_RETURN_IF_ERROR(check_range("slot_count", batch.slot_count, 1, INT32_MAX));
  DW_RETURN_IF_ERROR(check_range("parameter_count", batch.parameter_count, 1, INT32_MAX));
  if (batch.arena_address == nullptr) {
    DW_RETURN_IF_ERROR(check_aligned("arena", batch.arena, DW_ALIGNMENT));
  } else {
    DW_RETURN_IF_ERROR(
        check_aligned("arena_address", batch.arena_address, sizeof(*batch.arena_address)));
  }
  DW_RETURN_IF_ERROR(check_aligned("directory", batch.directory, sizeof(int64_t)));
  return check_aligned("slots", batch.slots, sizeof(int32_t));
}

dw_status check_index(const dw_batch& batch, int parameter) {
  return check_range("parameter", parameter, 0, batch.parameter_count - 1);
}

// What a record's kind needs must be there.
dw_status check_tensors(const dw_repack_args& args) {
  const dw_record& record = args.record;
  const bool factored = has_factors(record), mix = record.kind == DW_MIX;
  bool codes = record.kind == DW_DENSE || factored, grids = false, levels = false;
  for (int b = 0; b < record.band_count && !mix; ++b) {
    grids |= record.bands[b].grid != DW_GRID_NONE;
    levels |= record.bands[b].grid == DW_GRID_CODEBOOK;
  }
  const auto require = [&](const char* name, bool wanted, const void* pointer, int alignment) {
    return wanted ? check_aligned(name, pointer, alignment) : DW_OK;
  };
  const bool rows = record.kind == DW_ROWS;
  DW_RETURN_IF_ERROR(require("v_codes", codes, args.v_codes, 16));
  DW_RETURN_IF_ERROR(require("v_grid", grids, args.v_grid, 4));
  DW_RETURN_IF_ERROR(require("u_codes", factored, args.u_codes, 16));
  DW_RETURN_IF_ERROR(require("u_grid", factored && grids, args.u_grid, 4));
  DW_RETURN_IF_ERROR(require("sigma", factored || mix, args.sigma, 4));
  DW_RETURN_IF_ERROR(require("levels", levels, args.levels, 4));
  DW_RETURN_IF_ERROR(require("indices", rows, args.indices, 4));
  DW_RETURN_IF_ERROR(require("values", rows, args.values, 2));
  const bool floats = record.kind == DW_VALUES || (mix && record.band_count > 0);
  return require("values", floats, args.values, 4);
}

}  // namespace

dw_status check_repack(const dw_repack_args& args) {
  const int index = args.record.parameter;
  if (args.record.shares != -1) {
    return fail(DW_ERROR_ARGUMENT, "parameter ", index, " shares the record of ",
                args.record.shares, ", whose bytes are repacked once");
  }
  DW_RETURN_IF_ERROR(check_parameter(args.parameter, index));
  DW_RETURN_IF_ERROR(check_record(args.record, args.parameter, index, DW_MAX_RANK));
  DW_RETURN_IF_ERROR(check_tensors(args));
  DW_RETURN_IF_ERROR(check_aligned("payload", args.payload, DW_ALIGNMENT));
  const uint64_t needed = place(args.record, args.parameter).bytes;
  if (args.payload_bytes >= needed) return DW_OK;
  return fail(DW_ERROR_ARGUMENT, "payload of ", args.payload_bytes, " bytes, needed ", needed);
}

dw_status check_norm(const dw_norm& args) {
  DW_RETURN_IF_ERROR(check_batch(args.batch));
  DW_RETURN_IF_ERROR(check_index(args.batch, args.parameter));
  DW_RETURN_IF_ERROR(check_range("features", args.features, 1, DW_MAX_IN_FEATURES));
  DW_RETURN_IF_ERROR(check_range("rows_per_token", args.rows_per_token, 1, DW_MAX_IN_FEATURES));
  const int64_t rows = static_cast<int64_t>(args.batch.token_count) * args.rows_per_token;
  DW_RETURN_IF_ERROR(check_range("rows of all tokens", rows, 1, INT32_MAX));
  if (!(args.epsilon >= 0.f)) {
    return fail(DW_ERROR_ARGUMENT, "epsilon ", args.epsilon, ", expected at least 0");
  }
  DW_RETURN_IF_ERROR(check_aligned("x", args.x, 2));
  DW_RETURN_IF_ERROR(check_aligned("y", args.y, 2));
  DW_RETURN_IF_ERROR(check_aligned("weight", args.weight, 2));
  DW_RETURN_IF_ERROR(check_range("x_row_stride", args.x_row_stride, args.features, INT64_MAX));
  DW_RETURN_IF_ERROR(check_range("y_row_stride", args.y_row_stride, args.features, INT64_MAX));
  DW_RETURN_IF_ERROR(check_range("x_token_stride", args.x_token_stride, args.features, INT64_MAX));
  return check_range("y_token_stride", args.y_token_stride, args.features, INT64_MAX);
}

dw_status check_bias(const dw_bias& args) {
  DW_RETURN_IF_ERROR(check_batch(args.batch));
  DW_RETURN_IF_ERROR(check_range("slice_count", args.slice_count, 1, DW_MAX_SLICES));
  for (int s = 0; s < args.slice_count; ++s) {
    const dw_bias_slice& slice = args.slices[s];
    DW_RETURN_IF_ERROR(check_index(args.batch, slice.parameter));
    DW_RETURN_IF_ERROR(check_range("features", slice.features, 1, DW_MAX_OUT_FEATURES));
    DW_RETURN_IF_ERROR(check_aligned("y", slice.y, 2));
    DW_RETURN_IF_ERROR(check_range("y_stride", slice.y_stride, slice.features, INT64_MAX));
    if (slice.bias != nullptr) DW_RETURN_IF_ERROR(check_aligned("bias", slice.bias, 2));
  }
  return DW_OK;
}

dw_status check_embedding(const dw_embedding& args) {
  DW_RETURN_IF_ERROR(check_batch(args.batch));
  DW_RETURN_IF_ERROR(check_index(args.batch, args.parameter));
  DW_RETURN_IF_ERROR(check_range("base_rows", args.base_rows, 0, DW_MAX_OUT_FEATURES));
  const dw_parameter shape = {DW_EMBEDDING, args.features, DW_MAX_OUT_FEATURES, args.in_offset, 0};
  DW_RETURN_IF_ERROR(check_parameter(shape, args.parameter));
  DW_RETURN_IF_ERROR(check_aligned("ids", args.ids, sizeof(int64_t)));
  if (args.base_rows > 0) {
    DW_RETURN_IF_ERROR(check_aligned("table", args.table, 2));
    DW_RETURN_IF_ERROR(check_range("table_stride", args.table_stride, args.features, INT64_MAX));
  }
  DW_RETURN_IF_ERROR(check_aligned("y", args.y, 2));
  return check_range("y_stride", args.y_stride, args.features, INT64_MAX);
}

dw_status check_gate(const dw_gate& args) {
  DW_RETURN_IF_ERROR(check_batch(args.batch));
  DW_RETURN_IF_ERROR(check_index(args.batch, args.parameter));
  DW_RETURN_IF_ERROR(check_range("features", args.features, 1, DW_MAX_IN_FEATURES));
  DW_RETURN_IF_ERROR(check_aligned("x", args.x, 2));
  DW_RETURN_IF_ERROR(check_range("x_stride", args.x_stride, args.features, INT64_MAX));
  DW_RETURN_IF_ERROR(check_aligned("weights", args.weights, sizeof(float)));
  return check_range("weights_stride", args.weights_stride, DW_MAX_EXPERTS, INT64_MAX);
}

}  // namespace dw

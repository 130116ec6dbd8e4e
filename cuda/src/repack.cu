// SPDX-License-Identifier: Apache-2.0
// dw_repack: file order to kernel order, once per tenant and record, in two launches (one for rows
// and values). This file describes the record to the kernels.
//
//   factored  header, sigma, levels (repack_numbers.cu), then v's and u's blocks (repack_blocks.cu)
//   dense     levels if it has a codebook, blocks in v's order
//   rows      indices as they are, fp16 rows as blocks in v's order
//   values    as they are
//   lora      as factored, every expert a band of 16 bits
//   mix       header: bias and temperature; the gate's weight as it is
#include "batch_args.h"
#include "kernels.h"
#include "layout.h"
#include "payload.h"
#include "repack.h"
#include "status.h"

namespace dw {
namespace {

struct Factor {
  const void *codes, *grid;
  bool is_u;
  int features, offset, group_size, group_offset;

  int groups() const { return group_count(features, offset); }
  int grid_groups() const {
    return group_size > 0 ? ceil_div(features + group_offset, group_size) : 1;
  }
  int64_t row_bytes(int bits) const { return (static_cast<int64_t>(bits) * features + 7) / 8; }
  int64_t grid_halves(const dw_band& band) const {
    if (band.bits == 16) return 0;
    const int64_t entries = group_size > 0 ? static_cast<int64_t>(band.rank) * grid_groups() : 1;
    return entries * (band.grid == DW_GRID_AFFINE ? 2 : 1);
  }
};

Factor v_factor(const dw_repack_args& args) {
  const dw_record& record = args.record;
  const void* codes = record.kind == DW_ROWS ? args.values : args.v_codes;
  return {codes,
          args.v_grid,
          false,
          args.parameter.in_features,
          args.parameter.in_offset,
          record.v_group_size,
          record.v_group_offset};
}

Factor u_factor(const dw_repack_args& args) {
  const dw_record& record = args.record;
  return {args.u_codes,
          args.u_grid,
          true,
          args.parameter.out_features,
          args.parameter.out_offset,
          record.u_group_size,
          record.u_group_offset};
}

// Calls visit(index, band, codes, grid) for a factor's bands in file order.
template <typename Visit>
void walk_bands(const dw_record& record, const Factor& factor, Visit&& visit) {
  int64_t code_at = 0, grid_at = 0;
  for (int b = 0; b < record.band_count; ++b) {
    const dw_band& band = record.bands[b];
    code_at = round_up(code_at, 16);
    visit(b, band, static_cast<const unsigned char*>(factor.codes) + code_at,
          static_cast<const __half*>(factor.grid) + grid_at);
    code_at += band.rank * factor.row_bytes(band.bits);
    grid_at += factor.grid_halves(band);
  }
}

void add_bands(const dw_repack_args& args, const Payload& payload, const Factor& factor,
               RepackBands& bands) {
  walk_bands(args.record, factor,
             [&](int b, const dw_band& shape, const unsigned char* codes, const __half* grid) {
               RepackBand& band = bands.of[bands.count++];
               band.codes = codes;
               band.code_bytes = shape.rank * factor.row_bytes(shape.bits);
               band.grid = grid;
               band.to = static_cast<unsigned char*>(args.payload) +
                         (factor.is_u ? payload.bands[b].u : payload.bands[b].v);
               band.bits = shape.bits;
               band.rank = shape.rank;
               band.features = factor.features;
               band.offset = factor.offset;
               band.groups = factor.groups();
               band.group_size = factor.group_size;
               band.group_base = factor.group_offset - factor.offset;
               band.grid_groups = factor.grid_groups();
               band.affine = shape.grid == DW_GRID_AFFINE;
               band.is_u = factor.is_u;
               band.first_unit = bands.units;
               bands.units += block_count(shape.bits, shape.rank) * band.groups;
             });
}

RepackBands describe_bands(const dw_repack_args& args, const Payload& payload) {
  RepackBands bands = {};
  bands.header = static_cast<const float*>(args.payload);
  add_bands(args, payload, v_factor(args), bands);
  if (has_factors(args.record)) add_bands(args, payload, u_factor(args), bands);
  return bands;
}

void describe_ranges(const dw_record& record, const Factor& factor, RepackRange* ranges) {
  walk_bands(record, factor,
             [&](int b, const dw_band& band, const unsigned char* codes, const __half* grid) {
               RepackRange& range = ranges[b];
               range.scales = band.bits != 16;
               range.values = range.scales ? grid : reinterpret_cast<const __half*>(codes);
               range.pairs = range.scales && band.grid == DW_GRID_AFFINE;
               range.count = range.scales ? factor.grid_halves(band)
                                          : static_cast<int64_t>(band.rank) * factor.features;
             });
}

RepackNumbers describe_numbers(const dw_repack_args& args, const Payload& payload) {
  const dw_record& record = args.record;
  unsigned char* base = static_cast<unsigned char*>(args.payload);
  RepackNumbers numbers = {};
  numbers.band_count = record.band_count;
  numbers.levels = args.levels;
  for (int b = 0; b < record.band_count; ++b) {
    const dw_band& band = record.bands[b];
    numbers.rank[b] = band.rank;
    numbers.top[b] = (1 << band.bits) - 1;
    numbers.level_count[b] = band.grid == DW_GRID_CODEBOOK ? 1 << band.bits : 0;
    numbers.levels_to[b] = reinterpret_cast<__half*>(base + payload.bands[b].levels);
  }
  if (!has_factors(record)) return numbers;
  numbers.sigma = args.sigma;
  numbers.sigma_to = reinterpret_cast<float*>(base + payload.sigma);
  numbers.header_to = reinterpret_cast<float*>(base);
  describe_ranges(record, v_factor(args), numbers.v_ranges);
  describe_ranges(record, u_factor(args), numbers.u_ranges);
  return numbers;
}

bool has_numbers(const dw_record& record) {
  return has_factors(record) ||
         (record.kind == DW_DENSE && record.bands[0].grid == DW_GRID_CODEBOOK);
}

dw_status copy(const dw_repack_args& args, uint64_t to, const void* from, size_t bytes,
               cudaStream_t stream) {
  return check_launch(cudaMemcpyAsync(static_cast<unsigned char*>(args.payload) + to, from, bytes,
                                      cudaMemcpyDeviceToDevice, stream),
                      "repack copy");
}

}  // namespace
}  // namespace dw

dw_status dw_repack(const dw_repack_args* args, void* stream_pointer) {
  if (args == nullptr) return dw::fail(DW_ERROR_ARGUMENT, "null argument");
  DW_RETURN_IF_ERROR(dw::check_repack(*args));
  const dw_record& record = args->record;
  const dw::Payload payload = dw::place(record, args->parameter);
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_pointer);
  if (record.kind == DW_VALUES) {
    return dw::copy(*args, payload.values, args->values,
                    sizeof(float) * args->parameter.in_features, stream);
  }
  if (record.kind == DW_MIX) {
    const size_t weights = size_t{sizeof(float)} * record.band_count * record.rows;
    if (weights > 0) {
      DW_RETURN_IF_ERROR(dw::copy(*args, payload.values, args->values,
                                  weights * args->parameter.in_features, stream));
    }
    return dw::copy(*args, 0, args->sigma, sizeof(float) * dw::kMixNumbers, stream);
  }
  if (record.kind == DW_ROWS) {
    DW_RETURN_IF_ERROR(
        dw::copy(*args, payload.indices, args->indices, sizeof(int32_t) * record.rows, stream));
  }
  if (dw::has_numbers(record)) {
    DW_RETURN_IF_ERROR(dw::check_launch(
        dw::launch_repack_numbers(dw::describe_numbers(*args, payload), stream), "repack numbers"));
  }
  return dw::check_launch(dw::launch_repack_blocks(dw::describe_bands(*args, payload), stream),
                          "repack blocks");
}

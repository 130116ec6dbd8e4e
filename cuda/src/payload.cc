// SPDX-License-Identifier: Apache-2.0
#include "payload.h"

#include <algorithm>

#include "layout.h"
#include "status.h"

namespace dw {
namespace {

bool known_bits(int bits) {
  return bits == 1 || bits == 2 || bits == 3 || bits == 4 || bits == 8 || bits == 16;
}

dw_status check_features(const char* name, int features, int offset, int limit, int index) {
  if (features < 1 || features > limit) {
    return fail(DW_ERROR_ARGUMENT, "projection ", index, ": ", name, "_features ", features,
                ", expected 1 to ", limit);
  }
  if (offset < 0 || offset >= kGroup) {
    return fail(DW_ERROR_ARGUMENT, "projection ", index, ": ", name, "_offset ", offset,
                ", expected 0 to ", kGroup - 1);
  }
  return DW_OK;
}

dw_status check_groups(const char* name, int size, int offset, int index) {
  if (size < 0 || size % kGroup != 0) {
    return fail(DW_ERROR_UNSUPPORTED, "projection ", index, ": ", name, "_group_size ", size,
                ", the kernels take multiples of ", kGroup, ", or 0 for one group");
  }
  if (offset < 0 || (size == 0 ? offset != 0 : offset >= size)) {
    return fail(DW_ERROR_ARGUMENT, "projection ", index, ": ", name, "_group_offset ", offset,
                " with a group size of ", size);
  }
  return DW_OK;
}

dw_status check_band(const dw_band& band, int number, int index) {
  if (!known_bits(band.bits)) {
    return fail(DW_ERROR_ARGUMENT, "projection ", index, " band ", number, ": ", band.bits,
                " bits, expected 1, 2, 3, 4, 8 or 16");
  }
  if (band.rank < 1) {
    return fail(DW_ERROR_ARGUMENT, "projection ", index, " band ", number, ": rank ", band.rank,
                ", expected at least 1");
  }
  const bool known =
      band.grid == DW_GRID_NONE || band.grid == DW_GRID_AFFINE || band.grid == DW_GRID_CODEBOOK;
  if (!known || (band.grid == DW_GRID_NONE) != (band.bits == 16)) {
    return fail(DW_ERROR_ARGUMENT, "projection ", index, " band ", number, ": grid ", band.grid,
                " with ", band.bits, " bits; 16 bits have no grid, all others one");
  }
  return DW_OK;
}

}  // namespace

dw_status check_projection(const dw_projection& projection, int index) {
  DW_RETURN_IF_ERROR(check_features("in", projection.in_features, projection.in_offset,
                                    DW_MAX_IN_FEATURES, index));
  return check_features("out", projection.out_features, projection.out_offset, DW_MAX_OUT_FEATURES,
                        index);
}

dw_status check_factors(const dw_factors& factors, int max_rank) {
  const int index = factors.projection;
  if (factors.band_count < 1 || factors.band_count > DW_MAX_BANDS) {
    return fail(DW_ERROR_ARGUMENT, "projection ", index, ": ", factors.band_count,
                " bands, expected 1 to ", DW_MAX_BANDS);
  }
  int64_t rank = 0;
  for (int b = 0; b < factors.band_count; ++b) {
    DW_RETURN_IF_ERROR(check_band(factors.bands[b], b, index));
    rank += factors.bands[b].rank;
  }
  if (rank > max_rank) {
    return fail(DW_ERROR_ARGUMENT, "projection ", index, ": rank ", rank,
                ", the arena takes up to ", max_rank);
  }
  DW_RETURN_IF_ERROR(check_groups("v", factors.v_group_size, factors.v_group_offset, index));
  return check_groups("u", factors.u_group_size, factors.u_group_offset, index);
}

int total_rank(const dw_factors& factors) {
  int rank = 0;
  for (int b = 0; b < factors.band_count; ++b) rank += factors.bands[b].rank;
  return rank;
}

Payload place(const dw_factors& factors, const dw_projection& projection) {
  const int v_groups = group_count(projection.in_features, projection.in_offset);
  const int u_groups = group_count(projection.out_features, projection.out_offset);
  uint64_t cursor = kHeaderBytes;
  const auto advance = [&cursor](uint64_t bytes) {
    const uint64_t start = cursor;
    cursor += round_up(bytes, DW_ALIGNMENT);
    return start;
  };
  Payload payload = {};
  int padded = 0;
  for (int b = 0; b < factors.band_count; ++b) padded += padded_rank(factors.bands[b].rank);
  payload.sigma = advance(sizeof(float) * padded);
  for (int b = 0; b < factors.band_count; ++b) {
    const dw_band& band = factors.bands[b];
    BandPlace& to = payload.bands[b];
    to.v = advance(static_cast<uint64_t>(v_groups) * v_group_bytes(band.bits, band.rank));
    to.u = advance(static_cast<uint64_t>(u_groups) * u_group_bytes(band.bits, band.rank));
    if (band.grid == DW_GRID_CODEBOOK) to.levels = advance(2u << band.bits);
  }
  payload.bytes = cursor;
  return payload;
}

void directory_row(const dw_factors& factors, const dw_projection& projection, uint64_t offset,
                   int64_t* row) {
  const Payload payload = place(factors, projection);
  std::fill(row, row + DW_DIRECTORY_FIELDS, 0);
  row[DW_FIELD_BAND_COUNT] = factors.band_count;
  row[DW_FIELD_HEADER] = offset;
  row[DW_FIELD_SIGMA] = offset + payload.sigma;
  for (int b = 0; b < factors.band_count; ++b) {
    const dw_band& band = factors.bands[b];
    int64_t* fields = row + DW_FIELD_BANDS + b * DW_BAND_FIELDS;
    row[DW_FIELD_ROW_BLOCKS] += block_count(band.bits, band.rank);
    row[DW_FIELD_PADDED_RANK] += padded_rank(band.rank);
    fields[DW_BAND_SHAPE] = band.bits | band.grid << 8 | static_cast<int64_t>(band.rank) << 16;
    fields[DW_BAND_V] = offset + payload.bands[b].v;
    fields[DW_BAND_U] = offset + payload.bands[b].u;
    fields[DW_BAND_LEVELS] = payload.bands[b].levels ? offset + payload.bands[b].levels : 0;
  }
}

}  // namespace dw

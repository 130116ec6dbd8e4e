// SPDX-License-Identifier: Apache-2.0
#include "payload.h"

#include <algorithm>

#include "layout.h"
#include "status.h"

namespace dw {
namespace {

const char* kind_name(int parameter_kind) {
  switch (parameter_kind) {
    case DW_LINEAR:
      return "a linear parameter";
    case DW_EMBEDDING:
      return "an embedding";
    case DW_GATE:
      return "a gate";
    default:
      return "a vector";
  }
}

bool known_bits(int bits) {
  return bits == 1 || bits == 2 || bits == 3 || bits == 4 || bits == 8 || bits == 16;
}

dw_status check_features(const char* name, int features, int offset, int limit, int index) {
  if (features < 1 || features > limit) {
    return fail(DW_ERROR_ARGUMENT, "parameter ", index, ": ", name, "_features ", features,
                ", expected 1 to ", limit);
  }
  if (offset < 0 || offset >= kGroup) {
    return fail(DW_ERROR_ARGUMENT, "parameter ", index, ": ", name, "_offset ", offset,
                ", expected 0 to ", kGroup - 1);
  }
  return DW_OK;
}

// `shard_offset`: of the parameter's first feature behind a multiple of 128.
dw_status check_groups(const char* name, int size, int offset, int shard_offset, int index) {
  if (size < 0 || size % kGroup != 0) {
    return fail(DW_ERROR_UNSUPPORTED, "parameter ", index, ": ", name, "_group_size ", size,
                ", the kernels take multiples of ", kGroup, ", or 0 for one group");
  }
  if (offset < 0 || (size == 0 ? offset != 0 : offset >= size)) {
    return fail(DW_ERROR_ARGUMENT, "parameter ", index, ": ", name, "_group_offset ", offset,
                " with a group size of ", size);
  }
  if (size > 0 && offset % kGroup != shard_offset) {
    return fail(DW_ERROR_ARGUMENT, "parameter ", index, ": ", name, "_group_offset ", offset,
                " does not belong to a shard with offset ", shard_offset);
  }
  return DW_OK;
}

dw_status check_band(const dw_band& band, int number, int index) {
  if (!known_bits(band.bits)) {
    return fail(DW_ERROR_ARGUMENT, "parameter ", index, " band ", number, ": ", band.bits,
                " bits, expected 1, 2, 3, 4, 8 or 16");
  }
  if (band.rank < 1) {
    return fail(DW_ERROR_ARGUMENT, "parameter ", index, " band ", number, ": rank ", band.rank,
                ", expected at least 1");
  }
  const bool known =
      band.grid == DW_GRID_NONE || band.grid == DW_GRID_AFFINE || band.grid == DW_GRID_CODEBOOK;
  if (!known || (band.grid == DW_GRID_NONE) != (band.bits == 16)) {
    return fail(DW_ERROR_ARGUMENT, "parameter ", index, " band ", number, ": grid ", band.grid,
                " with ", band.bits, " bits; 16 bits have no grid, all others one");
  }
  return DW_OK;
}

dw_status check_factored(const dw_record& record, const dw_parameter& parameter, int index,
                         int max_rank) {
  if (record.band_count < 1 || record.band_count > DW_MAX_BANDS) {
    return fail(DW_ERROR_ARGUMENT, "parameter ", index, ": ", record.band_count,
                " bands, expected 1 to ", DW_MAX_BANDS);
  }
  int64_t rank = 0;
  for (int b = 0; b < record.band_count; ++b) {
    DW_RETURN_IF_ERROR(check_band(record.bands[b], b, index));
    rank += record.bands[b].rank;
  }
  if (rank > max_rank) {
    return fail(DW_ERROR_ARGUMENT, "parameter ", index, ": rank ", rank, ", the arena takes up to ",
                max_rank);
  }
  DW_RETURN_IF_ERROR(
      check_groups("v", record.v_group_size, record.v_group_offset, parameter.in_offset, index));
  return check_groups("u", record.u_group_size, record.u_group_offset, parameter.out_offset, index);
}

// Each band an expert's LoRA; one that leaves the linear alone has rank 0.
dw_status check_lora(const dw_record& record, int index, int max_rank) {
  if (record.band_count < 1 || record.band_count > DW_MAX_EXPERTS) {
    return fail(DW_ERROR_ARGUMENT, "parameter ", index, ": ", record.band_count,
                " experts, expected 1 to ", DW_MAX_EXPERTS);
  }
  int64_t rank = 0;
  for (int b = 0; b < record.band_count; ++b) {
    const dw_band& band = record.bands[b];
    if (band.bits != 16 || band.grid != DW_GRID_NONE || band.rank < 0) {
      return fail(DW_ERROR_ARGUMENT, "parameter ", index, " expert ", b, ": rank ", band.rank,
                  " in ", band.bits, " bits, expected at least 0 in 16 bits without a grid");
    }
    rank += band.rank;
  }
  if (rank < 1 || rank > max_rank) {
    return fail(DW_ERROR_ARGUMENT, "parameter ", index, ": experts of rank ", rank,
                " together, the arena takes 1 to ", max_rank);
  }
  return DW_OK;
}

dw_status check_mix(const dw_record& record, int index) {
  if (record.rows < 1 || record.rows > DW_MAX_EXPERTS) {
    return fail(DW_ERROR_ARGUMENT, "parameter ", index, ": ", record.rows,
                " experts, expected 1 to ", DW_MAX_EXPERTS);
  }
  if (record.band_count == 0 || record.band_count == 1) return DW_OK;
  return fail(DW_ERROR_ARGUMENT, "parameter ", index, ": ", record.band_count,
              " weights of a gate, expected 0 or 1");
}

// A band of whole rows: low-bit ones, or fp16 ones that replace.
dw_status check_rows(const dw_record& record, const dw_parameter& parameter, int index) {
  if (record.rows < 1 || record.rows > parameter.out_features) {
    return fail(DW_ERROR_ARGUMENT, "parameter ", index, ": ", record.rows, " rows, expected 1 to ",
                parameter.out_features);
  }
  if (record.band_count != 1) {
    return fail(DW_ERROR_ARGUMENT, "parameter ", index, ": ", record.band_count,
                " bands of rows, expected 1");
  }
  const dw_band& band = record.bands[0];
  DW_RETURN_IF_ERROR(check_band(band, 0, index));
  if ((band.bits == 16) != (record.kind == DW_ROWS)) {
    return fail(DW_ERROR_ARGUMENT, "parameter ", index, ": ", band.bits, " bits, expected ",
                record.kind == DW_ROWS ? "16 for replaced rows" : "1 to 8 for dense rows");
  }
  if (band.rank != record.rows) {
    return fail(DW_ERROR_ARGUMENT, "parameter ", index, ": a band of rank ", band.rank, " for ",
                record.rows, " rows");
  }
  if (record.kind == DW_ROWS) return DW_OK;
  return check_groups("v", record.v_group_size, record.v_group_offset, parameter.in_offset, index);
}

// Hands out consecutive ranges of a payload, each at a multiple of DW_ALIGNMENT.
class Cursor {
 public:
  uint64_t advance(uint64_t bytes) {
    const uint64_t start = at_;
    at_ += round_up(bytes, DW_ALIGNMENT);
    return start;
  }
  uint64_t at() const { return at_; }

 private:
  uint64_t at_ = 0;
};

}  // namespace

dw_status check_parameter(const dw_parameter& parameter, int index) {
  if (parameter.kind < DW_LINEAR || parameter.kind > DW_GATE) {
    return fail(DW_ERROR_ARGUMENT, "parameter ", index, ": kind ", parameter.kind,
                ", expected 0 to 3");
  }
  const bool vector = parameter.kind == DW_VECTOR;
  const bool single = vector || parameter.kind == DW_GATE;
  DW_RETURN_IF_ERROR(check_features("in", parameter.in_features, parameter.in_offset,
                                    vector ? DW_MAX_OUT_FEATURES : DW_MAX_IN_FEATURES, index));
  return check_features("out", parameter.out_features, parameter.out_offset,
                        single ? 1 : DW_MAX_OUT_FEATURES, index);
}

dw_status check_record(const dw_record& record, const dw_parameter& parameter, int index,
                       int max_rank) {
  const char* name = kind_name(parameter.kind);
  const bool linear = parameter.kind == DW_LINEAR, gate = parameter.kind == DW_GATE;
  const bool vector = parameter.kind == DW_VECTOR;
  switch (record.kind) {
    case DW_FACTORED:
      if (linear) return check_factored(record, parameter, index, max_rank);
      return fail(DW_ERROR_UNSUPPORTED, "parameter ", index, ": a factored record of ", name,
                  ", the kernels take those of linear parameters");
    case DW_DENSE:
    case DW_ROWS:
      if (!vector && !gate) return check_rows(record, parameter, index);
      return fail(DW_ERROR_UNSUPPORTED, "parameter ", index, ": rows of ", name, ", expected ",
                  gate ? "a mix" : "values");
    case DW_VALUES:
      if (vector) return DW_OK;
      return fail(DW_ERROR_UNSUPPORTED, "parameter ", index, ": values of ", name,
                  ", the kernels take those of vectors");
    case DW_LORA:
      if (linear) return check_lora(record, index, max_rank);
      return fail(DW_ERROR_UNSUPPORTED, "parameter ", index, ": LoRAs of ", name,
                  ", the kernels take those of linear parameters");
    case DW_MIX:
      if (gate) return check_mix(record, index);
      return fail(DW_ERROR_UNSUPPORTED, "parameter ", index, ": a mix of ", name,
                  ", expected one of a gate");
    default:
      return fail(DW_ERROR_ARGUMENT, "parameter ", index, ": record kind ", record.kind,
                  ", expected 0 to 5");
  }
}

Payload place(const dw_record& record, const dw_parameter& parameter) {
  Payload payload = {};
  Cursor cursor;
  if (has_factors(record)) {
    int padded = 0;
    for (int b = 0; b < record.band_count; ++b) padded += padded_rank(record.bands[b].rank);
    cursor.advance(kHeaderBytes);
    payload.sigma = cursor.advance(sizeof(float) * padded);
  }
  if (record.kind == DW_MIX) {
    cursor.advance(kHeaderBytes);
    const uint64_t weights = record.band_count * static_cast<uint64_t>(record.rows);
    payload.values = cursor.advance(sizeof(float) * weights * parameter.in_features);
    payload.bytes = cursor.at();
    return payload;
  }
  if (record.kind == DW_ROWS) payload.indices = cursor.advance(sizeof(int32_t) * record.rows);
  if (record.kind == DW_VALUES) {
    payload.values = cursor.advance(sizeof(float) * parameter.in_features);
  }
  const int v_groups = group_count(parameter.in_features, parameter.in_offset);
  const int u_groups = group_count(parameter.out_features, parameter.out_offset);
  for (int b = 0; b < record.band_count; ++b) {
    const dw_band& band = record.bands[b];
    BandPlace& to = payload.bands[b];
    to.v = cursor.advance(v_groups * static_cast<uint64_t>(v_group_bytes(band.bits, band.rank)));
    if (has_factors(record)) {
      to.u = cursor.advance(u_groups * static_cast<uint64_t>(u_group_bytes(band.bits, band.rank)));
    }
    if (band.grid == DW_GRID_CODEBOOK) to.levels = cursor.advance(2u << band.bits);
  }
  payload.bytes = cursor.at();
  return payload;
}

void directory_row(const dw_record& record, const dw_parameter& parameter, uint64_t offset,
                   int64_t* row) {
  const Payload payload = place(record, parameter);
  const bool factored = has_factors(record);
  const bool mix = record.kind == DW_MIX;
  const bool values = record.kind == DW_VALUES || (mix && record.band_count > 0);
  std::fill(row, row + DW_DIRECTORY_FIELDS, 0);
  row[DW_FIELD_KIND] = record.kind + 1;
  row[DW_FIELD_BAND_COUNT] = record.band_count;
  row[DW_FIELD_HEADER] = offset;
  row[DW_FIELD_SIGMA] = factored ? offset + payload.sigma : 0;
  row[DW_FIELD_INDICES] = record.kind == DW_ROWS ? offset + payload.indices : 0;
  row[DW_FIELD_VALUES] = values ? offset + payload.values : 0;
  row[DW_FIELD_ROWS] = record.rows;
  row[DW_FIELD_V_GROUP_SIZE] = record.v_group_size;
  row[DW_FIELD_V_GROUP_OFFSET] = record.v_group_offset;
  row[DW_FIELD_U_GROUP_SIZE] = record.u_group_size;
  row[DW_FIELD_U_GROUP_OFFSET] = record.u_group_offset;
  for (int b = 0; b < record.band_count && !mix; ++b) {
    const dw_band& band = record.bands[b];
    int64_t* fields = row + DW_FIELD_BANDS + b * DW_BAND_FIELDS;
    if (factored) row[DW_FIELD_PADDED_RANK] += padded_rank(band.rank);
    fields[DW_BAND_SHAPE] = band.bits | band.grid << 8 | static_cast<int64_t>(band.rank) << 16;
    fields[DW_BAND_V] = offset + payload.bands[b].v;
    fields[DW_BAND_U] = factored ? offset + payload.bands[b].u : 0;
    fields[DW_BAND_LEVELS] = payload.bands[b].levels ? offset + payload.bands[b].levels : 0;
  }
}

}  // namespace dw

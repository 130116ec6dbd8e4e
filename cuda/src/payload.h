// SPDX-License-Identifier: Apache-2.0
// Where each part of a record's payload lies (layout.h says how each part looks inside), and the
// checks that a record is one that the kernels compute.
#ifndef DELTAWEAVE_SRC_PAYLOAD_H_
#define DELTAWEAVE_SRC_PAYLOAD_H_

#include <cstdint>

#include "deltaweave.h"

namespace dw {

struct BandPlace {
  uint64_t v, u, levels;  // byte offsets within the payload; levels 0 without a codebook
};

// Parts that a record's kind lacks lie at 0.
struct Payload {
  uint64_t sigma, indices, values;
  BandPlace bands[DW_MAX_BANDS];
  uint64_t bytes;
};

// Whether a record has factors, sigma and a header: a delta's, or a fusion's experts as its bands.
inline bool has_factors(const dw_record& record) {
  return record.kind == DW_FACTORED || record.kind == DW_LORA;
}

dw_status check_parameter(const dw_parameter& parameter, int index);
// Whether the kernels compute a record that has its own bytes, as the value of parameter `index`
// (its own, or one that shares it). Errors name the parameter; `max_rank` is the arena's.
dw_status check_record(const dw_record& record, const dw_parameter& parameter, int index,
                       int max_rank);

Payload place(const dw_record& record, const dw_parameter& parameter);
// Fills DW_DIRECTORY_FIELDS numbers for a payload at `offset`.
void directory_row(const dw_record& record, const dw_parameter& parameter, uint64_t offset,
                   int64_t* row);

}  // namespace dw

#endif  // DELTAWEAVE_SRC_PAYLOAD_H_

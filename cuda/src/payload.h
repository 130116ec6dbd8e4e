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

struct Payload {
  uint64_t sigma;
  BandPlace bands[DW_MAX_BANDS];
  uint64_t bytes;
};

dw_status check_projection(const dw_projection& projection, int index);
// Errors name the projection; `max_rank` is the arena's.
dw_status check_factors(const dw_factors& factors, int max_rank);

int total_rank(const dw_factors& factors);
Payload place(const dw_factors& factors, const dw_projection& projection);
// Fills DW_DIRECTORY_FIELDS numbers for a payload at `offset`.
void directory_row(const dw_factors& factors, const dw_projection& projection, uint64_t offset,
                   int64_t* row);

}  // namespace dw

#endif  // DELTAWEAVE_SRC_PAYLOAD_H_

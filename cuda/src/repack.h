// SPDX-License-Identifier: Apache-2.0
// What dw_repack's two kernels are told: bands to be rewritten block by block, and the numbers that
// go beside them.
#ifndef DELTAWEAVE_SRC_REPACK_H_
#define DELTAWEAVE_SRC_REPACK_H_

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "deltaweave.h"

namespace dw {

// One band of one factor, from the file to the arena.
struct RepackBand {
  const unsigned char* codes;
  int64_t code_bytes;
  const __half* grid;
  unsigned char* to;
  int bits, rank;
  int features, offset;  // offset: of the first feature within its group of 128
  int groups;            // of 128 features
  int group_size;        // of the grid; 0: one entry for the band
  int group_base;        // elements of the grid's first group that lie before the first of 128
  int grid_groups;
  bool affine, is_u;
  int first_unit;  // a unit is a block of ranks in a group
};

struct RepackBands {
  RepackBand of[2 * DW_MAX_BANDS];
  int count, units;
  const float* header;  // of a factored record: [1] undoes u's power of two
};

// A factor's grid, or its 16-bit values, of one band.
struct RepackRange {
  const __half* values;
  int64_t count;
  bool scales, pairs;  // pairs: (scale, zero)
};

struct RepackNumbers {
  int band_count;
  int rank[DW_MAX_BANDS];
  int top[DW_MAX_BANDS];          // the largest code
  int level_count[DW_MAX_BANDS];  // 0 without a codebook
  __half* levels_to[DW_MAX_BANDS];
  const float *sigma, *levels;
  float* sigma_to;   // null: no sigma, header and ranges
  float* header_to;  // layout.h
  RepackRange v_ranges[DW_MAX_BANDS], u_ranges[DW_MAX_BANDS];
};

cudaError_t launch_repack_numbers(const RepackNumbers& numbers, cudaStream_t stream);
cudaError_t launch_repack_blocks(const RepackBands& bands, cudaStream_t stream);

}  // namespace dw

#endif  // DELTAWEAVE_SRC_REPACK_H_

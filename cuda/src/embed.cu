// SPDX-License-Identifier: Apache-2.0
// Rows of the tenants' embedding tables:
//
//   y[t] = base[id] + scale * (code - zero)   a DENSE record with row id (levels[code] if codebook)
//        = the record's row                   a ROWS record that lists id
//        = base[id]                           otherwise; zeros for an id that the base lacks too
//
//   ids  int64 [tokens]   base  fp16 or bf16 [base_rows, features]   y  the same dtype
//   record  rows in v's order (layout.h): row r is rank r of one band
//
// Roofline: bytes, base row and y once, and the record's row with its seven or fifteen neighbours
// of a block, since a lane's words hold two rows. Nothing beside a step's other kernels; a decode
// step is all latency, so the listed id is searched by a whole warp, 32 probes at a time.
//
// One block of threads a token. A thread takes what one lane of a v block holds of a row: of 128
// features the four octets from 8c.
#include "batch.cuh"
#include "batch_args.h"
#include "fragment.cuh"
#include "kernels.h"
#include "status.h"

namespace dw {
namespace {

constexpr int kBlock = 128;  // threads

// Where a tenant's row of the table lies.
struct TableRow {
  int64_t shape = 0;  // of the band
  const unsigned char* v = nullptr;
  const __half* levels = nullptr;
  int rank = -1;  // the row's place in the band; -1 if the tenant has none
};

// The place of `id` among `count` rising indices, or -1. All lanes of a warp take part.
__device__ __forceinline__ int find_index(const int32_t* indices, int count, int id) {
  int low = 0, high = count;  // the place is in [low, high), if any
  while (high - low > 0) {
    const int step = ceil_div(high - low, 32);
    const int probe = low + static_cast<int>(threadIdx.x % 32) * step;
    const bool reached = probe < high && indices[probe] <= id;
    const int lanes = __popc(__ballot_sync(0xffffffffu, reached));
    if (lanes == 0) return -1;
    low += (lanes - 1) * step;
    high = min(low + step, high);
    if (step == 1) return indices[low] == id ? low : -1;
  }
  return -1;
}

__device__ __forceinline__ TableRow find_table_row(const dw_embedding& args, int token,
                                                   int64_t id) {
  TableRow found;
  const int64_t* row = find_row(args.batch, args.parameter, token);
  if (row == nullptr || id < 0 || id >= DW_MAX_OUT_FEATURES) return found;
  const int64_t kind = row[DW_FIELD_KIND];
  const int rows = static_cast<int>(row[DW_FIELD_ROWS]);
  const unsigned char* arena = find_arena(args.batch);
  if (kind == DW_DENSE + 1) {
    found.rank = id < rows ? static_cast<int>(id) : -1;
  } else if (kind == DW_ROWS + 1) {
    const int32_t* indices = reinterpret_cast<const int32_t*>(arena + row[DW_FIELD_INDICES]);
    found.rank = find_index(indices, rows, static_cast<int>(id));
  }
  if (found.rank < 0) return found;
  const int64_t* band = row + DW_FIELD_BANDS;
  found.shape = band[DW_BAND_SHAPE];
  found.v = arena + band[DW_BAND_V];
  found.levels = reinterpret_cast<const __half*>(arena + band[DW_BAND_LEVELS]);
  return found;
}

// One lane's codes of one row in one block, and the row's grid there.
template <int kBits, bool kLevels>
struct LaneCodes {
  uint32_t words[2 * kBits];
  float scale = 1.f, zero = 0.f;
  bool odd;
  const __half* levels;

  __device__ __forceinline__ LaneCodes(const TableRow& from, int groups, int group, int c)
      : odd(from.rank % 2 != 0), levels(from.levels) {
    const int block = from.rank / block_ranks(kBits), rank = from.rank % block_ranks(kBits);
    const int ranks = min(band_rank(from.shape) - block * block_ranks(kBits), block_ranks(kBits));
    const unsigned char* at = from.v +
                              static_cast<int64_t>(block) * groups * whole_block_bytes(kBits) +
                              static_cast<int64_t>(group) * v_block_bytes(kBits, ranks);
    load_words<kBits>(words, at, rank / 2 * 4 + c, 4 * ceil_div(ranks, 2));
    if constexpr (kBits != 16) {
      const float2 entry =
          __half22float2(reinterpret_cast<const __half2*>(at + v_code_bytes(kBits, ranks))[rank]);
      scale = entry.x;
      zero = entry.y;
    }
  }

  // Values 2p and 2p + 1 of octet i (features 32i + 8c ..).
  __device__ __forceinline__ float2 pair(int i, int p) const {
    const int j = 4 * (2 * i + p / 2) + 2 * (p % 2);  // of an even rank; an odd one's is the next
    const uint32_t located = odd ? locate<kBits>(words, j + 1) : locate<kBits>(words, j);
    if constexpr (kBits == 16) {
      return __half22float2(pair_of(located));
    } else {
      constexpr uint32_t kMask = (1u << kBits) - 1;
      const int position = spot<kBits>(j).position();
      return make_float2(value(located >> position & kMask),
                         value(located >> (position + 16) & kMask));
    }
  }

  __device__ __forceinline__ float value(uint32_t code) const {
    if constexpr (kLevels) return scale * __half2float(levels[code]);
    return scale * (static_cast<float>(code) - zero);
  }
};

// Adds (or, at 16 bits, puts in place) the tenant's values of a lane's four octets.
template <int kBits, bool kLevels>
__device__ __forceinline__ void apply_row(const TableRow& from, int groups, int group, int c,
                                          float (&octets)[4][8]) {
  const LaneCodes<kBits, kLevels> codes(from, groups, group, c);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
#pragma unroll
    for (int p = 0; p < 4; ++p) {
      const float2 values = codes.pair(i, p);
      octets[i][2 * p] = values.x + (kBits == 16 ? 0.f : octets[i][2 * p]);
      octets[i][2 * p + 1] = values.y + (kBits == 16 ? 0.f : octets[i][2 * p + 1]);
    }
  }
}

template <typename T>
__global__ void __launch_bounds__(kBlock) embed_kernel(const __grid_constant__ dw_embedding args) {
  const int token = blockIdx.x;
  const int64_t id = args.ids[token];
  const TableRow from = find_table_row(args, token, id);
  const bool in_base = id >= 0 && id < args.base_rows;
  const T* base = static_cast<const T*>(args.table) + (in_base ? id * args.table_stride : 0);
  T* y = static_cast<T*>(args.y) + token * args.y_stride;
  const int groups = group_count(args.features, args.in_offset);
  for (int index = threadIdx.x; index < 4 * groups; index += kBlock) {
    const int group = index / 4, c = index % 4;
    const int first = group * kGroup + 8 * c - args.in_offset;
    float octets[4][8] = {};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (in_base) load_octet(base, first + 32 * i, args.features, octets[i]);
    }
    if (from.rank >= 0) {
      const bool levels = band_grid(from.shape) == DW_GRID_CODEBOOK;
      dispatch(band_bits(from.shape), levels, [&]<int kBits, bool kLevels>() {
        apply_row<kBits, kLevels>(from, groups, group, c, octets);
      });
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) store_octet(y, first + 32 * i, args.features, octets[i]);
  }
}

template <typename T>
cudaError_t launch(const dw_embedding& args, cudaStream_t stream) {
  embed_kernel<T><<<args.batch.token_count, kBlock, 0, stream>>>(args);
  return cudaGetLastError();
}

}  // namespace
}  // namespace dw

dw_status dw_embed(const dw_embedding* args, void* stream_pointer) {
  if (args == nullptr) return dw::fail(DW_ERROR_ARGUMENT, "null argument");
  DW_RETURN_IF_ERROR(dw::check_embedding(*args));
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_pointer);
  return dw::check_launch(args->batch.dtype == DW_BFLOAT16
                              ? dw::launch<__nv_bfloat16>(*args, stream)
                              : dw::launch<__half>(*args, stream),
                          "dw_embed");
}

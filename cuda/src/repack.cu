// SPDX-License-Identifier: Apache-2.0
// File order to kernel order, once per tenant.
//
//   codes  bands at multiples of 16 bytes, rows of little-endian bit streams (SPEC.md, "Codes") ->
//   blocks (layout.h) grid   fp16 [rank, groups, 2] affine or [rank, groups] codebook, or one entry
//   a band          ->  in the blocks sigma  float [rank]  ->  float, every band padded to 16 by
//   zeros       levels  float  ->  fp16
//
// One warp a block, one thread a lane's 64 codes, gathered into registers and written as whole
// vectors. Reads and writes every byte once (reads through L1, code by code); it runs at load,
// beside serving.
#include <cuda_fp16.h>

#include "batch_args.h"
#include "fragment.cuh"
#include "kernels.h"
#include "payload.h"
#include "status.h"

namespace dw {
namespace {

// One band of one factor.
struct Band {
  const unsigned char* codes;
  const __half* grid;
  unsigned char* to;
  int rank, features, offset;  // offset: of the first feature within its group of 128
  int blocks, groups;          // of 128 features
  int group_size;              // 0: one entry for the band
  int group_base, grid_groups;
  bool affine;
  float* largest;  // scale, for u; else null
};

template <int kBits>
__device__ __forceinline__ uint32_t read_code(const Band& band, int rank, int feature) {
  if (rank >= band.rank || feature < 0 || feature >= band.features) return 0;
  if constexpr (kBits == 16) {
    const int64_t index = static_cast<int64_t>(rank) * band.features + feature;
    return reinterpret_cast<const uint16_t*>(band.codes)[index];
  }
  const int64_t row_bytes = (static_cast<int64_t>(kBits) * band.features + 7) / 8;
  const int bit = kBits * feature;
  const unsigned char* at = band.codes + rank * row_bytes + bit / 8;
  uint32_t raw = at[0];
  if (bit % 8 + kBits > 8) raw |= static_cast<uint32_t>(at[1]) << 8;
  return raw >> bit % 8 & ((1u << kBits) - 1);
}

// The inverse of locate() in fragment.cuh.
template <int kBits>
__device__ __forceinline__ void place_pair(uint32_t (&words)[2 * kBits], int j, uint32_t low,
                                           uint32_t high) {
  const uint32_t pair = low | high << 16;
  if (kBits == 3 && j >= 30) {
#pragma unroll
    for (int i = 0; i < 3; ++i) words[3 * (j - 30) + i] |= (pair >> i & 0x00010001u) << 15;
    return;
  }
  const Spot at = spot<kBits>(j);
  words[at.word] |= pair << at.bit;
}

template <int kBits>
__device__ __forceinline__ void store_words(const uint32_t (&words)[2 * kBits],
                                            unsigned char* block, int lane, int lanes) {
  constexpr int kVectors = kBits / 2;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    *reinterpret_cast<uint4*>(block + (v * lanes + lane) * 16) =
        make_uint4(words[4 * v], words[4 * v + 1], words[4 * v + 2], words[4 * v + 3]);
  }
  if constexpr (kBits % 2 == 1) {
    *reinterpret_cast<uint2*>(block + kVectors * lanes * 16 + lane * 8) =
        make_uint2(words[4 * kVectors], words[4 * kVectors + 1]);
  }
}

template <int kBits>
__device__ void store_grid(const Band& band, int first_rank, int group, int slots,
                           unsigned char* to) {
  const int slot = threadIdx.x % 32;
  if (slot >= slots) return;
  __half scale = __ushort_as_half(0), zero = scale;
  const int rank = first_rank + slot;
  if (rank < band.rank) {
    int64_t entry = 0;
    if (band.group_size > 0) {
      entry = static_cast<int64_t>(rank) * band.grid_groups +
              (group * kGroup + band.group_base) / band.group_size;
    }
    scale = band.grid[band.affine ? 2 * entry : entry];
    if (band.affine) zero = band.grid[2 * entry + 1];
    if (band.largest != nullptr) {
      const float magnitude = fabsf(__half2float(scale));
      atomicMax(reinterpret_cast<int*>(band.largest), __float_as_int(magnitude));
    }
  }
  reinterpret_cast<__half2*>(to)[slot] = __halves2half2(scale, zero);
}

template <int kBits, bool kIsV>
__global__ void __launch_bounds__(kThreads) repack_kernel(const Band band) {
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (unit >= static_cast<int64_t>(band.blocks) * band.groups) return;
  const int block = static_cast<int>(kIsV ? unit / band.groups : unit % band.blocks);
  const int group = static_cast<int>(kIsV ? unit % band.groups : unit / band.blocks);
  const int first = block * block_ranks(kBits);
  const int ranks = min(band.rank - first, block_ranks(kBits));
  const int q = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  const int present = kIsV ? ceil_div(ranks, 2) : ceil_div(ranks, 4);
  const int64_t whole = whole_block_bytes(kBits);
  unsigned char* to =
      band.to +
      (kIsV ? block * whole * band.groups + group * v_block_bytes(kBits, ranks)
            : group * static_cast<int64_t>(u_group_bytes(kBits, band.rank)) + block * whole);
  const int feature0 = group * kGroup - band.offset;
  if ((kIsV ? q : c) < present) {
    uint32_t words[2 * kBits] = {};
#pragma unroll
    for (int j = 0; j < 32; ++j) {
      const int f = j / 4, r = j % 4;
      uint32_t codes[2];
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int rank = kIsV ? 2 * q + (r & 1) : 4 * c + 2 * (r >> 1) + half;
        const int feature = kIsV ? 32 * (f / 2) + 8 * c + 4 * (f % 2) + 2 * (r >> 1) + half
                                 : 16 * q + 2 * f + (r & 1);
        codes[half] = read_code<kBits>(band, first + rank, feature0 + feature);
      }
      place_pair<kBits>(words, j, codes[0], codes[1]);
    }
    store_words<kBits>(words, to, kIsV ? 4 * q + c : q * present + c,
                       kIsV ? 4 * present : 8 * present);
  }
  if constexpr (kBits != 16) {
    const int code_bytes = kIsV ? v_code_bytes(kBits, ranks) : u_code_bytes(kBits, ranks);
    store_grid<kBits>(band, first, group, ceil_div(ranks, 4) * 4, to + code_bytes);
  }
}

__global__ void sigma_kernel(const float* sigma, int rank, int padded, float* to) {
  const int r = blockIdx.x * blockDim.x + threadIdx.x;
  if (r < padded) to[r] = r < rank ? sigma[r] : 0.f;
}

__global__ void levels_kernel(const float* levels, __half* to) {
  to[threadIdx.x] = __float2half_rn(levels[threadIdx.x]);
}

__global__ void header_kernel(float* header, float largest) {
  header[threadIdx.x] = threadIdx.x == 0 ? largest : 0.f;
}

template <bool kIsV>
void launch_band(int bits, const Band& band, cudaStream_t stream) {
  const int64_t units = static_cast<int64_t>(band.blocks) * band.groups;
  const int grid = static_cast<int>((units + kWarps - 1) / kWarps);
  const auto launch = [&]<int kBits>() {
    repack_kernel<kBits, kIsV><<<grid, kThreads, 0, stream>>>(band);
  };
  if (bits == 1) launch.template operator()<1>();
  if (bits == 2) launch.template operator()<2>();
  if (bits == 3) launch.template operator()<3>();
  if (bits == 4) launch.template operator()<4>();
  if (bits == 8) launch.template operator()<8>();
  if (bits == 16) launch.template operator()<16>();
}

// Walks a factor's bands in file order.
template <bool kIsV>
cudaError_t repack_factor(const dw_repack_args& args, const Payload& payload, cudaStream_t stream) {
  const dw_record& factors = args.record;
  unsigned char* base = static_cast<unsigned char*>(args.payload);
  int64_t code_at = 0, grid_at = 0;
  Band band = {};
  band.features = kIsV ? args.parameter.in_features : args.parameter.out_features;
  band.offset = kIsV ? args.parameter.in_offset : args.parameter.out_offset;
  band.groups = group_count(band.features, band.offset);
  band.group_size = kIsV ? factors.v_group_size : factors.u_group_size;
  const int group_offset = kIsV ? factors.v_group_offset : factors.u_group_offset;
  band.group_base = group_offset - band.offset;
  band.grid_groups =
      band.group_size > 0 ? ceil_div(band.features + group_offset, band.group_size) : 1;
  band.largest = kIsV ? nullptr : static_cast<float*>(args.payload);
  for (int b = 0; b < factors.band_count; ++b) {
    const dw_band& shape = factors.bands[b];
    band.rank = shape.rank;
    band.blocks = block_count(shape.bits, shape.rank);
    band.affine = shape.grid == DW_GRID_AFFINE;
    code_at = round_up(code_at, 16);
    band.codes = static_cast<const unsigned char*>(kIsV ? args.v_codes : args.u_codes) + code_at;
    band.grid = static_cast<const __half*>(kIsV ? args.v_grid : args.u_grid) + grid_at;
    band.to = base + (kIsV ? payload.bands[b].v : payload.bands[b].u);
    launch_band<kIsV>(shape.bits, band, stream);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return error;
    code_at += shape.rank * ((static_cast<int64_t>(shape.bits) * band.features + 7) / 8);
    if (shape.bits == 16) continue;
    const int64_t entries =
        band.group_size > 0 ? static_cast<int64_t>(shape.rank) * band.grid_groups : 1;
    grid_at += entries * (band.affine ? 2 : 1);
  }
  return cudaSuccess;
}

cudaError_t repack_small(const dw_repack_args& args, const Payload& payload, cudaStream_t stream) {
  const dw_record& factors = args.record;
  unsigned char* base = static_cast<unsigned char*>(args.payload);
  float largest = 0.f;
  const float* sigma = args.sigma;
  const float* levels = args.levels;
  float* to = reinterpret_cast<float*>(base + payload.sigma);
  for (int b = 0; b < factors.band_count; ++b) {
    const dw_band& shape = factors.bands[b];
    const int padded = padded_rank(shape.rank);
    if (shape.bits == 16) largest = 1.f;
    sigma_kernel<<<ceil_div(padded, kThreads), kThreads, 0, stream>>>(sigma, shape.rank, padded,
                                                                      to);
    sigma += shape.rank;
    to += padded;
    if (shape.grid != DW_GRID_CODEBOOK) continue;
    levels_kernel<<<1, 1 << shape.bits, 0, stream>>>(
        levels, reinterpret_cast<__half*>(base + payload.bands[b].levels));
    levels += 1 << shape.bits;
  }
  header_kernel<<<1, kHeaderBytes / sizeof(float), 0, stream>>>(reinterpret_cast<float*>(base),
                                                                largest);
  return cudaGetLastError();
}

}  // namespace
}  // namespace dw

dw_status dw_repack(const dw_repack_args* args, void* stream_pointer) {
  if (args == nullptr) return dw::fail(DW_ERROR_ARGUMENT, "null argument");
  DW_RETURN_IF_ERROR(dw::check_repack(*args));
  const dw::Payload payload = dw::place(args->record, args->parameter);
  if (args->payload_bytes < payload.bytes) {
    return dw::fail(DW_ERROR_ARGUMENT, "payload of ", args->payload_bytes, " bytes, needed ",
                    payload.bytes);
  }
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_pointer);
  DW_RETURN_IF_ERROR(dw::check_launch(dw::repack_small(*args, payload, stream), "repack"));
  DW_RETURN_IF_ERROR(dw::check_launch(dw::repack_factor<true>(*args, payload, stream), "repack v"));
  return dw::check_launch(dw::repack_factor<false>(*args, payload, stream), "repack u");
}

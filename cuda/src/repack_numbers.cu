// SPDX-License-Identifier: Apache-2.0
// What goes beside a record's blocks: sigma, levels, and the header of u's scales.
//
//   sigma   float [rank]  ->  float, every band padded to 16 by zeros
//   levels  float  ->  fp16
//   header  float[64]: [0] the largest |scale| of u as stored, 1 for a 16-bit band; [1] 2^-s, where
//           2^s brings the largest of u's scales and 16-bit values into [2^6, 2^7); [2] a bound on
//           |sigma * v|; [8..15] what [0] is of all of each band (layout.h)
//
// One block of threads, before the blocks' kernel, which needs 2^s. It reads both grids once, by
// one multiprocessor: 0.26 MB of a 4096 x 4096 of rank 1002, 0.6 MB of an 11008 x 4096.
#include "layout.h"
#include "repack.h"

namespace dw {
namespace {

constexpr int kNumberThreads = 1024;
constexpr int kTarget = 6;  // exponent of the largest

// The larger of `largest` and the magnitude of a half, both as its bits; infinities and NaN count
// as nothing.
__device__ __forceinline__ uint32_t larger(uint32_t largest, uint32_t half) {
  const uint32_t magnitude = half & 0x7fffu;
  return magnitude < 0x7c00u ? max(largest, magnitude) : largest;
}

// The largest magnitudes of a range, as bits of halves: of all, or of scales and of zeros.
struct Largest {
  uint32_t value, zero;
};

// This thread's share of a range, 16 bytes at a time where it is aligned.
__device__ Largest largest_of(const RepackRange& range) {
  const bool aligned = reinterpret_cast<uintptr_t>(range.values) % 16 == 0;
  const int64_t vectors = aligned ? range.count / 8 : 0;
  const uint4* wide = reinterpret_cast<const uint4*>(range.values);
  uint32_t even = 0, odd = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < vectors; i += kNumberThreads) {
    const uint4 raw = wide[i];
    for (const uint32_t pair : {raw.x, raw.y, raw.z, raw.w}) {
      even = larger(even, pair);
      odd = larger(odd, pair >> 16);
    }
  }
  const unsigned short* narrow = reinterpret_cast<const unsigned short*>(range.values);
  for (int64_t i = 8 * vectors + threadIdx.x; i < range.count; i += kNumberThreads) {
    uint32_t& largest = i % 2 == 0 ? even : odd;
    largest = larger(largest, narrow[i]);
  }
  return range.pairs ? Largest{even, odd} : Largest{max(even, odd), 0};
}

// Of all threads; all of them call it.
__device__ uint32_t block_largest(uint32_t own) {
  __shared__ uint32_t largest;
  if (threadIdx.x == 0) largest = 0;
  __syncthreads();
  own = __reduce_max_sync(0xffffffffu, own);
  if (threadIdx.x % 32 == 0) atomicMax(&largest, own);
  __syncthreads();
  own = largest;
  __syncthreads();
  return own;
}

__device__ __forceinline__ float half_value(uint32_t bits) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

// At least |sigma * v| of a band: the products of the largest of each factor, so that it costs no
// pass over codes.
__device__ float bound_of(const RepackNumbers& numbers, int b, const float* sigma,
                          const float* levels) {
  float own = 0.f;
  for (int r = threadIdx.x; r < numbers.rank[b]; r += kNumberThreads) {
    own = fmaxf(own, fabsf(sigma[r]));
  }
  const float largest_sigma = __uint_as_float(block_largest(__float_as_uint(own)));
  const RepackRange& range = numbers.v_ranges[b];
  const Largest largest = largest_of(range);
  const float value = half_value(block_largest(largest.value));
  const float zero = half_value(block_largest(largest.zero));
  float code = 1.f;  // the largest magnitude that a scale is multiplied with
  if (numbers.level_count[b] > 0) {
    own = threadIdx.x < numbers.level_count[b] ? fabsf(levels[threadIdx.x]) : 0.f;
    code = __uint_as_float(block_largest(__float_as_uint(own)));
  } else if (range.scales) {
    code = numbers.top[b] + zero;
  }
  return largest_sigma * value * code;
}

// `largest`: of a band's scales or 16-bit values, as bits of a half.
__device__ void write_header(float* header, const RepackNumbers& numbers,
                             const uint32_t (&largest)[DW_MAX_BANDS]) {
  float most = 0.f;
  for (int b = 0; b < numbers.band_count; ++b) most = fmaxf(most, half_value(largest[b]));
  const int shift = most > 0.f ? kTarget - ilogbf(most) : 0;
  for (int b = 0; b < numbers.band_count; ++b) {
    const bool scales = numbers.u_ranges[b].scales;
    const float scale = scales ? half_value(largest[b]) * ldexpf(1.f, shift) : 1.f;
    header[kHeaderBands + b] = scale;
    header[0] = fmaxf(header[0], scale);
  }
  header[1] = ldexpf(1.f, -shift);
}

__device__ void copy_sigma(const RepackNumbers& numbers) {
  const float* from = numbers.sigma;
  float* to = numbers.sigma_to;
  for (int b = 0; b < numbers.band_count; ++b) {
    const int rank = numbers.rank[b], padded = padded_rank(rank);
    for (int r = threadIdx.x; r < padded; r += kNumberThreads) to[r] = r < rank ? from[r] : 0.f;
    from += rank;
    to += padded;
  }
}

__global__ void __launch_bounds__(kNumberThreads)
    repack_numbers_kernel(const __grid_constant__ RepackNumbers numbers) {
  const float* levels = numbers.levels;
  for (int b = 0; b < numbers.band_count; ++b) {
    const int count = numbers.level_count[b];
    if (threadIdx.x < count) {
      numbers.levels_to[b][threadIdx.x] = __float2half_rn(levels[threadIdx.x]);
    }
    levels += count;
  }
  if (numbers.sigma_to == nullptr) return;
  copy_sigma(numbers);
  if (threadIdx.x < kHeaderBytes / sizeof(float)) numbers.header_to[threadIdx.x] = 0.f;
  uint32_t largest[DW_MAX_BANDS];
  for (int b = 0; b < numbers.band_count; ++b) {
    largest[b] = block_largest(largest_of(numbers.u_ranges[b]).value);
  }
  float bound = 0.f;
  const float* sigma = numbers.sigma;
  levels = numbers.levels;
  for (int b = 0; b < numbers.band_count; ++b) {
    bound = fmaxf(bound, bound_of(numbers, b, sigma, levels));
    sigma += numbers.rank[b];
    levels += numbers.level_count[b];
  }
  if (threadIdx.x > 0) return;
  write_header(numbers.header_to, numbers, largest);
  numbers.header_to[2] = bound;
}

}  // namespace

cudaError_t launch_repack_numbers(const RepackNumbers& numbers, cudaStream_t stream) {
  repack_numbers_kernel<<<1, kNumberThreads, 0, stream>>>(numbers);
  return cudaGetLastError();
}

}  // namespace dw

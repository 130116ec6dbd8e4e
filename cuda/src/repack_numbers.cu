// SPDX-License-Identifier: Apache-2.0
// What goes beside a record's blocks: sigma, levels, and the header of u's scales.
//
//   sigma   float [rank]  ->  float, every band padded to 16 by zeros
//   levels  float  ->  fp16
//   header  float[64]: [0] the largest |scale| of u as stored, 1 for a 16-bit band; [1] 2^-s, where
//           2^s brings the largest of u's scales and 16-bit values into [2^6, 2^7) (layout.h)
//
// One block of threads, before the blocks' kernel, which needs 2^s. It reads u's grid once, by one
// multiprocessor: 0.13 MB of a 4096 x 4096 of rank 1002, 0.5 MB of an 11008 x 4096.
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

// This thread's share of a range, 16 bytes at a time where it is aligned.
__device__ uint32_t largest_of(const RepackRange& range) {
  const bool aligned = reinterpret_cast<uintptr_t>(range.values) % 16 == 0;
  const int64_t vectors = aligned ? range.count / 8 : 0;
  const uint4* wide = reinterpret_cast<const uint4*>(range.values);
  const bool both = range.step == 1;
  uint32_t largest = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < vectors; i += kNumberThreads) {
    const uint4 raw = wide[i];
    for (const uint32_t pair : {raw.x, raw.y, raw.z, raw.w}) {
      largest = larger(largest, pair);
      if (both) largest = larger(largest, pair >> 16);
    }
  }
  const unsigned short* narrow = reinterpret_cast<const unsigned short*>(range.values);
  for (int64_t i = 8 * vectors + threadIdx.x * range.step; i < range.count;
       i += kNumberThreads * range.step) {
    largest = larger(largest, narrow[i]);
  }
  return largest;
}

__device__ void write_header(float* header, uint32_t scale_bits, uint32_t value_bits, bool values) {
  const float scale = __half2float(__ushort_as_half(scale_bits));
  const float value = __half2float(__ushort_as_half(value_bits));
  const float largest = fmaxf(scale, value);
  const int shift = largest > 0.f ? kTarget - ilogbf(largest) : 0;
  header[0] = fmaxf(scale * ldexpf(1.f, shift), values ? 1.f : 0.f);
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
  __shared__ uint32_t largest[2];  // of the values, of the scales
  if (threadIdx.x < 2) largest[threadIdx.x] = 0;
  if (threadIdx.x < kHeaderBytes / sizeof(float)) numbers.header_to[threadIdx.x] = 0.f;
  __syncthreads();
  bool values = false;
  for (int b = 0; b < numbers.band_count; ++b) {
    const RepackRange& range = numbers.ranges[b];
    const uint32_t own = __reduce_max_sync(0xffffffffu, largest_of(range));
    if (threadIdx.x % 32 == 0) atomicMax(&largest[range.scales], own);
    values |= !range.scales;
  }
  __syncthreads();
  if (threadIdx.x == 0) write_header(numbers.header_to, largest[1], largest[0], values);
}

}  // namespace

cudaError_t launch_repack_numbers(const RepackNumbers& numbers, cudaStream_t stream) {
  repack_numbers_kernel<<<1, kNumberThreads, 0, stream>>>(numbers);
  return cudaGetLastError();
}

}  // namespace dw

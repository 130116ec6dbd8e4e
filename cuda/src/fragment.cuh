// SPDX-License-Identifier: Apache-2.0
// What one warp does with one block of codes (layout.h): copy it to shared memory, unpack it to
// fragments of packed halves, multiply. Unpacking is one bitwise select a pair: a code at mantissa
// position p under the exponent whose unit sits at p reads as 2^(10-p) + code, and one packed
// subtraction leaves code - center, exactly.
#ifndef DELTAWEAVE_SRC_FRAGMENT_CUH_
#define DELTAWEAVE_SRC_FRAGMENT_CUH_

#include <cuda_fp16.h>

#include <cstdint>

#include "layout.h"

namespace dw {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// 16 bytes, past L1; zeros instead if !valid.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// A block (a multiple of 16 bytes) by the whole warp.
__device__ __forceinline__ void copy_block(unsigned char* to, const unsigned char* from, int bytes,
                                           int lane) {
  for (int at = lane * 16; at < bytes; at += 32 * 16) copy_async(to + at, from + at);
}

// d += a * b, m16n8k16. Lane 4q+c holds of d rows q and q+8, columns 2c and 2c+1.
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint32_t bits_of(__half2 pair) {
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ __forceinline__ __half2 pair_of(uint32_t bits) {
  return *reinterpret_cast<const __half2*>(&bits);
}

// Where pair j of a lane lies: word, and position of the low code (the high one is 16 bits
// further). For 3 bits five pairs fill 15 of a word's 16 bits, and the spare bits of three words
// make pairs 30 and 31.
template <int kBits>
struct Place {
  static constexpr int kPairs = 16 / kBits;  // a word
  static constexpr int kShift = kBits == 4 || kBits == 8 ? 8 : 6;
  static constexpr int kDirect = kBits == 8 ? 0 : 10 - kBits;  // highest position inside a mantissa
};

// Isolates pair j: its codes at the returned position of both halves, other bits present.
template <int kBits>
__device__ __forceinline__ uint32_t locate(const uint32_t* words, int j, int& position) {
  if (kBits == 3 && j >= 30) {
    const uint32_t* spare = words + 3 * (j - 30);
    position = 0;
    return (spare[0] >> 15 & 0x00010001u) | (spare[1] >> 14 & 0x00020002u) |
           (spare[2] >> 13 & 0x00040004u);
  }
  const uint32_t word = words[j / Place<kBits>::kPairs];
  position = kBits * (j % Place<kBits>::kPairs);
  if (position <= Place<kBits>::kDirect) return word;
  position -= Place<kBits>::kShift;
  return word >> Place<kBits>::kShift;
}

// Pair j as two halves: code - center, or levels[code] if kLevels, or the value itself at 16 bits.
template <int kBits, bool kLevels>
__device__ __forceinline__ uint32_t unpack(const uint32_t* words, int j, const __half* levels) {
  if constexpr (kBits == 16) {
    return words[j];
  } else {
    int position;
    const uint32_t located = locate<kBits>(words, j, position);
    constexpr uint32_t kMask = (1u << kBits) - 1;
    if constexpr (kLevels) {
      const uint32_t low = located >> position & kMask, high = located >> (position + 16) & kMask;
      return bits_of(__halves2half2(levels[low], levels[high]));
    } else {
      const uint32_t exponent = static_cast<uint32_t>(25 - position) << 10;
      const uint32_t biased =
          (located & (kMask << position) * 0x00010001u) | exponent * 0x00010001u;
      const __half2 bias =
          __half2half2(__ushort2half_rn((1 << (10 - position)) + center_of(kBits)));
      return bits_of(__hsub2(pair_of(biased), bias));
    }
  }
}

// A lane's 2 * kBits words of a block in shared memory; `lanes` lanes are present.
template <int kBits>
__device__ __forceinline__ void load_words(uint32_t (&words)[2 * kBits], const unsigned char* block,
                                           int lane, int lanes) {
  constexpr int kVectors = kBits / 2;
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    const uint4 vector = *reinterpret_cast<const uint4*>(block + (v * lanes + lane) * 16);
    words[4 * v] = vector.x;
    words[4 * v + 1] = vector.y;
    words[4 * v + 2] = vector.z;
    words[4 * v + 3] = vector.w;
  }
  if constexpr (kBits % 2 == 1) {
    const uint2 vector = *reinterpret_cast<const uint2*>(block + kVectors * lanes * 16 + lane * 8);
    words[4 * kVectors] = vector.x;
    words[4 * kVectors + 1] = vector.y;
  }
}

// The four registers of fragment f.
template <int kBits, bool kLevels>
__device__ __forceinline__ void fragment(uint32_t (&a)[4], const uint32_t (&words)[2 * kBits],
                                         int f, const __half* levels) {
#pragma unroll
  for (int r = 0; r < 4; ++r) a[r] = unpack<kBits, kLevels>(words, 4 * f + r, levels);
}

// (scale, zero - center) of the four bytes at `grid`; 16-bit bands have (1, 0).
template <int kBits, bool kLevels>
__device__ __forceinline__ float2 grid_entry(uint32_t grid) {
  const float2 entry = __half22float2(pair_of(grid));
  return make_float2(entry.x, kLevels ? 0.f : entry.y - static_cast<float>(center_of(kBits)));
}

// A power of two that brings `largest` into [2^13, 2^14): products of fp16 operands then neither
// overflow nor lose bits that matter. 1 for zeros, infinities and NaN, and for magnitudes no finite
// fp16 model has.
__device__ __forceinline__ float normalizer(float largest) {
  const int exponent = static_cast<int>(__float_as_uint(largest) >> 23 & 255) - 127;
  if (exponent < -100 || exponent > 100) return 1.f;
  return __uint_as_float(static_cast<uint32_t>(13 - exponent + 127) << 23);
}

// Calls body.template operator()<bits, is codebook>() for a band's shape.
template <typename Body>
__device__ __forceinline__ void dispatch(int bits, bool levels, Body&& body) {
  if (bits == 2 && !levels) return body.template operator()<2, false>();
  if (bits == 3 && !levels) return body.template operator()<3, false>();
  if (bits == 8 && !levels) return body.template operator()<8, false>();
  if (bits == 4 && !levels) return body.template operator()<4, false>();
  if (bits == 1 && !levels) return body.template operator()<1, false>();
  if (bits == 16) return body.template operator()<16, false>();
  if (bits == 1) return body.template operator()<1, true>();
  if (bits == 2) return body.template operator()<2, true>();
  if (bits == 3) return body.template operator()<3, true>();
  if (bits == 4) return body.template operator()<4, true>();
  return body.template operator()<8, true>();
}

}  // namespace dw

#endif  // DELTAWEAVE_SRC_FRAGMENT_CUH_

// SPDX-License-Identifier: Apache-2.0
// What one warp does with one block of codes (layout.h) in shared memory: unpack it to fragments of
// packed halves and multiply. Unpacking is one bitwise select a pair: a code at mantissa position p
// under the exponent whose unit sits at p reads as 2^(10-p) + code. That bias is not subtracted
// from the weights but from the sums: one more product, with the biases for weights, gives what all
// rows must lose (a matrix of pairs j has the same bias in every row).
#ifndef DELTAWEAVE_SRC_FRAGMENT_CUH_
#define DELTAWEAVE_SRC_FRAGMENT_CUH_

#include <cuda_fp16.h>

#include <cstdint>

#include "layout.h"

namespace dw {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;

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

// Where pair j of a lane lies: word, bit of the low code (the high one is 16 further), and the
// shift that brings it to a mantissa position with a small bias. Pairs j and j + 1 (j even) share
// that position.
struct Spot {
  int word, bit, shift;  // shift > 0: to the right
  DW_HD constexpr int position() const { return bit - shift; }
};

template <int kBits>
DW_HD constexpr Spot spot(int j) {
  if (kBits == 1) {
    constexpr int kBit[16] = {4, 10, 5, 11, 6, 12, 7, 13, 8, 14, 9, 15, 0, 1, 2, 3};
    constexpr int kShift[16] = {0, 6, 0, 6, 0, 6, 0, 6, 0, 6, 0, 6, -6, -5, -6, -5};
    return {j / 16, kBit[j % 16], kShift[j % 16]};
  }
  if (kBits == 2) {
    constexpr int kBit[8] = {4, 10, 6, 12, 8, 14, 0, 2};
    constexpr int kShift[8] = {0, 6, 0, 6, 0, 6, -8, -6};
    return {j / 8, kBit[j % 8], kShift[j % 8]};
  }
  if (kBits == 3) {  // ten pairs fill two words but for bits 15 and 31, where pairs 30 and 31 lie
                     // (spare_pair)
    constexpr int kBit[10] = {3, 9, 6, 12, 3, 9, 6, 12, 0, 0};
    constexpr int kShift[10] = {0, 6, 0, 6, 0, 6, 0, 6, -6, -6};
    constexpr int kWord[10] = {0, 0, 0, 0, 1, 1, 1, 1, 0, 1};
    return j < 30 ? Spot{2 * (j / 10) + kWord[j % 10], kBit[j % 10], kShift[j % 10]}
                  : Spot{0, 0, -6};
  }
  if (kBits == 16) return {j, 0, 0};
  if (kBits == 4) return {j / 4, 4 * (j % 4), 4 * (j % 4) - 4};
  return {j / 2, 8 * (j % 2), 8 * (j % 2)};
}

// Pair j's codes at spot<kBits>(j).position() of both halves, other bits present.
template <int kBits>
__device__ __forceinline__ uint32_t locate(const uint32_t* words, int j) {
  if (kBits == 3 && j >= 30) {
    const uint32_t* spare = words + 3 * (j - 30);
    return (spare[0] >> 9 & 0x00400040u) | (spare[1] >> 8 & 0x00800080u) |
           (spare[2] >> 7 & 0x01000100u);
  }
  const Spot at = spot<kBits>(j);
  return at.shift >= 0 ? words[at.word] >> at.shift : words[at.word] << -at.shift;
}

// (bits & mask) | exponent in one instruction: the compiler splits it when both are constants.
__device__ __forceinline__ uint32_t select(uint32_t bits, uint32_t mask, uint32_t exponent) {
  uint32_t selected;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(selected) : "r"(bits), "r"(mask), "r"(exponent));
  return selected;
}

// Whether a band's codes are read with a bias: 16-bit values are not codes, levels are looked up.
template <int kBits, bool kLevels>
constexpr bool kBiased = kBits != 16 && !kLevels;

// What unpack() adds to both codes of pair j, as two halves: 2^(10 - position).
template <int kBits>
DW_HD constexpr uint32_t bias_pair(int j) {
  return static_cast<uint32_t>(25 - spot<kBits>(j).position()) << 10 |
         static_cast<uint32_t>(25 - spot<kBits>(j).position()) << 26;
}

// Pair j as two halves: code + bias, or levels[code] if kLevels, or the value itself at 16 bits.
template <int kBits, bool kLevels>
__device__ __forceinline__ uint32_t unpack(const uint32_t* words, int j, const __half* levels) {
  if constexpr (kBits == 16) {
    return words[j];
  } else {
    const uint32_t located = locate<kBits>(words, j);
    const int position = spot<kBits>(j).position();
    constexpr uint32_t kMask = (1u << kBits) - 1;
    if constexpr (kLevels) {
      const uint32_t low = located >> position & kMask, high = located >> (position + 16) & kMask;
      return bits_of(__halves2half2(levels[low], levels[high]));
    } else {
      return select(located, (kMask << position) * 0x00010001u, bias_pair<kBits>(j));
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

// A power of two that brings `largest` into [2^kTop, 2^(kTop + 1)): fp16 operands then neither
// overflow nor lose bits that matter. 1 for zeros, infinities and NaN, and for magnitudes no finite
// fp16 model has.
template <int kTop>
__device__ __forceinline__ float normalizer(float largest) {
  const int exponent = static_cast<int>(__float_as_uint(largest) >> 23 & 255) - 127;
  if (exponent < -100 || exponent > 100) return 1.f;
  return __uint_as_float(static_cast<uint32_t>(kTop - exponent + 127) << 23);
}

// The shapes of all bands of a directory row, zeros behind the last (rank 0: no blocks), loaded
// together.
struct Shapes {
  int64_t of[DW_MAX_BANDS];
};
__device__ __forceinline__ Shapes load_shapes(const int64_t* row) {
  Shapes shapes;
#pragma unroll
  for (int b = 0; b < DW_MAX_BANDS; ++b) {
    shapes.of[b] = row[DW_FIELD_BANDS + b * DW_BAND_FIELDS + DW_BAND_SHAPE];
  }
  return shapes;
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

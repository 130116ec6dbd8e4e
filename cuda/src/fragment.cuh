// SPDX-License-Identifier: Apache-2.0
// What one warp does with one block of codes (layout.h) in shared memory: unpack it and multiply.
//
// To integers, for few tokens: a lane's word holds its codes at the same place of every byte, so
// that one AND gives four codes times a power of two, an operand of m16n8k32 (place(), integers()).
// Tokens are two signed bytes a value, hi and lo: columns 2t and 2t + 1. Sums are exact.
//
// To halves, for more tokens, levels and 16 bits: one bitwise select a pair. A code at mantissa
// position p under the exponent whose unit sits at p reads as 2^(10-p) + code. That bias is not
// subtracted from the weights but from the sums: one more product, with the biases for weights,
// gives what all rows must lose (a matrix of pairs j has the same bias in every row).
#ifndef DELTAWEAVE_SRC_FRAGMENT_CUH_
#define DELTAWEAVE_SRC_FRAGMENT_CUH_

#include <cuda_bf16.h>
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

// The same of 16-bit values of a type.
template <typename T>
__device__ __forceinline__ void multiply_as(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                            uint32_t b1) {
  multiply(d, a, b0, b1);
}
template <>
__device__ __forceinline__ void multiply_as<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4],
                                                           uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same of bytes, m16n8k32: a unsigned, b signed.
__device__ __forceinline__ void multiply(int (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint32_t bits_of(__half2 pair) {
  return *reinterpret_cast<const uint32_t*>(&pair);
}
__device__ __forceinline__ __half2 pair_of(uint32_t bits) {
  return *reinterpret_cast<const __half2*>(&bits);
}

// Where pair j = 4 * product + register of a lane lies: word, bit of the low code (the high one is
// 16 further), and the shift that brings it to a mantissa position with a small bias. Pairs j and
// j + 1 (j even) share that position. Registers 0 and 2 are of one row and 1 and 3 of another
// (layout.h), and lie in the same place of neighbouring bytes.
struct Spot {
  int word, bit, shift;  // shift > 0: to the right
  DW_HD constexpr int position() const { return bit - shift; }
};

template <int kBits>
DW_HD constexpr Spot spot(int j) {
  const int f = j / 4, r = j % 4;
  if (kBits == 16) return {j, 0, 0};
  if (kBits == 8) return {2 * f + r % 2, r / 2 * 8, r / 2 * 8};
  if (kBits == 3) {  // six products have a word each, and the last two what these leave (spare_of)
    constexpr int kBit[4] = {0, 3, 8, 11};
    return f < 6 ? Spot{f, kBit[r], kBit[r] - 3} : Spot{3 * (f - 6), 5 + r / 2 * 8, r / 2 * 8};
  }
  constexpr int kProducts = 4 / (kBits < 4 ? kBits : 4);  // a word
  return {f / kProducts, kBits * (f % kProducts) + 4 * r, 4 * r - 4};
}

// Of 3 bits, products 6 and 7: a row's codes at bits 5 to 7 of every byte, of which three words
// leave bits 6 and 7.
__device__ __forceinline__ uint32_t spare_of(const uint32_t* words, int f, int row) {
  const uint32_t* three = words + 3 * (f - 6);
  return (three[2 * row] & 0xc0c0c0c0u) | (three[1] >> (1 + row) & 0x20202020u);
}

// Pair j's codes at spot<kBits>(j).position() of both halves, other bits present.
template <int kBits>
__device__ __forceinline__ uint32_t locate(const uint32_t* words, int j) {
  const Spot at = spot<kBits>(j);
  const uint32_t word = kBits == 3 && j >= 24 ? spare_of(words, j / 4, j % 2) : words[at.word];
  return at.shift >= 0 ? word >> at.shift : word << -at.shift;
}

// The codes of product f in row 0 or 1 of a lane's two as unsigned bytes: registers `row` and `row
// + 2`, in the order low, low, high, high. They are codes times 2^place<kBits>(f, row).
template <int kBits>
DW_HD constexpr int place(int f, int row) {
  return spot<kBits>(4 * f + row).bit % 8;
}
template <int kBits>
__device__ __forceinline__ uint32_t integers(const uint32_t* words, int f, int row) {
  static_assert(kBits <= 8, "bytes");
  if (kBits == 8) return words[2 * f + row];
  if (kBits == 3 && f >= 6) return spare_of(words, f, row);
  constexpr uint32_t kMask = ((1u << kBits) - 1) * 0x01010101u;
  return words[spot<kBits>(4 * f).word] & kMask << place<kBits>(f, row);
}

// (bits & mask) | exponent in one instruction: the compiler splits it when both are constants.
__device__ __forceinline__ uint32_t select(uint32_t bits, uint32_t mask, uint32_t exponent) {
  uint32_t selected;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(selected) : "r"(bits), "r"(mask), "r"(exponent));
  return selected;
}

// The larger place of a row's products.
template <int kBits>
DW_HD constexpr int most_place(int row) {
  int most = 0;
  for (int f = 0; f < 8; ++f) most = place<kBits>(f, row) > most ? place<kBits>(f, row) : most;
  return most;
}

// Values as signed steps of one size, of which the largest magnitude has kMostSteps: two signed
// bytes, hi * 256 + lo. What is not finite leaves a size of NaN.
struct Steps {
  static constexpr float kMostSteps = 32512.f;  // 127 * 256: rounding up may add some
  float size = 0.f, in_one = 0.f;               // in_one: steps

  __device__ __forceinline__ explicit Steps(uint32_t largest_bits) {
    const float largest = __uint_as_float(largest_bits);
    if (!(largest < __uint_as_float(0x7f800000u))) size = __uint_as_float(0x7fc00000u);
    if (!(largest > 1e-30f) || size != 0.f) return;  // NaN is not 0
    size = largest * (1.f / kMostSteps);
    in_one = __fdividef(kMostSteps, largest);
  }

  // The whole steps of a value, plus kOffset. Its low 16 bits are those of the steps.
  static constexpr uint32_t kOffset = 0x4b400000;  // as a float 1.5 * 2^23
  static __device__ __forceinline__ uint32_t bits(float value, float in_one) {
    return __float_as_uint(fmaf(value, in_one, 12582912.f));
  }
};

// lo, and hi, of two numbers of steps in the low two bytes.
__device__ __forceinline__ uint32_t low_bytes(uint32_t first, uint32_t second) {
  return __byte_perm(first, second, 0x0040);
}
__device__ __forceinline__ uint32_t high_bytes(uint32_t first, uint32_t second) {
  return __byte_perm(first + 128, second + 128, 0x0051);
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

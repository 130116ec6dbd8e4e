// SPDX-License-Identifier: Apache-2.0
// Packed blocks (layout.h) to the tensor core's row operand: a warp's 16 rows and 64 k at a time.
//
//   value = scale * (code - zero), the code exact in a half, one rounding of scale * zero and one
//   of the whole
//
// Of V^ rows are ranks: a block's fragments are what its lanes hold, in the order of decode. Of U^
// rows are outputs and k ranks: warp w takes outputs 16w .. 16w + 15 of a group, all from the codes
// of four of the block's lanes, so that lane 4q + c needs pairs 4q .. 4q + 3 of its (w, c): which
// bits these are depends on the lane, and a rotation by the lane's own amount brings them where a
// select (fragment.cuh) finds them.
#ifndef DELTAWEAVE_SRC_PREFILL_WEIGHTS_CUH_
#define DELTAWEAVE_SRC_PREFILL_WEIGHTS_CUH_

#include "prefill.cuh"

namespace dw {
namespace prefill {

constexpr int kUnit = 16;  // ranks of a block, or of two blocks of a 16-bit band

// 16 ranks of one band. Behind the last: no ranks.
struct Unit {
  int band, index;  // index: within the band
  int bits, ranks;
  bool levels;

  // What is in memory as blocks of 16 ranks is staged; 16-bit values are read where they lie.
  __device__ __forceinline__ bool is_staged() const { return ranks > 0 && bits != 16; }
};

__device__ __forceinline__ Unit unit_at(const Shapes& shapes, int index) {
  Unit unit = {0, 0, 2, 0, false};
#pragma unroll
  for (int b = 0; b < DW_MAX_BANDS; ++b) {
    const int rank = band_rank(shapes.of[b]), units = padded_rank(rank) / kUnit;
    if (index >= 0 && index < units) {
      unit = {b, index, band_bits(shapes.of[b]), min(rank - kUnit * index, kUnit),
              band_grid(shapes.of[b]) == DW_GRID_CODEBOOK};
    }
    index -= units;
  }
  return unit;
}

__device__ __forceinline__ const unsigned char* band_part(const Gemm& gemm, const int64_t* row,
                                                          int band, int field) {
  return gemm.arena + row[DW_FIELD_BANDS + band * DW_BAND_FIELDS + field];
}

// A unit's first block in memory. Of V^ group `group` lies v_block_bytes(bits, ranks) behind the
// one before it, except of 16 bits, whose units are two blocks.
__device__ __forceinline__ const unsigned char* v_blocks(const Gemm& gemm, const int64_t* row,
                                                         const Unit& unit) {
  const int blocks = kUnit / block_ranks(unit.bits) * unit.index;
  return band_part(gemm, row, unit.band, DW_BAND_V) +
         static_cast<int64_t>(blocks) * gemm.in_groups * whole_block_bytes(unit.bits);
}
__device__ __forceinline__ const unsigned char* u_blocks(const Gemm& gemm, const int64_t* row,
                                                         const Unit& unit, int group) {
  const int rank = band_rank(row[DW_FIELD_BANDS + unit.band * DW_BAND_FIELDS + DW_BAND_SHAPE]);
  return band_part(gemm, row, unit.band, DW_BAND_U) +
         static_cast<int64_t>(group) * u_group_bytes(unit.bits, rank) +
         kUnit / block_ranks(unit.bits) * unit.index * whole_block_bytes(unit.bits);
}

// Two codes, with their bias if they are no levels, as weights.
template <bool kLevels>
__device__ __forceinline__ uint32_t weight(uint32_t code, uint32_t bias, __half2 scale,
                                           __half2 offset) {
  if constexpr (kLevels) return bits_of(__hmul2(pair_of(code), scale));
  // The bias goes first: that is exact, and scale * bias is not.
  return bits_of(__hfma2(__hsub2(pair_of(code), pair_of(bias)), scale, offset));
}

// ---- V^ ---------------------------------------------------------------------------------------

// Half a block: 64 features from 64 * `half` on. Lane 4q + c has ranks 2q and 2q + 1.
template <int kBits, bool kLevels>
__device__ __forceinline__ void unpack_v(Fragments& a, const unsigned char* block, int ranks,
                                         int half, const __half* levels) {
  const int lane = threadIdx.x % 32, q = lane / 4, c = lane % 4, pairs = ceil_div(ranks, 2);
  const bool present = q < pairs;
  const int from = min(q, max(pairs, 1) - 1);
  const uint2 grid = *reinterpret_cast<const uint2*>(block + v_code_bytes(kBits, ranks) + 8 * from);
  __half2 scale[2], offset[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const __half2 entry = pair_of(present ? (i == 0 ? grid.x : grid.y) : 0);
    scale[i] = __low2half2(entry);
    offset[i] = __hneg2(__hmul2(scale[i], __high2half2(entry)));
  }
  const auto unpack_all = [&](const uint32_t* words, auto first_pair) {
#pragma unroll
    for (int i = 0; i < kTileDepth / 16; ++i) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {  // registers 0 and 2: the first rank, 1 and 3: the second
        constexpr int kFirst = decltype(first_pair)::value;
        const int j = kFirst + 4 * i + r;
        a[i][r] = weight<kLevels>(unpack<kBits, kLevels>(words, j, levels), bias_pair<kBits>(j),
                                  scale[r % 2], offset[r % 2]);
      }
    }
  };
  const int lanes = 4 * max(pairs, 1), own = 4 * from + c;
  if constexpr (kBits == 3) {  // its pairs have no period that fits
    uint32_t words[2 * kBits];
    load_words<kBits>(words, block, own, lanes);
    if (half == 0) {
      unpack_all(words, std::integral_constant<int, 0>());
    } else {
      unpack_all(words, std::integral_constant<int, 16>());
    }
  } else {
    uint32_t words[kBits];  // of the half
    if constexpr (kBits == 1) {
      words[0] = *reinterpret_cast<const uint32_t*>(block + 8 * own + 4 * half);
    } else if constexpr (kBits == 2) {
      const uint2 two = *reinterpret_cast<const uint2*>(block + 16 * own + 8 * half);
      words[0] = two.x;
      words[1] = two.y;
    } else {
#pragma unroll
      for (int v = 0; v < kBits / 4; ++v) {
        const uint4 four =
            *reinterpret_cast<const uint4*>(block + ((kBits / 4 * half + v) * lanes + own) * 16);
        words[4 * v] = four.x;
        words[4 * v + 1] = four.y;
        words[4 * v + 2] = four.z;
        words[4 * v + 3] = four.w;
      }
    }
    unpack_all(words, std::integral_constant<int, 0>());
  }
}

// Of a 16-bit unit's two blocks in memory, from the group's blocks of the first on; those of the
// second lie `pitch` bytes behind.
__device__ __forceinline__ void read_v(Fragments& a, const unsigned char* first, int64_t pitch,
                                       int group, int ranks, int half) {
  const int lane = threadIdx.x % 32, q = lane / 4, c = lane % 4;
  const int own = min(max(ranks - q / 4 * 8, 0), 8), pairs = ceil_div(own, 2);
  const unsigned char* block =
      first + q / 4 * pitch + static_cast<int64_t>(group) * v_block_bytes(16, own);
#pragma unroll
  for (int i = 0; i < kTileDepth / 16; ++i) {
    uint4 four = make_uint4(0, 0, 0, 0);
    if (q % 4 < pairs) {
      four = __ldg(reinterpret_cast<const uint4*>(
          block + ((4 * half + i) * 4 * pairs + 4 * (q % 4) + c) * 16));
    }
    a[i][0] = four.x;
    a[i][1] = four.y;
    a[i][2] = four.z;
    a[i][3] = four.w;
  }
}

// ---- U^ ---------------------------------------------------------------------------------------

// Where a select finds the codes: as high as their halves allow, for a small bias.
template <int kBits>
constexpr int kPosition = kBits == 8   ? 0
                          : kBits == 4 ? 4
                          : kBits == 3 ? 6
                                       : 8;

// Pairs 4q .. 4q + 3 of a block's lane, at kPosition, other bits present.
template <int kBits>
__device__ __forceinline__ void locate_pairs(uint32_t (&pairs)[4], const unsigned char* block,
                                             int lane, int lanes) {
  const int q = threadIdx.x % 32 / 4;
  const auto word = [&](int i) {
    constexpr int kWhole = kBits / 2 * 4;  // words in vectors of 16 bytes
    const int at = i < kWhole ? (i / 4 * lanes + lane) * 16 + i % 4 * 4
                              : kWhole * 4 * lanes + lane * 8 + (i - kWhole) * 4;
    return *reinterpret_cast<const uint32_t*>(block + at);
  };
  const auto rotated = [](uint32_t bits, int right) { return __funnelshift_r(bits, bits, right); };
  if constexpr (kBits == 8) {
#pragma unroll
    for (int r = 0; r < 4; ++r) pairs[r] = word(2 * q + r % 2) >> r / 2 * 8;
  } else if (kBits == 3 && q >= 6) {
    const int first = 3 * (q - 6);
    const uint32_t three[3] = {word(first), word(first + 1), word(first + 2)};
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      pairs[r] = rotated(spare_of(three, 6, r % 2), 5 + r / 2 * 8 - kPosition<kBits>);
    }
  } else {
    const Spot first = spot<kBits>(4 * q);
    const uint32_t bits = word(first.word);
#pragma unroll
    for (int r = 0; r < 4; ++r) {
      const int bit = first.bit + spot<kBits>(r).bit - spot<kBits>(0).bit;
      pairs[r] = rotated(bits, bit - kPosition<kBits>);
    }
  }
}

// A warp's 16 outputs and a unit's ranks. Lane 4q + c has ranks 4c .. 4c + 3 of outputs 2q, 2q + 1.
template <int kBits, bool kLevels>
__device__ __forceinline__ void unpack_u(uint32_t (&a)[4], const unsigned char* block, int ranks,
                                         const __half* levels) {
  const int c = threadIdx.x % 4, quads = ceil_div(ranks, 4), from = min(c, max(quads, 1) - 1);
  const bool present = c < quads;
  const uint4 grid =
      *reinterpret_cast<const uint4*>(block + u_code_bytes(kBits, ranks) + 16 * from);
  const __half2 scale[2] = {pair_of(present ? grid.x : 0), pair_of(present ? grid.z : 0)};
  __half2 offset[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    offset[i] = __hneg2(__hmul2(scale[i], pair_of(present ? (i == 0 ? grid.y : grid.w) : 0)));
  }
  uint32_t pairs[4];
  locate_pairs<kBits>(pairs, block, static_cast<int>(threadIdx.x) / 32 * quads + from, 8 * quads);
  constexpr int kAt = kPosition<kBits>;
  constexpr uint32_t kMask = (1u << kBits) - 1, kBias = (25u - kAt) << 10 | (25u - kAt) << 26;
#pragma unroll
  for (int r = 0; r < 4; ++r) {  // registers 0 and 1: the first two ranks, 2 and 3: the others
    uint32_t code;
    if constexpr (kLevels) {
      code = bits_of(
          __halves2half2(levels[pairs[r] >> kAt & kMask], levels[pairs[r] >> (kAt + 16) & kMask]));
    } else {
      code = select(pairs[r], (kMask << kAt) * 0x00010001u, kBias);
    }
    a[r] = weight<kLevels>(code, kBias, scale[r / 2], offset[r / 2]);
  }
}

// Of a 16-bit unit's two blocks in memory.
__device__ __forceinline__ void read_u(uint32_t (&a)[4], const unsigned char* first, int ranks) {
  const int q = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  const int own = min(max(ranks - c / 2 * 8, 0), 8), quads = ceil_div(own, 4);
  uint4 four = make_uint4(0, 0, 0, 0);
  if (c % 2 < quads) {
    const int lane = static_cast<int>(threadIdx.x) / 32 * quads + c % 2;
    four = __ldg(reinterpret_cast<const uint4*>(first + c / 2 * whole_block_bytes(16) +
                                                (q * 8 * quads + lane) * 16));
  }
  a[0] = four.x;
  a[1] = four.y;
  a[2] = four.z;
  a[3] = four.w;
}

}  // namespace prefill
}  // namespace dw

#endif  // DELTAWEAVE_SRC_PREFILL_WEIGHTS_CUH_

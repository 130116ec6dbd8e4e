// SPDX-License-Identifier: Apache-2.0
// File order to kernel order: all bands of a record in one launch.
//
//   codes  bands at multiples of 16 bytes, rows of little-endian bit streams (SPEC.md, "Codes")
//   grid   fp16 [rank, groups, 2] affine or [rank, groups] codebook, or one entry a band
//   ->     blocks of 16 ranks x 128 features with their grids (layout.h)
//
// Roofline: bytes, each read and written once. One warp a block: it copies the block's rows, 16 *
// bits bytes each, as words into shared memory, shifted so that the block's first code is bit 0;
// gathers each lane's 64 codes as eight octets of neighbouring codes; and stores the lanes' words
// as whole vectors. Neighbouring warps take neighbouring groups, so rows are read consecutively.
// On an H200, with the numbers before it: 12 us for the 2.4 MB of a 4096 x 4096 and 26 us for the
// 6.3 MB of an 11008 x 4096, which PCIe takes 44 and 113 us to bring.
#include "fragment.cuh"
#include "repack.h"

namespace dw {
namespace {

// Words of a row's 128 codes. One more lies between rows in shared memory: against bank conflicts,
// and for octets that are read across words.
template <int kBits>
constexpr int kRowWords = 4 * kBits;
constexpr int kWarpWords = 16 * (kRowWords<8> + 1);
static_assert(8 * (kRowWords<16> + 1) <= kWarpWords, "a 16-bit block has eight rows");

// The aligned word at `byte` of a band's codes; zeros outside the band.
__device__ __forceinline__ uint32_t load_word(const RepackBand& band, int64_t byte) {
  if (byte >= 0 && byte + 4 <= band.code_bytes) {
    return *reinterpret_cast<const uint32_t*>(band.codes + byte);
  }
  uint32_t word = 0;
  for (int i = 0; i < 4; ++i) {
    if (byte + i >= 0 && byte + i < band.code_bytes) {
      word |= static_cast<uint32_t>(band.codes[byte + i]) << 8 * i;
    }
  }
  return word;
}

// Bits [low, high) of the word whose first is bit `first`.
__device__ __forceinline__ uint32_t keep_bits(uint32_t word, int first, int low, int high) {
  const int from = max(low - first, 0), to = min(high - first, 32);
  if (from >= to) return 0;
  return word & 0xffffffffu >> (32 - (to - from)) << from;
}

// Rows first .. first + ranks - 1, features feature0 .. feature0 + 127; zeros for what is absent.
template <int kBits>
__device__ __forceinline__ void stage_rows(const RepackBand& band, int first, int ranks,
                                           int feature0, uint32_t* words) {
  constexpr int kWords = kRowWords<kBits>;
  const int64_t row_bits = (static_cast<int64_t>(kBits) * band.features + 7) / 8 * 8;
  const int low = kBits * max(-feature0, 0);
  const int high = kBits * min(band.features - feature0, kGroup);
#pragma unroll
  for (int i = 0; i < block_ranks(kBits) * kWords / 32; ++i) {
    const int index = 32 * i + threadIdx.x % 32;
    const int row = index / kWords, column = index % kWords;
    uint32_t word = 0;
    if (row < ranks) {
      const int64_t bit =
          (first + row) * row_bits + static_cast<int64_t>(kBits) * feature0 + 32 * column;
      const int shift = static_cast<int>(bit & 31);
      word = load_word(band, (bit >> 5) * 4);
      if (shift != 0) {
        word = __funnelshift_r(word, load_word(band, (bit >> 5) * 4 + 4), shift);
      }
      word = keep_bits(word, 32 * column, low, high);
    }
    words[row * (kWords + 1) + column] = word;
  }
}

// Eight neighbouring codes of a row.
template <int kBits>
struct Octet {
  uint32_t words[kBits <= 4 ? 1 : kBits / 4];

  __device__ __forceinline__ Octet(const uint32_t* row, int index) {
    const int bit = 8 * kBits * index;
    if constexpr (kBits >= 4) {
#pragma unroll
      for (int i = 0; i < kBits / 4; ++i) words[i] = row[bit / 32 + i];
    } else if constexpr (kBits == 3) {
      words[0] = __funnelshift_r(row[bit / 32], row[bit / 32 + 1], bit % 32);
    } else {
      words[0] = row[bit / 32] >> bit % 32;
    }
  }

  __device__ __forceinline__ uint32_t code(int k) const {
    const uint32_t word = words[kBits <= 4 ? 0 : k * kBits / 32];
    return word >> (kBits <= 4 ? k * kBits : k * kBits % 32) & ((1u << kBits) - 1);
  }
};

// The inverse of locate() in fragment.cuh.
template <int kBits>
__device__ __forceinline__ void place_pair(uint32_t (&words)[2 * kBits], int j, uint32_t low,
                                           uint32_t high) {
  const uint32_t pair = low | high << 16;
  const Spot at = spot<kBits>(j);
  if (kBits == 3 && j >= 24) {  // spare_of()
    const int row = j % 2, upper = j % 4 / 2 * 8;
    words[at.word + 2 * row] |= (pair >> 1 & 0x00030003u) << (6 + upper);
    words[at.word + 1] |= (pair & 0x00010001u) << (6 + row + upper);
    return;
  }
  words[at.word] |= pair << at.bit;
}

// v: lane 4q + c takes ranks 2q and 2q + 1 and of every 32 features the eight from 8c. A pair is
// two features of a rank. Pair 4f + r: rank r % 2, features 4 * (f % 2) + 2 * (r / 2) and the next
// of octet f / 2.
template <int kBits>
__device__ __forceinline__ void gather_v(const uint32_t* rows, uint32_t (&words)[2 * kBits]) {
  const int q = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
#pragma unroll
  for (int rank = 0; rank < 2; ++rank) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Octet<kBits> octet(rows + (2 * q + rank) * (kRowWords<kBits> + 1), 4 * i + c);
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        const int j = 4 * (2 * i + pair / 2) + 2 * (pair % 2) + rank;
        place_pair<kBits>(words, j, octet.code(2 * pair), octet.code(2 * pair + 1));
      }
    }
  }
}

// u's 16-bit values are stored times 2^s, codes as they are.
template <int kBits>
__device__ __forceinline__ uint32_t rescaled(uint32_t code, float scale) {
  if constexpr (kBits != 16) return code;
  const float value = __half2float(__ushort_as_half(static_cast<unsigned short>(code)));
  return __half_as_ushort(__float2half_rn(value * scale));
}

// u: lane (q, c) takes ranks 4c .. 4c + 3 and features 16q .. 16q + 15. A pair is a feature of two
// ranks; pair 4f + r: ranks 2 * (r / 2) and the next, feature 2f + r % 2.
template <int kBits>
__device__ __forceinline__ void gather_u(const uint32_t* rows, float scale,
                                         uint32_t (&words)[2 * kBits]) {
  const int q = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      const uint32_t* row = rows + (4 * c + 2 * pair) * (kRowWords<kBits> + 1);
      const Octet<kBits> low(row, 2 * q + half);
      const Octet<kBits> high(row + kRowWords<kBits> + 1, 2 * q + half);
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        const int j = 4 * (4 * half + k / 2) + 2 * pair + k % 2;
        place_pair<kBits>(words, j, rescaled<kBits>(low.code(k), scale),
                          rescaled<kBits>(high.code(k), scale));
      }
    }
  }
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

// The grid of a block's ranks, filled up to fours by zeros: v (scale, zero) a rank, u two
// scales times 2^s and then their zeros.
__device__ __forceinline__ void store_grid(const RepackBand& band, int first, int group, int ranks,
                                           float rescale, unsigned char* to) {
  const int index = threadIdx.x % 32;
  if (index >= ceil_div(ranks, 4) * 4) return;
  __half scale = __ushort_as_half(0), zero = scale;
  if (index < ranks) {
    int64_t entry = 0;
    if (band.group_size > 0) {
      entry = static_cast<int64_t>(first + index) * band.grid_groups +
              (group * kGroup + band.group_base) / band.group_size;
    }
    scale = band.grid[band.affine ? 2 * entry : entry];
    if (band.affine) zero = band.grid[2 * entry + 1];
  }
  __half* entries = reinterpret_cast<__half*>(to);
  if (band.is_u) {
    entries[index / 2 * 4 + index % 2] = __float2half_rn(__half2float(scale) * rescale);
    entries[index / 2 * 4 + 2 + index % 2] = zero;
  } else {
    reinterpret_cast<__half2*>(to)[index] = __halves2half2(scale, zero);
  }
}

template <int kBits, bool kIsU>
__device__ __forceinline__ void repack_block(const RepackBand& band, int unit, float scale,
                                             uint32_t* rows) {
  const int block = unit / band.groups, group = unit % band.groups;
  const int first = block * block_ranks(kBits);
  const int ranks = min(band.rank - first, block_ranks(kBits));
  stage_rows<kBits>(band, first, ranks, group * kGroup - band.offset, rows);
  __syncwarp();
  const int64_t whole = whole_block_bytes(kBits);
  unsigned char* to = band.to;
  if constexpr (kIsU) {
    to += group * static_cast<int64_t>(u_group_bytes(kBits, band.rank)) + block * whole;
  } else {
    to += block * whole * band.groups + group * v_block_bytes(kBits, ranks);
  }
  const int q = threadIdx.x % 32 / 4, c = threadIdx.x % 4;
  const int present = ceil_div(ranks, kIsU ? 4 : 2);
  if ((kIsU ? c : q) < present) {
    uint32_t words[2 * kBits] = {};
    if constexpr (kIsU) {
      gather_u<kBits>(rows, scale, words);
      store_words<kBits>(words, to, q * present + c, 8 * present);
    } else {
      gather_v<kBits>(rows, words);
      store_words<kBits>(words, to, 4 * q + c, 4 * present);
    }
  }
  if constexpr (kBits != 16) {
    const int code_bytes = kIsU ? u_code_bytes(kBits, ranks) : v_code_bytes(kBits, ranks);
    store_grid(band, first, group, ranks, scale, to + code_bytes);
  }
}

template <int kBits>
__device__ __forceinline__ void repack_either(const RepackBand& band, int unit, float scale,
                                              uint32_t* rows) {
  if (band.is_u) {
    repack_block<kBits, true>(band, unit, scale, rows);
  } else {
    repack_block<kBits, false>(band, unit, scale, rows);
  }
}

__global__ void __launch_bounds__(kThreads)
    repack_blocks_kernel(const __grid_constant__ RepackBands bands) {
  __shared__ uint32_t shared[kWarps][kWarpWords];
  uint32_t* rows = shared[threadIdx.x / 32];
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (unit >= bands.units) return;
  int b = bands.count - 1;
  while (unit < bands.of[b].first_unit) --b;
  const RepackBand& band = bands.of[b];
  const int index = static_cast<int>(unit) - band.first_unit;
  const float scale = band.is_u ? 1.f / bands.header[1] : 1.f;
  switch (band.bits) {
    case 1:
      return repack_either<1>(band, index, scale, rows);
    case 2:
      return repack_either<2>(band, index, scale, rows);
    case 3:
      return repack_either<3>(band, index, scale, rows);
    case 4:
      return repack_either<4>(band, index, scale, rows);
    case 8:
      return repack_either<8>(band, index, scale, rows);
    default:
      return repack_either<16>(band, index, scale, rows);
  }
}

}  // namespace

cudaError_t launch_repack_blocks(const RepackBands& bands, cudaStream_t stream) {
  repack_blocks_kernel<<<ceil_div(bands.units, kWarps), kThreads, 0, stream>>>(bands);
  return cudaGetLastError();
}

}  // namespace dw

// SPDX-License-Identifier: Apache-2.0
// Kernel order: how a tenant's factors lie in the arena. Shared by host bookkeeping, repack and the
// products.
//
// Both factors are cut into blocks of 16 ranks x 128 features (8 ranks in a 16-bit band), the
// weights that one warp feeds to eight m16n8k16 products. A block is
//
//     codes   lanes x 8*bits bytes     64 codes a lane: 32 pairs, pair j = 4 * product + register
//     grid    v: ranks x (scale, zero)    u: pairs of ranks x (2 scales, 2 zeros)
//             fp16; absent with 16 bits; a codebook has zero = 0
//
// padded to 16 bytes. A lane's 8*bits bytes are cut into 16-byte vectors (and an 8-byte one for 1
// and 3 bits), stored vector by vector over the lanes, so that shared memory is read without bank
// conflicts. Absent ranks take no space:
//
//     v   lane = 4*q + c holds ranks 2q, 2q+1 and, of every 32 features, the eight from 8c;
//         ranks padded to 2
//     u   lane = q*quads + c holds ranks 4c..4c+3 and features 16q..16q+15; ranks padded to 4
//
// v's order: band, block of ranks, group of 128 in_features. u's order: band, group of 128
// out_features, block of ranks. So one warp streams consecutive bytes in both stages. Groups lie at
// multiples of 128 of the whole layer: a shard that cuts one (in_offset, out_offset) has a partly
// used first group. Dense and replaced rows of an embedding or lm_head lie as v does, a row a rank.
//
// u is normalized: its scales, and the values of its 16-bit bands, are stored times 2^s, one s for
// the record, chosen so that the largest magnitude among both lies in [2^6, 2^7). Rounding to fp16
// then loses nothing unless s is negative and a scale 2^20 below the largest. A factored record's
// header, float[64]:
//
//     [0]  the largest |scale| of u as the kernels see it: as stored, and 1 for a 16-bit band
//     [1]  2^-s, which undoes it on the sums; 1 if all of u is zero
//     [2]  a bound on |sigma * v|, for prefill
//     [8..15]  of each band what [0] is of all
//
// A fusion's LORA record lies as a factored one does whose bands are the experts: A as v, B as u,
// the experts' scales as sigma. A MIX record's header, float[64]: [0..7] the bias, [8] the
// temperature; behind it the gate's weight, float [experts, in_features].
#ifndef DELTAWEAVE_SRC_LAYOUT_H_
#define DELTAWEAVE_SRC_LAYOUT_H_

#include <cstdint>

#include "deltaweave.h"

#ifdef __CUDACC__
#define DW_HD __host__ __device__ __forceinline__
#else
#define DW_HD inline
#endif

namespace dw {

constexpr int kGroup = 128;           // features of a block, and the smallest group of a grid
constexpr int kOctet = 8;             // 16-bit values that are read together
constexpr int kMaxBlockBytes = 2112;  // 16 ranks of 8 bits with their grid
constexpr int kHeaderBytes = DW_ALIGNMENT;
constexpr int kHeaderBands = 8;  // of a factored record's header: the first band's number
constexpr int kMixNumbers = DW_MAX_EXPERTS + 1;  // of a MIX record's header: bias, temperature

DW_HD int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}
DW_HD constexpr int ceil_div(int value, int divisor) { return (value + divisor - 1) / divisor; }

// Ranks of a whole block.
DW_HD constexpr int block_ranks(int bits) { return bits == 16 ? 8 : 16; }
DW_HD constexpr int block_count(int bits, int rank) { return ceil_div(rank, block_ranks(bits)); }
DW_HD constexpr int whole_block_bytes(int bits) { return bits == 16 ? 2048 : 256 * bits + 64; }

// Bytes of a block's codes and of the block, for `ranks` present ranks.
DW_HD constexpr int v_code_bytes(int bits, int ranks) { return 32 * bits * ceil_div(ranks, 2); }
DW_HD constexpr int u_code_bytes(int bits, int ranks) { return 64 * bits * ceil_div(ranks, 4); }
DW_HD int v_block_bytes(int bits, int ranks) {
  return v_code_bytes(bits, ranks) + (bits == 16 ? 0 : ceil_div(ranks, 4) * 16);
}
DW_HD int u_block_bytes(int bits, int ranks) {
  return u_code_bytes(bits, ranks) + (bits == 16 ? 0 : ceil_div(ranks, 4) * 16);
}

DW_HD int last_block_ranks(int bits, int rank) {
  return rank - (block_count(bits, rank) - 1) * block_ranks(bits);
}
// Bytes of all blocks of one group of 128 features.
DW_HD int v_group_bytes(int bits, int rank) {
  return (block_count(bits, rank) - 1) * whole_block_bytes(bits) +
         v_block_bytes(bits, last_block_ranks(bits, rank));
}
DW_HD int u_group_bytes(int bits, int rank) {
  return (block_count(bits, rank) - 1) * whole_block_bytes(bits) +
         u_block_bytes(bits, last_block_ranks(bits, rank));
}

DW_HD int group_count(int features, int offset) { return ceil_div(features + offset, kGroup); }
DW_HD constexpr int padded_rank(int rank) { return ceil_div(rank, 16) * 16; }

DW_HD int band_bits(int64_t shape) { return static_cast<int>(shape & 0xff); }
DW_HD int band_grid(int64_t shape) { return static_cast<int>(shape >> 8 & 0xff); }
DW_HD int band_rank(int64_t shape) { return static_cast<int>(shape >> 16); }

// The plan, int32: header; the tokens sorted by slot; of each of these its row in the prefill
// images, or -1; one (slot, first, count, place among the dense slots) a chunk, those of few-token
// slots first.
constexpr int kPlanHeader = 8;
constexpr int kPlanChunks = 0;
constexpr int kPlanInvalid = 1;
constexpr int kPlanChunkTokens = 2;
constexpr int kPlanPlaced = 3;  // tokens that have a slot
constexpr int kPlanFew = 4;     // chunks of few-token slots
constexpr int kPlanDone = 5;    // of a call's kernels that run at one time, blocks that are done
constexpr int kPlanParts = 3;
DW_HD int plan_order(int) { return kPlanHeader; }
DW_HD int plan_rows(int tokens) { return kPlanHeader + static_cast<int>(round_up(tokens, 4)); }
DW_HD int plan_chunks(int tokens) {
  return kPlanHeader + 2 * static_cast<int>(round_up(tokens, 4));
}

// Tokens of a chunk: what the decode kernels hold in registers, and a tile of the prefill kernels.
constexpr int kDecodeTokens = 8;
constexpr int kFewTokens = 4;  // of a chunk: they are multiplied as integers (fragment.cuh)
constexpr int kPrefillTokens = 128;
// The default by launch bucket.
DW_HD int default_chunk(int tokens) { return tokens <= 256 ? kDecodeTokens : kPrefillTokens; }

// In prefill a slot with at least so many tokens is dense: it fills a tile of the tensor core's
// columns. By the slot's own tokens alone.
constexpr int kDenseTokens = 128;
DW_HD int most_dense_slots(int tokens, int slots) {
  return tokens / kDenseTokens < slots ? tokens / kDenseTokens : slots;
}
// A slot's last tile may be short.
DW_HD int most_image_tiles(int tokens, int slots) {
  return tokens < kDenseTokens ? 0 : tokens / kPrefillTokens + most_dense_slots(tokens, slots);
}
constexpr int kImageTileBytes = 128 * 64 * 2;

// In decode stage 1 cuts a row of in_features into tiles of at most kTileGroups groups, all of one
// size but the last.
constexpr int kTileGroups = 16;
DW_HD int tile_groups(int in_groups) {
  return ceil_div(in_groups, ceil_div(in_groups, kTileGroups));
}

// Of gated LoRAs in decode, whose few bytes are taken all at once. In a prefill launch, where many
// tokens share the workspace, they are cut as deltas are.
constexpr int kLoraTileGroups = 8;

// Ranks of the workspace's intermediate, whatever bands a tenant has.
DW_HD constexpr int intermediate_ranks(int max_rank) {
  return padded_rank(max_rank) + 16 * DW_MAX_BANDS;
}
DW_HD int intermediate_blocks(int max_rank) { return intermediate_ranks(max_rank) / 8; }

}  // namespace dw

#endif  // DELTAWEAVE_SRC_LAYOUT_H_

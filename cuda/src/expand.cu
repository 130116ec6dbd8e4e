// SPDX-License-Identifier: Apache-2.0
// Stage 2 of the delta product:  y[s, t, n] += sum_r U^[r, n] h[s, t, r]
//
//   h  float [tiles, slices, tokens in plan order, ranks], from stage 1   U^ packed (layout.h)
//   y  fp16 or bf16 [tokens, out]
//
// Roofline: bytes, as in stage 1; y is 2 * out bytes a token.
//
// Work item = (chunk of one tenant's tokens, slice, group of 128 out_features), all ranks. A block
// of threads takes a run of consecutive items. For each (chunk, slice) it first makes h ready in
// shared memory: the tiles' sum as fp16, times a power of two a token so that the largest becomes
// 2^7; U^'s scales are stored so that the largest is 2^6, and no product overflows or loses bits
// that matter. The scale varies along the reduction but is one number a (rank, group), so it goes
// into h: h' = fp16(h * scale). Outputs are the 16-row operand, tokens the 8 columns; a block of 16
// ranks feeds eight products, one for every 16 outputs (product f: outputs 2f, 2f + 1 of every 16).
// One more product a block has the eight products' biases in rows 0-7 and the ranks' zeros in rows
// 8-15: what the sums must lose,
//
//     y[16q + 2f + i] = 2^-e * (sum code * h' - B[f] - Z),   B[f] = sum bias[f] * h',   Z = sum
//     zero * h'
//
// A team of warps shares an item: its blocks, contiguous a band, stream through stages
// (stages.cuh) of which each warp takes its part; their sums meet in shared memory in warp order.
// Which warp sums what depends on the band list and the launch's bucket of tokens alone.
#include <cuda_bf16.h>

#include "fragment.cuh"
#include "kernels.h"
#include "ring.cuh"
#include "stages.cuh"
#include "step.cuh"

namespace dw {
namespace {

constexpr int kStages = 3;
constexpr int kWarpBytes = 2304;    // of a stage, a warp: four blocks of 2 bits
constexpr int kTokens = 8;          // of a chunk
constexpr int kRound = 4;           // tokens whose sums meet at a time
constexpr int kPitch = kGroup + 4;  // floats between tokens when sums meet

// Blocks of ranks that one stage holds, a warp.
DW_HD constexpr int blocks_a_step(int bits) { return bits <= 2 ? 4 : bits <= 4 ? 2 : 1; }

// Consecutive blocks of one band of an item: what a stage holds.
struct __align__(16) Step {
  const unsigned char* u;  // in the first group of outputs
  int group_bytes;         // to the next
  int bytes;
};

// A warp's share of a step.
struct __align__(8) Share {
  uint16_t at, h_index;  // of its first block, in units of 16 bytes of the stage; its first rank
  uint8_t bits, levels : 1, band : 3, blocks, quads;  // quads: of its last block
};
static_assert(sizeof(Step) == 16 && sizeof(Share) == 8, "one read each");

constexpr int kMaxBlocks = (DW_MAX_RANK + 16 * DW_MAX_BANDS) / 8;

template <int kTeam, int kTeams>
struct Shared {
  // A step a team's worth of the widest blocks, and one more where bands end.
  static constexpr int kMaxSteps = ceil_div(kMaxBlocks, kTeam) + DW_MAX_BANDS;
  static constexpr int kStageBytes = kTeam * kWarpBytes;

  unsigned char stage[kTeams][kStages][kStageBytes];
  Stages<kStages, kTeam> stages[kTeams];
  Step steps[kMaxSteps];
  Share shares[kTeam][kMaxSteps];
  int largest[kTokens];  // |h|, as an integer
  float inverse[kTokens];
  uint2 biases[9][8];  // bits, product: of its registers 0 and 1, of its registers 2 and 3
  float loss[kTeams][kTeam][kRound][8];  // token, product: B + Z
  float sums[kTeams][kTeam][kRound * kPitch];
};

template <int kBits>
__device__ __forceinline__ void store_biases(uint2 (&biases)[9][8]) {
#pragma unroll
  for (int f = 0; f < 8; ++f) {
    biases[kBits][f] = make_uint2(bias_pair<kBits>(4 * f), bias_pair<kBits>(4 * f + 2));
  }
}

__device__ __forceinline__ void store_all_biases(uint2 (&biases)[9][8]) {
  if (threadIdx.x != 0) return;
  store_biases<1>(biases);
  store_biases<2>(biases);
  store_biases<3>(biases);
  store_biases<4>(biases);
  store_biases<8>(biases);
}

// Consecutive groups of outputs of one chunk and slice.
struct Unit {
  int4 chunk;  // slot, first token in plan order, count
  int slice, first, last;
  const int64_t* row;  // of the directory
};

__device__ __forceinline__ Unit unit_at(const Gemm& gemm, int64_t item, int64_t end, int groups) {
  Unit unit;
  unit.chunk = chunk_of(gemm, static_cast<int>(item / groups));
  unit.first = static_cast<int>(item % groups);
  unit.slice = 0;
  while (unit.first >= gemm.slices[unit.slice].groups) {
    unit.first -= gemm.slices[unit.slice++].groups;
  }
  const int64_t left = end - item + unit.first;
  unit.last = static_cast<int>(min(static_cast<int64_t>(gemm.slices[unit.slice].groups), left));
  unit.row = directory_row(gemm, gemm.slices[unit.slice].projection, unit.chunk.x);
  return unit;
}

// Lists an item's steps, a thread a share; returns how many steps. The shares of a band are dealt
// on from the warp that got none of the last band's last step, so that no warp works much more.
template <int kTeam, int kTeams>
__device__ __forceinline__ int list_steps(const Gemm& gemm, const Unit& unit,
                                          Shared<kTeam, kTeams>& shared) {
  const Shapes shapes = load_shapes(unit.row);
  int done = 0, h_start = 0, dealt = 0;
#pragma unroll
  for (int b = 0; b < DW_MAX_BANDS; ++b) {
    if (shapes.of[b] == 0) break;
    const int bits = band_bits(shapes.of[b]), rank = band_rank(shapes.of[b]);
    const int blocks = block_count(bits, rank), size = blocks_a_step(bits) * kTeam;
    const int steps = ceil_div(blocks, size);
    const int64_t* fields = unit.row + DW_FIELD_BANDS + b * DW_BAND_FIELDS;
    for (int i = threadIdx.x; i < steps * kTeam; i += blockDim.x) {
      const int step = i / kTeam, place = i % kTeam, whole = whole_block_bytes(bits);
      const int first = step * size, stop = min(first + size, blocks);
      const int left = min(rank - (stop - 1) * block_ranks(bits), block_ranks(bits));
      if (place == 0) {
        const int bytes = (stop - first - 1) * whole + u_block_bytes(bits, left);
        shared.steps[done + step] = {gemm.arena + fields[DW_BAND_U] + first * whole,
                                     u_group_bytes(bits, rank), bytes};
      }
      const int each = ceil_div(stop - first, kTeam), own = first + place * each;
      const int count = max(0, min(each, stop - own));
      const bool last = own + count == stop;
      Share& share = shared.shares[(dealt + place) % kTeam][done + step];
      share.at = static_cast<uint16_t>(place * each * whole / 16);
      share.h_index = static_cast<uint16_t>(h_start + own * block_ranks(bits));
      share.bits = static_cast<uint8_t>(bits);
      share.levels = band_grid(shapes.of[b]) == DW_GRID_CODEBOOK;
      share.band = static_cast<uint8_t>(b);
      share.blocks = static_cast<uint8_t>(count);
      share.quads = static_cast<uint8_t>(ceil_div(last ? left : block_ranks(bits), 4));
    }
    const int rest = blocks % size;  // of the last step
    if (rest > 0) dealt += ceil_div(rest, ceil_div(rest, kTeam));
    done += steps;
    h_start += padded_rank(rank);
  }
  return done;
}

// h of the unit's tokens as fp16 [token, pitch], each token times its own power of two; both passes
// read what stage 1 left in L2.
template <int kTeam, int kTeams>
__device__ __forceinline__ void make_h(const Gemm& gemm, const Unit& unit, int pitch, __half* h,
                                       Shared<kTeam, kTeams>& shared) {
  const int quads = static_cast<int>(unit.row[DW_FIELD_PADDED_RANK]) / 4;
  const float* header = reinterpret_cast<const float*>(gemm.arena + unit.row[DW_FIELD_HEADER]);
  const float undo = header[1];
  const auto store = [&](int token, int quad, float4 v, float factor) {
    const uint2 halves = make_uint2(bits_of(__floats2half2_rn(v.x * factor, v.y * factor)),
                                    bits_of(__floats2half2_rn(v.z * factor, v.w * factor)));
    *reinterpret_cast<uint2*>(h + token * pitch + 4 * quad) = halves;
  };
  if (threadIdx.x < kTokens) shared.largest[threadIdx.x] = 0;
  __syncthreads();
  // The first token's quads stay in registers: often it is the only one.
  constexpr int kThreads = 32 * kTeam * kTeams;
  constexpr int kKept = ceil_div((DW_MAX_RANK + 16 * DW_MAX_BANDS) / 4, kThreads);
  float4 kept[kKept];
  for (int token = 0; token < unit.chunk.z; ++token) {
    float largest = 0.f;
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const int quad = threadIdx.x + i * kThreads;
      float4 v = make_float4(0.f, 0.f, 0.f, 0.f);
      if (quad < quads) v = h_quad(gemm, unit.slice, unit.chunk.y + token, quad, gemm.tiles);
      if (token == 0) kept[i] = v;
      largest = fmaxf(largest, largest_of(v));
    }
    const int bits = __reduce_max_sync(0xffffffffu, __float_as_int(largest));
    if (threadIdx.x % 32 == 0) atomicMax(&shared.largest[token], bits);
  }
  __syncthreads();
  for (int token = 0; token < unit.chunk.z; ++token) {
    const float factor = normalizer<7>(__int_as_float(shared.largest[token]));
    if (threadIdx.x == 0) shared.inverse[token] = undo / factor;
#pragma unroll
    for (int i = 0; i < kKept; ++i) {
      const int quad = threadIdx.x + i * kThreads;
      if (quad >= quads) break;
      const float4 v =
          token == 0 ? kept[i] : h_quad(gemm, unit.slice, unit.chunk.y + token, quad, gemm.tiles);
      store(token, quad, v, factor);
    }
  }
}

// One warp's part in its team's items of one unit.
template <typename T, int kTeam, int kTeams>
struct Run {
  using Mine = Shared<kTeam, kTeams>;

  const Gemm& gemm;
  const Unit& unit;
  Mine& shared;
  const __half* h;  // of this lane's token
  int lane, member, team, steps;
  Turn<kStages>& turn;  // of the team's stages, over all units
  int ahead_group, ahead_step = 0;

  __device__ __forceinline__ Run(const Gemm& gemm, const Unit& unit, Mine& shared, const __half* h,
                                 int pitch, int steps, Turn<kStages>& turn)
      : gemm(gemm), unit(unit), shared(shared), steps(steps), turn(turn) {
    lane = threadIdx.x % 32;
    member = threadIdx.x / 32 % kTeam;
    team = threadIdx.x / 32 / kTeam;
    this->h = h + min(lane / 4, unit.chunk.z - 1) * pitch + 4 * (lane % 4);
    ahead_group = unit.first + team;
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) fill(s, member == 0);
  }

  // Asks for the next step that nobody has asked for, `ahead` turns before its use.
  __device__ __forceinline__ void fill(int ahead, bool mine) {
    if (ahead_group >= unit.last) return;
    if (mine) {
      const Step next = shared.steps[ahead_step];
      auto& stages = shared.stages[team];
      const Turn<kStages> to = turn.ahead(ahead);
      stages.wait_empty(to);
      stages.expect(to, next.bytes);
      stages.copy_wide(to, shared.stage[team][to.place],
                       next.u + static_cast<int64_t>(ahead_group) * next.group_bytes, next.bytes);
      stages.close(to);
    }
    if (++ahead_step == steps) {
      ahead_step = 0;
      ahead_group += kTeams;
    }
  }

  __device__ __forceinline__ void all_items() {
    for (int group = unit.first + team; group < unit.last; group += kTeams) {
      float acc[8][4] = {};
      float bias[4] = {};  // B[lane / 4] of two tokens, Z of the same
      for (int s = 0; s < steps; ++s) {
        const Share share = shared.shares[member][s];
        fill(kStages - 1, member == s % kTeam);
        shared.stages[team].wait_full(turn);
        dispatch(share.bits, share.levels, [&]<int kBits, bool kLevels>() {
          consume<kBits, kLevels>(shared.stage[team][turn.place] + 16 * share.at, share, acc, bias);
        });
        shared.stages[team].release(turn);
        turn.next();
      }
      finish(group, acc, bias);
    }
  }

  template <int kBits, bool kLevels>
  __device__ __forceinline__ void consume(const unsigned char* codes, Share share,
                                          float (&acc)[8][4], float (&bias)[4]) const {
    const __half* table = nullptr;
    if (kLevels) {
      const int field = DW_FIELD_BANDS + share.band * DW_BAND_FIELDS + DW_BAND_LEVELS;
      table = reinterpret_cast<const __half*>(gemm.arena + unit.row[field]);
    }
    constexpr int kMost = blocks_a_step(kBits), kRanks = block_ranks(kBits), kQuads = kRanks / 4;
    const __half* from = h + share.h_index;
    if (kMost == 4 && share.blocks == 4 && share.quads == kQuads) {
      multiply_blocks<kBits, kLevels, kMost>(codes, kQuads, from, table, acc, bias);
      return;
    }
#pragma unroll 1
    for (int m = 1; m <= share.blocks; ++m) {
      const int quads = m < share.blocks ? kQuads : share.quads;
      multiply_blocks<kBits, kLevels, 1>(codes, quads, from, table, acc, bias);
      codes += whole_block_bytes(kBits);
      from += kRanks;
    }
  }

  // Consecutive blocks of `quads` quads of ranks each.
  template <int kBits, bool kLevels, int kCount>
  __device__ __forceinline__ void multiply_blocks(const unsigned char* codes, int quads,
                                                  const __half* from, const __half* table,
                                                  float (&acc)[8][4], float (&bias)[4]) const {
    const int quad = min(lane % 4, quads - 1), lane_at = lane / 4 * quads + quad;
    const int grid_at = u_code_bytes(kBits, 4 * quads) + 16 * quad;
    uint2 biases = make_uint2(0, 0);
    if constexpr (kBiased<kBits, kLevels>) biases = shared.biases[kBits][lane / 4];
#pragma unroll
    for (int m = 0; m < kCount; ++m) {
      const unsigned char* block = codes + m * whole_block_bytes(kBits);
      uint32_t words[2 * kBits];
      load_words<kBits>(words, block, lane_at, 8 * quads);
      uint2 b = *reinterpret_cast<const uint2*>(from + m * block_ranks(kBits));
      if (kCount == 1 && lane % 4 >= quads) b = make_uint2(0, 0);
      uint32_t a[4];
      if constexpr (kBits != 16) {
        const uint2 scales = *reinterpret_cast<const uint2*>(block + grid_at);
        b.x = bits_of(__hmul2(pair_of(b.x), pair_of(scales.x)));
        b.y = bits_of(__hmul2(pair_of(b.y), pair_of(scales.y)));
      }
      if constexpr (kBiased<kBits, kLevels>) {
        a[0] = biases.x;
        a[1] = *reinterpret_cast<const uint32_t*>(block + grid_at + 8);
        a[2] = biases.y;
        a[3] = *reinterpret_cast<const uint32_t*>(block + grid_at + 12);
        multiply(bias, a, b.x, b.y);
      }
#pragma unroll
      for (int f = 0; f < 8; ++f) {
        fragment<kBits, kLevels>(a, words, f, table);
        multiply(acc[f], a, b.x, b.y);
      }
    }
  }

  __device__ __forceinline__ void meet() const {
    asm volatile("bar.sync %0, %1;" ::"r"(team + 1), "n"(32 * kTeam) : "memory");
  }

  // Adds the team's sums in warp order, a few tokens at a time, and updates y: a warp a token, a
  // lane four outputs.
  __device__ __forceinline__ void finish(int group, const float (&acc)[8][4],
                                         const float (&bias)[4]) const {
    const Slice& slice = gemm.slices[unit.slice];
    const int n = group * kGroup - slice.out_offset + 4 * lane;
    for (int round = 0; round < unit.chunk.z; round += kRound) {
      meet();  // what was summed before has been read
#pragma unroll
      for (int column = 0; column < 2; ++column) {
        const int token = 2 * (lane % 4) + column - round;
        if (token < 0 || token >= kRound || round + token >= unit.chunk.z) continue;
        float4* to =
            reinterpret_cast<float4*>(shared.sums[team][member] + token * kPitch + 16 * (lane / 4));
#pragma unroll
        for (int f = 0; f < 8; f += 2) {
          to[f / 2] = make_float4(acc[f][column], acc[f][2 + column], acc[f + 1][column],
                                  acc[f + 1][2 + column]);
        }
        shared.loss[team][member][token][lane / 4] = bias[column] + bias[2 + column];
      }
      // Of a team each warp in turn, so that none always works more.
      const int token = (member + group) % kTeam;
      const bool writes = token < min(kRound, unit.chunk.z - round);
      T* row = nullptr;
      if (writes) {
        row = static_cast<T*>(slice.y) +
              token_at(gemm, unit.chunk.y + round + token) * slice.y_stride;
      }
      Outputs<T> outputs(row, n, writes ? slice.out_features : 0);
      meet();
      if (!writes) continue;
      float delta[4] = {};
      float2 loss = make_float2(0.f, 0.f);
#pragma unroll
      for (int w = 0; w < kTeam; ++w) {
        const float4 part =
            *reinterpret_cast<const float4*>(shared.sums[team][w] + token * kPitch + 4 * lane);
        delta[0] += part.x;
        delta[1] += part.y;
        delta[2] += part.z;
        delta[3] += part.w;
        loss.x += shared.loss[team][w][token][2 * (lane % 4)];
        loss.y += shared.loss[team][w][token][2 * (lane % 4) + 1];
      }
      const float inverse = shared.inverse[round + token];
#pragma unroll
      for (int i = 0; i < 4; ++i) delta[i] = (delta[i] - (i < 2 ? loss.x : loss.y)) * inverse;
      outputs.add_all(delta);
    }
  }
};

template <typename T, int kTeam, int kTeams>
__global__ void __launch_bounds__(32 * kTeam * kTeams, 16 / (kTeam * kTeams))
    expand_kernel(const __grid_constant__ Gemm gemm, int groups, int pitch) {
  extern __shared__ __align__(128) unsigned char memory[];
  auto& shared = *reinterpret_cast<Shared<kTeam, kTeams>*>(memory);
  __half* h = reinterpret_cast<__half*>(memory + sizeof(shared));
  let_next_begin();
  if (threadIdx.x < kTeams) shared.stages[threadIdx.x].initialize();
  store_all_biases(shared.biases);
  const int64_t all = static_cast<int64_t>(chunk_count(gemm)) * groups;
  const int64_t end = all * (blockIdx.x + 1) / gridDim.x;
  Turn<kStages> turn;
  bool waited = false;
  for (int64_t item = all * blockIdx.x / gridDim.x; item < end;) {
    const Unit unit = unit_at(gemm, item, end, groups);
    item += unit.last - unit.first;
    if (!is_served(gemm, unit.row)) continue;
    const int steps = list_steps(gemm, unit, shared);
    __syncthreads();
    Run<T, kTeam, kTeams> run(gemm, unit, shared, h, pitch, steps, turn);
    if (!waited) after_previous();
    waited = true;
    make_h(gemm, unit, pitch, h, shared);
    __syncthreads();
    run.all_items();
    __syncthreads();
  }
  if (!waited) after_previous();
}

template <typename T, int kTeam, int kTeams>
cudaError_t launch(const Gemm& gemm, cudaStream_t stream) {
  int groups = 0;
  for (int s = 0; s < gemm.slice_count; ++s) groups += gemm.slices[s].groups;
  const int64_t most = static_cast<int64_t>(gemm.token_count) * groups;
  const int64_t resident = static_cast<int64_t>(multiprocessors()) * (16 / (kTeam * kTeams));
  const int grid = static_cast<int>(most < resident ? most : resident);
  // Tokens 16 bytes apart in the banks' cycle of 128: eight lanes read different ones.
  const int pitch = ceil_div(gemm.ranks, 64) * 64 + 16;
  const int tokens = gemm.token_count < kTokens ? gemm.token_count : kTokens;
  const int bytes = static_cast<int>(sizeof(Shared<kTeam, kTeams>)) + 2 * tokens * pitch;
  return launch_dependent(expand_kernel<T, kTeam, kTeams>, dim3(grid), 32 * kTeam * kTeams, bytes,
                          stream, gemm, groups, pitch);
}

template <typename T>
cudaError_t launch_typed(const Gemm& gemm, cudaStream_t stream) {
  return gemm.token_count < 24 ? launch<T, 8, 1>(gemm, stream) : launch<T, 4, 2>(gemm, stream);
}

}  // namespace

cudaError_t launch_expand(const Gemm& gemm, cudaStream_t stream) {
  return gemm.y_dtype == DW_BFLOAT16 ? launch_typed<__nv_bfloat16>(gemm, stream)
                                     : launch_typed<__half>(gemm, stream);
}

}  // namespace dw

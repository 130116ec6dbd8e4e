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
// A team of warps shares an item: each streams its own stretch of the item's blocks through a ring
// (ring.cuh), and their sums meet in shared memory in warp order. Which warp sums what depends on
// the band list and the launch's bucket of tokens alone.
#include <cuda_bf16.h>

#include "fragment.cuh"
#include "kernels.h"
#include "ring.cuh"
#include "step.cuh"

namespace dw {
namespace {

constexpr int kStages = 3;
constexpr int kStageBytes = 2304;   // four blocks of 2 bits
constexpr int kTokens = 8;          // of a chunk
constexpr int kRound = 4;           // tokens whose sums meet at a time
constexpr int kPitch = kGroup + 4;  // floats between tokens when sums meet

// Blocks of ranks that one stage holds.
DW_HD constexpr int blocks_a_step(int bits) { return bits <= 2 ? 4 : bits <= 4 ? 2 : 1; }

// Consecutive blocks of one band of an item.
struct __align__(16) Step {
  const unsigned char* u;  // in the first group of outputs
  int group_bytes;         // to the next
  uint16_t bytes, h_index;
};
struct __align__(8) Kind {
  uint8_t bits, band, blocks, ranks;  // ranks: of the last block
  uint8_t levels, unused[3];
};

constexpr int kMaxBlocks = (DW_MAX_RANK + 16 * DW_MAX_BANDS) / 8;

template <int kTeam, int kTeams>
struct Shared {
  // A warp's share of the blocks, each in a step of its own at worst; a step more where shares and
  // bands are cut.
  static constexpr int kMaxSteps = kMaxBlocks / kTeam + 2;

  Step steps[kTeam][kMaxSteps];
  Kind kinds[kTeam][kMaxSteps];
  int step_count[kTeam];
  int largest[kTokens];  // |h|, as an integer
  float inverse[kTokens];
  uint2 biases[9][8];  // bits, product: of its registers 0 and 1, of its registers 2 and 3
  float loss[kTeams][kTeam][kRound][8];  // token, product: B + Z
  float sums[kTeams][kTeam][kRound * kPitch];
  uint64_t barriers[kTeams * kTeam][kStages];
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

// Lists the steps of every warp of a team, one warp a list, one lane a step.
template <int kTeam, int kTeams>
__device__ __forceinline__ void list_steps(const Gemm& gemm, const Unit& unit,
                                           Shared<kTeam, kTeams>& shared) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp >= kTeam) return;
  const Shapes shapes = load_shapes(unit.row);
  const int all = static_cast<int>(unit.row[DW_FIELD_ROW_BLOCKS]);
  const int low = all * warp / kTeam, high = all * (warp + 1) / kTeam;
  int done = 0, start = 0, h_start = 0;
#pragma unroll
  for (int b = 0; b < DW_MAX_BANDS; ++b) {
    if (shapes.of[b] == 0) break;
    const int bits = band_bits(shapes.of[b]), rank = band_rank(shapes.of[b]);
    const int blocks = block_count(bits, rank), size = blocks_a_step(bits);
    const int from = max(low - start, 0), to = min(high - start, blocks);
    const int steps = to > from ? ceil_div(to - from, size) : 0;
    const int64_t* fields = unit.row + DW_FIELD_BANDS + b * DW_BAND_FIELDS;
    for (int i = lane; i < steps; i += 32) {
      const int first = from + i * size, last = min(first + size, to) - 1;
      const int ranks = min(rank - last * block_ranks(bits), block_ranks(bits));
      const int bytes = (last - first) * whole_block_bytes(bits) + u_block_bytes(bits, ranks);
      shared.steps[warp][done + i] = {
          gemm.arena + fields[DW_BAND_U] + first * whole_block_bytes(bits),
          u_group_bytes(bits, rank), static_cast<uint16_t>(bytes),
          static_cast<uint16_t>(h_start + first * block_ranks(bits))};
      shared.kinds[warp][done + i] = {static_cast<uint8_t>(bits),
                                      static_cast<uint8_t>(b),
                                      static_cast<uint8_t>(last - first + 1),
                                      static_cast<uint8_t>(ranks),
                                      band_grid(shapes.of[b]) == DW_GRID_CODEBOOK,
                                      {}};
    }
    done += steps;
    start += blocks;
    h_start += padded_rank(rank);
  }
  if (lane == 0) shared.step_count[warp] = done;
}

// h of the unit's tokens as fp16 [token, pitch], each token times its own power of two; both passes
// read what stage 1 left in L2.
template <int kTeam, int kTeams>
__device__ __forceinline__ void make_h(const Gemm& gemm, const Unit& unit, int pitch, __half* h,
                                       Shared<kTeam, kTeams>& shared) {
  const int quads = static_cast<int>(unit.row[DW_FIELD_PADDED_RANK]) / 4;
  if (threadIdx.x < kTokens) shared.largest[threadIdx.x] = 0;
  __syncthreads();
  for (int token = 0; token < unit.chunk.z; ++token) {
    float largest = 0.f;
    for (int quad = threadIdx.x; quad < quads; quad += blockDim.x) {
      largest = fmaxf(largest, largest_of(h_quad(gemm, unit.slice, unit.chunk.y + token, quad)));
    }
    const int bits = __reduce_max_sync(0xffffffffu, __float_as_int(largest));
    if (threadIdx.x % 32 == 0) atomicMax(&shared.largest[token], bits);
  }
  __syncthreads();
  const float* header = reinterpret_cast<const float*>(gemm.arena + unit.row[DW_FIELD_HEADER]);
  for (int token = 0; token < unit.chunk.z; ++token) {
    const float factor = normalizer<7>(__int_as_float(shared.largest[token]));
    if (threadIdx.x == 0) shared.inverse[token] = header[1] / factor;
    for (int quad = threadIdx.x; quad < quads; quad += blockDim.x) {
      const float4 v = h_quad(gemm, unit.slice, unit.chunk.y + token, quad);
      const uint2 halves = make_uint2(bits_of(__floats2half2_rn(v.x * factor, v.y * factor)),
                                      bits_of(__floats2half2_rn(v.z * factor, v.w * factor)));
      *reinterpret_cast<uint2*>(h + token * pitch + 4 * quad) = halves;
    }
  }
}

// One warp's part in its team's items of one unit.
template <typename T, int kTeam, int kTeams>
struct Run {
  using WarpRing = Ring<kStages, kStageBytes>;

  const Gemm& gemm;
  const Unit& unit;
  Shared<kTeam, kTeams>& shared;
  WarpRing& ring;
  const unsigned char* memory;  // the ring's
  const __half* h;              // of this lane's token
  int lane, member, team, steps;
  int stage = 0, ahead_group, ahead_step = 0;

  __device__ __forceinline__ Run(const Gemm& gemm, const Unit& unit, Shared<kTeam, kTeams>& shared,
                                 WarpRing& ring, const unsigned char* memory, const __half* h,
                                 int pitch)
      : gemm(gemm), unit(unit), shared(shared), ring(ring), memory(memory) {
    lane = threadIdx.x % 32;
    member = threadIdx.x / 32 % kTeam;
    team = threadIdx.x / 32 / kTeam;
    steps = shared.step_count[member];
    this->h = h + min(lane / 4, unit.chunk.z - 1) * pitch + 4 * (lane % 4);
    ahead_group = unit.first + team;
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) fill(s);
  }

  __device__ __forceinline__ void fill(int to) {
    if (ahead_group >= unit.last || steps == 0) {
      ring.skip();
      return;
    }
    const Step step = shared.steps[member][ahead_step];
    ring.fill(to, step.u + static_cast<int64_t>(ahead_group) * step.group_bytes, step.bytes);
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
        const Kind kind = shared.kinds[member][s];
        const int h_index = shared.steps[member][s].h_index;
        ring.wait(stage);
        fill(stage == 0 ? kStages - 1 : stage - 1);
        dispatch(kind.bits, kind.levels, [&]<int kBits, bool kLevels>() {
          consume<kBits, kLevels>(memory + stage * kStageBytes, kind, h_index, acc, bias);
        });
        __syncwarp();
        stage = stage + 1 == kStages ? 0 : stage + 1;
      }
      finish(group, acc, bias);
    }
  }

  // All blocks of a step.
  template <int kBits, bool kLevels>
  __device__ __forceinline__ void consume(const unsigned char* codes, Kind kind, int h_index,
                                          float (&acc)[8][4], float (&bias)[4]) const {
    const __half* table = nullptr;
    if (kLevels) {
      const int field = DW_FIELD_BANDS + kind.band * DW_BAND_FIELDS + DW_BAND_LEVELS;
      table = reinterpret_cast<const __half*>(gemm.arena + unit.row[field]);
    }
    constexpr int kMost = blocks_a_step(kBits);
    constexpr int kRanks = block_ranks(kBits);
#pragma unroll
    for (int m = 0; m < kMost; ++m) {
      if (m >= kind.blocks) break;
      const int quads = m + 1 < kind.blocks ? kRanks / 4 : ceil_div(int{kind.ranks}, 4);
      multiply_block<kBits, kLevels>(codes + m * whole_block_bytes(kBits), quads,
                                     h_index + m * kRanks, table, acc, bias);
    }
  }

  template <int kBits, bool kLevels>
  __device__ __forceinline__ void multiply_block(const unsigned char* codes, int quads, int h_index,
                                                 const __half* table, float (&acc)[8][4],
                                                 float (&bias)[4]) const {
    const int quad = min(lane % 4, quads - 1);
    uint32_t words[2 * kBits];
    load_words<kBits>(words, codes, lane / 4 * quads + quad, 8 * quads);
    uint2 b = *reinterpret_cast<const uint2*>(h + h_index);
    if (lane % 4 >= quads) b = make_uint2(0, 0);
    uint32_t a[4];
    if constexpr (kBits != 16) {
      const uint4 grid =
          *reinterpret_cast<const uint4*>(codes + u_code_bytes(kBits, 4 * quads) + 16 * quad);
      b.x = bits_of(__hmul2(pair_of(b.x), pair_of(grid.x)));
      b.y = bits_of(__hmul2(pair_of(b.y), pair_of(grid.y)));
      a[1] = grid.z;
      a[3] = grid.w;
    }
    if constexpr (kBiased<kBits, kLevels>) {
      const uint2 biases = shared.biases[kBits][lane / 4];
      a[0] = biases.x;
      a[2] = biases.y;
      multiply(bias, a, b.x, b.y);
    }
#pragma unroll
    for (int f = 0; f < 8; ++f) {
      fragment<kBits, kLevels>(a, words, f, table);
      multiply(acc[f], a, b.x, b.y);
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
        float4* to = reinterpret_cast<float4*>(shared.sums[team][member] + token * kPitch +
                                               16 * (lane / 4));
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
  constexpr int kRings = kTeam * kTeams * kStages * kStageBytes;
  auto& shared = *reinterpret_cast<Shared<kTeam, kTeams>*>(memory + kRings);
  __half* h = reinterpret_cast<__half*>(memory + kRings + sizeof(shared));
  const int warp = threadIdx.x / 32;
  unsigned char* own = memory + warp * kStages * kStageBytes;
  typename Run<T, kTeam, kTeams>::WarpRing ring(own, shared.barriers[warp]);
  store_all_biases(shared.biases);
  const int64_t all = static_cast<int64_t>(chunk_count(gemm)) * groups;
  const int64_t end = all * (blockIdx.x + 1) / gridDim.x;
  bool waited = false;
  for (int64_t item = all * blockIdx.x / gridDim.x; item < end;) {
    const Unit unit = unit_at(gemm, item, end, groups);
    item += unit.last - unit.first;
    if (!is_factored(unit.row)) continue;
    list_steps(gemm, unit, shared);
    __syncthreads();
    Run<T, kTeam, kTeams> run(gemm, unit, shared, ring, own, h, pitch);
    if (!waited) after_previous();
    waited = true;
    let_next_begin();
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
  const int bytes = kTeam * kTeams * kStages * kStageBytes +
                    static_cast<int>(sizeof(Shared<kTeam, kTeams>)) + 2 * tokens * pitch;
  return launch_dependent(expand_kernel<T, kTeam, kTeams>, grid, 32 * kTeam * kTeams, bytes, stream,
                          gemm, groups, pitch);
}

template <typename T>
cudaError_t launch_typed(const Gemm& gemm, cudaStream_t stream) {
  if (gemm.token_count < 8) return launch<T, 16, 1>(gemm, stream);
  return gemm.token_count < 24 ? launch<T, 8, 1>(gemm, stream) : launch<T, 4, 2>(gemm, stream);
}

}  // namespace

cudaError_t launch_expand(const Gemm& gemm, cudaStream_t stream) {
  return gemm.y_dtype == DW_BFLOAT16 ? launch_typed<__nv_bfloat16>(gemm, stream)
                                     : launch_typed<__half>(gemm, stream);
}

}  // namespace dw

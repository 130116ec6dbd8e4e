// SPDX-License-Identifier: Apache-2.0
// Stage 1 of the delta product:  h[tile, s, t, r] = sigma[r] * sum over tile's k of V^[r, k] x[t, k]
//
//   x  fp16 or bf16 [tokens, in]   V^ packed (layout.h)   h  float [tiles, slices, tokens in plan
//   order, ranks]; stage 2 adds the tiles
//
// Roofline: bytes. A tenant's V^ is read once from memory for up to 8 tokens; 2 * rank * in * tokens
// flops are nothing beside it. What must be avoided is the integer pipe: see fragment.cuh.
//
// A tile is at most 32 groups of 128 features; how a row is cut depends on in_features alone. The
// 8 warps of a block of threads divide the groups of a tile: each keeps its part of x in registers,
// as the operand of the tensor core's 8 columns, and streams its groups of one block of 16 ranks
// (the 16-row operand) after another through its own ring (ring.cuh). Per group P = sum of biased
// codes * x, where the sum starts at minus what the biases contribute, D; with S = sum of x, a
// block's sum is acc += scale * (P - zero * S). D and S come from one more product a group, with the
// biases in rows 0-7 and ones in rows 8-15, when x or the bit width changes. Every four blocks of
// ranks the warps meet and add their sums in warp order. So a token's bits depend on nothing but its
// slot and x.
//
// The launch's work, all blocks of ranks of every (tokens of one tenant, slice, tile), is cut into
// equal runs, one a block of threads.
#include <cuda_bf16.h>

#include "fragment.cuh"
#include "kernels.h"
#include "ring.cuh"
#include "step.cuh"

namespace dw {
namespace {

constexpr int kTeam = 8;  // warps of a block of threads
constexpr int kTeamThreads = 32 * kTeam;
constexpr int kResident = 2;  // blocks of threads a multiprocessor
constexpr int kWarpGroups = kTileGroups / kTeam;
constexpr int kStages = 3;
constexpr int kStageBytes = 2304;  // four groups of 2 bits
constexpr int kTokens = 8;
constexpr int kBatch = 4;           // blocks of ranks between two meetings
constexpr int kTokenPitch = 16 + 4;  // floats between tokens of a partial sum: no bank conflicts
constexpr int kUnits = 4;            // listed at a time
constexpr int kSegments = kUnits * DW_MAX_BANDS;
constexpr uint32_t kOnes = 0x3c003c00u;

// Groups of a block of ranks that one stage holds.
DW_HD constexpr int groups_a_step(int bits) { return bits <= 2 ? 4 : bits <= 4 ? 2 : 1; }
static_assert(4 * whole_block_bytes(2) <= kStageBytes && 2 * whole_block_bytes(4) <= kStageBytes &&
                  kMaxBlockBytes <= kStageBytes,
              "every step fits a stage");

// Consecutive blocks of ranks of one band, for one chunk of tokens, slice and tile.
struct Segment {
  const unsigned char* v;  // the band's
  const __half* levels;    // of a codebook
  const float* sigma;      // of the band's first rank
  float* h;                // of the chunk's first token and the band's first rank
  int order, tokens;       // first token in plan order, count
  int unit, tile;
  int first, last;  // blocks
  int rank;         // of the band
  int bits;
  bool codebook;
};

struct Shared {
  Segment segments[kSegments];
  int segment_count;
  int most;
  struct {
    const Segment* segment;
    int block;
  } pending[2][kBatch];
  float4 sums[kTeam][kWarpGroups][4];  // -D, -D, S, S of tokens 2c and 2c + 1
  float partial[2][kBatch][kTeam][kTokens * kTokenPitch];
  uint64_t barriers[kTeam][kStages];
};

struct Range {
  int64_t first, last;
};

// Warp 0 lists the segments of `range` within kUnits units from `unit`: a lane a (unit, band).
__device__ void list_segments(const Gemm& gemm, Range range, int64_t unit, int most, Shared& shared) {
  const int lane = threadIdx.x, band = lane % DW_MAX_BANDS;
  const int64_t own = unit + lane / DW_MAX_BANDS;
  Segment segment = {};
  int blocks = 0, padded = 0;
  const int64_t* row = nullptr;
  if (own * most < range.last) {
    row = row_of(gemm, static_cast<int>(own / gemm.tiles));
    if (is_factored(row)) {
      const int64_t shape = row[DW_FIELD_BANDS + band * DW_BAND_FIELDS + DW_BAND_SHAPE];
      segment.bits = band_bits(shape);
      segment.rank = band_rank(shape);
      segment.codebook = band_grid(shape) == DW_GRID_CODEBOOK;
      if (segment.rank > 0) blocks = block_count(segment.bits, segment.rank);
      padded = padded_rank(segment.rank);
    }
  }
  int block_start = blocks, rank_start = padded;  // inclusive sums over the bands
#pragma unroll
  for (int step = 1; step < DW_MAX_BANDS; step *= 2) {
    const int more_blocks = __shfl_up_sync(0xffffffffu, block_start, step, DW_MAX_BANDS);
    const int more_ranks = __shfl_up_sync(0xffffffffu, rank_start, step, DW_MAX_BANDS);
    if (band >= step) {
      block_start += more_blocks;
      rank_start += more_ranks;
    }
  }
  block_start -= blocks;
  rank_start -= padded;
  const int64_t low = range.first - own * most, high = range.last - own * most;
  segment.first = static_cast<int>(max(low - block_start, int64_t{0}));
  segment.last = static_cast<int>(min(high - block_start, static_cast<int64_t>(blocks)));
  const bool valid = segment.first < segment.last;
  const unsigned all = __ballot_sync(0xffffffffu, valid);
  if (lane == 0) shared.segment_count = __popc(all);
  if (!valid) return;
  const int pair = static_cast<int>(own / gemm.tiles), slice = pair % gemm.slice_count;
  const int4 chunk = chunk_of(gemm, pair / gemm.slice_count);
  const int64_t* fields = row + DW_FIELD_BANDS + band * DW_BAND_FIELDS;
  segment.v = gemm.arena + fields[DW_BAND_V];
  segment.levels = reinterpret_cast<const __half*>(gemm.arena + fields[DW_BAND_LEVELS]);
  segment.sigma = reinterpret_cast<const float*>(gemm.arena + row[DW_FIELD_SIGMA]) + rank_start;
  segment.order = chunk.y;
  segment.tokens = chunk.z;
  segment.unit = static_cast<int>(own);
  segment.tile = static_cast<int>(own % gemm.tiles);
  segment.h = h_row(gemm, segment.tile, slice, chunk.y) + rank_start;
  shared.segments[__popc(all & ((1u << lane) - 1))] = segment;
}

// Which groups of a tile a warp has.
struct Groups {
  int first, count;

  __device__ __forceinline__ Groups(const Gemm& gemm, int tile) {
    const int size = gemm.tile_groups, each = ceil_div(size, kTeam);
    const int start = tile * size, stop = min(start + size, gemm.in_groups);
    first = start + threadIdx.x / 32 * each;
    count = max(0, min(each, stop - first));
  }
};

// Walks a batch of segments step by step, ahead of their use.
struct Filler {
  const Gemm& gemm;
  const Shared& shared;
  int segment = -1, block = 0, last = 0, first = 0, group = 0, groups = 0, step = 1;
  int whole = 0, tail = 0, tail_block = 0;  // bytes of a block, of the band's last, its index
  const unsigned char* v = nullptr;         // all groups of `block`

  __device__ __forceinline__ Filler(const Gemm& gemm, const Shared& shared)
      : gemm(gemm), shared(shared) {
    next_segment();
  }

  __device__ __forceinline__ void next_segment() {
    do {
      if (++segment >= shared.segment_count) return;
      const Segment& now = shared.segments[segment];
      const Groups own(gemm, now.tile);
      groups = own.count;
      step = groups_a_step(now.bits);
      whole = whole_block_bytes(now.bits);
      tail_block = block_count(now.bits, now.rank) - 1;
      tail = v_block_bytes(now.bits, last_block_ranks(now.bits, now.rank));
      block = now.first;
      last = now.last;
      v = now.v + static_cast<int64_t>(block) * gemm.in_groups * whole;
      first = own.first;
    } while (groups == 0);
    group = 0;
  }

  template <typename R>
  __device__ __forceinline__ void fill(R& ring, int stage) {
    if (segment >= shared.segment_count) {
      ring.skip();
      return;
    }
    const int bytes = block == tail_block ? tail : whole;
    const int count = min(step, groups - group);
    ring.fill(stage, v + (first + group) * bytes, count * bytes);
    group += step;
    if (group < groups) return;
    group = 0;
    v += static_cast<int64_t>(gemm.in_groups) * whole;
    if (++block == last) next_segment();
  }
};

// x of eight tokens and a warp's groups, as the tensor core's columns.
struct Activations {
  uint4 of[kWarpGroups][4];

  float inverse[2];  // undoes, for tokens 2c and 2c + 1, what their rows were multiplied with

  // A bf16 row's part is multiplied by a power of two that lets it fit into fp16.
  template <typename T>
  __device__ __forceinline__ void load(const Gemm& gemm, const Segment& segment, Groups own) {
    const int lane = threadIdx.x % 32;
    const int order = segment.order + min(lane / 4, segment.tokens - 1);
    const int64_t token = token_at(gemm, order);
    const T* row = static_cast<const T*>(gemm.x) + token * gemm.x_stride + own.first * kGroup;
#pragma unroll
    for (int g = 0; g < kWarpGroups; ++g) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        of[g][i] = make_uint4(0, 0, 0, 0);
        if (g < own.count) {
          of[g][i] =
              __ldcg(reinterpret_cast<const uint4*>(row + g * kGroup + 32 * i + 8 * (lane % 4)));
        }
      }
    }
    float factor = gemm.x_scale == nullptr ? 1.f : __ldcg(gemm.x_scale + token);
    if constexpr (std::is_same_v<T, __nv_bfloat16>) factor = to_half();
    inverse[0] = __shfl_sync(0xffffffffu, factor, 8 * (lane % 4));
    inverse[1] = __shfl_sync(0xffffffffu, factor, 8 * (lane % 4) + 4);
  }

  __device__ __forceinline__ float to_half() {
    __nv_bfloat162 most = __float2bfloat162_rn(0.f);
    for_all([&](uint32_t& pair) {
      most = __hmax2(most, __habs2(reinterpret_cast<__nv_bfloat162&>(pair)));
    });
    float largest = fmaxf(__low2float(most), __high2float(most));
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
    const float factor = normalizer<13>(largest);
    for_all([&](uint32_t& pair) {
      const float low = __uint_as_float(pair << 16), high = __uint_as_float(pair & 0xffff0000u);
      pair = bits_of(__floats2half2_rn(low * factor, high * factor));
    });
    return 1.f / factor;
  }

  template <typename Body>
  __device__ __forceinline__ void for_all(Body&& body) {
#pragma unroll
    for (int g = 0; g < kWarpGroups; ++g) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        body(of[g][i].x);
        body(of[g][i].y);
        body(of[g][i].z);
        body(of[g][i].w);
      }
    }
  }

  // The two registers of product f of a group.
  __device__ __forceinline__ uint2 columns(int g, int f) const {
    const uint4& four = of[g][f / 2];
    return f % 2 ? make_uint2(four.z, four.w) : make_uint2(four.x, four.y);
  }
};

template <int kBits>
__device__ __forceinline__ void find_sums(const Activations& x, float4 (&sums)[kWarpGroups][4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int g = 0; g < kWarpGroups; ++g) {
    float found[4] = {};
#pragma unroll
    for (int f = 0; f < 8; ++f) {
      const uint32_t a[4] = {bias_pair<kBits>(4 * f), kOnes, bias_pair<kBits>(4 * f + 2), kOnes};
      const uint2 columns = x.columns(g, f);
      multiply(found, a, columns.x, columns.y);
    }
    if (lane < 4) sums[g][lane] = make_float4(-found[0], -found[1], found[2], found[3]);
  }
  __syncwarp();
}

// acc += this warp's part of one group of a block of ranks.
template <int kBits, bool kLevels>
__device__ __forceinline__ void add_group(float (&acc)[4], const unsigned char* block, int ranks,
                                          const Activations& x, int g, const float4* sums,
                                          const __half* levels) {
  const int lane = threadIdx.x % 32, pairs = ceil_div(ranks, 2), pair = min(lane / 4, pairs - 1);
  uint32_t words[2 * kBits];
  load_words<kBits>(words, block, 4 * pair + lane % 4, 4 * pairs);
  float product[4] = {};
  float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
  if constexpr (kBiased<kBits, kLevels>) {
    sum = sums[lane % 4];
    product[0] = product[2] = sum.x;
    product[1] = product[3] = sum.y;
  }
#pragma unroll
  for (int f = 0; f < 8; ++f) {
    uint32_t a[4];
    fragment<kBits, kLevels>(a, words, f, levels);
    const uint2 columns = x.columns(g, f);
    multiply(product, a, columns.x, columns.y);
  }
  if constexpr (kBits == 16) {
#pragma unroll
    for (int j = 0; j < 4; ++j) acc[j] += product[j];
  } else {
    const uint2 grid = *reinterpret_cast<const uint2*>(block + v_code_bytes(kBits, ranks) + 8 * pair);
    const float2 low = __half22float2(pair_of(grid.x)), high = __half22float2(pair_of(grid.y));
    acc[0] = fmaf(low.x, fmaf(-low.y, sum.z, product[0]), acc[0]);
    acc[1] = fmaf(low.x, fmaf(-low.y, sum.w, product[1]), acc[1]);
    acc[2] = fmaf(high.x, fmaf(-high.y, sum.z, product[2]), acc[2]);
    acc[3] = fmaf(high.x, fmaf(-high.y, sum.w, product[3]), acc[3]);
  }
}

// One block of threads' run through its segments.
template <typename T>
struct Run {
  using WarpRing = Ring<kStages, kStageBytes>;

  const Gemm& gemm;
  Shared& shared;
  WarpRing& ring;
  const unsigned char* memory;  // the ring's
  Filler filler;
  int lane, warp;
  int stage = 0, waiting = 0, phase = 0;
  Activations x;

  __device__ __forceinline__ Run(const Gemm& gemm, Shared& shared, WarpRing& ring,
                                 const unsigned char* memory)
      : gemm(gemm),
        shared(shared),
        ring(ring),
        memory(memory),
        filler(gemm, shared),
        lane(threadIdx.x % 32),
        warp(threadIdx.x / 32) {
#pragma unroll
    for (int s = 0; s < kStages - 1; ++s) filler.fill(ring, s);
  }

  __device__ __forceinline__ void all_segments() {
    int unit = -1, bits = 0;
    for (int s = 0; s < shared.segment_count; ++s) {
      const Segment& segment = shared.segments[s];
      const Groups own(gemm, segment.tile);
      const bool fresh = segment.unit != unit;
      if (fresh) x.load<T>(gemm, segment, own);
      const bool other = fresh || segment.bits != bits;
      unit = segment.unit;
      bits = segment.bits;
      dispatch(segment.bits, segment.codebook, [&]<int kBits, bool kLevels>() {
        if constexpr (kBiased<kBits, kLevels>) {
          if (other) find_sums<kBits>(x, shared.sums[warp]);
        }
        blocks<kBits, kLevels>(segment, own.count);
      });
      if (segment.codebook || segment.bits == 16) bits = 0;  // no sums were found
    }
    if (waiting > 0) meet();
    __syncthreads();
  }

  template <int kBits, bool kLevels>
  __device__ __forceinline__ void blocks(const Segment& segment, int groups) {
    constexpr int kStep = groups_a_step(kBits);
    const int tail = block_count(kBits, segment.rank) - 1;
    for (int block = segment.first; block < segment.last; ++block) {
      const int ranks = block == tail ? last_block_ranks(kBits, segment.rank) : block_ranks(kBits);
      const int bytes = v_block_bytes(kBits, ranks);
      float acc[4] = {};
#pragma unroll
      for (int start = 0; start < kWarpGroups; start += kStep) {
        if (start >= groups) break;
        ring.wait(stage);
        filler.fill(ring, stage == 0 ? kStages - 1 : stage - 1);
        const unsigned char* codes = memory + stage * kStageBytes;
#pragma unroll
        for (int i = 0; i < kStep; ++i) {
          if (start + i >= groups) break;
          add_group<kBits, kLevels>(acc, codes + i * bytes, ranks, x, start + i,
                                    shared.sums[warp][start + i], segment.levels);
        }
        __syncwarp();
        stage = stage + 1 == kStages ? 0 : stage + 1;
      }
      keep(acc, segment, block);
    }
  }

  // Lays a block's sums out as [token, rank] for the meeting.
  __device__ __forceinline__ void keep(const float (&acc)[4], const Segment& segment, int block) {
    float* to = shared.partial[phase][waiting][warp] + 2 * (lane / 4);
    const int token = 2 * (lane % 4);
    if (token < segment.tokens) {
      const float2 sums = make_float2(acc[0] * x.inverse[0], acc[2] * x.inverse[0]);
      *reinterpret_cast<float2*>(to + token * kTokenPitch) = sums;
    }
    if (token + 1 < segment.tokens) {
      const float2 sums = make_float2(acc[1] * x.inverse[1], acc[3] * x.inverse[1]);
      *reinterpret_cast<float2*>(to + (token + 1) * kTokenPitch) = sums;
    }
    if (threadIdx.x == 0) shared.pending[phase][waiting] = {&segment, block};
    if (++waiting == kBatch) meet();
  }

  // Adds the warps' sums of the waiting blocks in warp order and writes h.
  __device__ __forceinline__ void meet() {
    __syncthreads();
    const int count = waiting;
    for (int i = threadIdx.x; i < count * 16 * kTokens; i += kTeamThreads) {
      const int place = i / (16 * kTokens), token = i / 16 % kTokens, rank = i % 16;
      const Segment& segment = *shared.pending[phase][place].segment;
      if (token >= segment.tokens) continue;
      const int size = block_ranks(segment.bits), block = shared.pending[phase][place].block;
      const int r = block * size + rank, padded = padded_rank(segment.rank);
      if (rank >= size && r < padded - 8) continue;  // ranks of the next block, which has eight
      float value = 0.f;
#pragma unroll
      for (int w = 0; w < kTeam; ++w) {
        value += shared.partial[phase][place][w][token * kTokenPitch + rank];
      }
      value = r < segment.rank ? value * segment.sigma[r] : 0.f;
      segment.h[static_cast<int64_t>(token) * gemm.ranks + r] = value;
    }
    waiting = 0;
    phase ^= 1;
  }
};

template <typename T>
__global__ void __launch_bounds__(kTeamThreads, kResident)
    shrink_kernel(const __grid_constant__ Gemm gemm) {
  extern __shared__ __align__(128) unsigned char memory[];
  unsigned char* rings = memory;
  Shared& shared = *reinterpret_cast<Shared*>(memory + kTeam * kStages * kStageBytes);
  const int warp = threadIdx.x / 32;
  typename Run<T>::WarpRing ring(rings + warp * kStages * kStageBytes, shared.barriers[warp]);
  const int pairs = chunk_count(gemm) * gemm.slice_count;
  const int most = most_blocks(gemm, &shared.most);
  const int64_t all = static_cast<int64_t>(pairs) * gemm.tiles * most;
  // Units are counted as if all had the most blocks.
  const Range range = {all * blockIdx.x / gridDim.x, all * (blockIdx.x + 1) / gridDim.x};
  bool waited = false;
  for (int64_t unit = most > 0 ? range.first / most : 0; unit * most < range.last; unit += kUnits) {
    if (warp == 0) list_segments(gemm, range, unit, most, shared);
    __syncthreads();
    Run<T> run(gemm, shared, ring, rings + warp * kStages * kStageBytes);
    if (!waited) after_previous();
    waited = true;
    let_next_begin();
    run.all_segments();
  }
  if (!waited) after_previous();
}

template <typename T>
cudaError_t launch(const Gemm& gemm, cudaStream_t stream) {
  const auto kernel = shrink_kernel<T>;
  constexpr int kBytes = kTeam * kStages * kStageBytes + static_cast<int>(sizeof(Shared));
  const int64_t most =
      static_cast<int64_t>(gemm.token_count) * gemm.slice_count * gemm.tiles * gemm.blocks;
  const int64_t resident = static_cast<int64_t>(multiprocessors()) * kResident;
  const int grid = static_cast<int>(most < resident ? most : resident);
  return launch_dependent(kernel, grid, kTeamThreads, kBytes, stream, gemm);
}

}  // namespace

cudaError_t launch_shrink(const Gemm& gemm, cudaStream_t stream) {
  return gemm.x_dtype == DW_BFLOAT16 ? launch<__nv_bfloat16>(gemm, stream)
                                     : launch<__half>(gemm, stream);
}

}  // namespace dw

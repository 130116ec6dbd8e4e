// SPDX-License-Identifier: Apache-2.0
// Stage 2 of the delta product for many tokens of a tenant:  y[s, t, n] += sum_r U^[r, n] h[s, t,
// r]
//
//   h  image (prefill.cuh)   U^ packed (layout.h)   y  fp16 or bf16 [tokens, out]
//
// Work item = (chunk, slice, two groups of 128 out_features), all ranks; four warps have a group. A
// stage holds up to 64 ranks of one band: their part of h's image and the codes of both groups. Of
// a block of 16 ranks, which feeds eight products of 16 outputs, warp w has products 2w and 2w + 1.
#include "prefill.cuh"

namespace dw {
namespace prefill {
namespace {

constexpr int kTeams = 2;  // groups of four warps
constexpr int kUnits = 4;  // of 16 ranks a stage
constexpr int kImageBytes = kTokens * 2 * 16 * kUnits;
constexpr int kCodesBytes = kUnits * kMaxBlockBytes;
constexpr int kStageBytes = kImageBytes + kTeams * kCodesBytes;

// Units of 16 ranks a stage holds, and blocks a unit.
DW_HD constexpr int units_a_step(int bits) { return bits == 16 ? 2 : kUnits; }
DW_HD constexpr int blocks_a_unit(int bits) { return bits == 16 ? 2 : 1; }

struct Item {
  int4 chunk;  // slot, first token in plan order, count, first row of the image
  const int64_t* row;
  int slice, group;  // group: the first of two
};

__device__ __forceinline__ Item item_at(const Gemm& gemm, int index, int group_pairs) {
  Item item;
  item.chunk = chunk_of(gemm, index / group_pairs);
  int pair = index % group_pairs;
  item.slice = 0;
  while (pair >= ceil_div(gemm.slices[item.slice].groups, kTeams)) {
    pair -= ceil_div(gemm.slices[item.slice++].groups, kTeams);
  }
  item.group = kTeams * pair;
  item.row = directory_row(gemm, gemm.slices[item.slice].projection, item.chunk.x);
  return item;
}

// A stage's ranks: units first_unit .. + units of one band.
struct Step {
  const unsigned char* u;  // the band's first group, the step's first block
  int group_bytes, bytes;  // bytes: of all its blocks of one group
  int bits, rank, units, first_unit, h_index;
  const __half* levels;
  bool codebook;
};

// Calls body(step) for all stages of a row, in order.
template <typename Body>
__device__ __forceinline__ void for_all_steps(const Gemm& gemm, const int64_t* row, Body&& body) {
  if (!is_factored(row)) return;
  int rank_start = 0;
  for (int b = 0; b < DW_MAX_BANDS; ++b) {
    const int64_t* fields = row + DW_FIELD_BANDS + b * DW_BAND_FIELDS;
    const int64_t shape = fields[DW_BAND_SHAPE];
    if (shape == 0) break;
    Step step;
    step.bits = band_bits(shape);
    step.rank = band_rank(shape);
    step.codebook = band_grid(shape) == DW_GRID_CODEBOOK;
    step.levels = reinterpret_cast<const __half*>(gemm.arena + fields[DW_BAND_LEVELS]);
    step.group_bytes = u_group_bytes(step.bits, step.rank);
    const int whole = whole_block_bytes(step.bits), size = units_a_step(step.bits);
    const int all = ceil_div(step.rank, 16), blocks = block_count(step.bits, step.rank);
    for (step.first_unit = 0; step.first_unit < all; step.first_unit += size) {
      const int first = step.first_unit * blocks_a_unit(step.bits);
      const int last = min(first + size * blocks_a_unit(step.bits), blocks);
      step.units = min(size, all - step.first_unit);
      step.u = gemm.arena + fields[DW_BAND_U] + first * whole;
      step.bytes = last < blocks ? (last - first) * whole : step.group_bytes - first * whole;
      step.h_index = rank_start + 16 * step.first_unit;
      body(step);
    }
    rank_start += padded_rank(step.rank);
  }
}

template <int kStages>
struct Shared {
  unsigned char stage[kStages][kStageBytes];
  Stages<kStages, kConsumers> stages;
};

template <int kStages>
__device__ void produce(const Gemm& gemm, const Item& item, Shared<kStages>& shared,
                        Turn<kStages>& turn) {
  const int rows = image_rows(item.chunk.z);
  const int teams = min(kTeams, gemm.slices[item.slice].groups - item.group);
  const unsigned char* image = h_image(gemm, item.slice, item.chunk);
  for_all_steps(gemm, item.row, [&](const Step& step) {
    unsigned char* stage = shared.stage[turn.place];
    const int image_bytes = step.units * 16 * 2 * rows;
    shared.stages.wait_empty(turn);
    shared.stages.expect(turn, image_bytes + teams * step.bytes);
    __syncwarp();
    shared.stages.copy_wide(turn, stage, image + static_cast<int64_t>(step.h_index) * 2 * rows,
                            image_bytes);
    for (int team = 0; team < teams; ++team) {
      shared.stages.copy_wide(turn, stage + kImageBytes + team * kCodesBytes,
                              step.u + static_cast<int64_t>(item.group + team) * step.group_bytes,
                              step.bytes);
    }
    shared.stages.close(turn);
    turn.next();
  });
}

// Products 2 * kWarp and 2 * kWarp + 1 of a block.
template <int kBits, bool kLevels, int kWarp>
__device__ __forceinline__ void unpack_two(uint32_t (&a)[2][4], const uint32_t (&words)[2 * kBits],
                                           const __half* levels, const __half2 (&scale)[2],
                                           const __half2 (&offset)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int r = 0; r < 4;
         ++r) {  // registers 0 and 1: the quad's first two ranks, 2 and 3: its last
      a[i][r] = weight<kBits, kLevels>(words, 4 * (2 * kWarp + i) + r, levels, scale[r / 2],
                                       offset[r / 2]);
    }
  }
}

template <int kBits, bool kLevels>
__device__ __forceinline__ void load_weights(uint32_t (&a)[2][4], const unsigned char* codes,
                                             int quads, int quad, const __half* levels) {
  const int lane = threadIdx.x % 32;
  uint32_t words[2 * kBits];
  load_words<kBits>(words, codes, lane / 4 * quads + quad, 8 * quads);
  __half2 scale[2] = {}, offset[2] = {};
  if constexpr (kBits != 16) {
    const uint4 grid =
        *reinterpret_cast<const uint4*>(codes + u_code_bytes(kBits, 4 * quads) + 16 * quad);
    scale[0] = pair_of(grid.x);
    scale[1] = pair_of(grid.y);
    offset[0] = __hneg2(__hmul2(scale[0], pair_of(grid.z)));
    offset[1] = __hneg2(__hmul2(scale[1], pair_of(grid.w)));
  }
  switch (threadIdx.x / 32 % 4) {
    case 0:
      return unpack_two<kBits, kLevels, 0>(a, words, levels, scale, offset);
    case 1:
      return unpack_two<kBits, kLevels, 1>(a, words, levels, scale, offset);
    case 2:
      return unpack_two<kBits, kLevels, 2>(a, words, levels, scale, offset);
    default:
      return unpack_two<kBits, kLevels, 3>(a, words, levels, scale, offset);
  }
}

// Weights of one unit of 16 ranks: this lane's quad of ranks, if the band has it.
template <int kBits, bool kLevels>
__device__ __forceinline__ void load_unit(uint32_t (&a)[2][4], const unsigned char* codes,
                                          const Step& step, int unit) {
  constexpr int kQuads = block_ranks(kBits) / 4;
  const int lane = threadIdx.x % 32;
  // At 16 bits a unit is two blocks of two quads.
  const int block = unit * blocks_a_unit(kBits) + lane % 4 / kQuads;
  const int left = step.rank - (step.first_unit * blocks_a_unit(kBits) + block) * 4 * kQuads;
  const int quads = min(kQuads, ceil_div(max(left, 1), 4)), quad = lane % 4 % kQuads;
  const bool present = 4 * quad < left;
  load_weights<kBits, kLevels>(a, codes + (left > 0 ? block : 0) * whole_block_bytes(kBits), quads,
                               min(quad, quads - 1), step.levels);
  if (present) return;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
#pragma unroll
    for (int r = 0; r < 4; ++r) a[i][r] = 0;
  }
}

// All units of a step, each whole: their weights are unpacked together.
__device__ __forceinline__ void multiply_whole(float (&sums)[2][kColumns][4],
                                               const unsigned char* codes,
                                               const unsigned char* image, const Step& step,
                                               int rows, bool active) {
  uint32_t a[2 * kUnits][4];
  if (active) {
    dispatch(step.bits, step.codebook, [&]<int kBits, bool kLevels>() {
      if constexpr (kBits != 16) {  // whose steps are of fewer units
#pragma unroll
        for (int unit = 0; unit < kUnits; ++unit) {
          uint32_t own[2][4];
          load_weights<kBits, kLevels>(own, codes + unit * whole_block_bytes(kBits), 4,
                                       threadIdx.x % 4, step.levels);
#pragma unroll
          for (int i = 0; i < 8; ++i) a[2 * unit + i / 4][i % 4] = own[i / 4][i % 4];
        }
      }
    });
  }
  __syncwarp();
  keep_in_registers(a);
  begin_products();
#pragma unroll
  for (int unit = 0; unit < kUnits; ++unit) {
    multiply_tile(sums[0], a[2 * unit], image + unit * 32 * rows, 16 * rows, rows);
    multiply_tile(sums[1], a[2 * unit + 1], image + unit * 32 * rows, 16 * rows, rows);
  }
  end_products();
  wait_products();  // the other four warps unpack meanwhile
  keep_in_registers(a);
}

// Any step, a unit at a time.
__device__ __forceinline__ void multiply_units(float (&sums)[2][kColumns][4],
                                               const unsigned char* codes,
                                               const unsigned char* image, const Step& step,
                                               int rows, bool active) {
#pragma unroll 1
  for (int unit = 0; unit < step.units; ++unit, image += 32 * rows) {
    uint32_t a[2][4] = {};
    if (active) {
      dispatch(step.bits, step.codebook,
               [&]<int kBits, bool kLevels>() { load_unit<kBits, kLevels>(a, codes, step, unit); });
    }
    __syncwarp();
    keep_in_registers(a);
    begin_products();
    multiply_tile(sums[0], a[0], image, 16 * rows, rows);
    multiply_tile(sums[1], a[1], image, 16 * rows, rows);
    end_products();
    wait_products();
    keep_in_registers(a);
  }
}

template <typename T, int kStages>
__device__ void consume(const Gemm& gemm, const Item& item, Shared<kStages>& shared,
                        Turn<kStages>& turn) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, rows = image_rows(item.chunk.z);
  const int group = item.group + warp / 4;
  const bool active = group < gemm.slices[item.slice].groups;
  float sums[2][kColumns][4] = {};
  for_all_steps(gemm, item.row, [&](const Step& step) {
    const unsigned char* stage = shared.stage[turn.place];
    const unsigned char* codes = stage + kImageBytes + warp / 4 * kCodesBytes;
    shared.stages.wait_full(turn);
    if (step.units == kUnits && step.rank >= 16 * (step.first_unit + kUnits)) {
      multiply_whole(sums, codes, stage, step, rows, active);
    } else {
      multiply_units(sums, codes, stage, step, rows, active);
    }
    shared.stages.release(turn);
    turn.next();
  });
  if (!active || !is_factored(item.row)) return;
  // Lane 4q + c has outputs 16q + 4w .. + 3 of tokens 8j + 2c and 8j + 2c + 1.
  const Slice& slice = gemm.slices[item.slice];
  const int n = group * kGroup - slice.out_offset + 16 * (lane / 4) + 4 * (warp % 4);
  const float* header = reinterpret_cast<const float*>(gemm.arena + item.row[DW_FIELD_HEADER]);
  const float* h_scale =
      gemm.h_scale + static_cast<int64_t>(item.slice) * gemm.token_count + item.chunk.y;
#pragma unroll
  for (int j = 0; j < kColumns; ++j) {
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      const int token = 8 * j + 2 * (lane % 4) + column;
      if (token >= item.chunk.z) continue;
      T* row = static_cast<T*>(slice.y) + token_at(gemm, item.chunk.y + token) * slice.y_stride;
      Outputs<T> outputs(row, n, slice.out_features);
      const float scale = __ldcg(h_scale + token) * header[1];
      const float delta[4] = {sums[0][j][column] * scale, sums[0][j][2 + column] * scale,
                              sums[1][j][column] * scale, sums[1][j][2 + column] * scale};
      outputs.add_all(delta);
    }
  }
}

template <typename T, int kStages>
__global__ void __launch_bounds__(kThreads, 1)
    expand_kernel(const __grid_constant__ Gemm gemm, int group_pairs) {
  extern __shared__ __align__(128) unsigned char memory[];
  auto& shared = *reinterpret_cast<Shared<kStages>*>(memory);
  if (threadIdx.x == 0) shared.stages.initialize();
  __syncthreads();
  const int items = chunk_count(gemm) * group_pairs;
  after_previous();
  let_next_begin();
  Turn<kStages> turn;
  if (threadIdx.x / 32 >= kConsumers) {
    give_registers();
    if (threadIdx.x / 32 > kConsumers) return;
    for (int index = blockIdx.x; index < items; index += gridDim.x) {
      produce(gemm, item_at(gemm, index, group_pairs), shared, turn);
    }
  } else {
    take_registers();
    for (int index = blockIdx.x; index < items; index += gridDim.x) {
      consume<T>(gemm, item_at(gemm, index, group_pairs), shared, turn);
    }
  }
}

template <typename T, int kStages>
cudaError_t launch(const Gemm& gemm, cudaStream_t stream) {
  int group_pairs = 0;
  for (int s = 0; s < gemm.slice_count; ++s) group_pairs += ceil_div(gemm.slices[s].groups, kTeams);
  return launch_dependent(expand_kernel<T, kStages>, dim3(multiprocessors()), kThreads,
                          sizeof(Shared<kStages>), stream, gemm, group_pairs);
}

template <typename T>
cudaError_t launch_typed(const Gemm& gemm, cudaStream_t stream) {
  const int bytes = shared_bytes_a_block();
  return bytes >= static_cast<int>(sizeof(Shared<4>)) ? launch<T, 4>(gemm, stream)
                                                      : launch<T, 2>(gemm, stream);
}

}  // namespace

cudaError_t launch_expand(const Gemm& gemm, cudaStream_t stream) {
  return gemm.y_dtype == DW_BFLOAT16 ? launch_typed<__nv_bfloat16>(gemm, stream)
                                     : launch_typed<__half>(gemm, stream);
}

}  // namespace prefill
}  // namespace dw

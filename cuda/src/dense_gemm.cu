// SPDX-License-Identifier: Apache-2.0
// lm_head of tenants that bring rows of it:
//
//   y[t, r] += sum_k scale * (code[r, k] - zero) x[t, k]     a DENSE record
//   y[t, indices[r]] = sum_k row[r, k] x[t, k]               a ROWS record
//
//   x  fp16 or bf16 [tokens, in]   y  the same dtype [tokens, out]
//   rows  codes, or fp16 values, in v's order (layout.h)
//
// Roofline: bytes. A tenant's rows are read once from memory for up to 8 * kTiles tokens: 135 MB at
// 32000 x 4096 and 8 bits, 32 us at 4.2 TB/s. x (8 KB a token) stays in L1. On an H200: 44 us for
// one tenant, 91 % of the copy rate for 8, 97 % for 32.
//
// Work item = (chunk of one tenant's tokens, block of rows), one warp: it streams the block's
// groups, which lie one behind the other, through its own ring (ring.cuh). Rows are the tensor
// core's 16-row operand, tokens its 8 columns. Per group of 128 features P = sum of biased codes *
// x, and one more product has the biases in rows 0-7 and ones in rows 8-15, which gives D = sum of
// biases * x and S = sum of x: acc += scale * (P - D - zero * S). Sums run over the groups in
// order, so a token's bits depend on nothing but its slot and x.
#include "batch.cuh"
#include "fragment.cuh"
#include "gemm_args.h"
#include "kernels.h"
#include "ring.cuh"
#include "status.h"

namespace dw {
namespace {

constexpr int kStages = 4;
constexpr int kStageBytes = 2304;  // four groups of 2 bits
constexpr uint32_t kOnes = 0x3c003c00u;

using WarpRing = Ring<kStages, kStageBytes>;

// Groups of a block that one stage holds.
constexpr int groups_a_stage(int bits) { return bits <= 2 ? 4 : bits <= 4 ? 2 : 1; }
static_assert(4 * whole_block_bytes(2) <= kStageBytes && 2 * whole_block_bytes(4) <= kStageBytes &&
                  kMaxBlockBytes <= kStageBytes,
              "every step fits a stage");

// One call of dw_dense_gemm as the device sees it.
struct Dense {
  const unsigned char* arena;
  const int64_t* rows;  // of the directory: the parameter's, one a slot
  const int* plan;
  int token_count, chunk_tokens, in_groups, out_features;
  const __half* x;  // [tokens, 128 * in_groups]
  int64_t x_stride;
  const float* x_scale;  // undoes x's power of two; null for 1
  void* y;
  int64_t y_stride;
};

// A tenant's record and the tokens it is multiplied with.
struct Work {
  const unsigned char* v;
  const __half* levels;
  const int32_t* indices;  // of a ROWS record, else null
  int rows, bits;
  bool codebook;
  int order, tokens;  // the chunk: first token in plan order, count
};

__device__ __forceinline__ int chunk_count(const Dense& dense) {
  return dense.plan[kPlanChunkTokens] == dense.chunk_tokens ? dense.plan[kPlanChunks] : 0;
}

__device__ __forceinline__ int4 chunk_of(const Dense& dense, int chunk) {
  return reinterpret_cast<const int4*>(dense.plan + plan_chunks(dense.token_count))[chunk];
}

__device__ __forceinline__ const int64_t* row_of(const Dense& dense, int4 chunk) {
  return dense.rows + static_cast<int64_t>(chunk.x) * DW_DIRECTORY_FIELDS;
}

// Blocks of rows that this product takes of a record; none of other kinds.
__device__ __forceinline__ int block_count_of(const int64_t* row) {
  const int64_t kind = row[DW_FIELD_KIND], shape = row[DW_FIELD_BANDS + DW_BAND_SHAPE];
  const bool mine = kind == DW_DENSE + 1 || kind == DW_ROWS + 1;
  return mine ? block_count(band_bits(shape), band_rank(shape)) : 0;
}

__device__ __forceinline__ Work find_work(const Dense& dense, int index) {
  const int4 chunk = chunk_of(dense, index);
  const int64_t* row = row_of(dense, chunk);
  const int64_t* band = row + DW_FIELD_BANDS;
  const int64_t shape = band[DW_BAND_SHAPE];
  Work work;
  work.v = dense.arena + band[DW_BAND_V];
  work.levels = reinterpret_cast<const __half*>(dense.arena + band[DW_BAND_LEVELS]);
  work.indices = nullptr;
  if (row[DW_FIELD_KIND] == DW_ROWS + 1) {
    work.indices = reinterpret_cast<const int32_t*>(dense.arena + row[DW_FIELD_INDICES]);
  }
  work.rows = band_rank(shape);
  work.bits = band_bits(shape);
  work.codebook = band_grid(shape) == DW_GRID_CODEBOOK;
  work.order = chunk.y;
  work.tokens = chunk.z;
  return work;
}

// The product of one block of rows and up to 8 * kTiles tokens.
template <int kBits, bool kLevels, int kTiles>
struct BlockProduct {
  static constexpr int kStep = groups_a_stage(kBits);

  WarpRing& ring;
  const unsigned char* memory;  // the ring's
  const unsigned char* from;    // the block's first group
  int ranks, groups;
  const __half* levels;
  const __half* x[kTiles];  // tokens 8 * tile + lane / 4, from feature 8 * (lane % 4); null: none
  float acc[kTiles][4] = {};

  __device__ __forceinline__ void fill(int stage, int step) const {
    const int count = min(kStep, groups - step * kStep), bytes = v_block_bytes(kBits, ranks);
    if (count > 0) {
      ring.fill(stage, from + static_cast<int64_t>(step) * kStep * bytes, count * bytes);
    } else {
      ring.skip();
    }
  }

  __device__ __forceinline__ void run() {
    const int steps = ceil_div(groups, kStep), bytes = v_block_bytes(kBits, ranks);
#pragma unroll
    for (int step = 0; step < kStages - 1; ++step) fill(step, step);
    int stage = 0, spare = kStages - 1;
    for (int step = 0; step < steps; ++step) {
      ring.wait(stage);
      fill(spare, step + kStages - 1);
#pragma unroll
      for (int i = 0; i < kStep; ++i) {
        const int group = step * kStep + i;
        if (group < groups) add_group(memory + stage * kStageBytes + i * bytes, group);
      }
      __syncwarp();
      spare = stage;
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
  }

  __device__ __forceinline__ void add_group(const unsigned char* block, int group) {
    const int lane = threadIdx.x % 32, pairs = ceil_div(ranks, 2), pair = min(lane / 4, pairs - 1);
    uint32_t words[2 * kBits];
    load_words<kBits>(words, block, 4 * pair + lane % 4, 4 * pairs);
    float products[kTiles][4] = {}, sums[kTiles][4] = {};  // sums: D, D, S, S of two tokens
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint4 b[kTiles];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        b[tile] = make_uint4(0, 0, 0, 0);
        if (x[tile] != nullptr) {
          b[tile] = *reinterpret_cast<const uint4*>(x[tile] + group * kGroup + 32 * i);
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int f = 2 * i + half;
        uint32_t a[4];
        fragment<kBits, kLevels>(a, words, f, levels);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          multiply(products[tile], a, half ? b[tile].z : b[tile].x, half ? b[tile].w : b[tile].y);
        }
        if constexpr (kBiased<kBits, kLevels>) {
          const uint32_t ones[4] = {bias_pair<kBits>(4 * f), kOnes, bias_pair<kBits>(4 * f + 2),
                                    kOnes};
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
            multiply(sums[tile], ones, half ? b[tile].z : b[tile].x, half ? b[tile].w : b[tile].y);
          }
        }
      }
    }
    float2 grid[2] = {make_float2(1.f, 0.f), make_float2(1.f, 0.f)};  // (scale, zero) of two rows
    if constexpr (kBits != 16) {
      const uint2 raw =
          *reinterpret_cast<const uint2*>(block + v_code_bytes(kBits, ranks) + 8 * pair);
      grid[0] = __half22float2(pair_of(raw.x));
      grid[1] = __half22float2(pair_of(raw.y));
    }
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float sum =
            products[tile][j] - sums[tile][j % 2] - grid[j / 2].y * sums[tile][2 + j % 2];
        acc[tile][j] += grid[j / 2].x * sum;
      }
    }
  }
};

// One warp's share of the launch.
template <typename T, int kTiles>
struct Warp {
  const Dense& dense;
  WarpRing& ring;
  const unsigned char* memory;
  int lane = threadIdx.x % 32;

  __device__ __forceinline__ int token_at(int order) const {
    return dense.plan[plan_order(dense.token_count) + order];
  }

  // One block of rows for all tokens of a chunk.
  __device__ __forceinline__ void item(const Work& work, int index) const {
    dispatch(work.bits, work.codebook, [&]<int kBits, bool kLevels>() {
      for (int token = 0; token < work.tokens; token += 8 * kTiles) {
        multiply_block<kBits, kLevels>(work, index, token);
      }
    });
  }

  template <int kBits, bool kLevels>
  __device__ __forceinline__ void multiply_block(const Work& work, int index, int token) const {
    const int row = index * block_ranks(kBits);
    BlockProduct<kBits, kLevels, kTiles> product = {ring, memory};
    product.from =
        work.v + static_cast<int64_t>(index) * dense.in_groups * whole_block_bytes(kBits);
    product.ranks = min(work.rows - row, block_ranks(kBits));
    product.groups = dense.in_groups;
    product.levels = work.levels;
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      const int mine = token + 8 * tile + lane / 4;
      product.x[tile] = nullptr;
      if (mine < work.tokens) {
        product.x[tile] = dense.x + token_at(work.order + mine) * dense.x_stride + 8 * (lane % 4);
      }
    }
    product.run();
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      finish(work, row, product.ranks, token + 8 * tile, product.acc[tile]);
    }
  }

  // Rows 2q and 2q + 1 of a block, tokens 2c and 2c + 1 of a tile.
  __device__ __forceinline__ void finish(const Work& work, int row, int ranks, int token,
                                         const float (&acc)[4]) const {
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      const int mine = token + 2 * (lane % 4) + column;
      if (mine >= work.tokens) continue;
      const int64_t t = token_at(work.order + mine);
      const float scale = dense.x_scale == nullptr ? 1.f : dense.x_scale[t];
      T* y = static_cast<T*>(dense.y) + t * dense.y_stride;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int rank = 2 * (lane / 4) + half;
        if (rank < ranks) put(work, y, row + rank, acc[2 * half + column] * scale);
      }
    }
  }

  __device__ __forceinline__ void put(const Work& work, T* y, int row, float value) const {
    const int output = work.indices == nullptr ? row : work.indices[row];
    if (output < 0 || output >= dense.out_features) return;
    y[output] = rounded<T>(work.indices == nullptr ? to_float(y[output]) + value : value);
  }
};

template <int kTiles>
constexpr int kResident = kTiles == 1 ? 2 : 1;  // blocks of threads a multiprocessor

template <typename T, int kTiles>
__global__ void __launch_bounds__(kThreads, kResident<kTiles>)
    dense_kernel(const __grid_constant__ Dense dense) {
  extern __shared__ __align__(128) unsigned char shared[];
  __shared__ uint64_t barriers[kWarps][kStages];
  __shared__ int blocks[DW_MAX_TOKENS];  // work items a chunk
  const int chunks = chunk_count(dense), warp = threadIdx.x / 32;
  for (int chunk = threadIdx.x; chunk < chunks; chunk += kThreads) {
    blocks[chunk] = block_count_of(row_of(dense, chunk_of(dense, chunk)));
  }
  __syncthreads();
  unsigned char* memory = shared + warp * kStages * kStageBytes;
  WarpRing ring(memory, barriers[warp]);
  const Warp<T, kTiles> self = {dense, ring, memory};
  int next = warp * gridDim.x + blockIdx.x;  // few items go to many multiprocessors
  for (int chunk = 0, start = 0; chunk < chunks; start += blocks[chunk++]) {
    if (next >= start + blocks[chunk]) continue;
    const Work work = find_work(dense, chunk);
    for (; next < start + blocks[chunk]; next += gridDim.x * kWarps) self.item(work, next - start);
  }
}

template <typename T, int kTiles>
cudaError_t launch(const Dense& dense, cudaStream_t stream) {
  const auto kernel = dense_kernel<T, kTiles>;
  constexpr int kShared = kWarps * kStages * kStageBytes;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kShared);
  if (error != cudaSuccess) return error;
  const int64_t most =
      static_cast<int64_t>(dense.token_count) * ceil_div(dense.out_features, 8 * kWarps);
  const int64_t resident = static_cast<int64_t>(multiprocessors()) * kResident<kTiles>;
  const int grid = static_cast<int>(most < resident ? most : resident);
  kernel<<<grid, kThreads, kShared, stream>>>(dense);
  return cudaGetLastError();
}

template <typename T>
cudaError_t launch_typed(const Dense& dense, cudaStream_t stream) {
  return dense.chunk_tokens > 8 ? launch<T, 4>(dense, stream) : launch<T, 1>(dense, stream);
}

// Whether the kernel can read x where it is: fp16 in whole groups of 128, 16 bytes at a time.
bool is_readable(const dw_gemm& args) {
  return args.dtype == DW_FLOAT16 && reinterpret_cast<uintptr_t>(args.x) % 16 == 0 &&
         args.x_stride % 8 == 0 && args.in_features % kGroup == 0 && args.in_offset == 0;
}

Dense describe(const dw_gemm& args, const Workspace& cut, bool in_place) {
  const unsigned char* workspace = static_cast<const unsigned char*>(args.workspace);
  const dw_slice& slice = args.slices[0];
  Dense dense = {};
  dense.arena = static_cast<const unsigned char*>(args.arena);
  dense.rows = args.directory +
               static_cast<int64_t>(slice.parameter) * args.slot_count * DW_DIRECTORY_FIELDS;
  dense.plan = static_cast<const int*>(args.plan);
  dense.token_count = args.token_count;
  dense.chunk_tokens = resolve_chunk(args.chunk_tokens, args.token_count);
  dense.in_groups = cut.padded_in / kGroup;
  dense.out_features = slice.out_features;
  dense.x = static_cast<const __half*>(args.x);
  dense.x_stride = args.x_stride;
  if (!in_place) {
    dense.x = reinterpret_cast<const __half*>(workspace + cut.x);
    dense.x_scale = reinterpret_cast<const float*>(workspace + cut.x_scale);
    dense.x_stride = cut.padded_in;
  }
  dense.y = slice.y;
  dense.y_stride = slice.y_stride;
  return dense;
}

}  // namespace
}  // namespace dw

dw_status dw_dense_gemm(const dw_gemm* args, void* stream_pointer) {
  if (args == nullptr) return dw::fail(DW_ERROR_ARGUMENT, "null argument");
  DW_RETURN_IF_ERROR(dw::check_dense(*args));
  const cudaStream_t stream = static_cast<cudaStream_t>(stream_pointer);
  const dw::Workspace cut = dw::cut_workspace(*args);
  const bool in_place = dw::is_readable(*args);
  if (!in_place) {
    DW_RETURN_IF_ERROR(dw::check_launch(dw::launch_prepare(*args, cut, stream), "prepare"));
  }
  const dw::Dense dense = dw::describe(*args, cut, in_place);
  return dw::check_launch(args->dtype == DW_BFLOAT16
                              ? dw::launch_typed<__nv_bfloat16>(dense, stream)
                              : dw::launch_typed<__half>(dense, stream),
                          "dw_dense_gemm");
}

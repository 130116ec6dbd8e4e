// SPDX-License-Identifier: Apache-2.0
// Both products of the prefill path, over the images of prefill_images.cu:
//
//   stage 1   h[part, s, t, r] = sigma[r] * sum over part's k of V^[r, k] x[t, k]     float
//   stage 2   y[s, t, n] += sum_r U^[r, n] h[s, t, r]                         fp16 or bf16 [tokens,
//   out]
//
// (times what the images were scaled by, which stage 2 undoes)
//
// Roofline: the tensor cores, 2 * rank * (in + out) flops a token: for Llama-2-7B 3.3 ms of 512
// tokens at 990 TFLOP/s. A tile of 128 x kColumns takes (128 + kColumns) * 128 bytes from L2 for
// 16384 * kColumns flops, and stage 2 reads and writes y.
//
// Work item = (chunk of 128 tokens, slice, kColumns ranks or outputs, in stage 1 a part of
// in_features), all k. Consecutive items are the chunks that share weights. A block of threads
// takes every gridDim-th: one warp copies tiles of 64 k of both operands ahead into a ring of
// stages, over the ends of items; two groups of four warps multiply, 64 tokens each: wgmma with
// both operands from shared memory on sm_90a, mma.sync elsewhere, with the same sums in the same
// registers. Sums run over k in order, parts are added in order by the image of h: a token's bits
// depend on nothing but its slot and x.
#include <cuda_bf16.h>

#include "batch.cuh"
#include "prefill.cuh"

namespace dw {
namespace prefill {
namespace {

constexpr int kConsumers = 8;                    // warps that multiply
constexpr int kThreads = 32 * (kConsumers + 4);  // of the other four one copies

template <int kColumns, int kStages>
struct Shared {
  struct Stage {
    unsigned char tokens[kTileBytes], weights[kColumns / kTileRows * kTileBytes];
  } stage[kStages];
  Stages<kStages, kConsumers> stages;
};

struct Item {
  int4 chunk;  // slot, first token in plan order, count, place among the dense slots
  const int64_t* row;
  int slice, part;
  int column;             // the first rank, or the first output's place in whole groups
  int depth;              // k tiles; 0: nothing to do
  int weights_rows;       // tiles of 128 rows, 1 or 2
  int64_t weights_pitch;  // bytes between them
  const unsigned char *tokens, *weights;  // first tiles
};

// This thread's rows of an item's tokens: `half` 0 and 1.
__device__ __forceinline__ int token_row(int half) {
  return threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4 + 8 * half;
}

template <int kColumns>
struct Stage1 {
  const Gemm& gemm;
  int chunks, items, tiles;  // tiles: of columns, of the record with the most ranks

  __device__ __forceinline__ explicit Stage1(const Gemm& gemm)
      : gemm(gemm), chunks(dense_chunks(gemm)), items(0), tiles(1) {
    if (chunks == 0) return;
    tiles = ceil_div(__ldcg(gemm.cuts), kColumns);
    items = chunks * gemm.slice_count * tiles * __ldcg(gemm.cuts + 1);
  }

  __device__ __forceinline__ Item at(int index) const {
    Item item;
    const int chunk = index % chunks;
    index /= chunks;
    item.slice = index % gemm.slice_count;
    index /= gemm.slice_count;
    item.column = index % tiles * kColumns;
    item.part = index / tiles;
    item.chunk = dense_chunk(gemm, chunk);
    item.row = directory_row(gemm, gemm.slices[item.slice].projection, item.chunk.x);
    const int depth = input_tiles(gemm), padded = padded_ranks(gemm, item.row);
    const int each = ceil_div(depth, parts_of(gemm, item.slice, item.chunk.w));
    const int first = item.part * each;
    item.depth = item.column < padded ? max(0, min(each, depth - first)) : 0;
    item.weights_rows = min(ceil_div(padded - item.column, kTileRows), kColumns / kTileRows);
    item.weights_pitch = static_cast<int64_t>(depth) * kTileBytes;
    item.tokens = gemm.x_image + (static_cast<int64_t>(chunk) * depth + first) * kTileBytes;
    item.weights = v_image(gemm, item.slice, item.chunk.w) +
                   item.column / kTileRows * item.weights_pitch +
                   static_cast<int64_t>(first) * kTileBytes;
    return item;
  }

  __device__ __forceinline__ void expect_y(const Item&) const {}

  __device__ __forceinline__ void finish(const Item& item, const Sums<kColumns>& sums) const {
    const int lane_column = item.column + threadIdx.x % 4 * 2,
              padded = padded_ranks(gemm, item.row);
    const float* sigma = reinterpret_cast<const float*>(gemm.arena + item.row[DW_FIELD_SIGMA]);
    float* to[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int order = item.chunk.y + min(token_row(half), item.chunk.z - 1);
      to[half] = h_row(gemm, item.part, item.slice, order);
    }
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
      const int column = lane_column + 8 * j;
      if (column >= padded) break;
      const float2 factor = __ldg(reinterpret_cast<const float2*>(sigma + column));
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (token_row(half) >= item.chunk.z) continue;
        *reinterpret_cast<float2*>(to[half] + column) =
            make_float2(sums[j][2 * half] * factor.x, sums[j][2 * half + 1] * factor.y);
      }
    }
  }
};

template <typename T, int kColumns>
struct Stage2 {
  static constexpr int kGroups = kColumns / kGroup;  // an item

  const Gemm& gemm;
  int chunks, items;

  __device__ __forceinline__ explicit Stage2(const Gemm& gemm)
      : gemm(gemm), chunks(dense_chunks(gemm)), items(0) {
    for (int s = 0; s < gemm.slice_count; ++s) {
      items += chunks * ceil_div(gemm.slices[s].groups, kGroups);
    }
  }

  __device__ __forceinline__ Item at(int index) const {
    Item item;
    const int chunk = index % chunks;
    index /= chunks;
    item.slice = item.part = 0;
    while (index >= ceil_div(gemm.slices[item.slice].groups, kGroups)) {
      index -= ceil_div(gemm.slices[item.slice++].groups, kGroups);
    }
    item.column = index * kColumns;
    item.chunk = dense_chunk(gemm, chunk);
    item.row = directory_row(gemm, gemm.slices[item.slice].projection, item.chunk.x);
    item.depth = rank_tiles(padded_ranks(gemm, item.row));
    item.weights_rows = min(gemm.slices[item.slice].groups - index * kGroups, kGroups);
    item.weights_pitch = static_cast<int64_t>(gemm.rank_tiles) * kTileBytes;
    item.tokens = h_image(gemm, item.slice) + chunk * item.weights_pitch;
    item.weights = u_image(gemm, item.slice, item.chunk.w) + index * kGroups * item.weights_pitch;
    return item;
  }

  __device__ __forceinline__ T* y_row(const Item& item, int row) const {
    const Slice& slice = gemm.slices[item.slice];
    return static_cast<T*>(slice.y) + token_at(gemm, item.chunk.y + row) * slice.y_stride;
  }

  // The copying warp asks L2 for the item's part of y.
  __device__ __forceinline__ void expect_y(const Item& item) const {
    const Slice& slice = gemm.slices[item.slice];
    const int first = max(0, item.column - slice.out_offset);
    const int last = min(item.column + kColumns - slice.out_offset, slice.out_features);
    for (int row = threadIdx.x % 32; row < item.chunk.z; row += 32) {
      const T* from = y_row(item, row);
      for (int n = first; n < last; n += 64) {
        asm volatile("prefetch.global.L2 [%0];" ::"l"(from + n));
      }
    }
  }

  // Lane 4q + c has outputs 32b + 8c .. + 7 of rows q and q + 8.
  __device__ __forceinline__ void finish(const Item& item, const Sums<kColumns>& sums) const {
    const Slice& slice = gemm.slices[item.slice];
    const int first = item.column - slice.out_offset + 8 * (threadIdx.x % 4);
    const float* header = reinterpret_cast<const float*>(gemm.arena + item.row[DW_FIELD_HEADER]);
    const float* h_scale =
        gemm.h_scale + static_cast<int64_t>(item.slice) * gemm.token_count + item.chunk.y;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = token_row(half);
      if (row >= item.chunk.z) continue;
      T* y = y_row(item, row);
      const float scale = __ldcg(h_scale + row) * header[1];
      const auto delta = [&](int b, float (&values)[8]) {
#pragma unroll
        for (int i = 0; i < 8; ++i) values[i] += sums[4 * b + i / 2][2 * half + i % 2] * scale;
      };
      float values[8];
      if (is_wide(y, first, slice.out_features - (kColumns - 32))) {
        uint4 old[kColumns / 32];
#pragma unroll
        for (int b = 0; b < kColumns / 32; ++b) {
          old[b] = __ldcg(reinterpret_cast<const uint4*>(y + first + 32 * b));
        }
#pragma unroll
        for (int b = 0; b < kColumns / 32; ++b) {
          read_octet<T>(old[b], values);
          delta(b, values);
          *reinterpret_cast<uint4*>(y + first + 32 * b) = write_octet<T>(values);
        }
        continue;
      }
#pragma unroll
      for (int b = 0; b < kColumns / 32; ++b) {
        load_octet(y, first + 32 * b, slice.out_features, values);
        delta(b, values);
        store_octet(y, first + 32 * b, slice.out_features, values);
      }
    }
  }
};

template <typename Stage, int kColumns, int kStages>
__device__ __forceinline__ void produce(const Stage& stage, const Item& item,
                                        Shared<kColumns, kStages>& shared, Turn<kStages>& turn) {
  for (int k = 0; k < item.depth; ++k, turn.next()) {
    auto& to = shared.stage[turn.place];
    const int64_t from = static_cast<int64_t>(k) * kTileBytes;
    shared.stages.wait_empty(turn);
    shared.stages.expect(turn, (1 + item.weights_rows) * kTileBytes);
    __syncwarp();
    shared.stages.copy_wide(turn, to.tokens, item.tokens + from, kTileBytes);
    for (int i = 0; i < item.weights_rows; ++i) {
      shared.stages.copy_wide(turn, to.weights + i * kTileBytes,
                              item.weights + i * item.weights_pitch + from, kTileBytes);
    }
    shared.stages.close(turn);
    if (k == 0) stage.expect_y(item);
  }
}

template <typename Stage, int kColumns, int kStages>
__device__ __forceinline__ void consume(const Stage& stage, const Item& item,
                                        Shared<kColumns, kStages>& shared, Turn<kStages>& turn) {
  Sums<kColumns> sums = {};
  Turn<kStages> previous = turn;
  for (int k = 0; k < item.depth; ++k) {
    const auto& now = shared.stage[turn.place];
    shared.stages.wait_full(turn);
    begin_products<kColumns>(sums, now.tokens, now.weights);
    wait_products<1>();
    if (k > 0) shared.stages.release(previous);
    previous = turn;
    turn.next();
  }
  wait_products<0>();
  shared.stages.release(previous);
  stage.finish(item, sums);
}

template <typename Stage, int kColumns, int kStages>
__device__ __forceinline__ void run(const Gemm& gemm) {
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<Shared<kColumns, kStages>*>(memory);
  if (threadIdx.x == 0) shared.stages.initialize();
  __syncthreads();
  after_previous();
  let_next_begin();
  const Stage stage(gemm);
  Turn<kStages> turn;
  if (threadIdx.x / 32 >= kConsumers) {
    give_registers();
    if (threadIdx.x / 32 > kConsumers) return;
    for (int index = blockIdx.x; index < stage.items; index += gridDim.x) {
      produce(stage, stage.at(index), shared, turn);
    }
  } else {
    take_registers();
    for (int index = blockIdx.x; index < stage.items; index += gridDim.x) {
      const Item item = stage.at(index);
      if (item.depth > 0) consume(stage, item, shared, turn);
    }
  }
}

// Launched elsewhere than on compute capability 9.0.
constexpr int kPlainColumns = 128, kPlainStages = 3;

template <typename Stage, int kColumns, int kStages>
__global__ void __launch_bounds__(kThreads, 1) gemm_kernel(const __grid_constant__ Gemm gemm) {
#if !DW_WGMMA
  if constexpr (kColumns == kPlainColumns && kStages == kPlainStages)
#endif
    run<Stage, kColumns, kStages>(gemm);
}

template <template <int> typename Stage>
cudaError_t launch(const Gemm& gemm, int columns, cudaStream_t stream) {
  const auto launch_shape = [&]<int kColumns, int kStages>() {
    return launch_dependent(gemm_kernel<Stage<kColumns>, kColumns, kStages>,
                            dim3(multiprocessors()), kThreads, sizeof(Shared<kColumns, kStages>),
                            stream, gemm);
  };
  if (columns == 256) return launch_shape.template operator()<256, 4>();
  if (compute_major() == 9) return launch_shape.template operator()<128, 6>();
  return launch_shape.template operator()<kPlainColumns, kPlainStages>();
}

// Items of 256 outputs take 5/3 of the time of 128, so that they gain unless too few are left to
// fill the GPU. (Which is chosen changes no sum's order.)
int stage2_columns(const Gemm& gemm) {
  if (compute_major() != 9) return kPlainColumns;
  const auto rounds = [&](int groups_an_item) {
    int items = 0;
    for (int s = 0; s < gemm.slice_count; ++s) {
      items += ceil_div(gemm.slices[s].groups, groups_an_item);
    }
    return ceil_div(items * ceil_div(gemm.token_count, kTileRows), multiprocessors());
  };
  return 5 * rounds(2) < 3 * rounds(1) ? 256 : 128;
}

template <int kColumns>
using Stage2Half = Stage2<__half, kColumns>;
template <int kColumns>
using Stage2Bfloat16 = Stage2<__nv_bfloat16, kColumns>;

}  // namespace

cudaError_t launch_stage1(const Gemm& gemm, cudaStream_t stream) {
  return launch<Stage1>(gemm, gemm.columns, stream);
}

cudaError_t launch_stage2(const Gemm& gemm, cudaStream_t stream) {
  const int columns = stage2_columns(gemm);
  return gemm.y_dtype == DW_BFLOAT16 ? launch<Stage2Bfloat16>(gemm, columns, stream)
                                     : launch<Stage2Half>(gemm, columns, stream);
}

}  // namespace prefill
}  // namespace dw

// SPDX-License-Identifier: Apache-2.0
// CUDA's language on a CPU, included before kernels whose own instructions emulated_library.py has
// replaced. Threads of a block are fibers: each runs until it waits, for a barrier, for its warp or
// for a stage. Blocks of threads run one after the other.
#ifndef DELTAWEAVE_TESTS_CUDA_EMULATION_DEVICE_H_
#define DELTAWEAVE_TESTS_CUDA_EMULATION_DEVICE_H_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <type_traits>

#undef __align__
#undef __constant__
#undef __device__
#undef __forceinline__
#undef __global__
#undef __grid_constant__
#undef __host__
#undef __launch_bounds__
#undef __shared__
#define __align__(bytes)
#define __constant__
#define __device__
#define __forceinline__ inline
#define __global__
#define __grid_constant__
#define __host__
#define __launch_bounds__(...)
#define __shared__ static

namespace emulation {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

constexpr int kMultiprocessors = 5;  // few: a block of threads shall have several items
constexpr int kSharedBytes = 232448;

extern int shared_bytes;  // that a block of threads may have: kSharedBytes or fewer
extern Index block_index, grid_size, block_size, thread_index;  // of the fiber that runs
extern unsigned char* const shared_memory;                      // what a launch asks for

// Runs the block's other fibers; ends the process where none of them gets on any more.
void give_way();

// Runs a kernel.
void launch(int blocks, int threads, const std::function<void()>& kernel);

// A barrier of `count` threads.
void wait_at(int barrier, int count);

// What the lanes of the running fiber's warp exchange.
struct Warp {
  std::array<std::array<unsigned char, 48>, 32> values;
  int arrived = 0, left = 0;
};
Warp& own_warp();

// Every lane of a warp gives a value and looks at all of them: look(value of a lane).
template <typename Value, typename Look>
auto exchange(Value value, Look look) {
  static_assert(sizeof(Value) <= sizeof(Warp{}.values[0]));
  Warp& warp = own_warp();
  while (warp.left > 0) give_way();  // lanes that have not looked at the last values
  std::memcpy(warp.values[thread_index.x % 32].data(), &value, sizeof value);
  if (++warp.arrived == 32) warp.left = 32;
  while (warp.left == 0) give_way();
  const auto result = look([&warp](int lane) {
    Value of_lane;
    std::memcpy(&of_lane, warp.values[lane % 32].data(), sizeof of_lane);
    return of_lane;
  });
  if (--warp.left == 0) warp.arrived = 0;
  return result;
}

// mma.sync m16n8k16: d += a * b. Of the lane 4q + c the two halves of register r are: of a, row q
// (and 8 more where r is odd), columns 2c and 2c + 1 (and 8 more where r > 1); of b, column q, rows
// 2c and 2c + 1 (and 8 more where r is 1).
inline float2 floats_of(__half2 pair) { return __half22float2(pair); }
inline float2 floats_of(__nv_bfloat162 pair) { return __bfloat1622float2(pair); }
template <typename Pair = __half2>
void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct {
    float2 a[4], b[2];
  } own;
  const auto halves = [](uint32_t bits) { return floats_of(reinterpret_cast<const Pair&>(bits)); };
  for (int r = 0; r < 4; ++r) own.a[r] = halves(a[r]);
  own.b[0] = halves(b0);
  own.b[1] = halves(b1);
  const int lane = thread_index.x % 32, q = lane / 4, c = lane % 4;
  exchange(own, [&](auto of_lane) {
    for (int k = 0; k < 16; k += 2) {
      const int from = k / 2 % 4, upper = k / 8;
      const auto rows = of_lane(4 * q + from);
      for (int n = 0; n < 2; ++n) {
        const float2 column = of_lane(4 * (2 * c + n) + from).b[upper];
        const float2 low = rows.a[2 * upper], high = rows.a[2 * upper + 1];
        d[n] += low.x * column.x + low.y * column.y;
        d[2 + n] += high.x * column.x + high.y * column.y;
      }
    }
    return 0;
  });
}

// mma.sync m16n8k32 of unsigned and signed bytes. Of the lane 4q + c the four bytes of register r
// are: of a, row q (and 8 more where r is odd), columns 4c .. 4c + 3 (and 16 more where r > 1); of
// b, column q, rows 4c .. 4c + 3 (and 16 more where r is 1).
inline void multiply(int (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct {
    uint8_t a[4][4];
    int8_t b[2][4];
  } own;
  std::memcpy(own.a, a, sizeof own.a);
  std::memcpy(own.b[0], &b0, 4);
  std::memcpy(own.b[1], &b1, 4);
  const int lane = thread_index.x % 32, q = lane / 4, c = lane % 4;
  exchange(own, [&](auto of_lane) {
    for (int k = 0; k < 32; ++k) {
      const int from = k / 4 % 4, upper = k / 16;
      const auto rows = of_lane(4 * q + from);
      for (int n = 0; n < 2; ++n) {
        const int column = of_lane(4 * (2 * c + n) + from).b[upper][k % 4];
        d[n] += rows.a[2 * upper][k % 4] * column;
        d[2 + n] += rows.a[2 * upper + 1][k % 4] * column;
      }
    }
    return 0;
  });
}

}  // namespace emulation

#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index
#define gridDim emulation::grid_size
#define blockDim emulation::block_size

using std::max;
using std::min;

template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int shared_bytes) {
  return shared_bytes > emulation::shared_bytes ? cudaErrorInvalidValue : cudaSuccess;
}

inline void __syncthreads() { emulation::wait_at(0, static_cast<int>(blockDim.x)); }
inline void __syncwarp(unsigned = ~0u) {
  emulation::exchange(0, [](auto) { return 0; });
}
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulation::exchange(value, [lane](auto of_lane) { return of_lane(lane); });
}
template <typename T>
T __shfl_up_sync(unsigned, T value, int step, int width = 32) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int from = lane % width < step ? lane : lane - step;
  return emulation::exchange(value, [from](auto of_lane) { return of_lane(from); });
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  const int lane = static_cast<int>(threadIdx.x) % 32 ^ mask;
  return emulation::exchange(value, [lane](auto of_lane) { return of_lane(lane); });
}
inline int __reduce_add_sync(unsigned, int value) {
  return emulation::exchange(value, [](auto of_lane) {
    int sum = 0;
    for (int lane = 0; lane < 32; ++lane) sum += of_lane(lane);
    return sum;
  });
}
inline unsigned __reduce_max_sync(unsigned, unsigned value) {
  return emulation::exchange(value, [](auto of_lane) {
    unsigned most = 0;
    for (int lane = 0; lane < 32; ++lane) most = max(most, of_lane(lane));
    return most;
  });
}
inline unsigned __ballot_sync(unsigned, bool value) {
  return emulation::exchange(value, [](auto of_lane) {
    unsigned all = 0;
    for (int lane = 0; lane < 32; ++lane) all |= unsigned{of_lane(lane)} << lane;
    return all;
  });
}

template <typename T>
T __ldg(const T* from) {
  return *from;
}
template <typename T>
T __ldcg(const T* from) {
  return *from;
}
template <typename T>
T __ldcs(const T* from) {
  return *from;
}
template <typename T>
void __stcg(T* to, T value) {
  *to = value;
}
inline void __threadfence() {}
template <typename T>
T atomicAdd(T* at, T value) {
  const T before = *at;
  *at += value;
  return before;
}
template <typename T>
T atomicMax(T* at, T value) {
  const T before = *at;
  *at = max(before, value);
  return before;
}

inline float __uint_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t __float_as_uint(float value) { return std::bit_cast<uint32_t>(value); }
inline float __int_as_float(int bits) { return std::bit_cast<float>(bits); }
inline int __float_as_int(float value) { return std::bit_cast<int>(value); }
inline float __fdividef(float a, float b) { return a / b; }
inline int __popc(unsigned bits) { return std::popcount(bits); }
inline int __ffs(unsigned bits) { return bits == 0 ? 0 : std::countr_zero(bits) + 1; }
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, int shift) {
  return static_cast<uint32_t>((uint64_t{high} << 32 | low) >> (shift & 31));
}
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t all = uint64_t{high} << 32 | low;
  uint32_t chosen = 0;
  for (int i = 0; i < 4; ++i) chosen |= (all >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
  return chosen;
}
inline size_t __cvta_generic_to_shared(const void* pointer) {
  return reinterpret_cast<size_t>(pointer);
}
// Rounded once, which CUDA's own function for the host does not do.
inline __half2 __hfma2(__half2 a, __half2 b, __half2 c) {
  const auto fused = [](__half x, __half y, __half z) {
    return __double2half(double{__half2float(x)} * __half2float(y) + __half2float(z));
  };
  return __halves2half2(fused(__low2half(a), __low2half(b), __low2half(c)),
                        fused(__high2half(a), __high2half(b), __high2half(c)));
}

#endif  // DELTAWEAVE_TESTS_CUDA_EMULATION_DEVICE_H_

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
#include <cstring>
#include <functional>
#include <map>
#include <type_traits>

#undef __align__
#undef __device__
#undef __forceinline__
#undef __global__
#undef __grid_constant__
#undef __host__
#undef __launch_bounds__
#undef __shared__
#define __align__(bytes)
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
  std::array<std::array<unsigned char, 16>, 32> values;
  int arrived = 0, left = 0;
};
Warp& own_warp();

// Every lane of a warp gives a value and looks at all of them: look(value of a lane).
template <typename Value, typename Look>
auto exchange(Value value, Look look) {
  static_assert(sizeof(Value) <= 16);
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

}  // namespace emulation

#define threadIdx emulation::thread_index
#define blockIdx emulation::block_index
#define gridDim emulation::grid_size
#define blockDim emulation::block_size

using std::max;
using std::min;

inline void __syncthreads() { emulation::wait_at(0, static_cast<int>(blockDim.x)); }
inline void __syncwarp(unsigned = ~0u) {
  emulation::exchange(0, [](auto) { return 0; });
}
template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulation::exchange(value, [lane](auto of_lane) { return of_lane(lane); });
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

template <typename T>
T __ldg(const T* from) {
  return *from;
}
template <typename T>
T __ldcg(const T* from) {
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
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, int shift) {
  return static_cast<uint32_t>((uint64_t{high} << 32 | low) >> (shift & 31));
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

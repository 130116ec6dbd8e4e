// SPDX-License-Identifier: Apache-2.0
// One warp's ring of stages in shared memory, filled ahead of use: by the bulk copy engine on sm_90
// and later (one instruction a block, completion on an mbarrier), by cp.async before. Sizes and
// addresses are multiples of 16 bytes.
//
//   ring.open(stage, bytes); ring.block(...); ring.rows(...);  ring.close();     // fill
//   ring.wait<pending>(stage);  ... read ...  __syncwarp();                       // before the
//   stage is opened again
//
// close() also ends a step that fills nothing. wait's `pending` is how many later steps may still
// be under way.
#ifndef DELTAWEAVE_SRC_RING_CUH_
#define DELTAWEAVE_SRC_RING_CUH_

#include <cstdint>

namespace dw {

constexpr int kMaxStages = 4;

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

class Ring {
 public:
  // `barriers`: kMaxStages of this warp's own.
  __device__ __forceinline__ Ring(unsigned char* memory, uint64_t* barriers)
      : memory_(shared_address(memory)), barriers_(shared_address(barriers)) {
    if (threadIdx.x % 32 == 0) {
      for (int stage = 0; stage < kMaxStages; ++stage) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barriers_ + 8 * stage)
                     : "memory");
      }
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncwarp();
  }

  __device__ __forceinline__ void open(int stage, int bytes) {
    barrier_ = barriers_ + 8 * stage;
    if (threadIdx.x % 32 == 0) {
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier_),
                   "r"(bytes)
                   : "memory");
    }
  }

  // The whole warp copies one block to byte `at` of the ring.
  __device__ __forceinline__ void block(int at, const void* from, int bytes) const {
    if (threadIdx.x % 32 == 0) copy(at, from, bytes);
  }

  // Lane i < rows copies its row to at + i * pitch.
  __device__ __forceinline__ void rows(int at, int pitch, const void* from, int rows,
                                       int bytes) const {
    const int lane = threadIdx.x % 32;
    if (lane < rows) copy(at + lane * pitch, from, bytes);
  }

  __device__ __forceinline__ void close() const {}

  template <int kPending>
  __device__ __forceinline__ void wait(int stage) {
    const uint32_t parity = phases_ >> stage & 1, barrier = barriers_ + 8 * stage;
    uint32_t done;
    do {
      asm volatile(
          "{\n\t.reg .pred p;\n\t"
          "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n\t"
          "selp.u32 %0, 1, 0, p;\n\t}"
          : "=r"(done)
          : "r"(barrier), "r"(parity)
          : "memory");
    } while (!done);
    phases_ ^= 1u << stage;
    __syncwarp();
  }

  __device__ __forceinline__ void drain() const {}

  // Ordinary writes to the ring's memory come before later fills, across the next barrier of the
  // block.
  __device__ static __forceinline__ void release() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  }

 private:
  __device__ __forceinline__ void copy(int at, const void* from, int bytes) const {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(memory_ + at),
        "l"(from), "r"(bytes), "r"(barrier_)
        : "memory");
  }

  uint32_t memory_, barriers_, barrier_ = 0, phases_ = 0;
};

#else

class Ring {
 public:
  __device__ __forceinline__ Ring(unsigned char* memory, uint64_t*)
      : memory_(shared_address(memory)) {}

  __device__ __forceinline__ void open(int, int) const {}

  __device__ __forceinline__ void block(int at, const void* from, int bytes) const {
    for (int i = threadIdx.x % 32 * 16; i < bytes; i += 32 * 16) {
      copy(at + i, static_cast<const unsigned char*>(from) + i);
    }
  }

  __device__ __forceinline__ void rows(int at, int pitch, const void* from, int rows,
                                       int bytes) const {
    const int vectors = bytes / 16, all = rows * vectors;
    for (int first = 0; first < all; first += 32) {
      const int i = first + threadIdx.x % 32, row = i / vectors, place = i % vectors * 16;
      const uint64_t start =
          __shfl_sync(0xffffffffu, reinterpret_cast<uint64_t>(from), row < rows ? row : 0);
      if (i < all) {
        copy(at + row * pitch + place, reinterpret_cast<const unsigned char*>(start) + place);
      }
    }
  }

  __device__ __forceinline__ void close() const {
    asm volatile("cp.async.commit_group;" ::: "memory");
  }

  template <int kPending>
  __device__ __forceinline__ void wait(int) const {
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
    __syncwarp();
  }

  // Ends an item: its last steps filled nothing.
  __device__ __forceinline__ void drain() const { wait<0>(0); }

  __device__ static __forceinline__ void release() {}

 private:
  __device__ __forceinline__ void copy(int at, const void* from) const {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(memory_ + at), "l"(from)
                 : "memory");
  }

  uint32_t memory_;
};

#endif

}  // namespace dw

#endif  // DELTAWEAVE_SRC_RING_CUH_

// SPDX-License-Identifier: Apache-2.0
// One warp's ring of stages in shared memory, filled ahead of use: by the bulk copy engine on sm_90
// and later (one instruction a fill, completion on an mbarrier), by cp.async before. Sizes and
// addresses are multiples of 16 bytes.
//
//   ring.fill(stage, from, bytes), or ring.skip() for a step that copies nothing, once a step;
//   ring.wait(stage): the oldest fill has arrived;  ... read ...  __syncwarp() before its stage is
//   filled again.
#ifndef DELTAWEAVE_SRC_RING_CUH_
#define DELTAWEAVE_SRC_RING_CUH_

#include <cstdint>

namespace dw {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900

// The bulk copy engine's copy. `evict_first`: the second cache does so, and keeps what is read
// again. The number is what createpolicy.fractional.L2::evict_first makes for all of a copy
// (cute/arch/copy_sm90_desc.hpp of CUTLASS has it too).
__device__ __forceinline__ void copy_bulk(uint32_t to, const void* from, int bytes,
                                          uint32_t barrier, bool evict_first) {
  constexpr uint64_t kEvictFirst = 0x12F0000000000000;
  if (evict_first) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], "
        "[%1], %2, [%3], %4;" ::"r"(to),
        "l"(from), "r"(bytes), "r"(barrier), "l"(kEvictFirst)
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(to),
        "l"(from), "r"(bytes), "r"(barrier)
        : "memory");
  }
}

template <int kStages, int kStageBytes>
class Ring {
 public:
  // `barriers`: kStages of this warp's own.
  __device__ __forceinline__ Ring(unsigned char* memory, uint64_t* barriers)
      : memory_(shared_address(memory)), barriers_(shared_address(barriers)) {
    if (threadIdx.x % 32 == 0) {
      for (int stage = 0; stage < kStages; ++stage) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barriers_ + 8 * stage)
                     : "memory");
      }
      asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncwarp();
  }

  __device__ __forceinline__ void fill(int stage, const void* from, int bytes,
                                       bool evict_first = false) const {
    if (threadIdx.x % 32 != 0) return;
    const uint32_t barrier = barriers_ + 8 * stage;
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
                 : "memory");
    copy_bulk(memory_ + stage * kStageBytes, from, bytes, barrier, evict_first);
  }

  __device__ __forceinline__ void skip() const {}

  __device__ __forceinline__ void wait(int stage) {
    const uint32_t parity = phases_ >> stage & 1, barrier = barriers_ + 8 * stage;
    asm volatile(
        "{\n\t.reg .pred p;\n"
        "again:\n\t"
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n\t"
        "@!p bra again;\n\t}" ::"r"(barrier),
        "r"(parity)
        : "memory");
    phases_ ^= 1u << stage;
  }

 private:
  uint32_t memory_, barriers_, phases_ = 0;
};

#else

template <int kStages, int kStageBytes>
class Ring {
 public:
  __device__ __forceinline__ Ring(unsigned char* memory, uint64_t*)
      : memory_(shared_address(memory)) {}

  __device__ __forceinline__ void fill(int stage, const void* from, int bytes, bool = false) const {
    for (int i = threadIdx.x % 32 * 16; i < bytes; i += 32 * 16) {
      asm volatile(
          "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(memory_ + stage * kStageBytes + i),
          "l"(static_cast<const unsigned char*>(from) + i)
          : "memory");
    }
    skip();
  }

  __device__ __forceinline__ void skip() const {
    asm volatile("cp.async.commit_group;" ::: "memory");
  }

  __device__ __forceinline__ void wait(int) const {
    asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 2) : "memory");
    __syncwarp();
  }

 private:
  uint32_t memory_;
};

#endif

// Programmatic dependent launch: a kernel begins while the one before it in the stream still runs.
// after_previous() returns when that one has finished and its writes are visible; before it, only
// the plan, the directory and the arena may be read. let_next_begin() allows the next one to start:
// at once, where the next one waits too, so that what it may read comes while this one runs.
__device__ __forceinline__ void after_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_next_begin() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace dw

#endif  // DELTAWEAVE_SRC_RING_CUH_

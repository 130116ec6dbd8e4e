// SPDX-License-Identifier: Apache-2.0
// Stages of shared memory that warps fill ahead of use by others: by the bulk copy engine on sm_90
// and later, by cp.async before. Sizes and addresses are multiples of 16 bytes.
//
// A stage is full when all its bytes have arrived and empty when all consumer warps have read it.
// Each of several filling warps announces its own bytes.
// Stages are taken in turn; every warp keeps its own turn.
//
//   filling:  wait_empty(turn); expect(turn, all bytes); __syncwarp(); copy...; close(turn)
//   reading:  wait_full(turn); ... release(turn)
#ifndef DELTAWEAVE_SRC_STAGES_CUH_
#define DELTAWEAVE_SRC_STAGES_CUH_

#include <cstdint>

#include "ring.cuh"

namespace dw {

// Which stage is next, and how often, modulo two, it has been used.
template <int kStages>
struct Turn {
  int place = 0, round = 0;

  __device__ __forceinline__ void next() {
    if (++place < kStages) return;
    place = 0;
    round ^= 1;
  }
  __device__ __forceinline__ Turn ahead(int turns) const {
    Turn turn = *this;
    for (int i = 0; i < turns; ++i) turn.next();
    return turn;
  }
};

template <int kStages, int kConsumers, int kProducers = 1>
struct Stages {
  using Now = Turn<kStages>;

  uint64_t full[kStages], empty[kStages];

  // One thread calls it, before a barrier of all.
  __device__ __forceinline__ void initialize(int fillers = kProducers * kArrivalsOfACopy) {
    for (int s = 0; s < kStages; ++s) {
      initialize(full[s], fillers);
      initialize(empty[s], 32 * kConsumers);
    }
#if __CUDA_ARCH__ >= 900
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
  }

  __device__ __forceinline__ void wait_full(Now turn) { wait(full[turn.place], turn.round); }
  __device__ __forceinline__ void wait_empty(Now turn) { wait(empty[turn.place], turn.round ^ 1); }
  // A consumer warp has read a stage. Every lane arrives for its own reads: an arrival of one lane
  // behind __syncwarp would do, is no faster, and looks like a race to compute-sanitizer.
  __device__ __forceinline__ void release(Now turn) { arrive(empty[turn.place]); }

#if __CUDA_ARCH__ >= 900
  static constexpr int kArrivalsOfACopy = 1;

  // A copying warp announces all its bytes of a stage, then copies them.
  __device__ __forceinline__ void expect(Now turn, int bytes) {
    if (threadIdx.x % 32 != 0) return;
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                     shared_address(&full[turn.place])),
                 "r"(bytes)
                 : "memory");
  }
  // One lane's copy; `evict_first`: as for a ring.
  __device__ __forceinline__ void copy(Now turn, void* to, const void* from, int bytes,
                                       bool evict_first = false) {
    copy_bulk(shared_address(to), from, bytes, shared_address(&full[turn.place]), evict_first);
  }
  __device__ __forceinline__ void close(Now) {}
#else
  static constexpr int kArrivalsOfACopy = 32;

  __device__ __forceinline__ void expect(Now, int) {}
  __device__ __forceinline__ void copy(Now, void* to, const void* from, int bytes, bool = false) {
    for (int i = 0; i < bytes; i += 16) {
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to) + i),
                   "l"(static_cast<const unsigned char*>(from) + i)
                   : "memory");
    }
  }
  // The copying warp has asked for all of a stage's copies.
  __device__ __forceinline__ void close(Now turn) {
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(
                     shared_address(&full[turn.place]))
                 : "memory");
  }
#endif

  // The whole copying warp copies a contiguous piece.
  __device__ __forceinline__ void copy_wide(Now turn, unsigned char* to, const void* from,
                                            int bytes, bool evict_first = false) {
#if __CUDA_ARCH__ >= 900
    if (threadIdx.x % 32 == 0) copy(turn, to, from, bytes, evict_first);
#else
    for (int i = threadIdx.x % 32 * 16; i < bytes; i += 512) {
      copy(turn, to + i, static_cast<const unsigned char*>(from) + i, 16);
    }
#endif
  }

 protected:
  __device__ static __forceinline__ void arrive(uint64_t& barrier) {
    asm volatile("{\n\t.reg .b64 state;\n\tmbarrier.arrive.shared::cta.b64 state, [%0];\n\t}" ::"r"(
                     shared_address(&barrier))
                 : "memory");
  }

 private:
  __device__ static __forceinline__ void initialize(uint64_t& barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)),
                 "r"(count)
                 : "memory");
  }
  __device__ static __forceinline__ void wait(uint64_t& barrier, int parity) {
    asm volatile(
        "{\n\t.reg .pred p;\n"
        "again:\n\t"
#if __CUDA_ARCH__ >= 900
        "mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n\t"
#else
        "mbarrier.test_wait.parity.shared::cta.b64 p, [%0], %1;\n\t"
#endif
        "@!p bra again;\n\t}" ::"r"(shared_address(&barrier)),
        "r"(parity)
        : "memory");
  }
};

// Notes that all lanes of the filling warps write beside the stages, by ordinary stores.
//
//   filling:  wait_empty(turn); ... write ...; publish(turn)
//   reading:  wait_full(turn); ... read ...; release(turn)
template <int kNotes, int kReaders, int kWriters>
struct Notes : private Stages<kNotes, kReaders, kWriters> {
  using Base = Stages<kNotes, kReaders, kWriters>;
  using Base::release;
  using Base::wait_empty;
  using Base::wait_full;

  __device__ __forceinline__ void initialize() { Base::initialize(32 * kWriters); }
  __device__ __forceinline__ void publish(Turn<kNotes> turn) {
    this->arrive(this->full[turn.place]);
  }
};

}  // namespace dw

#endif  // DELTAWEAVE_SRC_STAGES_CUH_

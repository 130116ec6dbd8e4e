// SPDX-License-Identifier: Apache-2.0
// Stages and notes of shared memory (cuda/src/stages.cuh) with barriers by their meaning: a phase
// ends when all have arrived and all announced bytes are there. Copies are done at once.
#ifndef DELTAWEAVE_SRC_STAGES_CUH_
#define DELTAWEAVE_SRC_STAGES_CUH_

#include <cstdio>
#include <cstdlib>

#include "ring.cuh"

namespace dw {

template <int kStages>
struct Turn {
  int place = 0, round = 0;

  void next() {
    if (++place < kStages) return;
    place = 0;
    round ^= 1;
  }
};

struct Phases {
  int count, pending, phase;
  long bytes;  // announced and not there

  void initialize(int arrivals) { *this = {arrivals, arrivals, 0, 0}; }
  void arrive(long announced = 0) {
    --pending;
    add(announced);
  }
  void add(long more) {
    bytes += more;
    if (pending > 0 || bytes != 0) return;
    phase ^= 1;
    pending = count;
  }
  void wait(int parity) const {
    while (phase == parity) emulation::give_way();
  }
};

template <int kStages, int kConsumers, int kProducers = 1>
struct Stages {
  using Now = Turn<kStages>;

  Phases full[kStages], empty[kStages];

  void initialize(int fillers = kProducers) {
    for (int s = 0; s < kStages; ++s) {
      full[s].initialize(fillers);
      empty[s].initialize(32 * kConsumers);
    }
  }
  void wait_full(Now turn) const { full[turn.place].wait(turn.round); }
  void wait_empty(Now turn) const { empty[turn.place].wait(turn.round ^ 1); }
  void release(Now turn) { empty[turn.place].arrive(); }
  void expect(Now turn, int bytes) {
    if (threadIdx.x % 32 == 0) full[turn.place].arrive(bytes);
  }
  void copy(Now turn, void* to, const void* from, int bytes) {
    if ((reinterpret_cast<size_t>(to) | reinterpret_cast<size_t>(from) | bytes) % 16 != 0) {
      std::fprintf(stderr, "emulated copy: not of whole 16 bytes\n");
      std::abort();
    }
    std::memcpy(to, from, bytes);
    full[turn.place].add(-bytes);
  }
  void copy_wide(Now turn, unsigned char* to, const void* from, int bytes) {
    if (threadIdx.x % 32 == 0) copy(turn, to, from, bytes);
  }
  void close(Now) {}
};

template <int kNotes, int kReaders, int kWriters>
struct Notes : private Stages<kNotes, kReaders, kWriters> {
  using Base = Stages<kNotes, kReaders, kWriters>;
  using Base::release;
  using Base::wait_empty;
  using Base::wait_full;

  void initialize() { Base::initialize(32 * kWriters); }
  void publish(Turn<kNotes> turn) { this->full[turn.place].arrive(); }
};

}  // namespace dw

#endif  // DELTAWEAVE_SRC_STAGES_CUH_

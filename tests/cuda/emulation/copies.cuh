// SPDX-License-Identifier: Apache-2.0
// Shared memory that is filled ahead of use (cuda/src/ring.cuh and stages.cuh), included in dw
// instead of both: a phase of a barrier ends when all have arrived and all announced bytes are
// there. Copies are done at once.

template <int kStages>
struct Turn;

inline void copy_bytes(void* to, const void* from, int bytes) {
  if ((reinterpret_cast<size_t>(to) | reinterpret_cast<size_t>(from) | bytes) % 16 != 0) {
    std::fprintf(stderr, "emulated copy: not of whole 16 bytes\n");
    std::abort();
  }
  std::memcpy(to, from, bytes);
}

// One warp's; `filled` counts each stage's fills.
template <int kStages, int kStageBytes>
class Ring {
 public:
  Ring(unsigned char* memory, uint64_t* filled) : memory_(memory), filled_(filled) {
    if (threadIdx.x % 32 == 0) std::fill_n(filled, kStages, 0);
    __syncwarp();
  }
  void fill(int stage, const void* from, int bytes, bool = false) const {
    if (threadIdx.x % 32 != 0) return;
    copy_bytes(memory_ + stage * kStageBytes, from, bytes);
    ++filled_[stage];
  }
  void skip() const {}
  void wait(int stage) {
    while (filled_[stage] == taken_[stage]) emulation::give_way();
    ++taken_[stage];
  }

 private:
  unsigned char* memory_;
  uint64_t* filled_;
  uint64_t taken_[kStages] = {};
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
    copy_bytes(to, from, bytes);
    full[turn.place].add(-bytes);
  }
  void copy_wide(Now turn, unsigned char* to, const void* from, int bytes, bool = false) {
    if (threadIdx.x % 32 == 0) copy(turn, to, from, bytes);
  }
  void close(Now) {}

 protected:
  static void arrive(Phases& barrier) { barrier.arrive(); }
};

// SPDX-License-Identifier: Apache-2.0
// The emulated device (device.h): its fibers, and the few calls of CUDA's runtime that the library
// makes.
#include <ucontext.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <utility>
#include <vector>

#undef threadIdx

namespace emulation {

int shared_bytes = kSharedBytes;
Index block_index, grid_size, block_size, thread_index;
unsigned char* const shared_memory =
    static_cast<unsigned char*>(std::aligned_alloc(1024, kSharedBytes));

namespace {

constexpr size_t kStackBytes = 96 << 10;
constexpr long kMostTurns = 5'000'000;  // of a block's fibers: fifty times what a test needs

struct Fiber {
  ucontext_t context;
  bool done;
};

struct Barrier {
  int arrived = 0, generation = 0;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::map<int, Barrier> barriers;
  long turns = 0;
};

Block block;
ucontext_t scheduler;
const std::function<void()>* running;

void run_fiber() {
  (*running)();
  Fiber& own = block.fibers[thread_index.x];
  own.done = true;
  swapcontext(&own.context, &scheduler);
}

// A fiber's turn, until it gives way or ends.
void resume(int thread) {
  thread_index.x = thread;
  swapcontext(&scheduler, &block.fibers[thread].context);
}

}  // namespace

void give_way() {
  if (++block.turns > kMostTurns) {
    std::fprintf(stderr, "emulated kernel: its threads wait for each other\n");
    std::abort();
  }
  const unsigned own = thread_index.x;
  swapcontext(&block.fibers[own].context, &scheduler);
}

Warp& own_warp() { return block.warps[thread_index.x / 32]; }

void wait_at(int barrier, int count) {
  Barrier& own = block.barriers[barrier];
  const int generation = own.generation;
  if (++own.arrived == count) {
    own.arrived = 0;
    ++own.generation;
  }
  while (own.generation == generation) give_way();
}

void launch(int blocks, int threads, const std::function<void()>& kernel) {
  static std::vector<std::unique_ptr<char[]>> stacks;
  static std::mt19937 random;  // neither blocks nor threads may rely on an order
  while (static_cast<int>(stacks.size()) < threads) {
    stacks.push_back(std::make_unique<char[]>(kStackBytes));
  }
  running = &kernel;
  grid_size.x = blocks;
  block_size.x = threads;
  std::vector<int> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  std::shuffle(order.begin(), order.end(), random);
  for (const int index : order) {
    std::memset(shared_memory, 0xA7, kSharedBytes);
    block_index.x = index;
    block = {std::vector<Fiber>(threads), std::vector<Warp>(threads / 32), {}, 0};
    for (int thread = 0; thread < threads; ++thread) {
      ucontext_t& context = block.fibers[thread].context;
      getcontext(&context);
      context.uc_stack.ss_sp = stacks[thread].get();
      context.uc_stack.ss_size = kStackBytes;
      makecontext(&context, run_fiber, 0);
    }
    for (bool any = true; any;) {
      any = false;
      const int first = static_cast<int>(random() % threads);
      for (int turn = 0; turn < threads; ++turn) {
        const int thread = (first + turn) % threads;
        if (block.fibers[thread].done) continue;
        any = true;
        resume(thread);
      }
    }
  }
}

}  // namespace emulation

extern "C" {
// For tests of GPUs that have less.
__attribute__((visibility("default"))) void emulate_shared_bytes(int bytes) {
  emulation::shared_bytes = bytes == 0 ? emulation::kSharedBytes : bytes;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = 9;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = emulation::kMultiprocessors;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = emulation::shared_bytes + 1024;
      break;
    default:
      *value = emulation::shared_bytes;
  }
  return cudaSuccess;
}
const char* cudaGetErrorString(cudaError_t) { return "refused by the emulated device"; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}
}

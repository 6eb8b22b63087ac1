// What csrc/cuda/device.h needs of a GPU, on a CPU: the kernels' own sources, compiled by the host's compiler with
// CNNOPS_EMULATE defined, run here block after block.
//
// A block's threads are fibers. One runs until it meets the block's barrier or its end, then the next one does, a
// warp's threads after each other: so a thread is as far ahead of the others as a GPU's scheduler could ever let it,
// and what a missing barrier leaves to chance goes wrong in one Order or another. Run every kernel in each.
//
//   - Shared memory is a new piece of the heap for every block, of the exact size, filled with NaN (all bits set): what
//     nobody wrote shows in the results, and AddressSanitizer sees the first byte beyond the end.
//   - A barrier that not all threads of the block reach, or at which they meet from different lines, is an error.
//   - settings.grid_limit cuts grids short, settings.index_limit makes small tensors count as large: so the loops
//     and the 64-bit indices that only huge tensors need are run with small ones.
//
// What it cannot show: races that only an interleaving within two barriers would reveal, the hardware's memory model,
// its rounding where the compiler fuses a multiplication and an addition, the conversions to 16 bits that device.h has in
// place of those of numbers.h, and its speed.
#pragma once

#undef _FORTIFY_SOURCE  // it takes a jump from one stack to another for an attack
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <random>
#include <source_location>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

/// The names by which a kernel knows where it is.
struct EmulatedIndex {
  unsigned x = 0;
};
inline EmulatedIndex threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

/// The order in which the threads of a block run, from barrier to barrier, and in which the blocks do.
enum class Order { forward, reverse, shuffled };

struct Settings {
  Order order = Order::forward;
  int64_t grid_limit = 0x7fffffff;
  int64_t index_limit = 0x7fffffff;
};
inline Settings settings;

constexpr int64_t kWarp = 32;
constexpr std::size_t kStack = 64 * 1024;

/// 0 .. count-1 in the order wanted. Runs of `together` stay together: a warp is never interrupted by another.
inline std::vector<int64_t> in_order(int64_t count, int64_t together, std::mt19937& random) {
  std::vector<int64_t> groups((count + together - 1) / together), all;
  std::iota(groups.begin(), groups.end(), 0);
  if (settings.order == Order::shuffled) std::shuffle(groups.begin(), groups.end(), random);
  for (int64_t group : groups) {
    const auto begin = static_cast<std::ptrdiff_t>(all.size());
    for (int64_t i = group * together; i < std::min(count, (group + 1) * together); ++i) all.push_back(i);
    if (settings.order == Order::shuffled) std::shuffle(all.begin() + begin, all.end(), random);
  }
  if (settings.order == Order::reverse) std::reverse(all.begin(), all.end());
  return all;
}

/// A thread: where it stopped, and why. Its stack serves one block after the other.
struct Fiber {
  std::unique_ptr<unsigned char[]> stack;
  jmp_buf stopped;  // _setjmp saves no signals as ucontext does, so switching takes nanoseconds
  bool finished;
  std::source_location waits_at;
};

/// The block that is running. There is one at a time.
struct Block {
  std::string kernel;
  const std::function<void()>* body = nullptr;
  std::vector<Fiber> fibers;
  Fiber* current = nullptr;
  jmp_buf scheduler;
  std::unique_ptr<unsigned char[]> shared;

  void run(const std::vector<int64_t>& order) {
    fibers.resize(std::max(fibers.size(), order.size()));
    threads = order.size();
    for (bool finished = false; !finished;) {
      for (int64_t thread : order) resume(thread);
      finished = all_finished();
    }
  }

  /// Back to the scheduler, until resume() comes round again.
  [[gnu::noinline]] void stop() {
    if (!_setjmp(current->stopped)) _longjmp(scheduler, 1);
  }

 private:
  std::size_t threads = 0;

  static void live();

  [[gnu::noinline]] void resume(int64_t thread) {
    current = &fibers[static_cast<std::size_t>(thread)];
    current->finished = false;
    threadIdx.x = static_cast<unsigned>(thread);
    if (_setjmp(scheduler)) return;
    if (current->stack) _longjmp(current->stopped, 1);
    current->stack.reset(new unsigned char[kStack]);
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = current->stack.get();
    context.uc_stack.ss_size = kStack;
    makecontext(&context, live, 0);
    setcontext(&context);
  }

  /// Whether all threads have finished. Otherwise all must wait at one barrier.
  bool all_finished() {
    const Fiber& first = fibers.front();
    for (std::size_t i = 0; i < threads; ++i) {
      const Fiber& fiber = fibers[i];
      if (fiber.finished != first.finished) {
        fail(where(first.finished ? fiber : first) + " is not reached by every thread: of thread 0 and thread " +
             std::to_string(i) + " one waits there and the other has finished");
      }
      const bool together = fiber.waits_at.line() == first.waits_at.line() &&
                            std::strcmp(fiber.waits_at.file_name(), first.waits_at.file_name()) == 0;
      if (!fiber.finished && !together) {
        fail("thread 0 waits at " + where(first) + " and thread " + std::to_string(i) + " at " + where(fiber));
      }
    }
    return first.finished;
  }

  [[noreturn]] void fail(const std::string& what) {
    fibers.clear();  // those that wait will wait for ever
    throw std::runtime_error(kernel + ": " + what);
  }

  static std::string where(const Fiber& fiber) {
    return std::string("the barrier in ") + fiber.waits_at.file_name() + ":" + std::to_string(fiber.waits_at.line());
  }
};
inline Block block;

inline void Block::live() {
  for (;;) {
    (*block.body)();
    block.current->finished = true;
    block.stop();
  }
}

/// __syncthreads().
inline void sync_block(std::source_location here = std::source_location::current()) {
  block.current->waits_at = here;
  block.stop();
}

/// atomicMax(). One thread runs at a time.
inline void atomic_max(int64_t* place, int64_t x) { *place = std::max(*place, x); }

inline void* shared_memory() { return block.shared.get(); }

/// Runs `body`, a kernel with its arguments, as every thread of every block.
inline void run(const char* kernel, int64_t blocks, int threads, std::size_t shared_bytes,
                const std::function<void()>& body) {
  std::mt19937 random(1);
  block.kernel = kernel;
  block.body = &body;
  gridDim.x = static_cast<unsigned>(blocks);
  blockDim.x = static_cast<unsigned>(threads);
  for (int64_t number : in_order(blocks, 1, random)) {
    blockIdx.x = static_cast<unsigned>(number);
    block.shared.reset(new unsigned char[shared_bytes]);
    std::memset(block.shared.get(), 0xff, shared_bytes);
    block.run(in_order(threads, kWarp, random));
    block.shared.reset();
  }
}

}  // namespace emulation

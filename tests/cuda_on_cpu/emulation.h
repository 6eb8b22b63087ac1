// What csrc/cuda/device.h, warp.h and copy_async.h need of a GPU, on a CPU. README.md beside this file says what is
// checked and how to use it.
//
// A block's threads are fibers. One runs until it meets the block's barrier, a collective of its warp, or its end, then
// the next one does. A warp runs on through its collectives until all of it waits at the barrier: so a thread is as far
// ahead of the others as a GPU's scheduler could ever let it, and what a missing barrier leaves to chance goes wrong in
// one Order or another.
//
// This header is compiled with the kernels, so that sanitizers see what a thread reads and writes. emulation.cpp has what
// they must not see: switching between threads, and the registers that a warp exchanges.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
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

using Here = std::source_location;

/// The order in which the threads of a block run, from barrier to barrier, and in which the blocks do.
enum class Order { forward, reverse, shuffled };

/// When a cp.async lands: at once, as it may (and as on GPUs that have none); or only at the wait that covers it.
enum class Copies { eager, lazy };

struct Settings {
  Order order = Order::forward;
  Copies copies = Copies::eager;
  int64_t grid_limit = 0x7fffffff;   // cuts grids short, so that few blocks do the work of many
  int64_t index_limit = 0x7fffffff;  // makes small tensors count as large, and be indexed with 64 bits
  int architecture = 75;             // whose shared memory may be asked for
};
inline Settings settings;

constexpr int kWarp = 32;

/// Prints "KERNEL: thread T of block B: WHAT", or without the thread, and ends the process: what a kernel left half done
/// cannot be gone on with.
[[noreturn]] void fail(const std::string& what);
[[noreturn]] void fail_thread(const std::string& what);
std::string text(const Here& here);

/// Memory of an exact size between two pages that nobody may touch, filled with a poison. It ends where the page begins,
/// or the other way round in the reverse order. What lies between it and the other page is looked at by check(). It begins
/// `offset` bytes from an address that is aligned to 16.
class Guarded {
 public:
  Guarded(std::string name, std::size_t size, int poison = 0xff, std::size_t offset = 0);
  ~Guarded();
  Guarded(const Guarded&) = delete;

  void* data() const { return data_; }
  std::size_t size() const { return size_; }
  bool holds(const void* place, std::size_t bytes) const;
  void check() const;
  /// How far outside a place is, in words; nothing, if it is far away.
  std::string distance(const void* place) const;

 private:
  std::string name_;
  unsigned char *mapping_, *data_;
  std::size_t mapped_, size_;
};

/// A cp.async on its way.
struct Copy {
  void* to;
  const void* from;
  int bytes, size;  // read, and written: the rest is zeros
  Here here;
};

/// Of the thread that is running: its copies, by group. The last group is not committed yet.
std::vector<std::vector<Copy>>& copies();
/// Lets those of a group land, as reads and writes of this thread.
inline void land(std::vector<Copy>& group) {
  for (const Copy& copy : group) {
    if (copy.bytes > 0) std::memcpy(copy.to, copy.from, static_cast<std::size_t>(copy.bytes));
    std::memset(static_cast<char*>(copy.to) + copy.bytes, 0, static_cast<std::size_t>(copy.size - copy.bytes));
  }
  group.clear();
}
/// Whether any kernel so far used cp.async.
inline bool copies_seen = false;

/// __syncthreads().
void sync_block(Here here = Here::current());

/// A collective of a warp: gives each of its 32 threads what all of them brought, `size` bytes each.
void exchange(const char* kind, const void* mine, std::size_t size, void* all, const Here& here);

template <class T>
struct Lanes {
  T of[kWarp];
};

template <class T>
Lanes<T> exchange(const char* kind, const T& mine, const Here& here) {
  Lanes<T> all;
  exchange(kind, &mine, sizeof mine, &all, here);
  return all;
}

/// __syncwarp(): the only collective that orders memory.
void sync_warp(Here here = Here::current());

void check_aligned(const void* place, std::size_t bytes, const Here& here);
void check_shared(const void* place, std::size_t bytes, const char* what, const Here& here);

/// atomicMax().
void atomic_max(int64_t* place, int64_t x);

void* shared_memory();

/// Runs `body`, a kernel with its arguments, as every thread of every block.
void run(const char* kernel, int64_t blocks, int threads, std::size_t shared_bytes, int64_t shared_limit,
         const std::function<void()>& body);

}  // namespace emulation

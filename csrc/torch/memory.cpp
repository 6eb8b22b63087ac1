#include "memory.h"

#include <c10/core/CPUAllocator.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <charconv>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <limits>
#include <mutex>
#include <string>

#if defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) || __has_feature(memory_sanitizer)
#define CNNOPS_SANITIZED
#endif
#elif defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define CNNOPS_SANITIZED
#endif

// There if the process runs under a sanitizer, which a library kept warm would hide errors from.
extern "C" {
[[gnu::weak]] void __asan_init();
[[gnu::weak]] void __tsan_init();
[[gnu::weak]] void __msan_init();
}

namespace cnnops {
namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t kHeader = 64;
constexpr size_t kLeast = 64 << 10;  // of smaller blocks the C library keeps enough
constexpr int64_t kMostByDefault = int64_t(4) << 30;
constexpr std::chrono::duration<double> kSecondsByDefault{30};

/// The header of a block; the memory that the tensor sees follows it.
struct Block {
  struct Links {
    Block *newer, *older;
  };
  size_t size;  // without the header
  Clock::time_point freed;
  std::array<Links, 2> links;

  void* memory() { return reinterpret_cast<char*>(this) + kHeader; }
  static Block* of(void* memory) { return reinterpret_cast<Block*>(static_cast<char*>(memory) - kHeader); }
};
static_assert(sizeof(Block) <= kHeader);

/// Free blocks in the order in which they were freed. A block is in two such lists at once, hence `which`.
template <int which>
struct List {
  Block *newest = nullptr, *oldest = nullptr;

  void add(Block* b) {
    b->links[which] = {nullptr, newest};
    (newest ? newest->links[which].newer : oldest) = b;
    newest = b;
  }

  void remove(Block* b) {
    const auto [newer, older] = b->links[which];
    (newer ? newer->links[which].older : newest) = older;
    (older ? older->links[which].newer : oldest) = newer;
  }
};

/// Eight classes of sizes between a power of two and the next: at most an eighth of a block lies idle, and as long as
/// nobody writes there it takes no memory.
size_t rounded(size_t bytes) {
  const size_t step = std::bit_floor(bytes) / 8;
  return (bytes + step - 1) / step * step;
}

int class_of(size_t size) { return std::bit_width(size) * 8 + int(size / (std::bit_floor(size) / 8) % 8); }

Block* map(size_t size) {
  void* p = mmap(nullptr, size + kHeader, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED) return nullptr;
  Block* b = static_cast<Block*>(p);
  b->size = size;
  return b;
}

/// Returns a chain of blocks, linked by `older`, to the system.
void unmap(Block* b) {
  while (b) {
    Block* next = b->links[0].older;
    munmap(b, b->size + kHeader);
    b = next;
  }
}

// ---- the limit ----

/// The number in a file, or no limit.
int64_t limit_in(const std::string& path) {
  std::ifstream file(path);
  int64_t bytes;
  return file >> bytes ? bytes : std::numeric_limits<int64_t>::max();
}

/// The memory that this process may use: the machine's, its container's, or what ulimit leaves it.
int64_t memory_of_process() {
  int64_t bytes = int64_t(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE);
  std::string group;
  std::ifstream groups("/proc/self/cgroup");
  while (std::getline(groups, group) && !group.starts_with("0::")) {
  }
  for (const std::string& path : {std::string("memory.max"), std::string("memory/memory.limit_in_bytes"),
                                  group.substr(std::min<size_t>(3, group.size())) + "/memory.max"}) {
    bytes = std::min(bytes, limit_in("/sys/fs/cgroup/" + path));
  }
  rlimit space;
  if (getrlimit(RLIMIT_AS, &space) == 0 && space.rlim_cur != RLIM_INFINITY) {
    bytes = std::min(bytes, int64_t(space.rlim_cur));
  }
  return bytes;
}

int64_t limit_by_default() {
  if (const char* text = std::getenv("CNNOPS_CACHE_LIMIT")) {
    int64_t bytes = -1;
    const auto [end, error] = std::from_chars(text, text + std::strlen(text), bytes);
    TORCH_CHECK_VALUE(error == std::errc() && *end == 0 && bytes >= 0,
                      "CNNOPS_CACHE_LIMIT must be a number of bytes, 0 or more, but is '", text, "'");
    return bytes;
  }
#ifdef CNNOPS_SANITIZED
  return 0;
#endif
  if (__asan_init || __tsan_init || __msan_init) return 0;
  return std::min(memory_of_process() / 8, kMostByDefault);
}

// ---- the cache ----

class WarmMemory final : public c10::Allocator {
 public:
  /// Made at the first call and never destroyed: tensors may outlive everything else of the process.
  static WarmMemory& instance() {
    static WarmMemory& memory = *new WarmMemory;
    return memory;
  }

  c10::DataPtr allocate(size_t bytes) override {
    if (bytes < kLeast || bytes > size_t(limit_.load(std::memory_order_relaxed))) {
      return c10::GetCPUAllocator()->allocate(bytes);
    }
    const size_t size = rounded(bytes);
    Block* b = find(size);
    if (!b) b = map(size);
    if (!b) {
      empty();
      b = map(size);
    }
    if (!b) {
      unused(size);
      return c10::GetCPUAllocator()->allocate(bytes);  // which raises the error
    }
    c10::profiledCPUMemoryReporter().New(b->memory(), bytes);
    return {b->memory(), b->memory(), free, c10::Device(c10::kCPU)};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

  void empty() {
    std::unique_lock lock(mutex_);
    Block* all = take_all();
    lock.unlock();
    unmap(all);
  }

  void set_limit(int64_t bytes) {
    std::unique_lock lock(mutex_);
    limit_ = bytes;
    Block* evicted = evict(bytes, Clock::time_point::min());
    lock.unlock();
    unmap(evicted);
  }

  void set_seconds(double seconds) {
    const std::scoped_lock lock(mutex_);
    seconds_ = std::chrono::duration<double>(seconds);
  }

  MemoryStats stats() {
    const std::scoped_lock lock(mutex_);
    MemoryStats stats = stats_;
    stats.limit = limit_;
    return stats;
  }

 private:
  /// A fork waits until no other thread is in here. The child starts with nothing kept: to write to memory that it shares
  /// with its parent would cost it more than fresh memory does.
  WarmMemory() : limit_(limit_by_default()) {
    pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                   [] {
                     Block* all = instance().take_all();
                     instance().mutex_.unlock();
                     unmap(all);
                   });
  }

  static void free(void* memory) {
    c10::profiledCPUMemoryReporter().Delete(memory);
    unmap(instance().keep(Block::of(memory)));
  }

  /// The block of this size freed last, if there is one. From now on `size` bytes are in use.
  Block* find(size_t size) {
    const std::scoped_lock lock(mutex_);
    stats_.in_use += size;
    stats_.in_use_peak = std::max(stats_.in_use_peak, stats_.in_use);
    Block* b = classes_[class_of(size)].newest;
    ++(b ? stats_.hits : stats_.misses);
    if (b) remove(b);
    return b;
  }

  void unused(size_t size) {
    const std::scoped_lock lock(mutex_);
    stats_.in_use -= size;
  }

  /// Keeps a block, and makes room for it: returns those that have to go.
  Block* keep(Block* b) {
    const std::scoped_lock lock(mutex_);
    stats_.in_use -= b->size;
    if (int64_t(b->size) > limit_) {
      b->links[0].older = nullptr;
      return b;
    }
    b->freed = Clock::now();
    Block* evicted = evict(limit_ - int64_t(b->size), b->freed - std::chrono::duration_cast<Clock::duration>(seconds_));
    all_.add(b);
    classes_[class_of(b->size)].add(b);
    stats_.cached += b->size;
    stats_.cached_peak = std::max(stats_.cached_peak, stats_.cached);
    return evicted;
  }

  /// Takes out the oldest blocks, until no more than `most` bytes are left and none that was freed before `since`.
  Block* evict(int64_t most, Clock::time_point since) {
    Block* evicted = nullptr;
    while (all_.oldest && (stats_.cached > most || all_.oldest->freed < since)) {
      Block* b = all_.oldest;
      remove(b);
      ++stats_.evictions;
      b->links[0].older = evicted;
      evicted = b;
    }
    return evicted;
  }

  void remove(Block* b) {
    all_.remove(b);
    classes_[class_of(b->size)].remove(b);
    stats_.cached -= b->size;
  }

  Block* take_all() {
    Block* all = all_.newest;
    all_ = {};
    classes_ = {};
    stats_.cached = 0;
    return all;
  }

  std::mutex mutex_;
  List<0> all_;
  std::array<List<1>, 65 * 8> classes_;
  MemoryStats stats_{};
  std::atomic<int64_t> limit_;
  std::chrono::duration<double> seconds_ = kSecondsByDefault;
};

}  // namespace

c10::Allocator* warm_memory() { return &WarmMemory::instance(); }

MemoryStats memory_stats() { return WarmMemory::instance().stats(); }

void empty_cache() { WarmMemory::instance().empty(); }

void set_cache_limit(int64_t bytes) {
  TORCH_CHECK_VALUE(bytes >= 0, "cache_limit must be a number of bytes, 0 or more, but got ", bytes);
  WarmMemory::instance().set_limit(bytes);
}

void set_cache_seconds(double seconds) {
  TORCH_CHECK_VALUE(seconds >= 0, "cache_seconds must be 0 or more, but got ", seconds);
  WarmMemory::instance().set_seconds(seconds);
}

}  // namespace cnnops

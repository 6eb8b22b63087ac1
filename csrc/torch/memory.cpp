// The cache of freed blocks behind our tensors on the CPU: memory.h tells what it promises, docs/memory.md why.
#include "memory.h"

#include <c10/core/CPUAllocator.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <charconv>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <limits>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>

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

constexpr size_t kLeast = 64 << 10;  // of smaller blocks the C library keeps enough
constexpr int64_t kMostByDefault = int64_t(4) << 30;
constexpr std::chrono::duration<double> kSecondsByDefault{30};

size_t whole_pages(size_t bytes) {
  static const size_t page = sysconf(_SC_PAGESIZE);
  return (bytes + page - 1) / page * page;
}

/// Fresh memory, at `place` if there is room and a place is wanted; nullptr if the system has none.
char* map(size_t size, char* place = nullptr) {
  void* p = mmap(place, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return p == MAP_FAILED ? nullptr : static_cast<char*>(p);
}

/// Ranges of addresses, the highest first: their starts, and their sizes.
using Ranges = std::map<char*, size_t, std::greater<>>;

void unmap(const Ranges& ranges) {
  for (const auto& [start, size] : ranges) munmap(start, size);
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

/// Free memory is ranges of pages; neighbours are one range, wherever they came from. A block is the start of the
/// highest range that is long enough, so that what is wanted seldom gathers at the low end, which is what goes back.
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
    char* block = take(whole_pages(bytes));
    if (!block) {
      empty();
      block = take(whole_pages(bytes));
    }
    if (!block) return c10::GetCPUAllocator()->allocate(bytes);  // which raises the error
    c10::profiledCPUMemoryReporter().New(block, bytes);
    return {block, block, free, c10::Device(c10::kCPU)};
  }

  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

  void empty() {
    std::unique_lock lock(mutex_);
    const Ranges all = cut(0);
    lock.unlock();
    unmap(all);
  }

  void set_limit(int64_t bytes) {
    std::unique_lock lock(mutex_);
    limit_ = bytes;
    const Ranges gone = cut(bytes);
    lock.unlock();
    unmap(gone);
  }

  void set_seconds(double seconds) {
    const std::scoped_lock lock(mutex_);
    seconds_ = std::chrono::duration<double>(seconds);
    since_ = Clock::now();
    recent_peak_ = stats_.in_use;
  }

  MemoryStats stats() {
    const std::scoped_lock lock(mutex_);
    MemoryStats stats = stats_;
    stats.limit = limit_;
    return stats;
  }

 private:
  /// A fork waits until no other thread is in here. The child starts with nothing kept: to write to memory that it
  /// shares with its parent would cost it more than fresh memory does.
  WarmMemory() : limit_(limit_by_default()) {
    pthread_atfork([] { instance().mutex_.lock(); }, [] { instance().mutex_.unlock(); },
                   [] {
                     const Ranges all = instance().cut(0);
                     instance().mutex_.unlock();
                     unmap(all);
                   });
  }

  static void free(void* memory) {
    c10::profiledCPUMemoryReporter().Delete(memory);
    unmap(instance().keep(static_cast<char*>(memory)));
  }

  char* take(size_t size) {
    const std::scoped_lock lock(mutex_);
    auto range = std::find_if(free_.begin(), free_.end(), [&](const auto& range) { return range.second >= size; });
    const bool hit = range != free_.end();
    if (!hit) range = grow(size);
    if (range == free_.end()) return nullptr;
    const auto [start, length] = *range;
    free_.erase(range);
    if (length > size) free_.emplace(start + size, length - size);
    used_.emplace(start, size);
    stats_.cached -= size;
    stats_.in_use += size;
    stats_.in_use_peak = std::max(stats_.in_use_peak, stats_.in_use);
    recent_peak_ = std::max(recent_peak_, stats_.in_use);
    ++(hit ? stats_.hits : stats_.misses);
    return start;
  }

  /// A range of this size: the lowest one with fresh memory below it, or all fresh.
  Ranges::iterator grow(size_t size) {
    if (!free_.empty()) {
      const auto [start, length] = *free_.rbegin();
      const size_t missing = size - length;
      char* const place = start - missing;
      char* const fresh = map(missing, place);
      if (fresh == place) return add(fresh, missing);
      if (fresh) munmap(fresh, missing);
    }
    char* const fresh = map(size);
    return fresh ? add(fresh, size) : free_.end();
  }

  /// Adds a range to its free neighbours.
  Ranges::iterator add(char* start, size_t size) {
    stats_.cached += size;
    auto below = free_.lower_bound(start);  // the first that does not start above it
    if (below != free_.begin()) {
      const auto above = std::prev(below);
      if (above->first == start + size) {
        size += above->second;
        free_.erase(above);
      }
    }
    if (below != free_.end() && below->first + below->second == start) {
      below->second += size;
      return below;
    }
    return free_.emplace(start, size).first;
  }

  /// Keeps a block; returns what has to go for it.
  Ranges keep(char* block) {
    const std::scoped_lock lock(mutex_);
    const size_t size = used_.extract(block).mapped();
    stats_.in_use -= size;
    add(block, size);
    int64_t most = limit_;
    if (const auto now = Clock::now(); now - since_ > seconds_) {
      most = std::min(most, recent_peak_ + recent_peak_ / 2 - stats_.in_use);
      recent_peak_ = stats_.in_use;
      since_ = now;
    }
    Ranges gone = cut(most);
    stats_.cached_peak = std::max(stats_.cached_peak, stats_.cached);
    return gone;
  }

  /// Takes out the lowest pages, until no more than `most` bytes are left.
  Ranges cut(int64_t most) {
    Ranges gone;
    while (stats_.cached > most) {
      const auto [start, length] = *free_.rbegin();
      const size_t size = std::min(length, whole_pages(stats_.cached - most));
      free_.erase(start);
      if (length > size) free_.emplace(start + size, length - size);
      gone.emplace(start, size);
      stats_.cached -= size;
      ++stats_.evictions;
    }
    return gone;
  }

  std::mutex mutex_;
  Ranges free_;
  std::unordered_map<char*, size_t> used_;
  MemoryStats stats_{};
  std::atomic<int64_t> limit_;
  std::chrono::duration<double> seconds_ = kSecondsByDefault;
  Clock::time_point since_ = Clock::now();  // when the present period of so many seconds began
  int64_t recent_peak_ = 0;                 // the most that was in use in it
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

// The emulated GPU's scheduler. Never compiled with -fsanitize=thread: see emulation.h.
#include "emulation.h"

#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define CNNOPS_SANITIZED
#endif
#if defined(CNNOPS_EMULATE_TSAN)
#include <sanitizer/tsan_interface.h>
#define CNNOPS_SANITIZED
#else
// Each thread is known to ThreadSanitizer, and what orders memory between them.
static void* __tsan_get_current_fiber() { return nullptr; }
static void* __tsan_create_fiber(unsigned) { return nullptr; }
static void __tsan_switch_to_fiber(void*, unsigned) {}
static void __tsan_acquire(void*) {}
static void __tsan_release(void*) {}
constexpr unsigned __tsan_switch_to_fiber_no_sync = 1;
#endif

namespace emulation {
namespace {

constexpr std::size_t kPage = 4096, kStack = 256 * 1024, kOperand = 64;
constexpr std::size_t kAbove = 64 * 1024;  // a fault closer above a stack than this, sanitizers take for its overflow

/// What a thread stopped for.
enum class Stop { barrier, collective, end };

/// Where to go on, for the compiler's own setjmp: it saves no signals as ucontext does, and sanitizers, who would look at
/// the whole stack at each setjmp of the library's, do not know of it. So switching takes nanoseconds.
using Jump = void* [5];

struct Fiber {
  unsigned char* stack = nullptr;
  Jump stopped;
  void* tsan = nullptr;
  Stop stop = Stop::end;
  const char* kind = "";
  Here here;
  std::vector<std::vector<Copy>> copies;
};

/// What the threads of a warp exchange. A thread may reach its next collective before the others have read this one's,
/// but not the one after that.
struct Warp {
  alignas(16) unsigned char operands[2][kWarp][kOperand];
  int turn;
  char order[2];  // of memory, at every other sync_warp
};

/// The block that is running. There is one at a time.
struct Block {
  std::string kernel;
  const std::function<void()>* body = nullptr;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Fiber* current = nullptr;
  Jump scheduler;
  void* tsan = nullptr;
  std::unique_ptr<Guarded> shared;
  int threads = 0, barriers = 0;
  char order[2], begins, ends;  // of memory, at every other barrier, and around the block
};
Block block;
std::vector<const Guarded*> all_guarded;

/// 0 .. count-1 in the order wanted. Runs of `together` stay together: a warp is never interrupted by another.
std::vector<int> in_order(int64_t count, int together, std::mt19937& random) {
  std::vector<int> groups((count + together - 1) / together), all;
  std::iota(groups.begin(), groups.end(), 0);
  if (settings.order == Order::shuffled) std::shuffle(groups.begin(), groups.end(), random);
  for (int group : groups) {
    const auto begin = static_cast<std::ptrdiff_t>(all.size());
    for (int64_t i = int64_t{group} * together; i < std::min<int64_t>(count, (int64_t{group} + 1) * together); ++i) {
      all.push_back(static_cast<int>(i));
    }
    if (settings.order == Order::shuffled) std::shuffle(all.begin() + begin, all.end(), random);
  }
  if (settings.order == Order::reverse) std::reverse(all.begin(), all.end());
  return all;
}

/// A function of its own: in one that sets a place as well, gcc forgets about that.
[[gnu::noinline, gnu::no_sanitize("address")]] void jump(Jump& to) { __builtin_longjmp(to, 1); }

/// The life of a fiber: the same thread of one block after the other.
[[gnu::no_sanitize("address")]] void live() {
  for (;;) {
    __tsan_acquire(&block.begins);
    (*block.body)();
    for (const auto& group : block.current->copies) {
      if (!group.empty())
        fail_thread("ends with a cp.async under way that it never waited for, " + text(group[0].here));
    }
    block.current->copies.clear();
    block.current->stop = Stop::end;
    __tsan_release(&block.ends);
    __tsan_switch_to_fiber(block.tsan, __tsan_switch_to_fiber_no_sync);
    if (!__builtin_setjmp(block.current->stopped)) jump(block.scheduler);
  }
}

/// Runs a thread until it stops again.
[[gnu::noinline, gnu::no_sanitize("address")]] void resume(int thread) {
  Fiber& fiber = block.fibers[static_cast<std::size_t>(thread)];
  block.current = &fiber;
  threadIdx.x = static_cast<unsigned>(thread);
  if (__builtin_setjmp(block.scheduler)) return;
  if (fiber.stack) {
    __tsan_switch_to_fiber(fiber.tsan, __tsan_switch_to_fiber_no_sync);
    jump(fiber.stopped);
  }
  void* stack =
      mmap(nullptr, kStack + kAbove, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (stack == MAP_FAILED || mprotect(stack, kPage, PROT_NONE)) fail("no memory for its threads' stacks");
  fiber.stack = static_cast<unsigned char*>(stack);
  fiber.tsan = __tsan_create_fiber(0);
  static ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = kStack;
  makecontext(&context, live, 0);
  __tsan_switch_to_fiber(fiber.tsan, __tsan_switch_to_fiber_no_sync);
  setcontext(&context);
}

/// Back to the scheduler, until resume() comes round again.
[[gnu::noinline, gnu::no_sanitize("address")]] void stop(Stop why, const char* kind, const Here& here) {
  Fiber* fiber = block.current;
  fiber->stop = why;
  fiber->kind = kind;
  fiber->here = here;
  __tsan_switch_to_fiber(block.tsan, __tsan_switch_to_fiber_no_sync);
  if (!__builtin_setjmp(fiber->stopped)) jump(block.scheduler);
}

bool together(const Fiber& a, const Fiber& b) {
  return a.stop == b.stop &&
         (a.stop == Stop::end ||
          (a.here.line() == b.here.line() && a.kind == b.kind && a.here.column() == b.here.column() &&
           (a.here.file_name() == b.here.file_name() || !std::strcmp(a.here.file_name(), b.here.file_name()))));
}

/// "threads 0-3, 7 wait at the barrier, FILE:LINE", for each place where threads [begin, end) have stopped.
std::string places(int begin, int end, const char* name) {
  std::string all;
  std::vector<bool> told(static_cast<std::size_t>(end), false);
  for (int first = begin; first < end; ++first) {
    if (told[first]) continue;
    const Fiber& fiber = block.fibers[first];
    std::string who;
    for (int i = first; i < end; ++i) {
      if (!together(block.fibers[i], fiber)) continue;
      int last = i;
      while (last + 1 < end && together(block.fibers[last + 1], fiber)) ++last;
      who += (who.empty() ? "" : ", ") + std::to_string(i - begin);
      if (last > i) who += "-" + std::to_string(last - begin);
      for (; i <= last; ++i) told[i] = true;
    }
    if (!all.empty()) all += "; ";
    all += std::string(name) + " " + who +
           (fiber.stop == Stop::end ? " ended" : std::string(" wait at the ") + fiber.kind + ", " + text(fiber.here));
  }
  return all;
}

/// Runs a warp until all of it waits at the barrier, or has ended.
void run_warp(const std::vector<int>& threads) {
  const int begin = *std::min_element(threads.begin(), threads.end()), end = begin + static_cast<int>(threads.size());
  for (bool collective = true; collective;) {
    for (int thread : threads) resume(thread);
    const Fiber& first = block.fibers[begin];
    collective = std::any_of(threads.begin(), threads.end(),
                             [](int thread) { return block.fibers[thread].stop == Stop::collective; });
    const bool all =
        std::all_of(threads.begin(), threads.end(), [&](int thread) { return together(block.fibers[thread], first); });
    if (collective && (!all || threads.size() < kWarp)) {
      fail("a collective that not all 32 lanes of warp " + std::to_string(begin / kWarp) +
           " reach: " + places(begin, end, "lanes") +
           (threads.size() < kWarp ? "; lanes " + std::to_string(threads.size()) + "-31 do not exist" : ""));
    }
    block.warps[begin / kWarp].turn ^= collective;
  }
}

void run_block(const std::vector<int>& order) {
  for (;;) {
    for (std::size_t i = 0; i < order.size();) {
      std::vector<int> warp;
      for (const int number = order[i] / kWarp; i < order.size() && order[i] / kWarp == number; ++i) {
        warp.push_back(order[i]);
      }
      run_warp(warp);
    }
    const Fiber& first = block.fibers.front();
    if (!std::all_of(order.begin(), order.end(), [&](int i) { return together(block.fibers[i], first); })) {
      fail("a barrier that not all threads of the block reach: " + places(0, block.threads, "threads"));
    }
    if (first.stop == Stop::end) return;
    ++block.barriers;
  }
}

#ifndef CNNOPS_SANITIZED
/// A thread touched what it must not. Says so, and ends the process.
void trespass(int, siginfo_t* info, void*) {
  if (!block.current) _exit(139);
  const auto* place = static_cast<const unsigned char*>(info->si_addr);
  const unsigned char* stack = block.current->stack;
  if (place >= stack && place < stack + kPage) fail_thread("needs more than its stack");
  for (const Guarded* memory : all_guarded) {
    const std::string distance = memory->distance(place);
    if (!distance.empty()) fail_thread("reads or writes " + distance);
  }
  fail_thread("reads or writes at an address far from all that it was given");
}

const bool watching = [] {
  static unsigned char stack[64 * 1024];
  stack_t alternative{};
  alternative.ss_sp = stack;
  alternative.ss_size = sizeof stack;
  sigaltstack(&alternative, nullptr);
  struct sigaction action{};
  action.sa_sigaction = trespass;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  return !sigaction(SIGSEGV, &action, nullptr) && !sigaction(SIGBUS, &action, nullptr);
}();
#endif

}  // namespace

void fail(const std::string& what) {
  std::fprintf(stderr, "%s: %s\n", block.kernel.c_str(), what.c_str());
  std::fflush(stderr);
  _exit(1);
}

void fail_thread(const std::string& what) {
  fail("thread " + std::to_string(threadIdx.x) + " of block " + std::to_string(blockIdx.x) + " " + what);
}

std::string text(const Here& here) { return std::string(here.file_name()) + ":" + std::to_string(here.line()); }

Guarded::Guarded(std::string name, std::size_t size, int poison, std::size_t offset)
    : name_(std::move(name)), size_(size) {
  const std::size_t aligned = (offset + size + 15) / 16 * 16, inner = (aligned + kPage - 1) / kPage * kPage;
  mapped_ = inner + 2 * kPage;
  void* all = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (all == MAP_FAILED) throw std::bad_alloc();
  mapping_ = static_cast<unsigned char*>(all);
  data_ = mapping_ + kPage + (settings.order == Order::reverse ? 0 : inner - aligned) + offset;
  std::memset(mapping_ + kPage, 0xff, inner);
  std::memset(data_, poison, size);
  mprotect(mapping_, kPage, PROT_NONE);
  mprotect(mapping_ + kPage + inner, kPage, PROT_NONE);
#ifdef __SANITIZE_ADDRESS__
  __asan_poison_memory_region(mapping_ + kPage, inner);
  __asan_unpoison_memory_region(data_, size);
#endif
  all_guarded.push_back(this);
}

Guarded::~Guarded() {
  std::erase(all_guarded, this);
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(mapping_, mapped_);
#endif
  munmap(mapping_, mapped_);
}

bool Guarded::holds(const void* place, std::size_t bytes) const {
  const auto* at = static_cast<const unsigned char*>(place);
  return data_ <= at && at + bytes <= data_ + size_;
}

void Guarded::check() const {
#ifndef __SANITIZE_ADDRESS__
  for (const unsigned char* at = mapping_ + kPage; at < mapping_ + mapped_ - kPage; ++at) {
    if (at == data_) at += size_;
    if (at < mapping_ + mapped_ - kPage && *at != 0xff) fail("wrote " + distance(at));
  }
#endif
}

std::string Guarded::distance(const void* place) const {
  const auto* at = static_cast<const unsigned char*>(place);
  if (at < mapping_ || at >= mapping_ + mapped_) return "";
  if (at < data_) return std::to_string(data_ - at) + " bytes before " + name_;
  return std::to_string(at - data_ - static_cast<std::ptrdiff_t>(size_)) + " bytes beyond the end of " + name_;
}

std::vector<std::vector<Copy>>& copies() {
  auto& all = block.current->copies;
  if (all.empty()) all.emplace_back();
  copies_seen = true;
  return all;
}

void sync_block(Here here) {
  void* order = &block.order[block.barriers % 2];
  __tsan_release(order);
  stop(Stop::barrier, "barrier", here);
  __tsan_acquire(order);
}

/// Not memcpy(), which sanitizers watch wherever it is called from.
[[gnu::no_sanitize("address")]] static void copy_registers(const void* from, void* to, std::size_t size) {
  using Word [[gnu::may_alias, gnu::aligned(1)]] = std::uint64_t;
  const auto *in = static_cast<const unsigned char*>(from), *end = in + size;
  auto* out = static_cast<unsigned char*>(to);
  for (; in + sizeof(Word) <= end; in += sizeof(Word), out += sizeof(Word)) {
    *reinterpret_cast<Word*>(out) = *reinterpret_cast<const volatile Word*>(in);
  }
  for (; in < end; ++in, ++out) *out = *const_cast<const volatile unsigned char*>(in);
}

void exchange(const char* kind, const void* mine, std::size_t size, void* all, const Here& here) {
  if (size > kOperand) fail("operands of a collective larger than the emulation has room for");
  Warp& warp = block.warps[threadIdx.x / kWarp];
  auto& operands = warp.operands[warp.turn];
  copy_registers(mine, operands[threadIdx.x % kWarp], size);
  stop(Stop::collective, kind, here);
  for (int lane = 0; lane < kWarp; ++lane) {
    copy_registers(operands[lane], static_cast<unsigned char*>(all) + lane * size, size);
  }
}

void sync_warp(Here here) {
  Warp& warp = block.warps[threadIdx.x / kWarp];
  void* order = &warp.order[warp.turn];
  __tsan_release(order);
  stop(Stop::collective, "sync_warp", here);
  __tsan_acquire(order);
}

void check_aligned(const void* place, std::size_t bytes, const Here& here) {
  const std::size_t over = reinterpret_cast<std::uintptr_t>(place) % bytes;
  if (over) {
    fail_thread("accesses " + std::to_string(bytes) + " bytes at an address " + std::to_string(over) +
                " over a multiple of that, " + text(here));
  }
}

void check_shared(const void* place, std::size_t bytes, const char* what, const Here& here) {
  if (!block.shared->holds(place, bytes)) {
    fail_thread(std::string(what) + " outside of the block's shared memory, " + text(here));
  }
}

void atomic_max(int64_t* place, int64_t x) { *place = std::max(*place, x); }

void* shared_memory() { return block.shared->data(); }

void run(const char* kernel, int64_t blocks, int threads, std::size_t shared_bytes, int64_t shared_limit,
         const std::function<void()>& body) {
  std::mt19937 random(1);
  block.kernel = kernel;
  block.body = &body;
  block.threads = threads;
  block.tsan = __tsan_get_current_fiber();
  if (block.fibers.size() < static_cast<std::size_t>(threads)) block.fibers.resize(threads);
  block.warps.resize((threads + kWarp - 1) / kWarp);
  if (static_cast<int64_t>(shared_bytes) > shared_limit) {
    fail("asks for " + std::to_string(shared_bytes) + " bytes of shared memory, and a block may have " +
         std::to_string(shared_limit) + " on sm_" + std::to_string(settings.architecture));
  }
  if (threads < 1 || threads > 1024)
    fail("asks for " + std::to_string(threads) + " threads, and a block has 1 to 1024");
  gridDim.x = static_cast<unsigned>(blocks);
  blockDim.x = static_cast<unsigned>(threads);
  for (int number : in_order(blocks, 1, random)) {
    blockIdx.x = static_cast<unsigned>(number);
#ifdef CNNOPS_EMULATE_TSAN
    block.shared.reset();  // of other blocks, which nothing orders; new memory is a new matter
#endif
    if (!block.shared) {
      block.shared = std::make_unique<Guarded>("shared memory", shared_bytes);
    } else {
      std::memset(block.shared->data(), 0xff, shared_bytes);
    }
    __tsan_release(&block.begins);
    run_block(in_order(threads, kWarp, random));
    block.shared->check();
  }
  __tsan_acquire(&block.ends);
  block.shared.reset();
  block.current = nullptr;
}

}  // namespace emulation

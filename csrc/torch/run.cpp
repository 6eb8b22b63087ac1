#include "run.h"

#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

namespace cnnops {
namespace {

const cpu::InstructionSet& find_instruction_set(const std::string& name) {
  std::string known;
  for (const auto& set : cpu::instruction_sets()) {
    if (!set.supported()) continue;
    if (name.empty() || name == set.name) return set;
    known += (known.empty() ? "" : ", ") + std::string(set.name);
  }
  TORCH_CHECK_VALUE(false, "unknown instruction set '", name, "'; this build has these for this processor: ", known);
}

std::atomic<const cpu::InstructionSet*>& current() {
  static std::atomic<const cpu::InstructionSet*> set = [] {
    const char* name = std::getenv("CNNOPS_ISA");
    return &find_instruction_set(name ? name : "");
  }();
  return set;
}

struct Memory {
  static constexpr std::align_val_t kAlignment{64};
  struct Delete {
    void operator()(void* p) const { ::operator delete(p, kAlignment); }
  };
  std::unique_ptr<void, Delete> memory;
  int64_t size = 0;
};

}  // namespace

const cpu::InstructionSet& instruction_set() { return *current().load(std::memory_order_relaxed); }

void set_instruction_set(const std::string& name) { current().store(&find_instruction_set(name)); }

void* scratch(int64_t bytes, Scratch whose) {
  thread_local Memory both[2];
  Memory& scratch = both[int(whose)];
  if (scratch.size < bytes) {
    scratch.memory.reset();
    scratch.size = 0;
    scratch.memory.reset(::operator new(bytes, Memory::kAlignment));
    scratch.size = bytes;
  }
  return scratch.memory.get();
}

void refuse_cuda() {
  TORCH_CHECK(
      false,
      "cnnops was built without CUDA, so it has no kernels for CUDA tensors: install a CUDA compiler and build it "
      "again with CNNOPS_CUDA=1 pip install --no-build-isolation --force-reinstall cnnops");
}

}  // namespace cnnops

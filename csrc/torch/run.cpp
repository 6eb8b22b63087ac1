// Which instruction set is in use, and the scratch memory of threads.
#include "run.h"

#include <atomic>
#include <cstdlib>

#include "memory.h"

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
  c10::DataPtr block;
  int64_t size = 0;
};

}  // namespace

const cpu::InstructionSet& instruction_set() { return *current().load(std::memory_order_relaxed); }

void set_instruction_set(const std::string& name) { current().store(&find_instruction_set(name)); }

void* scratch(int64_t bytes, Scratch whose) {
  thread_local Memory both[2];
  Memory& memory = both[int(whose)];
  if (memory.size < bytes) {
    memory.block.clear();
    memory.size = 0;
    memory.block = warm_memory()->allocate(bytes);
    memory.size = bytes;
  }
  return memory.block.get();
}

void refuse_cuda() {
  TORCH_CHECK(
      false,
      "cnnops was built without CUDA, so it has no kernels for CUDA tensors: install a CUDA compiler and build it "
      "again with CNNOPS_CUDA=1 pip install --no-build-isolation --force-reinstall cnnops");
}

}  // namespace cnnops

// Where kernels are started: the one place that knows about threads, streams and scratch memory.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>

#include <string>
#include <type_traits>
#include <vector>

#include "../cpu/kernels.h"

#ifdef CNNOPS_CUDA
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>

#include "../cuda/kernels.h"
#endif

namespace cnnops {

/// The CPU kernels in use. The widest set that the processor supports, unless the environment variable CNNOPS_ISA or
/// set_instruction_set() names another.
const cpu::InstructionSet& instruction_set();
void set_instruction_set(const std::string& name);

template <class S>
const cpu::Kernels<S>& cpu_kernels() {
  return std::get<const cpu::Kernels<S>& (*)()>(instruction_set().kernels())();
}

/// Scratch memory of the calling thread, aligned to 64 bytes. It is kept from call to call (fresh pages cost more than
/// many a kernel) and grows to the largest size asked for, which the algorithms' own bounds keep to a few MiB. There is
/// one for what runs kernels and one for the kernels themselves.
enum class Scratch { of_kernel, of_caller };
void* scratch(int64_t bytes, Scratch whose = Scratch::of_kernel);

[[noreturn]] void refuse_cuda();

/// Calls run(begin, end) for ranges of tasks, on as many of torch's threads as have `grain` tasks or more to do.
/// (Asking torch costs more than a tiny tensor's kernel.)
template <class Run>
void split(int64_t tasks, int64_t grain, const Run& run) {
  if (tasks <= grain) {
    if (tasks > 0) run(0, tasks);
  } else {
    at::parallel_for(0, tasks, grain, run);
  }
}

/// Runs one kernel over `tasks` on the device of `like`. `body(kernels, call)` picks a kernel from the table and calls
/// call(kernel, arguments...); on the CPU the tasks are split over torch's threads, `grain` or more at a time.
template <class S, class Body>
void run_on_device(const at::Tensor& like, int64_t tasks, int64_t grain, const Body& body) {
  const auto check = [&](auto kernel) {
    TORCH_CHECK_NOT_IMPLEMENTED(kernel, "no kernel of this operator for dtype ", like.scalar_type(), " on ",
                                like.device().type());
  };
  if (like.is_cuda()) {
#ifdef CNNOPS_CUDA
    const c10::cuda::CUDAGuard guard(like.device());
    cuda::Stream stream = c10::cuda::getCurrentCUDAStream().stream();
    body(cuda::kernels<S>(), [&](auto kernel, auto... arguments) {
      check(kernel);
      if constexpr (std::is_invocable_v<decltype(kernel), decltype(arguments)..., int64_t, cuda::Stream>) {
        kernel(arguments..., tasks, stream);
      } else {
        kernel(arguments..., stream);
      }
    });
#else
    refuse_cuda();
#endif
  } else {
    body(cpu_kernels<S>(), [&](auto kernel, auto... arguments) {
      check(kernel);
      split(tasks, grain, [&](int64_t begin, int64_t end) { kernel(arguments..., begin, end); });
    });
  }
}

/// About this many simple operations are worth waking another thread for.
constexpr int64_t kGrain = 32768;

inline int64_t grain_for(int64_t operations_per_task) {
  return operations_per_task >= kGrain ? 1 : kGrain / (operations_per_task < 1 ? 1 : operations_per_task);
}

}  // namespace cnnops

// Which instruction sets this build holds, and which of them the processor runs. Compiled once, for any processor.
#include "kernels.h"

namespace cnnops::cpu {

namespace base {
KernelSet kernels();
}  // namespace base

#if defined(__x86_64__)
namespace avx2 {
KernelSet kernels();
}  // namespace avx2
namespace avx512 {
KernelSet kernels();
}  // namespace avx512
#endif

Table<InstructionSet> instruction_sets() {
  static const InstructionSet sets[] = {
#if defined(__x86_64__)
      {"avx512",
       [] {
         return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
                __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq");
       },
       avx512::kernels},
      {"avx2",
       [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); },
       avx2::kernels},
#endif
      {"base", [] { return true; }, base::kernels},
  };
  return {sets, sizeof sets / sizeof *sets};
}

}  // namespace cnnops::cpu

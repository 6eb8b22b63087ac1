// Which instruction sets this build holds, and which of them the processor runs. Compiled once, for any processor.
#include "kernels.h"

namespace cnnops::cpu {

namespace base {
const Kernels<float>& float32();
const Kernels<double>& float64();
}  // namespace base

#if defined(__x86_64__)
namespace avx2 {
const Kernels<float>& float32();
const Kernels<double>& float64();
}  // namespace avx2
namespace avx512 {
const Kernels<float>& float32();
const Kernels<double>& float64();
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
       avx512::float32, avx512::float64},
      {"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }, avx2::float32,
       avx2::float64},
#endif
      {"base", [] { return true; }, base::float32, base::float64},
  };
  return {sets, sizeof sets / sizeof *sets};
}

}  // namespace cnnops::cpu

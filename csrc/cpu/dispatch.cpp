#include "rows.h"

namespace lolkernels::cpu {

static const RowKernels& pick() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return avx512_kernels;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return avx2_kernels;
  }
#endif
  return baseline_kernels;
}

const RowKernels& row_kernels() {
  static const RowKernels& kernels = pick();
  return kernels;
}

}  // namespace lolkernels::cpu

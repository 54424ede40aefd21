// Row kernels on plain memory, without torch: the sanitizer harness links exactly these.
#pragma once

#include <cstdint>

#include "../arguments.h"

namespace lolkernels::cpu {

// Each function handles rows [begin, end). A row's result depends on that row alone.
struct RowKernels {
  const char* isa;
  void (*exps)(const ExpsArgs&, int64_t begin, int64_t end);
  void (*dlogits)(const DlogitsArgs&, int64_t begin, int64_t end);
};

extern const RowKernels baseline_kernels;
#if defined(__x86_64__)
extern const RowKernels avx2_kernels;
extern const RowKernels avx512_kernels;
#endif

// The best set this machine can run.
const RowKernels& row_kernels();

}  // namespace lolkernels::cpu

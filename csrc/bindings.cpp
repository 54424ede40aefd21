// The schemas of the compiled CPU ops. The kernels are registered in cpu/ops.cpp.
#include <torch/csrc/stable/library.h>

#include "schemas.h"

STABLE_TORCH_LIBRARY_FRAGMENT(lolkernels, m) {
  lolkernels::define_row_functions(m);
  // The instruction set the CPU kernels run on: avx512, avx2 or baseline.
  m.def("cpu_isa() -> str");
}

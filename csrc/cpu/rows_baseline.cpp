// Whatever the compiler targets by default: SSE2 on x86-64, NEON on aarch64.
#include "rows.h"

#define LOL_LANES 4
#define LOL_ISA "baseline"
#define LOL_KERNELS baseline_kernels
#include "rows_impl.h"

// Standard headers come before the target switch: their inline functions stay baseline code, so the
// linker may keep any translation unit's copy.
#include <cmath>
#include <cstring>
#include <limits>

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif

#include "rows.h"

#define LOL_LANES 16
#define LOL_ISA "avx512"
#define LOL_KERNELS avx512_kernels
#include "rows_impl.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

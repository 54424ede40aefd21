// What the kernels ask of a thread block and of the special function unit.
#pragma once

#include <cuda_runtime.h>

#include <cmath>

namespace lolkernels::cuda {

constexpr int kWarp = 32;
constexpr unsigned kEveryLane = 0xffffffffu;

// 2^x in one instruction, 0 where it would be denormal; nan stays nan.
__device__ __forceinline__ float exp2_flushed(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return x < -126.0f ? 0.0f : exp2f(x);
#endif
}

}  // namespace lolkernels::cuda

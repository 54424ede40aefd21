// What the kernels ask of a thread block and of the special function unit.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>

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

// To an aligned address of global memory. In a kernel as long as a GEMM the compiler leaves four
// stores of a word as they are.
__device__ __forceinline__ void store_16_bytes(void* to, const uint32_t (&words)[4]) {
#if defined(__CUDA_ARCH__)
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)),
               "r"(words[0]), "r"(words[1]), "r"(words[2]), "r"(words[3])
               : "memory");
#else
  memcpy(to, words, sizeof(words));
#endif
}

}  // namespace lolkernels::cuda

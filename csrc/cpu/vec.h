// Short vectors of floats in GCC/Clang vector extensions: LOL_LANES lanes, no intrinsics, any
// target. Everything has internal linkage, because each instruction set compiles its own copy.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>

#include "../contract.h"

namespace lolkernels::cpu {
namespace {

constexpr int kLanes = LOL_LANES;

typedef float F32 __attribute__((vector_size(kLanes * 4)));
typedef int32_t I32 __attribute__((vector_size(kLanes * 4)));
typedef uint32_t U32 __attribute__((vector_size(kLanes * 4)));
typedef uint16_t U16 __attribute__((vector_size(kLanes * 2)));

constexpr float kInf = std::numeric_limits<float>::infinity();

template <typename To, typename From>
inline To bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof(y));
  return y;
}

template <typename V, typename T>
inline V load(const T* p) {
  V v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}

template <typename V, typename T>
inline void store(T* p, V v) {
  std::memcpy(p, &v, sizeof(v));
}

// x - 0 is x for every x, -0 and NaN included.
inline F32 splat(float x) { return x - F32{}; }

// A NaN in `a` survives: the operand order is that of the hardware's max and min.
inline F32 at_least(F32 a, F32 b) { return b > a ? b : a; }
inline F32 at_most(F32 a, F32 b) { return b < a ? b : a; }

inline float largest(F32 v) {
  float m = v[0];
  for (int i = 1; i < kLanes; ++i) m = v[i] > m ? v[i] : m;
  return m;
}

inline float total(F32 v) {
  float lane[kLanes];
  store(lane, v);
  for (int width = kLanes / 2; width > 0; width /= 2) {
    for (int i = 0; i < width; ++i) lane[i] += lane[i + width];
  }
  return lane[0];
}

// Below kExpMin exp is a denormal and counts as 0; above kExpMax it counts as infinite.
constexpr float kExpMin = -87.33f;
constexpr float kExpMax = 88.37f;

// exp(x) for kExpMin <= x <= kExpMax, within 1 ulp; exp(0) is exactly 1, NaN gives NaN.
// x = n ln 2 + r, |r| <= ln 2 / 2, and (exp(r) - 1 - r) / r^2 is minimax for the relative error
// (3e-9).
inline F32 exp_in_range(F32 x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves round(x) in the low bits
  const F32 shifted = x * 1.44269504f + kRound;
  const F32 n = shifted - kRound;
  F32 r = x - n * 0.693359375f;  // ln 2 in two parts; the product with the first is exact
  r = r - n * -2.12194440e-4f;
  F32 e = r * 1.38145402e-3f + 8.36874511e-3f;
  e = e * r + 4.16683908e-2f;
  e = e * r + 1.66665204e-1f;
  e = e * r + 4.99999934e-1f;
  e = e * r + 1.0f;
  e = e * r + 1.0f;
  const U32 power = (bits<U32>(shifted) << 23) + 0x3f800000u;
  return e * bits<F32>(power);
}

// exp(x) for any x: exactly 0 at -inf and below kExpMin, inf above kExpMax.
inline F32 exp_any(F32 x) {
  // At 89 the power of two that exp_in_range multiplies with is infinity.
  const F32 e = exp_in_range(at_most(at_least(x, splat(kExpMin)), splat(89.0f)));
  return x < kExpMin ? F32{} : e;
}

// tanh(u) within 2 ulp and 1 - tanh(u)^2 without cancellation.
struct Tanh {
  F32 value;
  F32 slope;
};

inline Tanh tanh_and_slope(F32 u) {
  const U32 sign = bits<U32>(u) & 0x80000000u;
  const F32 magnitude = bits<F32>(bits<U32>(u) ^ sign);
  const F32 near = tanh_near(u, u * u);
  // Elsewhere: 1 - q with q = 2 / (exp(2|u|) + 1). exp saturates far beyond the last bit of 1 - q.
  const F32 q = 2.0f / (exp_in_range(at_most(magnitude * 2.0f, splat(kExpMax))) + 1.0f);
  const F32 far = bits<F32>(bits<U32>(1.0f - q) | sign);
  const auto small = magnitude < kTanhNear;
  return {small ? near : far, small ? 1.0f - near * near : q * (2.0f - q)};
}

// bf16 and fp16 are stored as uint16_t. Widening is exact, narrowing rounds to nearest even, NaN
// stays NaN.

inline F32 widen_bf16(U16 h) { return bits<F32>(__builtin_convertvector(h, U32) << 16); }

inline U16 narrow_bf16(F32 x) {
  const U32 u = bits<U32>(x);
  const U32 rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const U32 quiet = (u >> 16) | 0x40u;
  return __builtin_convertvector(x == x ? rounded : quiet, U16);
}

inline F32 widen_fp16(U16 half) {
  const U32 h = __builtin_convertvector(half, U32);
  const U32 magnitude = h & 0x7fffu;
  // Read as fp32 the number is 2^112 times too small; the product is exact, denormals included.
  const F32 scaled = bits<F32>(magnitude << 13) * 0x1p112f;
  const U32 special = (magnitude << 13) | 0x7f800000u;
  const U32 value = magnitude >= 0x7c00u ? special : bits<U32>(scaled);
  return bits<F32>(value | ((h & 0x8000u) << 16));
}

inline U16 narrow_fp16(F32 x) {
  const U32 u = bits<U32>(x);
  const U32 sign = (u >> 16) & 0x8000u;
  const U32 magnitude = u & 0x7fffffffu;
  const U32 normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  // 0.5 has the spacing of fp16's denormals: the addition rounds to it.
  const U32 denormal = bits<U32>(bits<F32>(magnitude) + 0.5f) - 0x3f000000u;
  U32 h = magnitude < 0x38800000u ? denormal : normal;
  h = magnitude >= 0x477ff000u ? U32{} + 0x7c00u : h;
  h = magnitude > 0x7f800000u ? U32{} + 0x7e00u : h;
  return __builtin_convertvector(h | sign, U16);
}

}  // namespace
}  // namespace lolkernels::cpu

// The arithmetic every compiled backend shares: logits, their gradient, and the clipped-ratio
// coefficients of the A-LoL family. No memory access and no torch here; a kernel decides where the
// numbers come from. Functions are `static` on purpose: translation units built for different
// instruction sets include this header, and the linker must never merge their copies.
#pragma once

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__)
#define LOL_MEMBER __host__ __device__ __forceinline__
#else
#define LOL_MEMBER inline
#endif
#define LOL_INLINE static LOL_MEMBER

namespace lolkernels {

// z = softcap(scale * x) / temperature with softcap(v) = cap * tanh(v / cap), or v without a cap.

struct LogitMap {
  float gain;   // scale / temperature: dz/dx at x = 0
  float inner;  // scale / cap: the argument of tanh per unit of x
  float outer;  // cap / temperature: the bound of |z|
  bool capped;
};

LOL_INLINE LogitMap make_logit_map(double scale, double softcap, double temperature) {
  LogitMap map;
  map.gain = static_cast<float>(scale / temperature);
  map.capped = softcap > 0.0;
  map.inner = map.capped ? static_cast<float>(scale / softcap) : 0.0f;
  map.outer = map.capped ? static_cast<float>(softcap / temperature) : 0.0f;
  return map;
}

// tanh(u) for |u| < kTanhNear, s = u * u: an odd polynomial, minimax for the relative error (5e-9).
constexpr float kTanhNear = 0.63f;

template <typename V>
LOL_INLINE V tanh_near(V u, V s) {
  V poly = s * -5.66078993e-3f + 2.06020086e-2f;
  poly = poly * s - 5.37292303e-2f;
  poly = poly * s + 1.33313290e-1f;
  poly = poly * s - 3.33332783e-1f;
  return u + u * s * poly;
}

// E_v = exp(z_v - anchor) dz/dx for v != y

constexpr float kShift = 16.0f;  // an anchor stands this many nats above the label's logit
constexpr float kReach = 50.0f;  // a row that stands higher than this above it has its own maximum

// dL/dz_v = a * [v == y] + p_v * (b + c * z_v). V is float or a vector of floats.

// Away from the label. p = 0 wins over z = -inf: such a column has no gradient.
template <typename V, typename S>
LOL_INLINE V dlogit(V p, V z, S b, S c) {
  return p == V{} ? V{} : p * (b + c * z);
}

// At the label, rearranged so that p near 1 costs no digits: a + p * (b + c * z) is
// a * (1 - p) + p * (a + b + c * z), and for b == -a, c == 0 the second term is exactly 0.
LOL_INLINE float dlogit_at_label(float z, double logp, float a, float b, float c) {
  const float one_minus_p = static_cast<float>(-std::expm1(logp));
  const float p = static_cast<float>(std::exp(logp));
  return a * one_minus_p + dlogit(p, z, a + b, c);
}

// loss = -weight * sum_t w_t l_t + beta * sum_t (l_t - lr_t),  coef_t = -(weight * w_t - beta)

enum class Ratio : int64_t { none = 0, sequence = 1, token = 2 };

struct SequenceRule {
  Ratio ratio;
  double log_low;  // bounds of the log-ratio, applied before exp so that nothing overflows
  double log_high;
  double beta;
};

LOL_INLINE bool outside(double log_ratio, const SequenceRule& rule) {
  return log_ratio < rule.log_low || log_ratio > rule.log_high;
}

// exp(clamp(log_ratio)); NaN stays NaN.
LOL_INLINE double clipped_ratio(double log_ratio, const SequenceRule& rule) {
  const double low = log_ratio < rule.log_low ? rule.log_low : log_ratio;
  return std::exp(low > rule.log_high ? rule.log_high : low);
}

// dloss/dlogp_t with the ratio held constant.
LOL_INLINE double sequence_coefficient(double weight, double ratio, const SequenceRule& rule) {
  return rule.beta - weight * ratio;
}

// beta = 0 means that there is no such term, also where the log-ratio is infinite.
LOL_INLINE double sequence_loss(double weight, double ratio_logp_sum, double log_ratio,
                                const SequenceRule& rule) {
  const double policy = -weight * ratio_logp_sum;
  return rule.beta == 0.0 ? policy : policy + rule.beta * log_ratio;
}

}  // namespace lolkernels

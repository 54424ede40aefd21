// Fuzzes the torch-free CPU kernels on every instruction set this machine has, against double
// arithmetic. Every matrix is its own heap block of exactly the bytes it may touch, so that
// AddressSanitizer sees one element too many; UndefinedBehaviorSanitizer watches the offsets.
// Usage: harness CASES SEED. Prints the worst errors; exits with 1 at the first miss.

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "../csrc/cpu/sequences.h"

using namespace lolkernels;
using namespace lolkernels::cpu;

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

std::mt19937_64 rng;

int64_t draw(int64_t low, int64_t high) {
  return std::uniform_int_distribution<int64_t>(low, high)(rng);
}
double normal() { return std::normal_distribution<double>()(rng); }
bool chance(double p) { return std::uniform_real_distribution<double>()(rng) < p; }

// Scalar conversions, written independently of the kernels.

double decode(uint16_t h, int exponent_bits) {
  const int mantissa_bits = 15 - exponent_bits, bias = (1 << (exponent_bits - 1)) - 1;
  const int exponent = (h >> mantissa_bits) & ((1 << exponent_bits) - 1);
  const int mantissa = h & ((1 << mantissa_bits) - 1);
  const double sign = h & 0x8000 ? -1.0 : 1.0;
  if (exponent == (1 << exponent_bits) - 1) return mantissa ? NAN : sign * kInfinity;
  if (exponent == 0) return sign * std::ldexp(mantissa, 1 - bias - mantissa_bits);
  return sign * std::ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits);
}

// Nearest by search: the 16-bit patterns of one sign are ordered.
uint16_t encode(double x, int exponent_bits) {
  const int mantissa_bits = 15 - exponent_bits;
  const uint16_t infinity = ((1 << exponent_bits) - 1) << mantissa_bits;
  if (std::isnan(x)) return infinity | 1;
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const double magnitude = std::fabs(x);
  uint16_t low = 0, high = infinity;
  while (high - low > 1) {
    const uint16_t middle = (low + high) / 2;
    (decode(middle, exponent_bits) <= magnitude ? low : high) = middle;
  }
  if (magnitude == kInfinity) return sign | infinity;
  const double below = decode(low, exponent_bits);
  const double above =
      high == infinity ? 2 * below - decode(low - 1, exponent_bits) : decode(high, exponent_bits);
  const double middle = below + (above - below) / 2;
  const bool up = magnitude > middle || (magnitude == middle && (low & 1));
  return sign | (up ? high : low);
}

int exponent_bits(DType dtype) { return dtype == DType::bf16 ? 8 : 5; }

// Matrices.

struct Owned {
  Matrix m;
  Owned(DType dtype, int64_t rows, int64_t cols) {
    const int64_t item = dtype == DType::f32 ? 4 : 2;
    int64_t col_stride = 1, row_stride = cols;
    switch (draw(0, 3)) {
      case 0: break;
      case 1: row_stride = cols + draw(0, 5); break;
      case 2: col_stride = draw(2, 4), row_stride = cols * col_stride + draw(0, 3); break;
      case 3: col_stride = rows + draw(0, 2), row_stride = 1; break;
    }
    const int64_t extent =
        rows == 0 || cols == 0 ? 0 : (rows - 1) * row_stride + (cols - 1) * col_stride + 1;
    void* data = std::malloc(static_cast<size_t>(std::max<int64_t>(extent * item, 1)));
    std::memset(data, 0xff, static_cast<size_t>(extent * item));  // NaN
    m = {data, dtype, rows, cols, row_stride, col_stride};
  }
  ~Owned() { std::free(m.data); }
  Owned(const Owned&) = delete;

  int64_t at(int64_t r, int64_t c) const { return r * m.row_stride + c * m.col_stride; }
  double get(int64_t r, int64_t c) const {
    if (m.dtype == DType::f32) return static_cast<float*>(m.data)[at(r, c)];
    return decode(static_cast<uint16_t*>(m.data)[at(r, c)], exponent_bits(m.dtype));
  }
  void set(int64_t r, int64_t c, double x) {
    if (m.dtype == DType::f32) {
      static_cast<float*>(m.data)[at(r, c)] = static_cast<float>(x);
    } else {
      static_cast<uint16_t*>(m.data)[at(r, c)] = encode(x, exponent_bits(m.dtype));
    }
  }
};

template <typename T>
struct Column {
  T* data;
  int64_t stride;
  explicit Column(int64_t n) : stride(draw(1, 3)) {
    const int64_t extent = n == 0 ? 0 : (n - 1) * stride + 1;
    data = static_cast<T*>(std::malloc(std::max<size_t>(extent * sizeof(T), 1)));
    std::memset(static_cast<void*>(data), 0xff, extent * sizeof(T));
  }
  ~Column() { std::free(data); }
  Column(const Column&) = delete;
  T& operator[](int64_t i) { return data[i * stride]; }
  operator Vector<T>() const { return {data, stride}; }
};

// Checks.

double worst_stat, worst_gradient, worst_sequence;

[[noreturn]] void fail(const char* isa, const char* what, double got, double want) {
  std::printf("%s %s: got %.9g, want %.9g\n", isa, what, got, want);
  std::exit(1);
}

void expect(const char* isa, const char* what, double got, double want, double tolerance,
            double& worst) {
  if (std::isnan(want) || std::isinf(want)) {
    if (std::isnan(want) ? !std::isnan(got) : got != want) fail(isa, what, got, want);
    return;
  }
  const double error = std::fabs(got - want) / tolerance;
  if (!(error <= 1.0)) fail(isa, what, got, want);
  worst = std::max(worst, error);
}

struct Shape {
  int64_t rows, cols;
};

Shape draw_shape() {
  static const int64_t edges[] = {0,  1,  2,  3,   4,    7,    8,    9,    15,   16,   17,  31,
                                  63, 64, 65, 127, 2047, 2048, 2049, 2064, 4096, 4097, 5000};
  return {draw(0, 5), chance(0.5) ? edges[draw(0, 22)] : draw(1, 300)};
}

double capped(double x, double scale, double cap, double temperature) {
  const double v = x * scale;
  return (cap > 0 ? cap * std::tanh(v / cap) : v) / temperature;
}

// Exponentials relative to the anchor that came back, which is the given one where that is in
// reach.
void check_exps(const RowKernels& kernels, const Owned& logits, const Vector<int64_t>& labels,
                const LogitMap& map, double scale, double cap, double temperature) {
  const int64_t n = logits.m.rows, v = logits.m.cols;
  const DType dtypes[] = {DType::f32, DType::bf16, DType::f16};
  Owned x(logits.m.dtype, n, v), other(dtypes[draw(0, 2)], n, v);
  const bool in_place = chance(0.5);
  const Owned& out = in_place ? x : other;
  const bool narrow = out.m.dtype == DType::f16;
  Column<float> given(n);
  std::vector<double> z(n * v), top(n, -kInfinity), top_off(n, -kInfinity);
  std::vector<bool> spoilt(n);
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t k = 0; k < v; ++k) {
      x.set(r, k, logits.get(r, k));
      const double here = z[r * v + k] = capped(logits.get(r, k), scale, cap, temperature);
      spoilt[r] = spoilt[r] || std::isnan(here) || here == kInfinity;
      top[r] = std::max(top[r], here);
      if (k != labels[r]) top_off[r] = std::max(top_off[r], here);
    }
    const double base = std::isfinite(top[r]) ? top[r] : 0.0;
    given[r] =
        static_cast<float>(base + (chance(0.5) ? 10.0 * normal() : -40.0 - 80.0 * chance(0.5)));
    if (chance(0.1)) given[r] = chance(0.5) ? NAN : INFINITY;
  }
  const bool has_anchor = chance(0.7);
  std::vector<float> used(n), rest(n), deviation(n), max(n), target(n), slope(n);
  kernels.exps(
      {x.m, out.m, labels, has_anchor ? Vector<float>(given) : Vector<float>{nullptr, 0}, map,
       used.data(), rest.data(), deviation.data(), max.data(), target.data(), slope.data()},
      0, n);
  for (int64_t r = 0; r < n; ++r) {
    if (spoilt[r]) {
      if (std::isfinite(rest[r]) && std::isfinite(target[r])) {
        fail(kernels.isa, "rest of a spoilt row", rest[r], NAN);
      }
      continue;
    }
    const bool has_target = labels[r] >= 0 && labels[r] < v;
    const double z_y = has_target ? z[r * v + labels[r]] : -kInfinity;
    const double wanted = has_anchor ? given[r] : z_y + kShift;
    const double size = 4e-7 * (4.0 + (std::isfinite(top[r]) ? std::fabs(top[r]) : 0.0));
    const bool near_reach = std::fabs(top_off[r] - wanted - kReach) < 100 * size;
    if (!near_reach) {
      const bool kept = !narrow && std::isfinite(wanted) && top_off[r] - wanted <= kReach;
      const double at_top = std::isfinite(top_off[r]) ? top_off[r] : std::isfinite(z_y) ? z_y : 0.0;
      const double anchor = kept ? wanted : at_top;
      expect(kernels.isa, "anchor", used[r], anchor, size + 1e-6 * (kShift + std::fabs(anchor)),
             worst_stat);
    }
    double want_rest = 0.0, want_deviation = 0.0, spread = 1e-30;
    for (int64_t k = 0; k < v; ++k) {
      const double d = z[r * v + k] - static_cast<double>(used[r]);
      const bool counts = k != labels[r] && d > -700.0;
      const double e = counts ? std::exp(d) : 0.0;
      want_rest += e;
      want_deviation += counts && e > 0 ? e * d : 0.0;
      spread += counts ? e * (1.0 + std::fabs(d)) : 0.0;
      double want = e * scale / temperature;
      if (cap > 0) want *= 1.0 / std::pow(std::cosh(logits.get(r, k) * scale / cap), 2);
      double tolerance =
          e * scale / temperature * (size + 2e-6 * (1.0 + std::fabs(counts ? d : 0.0))) + 1e-36;
      if (out.m.dtype != DType::f32) {  // twice where the row was scaled down
        tolerance += 2 * std::fabs(want) * (narrow ? 0x1p-10 : 0x1p-7) + (narrow ? 0x1p-24 : 0.0);
      }
      if (d < -1e30 && out.get(r, k) != 0.0) fail(kernels.isa, "exps", out.get(r, k), 0.0);
      expect(kernels.isa, "exps", out.get(r, k), want, tolerance, worst_gradient);
    }
    expect(kernels.isa, "rest", rest[r], want_rest, want_rest * (size + 1e-5) + 1e-34, worst_stat);
    expect(kernels.isa, "deviation", deviation[r], want_deviation, spread * (size + 1e-5) + 1e-32,
           worst_stat);
    expect(kernels.isa, "max_logit", max[r], top[r], size, worst_stat);
    expect(kernels.isa, "target_logit", target[r], z_y, 4e-7 * (4.0 + std::fabs(z_y)), worst_stat);
    double want_slope = has_target ? scale / temperature : 0.0;
    if (has_target && cap > 0) {
      want_slope *= 1.0 / std::pow(std::cosh(logits.get(r, labels[r]) * scale / cap), 2);
    }
    expect(kernels.isa, "slope", slope[r], want_slope, 1e-5 * scale / temperature, worst_gradient);
  }
}

struct Statistics {
  std::vector<float> target, max, used, rest, lse, expected;
};

Statistics statistics(const RowKernels& kernels, const Matrix& x, const Vector<int64_t>& labels,
                      const Vector<float>& anchor, const LogitMap& map) {
  const int64_t n = x.rows;
  Statistics s = {std::vector<float>(n), std::vector<float>(n), std::vector<float>(n),
                  std::vector<float>(n), std::vector<float>(n), std::vector<float>(n)};
  std::vector<float> deviation(n), slope(n);
  kernels.exps({x,
                {},
                labels,
                anchor,
                map,
                s.used.data(),
                s.rest.data(),
                deviation.data(),
                s.max.data(),
                s.target.data(),
                slope.data()},
               0, n);
  for (int64_t r = 0; r < n; ++r) {
    const float used = s.used[r], target = s.target[r];
    const double base = std::max<double>(used, target);
    const double others = std::exp(used - base), own = std::exp(target - base);
    const double sum = s.rest[r] * others + own;
    const double mean = others == 0 ? 0.0 : others * (deviation[r] + s.rest[r] * (used - base));
    s.lse[r] = static_cast<float>(base + std::log(sum));
    if (s.lse[r] == kInfinity) s.lse[r] = NAN;
    s.expected[r] =
        static_cast<float>(base + (mean + (own == 0 ? 0.0 : own * (target - base))) / sum);
  }
  return s;
}

void check_rows(const RowKernels& kernels) {
  const auto [n, v] = draw_shape();
  const DType dtypes[] = {DType::f32, DType::bf16, DType::f16};
  Owned x(dtypes[draw(0, 2)], n, v);
  const double scale = chance(0.5) ? 1.0 : 0.25 + draw(0, 8) * 0.25;
  const double cap = chance(0.7) ? 0.0 : 5.0 * static_cast<double>(draw(1, 10));
  const double temperature = chance(0.5) ? 1.0 : 0.5 + draw(0, 6) * 0.25;
  const LogitMap map = make_logit_map(scale, cap, temperature);
  Column<int64_t> labels(n);
  Column<float> a(n), b(n), c(n), lse(n);
  for (int64_t r = 0; r < n; ++r) {
    const double spread = chance(0.2) ? 12.0 : 4.0, offset = chance(0.2) ? 100.0 * normal() : 0.0;
    const double masked = chance(0.2) ? 0.9 : 0.0;
    const bool all_masked = chance(0.03), poisoned = chance(0.03);
    const int64_t first = draw(0, v / 2 + 1);
    for (int64_t k = 0; k < v; ++k) {
      const bool off = all_masked || (masked > 0 && (chance(masked) || k < first));
      x.set(r, k, off ? -kInfinity : spread * normal() + offset);
    }
    if (chance(0.2) && v > 0) x.set(r, v - 1, offset + 90.0);
    if (poisoned && v > 0) x.set(r, draw(0, v - 1), chance(0.5) ? NAN : kInfinity);
    const int64_t outside[] = {-1, -100, v, v + 3, INT64_MIN, INT64_MAX, int64_t{1} << 31};
    labels[r] = chance(0.2) || v == 0 ? outside[draw(0, 6)] : draw(0, v - 1);
    a[r] = static_cast<float>(normal());
    b[r] = chance(0.5) ? -a[r] : static_cast<float>(normal());
    c[r] = chance(0.5) ? 0.0f : static_cast<float>(normal());
  }

  // What the sums make, anchored at the maximum as where logits are made, and at the label's logit.
  Column<float> at_top(n);
  for (int64_t r = 0; r < n; ++r) at_top[r] = -INFINITY;
  const Statistics tops = statistics(kernels, x.m, labels, at_top, map);
  const Statistics sums = statistics(kernels, x.m, labels, {nullptr, 0}, map);
  check_exps(kernels, x, labels, map, scale, cap, temperature);
  std::vector<double> want_g(n * v), tolerance_g(n);
  for (int64_t r = 0; r < n; ++r) {
    double top = -kInfinity, sum = 0.0, mean = 0.0;
    bool nan = false;
    std::vector<double> z(v);
    for (int64_t k = 0; k < v; ++k) {
      z[k] = capped(x.get(r, k), scale, cap, temperature);
      nan |= std::isnan(z[k]);
      top = std::max(top, std::isnan(z[k]) ? -kInfinity : z[k]);
    }
    nan |= top == kInfinity;
    for (int64_t k = 0; k < v; ++k) {
      const double e = z[k] == -kInfinity ? 0.0 : std::exp(z[k] - top);
      sum += e;
      mean += e > 0 ? e * z[k] : 0.0;
    }
    const double want_lse = nan ? NAN : sum == 0.0 ? -kInfinity : top + std::log(sum);
    const bool has_target = labels[r] >= 0 && labels[r] < v;
    const double want_target = has_target ? z[labels[r]] : -kInfinity;
    const double want_mean = nan || sum == 0 ? NAN : mean / sum;
    // A few units in the last place of the largest number involved, and far below 2e-5. Relative to
    // an anchor elsewhere that is the distance to it, which a mean is multiplied by besides.
    const double units = 4e-7 * (4.0 + (std::isfinite(top) ? std::fabs(top) : 0.0));
    const double used = sums.used[r];
    const double far = std::isfinite(top) && std::isfinite(used) ? std::fabs(top - used) : 0.0;
    for (const Statistics* s : {&tops, &sums}) {
      const double distance = s == &tops ? 0.0 : far;
      expect(kernels.isa, "target_logit", s->target[r], want_target,
             4e-7 * (4.0 + std::fabs(want_target)), worst_stat);
      expect(kernels.isa, "lse", s->lse[r], want_lse, units + 1.2e-7 * distance, worst_stat);
      expect(kernels.isa, "expected_logit", s->expected[r], want_mean,
             4 * units + 2.4e-6 * distance, worst_stat);
      if (!nan) expect(kernels.isa, "max_logit", s->max[r], top, units, worst_stat);
      if (!nan && !(s->rest[r] >= 0.0f)) fail(kernels.isa, "rest below 0", s->rest[r], 0.0);
    }
    if (!nan && tops.lse[r] < tops.max[r]) {
      fail(kernels.isa, "lse below max", tops.lse[r], tops.max[r]);
    }

    lse[r] = static_cast<float>(want_lse);
    for (int64_t k = 0; k < v; ++k) {
      const double p = std::exp(z[k] - static_cast<double>(lse[r]));
      double g = p == 0 ? 0.0 : p * (b[r] + c[r] * z[k]);
      if (has_target && k == labels[r]) {
        g = a[r] * -std::expm1(z[k] - static_cast<double>(lse[r])) +
            (p == 0 ? 0.0 : p * (double{a[r]} + b[r] + c[r] * z[k]));
      }
      double slope = scale / temperature;
      if (cap > 0) slope *= 1.0 / std::pow(std::cosh(x.get(r, k) * scale / cap), 2);
      want_g[r * v + k] = g * slope;
      if (std::isfinite(g)) {
        // exp(z - lse) inherits the rounding of z: 6e-8 of its size.
        const double size = std::fabs(a[r]) + std::fabs(b[r]) + std::fabs(c[r] * z[k]);
        const double error = size * scale / temperature * 4e-7 * (4.0 + std::fabs(z[k]));
        tolerance_g[r] = std::max(tolerance_g[r], std::isfinite(error) && p > 1e-6 ? error : 0.0);
      }
    }
  }

  const bool in_place = chance(0.5);
  Owned other(dtypes[draw(0, 2)], n, v);
  const Owned& out = in_place ? x : other;
  kernels.dlogits({x.m, out.m, labels, lse, a, b, c, map}, 0, n);
  for (int64_t r = 0; r < n; ++r) {
    for (int64_t k = 0; k < v; ++k) {
      const double want = want_g[r * v + k];
      double tolerance = tolerance_g[r] + 1e-37;
      double rounded = want;
      if (out.m.dtype != DType::f32) {
        // A rounding that falls to the other side costs one unit in the last place.
        rounded = decode(encode(want, exponent_bits(out.m.dtype)), exponent_bits(out.m.dtype));
        tolerance += std::fabs(want) * (out.m.dtype == DType::bf16 ? 0x1p-7 : 0x1p-10) + 0x1p-24;
      }
      expect(kernels.isa, "dlogits", out.get(r, k), rounded, tolerance, worst_gradient);
    }
  }
}

// p within 1e-7 ... 1e-1 of 1: the gradient 1 - p keeps its digits.
void check_confident_label(const RowKernels& kernels) {
  const float lse = static_cast<float>(std::pow(10.0, -static_cast<double>(draw(1, 7))));
  const int64_t label = 0;
  const float a = 1.0f, b = -1.0f, c = 0.0f;
  float x = 0.0f;
  const Matrix m{&x, DType::f32, 1, 1, 1, 1};
  kernels.dlogits(
      {m, m, {&label, 1}, {&lse, 1}, {&a, 1}, {&b, 1}, {&c, 1}, make_logit_map(1.0, 0.0, 1.0)}, 0,
      1);
  const double want = -std::expm1(-static_cast<double>(lse));
  expect(kernels.isa, "confident label", x, want, 1e-6 * want, worst_gradient);
}

void check_sequences() {
  const int64_t s = draw(0, 6);
  Column<int64_t> cu(s + 1);
  cu[0] = 0;
  for (int64_t i = 0; i < s; ++i) cu[i + 1] = cu[i] + (chance(0.2) ? 0 : draw(1, 300));
  const int64_t n = cu[s];
  Column<float> logps(n), ref(n), weight(s);
  for (int64_t t = 0; t < n; ++t) {
    logps[t] = static_cast<float>(-std::fabs(3 * normal()));
    ref[t] = logps[t] + static_cast<float>(0.1 * normal());
  }
  for (int64_t i = 0; i < s; ++i) weight[i] = static_cast<float>(normal());
  SequenceRule rule{static_cast<Ratio>(draw(0, 2)), -0.5, 0.5, chance(0.5) ? 0.0 : 0.1};
  if (chance(0.3)) rule.log_low = -kInfinity;
  const bool has_ref = chance(0.7);
  std::vector<float> loss(s), coef(n), log_ratio(s), clipped(s);
  sequence_coefficients({logps, has_ref, ref, cu, weight, rule, loss.data(), coef.data(),
                         log_ratio.data(), clipped.data()},
                        0, s);
  for (int64_t i = 0; i < s; ++i) {
    const auto d = [&](int64_t t) { return double{logps[t]} - (has_ref ? ref[t] : 0.0f); };
    double total = 0.0, count = 0.0, want_loss = 0.0;
    for (int64_t t = cu[i]; t < cu[i + 1]; ++t) total += d(t);
    for (int64_t t = cu[i]; t < cu[i + 1]; ++t) {
      const double l = rule.ratio == Ratio::token ? d(t) : total;
      const double w = rule.ratio == Ratio::none
                           ? 1.0
                           : std::exp(std::min(std::max(l, rule.log_low), rule.log_high));
      count += rule.ratio != Ratio::none && (l < rule.log_low || l > rule.log_high);
      want_loss += -weight[i] * w * logps[t] + rule.beta * d(t);
      expect("sequences", "coef", coef[t], rule.beta - weight[i] * w, 1e-5, worst_sequence);
    }
    const double length = static_cast<double>(cu[i + 1] - cu[i]);
    expect("sequences", "loss", loss[i], want_loss, 1e-6 * (1 + 3e3), worst_sequence);
    expect("sequences", "log_ratio", log_ratio[i], total, 1e-6 * (1 + 3e3), worst_sequence);
    expect("sequences", "clipped", clipped[i], length > 0 ? count / length : 0.0, 1e-6,
           worst_sequence);
  }
}

std::vector<const RowKernels*> usable_kernels() {
  std::vector<const RowKernels*> usable{&baseline_kernels};
#if defined(__x86_64__)
  if (row_kernels().isa != baseline_kernels.isa) usable.push_back(&avx2_kernels);
  if (row_kernels().isa == avx512_kernels.isa) usable.push_back(&avx512_kernels);
#endif
  return usable;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  const int64_t cases = std::atoll(argv[1]);
  rng.seed(static_cast<uint64_t>(std::atoll(argv[2])));
  const auto kernels = usable_kernels();
  for (int64_t i = 0; i < cases; ++i) {
    const RowKernels& tested = *kernels[static_cast<size_t>(i) % kernels.size()];
    check_rows(tested);
    check_confident_label(tested);
    check_sequences();
  }
  for (const auto* k : kernels) std::printf("%s ", k->isa);
  std::printf("cases=%lld worst/tolerance: stats %.3f gradient %.3f sequences %.3f\n",
              static_cast<long long>(cases), worst_stat, worst_gradient, worst_sequence);
  return 0;
}

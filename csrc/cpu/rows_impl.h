// row_stats and dlogits for one instruction set; the including file sets LOL_LANES, LOL_ISA and
// LOL_KERNELS. A row is cut into blocks that stay in the first-level cache, so memory is read once.
// Inside a block sums run in float lanes (at most kBlock / (4 * kLanes) additions each); across
// blocks they are in double. Nothing depends on how rows are spread over threads.
#pragma once

#include <cmath>

#include "rows.h"
#include "vec.h"

namespace lolkernels::cpu {
namespace {

constexpr int64_t kBlock = 2048;
constexpr int kUnroll = 4;
constexpr int64_t kStep = kUnroll * kLanes;

// No std:: templates in this file: an out-of-line copy of one would carry this instruction set into
// code that every machine runs.
inline int64_t smaller(int64_t x, int64_t y) { return x < y ? x : y; }

inline void copy(const float* from, int64_t count, float* to) {
  std::memcpy(to, from, static_cast<size_t>(count) * sizeof(float));
}

// ---- storage: rows of any dtype and stride <-> blocks of contiguous floats
// -------------------------

struct Float32 {
  using Word = float;
  using Words = F32;
  static constexpr bool kIsFloat = true;
  static F32 widen(F32 x) { return x; }
  static F32 narrow(F32 x) { return x; }
};
struct Bf16 : BFloat16 {
  using Word = uint16_t;
  using Words = U16;
  static constexpr bool kIsFloat = false;
};
struct Fp16 : Float16 {
  using Word = uint16_t;
  using Words = U16;
  static constexpr bool kIsFloat = false;
};

template <typename D>
void read_block(const typename D::Word* from, int64_t stride, int64_t count, float* to) {
  using Words = typename D::Words;
  typename D::Word lane[kLanes] = {};
  int64_t i = 0;
  if (stride == 1) {
    for (; i + kLanes <= count; i += kLanes) store(to + i, D::widen(load<Words>(from + i)));
  }
  for (; i < count; i += kLanes) {
    const int64_t some = smaller(kLanes, count - i);
    for (int64_t j = 0; j < some; ++j) lane[j] = from[(i + j) * stride];
    store(to + i, D::widen(load<Words>(lane)));
  }
}

template <typename D>
void write_block(const float* from, int64_t count, typename D::Word* to, int64_t stride) {
  typename D::Word lane[kLanes];
  int64_t i = 0;
  if (stride == 1) {
    for (; i + kLanes <= count; i += kLanes) store(to + i, D::narrow(load<F32>(from + i)));
  }
  for (; i < count; i += kLanes) {
    const int64_t some = smaller(kLanes, count - i);
    store(lane, D::narrow(load<F32>(from + i)));
    for (int64_t j = 0; j < some; ++j) to[(i + j) * stride] = lane[j];
  }
}

// Blocks are padded to whole vectors.
struct alignas(64) Block {
  float at[kBlock];
};
static_assert(kBlock % kStep == 0);

template <typename D>
const float* read_logits(const Matrix& m, int64_t row, int64_t col, int64_t count, Block& buffer) {
  using Word = typename D::Word;
  const Word* from = static_cast<const Word*>(m.data) + row * m.row_stride + col * m.col_stride;
  if constexpr (D::kIsFloat) {
    if (m.col_stride == 1) return from;
  }
  read_block<D>(from, m.col_stride, count, buffer.at);
  return buffer.at;
}

const float* read_logits(const Matrix& m, int64_t row, int64_t col, int64_t count, Block& buffer) {
  switch (m.dtype) {
    case DType::f32: return read_logits<Float32>(m, row, col, count, buffer);
    case DType::bf16: return read_logits<Bf16>(m, row, col, count, buffer);
    default: return read_logits<Fp16>(m, row, col, count, buffer);
  }
}

template <typename D>
void write_gradient(const Matrix& m, int64_t row, int64_t col, int64_t count, const float* from) {
  using Word = typename D::Word;
  Word* to = static_cast<Word*>(m.data) + row * m.row_stride + col * m.col_stride;
  write_block<D>(from, count, to, m.col_stride);
}

void write_gradient(const Matrix& m, int64_t row, int64_t col, int64_t count, const float* from) {
  switch (m.dtype) {
    case DType::f32: return write_gradient<Float32>(m, row, col, count, from);
    case DType::bf16: return write_gradient<Bf16>(m, row, col, count, from);
    default: return write_gradient<Fp16>(m, row, col, count, from);
  }
}

// Calls f(vector, index) for the whole vectors of x and once for what is left, padded with `fill`.
template <typename Fn>
inline void for_each_vector(const float* x, int64_t count, float fill, const Fn& f) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) f(load<F32>(x + i), i);
  if (i < count) {
    F32 last = splat(fill);
    std::memcpy(&last, x + i, static_cast<size_t>(count - i) * sizeof(float));
    f(last, i);
  }
}

// ---- logits
// ---------------------------------------------------------------------------------------

// z of a block; `slope`, where wanted, gets dz/dx. Returns x itself where z == x.
const float* map_logits(const float* x, int64_t count, const LogitMap& map, Block& z,
                        Block* slope) {
  if (map.identity) return x;
  if (!map.capped) {
    for_each_vector(x, count, 0.0f, [&](F32 v, int64_t i) { store(z.at + i, v * map.gain); });
    return z.at;
  }
  for_each_vector(x, count, 0.0f, [&](F32 v, int64_t i) {
    const Tanh t = tanh_and_slope(v * map.inner);
    store(z.at + i, t.value * map.outer);
    if (slope != nullptr) store(slope->at + i, t.slope * map.gain);
  });
  return z.at;
}

// ---- row_stats
// ------------------------------------------------------------------------------------

float block_max(const float* z, int64_t count) {
  F32 m[kUnroll];
  for (auto& lane : m) lane = splat(-kInf);
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    for (int u = 0; u < kUnroll; ++u) m[u] = larger(load<F32>(z + i + u * kLanes), m[u]);
  }
  for_each_vector(z + i, count - i, -kInf, [&](F32 v, int64_t) { m[0] = larger(v, m[0]); });
  return largest(larger(larger(m[0], m[1]), larger(m[2], m[3])));
}

struct Sums {
  double p;   // sum exp(z - ref)
  double pz;  // sum exp(z - ref) * (z - ref)
};

// Needs z <= ref, or NaN. The lower clamp keeps exp(-inf) * -inf at 0.
Sums block_sums(const float* z, int64_t count, float ref) {
  F32 p[kUnroll] = {}, pz[kUnroll] = {};
  const auto add = [&](F32 v, int u) {
    const F32 t = at_least(v - ref, kExpMin);
    const F32 e = t == kExpMin ? F32{} : exp_in_range(t);
    p[u] += e;
    pz[u] += e * t;
  };
  int64_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    for (int u = 0; u < kUnroll; ++u) add(load<F32>(z + i + u * kLanes), u);
  }
  for_each_vector(z + i, count - i, -kInf, [&](F32 v, int64_t) { add(v, 0); });
  return {static_cast<double>(total((p[0] + p[1]) + (p[2] + p[3]))),
          static_cast<double>(total((pz[0] + pz[1]) + (pz[2] + pz[3])))};
}

// Online softmax over blocks. Sums are relative to max, or to 0 while every logit is -inf, so that
// such a block adds nothing instead of exp(-inf - -inf).
struct Online {
  float max = -kInf;
  Sums sum = {0.0, 0.0};

  void add(const float* z, int64_t count) {
    const float before = max;
    const float top = block_max(z, count);
    if (top > max) max = top;
    if (max != before && before != -kInf) {
      const double shift = static_cast<double>(before) - static_cast<double>(max);
      const double f = std::exp(shift);
      sum = {f * sum.p, f * (sum.pz + sum.p * shift)};
    }
    const Sums s = block_sums(z, count, max == -kInf ? 0.0f : max);
    sum.p += s.p;
    sum.pz += s.pz;
  }
};

void row_stats(const RowStatsArgs& args, int64_t begin, int64_t end) {
  Block raw, mapped;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t label = args.labels[row];
    float target = -kInf;
    Online online;
    for (int64_t col = 0; col < args.logits.cols; col += kBlock) {
      const int64_t count = smaller(kBlock, args.logits.cols - col);
      const float* x = read_logits(args.logits, row, col, count, raw);
      const float* z = map_logits(x, count, args.map, mapped, nullptr);
      if (label >= col && label < col + count) target = z[label - col];
      online.add(z, count);
    }
    const double lse = static_cast<double>(online.max) + std::log(online.sum.p);
    const double expected = static_cast<double>(online.max) + online.sum.pz / online.sum.p;
    const bool nan = online.sum.p != online.sum.p;
    args.target_logit[row] = target;
    args.lse[row] = nan ? static_cast<float>(online.sum.p) : static_cast<float>(lse);
    args.expected_logit[row] = static_cast<float>(expected);
    args.max_logit[row] = nan && online.max != kInf ? static_cast<float>(online.sum.p) : online.max;
  }
}

// ---- dlogits
// --------------------------------------------------------------------------------------

// g = p * (b + c * z) * slope, p = exp(z - lse); no slope counts as 1. g may be z.
template <bool kHasC, bool kHasSlope>
void block_gradient(const float* z, int64_t count, float lse, float b, float c, const float* slope,
                    float* g) {
  for_each_vector(z, count, -kInf, [&](F32 v, int64_t i) {
    const F32 p = exp_flushed(at_most(v - lse, kExpMax));
    F32 d = kHasC ? dlogit(p, v, b, c) : p * b;
    if constexpr (kHasSlope) d *= load<F32>(slope + i);
    const int64_t left = count - i;
    std::memcpy(g + i, &d, left < kLanes ? static_cast<size_t>(left) * sizeof(float) : sizeof(d));
  });
}

void dlogits(const DlogitsArgs& args, int64_t begin, int64_t end) {
  Block raw, mapped, slopes, grads;
  const bool direct = args.out.dtype == DType::f32 && args.out.col_stride == 1;
  const bool capped = args.map.capped;
  const float gain = args.map.gain;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t label = args.labels[row];
    const float lse = args.lse[row], a = args.a[row], b = args.b[row], c = args.c[row];
    for (int64_t col = 0; col < args.logits.cols; col += kBlock) {
      const int64_t count = smaller(kBlock, args.logits.cols - col);
      const float* x = read_logits(args.logits, row, col, count, raw);
      const float* z = map_logits(x, count, args.map, mapped, capped ? &slopes : nullptr);
      const bool here = label >= col && label < col + count;
      float at_label = 0.0f;
      if (here) {
        const int64_t i = label - col;
        at_label = dlogit_at_label(z[i], lse, a, b, c) * (capped ? slopes.at[i] : gain);
      }
      float* g =
          direct ? static_cast<float*>(args.out.data) + row * args.out.row_stride + col : grads.at;
      if (capped) {
        block_gradient<true, true>(z, count, lse, b, c, slopes.at, g);
      } else if (c != 0.0f) {
        block_gradient<true, false>(z, count, lse, b * gain, c * gain, nullptr, g);
      } else {
        block_gradient<false, false>(z, count, lse, b * gain, 0.0f, nullptr, g);
      }
      if (here) g[label - col] = at_label;
      if (!direct) write_gradient(args.out, row, col, count, g);
    }
  }
}

}  // namespace

const RowKernels LOL_KERNELS = {LOL_ISA, row_stats, dlogits};

}  // namespace lolkernels::cpu

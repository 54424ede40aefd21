// exps and dlogits for one instruction set; the including file sets LOL_LANES, LOL_ISA
// and LOL_KERNELS. Nothing depends on how rows are spread over threads.
//
// No std:: templates here: an out-of-line copy of one would carry this instruction set into code
// that every machine runs.
#pragma once

#include <cmath>

#include "rows.h"
#include "vec.h"

namespace lolkernels::cpu {
namespace {

// How a dtype is stored; kLowest is its -inf; kNarrow: its range does not hold e^kReach.
struct Float32 {
  using Word = float;
  static constexpr bool kWritten = true;
  static constexpr float kLowest = -kInf;
  static constexpr bool kNarrow = false;
  static F32 read(const float* p) { return load<F32>(p); }
  static void write(float* p, F32 v) { store(p, v); }
};
struct Bf16 {
  using Word = uint16_t;
  static constexpr bool kWritten = true;
  static constexpr uint16_t kLowest = 0xff80;
  static constexpr bool kNarrow = false;
  static F32 read(const uint16_t* p) { return widen_bf16(load<U16>(p)); }
  static void write(uint16_t* p, F32 v) { store(p, narrow_bf16(v)); }
};
struct Fp16 {
  using Word = uint16_t;
  static constexpr bool kWritten = true;
  static constexpr uint16_t kLowest = 0xfc00;
  static constexpr bool kNarrow = true;
  static F32 read(const uint16_t* p) { return widen_fp16(load<U16>(p)); }
  static void write(uint16_t* p, F32 v) { store(p, narrow_fp16(v)); }
};
struct Nowhere : Float32 {
  static constexpr bool kWritten = false;
};

// A row of a matrix. Loops over a row take its whole vectors first and then the partial one at its
// end, which is also how every vector of a strided row is read: element by element.
template <typename D>
struct Row {
  typename D::Word* data;
  int64_t cols, stride;

  Row(const Matrix& m, int64_t row)
      : data(static_cast<typename D::Word*>(m.data) + row * m.row_stride),
        cols(m.cols),
        stride(m.col_stride) {}

  Row(typename D::Word* data, int64_t cols, int64_t stride)
      : data(data), cols(cols), stride(stride) {}

  bool holds(int64_t label) const { return label >= 0 && label < cols; }
};

// Columns from `col` on, padded with -inf. gather and scatter are out of line and take their
// arguments by value, so that the loops over whole vectors keep everything in registers.
template <typename D>
[[gnu::noinline]] F32 gather(const Row<D> row, int64_t col) {
  typename D::Word lane[kLanes];
  for (int64_t j = 0; j < kLanes; ++j) {
    lane[j] = col + j < row.cols ? row.data[(col + j) * row.stride] : D::kLowest;
  }
  return D::read(lane);
}

template <typename D>
[[gnu::noinline]] void scatter(const Row<D> row, int64_t col, F32 v) {
  typename D::Word lane[kLanes];
  D::write(lane, v);
  for (int64_t j = 0; j < kLanes && col + j < row.cols; ++j) {
    row.data[(col + j) * row.stride] = lane[j];
  }
}

struct Logit {
  F32 z;
  F32 slope;  // dz/dx
};

template <bool kCapped>
inline Logit logit(F32 x, const LogitMap& map) {
  if constexpr (!kCapped) return {x * map.gain, splat(map.gain)};
  const Tanh t = tanh_and_slope(x * map.inner);
  return {t.value * map.outer, t.slope * map.gain};
}

// exps cuts a row into blocks that stay in the first-level cache, so memory is read once.
// Inside a block sums run in float lanes, kBlock / (kUnroll * kLanes) additions each; across blocks
// they are in double.
constexpr int64_t kBlock = 2048;
constexpr int kUnroll = 4;
constexpr int64_t kStep = kUnroll * kLanes;
static_assert(kBlock % kStep == 0);

struct Sums {
  double p;   // sum exp(z - anchor)
  double pz;  // sum exp(z - anchor) * (z - anchor)
};

// kBlock columns of logits.
template <typename D, bool kCapped, bool kSlopes>
struct Block {
  alignas(64) float z[kBlock];  // padded with -inf to a multiple of kStep
  alignas(64) float slope[kSlopes ? kBlock : kLanes];
  int64_t count;  // padding included
  float max;      // NaN does not count

  // Columns [col, col + kBlock).
  void read(const Row<D>& row, int64_t col, const LogitMap& map) {
    const int64_t left = row.cols - col;
    const int64_t cols = left < kBlock ? left : kBlock;
    F32 top = splat(-kInf);
    int64_t i = 0;
    const auto keep = [&](const Logit& x) {
      store(z + i, x.z);
      if constexpr (kSlopes) store(slope + i, x.slope);
      top = at_least(top, x.z);
    };
    if (row.stride == 1) {
      for (; i + kLanes <= cols; i += kLanes) {
        keep(logit<kCapped>(D::read(row.data + col + i), map));
      }
    }
    for (; i < cols; i += kLanes) {
      Logit x = logit<kCapped>(gather(row, col + i), map);
      for (int64_t j = cols - i; j < kLanes; ++j) x.z[j] = -kInf;
      keep(x);
    }
    for (; i % kStep != 0; i += kLanes) {
      store(z + i, splat(-kInf));
      if constexpr (kSlopes) store(slope + i, F32{});
    }
    count = i;
    max = largest(top);
  }

  // Column i takes no part.
  void leave_out(int64_t i) {
    z[i] = -kInf;
    F32 top = splat(-kInf);
    for (i = 0; i < count; i += kLanes) top = at_least(top, load<F32>(z + i));
    max = largest(top);
  }
};

// The maximum of the columns from `col` on but for the label.
template <typename D, bool kCapped>
[[gnu::noinline]] float highest(const Row<D> row, int64_t col, int64_t label, const LogitMap& map) {
  Block<D, kCapped, false> block;
  float max = -kInf;
  for (; col < row.cols; col += kBlock) {
    block.read(row, col, map);
    if (label >= col && label < col + block.count) block.leave_out(label - col);
    max = block.max > max ? block.max : max;
  }
  return max;
}

// Multiplies columns before `end`, a multiple of kBlock, by half * half, which may be too small for
// a float though the product is not.
template <typename D>
[[gnu::noinline]] void rescale(const Row<D> row, int64_t end, float half) {
  for (int64_t col = 0; col < end; col += kLanes) {
    scatter(row, col, gather(row, col) * half * half);
  }
}

template <typename In, typename Out, bool kCapped>
void exps(const ExpsArgs& args, int64_t begin, int64_t end) {
  const LogitMap map = args.map;
  const F32 gain = splat(map.gain);
  Block<In, kCapped, kCapped> block;
  for (int64_t r = begin; r < end; ++r) {
    const Row<In> row(args.logits, r);
    const Row<Out> out(args.out, r);
    const int64_t label = args.labels[r];
    float target = -kInf, slope = 0.0f;
    if (row.holds(label)) {
      const Logit y = logit<kCapped>(gather(row, label), map);
      target = y.z[0];
      slope = y.slope[0];
    }
    float anchor = args.anchor.data == nullptr ? target + kShift : args.anchor[r];
    const bool at_top = Out::kNarrow || !(anchor - anchor == 0.0f);  // or the anchor is not finite
    if (at_top) {
      anchor = highest<In, kCapped>(row, 0, label, map);
      // No other column counts: the label's own logit, if that is finite.
      if (anchor == -kInf) anchor = target - target == 0.0f ? target : 0.0f;
    }
    float top = -kInf;
    Sums sum = {0.0, 0.0};  // relative to the anchor
    for (int64_t col = 0; col < row.cols; col += kBlock) {
      block.read(row, col, map);
      if (label >= col && label < col + block.count) block.leave_out(label - col);
      top = block.max > top ? block.max : top;
      if (!at_top && top - anchor > kReach) {
        // Before anything of this block is written, which may take the place of its logits.
        const float rest = highest<In, kCapped>(row, col + kBlock, label, map);
        top = rest > top ? rest : top;
        const double shift = static_cast<double>(anchor) - static_cast<double>(top);
        const double f = std::exp(shift);
        if constexpr (Out::kWritten) rescale(out, col, static_cast<float>(std::exp(0.5 * shift)));
        sum = {f * sum.p, f * (sum.pz + sum.p * shift)};
        anchor = top;
      }
      F32 p[kUnroll] = {}, pz[kUnroll] = {};
      const auto exponential = [&](int64_t at, int u) {
        // Where nothing is written the logits come from memory: panels that are written are in
        // cache.
        if (!Out::kWritten && row.stride == 1) __builtin_prefetch(row.data + col + kBlock + at);
        const F32 t = load<F32>(block.z + at) - anchor;
        const F32 near = at_least(t, splat(kExpMin));
        const F32 e = t < kExpMin ? F32{} : exp_in_range(near);
        p[u] += e;
        pz[u] += e * near;
        if constexpr (kCapped) return e * load<F32>(block.slope + at);
        return e * gain;
      };
      const int64_t left = row.cols - col < kBlock ? row.cols - col : kBlock;
      int64_t i = 0;
      if (Out::kWritten && out.stride == 1) {
        for (; i + kStep <= left; i += kStep) {
          for (int u = 0; u < kUnroll; ++u) {
            const int64_t at = i + u * kLanes;
            Out::write(out.data + col + at, exponential(at, u));
          }
        }
      }
      const int64_t done = i;
      for (; i < block.count; i += kStep) {
        for (int u = 0; u < kUnroll; ++u) {
          const int64_t at = i + u * kLanes;
          const F32 e = exponential(at, u);
          if constexpr (Out::kWritten) store(block.z + at, e);
        }
      }
      for (i = done; i < left && Out::kWritten; i += kLanes) {
        scatter(out, col + i, load<F32>(block.z + i));
      }
      sum.p += static_cast<double>(total((p[0] + p[1]) + (p[2] + p[3])));
      sum.pz += static_cast<double>(total((pz[0] + pz[1]) + (pz[2] + pz[3])));
    }
    const bool nan = target != target || (sum.p != sum.p && top != kInf);
    args.used[r] = anchor;
    args.rest[r] = static_cast<float>(sum.p);
    args.deviation[r] = static_cast<float>(sum.pz);
    args.max_logit[r] = nan ? static_cast<float>(sum.p) + target : target > top ? target : top;
    args.target_logit[r] = target;
    args.slope[r] = slope;
  }
}

template <typename In, typename Out, bool kCapped>
void dlogits(const DlogitsArgs& args, int64_t begin, int64_t end) {
  const LogitMap map = args.map;
  for (int64_t r = begin; r < end; ++r) {
    const Row<In> row(args.logits, r);
    const Row<Out> out(args.out, r);
    const int64_t label = args.labels[r];
    const float lse = args.lse[r], a = args.a[r], b = args.b[r], c = args.c[r];
    const auto gradient = [&](F32 raw) {
      const Logit x = logit<kCapped>(raw, map);
      return dlogit(exp_any(x.z - lse), x.z, b, c) * x.slope;
    };

    float at_label = 0.0f;
    if (row.holds(label)) {  // before the sweep: out may be the logits
      const Logit y = logit<kCapped>(gather(row, label), map);
      const double z = y.z[0], logp = args.logps.data ? args.logps[r] : z - lse;
      at_label = dlogit_at_label(y.z[0], logp, a, b, c) * y.slope[0];
    }
    int64_t col = 0;
    if (row.stride == 1 && out.stride == 1) {
      for (; col + kLanes <= row.cols; col += kLanes) {
        Out::write(out.data + col, gradient(In::read(row.data + col)));
      }
    }
    for (; col < row.cols; col += kLanes) scatter(out, col, gradient(gather(row, col)));
    if (row.holds(label)) {
      const Row<Out> one(out.data + label * out.stride, 1, 1);
      scatter(one, 0, splat(at_label));
    }
  }
}

template <typename In, typename Out, bool kCapped>
void write_rows(const ExpsArgs& args, int64_t begin, int64_t end) {
  exps<In, Out, kCapped>(args, begin, end);
}

template <typename In, typename Out, bool kCapped>
void write_rows(const DlogitsArgs& args, int64_t begin, int64_t end) {
  dlogits<In, Out, kCapped>(args, begin, end);
}

template <typename In, typename Out, typename Args>
void write_of(const Args& args, int64_t begin, int64_t end) {
  return args.map.capped ? write_rows<In, Out, true>(args, begin, end)
                         : write_rows<In, Out, false>(args, begin, end);
}

template <typename In, typename Args>
void write_from(const Args& args, int64_t begin, int64_t end) {
  switch (args.out.dtype) {
    case DType::f32: return write_of<In, Float32>(args, begin, end);
    case DType::bf16: return write_of<In, Bf16>(args, begin, end);
    case DType::f16: return write_of<In, Fp16>(args, begin, end);
  }
}

template <typename Args>
void write_any(const Args& args, int64_t begin, int64_t end) {
  if constexpr (requires { args.anchor; }) {
    if (args.out.data == nullptr) {
      switch (args.logits.dtype) {
        case DType::f32: return write_of<Float32, Nowhere>(args, begin, end);
        case DType::bf16: return write_of<Bf16, Nowhere>(args, begin, end);
        case DType::f16: return write_of<Fp16, Nowhere>(args, begin, end);
      }
    }
  }
  switch (args.logits.dtype) {
    case DType::f32: return write_from<Float32>(args, begin, end);
    case DType::bf16: return write_from<Bf16>(args, begin, end);
    case DType::f16: return write_from<Fp16>(args, begin, end);
  }
}

}  // namespace

const RowKernels LOL_KERNELS = {LOL_ISA, write_any<ExpsArgs>, write_any<DlogitsArgs>};

}  // namespace lolkernels::cpu

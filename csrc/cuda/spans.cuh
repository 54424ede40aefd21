// The epilogue of a GEMM that makes logits some columns of a row at a time, a span: what exps makes
// of them, while they are in registers. The float32 logits are never written: 2 bytes a logit go
// through memory instead of 10.
//
// As in rows.cuh this is text for nvcc and for tests/cuda_host. The GEMM stands in hopper.cu; what
// makes rows of its spans in span_rows.cuh.
#pragma once

#include "exps.cuh"

namespace lolkernels::cuda {

constexpr int kQuad = 4;  // threads that share a row of a span

__host__ __device__ __forceinline__ int64_t span_count(int64_t cols, int span) {
  return (cols + span - 1) / span;
}

// How wgmma's accumulators of 64 rows fall to the 128 threads of a warpgroup: the thread holds a
// quarter of the columns of two rows, eight apart.
__host__ __device__ __forceinline__ int held_row(int thread, int half) {
  return thread / kWarp * 16 + thread % kWarp / kQuad + 8 * half;
}
__host__ __device__ __forceinline__ int held_column(int thread, int i) {
  return i / 2 * 8 + thread % kQuad * 2 + i % 2;
}

// Two neighbours, the first in the lower half.
__device__ __forceinline__ uint32_t narrow_pair(float x, float y) {
  __nv_bfloat16 pair[2];
  narrow(x, &pair[0]);
  narrow(y, &pair[1]);
  uint32_t word;
  memcpy(&word, pair, sizeof(word));
  return word;
}

// Four threads hold columns 2q, 2q + 1 of four groups of eight; afterwards thread q holds group q.
__device__ __forceinline__ void gather_groups(uint32_t (&words)[kQuad], int q) {
#pragma unroll
  for (int step = 1; step < kQuad; step *= 2) {
    const bool upper = (q & step) != 0;
#pragma unroll
    for (int i = 0; i < kQuad; ++i) {
      if (i & step) continue;
      const uint32_t sent = upper ? words[i] : words[i + step];
      const uint32_t got = __shfl_xor_sync(kEveryLane, sent, step);
      words[i] = upper ? got : words[i];
      words[i + step] = upper ? words[i + step] : got;
    }
  }
}

// What may be subtracted from a logit where the maximum so far is m.
__device__ __forceinline__ float finite_or_zero(float m) { return m == -HUGE_VALF ? 0.0f : m; }

// What exponentials of columns whose greatest logit is `top` are relative to.
__device__ __forceinline__ float base_of(float top, float anchor) {
  return within_reach(top, anchor) ? anchor : finite_or_zero(top);
}

// One row of one span: x holds the thread's accumulators (held_column) and is used up. All threads
// of a warp call it together, those whose row is past the last one too.
template <int kHeld>
__device__ __forceinline__ void finish_span(const SpansArgs& args, int64_t row, int64_t span,
                                            float (&x)[kHeld]) {
  constexpr int kSpan = kHeld * kQuad;
  const int q = static_cast<int>(threadIdx.x) % kQuad;
  const int64_t rows = args.rows, begin = span * kSpan;
  const bool inside = row < rows;
  const int64_t columns = args.cols - begin;
  if (columns <= 0) return;  // a tile that only fills up a cluster
  const int left = columns < kSpan ? static_cast<int>(columns) : kSpan;

  if (args.bias != nullptr) {
    const float* bias = args.bias + begin + 2 * q;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) x[i] += bias[held_column(0, i)];
  }

  // Few spans of a row hold its label, and one thread of four.
  const int64_t label = inside ? args.labels[row] - begin : -1;
  const bool mine = label >= 0 && label < left && label / 2 % kQuad == q;
  const int at_label = static_cast<int>(label) - 2 * q;
  if (mine) {
    float raw = 0.0f;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (held_column(0, i) == at_label) raw = x[i];
    }
    const Logit y = args.map.capped ? logit<true>(raw, args.map) : logit<false>(raw, args.map);
    args.target_logit[row] = y.z;
    args.slope[row] = y.slope;
  }

  if (args.map.capped) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) x[i] = logit<true>(x[i], args.map).z;
  } else {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) x[i] *= args.map.gain;
  }
  if (mine) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (held_column(0, i) == at_label) x[i] = -HUGE_VALF;
    }
  }
  float top = -HUGE_VALF;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    if (held_column(0, i) >= left - 2 * q) x[i] = -HUGE_VALF;
    top = fmaxf(top, x[i]);  // skips nan
  }
#pragma unroll
  for (int step = 1; step < kQuad; step *= 2) {
    top = fmaxf(top, __shfl_xor_sync(kEveryLane, top, step));
  }

  // dz/dx is gain (1 - tanh^2), or gain. Four sums at a time make shorter chains.
  const float base = base_of(top, inside ? args.anchor[row] : 0.0f), gain = args.map.gain;
  const float bend = args.map.capped ? gain / (args.map.outer * args.map.outer) : 0.0f;
  float total[kQuad] = {}, dev[kQuad] = {};
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const float z = x[i], e = fast_exp(z - base);
    total[i % kQuad] += e;
    dev[i % kQuad] += e * depth(z, base);
    x[i] = e == 0.0f ? 0.0f : e * (gain - z * z * bend);
  }
  float rest = (total[0] + total[1]) + (total[2] + total[3]);
  float deviation = (dev[0] + dev[1]) + (dev[2] + dev[3]);
#pragma unroll
  for (int step = 1; step < kQuad; step *= 2) {
    rest += __shfl_xor_sync(kEveryLane, rest, step);
    deviation += __shfl_xor_sync(kEveryLane, deviation, step);
  }
  if (inside && q == 0) {
    const int64_t plane = span_count(args.cols, kSpan) * rows;
    float* part = args.parts + span * rows + row;
    part[0] = top;
    part[plane] = rest;
    part[2 * plane] = deviation;
  }

  if (args.out == nullptr) return;
  __nv_bfloat16* out = static_cast<__nv_bfloat16*>(args.out) + row * args.row_stride + begin;
#pragma unroll
  for (int g = 0; g < kHeld / 8; ++g) {
    uint32_t words[kQuad];
#pragma unroll
    for (int k = 0; k < kQuad; ++k) {
      words[k] = narrow_pair(x[8 * g + 2 * k], x[8 * g + 2 * k + 1]);
    }
    gather_groups(words, q);
    const int column = (kQuad * g + q) * 8;
    if (inside && column < left) {
      store_16_bytes(out + column, words);
    }
  }
}

}  // namespace lolkernels::cuda

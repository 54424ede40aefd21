// Rows from the spans that finish_span leaves: their statistics, and dlogits over the exponentials.
#pragma once

#include "spans.cuh"

namespace lolkernels::cuda {

// The rows' statistics. A warp takes every eighth span of 32 rows, one a lane.
constexpr int kMergeWarps = 8;

__global__ void __launch_bounds__(kWarp* kMergeWarps)
    merge_spans_kernel(const MergeSpansArgs args) {
  __shared__ Running of_warp[kMergeWarps][kWarp];
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t rows = args.spans.rows, row = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  const int64_t spans = span_count(args.spans.cols), plane = spans * rows;
  Running s = nothing();
  if (row < rows) {
    for (int64_t span = warp; span < spans; span += kMergeWarps) {
      const float* part = args.spans.parts + span * rows + row;
      s = merge(s, {part[0], part[plane], part[2 * plane]});
    }
  }
  of_warp[warp][lane] = s;
  __syncthreads();
  if (warp != 0 || row >= rows) return;
  for (int other = 1; other < kMergeWarps; ++other) s = merge(s, of_warp[other][lane]);
  const int64_t label = args.labels[row];
  if (label < 0 || label >= args.spans.cols) args.target_logit[row] = -HUGE_VALF;
  write_stats(s, args.lse + row, args.expected_logit + row, args.max_logit + row);
}

// dL/dx over the exponentials: one factor a row and span, the label's column from its own logit.
// A warp takes whole spans: its 32 threads eight columns each. Bytes per logit: 2 read, 2 written.
constexpr int kSpansAtOnce = 4;

template <typename T>
__global__ void __launch_bounds__(kMaxThreads)
    span_dlogits_kernel(const SpanDlogitsArgs args, const int spans_a_block) {
  constexpr int kPack = kLoadBytes / static_cast<int>(sizeof(T));
  static_assert(kPack * kWarp == kSpan);
  using Columns = Pack<T, kPack>;
  const int64_t row = blockIdx.x, rows = args.spans.rows, cols = args.spans.cols;
  const int lane = static_cast<int>(threadIdx.x) % kWarp,
            warps = static_cast<int>(blockDim.x) / kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
  const int spans = static_cast<int>(span_count(cols));
  const int first = static_cast<int>(blockIdx.y) * spans_a_block;
  const int last = spans - first < spans_a_block ? spans : first + spans_a_block;
  T* e = static_cast<T*>(args.spans.data) + row * args.spans.row_stride + lane * kPack;
  const float* maximum = args.spans.parts + row;
  const float lse = args.lse[row], coef = args.coef[row];
  const int64_t label = args.labels[row];

  for (int begin = first + warp; begin < last; begin += kSpansAtOnce * warps) {
    Columns raw[kSpansAtOnce];
    float factor[kSpansAtOnce];
#pragma unroll
    for (int u = 0; u < kSpansAtOnce; ++u) {
      const int span = begin + u * warps;
      const bool there = span < last && span * kSpan + lane * kPack < cols;
      if (!there) continue;
      raw[u] = *reinterpret_cast<const Columns*>(e + static_cast<int64_t>(span) * kSpan);
      factor[u] = -coef * args.map.gain * fast_exp(maximum[span * rows] - lse);
    }
#pragma unroll
    for (int u = 0; u < kSpansAtOnce; ++u) {
      const int span = begin + u * warps;
      const int64_t column = static_cast<int64_t>(span) * kSpan + lane * kPack;
      if (span >= last || column >= cols) continue;
      Columns dx;
#pragma unroll
      for (int i = 0; i < kPack; ++i) narrow(widen(raw[u].lane[i]) * factor[u], &dx.lane[i]);
      *reinterpret_cast<Columns*>(e + static_cast<int64_t>(span) * kSpan) = dx;
      if (label >= column && label < column + kPack) {
        const float k = dlogit_at_label(args.target_logit[row], lse, coef, -coef, 0.0f);
        narrow(k * args.target_slope[row],
               e + static_cast<int64_t>(span) * kSpan + (label - column));
      }
    }
  }
}

}  // namespace lolkernels::cuda

// The rows of what finish_span leaves. Compiled once, while the GEMM has an object of its own.
#pragma once

#include "spans.cuh"

namespace lolkernels::cuda {

// Rows from spans. A warp takes every eighth span of 32 rows, one a lane; where a span of a row is
// out of the anchor's reach, the block then scales the row's exponentials to its maximum.
constexpr int kMergeWarps = 8;

__global__ void __launch_bounds__(kWarp* kMergeWarps)
    merge_spans_kernel(const SpansArgs args, const int span_columns) {
  __shared__ float tops[kMergeWarps][kWarp];
  __shared__ Running of_warp[kMergeWarps][kWarp];
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarp, warp = thread / kWarp;
  const int64_t rows = args.rows, first = static_cast<int64_t>(blockIdx.x) * kWarp;
  const int64_t row = first + lane, spans = span_count(args.cols, span_columns);
  const int64_t plane = spans * rows;

  float top = -HUGE_VALF;
  if (row < rows) {
    for (int64_t span = warp; span < spans; span += kMergeWarps) {
      top = fmaxf(top, args.parts[span * rows + row]);
    }
  }
  tops[warp][lane] = top;
  __syncthreads();
  const auto top_of = [&](int of_lane) {
    float all = tops[0][of_lane];
    for (int other = 1; other < kMergeWarps; ++other) all = fmaxf(all, tops[other][of_lane]);
    return all;
  };
  if (row < rows) {
    const float anchor = args.anchor[row], base = base_of(top_of(lane), anchor);
    Running s = nothing();
    for (int64_t span = warp; span < spans; span += kMergeWarps) {
      const float* part = args.parts + span * rows + row;
      Running next = {part[0], part[plane], part[2 * plane]};
      Fall(base_of(next.m, anchor), base).move(next);
      s = add_up(s, next);
    }
    of_warp[warp][lane] = s;
  }
  __syncthreads();
  if (warp == 0 && row < rows) {
    Running s = of_warp[0][lane];
    for (int other = 1; other < kMergeWarps; ++other) s = add_up(s, of_warp[other][lane]);
    const int64_t label = args.labels[row];
    if (label < 0 || label >= args.cols) {
      args.target_logit[row] = -HUGE_VALF;
      args.slope[row] = 0.0f;
    }
    const float anchor = args.anchor[row], target = args.target_logit[row];
    args.used[row] = within_reach(s.m, anchor) ? anchor : own_anchor(s.m, target);
    args.rest[row] = s.rest;
    args.deviation[row] = s.dev;
    args.max_logit[row] = max_logit(s, target);
  }

  if (args.out == nullptr) return;
  for (int of_lane = 0; of_lane < kWarp && first + of_lane < rows; ++of_lane) {
    const int64_t one = first + of_lane;
    const float anchor = args.anchor[one], highest = top_of(of_lane);
    if (within_reach(highest, anchor)) continue;
    constexpr int kPack = kLoadBytes / static_cast<int>(sizeof(__nv_bfloat16));
    using Columns = Pack<__nv_bfloat16, kPack>;
    __nv_bfloat16* out = static_cast<__nv_bfloat16*>(args.out) + one * args.row_stride;
    for (int64_t column = kPack * thread; column < args.cols; column += kPack * blockDim.x) {
      const float of_span = args.parts[column / span_columns * rows + one];
      const Fall fall(base_of(of_span, anchor), base_of(highest, anchor));
      Columns e = *reinterpret_cast<const Columns*>(out + column);
#pragma unroll
      for (int i = 0; i < kPack; ++i) narrow(fall(widen(e.lane[i])), &e.lane[i]);
      *reinterpret_cast<Columns*>(out + column) = e;
    }
  }
}

}  // namespace lolkernels::cuda

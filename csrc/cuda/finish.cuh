// What follows a sweep of whole rows: their statistics, and the label's own terms of dhidden and
// dweight. One block walks one row of hidden; as rows.cuh this is text for nvcc and for
// tests/cuda_host. The formulas stand in lolkernels/backends/finish.py.
#pragma once

#include "rows.cuh"

namespace lolkernels::cuda {

constexpr int kFinishThreads = 128, kFinishColumns = 8;

// log softmax at the label and its kin; then unit = rest slope table[label] - share unit.
template <typename Table>
__global__ void __launch_bounds__(kFinishThreads) finish_kernel(const FinishArgs args) {
  const int64_t row = blockIdx.x, label = args.labels[row];
  const auto sum = [&](int i) { return args.sums[i][row]; };
  const float anchor = sum(0), target = sum(4), slope = sum(5);
  const float base = fmaxf(target, anchor);
  const float mine = expf(target - base), fall = expf(anchor - base), others = sum(1) * fall;
  const float total = others + mine, rest = others / total, log_total = logf(total);
  float dev = fall == 0.0f ? 0.0f : fall * (sum(2) + sum(1) * (anchor - base));
  dev += mine == 0.0f ? 0.0f : mine * (target - base);
  float lse = base + log_total, share = fall / total;
  if (args.flags != nullptr && (label < 0 || label >= args.vocab)) {
    lse = share = NAN;
    if (threadIdx.x == 0) atomicOr(args.flags, kBadLabel);
  }
  const bool spoilt = !(lse < HUGE_VALF);
  if (threadIdx.x == 0) {
    const float logp = mine > others ? -log1pf(others / mine) : (target - base) - log_total;
    const float stats[] = {spoilt ? NAN : logp,
                           spoilt ? NAN : lse,
                           spoilt ? NAN : log_total - dev / total,
                           sum(3),
                           target,
                           slope,
                           rest,
                           share};
#pragma unroll
    for (int i = 0; i < 8; ++i) args.out[i][row] = stats[i];
  }
  if (args.unit == nullptr) return;
  const int64_t last = args.vocab - 1, inside = label < 0 ? 0 : label > last ? last : label;
  const Table* picked = static_cast<const Table*>(args.table.data) + inside * args.table.row_stride;
  float* unit = args.unit + row * args.unit_stride;
  const float own = rest * slope;
  for (int64_t d = threadIdx.x; d < args.table.cols; d += kFinishThreads) {
    unit[d] = own * widen(picked[d * args.table.col_stride]) - share * unit[d];
  }
}

// table[label] += dx_label row, rounded once: the block of the first row with a label adds up those
// of all its rows, in their order.
template <typename Table, typename Row>
__global__ void __launch_bounds__(kFinishThreads) add_labels_kernel(const LabelsArgs args) {
  __shared__ bool same[kFinishThreads];
  const int64_t first = blockIdx.x, n = args.rows.rows, label = args.labels[first];
  const int thread = static_cast<int>(threadIdx.x);
  int seen = label < 0 || label >= args.table.rows;
  for (int64_t start = 0; start < first && !seen; start += kFinishThreads) {
    const int64_t i = start + thread;
    seen = __syncthreads_or(i < first && args.labels[i] == label);
  }
  if (seen) return;

  const int64_t column = static_cast<int64_t>(blockIdx.y) * kFinishThreads * kFinishColumns;
  const auto there = [&](int u) { return column + u * kFinishThreads + thread; };
  const int64_t cols = args.table.cols;
  Table* table = static_cast<Table*>(args.table.data) + label * args.table.row_stride;
  float total[kFinishColumns];
#pragma unroll
  for (int u = 0; u < kFinishColumns; ++u) {
    total[u] = there(u) < cols ? widen(table[there(u) * args.table.col_stride]) : 0.0f;
  }
  for (int64_t start = first; start < n; start += kFinishThreads) {
    const bool mine = start + thread < n && args.labels[start + thread] == label;
    if (!__syncthreads_or(mine)) continue;  // which also says that `same` has been read
    same[thread] = mine;
    __syncthreads();
    for (int j = 0; j < kFinishThreads; ++j) {
      if (!same[j]) continue;
      const int64_t row = start + j;
      float own = args.a[row] * args.rest[row];
      if (args.both.data != nullptr) own += args.both[row] * expf(args.logps[row]);
      own *= args.slope[row];
      const Row* x = static_cast<const Row*>(args.rows.data) + row * args.rows.row_stride;
#pragma unroll
      for (int u = 0; u < kFinishColumns; ++u) {
        if (there(u) < cols) total[u] += own * widen(x[there(u) * args.rows.col_stride]);
      }
    }
  }
#pragma unroll
  for (int u = 0; u < kFinishColumns; ++u) {
    if (there(u) < cols) narrow(total[u], table + there(u) * args.table.col_stride);
  }
}

}  // namespace lolkernels::cuda

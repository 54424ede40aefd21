// The coefficient kernel of the A-LoL family: one block a sequence, in double, because tokens are
// few and their sum is large. Bytes a token: 8 read, 4 written.
#pragma once

#include "../arguments.h"
#include "block.cuh"

namespace lolkernels::cuda {

constexpr int kSequenceThreads = 256;

// Everyone's sum, in every thread; the order of the additions is fixed.
__device__ __forceinline__ double sum_block(double mine) {
  __shared__ double of_warp[kSequenceThreads / kWarp];
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) {
    mine += __shfl_down_sync(kEveryLane, mine, step);
  }
  __syncthreads();  // the last sum has been read
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = mine;
  __syncthreads();
  double total = 0.0;
  for (const double part : of_warp) total += part;
  return total;
}

template <Ratio kRatio>
__global__ void __launch_bounds__(kSequenceThreads, 2)
    sequence_coef_kernel(const SequencesArgs args) {
  const SequenceRule& rule = args.rule;
  const int64_t s = blockIdx.x;
  const int64_t first = args.cu_seqlens[s], last = args.cu_seqlens[s + 1];
  const double weight = args.weight[s], scale = args.scale.data ? args.scale[s] : 1.0f;
  bool missing = weight != weight;

  double log_ratio = 0.0, weighted = 0.0, clipped = 0.0;
  for (int64_t t = first + threadIdx.x; t < last; t += kSequenceThreads) {
    const double logp = args.logps[t];
    const double ref = args.has_ref ? args.ref_logps[t] : 0.0f, d = logp - ref;
    missing = missing || ref != ref;
    log_ratio += d;
    if constexpr (kRatio == Ratio::token) {
      const double w = clipped_ratio(d, rule);
      weighted += w * logp;
      clipped += outside(d, rule) ? 1.0 : 0.0;
      args.coef[t] = static_cast<float>(scale * sequence_coefficient(weight, w, rule));
    } else {
      weighted += logp;
    }
  }
  if (missing && args.flags != nullptr) atomicOr(args.flags, kNanInput);
  log_ratio = sum_block(log_ratio);
  weighted = sum_block(weighted);
  if constexpr (kRatio == Ratio::token) {
    clipped = sum_block(clipped) / static_cast<double>(last - first);
  } else {
    double w = 1.0;
    if constexpr (kRatio == Ratio::sequence) {
      w = clipped_ratio(log_ratio, rule);
      clipped = outside(log_ratio, rule) ? 1.0 : 0.0;
    }
    weighted *= w;
    const float coef = static_cast<float>(scale * sequence_coefficient(weight, w, rule));
    for (int64_t t = first + threadIdx.x; t < last; t += kSequenceThreads) args.coef[t] = coef;
  }
  if (threadIdx.x != 0) return;
  const bool empty = last <= first;
  const double loss = empty ? 0.0 : sequence_loss(weight, weighted, log_ratio, rule);
  args.loss[s] = static_cast<float>(loss);
  args.log_ratio[s] = static_cast<float>(log_ratio);
  args.clipped[s] = empty ? 0.0f : static_cast<float>(clipped);
}

}  // namespace lolkernels::cuda

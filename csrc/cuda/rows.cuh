// dlogits on an NVIDIA GPU, and what it shares with exps: one block walks one row (with few rows, a
// part of one), so that nothing crosses blocks, there are no atomics, and results are
// bit-reproducible. Nothing but ordinary functions of the CUDA runtime: tests/cuda_host compiles
// this very text for the CPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "../arguments.h"
#include "block.cuh"

namespace lolkernels::cuda {

constexpr int kLoadBytes = 16;           // the widest load
constexpr int kMaxThreads = 256;         // of a block
constexpr int kMinBlocks = 3;            // on a processor: 80 registers a thread
constexpr int64_t kMaxCols = 1ll << 30;  // columns are counted in int, with room for a last batch

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }

// Nearest even, as torch rounds.
__device__ __forceinline__ void narrow(float x, float* out) { *out = x; }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16* out) {
  *out = __float2bfloat16_rn(x);
}
__device__ __forceinline__ void narrow(float x, __half* out) { *out = __float2half_rn(x); }

// e^x, 0 where it would be denormal; exactly 1 at 0.
__device__ __forceinline__ float fast_exp(float x) { return exp2_flushed(x * 1.44269504f); }

struct Logit {
  float z;
  float slope;  // dz/dx
};

template <bool kCapped>
__device__ __forceinline__ Logit logit(float x, const LogitMap& map) {
  if constexpr (!kCapped) return {x * map.gain, map.gain};
  const float u = x * map.inner, magnitude = fabsf(u);
  const float near = tanh_near(u, u * u);
  // 1 - q with q = 2 / (e^2|u| + 1) = 1 - tanh |u|; e^88 + 1 is still finite, and a nan passes.
  const float twice = 2.0f * magnitude;
  const float q = __fdividef(2.0f, fast_exp(twice > 80.0f ? 80.0f : twice) + 1.0f);
  const bool small = magnitude < kTanhNear;
  const float t = small ? near : copysignf(1.0f - q, u);
  return {t * map.outer, (small ? 1.0f - near * near : q * (2.0f - q)) * map.gain};
}

// A logit with the head's bias, where there is one: V floats that all rows read from cache.
template <typename T>
__device__ __forceinline__ float biased(T raw, const float* bias, int64_t column) {
  return bias == nullptr ? widen(raw) : widen(raw) + bias[column];
}

// Columns that lie together, read or written at once.
template <typename T, int kColumns>
struct alignas(sizeof(T) * kColumns < kLoadBytes ? sizeof(T) * kColumns : kLoadBytes) Pack {
  T lane[kColumns];
};

// How the columns [0, cols) of a row fall to threads. Packs of kPack columns start after `head`
// columns, where 16-byte addresses begin; what is before and behind them are the edges, fewer than
// 2 * kPack <= 16 columns, one a thread.
template <int kPack>
struct Split {
  int head, packs, cols;

  __device__ int edges() const { return cols - packs * kPack; }
  __device__ int edge(int i) const { return i < head ? i : packs * kPack + i; }
  __device__ int column(int pack) const { return head + pack * kPack; }
};

template <typename T, bool kContiguous>
constexpr int kPackOf = kContiguous ? kLoadBytes / static_cast<int>(sizeof(T)) : 1;

// Packs a thread reads before it computes: 16 columns; 8 of a strided row.
template <typename T, bool kContiguous>
constexpr int kWrites = kContiguous ? 16 / kPackOf<T, kContiguous> : 8;

template <typename T, bool kContiguous>
__device__ __forceinline__ Split<kPackOf<T, kContiguous>> split(const T* row, int64_t cols) {
  constexpr int kPack = kPackOf<T, kContiguous>;
  const int count = static_cast<int>(cols);
  if constexpr (!kContiguous) return {0, count, count};
  const auto past = reinterpret_cast<uintptr_t>(row) % kLoadBytes;
  const int lead = past == 0 ? 0 : static_cast<int>((kLoadBytes - past) / sizeof(T));
  const int head = lead < count ? lead : count;
  return {head, (count - head) / kPack, count};
}

// batch(begin, count) over the packs [first, last): a thread's are begin + thread, and count in
// all, `threads` apart. All are there where count is kBatch; where it is 1 the pack may be beyond
// `last`.
template <int kBatch, typename Batch>
__device__ __forceinline__ void in_batches(int first, int last, int threads, const Batch& batch) {
  int begin = first;
  for (; begin + kBatch * threads <= last; begin += kBatch * threads) {
    batch(begin, std::integral_constant<int, kBatch>{});
  }
  for (; begin < last; begin += threads) batch(begin, std::integral_constant<int, 1>{});
}

// dx = (a [v == y] + p (b + c z)) dz/dx with p = e^(z - lse). Bytes per logit: one read, one write.
//
// The block takes packs [y * span, (y + 1) * span) of a row, y its place on grid.y, and the first
// one the edges. kAliased: out's rows start where those of logits do, with narrower elements. A
// write then lands only on columns that have been read, provided that one block walks the row from
// its start and that its threads have all read a batch before any writes.
template <typename In, typename Out, bool kCapped, bool kContiguous, bool kAliased>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks)
    dlogits_kernel(const DlogitsArgs args, const int span) {
  constexpr int kPack = kPackOf<In, kContiguous>, kBatch = kWrites<In, kContiguous>;
  const int64_t row = blockIdx.x;
  const In* x = static_cast<const In*>(args.logits.data) + row * args.logits.row_stride;
  Out* out = static_cast<Out*>(args.out.data) + row * args.out.row_stride;
  const int64_t x_stride = kContiguous ? 1 : args.logits.col_stride;
  const int64_t out_stride = kContiguous ? 1 : args.out.col_stride;
  const Split<kPack> at = split<In, kContiguous>(x, args.logits.cols);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int first = static_cast<int>(blockIdx.y) * span;
  const int last = at.packs - first < span ? at.packs : first + span;
  const bool has_edge = blockIdx.y == 0 && thread < at.edges();
  const float lse = args.lse[row], a = args.a[row], b = args.b[row], c = args.c[row];
  const auto gradient = [&](In raw, int column) {
    const Logit v = logit<kCapped>(biased(raw, args.bias, column), args.map);
    return dlogit(fast_exp(v.z - lse), v.z, b, c) * v.slope;
  };

  // The thread that writes the label's column reads it first, and corrects it in the end.
  const int64_t label = args.labels[row];
  bool mine = false;
  In x_label{};
  if (label >= 0 && label < args.logits.cols) {
    const int v = static_cast<int>(label), pack = v < at.head ? -1 : (v - at.head) / kPack;
    const bool in_pack = pack >= 0 && pack < at.packs;
    mine = in_pack ? pack >= first && pack < last && (pack - first) % threads == thread
                   : has_edge && at.edge(thread) == v;
    if (mine) x_label = x[label * x_stride];
  }

  in_batches<kBatch>(first, last, threads, [&](int begin, auto count) {
    constexpr int kCount = decltype(count)::value;
    const bool there = kCount > 1 || begin + thread < last;
    Pack<In, kPack> raw[kCount];
#pragma unroll
    for (int u = 0; u < kCount && there; ++u) {
      const int64_t column = at.column(begin + u * threads + thread);
      raw[u] = *reinterpret_cast<const Pack<In, kPack>*>(x + column * x_stride);
    }
    if (kAliased) __syncthreads();
#pragma unroll
    for (int u = 0; u < kCount && there; ++u) {
      Pack<Out, kPack> dx;
      const int column = at.column(begin + u * threads + thread);
#pragma unroll
      for (int i = 0; i < kPack; ++i) narrow(gradient(raw[u].lane[i], column + i), &dx.lane[i]);
      *reinterpret_cast<Pack<Out, kPack>*>(out + int64_t{column} * out_stride) = dx;
    }
  });
  if (kContiguous) {
    const In raw = has_edge ? x[at.edge(thread)] : In{};
    if (kAliased) __syncthreads();
    if (has_edge) narrow(gradient(raw, at.edge(thread)), out + at.edge(thread));
  }
  if (mine) {
    const Logit y = logit<kCapped>(biased(x_label, args.bias, label), args.map);
    const double z = y.z, logp = args.logps.data == nullptr ? z - lse : args.logps[row];
    narrow(dlogit_at_label(y.z, logp, a, b, c) * y.slope, out + label * out_stride);
  }
}

}  // namespace lolkernels::cuda

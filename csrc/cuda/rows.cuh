// row_stats and dlogits on an NVIDIA GPU: one block walks one row (with few rows, a part of one in
// dlogits), so that nothing crosses blocks, there are no atomics, and results are bit-reproducible.
// Nothing but ordinary functions of the CUDA runtime: tests/cuda_host compiles this very text for
// the CPU.
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

// Packs a thread reads before it computes: in row_stats 64 bytes, where it has as much to write 16
// columns; 8 columns of a strided row.
template <typename T, bool kContiguous>
constexpr int kReads = kContiguous ? 4 : 8;
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

// row_stats ---------------------------------------------------------------------------------------

// The statistics of some logits: their maximum m, sum e^(z - m) less the 1 of a maximum, and
// sum e^(z - m) (z - m). Where one logit is nearly everything, `rest` is what its log-prob is made
// of, and expectations around the maximum lose no digits to its size.
struct Running {
  float m, rest, dev;
};

__device__ __forceinline__ Running nothing() { return {-HUGE_VALF, 0.0f, 0.0f}; }

// What may be subtracted from a logit where the maximum so far is m.
__device__ __forceinline__ float finite_or_zero(float m) { return m == -HUGE_VALF ? 0.0f : m; }

__device__ __forceinline__ float held(float m) { return m == -HUGE_VALF ? 0.0f : 1.0f; }

// How far below base z lies; e^d is 0 before -128, and d = -inf would make 0 * d a nan.
__device__ __forceinline__ float depth(float z, float base) { return fmaxf(z - base, -128.0f); }

template <int kCount>
__device__ __forceinline__ void absorb(Running& s, const float (&z)[kCount]) {
  float top = z[0];
#pragma unroll
  for (int i = 1; i < kCount; ++i) top = fmaxf(top, z[i]);  // skips nan
  const float m = fmaxf(s.m, top);
  const float base = finite_or_zero(m), fall = depth(s.m, base), shrink = fast_exp(fall);
  float total = 0.0f, dev = 0.0f;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float d = z[i] - base, e = fast_exp(d);
    total += e;
    dev += e * depth(z[i], base);
  }
  const float before = held(s.m) + s.rest;
  s.dev = shrink * (s.dev + before * fall) + dev;
  s.rest = m > s.m ? shrink * before + (total - 1.0f) : s.rest + total;
  s.m = m;
}

__device__ __forceinline__ Running merge(Running a, Running b) {
  if (b.m > a.m) {
    const Running c = a;
    a = b, b = c;
  }
  const float fall = depth(b.m, finite_or_zero(a.m)), shrink = fast_exp(fall);
  const float sum = held(b.m) + b.rest;
  return {a.m, a.rest + shrink * sum, a.dev + shrink * (b.dev + sum * fall)};
}

// In the first thread of the block: everyone's, in an order that depends on blockDim alone.
template <typename Merge>
__device__ __forceinline__ Running merge_block(Running s, const Merge& merge) {
  __shared__ Running of_warp[kMaxThreads / kWarp];
  const auto merge_warp = [&](Running mine) {
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
      Running other;
      other.m = __shfl_down_sync(kEveryLane, mine.m, step);
      other.rest = __shfl_down_sync(kEveryLane, mine.rest, step);
      other.dev = __shfl_down_sync(kEveryLane, mine.dev, step);
      mine = merge(mine, other);
    }
    return mine;
  };
  s = merge_warp(s);
  if (blockDim.x == kWarp) return s;
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = s;
  __syncthreads();
  if (threadIdx.x >= kWarp) return s;
  return merge_warp(threadIdx.x < blockDim.x / kWarp ? of_warp[threadIdx.x] : nothing());
}

__device__ __forceinline__ void write_stats(Running s, float* lse, float* expected, float* max) {
  const float base = finite_or_zero(s.m);
  // Of no logit but -inf the sum is 0 = 1 + -1, or nan.
  *lse = base + log1pf(s.rest - (1.0f - held(s.m)));
  *expected = base + s.dev / (held(s.m) + s.rest);
  *max = s.rest != s.rest && s.m != HUGE_VALF ? s.rest : s.m;  // it skips nan
}

// One online-softmax sweep of a row. Bytes per logit: its own size, read once; one exponential a
// logit and one a batch. Every thread has statistics of its own until the row's end.
template <typename T, bool kCapped, bool kContiguous>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks)
    row_stats_kernel(const RowStatsArgs args) {
  constexpr int kPack = kPackOf<T, kContiguous>, kBatch = kReads<T, kContiguous>;
  using Columns = Pack<T, kPack>;
  const int64_t row = blockIdx.x;
  const T* x = static_cast<const T*>(args.logits.data) + row * args.logits.row_stride;
  const int64_t stride = kContiguous ? 1 : args.logits.col_stride;
  const Split<kPack> at = split<T, kContiguous>(x, args.logits.cols);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);

  Running s = nothing();
  in_batches<kBatch>(0, at.packs, threads, [&](int begin, auto count) {
    constexpr int kCount = decltype(count)::value;
    if (kCount == 1 && begin + thread >= at.packs) return;
    Columns raw[kCount];
#pragma unroll
    for (int u = 0; u < kCount; ++u) {
      const int64_t column = at.column(begin + u * threads + thread);
      raw[u] = *reinterpret_cast<const Columns*>(x + column * stride);
    }
    float z[kCount * kPack];
#pragma unroll
    for (int i = 0; i < kCount * kPack; ++i) {
      z[i] = logit<kCapped>(widen(raw[i / kPack].lane[i % kPack]), args.map).z;
    }
    absorb(s, z);
  });
  if (thread < at.edges()) {
    absorb(s, {logit<kCapped>(widen(x[at.edge(thread) * stride]), args.map).z});
  }
  s = merge_block(s, merge);

  if (thread != 0) return;
  const int64_t label = args.labels[row];
  const bool has_target = label >= 0 && label < args.logits.cols;
  args.target_logit[row] =
      has_target ? logit<kCapped>(widen(x[label * stride]), args.map).z : -HUGE_VALF;
  write_stats(s, args.lse + row, args.expected_logit + row, args.max_logit + row);
}

// dlogits -----------------------------------------------------------------------------------------

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
  const auto gradient = [&](In raw) {
    const Logit v = logit<kCapped>(widen(raw), args.map);
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
#pragma unroll
      for (int i = 0; i < kPack; ++i) narrow(gradient(raw[u].lane[i]), &dx.lane[i]);
      const int64_t column = at.column(begin + u * threads + thread);
      *reinterpret_cast<Pack<Out, kPack>*>(out + column * out_stride) = dx;
    }
  });
  if (kContiguous) {
    const In raw = has_edge ? x[at.edge(thread)] : In{};
    if (kAliased) __syncthreads();
    if (has_edge) narrow(gradient(raw), out + at.edge(thread));
  }
  if (mine) {
    const Logit y = logit<kCapped>(widen(x_label), args.map);
    const double z = y.z, logp = args.logps.data == nullptr ? z - lse : args.logps[row];
    narrow(dlogit_at_label(y.z, logp, a, b, c) * y.slope, out + label * out_stride);
  }
}

}  // namespace lolkernels::cuda

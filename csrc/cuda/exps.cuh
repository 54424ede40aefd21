// exps on an NVIDIA GPU: E = e^(z - anchor) dz/dx, the label's column 0, and the sums that make the
// row's statistics of it. One block walks one row, without atomics: bit-reproducible. As rows.cuh
// this is text for nvcc and for tests/cuda_host.
#pragma once

#include "rows.cuh"

namespace lolkernels::cuda {

// Packs a thread reads before it computes: half as many where their slopes have to be held too.
template <typename T, bool kCapped, bool kContiguous>
constexpr int kExps = kWrites<T, kContiguous> / (kCapped ? 2 : 1);

// Of some columns: their maximum m, sum e^(z - anchor) and sum e^(z - anchor) (z - anchor).
struct Running {
  float m, rest, dev;
};

__device__ __forceinline__ Running nothing() { return {-HUGE_VALF, 0.0f, 0.0f}; }

// How far below base z lies; e^d is 0 before -128, and d = -inf would make 0 * d a nan.
__device__ __forceinline__ float depth(float z, float base) { return fmaxf(z - base, -128.0f); }

// Whether exponentials of a row whose greatest is `top` may be relative to the anchor.
__device__ __forceinline__ bool within_reach(float top, float anchor) {
  return fabsf(anchor) < HUGE_VALF && !(top > anchor + kReach);
}

// What exponentials out of its reach are relative to: the maximum, or where no column but the
// label's counts, the label's logit.
__device__ __forceinline__ float own_anchor(float top, float target) {
  if (top != -HUGE_VALF) return top;
  return fabsf(target) < HUGE_VALF ? target : 0.0f;
}

__device__ __forceinline__ Running add_up(Running a, Running b) {
  return {fmaxf(a.m, b.m), a.rest + b.rest, a.dev + b.dev};
}

// In the first thread of the block: everyone's, in an order that depends on blockDim alone.
__device__ __forceinline__ Running add_up_block(Running s) {
  __shared__ Running of_warp[kMaxThreads / kWarp];
  const auto add_up_warp = [&](Running mine) {
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) {
      Running other;
      other.m = __shfl_down_sync(kEveryLane, mine.m, step);
      other.rest = __shfl_down_sync(kEveryLane, mine.rest, step);
      other.dev = __shfl_down_sync(kEveryLane, mine.dev, step);
      mine = add_up(mine, other);
    }
    return mine;
  };
  s = add_up_warp(s);
  if (blockDim.x == kWarp) return s;
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = s;
  __syncthreads();
  if (threadIdx.x >= kWarp) return s;
  return add_up_warp(threadIdx.x < blockDim.x / kWarp ? of_warp[threadIdx.x] : nothing());
}

// Sums and exponentials relative to `from` become relative to `to`, which is greater. Half of the
// factor at a time: neither half is too small for a float before the product is.
struct Fall {
  float fall, half;
  __device__ Fall(float from, float to)
      : fall(fmaxf(fminf(from - to, 0.0f), -256.0f)), half(fast_exp(0.5f * fall)) {}
  __device__ float operator()(float e) const { return e * half * half; }
  __device__ void move(Running& s) const {
    s.dev = (*this)(s.dev + s.rest * fall);
    s.rest = (*this)(s.rest);
  }
};

// max z, the label's included, nan where any logit is.
__device__ __forceinline__ float max_logit(Running others, float target) {
  if (target != target) return target;
  const bool spoilt = others.rest != others.rest && others.m != HUGE_VALF;  // m skips nan
  return spoilt ? others.rest : fmaxf(others.m, target);
}

struct Nowhere {};
__device__ __forceinline__ float widen(Nowhere) { return 0.0f; }
__device__ __forceinline__ void narrow(float, Nowhere*) {}

// Bytes per logit: one read, one write. Where a logit stands out of the anchor's reach, its thread
// stops writing and only looks for the maximum; float16, whose range is small, starts that way.
// What was written is then scaled down, and the rest of the row read once more: no logit is lost
// though out may be logits itself.
//
// kAliased: out's rows start where those of logits do, with narrower elements. A write then lands
// only on columns that have been read, provided that all threads have read a batch before any
// writes, and that all stop at the same one.
//
// Out is Nowhere where only the sums are wanted.
template <typename In, typename Out, bool kCapped, bool kContiguous, bool kAliased>
__global__ void __launch_bounds__(kMaxThreads, kMinBlocks) exps_kernel(const ExpsArgs args) {
  constexpr bool kWritten = !std::is_same_v<Out, Nowhere>;
  constexpr int kPack = kPackOf<In, kContiguous>, kBatch = kExps<In, kCapped, kContiguous>;
  const int64_t row = blockIdx.x;
  const In* x = static_cast<const In*>(args.logits.data) + row * args.logits.row_stride;
  Out* out = static_cast<Out*>(args.out.data) + row * args.out.row_stride;
  const int64_t x_stride = kContiguous ? 1 : args.logits.col_stride;
  const int64_t out_stride = kContiguous ? 1 : args.out.col_stride;
  const Split<kPack> at = split<In, kContiguous>(x, args.logits.cols);
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const bool has_edge = thread < at.edges();

  int label = -1;
  Logit target = {-HUGE_VALF, 0.0f};
  if (args.labels[row] >= 0 && args.labels[row] < args.logits.cols) {
    label = static_cast<int>(args.labels[row]);
    target = logit<kCapped>(biased(x[label * x_stride], args.bias, label), args.map);
  }
  __syncthreads();  // all have read it before any writes
  float anchor = args.anchor.data == nullptr ? target.z + kShift : args.anchor[row];
  bool writing = within_reach(-HUGE_VALF, anchor) && !std::is_same_v<Out, __half>;
  float limit = writing ? anchor + kReach : -HUGE_VALF;

  Running s = nothing(), all;
  int done = 0;  // the packs before it hold exponentials
  bool edge_done = false;
  __shared__ float top_of_row;
  const auto masked = [&](In raw, int column) {
    Logit v = logit<kCapped>(biased(raw, args.bias, column), args.map);
    if (column == label) v.z = -HUGE_VALF;
    return v;
  };
  const auto may_write = [&](float top) {
    s.m = fmaxf(s.m, top);
    const bool over = top > limit;
    writing = writing && !(kAliased ? __syncthreads_or(over) != 0 : over);
    return writing;
  };
  for (;;) {
    in_batches<kBatch>(done, at.packs, threads, [&](int begin, auto count) {
      constexpr int kCount = decltype(count)::value;
      const auto column = [&](int u) { return at.column(begin + u * threads + thread); };
      const bool there = kCount > 1 || begin + thread < at.packs;
      Pack<In, kPack> raw[kCount];
#pragma unroll
      for (int u = 0; u < kCount && there; ++u) {
        raw[u] = *reinterpret_cast<const Pack<In, kPack>*>(x + column(u) * x_stride);
      }
      Logit v[kCount][kPack];
      float top = -HUGE_VALF;
#pragma unroll
      for (int u = 0; u < kCount && there; ++u) {
#pragma unroll
        for (int i = 0; i < kPack; ++i) {
          v[u][i] = masked(raw[u].lane[i], column(u) + i);
          top = fmaxf(top, v[u][i].z);
        }
      }
      if (!may_write(top)) return;
      float rest = 0.0f, dev = 0.0f;
#pragma unroll
      for (int u = 0; u < kCount && there; ++u) {
        Pack<Out, kPack> e;
#pragma unroll
        for (int i = 0; i < kPack; ++i) {
          const float one = fast_exp(v[u][i].z - anchor);
          rest += one;
          dev += one * depth(v[u][i].z, anchor);
          narrow(one * v[u][i].slope, &e.lane[i]);
        }
        if constexpr (kWritten) {
          *reinterpret_cast<Pack<Out, kPack>*>(out + column(u) * out_stride) = e;
        }
      }
      s.rest += rest;
      s.dev += dev;
      done = begin + kCount * threads;
    });
    if (kContiguous && !edge_done) {
      Logit v = {-HUGE_VALF, 0.0f};
      if (has_edge) v = masked(x[at.edge(thread)], at.edge(thread));
      edge_done = may_write(v.z);
      if (edge_done && has_edge) {
        const float one = fast_exp(v.z - anchor);
        s.rest += one;
        s.dev += one * depth(v.z, anchor);
        if (kWritten) narrow(one * v.slope, out + at.edge(thread));
      }
    }

    all = add_up_block(s);
    if (thread == 0) top_of_row = all.m;
    __syncthreads();
    if (limit != -HUGE_VALF && !(top_of_row > limit)) break;
    // Once more, from where the thread stopped, relative to the maximum.
    const float top = own_anchor(top_of_row, target.z);
    const Fall fall(limit == -HUGE_VALF ? top : anchor, top);
    fall.move(s);
    for (int pack = thread; kWritten && pack < done && pack < at.packs; pack += threads) {
      Out* written = out + at.column(pack) * out_stride;
      Pack<Out, kPack> e = *reinterpret_cast<Pack<Out, kPack>*>(written);
#pragma unroll
      for (int i = 0; i < kPack; ++i) narrow(fall(widen(e.lane[i])), &e.lane[i]);
      *reinterpret_cast<Pack<Out, kPack>*>(written) = e;
    }
    if (kWritten && edge_done && has_edge) {
      narrow(fall(widen(out[at.edge(thread)])), out + at.edge(thread));
    }
    anchor = top, limit = HUGE_VALF, writing = true;
  }

  if (thread != 0) return;
  args.used[row] = anchor;
  args.rest[row] = all.rest;
  args.deviation[row] = all.dev;
  args.max_logit[row] = max_logit(all, target.z);
  args.target_logit[row] = target.z;
  args.slope[row] = target.slope;
}

}  // namespace lolkernels::cuda

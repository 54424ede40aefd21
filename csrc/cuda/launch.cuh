// From arguments to a launch: which kernel, how many blocks of how many threads. No torch here.
#pragma once

#include <type_traits>

#include "finish.cuh"
#include "sequences.cuh"
#include "span_rows.cuh"

namespace lolkernels::cuda {

template <typename... Params, typename... Args>
cudaError_t launch(void (*kernel)(Params...), unsigned blocks, unsigned parts, int threads,
                   cudaStream_t stream, const Args&... args) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks, parts);
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

// The table of launches: as few warps as read a row in one batch of `columns` a thread, 8 at most.
inline int block_threads(int64_t cols, int64_t columns) {
  int threads = kWarp;
  while (threads * columns < cols && threads < kMaxThreads) threads *= 2;
  return threads;
}

// A grid of fewer blocks than this leaves processors idle: the columns are shared out as well.
constexpr int64_t kEnoughBlocks = 1024;

// Whether the packs of logits lie at addresses where those of out can be written at once.
template <typename In, typename Out>
bool packs_align(const Matrix& x, const Matrix& out) {
  if (x.col_stride != 1 || out.col_stride != 1) return false;
  const auto x_past = reinterpret_cast<uintptr_t>(x.data) % kLoadBytes;
  const auto out_past = reinterpret_cast<uintptr_t>(out.data) % kLoadBytes;
  const auto x_row = static_cast<uint64_t>(x.row_stride) * sizeof(In) % kLoadBytes;
  const auto out_row = static_cast<uint64_t>(out.row_stride) * sizeof(Out) % kLoadBytes;
  if (sizeof(In) == sizeof(Out)) return x_past == out_past && x_row == out_row;
  return x_past + out_past + x_row + out_row == 0;
}

template <typename F>
cudaError_t with_dtype(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32: return f(float{});
    case DType::bf16: return f(__nv_bfloat16{});
    case DType::f16: return f(__half{});
  }
  return cudaErrorInvalidValue;
}

template <typename F>
cudaError_t with_flag(bool flag, const F& f) {
  return flag ? f(std::true_type{}) : f(std::false_type{});
}

// f(In{}, Out{}, capped, contiguous, aliased) with the three as types.
template <typename F>
cudaError_t with_rows(const Matrix& x, const Matrix& out, bool capped, bool aliased, const F& f) {
  return with_dtype(x.dtype, [&](auto in) {
    return with_dtype(out.dtype, [&](auto to) {
      return with_flag(capped, [&](auto cap) {
        return with_flag(packs_align<decltype(in), decltype(to)>(x, out), [&](auto contiguous) {
          if constexpr (sizeof(to) < sizeof(in)) {
            if (aliased) return f(in, to, cap, contiguous, std::true_type{});
          }
          return f(in, to, cap, contiguous, std::false_type{});
        });
      });
    });
  });
}

// At least one row and one column.
// aliased: out's rows start where those of logits do, with narrower elements.
inline cudaError_t exps(const ExpsArgs& args, bool aliased, cudaStream_t stream) {
  const auto go = [&](auto in, auto to, auto capped, auto contiguous, auto shared) {
    using In = decltype(in);
    constexpr bool kCapped = decltype(capped)::value;
    constexpr bool kContiguous = decltype(contiguous)::value;
    constexpr int kBatch = kPackOf<In, kContiguous> * kExps<In, kCapped, kContiguous>;
    return launch(exps_kernel<In, decltype(to), kCapped, kContiguous, decltype(shared)::value>,
                  static_cast<unsigned>(args.logits.rows), 1,
                  block_threads(args.logits.cols, kBatch), stream, args);
  };
  if (args.out.data != nullptr) {
    return with_rows(args.logits, args.out, args.map.capped, aliased, go);
  }
  return with_dtype(args.logits.dtype, [&](auto in) {
    return with_flag(args.map.capped, [&](auto capped) {
      return with_flag(args.logits.col_stride == 1, [&](auto contiguous) {
        return go(in, Nowhere{}, capped, contiguous, std::false_type{});
      });
    });
  });
}

inline cudaError_t dlogits(const DlogitsArgs& args, bool aliased, cudaStream_t stream) {
  return with_rows(
      args.logits, args.out, args.map.capped, aliased,
      [&](auto in, auto to, auto capped, auto contiguous, auto shared) {
        using In = decltype(in);
        constexpr bool kContiguous = decltype(contiguous)::value;
        constexpr bool kAliased = decltype(shared)::value;
        constexpr int64_t kPack = kPackOf<In, kContiguous>, kBatch = kWrites<In, kContiguous>;
        const int64_t rows = args.logits.rows, packs = args.logits.cols / kPack;
        const int64_t threads = block_threads(args.logits.cols, kPack * kBatch);
        const int64_t batches = (packs + kBatch * threads - 1) / (kBatch * threads);
        const int64_t wanted = kAliased || batches == 0 ? 1 : (kEnoughBlocks + rows - 1) / rows;
        const int64_t parts = wanted < batches ? wanted : batches > 0 ? batches : 1;
        const int64_t span = (batches + parts - 1) / parts * kBatch * threads;
        const int64_t blocks = span == 0 ? 1 : (packs + span - 1) / span;
        return launch(
            dlogits_kernel<In, decltype(to), decltype(capped)::value, kContiguous, kAliased>,
            static_cast<unsigned>(rows), static_cast<unsigned>(blocks), static_cast<int>(threads),
            stream, args, static_cast<int>(span));
      });
}

inline cudaError_t sequence_coef(const SequencesArgs& args, int64_t sequences,
                                 cudaStream_t stream) {
  const auto go = [&](auto kernel) {
    return launch(kernel, static_cast<unsigned>(sequences), 1, kSequenceThreads, stream, args);
  };
  switch (args.rule.ratio) {
    case Ratio::none: return go(sequence_coef_kernel<Ratio::none>);
    case Ratio::sequence: return go(sequence_coef_kernel<Ratio::sequence>);
    case Ratio::token: return go(sequence_coef_kernel<Ratio::token>);
  }
  return cudaErrorInvalidValue;
}

inline cudaError_t finish(const FinishArgs& args, int64_t rows, cudaStream_t stream) {
  return with_dtype(args.table.dtype, [&](auto table) {
    return launch(finish_kernel<decltype(table)>, static_cast<unsigned>(rows), 1, kFinishThreads,
                  stream, args);
  });
}

inline cudaError_t add_labels(const LabelsArgs& args, cudaStream_t stream) {
  constexpr int64_t kColumns = kFinishThreads * kFinishColumns;
  const auto parts = static_cast<unsigned>((args.table.cols + kColumns - 1) / kColumns);
  return with_dtype(args.table.dtype, [&](auto table) {
    return with_dtype(args.rows.dtype, [&](auto x) {
      return launch(add_labels_kernel<decltype(table), decltype(x)>,
                    static_cast<unsigned>(args.rows.rows), parts, kFinishThreads, stream, args);
    });
  });
}

// span: the columns of one.
inline cudaError_t merge_spans(const SpansArgs& args, int span, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((args.rows + kWarp - 1) / kWarp);
  return launch(merge_spans_kernel, blocks, 1, kMergeWarps * kWarp, stream, args, span);
}

}  // namespace lolkernels::cuda

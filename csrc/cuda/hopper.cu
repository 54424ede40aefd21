// The GEMM is CUTLASS's (TMA, wgmma, warp-specialised, persistent); its epilogue is ours.
#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>

#include <cutlass/epilogue/collective/detail.hpp>
#include <cutlass/epilogue/dispatch_policy.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "hopper.h"
#include "spans.cuh"

namespace lolkernels::cuda {
namespace {

using cute::_1;
using cute::_2;
using cute::_64;
using cute::Int;
using cute::Shape;
using Stride = cute::Stride<int64_t, _1, int64_t>;  // rows, elements of a row, batch

// What CUTLASS asks of an epilogue that loads nothing, in place of its store of D.
struct FinishSpans {
  using ElementC = void;
  using ElementD = cutlass::bfloat16_t;
  using ElementAccumulator = float;
  using ElementCompute = float;
  using StrideC = Stride;
  using StrideD = Stride;
  using DispatchPolicy = cutlass::gemm::EpilogueDefault;
  struct SharedStorage {};
  struct ThreadEpilogueOp {
    using ElementCompute = float;
  };
  using Arguments = SpansArgs;
  using Params = SpansArgs;

  const Params& params;

  CUTLASS_HOST_DEVICE FinishSpans(const Params& params) : params(params) {}

  template <class Problem>
  static Params to_underlying_arguments(const Problem&, const Arguments& args, void*) {
    return args;
  }
  template <class Problem>
  static size_t get_workspace_size(const Problem&, const Arguments&) {
    return 0;
  }
  template <class Problem>
  static cutlass::Status initialize_workspace(const Problem&, const Arguments&, void*, cudaStream_t,
                                              cutlass::CudaHostAdapter* = nullptr) {
    return cutlass::Status::kSuccess;
  }
  template <class Problem>
  static bool can_implement(const Problem&, const Arguments&) {
    return true;
  }

  template <class Problem, class Extent, class Place, class Engine, class Layout, class Mma,
            class Rest>
  CUTLASS_DEVICE void operator()(const Problem&, const Extent&, const Place& place,
                                 const cute::Tensor<Engine, Layout>& accumulators, const Mma&,
                                 const Rest&, int thread, char*) {
    // Of a thread: (pairs of columns, its two rows, groups of columns), one tile of 64 rows by one.
    constexpr int kHeld = cute::size<1>(Extent{}) / kQuad;
    static_assert(cute::size<0, 0>(Layout{}) == 2 && cute::size<0, 1>(Layout{}) == 2 &&
                  cute::size<0, 2>(Layout{}) == kHeld / 2 && cute::size<2>(Layout{}) == 1);
    const int64_t first = static_cast<int64_t>(cute::get<0>(place)) * cute::size<0>(Extent{});
    const int64_t span = cute::get<1>(place);
#pragma unroll
    for (int below = 0; below < cute::size<1>(Layout{}); ++below) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float x[kHeld];
#pragma unroll
        for (int i = 0; i < kHeld; ++i) {
          x[i] = accumulators(cute::make_coord(cute::make_coord(i % 2, half, i / 2), below, 0));
        }
        finish_span(params, first + 64 * below + held_row(thread, half), span, x);
      }
    }
  }
};

template <Tile kTile>
struct Gemm {
  static constexpr bool kTurns = kTile != Tile::m128n256;
  using Element = cutlass::bfloat16_t;
  using Extent =
      Shape<Int<kTile == Tile::m64n256 ? 64 : 128>, Int<kTile == Tile::m128n192 ? 192 : 256>, _64>;
  using Cluster = Shape<_2, _1, _1>;  // two tiles of rows share the columns' operand
  using Policy = cute::conditional_t<kTurns, cutlass::gemm::KernelTmaWarpSpecializedPingpong,
                                     cutlass::gemm::KernelTmaWarpSpecializedCooperative>;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, cutlass::layout::RowMajor, 8,
      Element, cutlass::layout::ColumnMajor, 8, float, Extent, Cluster,
      cutlass::gemm::collective::StageCountAutoCarveout<1024>, Policy>::CollectiveOp;
  using Epilogue =
      cutlass::epilogue::collective::detail::Sm90TmaWarpSpecializedAdapter<FinishSpans>;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape<int, int, int, int>, Mainloop, Epilogue,
                                                      cutlass::gemm::PersistentScheduler>;
  using Device = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;
};

template <Tile kTile>
cudaError_t run(const Matrix& hidden, const Matrix& weight, const SpansArgs& args,
                cudaStream_t stream) {
  using G = Gemm<kTile>;
  using Element = typename G::Element;
  cutlass::KernelHardwareInfo card;
  cudaError_t status = cudaGetDevice(&card.device_id);
  if (status != cudaSuccess) return status;
  status = cudaDeviceGetAttribute(&card.sm_count, cudaDevAttrMultiProcessorCount, card.device_id);
  if (status != cudaSuccess) return status;
  typename G::Device::Arguments arguments{
      cutlass::gemm::GemmUniversalMode::kGemm,
      {static_cast<int>(hidden.rows), static_cast<int>(weight.rows), static_cast<int>(hidden.cols),
       1},
      {static_cast<const Element*>(hidden.data),
       {hidden.row_stride, _1{}, 0},
       static_cast<const Element*>(weight.data),
       {weight.row_stride, _1{}, 0}},
      args,
      card};
  typename G::Device gemm;
  if (G::Device::get_workspace_size(arguments) != 0) return cudaErrorInvalidValue;
  if (G::Device::can_implement(arguments) != cutlass::Status::kSuccess)
    return cudaErrorInvalidValue;
  if (gemm.initialize(arguments, nullptr, stream) != cutlass::Status::kSuccess) {
    return cudaErrorInvalidConfiguration;
  }
  if (gemm.run(stream) != cutlass::Status::kSuccess) {
    status = cudaGetLastError();
    return status == cudaSuccess ? cudaErrorLaunchFailure : status;
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t linear_spans(const Matrix& hidden, const Matrix& weight, const SpansArgs& args,
                         Tile tile, cudaStream_t stream) {
  switch (tile) {
    case Tile::m128n256: return run<Tile::m128n256>(hidden, weight, args, stream);
    case Tile::m64n256: return run<Tile::m64n256>(hidden, weight, args, stream);
    case Tile::m128n192: return run<Tile::m128n192>(hidden, weight, args, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace lolkernels::cuda

// The epilogue of the Hopper GEMM and what follows it, behind plain C functions. The GEMM itself is
// left out: float32 products are handed to the warpgroups as wgmma would leave them.
#include "../../csrc/cuda/launch.cuh"

using namespace lolkernels;

namespace {

constexpr int kRows = 64, kThreads = 128;

// What TMA reads past the operands is zero.
template <int kHeld>
void finish_kernel(const SpansArgs args, const float* products, int64_t stride) {
  const int thread = static_cast<int>(threadIdx.x);
  for (int half = 0; half < 2; ++half) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + cuda::held_row(thread, half);
    const int64_t begin = static_cast<int64_t>(blockIdx.y) * kHeld * cuda::kQuad;
    float x[kHeld];
    for (int i = 0; i < kHeld; ++i) {
      const int64_t column = begin + cuda::held_column(thread, i);
      const bool inside = row < args.rows && column < args.cols;
      x[i] = inside ? products[row * stride + column] : 0.0f;
    }
    cuda::finish_span(args, row, blockIdx.y, x);
  }
}

}  // namespace

extern "C" {

void host_order(int reverse) { cuda_host::host_reverse = reverse != 0; }

// out: address (0: none), rows, cols, row_stride. sums: six rows of float32.
int host_linear_exps(const float* products, int64_t stride, const int64_t* out, float* parts,
                     const float* bias, const int64_t* labels, const float* anchor,
                     const double* map, int64_t span, float* sums) {
  const int64_t n = out[1];
  const SpansArgs args{reinterpret_cast<void*>(out[0]),
                       n,
                       out[2],
                       out[3],
                       bias,
                       {labels, 1},
                       {anchor, 1},
                       make_logit_map(map[0], map[1], map[2]),
                       parts,
                       sums,
                       sums + n,
                       sums + 2 * n,
                       sums + 3 * n,
                       sums + 4 * n,
                       sums + 5 * n};
  // One more of each: a GEMM's tiles may go beyond the matrix.
  const auto tiles = static_cast<unsigned>((n + kRows - 1) / kRows + 1);
  const auto spans = static_cast<unsigned>(cuda::span_count(out[2], static_cast<int>(span)) + 1);
  const cudaError_t status = cuda::launch(span == 192 ? finish_kernel<48> : finish_kernel<64>,
                                          tiles, spans, kThreads, nullptr, args, products, stride);
  if (status != cudaSuccess) return status;
  return cuda::merge_spans(args, static_cast<int>(span), nullptr);
}
}

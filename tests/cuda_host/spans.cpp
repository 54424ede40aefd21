// The epilogue of the Hopper GEMM and what follows it, behind plain C functions. The GEMM itself is
// left out: float32 products are handed to the warpgroups as wgmma would leave them.
#include "../../csrc/cuda/launch.cuh"

using namespace lolkernels;

namespace {

constexpr int kRows = 64, kThreads = 128;

// What TMA reads past the operands is zero.
template <typename Out>
void finish_kernel(const LinearSpansArgs args, const float* products, int64_t stride) {
  const int thread = static_cast<int>(threadIdx.x);
  for (int half = 0; half < 2; ++half) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * kRows + cuda::held_row(thread, half);
    float x[cuda::kHeld];
    for (int i = 0; i < cuda::kHeld; ++i) {
      const int64_t column =
          static_cast<int64_t>(blockIdx.y) * cuda::kSpan + cuda::held_column(thread, i);
      const bool inside = row < args.spans.rows && column < args.spans.cols;
      x[i] = inside ? products[row * stride + column] : 0.0f;
    }
    cuda::finish_span<Out>(args, row, blockIdx.y, x);
  }
}

Spans spans(const int64_t* s, float* parts) {
  return {reinterpret_cast<void*>(s[0]), static_cast<DType>(s[1]), s[2], s[3], s[4], parts};
}

template <typename T>
Vector<T> adjacent(const T* data) {
  return {data, 1};
}

}  // namespace

extern "C" {

void host_order(int reverse) { cuda_host::host_reverse = reverse != 0; }

// held: address (0: none), dtype, rows, cols, row_stride. result: five rows of float32.
int host_linear_spans(const float* products, int64_t stride, const int64_t* held, float* parts,
                      const float* bias, const int64_t* labels, const double* map, float* result) {
  const Spans s = spans(held, parts);
  float *target = result, *slope = result + 4 * s.rows;
  const LinearSpansArgs args{s,      bias, adjacent(labels), make_logit_map(map[0], map[1], map[2]),
                             target, slope};
  // One more of each: a GEMM's tiles may go beyond the matrix.
  const auto tiles = static_cast<unsigned>((s.rows + kRows - 1) / kRows + 1);
  const auto columns = static_cast<unsigned>(cuda::span_count(s.cols) + 1);
  const cudaError_t status = s.dtype == DType::bf16
                                 ? cuda::launch(finish_kernel<__nv_bfloat16>, tiles, columns,
                                                kThreads, nullptr, args, products, stride)
                                 : cuda::launch(finish_kernel<__half>, tiles, columns, kThreads,
                                                nullptr, args, products, stride);
  if (status != cudaSuccess) return status;
  return cuda::merge_spans(
      {s, adjacent(labels), target, result + s.rows, result + 2 * s.rows, result + 3 * s.rows},
      nullptr);
}

int host_span_dlogits(const int64_t* held, float* parts, const int64_t* labels, const float* target,
                      const float* slope, const float* lse, const float* coef, const double* map) {
  return cuda::span_dlogits(
      {spans(held, parts), adjacent(labels), adjacent(target), adjacent(slope), adjacent(lse),
       adjacent(coef), make_logit_map(map[0], map[1], map[2])},
      nullptr);
}
}

// The launches of csrc/cuda behind plain C functions, for ctypes. Compiled by g++ with this folder
// on the include path, where cuda_runtime.h stands in for CUDA.
#include "../../csrc/cuda/launch.cuh"

using namespace lolkernels;

namespace {

// address, dtype, rows, cols, row_stride, col_stride
Matrix matrix(const int64_t* m) {
  return {reinterpret_cast<void*>(m[0]), static_cast<DType>(m[1]), m[2], m[3], m[4], m[5]};
}

// address, stride
template <typename T>
Vector<T> vector(const int64_t* v) {
  return {reinterpret_cast<const T*>(v[0]), v[1]};
}

constexpr int kRows = 64, kThreads = 128;  // of a warpgroup

// The epilogue of the GEMM for Hopper, handed float32 products as wgmma would leave them. What TMA
// reads past the operands is zero.
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

#if !defined(SPANS_ALONE)  // quicker to compile
// sums: six rows of float32. anchor: address (0: none), stride.
int host_exps(const int64_t* logits, const int64_t* out, const int64_t* labels,
              const int64_t* anchor, const double* map, int aliased, float* const* sums,
              const float* bias) {
  return cuda::exps({matrix(logits), matrix(out), vector<int64_t>(labels), vector<float>(anchor),
                     make_logit_map(map[0], map[1], map[2]), sums[0], sums[1], sums[2], sums[3],
                     sums[4], sums[5], bias},
                    aliased != 0, nullptr);
}

int host_dlogits(const int64_t* logits, const int64_t* out, const int64_t* labels,
                 const int64_t* vectors, const double* map, int aliased, const int64_t* logps,
                 const float* bias) {
  return cuda::dlogits(
      {matrix(logits), matrix(out), vector<int64_t>(labels), vector<float>(vectors),
       vector<float>(vectors + 2), vector<float>(vectors + 4), vector<float>(vectors + 6),
       make_logit_map(map[0], map[1], map[2]), vector<float>(logps), bias},
      aliased != 0, nullptr);
}

int host_sequence_coef(const int64_t* logps, const int64_t* ref, const int64_t* cu,
                       const int64_t* weight, int64_t sequences, int64_t ratio, const double* rule,
                       float* loss, float* coef, float* log_ratio, float* clipped,
                       const int64_t* scale, int32_t* flags) {
  const SequenceRule family = {static_cast<Ratio>(ratio), rule[0], rule[1], rule[2]};
  return cuda::sequence_coef(
      {vector<float>(logps), ref[0] != 0, vector<float>(ref), vector<int64_t>(cu),
       vector<float>(weight), family, loss, coef, log_ratio, clipped, vector<float>(scale), flags},
      sequences, nullptr);
}

// labels: address, stride. sums, out: rows of float32. table: null without unit.
int host_finish(const int64_t* labels, int64_t rows, int64_t vocab, float* const* sums,
                float* const* out, int32_t* flags, float* unit, int64_t unit_stride,
                const int64_t* table) {
  FinishArgs args = {};
  args.labels = vector<int64_t>(labels), args.vocab = vocab, args.flags = flags;
  for (int i = 0; i < 6; ++i) args.sums[i] = sums[i];
  for (int i = 0; i < 8; ++i) args.out[i] = out[i];
  args.unit = unit, args.unit_stride = unit_stride;
  if (unit != nullptr) args.table = matrix(table);
  return cuda::finish(args, rows, nullptr);
}

// vectors: a and both (address 0: none), address and stride each.
int host_add_labels(const int64_t* table, const int64_t* rows, const int64_t* labels,
                    const int64_t* vectors, float* const* stats) {
  return cuda::add_labels(
      {matrix(table), matrix(rows), vector<int64_t>(labels), vector<float>(vectors),
       vector<float>(vectors + 2), stats[0], stats[1], stats[2]},
      nullptr);
}

// The grid a row count, a width and a batch make, for tests of the table of launches.
int host_threads(int64_t cols, int64_t columns) { return cuda::block_threads(cols, columns); }
#endif

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

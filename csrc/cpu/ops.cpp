// The CPU kernels as torch ops, through PyTorch's stable ABI: checks, allocation, threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <string>
#include <tuple>

#include "rows.h"
#include "sequences.h"

namespace lolkernels::cpu {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// Work below this many elements stays on one thread.
constexpr int64_t kGrain = 32768;

int64_t grain(int64_t rows, int64_t elements) {
  return rows == 0 ? 1 : 1 + kGrain * rows / (elements + 1);
}

DType row_dtype(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: break;
  }
  STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16 for the cpu backend");
}

Matrix matrix(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.is_cpu(), name, " must be a CPU tensor");
  STD_TORCH_CHECK(t.dim() == 2, name, " must have 2 dimensions, not ", t.dim());
  return {t.data_ptr(), row_dtype(t, name), t.size(0), t.size(1), t.stride(0), t.stride(1)};
}

template <typename T>
Vector<T> vector(const Tensor& t, const char* name, ScalarType dtype, int64_t size) {
  STD_TORCH_CHECK(t.is_cpu(), name, " must be a CPU tensor");
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, " must be ",
                  dtype == ScalarType::Long ? "int64" : "float32");
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == size, name, " must have shape (", size, ",)");
  return {static_cast<const T*>(t.data_ptr()), t.stride(0)};
}

LogitMap logit_map(double scale, double softcap, double temperature) {
  STD_TORCH_CHECK(std::isfinite(scale), "scale must be finite, not ", scale);
  STD_TORCH_CHECK(temperature > 0.0 && std::isfinite(temperature),
                  "temperature must be positive and finite, not ", temperature);
  STD_TORCH_CHECK(softcap >= 0.0 && std::isfinite(softcap),
                  "softcap must be positive and finite, or 0 for none, not ", softcap);
  return make_logit_map(scale, softcap, temperature);
}

Tensor new_float(const Tensor& like, int64_t size) {
  return torch::stable::new_empty(like, {size}, ScalarType::Float);
}

float* floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

Four row_stats(const Tensor& logits, const Tensor& labels, double scale, double softcap,
               double temperature) {
  const Matrix x = matrix(logits, "logits");
  const int64_t n = x.rows;
  const Vector<int64_t> y = vector<int64_t>(labels, "labels", ScalarType::Long, n);
  const LogitMap map = logit_map(scale, softcap, temperature);
  Four result{new_float(logits, n), new_float(logits, n), new_float(logits, n),
              new_float(logits, n)};
  const RowStatsArgs args{x,
                          y,
                          map,
                          floats(std::get<0>(result)),
                          floats(std::get<1>(result)),
                          floats(std::get<2>(result)),
                          floats(std::get<3>(result))};
  torch::stable::parallel_for(0, n, grain(n, n * x.cols), [&](int64_t begin, int64_t end) {
    row_kernels().row_stats(args, begin, end);
  });
  return result;
}

size_t item_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

bool same_view(const Matrix& x, const Matrix& y) {
  return x.data == y.data && x.dtype == y.dtype && x.row_stride == y.row_stride &&
         x.col_stride == y.col_stride;
}

// One past the last byte; an empty matrix has none.
const char* end_of(const Matrix& m) {
  const char* first = static_cast<const char*>(m.data);
  if (m.rows == 0 || m.cols == 0) return first;
  const int64_t last = (m.rows - 1) * m.row_stride + (m.cols - 1) * m.col_stride;
  return first + static_cast<size_t>(last + 1) * item_size(m.dtype);
}

bool disjoint(const Matrix& x, const Matrix& y) {
  return end_of(x) <= static_cast<const char*>(y.data) ||
         end_of(y) <= static_cast<const char*>(x.data);
}

// True where no two elements share memory. Conservative: exotic interleavings count as shared.
bool writes_once(const Matrix& m) {
  if (m.rows == 0 || m.cols == 0) return true;
  const int64_t row_span = m.rows == 1 ? 0 : (m.rows - 1) * m.row_stride;
  const int64_t col_span = m.cols == 1 ? 0 : (m.cols - 1) * m.col_stride;
  const bool rows_outside = m.rows == 1 || m.row_stride > col_span;
  const bool cols_outside = m.cols == 1 || m.col_stride > row_span;
  const bool distinct = (m.rows == 1 || m.row_stride > 0) && (m.cols == 1 || m.col_stride > 0);
  return distinct && (rows_outside || cols_outside);
}

void dlogits(const Tensor& logits, const Tensor& labels, const Tensor& lse, const Tensor& a,
             const Tensor& b, const Tensor& c, double scale, double softcap, double temperature,
             Tensor out) {
  const Matrix x = matrix(logits, "logits");
  const Matrix g = matrix(out, "out");
  const int64_t n = x.rows;
  STD_TORCH_CHECK(g.rows == n && g.cols == x.cols, "out must have the shape of logits");
  STD_TORCH_CHECK(writes_once(g), "out must not hold two elements in one place; pass a copy");
  STD_TORCH_CHECK(same_view(x, g) || disjoint(x, g),
                  "out must be logits itself or share no memory with it");
  const DlogitsArgs args{x,
                         g,
                         vector<int64_t>(labels, "labels", ScalarType::Long, n),
                         vector<float>(lse, "lse", ScalarType::Float, n),
                         vector<float>(a, "a", ScalarType::Float, n),
                         vector<float>(b, "b", ScalarType::Float, n),
                         vector<float>(c, "c", ScalarType::Float, n),
                         logit_map(scale, softcap, temperature)};
  torch::stable::parallel_for(0, n, grain(n, n * x.cols), [&](int64_t begin, int64_t end) {
    row_kernels().dlogits(args, begin, end);
  });
}

Four sequence_coef(const Tensor& logps, const std::optional<Tensor>& ref_logps,
                   const Tensor& cu_seqlens, const Tensor& weight, int64_t ratio, double log_low,
                   double log_high, double beta) {
  STD_TORCH_CHECK(logps.dim() == 1, "logps must have 1 dimension, not ", logps.dim());
  STD_TORCH_CHECK(weight.dim() == 1, "weight must have 1 dimension, not ", weight.dim());
  STD_TORCH_CHECK(ratio >= 0 && ratio <= 2, "ratio must be 0, 1 or 2, not ", ratio);
  STD_TORCH_CHECK(log_low <= log_high, "log_low must not exceed log_high");
  const int64_t n = logps.size(0), s = weight.size(0);
  SequencesArgs args;
  args.logps = vector<float>(logps, "logps", ScalarType::Float, n);
  args.has_ref = ref_logps.has_value();
  args.ref_logps = args.has_ref ? vector<float>(*ref_logps, "ref_logps", ScalarType::Float, n)
                                : Vector<float>{nullptr, 0};
  args.cu_seqlens = vector<int64_t>(cu_seqlens, "cu_seqlens", ScalarType::Long, s + 1);
  args.weight = vector<float>(weight, "weight", ScalarType::Float, s);
  args.rule = {static_cast<Ratio>(ratio), log_low, log_high, beta};
  STD_TORCH_CHECK(args.cu_seqlens[0] == 0 && args.cu_seqlens[s] == n,
                  "cu_seqlens must start at 0 and end at the number of tokens, ", n);
  for (int64_t i = 0; i < s; ++i) {
    STD_TORCH_CHECK(args.cu_seqlens[i] <= args.cu_seqlens[i + 1], "cu_seqlens must not decrease");
  }
  Four result{new_float(logps, s), new_float(logps, n), new_float(logps, s), new_float(logps, s)};
  args.loss = floats(std::get<0>(result));
  args.coef = floats(std::get<1>(result));
  args.log_ratio = floats(std::get<2>(result));
  args.clipped = floats(std::get<3>(result));
  torch::stable::parallel_for(0, s, grain(s, n), [&](int64_t begin, int64_t end) {
    sequence_coefficients(args, begin, end);
  });
  return result;
}

std::string cpu_isa() { return row_kernels().isa; }

}  // namespace
}  // namespace lolkernels::cpu

STABLE_TORCH_LIBRARY_IMPL(lolkernels, CPU, m) {
  m.impl("row_stats", TORCH_BOX(&lolkernels::cpu::row_stats));
  m.impl("dlogits", TORCH_BOX(&lolkernels::cpu::dlogits));
  m.impl("sequence_coef", TORCH_BOX(&lolkernels::cpu::sequence_coef));
}

STABLE_TORCH_LIBRARY_IMPL(lolkernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&lolkernels::cpu::cpu_isa));
}

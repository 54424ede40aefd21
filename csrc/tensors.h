// Tensors to the arguments of kernels, checked; through PyTorch's stable ABI.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "arguments.h"

namespace lolkernels {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Six = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

constexpr int kCpu = -1;  // as a device; any other number is that GPU

inline void check_device(const Tensor& t, const char* name, int device) {
  if (device == kCpu) {
    STD_TORCH_CHECK(t.is_cpu(), name, " must be a CPU tensor");
  } else {
    STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == device, name,
                    " must be on the GPU of the first argument, cuda:", device);
  }
}

inline DType row_dtype(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default: break;
  }
  STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16");
}

inline Matrix matrix(const Tensor& t, const char* name, int device) {
  check_device(t, name, device);
  STD_TORCH_CHECK(t.dim() == 2, name, " must have 2 dimensions, not ", t.dim());
  return {t.data_ptr(), row_dtype(t, name), t.size(0), t.size(1), t.stride(0), t.stride(1)};
}

template <typename T>
inline Vector<T> vector(const Tensor& t, const char* name, ScalarType dtype, int64_t size,
                        int device) {
  check_device(t, name, device);
  STD_TORCH_CHECK(t.scalar_type() == dtype, name, " must be ",
                  dtype == ScalarType::Long ? "int64" : "float32");
  STD_TORCH_CHECK(t.dim() == 1 && t.size(0) == size, name, " must have shape (", size, ",)");
  return {static_cast<const T*>(t.data_ptr()), t.stride(0)};
}

inline LogitMap logit_map(double scale, double softcap, double temperature) {
  STD_TORCH_CHECK(std::isfinite(scale), "scale must be finite, not ", scale);
  STD_TORCH_CHECK(temperature > 0.0 && std::isfinite(temperature),
                  "temperature must be positive and finite, not ", temperature);
  STD_TORCH_CHECK(softcap >= 0.0 && std::isfinite(softcap),
                  "softcap must be positive and finite, or 0 for none, not ", softcap);
  return make_logit_map(scale, softcap, temperature);
}

inline Tensor new_float(const Tensor& like, int64_t size) {
  return torch::stable::new_empty(like, {size}, ScalarType::Float);
}

inline float* floats(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

// What an op returns, of which the kernel writes the fields of its arguments.
template <typename Args>
Six new_sums(const Tensor& like, int64_t n, Args& args) {
  Six sums{new_float(like, n), new_float(like, n), new_float(like, n),
           new_float(like, n), new_float(like, n), new_float(like, n)};
  args.used = floats(std::get<0>(sums)), args.rest = floats(std::get<1>(sums));
  args.deviation = floats(std::get<2>(sums)), args.max_logit = floats(std::get<3>(sums));
  args.target_logit = floats(std::get<4>(sums)), args.slope = floats(std::get<5>(sums));
  return sums;
}

inline Four new_coefficients(const Tensor& like, int64_t n, int64_t s, SequencesArgs& args) {
  Four result{new_float(like, s), new_float(like, n), new_float(like, s), new_float(like, s)};
  args.loss = floats(std::get<0>(result)), args.coef = floats(std::get<1>(result));
  args.log_ratio = floats(std::get<2>(result)), args.clipped = floats(std::get<3>(result));
  return result;
}

// All but the flags and what is returned.
inline SequencesArgs sequences_args(const Tensor& logps, const std::optional<Tensor>& ref_logps,
                                    const Tensor& cu_seqlens, const Tensor& weight, int64_t ratio,
                                    double log_low, double log_high, double beta,
                                    const std::optional<Tensor>& scale, int device) {
  STD_TORCH_CHECK(logps.dim() == 1, "logps must have 1 dimension, not ", logps.dim());
  STD_TORCH_CHECK(weight.dim() == 1, "weight must have 1 dimension, not ", weight.dim());
  STD_TORCH_CHECK(ratio >= 0 && ratio <= 2, "ratio must be 0, 1 or 2, not ", ratio);
  STD_TORCH_CHECK(log_low <= log_high, "log_low must not exceed log_high");
  const int64_t n = logps.size(0), s = weight.size(0);
  const auto floats_of = [&](const Tensor& t, const char* name, int64_t size) {
    return vector<float>(t, name, ScalarType::Float, size, device);
  };
  SequencesArgs args{};
  args.logps = floats_of(logps, "logps", n);
  args.has_ref = ref_logps.has_value();
  if (ref_logps) args.ref_logps = floats_of(*ref_logps, "ref_logps", n);
  args.cu_seqlens = vector<int64_t>(cu_seqlens, "cu_seqlens", ScalarType::Long, s + 1, device);
  args.weight = floats_of(weight, "weight", s);
  args.rule = {static_cast<Ratio>(ratio), log_low, log_high, beta};
  if (scale) args.scale = floats_of(*scale, "scale", s);
  return args;
}

inline size_t item_size(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

inline bool same_view(const Matrix& x, const Matrix& y) {
  return x.data == y.data && x.dtype == y.dtype && x.row_stride == y.row_stride &&
         x.col_stride == y.col_stride;
}

// One past the last byte; an empty matrix has none.
inline const char* end_of(const Matrix& m) {
  const char* first = static_cast<const char*>(m.data);
  if (m.rows == 0 || m.cols == 0) return first;
  const int64_t last = (m.rows - 1) * m.row_stride + (m.cols - 1) * m.col_stride;
  return first + static_cast<size_t>(last + 1) * item_size(m.dtype);
}

inline bool disjoint(const Matrix& x, const Matrix& y) {
  return end_of(x) <= static_cast<const char*>(y.data) ||
         end_of(y) <= static_cast<const char*>(x.data);
}

// True where no two elements share memory. Conservative: exotic interleavings count as shared.
inline bool writes_once(const Matrix& m) {
  if (m.rows == 0 || m.cols == 0) return true;
  const int64_t row_span = m.rows == 1 ? 0 : (m.rows - 1) * m.row_stride;
  const int64_t col_span = m.cols == 1 ? 0 : (m.cols - 1) * m.col_stride;
  const bool rows_outside = m.rows == 1 || m.row_stride > col_span;
  const bool cols_outside = m.cols == 1 || m.col_stride > row_span;
  const bool distinct = (m.rows == 1 || m.row_stride > 0) && (m.cols == 1 || m.col_stride > 0);
  return distinct && (rows_outside || cols_outside);
}

}  // namespace lolkernels

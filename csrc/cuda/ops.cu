// The CUDA kernels as torch ops, through PyTorch's stable ABI: checks, allocation, device, stream.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <optional>

#include "../schemas.h"
#include "../tensors.h"
#include "launch.cuh"

namespace lolkernels::cuda {
namespace {

int gpu_of(const Tensor& t) {
  STD_TORCH_CHECK(t.is_cuda(), "the first argument must be a CUDA tensor");
  return t.get_device_index();
}

// The device of the first argument, made current, and torch's stream on it.
struct Here {
  int device;
  torch::stable::accelerator::DeviceGuard guard;
  cudaStream_t stream;

  explicit Here(const Tensor& first) : device(gpu_of(first)), guard(device) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
    stream = static_cast<cudaStream_t>(current);
  }
};

void check_launch(cudaError_t status) {
  STD_TORCH_CHECK(status == cudaSuccess, "CUDA: ", cudaGetErrorString(status));
}

void check_size(const Matrix& x) {
  STD_TORCH_CHECK(x.cols <= kMaxCols, "logits must have at most 2^30 columns, not ", x.cols);
  STD_TORCH_CHECK(x.rows < 1ll << 31, "logits must have less than 2^31 rows, not ", x.rows);
}

Four row_stats_op(const Tensor& logits, const Tensor& labels, double scale, double softcap,
                  double temperature) {
  const Here here(logits);
  const Matrix x = matrix(logits, "logits", here.device);
  const int64_t n = x.rows;
  check_size(x);
  const Vector<int64_t> y = vector<int64_t>(labels, "labels", ScalarType::Long, n, here.device);
  const LogitMap map = logit_map(scale, softcap, temperature);
  Four result{new_float(logits, n), new_float(logits, n), new_float(logits, n),
              new_float(logits, n)};
  if (n == 0) return result;
  check_launch(row_stats({x, y, map, floats(std::get<0>(result)), floats(std::get<1>(result)),
                          floats(std::get<2>(result)), floats(std::get<3>(result))},
                         here.stream));
  return result;
}

// out's rows begin where those of logits do, with narrower elements.
bool begins_with(const Matrix& x, const Matrix& out) {
  const int64_t x_size = item_size(x.dtype), out_size = item_size(out.dtype);
  const bool rows =
      x.rows == 1 || (x.row_stride * x_size == out.row_stride * out_size && x.row_stride >= x.cols);
  return x.data == out.data && out_size < x_size && rows && x.col_stride == 1 &&
         out.col_stride == 1;
}

void dlogits_op(const Tensor& logits, const Tensor& labels, const Tensor& lse, const Tensor& a,
                const Tensor& b, const Tensor& c, double scale, double softcap, double temperature,
                Tensor out) {
  const Here here(logits);
  const Matrix x = matrix(logits, "logits", here.device);
  const Matrix g = matrix(out, "out", here.device);
  const int64_t n = x.rows;
  check_size(x);
  STD_TORCH_CHECK(g.rows == n && g.cols == x.cols, "out must have the shape of logits");
  STD_TORCH_CHECK(writes_once(g), "out must not hold two elements in one place; pass a copy");
  const bool aliased = begins_with(x, g);
  STD_TORCH_CHECK(same_view(x, g) || disjoint(x, g) || aliased,
                  "out must be logits itself, share no memory with it, or hold narrower elements "
                  "in rows that begin where those of logits do");
  const auto floats_of = [&](const Tensor& t, const char* name) {
    return vector<float>(t, name, ScalarType::Float, n, here.device);
  };
  const DlogitsArgs args{x,
                         g,
                         vector<int64_t>(labels, "labels", ScalarType::Long, n, here.device),
                         floats_of(lse, "lse"),
                         floats_of(a, "a"),
                         floats_of(b, "b"),
                         floats_of(c, "c"),
                         logit_map(scale, softcap, temperature)};
  if (n == 0 || x.cols == 0) return;
  check_launch(dlogits(args, aliased, here.stream));
}

// The values of cu_seqlens are not looked at: that would wait for the device.
Four sequence_coef_op(const Tensor& logps, const std::optional<Tensor>& ref_logps,
                      const Tensor& cu_seqlens, const Tensor& weight, int64_t ratio, double log_low,
                      double log_high, double beta) {
  const Here here(logps);
  STD_TORCH_CHECK(logps.dim() == 1, "logps must have 1 dimension, not ", logps.dim());
  STD_TORCH_CHECK(weight.dim() == 1, "weight must have 1 dimension, not ", weight.dim());
  STD_TORCH_CHECK(ratio >= 0 && ratio <= 2, "ratio must be 0, 1 or 2, not ", ratio);
  STD_TORCH_CHECK(log_low <= log_high, "log_low must not exceed log_high");
  const int64_t n = logps.size(0), s = weight.size(0);
  const auto floats_of = [&](const Tensor& t, const char* name, int64_t size) {
    return vector<float>(t, name, ScalarType::Float, size, here.device);
  };
  SequencesArgs args;
  args.logps = floats_of(logps, "logps", n);
  args.has_ref = ref_logps.has_value();
  args.ref_logps = args.has_ref ? floats_of(*ref_logps, "ref_logps", n) : Vector<float>{nullptr, 0};
  args.cu_seqlens = vector<int64_t>(cu_seqlens, "cu_seqlens", ScalarType::Long, s + 1, here.device);
  args.weight = floats_of(weight, "weight", s);
  args.rule = {static_cast<Ratio>(ratio), log_low, log_high, beta};
  Four result{new_float(logps, s), new_float(logps, n), new_float(logps, s), new_float(logps, s)};
  args.loss = floats(std::get<0>(result));
  args.coef = floats(std::get<1>(result));
  args.log_ratio = floats(std::get<2>(result));
  args.clipped = floats(std::get<3>(result));
  if (s == 0) return result;
  check_launch(sequence_coef(args, s, here.stream));
  return result;
}

}  // namespace
}  // namespace lolkernels::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(lolkernels_cuda, m) { lolkernels::define_row_functions(m); }

STABLE_TORCH_LIBRARY_IMPL(lolkernels_cuda, CUDA, m) {
  using namespace lolkernels::cuda;
  m.impl("row_stats", TORCH_BOX(&row_stats_op));
  m.impl("dlogits", TORCH_BOX(&dlogits_op));
  m.impl("sequence_coef", TORCH_BOX(&sequence_coef_op));
}

// The CUDA kernels as torch ops, through PyTorch's stable ABI: checks, allocation, device, stream.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "../schemas.h"
#include "../tensors.h"
#include "hopper.h"
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

// out's rows begin where those of logits do, with narrower elements.
bool begins_with(const Matrix& x, const Matrix& out) {
  const int64_t x_size = item_size(x.dtype), out_size = item_size(out.dtype);
  const bool rows =
      x.rows == 1 || (x.row_stride * x_size == out.row_stride * out_size && x.row_stride >= x.cols);
  return x.data == out.data && out_size < x_size && rows && x.col_stride == 1 &&
         out.col_stride == 1;
}

// Whether that is so; out may also be logits itself, or share no memory with it.
bool check_out(const Matrix& x, const Matrix& out) {
  check_size(x);
  STD_TORCH_CHECK(out.rows == x.rows && out.cols == x.cols, "out must have the shape of logits");
  STD_TORCH_CHECK(writes_once(out), "out must not hold two elements in one place; pass a copy");
  const bool aliased = begins_with(x, out);
  STD_TORCH_CHECK(same_view(x, out) || disjoint(x, out) || aliased,
                  "out must be logits itself, share no memory with it, or hold narrower elements "
                  "in rows that begin where those of logits do");
  return aliased;
}

// (cols,) float32, or null.
const float* bias_of(const std::optional<Tensor>& bias, int64_t cols, int device) {
  if (!bias) return nullptr;
  const Vector<float> given = vector<float>(*bias, "bias", ScalarType::Float, cols, device);
  STD_TORCH_CHECK(given.stride == 1 || cols == 1, "bias must be contiguous");
  return given.data;
}

Six exps_op(const Tensor& logits, const Tensor& labels, const std::optional<Tensor>& anchor,
            double scale, double softcap, double temperature, const std::optional<Tensor>& out,
            const std::optional<Tensor>& bias) {
  const Here here(logits);
  const Matrix x = matrix(logits, "logits", here.device);
  check_size(x);
  ExpsArgs args = {};
  args.logits = x;
  if (out) args.out = matrix(*out, "out", here.device);
  const bool aliased = out && check_out(x, args.out);
  const int64_t n = x.rows;
  args.labels = vector<int64_t>(labels, "labels", ScalarType::Long, n, here.device);
  if (anchor) args.anchor = vector<float>(*anchor, "anchor", ScalarType::Float, n, here.device);
  args.map = logit_map(scale, softcap, temperature);
  args.bias = bias_of(bias, x.cols, here.device);
  const Six sums = new_sums(logits, n, args);
  if (n > 0) check_launch(exps(args, aliased, here.stream));
  return sums;
}

void dlogits_op(const Tensor& logits, const Tensor& labels, const Tensor& lse, const Tensor& a,
                const Tensor& b, const Tensor& c, double scale, double softcap, double temperature,
                Tensor out, const std::optional<Tensor>& logps, const std::optional<Tensor>& bias) {
  const Here here(logits);
  const Matrix x = matrix(logits, "logits", here.device);
  const Matrix g = matrix(out, "out", here.device);
  const int64_t n = x.rows;
  const bool aliased = check_out(x, g);
  const auto floats_of = [&](const Tensor& t, const char* name) {
    return vector<float>(t, name, ScalarType::Float, n, here.device);
  };
  DlogitsArgs args{x,
                   g,
                   vector<int64_t>(labels, "labels", ScalarType::Long, n, here.device),
                   floats_of(lse, "lse"),
                   floats_of(a, "a"),
                   floats_of(b, "b"),
                   floats_of(c, "c"),
                   logit_map(scale, softcap, temperature)};
  if (logps) args.logps = floats_of(*logps, "logps");
  args.bias = bias_of(bias, x.cols, here.device);
  if (n == 0 || x.cols == 0) return;
  check_launch(dlogits(args, aliased, here.stream));
}

// () int32, or null.
int32_t* flag_word(const std::optional<Tensor>& flags, int device) {
  if (!flags) return nullptr;
  check_device(*flags, "flags", device);
  STD_TORCH_CHECK(flags->scalar_type() == ScalarType::Int && flags->numel() == 1,
                  "flags must be one int32");
  return static_cast<int32_t*>(flags->mutable_data_ptr());
}

// The values of cu_seqlens are not looked at: that would wait for the device.
Four sequence_coef_op(const Tensor& logps, const std::optional<Tensor>& ref_logps,
                      const Tensor& cu_seqlens, const Tensor& weight, int64_t ratio, double log_low,
                      double log_high, double beta, const std::optional<Tensor>& scale,
                      const std::optional<Tensor>& flags) {
  const Here here(logps);
  SequencesArgs args = sequences_args(logps, ref_logps, cu_seqlens, weight, ratio, log_low,
                                      log_high, beta, scale, here.device);
  args.flags = flag_word(flags, here.device);
  const int64_t n = logps.size(0), s = weight.size(0);
  const Four result = new_coefficients(logps, n, s, args);
  if (s > 0) check_launch(sequence_coef(args, s, here.stream));
  return result;
}

float* row_floats(const Tensor& t, const char* name, int64_t n, int device) {
  const Vector<float> v = vector<float>(t, name, ScalarType::Float, n, device);
  STD_TORCH_CHECK(n < 2 || v.stride == 1, name, " must be contiguous");
  return const_cast<float*>(v.data);
}

void finish_op(const Tensor& labels, int64_t vocab, const std::vector<Tensor>& sums,
               const std::vector<Tensor>& out, const std::optional<Tensor>& flags,
               const std::optional<Tensor>& unit, const std::optional<Tensor>& table) {
  const Here here(labels);
  STD_TORCH_CHECK(labels.dim() == 1, "labels must have 1 dimension, not ", labels.dim());
  STD_TORCH_CHECK(sums.size() == 6 && out.size() == 8, "sums must be 6 tensors, and out 8");
  const int64_t n = labels.size(0);
  FinishArgs args = {};
  args.labels = vector<int64_t>(labels, "labels", ScalarType::Long, n, here.device);
  args.vocab = vocab;
  for (int i = 0; i < 6; ++i) args.sums[i] = row_floats(sums[i], "sums", n, here.device);
  for (int i = 0; i < 8; ++i) args.out[i] = row_floats(out[i], "out", n, here.device);
  args.flags = flag_word(flags, here.device);
  args.table.dtype = DType::f32;
  if (unit) {
    STD_TORCH_CHECK(table.has_value(), "unit needs the table");
    const Matrix u = matrix(*unit, "unit", here.device);
    args.table = matrix(*table, "table", here.device);
    STD_TORCH_CHECK(u.dtype == DType::f32 && u.rows == n && u.cols == args.table.cols &&
                        (u.cols < 2 || u.col_stride == 1) && writes_once(u),
                    "unit must be (n, D) float32 with rows of adjacent elements");
    STD_TORCH_CHECK(args.table.rows == vocab && vocab > 0, "table must be (vocab, D)");
    args.unit = static_cast<float*>(u.data), args.unit_stride = u.row_stride;
  }
  if (n > 0) check_launch(finish(args, n, here.stream));
}

void add_labels_op(const Tensor& table, const Tensor& labels, const Tensor& rows, const Tensor& a,
                   const std::optional<Tensor>& both, const Tensor& logps, const Tensor& rest,
                   const Tensor& slope) {
  const Here here(table);
  LabelsArgs args = {};
  args.table = matrix(table, "table", here.device);
  args.rows = matrix(rows, "rows", here.device);
  const int64_t n = args.rows.rows;
  STD_TORCH_CHECK(args.rows.cols == args.table.cols,
                  "rows (n, D) and table (V, D) must have one D");
  STD_TORCH_CHECK(writes_once(args.table), "table must not hold two elements in one place");
  check_size(args.rows);
  args.labels = vector<int64_t>(labels, "labels", ScalarType::Long, n, here.device);
  args.a = vector<float>(a, "a", ScalarType::Float, n, here.device);
  if (both) args.both = vector<float>(*both, "both", ScalarType::Float, n, here.device);
  args.logps = row_floats(logps, "logps", n, here.device);
  args.rest = row_floats(rest, "rest", n, here.device);
  args.slope = row_floats(slope, "slope", n, here.device);
  if (n > 0 && args.rows.cols > 0) check_launch(add_labels(args, here.stream));
}

#if defined(LOLKERNELS_HOPPER)
// bfloat16, neighbouring elements, rows from aligned addresses: what TMA loads and a pack of 16
// bytes stores.
Matrix aligned_rows(const Tensor& t, const char* name, int device) {
  const Matrix m = matrix(t, name, device);
  STD_TORCH_CHECK(m.dtype == DType::bf16, name, " must be bfloat16");
  const bool rows = m.rows < 2 || (m.row_stride >= m.cols && m.row_stride % 8 == 0);
  STD_TORCH_CHECK(
      (m.cols < 2 || m.col_stride == 1) && rows && reinterpret_cast<uintptr_t>(m.data) % 16 == 0,
      name, " must have rows of adjacent elements that start at multiples of 16 bytes");
  STD_TORCH_CHECK(m.rows < 1ll << 31 && m.cols <= kMaxCols, name,
                  " must have less than 2^31 rows and at most 2^30 columns");
  return m;
}

Six linear_exps_op(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
                   const Tensor& labels, const Tensor& anchor, const std::optional<Tensor>& out,
                   double scale, double softcap, double temperature, int64_t tile) {
  const Here here(hidden);
  Matrix h = aligned_rows(hidden, "hidden", here.device);
  Matrix w = aligned_rows(weight, "weight", here.device);
  STD_TORCH_CHECK(tile >= 0 && tile < kTiles, "tile must be 0, 1 or 2, not ", tile);
  const Tile shape = static_cast<Tile>(tile);
  const int span = span_of(shape);
  const int64_t n = h.rows, cols = w.rows, spans = span_count(cols, span);
  STD_TORCH_CHECK(h.cols == w.cols && h.cols > 0 && cols > 0,
                  "hidden (n, D) and weight (V, D) must have one D, and D and V be positive");
  STD_TORCH_CHECK(h.cols % 8 == 0, "hidden must have a multiple of 8 columns, not ", h.cols);
  STD_TORCH_CHECK(cols <= kMaxCols, "weight must have at most 2^30 rows, not ", cols);
  if (n < 2) h.row_stride = h.cols;  // of a single row it may be any number
  if (cols < 2) w.row_stride = w.cols;
  SpansArgs args = {};
  args.rows = n, args.cols = cols;
  args.labels = vector<int64_t>(labels, "labels", ScalarType::Long, n, here.device);
  args.anchor = vector<float>(anchor, "anchor", ScalarType::Float, n, here.device);
  if (bias.has_value()) {
    const auto b = vector<float>(*bias, "bias", ScalarType::Float, spans * span, here.device);
    STD_TORCH_CHECK(b.stride == 1, "bias must be contiguous");
    args.bias = b.data;
  }
  args.map = logit_map(scale, softcap, temperature);
  if (out.has_value()) {
    const Matrix e = aligned_rows(*out, "out", here.device);
    STD_TORCH_CHECK(e.rows == n && e.cols == cols, "out must be (n, V)");
    STD_TORCH_CHECK(e.row_stride >= (cols + 7) / 8 * 8,
                    "out's rows must have room for a multiple of 8 columns");
    STD_TORCH_CHECK(disjoint(h, e) && disjoint(w, e),
                    "out must share no memory with hidden or weight");
    args.out = e.data, args.row_stride = e.row_stride;
  }
  const Six sums = new_sums(hidden, n, args);
  if (n == 0) return sums;
  const Tensor parts = torch::stable::new_empty(hidden, {3, spans, n}, ScalarType::Float);
  args.parts = floats(parts);
  check_launch(linear_spans(h, w, args, shape, here.stream));
  check_launch(merge_spans(args, span, here.stream));
  return sums;
}
#endif

}  // namespace
}  // namespace lolkernels::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(lolkernels_cuda, m) {
  lolkernels::define_row_functions(m);
  // sums as exps gives them; out: the statistics, each (n,); see lolkernels/backends/finish.py
  m.def(
      "finish(Tensor labels, int vocab, Tensor[] sums, Tensor(a!)[] out, Tensor(b!)? flags,"
      " Tensor(c!)? unit, Tensor? table) -> ()");
  m.def(
      "add_labels(Tensor(a!) table, Tensor labels, Tensor rows, Tensor a, Tensor? both,"
      " Tensor logps, Tensor rest, Tensor slope) -> ()");
#if defined(LOLKERNELS_HOPPER)
  // as exps; bias (ceil(V / S) S,) float32 with the tile's S columns, out (n, V) bfloat16
  m.def(
      "linear_exps(Tensor hidden, Tensor weight, Tensor? bias, Tensor labels, Tensor anchor,"
      " Tensor(a!)? out, float scale, float softcap, float temperature, int tile)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
#endif
}

STABLE_TORCH_LIBRARY_IMPL(lolkernels_cuda, CUDA, m) {
  using namespace lolkernels::cuda;
  m.impl("exps", TORCH_BOX(&exps_op));
  m.impl("dlogits", TORCH_BOX(&dlogits_op));
  m.impl("sequence_coef", TORCH_BOX(&sequence_coef_op));
  m.impl("finish", TORCH_BOX(&finish_op));
  m.impl("add_labels", TORCH_BOX(&add_labels_op));
#if defined(LOLKERNELS_HOPPER)
  m.impl("linear_exps", TORCH_BOX(&linear_exps_op));
#endif
}

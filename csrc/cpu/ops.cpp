// The CPU kernels as torch ops, through PyTorch's stable ABI: checks, allocation, threads.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <string>

#include "../tensors.h"
#include "rows.h"
#include "sequences.h"

namespace lolkernels::cpu {
namespace {

// Work below this many elements stays on one thread.
constexpr int64_t kGrain = 32768;

int64_t grain(int64_t rows, int64_t elements) {
  return rows == 0 ? 1 : 1 + kGrain * rows / (elements + 1);
}

Matrix matrix_like(const Matrix& x, const Tensor& out) {
  const Matrix g = matrix(out, "out", kCpu);
  STD_TORCH_CHECK(g.rows == x.rows && g.cols == x.cols, "out must have the shape of logits");
  STD_TORCH_CHECK(writes_once(g), "out must not hold two elements in one place; pass a copy");
  STD_TORCH_CHECK(same_view(x, g) || disjoint(x, g),
                  "out must be logits itself or share no memory with it");
  return g;
}

void refuse(const std::optional<Tensor>& bias) {
  STD_TORCH_CHECK(!bias, "bias is for a GPU: on a CPU the caller adds it to panels in cache");
}

Six exps(const Tensor& logits, const Tensor& labels, const std::optional<Tensor>& anchor,
         double scale, double softcap, double temperature, const std::optional<Tensor>& out,
         const std::optional<Tensor>& bias) {
  refuse(bias);
  const Matrix x = matrix(logits, "logits", kCpu);
  const int64_t n = x.rows;
  ExpsArgs args{};
  args.logits = x;
  if (out) args.out = matrix_like(x, *out);
  args.labels = vector<int64_t>(labels, "labels", ScalarType::Long, n, kCpu);
  if (anchor) args.anchor = vector<float>(*anchor, "anchor", ScalarType::Float, n, kCpu);
  args.map = logit_map(scale, softcap, temperature);
  const Six result = new_sums(logits, n, args);
  torch::stable::parallel_for(0, n, grain(n, n * x.cols), [&](int64_t begin, int64_t end) {
    row_kernels().exps(args, begin, end);
  });
  return result;
}

void dlogits(const Tensor& logits, const Tensor& labels, const Tensor& lse, const Tensor& a,
             const Tensor& b, const Tensor& c, double scale, double softcap, double temperature,
             Tensor out, const std::optional<Tensor>& logps, const std::optional<Tensor>& bias) {
  refuse(bias);
  const Matrix x = matrix(logits, "logits", kCpu);
  const int64_t n = x.rows;
  DlogitsArgs args{x,
                   matrix_like(x, out),
                   vector<int64_t>(labels, "labels", ScalarType::Long, n, kCpu),
                   vector<float>(lse, "lse", ScalarType::Float, n, kCpu),
                   vector<float>(a, "a", ScalarType::Float, n, kCpu),
                   vector<float>(b, "b", ScalarType::Float, n, kCpu),
                   vector<float>(c, "c", ScalarType::Float, n, kCpu),
                   logit_map(scale, softcap, temperature)};
  if (logps) args.logps = vector<float>(*logps, "logps", ScalarType::Float, n, kCpu);
  torch::stable::parallel_for(0, n, grain(n, n * x.cols), [&](int64_t begin, int64_t end) {
    row_kernels().dlogits(args, begin, end);
  });
}

Four sequence_coef(const Tensor& logps, const std::optional<Tensor>& ref_logps,
                   const Tensor& cu_seqlens, const Tensor& weight, int64_t ratio, double log_low,
                   double log_high, double beta, const std::optional<Tensor>& scale,
                   const std::optional<Tensor>& flags) {
  STD_TORCH_CHECK(!flags, "flags are for a GPU: on a CPU the caller looks at the inputs");
  SequencesArgs args = sequences_args(logps, ref_logps, cu_seqlens, weight, ratio, log_low,
                                      log_high, beta, scale, kCpu);
  const int64_t n = logps.size(0), s = weight.size(0);
  STD_TORCH_CHECK(args.cu_seqlens[0] == 0 && args.cu_seqlens[s] == n,
                  "cu_seqlens must start at 0 and end at the number of tokens, ", n);
  for (int64_t i = 0; i < s; ++i) {
    STD_TORCH_CHECK(args.cu_seqlens[i] <= args.cu_seqlens[i + 1], "cu_seqlens must not decrease");
  }
  const Four result = new_coefficients(logps, n, s, args);
  torch::stable::parallel_for(0, s, grain(s, n), [&](int64_t begin, int64_t end) {
    sequence_coefficients(args, begin, end);
  });
  return result;
}

std::string cpu_isa() { return row_kernels().isa; }

}  // namespace
}  // namespace lolkernels::cpu

STABLE_TORCH_LIBRARY_IMPL(lolkernels, CPU, m) {
  m.impl("exps", TORCH_BOX(&lolkernels::cpu::exps));
  m.impl("dlogits", TORCH_BOX(&lolkernels::cpu::dlogits));
  m.impl("sequence_coef", TORCH_BOX(&lolkernels::cpu::sequence_coef));
}

STABLE_TORCH_LIBRARY_IMPL(lolkernels, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&lolkernels::cpu::cpu_isa));
}

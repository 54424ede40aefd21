// What the kernels of every device take: plain memory, without torch.
#pragma once

#include <cstdint>

#include "contract.h"

namespace lolkernels {

enum class DType { f32, bf16, f16 };

// Strides are in elements and may be any non-negative number.
struct Matrix {
  void* data;
  DType dtype;
  int64_t rows, cols;
  int64_t row_stride, col_stride;
};

template <typename T>
struct Vector {
  const T* data;
  int64_t stride;
  LOL_MEMBER const T& operator[](int64_t i) const { return data[i * stride]; }
};

struct ExpsArgs {
  Matrix logits;
  Matrix out;              // as in DlogitsArgs, or without data: the sums only
  Vector<int64_t> labels;  // outside [0, cols): no target in these columns
  Vector<float> anchor;    // null: the label's own logit + kShift
  LogitMap map;
  float *used, *rest, *deviation, *max_logit, *target_logit, *slope;
  const float* bias = nullptr;  // (cols,), added to the logits; whole rows on a GPU only
};

struct DlogitsArgs {
  Matrix logits;
  Matrix out;  // the same view as logits, or disjoint memory of the same shape; see cuda/rows.cuh
  Vector<int64_t> labels;
  Vector<float> lse, a, b, c;
  LogitMap map;
  Vector<float> logps = {nullptr, 0};  // null: z - lse at the label, without digits for p near 1
  const float* bias = nullptr;         // as in ExpsArgs
};

// What exps leaves, made by a GEMM: x = hidden weight^T + bias in spans of columns, E of bfloat16.
struct SpansArgs {
  void* out;  // (rows, cols), or null: the sums only
  int64_t rows, cols, row_stride;
  const float* bias;  // of whole spans, or null
  Vector<int64_t> labels;
  Vector<float> anchor;
  LogitMap map;
  float* parts;  // (3, spans, rows): the maximum, sum and deviation of each row and span
  float *used, *rest, *deviation, *max_logit, *target_logit, *slope;
};

// Vectors of a GPU's rows are contiguous but for those with a stride.
struct FinishArgs {
  Vector<int64_t> labels;
  int64_t vocab;
  const float* sums[6];  // of ExpsArgs
  float* out[8];         // logps, lse, entropy, max_logit, target_logit, slope, rest, share
  int32_t* flags;        // a label outside [0, vocab) sets kBadLabel and spoils its row; or null
  float* unit;           // (rows, table.cols), or null
  int64_t unit_stride;
  Matrix table;  // (vocab, D)
};

struct LabelsArgs {
  Matrix table;  // (V, D), added to
  Matrix rows;   // (n, D)
  Vector<int64_t> labels;
  Vector<float> a, both;  // both: null where it is zero
  const float *logps, *rest, *slope;
};

struct SequencesArgs {
  Vector<float> logps;
  bool has_ref;  // without one the reference log-probs are 0
  Vector<float> ref_logps;
  Vector<int64_t> cu_seqlens;
  Vector<float> weight;
  SequenceRule rule;
  float *loss, *coef, *log_ratio, *clipped;
  Vector<float> scale = {nullptr, 0};  // of the coefficients of a sequence; null: 1
  int32_t* flags = nullptr;            // a nan among ref_logps and weight sets kNanInput; or null
};

constexpr int32_t kBadLabel = 1, kNanInput = 2;

}  // namespace lolkernels

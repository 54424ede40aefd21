// Row kernels on plain memory, without torch: the sanitizer harness links exactly these.
#pragma once

#include <cstdint>

#include "../contract.h"

namespace lolkernels::cpu {

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
  const T& operator[](int64_t i) const { return data[i * stride]; }
};

struct RowStatsArgs {
  Matrix logits;
  Vector<int64_t> labels;  // outside [0, cols): no target in these columns
  LogitMap map;
  float *target_logit, *lse, *expected_logit, *max_logit;
};

struct DlogitsArgs {
  Matrix logits;
  Matrix out;  // the same view as logits, or disjoint memory of the same shape
  Vector<int64_t> labels;
  Vector<float> lse, a, b, c;
  LogitMap map;
};

// Both functions handle rows [begin, end). A row's result depends on that row alone.
struct RowKernels {
  const char* isa;
  void (*row_stats)(const RowStatsArgs&, int64_t begin, int64_t end);
  void (*dlogits)(const DlogitsArgs&, int64_t begin, int64_t end);
};

extern const RowKernels baseline_kernels;
#if defined(__x86_64__)
extern const RowKernels avx2_kernels;
extern const RowKernels avx512_kernels;
#endif

// The best set this machine can run.
const RowKernels& row_kernels();

}  // namespace lolkernels::cpu

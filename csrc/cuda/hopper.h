// A GEMM for NVIDIA's Hopper whose epilogue is finish_span: the logits of a linear head are seen in
// registers only. In a translation unit of its own, for sm_90a alone.
#pragma once

#include <cuda_runtime.h>

#include "../arguments.h"

namespace lolkernels::cuda {

// How the tiles are shared out: two warpgroups work on one tile of 128 rows, or take turns with
// tiles of 64, so that one multiplies while the other finishes.
enum class Schedule : int64_t { cooperative = 0, pingpong = 1 };

// hidden (n, D), weight (V, D): one half-precision dtype, rows of neighbouring elements that start
// at multiples of 16 bytes. At least one row, column and element.
cudaError_t linear_spans(const Matrix& hidden, const Matrix& weight, const LinearSpansArgs& args,
                         Schedule schedule, cudaStream_t stream);

}  // namespace lolkernels::cuda

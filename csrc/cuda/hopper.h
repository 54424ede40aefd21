// A GEMM for NVIDIA's Hopper whose epilogue is finish_span: the logits of a linear head are seen in
// registers only. In a translation unit of its own, for sm_90a alone.
#pragma once

#include <cuda_runtime.h>

#include "../arguments.h"

namespace lolkernels::cuda {

// Rows and columns of a tile. Two warpgroups work together on one of 128 x 256, or take turns with
// the others, so that one multiplies while the other finishes.
enum class Tile : int64_t { m128n256 = 0, m64n256 = 1, m128n192 = 2 };
constexpr int64_t kTiles = 3;

inline int span_of(Tile tile) { return tile == Tile::m128n192 ? 192 : 256; }

// hidden (n, D), weight (V, D): bfloat16, rows of neighbouring elements that start at multiples of
// 16 bytes. At least one row, column and element. What finish_span makes of them; merge_spans is to
// follow.
cudaError_t linear_spans(const Matrix& hidden, const Matrix& weight, const SpansArgs& args,
                         Tile tile, cudaStream_t stream);

}  // namespace lolkernels::cuda

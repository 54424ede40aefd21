// The coefficient kernel of the A-LoL family on plain memory, without torch.
#pragma once

#include "rows.h"

namespace lolkernels::cpu {

struct SequencesArgs {
  Vector<float> logps;
  bool has_ref;  // without one the reference log-probs are 0
  Vector<float> ref_logps;
  Vector<int64_t> cu_seqlens;
  Vector<float> weight;
  SequenceRule rule;
  float *loss, *coef, *log_ratio, *clipped;
};

// Handles sequences [begin, end); sums are in double, in token order.
void sequence_coefficients(const SequencesArgs&, int64_t begin, int64_t end);

}  // namespace lolkernels::cpu

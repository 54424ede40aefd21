// The coefficient kernel of the A-LoL family on plain memory, without torch.
#pragma once

#include "rows.h"

namespace lolkernels::cpu {

// Handles sequences [begin, end); sums are in double, in token order.
void sequence_coefficients(const SequencesArgs&, int64_t begin, int64_t end);

}  // namespace lolkernels::cpu

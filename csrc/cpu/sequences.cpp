#include "sequences.h"

namespace lolkernels::cpu {

void sequence_coefficients(const SequencesArgs& args, int64_t begin, int64_t end) {
  const SequenceRule& rule = args.rule;
  for (int64_t s = begin; s < end; ++s) {
    const int64_t first = args.cu_seqlens[s], last = args.cu_seqlens[s + 1];
    const double weight = args.weight[s], scale = args.scale.data ? args.scale[s] : 1.0f;
    const auto log_ratio_at = [&](int64_t t) {
      const double l = args.logps[t];
      return args.has_ref ? l - static_cast<double>(args.ref_logps[t]) : l;
    };

    double log_ratio = 0.0;
    for (int64_t t = first; t < last; ++t) log_ratio += log_ratio_at(t);

    const bool per_sequence = rule.ratio == Ratio::sequence;
    const bool per_token = rule.ratio == Ratio::token;
    const double shared = per_sequence ? clipped_ratio(log_ratio, rule) : 1.0;
    int64_t outside_count = per_sequence && outside(log_ratio, rule) ? last - first : 0;
    double weighted = 0.0;
    for (int64_t t = first; t < last; ++t) {
      double w = shared;
      if (per_token) {
        const double token_log_ratio = log_ratio_at(t);
        w = clipped_ratio(token_log_ratio, rule);
        outside_count += outside(token_log_ratio, rule);
      }
      weighted += w * static_cast<double>(args.logps[t]);
      args.coef[t] = static_cast<float>(scale * sequence_coefficient(weight, w, rule));
    }

    const bool empty = last == first;
    const double loss = empty ? 0.0 : sequence_loss(weight, weighted, log_ratio, rule);
    const double length = static_cast<double>(last - first);
    args.loss[s] = static_cast<float>(loss);
    args.log_ratio[s] = static_cast<float>(log_ratio);
    args.clipped[s] =
        empty ? 0.0f : static_cast<float>(static_cast<double>(outside_count) / length);
  }
}

}  // namespace lolkernels::cpu

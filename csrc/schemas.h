// The row functions' schemas, which every compiled backend registers in a namespace of its own:
// each shared object can be loaded alone.
#pragma once

namespace lolkernels {

template <typename Library>
void define_row_functions(Library& m) {
  // -> anchor, rest, deviation, max_logit, target_logit, slope, each (n,) float32; out may be
  // logits itself: the exponentials then take its place; without one they are not written. A GPU
  // adds bias (V,) to the logits; on a CPU that is the caller's.
  m.def(
      "exps(Tensor logits, Tensor labels, Tensor? anchor, float scale=1, float softcap=0,"
      " float temperature=1, *, Tensor(a!)? out, Tensor? bias=None)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  // out may be logits itself: the gradient then takes its place.
  m.def(
      "dlogits(Tensor logits, Tensor labels, Tensor lse, Tensor a, Tensor b, Tensor c,"
      " float scale=1, float softcap=0, float temperature=1, *, Tensor(a!) out, Tensor? logps=None,"
      " Tensor? bias=None) -> ()");
  // -> loss (s,), coef (n,), log_ratio (s,), clipped (s,), all float32
  m.def(
      "sequence_coef(Tensor logps, Tensor? ref_logps, Tensor cu_seqlens, Tensor weight, int ratio,"
      " float log_low, float log_high, float beta, Tensor? scale=None, Tensor? flags=None)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
}

}  // namespace lolkernels

// Host code that asks CUTLASS where wgmma's accumulators lie, and compares with what finish_span
// believes. Prints a line a GEMM: its schedule, its stages and its bytes of shared memory.
#include <cstdio>

#include "../csrc/cuda/hopper.cu"

namespace lolkernels::cuda {

template <Schedule kSchedule>
bool check(const char* name) {
  using G = Gemm<__nv_bfloat16, kSchedule>;
  typename G::Mainloop::TiledMma mma;
  const auto tile = cute::make_identity_tensor(
      cute::make_shape(cute::size<0>(typename G::Tile{}), cute::size<1>(typename G::Tile{})));
  for (int thread = 0; thread < static_cast<int>(cute::size(mma)); ++thread) {
    const auto mine = mma.get_slice(thread).partition_C(tile);
    if (cute::size(mine) != 2 * kHeld) return false;
    for (int half = 0; half < 2; ++half) {
      for (int i = 0; i < kHeld; ++i) {
        const auto at = mine(cute::make_coord(cute::make_coord(i % 2, half, i / 2), 0, 0));
        if (cute::get<0>(at) != held_row(thread, half) ||
            cute::get<1>(at) != held_column(thread, i)) {
          std::printf("%s: thread %d, value %d of row %d\n", name, thread, i, half);
          return false;
        }
      }
    }
  }
  std::printf("%s %d %d\n", name, G::Mainloop::DispatchPolicy::Stages,
              static_cast<int>(sizeof(typename G::Kernel::SharedStorage)));
  return true;
}

}  // namespace lolkernels::cuda

int main() {
  using namespace lolkernels::cuda;
  const bool right =
      check<Schedule::cooperative>("cooperative") & check<Schedule::pingpong>("pingpong");
  return right ? 0 : 1;
}

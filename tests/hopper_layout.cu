// Host code that asks CUTLASS where wgmma's accumulators lie, and compares with what finish_span
// believes. Prints a line a GEMM: its tile, its stages and its bytes of shared memory.
#include <cstdio>

#include "../csrc/cuda/hopper.cu"

namespace lolkernels::cuda {

template <Tile kTile>
bool check(const char* name) {
  using G = Gemm<kTile>;
  constexpr int kRows = cute::size<0>(typename G::Extent{});
  constexpr int kColumns = cute::size<1>(typename G::Extent{}), kHeld = kColumns / kQuad;
  typename G::Mainloop::TiledMma mma;
  const auto tile = cute::make_identity_tensor(cute::make_shape(kRows, kColumns));
  const int threads = static_cast<int>(cute::size(mma)), below = kRows * 2 / threads;
  if (span_of(kTile) != kColumns) return false;
  for (int thread = 0; thread < threads; ++thread) {
    const auto mine = mma.get_slice(thread).partition_C(tile);
    if (cute::size(mine) != 2 * below * kHeld) return false;
    for (int at = 0; at < 2 * below * kHeld; ++at) {
      const int i = at % kHeld, half = at / kHeld % 2, m = at / kHeld / 2;
      const auto place = mine(cute::make_coord(cute::make_coord(i % 2, half, i / 2), m, 0));
      if (cute::get<0>(place) != 64 * m + held_row(thread, half) ||
          cute::get<1>(place) != held_column(thread, i)) {
        std::printf("%s: thread %d, value %d of row %d\n", name, thread, i, half);
        return false;
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
  const bool right = check<Tile::m128n256>("128x256") & check<Tile::m64n256>("64x256") &
                     check<Tile::m128n192>("128x192");
  return right ? 0 : 1;
}

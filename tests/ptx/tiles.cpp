// Prints what the host knows of the kernels, as JSON: the rows of tile.h, and the dynamic shared memory of the others.
//   g++ -std=c++20 -Icsrc/cuda -Itests/emulator tests/ptx/tiles.cpp
#include <cstdio>

#include "group_norm.cuh"
#include "quantize.cuh"
#include "tile.h"

using namespace sparsegan::cuda;

int main() {
  std::printf("{\"tiles\": [\n");
  for (int i = 0; i < kTileCount; i++) {
    const Tile& t = kTiles[i];
    std::printf(
        "  {\"type\": %d, \"two_four\": %d, \"block_o\": %d, \"block_k\": %d, \"pixels\": %d, \"threads\": %d, \"shared\": %d, "
        "\"resident\": [%d, %d], \"mma\": %d, \"slots\": %d}%s\n",
        static_cast<int>(t.type), t.two_four, t.block_o, t.block_k, t.pixels, kThreads, t.shared_bytes(), t.resident[0],
        t.resident[1], main_loop_mma(t), main_loop_slots(t), i + 1 < kTileCount ? "," : "");
  }
  std::printf("], \"quantize\": %zu, \"sums_u8\": %zu, \"sums_16\": %zu, \"sums_32\": %zu, \"merge\": %zu}\n", kQuantizeShared,
              norm_sums_shared<uint8_t>(), norm_sums_shared<Half>(), norm_sums_shared<float>(), kNormMergeShared);
}

// Which tile computes a gather-GEMM, and into how many parts its sums are cut. Host code without CUDA.
//
// A CTA of 128 threads computes one packed row (block_o channels) for `pixels` output pixels of one phase. It walks the kept
// blocks of the row in stages of 64 bytes along k: two blocks of 32 bytes a channel row, or one of 64.
//
//                 pixels               issue slots of a warp for one stage, with To = block_o / warps_o / 16 and
//           +---------------+          Tp = pixels / warps_p / 8 fragments (main_loop_slots, which tests hold the SASS against):
//   block_o | warp  |  warp |  warps_o     mma           2 To Tp             (2:4: To Tp, each twice as deep)
//           |-------+-------|              ldmatrix.x4   2 To + Tp           (2:4: To + Tp, and To for the metadata)
//           | warp  |  warp |              gather        pixels / 32 copies of 16 bytes, 4 slots each
//           +---------------+              weights       block_o / 32 copies (2:4: half of that, and the metadata)
//                warps_p                   the rest      20: barrier, waits, loop, place of the next block
//
// The bound: a dense implicit GEMM in the manner of CUTLASS with this tile has the same mma, ldmatrix and copies. Its gather
// takes 4 slots as well (test of the tap's mask, 64-bit address in two, copy), and its loop the 20: it has to step through taps
// and channels, where this one reads from a table. Here they are test, address in one, copy from the image and copy from the
// padding, of which one is switched off (3 for floats: cp.async writes zeros by itself). So kept blocks cost what blocks of a
// dense kernel with this tile do. A dense kernel may take 128 channels a tile, though, and half the gather for each mma; a row of
// a sparse weight has the blocks it has.
//
// Slots are not what limits: a tensor core of sm_80 is busy for 8 cycles with an int8 m16n8k32 (sm_86, 89: 16), and all the large
// tiles issue an mma in less: 64 channels 2.6 slots, 32: 3.8, 16: 6.8 (2:4: 4.4 and 7.5). The small tiles, 3 to 12, are for maps
// that wait for memory anyway. What does limit, from the outside in:
//
//     second-level cache   a stage reads 64 bytes of block_o + pixels rows: 43 int8 multiply-adds a byte for 64x128, 26 for
//                          32x128, 14 for 16x128
//     shared memory        at 128 bytes a cycle, a stage of a CTA takes stage_bytes / 128 cycles to write and 16 for each
//                          ldmatrix.x4 of its warps to read: 288, 208 and 168 for those tiles, where the tensor cores of sm_80
//                          need 256, 128 and 64 (of sm_86 and 89: 512, 256 and 128)
//
// So blocks of 64 output channels are the ones to prune for. A tile of 64x256, 64x64 a warp, would read a third less from shared
// memory for 128 sums a thread; it is not here, because two CTAs of it would fit only where there are 164 KiB.
//
// Not here: wgmma (sm_90a) and tcgen05 (sm_100a), which take their operands from shared memory by descriptors. mma.sync runs on
// all architectures, on sm_90 and sm_100 well below their peak; those forms are future work.
#pragma once
#include "launch.h"

namespace sparsegan::cuda {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kStageBytes = 64;  // along k, of a pixel and of an output channel (2:4: half of that is kept)
// Kept blocks whose places are worked out at once, one a thread; behind them always stands a stage of none.
constexpr int kRunBlocks = kThreads - 2;

// Kinds of multiprocessors: with 100 KiB of shared memory and 1536 threads (sm_86, 89, 120), and with 164 KiB or more and 2048
// threads (sm_80, 90, 100). All have 65536 registers. The system takes 1 KiB for each CTA.
constexpr int kMultiprocessorBytes[] = {100 << 10, 164 << 10}, kMultiprocessorThreads[] = {1536, 2048};
constexpr int kReservedBytes = 1 << 10;

struct Tile {
  Type type;
  bool two_four;
  int block_o, block_k;
  int pixels;
  int warps_o;      // of the 4 warps; the others lie along the pixels
  int stages;       // in shared memory, of which stages - 1 are on their way
  int resident[2];  // CTAs that a multiprocessor of each kind is meant to hold; the second bounds the registers

  constexpr int warps_p() const { return kWarps / warps_o; }
  constexpr int fragments_o() const { return block_o / warps_o / 16; }
  constexpr int fragments_p() const { return pixels / warps_p() / 8; }
  constexpr int kept_bytes() const { return two_four ? kStageBytes / 2 : kStageBytes; }  // of an output channel in a stage
  constexpr int metadata_bytes() const { return two_four ? block_o * (type == Type::kUint8 ? 8 : 4) : 0; }  // of a stage
  constexpr int stage_bytes() const { return pixels * kStageBytes + block_o * kept_bytes() + metadata_bytes(); }
  constexpr int sums_pitch() const { return block_o + 4; }  // of a pixel; fragments are then stored without bank conflicts
  // The sums take the place of the stages when these are done with.
  constexpr int work_bytes() const {
    const int sums = pixels * sums_pitch() * 4, all = stages * stage_bytes();
    return sums > all ? sums : all;
  }
  constexpr int shared_bytes() const { return work_bytes() + kThreads * 8 + pixels * 4; }
  constexpr int fits(int kind) const {
    const int by_memory = kMultiprocessorBytes[kind] / (shared_bytes() + kReservedBytes);
    const int by_threads = kMultiprocessorThreads[kind] / kThreads;
    return by_memory < by_threads ? by_memory : by_threads;
  }
};

// Shape classes: `pixels` 128 for maps that fill the GPU with such tiles, 64 for smaller ones (choose_tile). Three stages for the
// large tiles, since two or more CTAs share a multiprocessor and hide each other's latency; four for the small ones, which are
// chosen where there may be only one.
constexpr Tile kTiles[] = {
    // 64 channels: warps 2 x 2 of 32 x 64, 32 mma for 12 ldmatrix, the fewest for 64 sums a thread. Those and the fragments take
    // 150
    // registers: 3 CTAs.
    {Type::kUint8, false, 64, 32, 128, 2, 3, {2, 3}},
    {Type::kUint8, false, 64, 32, 64, 2, 4, {2, 4}},
    // 32 channels: all warps along the pixels, 32 x 32 each, so that each reads the weights once and no pixel twice.
    {Type::kUint8, false, 32, 32, 128, 1, 3, {3, 4}},
    {Type::kUint8, false, 32, 32, 64, 1, 4, {3, 6}},
    // 16 channels: 16 x 32 a warp, 8 mma for 6 ldmatrix; for layers whose channels do not pair up into higher blocks. With u8
    // output a pixel's 16 bytes are half a sector: the sectors of the other half come from the CTA of the next row and meet in
    // the
    // second-level cache. That doubles the sectors stored, 16 bytes more beside the 32 bytes a kept block that were gathered.
    {Type::kUint8, false, 16, 32, 128, 1, 3, {3, 5}},
    {Type::kUint8, false, 16, 32, 64, 1, 4, {4, 6}},
    // 16-bit floats: the same bytes, so the same tiles; 64x16 and 16x16 have 32 bytes a row as 8-bit blocks have, 32x32 has 64.
    {Type::kFloat16, false, 64, 16, 128, 2, 3, {2, 3}},
    {Type::kFloat16, false, 64, 16, 64, 2, 4, {2, 4}},
    {Type::kFloat16, false, 32, 32, 128, 1, 3, {3, 4}},
    {Type::kFloat16, false, 32, 32, 64, 1, 4, {3, 6}},
    {Type::kFloat16, false, 16, 16, 128, 1, 3, {3, 5}},
    {Type::kFloat16, false, 16, 16, 64, 1, 4, {4, 6}},
    {Type::kBFloat16, false, 64, 16, 128, 2, 3, {2, 3}},
    {Type::kBFloat16, false, 64, 16, 64, 2, 4, {2, 4}},
    {Type::kBFloat16, false, 32, 32, 128, 1, 3, {3, 4}},
    {Type::kBFloat16, false, 32, 32, 64, 1, 4, {3, 6}},
    {Type::kBFloat16, false, 16, 16, 128, 1, 3, {3, 5}},
    {Type::kBFloat16, false, 16, 16, 64, 1, 4, {4, 6}},
    // 2:4: half the weights and half the mma for the same gather; 64 bytes of a pixel a block, one block a stage.
    {Type::kUint8, true, 64, 64, 128, 2, 3, {2, 3}},
    {Type::kUint8, true, 64, 64, 64, 2, 4, {3, 4}},
    {Type::kUint8, true, 32, 64, 128, 1, 3, {3, 4}},
    {Type::kUint8, true, 32, 64, 64, 1, 4, {4, 6}},
    {Type::kFloat16, true, 64, 32, 128, 2, 3, {2, 3}},
    {Type::kFloat16, true, 64, 32, 64, 2, 4, {3, 4}},
    {Type::kFloat16, true, 32, 32, 128, 1, 3, {3, 4}},
    {Type::kFloat16, true, 32, 32, 64, 1, 4, {4, 6}},
    {Type::kBFloat16, true, 64, 32, 128, 2, 3, {2, 3}},
    {Type::kBFloat16, true, 64, 32, 64, 2, 4, {3, 4}},
    {Type::kBFloat16, true, 32, 32, 128, 1, 3, {3, 4}},
    {Type::kBFloat16, true, 32, 32, 64, 1, 4, {4, 6}},
};
constexpr int kTileCount = sizeof kTiles / sizeof kTiles[0];

// Instructions of the main loop for one stage, a warp: mma, and at most so many in all.
constexpr int main_loop_mma(const Tile& t) { return (t.two_four ? 1 : 2) * t.fragments_o() * t.fragments_p(); }
constexpr int main_loop_slots(const Tile& t) {
  const int loads = 2 * t.fragments_o() + t.fragments_p();  // 2:4: half of those of the weights are of metadata
  const int weight_pieces = t.block_o * t.kept_bytes() / 16;
  const int weight_copies = weight_pieces < kThreads ? 1 + 3 : weight_pieces / kThreads;  // 3: only some of the threads copy
  const int metadata_copies = t.two_four ? 1 + 4 : 0;                                     // 4: address, and some of the threads
  return main_loop_mma(t) + loads + 4 * (t.pixels / 32) + weight_copies + metadata_copies + 20;
}

constexpr bool occupancy_holds() {
  for (const Tile& tile : kTiles)
    for (int kind = 0; kind < 2; kind++)
      if (tile.fits(kind) < tile.resident[kind]) return false;
  return true;
}
static_assert(occupancy_holds(), "the shared memory of a tile does not let as many CTAs in as its row says");

// Output pixels of a phase, all images.
inline int64_t phase_pixels(const GatherGemm& call, int phase) {
  return call.batch * call.phases[phase].height * call.phases[phase].width;
}

// CTAs of a call with tiles of so many pixels.
inline int64_t cta_count(const GatherGemm& call, int pixels) {
  int64_t tiles = 0;
  for (int p = 0; p < call.phase_count; p++) tiles += (phase_pixels(call, p) + pixels - 1) / pixels;
  return tiles * call.rows;
}

// Index into kTiles, -1: no such kernel. The small tile is taken where the large ones would leave multiprocessors without a
// second CTA: then the longer wait for a multiprocessor's only tile costs more than the weights that twice as many CTAs read.
inline int choose_tile(const GatherGemm& call, int multiprocessors) {
  const bool small = cta_count(call, 128) < 2 * int64_t(multiprocessors);
  for (int i = 0; i < kTileCount; i++) {
    const Tile& t = kTiles[i];
    if (t.type == call.weight_type && t.two_four == (call.metadata != nullptr) && t.block_o == call.block_o &&
        t.block_k == call.block_k && t.pixels == (small ? 64 : 128))
      return i;
  }
  return -1;
}

// Into how many ranges the kept blocks of each row are cut (split-K), so that a map of few pixels still occupies every
// multiprocessor: as many as make two CTAs for each, but at least kSplitStages stages a range, since each range pays for filling
// the pipeline and for 4 bytes a sum to the workspace and back. At most kMostSplits, because they are added up one after another.
constexpr int kSplitStages = 8, kMostSplits = 16;
inline int choose_splits(const GatherGemm& call, const Tile& tile, int multiprocessors) {
  const int64_t ctas = cta_count(call, tile.pixels);
  if (tile.pixels != 64 || ctas == 0 || ctas >= multiprocessors) return 1;
  const int64_t element = call.weight_type == Type::kUint8 ? 1 : 2;
  const int64_t mean_bytes = call.blocks * call.block_k * element / (call.rows * call.phase_count);
  int64_t splits = (2 * int64_t(multiprocessors) + ctas - 1) / ctas;
  const int64_t most = mean_bytes / (kSplitStages * kStageBytes);
  if (splits > most) splits = most;
  if (splits > kMostSplits) splits = kMostSplits;
  return splits < 1 ? 1 : static_cast<int>(splits);
}

}  // namespace sparsegan::cuda

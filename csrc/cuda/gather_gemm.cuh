// Gather-GEMM: convolution, transposed convolution and linear layer over the kept blocks of a weight.
//
//   y[pixel, channels of row r] = finish(sum over kept blocks b of row r:  values[b] . x[pixel moved by the tap of b, input block
//   of b])
//
//       values[b] (A, shared memory)        x, gathered (B, shared memory)           one CTA: packed row r, `pixels` output
//       pixels
//        +--- block_k ---+                   +--- block_k ---+
//        |               | block_o           |  pixel 0      |  each pixel's 32 or 64 bytes come from where the tap of b moves
//        |               |            x      |  pixel 1      |  it, or from `pad` where that is outside the image
//        +---------------+                   |  ...          |
//                                            +---------------+
//
// Blocks come in stages of 64 bytes along k by cp.async: while a stage is multiplied, the next ones are on their way. Which tap
// and input block a column means is worked out for kRunBlocks blocks at once, by one thread each: an offset from the pixel, and
// the bits of the row and column of taps, which a pixel's word `outside` has set where that row or column leaves the image.
//
// In shared memory, rows of 32 or 64 bytes follow each other without padding; the 16-byte pieces of a row change places by the
// row's number, so that 8 rows of one ldmatrix, as well as 8 neighbouring cp.async, fall on all 32 banks once.
//
// Sums stay in registers, [fragments_o][fragments_p] a warp, and go through shared memory to the epilogue, which reads them by
// pixel. With split-K they go to the workspace, and add_splits_kernel adds the parts in the order of their numbers.
//
// Limits: tensors below 2^31 elements, kMaxTaps taps; launch_gather_gemm checks them.
#pragma once
#include "epilogue.cuh"
#include "tile.h"

namespace sparsegan::cuda {

// ---- what the launcher hands over ----

// n / divisor for n < 2^31 by a multiplication.
struct Divisor {
  uint32_t magic = 1, shift = 0;
};
SPARSEGAN_DEVICE uint32_t divide(uint32_t n, const Divisor& d) {
  return (static_cast<uint32_t>(static_cast<uint64_t>(n) * d.magic >> 32) + n) >> d.shift;
}

struct TapStep {
  int32_t offset;   // from a pixel's input at tap (0, 0) to this tap's, in units of 16 bytes
  uint32_t leaves;  // the bits of its row and its column of taps
};
constexpr uint32_t kAlwaysOutside = 1u << 31;  // of every pixel; what asks for this bit reads `pad`

struct PhaseWork {
  int32_t tap_begin, tap_end;
  int32_t y0, x0;
  uint32_t height, width;
  uint32_t pixels;      // of all images
  uint32_t first_tile;  // number of its first pixel tile among those of all phases
  Divisor per_image, per_row;
};

struct GatherWork {
  const uint8_t *x, *pad, *values, *metadata;
  const int32_t *cols, *tap_ptr;
  uint8_t* workspace;      // sums [split][cta][pixel of the tile][channel of the row], or nullptr: not split
  int64_t pixel_bytes;     // of x
  int32_t block_units;     // of x, in units of 16 bytes
  uint32_t height, width;  // of x
  int32_t taps, in_blocks, splits;
  int32_t in_step_h, in_step_w, out_step_h, out_step_w;
  uint32_t out_height, out_width;
  uint32_t rows;
  Divisor per_rows, per_in_blocks;
  int32_t phase_count;
  int32_t tap_rows, tap_columns;  // different dy and dx
  int16_t dy[32], dx[32];         // those
  TapStep steps[kMaxTaps];
  PhaseWork phases[kMaxPhases];
  Epilogue epilogue;
};

// ---- number formats ----

struct Int8 {
  using Sum = int;
  static constexpr Type kType = Type::kUint8;
  static constexpr bool kTwoFour = false;
  static SPARSEGAN_DEVICE void multiply(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_s8u8(c, a, b); }
};
struct Float16 {
  using Sum = float;
  static constexpr Type kType = Type::kFloat16;
  static constexpr bool kTwoFour = false;
  static SPARSEGAN_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_f16(c, a, b); }
};
struct BrainFloat16 {
  using Sum = float;
  static constexpr Type kType = Type::kBFloat16;
  static constexpr bool kTwoFour = false;
  static SPARSEGAN_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { mma_bf16(c, a, b); }
};
struct Int8TwoFour {
  using Sum = int;
  static constexpr Type kType = Type::kUint8;
  static constexpr bool kTwoFour = true;
  static SPARSEGAN_DEVICE void multiply(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t m) {
    mma_sp_s8u8(c, a, b, m);
  }
};
struct Float16TwoFour {
  using Sum = float;
  static constexpr Type kType = Type::kFloat16;
  static constexpr bool kTwoFour = true;
  static SPARSEGAN_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t m) {
    mma_sp_f16(c, a, b, m);
  }
};
struct BrainFloat16TwoFour {
  using Sum = float;
  static constexpr Type kType = Type::kBFloat16;
  static constexpr bool kTwoFour = true;
  static SPARSEGAN_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t m) {
    mma_sp_bf16(c, a, b, m);
  }
};

// A row of kTiles as the kernel sees it.
template <class F, int kBlockOut, int kBlockIn, int kTilePixels>
struct GatherTile {
  using Format = F;
  using Sum = typename F::Sum;
  static constexpr int kBlockO = kBlockOut, kBlockK = kBlockIn, kPixels = kTilePixels;
  static constexpr Tile find() {
    for (const Tile& t : kTiles)
      if (t.type == F::kType && t.two_four == F::kTwoFour && t.block_o == kBlockO && t.block_k == kBlockK && t.pixels == kPixels)
        return t;
    return {};
  }
  static constexpr Tile kTile = find();
  static constexpr bool kTwoFour = F::kTwoFour;
  static constexpr int kElement = F::kType == Type::kUint8 ? 1 : 2;

  // Rows along k, in bytes: of x and of the weight.
  static constexpr int kRowX = kBlockK * kElement, kRowW = kTwoFour ? kRowX / 2 : kRowX;
  static constexpr int kStageBlocks = kStageBytes / kRowX;
  static constexpr int kMmaX = kTwoFour ? 64 : 32, kMmaSteps = kStageBytes / kMmaX;  // bytes of x along k that an mma takes
  static constexpr int kBlockSteps = kRowX / kMmaX;                                  // mma along k in a block
  static constexpr int kMetadataTile = F::kType == Type::kUint8 ? 128 : 64;          // bytes, of 16 channels

  // A stage: x [kStageBlocks][kPixels][kRowX], weights [kStageBlocks][kBlockO][kRowW], metadata [kBlockO / 16][kMetadataTile]
  static constexpr int kSubX = kPixels * kRowX, kSubW = kBlockO * kRowW;
  static constexpr int kStageX = kStageBlocks * kSubX, kStageW = kStageBlocks * kSubW;
  static constexpr int kStage = kTile.stage_bytes();
  static constexpr int kStages = kTile.stages, kWarpsO = kTile.warps_o, kWorkBytes = kTile.work_bytes();
  static constexpr int kMetadata = kTile.metadata_bytes();
  static_assert(kStage == kStageX + kStageW + kMetadata);

  static constexpr int kFragmentsO = kTile.fragments_o(), kFragmentsP = kTile.fragments_p();
  static constexpr int kPitch = kTile.sums_pitch();

  // Copies of 16 bytes a thread: of x, in steps of kPassRows pixels, and of the weights.
  static constexpr int kPassRows = kThreads / kStageBlocks / (kRowX / 16);
  static constexpr int kCopiesX = kPixels / kPassRows;
  static constexpr int kPiecesSubW = kSubW / 16, kPiecesW = kStageW / 16;
  static constexpr int kCopiesW = (kPiecesW + kThreads - 1) / kThreads;
  static_assert(kPassRows % 8 == 0 && (kPiecesW % kThreads == 0 || kPiecesW < kThreads));
};

// Byte of 16-byte piece `piece` of row `row` of a subtile with rows of kRowBytes: 8 neighbouring rows at the same piece, and
// whole 128-byte lines, lie in different banks.
template <int kRowBytes>
SPARSEGAN_DEVICE int swizzled(int row, int piece) {
  constexpr int kLineRows = 128 / kRowBytes, kPieces = kRowBytes / 16;
  return row * kRowBytes + (piece ^ row / kLineRows % kPieces) * 16;
}

// ---- places ----

struct CtaPlace {
  int phase;
  uint32_t row;
  uint32_t first_pixel;  // of the phase
};

// CTAs count rows first, so that those which gather the same pixels run at the same time and share them in the second-level
// cache.
SPARSEGAN_DEVICE CtaPlace find_cta(const GatherWork& work, uint32_t cta, uint32_t pixels) {
  CtaPlace place;
  const uint32_t tile = divide(cta, work.per_rows);
  place.row = cta - tile * work.rows;
  place.phase = 0;
  while (place.phase + 1 < work.phase_count && tile >= work.phases[place.phase + 1].first_tile) place.phase++;
  place.first_pixel = (tile - work.phases[place.phase].first_tile) * pixels;
  return place;
}

struct Pixel {
  uint32_t image, i, j;
};

SPARSEGAN_DEVICE Pixel find_pixel(const PhaseWork& phase, uint32_t number) {
  Pixel p;
  p.image = divide(number, phase.per_image);
  const uint32_t rest = number - p.image * (phase.height * phase.width);
  p.i = divide(rest, phase.per_row);
  p.j = rest - p.i * phase.width;
  return p;
}

// Number in y of a pixel of a phase.
SPARSEGAN_DEVICE int32_t output_pixel(const GatherWork& work, const PhaseWork& phase, uint32_t number) {
  const Pixel p = find_pixel(phase, number);
  const uint32_t y = phase.y0 + p.i * work.out_step_h, x = phase.x0 + p.j * work.out_step_w;
  return static_cast<int32_t>((p.image * work.out_height + y) * work.out_width + x);
}

// A piece of a pixel on its way to shared memory; of the padding, where the tap leaves the image. For floats that is zero, which
// the copy writes by itself.
template <class T>
SPARSEGAN_DEVICE void copy_pixel(uint8_t* to, const uint8_t* from, const uint8_t* pad, uint32_t leaves) {
  if constexpr (T::Format::kType != Type::kUint8) {
    cp_async16(to, from, leaves == 0);
  } else if (leaves == 0) {
    cp_async16(to, from, true);
  } else {
    cp_async16(to, pad, true);
  }
}

// ---- the kernel ----

// Grid (row and pixel tile, split).
template <class T>
__global__ void __launch_bounds__(kThreads, T::kTile.resident[1]) gather_gemm_kernel(const __grid_constant__ GatherWork work) {
  using Sum = typename T::Sum;
  SmemCarver shared;
  uint8_t* const stages = shared.take<uint8_t>(T::kWorkBytes);
  TapStep* const sources = shared.take<TapStep>(kThreads);
  int32_t* const out_pixels = shared.take<int32_t>(T::kPixels);

  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const CtaPlace place = find_cta(work, blockIdx.x, T::kPixels);
  const PhaseWork& phase = work.phases[place.phase];

  // The kept blocks of this row, phase and split.
  const int32_t* const cell = work.tap_ptr + static_cast<int64_t>(place.row) * work.taps;
  int begin = cell[phase.tap_begin], end = cell[phase.tap_end];
  if (work.splits > 1) {
    const int stage_count = (end - begin + T::kStageBlocks - 1) / T::kStageBlocks;
    const int part = (stage_count + work.splits - 1) / work.splits * T::kStageBlocks;
    const int first = begin + static_cast<int>(blockIdx.y) * part;
    begin = first < end ? first : end;
    end = begin + part < end ? begin + part : end;
  }

  if (thread < T::kPixels) {
    const uint32_t number = place.first_pixel + thread;
    out_pixels[thread] = number < phase.pixels ? output_pixel(work, phase, number) : -1;
  }

  // This thread gathers 16-byte piece x_piece of block x_block of each stage, for pixels x_row + i * kPassRows.
  constexpr int kBlockThreads = kThreads / T::kStageBlocks, kPiecesX = T::kRowX / 16;
  const int x_block = thread / kBlockThreads, x_piece = thread % kPiecesX, x_row = thread % kBlockThreads / kPiecesX;
  const uint8_t* from[T::kCopiesX];
  uint32_t outside[T::kCopiesX];
  int y[T::kCopiesX], x[T::kCopiesX];
#pragma unroll
  for (int i = 0; i < T::kCopiesX; i++) {
    const uint32_t number = place.first_pixel + x_row + i * T::kPassRows;
    const Pixel p = find_pixel(phase, number < phase.pixels ? number : 0);
    y[i] = static_cast<int>(p.i) * work.in_step_h, x[i] = static_cast<int>(p.j) * work.in_step_w;
    // A choice, lest the compiler add work.x again and again in the loop.
    const int64_t offset = ((static_cast<int64_t>(p.image) * work.height + y[i]) * work.width + x[i]) * work.pixel_bytes;
    from[i] = number < phase.pixels ? work.x + offset + x_piece * 16 : work.pad;
    outside[i] = number < phase.pixels ? kAlwaysOutside : ~0u;
  }
#pragma unroll 1
  for (int t = 0; t < work.tap_rows; t++)
#pragma unroll
    for (int i = 0; i < T::kCopiesX; i++)
      outside[i] |= static_cast<uint32_t>(static_cast<uint32_t>(y[i] + work.dy[t]) >= work.height) << t;
#pragma unroll 1
  for (int t = 0; t < work.tap_columns; t++)
#pragma unroll
    for (int i = 0; i < T::kCopiesX; i++)
      outside[i] |= static_cast<uint32_t>(static_cast<uint32_t>(x[i] + work.dx[t]) >= work.width) << (work.tap_rows + t);
  const uint8_t* const pad = work.pad + x_piece * 16;
  const int x_to = x_block * T::kSubX + swizzled<T::kRowX>(x_row, x_piece);

  // And of the weights, which lie in a stage as in memory but for the swizzle, pieces thread + i * kThreads.
  constexpr int kPiecesRowW = T::kRowW / 16;
  const bool copies_w = T::kPiecesW >= kThreads || thread < T::kPiecesW;
  const int w_block = thread / T::kPiecesSubW;
  const int w_to =
      T::kStageX + w_block * T::kSubW + swizzled<T::kRowW>(thread % T::kPiecesSubW / kPiecesRowW, thread % kPiecesRowW);

  // Where the lanes of this warp point ldmatrix, for its first fragment.
  const int first_o = warp % T::kWarpsO * T::kFragmentsO * 16, first_p = warp / T::kWarpsO * T::kFragmentsP * 8;
  int lane_w[T::kBlockSteps], lane_x[T::kBlockSteps];
#pragma unroll
  for (int s = 0; s < T::kBlockSteps; s++) {
    lane_w[s] = T::kStageX + swizzled<T::kRowW>(first_o + lane % 16, 2 * s + lane / 16);
    lane_x[s] = T::kTwoFour ? swizzled<T::kRowX>(first_p + lane % 8, lane / 8)
                            : swizzled<T::kRowX>(first_p + lane % 8 + lane / 16 * 8, 2 * s + lane / 8 % 2);
  }
  const int lane_metadata =
      T::kStageX + T::kStageW + first_o / 16 * T::kMetadataTile + (T::kMetadataTile == 128 ? lane : lane / 4 * 2 + lane % 2) * 4;

  Sum sums[T::kFragmentsO][T::kFragmentsP][4] = {};

  const uint8_t* values = work.values + static_cast<int64_t>(begin) * T::kSubW + thread * 16;  // of the run
  const uint8_t* metadata = work.metadata + static_cast<int64_t>(begin) * T::kMetadata + thread * 16;

  for (int run = begin; run < end; run += kRunBlocks) {
    const int count = end - run < kRunBlocks ? end - run : kRunBlocks;
    if (run > begin) __syncthreads();  // all have done with the last run's stages and sources
    if (thread < count) {
      const uint32_t col = work.cols[run + thread], tap = divide(col, work.per_in_blocks);
      TapStep source = work.steps[tap];
      source.offset += static_cast<int32_t>(col - tap * work.in_blocks) * work.block_units;
      sources[thread] = source;
    } else {
      sources[thread] = {0, kAlwaysOutside};
    }
    __syncthreads();

    const TapStep* const x_sources = sources + x_block;
    TapStep next_tap = *x_sources;  // of the stage that is loaded next: read so early that nothing waits for it
    int loaded = 0;                 // blocks; runs on while the last stages are multiplied

    // Starts the copies of the next stage. A block beyond the last is multiplied with padding, so its weights must be zeros.
    const auto load_stage = [&](uint8_t* stage) {
      const TapStep tap = next_tap;
#pragma unroll
      for (int i = 0; i < T::kCopiesX; i++)
        copy_pixel<T>(stage + x_to + i * T::kPassRows * T::kRowX, from[i] + static_cast<int64_t>(tap.offset) * 16, pad,
                      outside[i] & tap.leaves);
      if (copies_w) {
        const uint8_t* const stage_values = values + static_cast<int64_t>(loaded) * T::kSubW;
#pragma unroll
        for (int i = 0; i < T::kCopiesW; i++) {
          const int block = T::kStageBlocks == 1 ? 0 : T::kPiecesSubW < kThreads ? w_block : i * kThreads / T::kPiecesSubW;
          cp_async16(stage + w_to + i * kThreads * 16, stage_values + i * kThreads * 16, loaded + block < count);
        }
      }
      if constexpr (T::kTwoFour) {
        if (thread < T::kMetadata / 16)
          cp_async16(stage + T::kStageX + T::kStageW + thread * 16, metadata + static_cast<int64_t>(loaded) * T::kMetadata, true);
      }
      next_tap = x_sources[loaded + T::kStageBlocks];
    };

    // Multiplies a stage; `next` is free and takes the stage that is loaded meanwhile.
    const auto multiply_stage = [&](const uint8_t* stage, uint8_t* next) {
#pragma unroll
      for (int s = 0; s < T::kMmaSteps; s++) {
        const int block = s / T::kBlockSteps, part = s % T::kBlockSteps;
        uint32_t w[T::kFragmentsO][4], metadata_words[T::kFragmentsO] = {};
#pragma unroll
        for (int o = 0; o < T::kFragmentsO; o++) {
          ldmatrix_x4(w[o], stage + block * T::kSubW + o * 16 * T::kRowW + lane_w[part]);
          if constexpr (T::kTwoFour) metadata_words[o] = load_vector<uint32_t>(stage + o * T::kMetadataTile + lane_metadata);
        }
        constexpr int kLoadsX = T::kTwoFour ? T::kFragmentsP : T::kFragmentsP / 2, kLoadRows = T::kTwoFour ? 8 : 16;
        uint32_t x[kLoadsX][4];
#pragma unroll
        for (int p = 0; p < kLoadsX; p++) ldmatrix_x4(x[p], stage + block * T::kSubX + p * kLoadRows * T::kRowX + lane_x[part]);
        if (s == 0) {
          if (loaded < count) load_stage(next);
          cp_async_commit();
        }
#pragma unroll
        for (int o = 0; o < T::kFragmentsO; o++)
#pragma unroll
          for (int p = 0; p < T::kFragmentsP; p++) {
            if constexpr (T::kTwoFour) {
              T::Format::multiply(sums[o][p], w[o], x[p], metadata_words[o]);
            } else {
              const uint32_t half[2] = {x[p / 2][p % 2 * 2], x[p / 2][p % 2 * 2 + 1]};
              T::Format::multiply(sums[o][p], w[o], half);
            }
          }
      }
    };

#pragma unroll
    for (int s = 0; s < T::kStages - 1; s++) {
      if (loaded < count) load_stage(stages + s * T::kStage);
      cp_async_commit();
      loaded += T::kStageBlocks;
    }
    const int done = count + (T::kStages - 1) * T::kStageBlocks;
    while (loaded < done) {
#pragma unroll
      for (int s = 0; s < T::kStages; s++) {  // all stages in one turn, so that their addresses are constants
        cp_async_wait<T::kStages - 2>();
        __syncthreads();  // the stage is there, for all threads, and the one before it is free
        multiply_stage(stages + s * T::kStage, stages + (s + T::kStages - 1) % T::kStages * T::kStage);
        loaded += T::kStageBlocks;
        if (loaded >= done) break;
      }
    }
    values += static_cast<int64_t>(count) * T::kSubW;
    metadata += static_cast<int64_t>(count) * T::kMetadata;
  }

  // Sums to shared memory, [pixel][kPitch]: fragment element r of a lane is channel lane / 4 + 8 * (r / 2), pixel lane % 4 * 2 +
  // r % 2.
  __syncthreads();
  Sum* const tile_sums = reinterpret_cast<Sum*>(stages);
#pragma unroll
  for (int o = 0; o < T::kFragmentsO; o++)
#pragma unroll
    for (int p = 0; p < T::kFragmentsP; p++)
#pragma unroll
      for (int r = 0; r < 4; r++)
        tile_sums[(first_p + p * 8 + lane % 4 * 2 + r % 2) * T::kPitch + first_o + o * 16 + lane / 4 + r / 2 * 8] = sums[o][p][r];
  __syncthreads();

  // A thread finishes four channels of every kPassPixels-th pixel. Lanes run along the channels; with 16 of them, where the pitch
  // would then make two pixels share a bank, along 8 pixels first.
  constexpr int kGroups = T::kBlockO / 4, kPassPixels = kThreads / kGroups;
  const int group = kGroups == 4 ? lane / 8 : thread % kGroups;
  const int first = kGroups == 4 ? warp * 8 + lane % 8 : thread / kGroups;
  if (work.splits > 1) {
    const int64_t cta = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;
    Sum* const part = reinterpret_cast<Sum*>(work.workspace) + cta * T::kPixels * T::kBlockO + group * 4;
    for (int p = first; p < T::kPixels; p += kPassPixels)
      store_vector(part + p * T::kBlockO, load_vector<Four<Sum>>(tile_sums + p * T::kPitch + group * 4));
    return;
  }
  const ChannelGroup channels = load_group(work.epilogue, place.phase, static_cast<int64_t>(place.row) * T::kBlockO + group * 4);
  if (channels.empty) return;
  for (int p = first; p < T::kPixels; p += kPassPixels) {
    const int32_t pixel = out_pixels[p];
    if (pixel >= 0) finish_group(work.epilogue, channels, pixel, load_vector<Four<Sum>>(tile_sums + p * T::kPitch + group * 4));
  }
}

// Adds the parts of a split sum, in the order of the splits, and finishes. Grid: the CTAs of one split, and 4 parts of their
// pixels.
template <class Sum>
__global__ void __launch_bounds__(kThreads, 4)
    add_splits_kernel(const __grid_constant__ GatherWork work, int block_o, int pixels) {
  const CtaPlace place = find_cta(work, blockIdx.x, pixels);
  const PhaseWork& phase = work.phases[place.phase];
  const int groups = block_o / 4, group = static_cast<int>(threadIdx.x) % groups, pass = kThreads / groups;
  const ChannelGroup channels = load_group(work.epilogue, place.phase, static_cast<int64_t>(place.row) * block_o + group * 4);
  if (channels.empty) return;
  const int64_t split_sums = static_cast<int64_t>(gridDim.x) * pixels * block_o;
  const Sum* const tile = reinterpret_cast<const Sum*>(work.workspace) + static_cast<int64_t>(blockIdx.x) * pixels * block_o;
  const int quarter = pixels / static_cast<int>(gridDim.y), last = (static_cast<int>(blockIdx.y) + 1) * quarter;
  for (int p = static_cast<int>(blockIdx.y) * quarter + static_cast<int>(threadIdx.x) / groups; p < last; p += pass) {
    const uint32_t number = place.first_pixel + p;
    if (number >= phase.pixels) break;
    const Sum* part = tile + p * block_o + group * 4;
    Four<Sum> sums = load_vector<Four<Sum>>(part);
    for (int s = 1; s < work.splits; s++) {
      const Four<Sum> more = load_vector<Four<Sum>>(part + s * split_sums);
#pragma unroll
      for (int i = 0; i < 4; i++) sums.e[i] += more.e[i];
    }
    finish_group(work.epilogue, channels, output_pixel(work, phase, number), sums);
  }
}

}  // namespace sparsegan::cuda

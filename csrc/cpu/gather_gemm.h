// v = act(scale * (sum over kept blocks of W_block . x_block - zero point) + bias), for every layer type, and what follows it:
//
//     accumulators ──> scale, bias, activation ──> + residual, activation ──> stores (affine, activation, modulation, rounding)
//          or                                                          └────> sums for the normalisation that follows
//     a stored tensor (pointwise steps)
//
// A tile is R packed rows (output channels) x V vectors of pixels, its R*V accumulators in registers. For each kept block of the
// row: V loads of activations at one constant offset, then for each row one broadcast weight word and V dot products.
// A task is one tile of pixels (or a few) x a group of packed rows x one row of output phases; tasks are independent and each
// writes its own output, so the result does not depend on the number of threads.
#pragma once
#include <cstdint>
#include <memory>

#include "plan.h"

namespace sparsegan {

// A tensor that is read pixel by pixel: lanes of a slot, or a float32 tensor of any strides.
struct Source {
  const uint8_t* data = nullptr;
  LaneLayout layout;       // of a tensor: format f32, no ring, one phase; plane_stride is that of channels
  bool tensor = false;     // not a slot: nothing may be read past its end
  int64_t col_stride = 1;  // lanes between neighbouring columns (of one phase)
  float scale = 1;         // u8: value = (q - zero) * scale
  int32_t zero = 0;
  bool one_channel = false;  // the only channel serves all
};

// Arrays "by packed row" follow row_channels: [rows * block_o], padding rows hold zeros, and kPadding more can be read.
constexpr int kPadding = 16;  // a vector

struct Store {
  uint8_t* data = nullptr;
  const LaneLayout* layout = nullptr;
  int64_t channel = 0;            // of the layout, where channel 0 of the step goes
  const float* scale = nullptr;   // by packed row; nullptr: no affine
  const float* bias = nullptr;    // by packed row
  const float* factor = nullptr;  // by packed row, modulation; nullptr: none
  int64_t factor_stride = 0;      // from image to image
  Activation activation = Activation::kNone;
  float slope = 0;
  float inv_scale = 1;  // u8: q = round(w * inv_scale) + zero
  int32_t zero = 0;
};

constexpr int kMaxStores = 4;

struct Epilogue {
  const float* scale = nullptr;  // by packed row
  const float* bias = nullptr;   // by packed row
  int64_t scale_stride = 0;      // from image to image; 0 where all share them
  int64_t bias_stride = 0;
  Activation activation = Activation::kNone;
  float slope = 0;
  const Source* residual = nullptr;
  int residual_upsample = 1;
  Activation post_activation = Activation::kNone;
  float post_slope = 0;
  bool bounded = false;   // |scale * sum + bias| < 2^22, whatever the input
  float* sums = nullptr;  // [tiles][2][rows * block_o] sum and sum of squares of each packed row over the pixels of each tile
  Store stores[kMaxStores];
  int store_count = 0;
};

// What an instruction set makes of a layer's weight beforehand, for one plan.
struct Prepared {
  virtual ~Prepared() = default;
};

struct GatherGemm {
  const PackedWeight* weight = nullptr;  // pointwise steps: only the rows, in order
  const Plan* plan = nullptr;
  const uint8_t* in = nullptr;     // lanes of plan->in
  const Source* source = nullptr;  // pointwise steps read this instead
  int upsample = 1, shuffle = 1;   // pointwise steps
  Epilogue epilogue;
  const Prepared* prepared = nullptr;
  // Images do not share a tile: set where the epilogue differs from image to image.
  bool per_image = false;
};

// How a gather-GEMM is cut into tasks; made by Kernels::split.
struct Split {
  int64_t vectors = 0;          // vectors of raster pixels: of one image when per_image, else of all
  int64_t tiles_per_image = 0;  // per_image: tiles of one image
  int64_t tiles = 0;            // groups of at most kMaxV vectors, in all
  int64_t tile_group = 1;       // tiles a task takes one after another
  int64_t row_group = 0;        // packed rows a task
  int64_t row_groups = 0;
  int64_t phase_rows = 0;             // groups of plan->interleave phases
  int64_t strip = 0;                  // groups of tiles that all row groups visit before the next tiles: their input stays in L2
  bool whole_lanes[kMaxStores] = {};  // packed rows lie in channel order, so a lane of the store is written whole
  bool whole_fours = false;           // four packed rows hold four channels in order
  int64_t dots = 0;                   // dot products of one vector in all tasks, about: whether threads are worth waking
  int64_t tile_groups() const { return tile_group == 1 ? tiles : (tiles + tile_group - 1) / tile_group; }
  int64_t tasks() const { return tile_groups() * row_groups * phase_rows; }
};

// float32 source of any strides (in elements).
struct SourceTensor {
  const float* data = nullptr;
  int64_t image_stride = 0, channel_stride = 0, row_stride = 0, col_stride = 0;
};

// One table an instruction set.
struct Kernels {
  const char* isa;
  int vector_lanes;
  // nullptr where the instruction set has nothing better than the packed weight. The plan must outlive what is returned.
  std::unique_ptr<const Prepared> (*prepare)(const GatherGemm& op);
  Split (*split)(const GatherGemm& op, int threads);
  void (*run_task)(const GatherGemm& op, const Split& split, int64_t task);
  // Fills a lane buffer from a tensor, ring included; `line` in [0, pack_lines(layout)).
  void (*pack_line)(const LaneLayout& layout, const SourceTensor& x, float inv_scale, int32_t zero, uint8_t* lanes, int64_t line);
  // Whether all values lie in [0, limit).
  bool (*below)(const int32_t* values, int64_t count, int32_t limit);
  // Giga multiply-adds a second of the dot product instruction alone, on this thread, for about 10 ms. loads: of the matrix unit,
  // with the loads of tiles of a kernel that keeps four sums; of others the same.
  double (*dot_peak)(Format format, bool loads);
};

inline int64_t pack_lines(const LaneLayout& l) {
  return l.batch_in_cols ? l.planes / block_planes(l.format) : l.images * l.rows * l.phases_h;
}

const Kernels* portable_kernels();
const Kernels* avx2_kernels();  // nullptr where not compiled in
const Kernels* avx2_vnni_kernels();
const Kernels* avx512_vnni_kernels();
const Kernels* avx512_amx_kernels();

}  // namespace sparsegan

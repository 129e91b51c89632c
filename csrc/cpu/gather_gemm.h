// y = act(scale * (sum over kept blocks of W_block . x_block - zero point) + bias), for every layer type.
//
// A tile is R packed rows (output channels) x V vectors of pixels, its R*V accumulators in registers. For each kept block of the
// row: V loads of activations at one constant offset, then for each row one broadcast weight word and V dot products.
// A task is one tile of pixels x a group of packed rows x one row of output phases; tasks are independent and each writes
// its own output, so the result does not depend on the number of threads.
#pragma once
#include <cstdint>

#include "plan.h"

namespace sparsegan {

// What happens between the accumulator and memory. The per-row arrays follow row_channels; padding rows hold zeros.
struct Epilogue {
  const float* scale = nullptr;  // [rows * block_o], and readable for kPadding more
  const float* bias = nullptr;
  static constexpr int kPadding = 16;  // a vector
  Activation activation = Activation::kNone;
  float slope = 0;
  float out_inv_scale = 1;  // int8 output: q = round(y * out_inv_scale) + out_zero
  int32_t out_zero = 0;
};

struct GatherGemm {
  const PackedWeight* weight = nullptr;
  const Plan* plan = nullptr;
  const uint8_t* in = nullptr;  // lanes of plan->in
  uint8_t* out = nullptr;       // lanes of *out_layout
  const LaneLayout* out_layout = nullptr;
  Epilogue epilogue;
};

// How a gather-GEMM is cut into tasks; made by Kernels::split.
struct Split {
  int64_t vectors = 0;    // vectors of raster pixels, over all images
  int64_t tiles = 0;      // groups of at most kMaxV vectors
  int64_t row_group = 0;  // packed rows a task
  int64_t row_groups = 0;
  int64_t phase_rows = 0;    // groups of plan->interleave phases
  int64_t strip = 0;         // tiles that all row groups visit before the next tiles: their input stays in L2
  bool whole_lanes = false;  // packed rows lie in channel order, so a lane of the output is written whole
  int64_t tasks() const { return tiles * row_groups * phase_rows; }
};

// float32 source of any strides (in elements); data == nullptr: only the ring and the padding channels are written.
struct SourceTensor {
  const float* data = nullptr;
  int64_t image_stride = 0, channel_stride = 0, row_stride = 0, col_stride = 0;
};

// One table an instruction set.
struct Kernels {
  const char* isa;
  int vector_lanes;
  Split (*split)(const GatherGemm& op, int threads);
  void (*run_task)(const GatherGemm& op, const Split& split, int64_t task);
  // Fills a lane buffer from a tensor, ring included; `line` in [0, pack_lines(layout)).
  void (*pack_line)(const LaneLayout& layout, const SourceTensor& x, float inv_scale, int32_t zero, uint8_t* lanes, int64_t line);
  // Whether all values lie in [0, limit).
  bool (*below)(const int32_t* values, int64_t count, int32_t limit);
  // Giga multiply-adds a second of the dot product instruction alone, on this thread, for about 10 ms.
  double (*dot_peak)(Format format);
};

inline int64_t pack_lines(const LaneLayout& l) {
  return l.batch_in_cols ? l.planes / block_planes(l.format) : l.images * l.rows * l.phases_h;
}

const Kernels* portable_kernels();
const Kernels* avx2_kernels();  // nullptr where not compiled in
const Kernels* avx2_vnni_kernels();
const Kernels* avx512_vnni_kernels();

}  // namespace sparsegan

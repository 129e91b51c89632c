// Where everything lies and who computes what, before any arithmetic: torch-free and the same for every instruction set.
//
// Activations lie as 32-bit *lanes*: one lane holds 4 (int8), 2 (bf16) or 1 (f32) input channels of one pixel, so a vector
// register holds neighbouring pixels and every (tap, input block) of a convolution is one constant byte offset.
//
//   by rows  [image][phase][row][plane][column]   wide maps: the lines that one tile reads lie close together (TLB, L1)
//   planar   [image][phase][plane][row][column]   narrow maps: a vector runs on over the ends of rows
//
// `phase`: a convolution of stride s reads every s-th pixel, so its input is split into s*s phases when it is stored. The
// padding ring is part of the layout and holds the zero point. Maps of 1x1 pixels put the batch in place of the columns, or, in
// small batches, lie as one vector of channels an image.
#pragma once
#include <cstdint>
#include <vector>

#include "../packed.h"

namespace sparsegan {

struct LaneLayout {
  Format format = Format::kFloat32;
  int64_t images = 0, channels = 0, height = 0, width = 0;  // of the tensor that is stored
  int64_t planes = 0;                                       // channel groups, padded to whole blocks
  int64_t rows = 0, cols = 0;                               // of one phase, padding ring included
  int64_t top = 0, left = 0;                                // ring, in pixels
  int64_t phases_h = 1, phases_w = 1;
  int64_t image_stride = 0, phase_stride = 0, plane_stride = 0, row_stride = 0;  // in lanes
  bool batch_in_cols = false;

  int64_t lanes() const;
  bool operator==(const LaneLayout&) const = default;
  // Lane of plane 0 at real pixel (y, x); ring pixels have y, x outside [0, height) x [0, width).
  int64_t at(int64_t n, int64_t y, int64_t x) const {
    const int64_t r = y + top, c = x + left;
    if (phases_h == 1 && phases_w == 1) return n * image_stride + r * row_stride + c;  // divisions are slow
    return n * image_stride + ((r % phases_h) * phases_w + c % phases_w) * phase_stride + (r / phases_h) * row_stride +
           c / phases_w;
  }
};

// NCHW float32, contiguous: the f32 lane layout with no ring.
LaneLayout nchw_layout(int64_t n, int64_t c, int64_t h, int64_t w);

// Output pixels (y0 + p*step_h, x0 + q*step_w) that use the same taps, for the raster of (p, q).
struct OutputPhase {
  int64_t tap_begin = 0, tap_end = 0;  // tap positions
  int64_t y0 = 0, x0 = 0;
};

// Phases whose pixels alternate in an output row are computed together and stored as one run, up to this stride.
constexpr int kMaxInterleave = 4;

struct Plan {
  LaneLayout in;
  int64_t out_h = 0, out_w = 0;
  int64_t raster_h = 0, raster_w = 0;  // of (p, q)
  int64_t step_h = 1, step_w = 1;      // output pixels between neighbours of the raster
  int64_t interleave = 1;              // neighbouring phases in a row of `phases`, whose pixels alternate in an output row
  std::vector<OutputPhase> phases;     // [.., interleave]
  std::vector<int32_t> offsets;        // [taps * input blocks] bytes from raster pixel (0, 0) to the block's first plane
  std::vector<int32_t> init;           // [phases, rows * block_o] starting value of the accumulators, empty when all zero
  bool flat = false;                   // vectors run on over row ends (planar layout)
  int64_t pitch = 0;                   // flat: raster columns from row to row, ring included
  bool pixels = false;                 // images of one pixel: lanes are output pixels, phases[i] is the tap of pixel i
};

// Output size of the layer; throws std::invalid_argument when there is no output pixel.
void output_size(const Layer& layer, int64_t h, int64_t w, int64_t* out_h, int64_t* out_w);

// per_image: images must not share vectors, because what follows differs from image to image. ring: what stands around the image
// is not the zero point, so that it counts. Throws std::invalid_argument when there is no output pixel, and when one packed image
// exceeds the 2 GiB of its offsets.
Plan make_plan(const Layer& layer, int64_t n, int64_t c, int64_t h, int64_t w, int vector_lanes, bool per_image, bool ring);

// A slot that no gather-GEMM reads: by rows, no ring.
LaneLayout plain_layout(Format format, int64_t n, int64_t c, int64_t h, int64_t w);

// The raster of a step without weights over output images of h x w.
Plan pointwise_plan(int64_t n, int64_t h, int64_t w);

}  // namespace sparsegan

#include "plan.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <utility>

namespace sparsegan {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t floor_mod(int64_t a, int64_t b) { return ((a % b) + b) % b; }

struct Tap {
  int64_t y, x;  // kernel position
};

// Tap positions as the packed columns count them: raster order, or by output phase (sparsegan/formats.py, tap_order).
std::vector<Tap> tap_positions(const Layer& layer) {
  std::vector<Tap> taps;
  for (int64_t y = 0; y < layer.kernel_h; y++)
    for (int64_t x = 0; x < layer.kernel_w; x++) taps.push_back({y, x});
  if (layer.transposed) {
    std::vector<std::pair<int64_t, Tap>> sorted;
    for (const Tap& t : taps)
      sorted.push_back({floor_mod(t.y * layer.dilation_h - layer.padding_h, layer.stride_h) * layer.stride_w +
                            floor_mod(t.x * layer.dilation_w - layer.padding_w, layer.stride_w),
                        t});
    std::stable_sort(sorted.begin(), sorted.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
    for (size_t i = 0; i < taps.size(); i++) taps[i] = sorted[i].second;
  }
  return taps;
}

// One axis of a layer: `out = scale * in + shift(tap)` on the raster, and the ring that the shifts reach into.
struct Axis {
  int64_t kernel, stride, padding, dilation, in, out;
  bool transposed;

  // Transposed: output phase of the tap, and the input pixel (relative to the raster) it reads.
  int64_t phase(int64_t tap) const { return floor_mod(tap * dilation - padding, stride); }
  int64_t shift(int64_t tap) const { return (phase(tap) + padding - tap * dilation) / stride; }
  // First and one past the last input pixel that any output pixel reads.
  int64_t first() const {
    if (!transposed) return -padding;
    int64_t lo = 0;
    for (int64_t t = 0; t < kernel; t++) lo = std::min(lo, shift(t));
    return lo;
  }
  int64_t last() const {
    if (!transposed) return (out - 1) * stride + (kernel - 1) * dilation - padding + 1;
    int64_t hi = in;
    for (int64_t t = 0; t < kernel; t++) hi = std::max(hi, ceil_div(out, stride) + shift(t));
    return hi;
  }
};

void set_strides(LaneLayout& l, bool by_rows) {
  if (by_rows) {
    l.plane_stride = l.cols;
    l.row_stride = l.planes * l.cols;
  } else {
    l.plane_stride = l.rows * l.cols;
    l.row_stride = l.cols;
  }
  l.phase_stride = l.planes * l.rows * l.cols;
  l.image_stride = l.phases_h * l.phases_w * l.phase_stride;
}

}  // namespace

int64_t LaneLayout::lanes() const { return batch_in_cols ? planes * plane_stride : images * image_stride; }

LaneLayout nchw_layout(int64_t n, int64_t c, int64_t h, int64_t w) {
  LaneLayout l;
  l.images = n, l.channels = l.planes = c, l.height = l.rows = h, l.width = l.cols = w;
  set_strides(l, /*by_rows=*/false);
  return l;
}

LaneLayout plain_layout(Format format, int64_t n, int64_t c, int64_t h, int64_t w) {
  LaneLayout l;
  l.format = format;
  l.images = n, l.channels = c, l.height = l.rows = h, l.width = l.cols = w;
  l.planes = ceil_div(c, lane_channels(format));
  set_strides(l, /*by_rows=*/true);
  return l;
}

Plan pointwise_plan(int64_t n, int64_t h, int64_t w) {
  Plan plan;
  plan.in.images = n, plan.in.height = h, plan.in.width = w;
  plan.out_h = plan.raster_h = h, plan.out_w = plan.raster_w = w;
  plan.phases.resize(1);
  return plan;
}

void output_size(const Layer& layer, int64_t h, int64_t w, int64_t* out_h, int64_t* out_w) {
  auto size = [&](int64_t in, int64_t k, int64_t s, int64_t p, int64_t op, int64_t d) {
    if (layer.transposed) return (in - 1) * s - 2 * p + d * (k - 1) + op + 1;
    const int64_t span = in + 2 * p - d * (k - 1) - 1;
    return span < 0 ? int64_t(0) : span / s + 1;
  };
  // Rows and columns below 2^31 keep every product of them below 2^63.
  if (h >= INT32_MAX || w >= INT32_MAX) throw std::invalid_argument("an image side of 2^31 pixels or more");
  *out_h = size(h, layer.kernel_h, layer.stride_h, layer.padding_h, layer.output_padding_h, layer.dilation_h);
  *out_w = size(w, layer.kernel_w, layer.stride_w, layer.padding_w, layer.output_padding_w, layer.dilation_w);
  if (*out_h < 1 || *out_w < 1)
    throw std::invalid_argument("an image of " + std::to_string(h) + "x" + std::to_string(w) + " gives an output of " +
                                std::to_string(*out_h) + "x" + std::to_string(*out_w) +
                                " pixels; the image must be at least as large as the kernel");
}

Plan make_plan(const Layer& layer, int64_t n, int64_t c, int64_t h, int64_t w, int vector_lanes, bool per_image, bool ring) {
  Plan plan;
  output_size(layer, h, w, &plan.out_h, &plan.out_w);
  const Format format = layer.weight.format;
  const int64_t blocks_k = ceil_div(c, kBlockK), taps = layer.weight.taps;
  const std::vector<Tap> positions = tap_positions(layer);
  const Axis ay{layer.kernel_h, layer.stride_h, layer.padding_h, layer.dilation_h, h, plan.out_h, layer.transposed};
  const Axis ax{layer.kernel_w, layer.stride_w, layer.padding_w, layer.dilation_w, w, plan.out_w, layer.transposed};

  LaneLayout& in = plan.in;
  in.format = format;
  in.images = n, in.channels = c, in.height = h, in.width = w;
  in.planes = blocks_k * block_planes(format);
  // Offsets inside an image are 32-bit. In floating point, since the product itself may overflow.
  auto check_size = [&](int64_t rows, int64_t cols) {
    if (4.0 * double(in.planes) * double(rows) * double(cols) > INT32_MAX)
      throw std::invalid_argument("one image of " + std::to_string(c) + "x" + std::to_string(h) + "x" + std::to_string(w) +
                                  " with its padding takes more than 2 GiB packed; cut it into tiles");
    if (double(plan.out_h) * double(plan.out_w) > INT32_MAX)
      throw std::invalid_argument("an output of " + std::to_string(plan.out_h) + "x" + std::to_string(plan.out_w) +
                                  " pixels; cut the image into tiles");
  };
  std::vector<int64_t> tap_lane(taps, 0);  // lanes from raster pixel (0, 0) to the pixel that the tap reads

  const bool batch_in_cols = !per_image && (n >= vector_lanes / 2 || format != Format::kInt8);
  if (h == 1 && w == 1 && !ring && (batch_in_cols || format == Format::kInt8)) {
    // Images of one pixel: an output pixel has at most one tap that is not padding, so every output pixel is a phase of its
    // own, without a multiplication by the ring. A large batch is the raster then; a small one would leave most lanes empty,
    // so its vectors run over the output pixels (int8, where a weight word is a whole row of a block).
    in.rows = 1;
    check_size(1, 1);
    if (double(plan.out_h) * double(plan.out_w) > 1 << 20)
      throw std::invalid_argument("an output of " + std::to_string(plan.out_h) + "x" + std::to_string(plan.out_w) +
                                  " from an image of one pixel");
    if (4.0 * double(in.planes) * double(n) > INT32_MAX)
      throw std::invalid_argument("a batch of " + std::to_string(n) + " rows of " + std::to_string(c) +
                                  " channels takes more than 2 GiB packed; use smaller batches");
    if (batch_in_cols) {
      in.batch_in_cols = true;
      in.cols = n;
      in.plane_stride = n, in.image_stride = 1, in.row_stride = n;
      plan.raster_h = 1, plan.raster_w = n;
    } else {
      plan.pixels = plan.flat = true;
      in.cols = 1;
      in.plane_stride = 1, in.image_stride = in.planes, in.row_stride = in.planes;
      plan.raster_h = plan.out_h, plan.raster_w = plan.pitch = plan.out_w;
    }
    plan.phases.resize(plan.out_h * plan.out_w);
    for (int64_t y = 0; y < plan.out_h; y++)
      for (int64_t x = 0; x < plan.out_w; x++) {
        OutputPhase& phase = plan.phases[y * plan.out_w + x];
        phase.y0 = y, phase.x0 = x;
        for (int64_t t = 0; t < taps; t++) {
          const int64_t in_y = layer.transposed ? y + ay.padding - positions[t].y * ay.dilation
                                                : y * ay.stride - ay.padding + positions[t].y * ay.dilation;
          const int64_t in_x = layer.transposed ? x + ax.padding - positions[t].x * ax.dilation
                                                : x * ax.stride - ax.padding + positions[t].x * ax.dilation;
          if (in_y == 0 && in_x == 0) phase.tap_begin = t, phase.tap_end = t + 1;
        }
      }
  } else {
    in.top = -ay.first(), in.left = -ax.first();
    const int64_t rows = in.top + std::max(h, ay.last()), cols = in.left + std::max(w, ax.last());
    check_size(rows + layer.stride_h, cols + layer.stride_w);
    if (layer.transposed && layer.stride_h * layer.stride_w > 1 << 20)
      throw std::invalid_argument("a stride of " + std::to_string(layer.stride_h) + "x" + std::to_string(layer.stride_w));
    if (!layer.transposed) in.phases_h = layer.stride_h, in.phases_w = layer.stride_w;
    in.rows = ceil_div(rows, in.phases_h), in.cols = ceil_div(cols, in.phases_w);
    if (layer.transposed) plan.step_h = layer.stride_h, plan.step_w = layer.stride_w;
    plan.raster_h = ceil_div(plan.out_h, plan.step_h), plan.raster_w = ceil_div(plan.out_w, plan.step_w);
    plan.interleave = plan.step_w <= kMaxInterleave ? plan.step_w : 1;

    const int64_t by_rows = plan.raster_h * ceil_div(plan.raster_w, vector_lanes);
    const int64_t flat = ceil_div((plan.raster_h - 1) * in.cols + plan.raster_w, vector_lanes);
    plan.flat = by_rows * 10 > flat * 11;
    plan.pitch = in.cols;
    set_strides(in, !plan.flat);

    for (int64_t t = 0; t < taps; t++) {
      const Tap& tap = positions[t];
      if (layer.transposed)
        tap_lane[t] = (ay.shift(tap.y) + in.top) * in.row_stride + ax.shift(tap.x) + in.left;
      else
        tap_lane[t] = in.at(0, tap.y * ay.dilation - ay.padding, tap.x * ax.dilation - ax.padding);
    }
    plan.phases.resize(plan.step_h * plan.step_w);
    int64_t t = 0;
    for (int64_t y = 0; y < plan.step_h; y++)
      for (int64_t x = 0; x < plan.step_w; x++) {
        OutputPhase& phase = plan.phases[y * plan.step_w + x];
        phase.y0 = y, phase.x0 = x, phase.tap_begin = t;
        if (layer.transposed)
          while (t < taps && ay.phase(positions[t].y) == y && ax.phase(positions[t].x) == x) t++;
        else
          t = taps;
        phase.tap_end = t;
      }
  }

  plan.offsets.resize(taps * blocks_k);
  for (int64_t t = 0; t < taps; t++)
    for (int64_t k = 0; k < blocks_k; k++)
      plan.offsets[t * blocks_k + k] = int32_t(4 * (tap_lane[t] + k * block_planes(format) * in.plane_stride));

  if (format == Format::kInt8 && layer.x_zero != 0) {
    const PackedWeight& weight = layer.weight;
    const int64_t packed_rows = weight.rows * weight.block_o;
    plan.init.assign(plan.phases.size() * packed_rows, 0);
    for (size_t i = 0; i < plan.phases.size(); i++)
      for (int64_t r = 0; r < packed_rows; r++) {
        const int32_t channel = weight.row_channels[r];
        if (channel < 0) continue;
        int32_t sum = 0;
        for (int64_t t = plan.phases[i].tap_begin; t < plan.phases[i].tap_end; t++) sum += weight.tap_sums[channel * taps + t];
        plan.init[i * packed_rows + r] = -layer.x_zero * sum;
      }
  }
  return plan;
}

}  // namespace sparsegan

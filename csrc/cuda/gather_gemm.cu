// launch_gather_gemm: checks, choice of tile and splits, launch. The kernels are in gather_gemm.cuh, the table of tiles in
// tile.h.
#include <cstdio>
#include <utility>

#include "gather_gemm.cuh"

namespace sparsegan::cuda {
namespace {

constexpr int64_t kLargest = (int64_t{1} << 31) - 1;  // elements of a tensor; CTAs of a grid
constexpr int kTapBits = 31;                          // of TapStep::leaves

int64_t element_bytes(Type type) { return type == Type::kUint8 ? 1 : type == Type::kFloat32 ? 4 : 2; }

bool aligned(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % static_cast<uint64_t>(bytes) == 0; }

// a * b * c * d <= kLargest, none of them negative.
bool fits(int64_t a, int64_t b, int64_t c = 1, int64_t d = 1) {
  if (a == 0 || b == 0 || c == 0 || d == 0) return true;
  return a <= kLargest / b && a * b <= kLargest / c && a * b * c <= kLargest / d;
}

// For n < 2^31: with 2^shift >= divisor, magic = 2^32 * (2^shift - divisor) / divisor, rounded up.
Divisor make_divisor(uint32_t divisor) {
  Divisor d{1, 0};
  while ((uint64_t{1} << d.shift) < divisor) d.shift++;
  d.magic = static_cast<uint32_t>(((uint64_t{1} << d.shift) - divisor) * (uint64_t{1} << 32) / divisor + 1);
  return d;
}

// Adds `value` to the list if it is not there; its place, or -1 if the list is full.
int place_in(int16_t (&list)[32], int32_t* count, int16_t value) {
  for (int i = 0; i < *count; i++)
    if (list[i] == value) return i;
  if (*count == 32) return -1;
  list[*count] = value;
  return (*count)++;
}

// What is wrong with a call, or nullptr.
const char* check(const GatherGemm& c) {
  if (const char* why = refuse_gather_gemm(c.weight_type, c.block_o, c.block_k, c.metadata != nullptr)) return why;
  const int64_t element = element_bytes(c.weight_type);
  if (c.batch < 0 || c.height < 0 || c.width < 0 || c.out_height < 0 || c.out_width < 0) return "gather_gemm: a size is negative";
  if (c.rows < 1 || c.taps < 1 || c.in_blocks < 1 || c.blocks < 0 || c.out_channels < 1)
    return "gather_gemm: the weight has no rows, taps, input blocks or output channels";
  if (c.taps > kMaxTaps) return "gather_gemm: kernels of more than 128 positions are not supported";
  if (c.out_channels > c.rows * c.block_o || c.out_channels <= (c.rows - 1) * c.block_o)
    return "gather_gemm: the number of rows does not fit the number of output channels";
  if (!fits(c.rows, c.block_o) || !fits(c.taps, c.in_blocks) || !fits(c.blocks, c.block_o, c.block_k))
    return "gather_gemm: a weight beyond 2^31 elements";
  if (c.phase_count < 1 || c.phase_count > kMaxPhases) return "gather_gemm: more than 16 phases (stride_h * stride_w)";
  if (c.in_step_h < 1 || c.in_step_w < 1 || c.out_step_h < 1 || c.out_step_w < 1) return "gather_gemm: a step is below 1";
  for (int i = 0; i < c.phase_count; i++) {
    const Phase& p = c.phases[i];
    if (p.tap_begin < 0 || p.tap_begin > p.tap_end || p.tap_end > c.taps)
      return "gather_gemm: the taps of a phase are out of range";
    if (p.height < 0 || p.width < 0 || p.y0 < 0 || p.x0 < 0) return "gather_gemm: a size of a phase is negative";
    if (p.height > 0 && p.width > 0 &&
        (p.y0 + (p.height - int64_t{1}) * c.out_step_h >= c.out_height ||
         p.x0 + (p.width - int64_t{1}) * c.out_step_w >= c.out_width))
      return "gather_gemm: a phase leaves the output";
  }
  if (c.x_stride < c.in_blocks * c.block_k) return "gather_gemm: the pixels of x are narrower than the weight's input blocks";
  if (c.x_stride * element % 16) return "gather_gemm: the pixels of x must be multiples of 16 bytes apart";
  if (c.y_stride < c.out_channels) return "gather_gemm: the pixels of y are narrower than the output channels";
  if (c.residual && c.residual_stride < c.out_channels)
    return "gather_gemm: the pixels of the residual are narrower than the output channels";
  // Only coordinates are kept in 32 bits: a few taps beyond the image must not overflow them either.
  if (!fits(c.batch, c.height, c.width, c.x_stride)) return "gather_gemm: x is beyond 2^31 elements";
  if (!fits(c.batch, c.out_height, c.out_width, c.y_stride) ||
      (c.residual && !fits(c.batch, c.out_height, c.out_width, c.residual_stride)))
    return "gather_gemm: y or the residual is beyond 2^31 elements";
  if (!fits(2 * c.out_height, c.in_step_h) || !fits(2 * c.out_width, c.in_step_w))
    return "gather_gemm: the output reaches too far beyond x";
  if (!c.pad || !c.tap_ptr || !c.row_channels || (c.blocks && (!c.values || !c.cols))) return "gather_gemm: a pointer is missing";
  if (c.batch && c.out_height && c.out_width && (!c.y || (!c.x && c.height && c.width)))
    return "gather_gemm: a pointer is missing";
  if (!aligned(c.x, 16) || !aligned(c.pad, 16) || !aligned(c.values, 16) || !aligned(c.metadata, 16) ||
      !aligned(c.workspace, 16) || !aligned(c.row_channels, 16))
    return "gather_gemm: x, pad, values, metadata, row_channels and workspace must begin at multiples of 16 bytes";
  if (!aligned(c.cols, 4) || !aligned(c.tap_ptr, 4) || !aligned(c.zero_sums, 4) || !aligned(c.scale, 4) || !aligned(c.bias, 4) ||
      !aligned(c.y, element_bytes(c.y_type)) || !aligned(c.residual, element_bytes(c.residual_type)))
    return "gather_gemm: a pointer is not a multiple of its element";
  return nullptr;
}

// The call in the form the kernel wants, for tiles of so many pixels; what is wrong with it, or nullptr.
const char* prepare(const GatherGemm& c, int pixels, GatherWork* w) {
  const int64_t element = element_bytes(c.weight_type), pixel_bytes = c.x_stride * element;
  w->x = static_cast<const uint8_t*>(c.x);
  w->pad = static_cast<const uint8_t*>(c.pad);
  w->values = static_cast<const uint8_t*>(c.values);
  w->metadata = reinterpret_cast<const uint8_t*>(c.metadata);
  w->cols = c.cols;
  w->tap_ptr = c.tap_ptr;
  w->workspace = nullptr;
  w->splits = 1;
  w->pixel_bytes = pixel_bytes;
  w->block_units = static_cast<int32_t>(c.block_k * element / 16);
  w->height = static_cast<uint32_t>(c.height);
  w->width = static_cast<uint32_t>(c.width);
  w->taps = static_cast<int32_t>(c.taps);
  w->in_blocks = static_cast<int32_t>(c.in_blocks);
  w->in_step_h = c.in_step_h, w->in_step_w = c.in_step_w;
  w->out_step_h = c.out_step_h, w->out_step_w = c.out_step_w;
  w->out_height = static_cast<uint32_t>(c.out_height);
  w->out_width = static_cast<uint32_t>(c.out_width);
  w->rows = static_cast<uint32_t>(c.rows);
  w->per_rows = make_divisor(w->rows);
  w->per_in_blocks = make_divisor(static_cast<uint32_t>(c.in_blocks));

  w->tap_rows = w->tap_columns = 0;
  int rows[kMaxTaps], columns[kMaxTaps];
  for (int t = 0; t < c.taps; t++) {
    rows[t] = place_in(w->dy, &w->tap_rows, c.dy[t]);
    columns[t] = place_in(w->dx, &w->tap_columns, c.dx[t]);
    if (rows[t] < 0 || columns[t] < 0 || w->tap_rows + w->tap_columns > kTapBits)
      return "gather_gemm: kernels of more than 31 different rows and columns of positions are not supported";
  }
  for (int t = 0; t < c.taps; t++) {
    const int64_t offset = (c.dy[t] * c.width + c.dx[t]) * (pixel_bytes / 16), reach = offset + pixel_bytes / 16;
    if (offset < -kLargest || reach > kLargest) return "gather_gemm: a tap reaches too far beyond x";
    w->steps[t] = {static_cast<int32_t>(offset), 1u << rows[t] | 1u << (w->tap_rows + columns[t])};
  }

  w->phase_count = c.phase_count;
  int64_t tiles = 0;
  for (int i = 0; i < c.phase_count; i++) {
    const Phase& p = c.phases[i];
    PhaseWork& to = w->phases[i];
    to.tap_begin = p.tap_begin, to.tap_end = p.tap_end;
    to.y0 = p.y0, to.x0 = p.x0;
    to.height = static_cast<uint32_t>(p.height);
    to.width = static_cast<uint32_t>(p.width);
    to.pixels = static_cast<uint32_t>(phase_pixels(c, i));
    to.first_tile = static_cast<uint32_t>(tiles);
    to.per_image = make_divisor(to.pixels ? to.height * to.width : 1);
    to.per_row = make_divisor(to.pixels ? to.width : 1);
    tiles += (phase_pixels(c, i) + pixels - 1) / pixels;
  }

  Epilogue& e = w->epilogue;
  const auto vectors = [](const void* p, Type type, int64_t stride) {
    return stride % 4 == 0 && aligned(p, 4 * element_bytes(type));
  };
  e.row_channels = c.row_channels;
  e.zero_sums = c.zero_sums;
  e.scale = c.scale;
  e.bias = c.bias;
  e.residual = static_cast<const uint8_t*>(c.residual);
  e.y = static_cast<uint8_t*>(c.y);
  e.residual_stride = c.residual_stride;
  e.y_stride = c.y_stride;
  e.out_channels = static_cast<int32_t>(c.out_channels);
  e.residual_type = c.residual_type;
  e.y_type = c.y_type;
  e.vectors = c.out_channels % 4 == 0 && aligned(c.zero_sums, 16) && aligned(c.scale, 16) && aligned(c.bias, 16);
  e.residual_vectors = vectors(c.residual, c.residual_type, c.residual_stride);
  e.y_vectors = vectors(c.y, c.y_type, c.y_stride);
  e.act = c.act, e.post_act = c.post_act;
  e.slope = c.slope, e.post_slope = c.post_slope;
  e.residual_scale = c.residual_scale;
  e.residual_zero = c.residual_zero;
  e.y_inverse_scale = c.y_inverse_scale;
  e.y_zero = c.y_zero;
  return nullptr;
}

template <Type kType, bool kTwoFour>
struct FormatOf;
template <>
struct FormatOf<Type::kUint8, false> {
  using Is = Int8;
};
template <>
struct FormatOf<Type::kFloat16, false> {
  using Is = Float16;
};
template <>
struct FormatOf<Type::kBFloat16, false> {
  using Is = BrainFloat16;
};
template <>
struct FormatOf<Type::kUint8, true> {
  using Is = Int8TwoFour;
};
template <>
struct FormatOf<Type::kFloat16, true> {
  using Is = Float16TwoFour;
};
template <>
struct FormatOf<Type::kBFloat16, true> {
  using Is = BrainFloat16TwoFour;
};

template <size_t kIndex>
const char* launch_tile(const GatherWork& work, uint32_t ctas, Stream stream) {
  constexpr Tile t = kTiles[kIndex];
  using Kernel = GatherTile<typename FormatOf<t.type, t.two_four>::Is, t.block_o, t.block_k, t.pixels>;
  return LAUNCH((gather_gemm_kernel<Kernel>), dim3(ctas, work.splits), dim3(kThreads), t.shared_bytes(), stream, work);
}

using Launch = const char* (*)(const GatherWork&, uint32_t, Stream);
template <size_t... kIndex>
Launch launch_of(int tile, std::index_sequence<kIndex...>) {
  constexpr Launch table[] = {launch_tile<kIndex>...};
  return table[tile];
}

const char* add_splits(const GatherWork& work, const Tile& tile, uint32_t ctas, Stream stream) {
  constexpr int kParts = 4;  // a CTA each for a quarter of the pixels
  if (tile.type == Type::kUint8)
    return LAUNCH((add_splits_kernel<int>), dim3(ctas, kParts), dim3(kThreads), 0, stream, work, tile.block_o, tile.pixels);
  return LAUNCH((add_splits_kernel<float>), dim3(ctas, kParts), dim3(kThreads), 0, stream, work, tile.block_o, tile.pixels);
}

}  // namespace

const char* refuse_gather_gemm(Type weight_type, int block_o, int block_k, bool two_four) {
  for (const Tile& t : kTiles)
    if (t.type == weight_type && t.two_four == two_four && t.block_o == block_o && t.block_k == block_k) return nullptr;
  const bool bytes = weight_type == Type::kUint8, half = weight_type == Type::kFloat16 || weight_type == Type::kBFloat16;
  if (!bytes && !half) return "float32 weights have no CUDA kernel: wanted int8, float16 or bfloat16";
  thread_local char text[128];
  std::snprintf(
      text, sizeof text, "%s%s blocks of %dx%d have no CUDA kernel: wanted %s",
      bytes                           ? "int8"
      : weight_type == Type::kFloat16 ? "float16"
                                      : "bfloat16",
      two_four ? " 2:4" : "", block_o, block_k,
      two_four ? (bytes ? "32x64 or 64x64" : "32x32 or 64x32") : (bytes ? "16x32, 32x32 or 64x32" : "16x16, 32x32 or 64x16"));
  return text;
}

int64_t gather_gemm_workspace(const GatherGemm& call, int multiprocessors) {
  if (check(call)) return 0;
  const Tile& tile = kTiles[choose_tile(call, multiprocessors)];
  const int splits = choose_splits(call, tile, multiprocessors);
  return splits == 1 ? 0 : splits * cta_count(call, tile.pixels) * tile.pixels * tile.block_o * 4;
}

const char* launch_gather_gemm(const GatherGemm& call, int multiprocessors, Stream stream) {
  if (const char* wrong = check(call)) return wrong;
  const int index = choose_tile(call, multiprocessors);
  const Tile& tile = kTiles[index];
  const int64_t ctas = cta_count(call, tile.pixels);
  if (ctas == 0) return nullptr;  // no output pixels
  if (ctas > kLargest) return "gather_gemm: more than 2^31 CTAs";
  GatherWork work;
  if (const char* wrong = prepare(call, tile.pixels, &work)) return wrong;
  if (call.workspace) {
    if (call.workspace_bytes < gather_gemm_workspace(call, multiprocessors))
      return "gather_gemm: the workspace is smaller than gather_gemm_workspace() says";
    work.splits = choose_splits(call, tile, multiprocessors);
    work.workspace = static_cast<uint8_t*>(call.workspace);
  }
  const Launch launch = launch_of(index, std::make_index_sequence<kTileCount>());
  const char* failed = launch(work, static_cast<uint32_t>(ctas), stream);
  if (!failed && work.splits > 1) failed = add_splits(work, tile, static_cast<uint32_t>(ctas), stream);
  return failed;
}

}  // namespace sparsegan::cuda

// Checks a call of quantize, chooses how x is read, and launches; see quantize.cuh.
#include <initializer_list>

#include "quantize.cuh"

namespace sparsegan::cuda {
namespace {

struct Dimension {
  int64_t size, stride;
};

// Whether two neighbouring dimensions are one: then `inner` becomes it and `outer` has size 1.
void merge(Dimension& outer, Dimension& inner) {
  if (inner.size == 1) {
    inner = outer;
  } else if (outer.size != 1 && outer.stride != inner.size * inner.stride) {
    return;
  } else {
    inner.size *= outer.size;
  }
  outer = {1, 0};
}

template <class TX, class TY>
const char* launch(const QuantizeArguments& arguments, Read read, dim3 grid, Stream stream) {
  const auto kernel = read == Read::kPixels     ? quantize_kernel<TX, TY, Read::kPixels>
                      : read == Read::kChannels ? quantize_kernel<TX, TY, Read::kChannels>
                                                : quantize_kernel<TX, TY, Read::kSingle>;
  return LAUNCH(kernel, grid, dim3(kQuantizeThreads), kQuantizeShared, stream, arguments);
}

template <class TX>
const char* launch(const QuantizeArguments& arguments, Type y_type, Read read, dim3 grid, Stream stream) {
  switch (y_type) {
    case Type::kUint8:
      return launch<TX, uint8_t>(arguments, read, grid, stream);
    case Type::kFloat16:
      return launch<TX, Half>(arguments, read, grid, stream);
    default:
      return launch<TX, BFloat16>(arguments, read, grid, stream);
  }
}

// A product of sizes, at most 2^31 (then too large).
int64_t elements(std::initializer_list<int64_t> sizes) {
  int64_t product = 1;
  for (const int64_t size : sizes) product = size > 0 && product > (int64_t(1) << 31) / size ? int64_t(1) << 31 : product * size;
  return product;
}

}  // namespace

const char* launch_quantize(const Quantize& call, Stream stream) {
  if (call.x_type != Type::kFloat32 && call.x_type != Type::kFloat16 && call.x_type != Type::kBFloat16)
    return "quantize: x must be float32, float16 or bfloat16";
  if (call.y_type != Type::kUint8 && call.y_type != Type::kFloat16 && call.y_type != Type::kBFloat16)
    return "quantize: y must be uint8, float16 or bfloat16";
  if (call.batch < 0 || call.channels < 1 || call.height < 1 || call.width < 1)
    return "quantize: sizes of x must be positive (an empty batch is allowed)";
  if (call.batch == 0) return nullptr;
  if (!call.x || !call.y) return "quantize: x and y must not be null";
  const int64_t x_bytes = call.x_type == Type::kFloat32 ? 4 : 2, y_bytes = call.y_type == Type::kUint8 ? 1 : 2;
  if (call.y_stride < call.channels || call.y_stride * y_bytes % 16)
    return "quantize: y_stride must hold the channels and be a multiple of 16 bytes";
  if (reinterpret_cast<uintptr_t>(call.y) % 16) return "quantize: y must be 16-byte aligned";
  if (reinterpret_cast<uintptr_t>(call.x) % x_bytes) return "quantize: x is not aligned to its elements";
  for (const int64_t stride : call.x_strides)
    if (stride < 0) return "quantize: strides of x must not be negative";
  if (call.y_type == Type::kUint8 && (call.zero < 0 || call.zero > 255)) return "quantize: the zero point must lie in 0..255";
  constexpr int64_t kLimit = int64_t(1) << 31;
  if (elements({call.batch, call.channels, call.height, call.width}) >= kLimit ||
      elements({call.batch, call.height, call.width, call.y_stride}) >= kLimit)
    return "quantize: x and y must have fewer than 2^31 elements";

  Dimension n{call.batch, call.x_strides[0]}, h{call.height, call.x_strides[2]}, w{call.width, call.x_strides[3]};
  merge(h, w);
  if (h.size == 1)
    merge(n, w);
  else
    merge(n, h);

  const int64_t stride_c = call.channels == 1 ? 0 : call.x_strides[1];
  const auto fours = [](std::initializer_list<int64_t> numbers) {
    for (const int64_t number : numbers)
      if (number % 4) return false;
    return true;
  };
  const bool aligned = reinterpret_cast<uintptr_t>(call.x) % (4 * x_bytes) == 0;
  const Read read = aligned && w.stride == 1 && fours({w.size, n.stride, h.stride, stride_c})          ? Read::kPixels
                    : aligned && stride_c == 1 && fours({call.channels, n.stride, h.stride, w.stride}) ? Read::kChannels
                                                                                                       : Read::kSingle;
  const QuantizeArguments arguments{
      .x = call.x,
      .y = call.y,
      .stride_n = n.stride,
      .stride_h = h.stride,
      .stride_w = w.stride,
      .stride_c = stride_c,
      .height = int32_t(h.size),
      .width = int32_t(w.size),
      .pixels = int32_t(call.batch * call.height * call.width),
      .channels = int32_t(call.channels),
      .y_stride = int32_t(call.y_stride),
      .inverse_scale = call.inverse_scale,
      .zero = call.y_type == Type::kUint8 ? call.zero : 0,
  };
  const int64_t tile_channels = kQuantizeChunks * 16 / y_bytes,
                channel_tiles = (call.y_stride + tile_channels - 1) / tile_channels;
  if (channel_tiles > 65535) return "quantize: y_stride is too large";
  const dim3 grid((arguments.pixels + kQuantizePixels - 1) / kQuantizePixels, uint32_t(channel_tiles));
  switch (call.x_type) {
    case Type::kFloat32:
      return launch<float>(arguments, call.y_type, read, grid, stream);
    case Type::kFloat16:
      return launch<Half>(arguments, call.y_type, read, grid, stream);
    default:
      return launch<BFloat16>(arguments, call.y_type, read, grid, stream);
  }
}

}  // namespace sparsegan::cuda

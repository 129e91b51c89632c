// From the sums of a gather-GEMM to the output, four channels of one pixel at a time:
//
//   v = act((sum - zero_sum[phase, o]) * scale[o] + bias[o]);  v = post_act(v + residual);  y = v, rounded to the type of y
//
// Neighbouring lanes take neighbouring groups of four channels, so a warp stores whole sectors for every type of y: 4 bytes a
// lane for u8, 8 for f16 and bf16, 16 for f32. Where the channels of a group do not follow each other, or do not begin at a
// multiple of four, they are stored one by one. Types and activations are run-time switches, the same way for a whole grid: they
// cost a few instructions a group, where one kernel for each combination would cost hundreds of kernels.
#pragma once
#include <type_traits>

#include "elementwise.cuh"

namespace sparsegan::cuda {

struct Epilogue {
  const int32_t* row_channels;
  const int32_t* zero_sums;
  const float *scale, *bias;
  const uint8_t* residual;
  uint8_t* y;
  int64_t residual_stride, y_stride;
  int32_t out_channels;
  Type residual_type, y_type;
  bool vectors, residual_vectors, y_vectors;  // four channels of scale, bias and zero_sums, of the residual, of y begin at
                                              // addresses that one access may have
  Activation act, post_act;
  float slope, post_slope;
  float residual_scale, y_inverse_scale;
  int32_t residual_zero, y_zero;
};

// Four neighbouring elements.
template <class E>
struct alignas(4 * sizeof(E)) Four {
  E e[4];
};

// What a thread keeps of the four channels that it finishes for one pixel after the other.
struct ChannelGroup {
  int32_t channel[4];  // -1: padding
  bool consecutive, empty;
  Four<int32_t> zero_sum;
  Four<float> scale, bias;
};

// The elements of an array over channels, at once or one by one.
template <class E>
SPARSEGAN_DEVICE Four<E> load_four(const E* from, const ChannelGroup& g, bool vectors) {
  if (g.consecutive && vectors) return load_vector<Four<E>>(from + g.channel[0]);
  Four<E> values{};
#pragma unroll
  for (int i = 0; i < 4; i++)
    if (g.channel[i] >= 0) values.e[i] = from[g.channel[i]];
  return values;
}

// slot: position of the first of the four among the packed rows, a multiple of 4.
SPARSEGAN_DEVICE ChannelGroup load_group(const Epilogue& e, int phase, int64_t slot) {
  ChannelGroup g;
  const Four<int32_t> channels = load_vector<Four<int32_t>>(e.row_channels + slot);
  const int32_t first = channels.e[0];
  g.consecutive = first % 4 == 0;
  g.empty = true;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    g.channel[i] = channels.e[i];
    g.consecutive &= channels.e[i] == first + i;
    g.empty &= channels.e[i] < 0;
  }
  g.zero_sum = {0, 0, 0, 0};
  g.scale = {1, 1, 1, 1};
  g.bias = {0, 0, 0, 0};
  if (e.zero_sums) g.zero_sum = load_four(e.zero_sums + static_cast<int64_t>(phase) * e.out_channels, g, e.vectors);
  if (e.scale) g.scale = load_four(e.scale, g, e.vectors);
  if (e.bias) g.bias = load_four(e.bias, g, e.vectors);
  return g;
}

template <Activation kActivation>
SPARSEGAN_DEVICE void activate_group(float (&v)[4], float slope) {
#pragma unroll
  for (int i = 0; i < 4; i++) v[i] = activate(kActivation, v[i], slope);
}

SPARSEGAN_DEVICE void activate_group(Activation activation, float (&v)[4], float slope) {
  switch (activation) {
    case Activation::kNone:
      break;
    case Activation::kRelu:
      activate_group<Activation::kRelu>(v, slope);
      break;
    case Activation::kLeakyRelu:
      activate_group<Activation::kLeakyRelu>(v, slope);
      break;
    case Activation::kTanh:
      activate_group<Activation::kTanh>(v, slope);
      break;
    case Activation::kSigmoid:
      activate_group<Activation::kSigmoid>(v, slope);
      break;
    case Activation::kSilu:
      activate_group<Activation::kSilu>(v, slope);
      break;
    case Activation::kGelu:
      activate_group<Activation::kGelu>(v, slope);
      break;
  }
}

template <class E>
SPARSEGAN_DEVICE void store_four(E* to, const Four<E>& values, const ChannelGroup& g, bool vectors) {
  if (g.consecutive && vectors) return store_vector(to + g.channel[0], values);
#pragma unroll
  for (int i = 0; i < 4; i++)
    if (g.channel[i] >= 0) to[g.channel[i]] = values.e[i];
}

template <class E>
SPARSEGAN_DEVICE void add_residual(const Epilogue& e, const ChannelGroup& g, int64_t pixel, float (&v)[4]) {
  const Four<E> r = load_four(reinterpret_cast<const E*>(e.residual) + pixel * e.residual_stride, g, e.residual_vectors);
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if constexpr (sizeof(E) == 1)
      v[i] += dequantize_u8(r.e[i], e.residual_scale, e.residual_zero);
    else
      v[i] += to_float(r.e[i]);
  }
}

template <class E>
SPARSEGAN_DEVICE void store_output(const Epilogue& e, const ChannelGroup& g, int64_t pixel, const float (&v)[4]) {
  Four<E> rounded;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if constexpr (sizeof(E) == 1)
      rounded.e[i] = static_cast<uint8_t>(quantize_u8(v[i], e.y_inverse_scale, e.y_zero));
    else
      rounded.e[i] = from_float<E>(v[i]);
  }
  store_four(reinterpret_cast<E*>(e.y) + pixel * e.y_stride, rounded, g, e.y_vectors);
}

// pixel: its number in y.
template <class Sum>
SPARSEGAN_DEVICE void finish_group(const Epilogue& e, const ChannelGroup& g, int64_t pixel, const Four<Sum>& sums) {
  float v[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    if constexpr (std::is_integral_v<Sum>)
      v[i] = fmaf(static_cast<float>(sums.e[i] - g.zero_sum.e[i]), g.scale.e[i], g.bias.e[i]);
    else
      v[i] = fmaf(sums.e[i], g.scale.e[i], g.bias.e[i]);
  }
  activate_group(e.act, v, e.slope);
  if (e.residual) {
    switch (e.residual_type) {
      case Type::kUint8:
        add_residual<uint8_t>(e, g, pixel, v);
        break;
      case Type::kFloat16:
        add_residual<Half>(e, g, pixel, v);
        break;
      case Type::kBFloat16:
        add_residual<BFloat16>(e, g, pixel, v);
        break;
      case Type::kFloat32:
        add_residual<float>(e, g, pixel, v);
        break;
    }
  }
  activate_group(e.post_act, v, e.post_slope);
  switch (e.y_type) {
    case Type::kUint8:
      store_output<uint8_t>(e, g, pixel, v);
      break;
    case Type::kFloat16:
      store_output<Half>(e, g, pixel, v);
      break;
    case Type::kBFloat16:
      store_output<BFloat16>(e, g, pixel, v);
      break;
    case Type::kFloat32:
      store_output<float>(e, g, pixel, v);
      break;
  }
}

}  // namespace sparsegan::cuda

// What the kernels do to one value: activations, and rounding to the u8 of the activations and back. The rules are those of the
// CPU kernels (csrc/cpu/simd.h), so that both give the same integers. Sums of products are fused only where fmaf is written: the
// build switches off what the compiler would fuse by itself.
#pragma once
#include "../packed.h"
#include "launch.h"
#include "warp.cuh"

namespace sparsegan::cuda {

// One activation on kCount values: the switch stands outside of the loop. NaN stays NaN; slope is that of the leaky ReLU.
template <int kCount>
SPARSEGAN_DEVICE void activate(Activation activation, float (&v)[kCount], float slope) {
  const auto each = [&](auto function) {
#pragma unroll
    for (int i = 0; i < kCount; i++) v[i] = function(v[i]);
  };
  switch (activation) {
    case Activation::kNone:
      break;
    case Activation::kRelu:
      return each([](float x) { return x < 0.0f ? 0.0f : x; });
    case Activation::kLeakyRelu:
      return each([=](float x) { return x > 0.0f ? x : x * slope; });
    case Activation::kTanh:
      return each([](float x) { return tanhf(x); });
    case Activation::kSigmoid:
      return each([](float x) { return 1.0f / (1.0f + expf(-x)); });
    case Activation::kSilu:
      return each([](float x) {
        x = x < -88.0f ? -88.0f : x;  // where exp would overflow; the result is 0 but for 1e-36
        return x / (1.0f + expf(-x));
      });
    case Activation::kGelu:  // erfc keeps the digits of the negative side
      return each([](float x) { return 0.5f * x * erfcf(x * -0.70710678118654752f); });
  }
}

SPARSEGAN_DEVICE float activate(Activation activation, float v, float slope) {
  float values[1] = {v};
  activate(activation, values, slope);
  return values[0];
}

// clamp(round(v * inverse_scale) + zero, 0, 255), ties to even; NaN gives 0, as on the CPU.
SPARSEGAN_DEVICE int quantize_u8(float v, float inverse_scale, int zero) {
  float steps = v * inverse_scale;
  steps = steps > -1024.0f ? steps : -1024.0f;  // a NaN too
  steps = steps < 1024.0f ? steps : 1024.0f;
  const int q = static_cast<int>(rintf(steps)) + zero;
  return q < 0 ? 0 : q > 255 ? 255 : q;
}

SPARSEGAN_DEVICE float dequantize_u8(int q, float scale, int zero) { return static_cast<float>(q - zero) * scale; }

// What a vector of so many bytes is loaded and stored as.
template <int kBytes>
struct VectorOf;
template <>
struct VectorOf<4> {
  using Words = uint32_t;
};
template <>
struct VectorOf<8> {
  using Words = Words2;
};
template <>
struct VectorOf<16> {
  using Words = Words4;
};
template <int kBytes>
using Vector = typename VectorOf<kBytes>::Words;

// As many values of T as `Words` holds, to and from float; T is uint8_t, Half, BFloat16 or float. kCount values of a u8 are whole
// numbers: the scale and the zero point are the caller's.
template <class T, class Words, int kCount>
SPARSEGAN_DEVICE void unpack(const Words& words, float (&v)[kCount]) {
  static_assert(sizeof(Words) == kCount * sizeof(T));
  const uint32_t* word = reinterpret_cast<const uint32_t*>(&words);
#pragma unroll
  for (int i = 0; i < kCount; i++) {
    if constexpr (sizeof(T) == 1)
      v[i] = static_cast<float>(word[i / 4] >> 8 * (i % 4) & 255u);
    else if constexpr (sizeof(T) == 2)
      v[i] = to_float(T{static_cast<uint16_t>(word[i / 2] >> 16 * (i % 2))});
    else
      v[i] = __uint_as_float(word[i]);
  }
}

// u8: rounded as quantize_u8 does.
template <class T, class Words, int kCount>
SPARSEGAN_DEVICE Words pack(const float (&v)[kCount], float inverse_scale, int zero) {
  static_assert(sizeof(Words) == kCount * sizeof(T));
  Words words{};
  uint32_t* word = reinterpret_cast<uint32_t*>(&words);
#pragma unroll
  for (int i = 0; i < kCount; i++) {
    if constexpr (sizeof(T) == 1)
      word[i / 4] |= static_cast<uint32_t>(quantize_u8(v[i], inverse_scale, zero)) << 8 * (i % 4);
    else if constexpr (sizeof(T) == 2)
      word[i / 2] |= static_cast<uint32_t>(from_float<T>(v[i]).bits) << 16 * (i % 2);
    else
      word[i] = __float_as_uint(v[i]);
  }
  return words;
}

}  // namespace sparsegan::cuda

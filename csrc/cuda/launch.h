// What the bindings ask of the kernels: plain structs and raw device pointers, no header of CUDA or torch.
//
// Activations are channels_last, [batch, height, width, stride] with `stride` elements from pixel to pixel, a multiple of 16
// bytes (outputs and residuals of the gather-GEMM: any number, in multiples of 4 elements stored whole); u8 stands for (q - zero)
// * scale. Every launch_* returns nullptr, or a static text that says what is wrong with the call or what the CUDA runtime
// answered; a wrong call launches nothing.
#pragma once
#include <cstdint>

#include "../packed.h"

namespace sparsegan::cuda {

enum class Type { kUint8, kFloat16, kBFloat16, kFloat32 };

// Positions of the kernel, in the order of the packed weight. More taps than this are refused, and so are more than 31 different
// dy and dx together (a pixel keeps in one word which of them fall outside the image).
constexpr int kMaxTaps = 128;
// Output phases of a transposed convolution: stride_h * stride_w.
constexpr int kMaxPhases = 16;

// Output pixels (y0 + i * step, x0 + j * step), each the sum over taps [tap_begin, tap_end) of
// w[tap] . x[i * in_step + dy[tap], j * in_step + dx[tap]]. A convolution and a linear layer have one phase.
struct Phase {
  int32_t tap_begin = 0, tap_end = 0;
  int32_t y0 = 0, x0 = 0;         // first output pixel
  int32_t height = 0, width = 0;  // output pixels of this phase
};

struct GatherGemm {
  // Input: u8 for s8 weights, else of the type of the weight. Channels from `in_channels` to in_blocks * block_k hold anything
  // finite (their weights are zero). stride >= in_blocks * block_k. What lies outside the image reads as `pad`.
  const void* x = nullptr;
  int64_t batch = 0, height = 0, width = 0, x_stride = 0;
  const void* pad = nullptr;  // block_k elements on the device: the zero point, or 0

  // Weight, as sparsegan/formats.py packs it: values [blocks, block_o, block_k] of s8, f16 or bf16. With 2:4 sparsity
  // (metadata != nullptr, even with no block) values are [blocks, block_o, block_k / 2]: of every run of 4 input channels the 2
  // kept. metadata [blocks, block_o / 16, words] says where they were, in the order in which the lanes of a warp hand it to
  // mma.sp; idx[v] is the position in its run, 0..3, of kept value v of the row:
  //   s8 (block_k 64), 32 words a tile of 16 rows: word w is of row w / 4 + 8 * (w % 2), v = 16 * (w / 2 % 2) + i: idx[v] at bits
  //                                       2i, 2i + 1, i < 16
  //   f16, bf16 (block_k 32), 16 words:   word w is of row w / 2 (low half) and row w / 2 + 8 (high half), v = 8 * (w % 2) + i:
  //                                       idx[v] at bits 2i, 2i + 1 of the half, i < 8
  // The two positions of a run ascend; where fewer than two weights are not zero, zeros fill up.
  Type weight_type = Type::kUint8;  // kUint8 stands for s8 weights times u8 activations
  int32_t block_o = 0, block_k = 0;
  const void* values = nullptr;
  const uint32_t* metadata = nullptr;
  const int32_t *cols = nullptr, *tap_ptr = nullptr, *row_channels = nullptr;
  int64_t blocks = 0;  // kept blocks in all
  int64_t rows = 0, taps = 0, in_blocks = 0, out_channels = 0;

  // Geometry
  int16_t dy[kMaxTaps] = {}, dx[kMaxTaps] = {};
  Phase phases[kMaxPhases];
  int32_t phase_count = 1;
  int32_t in_step_h = 1, in_step_w = 1;    // input pixels from one output pixel of a phase to the next
  int32_t out_step_h = 1, out_step_w = 1;  // output pixels from one pixel of a phase to the next
  int64_t out_height = 0, out_width = 0;

  // Epilogue: v = act((acc - zero_sums[phase, o]) * scale[o] + bias[o]); v = post_act(v + residual)
  const int32_t* zero_sums = nullptr;  // [phase_count, out_channels]: zero point times the weights of the phase, or nullptr: 0
  const float *scale = nullptr, *bias = nullptr;  // [out_channels], or nullptr: 1 and 0
  Activation act = Activation::kNone, post_act = Activation::kNone;
  float slope = 0, post_slope = 0;
  const void* residual = nullptr;  // of the shape of y, or nullptr
  Type residual_type = Type::kFloat32;
  int64_t residual_stride = 0;
  float residual_scale = 1;
  int32_t residual_zero = 0;

  // Output; channels from out_channels to y_stride are left alone. u8: q = clamp(round(v * y_inverse_scale) + y_zero).
  void* y = nullptr;
  Type y_type = Type::kFloat32;
  int64_t y_stride = 0;
  float y_inverse_scale = 1;
  int32_t y_zero = 0;

  // Split-K for small maps: workspace of at least gather_gemm_workspace() bytes; nullptr: never split.
  void* workspace = nullptr;
  int64_t workspace_bytes = 0;
};

// x [batch, channels, height, width] of any strides -> channels_last u8, f16 or bf16; channels from `channels` to y_stride get
// the zero point (u8) or 0. NaN becomes the lowest step, 0, infinities the ends of the range, as on the CPU.
struct Quantize {
  const void* x = nullptr;
  Type x_type = Type::kFloat32;  // kFloat16, kBFloat16, kFloat32
  int64_t batch = 0, channels = 0, height = 0, width = 0;
  int64_t x_strides[4] = {};  // elements: batch, channel, row, column
  void* y = nullptr;
  Type y_type = Type::kUint8;
  int64_t y_stride = 0;
  float inverse_scale = 1;
  int32_t zero = 0;
};

// y = act((x - mean) * rsqrt(var + eps) * weight + bias) over groups of channels, in two passes over x: sums, then the rest.
// groups == channels is instance normalisation.
struct GroupNorm {
  const void* x = nullptr;
  Type x_type = Type::kFloat16;
  int64_t batch = 0, height = 0, width = 0, channels = 0, x_stride = 0;
  float x_scale = 1;
  int32_t x_zero = 0;  // u8 only
  int64_t groups = 1;
  float eps = 0;
  const float *weight = nullptr, *bias = nullptr;  // [channels], or nullptr: 1 and 0
  Activation act = Activation::kNone;
  float slope = 0;
  void* y = nullptr;
  Type y_type = Type::kUint8;
  int64_t y_stride = 0;  // channels from `channels` to y_stride get the zero point or 0
  float y_inverse_scale = 1;
  int32_t y_zero = 0;
  void* workspace = nullptr;  // of group_norm_workspace(call) bytes
  int64_t workspace_bytes = 0;
};

using Stream = void*;  // a cudaStream_t

// Why no kernel of this build takes such weights (say: "int8 blocks of 8x4: wanted 16x32, 32x32 or 64x32"), or nullptr.
const char* refuse_gather_gemm(Type weight_type, int block_o, int block_k, bool two_four);
int64_t gather_gemm_workspace(const GatherGemm& call, int multiprocessors);
const char* launch_gather_gemm(const GatherGemm& call, int multiprocessors, Stream stream);
const char* launch_quantize(const Quantize& call, Stream stream);
int64_t group_norm_workspace(const GroupNorm& call);
const char* launch_group_norm(const GroupNorm& call, Stream stream);

}  // namespace sparsegan::cuda

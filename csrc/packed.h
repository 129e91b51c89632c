// The packed weight, torch-free; mirrors PackedWeight in sparsegan/formats.py.
//
//   weight view [O, T, C]            packed row r computes BO output channels row_channels[r*BO .. r*BO+BO)
//
//        tap 0        tap 1          blocks of (row r, tap position t):  tap_ptr[r*T+t] .. tap_ptr[r*T+t+1]
//   r0  [#..#....]  [..#.....]       block i: values[i] is [BO][4] row-major, its column cols[i] = t * ceil(C/4) + input block
//   r1  [....#...]  [#......#]       absent blocks are zero
#pragma once
#include <cstdint>

namespace sparsegan {

enum class Format { kInt8, kBFloat16, kFloat32 };
enum class Activation { kNone, kRelu, kLeakyRelu, kTanh, kSigmoid, kSilu, kGelu };
constexpr int kActivations = 7;

// Input channels of one block: 4 int8 channels fill one 32-bit lane, so 4 is the finest block whose zeros save an instruction.
constexpr int kBlockK = 4;

// Input channels that share one 32-bit lane.
constexpr int lane_channels(Format f) { return f == Format::kInt8 ? 4 : f == Format::kBFloat16 ? 2 : 1; }
// And the number of bits of that: a division by a number that the compiler does not know is slow.
constexpr int lane_shift(Format f) { return f == Format::kInt8 ? 2 : f == Format::kBFloat16 ? 1 : 0; }
// Lane planes that one block of kBlockK input channels spans.
constexpr int block_planes(Format f) { return kBlockK / lane_channels(f); }
constexpr int element_bytes(Format f) { return 4 / lane_channels(f); }

struct PackedWeight {
  Format format = Format::kFloat32;
  const uint8_t* values = nullptr;        // [blocks, block_o, 4]
  const int32_t* cols = nullptr;          // [blocks]
  const int32_t* tap_ptr = nullptr;       // [rows * taps + 1]
  const int32_t* row_channels = nullptr;  // [rows * block_o], -1: padding row
  const int32_t* tap_sums = nullptr;      // [out_channels, taps]
  const float* scale = nullptr;           // [out_channels]
  const float* bias = nullptr;            // [out_channels]
  int64_t blocks = 0, rows = 0, taps = 0, block_o = 0, out_channels = 0;
  bool in_order = false;  // packed row r computes channel r, padding last
};

// A layer as the ops describe it. A linear layer is a 1x1 convolution over images of one pixel.
struct Layer {
  PackedWeight weight;
  bool transposed = false;
  int64_t kernel_h = 1, kernel_w = 1, stride_h = 1, stride_w = 1, padding_h = 0, padding_w = 0;
  int64_t output_padding_h = 0, output_padding_w = 0, dilation_h = 1, dilation_w = 1;
  int32_t x_zero = 0;  // int8 only: what stands for 0 in x
};

}  // namespace sparsegan

// From the ops' arguments to programs. The op files (block_*.cpp) describe layers; this runs them one after another.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <string>
#include <vector>

#include "../checks.h"
#include "program.h"

namespace sparsegan {

// A layer with what its op says of x and of the epilogue.
struct LayerCall {
  Layer layer;
  double x_scale = 1;  // int8 only
  Activation activation = Activation::kNone;
  float slope = 0;
};

// weight: [values, cols, tap_ptr, row_channels, tap_sums, scale, bias], sparsegan/formats.py. Checks dtypes, sizes and that every
// index stays inside, so that no weight can make a kernel read elsewhere. `in_channels` is what x brings.
PackedWeight read_weight(const std::vector<Tensor>& weight, int64_t taps, int64_t in_channels, const char* op);

void set_quantization(LayerCall* call, double x_scale, int64_t x_zero, const char* op);

// x: float32 [N, C, H, W] of any strides -> float32 [N, O, P, Q] contiguous, with every layer applied in turn. x_is_rows:
// x is [M, C], the answer [M, O].
Tensor run_layers(const Tensor& x, bool x_is_rows, const std::vector<LayerCall>& calls, const char* op);

// torch's threads.
Parallel torch_parallel();

// x, of shape [N, C, H, W] or [N, C] and float32, as programs see it.
InputTensor input_tensor(const Tensor& x);

}  // namespace sparsegan

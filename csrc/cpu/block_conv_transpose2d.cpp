// y[n, o, p*s + i*d - pad, q*s + j*d - pad] += x[n, c, p, q] w[c, o, i, j], then act(scale * y + bias). Output pixels that use
// the same taps form a phase (stride 2: four), and each phase is a convolution of its own over the same input.
#include <torch/csrc/stable/library.h>

#include "layers.h"

namespace sparsegan {
namespace {

Tensor block_conv_transpose2d_cpu(const Tensor& x, std::vector<Tensor> weight, std::vector<int64_t> kernel_size,
                                  std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> output_padding,
                                  std::vector<int64_t> dilation, double x_scale, int64_t x_zero, std::string activation,
                                  double slope) {
  constexpr const char* kOp = "block_conv_transpose2d";
  check_dim(x, 4, kOp, "x");
  LayerCall call;
  Layer& layer = call.layer;
  layer.transposed = true;
  set_window(&layer, kernel_size, stride, padding, output_padding, dilation, kOp);
  layer.weight = read_weight(weight, layer.kernel_h * layer.kernel_w, x.size(1), kOp);
  set_quantization(&call, x_scale, x_zero, kOp);
  call.activation = read_activation(activation, kOp);
  call.slope = float(slope);
  return run_layers(x, /*x_is_rows=*/false, {call}, kOp);
}

}  // namespace
}  // namespace sparsegan

STABLE_TORCH_LIBRARY_IMPL(sparsegan, CPU, m) {
  m.impl("block_conv_transpose2d", TORCH_BOX(&sparsegan::block_conv_transpose2d_cpu));
}

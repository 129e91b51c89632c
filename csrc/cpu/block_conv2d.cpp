// y[n, o, p, q] = act(scale[o] * sum_{c,i,j} x[n, c, p*s + i*d - pad, q*s + j*d - pad] w[o, c, i, j] + bias[o])
#include <torch/csrc/stable/library.h>

#include "layers.h"

namespace sparsegan {
namespace {

Tensor block_conv2d_cpu(const Tensor& x, std::vector<Tensor> weight, std::vector<int64_t> kernel_size,
                        std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation, double x_scale,
                        int64_t x_zero, std::string activation, double slope) {
  constexpr const char* kOp = "block_conv2d";
  check_dim(x, 4, kOp, "x");
  LayerCall call;
  Layer& layer = call.layer;
  set_window(&layer, kernel_size, stride, padding, {0, 0}, dilation, kOp);
  layer.weight = read_weight(weight, layer.kernel_h * layer.kernel_w, x.size(1), kOp);
  set_quantization(&call, x_scale, x_zero, kOp);
  call.activation = read_activation(activation, kOp);
  call.slope = float(slope);
  return run_layers(x, /*x_is_rows=*/false, {call}, kOp);
}

}  // namespace
}  // namespace sparsegan

STABLE_TORCH_LIBRARY_IMPL(sparsegan, CPU, m) { m.impl("block_conv2d", TORCH_BOX(&sparsegan::block_conv2d_cpu)); }

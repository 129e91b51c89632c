// y[m, o] = act(scale[o] * sum_c x[m, c] w[o, c] + bias[o]): the gather-GEMM over images of one pixel; the rows are the batch.
#include <torch/csrc/stable/library.h>

#include "layers.h"

namespace sparsegan {
namespace {

Tensor block_linear_cpu(const Tensor& x, std::vector<Tensor> weight, double x_scale, int64_t x_zero, std::string activation,
                        double slope) {
  constexpr const char* kOp = "block_linear";
  check_dim(x, 2, kOp, "x");
  LayerCall call;
  Layer& layer = call.layer;
  layer.weight = read_weight(weight, 1, x.size(1), kOp);
  set_quantization(&call, x_scale, x_zero, kOp);
  call.activation = read_activation(activation, kOp);
  call.slope = float(slope);
  return run_layers(x, /*x_is_rows=*/true, {call}, kOp);
}

}  // namespace
}  // namespace sparsegan

STABLE_TORCH_LIBRARY_IMPL(sparsegan, CPU, m) { m.impl("block_linear", TORCH_BOX(&sparsegan::block_linear_cpu)); }

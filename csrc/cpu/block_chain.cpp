// Layers that follow each other directly, in one call: between them the activations stay packed, and nothing is converted.
#include <torch/csrc/stable/library.h>

#include "layers.h"

namespace sparsegan {
namespace {

// One layer in `geometry`, as sparsegan/ops/block_chain.py writes it; in `scales`: x_scale, slope.
enum Field {
  kKind,  // 0 linear, 1 conv2d, 2 conv_transpose2d
  kKernelH,
  kKernelW,
  kStrideH,
  kStrideW,
  kPaddingH,
  kPaddingW,
  kOutputPaddingH,
  kOutputPaddingW,
  kDilationH,
  kDilationW,
  kXZero,
  kActivation,
  kFields
};
constexpr size_t kScales = 2;
constexpr size_t kWeightTensors = 7;

Tensor block_chain_cpu(const Tensor& x, std::vector<Tensor> weights, std::vector<int64_t> geometry, std::vector<double> scales) {
  constexpr const char* kOp = "block_chain";
  const size_t count = scales.size() / kScales;
  STD_TORCH_CHECK(count > 0 && scales.size() == count * kScales && geometry.size() == count * kFields &&
                      weights.size() == count * kWeightTensors,
                  kOp, ": ", weights.size(), " weights, ", geometry.size(), " geometry values and ", scales.size(),
                  " scales do not describe the same number of layers");
  std::vector<LayerCall> layers(count);
  const bool rows = geometry[kKind] == 0;
  check_dim(x, rows ? 2 : 4, kOp, "x");
  int64_t channels = x.size(1);
  for (size_t i = 0; i < count; i++) {
    const int64_t* g = geometry.data() + i * kFields;
    LayerCall& call = layers[i];
    Layer& layer = call.layer;
    STD_TORCH_CHECK(g[kKind] >= 0 && g[kKind] <= 2 && (g[kKind] == 0) == rows, kOp, ": layer ", i, " is of kind ", g[kKind],
                    "; a chain holds linear layers (0) or convolutions (1) and transposed ones (2)");
    layer.transposed = g[kKind] == 2;
    set_window(&layer, {g[kKernelH], g[kKernelW]}, {g[kStrideH], g[kStrideW]}, {g[kPaddingH], g[kPaddingW]},
               {g[kOutputPaddingH], g[kOutputPaddingW]}, {g[kDilationH], g[kDilationW]}, kOp);
    const std::vector<Tensor> weight(weights.begin() + i * kWeightTensors, weights.begin() + (i + 1) * kWeightTensors);
    layer.weight = read_weight(weight, layer.kernel_h * layer.kernel_w, channels, kOp);
    channels = layer.weight.out_channels;
    set_quantization(&call, scales[i * kScales], g[kXZero], kOp);
    STD_TORCH_CHECK(g[kActivation] >= 0 && g[kActivation] <= int64_t(Activation::kSigmoid), kOp, ": layer ", i,
                    " has activation ", g[kActivation], ", wanted 0 to ", int64_t(Activation::kSigmoid));
    call.activation = Activation(g[kActivation]);
    call.slope = float(scales[i * kScales + 1]);
  }
  return run_layers(x, rows, layers, kOp);
}

}  // namespace
}  // namespace sparsegan

STABLE_TORCH_LIBRARY_IMPL(sparsegan, CPU, m) { m.impl("block_chain", TORCH_BOX(&sparsegan::block_chain_cpu)); }

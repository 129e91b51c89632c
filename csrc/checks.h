// Arguments of ops read and checked, with errors that say the argument's name, what came and what was wanted.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <string>
#include <vector>

#include "packed.h"

namespace sparsegan {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_text(const Tensor& t) {
  std::string text = "[";
  for (int64_t i = 0; i < t.dim(); i++) text += (i ? ", " : "") + std::to_string(t.size(i));
  return text + "]";
}

inline void check_dtype(const Tensor& t, ScalarType want, const char* op, const char* name) {
  STD_TORCH_CHECK(t.scalar_type() == want, op, ": ", name, " is ", torch::headeronly::toString(t.scalar_type()), ", wanted ",
                  torch::headeronly::toString(want));
}

inline void check_dim(const Tensor& t, int64_t want, const char* op, const char* name) {
  STD_TORCH_CHECK(t.dim() == want, op, ": ", name, " has shape ", shape_text(t), ", wanted ", want, " dimensions");
}

inline void check_numel(const Tensor& t, int64_t want, const char* op, const char* name) {
  STD_TORCH_CHECK(t.numel() == want, op, ": ", name, " holds ", t.numel(), " values, wanted ", want);
}

inline void check_contiguous(const Tensor& t, const char* op, const char* name) {
  STD_TORCH_CHECK(t.is_contiguous(), op, ": ", name, " is not contiguous");
}

inline void check_length(const std::vector<int64_t>& v, size_t want, int64_t least, int64_t most, const char* op,
                         const char* name) {
  STD_TORCH_CHECK(v.size() == want, op, ": ", name, " has ", v.size(), " values, wanted ", want);
  for (int64_t e : v) STD_TORCH_CHECK(e >= least && e <= most, op, ": ", name, " holds ", e, ", wanted ", least, " to ", most);
}

inline Activation read_activation(const std::string& name, const char* op) {
  if (name == "none") return Activation::kNone;
  if (name == "relu") return Activation::kRelu;
  if (name == "leaky_relu") return Activation::kLeakyRelu;
  if (name == "tanh") return Activation::kTanh;
  if (name == "sigmoid") return Activation::kSigmoid;
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu") return Activation::kGelu;
  STD_TORCH_CHECK(false, op, ": activation is '", name, "', wanted none, relu, leaky_relu, tanh, sigmoid, silu or gelu");
}

// kernel_size, stride and dilation at least 1, paddings at least 0; two values each, rows first.
inline void set_window(Layer* layer, const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
                       const std::vector<int64_t>& padding, const std::vector<int64_t>& output_padding,
                       const std::vector<int64_t>& dilation, const char* op) {
  constexpr int64_t kMost = 65535;  // no layer is that large, and no product of sizes can overflow below it
  check_length(kernel_size, 2, 1, kMost, op, "kernel_size");
  check_length(stride, 2, 1, kMost, op, "stride");
  check_length(padding, 2, 0, kMost, op, "padding");
  check_length(output_padding, 2, 0, kMost, op, "output_padding");
  check_length(dilation, 2, 1, kMost, op, "dilation");
  layer->kernel_h = kernel_size[0], layer->kernel_w = kernel_size[1];
  layer->stride_h = stride[0], layer->stride_w = stride[1];
  layer->padding_h = padding[0], layer->padding_w = padding[1];
  layer->output_padding_h = output_padding[0], layer->output_padding_w = output_padding[1];
  layer->dilation_h = dilation[0], layer->dilation_w = dilation[1];
}

}  // namespace sparsegan

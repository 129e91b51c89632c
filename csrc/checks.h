// Argument checks that say the argument's name, what came and what was wanted.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <string>
#include <vector>

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

}  // namespace sparsegan

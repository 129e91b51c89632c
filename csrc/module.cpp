// The extension module. Importing it registers the CPU implementations of the ops whose schemas sparsegan/ops defines.
#define Py_LIMITED_API 0x030B0000
#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <string>
#include <vector>

#include "checks.h"
#include "cpu/isa.h"

namespace sparsegan {
namespace {

void set_isa(std::string name) {
  try {
    force_isa(name);
  } catch (const std::exception& e) {
    STD_TORCH_CHECK(false, e.what());
  }
}

std::string isa() {
  try {
    return current_kernels()->isa;
  } catch (const std::exception& e) {
    STD_TORCH_CHECK(false, e.what());
  }
}

// Instruction sets that this build has and this CPU can run, best first, separated by spaces.
std::string available_isas() {
  std::string names;
  for (const Kernels* kernels : available_kernels()) names += (names.empty() ? "" : " ") + std::string(kernels->isa);
  return names;
}

// All threads at once, as the kernels run: cores slow each other down.
double dot_peak(ScalarType dtype, bool loads) {
  const Format format = dtype == ScalarType::Char       ? Format::kInt8
                        : dtype == ScalarType::BFloat16 ? Format::kBFloat16
                                                        : Format::kFloat32;
  const Kernels* kernels = current_kernels();
  std::vector<double> peaks(torch::stable::get_num_threads(), 0.0);
  torch::stable::parallel_for(0, int64_t(peaks.size()), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) peaks[i] = kernels->dot_peak(format, loads);
  });
  double sum = 0;
  for (double p : peaks) sum += p;
  return sum;
}

// The GPU architectures that the CUDA kernels were compiled for, such as "80 90", or nothing.
std::string cuda_architectures() {
#ifdef SPARSEGAN_CUDA_ARCHITECTURES
  return SPARSEGAN_CUDA_ARCHITECTURES;
#else
  return "";
#endif
}

#ifdef SPARSEGAN_NO_CUDA  // else csrc/cuda/ops_cuda.cpp looks for a device
std::string cuda_error() { return "sparsegan._C was built without CUDA: " SPARSEGAN_NO_CUDA; }
#endif

}  // namespace
}  // namespace sparsegan

STABLE_TORCH_LIBRARY_IMPL(sparsegan, CompositeExplicitAutograd, m) {
  m.impl("set_isa", TORCH_BOX(&sparsegan::set_isa));
  m.impl("isa", TORCH_BOX(&sparsegan::isa));
  m.impl("available_isas", TORCH_BOX(&sparsegan::available_isas));
  m.impl("dot_peak", TORCH_BOX(&sparsegan::dot_peak));
  m.impl("cuda_architectures", TORCH_BOX(&sparsegan::cuda_architectures));
#ifdef SPARSEGAN_NO_CUDA
  m.impl("cuda_error", TORCH_BOX(&sparsegan::cuda_error));
#endif
}

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}

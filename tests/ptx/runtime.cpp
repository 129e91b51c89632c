// A CUDA runtime whose device is somebody else: launches go to a function that Python sets (device.py). It has just what nvcc's
// host code and the launchers of csrc/cuda call, and keeps the rules of the real one that a launcher can break.
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "launch.h"

struct Dim3 {
  unsigned x, y, z;
};

using Run = int (*)(const char* kernel, const unsigned* grid, const unsigned* block, void** arguments, size_t shared);

namespace {
constexpr int kSuccess = 0, kInvalidValue = 1, kInvalidConfiguration = 9, kFailure = 719;
constexpr size_t kSharedByDefault = 48 << 10, kSharedAtMost = 99 << 10;  // the least of all architectures

struct Call {
  Dim3 grid, block;
  size_t shared;
  void* stream;
};

Run run_kernel = nullptr;
int last_error = kSuccess;
std::map<const void*, std::string> names;
std::map<const void*, size_t> shared_limit;
std::vector<Call> calls;

int fail(int status) { return last_error = status; }
}  // namespace

extern "C" {
void set_run(Run run) { run_kernel = run; }

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
  names[host] = name;
}

unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared, void* stream) {
  calls.push_back({grid, block, shared, stream});
  return 0;
}
int __cudaPopCallConfiguration(Dim3* grid, Dim3* block, size_t* shared, void* stream) {
  const Call call = calls.back();
  calls.pop_back();
  *grid = call.grid, *block = call.block, *shared = call.shared, *static_cast<void**>(stream) = call.stream;
  return kSuccess;
}

int cudaLaunchKernel(const void* host, Dim3 grid, Dim3 block, void** arguments, size_t shared, void*) {
  const size_t limit = shared_limit.count(host) ? shared_limit[host] : kSharedByDefault;
  if (shared > limit) return fail(kInvalidValue);
  const bool fits = grid.x && grid.y && grid.z && grid.x < 1u << 31 && grid.y < 65536 && grid.z < 65536 && block.x && block.y &&
                    block.z && block.x <= 1024 && block.y <= 1024 && block.z <= 64 && block.x * block.y * block.z <= 1024;
  if (!fits) return fail(kInvalidConfiguration);
  return fail(run_kernel(names[host].c_str(), &grid.x, &block.x, arguments, shared) ? kFailure : kSuccess);
}
int __cudaGetKernel(void** kernel, const void* host) {
  *kernel = const_cast<void*>(host);
  return kSuccess;
}
int __cudaLaunchKernel(void* kernel, Dim3 grid, Dim3 block, void** arguments, size_t shared, void* stream) {
  return cudaLaunchKernel(kernel, grid, block, arguments, shared, stream);
}

int cudaFuncSetAttribute(const void* host, int attribute, int value) {
  constexpr int kMaxDynamicSharedMemorySize = 8;
  if (attribute != kMaxDynamicSharedMemorySize || value < 0 || size_t(value) > kSharedAtMost) return fail(kInvalidValue);
  shared_limit[host] = value;
  return kSuccess;
}
int cudaGetLastError() {
  const int status = last_error;
  last_error = kSuccess;
  return status;
}
int cudaPeekAtLastError() { return last_error; }
const char* cudaGetErrorString(int status) {
  return status == kInvalidValue           ? "invalid argument"
         : status == kInvalidConfiguration ? "invalid configuration argument"
                                           : "unspecified launch failure";
}

// The launchers, without C++ in their names.
using namespace sparsegan::cuda;
size_t size_of_gather_gemm() { return sizeof(GatherGemm); }
size_t size_of_quantize() { return sizeof(Quantize); }
size_t size_of_group_norm() { return sizeof(GroupNorm); }
}

// Only what is linked in can be called: sources that are not there yet leave these without a body.
#define CALL(name, ...) extern "C" __VA_ARGS__
#ifdef HAS_gather_gemm
CALL(gather_gemm, int64_t gather_gemm_bytes(const GatherGemm* c, int mps) { return gather_gemm_workspace(*c, mps); })
CALL(gather_gemm, const char* run_gather_gemm(const GatherGemm* c, int mps) { return launch_gather_gemm(*c, mps, nullptr); })
#endif
#ifdef HAS_quantize
CALL(quantize, const char* run_quantize(const Quantize* c) { return launch_quantize(*c, nullptr); })
#endif
#ifdef HAS_group_norm
CALL(group_norm, int64_t group_norm_bytes(const GroupNorm* c) { return group_norm_workspace(*c); })
CALL(group_norm, const char* run_group_norm(const GroupNorm* c) { return launch_group_norm(*c, nullptr); })
#endif

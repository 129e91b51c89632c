// The ops on CUDA tensors: from arguments, checked, to the plain structs of launch.h.
//
//   block_conv2d      x [N, C, H, W] ──quantise──> [N, H, W, pitch] ──gather-GEMM──> [N, P, Q, pitch], returned as [N, O, P, Q]
//   quantize_pack, gather_gemm, group_norm_act     the same kernels one by one, on packed maps [N, H, W, pitch], so that a chain
//                                                  of layers can stay in u8 or f16
//
// Nothing here synchronises, or copies from or to the host, so that every op can be captured in a CUDA graph. That is why the
// contents of a weight are not looked at: `validated` in sparsegan/ops/cuda.py does that once, and adds zero_sums and pad.
//
// With SPARSEGAN_EMULATED the same file registers the same ops for CPU tensors, in the library sparsegan_emulated, to which
// tests/emulated.py gives their schemas. The kernels then run on the host.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cmath>
#include <optional>

#include "../checks.h"
#include "launch.h"
#ifndef SPARSEGAN_EMULATED
#include <cuda_runtime_api.h>
#endif

namespace sparsegan::cuda {
namespace {

constexpr int kOldestArchitecture = 80;
constexpr int64_t kPitchBytes = 16;  // pixels of a packed map begin at multiples of this

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- Devices and streams ----

struct Device {
  int architecture = 0;  // 86: compute capability 8.6
  int multiprocessors = 0;
};

#ifdef SPARSEGAN_EMULATED

Device emulated_device{80, 4};

void set_device(int64_t architecture, int64_t multiprocessors) { emulated_device = {int(architecture), int(multiprocessors)}; }

Device device_at(int, const char*) { return emulated_device; }

struct DeviceGuard {
  explicit DeviceGuard(int) {}
};

Stream current_stream(int, const char*) { return nullptr; }

bool same_device(const Tensor& a, const Tensor& b) { return a.is_cpu() && b.is_cpu(); }

#else

Device device_at(int index, const char* op) {
  // architecture << 16 | multiprocessors, 0: not asked yet. Asking twice at once does no harm.
  static std::atomic<int> known[64];
  const bool kept = index >= 0 && index < 64;
  int packed = kept ? known[index].load(std::memory_order_relaxed) : 0;
  if (packed == 0) {
    int major = 0, minor = 0, count = 0;
    cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index);
    if (error == cudaSuccess) error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, index);
    STD_TORCH_CHECK(error == cudaSuccess, op, ": no CUDA device ", index, ": ", cudaGetErrorString(error));
    packed = (major * 10 + minor) << 16 | count;
    if (kept) known[index].store(packed, std::memory_order_relaxed);
  }
  return {packed >> 16, packed & 0xffff};
}

// The device of x is current for as long as this lives: for torch, and for the CUDA runtime inside this extension.
struct DeviceGuard {
  torch::stable::accelerator::DeviceGuard torch_guard;
  explicit DeviceGuard(int index) : torch_guard(index) { cudaSetDevice(index); }
};

// torch's current stream. A torch that was built without CUDA lacks the function, so it is looked up when it is needed; the
// library is loaded wherever a CUDA tensor exists.
Stream current_stream(int index, const char* op) {
  using Function = int32_t (*)(int32_t, void**);
  static const Function function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  STD_TORCH_CHECK(function, op, ": this torch has no CUDA streams");
  Stream stream = nullptr;
  STD_TORCH_CHECK(function(index, &stream) == 0, op, ": torch does not say its current CUDA stream");
  return stream;
}

bool same_device(const Tensor& a, const Tensor& b) {
  return a.is_cuda() && b.is_cuda() && a.get_device_index() == b.get_device_index();
}

// Why nothing can run here, or nothing.
std::string cuda_error() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess) return std::string("no CUDA device: ") + cudaGetErrorString(error);
  return count > 0 ? "" : "no CUDA device: the driver knows of none";
}

#endif

// Where an op runs: on the device of x, on torch's current stream.
class Launch {
 public:
  Launch(const Tensor& x, const char* op)
      : op_(op), x_(x), device_(device_at(x.get_device_index(), op)), guard_(x.get_device_index()) {
    STD_TORCH_CHECK(device_.architecture >= kOldestArchitecture, op, ": device ", x.get_device_index(),
                    " has compute capability ", device_.architecture / 10, ".", device_.architecture % 10,
                    ", the kernels need 8.0 or later");
  }

  void check_device(const Tensor& t, const char* name) const {
    STD_TORCH_CHECK(same_device(x_, t), op_, ": ", name, " is not on the device of x");
  }

  Tensor workspace(int64_t bytes) const { return torch::stable::new_empty(x_, {bytes}, ScalarType::Byte); }

  void run(const Quantize& call) const { done(launch_quantize(call, current_stream(x_.get_device_index(), op_))); }

  void run(GatherGemm call) const {
    call.workspace_bytes = gather_gemm_workspace(call, device_.multiprocessors);
    std::optional<Tensor> space;
    if (call.workspace_bytes > 0) space = workspace(call.workspace_bytes), call.workspace = space->mutable_data_ptr();
    done(launch_gather_gemm(call, device_.multiprocessors, current_stream(x_.get_device_index(), op_)));
  }

  void run(GroupNorm call) const {
    call.workspace_bytes = group_norm_workspace(call);
    const Tensor space = workspace(call.workspace_bytes);
    call.workspace = space.mutable_data_ptr();
    done(launch_group_norm(call, current_stream(x_.get_device_index(), op_)));
  }

 private:
  void done(const char* problem) const { STD_TORCH_CHECK(problem == nullptr, op_, ": ", problem); }

  const char* op_;
  const Tensor& x_;
  Device device_;
  DeviceGuard guard_;
};

// ---- Packed maps ----

Type type_of(ScalarType dtype, const char* op, const char* name) {
  switch (dtype) {
    case ScalarType::Byte:
      return Type::kUint8;
    case ScalarType::Half:
      return Type::kFloat16;
    case ScalarType::BFloat16:
      return Type::kBFloat16;
    case ScalarType::Float:
      return Type::kFloat32;
    default:
      STD_TORCH_CHECK(false, op, ": ", name, " is ", torch::headeronly::toString(dtype),
                      ", wanted Byte (u8), Half, BFloat16 or Float");
  }
}

int64_t bytes_of(Type type) { return type == Type::kUint8 ? 1 : type == Type::kFloat32 ? 4 : 2; }

// What the kernels number with 32 bits. In floating point, because the product may overflow.
void check_elements(std::initializer_list<int64_t> sizes, const char* op, const char* name) {
  double elements = 1;
  std::string text;
  for (int64_t size : sizes) elements *= double(size), text += (text.empty() ? "[" : ", ") + std::to_string(size);
  STD_TORCH_CHECK(elements < 2147483648.0, op, ": ", name, " ", text, "] has 2^31 elements or more, which the CUDA kernels",
                  " do not take: use a smaller batch or image");
}

void check_aligned(const Tensor& t, const char* op, const char* name) {
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % kPitchBytes == 0, op, ": ", name,
                  " does not begin at a multiple of ", kPitchBytes, " bytes");
}

// A packed map [N, H, W, pitch] of at least `channels` channels.
Type check_map(const Tensor& t, int64_t channels, const char* op, const char* name) {
  check_dim(t, 4, op, name);
  const Type type = type_of(t.scalar_type(), op, name);
  check_contiguous(t, op, name);
  check_aligned(t, op, name);
  const int64_t pitch = t.size(3);
  STD_TORCH_CHECK(pitch * bytes_of(type) % kPitchBytes == 0, op, ": ", name, " has ", pitch * bytes_of(type),
                  " bytes a pixel, wanted a multiple of ", kPitchBytes);
  STD_TORCH_CHECK(pitch >= channels, op, ": ", name, " has ", pitch, " channels a pixel, wanted at least ", channels);
  check_elements({t.size(0), t.size(1), t.size(2), pitch}, op, name);
  return type;
}

// A new map. Kernels that leave the channels beyond `channels` alone want them cleared, as a NaN there would reach the sums.
Tensor new_map(const Tensor& x, int64_t n, int64_t h, int64_t w, int64_t channels, int64_t pitch, ScalarType dtype, bool cleared,
               const char* op) {
  const int64_t bytes = bytes_of(type_of(dtype, op, "dtype"));
  STD_TORCH_CHECK(pitch >= channels && pitch * bytes % kPitchBytes == 0, op, ": pitch is ", pitch, ", wanted at least ", channels,
                  " and a multiple of ", kPitchBytes / bytes);
  check_elements({n, h, w, pitch}, op, "the output");
  return cleared ? torch::stable::new_zeros(x, {n, h, w, pitch}, dtype) : torch::stable::new_empty(x, {n, h, w, pitch}, dtype);
}

float inverse(double scale, const char* op, const char* name) {
  STD_TORCH_CHECK(scale > 0 && std::isfinite(float(1.0 / scale)), op, ": ", name, " is ", scale, ", wanted a positive number");
  return float(1.0 / scale);
}

int32_t zero_point(int64_t zero, const char* op, const char* name) {
  STD_TORCH_CHECK(zero >= 0 && zero <= 255, op, ": ", name, " is ", zero, ", wanted 0 to 255");
  return int32_t(zero);
}

// ---- Gather-GEMM ----

ScalarType input_type(const Tensor& values) {
  return values.scalar_type() == ScalarType::Char ? ScalarType::Byte : values.scalar_type();
}

// weight: the tensors of a PackedWeight (sparsegan/formats.py), of a 2:4 weight with its metadata; then zero_sums and pad.
void set_weight(GatherGemm* call, const std::vector<Tensor>& weight, int64_t taps, int64_t in_channels, const Launch& launch,
                const char* op) {
  static const char* const names[] = {"values", "cols", "tap_ptr", "row_channels", "tap_sums", "scale", "bias"};
  STD_TORCH_CHECK(weight.size() == 9 || weight.size() == 10, op, ": weight holds ", weight.size(),
                  " tensors, wanted values, cols, tap_ptr, row_channels, tap_sums, scale, bias, metadata of a 2:4 weight,",
                  " and the zero_sums and pad that sparsegan.ops.cuda.validated adds");
  const bool two_four = weight.size() == 10;
  const auto name = [&](size_t i) {
    return i < 7 ? names[i] : i == weight.size() - 1 ? "pad" : i == weight.size() - 2 ? "zero_sums" : "metadata";
  };
  for (size_t i = 0; i < weight.size(); i++) {
    launch.check_device(weight[i], name(i));
    check_contiguous(weight[i], op, name(i));
    if (i >= 1 && i + 1 < weight.size()) {
      check_dtype(weight[i], i == 5 || i == 6 ? ScalarType::Float : ScalarType::Int, op, name(i));
    }
  }
  const Tensor &values = weight[0], &zero_sums = weight[weight.size() - 2], &pad = weight.back();
  STD_TORCH_CHECK(values.scalar_type() != ScalarType::Float, op, ": values is Float, the CUDA kernels take int8, float16 and ",
                  "bfloat16 weights");
  call->weight_type = type_of(input_type(values), op, "values");
  check_dim(values, 3, op, "values");
  const int64_t blocks = values.size(0), block_o = values.size(1), block_k = values.size(2) * (two_four ? 2 : 1);
  STD_TORCH_CHECK(block_o > 0 && block_o <= 1024 && block_k > 0 && block_k <= 1024, op, ": values has shape ",
                  shape_text(values));
  const char* refused = refuse_gather_gemm(call->weight_type, int(block_o), int(block_k), two_four);
  STD_TORCH_CHECK(refused == nullptr, op, ": ", refused);
  call->block_o = int32_t(block_o), call->block_k = int32_t(block_k);
  call->blocks = blocks, call->taps = taps, call->rows = weight[3].numel() / block_o, call->out_channels = weight[5].numel();
  call->in_blocks = ceil_div(in_channels, block_k);
  STD_TORCH_CHECK(call->out_channels > 0 && in_channels > 0, op, ": no channels");
  check_numel(weight[1], blocks, op, "cols");
  check_numel(weight[2], call->rows * taps + 1, op, "tap_ptr");
  check_numel(weight[3], ceil_div(call->out_channels, block_o) * block_o, op, "row_channels");
  check_numel(weight[6], call->out_channels, op, "bias");
  check_elements({blocks, block_o, block_k}, op, "values");
  check_elements({taps, call->in_blocks}, op, "the columns of the weight");
  if (two_four) check_numel(weight[7], blocks * block_o * block_k / 32, op, "metadata");
  if (call->weight_type == Type::kUint8) check_numel(zero_sums, call->phase_count * call->out_channels, op, "zero_sums");
  check_dtype(pad, input_type(values), op, "pad");
  STD_TORCH_CHECK(pad.numel() == call->in_blocks * block_k, op, ": x has ", in_channels,
                  " channels, the weight comes with a pad of ", pad.numel(), ", wanted ", call->in_blocks * block_k);
  check_aligned(values, op, "values");
  check_aligned(pad, op, "pad");
  call->values = values.const_data_ptr();
  call->cols = static_cast<const int32_t*>(weight[1].const_data_ptr());
  call->tap_ptr = static_cast<const int32_t*>(weight[2].const_data_ptr());
  call->row_channels = static_cast<const int32_t*>(weight[3].const_data_ptr());
  call->scale = static_cast<const float*>(weight[5].const_data_ptr());
  call->bias = static_cast<const float*>(weight[6].const_data_ptr());
  // What says that the weight is 2:4, so not the null pointer of an empty tensor.
  if (two_four) call->metadata = static_cast<const uint32_t*>((blocks > 0 ? weight[7] : pad).const_data_ptr());
  if (call->weight_type == Type::kUint8) call->zero_sums = static_cast<const int32_t*>(zero_sums.const_data_ptr());
  call->pad = pad.const_data_ptr();
}

// Output pixels along one axis; the layer may leave none.
int64_t output_size(const Layer& l, int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t extra,
                    int64_t dilation) {
  const int64_t reach = dilation * (kernel - 1) + 1;
  if (l.transposed) return (size - 1) * stride - 2 * padding + reach + extra;
  return size + 2 * padding < reach ? 0 : (size + 2 * padding - reach) / stride + 1;
}

// The taps, phases and output size of a layer on images of call->height x call->width.
void set_geometry(GatherGemm* call, const Layer& l, const char* op) {
  STD_TORCH_CHECK(l.kernel_h * l.kernel_w <= kMaxTaps, op, ": a ", l.kernel_h, "x", l.kernel_w, " kernel has more than ",
                  kMaxTaps, " positions, which the CUDA kernels do not take");
  const int64_t phases = l.transposed ? l.stride_h * l.stride_w : 1;
  STD_TORCH_CHECK(phases <= kMaxPhases, op, ": a transposed convolution of stride ", l.stride_h, "x", l.stride_w,
                  " has more than ", kMaxPhases, " phases, which the CUDA kernels do not take");
  call->out_height = output_size(l, call->height, l.kernel_h, l.stride_h, l.padding_h, l.output_padding_h, l.dilation_h);
  call->out_width = output_size(l, call->width, l.kernel_w, l.stride_w, l.padding_w, l.output_padding_w, l.dilation_w);
  STD_TORCH_CHECK(call->out_height > 0 && call->out_width > 0, op, ": images of ", call->height, "x", call->width,
                  " leave no output pixel");
  call->phase_count = int32_t(phases);
  (l.transposed ? call->out_step_h : call->in_step_h) = int32_t(l.stride_h);
  (l.transposed ? call->out_step_w : call->in_step_w) = int32_t(l.stride_w);

  int32_t tap = 0;
  const auto add_tap = [&](int64_t dy, int64_t dx) {
    STD_TORCH_CHECK(std::max(std::abs(dy), std::abs(dx)) <= INT16_MAX, op, ": a kernel position lies ", dy, ", ", dx,
                    " pixels away, which is beyond 16 bits");
    call->dy[tap] = int16_t(dy), call->dx[tap] = int16_t(dx);
    tap++;
  };
  for (int64_t i = 0; i < phases; i++) {
    Phase& phase = call->phases[i];
    phase.tap_begin = tap;
    if (!l.transposed) {
      phase.height = int32_t(call->out_height), phase.width = int32_t(call->out_width);
      for (int64_t ky = 0; ky < l.kernel_h; ky++) {
        for (int64_t kx = 0; kx < l.kernel_w; kx++) add_tap(ky * l.dilation_h - l.padding_h, kx * l.dilation_w - l.padding_w);
      }
    } else {
      // Output pixel y0 + j * stride meets tap k at input pixel j + (y0 + padding - k * dilation) / stride, where that is whole.
      phase.y0 = int32_t(i / l.stride_w), phase.x0 = int32_t(i % l.stride_w);
      phase.height = int32_t(std::max<int64_t>(0, ceil_div(call->out_height - phase.y0, l.stride_h)));
      phase.width = int32_t(std::max<int64_t>(0, ceil_div(call->out_width - phase.x0, l.stride_w)));
      for (int64_t ky = 0; ky < l.kernel_h; ky++) {
        const int64_t y = phase.y0 + l.padding_h - ky * l.dilation_h;
        for (int64_t kx = 0; kx < l.kernel_w && y % l.stride_h == 0; kx++) {
          const int64_t x = phase.x0 + l.padding_w - kx * l.dilation_w;
          if (x % l.stride_w == 0) add_tap(y / l.stride_h, x / l.stride_w);
        }
      }
    }
    phase.tap_end = tap;
  }
}

void set_output(GatherGemm* call, const Tensor& y, const char* op) {
  call->y = y.mutable_data_ptr();
  call->y_type = type_of(y.scalar_type(), op, "y");
  call->y_stride = y.size(y.dim() - 1);  // of [N, H, W, pitch] or [M, O]
}

// ---- The ops ----

// x: [N, C, H, W] or [N, C] of any strides.
Tensor quantized(const Tensor& x, ScalarType dtype, int64_t pitch, double scale, int64_t zero, const Launch& launch,
                 const char* op) {
  const bool image = x.dim() == 4;
  Quantize call;
  call.x_type = type_of(x.scalar_type(), op, "x");
  STD_TORCH_CHECK(call.x_type != Type::kUint8, op, ": x is Byte, wanted Half, BFloat16 or Float");
  call.batch = x.size(0), call.channels = x.size(1);
  call.height = image ? x.size(2) : 1, call.width = image ? x.size(3) : 1;
  for (int i = 0; i < x.dim(); i++) call.x_strides[i] = x.stride(i);
  STD_TORCH_CHECK(dtype != ScalarType::Float, op, ": dtype is Float, wanted Byte (u8), Half or BFloat16");
  Tensor y = new_map(x, call.batch, call.height, call.width, call.channels, pitch, dtype, /*cleared=*/false, op);
  call.x = x.const_data_ptr();
  call.y_type = type_of(dtype, op, "dtype");
  call.y_stride = pitch;
  if (dtype == ScalarType::Byte) {
    call.inverse_scale = inverse(scale, op, "scale");
    call.zero = zero_point(zero, op, "zero");
  }
  call.y = y.mutable_data_ptr();
  if (y.numel() > 0) launch.run(call);
  return y;
}

Tensor quantize_pack(const Tensor& x, ScalarType dtype, int64_t pitch, double scale, int64_t zero) {
  constexpr const char* kOp = "quantize_pack";
  STD_TORCH_CHECK(x.dim() == 4 || x.dim() == 2, kOp, ": x has shape ", shape_text(x), ", wanted [N, C, H, W] or [N, C]");
  return quantized(x, dtype, pitch, scale, zero, Launch(x, kOp), kOp);
}

// window: kernel_size, stride, padding, output_padding and dilation, two numbers each.
Tensor gather_gemm(const Tensor& x, int64_t in_channels, std::vector<Tensor> weight, bool transposed, std::vector<int64_t> window,
                   std::string activation, double slope, std::optional<Tensor> residual, double residual_scale,
                   int64_t residual_zero, std::string post_activation, double post_slope, ScalarType dtype, int64_t pitch,
                   double y_scale, int64_t y_zero) {
  constexpr const char* kOp = "gather_gemm";
  const Launch launch(x, kOp);
  check_map(x, in_channels, kOp, "x");
  STD_TORCH_CHECK(window.size() == 10, kOp, ": window has ", window.size(), " values, wanted 10");
  const auto pair = [&](size_t i) { return std::vector<int64_t>(window.begin() + 2 * i, window.begin() + 2 * i + 2); };
  Layer layer;
  layer.transposed = transposed;
  set_window(&layer, pair(0), pair(1), pair(2), pair(3), pair(4), kOp);
  GatherGemm call;
  call.batch = x.size(0), call.height = x.size(1), call.width = x.size(2), call.x_stride = x.size(3);
  set_geometry(&call, layer, kOp);
  set_weight(&call, weight, layer.kernel_h * layer.kernel_w, in_channels, launch, kOp);
  check_dtype(x, input_type(weight[0]), kOp, "x");
  check_map(x, call.in_blocks * call.block_k, kOp, "x");
  call.act = read_activation(activation, kOp), call.slope = float(slope);
  call.post_act = read_activation(post_activation, kOp), call.post_slope = float(post_slope);
  const bool cleared = pitch > call.out_channels && dtype != ScalarType::Byte;
  Tensor y = new_map(x, call.batch, call.out_height, call.out_width, call.out_channels, pitch, dtype, cleared, kOp);
  if (residual) {
    launch.check_device(*residual, "residual");
    call.residual_type = check_map(*residual, call.out_channels, kOp, "residual");
    for (int i = 0; i < 3; i++) {
      STD_TORCH_CHECK(residual->size(i) == y.size(i), kOp, ": residual has shape ", shape_text(*residual), ", the output ",
                      shape_text(y));
    }
    call.residual = residual->const_data_ptr(), call.residual_stride = residual->size(3);
    call.residual_scale = float(residual_scale);
    call.residual_zero = zero_point(residual_zero, kOp, "residual_zero");
  }
  if (dtype == ScalarType::Byte) {
    call.y_inverse_scale = inverse(y_scale, kOp, "y_scale");
    call.y_zero = zero_point(y_zero, kOp, "y_zero");
  }
  call.x = x.const_data_ptr();
  set_output(&call, y, kOp);
  if (y.numel() > 0) launch.run(call);
  return y;
}

Tensor group_norm_act(const Tensor& x, int64_t channels, int64_t groups, double eps, std::optional<Tensor> weight,
                      std::optional<Tensor> bias, double x_scale, int64_t x_zero, std::string activation, double slope,
                      ScalarType dtype, int64_t pitch, double y_scale, int64_t y_zero) {
  constexpr const char* kOp = "group_norm_act";
  const Launch launch(x, kOp);
  GroupNorm call;
  call.x_type = check_map(x, channels, kOp, "x");
  call.batch = x.size(0), call.height = x.size(1), call.width = x.size(2), call.channels = channels, call.x_stride = x.size(3);
  call.x_scale = float(x_scale), call.x_zero = zero_point(x_zero, kOp, "x_zero");
  STD_TORCH_CHECK(groups > 0 && channels > 0 && channels % groups == 0, kOp, ": groups is ", groups, ", wanted a divisor of the ",
                  channels, " channels");
  STD_TORCH_CHECK(eps >= 0 && std::isfinite(eps), kOp, ": eps is ", eps, ", wanted a number >= 0");
  call.groups = groups, call.eps = float(eps);
  const auto affine = [&](const std::optional<Tensor>& t, const char* name) -> const float* {
    if (!t) return nullptr;
    launch.check_device(*t, name);
    check_dtype(*t, ScalarType::Float, kOp, name);
    check_contiguous(*t, kOp, name);
    check_numel(*t, channels, kOp, name);
    return static_cast<const float*>(t->const_data_ptr());
  };
  call.weight = affine(weight, "weight"), call.bias = affine(bias, "bias");
  call.act = read_activation(activation, kOp), call.slope = float(slope);
  Tensor y = new_map(x, call.batch, call.height, call.width, channels, pitch, dtype, /*cleared=*/false, kOp);
  call.y_type = type_of(dtype, kOp, "dtype"), call.y_stride = pitch;
  if (dtype == ScalarType::Byte) {
    call.y_inverse_scale = inverse(y_scale, kOp, "y_scale");
    call.y_zero = zero_point(y_zero, kOp, "y_zero");
  }
  call.x = x.const_data_ptr(), call.y = y.mutable_data_ptr();
  if (y.numel() > 0) launch.run(call);
  return y;
}

// Whether x lies in memory as a packed map of `pitch` channels: float16 in channels_last, say, of a model that is in float16.
bool is_map(const Tensor& x, ScalarType dtype, int64_t pitch) {
  if (x.scalar_type() != dtype || x.size(1) != pitch) return false;
  if (reinterpret_cast<uintptr_t>(x.const_data_ptr()) % kPitchBytes != 0) return false;
  int64_t step = 1;
  for (int i : {1, 3, 2, 0}) {
    if (i >= x.dim()) continue;
    if (x.size(i) != 1 && x.stride(i) != step) return false;
    step *= x.size(i);
  }
  return true;
}

// A layer from x [N, C, H, W], or [M, C] of `rows`, of any strides, to y of the type of x, channels_last.
Tensor run_layer(const Tensor& x, bool rows, const Layer& layer, const std::vector<Tensor>& weight, double x_scale,
                 int64_t x_zero, const std::string& activation, double slope, const char* op) {
  check_dim(x, rows ? 2 : 4, op, "x");
  const Launch launch(x, op);
  GatherGemm call;
  call.batch = x.size(0), call.height = rows ? 1 : x.size(2), call.width = rows ? 1 : x.size(3);
  set_geometry(&call, layer, op);
  set_weight(&call, weight, layer.kernel_h * layer.kernel_w, x.size(1), launch, op);
  call.act = read_activation(activation, op), call.slope = float(slope);
  check_elements({call.batch, call.out_height, call.out_width, call.out_channels}, op, "the output");
  call.x_stride = call.in_blocks * call.block_k;
  const ScalarType dtype = input_type(weight[0]);
  const Tensor q = is_map(x, dtype, call.x_stride) ? x : quantized(x, dtype, call.x_stride, x_scale, x_zero, launch, op);
  call.x = q.const_data_ptr();
  Tensor y = rows ? torch::stable::new_empty(x, {call.batch, call.out_channels})
                  : torch::stable::new_empty(x, {call.batch, call.out_height, call.out_width, call.out_channels});
  set_output(&call, y, op);
  if (y.numel() > 0) launch.run(call);
  return rows ? y : torch::stable::transpose(y = torch::stable::transpose(y, 2, 3), 1, 2);
}

Tensor block_linear(const Tensor& x, std::vector<Tensor> weight, double x_scale, int64_t x_zero, std::string activation,
                    double slope) {
  return run_layer(x, /*rows=*/true, Layer(), weight, x_scale, x_zero, activation, slope, "block_linear");
}

Tensor block_conv2d(const Tensor& x, std::vector<Tensor> weight, std::vector<int64_t> kernel_size, std::vector<int64_t> stride,
                    std::vector<int64_t> padding, std::vector<int64_t> dilation, double x_scale, int64_t x_zero,
                    std::string activation, double slope) {
  constexpr const char* kOp = "block_conv2d";
  Layer layer;
  set_window(&layer, kernel_size, stride, padding, {0, 0}, dilation, kOp);
  return run_layer(x, /*rows=*/false, layer, weight, x_scale, x_zero, activation, slope, kOp);
}

Tensor block_conv_transpose2d(const Tensor& x, std::vector<Tensor> weight, std::vector<int64_t> kernel_size,
                              std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> output_padding,
                              std::vector<int64_t> dilation, double x_scale, int64_t x_zero, std::string activation,
                              double slope) {
  constexpr const char* kOp = "block_conv_transpose2d";
  Layer layer;
  layer.transposed = true;
  set_window(&layer, kernel_size, stride, padding, output_padding, dilation, kOp);
  return run_layer(x, /*rows=*/false, layer, weight, x_scale, x_zero, activation, slope, kOp);
}

void register_ops(torch::stable::detail::StableLibrary& m) {
  m.impl("block_linear", TORCH_BOX(&block_linear));
  m.impl("block_conv2d", TORCH_BOX(&block_conv2d));
  m.impl("block_conv_transpose2d", TORCH_BOX(&block_conv_transpose2d));
  m.impl("quantize_pack", TORCH_BOX(&quantize_pack));
  m.impl("gather_gemm", TORCH_BOX(&gather_gemm));
  m.impl("group_norm_act", TORCH_BOX(&group_norm_act));
}

}  // namespace
}  // namespace sparsegan::cuda

#ifdef SPARSEGAN_EMULATED
STABLE_TORCH_LIBRARY_IMPL(sparsegan_emulated, CPU, m) { sparsegan::cuda::register_ops(m); }
STABLE_TORCH_LIBRARY_IMPL(sparsegan_emulated, CompositeExplicitAutograd, m) {
  m.impl("set_device", TORCH_BOX(&sparsegan::cuda::set_device));
}
#else
STABLE_TORCH_LIBRARY_IMPL(sparsegan, CUDA, m) { sparsegan::cuda::register_ops(m); }
STABLE_TORCH_LIBRARY_IMPL(sparsegan, CompositeExplicitAutograd, m) {
  m.impl("cuda_error", TORCH_BOX(&sparsegan::cuda::cuda_error));
}
#endif

#include "layers.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>
#include <stdexcept>

#include "isa.h"

namespace sparsegan {
namespace {

// Lane buffers of one call, kept for the next: fresh pages from the system would cost more than the kernel.
class Workspace {
 public:
  uint8_t* get(size_t bytes) {
    if (bytes > size_) {
      buffer_.reset();
      buffer_.reset(static_cast<uint8_t*>(std::aligned_alloc(kAlign, (bytes + kAlign - 1) / kAlign * kAlign)));
      size_ = buffer_ ? bytes : 0;
      STD_TORCH_CHECK(buffer_, "out of memory: ", bytes, " bytes for packed activations; use a smaller batch or image");
    }
    return buffer_.get();
  }

 private:
  static constexpr size_t kAlign = 64;
  struct Free {
    void operator()(uint8_t* p) const { std::free(p); }
  };
  std::unique_ptr<uint8_t, Free> buffer_;
  size_t size_ = 0;
};
thread_local Workspace workspace;

// Vector loads may read past the last lane of a buffer, never past this.
constexpr int64_t kSlackBytes = 128;
// Dot products of one vector below which waking other threads costs more than it saves (about 5 us of work).
constexpr int64_t kSerialWork = 30000;

constexpr int64_t kMaxThreads = 64;  // shares live on the stack; layers of generators do not feed more
constexpr int64_t kLinesPerTask = 4;
int64_t pack_tasks(const LaneLayout& layout) { return (pack_lines(layout) + kLinesPerTask - 1) / kLinesPerTask; }

// Every worker starts on its own share of the tasks, which are neighbours, so that it mostly reads what it wrote in the layer
// before. Then it helps with the other shares: tasks differ in their kept blocks, and cores in what else runs on them.
template <class F>
void for_each_task(int64_t tasks, bool serial, const F& run) {
  const int64_t threads = serial ? 1 : std::min<int64_t>({torch::stable::get_num_threads(), tasks, kMaxThreads});
  if (threads <= 1) {
    for (int64_t i = 0; i < tasks; i++) run(i);
    return;
  }
  struct alignas(64) Share {
    std::atomic<int64_t> next;
    int64_t end;
  } shares[kMaxThreads];
  for (int64_t s = 0; s < threads; s++) {
    shares[s].next = s * tasks / threads;
    shares[s].end = (s + 1) * tasks / threads;
  }
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; worker++)
      for (int64_t s = 0; s < threads; s++) {
        Share& share = shares[(worker + s) % threads];
        for (int64_t i = share.next++; i < share.end; i = share.next++) run(i);
      }
  });
}

Epilogue make_epilogue(const Layer& layer, std::vector<float>* rows) {
  const PackedWeight& w = layer.weight;
  const int64_t count = w.rows * w.block_o;
  rows->assign(2 * count + Epilogue::kPadding, 0.0f);
  for (int64_t r = 0; r < count; r++) {
    const int32_t channel = w.row_channels[r];
    if (channel < 0) continue;
    (*rows)[r] = w.scale[channel];
    (*rows)[count + r] = w.bias[channel];
  }
  Epilogue e;
  e.scale = rows->data();
  e.bias = rows->data() + count;
  e.activation = layer.activation;
  e.slope = layer.slope;
  return e;
}

}  // namespace

void set_window(Layer* layer, const std::vector<int64_t>& kernel_size, const std::vector<int64_t>& stride,
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

void set_quantization(Layer* layer, double x_scale, int64_t x_zero, const char* op) {
  STD_TORCH_CHECK(x_scale > 0 && std::isfinite(float(1.0 / x_scale)), op, ": x_scale is ", x_scale, ", wanted a positive number");
  STD_TORCH_CHECK(x_zero >= 0 && x_zero <= 255, op, ": x_zero is ", x_zero, ", wanted 0 to 255");
  layer->inv_x_scale = float(1.0 / x_scale);
  layer->x_zero = int32_t(x_zero);
}

Activation read_activation(const std::string& name, const char* op) {
  if (name == "none") return Activation::kNone;
  if (name == "relu") return Activation::kRelu;
  if (name == "leaky_relu") return Activation::kLeakyRelu;
  if (name == "tanh") return Activation::kTanh;
  if (name == "sigmoid") return Activation::kSigmoid;
  STD_TORCH_CHECK(false, op, ": activation is '", name, "', wanted none, relu, leaky_relu, tanh or sigmoid");
}

PackedWeight read_weight(const std::vector<Tensor>& weight, int64_t taps, int64_t in_channels, const char* op) {
  STD_TORCH_CHECK(weight.size() == 7, op, ": weight holds ", weight.size(),
                  " tensors, wanted values, cols, tap_ptr, row_channels, tap_sums, scale, bias");
  const Tensor &values = weight[0], &cols = weight[1], &tap_ptr = weight[2], &row_channels = weight[3], &tap_sums = weight[4],
               &scale = weight[5], &bias = weight[6];
  static const char* const names[] = {"values", "cols", "tap_ptr", "row_channels", "tap_sums", "scale", "bias"};
  for (size_t i = 0; i < 7; i++) {
    check_contiguous(weight[i], op, names[i]);
    if (i >= 1) check_dtype(weight[i], i <= 4 ? ScalarType::Int : ScalarType::Float, op, names[i]);
  }
  PackedWeight w;
  switch (values.scalar_type()) {
    case ScalarType::Char:
      w.format = Format::kInt8;
      break;
    case ScalarType::BFloat16:
      w.format = Format::kBFloat16;
      break;
    default:
      check_dtype(values, ScalarType::Float, op, "values (not int8 or bfloat16)");
  }
  check_dim(values, 3, op, "values");
  w.blocks = values.size(0), w.block_o = values.size(1);
  STD_TORCH_CHECK((w.block_o == 4 || w.block_o == 8) && values.size(2) == kBlockK, op, ": values has shape ", shape_text(values),
                  ", the CPU kernels take blocks of 4x4 and 8x4");
  w.taps = taps;
  w.out_channels = scale.numel();
  w.rows = row_channels.numel() / w.block_o;
  STD_TORCH_CHECK(w.out_channels > 0 && in_channels > 0, op, ": no channels");
  check_numel(row_channels, w.rows * w.block_o, op, "row_channels");
  check_numel(cols, w.blocks, op, "cols");
  check_numel(tap_ptr, w.rows * taps + 1, op, "tap_ptr");
  check_numel(tap_sums, w.out_channels * taps, op, "tap_sums");
  check_numel(bias, w.out_channels, op, "bias");
  w.values = static_cast<const uint8_t*>(values.const_data_ptr());
  w.cols = static_cast<const int32_t*>(cols.const_data_ptr());
  w.tap_ptr = static_cast<const int32_t*>(tap_ptr.const_data_ptr());
  w.row_channels = static_cast<const int32_t*>(row_channels.const_data_ptr());
  w.tap_sums = static_cast<const int32_t*>(tap_sums.const_data_ptr());
  w.scale = static_cast<const float*>(scale.const_data_ptr());
  w.bias = static_cast<const float*>(bias.const_data_ptr());

  const int64_t columns = taps * ((in_channels + kBlockK - 1) / kBlockK);
  STD_TORCH_CHECK(columns < INT32_MAX && current_kernels()->below(w.cols, w.blocks, int32_t(columns)), op, ": cols leaves 0 to ",
                  columns - 1, ", the columns of ", taps, " taps of ", in_channels,
                  " input channels; x has another number of channels than the weight, or the weight is damaged");
  bool ordered = w.tap_ptr[0] == 0 && w.tap_ptr[w.rows * taps] == w.blocks;
  for (int64_t i = 0; i < w.rows * taps; i++) ordered &= w.tap_ptr[i] <= w.tap_ptr[i + 1];
  STD_TORCH_CHECK(ordered, op, ": tap_ptr does not rise from 0 to the number of blocks, ", w.blocks);
  // Nearly always in order, which is quickly seen; else each channel must be found once.
  w.in_order = w.rows * w.block_o >= w.out_channels;
  for (int64_t r = 0; w.in_order && r < w.rows * w.block_o; r++) w.in_order = w.row_channels[r] == (r < w.out_channels ? r : -1);
  if (!w.in_order) {
    std::vector<bool> seen(w.out_channels, false);
    int64_t channels = 0;
    for (int64_t r = 0; r < w.rows * w.block_o; r++) {
      const int32_t channel = w.row_channels[r];
      if (channel == -1) continue;
      STD_TORCH_CHECK(channel >= 0 && channel < w.out_channels && !seen[channel], op, ": row_channels holds ", channel,
                      ", wanted each of 0 to ", w.out_channels - 1, " once, and -1 for padding");
      seen[channel] = true;
      channels++;
    }
    STD_TORCH_CHECK(channels == w.out_channels, op, ": row_channels names ", channels, " channels, wanted each of ",
                    w.out_channels, " once");
  }
  return w;
}

Tensor run_layers(const Tensor& x, bool x_is_rows, const std::vector<Layer>& layers, const char* op) {
  check_dtype(x, ScalarType::Float, op, "x");
  check_dim(x, x_is_rows ? 2 : 4, op, "x");
  const Kernels* kernels = current_kernels();
  const int64_t n = x.size(0);
  int64_t c = x.size(1), h = x_is_rows ? 1 : x.size(2), w = x_is_rows ? 1 : x.size(3);

  std::vector<Plan> plans;
  plans.reserve(layers.size());
  size_t bytes[2] = {0, 0};  // layers read the two buffers by turns, so that both stay in the cache
  for (const Layer& layer : layers) {
    try {
      plans.push_back(make_plan(layer, n, c, h, w, kernels->vector_lanes));
    } catch (const std::invalid_argument& e) {
      STD_TORCH_CHECK(false, op, ": ", e.what());
    } catch (const std::bad_alloc&) {
      STD_TORCH_CHECK(false, op, ": out of memory while planning an image of ", c, "x", h, "x", w);
    }
    const Plan& plan = plans.back();
    size_t& size = bytes[(plans.size() - 1) % 2];
    size = std::max(size, size_t(4 * plan.in.lanes() + kSlackBytes + 63) / 64 * 64);
    c = layer.weight.out_channels, h = plan.out_h, w = plan.out_w;
  }
  Tensor y = x_is_rows ? torch::stable::new_empty(x, {n, c}) : torch::stable::new_empty(x, {n, c, h, w});
  if (n == 0) return y;
  uint8_t* const memory = workspace.get(bytes[0] + bytes[1]);
  uint8_t* const buffers[2] = {memory, memory + bytes[0]};

  auto pack = [&](size_t i, const SourceTensor& src, int64_t task) {
    const int64_t end = std::min(pack_lines(plans[i].in), (task + 1) * kLinesPerTask);
    for (int64_t line = task * kLinesPerTask; line < end; line++)
      kernels->pack_line(plans[i].in, src, layers[i].inv_x_scale, layers[i].x_zero, buffers[i % 2], line);
  };
  const SourceTensor src{static_cast<const float*>(x.const_data_ptr()), x.stride(0), x.stride(1), x_is_rows ? 0 : x.stride(2),
                         x_is_rows ? 0 : x.stride(3)};
  for_each_task(pack_tasks(plans[0].in), x.numel() < 4096, [&](int64_t task) { pack(0, src, task); });

  const LaneLayout y_layout = nchw_layout(n, c, h, w);
  std::vector<float> epilogue_rows;
  for (size_t i = 0; i < layers.size(); i++) {
    const bool last = i + 1 == layers.size();
    GatherGemm gemm;
    gemm.weight = &layers[i].weight;
    gemm.plan = &plans[i];
    gemm.in = buffers[i % 2];
    gemm.out = last ? static_cast<uint8_t*>(y.mutable_data_ptr()) : buffers[(i + 1) % 2];
    gemm.out_layout = last ? &y_layout : &plans[i + 1].in;
    gemm.epilogue = make_epilogue(layers[i], &epilogue_rows);
    if (!last) {
      gemm.epilogue.out_inv_scale = layers[i + 1].inv_x_scale;
      gemm.epilogue.out_zero = layers[i + 1].x_zero;
    }
    const Split split = kernels->split(gemm, int(torch::stable::get_num_threads()));
    const int64_t work =
        split.vectors * layers[i].weight.blocks * layers[i].weight.block_o * block_planes(layers[i].weight.format);
    const int64_t ring = last ? 0 : pack_tasks(plans[i + 1].in);
    for_each_task(split.tasks() + ring, work < kSerialWork, [&](int64_t task) {
      if (task < ring)
        pack(i + 1, SourceTensor{}, task);
      else
        kernels->run_task(gemm, split, task - ring);
    });
  }
  return y;
}

}  // namespace sparsegan

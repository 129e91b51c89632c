#include "layers.h"

#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <new>
#include <stdexcept>

#include "isa.h"

namespace sparsegan {

void set_quantization(LayerCall* call, double x_scale, int64_t x_zero, const char* op) {
  STD_TORCH_CHECK(x_scale > 0 && std::isfinite(float(1.0 / x_scale)), op, ": x_scale is ", x_scale, ", wanted a positive number");
  STD_TORCH_CHECK(x_zero >= 0 && x_zero <= 255, op, ": x_zero is ", x_zero, ", wanted 0 to 255");
  call->x_scale = x_scale;
  call->layer.x_zero = int32_t(x_zero);
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

Parallel torch_parallel() {
  Parallel parallel;
  parallel.threads = int(torch::stable::get_num_threads());
  parallel.run = [](int64_t workers, Body body) {
    torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) body(i);
    });
  };
  return parallel;
}

InputTensor input_tensor(const Tensor& x) {
  InputTensor input;
  input.data = static_cast<const float*>(x.const_data_ptr());
  input.n = x.size(0), input.c = x.size(1), input.stride_n = x.stride(0), input.stride_c = x.stride(1);
  if (x.dim() == 4) input.h = x.size(2), input.w = x.size(3), input.stride_h = x.stride(2), input.stride_w = x.stride(3);
  return input;
}

Tensor run_layers(const Tensor& x, bool x_is_rows, const std::vector<LayerCall>& calls, const char* op) {
  check_dtype(x, ScalarType::Float, op, "x");
  check_dim(x, x_is_rows ? 2 : 4, op, "x");
  ProgramSpec spec;
  spec.inputs = spec.outputs = 1;
  spec.prepare = false;
  StepSpec import;
  import.pointwise = true;
  import.x = ~0;
  spec.steps.push_back(import);
  int64_t channels = x.size(1);
  for (const LayerCall& call : calls) {
    SlotSpec slot;
    slot.channels = channels, slot.format = call.layer.weight.format;
    slot.scale = call.x_scale, slot.zero = call.layer.x_zero;
    StoreSpec store;
    store.slot = int64_t(spec.slots.size());
    spec.slots.push_back(slot);
    spec.steps.back().stores.push_back(store);
    StepSpec step;
    step.x = store.slot;
    step.layer = call.layer;
    step.activation = call.activation, step.slope = call.slope;
    spec.steps.push_back(step);
    channels = call.layer.weight.out_channels;
  }
  StoreSpec output;
  output.slot = ~0;
  spec.steps.back().stores.push_back(output);
  try {
    Program program(std::move(spec));
    const std::vector<InputTensor> inputs = {input_tensor(x)};
    const Parallel parallel = torch_parallel();
    const auto plan = program.plan(inputs, parallel.threads);
    const OutputShape& shape = Program::output_shapes(*plan)[0];
    Tensor y = x_is_rows ? torch::stable::new_empty(x, {shape.n, shape.c})
                         : torch::stable::new_empty(x, {shape.n, shape.c, shape.h, shape.w});
    program.run(*plan, inputs, {static_cast<float*>(y.mutable_data_ptr())}, parallel);
    return y;
  } catch (const std::invalid_argument& e) {
    STD_TORCH_CHECK(false, op, ": ", e.what());
  } catch (const std::bad_alloc&) {
    STD_TORCH_CHECK(false, op, ": out of memory for packed activations; use a smaller batch or image");
  }
}

}  // namespace sparsegan

// Programs as torch sees them: made once from the numbers that sparsegan/ops/program.py writes, then run by their handle.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <cstring>
#include <deque>
#include <map>
#include <memory>
#include <mutex>

#include "layers.h"

namespace sparsegan {
namespace {

constexpr const char* kOp = "program";
constexpr size_t kWeightTensors = 7;

// A program and what its spec points to.
struct OwnedProgram {
  std::deque<std::vector<uint8_t>> arrays;
  std::unique_ptr<Program> program;
  std::vector<bool> rows;  // outputs that are [N, C]
};

std::mutex registry_mutex;
std::map<int64_t, std::shared_ptr<OwnedProgram>> registry;
int64_t next_handle = 0;

std::shared_ptr<OwnedProgram> find(int64_t handle) {
  std::lock_guard<std::mutex> lock(registry_mutex);
  const auto found = registry.find(handle);
  STD_TORCH_CHECK(found != registry.end(), kOp, ": no program has the handle ", handle);
  return found->second;
}

// Reads the program front to back; every number is checked before it is used.
class Reader {
 public:
  Reader(std::vector<Tensor> tensors, std::vector<int64_t> numbers, std::vector<double> reals)
      : tensors_(std::move(tensors)), numbers_(std::move(numbers)), reals_(std::move(reals)), owned_(new OwnedProgram) {}

  std::shared_ptr<OwnedProgram> read() {
    ProgramSpec spec;
    spec.inputs = number("inputs", 0, kMany);
    spec.outputs = number("outputs", 1, kMany);
    const int64_t slots = number("slots", 0, kMany), steps = number("steps", 1, kMany);
    for (int64_t i = 0; i < spec.outputs; i++) owned_->rows.push_back(number("rows", 0, 1));
    for (int64_t i = 0; i < slots; i++) {
      SlotSpec slot;
      slot.channels = number("channels", 1, INT32_MAX);
      slot.format = Format(number("format", 0, 2));
      slot.zero = int32_t(number("zero", 0, 255));
      slot.padding = Padding(number("padding_mode", 0, 2));
      slot.scale = real("scale");
      STD_TORCH_CHECK(slot.scale > 0 && std::isfinite(float(1.0 / slot.scale)), kOp, ": the scale of slot ", i, " is ",
                      slot.scale, ", wanted a positive number");
      spec.slots.push_back(slot);
    }
    for (int64_t i = 0; i < steps; i++) spec.steps.push_back(read_step(spec));
    STD_TORCH_CHECK(number_ == numbers_.size() && real_ == reals_.size() && tensor_ == tensors_.size(), kOp,
                    ": more numbers or tensors than the program describes");
    owned_->program.reset(new Program(std::move(spec)));
    return owned_;
  }

 private:
  static constexpr int64_t kMany = 1 << 20;
  static constexpr int64_t kMaxFactor = 64;  // of upsampling and shuffling

  int64_t number(const char* name, int64_t least, int64_t most) {
    STD_TORCH_CHECK(number_ < numbers_.size(), kOp, ": the program ends before ", name);
    const int64_t value = numbers_[number_++];
    STD_TORCH_CHECK(value >= least && value <= most, kOp, ": ", name, " is ", value, ", wanted ", least, " to ", most);
    return value;
  }
  double real(const char* name) {
    STD_TORCH_CHECK(real_ < reals_.size(), kOp, ": the program ends before ", name);
    const double value = reals_[real_++];
    STD_TORCH_CHECK(std::isfinite(value), kOp, ": ", name, " is not finite");
    return value;
  }
  const Tensor& tensor(const char* name) {
    STD_TORCH_CHECK(tensor_ < tensors_.size(), kOp, ": the program ends before ", name);
    return tensors_[tensor_++];
  }
  Activation activation(float* slope) {
    *slope = float(real("slope"));
    return Activation(number("activation", 0, kActivations - 1));
  }
  // A copy, so that nothing that is done to the tensor later can reach the kernels.
  template <class T>
  const T* own(const void* data, int64_t count) {
    constexpr size_t kAlign = 64;
    std::vector<uint8_t>& array = owned_->arrays.emplace_back(size_t(count) * sizeof(T) + kAlign);
    uint8_t* to = array.data() + (kAlign - reinterpret_cast<uintptr_t>(array.data()) % kAlign) % kAlign;
    if (count) std::memcpy(to, data, size_t(count) * sizeof(T));
    return reinterpret_cast<const T*>(to);
  }
  // float32 [count]
  const float* channel_values(int64_t count, const char* name) {
    const Tensor& t = tensor(name);
    check_dtype(t, ScalarType::Float, kOp, name);
    check_contiguous(t, kOp, name);
    check_numel(t, count, kOp, name);
    return own<float>(t.const_data_ptr(), count);
  }

  StepSpec read_step(const ProgramSpec& spec) {
    constexpr int64_t kLeast = -kMany, kMost = kMany;
    StepSpec step;
    const int64_t kind = number("kind", 0, 3);
    step.pointwise = kind == 3;
    step.x = number("x", kLeast, int64_t(spec.slots.size()) - 1);
    step.prescaled = number("prescaled", 0, 1);
    int64_t channels = step.x >= 0 ? spec.slots[step.x].channels : 0;
    if (!step.pointwise) {
      STD_TORCH_CHECK(step.x >= 0, kOp, ": a layer reads an input; a pointwise step must pack it into a slot first");
      auto pair = [&](const char* name) { return std::vector<int64_t>{number(name, 0, kMany), number(name, 0, kMany)}; };
      const auto kernel = pair("kernel_size"), stride = pair("stride"), padding = pair("padding");
      const auto output_padding = pair("output_padding"), dilation = pair("dilation");
      set_window(&step.layer, kernel, stride, padding, output_padding, dilation, kOp);
      step.layer.transposed = kind == 2;
      step.layer.x_zero = spec.slots[step.x].format == Format::kInt8 ? spec.slots[step.x].zero : 0;
      std::vector<Tensor> weight;
      for (size_t i = 0; i < kWeightTensors; i++) weight.push_back(tensor("weight"));
      const int64_t taps = step.layer.kernel_h * step.layer.kernel_w;
      PackedWeight w = step.layer.weight = read_weight(weight, taps, channels, kOp);
      w.values = own<uint8_t>(w.values, w.blocks * w.block_o * kBlockK * element_bytes(w.format));
      w.cols = own<int32_t>(w.cols, w.blocks);
      w.tap_ptr = own<int32_t>(w.tap_ptr, w.rows * taps + 1);
      w.row_channels = own<int32_t>(w.row_channels, w.rows * w.block_o);
      w.tap_sums = own<int32_t>(w.tap_sums, w.out_channels * taps);
      w.scale = own<float>(w.scale, w.out_channels);
      w.bias = own<float>(w.bias, w.out_channels);
      step.layer.weight = w;
      channels = w.out_channels;
      step.demodulation = number("demodulation", -1, kMost);
    } else {
      for (int64_t& side : step.view) side = number("view", 0, INT32_MAX);
      step.upsample = int(number("upsample", 1, kMaxFactor));
      step.shuffle = int(number("shuffle", 1, kMaxFactor));
      step.norm_groups = number("groups", 0, INT32_MAX);
      if (step.norm_groups) {
        step.norm_eps = real("eps");
        STD_TORCH_CHECK(step.norm_eps >= 0, kOp, ": eps is ", step.norm_eps, ", wanted at least 0");
        if (number("affine", 0, 1)) {
          step.norm_scale = channel_values(channels, "norm scale");
          step.norm_bias = channel_values(channels, "norm bias");
        }
      }
      // 0 when the channels depend on the input: then there can be no arrays by channel
      channels = step.view[0] ? step.view[0] : channels / (step.shuffle * step.shuffle);
    }
    step.activation = activation(&step.slope);
    step.has_residual = number("has_residual", 0, 1);
    if (step.has_residual) {
      step.residual = number("residual", kLeast, int64_t(spec.slots.size()) - 1);
      step.residual_upsample = int(number("residual_upsample", 1, kMaxFactor));
    }
    step.post_activation = activation(&step.post_slope);
    step.stats = number("stats", 0, 1);
    const int64_t stores = number("stores", 1, kMaxStores);
    for (int64_t i = 0; i < stores; i++) {
      StoreSpec store;
      store.slot = number("slot", kLeast, kMost);
      store.channel = number("channel", 0, INT32_MAX);
      store.modulation = number("modulation", -1, kMost);
      store.activation = activation(&store.slope);
      if (const int64_t length = number("affine", 0, INT32_MAX)) {
        STD_TORCH_CHECK(channels == 0 || channels == length, kOp, ": an affine of ", length, " channels after a step of ",
                        channels);
        STD_TORCH_CHECK(channels != 0 || step.x < 0, kOp, ": an affine of unknown length");
        step.affine_channels = length;
        store.scale = channel_values(length, "affine scale");
        store.bias = channel_values(length, "affine bias");
      }
      step.stores.push_back(store);
    }
    return step;
  }

  std::vector<Tensor> tensors_;
  std::vector<int64_t> numbers_;
  std::vector<double> reals_;
  size_t tensor_ = 0, number_ = 0, real_ = 0;
  std::shared_ptr<OwnedProgram> owned_;
};

int64_t create_program(std::vector<Tensor> tensors, std::vector<int64_t> numbers, std::vector<double> reals) {
  std::shared_ptr<OwnedProgram> owned;
  try {
    owned = Reader(std::move(tensors), std::move(numbers), std::move(reals)).read();
  } catch (const std::invalid_argument& e) {
    STD_TORCH_CHECK(false, kOp, ": ", e.what());
  }
  std::lock_guard<std::mutex> lock(registry_mutex);
  registry[next_handle] = std::move(owned);
  return next_handle++;
}

void free_program(int64_t handle) {
  std::lock_guard<std::mutex> lock(registry_mutex);
  registry.erase(handle);
}

struct Planned {
  std::vector<InputTensor> inputs;
  std::shared_ptr<const ProgramPlan> plan;
};

Planned plan_for(Program* program, const std::vector<Tensor>& inputs, int threads) {
  Planned planned;
  for (const Tensor& x : inputs) {
    check_dtype(x, ScalarType::Float, kOp, "input");
    STD_TORCH_CHECK(x.dim() == 2 || x.dim() == 4, kOp, ": an input has shape ", shape_text(x), ", wanted [N, C] or [N, C, H, W]");
    planned.inputs.push_back(input_tensor(x));
  }
  try {
    planned.plan = program->plan(planned.inputs, threads);
  } catch (const std::invalid_argument& e) {
    STD_TORCH_CHECK(false, kOp, ": ", e.what());
  } catch (const std::bad_alloc&) {
    STD_TORCH_CHECK(false, kOp, ": out of memory while planning");
  }
  return planned;
}

std::vector<Tensor> run_program(int64_t handle, std::vector<Tensor> inputs) {
  const std::shared_ptr<OwnedProgram> owned = find(handle);
  STD_TORCH_CHECK(!inputs.empty(), kOp, ": no inputs");
  const Parallel parallel = torch_parallel();
  const Planned planned = plan_for(owned->program.get(), inputs, parallel.threads);
  std::vector<Tensor> outputs;
  std::vector<float*> data;
  const std::vector<OutputShape>& shapes = Program::output_shapes(*planned.plan);
  for (size_t i = 0; i < shapes.size(); i++) {
    const OutputShape& s = shapes[i];
    STD_TORCH_CHECK(!owned->rows[i] || (s.h == 1 && s.w == 1), kOp, ": output ", i, " is an image of ", s.h, "x", s.w,
                    ", not rows");
    outputs.push_back(owned->rows[i] ? torch::stable::new_empty(inputs[0], {s.n, s.c})
                                     : torch::stable::new_empty(inputs[0], {s.n, s.c, s.h, s.w}));
    data.push_back(static_cast<float*>(outputs.back().mutable_data_ptr()));
  }
  try {
    owned->program->run(*planned.plan, planned.inputs, data, parallel);
  } catch (const std::bad_alloc&) {
    STD_TORCH_CHECK(false, kOp, ": out of memory: ", Program::bytes(*planned.plan),
                    " bytes for packed activations; use a smaller batch or image");
  }
  return outputs;
}

int64_t program_bytes(int64_t handle, std::vector<Tensor> inputs) {
  const std::shared_ptr<OwnedProgram> owned = find(handle);
  return Program::bytes(*plan_for(owned->program.get(), inputs, int(torch::stable::get_num_threads())).plan);
}

}  // namespace
}  // namespace sparsegan

STABLE_TORCH_LIBRARY_IMPL(sparsegan, CompositeExplicitAutograd, m) {
  m.impl("program_create", TORCH_BOX(&sparsegan::create_program));
  m.impl("program_free", TORCH_BOX(&sparsegan::free_program));
}
STABLE_TORCH_LIBRARY_IMPL(sparsegan, CPU, m) {
  m.impl("program_run", TORCH_BOX(&sparsegan::run_program));
  m.impl("program_bytes", TORCH_BOX(&sparsegan::program_bytes));
}

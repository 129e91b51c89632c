// Random programs, made for the sanitizers to watch; tests/test_sanitizers.py compiles and runs it. Torch-free.
//
//     program_fuzz valid FIRST COUNT      programs of the seeds FIRST .. FIRST + COUNT - 1. On every instruction set 1, 2 and 3
//                                         threads, several runs at once and an image alone give the same numbers, and so do the
//                                         instruction sets. Everything the program may read is as long as it says and no longer.
//     program_fuzz hostile FIRST COUNT    the same programs with fields changed to nonsense, as far as the Reader of
//                                         run_program.cpp lets it pass: std::invalid_argument, or a run that touches only its
//                                         own.
//
// On failure it prints the seed and the program and ends with an error.
#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <new>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "isa.h"
#include "program.h"

// Fresh memory reads as NaN, or 255, so that what was never written shows; memory that is too much to ask for is std::bad_alloc.
extern "C" const char* __asan_default_options() {
  return "max_malloc_fill_size=1073741824:malloc_fill_byte=255:allocator_may_return_null=1:detect_leaks=0";
}
extern "C" const char* __ubsan_default_options() { return "print_stacktrace=1"; }

namespace sparsegan {
namespace {

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

class Random {
 public:
  explicit Random(uint64_t seed) : bits_(seed) {}
  int64_t pick(int64_t least, int64_t most) { return least + int64_t(bits_() % uint64_t(most - least + 1)); }
  bool chance(int64_t percent) { return pick(0, 99) < percent; }
  float normal() {  // near enough
    float sum = 0;
    for (int i = 0; i < 4; i++) sum += float(pick(-1000, 1000));
    return sum / 1155;
  }
  template <class T>
  T of(const std::vector<T>& choices) {
    return choices[size_t(pick(0, int64_t(choices.size()) - 1))];
  }

 private:
  std::mt19937_64 bits_;
};

// A program with inputs, and everything they point to in pieces of exactly its length.
struct Case {
  ProgramSpec spec;
  std::vector<InputTensor> inputs;
  std::vector<std::shared_ptr<void>> memory;
  std::map<const void*, int64_t> lengths;
  bool exact = true;  // the numbers are the same to the bit on every instruction set
  bool fine = true;   // no rounding between steps but that of float32

  template <class T>
  const T* keep(const std::vector<T>& values) {
    T* const array = new T[values.size()];
    std::copy(values.begin(), values.end(), array);
    memory.emplace_back(array, [](void* p) { delete[] static_cast<T*>(p); });
    lengths[array] = int64_t(values.size());
    return array;
  }
};

std::string describe(const Case& c) {
  static const char* const formats[] = {"u8", "bf16", "f32"};
  std::string text;
  auto add = [&](const char* name, auto... numbers) {
    text += std::string(" ") + name;
    ((text += " " + std::to_string(numbers)), ...);
  };
  for (const InputTensor& x : c.inputs) {
    add("input", x.n, x.c, x.h, x.w);
    add("strides", x.stride_n, x.stride_c, x.stride_h, x.stride_w);
    text += "\n";
  }
  for (const SlotSpec& s : c.spec.slots) {
    add("slot", s.channels);
    add(formats[int(s.format)], s.scale, s.zero);
    add("padding", int(s.padding));
    text += "\n";
  }
  for (const StepSpec& s : c.spec.steps) {
    const Layer& l = s.layer;
    add(s.pointwise ? "pointwise" : l.transposed ? "transposed" : "gemm", s.x);
    if (s.pointwise) {
      add("view", s.view[0], s.view[1], s.view[2]);
      add("upsample", s.upsample);
      add("shuffle", s.shuffle);
      add("norm", s.norm_groups);
    } else {
      add(formats[int(l.weight.format)], l.weight.out_channels, l.weight.rows, l.weight.block_o, l.weight.blocks);
      add("kernel", l.kernel_h, l.kernel_w);
      add("stride", l.stride_h, l.stride_w);
      add("padding", l.padding_h, l.padding_w, l.output_padding_h, l.output_padding_w);
      add("dilation", l.dilation_h, l.dilation_w);
      add("demodulation", s.demodulation);
    }
    add("act", int(s.activation), int(s.post_activation));
    if (s.has_residual) add("residual", s.residual, s.residual_upsample);
    add(s.stats ? "stats" : s.prescaled ? "prescaled" : "", s.affine_channels);
    for (const StoreSpec& t : s.stores) add(t.scale ? "-> affine" : "->", t.slot, t.channel, int(t.activation), t.modulation);
    text += "\n";
  }
  return text;
}

const Case* current = nullptr;
int64_t current_seed = -1;

void print_current() {
  std::fprintf(stderr, "seed %lld on %s:\n%s", static_cast<long long>(current_seed), current_kernels()->isa,
               current ? describe(*current).c_str() : "");
}

[[noreturn]] void fail(const std::string& text) {
  std::fprintf(stderr, "%s\n", text.c_str());
  print_current();
  std::exit(1);
}

// Steps that store what is read of them, each time it is read; sometimes a slot is read again.
class Builder {
 public:
  explicit Builder(uint64_t seed) : random_(seed) {
    case_.exact = random_.chance(40);
    const std::vector<std::vector<Format>> formats = {
        {Format::kBFloat16}, {Format::kFloat32}, {Format::kFloat32}, {Format::kInt8, Format::kBFloat16, Format::kFloat32}};
    formats_ = case_.exact ? std::vector<Format>{Format::kInt8} : random_.of(formats);
    large_ = random_.chance(20);
    batch_ = random_.chance(60) ? random_.pick(1, 3) : random_.pick(4, 20);
  }

  Case build() {
    entry();
    for (int64_t steps = random_.pick(1, 6); steps > 0; steps--) {
      if (random_.chance(10)) entry();
      random_.chance(65) ? gemm() : pointwise();
    }
    for (size_t i = 0; i < values_.size(); i++)
      if (steps()[i].stores.empty() || random_.chance(15)) store(i, ~case_.spec.outputs++, 0, false);
    for (StepSpec& step : steps()) prescale(&step);
    case_.spec.inputs = int64_t(case_.inputs.size());
    case_.spec.prepare = random_.chance(70);
    return std::move(case_);
  }

 private:
  struct Value {
    int64_t channels, height, width;
  };
  struct Reading {
    bool viewed = false, windowed = false;
    Layer window;
    int64_t height = 0, width = 0;
  };

  std::vector<StepSpec>& steps() { return case_.spec.steps; }

  // float32 [n, c, h, w] in one of the ways that torch has tensors lie.
  int64_t input(int64_t n, int64_t c, int64_t h, int64_t w, bool may_have_gaps = true) {
    InputTensor x;
    x.n = n, x.c = c, x.h = h, x.w = w;
    const int64_t way = may_have_gaps ? random_.pick(0, 3) : 0;
    if (way == 1) {  // channels last
      x.stride_c = 1, x.stride_w = c, x.stride_h = w * c, x.stride_n = h * w * c;
    } else {
      const int64_t gap = way == 2 ? random_.pick(1, 3) : 0;
      x.stride_w = gap + 1, x.stride_h = w * x.stride_w + gap, x.stride_c = h * x.stride_h, x.stride_n = c * x.stride_c + gap;
      if (way == 3) x.stride_n = 0;  // expanded
    }
    const int64_t last = (n - 1) * x.stride_n + (c - 1) * x.stride_c + (h - 1) * x.stride_h + (w - 1) * x.stride_w;
    x.data = case_.keep(normals(last + 1));
    case_.inputs.push_back(x);
    return int64_t(case_.inputs.size()) - 1;
  }

  std::vector<float> normals(int64_t count) {
    std::vector<float> values(count);
    for (float& v : values) v = random_.normal();
    return values;
  }

  Activation activation(float* slope) {
    *slope = 0.25f;
    return Activation(random_.pick(0, case_.exact ? 2 : kActivations - 1));
  }

  void add(const Value& value, StepSpec step) {
    steps().push_back(std::move(step));
    values_.push_back(value);
  }

  void store(size_t step, int64_t slot, int64_t channel, bool plain) {
    const int64_t channels = values_[step].channels;
    StoreSpec s;
    s.slot = slot, s.channel = channel;
    if (!plain && random_.chance(20)) {
      steps()[step].affine_channels = channels;
      s.scale = case_.keep(normals(channels)), s.bias = case_.keep(normals(channels));
    }
    if (!plain && random_.chance(30)) s.activation = activation(&s.slope);
    if (!plain && random_.chance(15)) s.modulation = input(batch_, channels, 1, 1);
    steps()[step].stores.push_back(s);
  }

  Format any_format() { return Format(random_.pick(0, 2)); }

  // A new slot with the results of these steps side by side.
  int64_t slot(const std::vector<size_t>& parts, Format format, bool plain = false) {
    const int64_t index = int64_t(case_.spec.slots.size());
    SlotSpec s;
    s.format = format;
    case_.fine &= format == Format::kFloat32;
    if (format == Format::kInt8) s.scale = random_.of<double>({0.03, 0.05}), s.zero = random_.of<int32_t>({0, 90, 128, 255});
    for (size_t part : parts) {
      store(part, index, s.channels, plain);
      s.channels += values_[part].channels;
    }
    case_.spec.slots.push_back(s);
    readings_.push_back({});
    readings_.back().height = values_[parts[0]].height, readings_.back().width = values_[parts[0]].width;
    return index;
  }

  // Steps that may store once more, and still give an output.
  std::vector<size_t> open_steps() {
    std::vector<size_t> open;
    for (size_t i = 0; i < values_.size(); i++)
      if (steps()[i].stores.size() + 1 < kMaxStores) open.push_back(i);
    if (open.empty()) entry(), open.push_back(values_.size() - 1);
    return open;
  }

  // One step, or two whose results may stand side by side.
  std::vector<size_t> parts(Format format) {
    const std::vector<size_t> open = open_steps();
    const size_t first = random_.of(open);
    const Value& v = values_[first];
    for (size_t other : open)
      if (other != first && values_[other].height == v.height && values_[other].width == v.width &&
          v.channels % lane_channels(format) == 0 && random_.chance(40))
        return {first, other};
    return {first};
  }

  std::vector<int64_t> slots_where(const std::function<bool(const SlotSpec&, const Reading&)>& good) {
    std::vector<int64_t> found;
    for (size_t s = 0; s < readings_.size(); s++)
      if (good(case_.spec.slots[s], readings_[s])) found.push_back(int64_t(s));
    return found;
  }

  void entry() {
    const std::vector<std::pair<int64_t, int64_t>> sizes = {
        {1, 1}, {1, 1}, {1, 5}, {3, 5}, {4, 4}, {2, 17}, {7, 20}, {1, 70}, {random_.pick(1, 24), random_.pick(1, 24)}};
    const auto [h, w] = large_ ? std::pair<int64_t, int64_t>{random_.pick(17, 33), random_.pick(20, 50)} : random_.of(sizes);
    Value v{random_.pick(1, large_ ? 40 : 10), h, w};
    StepSpec step;
    step.pointwise = true;
    if (random_.chance(10)) {
      step.x = ~input(batch_, v.width, v.channels, v.height, false);
      step.view[0] = v.channels, step.view[1] = v.height, step.view[2] = v.width;
    } else {
      step.x = ~input(batch_, v.channels, v.height, v.width);
      if (random_.chance(10)) rearrange(&step, &v);
    }
    if (random_.chance(20)) epilogue(v, &step);
    add(v, step);
  }

  void rearrange(StepSpec* step, Value* v) {
    if (v->channels % 4 == 0 && random_.chance(50))
      step->shuffle = 2;
    else if (v->height * v->width <= 150)
      step->upsample = int(random_.pick(2, 3));
    v->channels /= step->shuffle * step->shuffle;
    v->height *= step->upsample * step->shuffle, v->width *= step->upsample * step->shuffle;
  }

  void epilogue(const Value& v, StepSpec* step) {
    if (random_.chance(60)) step->activation = activation(&step->slope);
    if (random_.chance(35)) {
      step->has_residual = true;
      step->residual = residual(v, &step->residual_upsample);
    }
    if (random_.chance(20)) step->post_activation = activation(&step->post_slope);
  }

  int64_t residual(const Value& v, int* upsample) {
    auto fits = [&](int64_t channels, int64_t height, int64_t width) {
      for (int up = 1; up <= 2; up++)
        if ((channels == 1 || channels == v.channels) && height * up == v.height && width * up == v.width) return up;
      return 0;
    };
    const auto slots = slots_where([&](const SlotSpec& s, const Reading& r) { return fits(s.channels, r.height, r.width) > 0; });
    if (!slots.empty() && random_.chance(50)) {
      const int64_t s = random_.of(slots);
      *upsample = fits(case_.spec.slots[s].channels, readings_[s].height, readings_[s].width);
      return s;
    }
    for (size_t i : open_steps())
      if (const int up = fits(values_[i].channels, values_[i].height, values_[i].width); up && random_.chance(50)) {
        *upsample = up;
        return slot({i}, any_format());
      }
    *upsample = v.height % 2 == 0 && v.width % 2 == 0 ? int(random_.pick(1, 2)) : 1;
    return ~input(random_.chance(30) ? 1 : batch_, random_.chance(30) ? 1 : v.channels, v.height / *upsample,
                  v.width / *upsample);
  }

  // Of what is read, a whole slot: one that is there, or a new one.
  int64_t source(Format format, const std::function<bool(const SlotSpec&, const Reading&)>& good) {
    const auto there = slots_where(good);
    return !there.empty() && random_.chance(25) ? random_.of(there) : slot(parts(format), format);
  }

  void gemm() {
    const Format format = random_.of(formats_);
    const int64_t x = source(format, [&](const SlotSpec& s, const Reading& r) { return s.format == format && !r.viewed; });
    SlotSpec& s = case_.spec.slots[x];
    Reading& r = readings_[x];
    StepSpec step;
    step.x = x;
    Value v{random_.pick(1, large_ ? 70 : 14), 0, 0};
    if (!r.windowed) r.window = window(v.channels, s.channels, r.height, r.width, &s.padding), r.windowed = true;
    step.layer = r.window;
    output_size(step.layer, r.height, r.width, &v.height, &v.width);
    step.layer.weight = weight(format, step.layer.kernel_h * step.layer.kernel_w, s.channels, v.channels, s.scale);
    if (format == Format::kInt8) step.layer.x_zero = s.zero;
    if (random_.chance(15)) step.demodulation = input(batch_, v.channels, 1, 1);
    epilogue(v, &step);
    add(v, step);
  }

  Layer window(int64_t outputs, int64_t inputs, int64_t h, int64_t w, Padding* padding) {
    for (int tries = 0; tries < 8; tries++) {
      Layer l;
      if (h == 1 && w == 1 && random_.chance(40)) break;
      l.transposed = random_.chance(35);
      const int64_t largest = random_.chance(20) ? 7 : 4, fastest = random_.chance(15) ? 6 : 3;
      l.kernel_h = random_.pick(1, largest), l.kernel_w = random_.pick(1, largest);
      l.stride_h = random_.pick(1, fastest), l.stride_w = random_.pick(1, fastest);
      l.dilation_h = random_.pick(1, 3), l.dilation_w = random_.pick(1, 3);
      l.padding_h = random_.pick(0, l.kernel_h), l.padding_w = random_.pick(0, l.kernel_w);
      if (l.transposed) {
        l.output_padding_h = random_.pick(0, std::max(l.stride_h, l.dilation_h) - 1);
        l.output_padding_w = random_.pick(0, std::max(l.stride_w, l.dilation_w) - 1);
      }
      int64_t out_h, out_w;
      try {
        output_size(l, h, w, &out_h, &out_w);
      } catch (const std::invalid_argument&) {
        continue;
      }
      const int64_t values = batch_ * outputs * out_h * out_w;
      if (values > (large_ ? 200000 : 20000) || values * inputs * l.kernel_h * l.kernel_w > (large_ ? 20000000 : 3000000))
        continue;
      if (!l.transposed && h * w > 1) {
        const bool fits = l.padding_h < h && l.padding_w < w;
        *padding = Padding(random_.of<int>(fits ? std::vector<int>{0, 1, 2} : std::vector<int>{0, 2}));
      }
      return l;
    }
    return {};
  }

  PackedWeight weight(Format format, int64_t taps, int64_t inputs, int64_t outputs, double x_scale) {
    PackedWeight w;
    w.format = format, w.taps = taps, w.out_channels = outputs;
    w.block_o = random_.of<int64_t>({4, 8});
    const bool padding_anywhere = random_.chance(15);
    w.rows = ceil_div(outputs, w.block_o) + (padding_anywhere ? random_.pick(0, 1) : 0);
    std::vector<int32_t> channels(w.rows * w.block_o, -1);
    for (int64_t i = 0; i < outputs; i++) channels[i] = int32_t(i);
    if (padding_anywhere || random_.chance(30)) {
      const int64_t count = padding_anywhere ? int64_t(channels.size()) : outputs;
      for (int64_t i = count - 1; i > 0; i--) std::swap(channels[i], channels[random_.pick(0, i)]);
    }
    w.in_order = true;
    for (size_t i = 0; i < channels.size(); i++) w.in_order &= channels[i] == (int64_t(i) < outputs ? int32_t(i) : -1);

    const int64_t density = random_.of<int64_t>({0, 20, 50, 50, 100}), blocks_k = ceil_div(inputs, kBlockK);
    const float size = 1 / std::sqrt(float(taps * inputs));
    std::vector<int32_t> cols, ends = {0}, sums(outputs * taps, 0);
    std::vector<uint8_t> values;
    auto put = [&](auto value) {
      uint8_t bytes[sizeof(value)];
      std::memcpy(bytes, &value, sizeof(value));
      values.insert(values.end(), bytes, bytes + sizeof(value));
    };
    for (int64_t row = 0; row < w.rows; row++) {
      const int64_t kept = random_.chance(15) ? 0 : density;
      for (int64_t t = 0; t < taps; t++, ends.push_back(int32_t(cols.size())))
        for (int64_t k = 0; k < blocks_k; k++) {
          if (!random_.chance(kept)) continue;
          cols.push_back(int32_t(t * blocks_k + k));
          for (int64_t r = 0; r < w.block_o; r++)
            for (int64_t i = 0; i < kBlockK; i++) {
              const int32_t channel = channels[row * w.block_o + r];
              const bool real = channel >= 0 && k * kBlockK + i < inputs;
              const float number = real ? random_.normal() * size : 0.0f;
              const auto q = int8_t(real ? random_.pick(-127, 127) : 0);
              if (real) sums[channel * taps + t] += q;
              if (format == Format::kInt8) put(q);
              if (format == Format::kBFloat16) put(uint16_t(std::bit_cast<uint32_t>(number) >> 16));
              if (format == Format::kFloat32) put(number);
            }
        }
    }
    w.blocks = int64_t(cols.size());
    w.values = case_.keep(values), w.cols = case_.keep(cols), w.tap_ptr = case_.keep(ends);
    w.row_channels = case_.keep(channels), w.tap_sums = case_.keep(sums);
    std::vector<float> scales = normals(outputs);
    for (float& scale : scales) scale = format == Format::kInt8 ? scale * float(x_scale) * size / 64 : scale + 1;
    w.scale = case_.keep(scales), w.bias = case_.keep(normals(outputs));
    return w;
  }

  void pointwise() {
    StepSpec step;
    step.pointwise = true;
    const int64_t choice = random_.pick(0, case_.exact ? 3 : 5);
    if (choice >= 4) {  // of sums of a step's only plain store
      const size_t from = random_.of(open_steps());
      const Value v = values_[from];
      steps()[from].stats = true;
      step.x = slot({from}, random_.of<Format>({Format::kBFloat16, Format::kFloat32}), true);
      step.norm_groups = v.channels;
      while (v.channels % step.norm_groups != 0 || (step.norm_groups > 1 && random_.chance(30))) step.norm_groups--;
      step.norm_eps = 0.1;
      if (random_.chance(50)) step.norm_scale = case_.keep(normals(v.channels)), step.norm_bias = case_.keep(normals(v.channels));
      epilogue(v, &step);
      return add(v, step);
    }
    const bool view = choice == 0;
    step.x = source(view ? Format::kFloat32 : any_format(),
                    [&](const SlotSpec& s, const Reading& r) { return !view || (s.format == Format::kFloat32 && !r.windowed); });
    Reading& r = readings_[step.x];
    Value v{case_.spec.slots[step.x].channels, r.height, r.width};
    if (view) {
      r.viewed = true;
      v = random_.chance(50) ? Value{v.channels * v.height * v.width, 1, 1} : Value{v.height, v.channels, v.width};
      step.view[0] = v.channels, step.view[1] = v.height, step.view[2] = v.width;
    } else if (choice >= 2) {
      rearrange(&step, &v);
    }
    epilogue(v, &step);
    add(v, step);
  }

  void prescale(StepSpec* step) {
    const StoreSpec& s = step->stores[0];
    step->prescaled = !step->pointwise && step->stores.size() == 1 && s.slot >= 0 &&
                      case_.spec.slots[s.slot].format == Format::kInt8 && !s.scale && s.activation == Activation::kNone &&
                      s.modulation < 0 && !step->has_residual && step->demodulation < 0 && !step->stats &&
                      step->post_activation == Activation::kNone && int(step->activation) <= 2 && random_.chance(50);
  }

  Random random_;
  Case case_;
  std::vector<Format> formats_;
  bool large_;  // enough work for threads
  int64_t batch_;
  std::vector<Value> values_;      // of the steps
  std::vector<Reading> readings_;  // of the slots
};

std::atomic<int64_t> parallel_runs{0};

Parallel std_parallel(int threads) {
  Parallel parallel;
  parallel.threads = threads;
  parallel.run = [](int64_t workers, Body body) {
    parallel_runs++;
    std::vector<std::thread> others;
    for (int64_t i = 1; i < workers; i++) others.emplace_back([body, i] { body(i); });
    body(0);
    for (std::thread& t : others) t.join();
  };
  return parallel;
}

// Allocations by operator new of this thread.
thread_local int64_t allocations = 0;

const float kUnwritten = std::bit_cast<float>(0x7FA5A5A5);
using Outputs = std::vector<std::vector<float>>;

Outputs run(Program* program, const std::vector<InputTensor>& inputs, int threads) {
  const auto plan = program->plan(inputs, threads);
  Outputs outputs;
  std::vector<float*> data;
  for (const OutputShape& s : Program::output_shapes(*plan)) outputs.emplace_back(s.n * s.c * s.h * s.w, kUnwritten);
  for (std::vector<float>& output : outputs) data.push_back(output.data());
  program->run(*plan, inputs, data, std_parallel(threads));
  return outputs;
}

// A run like one before it on this thread takes no memory.
void check_steady(Program* program, const std::vector<InputTensor>& inputs) {
  const auto plan = program->plan(inputs, 1);
  std::vector<std::vector<float>> outputs;
  std::vector<float*> data;
  for (const OutputShape& s : Program::output_shapes(*plan)) outputs.emplace_back(s.n * s.c * s.h * s.w);
  for (std::vector<float>& output : outputs) data.push_back(output.data());
  const Parallel serial = std_parallel(1);
  const int64_t before = allocations;
  program->run(*plan, inputs, data, serial);
  if (allocations != before) fail("a run takes memory " + std::to_string(allocations - before) + " times");
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

bool agree(const Case& c, const std::vector<float>& a, const std::vector<float>& b) {
  if (c.exact) return same(a, b);
  double difference = 0, size = 0;
  for (size_t i = 0; i < a.size(); i++) difference += std::pow(double(a[i]) - b[i], 2), size += std::pow(double(b[i]), 2);
  return std::sqrt(difference) <= (c.fine ? 1e-4 : 0.1) * (std::sqrt(size) + std::sqrt(double(b.size())) / 4);
}

void need(bool ok, const std::string& text, size_t output) {
  if (!ok) fail(text + " (output " + std::to_string(output) + ")");
}

void check_valid(const Case& c, Random* random) {
  Program program(c.spec);
  Outputs first;
  for (const Kernels* kernels : available_kernels()) {
    force_isa(kernels->isa);
    const Outputs wanted = run(&program, c.inputs, 1);
    for (size_t k = 0; k < wanted.size(); k++) {
      for (float v : wanted[k]) need(std::bit_cast<uint32_t>(v) != std::bit_cast<uint32_t>(kUnwritten), "not written", k);
      need(first.empty() || agree(c, wanted[k], first[k]), "another instruction set gives other numbers", k);
    }
    if (first.empty()) first = wanted;

    for (int threads = 1; threads <= 3; threads++) {  // one thread again: the memory is no longer fresh
      const Outputs got = run(&program, c.inputs, threads);
      for (size_t k = 0; k < got.size(); k++) need(same(got[k], wanted[k]), std::to_string(threads) + " threads differ", k);
    }
    check_steady(&program, c.inputs);
    std::vector<Outputs> at_once(3);
    std::vector<std::thread> callers;
    for (int i = 0; i < 3; i++)
      callers.emplace_back([&, i] {
        for (int again = 0; again < 2; again++) at_once[i] = run(&program, c.inputs, 1 + i % 2);
      });
    for (std::thread& t : callers) t.join();
    for (const Outputs& got : at_once)
      for (size_t k = 0; k < got.size(); k++) need(same(got[k], wanted[k]), "runs at the same time differ", k);

    int64_t batch = 1;
    for (const InputTensor& x : c.inputs) batch = std::max(batch, x.n);
    const int64_t image = random->pick(0, batch - 1);
    std::vector<InputTensor> alone = c.inputs;
    for (InputTensor& x : alone)
      if (x.n == batch) x.data += image * x.stride_n, x.n = 1;
    const Outputs got = run(&program, alone, 1);
    for (size_t k = 0; k < got.size(); k++) {
      const auto begin = wanted[k].begin() + image * int64_t(got[k].size());
      need(agree(c, got[k], std::vector<float>(begin, begin + int64_t(got[k].size()))), "an image alone differs", k);
    }
  }
  force_isa("");
}

// Whether the Reader of run_program.cpp would hand over this spec: what it promises that Program does not check again.
bool passes_reader(const Case& c) {
  for (const StepSpec& step : c.spec.steps) {
    const int64_t read = step.x >= 0 ? c.spec.slots[step.x].channels : 0;
    int64_t channels = step.layer.weight.out_channels;
    if (!step.pointwise) {
      const PackedWeight& w = step.layer.weight;
      const int64_t columns = w.taps * ceil_div(read, kBlockK);
      if (columns >= INT32_MAX || (w.blocks && *std::max_element(w.cols, w.cols + w.blocks) >= columns)) return false;
    } else {
      if (step.norm_groups && step.norm_scale && c.lengths.at(step.norm_scale) != read) return false;
      channels = step.view[0] ? step.view[0] : read / (step.shuffle * step.shuffle);
    }
    for (const StoreSpec& store : step.stores)
      if (store.scale && (channels ? channels != c.lengths.at(store.scale) : step.x >= 0)) return false;
  }
  return true;
}

// One field set to another value that the Reader takes.
void mutate(Case* c, Random* random) {
  ProgramSpec& spec = c->spec;
  constexpr int64_t kMany = 1 << 20, kExtent = 65535, kFactor = 64;
  auto change = [&](auto* field, int64_t least, int64_t most) {
    const auto old = int64_t(*field);
    const int64_t value = random->of<int64_t>(
        {least, least + 1, 1, 2, 3, 4, 5, 8, 16, 33, most - 1, most, old - 1, old + 1, 2 * old, random->pick(-4, 8)});
    *field = std::remove_reference_t<decltype(*field)>(std::clamp(value, least, most));
  };
  const int64_t last_slot = int64_t(spec.slots.size()) - 1;
  if (last_slot >= 0 && random->chance(15)) {
    SlotSpec& s = spec.slots[random->pick(0, last_slot)];
    switch (random->pick(0, 4)) {
      case 0:
        return change(&s.channels, 1, INT32_MAX);
      case 1:
        return change(&s.format, 0, 2);
      case 2:
        return change(&s.zero, 0, 255);
      case 3:
        return change(&s.padding, 0, 2);
      default:
        s.scale = random->of<double>({1e-38, 1e-3, 1, 1e38});
        return;
    }
  }
  if (random->chance(20)) {
    InputTensor& x = c->inputs[random->pick(0, int64_t(c->inputs.size()) - 1)];
    change(random->of<int64_t*>({&x.n, &x.c, &x.h, &x.w}), 0, 70);
    x.stride_w = 1, x.stride_h = x.w, x.stride_c = x.h * x.w, x.stride_n = x.c * x.stride_c;
    x.data = c->keep(std::vector<float>(x.n * x.stride_n, 0.5f));
    return;
  }
  if (random->chance(3)) return change(random->chance(50) ? &spec.inputs : &spec.outputs, 0, kMany);
  StepSpec& step = spec.steps[random->pick(0, int64_t(spec.steps.size()) - 1)];
  Layer& l = step.layer;
  if (!step.pointwise && random->chance(40)) {
    switch (random->pick(0, 3)) {
      case 0:
        return std::swap(l.kernel_h, l.kernel_w);
      case 1:
        return change(random->of<int64_t*>({&l.stride_h, &l.stride_w}), 1, kExtent);
      case 2:
        return change(random->of<int64_t*>({&l.dilation_h, &l.dilation_w}), 1, kExtent);
      default:
        return change(random->of<int64_t*>({&l.padding_h, &l.padding_w, &l.output_padding_h, &l.output_padding_w}), 0, kExtent);
    }
  }
  if (step.pointwise && random->chance(40)) {
    switch (random->pick(0, 3)) {
      case 0:
        return change(&step.view[random->pick(0, 2)], 0, INT32_MAX);
      case 1:
        return change(&step.upsample, 1, kFactor);
      case 2:
        return change(&step.shuffle, 1, kFactor);
      default:
        return change(&step.norm_groups, 0, INT32_MAX);
    }
  }
  StoreSpec& store = step.stores[random->pick(0, int64_t(step.stores.size()) - 1)];
  switch (random->pick(0, 11)) {
    case 0:
      return change(&step.x, -kMany, last_slot);
    case 1:
      return change(&step.residual, -kMany, last_slot);
    case 2:
      step.has_residual = !step.has_residual;
      return;
    case 3:
      return change(&step.residual_upsample, 1, kFactor);
    case 4:
      step.stats = !step.stats;
      return;
    case 5:
      if (!step.pointwise) change(&step.demodulation, -1, kMany);
      return;
    case 6:
      return change(&step.activation, 0, kActivations - 1);
    case 7:
      return change(&store.slot, -kMany, kMany);
    case 8:
      return change(&store.channel, 0, INT32_MAX);
    case 9:
      return change(&store.modulation, -1, kMany);
    case 10:
      if (step.stores.size() < kMaxStores) step.stores.push_back(StoreSpec(store));
      return;
    default:
      if (step.stores.size() > 1) step.stores.pop_back();
  }
}

void check_hostile(const Case& valid, Random* random) {
  constexpr int64_t kMost = 1 << 20;  // bytes and numbers of a program that is run
  for (int i = 0; i < 30; i++) {
    Case c = valid;
    for (int64_t changes = random->pick(1, 3); changes > 0; changes--) mutate(&c, random);
    for (StepSpec& step : c.spec.steps)
      if (!step.pointwise && step.x >= 0) {
        const SlotSpec& slot = c.spec.slots[step.x];
        step.layer.x_zero = slot.format == Format::kInt8 ? slot.zero : 0;
      }
    if (!passes_reader(c)) continue;
    current = &c;
    try {
      Program program(c.spec);
      const int threads = int(random->pick(1, 3));
      const auto plan = program.plan(c.inputs, threads);
      int64_t size = Program::bytes(*plan);
      for (const OutputShape& s : Program::output_shapes(*plan)) size = std::max({size, s.n * s.c, s.n * s.c * s.h * s.w});
      if (size <= kMost) run(&program, c.inputs, threads);
    } catch (const std::invalid_argument&) {
    } catch (const std::bad_alloc&) {
    }
    current = &valid;
  }
  // Inputs that were refused leave nothing behind.
  auto program = std::make_unique<Program>(valid.spec);
  for (int i = 0; i < 3; i++) {
    Case c = valid;
    InputTensor& x = c.inputs[random->pick(0, int64_t(c.inputs.size()) - 1)];
    (i == 0 ? x.c : i == 1 ? x.h : x.w)++;
    try {
      program->plan(c.inputs, 1);
      program = std::make_unique<Program>(valid.spec);  // the first inputs settle channels that nothing else does
    } catch (const std::invalid_argument&) {
    }
  }
  try {
    run(program.get(), valid.inputs, 1);
  } catch (const std::invalid_argument& e) {
    fail(std::string("inputs that fit are refused after others that did not: ") + e.what());
  }
}

}  // namespace
}  // namespace sparsegan

void* operator new(std::size_t bytes) {
  sparsegan::allocations++;
  if (void* memory = std::malloc(bytes ? bytes : 1)) return memory;
  throw std::bad_alloc();
}
void* operator new(std::size_t bytes, const std::nothrow_t&) noexcept {
  sparsegan::allocations++;
  return std::malloc(bytes ? bytes : 1);
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

// Called by the sanitizers' runtimes, of which GCC has one for each.
extern "C" void __ubsan_on_report() { sparsegan::print_current(); }
extern "C" [[gnu::weak]] void __sanitizer_set_death_callback(void (*)());

int main(int argc, char** argv) {
  using namespace sparsegan;
  const std::string mode = argc == 4 ? argv[1] : "";
  if (mode != "valid" && mode != "hostile") {
    std::fprintf(stderr, "usage: program_fuzz valid|hostile FIRST COUNT\n");
    return 2;
  }
  if (__sanitizer_set_death_callback) __sanitizer_set_death_callback(print_current);
  const int64_t first = std::atoll(argv[2]), count = std::atoll(argv[3]);
  for (current_seed = first; current_seed < first + count; current_seed++) {
    const Case c = Builder(uint64_t(current_seed)).build();
    current = &c;
    Random random(uint64_t(current_seed) + (1ull << 32));
    try {
      mode == "valid" ? check_valid(c, &random) : check_hostile(c, &random);
    } catch (const std::exception& e) {
      fail(std::string("thrown: ") + e.what());
    }
    current = nullptr;
  }
  std::string isas;
  for (const Kernels* k : available_kernels()) isas += std::string(" ") + k->isa;
  std::printf("%lld %s programs on%s, %lld parallel steps\n", static_cast<long long>(count), mode.c_str(), isas.c_str(),
              static_cast<long long>(parallel_runs.load()));
  return 0;
}

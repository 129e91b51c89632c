#include "program.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <new>
#include <stdexcept>
#include <string>
#include <utility>

#include "isa.h"
#include "memory.h"

namespace sparsegan {
namespace {

// Vector loads may read past the last lane of a slot, never past this.
constexpr int64_t kSlackBytes = 128;
// Dot products of one vector below which a step is not worth sharing (about 1.5 us of work), and a program not worth waking other
// threads for.
constexpr int64_t kSerialWork = 8000, kSerialProgram = 120000;
constexpr int64_t kUnsharedBytes = 512 << 10;  // of activations: well inside the second cache beside the weights
constexpr int64_t kJobsPerStep = 2;
constexpr int64_t kLinesPerTask = 4;
constexpr size_t kMostPlans = 8;  // shapes of inputs that are remembered
constexpr int64_t kPointwiseRows = 8;
constexpr int64_t kMostLanes = int64_t(1) << 40;  // of a slot

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t line_tasks(int64_t lines) { return ceil_div(lines, kLinesPerTask); }

// In floating point, since the product of three sizes may overflow; exact below 2^53.
double elements(int64_t c, int64_t h, int64_t w) { return double(c) * double(h) * double(w); }

// Epilogue::bounded of int8 products. Of inputs and the zero point, both u8, the difference counts.
bool is_bounded(const PackedWeight& w, const std::vector<float>& scale, const std::vector<float>& bias) {
  constexpr float kMostProduct = 255 * 128, kLimit = 1 << 22;
  for (int64_t row = 0; row < w.rows; row++) {
    const float most = kMostProduct * kBlockK * float(w.tap_ptr[(row + 1) * w.taps] - w.tap_ptr[row * w.taps]);
    for (int64_t r = row * w.block_o; r < (row + 1) * w.block_o; r++)
      if (!(std::abs(scale[r]) * most + std::abs(bias[r]) < kLimit)) return false;  // a NaN, too
  }
  return true;
}

[[noreturn]] void fail(const std::string& text) { throw std::invalid_argument(text); }
void need(bool ok, size_t step, const char* text) {
  if (!ok) fail("step " + std::to_string(step) + ": " + text);
}

// A side of the ring: mostly one word, for which the loop of std::fill takes long to begin.
void fill_side(int32_t* to, int32_t* end, int32_t word) {
  if (end - to == 1)
    *to = word;
  else if (end != to)
    std::fill(to, end, word);
}

// Writes part `part` of `parts` of what steps do not store of a slot: the ring and whole padding planes. The parts follow the
// order of the tasks that store, so that the caches of two cores seldom have to send each other the lines where a ring and an
// image meet.
void fill_ring(const LaneLayout& l, int32_t word, uint8_t* data, int64_t part, int64_t parts) {
  const int64_t real_planes = ceil_div(l.channels, lane_channels(l.format));
  const bool by_rows = l.row_stride > l.plane_stride;
  const int64_t phases = l.phases_h * l.phases_w, outer = by_rows ? l.rows : l.planes, inner = by_rows ? l.planes : l.rows;
  const int64_t count = (l.batch_in_cols ? 1 : l.images) * outer * phases, end = (part + 1) * count / parts;
  for (int64_t i = part * count / parts; i < end; i++) {
    const int64_t phase = i % phases, o = i / phases % outer, n = i / phases / outer;
    // of the image's pixels in this phase
    auto range = [](int64_t ring, int64_t size, int64_t first, int64_t step) {
      return std::pair{ceil_div(ring - first, step), ceil_div(ring + size - first, step)};
    };
    const auto rows = range(l.top, l.height, phase / l.phases_w, l.phases_h);
    const auto cols = range(l.left, l.batch_in_cols ? l.images : l.width, phase % l.phases_w, l.phases_w);
    int32_t* to = reinterpret_cast<int32_t*>(data) + n * l.image_stride + phase * l.phase_stride +
                  o * (by_rows ? l.row_stride : l.plane_stride);
    for (int64_t k = 0; k < inner; k++, to += l.cols) {
      const int64_t plane = by_rows ? k : o, row = by_rows ? o : k;
      if (plane >= real_planes || row < rows.first || row >= rows.second) {
        std::fill(to, to + l.cols, word);
      } else {
        fill_side(to, to + cols.first, word);
        fill_side(to + cols.second, to + l.cols, word);
      }
    }
  }
}

// Pixel that stands at place `i` of an axis of `size` pixels; -1: none.
int64_t mirrored(Padding padding, int64_t i, int64_t size) {
  if (padding == Padding::kReplicate) return std::clamp<int64_t>(i, 0, size - 1);
  if (i < 0) i = -i;
  if (i >= size) i = 2 * size - 2 - i;
  return i >= 0 && i < size ? i : -1;
}

// Fills the ring of one row of one image with copies of the image's pixels.
void mirror_line(const LaneLayout& l, Padding padding, uint8_t* data, int64_t line) {
  const int64_t padded_rows = l.rows * l.phases_h, n = line / padded_rows, y = line % padded_rows - l.top;
  const int64_t from_y = mirrored(padding, y, l.height);
  if (from_y < 0) return;
  int32_t* const lanes = reinterpret_cast<int32_t*>(data);
  const int64_t end = l.cols * l.phases_w - l.left;
  for (int64_t x = -l.left; x < end; x++) {
    if (x == 0 && y == from_y) x = l.width;
    if (x >= end) break;
    const int64_t from_x = mirrored(padding, x, l.width);
    if (from_x < 0) continue;
    const int32_t* from = lanes + l.at(n, from_y, from_x);
    int32_t* to = lanes + l.at(n, y, x);
    for (int64_t plane = 0; plane < l.planes; plane++) to[plane * l.plane_stride] = from[plane * l.plane_stride];
  }
}

LaneLayout tensor_layout(const InputTensor& x) {
  LaneLayout l;
  l.images = x.n, l.channels = l.planes = x.c, l.height = l.rows = x.h, l.width = l.cols = x.w;
  l.image_stride = x.stride_n, l.plane_stride = x.stride_c, l.row_stride = x.stride_h;
  return l;
}

// x read as [n, view]; its images must be contiguous.
InputTensor viewed(const InputTensor& x, const int64_t (&view)[3]) {
  if (!view[0]) return x;
  InputTensor v = x;
  v.c = view[0], v.h = view[1], v.w = view[2];
  v.stride_c = v.h * v.w, v.stride_h = v.w, v.stride_w = 1;
  return v;
}

Source tensor_source(const InputTensor& x) {
  Source s;
  s.data = reinterpret_cast<const uint8_t*>(x.data);
  s.layout = tensor_layout(x);
  s.tensor = true;
  s.col_stride = x.w == 1 ? 1 : x.stride_w;
  return s;
}

}  // namespace

struct SlotPlan {
  LaneLayout layout;
  int64_t h = 0, w = 0;
  int64_t first_step = -1, last_step = -1;  // that use it
  bool planar = false;                      // NCHW float32, to be viewed
  int64_t offset = 0;
};

struct Buffer {
  int64_t bytes = 0, first_step = 0, last_step = 0, offset = 0;
};

struct StepPlan {
  Plan plan;
  std::unique_ptr<const Prepared> prepared;
  Split split;
  int64_t channels = 0, h = 0, w = 0;  // of the result
  bool per_image = false;
  bool bounded = false;        // see Epilogue; without demodulation
  bool import = false;         // only packs an input into a slot
  bool mirror = false;         // the ring of x is still to be filled with copies of its pixels
  std::vector<int64_t> rings;  // slots whose ring this step fills
  size_t norm_source = 0;      // the step whose sums this one's normalisation reads
  int64_t totals = -1;         // buffers; this one: float64 [2][rows of the source], [2][channels]
  int64_t sums = -1;
  int64_t scales = -1;           // [n][2][rows]: normalisation or demodulation
  std::vector<int64_t> factors;  // of each store, -1: none
};

struct ProgramPlan {
  int64_t n = 0;
  const Kernels* kernels = nullptr;
  std::vector<SlotPlan> slots;
  std::vector<StepPlan> steps;
  std::vector<Buffer> buffers;
  std::vector<OutputShape> outputs;
  int64_t bytes = 0;
  bool serial = false;
};

namespace {

Source slot_source(const SlotSpec& spec, const SlotPlan& slot, const uint8_t* memory) {
  Source s;
  s.data = memory + slot.offset;
  s.layout = slot.layout;
  s.scale = float(spec.scale), s.zero = spec.zero;
  return s;
}

// Places buffers so that those alive at the same time do not overlap, the largest first; returns the bytes of all. Few bytes are
// not shared at all: what a core wrote stays in its cache until it writes there again, and no other core has to be asked for it.
int64_t place(std::vector<Buffer*> buffers) {
  int64_t all = 0;
  for (const Buffer* b : buffers) all += b->bytes;
  std::stable_sort(buffers.begin(), buffers.end(), [](const Buffer* a, const Buffer* b) { return a->bytes > b->bytes; });
  int64_t end = 0;
  for (size_t i = 0; i < buffers.size(); i++) {
    Buffer& b = *buffers[i];
    std::vector<std::pair<int64_t, int64_t>> taken;
    for (size_t j = 0; j < i; j++)
      if (all <= kUnsharedBytes || (buffers[j]->first_step <= b.last_step && b.first_step <= buffers[j]->last_step))
        taken.push_back({buffers[j]->offset, buffers[j]->offset + buffers[j]->bytes});
    std::sort(taken.begin(), taken.end());
    for (const auto& [from, to] : taken) {
      if (b.offset + b.bytes <= from) break;
      b.offset = std::max(b.offset, to);
    }
    end = std::max(end, b.offset + b.bytes);
  }
  return end;
}

}  // namespace

void Program::Free::operator()(uint8_t* p) const { std::free(p); }
Program::~Program() = default;

Program::Program(ProgramSpec spec) : spec_(std::move(spec)) {
  rows_.resize(spec_.steps.size());
  auto is_slot = [&](int64_t i) { return i >= 0 && i < int64_t(spec_.slots.size()); };
  auto is_input = [&](int64_t i) { return i >= 0 && i < spec_.inputs; };
  std::vector<int64_t> stored(spec_.slots.size(), 0);  // channels that were stored so far
  std::vector<bool> has_stats(spec_.slots.size(), false), given(std::max<int64_t>(spec_.outputs, 0), false);
  for (size_t i = 0; i < spec_.steps.size(); i++) {
    const StepSpec& step = spec_.steps[i];
    auto readable = [&](int64_t slot) { return is_slot(slot) && stored[slot] == spec_.slots[slot].channels; };
    if (step.pointwise) {
      need(step.x < 0 ? is_input(~step.x) : readable(step.x), i, "x is no input, and no slot that was stored");
      need(step.x < 0 || spec_.slots[step.x].format == Format::kFloat32 || !step.view[0], i, "only an f32 slot can be viewed");
      need(step.upsample >= 1 && step.shuffle >= 1 && (step.upsample == 1 || step.shuffle == 1), i,
           "upsample or shuffle below 1");
      need(!step.norm_groups || (step.x >= 0 && has_stats[step.x] && !step.view[0] && step.shuffle == 1), i,
           "a norm of a slot without sums");
    } else {
      need(readable(step.x), i, "x is no slot that was stored");
      need(step.layer.weight.format == spec_.slots[step.x].format, i, "the weight has another format than the slot");
      need(step.demodulation < 0 || is_input(step.demodulation), i, "demodulation is no input");
    }
    need(!step.has_residual || (step.residual < 0 ? is_input(~step.residual) : readable(step.residual)), i,
         "the residual is no input, and no slot that was stored");
    need(step.residual_upsample >= 1, i, "residual_upsample below 1");
    need(!step.stores.empty() && step.stores.size() <= kMaxStores, i, "no stores, or more than 4");
    for (const StoreSpec& store : step.stores) {
      need(store.modulation < 0 || is_input(store.modulation), i, "modulation is no input");
      if (store.slot < 0) {
        need(~store.slot < spec_.outputs && store.channel == 0 && !given[~store.slot], i,
             "a store to no output, or to one twice");
        given[~store.slot] = true;
        continue;
      }
      need(is_slot(store.slot) && store.channel >= 0, i, "a store to no slot");
      need(store.channel % lane_channels(spec_.slots[store.slot].format) == 0, i, "a store begins inside a lane");
      // Channels are counted once they are known: for gather-GEMMs now, for pointwise steps when planned.
      stored[store.slot] = spec_.slots[store.slot].channels;
      has_stats[store.slot] = step.stats && store.channel == 0;
    }
    StepRows& rows = rows_[i];
    if (step.pointwise) continue;
    const PackedWeight& w = rows.weight = step.layer.weight;
    auto by_row = [&](const float* values) {
      std::vector<float> sorted(w.rows * w.block_o + kPadding, 0.0f);
      for (int64_t r = 0; r < w.rows * w.block_o; r++)
        if (w.row_channels[r] >= 0) sorted[r] = values[w.row_channels[r]];
      return sorted;
    };
    rows.scale = by_row(w.scale);
    rows.bias = by_row(w.bias);
    for (const StoreSpec& store : step.stores) {
      rows.store_scale.push_back(store.scale ? by_row(store.scale) : std::vector<float>());
      rows.store_bias.push_back(store.scale ? by_row(store.bias) : std::vector<float>());
    }
  }
  for (bool g : given)
    if (!g) fail("an output is never stored");
}

const std::vector<OutputShape>& Program::output_shapes(const ProgramPlan& plan) { return plan.outputs; }
int64_t Program::bytes(const ProgramPlan& plan) { return plan.bytes; }

std::shared_ptr<const ProgramPlan> Program::plan(const std::vector<InputTensor>& inputs, int threads) {
  if (int64_t(inputs.size()) != spec_.inputs)
    fail(std::to_string(inputs.size()) + " inputs, wanted " + std::to_string(spec_.inputs));
  std::vector<int64_t> key = {threads, int64_t(reinterpret_cast<uintptr_t>(current_kernels()))};
  for (const InputTensor& x : inputs) key.insert(key.end(), {x.n, x.c, x.h, x.w});
  std::lock_guard<std::mutex> lock(mutex_);
  if (auto found = plans_.find(key); found != plans_.end()) return found->second;
  auto made = make_program_plan(inputs, threads);
  if (plans_.size() >= kMostPlans) plans_.clear();
  plans_[key] = made;
  return made;
}

std::shared_ptr<const ProgramPlan> Program::make_program_plan(const std::vector<InputTensor>& inputs, int threads) {
  auto made = std::make_shared<ProgramPlan>();
  ProgramPlan& p = *made;
  p.kernels = current_kernels();
  p.slots.resize(spec_.slots.size());
  p.steps.resize(spec_.steps.size());
  p.outputs.resize(spec_.outputs);
  p.n = 1;
  for (const InputTensor& x : inputs) p.n = std::max(p.n, x.n);
  if (!inputs.empty() && std::any_of(inputs.begin(), inputs.end(), [](const InputTensor& x) { return x.n == 0; })) p.n = 0;

  for (const InputTensor& x : inputs)
    if (x.c < 1 || x.h < 1 || x.w < 1) fail("an input without channels or pixels");

  // Sizes of everything, and who uses which slot when.
  auto use = [&](int64_t slot, size_t step) {
    SlotPlan& s = p.slots[slot];
    if (s.first_step < 0) s.first_step = int64_t(step), p.steps[step].rings.push_back(slot);
    s.last_step = int64_t(step);
  };
  std::vector<std::vector<size_t>> readers(spec_.slots.size());  // gather-GEMMs
  for (size_t i = 0; i < spec_.steps.size(); i++) {
    const StepSpec& step = spec_.steps[i];
    StepPlan& sp = p.steps[i];
    int64_t c, h, w;
    if (step.x < 0) {
      const InputTensor& x = inputs[~step.x];
      const InputTensor v = viewed(x, step.view);
      need(elements(x.c, x.h, x.w) == elements(v.c, v.h, v.w), i, "the view has another number of elements than the input");
      need(!step.view[0] ||
               ((x.w == 1 || x.stride_w == 1) && (x.h == 1 || x.stride_h == x.w) && (x.c == 1 || x.stride_c == x.h * x.w)),
           i, "an input that is viewed must be contiguous");
      need(x.n == p.n, i, "the inputs have different batch sizes");
      c = v.c, h = v.h, w = v.w;
    } else {
      use(step.x, i);
      SlotPlan& slot = p.slots[step.x];
      c = spec_.slots[step.x].channels, h = slot.h, w = slot.w;
      if (step.view[0]) {
        slot.planar = true;
        need(elements(c, h, w) == elements(step.view[0], step.view[1], step.view[2]), i,
             "the view has another number of elements than the slot");
        c = step.view[0], h = step.view[1], w = step.view[2];
      }
    }
    if (step.pointwise) {
      need(c % (step.shuffle * step.shuffle) == 0, i, "the channels cannot be shuffled into pixels");
      sp.channels = c / (step.shuffle * step.shuffle);
      sp.h = h * step.upsample * step.shuffle, sp.w = w * step.upsample * step.shuffle;
      need(!step.norm_groups || sp.channels % step.norm_groups == 0, i, "the groups of the norm do not divide the channels");
      if (double(sp.h) * double(sp.w) > INT32_MAX) fail("an output of 2^31 pixels or more");
    } else {
      readers[step.x].push_back(i);
      output_size(step.layer, h, w, &sp.h, &sp.w);
      sp.channels = step.layer.weight.out_channels;
      need(step.demodulation < 0 || (inputs[step.demodulation].n == p.n && inputs[step.demodulation].c == sp.channels), i,
           "the demodulation is not [N, channels]");
      sp.mirror = spec_.slots[step.x].padding != Padding::kZeros && (step.layer.padding_h > 0 || step.layer.padding_w > 0) &&
                  readers[step.x].size() == 1;
    }
    if (step.has_residual) {
      int64_t rc, rh, rw, rn = p.n;
      if (step.residual < 0) {
        const InputTensor& r = inputs[~step.residual];
        rc = r.c, rh = r.h, rw = r.w, rn = r.n;
      } else {
        use(step.residual, i);
        rc = spec_.slots[step.residual].channels, rh = p.slots[step.residual].h, rw = p.slots[step.residual].w;
      }
      need((rc == sp.channels || rc == 1) && (rn == p.n || rn == 1) && rh * step.residual_upsample == sp.h &&
               rw * step.residual_upsample == sp.w,
           i, "the residual has another size than the result");
    }
    need(!step.affine_channels || step.affine_channels == sp.channels, i,
         "an affine has another number of channels than the step");
    sp.per_image = step.stats || step.norm_groups || step.demodulation >= 0;
    for (const StoreSpec& store : step.stores) {
      if (store.modulation >= 0) {
        need(inputs[store.modulation].n == p.n && inputs[store.modulation].c == sp.channels, i,
             "the modulation is not [N, channels]");
        sp.per_image = true;
      }
      if (store.slot < 0) {
        p.outputs[~store.slot] = {p.n, sp.channels, sp.h, sp.w};
        continue;
      }
      SlotPlan& slot = p.slots[store.slot];
      const SlotSpec& spec = spec_.slots[store.slot];
      const int64_t end = store.channel + sp.channels;
      need(end <= spec.channels && (end == spec.channels || end % lane_channels(spec.format) == 0), i,
           "a store ends inside a lane, or beyond the slot");
      need(slot.first_step < 0 || (slot.h == sp.h && slot.w == sp.w), i, "the parts of a slot have different sizes");
      slot.h = sp.h, slot.w = sp.w;
      use(store.slot, i);
    }
  }

  if (p.n == 0) return made;  // the shapes of the outputs are all that is needed

  // Layouts: that of the gather-GEMMs that read a slot, else plain.
  for (size_t s = 0; s < p.slots.size(); s++) {
    SlotPlan& slot = p.slots[s];
    const SlotSpec& spec = spec_.slots[s];
    if (slot.first_step < 0) continue;
    bool per_image = false, ring = false;
    for (size_t reader : readers[s]) {
      const Layer& layer = spec_.steps[reader].layer;
      per_image |= p.steps[reader].per_image;
      ring |= spec.padding != Padding::kZeros && (layer.padding_h > 0 || layer.padding_w > 0);
    }
    for (size_t reader : readers[s]) {
      Plan& plan = p.steps[reader].plan;
      plan = make_plan(spec_.steps[reader].layer, p.n, spec.channels, slot.h, slot.w, p.kernels->vector_lanes, per_image, ring);
      if (reader != readers[s].front() && !(plan.in == slot.layout)) fail("layers of different windows read one slot");
      slot.layout = plan.in;
    }
    if (readers[s].empty())
      slot.layout = slot.planar ? nchw_layout(p.n, spec.channels, slot.h, slot.w)
                                : plain_layout(spec.format, p.n, spec.channels, slot.h, slot.w);
    else if (slot.planar)
      fail("a slot that is viewed cannot be read by a gather-GEMM, too");
    const LaneLayout& l = slot.layout;
    if (elements(l.planes, l.rows * l.phases_h, l.cols * l.phases_w) * double(p.n) > double(kMostLanes))
      fail("a slot of more than 4 TiB");
    for (size_t reader : readers[s]) {
      const Layer& layer = spec_.steps[reader].layer;
      const bool fits = spec.padding == Padding::kReplicate || (layer.padding_h < slot.h && layer.padding_w < slot.w);
      if (ring && (layer.transposed || !fits)) fail("reflected padding must be smaller than the image, and before a convolution");
    }
  }

  // Splits and extra buffers.
  for (size_t i = 0; i < spec_.steps.size(); i++) {
    const StepSpec& step = spec_.steps[i];
    StepPlan& sp = p.steps[i];
    StepRows& rows = rows_[i];
    if (step.pointwise) {
      sp.plan = pointwise_plan(p.n, sp.h, sp.w);
      const StoreSpec& store = step.stores.front();
      sp.import = step.x < 0 && step.stores.size() == 1 && store.slot >= 0 && store.channel == 0 &&
                  sp.channels == spec_.slots[store.slot].channels && !store.scale && store.activation == Activation::kNone &&
                  store.modulation < 0 && step.upsample == 1 && step.shuffle == 1 && step.activation == Activation::kNone &&
                  step.post_activation == Activation::kNone && !step.has_residual && !step.stats;
      // the rows of a pointwise step follow from its channels
      if (rows.weight.out_channels != sp.channels) {
        if (rows.weight.out_channels) fail("the number of channels of a pointwise step changed");
        const int64_t count = ceil_div(sp.channels, kPointwiseRows) * kPointwiseRows;
        rows.row_channels.resize(count);
        for (int64_t r = 0; r < count; r++) rows.row_channels[r] = r < sp.channels ? int32_t(r) : -1;
        PackedWeight& w = rows.weight;
        w.row_channels = rows.row_channels.data();
        w.rows = count / kPointwiseRows, w.block_o = kPointwiseRows, w.out_channels = sp.channels, w.in_order = true;
        auto padded = [&](const float* values, float otherwise) {
          std::vector<float> sorted(count + kPadding, 0.0f);
          for (int64_t c = 0; c < sp.channels; c++) sorted[c] = values ? values[c] : otherwise;
          return sorted;
        };
        rows.scale = padded(nullptr, 1.0f);
        rows.bias = padded(nullptr, 0.0f);
        for (const StoreSpec& s : step.stores) {
          rows.store_scale.push_back(s.scale ? padded(s.scale, 0) : std::vector<float>());
          rows.store_bias.push_back(s.scale ? padded(s.bias, 0) : std::vector<float>());
        }
      }
    }
    const PackedWeight& w = rows.weight;
    const int64_t count = w.rows * w.block_o;
    auto buffer = [&](int64_t floats, size_t last) {
      Buffer b;
      b.bytes = ceil_div(4 * floats, 64) * 64, b.first_step = int64_t(i), b.last_step = int64_t(last);
      p.buffers.push_back(b);
      return int64_t(p.buffers.size()) - 1;
    };
    GatherGemm op;
    op.weight = &w;
    op.plan = &sp.plan;
    Source pointwise;
    if (step.pointwise) op.source = &pointwise;
    op.per_image = sp.per_image;
    std::vector<LaneLayout> outputs(step.stores.size());
    for (size_t s = 0; s < step.stores.size(); s++) {
      const StoreSpec& store = step.stores[s];
      outputs[s] = store.slot < 0 ? nchw_layout(p.n, sp.channels, sp.h, sp.w) : p.slots[store.slot].layout;
      op.epilogue.stores[s].layout = &outputs[s];
      op.epilogue.stores[s].channel = store.channel;
      sp.factors.push_back(store.modulation < 0 ? -1 : buffer(p.n * (count + kPadding), i));
    }
    op.epilogue.store_count = int(step.stores.size());
    if (spec_.prepare) sp.prepared = p.kernels->prepare(op);
    op.prepared = sp.prepared.get();
    sp.split = p.kernels->split(op, threads);
    sp.bounded = !step.pointwise && w.format == Format::kInt8 && step.demodulation < 0 && is_bounded(w, rows.scale, rows.bias);
    if (step.norm_groups || step.demodulation >= 0) sp.scales = buffer(p.n * 2 * (count + kPadding), i);
    if (step.norm_groups) {
      const PackedWeight& from = rows_[sp.norm_source].weight;
      sp.totals = buffer(2 * 2 * (from.rows * from.block_o + sp.channels), i);
    }
    // Where stores write every lane there is neither ring nor padding channel to fill.
    std::erase_if(sp.rings, [&](int64_t slot) {
      const LaneLayout& l = p.slots[slot].layout;
      return l.images * l.channels * l.height * l.width == l.lanes() * lane_channels(l.format);
    });
    if (step.stats) {
      size_t last = i;  // the norms that read the sums
      for (size_t j = i + 1; j < spec_.steps.size(); j++)
        for (const StoreSpec& store : step.stores)
          if (store.slot >= 0 && spec_.steps[j].norm_groups && spec_.steps[j].x == store.slot)
            last = j, p.steps[j].norm_source = i;
      sp.sums = buffer(p.n * sp.split.tiles_per_image * sp.split.phase_rows * 2 * count, last);
    }
  }

  // One block of memory for all.
  std::vector<Buffer> slots(p.slots.size());
  std::vector<Buffer*> all;
  for (size_t s = 0; s < p.slots.size(); s++) {
    if (p.slots[s].first_step < 0) continue;
    slots[s].bytes = ceil_div(4 * p.slots[s].layout.lanes() + kSlackBytes, 64) * 64;
    slots[s].first_step = p.slots[s].first_step, slots[s].last_step = p.slots[s].last_step;
    all.push_back(&slots[s]);
  }
  for (Buffer& b : p.buffers) all.push_back(&b);
  p.bytes = place(all);
  int64_t dots = 0;
  for (const StepPlan& sp : p.steps) dots += sp.import ? 0 : sp.split.dots;
  p.serial = dots < kSerialProgram;
  for (size_t s = 0; s < p.slots.size(); s++) p.slots[s].offset = slots[s].offset;
  return made;
}

Program::Arena Program::take_arena(int64_t bytes) {
  Arena arena;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!arenas_.empty()) {
      arena = std::move(arenas_.back());
      arenas_.pop_back();
    }
  }
  if (arena.size < bytes) {
    arena.memory.reset();
    const int64_t page = bytes < kHugePage ? 64 : kHugePage, whole = ceil_div(bytes, page) * page;
    arena.memory.reset(static_cast<uint8_t*>(std::aligned_alloc(page, whole)));
    if (!arena.memory) throw std::bad_alloc();
    use_huge_pages(arena.memory.get(), whole);
    arena.size = bytes;
  }
  return arena;
}

void Program::give_back(Arena arena) {
  std::lock_guard<std::mutex> lock(mutex_);
  arenas_.push_back(std::move(arena));
}

void Program::run(const ProgramPlan& plan, const std::vector<InputTensor>& inputs, const std::vector<float*>& outputs,
                  const Parallel& parallel) {
  if (plan.n == 0) return;
  const int64_t threads = plan.serial ? 1 : std::min<int64_t>(parallel.threads, Team::kMaxThreads);
  const int64_t jobs = kJobsPerStep * int64_t(plan.steps.size()), activations = ceil_div(plan.bytes, 64) * 64;
  Arena arena = take_arena(std::max<int64_t>(activations + Team::bytes(threads, jobs), 64));
  uint8_t* const memory = arena.memory.get();
  Team team(threads, jobs, memory + activations);
  const auto lead = [&] {
    for (size_t i = 0; i < plan.steps.size(); i++) run_step(plan, i, inputs, outputs, memory, &team);
    team.dismiss();
  };
  if (threads == 1) {
    lead();
  } else {
    const auto member = [&](int64_t worker) { worker == 0 ? lead() : team.help(worker); };
    parallel.run(threads, body_of(member));
  }
  give_back(std::move(arena));
}

void Program::run_step(const ProgramPlan& p, size_t index, const std::vector<InputTensor>& inputs,
                       const std::vector<float*>& outputs, uint8_t* memory, Team* team) {
  const StepSpec& step = spec_.steps[index];
  const StepPlan& sp = p.steps[index];
  const StepRows& rows = rows_[index];
  const PackedWeight& w = rows.weight;
  const int64_t count = w.rows * w.block_o;
  auto floats = [&](int64_t buffer) { return reinterpret_cast<float*>(memory + p.buffers[buffer].offset); };

  if (sp.import) {
    const InputTensor x = viewed(inputs[~step.x], step.view);
    const SourceTensor src{x.data, x.stride_n, x.stride_c, x.stride_h, x.stride_w};
    const int64_t slot = step.stores.front().slot;
    const LaneLayout& l = p.slots[slot].layout;
    return team->for_each(line_tasks(pack_lines(l)), x.n * x.c * x.h * x.w < 4096, [&](int64_t task) {
      for (int64_t line = task * kLinesPerTask; line < std::min(pack_lines(l), (task + 1) * kLinesPerTask); line++)
        p.kernels->pack_line(l, src, float(1.0 / spec_.slots[slot].scale), spec_.slots[slot].zero, memory + p.slots[slot].offset,
                             line);
    });
  }

  GatherGemm op;
  op.weight = &w;
  op.plan = &sp.plan;
  op.per_image = sp.per_image;
  op.prepared = sp.prepared.get();
  Source source, residual;
  if (!step.pointwise) {
    op.in = memory + p.slots[step.x].offset;
    if (sp.mirror) {
      const LaneLayout& l = p.slots[step.x].layout;
      team->for_each(line_tasks(pack_lines(l)), l.lanes() < 65536, [&](int64_t task) {
        for (int64_t line = task * kLinesPerTask; line < std::min(pack_lines(l), (task + 1) * kLinesPerTask); line++)
          mirror_line(l, spec_.slots[step.x].padding, memory + p.slots[step.x].offset, line);
      });
    }
  } else if (step.x < 0) {
    source = tensor_source(viewed(inputs[~step.x], step.view));
  } else {
    source = slot_source(spec_.slots[step.x], p.slots[step.x], memory);
    if (step.view[0]) source.layout = nchw_layout(p.n, step.view[0], step.view[1], step.view[2]);
  }
  if (step.pointwise) {
    op.source = &source;
    op.upsample = step.upsample, op.shuffle = step.shuffle;
  }

  Epilogue& e = op.epilogue;
  e.scale = rows.scale.data(), e.bias = rows.bias.data();
  e.bounded = sp.bounded;
  if (step.demodulation >= 0) {
    const InputTensor& d = inputs[step.demodulation];
    float* scale = floats(sp.scales);
    for (int64_t n = 0; n < p.n; n++)
      for (int64_t r = 0; r < count; r++)
        scale[n * (count + kPadding) + r] =
            w.row_channels[r] < 0 ? 0.0f : rows.scale[r] * d.data[n * d.stride_n + w.row_channels[r] * d.stride_c];
    e.scale = scale, e.scale_stride = count + kPadding;
  }
  if (step.norm_groups) {
    const StepPlan& from = p.steps[sp.norm_source];
    const PackedWeight& from_rows = rows_[sp.norm_source].weight;
    const int64_t from_count = from_rows.rows * from_rows.block_o, tiles = from.split.tiles_per_image * from.split.phase_rows;
    const double pixels = double(from.h) * double(from.w) * double(sp.channels / step.norm_groups);
    const int64_t group = sp.channels / step.norm_groups;
    float* const scale = floats(sp.scales);
    float* const bias = scale + p.n * (count + kPadding);
    double* const totals = reinterpret_cast<double*>(floats(sp.totals));
    double* const sums = totals + 2 * from_count;
    for (int64_t n = 0; n < p.n; n++) {
      std::fill(totals, totals + 2 * from_count, 0.0);
      const float* tile = floats(from.sums) + n * tiles * 2 * from_count;
      for (int64_t t = 0; t < tiles; t++, tile += 2 * from_count)
        for (int64_t r = 0; r < 2 * from_count; r++) totals[r] += tile[r];
      for (int64_t r = 0; r < from_count; r++)
        if (from_rows.row_channels[r] >= 0)
          for (int64_t k = 0; k < 2; k++) sums[k * sp.channels + from_rows.row_channels[r]] = totals[k * from_count + r];
      for (int64_t g = 0; g < step.norm_groups; g++) {
        double sum = 0, square = 0;
        for (int64_t c = g * group; c < (g + 1) * group; c++) sum += sums[c], square += sums[sp.channels + c];
        const double mean = sum / pixels, inverse = 1 / std::sqrt(std::max(square / pixels - mean * mean, 0.0) + step.norm_eps);
        for (int64_t c = g * group; c < (g + 1) * group; c++) {
          const double gain = step.norm_scale ? inverse * step.norm_scale[c] : inverse;
          scale[n * (count + kPadding) + c] = float(gain);
          bias[n * (count + kPadding) + c] = float((step.norm_bias ? step.norm_bias[c] : 0.0) - mean * gain);
        }
      }
      for (int64_t c = sp.channels; c < count; c++) scale[n * (count + kPadding) + c] = bias[n * (count + kPadding) + c] = 0;
    }
    e.scale = scale, e.bias = bias;
    e.scale_stride = e.bias_stride = count + kPadding;
  }
  e.activation = step.activation, e.slope = step.slope;
  e.post_activation = step.post_activation, e.post_slope = step.post_slope;
  if (step.has_residual) {
    residual = step.residual < 0 ? tensor_source(inputs[~step.residual])
                                 : slot_source(spec_.slots[step.residual], p.slots[step.residual], memory);
    if (step.residual < 0 && inputs[~step.residual].n == 1) residual.layout.image_stride = 0;
    residual.one_channel = residual.layout.channels == 1;
    e.residual = &residual;
    e.residual_upsample = step.residual_upsample;
  }
  if (step.stats) e.sums = floats(sp.sums);

  LaneLayout output_layout;
  e.store_count = int(step.stores.size());
  for (int s = 0; s < e.store_count; s++) {
    const StoreSpec& spec = step.stores[s];
    Store& store = e.stores[s];
    if (spec.slot < 0) {
      output_layout = nchw_layout(p.n, sp.channels, sp.h, sp.w);
      store.layout = &output_layout;
      store.data = reinterpret_cast<uint8_t*>(outputs[~spec.slot]);
    } else {
      store.layout = &p.slots[spec.slot].layout;
      store.data = memory + p.slots[spec.slot].offset;
      store.inv_scale = step.prescaled ? 1.0f : float(1.0 / spec_.slots[spec.slot].scale);
      store.zero = spec_.slots[spec.slot].zero;
    }
    store.channel = spec.channel;
    if (spec.scale) store.scale = rows.store_scale[s].data(), store.bias = rows.store_bias[s].data();
    store.activation = spec.activation, store.slope = spec.slope;
    if (spec.modulation >= 0) {
      const InputTensor& m = inputs[spec.modulation];
      float* const factor = floats(sp.factors[s]);
      for (int64_t n = 0; n < p.n; n++)
        for (int64_t r = 0; r < count; r++)
          factor[n * (count + kPadding) + r] =
              w.row_channels[r] < 0 ? 0.0f : m.data[n * m.stride_n + w.row_channels[r] * m.stride_c];
      store.factor = factor, store.factor_stride = count + kPadding;
    }
  }

  const int64_t tasks = sp.split.tasks();
  team->for_each(tasks, sp.split.dots < kSerialWork, [&](int64_t task) {
    for (const int64_t slot : sp.rings) {
      const LaneLayout& l = p.slots[slot].layout;
      const int32_t word = l.format == Format::kInt8 ? int32_t(uint32_t(spec_.slots[slot].zero) * 0x01010101u) : 0;
      fill_ring(l, word, memory + p.slots[slot].offset, task, tasks);
    }
    p.kernels->run_task(op, sp.split, task);
  });
}

}  // namespace sparsegan

// launch_gather_gemm against plain loops over the dense weight: linear layers, convolutions and transposed convolutions with
// every tile of tile.h, blocks dropped at random, split sums, all epilogues, and calls that must be refused. Inputs are small
// whole numbers, so that every order of summation gives the same sum and the comparison is for equality; only activations with an
// exp inside are compared with a tolerance.
#include <algorithm>

#include "checks.h"

namespace checks {
namespace {

struct Axis {
  int size, kernel = 1, stride = 1, padding = 0, dilation = 1, output_padding = 0;
};
struct Shape {
  const char* name;
  bool transposed;
  int batch, channels, out_channels;
  Axis h, w;
  bool small = false;  // also run under the sanitizers
};

int out_size(const Axis& a, bool transposed) {
  const int reach = a.dilation * (a.kernel - 1);
  return transposed ? (a.size - 1) * a.stride - 2 * a.padding + reach + a.output_padding + 1
                    : (a.size + 2 * a.padding - reach - 1) / a.stride + 1;
}

// Input coordinate that output coordinate `out` meets at kernel position `k`, or -1.
int in_coordinate(const Axis& a, bool transposed, int out, int k) {
  if (!transposed) {
    const int in = out * a.stride - a.padding + k * a.dilation;
    return in >= 0 && in < a.size ? in : -1;
  }
  const int in = out + a.padding - k * a.dilation;
  return in >= 0 && in % a.stride == 0 && in / a.stride < a.size ? in / a.stride : -1;
}

int floor_divide(int a, int b) { return a >= 0 ? a / b : -((-a + b - 1) / b); }

struct Block {
  Type type;
  bool two_four;
  int block_o, block_k;
};
const Block kBlocks[] = {
    {Type::kUint8, false, 16, 32},    {Type::kUint8, false, 32, 32},    {Type::kUint8, false, 64, 32},
    {Type::kFloat16, false, 16, 16},  {Type::kFloat16, false, 32, 32},  {Type::kFloat16, false, 64, 16},
    {Type::kBFloat16, false, 16, 16}, {Type::kBFloat16, false, 32, 32}, {Type::kBFloat16, false, 64, 16},
    {Type::kUint8, true, 32, 64},     {Type::kUint8, true, 64, 64},     {Type::kFloat16, true, 32, 32},
    {Type::kFloat16, true, 64, 32},   {Type::kBFloat16, true, 32, 32},  {Type::kBFloat16, true, 64, 32},
};

// Returns whether the sums were split.
bool check_one(const Shape& shape, const Block& o, int multiprocessors, double density, Random random) {
  const int kh = shape.h.kernel, kw = shape.w.kernel, taps = kh * kw, channels = shape.channels;
  const bool bytes = o.type == Type::kUint8;
  const size_t element = bytes_of(o.type);
  GatherGemm call;
  call.weight_type = o.type;
  call.block_o = o.block_o, call.block_k = o.block_k;
  call.batch = shape.batch, call.height = shape.h.size, call.width = shape.w.size;
  call.in_blocks = (channels + o.block_k - 1) / o.block_k;
  call.out_channels = shape.out_channels;
  call.rows = (shape.out_channels + o.block_o - 1) / o.block_o;
  call.taps = taps;
  call.out_height = out_size(shape.h, shape.transposed), call.out_width = out_size(shape.w, shape.transposed);

  // Taps in packed order, by phase; a convolution has one.
  std::vector<int> order;
  if (shape.transposed) {
    const int sh = shape.h.stride, sw = shape.w.stride;
    call.phase_count = sh * sw;
    call.out_step_h = sh, call.out_step_w = sw;
    for (int p = 0; p < sh * sw; p++) {
      Phase& phase = call.phases[p];
      phase.y0 = p / sw, phase.x0 = p % sw;
      phase.height = (int(call.out_height) - phase.y0 + sh - 1) / sh,
      phase.width = (int(call.out_width) - phase.x0 + sw - 1) / sw;
      phase.tap_begin = int(order.size());
      for (int t = 0; t < taps; t++) {
        const int y = phase.y0 + shape.h.padding - t / kw * shape.h.dilation,
                  x = phase.x0 + shape.w.padding - t % kw * shape.w.dilation;
        if (y - floor_divide(y, sh) * sh || x - floor_divide(x, sw) * sw) continue;
        call.dy[order.size()] = int16_t(floor_divide(y, sh)), call.dx[order.size()] = int16_t(floor_divide(x, sw));
        order.push_back(t);
      }
      phase.tap_end = int(order.size());
    }
  } else {
    call.phases[0] = {0, taps, 0, 0, int(call.out_height), int(call.out_width)};
    call.in_step_h = shape.h.stride, call.in_step_w = shape.w.stride;
    for (int t = 0; t < taps; t++) {
      call.dy[t] = int16_t(t / kw * shape.h.dilation - shape.h.padding),
      call.dx[t] = int16_t(t % kw * shape.w.dilation - shape.w.padding);
      order.push_back(t);
    }
  }

  // The weight, dense [out_channels][taps][channels] and packed.
  const int values_k = o.two_four ? o.block_k / 2 : o.block_k;
  const int slots = int(call.rows) * o.block_o;
  Memory row_channels(slots * 4);
  std::vector<int> channel_order(shape.out_channels);
  for (int i = 0; i < shape.out_channels; i++) channel_order[i] = i;
  if (random() % 2) std::shuffle(channel_order.begin(), channel_order.end(), random);
  for (int i = 0; i < slots; i++) row_channels.as<int32_t>()[i] = i < shape.out_channels ? channel_order[i] : -1;
  std::vector<float> dense(size_t(shape.out_channels) * taps * channels);
  std::vector<float> packed;
  std::vector<int> indices, cols, tap_ptr{0};
  const int most = bytes ? 127 : 8;
  for (int r = 0; r < call.rows; r++)
    for (int t = 0; t < taps; t++) {
      for (int b = 0; b < call.in_blocks; b++) {
        if (double(random() % 1000) >= density * 1000) continue;
        cols.push_back(t * int(call.in_blocks) + b);
        for (int i = 0; i < o.block_o; i++)
          for (int k = 0; k < o.block_k; k += o.two_four ? 4 : 1) {
            const int channel = row_channels.as<int32_t>()[r * o.block_o + i];
            const auto weight = [&](int c) {
              if (channel < 0 || c >= channels) return 0.0f;
              const float w = float(between(random, bytes ? -128 : -most, most));
              dense[(size_t(channel) * taps + order[t]) * channels + c] = w;
              return w;
            };
            if (!o.two_four) {
              packed.push_back(weight(b * o.block_k + k));
              continue;
            }
            const int first = between(random, 0, 2), second = between(random, first + 1, 3);
            for (const int index : {first, second}) {
              packed.push_back(weight(b * o.block_k + k + index));
              indices.push_back(index);
            }
          }
      }
      tap_ptr.push_back(int(cols.size()));
    }
  call.blocks = int64_t(cols.size());
  Memory values(packed.size() * element), cols_memory(cols.size() * 4), tap_ptr_memory(tap_ptr.size() * 4);
  for (size_t i = 0; i < packed.size(); i++)
    if (bytes)
      values.as<int8_t>()[i] = int8_t(packed[i]);
    else
      write(o.type, values.data(), int64_t(i), packed[i]);
  std::copy(cols.begin(), cols.end(), cols_memory.as<int32_t>());
  std::copy(tap_ptr.begin(), tap_ptr.end(), tap_ptr_memory.as<int32_t>());
  const int words = bytes ? 32 : 16, tiles = o.block_o / 16;
  Memory metadata(o.two_four ? size_t(call.blocks) * tiles * words * 4 : 4);
  if (o.two_four) {
    for (int64_t b = 0; b < call.blocks; b++)
      for (int tile = 0; tile < tiles; tile++)
        for (int w = 0; w < words; w++) {
          uint32_t word = 0;
          for (int i = 0; i < 16; i++) {
            const int row = bytes ? w / 4 + 8 * (w % 2) : w / 2 + 8 * (i / 8);
            const int value = bytes ? 16 * (w / 2 % 2) + i : 8 * (w % 2) + i % 8;
            word |= uint32_t(indices[((b * tiles + tile) * 16 + row) * values_k + value]) << 2 * i;
          }
          metadata.as<uint32_t>()[(b * tiles + tile) * words + w] = word;
        }
    call.metadata = metadata.as<uint32_t>();
  }
  call.values = values.data(), call.cols = cols_memory.as<int32_t>(), call.tap_ptr = tap_ptr_memory.as<int32_t>();
  call.row_channels = row_channels.as<int32_t>();

  // The input. Channels that the weight does not have hold anything finite.
  const int zero = bytes ? between(random, 1, 255) : 0;
  call.x_stride = call.in_blocks * o.block_k + (random() % 3 ? 0 : 64);
  const int64_t in_pixels = call.batch * call.height * call.width, out_pixels = call.batch * call.out_height * call.out_width;
  Memory x(in_pixels * call.x_stride * element), pad(o.block_k * element);
  for (int64_t i = 0; i < in_pixels * call.x_stride; i++)
    write(o.type, x.data(), i, float(bytes ? between(random, 0, 255) : between(random, -8, 8)));
  for (int i = 0; i < o.block_k; i++) write(o.type, pad.data(), i, float(zero));
  call.x = x.data(), call.pad = pad.data();

  // The epilogue. What a phase takes off is the zero point times the weights of its taps.
  Memory zero_sums(call.phase_count * shape.out_channels * 4), scale(shape.out_channels * 4), bias(shape.out_channels * 4);
  for (int p = 0; p < call.phase_count; p++)
    for (int c = 0; c < shape.out_channels; c++) {
      int sum = 0;
      for (int t = call.phases[p].tap_begin; t < call.phases[p].tap_end; t++)
        for (int k = 0; k < channels; k++) sum += int(dense[(size_t(c) * taps + order[t]) * channels + k]) * zero;
      zero_sums.as<int32_t>()[p * shape.out_channels + c] = sum;
    }
  for (int c = 0; c < shape.out_channels; c++) {
    scale.as<float>()[c] = float(between(random, 50, 200)) / (bytes ? 1e6f : 1e4f);
    bias.as<float>()[c] = float(between(random, -1000, 1000)) / 500.0f;
  }
  if (bytes) call.zero_sums = zero_sums.as<int32_t>();
  // The small cases always have all of it, exactly; the others what comes.
  if (shape.small || random() % 5) call.scale = scale.as<float>();
  if (shape.small || random() % 5) call.bias = bias.as<float>();
  call.act = Activation(random() % (shape.small ? 3 : sparsegan::kActivations));
  if (random() % 2) call.post_act = Activation(random() % (shape.small ? 3 : sparsegan::kActivations));
  call.slope = 0.2f, call.post_slope = 0.1f;
  call.residual_type = Type(random() % 4);
  call.residual_stride = shape.out_channels + between(random, 0, 1) * between(random, 0, 5);
  call.residual_scale = 0.03f, call.residual_zero = 99;
  Memory residual(out_pixels * call.residual_stride * bytes_of(call.residual_type));
  for (int64_t i = 0; i < out_pixels * call.residual_stride; i++)
    write(call.residual_type, residual.data(), i, float(between(random, 0, 255)) / (call.residual_type == Type::kUint8 ? 1 : 64));
  if (random() % 2) call.residual = residual.data();
  call.y_type = shape.small ? Type::kUint8 : Type(random() % 4);
  call.y_stride = (shape.out_channels + 15) / 16 * 16;
  if (random() % 4 == 0) call.y_stride = shape.out_channels + between(random, 0, 3);
  call.y_inverse_scale = 20.0f, call.y_zero = call.y_type == Type::kUint8 ? 60 : 0;

  // What the output should be.
  const auto exact = [](Activation a) { return a == Activation::kNone || a == Activation::kRelu || a == Activation::kLeakyRelu; };
  const bool equal = exact(call.act) && exact(call.post_act);
  std::vector<float> wanted(out_pixels * shape.out_channels);
  for (int64_t p = 0; p < out_pixels; p++) {
    const int n = int(p / (call.out_height * call.out_width)), oy = int(p / call.out_width % call.out_height),
              ox = int(p % call.out_width);
    for (int c = 0; c < shape.out_channels; c++) {
      int64_t sum = 0;
      for (int t = 0; t < taps; t++) {
        const int iy = in_coordinate(shape.h, shape.transposed, oy, t / kw),
                  ix = in_coordinate(shape.w, shape.transposed, ox, t % kw);
        if (iy < 0 || ix < 0) continue;
        const int64_t pixel = ((n * call.height + iy) * call.width + ix) * call.x_stride;
        const float* weights = &dense[(size_t(c) * taps + t) * channels];
        for (int k = 0; k < channels; k++)
          if (weights[k] != 0) sum += int64_t(weights[k]) * (int64_t(read(o.type, x.data(), pixel + k)) - zero);
      }
      float v = std::fma(float(sum), call.scale ? call.scale[c] : 1.0f, call.bias ? call.bias[c] : 0.0f);
      v = call.act == Activation::kLeakyRelu ? (v > 0 ? v : v * call.slope) : float(activated(call.act, v, call.slope));
      if (call.residual) {
        const float r = read(call.residual_type, residual.data(), p * call.residual_stride + c);
        v += call.residual_type == Type::kUint8 ? (r - float(call.residual_zero)) * call.residual_scale : r;
      }
      v = call.post_act == Activation::kLeakyRelu ? (v > 0 ? v : v * call.post_slope)
                                                  : float(activated(call.post_act, v, call.post_slope));
      wanted[p * shape.out_channels + c] = v;
    }
  }

  Memory y(out_pixels * call.y_stride * bytes_of(call.y_type));
  call.y = y.data();
  const int64_t workspace_bytes = gather_gemm_workspace(call, multiprocessors);
  Memory workspace(workspace_bytes, 0xFF);
  if (workspace_bytes) call.workspace = workspace.data(), call.workspace_bytes = workspace_bytes;

  under_several_orders(random(), [&] {
    std::memset(y.data(), 0xEE, y.size());
    std::memset(workspace.data(), 0xFF, workspace.size());
    expect_launched(launch_gather_gemm(call, multiprocessors, nullptr));
    y.check("y");
    workspace.check("the workspace");
    for (int64_t p = 0; p < out_pixels; p++)
      for (int64_t c = 0; c < call.y_stride; c++) {
        const float got = read(call.y_type, y.data(), p * call.y_stride + c);
        Memory rounded(4);
        float want = 0, allowed = 0;
        if (c < shape.out_channels) {
          const float v = wanted[p * shape.out_channels + c];
          write(call.y_type, rounded.data(), 0,
                call.y_type == Type::kUint8 ? float(quantized(v, call.y_inverse_scale, call.y_zero)) : v);
          want = read(call.y_type, rounded.data(), 0);
          const float steps[] = {1, 0x1p-10f * std::fabs(want), 0x1p-7f * std::fabs(want), 0};
          if (!equal) allowed = steps[int(call.y_type)] + (call.y_type == Type::kUint8 ? 0 : 2e-6f * (1 + std::fabs(want)));
        } else {
          want = read(call.y_type, rounded.data(), 0);  // untouched
        }
        if (!(std::fabs(got - want) <= allowed) && std::memcmp(&got, &want, 4))
          throw Wrong("pixel " + std::to_string(p) + ", channel " + std::to_string(c) + ": got " + std::to_string(got) +
                      ", wanted " + std::to_string(want) + (c < shape.out_channels ? "" : ", which should be left alone"));
      }
  });
  return workspace_bytes > 0;
}

// Covers: one pixel and one channel beyond a tile, several rows of pixels and of channels, padding on all sides, strides that
// leave pixels out, dilation, phases of different sizes and without any tap, small maps with many channels.
const Shape kShapes[] = {
    {"linear", false, 70, 96, 40, {1}, {1}},
    {"1x1", false, 2, 40, 64, {9}, {8}},
    {"3x3", false, 1, 40, 70, {8, 3, 1, 1}, {9, 3, 1, 1}, true},
    {"3x3, stride 2", false, 2, 33, 16, {9, 3, 2, 1}, {8, 3, 2, 1}},
    {"3x2, dilated", false, 1, 32, 20, {7, 3, 1, 2, 2}, {9, 2, 1, 0, 3}},
    {"transposed 4x4, stride 2", true, 1, 64, 24, {5, 4, 2, 1}, {4, 4, 2, 1}, true},
    {"transposed 2x3, stride 3x2", true, 2, 20, 7, {3, 2, 3, 0, 1, 1}, {4, 3, 2, 1, 1, 1}},
    {"small map", false, 1, 300, 24, {4, 3, 1, 1}, {4, 3, 1, 1}, true},
    {"larger than a tile", false, 1, 32, 80, {15, 1}, {18, 1}},
};

void check_refusals() {
  if (refuse_gather_gemm(Type::kUint8, 16, 32, false)) return;  // a library of fewer kernels
  Memory x(4096), y(4096), pad(64), values(4096), cols(64), tap_ptr(64), row_channels(64);
  std::memset(cols.data(), 0, cols.size());
  std::memset(tap_ptr.data(), 0, tap_ptr.size());
  GatherGemm good;
  good.x = x.data(), good.y = y.data(), good.pad = pad.data(), good.values = values.data();
  good.cols = cols.as<int32_t>(), good.tap_ptr = tap_ptr.as<int32_t>(), good.row_channels = row_channels.as<int32_t>();
  for (int i = 0; i < 16; i++) row_channels.as<int32_t>()[i] = i;
  good.block_o = 16, good.block_k = 32;
  good.batch = 1, good.height = 4, good.width = 4, good.x_stride = 32;
  good.rows = good.taps = good.in_blocks = good.blocks = 1, good.out_channels = 16;
  good.phases[0] = {0, 1, 0, 0, 4, 4};
  good.out_height = good.out_width = 4;
  good.y_type = Type::kUint8, good.y_stride = 16;
  const auto refused = [&](const char* words, const std::function<void(GatherGemm&)>& spoil) {
    GatherGemm call = good;
    spoil(call);
    expect_refused(launch_gather_gemm(call, 108, nullptr), words);
    for (size_t i = 0; i < y.size(); i++)
      if (y.data()[i] != 0xEE) throw Wrong(std::string("launched, then refused: ") + words);
  };
  refused("8x4 have no CUDA kernel", [](auto& c) { c.block_o = 8, c.block_k = 4; });
  refused("float32", [](auto& c) { c.weight_type = Type::kFloat32; });
  refused("multiples of 16 bytes", [](auto& c) { c.x = static_cast<const char*>(c.x) + 4; });
  refused("multiples of 16 bytes", [](auto& c) { c.x_stride = 40; });
  refused("narrower", [](auto& c) { c.x_stride = 16; });
  refused("narrower", [](auto& c) { c.y_stride = 15; });
  refused("pointer is missing", [](auto& c) { c.pad = nullptr; });
  refused("pointer is missing", [](auto& c) { c.y = nullptr; });
  refused("2^31", [](auto& c) { c.height = c.width = 1 << 15; });
  refused("128 positions", [](auto& c) { c.taps = 129; });
  refused("phases", [](auto& c) { c.phase_count = 17; });
  refused("leaves the output", [](auto& c) { c.phases[0].height = 5; });
  refused("negative", [](auto& c) { c.batch = -1; });
  expect_launched(launch_gather_gemm(good, 108, nullptr));  // the good one is good
  good.batch = 0, good.x = good.y = nullptr;
  expect_launched(launch_gather_gemm(good, 108, nullptr));  // nothing to do
}

}  // namespace

void check_gather_gemm(const Effort& effort, std::string& at) {
  int turn = 0;
  for (const Block& block : kBlocks) {
    const std::string blocks = std::string("blocks of ") + std::to_string(block.block_o) + "x" + std::to_string(block.block_k) +
                               " " + (block.two_four ? "2:4 " : "") + name_of(block.type);
    at = blocks;
    if (const char* reason = refuse_gather_gemm(block.type, block.block_o, block.block_k, block.two_four)) {
      // A library of fewer kernels is what the planted bugs are tried on.
      if (effort.small) continue;
      throw Wrong(std::string("refused: ") + reason);
    }
    bool split = false;
    for (const Shape& shape : kShapes)
      for (const int multiprocessors :
           {1, 108}) {  // few: large tiles, as if the map filled the GPU; many: small ones, and split sums
        turn++;
        const bool deep = !std::strcmp(shape.name, "small map");
        if (effort.small ? !shape.small || (deep && multiprocessors == 1) : turn % 3 && !shape.small) continue;
        const double densities[] = {1.0, 0.5, 0.5, 0.1};
        at = std::string(shape.name) + ", " + blocks + ", " + std::to_string(multiprocessors) + " multiprocessors";
        if (effort.wants(at))
          split |= check_one(shape, block, multiprocessors, deep ? 1.0 : densities[shape.small ? 1 : turn % 4], random_of(at));
      }
    at = blocks;
    if (effort.only.empty() && !split) throw Wrong("no call had its sums split");
  }
  at = "refusals";
  if (effort.wants(at)) check_refusals();
}

}  // namespace checks

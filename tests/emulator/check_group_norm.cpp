// launch_group_norm against float64: every pair of types, groups from single channels to all of them, means far from 0, tails,
// runs of pixels that are merged, the same bits under every order of execution, and calls that must be refused.
#include "checks.h"

namespace checks {
namespace {

struct Case {
  int64_t n, c, h, w, groups;
};

void check_one(const Case& size, Type x_type, Type y_type, Activation act, Random random) {
  GroupNorm call;
  call.x_type = x_type, call.y_type = y_type;
  call.batch = size.n, call.channels = size.c, call.height = size.h, call.width = size.w, call.groups = size.groups;
  const auto stride = [&](Type type) {
    const int64_t unit = 16 / int64_t(bytes_of(type));
    return (size.c + unit - 1) / unit * unit + (random() % 3 == 0 ? unit : 0);
  };
  call.x_stride = stride(x_type), call.y_stride = stride(y_type);
  call.x_scale = 0.037f, call.x_zero = 77;
  call.y_inverse_scale = 25.5f, call.y_zero = y_type == Type::kUint8 ? 100 : 0;
  call.eps = 1e-5f;
  call.act = act, call.slope = 0.2f;
  const int64_t pixels = size.h * size.w;
  Memory x(size.n * pixels * call.x_stride * bytes_of(x_type), 0xFF);  // tails: NaN
  Memory weight(size.c * 4), bias(size.c * 4);
  call.x = x.data();
  if (random() % 4) call.weight = weight.as<float>();
  if (random() % 4) call.bias = bias.as<float>();
  for (int64_t c = 0; c < size.c; c++) {
    weight.as<float>()[c] = float(between(random, -2000, 2000)) / 1000.0f;
    bias.as<float>()[c] = float(between(random, -2000, 2000)) / 1000.0f;
    // Of every four channels one hardly varies beside its mean.
    const float mean = random() % 4 ? float(between(random, -3, 3)) : 60.0f;
    for (int64_t p = 0; p < size.n * pixels; p++) {
      const float v = mean + float(between(random, -1000, 1000)) / 1000.0f;
      write(x_type, x.data(), p * call.x_stride + c, x_type == Type::kUint8 ? float(std::clamp(int(v * 2) + 120, 0, 255)) : v);
    }
  }

  const auto value = [&](int64_t n, int64_t p, int64_t c) {
    const double v = read(x_type, x.data(), (n * pixels + p) * call.x_stride + c);
    return x_type == Type::kUint8 ? (v - call.x_zero) * double(call.x_scale) : v;
  };
  const int64_t group_channels = size.c / size.groups;
  std::vector<double> mean(size.n * size.groups), deviation(size.n * size.groups);
  for (int64_t n = 0; n < size.n; n++)
    for (int64_t g = 0; g < size.groups; g++) {
      double sum = 0, squares = 0;
      for (int64_t c = g * group_channels; c < (g + 1) * group_channels; c++)
        for (int64_t p = 0; p < pixels; p++) sum += value(n, p, c);
      const double m = sum / double(group_channels * pixels);
      for (int64_t c = g * group_channels; c < (g + 1) * group_channels; c++)
        for (int64_t p = 0; p < pixels; p++) squares += (value(n, p, c) - m) * (value(n, p, c) - m);
      mean[n * size.groups + g] = m;
      deviation[n * size.groups + g] = std::sqrt(squares / double(group_channels * pixels) + double(call.eps));
    }

  Memory workspace(group_norm_workspace(call), 0xFF);
  call.workspace = workspace.data();
  call.workspace_bytes = int64_t(workspace.size());
  std::vector<unsigned char> first;
  under_several_orders(random(), [&] {
    Memory y(size.n * pixels * call.y_stride * bytes_of(y_type));
    call.y = y.data();
    std::memset(workspace.data(), 0xFF, workspace.size());
    expect_launched(launch_group_norm(call, nullptr));
    y.check("y");
    workspace.check("the workspace");
    const std::vector<unsigned char> bytes(y.data(), y.data() + y.size());
    if (first.empty()) first = bytes;
    if (bytes != first) throw Wrong("the result depends on the order of execution");
    for (int64_t n = 0; n < size.n; n++)
      for (int64_t p = 0; p < pixels; p++)
        for (int64_t c = 0; c < call.y_stride; c++) {
          const double got = read(y_type, y.data(), (n * pixels + p) * call.y_stride + c);
          double wanted = 0, allowed = 0;
          if (c >= size.c) {
            wanted = y_type == Type::kUint8 ? call.y_zero : 0;
          } else {
            const int64_t g = n * size.groups + c / group_channels;
            const double w = call.weight ? call.weight[c] : 1.0, b = call.bias ? call.bias[c] : 0.0;
            const double normal = (value(n, p, c) - mean[g]) / deviation[g];
            wanted = activated(act, normal * w + b, call.slope);
            // The mean is a float: its last bit counts for so many deviations.
            allowed = 6e-7 * (4 + std::fabs(normal) + std::fabs(mean[g]) / deviation[g]) * (std::fabs(w) + 1) + 1e-6;
            if (y_type == Type::kUint8) {
              wanted = std::clamp(wanted * double(call.y_inverse_scale) + call.y_zero, 0.0, 255.0);
              allowed = allowed * double(call.y_inverse_scale) + 0.5;
            } else if (y_type != Type::kFloat32) {
              allowed += std::fabs(wanted) * (y_type == Type::kFloat16 ? 0x1p-11 : 0x1p-8) + 1e-7;
            }
          }
          if (!(std::fabs(got - wanted) <= allowed))
            throw Wrong("image " + std::to_string(n) + ", pixel " + std::to_string(p) + ", channel " + std::to_string(c) +
                        ": got " + std::to_string(got) + ", wanted " + std::to_string(wanted) + " +- " + std::to_string(allowed));
        }
  });
}

void check_refusals() {
  Memory x(4096), y(4096), workspace(65536);
  GroupNorm good;
  good.x_type = Type::kFloat16, good.y_type = Type::kUint8;
  good.x = x.data(), good.y = y.data();
  good.batch = 1, good.channels = 16, good.height = 4, good.width = 4, good.groups = 4;
  good.x_stride = good.y_stride = 16;
  good.workspace = workspace.data(), good.workspace_bytes = group_norm_workspace(good);
  const auto refused = [&](const char* words, const std::function<void(GroupNorm&)>& spoil) {
    GroupNorm call = good;
    spoil(call);
    expect_refused(launch_group_norm(call, nullptr), words);
    for (size_t i = 0; i < y.size(); i++)
      if (y.data()[i] != 0xEE) throw Wrong(std::string("launched, then refused: ") + words);
  };
  refused("must be positive", [](auto& c) { c.width = 0; });
  refused("65535 images", [](auto& c) { c.batch = 65536; });
  refused("divide the channels", [](auto& c) { c.groups = 3; });
  refused("divide the channels", [](auto& c) { c.groups = 0; });
  refused("x_stride", [](auto& c) { c.x_stride = 20; });
  refused("x_stride", [](auto& c) { c.x_stride = 8; });
  refused("y_stride", [](auto& c) { c.y_stride = 24; });
  refused("2^31", [](auto& c) { c.height = c.width = 1 << 14; });
  refused("2^31", [](auto& c) { c.height = c.width = int64_t(1) << 40; });
  refused("not be null", [](auto& c) { c.x = nullptr; });
  refused("not be null", [](auto& c) { c.y = nullptr; });
  refused("16-byte aligned", [](auto& c) { c.x = static_cast<const char*>(c.x) + 2; });
  refused("16-byte aligned", [](auto& c) { c.y = static_cast<char*>(c.y) + 4; });
  refused("eps", [](auto& c) { c.eps = -1; });
  refused("eps", [](auto& c) { c.eps = NAN; });
  refused("zero point", [](auto& c) { c.y_zero = -1; });
  refused("group_norm_workspace", [](auto& c) { c.workspace = nullptr; });
  refused("group_norm_workspace", [](auto& c) { c.workspace_bytes--; });
  refused("workspace must be 16-byte", [](auto& c) { c.workspace = static_cast<char*>(c.workspace) + 8; });
  good.batch = 0;
  expect_launched(launch_group_norm(good, nullptr));  // nothing to do
}

}  // namespace

void check_group_norm(const Effort& effort, std::string& at) {
  // Groups of one channel, of a few, of more than a block merges at a time; channels that fill no vector; several runs of pixels.
  const Case all[] = {{1, 16, 4, 4, 4},   {2, 24, 5, 7, 24},   {1, 40, 9, 3, 1},  {2, 96, 3, 3, 2},
                      {1, 33, 6, 6, 11},  {3, 8, 1, 1, 8},     {1, 130, 4, 4, 2}, {1, 3, 20, 19, 3},
                      {1, 64, 24, 24, 8}, {1, 200, 2, 2, 100}, {1, 6, 36, 33, 2}};
  const Case few[] = {{2, 24, 5, 7, 24}, {1, 40, 16, 17, 1}, {1, 130, 2, 3, 13}};
  int turn = 0;
  for (const Case& size :
       effort.small ? std::vector<Case>(std::begin(few), std::end(few)) : std::vector<Case>(std::begin(all), std::end(all)))
    for (int x_type = 0; x_type < 4; x_type++)
      for (int y_type = 0; y_type < 4; y_type++) {
        const auto act = Activation(turn++ % sparsegan::kActivations);
        if (effort.small && turn % 3) continue;
        at = "[" + std::to_string(size.n) + ", " + std::to_string(size.c) + ", " + std::to_string(size.h) + ", " +
             std::to_string(size.w) + "] in " + std::to_string(size.groups) + " groups, " + name_of(Type(x_type)) + " to " +
             name_of(Type(y_type)) + ", activation " + std::to_string(int(act));
        if (effort.wants(at)) check_one(size, Type(x_type), Type(y_type), act, random_of(at));
      }
  at = "refusals";
  if (effort.wants(at)) check_refusals();
}

}  // namespace checks

// launch_quantize against a plain loop: every type, layouts of x that reach each way of reading, odd sizes, values that are hard
// to round, tails, and calls that must be refused.
#include "checks.h"

namespace checks {
namespace {

struct Layout {
  const char* name;
  // Strides of [batch, channel, row, column] for sizes n, c, h, w.
  std::function<void(int64_t n, int64_t c, int64_t h, int64_t w, int64_t (&strides)[4])> strides;
  int offset;  // elements before the first
};

const Layout kLayouts[] = {
    {"nchw", [](auto, auto c, auto h, auto w, auto& s) { s[0] = c * h * w, s[1] = h * w, s[2] = w, s[3] = 1; }, 0},
    {"nhwc", [](auto, auto c, auto h, auto w, auto& s) { s[0] = c * h * w, s[1] = 1, s[2] = w * c, s[3] = c; }, 0},
    {"nchw, off by one", [](auto, auto c, auto h, auto w, auto& s) { s[0] = c * h * w, s[1] = h * w, s[2] = w, s[3] = 1; }, 1},
    {"nhwc, off by one", [](auto, auto c, auto h, auto w, auto& s) { s[0] = c * h * w, s[1] = 1, s[2] = w * c, s[3] = c; }, 1},
    {"rows apart",
     [](auto, auto c, auto h, auto w, auto& s) { s[0] = c * h * (w + 4), s[1] = h * (w + 4), s[2] = w + 4, s[3] = 1; }, 0},
    {"pixels apart",
     [](auto, auto c, auto h, auto w, auto& s) { s[0] = (c + 8) * h * w, s[1] = 1, s[2] = w * (c + 8), s[3] = c + 8; }, 4},
    {"turned", [](auto, auto c, auto h, auto w, auto& s) { s[0] = c * h * w, s[1] = h * w, s[2] = 1, s[3] = h; }, 0},
    {"every other", [](auto, auto c, auto h, auto w, auto& s) { s[0] = c * h * w * 2, s[1] = h * w * 2, s[2] = w * 2, s[3] = 2; },
     0},
    {"one image for all", [](auto, auto, auto h, auto w, auto& s) { s[0] = 0, s[1] = h * w, s[2] = w, s[3] = 1; }, 0},
};
struct Size {
  int64_t n, c, h, w;
};

void check_one(const Size& size, const Layout& layout, Type x_type, Type y_type, Random random) {
  Quantize call;
  call.x_type = x_type;
  call.y_type = y_type;
  call.batch = size.n, call.channels = size.c, call.height = size.h, call.width = size.w;
  layout.strides(size.n, size.c, size.h, size.w, call.x_strides);
  const int64_t* s = call.x_strides;
  const int64_t last = (size.n - 1) * s[0] + (size.c - 1) * s[1] + (size.h - 1) * s[2] + (size.w - 1) * s[3];
  Memory x_memory((layout.offset + last + 1) * bytes_of(x_type));
  call.x = x_memory.data() + layout.offset * bytes_of(x_type);
  const int64_t unit = 16 / int64_t(bytes_of(y_type));
  call.y_stride = (size.c + unit - 1) / unit * unit + (random() % 3 == 0 ? unit : 0);
  call.zero = y_type == Type::kUint8 ? between(random, 0, 255) : 0;
  call.inverse_scale = random() % 2 ? 8.0f : 37.03f;

  for (int64_t i = 0; i <= last; i++) {
    const int kind = between(random, 0, 40);
    float v = float(between(random, -40000, 40000)) / 1000.0f;
    if (kind < 4) v = (between(random, -300, 300) + 0.5f) / 8.0f;  // a tie when the scale is 1/8
    if (kind == 5) v = INFINITY;
    if (kind == 6) v = -INFINITY;
    if (kind == 7) v = NAN;
    if (kind == 8) v = 3e38f;
    if (kind == 9) v = -3e38f;
    if (kind == 10) v = -0.0f;
    if (kind == 11) v = 1e-6f;
    write(x_type, const_cast<void*>(call.x), i, v);
  }
  const int64_t pixels = size.n * size.h * size.w;
  under_several_orders(random(), [&] {
    Memory y(pixels * call.y_stride * bytes_of(y_type));
    call.y = y.data();
    expect_launched(launch_quantize(call, nullptr));
    y.check("y");
    for (int64_t p = 0; p < pixels; p++)
      for (int64_t c = 0; c < call.y_stride; c++) {
        const int64_t n = p / (size.h * size.w), h = p / size.w % size.h, w = p % size.w;
        const float v = c < size.c ? read(x_type, call.x, n * s[0] + c * s[1] + h * s[2] + w * s[3]) : 0.0f;
        const float got = read(y_type, y.data(), p * call.y_stride + c);
        Memory rounded(4);
        write(y_type, rounded.data(), 0, y_type == Type::kUint8 ? float(quantized(v, call.inverse_scale, call.zero)) : v);
        const float wanted = read(y_type, rounded.data(), 0);
        if (!(got == wanted || (std::isnan(got) && std::isnan(wanted))))
          throw Wrong("pixel " + std::to_string(p) + ", channel " + std::to_string(c) + ": got " + std::to_string(got) +
                      ", wanted " + std::to_string(wanted) + " for " + std::to_string(v));
      }
  });
}

void check_refusals() {
  Memory x(4096), y(4096);
  Quantize good;
  good.x = x.data(), good.y = y.data();
  good.batch = 1, good.channels = 8, good.height = 4, good.width = 4;
  good.x_strides[0] = 128, good.x_strides[1] = 16, good.x_strides[2] = 4, good.x_strides[3] = 1;
  good.y_stride = 16;
  good.inverse_scale = 1;
  const auto refused = [&](const char* words, const std::function<void(Quantize&)>& spoil) {
    Quantize call = good;
    spoil(call);
    expect_refused(launch_quantize(call, nullptr), words);
    for (size_t i = 0; i < y.size(); i++)
      if (y.data()[i] != 0xEE) throw Wrong(std::string("launched, then refused: ") + words);
  };
  refused("float32, float16 or bfloat16", [](auto& c) { c.x_type = Type::kUint8; });
  refused("uint8, float16 or bfloat16", [](auto& c) { c.y_type = Type::kFloat32; });
  refused("must be positive", [](auto& c) { c.channels = 0; });
  refused("must be positive", [](auto& c) { c.batch = -1; });
  refused("not be null", [](auto& c) { c.x = nullptr; });
  refused("not be null", [](auto& c) { c.y = nullptr; });
  refused("multiple of 16 bytes", [](auto& c) { c.y_stride = 24; });
  refused("hold the channels", [](auto& c) { c.channels = 17; });
  refused("16-byte aligned", [](auto& c) { c.y = static_cast<char*>(c.y) + 8; });
  refused("aligned to its elements", [](auto& c) { c.x = static_cast<const char*>(c.x) + 2; });
  refused("not be negative", [](auto& c) { c.x_strides[3] = -1; });
  refused("zero point", [](auto& c) { c.zero = 256; });
  refused("2^31", [](auto& c) { c.batch = 1 << 12, c.height = 1 << 10, c.width = 1 << 10; });
  refused("2^31", [](auto& c) { c.height = int64_t(1) << 40, c.width = int64_t(1) << 40; });
  refused("2^31", [](auto& c) { c.height = 1 << 14, c.width = 1 << 13; });  // y only: 2^27 pixels of 16 channels
  good.batch = 0, good.x = good.y = nullptr;
  expect_launched(launch_quantize(good, nullptr));  // nothing to do
}

}  // namespace

void check_quantize(const Effort& effort, std::string& at) {
  const Size all[] = {{1, 3, 8, 8},  {2, 5, 7, 9}, {1, 64, 12, 8}, {2, 130, 4, 4},
                      {3, 40, 1, 1}, {1, 1, 5, 4}, {70, 16, 1, 1}, {1, 33, 16, 20}};
  const Size few[] = {{1, 3, 8, 8}, {2, 5, 7, 9}, {1, 40, 4, 4}};
  int turn = 0;
  for (const Size& size :
       effort.small ? std::vector<Size>(std::begin(few), std::end(few)) : std::vector<Size>(std::begin(all), std::end(all)))
    for (const Layout& layout : kLayouts)
      for (const Type x_type : {Type::kFloat32, Type::kFloat16, Type::kBFloat16})
        for (const Type y_type : {Type::kUint8, Type::kFloat16, Type::kBFloat16}) {
          if (effort.small && turn++ % 5) continue;
          at = std::string(layout.name) + " [" + std::to_string(size.n) + ", " + std::to_string(size.c) + ", " +
               std::to_string(size.h) + ", " + std::to_string(size.w) + "] " + name_of(x_type) + " to " + name_of(y_type);
          if (effort.wants(at)) check_one(size, layout, x_type, y_type, random_of(at));
        }
  at = "refusals";
  if (effort.wants(at)) check_refusals();
}

}  // namespace checks

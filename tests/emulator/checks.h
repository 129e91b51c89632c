// What the checks of the emulated kernels share: memory with guards, random numbers, number formats written apart from the
// kernels' own, and the runs of one call under several orders of execution.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "emu.h"
#include "launch.h"

namespace checks {

using sparsegan::Activation;
using namespace sparsegan::cuda;

// A wrong result; the text says which and where.
struct Wrong : std::runtime_error {
  using std::runtime_error::runtime_error;
};

using Random = std::mt19937_64;
// Each case has numbers of its own, whichever others run.
inline Random random_of(const std::string& text) {
  uint64_t hash = 14695981039346656037u;
  for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 1099511628211u;
  return Random(hash);
}
inline int between(Random& random, int lo, int hi) { return lo + int(random() % uint64_t(hi - lo + 1)); }

inline const char* name_of(Type type) {
  const char* names[] = {"u8", "f16", "bf16", "f32"};
  return names[int(type)];
}
inline size_t bytes_of(Type type) { return type == Type::kUint8 ? 1 : type == Type::kFloat32 ? 4 : 2; }

// "Device" memory: 256-byte aligned as cudaMalloc gives it, of exactly the wanted size, so that the address sanitizer sees a byte
// too many; without it, guards at both ends are looked at by check().
class Memory {
 public:
  explicit Memory(size_t bytes, unsigned char fill = 0xEE)
      : bytes_(bytes), storage_(::operator new[](bytes + 2 * kGuard, kAlign)) {
    std::memset(storage_, kByte, bytes + 2 * kGuard);
    std::memset(data(), fill, bytes);
    emu::poison(storage_, kGuard);
    emu::poison(data() + bytes, kGuard);
  }
  ~Memory() {
    emu::unpoison(storage_, bytes_ + 2 * kGuard);
    ::operator delete[](storage_, kAlign);
  }
  Memory(const Memory&) = delete;
  unsigned char* data() { return static_cast<unsigned char*>(storage_) + kGuard; }
  size_t size() const { return bytes_; }
  template <class T>
  T* as() {
    return reinterpret_cast<T*>(data());
  }
  void check(const char* what) {
    emu::unpoison(storage_, bytes_ + 2 * kGuard);
    for (size_t i = 0; i < kGuard; i++)
      if (data()[-1 - long(i)] != kByte || data()[bytes_ + i] != kByte) throw Wrong(std::string("written outside of ") + what);
    emu::poison(storage_, kGuard);
    emu::poison(data() + bytes_, kGuard);
  }

 private:
  static constexpr size_t kGuard = 256;
  static constexpr unsigned char kByte = 0x5A;
  static constexpr std::align_val_t kAlign{256};
  size_t bytes_;
  void* storage_;
};

// ---- number formats, not those of the kernels ----

inline uint16_t to_half(float f) {
  const _Float16 h = _Float16(f);
  uint16_t bits;
  std::memcpy(&bits, &h, 2);
  return bits;
}
inline float of_half(uint16_t bits) {
  _Float16 h;
  std::memcpy(&h, &bits, 2);
  return float(h);
}
inline float of_bfloat(uint16_t bits) {
  const uint32_t word = uint32_t(bits) << 16;
  float f;
  std::memcpy(&f, &word, 4);
  return f;
}
// The nearer of the two neighbours, the even one of two equally near.
inline uint16_t to_bfloat(float f) {
  uint32_t word;
  std::memcpy(&word, &f, 4);
  const uint16_t below = uint16_t(word >> 16);
  if (!std::isfinite(f)) return std::isnan(f) ? 0x7FFF : below;
  const uint16_t above = uint16_t(below + 1);
  const double at_below = std::fabs(double(f) - of_bfloat(below));
  const double at_above =
      std::fabs((std::isfinite(of_bfloat(above)) ? double(of_bfloat(above)) : std::copysign(0x1p128, f)) - double(f));
  return at_below < at_above || (at_below == at_above && below % 2 == 0) ? below : above;
}
inline float read(Type type, const void* p, int64_t i) {
  switch (type) {
    case Type::kUint8:
      return static_cast<const uint8_t*>(p)[i];
    case Type::kFloat16:
      return of_half(static_cast<const uint16_t*>(p)[i]);
    case Type::kBFloat16:
      return of_bfloat(static_cast<const uint16_t*>(p)[i]);
    default:
      return static_cast<const float*>(p)[i];
  }
}
inline void write(Type type, void* p, int64_t i, float v) {
  switch (type) {
    case Type::kUint8:
      static_cast<uint8_t*>(p)[i] = uint8_t(v);
      break;
    case Type::kFloat16:
      static_cast<uint16_t*>(p)[i] = to_half(v);
      break;
    case Type::kBFloat16:
      static_cast<uint16_t*>(p)[i] = to_bfloat(v);
      break;
    default:
      static_cast<float*>(p)[i] = v;
  }
}
// The u8 of v * inverse_scale, as the CPU rounds it.
inline int quantized(float v, float inverse_scale, int zero) {
  const float steps = v * inverse_scale;
  if (std::isnan(steps)) return 0;
  return int(std::min(255.0, std::max(0.0, std::nearbyint(std::min(2000.0, std::max(-2000.0, double(steps)))) + zero)));
}
inline double activated(Activation activation, double v, double slope) {
  switch (activation) {
    case Activation::kNone:
      return v;
    case Activation::kRelu:
      return v > 0 ? v : 0;
    case Activation::kLeakyRelu:
      return v > 0 ? v : v * slope;
    case Activation::kTanh:
      return std::tanh(v);
    case Activation::kSigmoid:
      return 1 / (1 + std::exp(-v));
    case Activation::kSilu:
      return v / (1 + std::exp(-v));
    case Activation::kGelu:
      return 0.5 * v * std::erfc(-v / std::sqrt(2.0));
  }
  return v;
}

// ---- running ----

// How much is tried: `small` is for the sanitizers, which take many times as long; `only` names some cases by a part of their
// text.
struct Effort {
  bool small = false;
  std::string only;
  bool wants(const std::string& at) const { return at.find(only) != std::string::npos; }
};

// Runs a call under orders of execution that differ; `run` launches and compares.
inline void under_several_orders(uint64_t seed, const std::function<void()>& run) {
  for (int i = 0; i < 2; i++) {
    emu::options.seed = seed * 2 + uint64_t(i);
    emu::options.interleave = i;
    emu::options.eager_copies = (seed + uint64_t(i)) % 2;
    run();
  }
}

inline void expect_launched(const char* answer) {
  if (answer) throw Wrong(std::string("refused: ") + answer);
}
// A call must be refused with a text that has `words`.
inline void expect_refused(const char* answer, const char* words) {
  if (!answer) throw Wrong(std::string("accepted what should be refused with '") + words + "'");
  if (!std::strstr(answer, words)) throw Wrong(std::string("refused with '") + answer + "', wanted '" + words + "'");
}

// Each throws Wrong, or emu::Error for a fault of a kernel; `at` says which case is running.
void check_quantize(const Effort& effort, std::string& at);
void check_group_norm(const Effort& effort, std::string& at);
void check_gather_gemm(const Effort& effort, std::string& at);

}  // namespace checks

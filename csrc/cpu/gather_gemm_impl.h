// The kernels of gather_gemm.h over the vector type of simd.h. Included by one file an instruction set, which defines
// SPARSEGAN_ISA (the name) and SPARSEGAN_KERNELS (the function that gives out the table).
#pragma once
#include <algorithm>
#include <chrono>
#include <cstring>
#include <map>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "gather_gemm.h"
#include "memory.h"
#include "simd.h"

namespace sparsegan {
namespace {

using S = Simd;
constexpr int kMaxR = 8;
constexpr int kMaxV = S::kMaxV4 > S::kMaxV8 ? S::kMaxV4 : S::kMaxV8;
constexpr int kPreparedV = 4, kPreparedRows = 32;  // vectors and channels that the matrix unit takes at once
constexpr int kMostTiles = 8;                      // of a task
constexpr int64_t kDotsPerTask = 16000;            // of a vector, at least, where there are enough tasks
constexpr int kGroupChannels = 128;                // output channels of a task, see make_split
constexpr int kTileWords = 32 * S::kLanes;         // the largest R * V tile
static_assert(8 * S::kMaxV8 <= 32 && 4 * S::kMaxV4 <= 32, "a tile must fit kTileWords");

// ---- the three number formats: what a lane holds and how it is multiplied ----------------------------------------------------

struct Int8 {
  using Acc = S::I;
  using X = S::X8;
  static X load_x(const uint8_t* p) { return S::split_x(S::load(p)); }
  static S::W8 load_w(const uint8_t* p) { return S::split_w(S::broadcast(p)); }
  static void dot(Acc& acc, const X& x, const S::W8& w) { S::dot8(acc, x, w); }
  static void hide(X& x) { S::hide(x); }
  static Acc start(int32_t v) { return S::set1(v); }
  static S::I bits(Acc acc) { return acc; }
  static S::F value(S::I bits) { return S::to_float(bits); }
  static constexpr Format kFormat = Format::kInt8;
};

struct BFloat16 {
  struct Pair {
    S::F lo, hi;
  };
  using Acc = S::F;
  using X = Pair;
  static Pair split(S::I v) { return {S::as_f(S::shift_left<16>(v)), S::as_f(S::bit_and(v, S::set1(int32_t(0xFFFF0000))))}; }
  static X load_x(const uint8_t* p) { return split(S::load(p)); }
  static Pair load_w(const uint8_t* p) { return split(S::broadcast(p)); }
  static void dot(Acc& acc, const X& x, const Pair& w) {
    S::fma(acc, x.lo, w.lo);
    S::fma(acc, x.hi, w.hi);
  }
  static void hide(X& x) { S::hide(x.lo), S::hide(x.hi); }
  static Acc start(int32_t) { return S::set1(0.0f); }
  static S::I bits(Acc acc) { return S::as_i(acc); }
  static S::F value(S::I bits) { return S::as_f(bits); }
  static constexpr Format kFormat = Format::kBFloat16;
};

struct Float32 {
  using Acc = S::F;
  using X = S::F;
  static X load_x(const uint8_t* p) { return S::as_f(S::load(p)); }
  static S::F load_w(const uint8_t* p) { return S::as_f(S::broadcast(p)); }
  static void dot(Acc& acc, const X& x, const S::F& w) { S::fma(acc, x, w); }
  static void hide(X& x) { S::hide(x); }
  static Acc start(int32_t) { return S::set1(0.0f); }
  static S::I bits(Acc acc) { return S::as_i(acc); }
  static S::F value(S::I bits) { return S::as_f(bits); }
  static constexpr Format kFormat = Format::kFloat32;
};

// ---- the tile: R output channels x V vectors ---------------------------------------------------------------------------------

struct TileInput {
  const uint8_t* x[kMaxV] = {};  // first byte of each vector at raster pixel (p, q), before the block's offset
  const int32_t* offsets;        // [taps * input blocks]
  const int32_t* cols;           // of this row's blocks
  const uint8_t* values;
  int64_t blocks;
  int64_t plane_bytes;   // from one lane plane of a block to the next
  const int32_t* start;  // [R] or nullptr for zeros
};

// Sets of accumulators that blocks use by turns: a dot product takes 5 cycles and two can start in each, so fewer than 10
// accumulators would wait for each other. (Without the long registers there is no room, and no such latency either.)
constexpr int accumulator_sets(int r, int v) { return S::kLanes < 16 || r * v > 8 ? 1 : r * v > 4 ? 2 : 4; }

// finish(acc) takes the sums, T::Acc [R][V].
template <class T, int R, int V, class Finish>
[[gnu::always_inline]] inline void compute_tile(const TileInput& in, const Finish& finish) {
  constexpr int kSteps = block_planes(T::kFormat);
  constexpr int kRowBytes = kBlockK * element_bytes(T::kFormat);
  constexpr int kSets = accumulator_sets(R, V);
  typename T::Acc acc[kSets][R][V];
#pragma GCC unroll 8
  for (int s = 0; s < kSets; s++)
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) acc[s][r][v] = T::start(s == 0 && in.start ? in.start[r] : 0);
  const uint8_t* x[V];
#pragma GCC unroll 8
  for (int v = 0; v < V; v++) x[v] = in.x[v];

  auto add_block = [&](typename T::Acc(&sums)[R][V], int32_t col, const uint8_t* w) __attribute__((always_inline)) {
    int64_t offset = in.offsets[col];
#pragma GCC unroll 4
    for (int step = 0; step < kSteps; step++, offset += in.plane_bytes) {
      typename T::X xs[V];  // [4 / kSteps channels] x [lanes]
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) xs[v] = T::load_x(x[v] + offset);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) {
        const auto ws = T::load_w(w + r * kRowBytes + step * 4);
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) T::dot(sums[r][v], xs[v], ws);
      }
    }
  };
  const uint8_t* w = in.values;
  const int32_t *col = in.cols, *const end = in.cols + in.blocks;
  for (; col + kSets <= end; col += kSets, w += kSets * R * kRowBytes)
#pragma GCC unroll 8
    for (int s = 0; s < kSets; s++) add_block(acc[s], col[s], w + s * R * kRowBytes);
  if constexpr (kSets > 1)
    for (; col != end; col++, w += R * kRowBytes) add_block(acc[0], *col, w);

  if constexpr (kSets > 1)
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int v = 0; v < V; v++)
#pragma GCC unroll 8
        for (int s = 1; s < kSets; s++) acc[0][r][v] = S::add(acc[0][r][v], acc[s][r][v]);
  finish(acc[0]);
}

// run of the size of the tiles: with std::integral_constant R, V.
template <class Run>
void with_size(int64_t block_o, int vectors, const Run& run) {
  auto with = [&]<int R, int V>() { run(std::integral_constant<int, R>(), std::integral_constant<int, V>()); };
  if (block_o == 8) {
    if (vectors == 1) return with.template operator()<8, 1>();
    if constexpr (S::kMaxV8 >= 2)
      if (vectors == 2) return with.template operator()<8, 2>();
    if constexpr (S::kMaxV8 >= 3)
      if (vectors == 3) return with.template operator()<8, 3>();
  } else {
    if (vectors == 1) return with.template operator()<4, 1>();
    if constexpr (S::kMaxV4 >= 2)
      if (vectors == 2) return with.template operator()<4, 2>();
    if constexpr (S::kMaxV4 >= 3)
      if (vectors == 3) return with.template operator()<4, 3>();
    if constexpr (S::kMaxV4 >= 4)
      if (vectors == 4) return with.template operator()<4, 4>();
  }
}

// The bits of the sums, [R][V][lanes].
template <class T, int R, int V>
[[gnu::noinline]] void keep_sums(const TileInput& in, int32_t* to) {
  compute_tile<T, R, V>(in, [to](const typename T::Acc(&acc)[R][V]) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) S::store(to + (r * V + v) * S::kLanes, T::bits(acc[r][v]));
  });
}

// ---- one output pixel of an image of one pixel, int8: lanes are output channels -----------------------------------------------

// Blocks follow each other as R weight words of 4 channels, so a vector of weights holds kLanes / R blocks, each of which wants
// its own word of x in all its lanes. The words lie side by side, from that of column `first` on. sums: [R] int32.
template <int R>
[[gnu::always_inline]] inline void compute_pixel(const TileInput& in, int64_t first, int32_t* sums) {
  constexpr int kBlocks = S::kLanes / R;
  constexpr int64_t kPrefetch = 1024;  // bytes; the weights come from the second cache faster than it guesses
  const int32_t *col = in.cols, *const end = in.cols + in.blocks;
  const uint8_t* w = in.values;
  auto x = [&](int64_t i) { return S::broadcast(in.x[0] + 4 * (col[i] - first)); };
  auto add_blocks = [&](S::I& acc) __attribute__((always_inline)) {
    S::I xs = x(0);
    if constexpr (kBlocks == 2) xs = S::join<R>(xs, x(1));
    if constexpr (kBlocks == 4) xs = S::join<2 * R>(S::join<R>(xs, x(1)), S::join<3 * R>(x(2), x(3)));
    S::dot8(acc, S::split_x(xs), S::split_w(S::load(w)));
    __builtin_prefetch(w + kPrefetch);
    col += kBlocks, w += S::kLanes * 4;
  };
  // by turns, since a dot product takes longer than the loads of the next
  S::I acc[2] = {in.start ? S::as_i(S::load_partial(in.start, R)) : S::set1(0), S::set1(0)};
  while (col + 2 * kBlocks <= end) add_blocks(acc[0]), add_blocks(acc[1]);
  if (col + kBlocks <= end) add_blocks(acc[0]);
  for (; col < end; col++, w += R * 4)  // fewer than fill a vector
    S::dot8(acc[1], S::split_x(x(0)), S::split_w(S::as_i(S::load_partial(w, R))));
  S::fold<R>(S::add(acc[0], acc[1]), sums);
}

// ---- reading a stored tensor pixel by pixel ----------------------------------------------------------------------------------

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// a / b and what is left over, of numbers not below 0. Where `a` is the less or `b` is 1, as is often so, without a division: a
// few of those for each tile take longer than a tile with few blocks.
struct Quotient {
  int64_t whole, rest;
};
Quotient divide(int64_t a, int64_t b) {
  if (a < b) return {0, a};
  if (b == 1) return {a, 0};
  return {a / b, a % b};
}

// The low bytes of a u8 source's lanes.
S::F dequantized(const Source& source, S::I q) {
  return S::mul(S::to_float(S::add(S::bit_and(q, S::set1(255)), S::set1(-source.zero))), S::set1(source.scale));
}

// `count` values of one channel, at every x_step-th pixel of an image row from (y, x) on.
void load_run(const Source& s, int64_t channel, int64_t n, int64_t y, int64_t x, int64_t x_step, int64_t count, float* to) {
  const LaneLayout& l = s.layout;
  const int per_lane = lane_channels(l.format);
  if (s.one_channel) channel = 0;
  // a word that starts at the channel's bytes holds them in its low end
  const uint8_t* const plane = s.data + 4 * (channel / per_lane * l.plane_stride) + 4 / per_lane * (channel % per_lane);
  auto decode = [&](S::I word) {
    if (l.format == Format::kInt8) return dequantized(s, word);
    return S::as_f(l.format == Format::kBFloat16 ? S::shift_left<16>(word) : word);
  };
  const bool tensor = s.col_stride != 1;
  if (!tensor && l.phases_w == 1 && x_step == 1) {
    const uint8_t* from = plane + 4 * l.at(n, y, x);
    int64_t j = 0;
    for (; j + S::kLanes <= count; j += S::kLanes) S::store(to + j, S::as_i(decode(S::load(from + 4 * j))));
    if (j < count) {
      // the last word of a slot may be read past its end, that of a tensor has no bytes behind it
      const S::I words = S::as_i(S::load_partial(from + 4 * j, int(count - j)));
      S::store_partial(to + j, S::as_i(decode(words)), int(count - j));
    }
    return;
  }
  alignas(64) float word[S::kLanes] = {};
  for (int64_t j = 0; j < count; j++) {
    const int64_t column = x + j * x_step;
    const int64_t lane = tensor ? n * l.image_stride + y * l.row_stride + column * s.col_stride : l.at(n, y, column);
    std::memcpy(word, plane + 4 * lane, 4);
    S::store_partial(to + j, S::as_i(decode(S::as_i(S::load_f(word)))), 1);
  }
}

constexpr int kRunWords = kMaxV * S::kLanes;  // the longest run of a tile in one output phase

// The same from an image that is read `upsample` times as large in both directions, pixels repeated.
void load_upsampled(const Source& s, int64_t channel, int64_t n, int64_t y, int64_t x, int64_t x_step, int64_t count,
                    int upsample, float* to) {
  if (upsample == 1) return load_run(s, channel, n, y, x, x_step, count, to);
  y /= upsample;
  if (x_step == upsample) return load_run(s, channel, n, y, x / upsample, 1, count, to);
  alignas(64) float small[kRunWords * kMaxInterleave + S::kLanes];
  const int64_t first = x / upsample, last = (x + (count - 1) * x_step) / upsample;
  if (last - first < int64_t(sizeof(small) / sizeof(*small)) - S::kLanes) {
    load_run(s, channel, n, y, first, 1, last - first + 1, small);
    for (int64_t j = 0; j < count; j++) to[j] = small[(x + j * x_step) / upsample - first];
  } else {
    for (int64_t j = 0; j < count; j++) load_run(s, channel, n, y, (x + j * x_step) / upsample, 1, 1, to + j);
  }
}

// Pixel shuffle: output channel c at (y, x) is channel (c * r + y mod r) * r + x mod r at (y / r, x / r).
void load_shuffled(const Source& s, int64_t channel, int64_t n, int64_t y, int64_t x, int64_t count, int r, float* to) {
  alignas(64) float run[kRunWords + S::kLanes];
  for (int64_t k = 0; k < r && k < count; k++) {
    const int64_t same = ceil_div(count - k, r);
    load_run(s, (channel * r + y % r) * r + (x + k) % r, n, y / r, (x + k) / r, 1, same, run);
    for (int64_t j = 0; j < same; j++) to[k + j * r] = run[j];
  }
}

// A source as a tile sees it. Where every vector is one piece of an image row that lies as it is read, the values come straight
// from the source, else by way of a buffer that the functions above fill.
struct Reader {
  const Source* source = nullptr;
  bool direct = false;
  bool twice = false;             // direct: every pixel is read two times
  int64_t lane[kMaxV];            // direct: of each vector, in a plane
  const float* buffer = nullptr;  // [block_o][vectors][lanes]

  // Channels c .. c + 3 of vector v, rows 4 * i .. of the tile. c is a multiple of 4 when direct.
  [[gnu::always_inline]] void load(int64_t c, int i, int v, int vectors, S::F (&y)[4]) const {
    if (!direct) {
      for (int j = 0; j < 4; j++) y[j] = S::load_f(buffer + ((4 * i + j) * vectors + v) * S::kLanes);
      return;
    }
    const LaneLayout& l = source->layout;
    const uint8_t* const data = source->data + 4 * lane[v];
    auto plane = [&](int64_t p) {
      S::I lo = S::load(data + 4 * p * l.plane_stride), hi;
      if (twice) S::interleave(lo, lo, &lo, &hi);
      return lo;
    };
    const S::F zero = S::set1(0.0f);
    if (source->one_channel) {
      const S::I word = plane(0);
      const S::F value = l.format == Format::kInt8       ? dequantized(*source, word)
                         : l.format == Format::kBFloat16 ? S::as_f(S::shift_left<16>(word))
                                                         : S::as_f(word);
      for (int j = 0; j < 4; j++) y[j] = value;
    } else if (c >= l.channels) {
      for (int j = 0; j < 4; j++) y[j] = zero;
    } else if (l.format == Format::kInt8) {
      const S::I word = plane(c / 4);
      y[0] = dequantized(*source, word);
      y[1] = dequantized(*source, S::template shift_right<8>(word));
      y[2] = dequantized(*source, S::template shift_right<16>(word));
      y[3] = dequantized(*source, S::template shift_right<24>(word));
    } else if (l.format == Format::kBFloat16) {
      for (int j = 0; j < 4; j += 2) {
        const S::I word = c + j < l.channels ? plane((c + j) / 2) : S::set1(0);
        y[j] = S::as_f(S::template shift_left<16>(word));
        y[j + 1] = S::as_f(S::bit_and(word, S::set1(int32_t(0xFFFF0000))));
      }
    } else {
      for (int j = 0; j < 4; j++) y[j] = c + j < l.channels ? S::as_f(plane(c + j)) : zero;
    }
  }
};

// ---- epilogue: accumulators to words of the stores' lanes
// ----------------------------------------------------------------------

template <Activation kActivation>
S::F activate(S::F y, float slope) {
  const S::F zero = S::set1(0.0f);
  if constexpr (kActivation == Activation::kRelu) return S::max(zero, y);
  if constexpr (kActivation == Activation::kLeakyRelu) return S::select_lt(zero, y, y, S::mul(y, S::set1(slope)));
  if constexpr (kActivation == Activation::kTanh) return simd_tanh(y);
  if constexpr (kActivation == Activation::kSigmoid) return simd_sigmoid(y);
  if constexpr (kActivation == Activation::kSilu) return simd_silu(y);
  if constexpr (kActivation == Activation::kGelu) return simd_gelu(y);
  return y;
}

S::F activate(Activation activation, S::F y, float slope) {
  switch (activation) {
    case Activation::kNone:
      return y;
    case Activation::kRelu:
      return activate<Activation::kRelu>(y, slope);
    case Activation::kLeakyRelu:
      return activate<Activation::kLeakyRelu>(y, slope);
    case Activation::kTanh:
      return activate<Activation::kTanh>(y, slope);
    case Activation::kSigmoid:
      return activate<Activation::kSigmoid>(y, slope);
    case Activation::kSilu:
      return activate<Activation::kSilu>(y, slope);
    case Activation::kGelu:
      return activate<Activation::kGelu>(y, slope);
  }
  return y;
}

// Where the vectors of a tile go in every word row of a store.
struct WordColumns {
  bool direct = false;  // straight to the store's lanes, else to a buffer
  bool pairs = false;   // two vectors of alternating phases go straight there, once both are known
  int64_t col[kMaxV];   // in words
  int count[kMaxV];     // words of the vector that exist
  int64_t pair_col[kMaxV];
  int pair_count[kMaxV];  // of both
};

// Word rows of one store: `put(i, v)` writes word row i, vector v.
struct WordTarget {
  int32_t* row[kMaxR];  // nullptr: not wanted (padding rows)
  const WordColumns* columns;
  void put(int i, int v, S::I words) const {
    if (!row[i]) return;
    if (columns->count[v] == S::kLanes)
      S::store(row[i] + columns->col[v], words);
    else
      S::store_partial(row[i] + columns->col[v], words, columns->count[v]);
  }
};

// One packed row of a tile at one output phase.
struct RowTile {
  const int32_t* acc;  // [block_o][vectors][lanes]
  int vectors;
  int64_t first;            // row * block_o, where arrays by packed row begin
  int64_t image;            // of the tile, where images do not share one
  const Reader* source;     // pointwise steps, instead of acc
  const Reader* residual;   // or nullptr
  const int32_t* real;      // [vectors][lanes] all bits set in lanes that are pixels; only for sums
  float* sums;              // [block_o], added to
  float* squares;           // [block_o], added to
  const bool* whole_lanes;  // [stores]
  WordTarget* target;       // [stores]
};

// Four packed rows, the values y[j] of one vector each, to one store.
[[gnu::always_inline]] inline void store_rows(const Store& s, bool whole_lanes, const RowTile& tile, int i, int v,
                                              const WordTarget& target, const S::F (&y)[4]) {
  const int64_t first = tile.first + 4 * i;
  S::F w[4] = {y[0], y[1], y[2], y[3]};
  if (s.scale)
    for (int j = 0; j < 4; j++) w[j] = S::madd(w[j], S::set1(s.scale[first + j]), S::set1(s.bias[first + j]));
  if (s.activation != Activation::kNone)
    for (int j = 0; j < 4; j++) w[j] = activate(s.activation, w[j], s.slope);
  if (s.factor)
    for (int j = 0; j < 4; j++) w[j] = S::mul(w[j], S::set1(s.factor[tile.image * s.factor_stride + first + j]));
  switch (s.layout->format) {
    case Format::kInt8: {
      S::I q[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) q[j] = simd_quantize(w[j], s.inv_scale);
      if (whole_lanes)
        target.put(i, v, S::pack4(q[0], q[1], q[2], q[3], s.zero));
      else
        for (int j = 0; j < 4; j++) target.put(4 * i + j, v, S::pack4(q[j], q[j], q[j], q[j], s.zero));
      break;
    }
    case Format::kBFloat16:
      if (whole_lanes)
        for (int j = 0; j < 2; j++) target.put(2 * i + j, v, simd_pack_bf16(w[2 * j], w[2 * j + 1]));
      else
        for (int j = 0; j < 4; j++) target.put(4 * i + j, v, simd_pack_bf16(w[j], S::set1(0.0f)));
      break;
    case Format::kFloat32:
      for (int j = 0; j < 4; j++) target.put(4 * i + j, v, S::as_i(w[j]));
  }
}

// Packed rows [4 * first, 4 * last) of the tile, vectors [begin, end).
template <class T, Activation kActivation>
void finish_rows(const Epilogue& e, const RowTile& tile, int first, int last, int begin, int end) {
  const float* scales = e.scale + tile.image * e.scale_stride + tile.first;
  const float* biases = e.bias + tile.image * e.bias_stride + tile.first;
  const int vectors = tile.vectors;
  for (int i = first; i < last; i++) {
    S::F scale[4], bias[4], sum[4], square[4];
    for (int j = 0; j < 4; j++) {
      scale[j] = S::set1(scales[4 * i + j]);
      bias[j] = S::set1(biases[4 * i + j]);
      sum[j] = square[j] = S::set1(0.0f);
    }
    for (int v = begin; v < end; v++) {
      S::F y[4], other[4];
      if (tile.source)
        tile.source->load(tile.first + 4 * i, i, v, vectors, y);
      else
        for (int j = 0; j < 4; j++) y[j] = T::value(S::load(tile.acc + ((4 * i + j) * vectors + v) * S::kLanes));
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) y[j] = activate<kActivation>(S::madd(y[j], scale[j], bias[j]), e.slope);
      if (tile.residual) {
        tile.residual->load(tile.first + 4 * i, i, v, vectors, other);
        for (int j = 0; j < 4; j++) y[j] = S::add(y[j], other[j]);
      }
      if (e.post_activation == Activation::kRelu)
        for (int j = 0; j < 4; j++) y[j] = activate<Activation::kRelu>(y[j], 0);
      else if (e.post_activation != Activation::kNone)
        for (int j = 0; j < 4; j++) y[j] = activate(e.post_activation, y[j], e.post_slope);
      if (tile.sums) {
        const S::I real = S::load(tile.real + v * S::kLanes);
        for (int j = 0; j < 4; j++) {
          const S::F masked = S::as_f(S::bit_and(S::as_i(y[j]), real));
          sum[j] = S::add(sum[j], masked);
          square[j] = S::madd(masked, masked, square[j]);
        }
      }
      for (int s = 0; s < e.store_count; s++) store_rows(e.stores[s], tile.whole_lanes[s], tile, i, v, tile.target[s], y);
    }
    if (tile.sums) {
      S::add_sums(sum, tile.sums + 4 * i);
      S::add_sums(square, tile.squares + 4 * i);
    }
  }
}

// One u8 store of whole lanes, which only rounds.
bool stores_plainly(const Epilogue& e, const bool* whole_lanes) {
  const Store& s = e.stores[0];
  return e.store_count == 1 && s.layout->format == Format::kInt8 && whole_lanes[0] && !s.scale &&
         s.activation == Activation::kNone && !s.factor && !e.sums;
}

// The most common epilogue: nothing between the activation and such a store.
bool is_plain(const Epilogue& e, const bool* whole_lanes) {
  return stores_plainly(e, whole_lanes) && !e.residual && e.post_activation == Activation::kNone;
}

// Of accumulators; pointwise steps go the general way.
template <class T, Activation kActivation>
void finish_plain_rows(const Epilogue& e, const RowTile& tile, int first, int last, int begin, int end) {
  const float* scales = e.scale + tile.image * e.scale_stride + tile.first;
  const float* biases = e.bias + tile.image * e.bias_stride + tile.first;
  const Store& store = e.stores[0];
  const bool multiply = store.inv_scale != 1.0f;
  const int vectors = tile.vectors;
  for (int i = first; i < last; i++) {
    S::F scale[4], bias[4];
    for (int j = 0; j < 4; j++) {
      scale[j] = S::set1(scales[4 * i + j]);
      bias[j] = S::set1(biases[4 * i + j]);
    }
    for (int v = begin; v < end; v++) {
      S::I q[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) {
        const int32_t* acc = tile.acc + ((4 * i + j) * vectors + v) * S::kLanes;
        S::F y = activate<kActivation>(S::madd(T::value(S::load(acc)), scale[j], bias[j]), e.slope);
        if (multiply) y = S::mul(y, S::set1(store.inv_scale));
        q[j] = simd_round(y);
      }
      tile.target->put(i, v, S::pack4(q[0], q[1], q[2], q[3], store.zero));
    }
  }
}

// ---- the same while the sums are still in registers, for stores of whole lanes --------------------------

// The first `count` words of two vectors that alternate.
[[gnu::always_inline]] inline void store_interleaved(S::I even, S::I odd, int count, int32_t* to) {
  S::I lo, hi;
  S::interleave(even, odd, &lo, &hi);
  if (count == 2 * S::kLanes) {
    S::store(to, lo), S::store(to + S::kLanes, hi);
  } else {
    S::store_partial(to, lo, count < S::kLanes ? count : S::kLanes);
    if (count > S::kLanes) S::store_partial(to + S::kLanes, hi, count - S::kLanes);
  }
}

// Where the words of a tile go in one store. A copy, and all values are made before the first is stored: else the compiler has to
// expect that a store changes what is still to be read.
template <int R, int V>
struct TileWords {
  int32_t* row[R];      // of words; nullptr: not wanted (padding rows)
  const int32_t* even;  // those of the phase before, [word rows][V][lanes], which alternate with these; or nullptr
  int64_t col[V], pair_col[V];
  int count[V], pair_count[V];
  void set(const WordColumns& columns) {
    for (int v = 0; v < V; v++) {
      col[v] = columns.col[v], count[v] = columns.count[v];
      pair_col[v] = columns.pair_col[v], pair_count[v] = columns.pair_count[v];
    }
  }
  // The V vectors of word row i.
  [[gnu::always_inline]] void put_row(int i, const S::I (&words)[V]) const {
    if (even) {
#pragma GCC unroll 8
      for (int v = 0; v < V; v++)
        store_interleaved(S::load(even + (i * V + v) * S::kLanes), words[v], pair_count[v], row[i] + pair_col[v]);
      return;
    }
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) {
      if (count[v] == S::kLanes)
        S::store(row[i] + col[v], words[v]);
      else
        S::store_partial(row[i] + col[v], words[v], count[v]);
    }
  }
  // u8; without kAdd `zero` is 0
  template <bool kAdd>
  [[gnu::always_inline]] void put(const S::I (&q)[R][V], int32_t zero) const {
    S::I words[R / 4][V];
#pragma GCC unroll 8
    for (int i = 0; i < R / 4; i++)
#pragma GCC unroll 8
      for (int v = 0; v < V; v++)
        words[i][v] = S::pack4<kAdd>(q[4 * i][v], q[4 * i + 1][v], q[4 * i + 2][v], q[4 * i + 3][v], zero);
#pragma GCC unroll 8
    for (int i = 0; i < R / 4; i++)
      if (row[i]) put_row(i, words[i]);
  }
};

// The whole tile, of which `rows` rows are real. All activations but those of an operation or two go by way of memory, so that
// there is one copy of their code.
[[gnu::noinline]] void activate_all(Activation activation, float slope, float* y, int64_t vectors) {
  for (int64_t i = 0; i < vectors; i++, y += S::kLanes) S::store(y, S::as_i(activate(activation, S::load_f(y), slope)));
}

template <int R, int V>
[[gnu::always_inline]] inline void activate_tile(Activation activation, float slope, int rows, S::F (&y)[R][V]) {
  if (activation == Activation::kNone) return;
  if (activation == Activation::kRelu) {
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) y[r][v] = activate<Activation::kRelu>(y[r][v], slope);
    return;
  }
  if (activation == Activation::kLeakyRelu) {
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) y[r][v] = activate<Activation::kLeakyRelu>(y[r][v], slope);
    return;
  }
  alignas(64) float values[R][V][S::kLanes];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) S::store(values[r][v], S::as_i(y[r][v]));
  activate_all(activation, slope, values[0][0], rows * V);
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 8
    for (int v = 0; v < V; v++) y[r][v] = S::load_f(values[r][v]);
}

bool fits_sums(const Epilogue& e) {
  const Store& s = e.stores[0];
  return e.store_count == 1 && e.bounded && !e.residual && e.post_activation == Activation::kNone && !e.sums &&
         s.layout->format == Format::kInt8 && s.inv_scale == 1.0f && s.activation == Activation::kNone && !s.scale && !s.factor;
}

// For steps in units of the slot (`bounded`, so that no float is too large for an integer) with one store that only rounds;
// without kAdd its zero point is 0.
template <Activation kActivation, bool kAdd>
struct FinishSums {
  static constexpr bool kGeneral = false;
  static constexpr int kStores = 1;
  const Epilogue& e;
  template <int R, int V>
  [[gnu::always_inline]] void operator()(const S::I (&acc)[R][V], const float* scale, const float* bias,
                                         const TileWords<R, V>* words) const {
    S::I q[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int v = 0; v < V; v++)
        q[r][v] = S::round(activate<kActivation>(S::madd(S::to_float(acc[r][v]), S::set1(scale[r]), S::set1(bias[r])), e.slope));
    words->template put<kAdd>(q, e.stores[0].zero);
  }
};

using FinishRows = void (*)(const Epilogue&, const RowTile&, int, int, int, int);
template <class T>
constexpr FinishRows kFinishPlainRows[kActivations] = {
    finish_plain_rows<T, Activation::kNone>,      finish_plain_rows<T, Activation::kRelu>,
    finish_plain_rows<T, Activation::kLeakyRelu>, finish_plain_rows<T, Activation::kTanh>,
    finish_plain_rows<T, Activation::kSigmoid>,   finish_plain_rows<T, Activation::kSilu>,
    finish_plain_rows<T, Activation::kGelu>};
template <class T>
constexpr FinishRows kFinishRows[kActivations] = {finish_rows<T, Activation::kNone>,      finish_rows<T, Activation::kRelu>,
                                                  finish_rows<T, Activation::kLeakyRelu>, finish_rows<T, Activation::kTanh>,
                                                  finish_rows<T, Activation::kSigmoid>,   finish_rows<T, Activation::kSilu>,
                                                  finish_rows<T, Activation::kGelu>};

template <class T>
FinishRows choose_finish(const Epilogue& e, const bool* whole_lanes, bool pointwise) {
  if (pointwise || !is_plain(e, whole_lanes)) return kFinishRows<T>[int(e.activation)];
  // saturation to u8 with no zero point is a ReLU already
  const bool clamps = e.activation == Activation::kRelu && e.stores[0].zero == 0;
  return kFinishPlainRows<T>[clamps ? 0 : int(e.activation)];
}

// ---- a task -----------------------------------------------------------------------------------------------------------------

int64_t vectors_per_image(const Plan& plan) {
  if (plan.flat) return ceil_div((plan.raster_h - 1) * plan.pitch + plan.raster_w, S::kLanes);
  return plan.raster_h * ceil_div(plan.raster_w, S::kLanes);
}

// Whether packed rows hold channels in order, `per_lane` at a time.
bool holds_whole(const PackedWeight& w, int per_lane) {
  bool whole = true;
  for (int64_t r = 0; !w.in_order && per_lane > 1 && r < w.rows * w.block_o; r += per_lane) {
    const int32_t first = w.row_channels[r];
    whole &= first < 0 || first % per_lane == 0;
    for (int i = 1; i < per_lane; i++) {
      const int32_t channel = w.row_channels[r + i];
      whole &= channel < 0 ? first < 0 || first + i >= w.out_channels : first >= 0 && channel == first + i;
    }
  }
  return whole;
}

// Whether packed rows fill the lanes of a store whole.
bool fills_lanes(const PackedWeight& w, const Store& store) {
  const int per_lane = lane_channels(store.layout->format);
  return store.channel % per_lane == 0 && holds_whole(w, per_lane);
}

// Of a layer that is prepared: packed rows of a task.
int64_t rows_in_l2(const GatherGemm& op);
// And how far its pairs of vectors lie apart, in bytes, where one is above the other; else 0.
int64_t vertical_pairs(const GatherGemm& op);

Split make_split(const GatherGemm& op, int threads) {
  const PackedWeight& w = *op.weight;
  const Plan& plan = *op.plan;
  Split s;
  const int most = op.prepared ? kPreparedV : w.block_o == 8 ? S::kMaxV8 : S::kMaxV4;
  s.vectors = vectors_per_image(plan) * (plan.in.batch_in_cols || op.per_image ? 1 : plan.in.images);
  s.tiles_per_image = ceil_div(s.vectors, most);
  s.tiles = s.tiles_per_image * (op.per_image ? plan.in.images : 1);
  s.phase_rows = plan.pixels ? 1 : int64_t(plan.phases.size()) / plan.interleave;
  // 128 output channels a task keep the tile's input in L1 while the weights pass; fewer when tasks would not go round.
  s.row_group = op.prepared ? rows_in_l2(op) : kGroupChannels / w.block_o;
  const int64_t least = op.prepared ? kPreparedRows / w.block_o : 1;
  s.row_group = ceil_div(s.row_group, least) * least;
  while (s.row_group / 2 >= least && s.row_group / 2 % least == 0 &&
         s.tiles * s.phase_rows * ceil_div(w.rows, s.row_group) < 6 * threads)
    s.row_group /= 2;
  s.row_groups = ceil_div(w.rows, s.row_group);
  // the matrix unit finishes a tile during the products of the next
  while (op.prepared && s.tile_group < kMostTiles && s.tile_groups() * s.row_groups * s.phase_rows >= 16 * threads)
    s.tile_group *= 2;
  for (int i = 0; i < op.epilogue.store_count; i++) s.whole_lanes[i] = fills_lanes(w, op.epilogue.stores[i]);
  s.whole_fours = holds_whole(w, 4);
  const int64_t all_vectors = s.vectors * (op.per_image ? plan.in.images : 1);
  // without weights about ten instructions a vector of one channel
  s.dots = all_vectors * (op.source ? w.rows * w.block_o * 10 : w.blocks * w.block_o * block_planes(w.format));
  // a task begins with some 200 cycles of looking for its place
  while (!op.prepared && s.tile_group < kMostTiles && s.tasks() >= 32 * threads && s.dots / s.tasks() < kDotsPerTask)
    s.tile_group *= 2;
  s.strip = ceil_div(s.tile_groups(), ceil_div(ceil_div(s.tiles, 16), threads) * threads);
  return s;
}

// A run of pixels that lie one after another in the tile and in an output row.
struct Segment {
  int64_t tile_word;  // first word in a word row of the tile (interleaved)
  int64_t count;      // words
  int64_t n, y, x;    // output pixel of the first word
};

// Output pixels from one word of a segment to the next: 1 where all phases of an output row are interleaved.
int64_t pixel_step(const Plan& plan) { return divide(plan.step_w, plan.interleave).whole; }

constexpr int kMaxSegments = kMaxV * S::kLanes;

// The raster pixels of some vectors as segments of the output, and where their inputs start.
struct TilePixels {
  int vectors = 0;
  int64_t index = 0;  // of the tile, phase rows counted too, in its image
  int64_t image = 0;  // where images do not share a tile
  const uint8_t* x[kMaxV];
  int64_t first_pixel[kMaxV];  // of its image, in the raster
  Segment segments[kMaxSegments];
  int count = 0;
  WordColumns columns[kMaxStores];
  Reader source, residual;
};

// Vectors [first, first + vectors) of all images, or of image `image` where they are counted by image.
void find_pixels(const GatherGemm& op, int64_t image, int64_t first, int vectors, const OutputPhase& phase, TilePixels* tile) {
  const Plan& plan = *op.plan;
  const LaneLayout& in = plan.in;
  const int64_t per_image = vectors_per_image(plan), per_row = ceil_div(plan.raster_w, S::kLanes);
  const int64_t step = pixel_step(plan), words_in_row = step == 1 ? plan.out_w - phase.x0 : ceil_div(plan.out_w - phase.x0, step);
  const bool vertical = op.prepared && vertical_pairs(op) != 0;
  tile->vectors = vectors;
  tile->image = image;
  tile->count = 0;
  const Quotient images = divide(first, per_image);
  int64_t n = image + images.whole, index = images.rest;
  // of the vector's first lane
  const Quotient rows = plan.flat ? divide(index * S::kLanes, plan.pitch) : divide(index, per_row);
  int64_t p = rows.whole, q = plan.flat ? rows.rest : rows.rest * S::kLanes;
  for (int v = 0; v < vectors; v++) {
    int64_t row = p, col = q;
    if (vertical) {  // down and up in bands of two rows, the last of which may have one
      const int64_t band = index / (2 * per_row) * 2, in_band = index - band * per_row;
      const int64_t height = band + 1 < plan.raster_h ? 2 : 1;
      row = band + in_band % height, col = in_band / height * S::kLanes;
    }
    const int64_t lanes = plan.flat ? S::kLanes : std::min<int64_t>(plan.raster_w - col, S::kLanes);
    const int64_t pixel = plan.pixels ? 0 : row * in.row_stride + col;
    tile->x[v] = op.in + 4 * (n * (in.batch_in_cols ? 0 : in.image_stride) + pixel);
    tile->first_pixel[v] = index * S::kLanes;
    for (int64_t lane = 0; lane < lanes && row < plan.raster_h; row++, col = 0) {
      // up to the end of the raster row; in a flat layout the ring pixels behind it are computed and dropped
      const int64_t pitch = std::min(plan.flat ? plan.pitch - col : lanes, lanes - lane);
      const int64_t run = std::min(plan.raster_w - col, pitch);
      const int64_t y = phase.y0 + row * plan.step_h, x = phase.x0 + col * plan.step_w;
      int64_t words = run * plan.interleave;
      if (!in.batch_in_cols) words = std::min(words, words_in_row - col * plan.interleave);
      if (run > 0 && words > 0 && y < plan.out_h)
        tile->segments[tile->count++] = {(v * S::kLanes + lane) * plan.interleave, words, in.batch_in_cols ? col : n, y,
                                         in.batch_in_cols ? phase.x0 : x};
      lane += pitch;
    }
    // on to the next vector
    if (++index == per_image) {
      n++, index = p = q = 0;
      continue;
    }
    q += S::kLanes;
    if (plan.flat)
      for (; q >= plan.pitch; q -= plan.pitch) p++;
    else if (q >= plan.raster_w)
      p++, q = 0;
  }
}

// Full vectors of one image row go straight to their plane, everything else by way of a buffer in L1.
void find_columns(const GatherGemm& op, const Split& split, int vectors, TilePixels* tile) {
  const Plan& plan = *op.plan;
  for (int s = 0; s < op.epilogue.store_count; s++) {
    const LaneLayout& out = *op.epilogue.stores[s].layout;
    WordColumns& columns = tile->columns[s];
    columns.direct = plan.step_w == 1 && !plan.flat && !plan.in.batch_in_cols && out.phases_w == 1 && tile->count == vectors &&
                     (split.whole_lanes[s] || out.format == Format::kFloat32);
    columns.pairs = plan.interleave == 2 && pixel_step(plan) == 1 && !plan.flat && !plan.in.batch_in_cols && out.phases_w == 1 &&
                    tile->count == vectors && (split.whole_lanes[s] || out.format == Format::kFloat32);
    for (int v = 0; v < vectors; v++) {
      const Segment& segment = tile->segments[v];
      const int64_t lane = columns.direct || columns.pairs ? out.at(segment.n, segment.y, segment.x) : 0;
      columns.col[v] = columns.direct ? lane : v * S::kLanes;
      columns.count[v] = columns.direct ? int(segment.count) : S::kLanes;
      columns.pair_col[v] = columns.pairs ? lane : 0, columns.pair_count[v] = columns.pairs ? int(segment.count) : 0;
    }
  }
}

// Whether `source`, read from (y / upsample, x / upsample) on, lies as the tile's vectors read it, and if so where.
void find_lanes(const GatherGemm& op, const Source& source, int upsample, bool whole, const TilePixels& tile, int vectors,
                Reader* reader) {
  const Plan& plan = *op.plan;
  const LaneLayout& l = source.layout;
  reader->source = &source;
  reader->twice = upsample == 2 && plan.step_w == 1 && !source.tensor;
  reader->direct = whole && tile.count == vectors && source.col_stride == 1 && l.phases_w == 1 && !plan.in.batch_in_cols &&
                   (reader->twice || (upsample == plan.step_w && plan.step_w == plan.interleave));
  for (int v = 0; reader->direct && v < vectors; v++) {
    const Segment& s = tile.segments[v];
    // Slots can be read past their end; tensors cannot, and the last vector of a row may be short.
    reader->direct &=
        s.tile_word == int64_t(v) * S::kLanes * plan.interleave && (!source.tensor || s.count >= S::kLanes * plan.interleave);
    reader->direct &= !reader->twice || s.x % 2 == 0;
    reader->lane[v] = l.at(s.n, s.y / upsample, s.x / upsample);
  }
}

// The first `count` words by turns to two runs.
void store_unzipped(S::I words, int count, int32_t* even, int32_t* odd) {
  S::I evens = words, odds = words;
  S::unzip(words, &evens, &odds);
  S::store_partial(even, evens, (count + 1) / 2);
  S::store_partial(odd, odds, count / 2);
}

// Copies a word row of the tile to its pixels: all 4 bytes of their lanes in `plane`, or the low bytes of a word to one channel.
template <class Word>
void scatter(const int32_t* words, const TilePixels& tile, const Plan& plan, const LaneLayout& out, uint8_t* plane) {
  const bool batch = plan.in.batch_in_cols;
  const int64_t step = batch ? out.image_stride : pixel_step(plan);  // lanes from word to word
  const bool split_phases = !batch && out.phases_w > 1;              // there is no such step
  for (int i = 0; i < tile.count; i++) {
    const Segment& s = tile.segments[i];
    const int32_t* from = words + s.tile_word;
    const int64_t first = out.at(s.n, s.y, s.x);
    if (sizeof(Word) == 4 && step == 1 && !split_phases) {
      int32_t* to = reinterpret_cast<int32_t*>(plane) + first;
      int64_t j = 0;
      for (; j + S::kLanes <= s.count; j += S::kLanes) S::store(to + j, S::load(from + j));
      if (j < s.count) S::store_partial(to + j, S::load(from + j), int(s.count - j));
    } else if (sizeof(Word) == 4 && split_phases && step == 1 && out.phases_w == 2) {
      int32_t *const even = reinterpret_cast<int32_t*>(plane) + first, *const odd = reinterpret_cast<int32_t*>(plane) +
                                                                                    out.at(s.n, s.y, s.x + 1);
      for (int64_t j = 0; j < s.count; j += S::kLanes)
        store_unzipped(S::load(from + j), int(std::min<int64_t>(s.count - j, S::kLanes)), even + j / 2, odd + j / 2);
    } else if (split_phases && step == 1) {
      // every phases_w-th word goes to the same phase, side by side
      for (int64_t k = 0; k < out.phases_w && k < s.count; k++) {
        uint8_t* const to = plane + 4 * out.at(s.n, s.y, s.x + k);
        for (int64_t j = 0; k + j * out.phases_w < s.count; j++) {
          const Word word = Word(from[k + j * out.phases_w]);
          std::memcpy(to + 4 * j, &word, sizeof(Word));
        }
      }
    } else {
      for (int64_t j = 0; j < s.count; j++) {
        const int64_t lane = split_phases ? out.at(s.n, s.y, s.x + j * step) : first + j * step;
        const Word word = Word(from[j]);
        std::memcpy(plane + 4 * lane, &word, sizeof(Word));
      }
    }
  }
}

// The blocks of a packed row that output phase `index` uses.
template <class T>
[[gnu::always_inline]] inline void select_phase(const GatherGemm& op, int64_t row, int64_t index, TileInput* in) {
  const PackedWeight& w = *op.weight;
  const OutputPhase& phase = op.plan->phases[index];
  const int64_t begin = w.tap_ptr[row * w.taps + phase.tap_begin], end = w.tap_ptr[row * w.taps + phase.tap_end];
  in->cols = w.cols + begin;
  in->values = w.values + begin * w.block_o * kBlockK * element_bytes(T::kFormat);
  in->blocks = end - begin;
  in->start = op.plan->init.empty() ? nullptr : op.plan->init.data() + (index * w.rows + row) * w.block_o;
}

// What a tile needs besides its accumulators, the same for all its packed rows.
struct TileMemory {
  alignas(64) int32_t acc[kTileWords];
  alignas(64) float residual[kTileWords];
  alignas(64) int32_t real[kMaxInterleave][kMaxV * S::kLanes];
  // [store][phase]: the last vector of a row may be read past its end
  alignas(64) int32_t words[kMaxStores][kMaxInterleave][kTileWords + S::kLanes];
};

void mark_real(const TilePixels& tile, const Plan& plan, TileMemory* memory) {
  const int interleave = int(plan.interleave);
  std::memset(memory->real, 0, sizeof(memory->real));
  for (int i = 0; i < tile.count; i++)
    for (int64_t w = tile.segments[i].tile_word; w < tile.segments[i].tile_word + tile.segments[i].count; w++)
      memory->real[w % interleave][w / interleave] = -1;
}

// The residual of one channel at output phase b.
void load_residual(const GatherGemm& op, const TilePixels& tile, int64_t channel, int b, float* to) {
  const Plan& plan = *op.plan;
  const Source& source = *op.epilogue.residual;
  const int upsample = op.epilogue.residual_upsample;
  for (int i = 0; i < tile.count; i++) {
    const Segment& s = tile.segments[i];
    const int64_t count = ceil_div(s.count - b, plan.interleave);
    float* const run = to + s.tile_word / plan.interleave;
    if (plan.in.batch_in_cols)
      for (int64_t j = 0; j < count; j++) load_upsampled(source, channel, s.n + j, s.y, s.x, 1, 1, upsample, run + j);
    else if (count > 0)
      load_upsampled(source, channel, s.n, s.y, s.x + b, plan.step_w, count, upsample, run);
  }
}

// The residuals of the packed rows from `first` on; zeros for padding rows, since a NaN would stay one in the padding channels of
// a lane.
void load_residual_rows(const GatherGemm& op, const TilePixels& tile, int vectors, int64_t first, int b, float* to) {
  for (int r = 0; r < op.weight->block_o; r++, to += vectors * S::kLanes) {
    const int64_t channel = op.weight->row_channels[first + r];
    if (channel >= 0)
      load_residual(op, tile, channel, b, to);
    else
      std::memset(to, 0, vectors * S::kLanes * sizeof(float));
  }
}

// Fills acc with the source of a pointwise step.
void load_rows(const GatherGemm& op, const TilePixels& tile, int vectors, int64_t first, int block_o, int32_t* acc) {
  for (int r = 0; r < block_o; r++) {
    if (first + r >= op.weight->out_channels) {  // zeros, since a NaN would stay one in the padding channels of a lane
      std::memset(acc + r * vectors * S::kLanes, 0, vectors * S::kLanes * 4);
      continue;
    }
    for (int i = 0; i < tile.count; i++) {
      const Segment& s = tile.segments[i];
      float* const to = reinterpret_cast<float*>(acc) + r * vectors * S::kLanes + s.tile_word;
      if (op.shuffle > 1)
        load_shuffled(*op.source, first + r, s.n, s.y, s.x, s.count, op.shuffle, to);
      else
        load_upsampled(*op.source, first + r, s.n, s.y, s.x, 1, s.count, op.upsample, to);
    }
  }
}

// Any epilogue of an int8 layer, and steps without weights, while the values are in registers.
struct FinishAll {
  static constexpr bool kGeneral = true;
  static constexpr int kStores = kMaxStores;
  const GatherGemm& op;
  const Split& split;
  const TilePixels& tile;
  TileMemory* memory;
  int64_t row;
  int b;  // output phase

  // What does not lie as the tile reads it goes to the buffers of its readers.
  void prepare() const {
    const int block_o = int(op.weight->block_o), vectors = tile.vectors;
    const int64_t first = row * block_o;
    if (op.source && !tile.source.direct) load_rows(op, tile, vectors, first, block_o, memory->acc);
    if (op.epilogue.residual && !tile.residual.direct) load_residual_rows(op, tile, vectors, first, b, memory->residual);
  }

  template <int R, int V>
  [[gnu::always_inline]] void operator()(const S::I (&acc)[R][V], const float* scale, const float* bias,
                                         const TileWords<R, V>* words) const {
    S::F y[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) y[r][v] = S::madd(S::to_float(acc[r][v]), S::set1(scale[r]), S::set1(bias[r]));
    finish(y, words);
  }

  template <int R, int V>
  [[gnu::always_inline]] void pointwise(const float* scale, const float* bias, const TileWords<R, V>* words) const {
    S::F y[R][V];
#pragma GCC unroll 8
    for (int i = 0; i < R / 4; i++)
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) {
        S::F x[4];
        tile.source.load(row * R + 4 * i, i, v, V, x);
#pragma GCC unroll 8
        for (int j = 0; j < 4; j++) y[4 * i + j][v] = S::madd(x[j], S::set1(scale[4 * i + j]), S::set1(bias[4 * i + j]));
      }
    finish(y, words);
  }

 private:
  template <int R, int V>
  [[gnu::always_inline]] void finish(S::F (&y)[R][V], const TileWords<R, V>* words) const {
    const Epilogue& e = op.epilogue;
    const int64_t first = row * R;
    int rows = R;
    while (rows > 0 && op.weight->row_channels[first + rows - 1] < 0) rows--;
    activate_tile(e.activation, e.slope, rows, y);
    if (e.residual) {
#pragma GCC unroll 8
      for (int i = 0; i < R / 4; i++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) {
          S::F other[4];
          tile.residual.load(first + 4 * i, i, v, V, other);
#pragma GCC unroll 8
          for (int j = 0; j < 4; j++) y[4 * i + j][v] = S::add(y[4 * i + j][v], other[j]);
        }
    }
    activate_tile(e.post_activation, e.post_slope, rows, y);
    if (e.sums) add_to_sums(y);
    for (int s = 0; s < e.store_count; s++) put(e.stores[s], rows, y, words[s]);
  }

  template <int R, int V>
  [[gnu::always_inline]] void add_to_sums(const S::F (&y)[R][V]) const {
    const int64_t channels = op.weight->rows * R;
    float* const sums =
        op.epilogue.sums + (tile.image * split.tiles_per_image * split.phase_rows + tile.index) * 2 * channels + row * R;
    for (int r = 0; b == 0 && r < R; r++) sums[r] = sums[channels + r] = 0;
#pragma GCC unroll 8
    for (int i = 0; i < R / 4; i++) {
      S::F sum[4], square[4];
#pragma GCC unroll 8
      for (int j = 0; j < 4; j++) sum[j] = square[j] = S::set1(0.0f);
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) {
        const S::I real = S::load(memory->real[b] + v * S::kLanes);
#pragma GCC unroll 8
        for (int j = 0; j < 4; j++) {
          const S::F masked = S::as_f(S::bit_and(S::as_i(y[4 * i + j][v]), real));
          sum[j] = S::add(sum[j], masked);
          square[j] = S::madd(masked, masked, square[j]);
        }
      }
      S::add_sums(sum, sums + 4 * i);
      S::add_sums(square, sums + channels + 4 * i);
    }
  }

  template <int R, int V>
  [[gnu::always_inline]] void put(const Store& store, int rows, const S::F (&y)[R][V], const TileWords<R, V>& words) const {
    const int64_t first = row * R;
    S::F w[R][V];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++)
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) w[r][v] = y[r][v];
    if (store.scale)
#pragma GCC unroll 8
      for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) w[r][v] = S::madd(w[r][v], S::set1(store.scale[first + r]), S::set1(store.bias[first + r]));
    activate_tile(store.activation, store.slope, rows, w);
    if (store.factor) {
      const float* const factor = store.factor + tile.image * store.factor_stride + first;
#pragma GCC unroll 8
      for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) w[r][v] = S::mul(w[r][v], S::set1(factor[r]));
    }
    if (store.layout->format == Format::kInt8) {
      S::I q[R][V];
#pragma GCC unroll 8
      for (int r = 0; r < R; r++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) q[r][v] = simd_quantize(w[r][v], store.inv_scale);
      words.template put<true>(q, store.zero);
      return;
    }
    const bool pairs = store.layout->format == Format::kBFloat16;
#pragma GCC unroll 8
    for (int i = 0; i < R; i++) {
      if ((pairs && i >= R / 2) || !words.row[i]) continue;
      S::I bits[V];
#pragma GCC unroll 8
      for (int v = 0; v < V; v++) bits[v] = pairs ? simd_pack_bf16(w[2 * i % R][v], w[(2 * i + 1) % R][v]) : S::as_i(w[i][v]);
      words.put_row(i, bits);
    }
  }
};

// Packed rows [first_row, last_row) at the output pixel of this phase. sums: [rows * R].
template <int R>
void compute_pixel_rows(const GatherGemm& op, const uint8_t* x, int64_t phase, int64_t first_row, int64_t last_row,
                        int32_t* sums) {
  TileInput in;
  in.x[0] = x;
  const int64_t first = op.plan->phases[phase].tap_begin * op.plan->in.planes;
  for (int64_t row = first_row; row < last_row; row++, sums += R) {
    select_phase<Int8>(op, row, phase, &in);
    compute_pixel<R>(in, first, sums);
  }
}

void compute_pixel_rows(const GatherGemm& op, const uint8_t* x, int64_t phase, int64_t first_row, int64_t last_row,
                        int32_t* sums) {
  const auto compute = op.weight->block_o == 8 ? compute_pixel_rows<8> : compute_pixel_rows<4>;
  compute(op, x, phase, first_row, last_row, sums);
}

template <class T>
void compute_rows(const GatherGemm& op, const TilePixels& tile, int vectors, int64_t row, int64_t phase, TileInput* in,
                  int32_t* acc) {
  const int block_o = int(op.weight->block_o);
  if (!op.plan->pixels) {
    select_phase<T>(op, row, phase, in);
    return with_size(block_o, vectors, [&](auto r, auto v) { keep_sums<T, r, v>(*in, acc); });
  }
  for (int v = 0; v < vectors; v++) {
    for (int lane = 0; lane < S::kLanes && tile.first_pixel[v] + lane < int64_t(op.plan->phases.size()); lane++) {
      int32_t sums[kMaxR];
      compute_pixel_rows(op, tile.x[v], tile.first_pixel[v] + lane, row, row + 1, sums);
      for (int r = 0; r < block_o; r++) acc[(r * vectors + v) * S::kLanes + lane] = sums[r];
    }
  }
}

// The words of one store from its buffers, phases side by side, to its lanes.
void write_store(const GatherGemm& op, const TilePixels& tile, int vectors, int64_t row, const Store& store, bool whole_lanes,
                 const int32_t (&buffer)[kMaxInterleave][kTileWords + S::kLanes]) {
  const Plan& plan = *op.plan;
  const PackedWeight& w = *op.weight;
  const LaneLayout& out = *store.layout;
  const int block_o = int(w.block_o), per_lane = lane_channels(out.format), interleave = int(plan.interleave);
  const int word_rows = whole_lanes ? block_o / per_lane : block_o;
  const int64_t words = int64_t(vectors) * S::kLanes;
  if (plan.in.batch_in_cols && per_lane == 1 && out.plane_stride == 1 && w.in_order) {
    // Rows of a matrix, which lie far apart, often by a power of two: visit each once, not once a channel.
    const int64_t channel = row * block_o, rows = w.out_channels - channel < block_o ? w.out_channels - channel : block_o;
    for (int i = 0; i < tile.count; i++) {
      const Segment& s = tile.segments[i];
      int32_t* to = reinterpret_cast<int32_t*>(store.data) + out.at(s.n, s.y, s.x) + store.channel + channel;
      for (const int32_t *from = buffer[0] + s.tile_word, *end = from + s.count; from < end; from++, to += out.image_stride)
        for (int64_t r = 0; r < rows; r++) to[r] = from[r * words];
    }
    return;
  }
  // Two phases that alternate: no need to put them into a line first.
  const bool straight = interleave == 2 && !plan.in.batch_in_cols && out.phases_w == 1 && pixel_step(plan) == 1;
  for (int i = 0; i < word_rows; i++) {
    const int32_t row_channel = w.row_channels[row * block_o + (whole_lanes ? i * per_lane : i)];
    if (row_channel < 0) continue;
    const int64_t channel = store.channel + row_channel;
    uint8_t* const plane = store.data + 4 * (channel >> lane_shift(out.format)) * out.plane_stride;
    // the last bf16 channel writes its padding neighbour too, which must not stay a NaN
    const bool alone = per_lane == 2 && channel % 2 == 0 && channel + 1 == out.channels;
    const bool words_whole = whole_lanes || out.format == Format::kFloat32 || alone;
    if (straight && words_whole) {
      for (int k = 0; k < tile.count; k++) {
        const Segment& segment = tile.segments[k];
        const int64_t from = i * words + segment.tile_word / 2;
        int32_t* const to = reinterpret_cast<int32_t*>(plane) + out.at(segment.n, segment.y, segment.x);
        for (int64_t j = 0; j < segment.count; j += 2 * S::kLanes)
          store_interleaved(S::load(buffer[0] + from + j / 2), S::load(buffer[1] + from + j / 2),
                            int(std::min<int64_t>(segment.count - j, 2 * S::kLanes)), to + j);
      }
      continue;
    }
    alignas(64) int32_t line[(kMaxInterleave * kMaxV + 1) * S::kLanes];
    const int32_t* from = buffer[0] + i * words;
    if (interleave == 2) {
      for (int64_t j = 0; j < words; j += S::kLanes) {
        S::I lo, hi;
        S::interleave(S::load(buffer[0] + i * words + j), S::load(buffer[1] + i * words + j), &lo, &hi);
        S::store(line + 2 * j, lo);
        S::store(line + 2 * j + S::kLanes, hi);
      }
      from = line;
    } else if (interleave > 2) {
      for (int b = 0; b < interleave; b++)
        for (int64_t j = 0; j < words; j++) line[j * interleave + b] = buffer[b][i * words + j];
      from = line;
    }
    if (words_whole)
      scatter<int32_t>(from, tile, plan, out, plane);
    else if (out.format == Format::kInt8)
      scatter<uint8_t>(from, tile, plan, out, plane + channel % per_lane);
    else
      scatter<uint16_t>(from, tile, plan, out, plane + 2 * (channel % per_lane));
  }
}

// What follows once the accumulators of a packed row are known, for the rows of a tile one after another.
template <class T>
class RowFinish {
 public:
  RowFinish(const GatherGemm& op, const Split& split, const TilePixels& tile, int vectors, int64_t phase_row, TileMemory* memory)
      : op_(op), split_(split), tile_(tile), memory_(memory), phase_row_(phase_row), vectors_(vectors) {
    rows_.vectors = vectors;
    rows_.image = tile.image;
    rows_.whole_lanes = split.whole_lanes;
    rows_.target = targets_;
    rows_.sums = rows_.squares = nullptr;
    rows_.source = op.source ? &tile.source : nullptr;
    rows_.residual = op.epilogue.residual ? &tile.residual : nullptr;
    finish_ = choose_finish<T>(op.epilogue, split.whole_lanes, op.source != nullptr);
  }
  RowFinish(const RowFinish&) = delete;
  RowFinish& operator=(const RowFinish&) = delete;

  void begin(int64_t row) {
    const PackedWeight& w = *op_.weight;
    const Epilogue& e = op_.epilogue;
    const int block_o = int(w.block_o);
    row_ = row;
    rows_.first = row * block_o;
    for (int s = 0; s < e.store_count; s++) {
      const Store& store = e.stores[s];
      const LaneLayout& out = *store.layout;
      const int per_lane = lane_channels(out.format);
      const bool whole = split_.whole_lanes[s];
      targets_[s].columns = &tile_.columns[s];
      for (int i = 0; i < (whole ? block_o / per_lane : block_o); i++) {
        const int32_t channel = w.row_channels[rows_.first + (whole ? i * per_lane : i)];
        targets_[s].row[i] = channel < 0 ? nullptr
                             : tile_.columns[s].direct
                                 ? reinterpret_cast<int32_t*>(store.data) +
                                       ((store.channel + channel) >> lane_shift(out.format)) * out.plane_stride
                                 : memory_->words[s][0] + i * vectors_ * S::kLanes;
      }
    }
    if (e.sums) {
      const int64_t tile = tile_.image * split_.tiles_per_image * split_.phase_rows + tile_.index;
      rows_.sums = e.sums + tile * 2 * w.rows * block_o + rows_.first;
      rows_.squares = rows_.sums + w.rows * block_o;
      for (int r = 0; r < block_o; r++) rows_.sums[r] = rows_.squares[r] = 0;
    }
  }

  // At output phase b of the phase row, which has these accumulators: [block_o][vectors][lanes].
  void begin_phase(int b, const int32_t* acc) {
    const int block_o = int(op_.weight->block_o);
    rows_.acc = acc;
    rows_.real = memory_->real[b];
    if (rows_.residual && !tile_.residual.direct) load_residual_rows(op_, tile_, vectors_, rows_.first, b, memory_->residual);
    if (b > 0)
      for (int s = 0; s < op_.epilogue.store_count; s++)
        for (int i = 0; i < kMaxR; i++)
          if (i < block_o && targets_[s].row[i]) targets_[s].row[i] = memory_->words[s][b] + i * vectors_ * S::kLanes;
  }

  // Channels [4 * first, 4 * last) of the row, vectors [begin, end).
  void finish(int first, int last, int begin, int end) { finish_(op_.epilogue, rows_, first, last, begin, end); }

  // After the last phase.
  void end() {
    for (int s = 0; s < op_.epilogue.store_count; s++)
      if (!tile_.columns[s].direct)
        write_store(op_, tile_, vectors_, row_, op_.epilogue.stores[s], split_.whole_lanes[s], memory_->words[s]);
  }

  // `compute(phase)` gives the accumulators.
  template <class Compute>
  void run(int64_t row, const Compute& compute) {
    begin(row);
    for (int b = 0; b < op_.plan->interleave; b++) {
      begin_phase(b, compute(phase_row_ * op_.plan->interleave + b));
      finish(0, int(op_.weight->block_o / 4), 0, vectors_);
    }
    end();
  }

 private:
  const GatherGemm& op_;
  const Split& split_;
  const TilePixels& tile_;
  TileMemory* memory_;
  const int64_t phase_row_;
  const int vectors_;
  int64_t row_ = 0;
  WordTarget targets_[kMaxStores];
  RowTile rows_;
  FinishRows finish_;
};

// Packed rows of a tile, from the products to the stores. What the next row needs is found before this one's sums are finished:
// so many of its products are still waiting then that this takes no time of its own.
template <class Finish, int R, int V>
[[gnu::noinline]] void run_in_registers(const GatherGemm& op, const Split& split, const TilePixels& tile, int64_t first_row,
                                        int64_t last_row, int64_t phase_row, TileInput in, TileMemory* memory) {
  const PackedWeight& w = *op.weight;
  const Epilogue& e = op.epilogue;
  const int interleave = int(op.plan->interleave), stores = Finish::kGeneral ? int(e.store_count) : 1;
  const float* const scale = e.scale + tile.image * e.scale_stride;
  const float* const bias = e.bias + tile.image * e.bias_stride;
  TileWords<R, V> words[2][Finish::kStores];  // of this row and phase and of the next by turns
  for (int s = 0; s < stores; s++) words[0][s].set(tile.columns[s]), words[1][s].set(tile.columns[s]);
  auto prepare = [&](int64_t row, int b, TileWords<R, V>* to) __attribute__((always_inline)) {
    const int32_t* const channels = w.row_channels + row * R;
    for (int s = 0; s < stores; s++) {
      const Store& store = e.stores[s];
      const int shift = Finish::kGeneral ? lane_shift(store.layout->format) : 2;
      const bool pairs = tile.columns[s].pairs && b == 1, whole = tile.columns[s].direct || pairs;
      to[s].even = pairs ? memory->words[s][0] : nullptr;
      for (int i = 0; i < R >> shift; i++) {
        const int64_t channel = channels[i << shift];
        int32_t* const lanes =
            reinterpret_cast<int32_t*>(store.data) + ((store.channel + channel) >> shift) * store.layout->plane_stride;
        to[s].row[i] = channel < 0 ? nullptr : whole ? lanes : memory->words[s][b] + i * V * S::kLanes;
      }
    }
    if (!op.source) select_phase<Int8>(op, row, phase_row * interleave + b, &in);
  };
  prepare(first_row, 0, words[0]);
  for (int64_t row = first_row, turn = 0; row < last_row; row++) {
    for (int b = 0; b < interleave; b++, turn ^= 1) {
      auto prepare_next = [&]() __attribute__((always_inline)) {
        const bool last = b + 1 == interleave;
        if (!last || row + 1 < last_row) prepare(row + last, last ? 0 : b + 1, words[turn ^ 1]);
      };
      if constexpr (Finish::kGeneral) {
        const Finish finish{op, split, tile, memory, row, b};
        finish.prepare();
        if (op.source) {
          finish.template pointwise<R, V>(scale + row * R, bias + row * R, words[turn]);
          prepare_next();
          continue;
        }
        compute_tile<Int8, R, V>(in, [&](const S::I(&acc)[R][V]) __attribute__((always_inline)) {
          prepare_next();
          finish(acc, scale + row * R, bias + row * R, words[turn]);
        });
      } else {
        compute_tile<Int8, R, V>(in, [&](const S::I(&acc)[R][V]) __attribute__((always_inline)) {
          prepare_next();
          Finish{e}(acc, scale + row * R, bias + row * R, words[turn]);
        });
      }
    }
    for (int s = 0; s < stores; s++)
      if (!tile.columns[s].direct && !tile.columns[s].pairs) write_store(op, tile, V, row, e.stores[s], true, memory->words[s]);
  }
}

using RunInRegisters = void (*)(const GatherGemm&, const Split&, const TilePixels&, int64_t, int64_t, int64_t, TileInput,
                                TileMemory*);

template <class Finish>
RunInRegisters run_with(const GatherGemm& op, int vectors) {
  RunInRegisters run = nullptr;
  with_size(op.weight->block_o, vectors, [&](auto r, auto v) { run = run_in_registers<Finish, r, v>; });
  return run;
}

// nullptr where the sums have to go to memory.
RunInRegisters choose_in_registers(const GatherGemm& op, const Split& split, int vectors) {
  const Epilogue& e = op.epilogue;
  if (op.plan->pixels) return nullptr;
  for (int s = 0; s < e.store_count; s++)
    if (!split.whole_lanes[s]) return nullptr;
  const bool add = e.stores[0].zero != 0;
  if (!op.source && fits_sums(e)) {
    if (e.activation == Activation::kNone || (e.activation == Activation::kRelu && !add))  // saturation to u8 is that ReLU
      return add ? run_with<FinishSums<Activation::kNone, true>>(op, vectors)
                 : run_with<FinishSums<Activation::kNone, false>>(op, vectors);
    if (e.activation == Activation::kRelu) return run_with<FinishSums<Activation::kRelu, true>>(op, vectors);
    // A negative slope makes large values of small ones, which an integer may not hold.
    if (e.activation == Activation::kLeakyRelu && e.slope >= 0)
      return run_with<FinishSums<Activation::kLeakyRelu, true>>(op, vectors);
  }
  return run_with<FinishAll>(op, vectors);
}

template <class T>
void run_rows(const GatherGemm& op, const Split& split, const TilePixels& tile, int vectors, int64_t first_row, int64_t last_row,
              int64_t phase_row, TileMemory* memory) {
  TileInput in;
  for (int v = 0; v < vectors; v++) in.x[v] = tile.x[v];
  in.offsets = op.plan->offsets.data();
  in.plane_bytes = 4 * op.plan->in.plane_stride;
  if (T::kFormat == Format::kInt8 || op.source)
    if (const RunInRegisters run = choose_in_registers(op, split, vectors))
      return run(op, split, tile, first_row, last_row, phase_row, in, memory);
  RowFinish<T> finish(op, split, tile, vectors, phase_row, memory);
  for (int64_t row = first_row; row < last_row; row++)
    finish.run(row, [&](int64_t phase) {
      if (!op.source)
        compute_rows<T>(op, tile, vectors, row, phase, &in, memory->acc);
      else if (!tile.source.direct)
        load_rows(op, tile, vectors, row * op.weight->block_o, int(op.weight->block_o), memory->acc);
      return memory->acc;
    });
}

// One pixel in, one out, such as a linear layer at a small batch: the channels lie side by side, so they are the lanes.
bool is_single_pixel(const GatherGemm& op) {
  const Epilogue& e = op.epilogue;
  const Store& s = e.stores[0];
  return op.plan->pixels && op.plan->phases.size() == 1 && e.store_count == 1 && s.layout->plane_stride == 1 &&
         s.layout->format != Format::kBFloat16 && s.channel == 0 && !s.scale && s.activation == Activation::kNone && !s.factor &&
         !e.residual && !e.sums && e.post_activation == Activation::kNone && e.scale_stride == 0;
}

void run_single_pixel(const GatherGemm& op, const Split& split, const TilePixels& tile, int vectors, int64_t first_row,
                      int64_t last_row) {
  const PackedWeight& w = *op.weight;
  const Epilogue& e = op.epilogue;
  const Store& store = e.stores[0];
  const int64_t first = first_row * w.block_o, count = (last_row - first_row) * w.block_o;
  alignas(64) int32_t sums[kGroupChannels];
  for (int v = 0; v < vectors; v++) {
    compute_pixel_rows(op, tile.x[v], 0, first_row, last_row, sums);
    const Segment& segment = tile.segments[v];
    uint8_t* const pixel = store.data + 4 * store.layout->at(segment.n, segment.y, segment.x);
    for (int64_t c = 0; c < count; c += S::kLanes) {
      const int lanes = count - c < S::kLanes ? int(count - c) : S::kLanes;
      const S::F sum = S::to_float(S::load(sums + c));
      S::I words =
          S::as_i(activate(e.activation, S::madd(sum, S::load_f(e.scale + first + c), S::load_f(e.bias + first + c)), e.slope));
      const bool quantize = store.layout->format == Format::kInt8;
      if (quantize) {
        const S::I q = simd_quantize(S::as_f(words), store.inv_scale);
        words = S::pack4(q, q, q, q, store.zero);
      } else if (w.in_order && first + c + lanes <= w.out_channels) {
        S::store_partial(pixel + 4 * (first + c), words, lanes);
        continue;
      }
      alignas(64) int32_t buffer[S::kLanes];
      S::store(buffer, words);
      for (int i = 0; i < lanes; i += 4) {
        const int32_t* const channels = w.row_channels + first + c + i;
        const bool whole = split.whole_fours && channels[0] >= 0 && channels[0] + 4 <= w.out_channels;
        if (whole && quantize) {  // each word is four times its byte
          const uint32_t* const q = reinterpret_cast<const uint32_t*>(buffer + i);
          const uint32_t word = (q[0] & 0xFF) | (q[1] & 0xFF00) | (q[2] & 0xFF0000) | (q[3] & 0xFF000000);
          std::memcpy(pixel + channels[0], &word, 4);
        } else if (whole) {
          std::memcpy(pixel + 4 * channels[0], buffer + i, 16);
        } else {
          for (int j = 0; j < 4; j++)
            if (channels[j] >= 0) std::memcpy(pixel + (quantize ? 1 : 4) * channels[j], buffer + i + j, quantize ? 1 : 4);
        }
      }
    }
  }
}

// All of a tile but its accumulators; returns the number of its vectors.
int find_tile(const GatherGemm& op, const Split& split, int64_t t, int64_t phase_row, TilePixels* tile, TileMemory* memory) {
  const auto [image, in_image] = divide(t, split.tiles_per_image);
  const int64_t first = in_image * split.vectors / split.tiles_per_image;
  const int64_t last = (in_image + 1) * split.vectors / split.tiles_per_image;
  const int vectors = int(last - first);
  find_pixels(op, image, first, vectors, op.plan->phases[phase_row * op.plan->interleave], tile);
  tile->index = phase_row * split.tiles_per_image + in_image;
  find_columns(op, split, vectors, tile);
  if (op.epilogue.sums) mark_real(*tile, *op.plan, memory);
  if (op.source) {
    find_lanes(op, *op.source, 1, op.upsample == 1 && op.shuffle == 1, *tile, vectors, &tile->source);
    tile->source.buffer = reinterpret_cast<const float*>(memory->acc);
  }
  if (op.epilogue.residual) {
    find_lanes(op, *op.epilogue.residual, op.epilogue.residual_upsample, op.weight->in_order, *tile, vectors, &tile->residual);
    tile->residual.buffer = memory->residual;
  }
  return vectors;
}

// ---- many output channels at once, int8: the matrix unit ---------------------------------------------------------------------
//
//   C [16 channels x 16 pixels] += A [16 channels x 16 columns of 4] * B [16 columns x 16 pixels of 4]
//
// A column is a (tap, input block), whose 16 pixels lie anywhere, unaligned and mostly in L2: loaded as they lie, such rows hold
// the products back (3,300 of 4,700 GMAC/s were measured, where copies are aligned and in L1). So the columns that a group of
// channels uses are first copied, 16 to a tile, between the products before, and every tile of weights then finds them ready.
// Where all groups use the same columns, as in a dense layer, they are copied once for all groups.

#if defined(SPARSEGAN_TILES)

constexpr int kGroupRows = kPreparedRows;  // output channels of a group
constexpr int kTileVectors = kPreparedV;   // of pixels
constexpr int kAccWords = kGroupRows * kTileVectors * S::kLanes;
constexpr int64_t kWeightsInL2 = 1280 << 10;
constexpr int64_t kAhead = 2;  // steps from the copy of columns to their product
// Copies that are used once stay in L1: steps take turns in this many. More than kAhead.
constexpr int64_t kRingSteps = 3;
// So many that four sums are made: two tiles of weights by two vectors, or one by four.
constexpr int vectors_at_once(int tiles_m) { return tiles_m == 2 ? 2 : 4; }
constexpr int64_t kSharedSlots = 1024;  // of copies that all groups use, at most; in L2

struct TileWeight : Prepared {
  // 16 columns. Of each vector: the slot of their copy, and whether that is still to be made.
  struct Step {
    int32_t offsets[16];  // bytes, as in Plan
    uint16_t slot[vectors_at_once(1)];
    bool copy[vectors_at_once(1)];
  };
  struct Group {
    int64_t count = 0;  // of steps
    int64_t steps = 0;  // first of `count` in `steps`, and, where there are vertical pairs, of as many for them behind those
    int64_t tiles = 0;  // first of count * tiles_m in `tiles`, a step's tiles side by side
  };
  int rows_m = 16;         // of a tile of weights
  int tiles_m = 2;         // tiles of weights a group
  int64_t group_rows = 0;  // packed rows a group
  int64_t groups = 0;
  bool shared = false;          // all groups use the same columns
  int64_t slots = 0;            // for the copies of an item
  int64_t pair_bytes = 0;       // from one vector to the next of a vertical pair, which share copies; 0: there are none
  std::vector<Group> by_phase;  // [phases][groups]
  std::vector<Step> steps;      // the last columns of a group may have no weights
  std::vector<int8_t> bytes;
  const int8_t* tiles = nullptr;  // aligned, in `bytes`
  const Group& at(int64_t phase, int64_t group) const { return by_phase[phase * groups + group]; }
};

// Cycles of a vector, measured on Granite Rapids with two threads.
// Products with one or two tiles of weights and their loads, which come from L2 and, of weights beyond its size, from L3. One
// tile: of two vectors at once. Four take less, but with 32 here dense layers took this way, too, and were slower by it.
constexpr double product_cycles(int tiles_m, int64_t steps) {
  return (tiles_m == 2 ? 65 : 45) * (steps * tiles_m * Tiles::kBytes <= kWeightsInL2 ? 1 : 1.2);
}
// The copy of 16 columns, for one group to L1, for all to L2.
constexpr double kCopyCycles = 33, kSharedCopyCycles = 60;
// The rest of a group of 16 channels: while products need no copies, most of it is hidden behind them.
constexpr double kRestCycles = 176, kSharedRestCycles = 50;
// The vector kernel, in chains of layers: a block, whose columns come from L1 or L2, and the rest of a channel.
constexpr double block_cycles(int64_t block_o, int64_t columns) {
  return (block_o == 8 ? 1 : 0.62) * (columns <= 320 ? 5.5 : 5.8);
}
constexpr double kVectorRestCycles = 7;

int64_t vertical_pairs(const GatherGemm& op) { return static_cast<const TileWeight&>(*op.prepared).pair_bytes; }

int64_t rows_in_l2(const GatherGemm& op) {
  const TileWeight& t = static_cast<const TileWeight&>(*op.prepared);
  const int64_t parts = ceil_div(int64_t(t.bytes.size()), kWeightsInL2);
  return ceil_div(t.groups, parts) * t.group_rows;
}

// Where steps are 16 planes of one tap, a column of taps one after another: a step of the lower vector of a vertical pair is the
// upper one's next.
void order_columns(const Plan& plan, const PackedWeight& w, int64_t pair_bytes, std::vector<int32_t>* columns) {
  const int32_t planes = int32_t(plan.offsets.size() / w.taps);
  if (pair_bytes == 0 || planes % 16 != 0) return;
  auto key = [&](int32_t column) {
    const int64_t tap = plan.offsets[column / planes * planes];
    return std::tuple<int64_t, int64_t, int64_t, int32_t>{column % planes / 16, tap % pair_bytes, tap, column % 16};
  };
  std::sort(columns->begin(), columns->end(), [&](int32_t a, int32_t b) { return key(a) < key(b); });
}

// The steps of these columns; pair_bytes: of vertical pairs, or 0.
void add_steps(const Plan& plan, const std::vector<int32_t>& columns, int64_t pair_bytes, TileWeight* t) {
  // Slots of each pair, by what stands there relative to the upper vector.
  std::map<std::vector<int64_t>, int64_t> copies[vectors_at_once(1) / 2];
  int64_t made = 0;
  const int64_t count = int64_t(columns.size()), vectors = vectors_at_once(t->tiles_m);
  for (int64_t first = 0; first < count; first += 16) {
    TileWeight::Step step;
    for (int64_t j = 0; j < 16; j++) step.offsets[j] = plan.offsets[columns[first + j < count ? first + j : count - 1]];
    for (int64_t v = 0; v < vectors; v++) {
      int64_t slot = (first / 16 * vectors + v) % (vectors * kRingSteps);
      step.copy[v] = true;
      if (t->shared) {
        slot = first / 16 * vectors + v;
        if (pair_bytes) {
          std::vector<int64_t> from(step.offsets, step.offsets + 16);
          for (int64_t& offset : from) offset += v % 2 * pair_bytes;
          const auto [found, added] = copies[v / 2].try_emplace(std::move(from), made);
          slot = found->second, step.copy[v] = added, made += added;
        }
      }
      step.slot[v] = uint16_t(slot);
      t->slots = slot + 1 > t->slots ? slot + 1 : t->slots;
    }
    t->steps.push_back(step);
  }
}

// The blocks of a packed row that output phase `phase` uses.
std::pair<int64_t, int64_t> row_blocks(const PackedWeight& w, const Plan& plan, int64_t row, int64_t phase) {
  return {w.tap_ptr[row * w.taps + plan.phases[phase].tap_begin], w.tap_ptr[row * w.taps + plan.phases[phase].tap_end]};
}

// One way to group the packed rows: the columns that the rows of each group use, those that any row uses, and the cycles of a
// vector with columns of their own and with shared ones.
struct Grouping {
  int64_t group_rows = 0, groups = 0;
  int tiles_m = 1;
  std::vector<std::vector<int32_t>> used, shared;  // [phases][groups], [phases]
  double apart = 0, together = 0;
};

Grouping group_by(const PackedWeight& w, const Plan& plan, int64_t group_rows) {
  Grouping g;
  const int64_t columns = int64_t(plan.offsets.size()), phases = int64_t(plan.phases.size());
  g.group_rows = group_rows, g.groups = ceil_div(w.rows, group_rows);
  g.tiles_m = group_rows * w.block_o > Tiles::kRows && w.rows * w.block_o > Tiles::kRows ? 2 : 1;
  g.used.resize(phases * g.groups), g.shared.resize(phases);
  int64_t steps = 0, shared_steps = 0;
  for (int64_t p = 0; p < phases; p++) {
    std::vector<bool> any(columns, false);
    for (int64_t i = 0; i < g.groups; i++) {
      std::vector<bool> mine(columns, false);
      for (int64_t row = i * group_rows; row < (i + 1) * group_rows && row < w.rows; row++) {
        const auto [begin, end] = row_blocks(w, plan, row, p);
        for (int64_t b = begin; b < end; b++) mine[w.cols[b]] = any[w.cols[b]] = true;
      }
      std::vector<int32_t>& used = g.used[p * g.groups + i];
      for (int64_t c = 0; c < columns; c++)
        if (mine[c]) used.push_back(int32_t(c));
      steps += ceil_div(int64_t(used.size()), 16);
    }
    for (int64_t c = 0; c < columns; c++)
      if (any[c]) g.shared[p].push_back(int32_t(c));
    shared_steps += ceil_div(int64_t(g.shared[p].size()), 16);
  }
  const double groups = double(g.groups), tiles = double(phases * g.tiles_m);
  g.apart = double(steps) * (product_cycles(g.tiles_m, steps) + kCopyCycles) + tiles * groups * kRestCycles;
  g.together = double(shared_steps) * (groups * product_cycles(g.tiles_m, shared_steps * g.groups) + kSharedCopyCycles) +
               tiles * (kRestCycles + (groups - 1) * kSharedRestCycles);
  return g;
}

std::unique_ptr<const Prepared> prepare(const GatherGemm& op) {
  const PackedWeight& w = *op.weight;
  const Plan& plan = *op.plan;
  if (op.source || plan.pixels || w.format != Format::kInt8 || w.blocks == 0) return nullptr;
  auto made = std::make_unique<TileWeight>();
  TileWeight& t = *made;
  const int64_t columns = int64_t(plan.offsets.size()), phases = int64_t(plan.phases.size());

  // Groups of two tiles take fewest loads; groups of one take fewer columns where those of two rows are alike.
  Grouping g = group_by(w, plan, kGroupRows / w.block_o);
  Grouping low = group_by(w, plan, Tiles::kRows / w.block_o);
  if (std::min(low.apart, low.together) < std::min(g.apart, g.together)) g = std::move(low);
  double vectors = double(phases * w.rows * w.block_o) * kVectorRestCycles;
  for (int64_t p = 0; p < phases; p++)
    for (int64_t row = 0; row < w.rows; row++) {
      const auto [begin, end] = row_blocks(w, plan, row, p);
      vectors += double(end - begin) * block_cycles(w.block_o, columns);
    }
  // Of fewer than 4 vectors, the weights still have to be loaded, which takes more than half of the time.
  const int64_t in_all = vectors_per_image(plan) * (plan.in.batch_in_cols ? 1 : plan.in.images);
  const double few = in_all < kTileVectors ? 3 / double(in_all) : 1;
  if (vectors < few * std::min(g.apart, g.together)) return nullptr;
  t.rows_m = int(std::min<int64_t>(w.rows * w.block_o, Tiles::kRows));
  t.tiles_m = g.tiles_m, t.group_rows = g.group_rows, t.groups = g.groups;
  std::vector<std::vector<int32_t>>&used = g.used, &shared = g.shared;
  t.shared = g.together <= g.apart;
  int64_t most = 0;  // copies of one vector
  for (int64_t i = 0; i < phases; i++) most = std::max(most, ceil_div(int64_t(shared[i].size()), 16));
  t.shared = t.shared && most * kTileVectors * plan.interleave <= kSharedSlots;
  if (t.shared) {
    if (!plan.flat && plan.raster_h > 1) t.pair_bytes = 4 * plan.in.row_stride;
    for (int64_t i = 0; i < phases; i++) {
      order_columns(plan, w, t.pair_bytes, &shared[i]);
      for (int64_t g = 0; g < t.groups; g++) used[i * t.groups + g] = shared[i];
    }
  }

  int64_t tiles = 0;
  for (int64_t i = 0; i < phases * t.groups; i++) {
    TileWeight::Group group;
    group.count = ceil_div(int64_t(used[i].size()), 16);
    group.tiles = tiles;
    tiles += group.count * t.tiles_m;
    if (i % t.groups > 0 && used[i] == used[i - 1]) {
      group.steps = t.by_phase.back().steps;
    } else {
      group.steps = int64_t(t.steps.size());
      add_steps(plan, used[i], 0, &t);
      if (t.pair_bytes) add_steps(plan, used[i], t.pair_bytes, &t);
    }
    t.by_phase.push_back(group);
  }
  t.bytes.reserve(tiles * Tiles::kBytes + 64);
  use_huge_pages(t.bytes.data(), tiles * Tiles::kBytes + 64);
  t.bytes.assign(tiles * Tiles::kBytes + 64, 0);
  int8_t* const aligned = t.bytes.data() + (64 - reinterpret_cast<uintptr_t>(t.bytes.data()) % 64) % 64;
  t.tiles = aligned;
  std::vector<int64_t> place(columns);
  for (int64_t i = 0; i < phases * t.groups; i++) {
    for (size_t c = 0; c < used[i].size(); c++) place[used[i][c]] = int64_t(c);
    const int64_t first_row = i % t.groups * t.group_rows;
    for (int64_t row = first_row; row < first_row + t.group_rows && row < w.rows; row++) {
      const auto [begin, end] = row_blocks(w, plan, row, i / t.groups);
      for (int64_t b = begin; b < end; b++)
        for (int64_t r = 0; r < w.block_o; r++) {
          const int64_t m = (row - first_row) * w.block_o + r, c = place[w.cols[b]];
          std::memcpy(aligned + (t.by_phase[i].tiles + c / 16 * t.tiles_m + m / 16) * Tiles::kBytes + m % 16 * Tiles::kRowBytes +
                          c % 16 * 4,
                      w.values + (b * w.block_o + r) * kBlockK, kBlockK);
        }
    }
  }
  return made;
}

// Memory of a thread for the copies of columns and for accumulators.
uint8_t* tile_memory(int64_t bytes) {
  thread_local std::vector<uint8_t> memory;
  if (int64_t(memory.size()) < bytes + 64) memory.resize(bytes + 64);
  return memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
}

// Copies the columns of an item, one step after another.
struct ColumnCopier {
  const uint8_t* x[vectors_at_once(1)];  // of its vectors, nullptr where there is none
  const TileWeight::Step* step;
  uint8_t* slots;

  [[gnu::always_inline]] void copy(int v) const {
    if (!step->copy[v] || !x[v]) return;
    const uint8_t* from = x[v];
    uint8_t* const to = slots + step->slot[v] * Tiles::kBytes;
#pragma GCC unroll 16
    for (int j = 0; j < 16; j++) S::store(to + j * Tiles::kRowBytes, S::load(from + step->offsets[j]));
  }
};

// Products of a group's weights with the copied columns of some vectors.
struct TileProducts {
  const int8_t* tiles;
  const TileWeight::Step* step;
  const uint8_t* slots;
};

// `count` steps of them. During each, the copier takes a step (of those to come) and `between` does some other work.
template <int kTilesM, int kVectors, bool kCopy, class Between>
[[gnu::always_inline]] inline void multiply_steps(TileProducts* products, int64_t count, ColumnCopier* columns,
                                                  const Between& between) {
  TileProducts p = *products;  // both in registers: memory would be held up behind the stores of the copies
  ColumnCopier copier = *columns;
  auto column = [&](int v) __attribute__((always_inline)) { return p.slots + p.step->slot[v] * Tiles::kBytes; };
  auto copy = [&](int v) __attribute__((always_inline)) {
    if constexpr (kCopy) copier.copy(v);
  };
  for (int64_t s = 0; s < count; s++, p.step++, p.tiles += kTilesM * Tiles::kBytes) {
    Tiles::load<4>(column(0));
    Tiles::load<6>(p.tiles);
    Tiles::dot<0, 6, 4>();
    copy(0);
    if constexpr (kTilesM == 2) {
      Tiles::load<7>(p.tiles + Tiles::kBytes);
      Tiles::dot<2, 7, 4>();
    }
    if constexpr (kVectors > 1) {
      Tiles::load<5>(column(1));
      if constexpr (kTilesM == 2) Tiles::dot<3, 7, 5>();
    }
    copy(1);
    if constexpr (kVectors > 1) Tiles::dot<1, 6, 5>();
    if constexpr (kTilesM == 1) {
      if constexpr (kVectors > 2) {
        Tiles::load<4>(column(2));
        Tiles::dot<2, 6, 4>();
      }
      copy(2);
      if constexpr (kVectors > 3) {
        Tiles::load<5>(column(3));
        Tiles::dot<3, 6, 5>();
      }
      copy(3);
    }
    if constexpr (kCopy) copier.step++;
    between();
  }
  *products = p, *columns = copier;
}

// Multiplies and finishes tiles of pixels. Its work is a stream of `items`: a group of channels, an output phase and the vectors
// that are multiplied at once. The columns of an item are copied during the products before it, and the accumulators of a group
// are finished during the products of the next.
template <int kTilesM>
class TileTask {
 public:
  TileTask(const GatherGemm& op, const Split& split, int64_t first_tile, int64_t last_tile, int64_t first_row, int64_t last_row,
           int64_t phase_row)
      : op_(op),
        split_(split),
        t_(static_cast<const TileWeight&>(*op.prepared)),
        interleave_(int(op.plan->interleave)),
        first_row_(first_row),
        last_row_(last_row),
        phase_row_(phase_row),
        first_group_(first_row / t_.group_rows),
        last_group_(ceil_div(last_row, t_.group_rows)),
        tile_(first_tile),
        last_tile_(last_tile) {
    const int64_t slots = t_.slots * (t_.shared ? interleave_ * kTileVectors / kAtOnce : 2);
    const int64_t acc_bytes = 2 * interleave_ * kAccWords * 4;
    uint8_t* const bytes = tile_memory(acc_bytes + kGroupRows * Tiles::kRowBytes + slots * Tiles::kBytes);
    acc_ = reinterpret_cast<int32_t*>(bytes);
    start_ = reinterpret_cast<int32_t*>(bytes + acc_bytes);
    slots_ = bytes + acc_bytes + kGroupRows * Tiles::kRowBytes;
  }

  void run() {
    Item items[2], *item = &items[0], *next = &items[1];
    open(nullptr, item);
    int64_t ready = 0;  // steps of the item that are copied
    for (bool more = true; more; std::swap(item, next)) {
      more = open(item, next);
      if (item->copies)  // the first item, and after items too short to look ahead
        for (; ready < kAhead && ready < item->steps; ready++, item->copier.step++)
          for (int v = 0; v < kAtOnce; v++) item->copier.copy(v);
      if (item->b == 0 && item->part == 0) {
        int64_t steps = 0;  // in which the group before can be finished
        for (int b = 0; b < interleave_; b++)
          steps += t_.at(phase_row_ * interleave_ + b, item->group).count * ceil_div(item->tile->vectors, kAtOnce);
        pieces_a_step_ = steps > 0 ? int(ceil_div(pieces_, steps)) : 0;
      }
      begin_sums(*item);
      const int64_t own = item->steps > kAhead ? item->steps - kAhead : 0;
      const bool looks_ahead = more && next->copies && next->products.slots != item->products.slots;
      const int64_t ahead = !looks_ahead ? 0 : next->steps < item->steps - own ? next->steps : item->steps - own;
      multiply(item, own, item->copies, &item->copier);
      multiply(item, ahead, true, &next->copier);
      multiply(item, item->steps - own - ahead, false, &next->copier);
      ready = ahead;
      const bool group_ends = !more || next->tile != item->tile || next->group != item->group;
      while (group_ends && pieces_ > 0) finish_piece();
      end_sums(*item);
      if (group_ends) start_finish(*item);
    }
    while (pieces_ > 0) finish_piece();
  }

 private:
  static constexpr int kAtOnce = vectors_at_once(kTilesM);
  struct Tile {
    int vectors;
    TilePixels pixels;
    TileMemory memory;
    std::optional<RowFinish<Int8>> finish;
  };
  struct Item {
    Tile* tile = nullptr;
    int64_t group = 0, steps = 0;
    int b = 0, part = 0;  // of the tile's vectors
    bool copies = false;
    TileProducts products = {};
    ColumnCopier copier = {};
  };

  // The item after `before`. In place: a copy would wait for all stores of tiles before it.
  bool open(const Item* before, Item* item) {
    item->tile = before ? before->tile : nullptr;
    if (before) {
      item->group = before->group, item->b = before->b, item->part = before->part + 1;
      if (kAtOnce * item->part >= item->tile->vectors) item->part = 0, item->b++;
      if (item->b == interleave_) item->b = 0, item->group++;
      if (item->group == last_group_) item->tile = nullptr;
    }
    if (!item->tile) {
      if (tile_ == last_tile_) return false;
      Tile& tile = memory_[tile_ % 3];  // that of three tiles before is finished
      tile.vectors = find_tile(op_, split_, tile_++, phase_row_, &tile.pixels, &tile.memory);
      tile.finish.emplace(op_, split_, tile.pixels, tile.vectors, phase_row_, &tile.memory);
      item->tile = &tile;
      item->group = first_group_;
      item->b = item->part = 0;
    }
    const TileWeight::Group& g = t_.at(phase_row_ * interleave_ + item->b, item->group);
    item->steps = g.count;
    item->copies = !t_.shared || item->group == first_group_;
    const uint8_t* const* x = item->tile->pixels.x + kAtOnce * item->part;
    const int vectors = vectors_of(*item);
    bool vertical = t_.pair_bytes && vectors == kAtOnce;
    for (int v = 0; vertical && v < vectors; v += 2) vertical = x[v + 1] - x[v] == t_.pair_bytes;
    const TileWeight::Step* const step = t_.steps.data() + g.steps + (vertical ? g.count : 0);
    uint8_t* const slots =
        slots_ + (t_.shared ? item->b * kTileVectors / kAtOnce + item->part : items_++ % 2) * t_.slots * Tiles::kBytes;
    item->products = {t_.tiles + g.tiles * Tiles::kBytes, step, slots};
    item->copier = {{}, step, slots};
    for (int v = 0; v < vectors; v++) item->copier.x[v] = x[v];
    return true;
  }

  static int vectors_of(const Item& item) { return std::min(kAtOnce, item.tile->vectors - kAtOnce * item.part); }

  void begin_sums(const Item& item) {
    if (op_.plan->init.empty()) {
      Tiles::zero<0>(), Tiles::zero<1>(), Tiles::zero<2>(), Tiles::zero<3>();
      return;
    }
    const int64_t channels = op_.weight->rows * op_.weight->block_o, height = t_.group_rows * op_.weight->block_o;
    const int64_t first = item.group * height, count = channels - first < height ? channels - first : height;
    const int32_t* from = op_.plan->init.data() + (phase_row_ * interleave_ + item.b) * channels + first;
    for (int64_t c = 0; c < count; c++) S::store(start_ + c * S::kLanes, S::set1(from[c]));
    const int32_t* const below = start_ + (kTilesM == 2 ? 16 * S::kLanes : 0);
    Tiles::load<0>(start_), Tiles::load<1>(start_), Tiles::load<2>(below), Tiles::load<3>(below);
  }

  // Accumulators of the group that is multiplied (0) or finished (1), [group's channels][vectors][lanes].
  int32_t* sums_of(int finished, int b) { return acc_ + ((groups_ + finished) % 2 * interleave_ + b) * kAccWords; }

  void end_sums(const Item& item) {
    const int64_t vectors = item.tile->vectors, stride = vectors * Tiles::kRowBytes;
    const int count = vectors_of(item);
    int32_t* acc = sums_of(0, item.b) + kAtOnce * item.part * S::kLanes;
    Tiles::store<0>(acc, stride);
    if (count > 1) Tiles::store<1>(acc + S::kLanes, stride);
    if constexpr (kTilesM == 2) {
      acc += 16 * vectors * S::kLanes;
      Tiles::store<2>(acc, stride);
      if (count > 1) Tiles::store<3>(acc + S::kLanes, stride);
    } else {
      if (count > 2) Tiles::store<2>(acc + 2 * S::kLanes, stride);
      if (count > 3) Tiles::store<3>(acc + 3 * S::kLanes, stride);
    }
  }

  template <bool kCopy, class Between>
  void multiply_vectors(Item* item, int64_t steps, ColumnCopier* copier, const Between& between) {
    switch (vectors_of(*item)) {
      case 1:
        return multiply_steps<kTilesM, 1, kCopy>(&item->products, steps, copier, between);
      case 2:
        return multiply_steps<kTilesM, 2, kCopy>(&item->products, steps, copier, between);
      case 3:
        if constexpr (kAtOnce > 2) multiply_steps<kTilesM, 3, kCopy>(&item->products, steps, copier, between);
        return;
      default:
        if constexpr (kAtOnce > 2) multiply_steps<kTilesM, 4, kCopy>(&item->products, steps, copier, between);
    }
  }

  void multiply(Item* item, int64_t steps, bool copies, ColumnCopier* copier) {
    auto between = [&] {
      for (int i = 0; i < pieces_a_step_ && pieces_ > 0; i++) finish_piece();
    };
    copies ? multiply_vectors<true>(item, steps, copier, between) : multiply_vectors<false>(item, steps, copier, between);
  }

  void start_finish(const Item& item) {
    groups_++;
    done_ = item.tile;
    done_row_ = row_ = item.group * t_.group_rows;
    b_ = i_ = v_ = 0;
    const int64_t rows = (row_ + t_.group_rows < last_row_ ? row_ + t_.group_rows : last_row_) - row_;
    const int64_t words = rows * interleave_ * (op_.weight->block_o / 4) * done_->vectors;
    // small pieces fit between products best, large ones take less time in all
    const bool small = is_plain(op_.epilogue, split_.whole_lanes) && words <= 2 * item.steps;
    piece_vectors_ = small && done_->vectors > 2 ? 2 : done_->vectors;
    pieces_ = words / done_->vectors * ceil_div(done_->vectors, piece_vectors_);
  }

  // Four channels of some vectors.
  [[gnu::noinline]] void finish_piece() {
    RowFinish<Int8>& finish = *done_->finish;
    const int block_o = int(op_.weight->block_o), vectors = done_->vectors;
    if (i_ == 0 && v_ == 0) {
      if (b_ == 0) finish.begin(row_);
      finish.begin_phase(b_, sums_of(1, b_) + (row_ - done_row_) * block_o * vectors * S::kLanes);
    }
    const int end = v_ + piece_vectors_ < vectors ? v_ + piece_vectors_ : vectors;
    finish.finish(i_, i_ + 1, v_, end);
    pieces_--;
    v_ = end;
    if (v_ < vectors) return;
    v_ = 0;
    if (++i_ < block_o / 4) return;
    i_ = 0;
    if (++b_ < interleave_) return;
    b_ = 0;
    finish.end();
    row_++;
  }

  const GatherGemm& op_;
  const Split& split_;
  const TileWeight& t_;
  const int interleave_;
  const int64_t first_row_, last_row_, phase_row_, first_group_, last_group_;
  int64_t tile_;  // the next
  const int64_t last_tile_;
  int32_t *acc_, *start_;
  uint8_t* slots_;      // of copied columns
  int64_t items_ = 0;   // begun so far
  int64_t groups_ = 0;  // multiplied so far
  // The group that is being finished, and where.
  Tile* done_ = nullptr;
  int64_t done_row_ = 0, row_ = 0, pieces_ = 0;
  int b_ = 0, i_ = 0, v_ = 0, piece_vectors_ = 1, pieces_a_step_ = 0;
  Tile memory_[3];
};

void run_tile_task(const GatherGemm& op, const Split& split, int64_t first_tile, int64_t last_tile, int64_t first_row,
                   int64_t last_row, int64_t phase_row) {
  const TileWeight& t = static_cast<const TileWeight&>(*op.prepared);
  const Tiles::Scope scope(t.rows_m);
  if (t.tiles_m == 2)
    TileTask<2>(op, split, first_tile, last_tile, first_row, last_row, phase_row).run();
  else
    TileTask<1>(op, split, first_tile, last_tile, first_row, last_row, phase_row).run();
}

// loads: with those of a kernel that keeps four sums, two tiles of each operand for four products; weights from L2, columns from
// L1.
double measure_tile_peak(bool loads) {
  const Tiles::Scope scope(Tiles::kRows);
  constexpr int64_t kWeights = 256 << 10, kColumns = 16 << 10, kStep = 2 * Tiles::kBytes;
  std::vector<int8_t> memory(kWeights + kColumns + 64, 1);
  const int8_t* weights = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
  const int8_t* columns = weights + kWeights;
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  double seconds = 0;
  int64_t rounds = 0;
  while (seconds < 0.01) {
    for (int64_t i = 0; i < 1024; i++) {
      if (loads) {
        const int8_t *a = weights + i * kStep % kWeights, *b = columns + i * kStep % kColumns;
        Tiles::load<4>(b), Tiles::load<6>(a), Tiles::load<7>(a + Tiles::kBytes), Tiles::load<5>(b + Tiles::kBytes);
      }
      Tiles::dot<0, 6, 4>(), Tiles::dot<2, 7, 4>(), Tiles::dot<1, 6, 5>(), Tiles::dot<3, 7, 5>();
    }
    rounds += 1024;
    seconds = std::chrono::duration<double>(Clock::now() - start).count();
  }
  return double(rounds) * 4 * 16 * 16 * 64 / seconds / 1e9;
}

#else

std::unique_ptr<const Prepared> prepare(const GatherGemm&) { return nullptr; }
int64_t rows_in_l2(const GatherGemm& op) { return op.weight->rows; }
int64_t vertical_pairs(const GatherGemm&) { return 0; }

#endif

void run_tile(const GatherGemm& op, const Split& split, int64_t t, int64_t first_row, int64_t last_row, int64_t phase_row,
              TilePixels* tile, TileMemory* memory) {
  const int vectors = find_tile(op, split, t, phase_row, tile, memory);
  if (!op.source && is_single_pixel(op)) return run_single_pixel(op, split, *tile, vectors, first_row, last_row);
  if (op.source) return run_rows<Float32>(op, split, *tile, vectors, first_row, last_row, phase_row, memory);
  switch (op.weight->format) {
    case Format::kInt8:
      return run_rows<Int8>(op, split, *tile, vectors, first_row, last_row, phase_row, memory);
    case Format::kBFloat16:
      return run_rows<BFloat16>(op, split, *tile, vectors, first_row, last_row, phase_row, memory);
    case Format::kFloat32:
      return run_rows<Float32>(op, split, *tile, vectors, first_row, last_row, phase_row, memory);
  }
}

void run_task(const GatherGemm& op, const Split& split, int64_t task) {
  // strips of tiles; in a strip every (row group, phase row), then its tiles: output rows of two phases share cache lines
  const int64_t rest = split.row_groups * split.phase_rows, tile_groups = split.tile_groups();
  const Quotient strips = divide(task, split.strip * rest);
  const int64_t first_tile = strips.whole * split.strip, width = std::min(tile_groups - first_tile, split.strip);
  const Quotient parts = divide(strips.rest, width), groups = divide(parts.whole, split.phase_rows);
  const int64_t t = first_tile + parts.rest, phase_row = groups.rest, first_row = groups.whole * split.row_group;
  const int64_t last_row = std::min(first_row + split.row_group, op.weight->rows);
  const int64_t last_tile = std::min((t + 1) * split.tile_group, split.tiles);
#if defined(SPARSEGAN_TILES)
  if (op.prepared) return run_tile_task(op, split, t * split.tile_group, last_tile, first_row, last_row, phase_row);
#endif
  TilePixels tile;
  TileMemory memory;
  for (int64_t i = t * split.tile_group; i < last_tile; i++)
    run_tile(op, split, i, first_row, last_row, phase_row, &tile, &memory);
}

// ---- float32 tensors to lanes ------------------------------------------------------------------------------------------------

// One row of one image with all its channels, or, where the batch stands in the columns, one block of channels.
void pack_line(const LaneLayout& l, const SourceTensor& src, float inv_scale, int32_t zero, uint8_t* lanes, int64_t line) {
  const int per_lane = lane_channels(l.format), block_of_planes = block_planes(l.format);
  const bool batch = l.batch_in_cols;
  const int64_t padded_rows = l.rows * l.phases_h;
  const int64_t n = batch ? 0 : line / padded_rows, r = batch ? 0 : line % padded_rows, y = r - l.top;
  const int64_t first_plane = batch ? line * block_of_planes : 0, last_plane = batch ? first_plane + block_of_planes : l.planes;
  const int64_t cols = l.cols * l.phases_w, left = l.left, width = batch ? l.images : l.width;
  const int64_t col_stride = batch ? src.image_stride : src.col_stride;
  const bool inside = y >= 0 && y < l.height;
  const int32_t pad_word = l.format == Format::kInt8 ? int32_t(uint32_t(zero) * 0x01010101u) : 0;
  int32_t* const row = reinterpret_cast<int32_t*>(lanes) + (batch ? 0 : l.at(n, y, -left));

  for (int64_t plane = first_plane; plane < last_plane; plane++) {
    int32_t* const out = row + plane * l.plane_stride;
    auto lane = [&](int64_t c) { return l.phases_w == 1 ? c : c % l.phases_w * l.phase_stride + c / l.phases_w; };
    auto fill = [&](int64_t from, int64_t to) {
      for (; from < to; from++) out[lane(from)] = pad_word;
    };
    const int64_t channel = plane * per_lane;
    if (!inside) {
      fill(0, cols);
      continue;
    }
    fill(0, left);
    fill(left + width, cols);

    const float* x = src.data + n * src.image_stride + channel * src.channel_stride + y * src.row_stride;
    for (int64_t c = 0; c < width; c += S::kLanes) {
      const int count = width - c < S::kLanes ? int(width - c) : S::kLanes;
      auto load = [&](int i) {
        if (channel + i >= l.channels) return S::set1(0.0f);
        const float* p = x + i * src.channel_stride + c * col_stride;
        if (col_stride > INT32_MAX / S::kLanes) {  // beyond the 32-bit indices of the instruction
          alignas(64) float wide[S::kLanes] = {};
          for (int j = 0; j < count; j++) wide[j] = p[j * col_stride];
          return S::load_f(wide);
        }
        if (col_stride != 1) return S::gather(p, col_stride, count);
        return count == S::kLanes ? S::load_f(p) : S::load_partial(p, count);
      };
      S::I words;
      if (l.format == Format::kInt8) {
        auto q = [&](int i) { return simd_quantize(load(i), inv_scale); };
        words = S::pack4(q(0), q(1), q(2), q(3), zero);
      } else if (l.format == Format::kBFloat16) {
        words = simd_pack_bf16(load(0), load(1));
      } else {
        words = S::as_i(load(0));
      }
      if (l.phases_w == 1) {
        S::store_partial(out + left + c, words, count);
      } else if (l.phases_w == 2) {
        store_unzipped(words, count, out + lane(left + c), out + lane(left + c + 1));
      } else {
        alignas(64) int32_t buffer[S::kLanes];
        S::store(buffer, words);
        for (int i = 0; i < count; i++) out[lane(left + c + i)] = buffer[i];
      }
    }
  }
}

bool below(const int32_t* values, int64_t count, int32_t limit) {
  uint32_t largest = 0;  // as unsigned, so that a negative one is too large
  for (int64_t i = 0; i < count; i++) largest = uint32_t(values[i]) > largest ? uint32_t(values[i]) : largest;
  return count == 0 || largest < uint32_t(limit);
}

// ---- the limit ---------------------------------------------------------------------------------------------------------------

template <class T>
double measure_dot_peak() {
  // independent accumulators: at least latency x ports (5 x 2), and few enough for the registers
  constexpr int kChains = S::kLanes == 16 ? 20 : 10;
  typename T::Acc acc[kChains];
#pragma GCC unroll 20
  for (int a = 0; a < kChains; a++) acc[a] = T::start(0);
  alignas(64) uint8_t bytes[64] = {};
  auto x = T::load_x(bytes);
  auto w = T::load_w(bytes);
  T::hide(w);
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  double seconds = 0;
  int64_t rounds = 0;
  while (seconds < 0.01) {
    for (int i = 0; i < 4096; i++) {
#pragma GCC unroll 20
      for (int a = 0; a < kChains; a++) {
        T::hide(x);  // else equal products would be computed once
        T::dot(acc[a], x, w);
      }
    }
    rounds += 4096;
    seconds = std::chrono::duration<double>(Clock::now() - start).count();
  }
  alignas(64) int32_t sink[S::kLanes];
#pragma GCC unroll 20
  for (int a = 0; a < kChains; a++) {
    S::store(sink, T::bits(acc[a]));
    asm volatile("" : : "m"(sink));
  }
  return double(rounds) * kChains * S::kLanes * lane_channels(T::kFormat) / seconds / 1e9;
}

double dot_peak(Format format, [[maybe_unused]] bool loads) {
  switch (format) {
    case Format::kInt8:
#if defined(SPARSEGAN_TILES)
      return measure_tile_peak(loads);
#else
      return measure_dot_peak<Int8>();
#endif
    case Format::kBFloat16:
      return measure_dot_peak<BFloat16>();
    case Format::kFloat32:
      return measure_dot_peak<Float32>();
  }
  return 0;
}

constexpr Kernels kTable{SPARSEGAN_ISA, S::kLanes, prepare, make_split, run_task, pack_line, below, dot_peak};

}  // namespace

const Kernels* SPARSEGAN_KERNELS() { return &kTable; }

}  // namespace sparsegan

// y = act((x - mean) / sqrt(variance + eps) * weight + bias), mean and variance over the pixels and channels of a group of one
// image. Two passes over x, and a small kernel between them:
//
//      group_norm_sums    x ──> mean and sum of squared deviations of each channel over a run of pixels    [images, runs,
//      channels] group_norm_merge   the runs and channels of a group ──> mean, factor and offset of each channel     [images, 3,
//      channels] group_norm_apply   (x - mean) * factor + offset ──> act ──> y
//
//      x [pixels, stride]      a vector of 4..16 channels a thread; neighbouring threads take neighbouring vectors, 8 at most,
//        [vvvvvvvv........]    then the next pixel. A vector is 16 bytes of x in group_norm_sums and of the wider of x and y
//        [vvvvvvvv........]    in group_norm_apply.
//
// Every thread keeps the running mean and squared deviations of its channels (Welford); those of threads, runs and channels are
// merged by the rule of Chan, Golub and LeVeque, always in the same order: the result depends on the shape only, and a mean that
// is large beside the deviations costs no digits. A u8 enters as the whole number it is stored as: the zero point cancels in
// x - mean, the scale goes into the factor.
//
// Limits: fewer than 2^31 elements of x and of y; both 16-byte aligned, with strides of a multiple of 16 bytes; 65535 images.
#pragma once
#include "elementwise.cuh"

namespace sparsegan::cuda {

constexpr int kNormThreads = 128;
constexpr int kNormVectors = 8;  // of one pixel, in one block
constexpr int kNormLanes = 32;   // channels that a block of group_norm_merge takes at a time

// Mean of some values and the sum of their squared deviations from it.
struct alignas(8) Moments {
  float mean, squares;
};

SPARSEGAN_DEVICE void merge(Moments& a, float& count, Moments b, float b_count) {
  if (b_count == 0.0f) return;
  const float sum = count + b_count, share = b_count / sum, delta = b.mean - a.mean;
  a.mean += delta * share;
  a.squares += b.squares + delta * delta * (count * share);
  count = sum;
}

// How one kernel cuts the pixels and channels of an image.
struct NormTiles {
  int32_t vectors;  // of one pixel, in one block
  int32_t run;      // pixels of one block
  int32_t runs;
};

template <class T>
constexpr size_t norm_sums_shared() {
  return smem_piece(kNormThreads * (16 / sizeof(T)) * sizeof(Moments)) + smem_piece(kNormThreads * sizeof(float));
}

// Grid: runs, groups of tiles.vectors vectors, images. sums is [images, runs, channels].
template <class T>
__global__ void __launch_bounds__(kNormThreads) group_norm_sums_kernel(const T* __restrict__ x, Moments* __restrict__ sums,
                                                                       int pixels, int channels, int x_stride, NormTiles tiles) {
  constexpr int kVector = 16 / static_cast<int>(sizeof(T));
  SmemCarver carver;
  Moments* shared = carver.take<Moments>(kNormThreads * kVector);  // [channel of the vector][thread]
  float* shared_count = carver.take<float>(kNormThreads);
  const int thread = static_cast<int>(threadIdx.x), rows = kNormThreads / tiles.vectors;
  const int row = thread / tiles.vectors, vector = thread % tiles.vectors;  // threads with row == rows are left over
  const int first_channel = static_cast<int>(blockIdx.y) * tiles.vectors * kVector, channel = first_channel + vector * kVector;
  const int begin = static_cast<int>(blockIdx.x) * tiles.run;
  const int end = pixels - begin < tiles.run ? pixels : begin + tiles.run;

  Moments moments[kVector] = {};
  float count = 0.0f;
  if (row < rows && channel < channels) {
    const T* image = x + static_cast<int64_t>(blockIdx.z) * pixels * x_stride + channel;
#pragma unroll 1
    for (int pixel = begin + row; pixel < end; pixel += rows) {
      float v[kVector];
      unpack<T>(load_vector<Words4>(image + static_cast<int64_t>(pixel) * x_stride), v);
      count += 1.0f;
      const float share = 1.0f / count;
#pragma unroll
      for (int i = 0; i < kVector; i++) {
        const float delta = v[i] - moments[i].mean;
        moments[i].mean += delta * share;
        moments[i].squares += delta * (v[i] - moments[i].mean);
      }
    }
  }

  // Each step merges the upper rows into the lower ones.
  for (int half = kNormThreads / 2; half > 0; half /= 2) {
    if (half >= rows) continue;
    if (row >= half && row < 2 * half && row < rows) {
#pragma unroll
      for (int i = 0; i < kVector; i++) shared[i * kNormThreads + thread] = moments[i];
      shared_count[thread] = count;
    }
    __syncthreads();
    if (row < half && row + half < rows) {
      const int other = thread + half * tiles.vectors;
      const float other_count = shared_count[other], count_before = count;
#pragma unroll
      for (int i = 0; i < kVector; i++) {
        count = count_before;
        merge(moments[i], count, shared[i * kNormThreads + other], other_count);
      }
    }
    __syncthreads();
  }
  // From a vector a thread to a channel a thread; one more place a vector keeps the banks apart.
  if (row == 0) {
#pragma unroll
    for (int i = 0; i < kVector; i++) shared[vector * (kVector + 1) + i] = moments[i];
  }
  __syncthreads();
  if (thread < tiles.vectors * kVector && first_channel + thread < channels) {
    Moments* run = sums + (static_cast<int64_t>(blockIdx.z) * tiles.runs + blockIdx.x) * channels;
    run[first_channel + thread] = shared[thread / kVector * (kVector + 1) + thread % kVector];
  }
}

// Where group_norm_apply finds the coefficients of a channel in their plane of the image: its threads read four at a time, and
// neighbouring threads then read neighbouring places.
SPARSEGAN_DEVICE int norm_place(int channel, int vector_channels, int vectors) {
  const int block = vectors * vector_channels, in_block = channel % block;
  const int vector = in_block / vector_channels, i = in_block % vector_channels;
  return channel - in_block + (i / 4 * vectors + vector) * 4 + i % 4;
}

struct NormMerge {
  const Moments* sums;
  float* coefficients;  // [images, 3, places]
  const float *weight, *bias;
  int32_t pixels, channels, group_channels, places;
  int32_t vector_channels, vectors;  // of group_norm_apply
  int32_t run, runs;                 // of group_norm_sums
  float scale, eps;
};

constexpr size_t kNormMergeShared = smem_piece(kNormThreads * sizeof(Moments)) + smem_piece(kNormThreads * sizeof(float));

// Grid: groups (several of less than kNormLanes channels make one block), images. Channels from `channels` to `places` get zeros.
__global__ void __launch_bounds__(kNormThreads) group_norm_merge_kernel(const __grid_constant__ NormMerge norm) {
  SmemCarver carver;
  Moments* shared = carver.take<Moments>(kNormThreads);
  float* shared_count = carver.take<float>(kNormThreads);
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kNormLanes, row = thread / kNormLanes;
  const int groups = norm.group_channels < kNormLanes ? kNormLanes / norm.group_channels : 1;  // of a block
  const int first = static_cast<int>(blockIdx.x) * groups * norm.group_channels;
  const int channels =
      norm.channels - first < groups * norm.group_channels ? norm.channels - first : groups * norm.group_channels;

  Moments moments = {};
  float count = 0.0f;
  const Moments* sums = norm.sums + static_cast<int64_t>(blockIdx.y) * norm.runs * norm.channels + first;
  for (int channel = lane; channel < channels; channel += kNormLanes)
    for (int run = row; run < norm.runs; run += kNormThreads / kNormLanes) {
      const int pixels = norm.pixels - run * norm.run < norm.run ? norm.pixels - run * norm.run : norm.run;
      merge(moments, count, sums[static_cast<int64_t>(run) * norm.channels + channel], static_cast<float>(pixels));
    }
  shared[thread] = moments;
  shared_count[thread] = count;
  __syncthreads();
  if (row == 0) {
    for (int other = lane + kNormLanes; other < kNormThreads; other += kNormLanes)
      merge(moments, count, shared[other], shared_count[other]);
    shared[lane] = moments;
    shared_count[lane] = count;
  }
  __syncthreads();
  // The lanes of a group. The result goes behind them, in rows that are no longer read.
  Moments* group_moments = shared + kNormLanes;
  float* group_count = shared_count + kNormLanes;
  if (thread < groups) {
    const int lanes = norm.group_channels < kNormLanes ? norm.group_channels : kNormLanes;
    moments = {};
    count = 0.0f;
    for (int i = 0; i < lanes; i++) merge(moments, count, shared[thread * lanes + i], shared_count[thread * lanes + i]);
    group_moments[thread] = moments;
    group_count[thread] = count;
  }
  __syncthreads();

  float* planes = norm.coefficients + static_cast<int64_t>(blockIdx.y) * 3 * norm.places;
  const int places = first + channels == norm.channels ? norm.places - first : channels;
  for (int channel = thread; channel < places; channel += kNormThreads) {
    float mean = 0.0f, factor = 0.0f, offset = 0.0f;
    if (channel < channels) {
      const int group = channel / norm.group_channels;
      const float variance = group_moments[group].squares / group_count[group] * norm.scale * norm.scale;
      mean = group_moments[group].mean;
      factor = norm.scale / sqrtf(variance + norm.eps) * (norm.weight ? norm.weight[first + channel] : 1.0f);
      offset = norm.bias ? norm.bias[first + channel] : 0.0f;
    }
    const int place = norm_place(first + channel, norm.vector_channels, norm.vectors);
    planes[place] = mean;
    planes[norm.places + place] = factor;
    planes[2 * norm.places + place] = offset;
  }
}

struct NormApply {
  const void* x;
  void* y;
  const float* coefficients;
  int32_t pixels, channels, places;
  int32_t x_stride, y_stride;
  NormTiles tiles;
  Activation act;
  float slope;
  float y_inverse_scale;
  int32_t y_zero;
};

template <class TX, class TY>
constexpr int kNormApplyVector = 16 / static_cast<int>(sizeof(TX) > sizeof(TY) ? sizeof(TX) : sizeof(TY));

// Grid: runs, groups of tiles.vectors vectors of y_stride, images.
template <class TX, class TY>
__global__ void __launch_bounds__(kNormThreads) group_norm_apply_kernel(const __grid_constant__ NormApply norm) {
  constexpr int kVector = kNormApplyVector<TX, TY>;
  const NormTiles& tiles = norm.tiles;
  const int thread = static_cast<int>(threadIdx.x), rows = kNormThreads / tiles.vectors;
  const int row = thread / tiles.vectors, vector = thread % tiles.vectors;
  const int first_channel = static_cast<int>(blockIdx.y) * tiles.vectors * kVector, channel = first_channel + vector * kVector;
  if (row >= rows || channel >= norm.y_stride) return;
  const int begin = static_cast<int>(blockIdx.x) * tiles.run;
  const int end = norm.pixels - begin < tiles.run ? norm.pixels : begin + tiles.run;

  float mean[kVector], factor[kVector], offset[kVector];
  const float* planes = norm.coefficients + static_cast<int64_t>(blockIdx.z) * 3 * norm.places + first_channel;
#pragma unroll
  for (int i = 0; i < kVector; i += 4) {
    const float* four = planes + (i / 4 * tiles.vectors + vector) * 4;
    const Words4 means = load_vector<Words4>(four), factors = load_vector<Words4>(four + norm.places),
                 offsets = load_vector<Words4>(four + 2 * norm.places);
#pragma unroll
    for (int j = 0; j < 4; j++) {
      mean[i + j] = __uint_as_float(means.word[j]);
      factor[i + j] = __uint_as_float(factors.word[j]);
      offset[i + j] = __uint_as_float(offsets.word[j]);
    }
  }
  const TX* x = static_cast<const TX*>(norm.x) + static_cast<int64_t>(blockIdx.z) * norm.pixels * norm.x_stride + channel;
  TY* y = static_cast<TY*>(norm.y) + static_cast<int64_t>(blockIdx.z) * norm.pixels * norm.y_stride + channel;
#pragma unroll 1
  for (int pixel = begin + row; pixel < end; pixel += rows) {
    float v[kVector] = {};
    if (channel < norm.channels)
      unpack<TX>(load_vector<Vector<kVector * sizeof(TX)>>(x + static_cast<int64_t>(pixel) * norm.x_stride), v);
#pragma unroll
    for (int i = 0; i < kVector; i++) v[i] = fmaf(v[i] - mean[i], factor[i], offset[i]);
    activate(norm.act, v, norm.slope);
#pragma unroll
    for (int i = 0; i < kVector; i++) v[i] = channel + i < norm.channels ? v[i] : 0.0f;  // x holds anything there
    store_vector(y + static_cast<int64_t>(pixel) * norm.y_stride,
                 pack<TY, Vector<kVector * sizeof(TY)>>(v, norm.y_inverse_scale, norm.y_zero));
  }
}

}  // namespace sparsegan::cuda

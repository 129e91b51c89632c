// y[n, h, w, c] = round(x[n, c, h, w] * inverse_scale) + zero as u8, or x as f16 or bf16: what the network is given, of any
// strides, becomes channels_last. Channels from `channels` to y_stride are written as what stands for 0.
//
//      x: pixels along the lanes (NCHW)        tile in shared memory               y: 64 bytes of channels a pixel
//         channel 0  [pppp|pppp|....]           pixel 0 [chunk|chunk|chunk|chunk]     [pixel 0 ........|pixel 1 ........]
//         channel 1  [pppp|pppp|....]    ──>    pixel 1 [  16 bytes of channels  ] ──>  16 bytes a thread, neighbours
//      or channels along the lanes              ...     64 pixels                       next to each other
//
// A block of 128 threads makes one tile of 64 pixels x 64 bytes of channels. Pixels are counted over the whole batch, so that
// many small images fill tiles too. Both images of x are read in whole sectors: 4 neighbouring values a thread where strides and
// addresses allow it (kPixels, kChannels), else one value a thread along the axis that is closer in memory (kSingle).
//
// Two pixels share a line of 128 bytes of the tile, the 8 chunks of which are permuted by `tile_chunk`: a quarter of a warp that
// writes 8 pixels 4 apart, or 8 neighbours, or reads whole lines, meets 8 different chunks, so no bank is used twice. (kSingle
// writes single values, with conflicts; so does a y of 3 chunks a pixel when it is read back.)
//
// Limits: fewer than 2^31 elements of x and of y; y 16-byte aligned with a stride of a multiple of 16 bytes.
#pragma once
#include "elementwise.cuh"

namespace sparsegan::cuda {

constexpr int kQuantizeThreads = 128;
constexpr int kQuantizePixels = 64;
constexpr int kQuantizeChunks = 4;  // of 16 bytes, of the channels of one pixel
constexpr size_t kQuantizeShared = smem_piece(kQuantizePixels * kQuantizeChunks * 16) + smem_piece(kQuantizePixels * 8);

enum class Read { kPixels, kChannels, kSingle };

struct QuantizeArguments {
  const void* x;
  void* y;
  int64_t stride_n, stride_h, stride_w, stride_c;  // elements of x
  int32_t height, width;                           // after dimensions that lie one behind the other were merged
  int32_t pixels, channels, y_stride;
  float inverse_scale;
  int32_t zero;
};

// Where chunk `chunk` of pixel `pixel` lies in the tile, in chunks. The permutation of a line is by three bits that are bijective
// both in pixel bits 0-2 (the line has bit 0 already) and in bits 2-4.
SPARSEGAN_DEVICE int tile_chunk(int pixel, int chunk) {
  const int flip = (pixel >> 2 & 1) | ((pixel >> 3 ^ pixel >> 1) & 1) << 1 | (pixel >> 4 & 1) << 2;
  return pixel / 2 * 8 + ((pixel % 2 * 4 + chunk) ^ flip);
}

template <class TX, class TY, Read kRead>
__global__ void __launch_bounds__(kQuantizeThreads) quantize_kernel(const __grid_constant__ QuantizeArguments arguments) {
  constexpr int kChannels = kQuantizeChunks * 16 / static_cast<int>(sizeof(TY));  // of a tile
  constexpr int kQuads = kChannels / 4;
  using QuadX = Vector<4 * sizeof(TX)>;
  using QuadY = Vector<4 * sizeof(TY)>;

  SmemCarver carver;
  unsigned char* tile = carver.take<unsigned char>(kQuantizePixels * kQuantizeChunks * 16);
  int64_t* offsets = carver.take<int64_t>(kQuantizePixels);  // of the pixels in x, where threads change pixels
  const int thread = static_cast<int>(threadIdx.x);
  const int first_pixel = static_cast<int>(blockIdx.x) * kQuantizePixels;
  const int first_channel = static_cast<int>(blockIdx.y) * kChannels;
  const TX* x = static_cast<const TX*>(arguments.x) + first_channel * arguments.stride_c;
  const int channels = arguments.channels - first_channel;  // that x has from here on; may be none, or more than a tile
  const int pixels = arguments.pixels - first_pixel < kQuantizePixels ? arguments.pixels - first_pixel : kQuantizePixels;

  // Where a pixel of the tile begins in x; -1 past the last.
  const auto offset_of = [&](int in_tile) {
    const int pixel = first_pixel + in_tile, row = pixel / arguments.width, image = row / arguments.height;
    return in_tile < pixels ? image * arguments.stride_n + (row - image * arguments.height) * arguments.stride_h +
                                  (pixel - row * arguments.width) * arguments.stride_w
                            : int64_t(-1);
  };
  const auto store_quad = [&](int pixel, int quad, const float (&v)[4]) {
    unsigned char* chunk = tile + tile_chunk(pixel, quad * static_cast<int>(sizeof(QuadY)) / 16) * 16;
    store_vector(chunk + quad * sizeof(QuadY) % 16, pack<TY, QuadY>(v, arguments.inverse_scale, arguments.zero));
  };
  if constexpr (kRead == Read::kSingle) {
    const float nothing[4] = {};
    for (int i = thread; i < kQuantizePixels * kQuads; i += kQuantizeThreads) store_quad(i / kQuads, i % kQuads, nothing);
  }
  if constexpr (kRead != Read::kPixels) {
    if (thread < kQuantizePixels) offsets[thread] = offset_of(thread);
    __syncthreads();
  }

  if constexpr (kRead == Read::kPixels) {
    // A thread turns 4 channels x 4 pixels; a warp has 16 channels x 32 pixels of them.
    const int lane = lane_id(), warp = thread / 32;
    const int pixel = warp % 2 * 32 + lane % 8 * 4;
    const int64_t offset = offset_of(pixel);
#pragma unroll
    for (int i = 0; i < kQuads / 8; i++) {
      const int quad = i * 8 + warp / 2 * 4 + lane / 8;
      float v[4][4] = {};  // [channel][pixel]
#pragma unroll
      for (int c = 0; c < 4; c++)
        if (offset >= 0 && quad * 4 + c < channels)
          unpack<TX>(load_vector<QuadX>(x + offset + (quad * 4 + c) * arguments.stride_c), v[c]);
#pragma unroll
      for (int p = 0; p < 4; p++) {
        const float turned[4] = {v[0][p], v[1][p], v[2][p], v[3][p]};
        store_quad(pixel + p, quad, turned);
      }
    }
  } else if constexpr (kRead == Read::kChannels) {
#pragma unroll
    for (int i = 0; i < kQuantizePixels * kQuads / kQuantizeThreads; i++) {
      const int at = i * kQuantizeThreads + thread, pixel = at / kQuads, quad = at % kQuads;
      float v[4] = {};
      if (offsets[pixel] >= 0 && quad * 4 < channels) unpack<TX>(load_vector<QuadX>(x + offsets[pixel] + quad * 4), v);
      store_quad(pixel, quad, v);
    }
  } else {
    // Only the channels that are there are counted, so that few of them still fill the lanes.
    const int width = channels < kChannels ? channels : kChannels;
    for (int i = thread; i < pixels * width; i += kQuantizeThreads) {
      const bool along_channels = arguments.stride_c == 1;
      const int pixel = along_channels ? i / width : i % pixels, channel = along_channels ? i % width : i / pixels;
      const float v = to_float(x[offsets[pixel] + channel * arguments.stride_c]);
      unsigned char* chunk = tile + tile_chunk(pixel, channel * static_cast<int>(sizeof(TY)) / 16) * 16;
      TY* place = reinterpret_cast<TY*>(chunk) + channel % (16 / sizeof(TY));
      if constexpr (sizeof(TY) == 1)
        *place = static_cast<uint8_t>(quantize_u8(v, arguments.inverse_scale, arguments.zero));
      else
        *place = from_float<TY>(v);
    }
  }
  __syncthreads();

  const int left = (arguments.y_stride - first_channel) * static_cast<int>(sizeof(TY)) / 16;
  const int chunks = left < kQuantizeChunks ? left : kQuantizeChunks;
  TY* y = static_cast<TY*>(arguments.y) + int64_t(first_pixel) * arguments.y_stride + first_channel;
  for (int i = thread; i < pixels * chunks; i += kQuantizeThreads) {
    const int pixel = i / chunks, chunk = i % chunks;
    store_vector(y + int64_t(pixel) * arguments.y_stride + chunk * (16 / sizeof(TY)),
                 load_vector<Words4>(tile + tile_chunk(pixel, chunk) * 16));
  }
}

}  // namespace sparsegan::cuda

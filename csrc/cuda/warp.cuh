// The warp-level instructions the kernels are made of, and how a kernel is launched. Inline PTX stands in this file only. It has
// two branches with one contract: the device branch is the PTX instruction, the host branch (g++, for tests) does what the PTX
// ISA manual says of it, on the emulator tests/emulator/emu.h.
//
// Operand layouts ("Matrix fragments" in the manual). Lane l has group g = l / 4 and place t = l % 4. A row of A and a column of
// B both lie along k in memory; offsets are in bytes, so they serve s8, f16 and bf16 alike.
//
//     dense, 32 bytes along k:      a[r] = A[row g + 8 * (r & 1)] at byte 4t + 16 * (r >> 1),   r = 0..3
//     (s8: k = 32, f16: k = 16)     b[r] = B[column g]            at byte 4t + 16 * r,          r = 0..1
//     all of them                   c[r] = C[row g + 8 * (r >> 1)][column 2t + (r & 1)],        r = 0..3
//
// so ldmatrix_x4 on 16 rows of A (lanes 0-15: rows 0-15 at byte 0, lanes 16-31: at byte 16) loads a, and ldmatrix_x2 or half an
// ldmatrix_x4 on 8 columns of B (lanes 0-7 at byte 0, 8-15 at byte 16) loads b.
//
//     2:4 sparse A (s8: k = 64, f16: k = 32): A holds the 32 bytes that are kept, a[r] as above; B has 64 bytes along k, r =
//     0..3. Of every 4 values along k, 2 are kept, in ascending order; each has a 2-bit index. The indices of one row, in order
//     from the lowest bit: s8 64 bits, f16 32 bits. The lanes of group g bring, with selector 0,
//
//         s8    t = 0: row g, k 0-31     t = 1: row g + 8, k 0-31     t = 2: row g, k 32-63     t = 3: row g + 8, k 32-63
//         f16   t = 0: k 0-15, t = 1: k 16-31, each row g in the low 16 bits and row g + 8 in the high ones; t = 2, 3: not read
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define SPARSEGAN_DEVICE __device__ __forceinline__
#else
#include <bit>
#include <cmath>

#include "emu.h"
#define __global__
#define __host__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define SPARSEGAN_DEVICE inline
using emu::blockDim;
using emu::blockIdx;
using emu::dim3;
using emu::gridDim;
using emu::threadIdx;
#endif

namespace sparsegan::cuda {

struct alignas(8) Words2 {
  uint32_t word[2];
};
struct alignas(16) Words4 {
  uint32_t word[4];
};
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

constexpr unsigned kAllLanes = 0xFFFFFFFFu;

// What SmemCarver takes for a piece of so many bytes.
__host__ __device__ constexpr size_t smem_piece(size_t bytes) { return (bytes + 15) / 16 * 16; }

#if defined(__CUDACC__)

// ---- device
// ----------------------------------------------------------------------------------------------------------------------

// nullptr, or what the CUDA runtime answered. More than 48 KiB of shared memory must be asked for.
template <class... P, class... A>
const char* launch_kernel(void (*kernel)(P...), dim3 grid, dim3 threads, size_t shared_bytes, void* stream,
                          const A&... arguments) {
  cudaError_t status = cudaSuccess;
  if (shared_bytes > (48u << 10))
    status = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
  if (status == cudaSuccess) {
    kernel<<<grid, threads, shared_bytes, static_cast<cudaStream_t>(stream)>>>(static_cast<P>(arguments)...);
    status = cudaGetLastError();
  }
  return status == cudaSuccess ? nullptr : cudaGetErrorString(status);
}

extern __shared__ __align__(128) unsigned char dynamic_shared_memory[];

// Pieces of the dynamic shared memory, the first 128-byte aligned, the others 16-byte.
class SmemCarver {
 public:
  template <class T>
  SPARSEGAN_DEVICE T* take(size_t count) {
    T* piece = reinterpret_cast<T*>(dynamic_shared_memory + offset_);
    offset_ += smem_piece(count * sizeof(T));
    return piece;
  }

 private:
  size_t offset_ = 0;
};

SPARSEGAN_DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// c += A . B, A s8 [16, 32], B u8 [32, 8]
SPARSEGAN_DEVICE void mma_s8u8(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// c += A . B, A f16 [16, 16], B f16 [16, 8]
SPARSEGAN_DEVICE void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// c += A . B, A bf16 [16, 16], B bf16 [16, 8]
SPARSEGAN_DEVICE void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// c += A . B, A s8 [16, 64] of which 32 a row are kept, B u8 [64, 8]
SPARSEGAN_DEVICE void mma_sp_s8u8(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata) {
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.s32.s8.u8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, 0x0;"
      : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata));
}

// c += A . B, A f16 [16, 32] of which 16 a row are kept, B f16 [32, 8]
SPARSEGAN_DEVICE void mma_sp_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata) {
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, 0x0;"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata));
}

// c += A . B, A bf16 [16, 32] of which 16 a row are kept, B bf16 [32, 8]
SPARSEGAN_DEVICE void mma_sp_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata) {
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, 0x0;"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata));
}

// Four 8x8 matrices of 16-bit elements from shared memory: lane l points at row l % 8 (16 bytes) of matrix l / 8 and gets, of
// matrix i, the 4 bytes 4 * (l % 4) of row l / 4 in r[i].
SPARSEGAN_DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// Two of them; the pointers of lanes 16-31 are not used.
SPARSEGAN_DEVICE void ldmatrix_x2(uint32_t (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}

// Starts to copy 16 bytes from global to shared memory, past the first-level cache; zeros when !valid, src is not read then.
SPARSEGAN_DEVICE void cp_async16(void* dst, const void* src, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(dst)), "l"(__cvta_generic_to_global(src)),
               "r"(valid ? 16 : 0)
               : "memory");
}

// Closes a group of copies. What a thread waited for, others see after the next __syncthreads.
SPARSEGAN_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the kLeft youngest groups of this thread are still on their way.
template <int kLeft>
SPARSEGAN_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

SPARSEGAN_DEVICE float to_float(Half h) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h.bits));
  return f;
}
SPARSEGAN_DEVICE float to_float(BFloat16 b) { return __uint_as_float(static_cast<uint32_t>(b.bits) << 16); }

// Rounded to nearest even; a NaN stays one, what is too large becomes infinite.
template <class T>
SPARSEGAN_DEVICE T from_float(float f);
template <>
SPARSEGAN_DEVICE Half from_float<Half>(float f) {
  Half h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h.bits) : "f"(f));
  return h;
}
template <>
SPARSEGAN_DEVICE BFloat16 from_float<BFloat16>(float f) {
  BFloat16 b;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(b.bits) : "f"(f));
  return b;
}

// 4, 8 or 16 bytes at once from an address that is a multiple of them.
template <class V>
SPARSEGAN_DEVICE V load_vector(const void* p) {
  return *static_cast<const V*>(p);
}
template <class V>
SPARSEGAN_DEVICE void store_vector(void* p, V v) {
  *static_cast<V*>(p) = v;
}

#define LAUNCH(kernel, grid, block, smem_bytes, stream, ...) \
  ::sparsegan::cuda::launch_kernel(kernel, grid, block, smem_bytes, stream, __VA_ARGS__)

#else

// ---- host
// ------------------------------------------------------------------------------------------------------------------------

using emu::SmemCarver;
using Site = emu::Site;

// Always nullptr: what goes wrong throws emu::Error.
#define LAUNCH(kernel, grid, block, smem_bytes, stream, ...) \
  (static_cast<void>(stream), ::emu::launch(kernel, grid, block, smem_bytes, __VA_ARGS__), static_cast<const char*>(nullptr))

inline void __syncthreads(const Site& at = Site::current()) { emu::barrier(at); }

inline void __syncwarp(unsigned mask = kAllLanes, const Site& at = Site::current()) {
  int nothing = 0;
  emu::collective("__syncwarp", at, mask, true, &nothing, [](auto&) {});
}

// out = in of lane source(l); a lane outside the mask has no value to give.
template <class T, class F>
T shuffle(const char* name, const Site& at, unsigned mask, T value, F source) {
  struct Lane {
    T in, out;
  } mine{value, value};
  emu::collective(name, at, mask, false, &mine, [&](auto& lanes) {
    for (int l = 0; l < 32; l++) {
      if (!lanes[l]) continue;
      const Lane* from = lanes[source(l) & 31];
      if (!from)
        emu::fail(std::string(name) + " (" + emu::show(at) + "): lane " + std::to_string(l) + " reads a lane outside the mask");
      lanes[l]->out = from->in;
    }
  });
  return mine.out;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int flip, const Site& at = Site::current()) {
  return shuffle("__shfl_xor_sync", at, mask, value, [flip](int l) { return l ^ flip; });
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, const Site& at = Site::current()) {
  struct Lane {
    T in, out;
    int from;
  } mine{value, value, lane};
  emu::collective("__shfl_sync", at, mask, false, &mine, [&](auto& lanes) {
    for (Lane* me : lanes) {
      if (!me) continue;
      const Lane* from = lanes[me->from & 31];
      if (!from) emu::fail("__shfl_sync (" + emu::show(at) + "): reads a lane outside the mask");
      me->out = from->in;
    }
  });
  return mine.out;
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int down, const Site& at = Site::current()) {
  return shuffle("__shfl_down_sync", at, mask, value, [down](int l) { return l + down < 32 ? l + down : l; });
}

inline int atomicAdd(int* p, int v) { return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }
inline unsigned atomicAdd(unsigned* p, unsigned v) { return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }

inline uint32_t __float_as_uint(float f) { return std::bit_cast<uint32_t>(f); }
inline float __uint_as_float(uint32_t u) { return std::bit_cast<float>(u); }

inline float to_float(BFloat16 b) { return __uint_as_float(uint32_t(b.bits) << 16); }
inline float to_float(Half h) {
  // The bits moved to where float32 has them; its exponents count from 127 and not from 15.
  const float magnitude = __uint_as_float((h.bits & 0x7FFFu) << 13) * 0x1p112f;
  const uint32_t special = (h.bits & 0x7C00) == 0x7C00 ? 0x7F800000u : 0;
  return __uint_as_float(__float_as_uint(magnitude) | special | uint32_t(h.bits >> 15) << 31);
}

template <class T>
T from_float(float f);
template <>
inline Half from_float<Half>(float f) {
  const uint16_t sign = __float_as_uint(f) >> 31 << 15;
  const float magnitude = std::fabs(f);
  if (magnitude != magnitude) return {0x7FFF};
  if (magnitude >= 65520.0f) return {uint16_t(sign | 0x7C00)};  // rounds up past 65504
  if (magnitude == 0) return {sign};
  // Whole steps of the least bit, rounded in float arithmetic; a carry out of the mantissa runs on into the exponent, rightly.
  const int exponent = std::max(std::ilogb(magnitude), -14);
  const int steps = int(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  return {uint16_t(sign | ((exponent + 14) * 1024 + steps))};
}
template <>
inline BFloat16 from_float<BFloat16>(float f) {
  const uint32_t bits = __float_as_uint(f);
  if (f != f) return {0x7FFF};
  return {uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}

template <class V>
V load_vector(const void* p, const Site& at = Site::current()) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(V)) emu::fail("load_vector (" + emu::show(at) + "): misaligned address");
  return *static_cast<const V*>(p);
}
template <class V>
void store_vector(void* p, V v, const Site& at = Site::current()) {
  if (reinterpret_cast<uintptr_t>(p) % sizeof(V)) emu::fail("store_vector (" + emu::show(at) + "): misaligned address");
  *static_cast<V*>(p) = v;
}

// The multiplication all mma have in common: rows of A and columns of B of kK elements along k, spread over the lanes as above.
// expand(lanes, row, kept values, full row) makes the row that is multiplied of the 32 bytes kept of it.
template <class TA, class TB, int kK, class C, int kB, class Expand>
void multiply(const char* name, const Site& at, C (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[kB], uint32_t metadata,
              Expand expand) {
  struct Lane {
    C* c;
    const uint32_t *a, *b;
    uint32_t metadata;
  } mine{c, a, b, metadata};
  emu::collective(name, at, kAllLanes, false, &mine, [&](auto& lanes) {
    TA kept[16][32 / sizeof(TA)];
    TB column[8][kK];
    for (int l = 0; l < 32; l++) {
      const int g = l / 4, t = l % 4;
      for (int r = 0; r < 4; r++)
        std::memcpy(reinterpret_cast<char*>(kept[g + 8 * (r & 1)]) + 4 * t + 16 * (r >> 1), &lanes[l]->a[r], 4);
      for (int r = 0; r < kB; r++) std::memcpy(reinterpret_cast<char*>(column[g]) + 4 * t + 16 * r, &lanes[l]->b[r], 4);
    }
    C row[16][kK] = {}, col[8][kK];
    const auto number = [](auto v) {
      if constexpr (sizeof v == 2)
        return to_float(v);
      else
        return int(v);
    };
    for (int i = 0; i < 16; i++) expand(lanes, i, kept[i], row[i], number);
    for (int j = 0; j < 8; j++)
      for (int k = 0; k < kK; k++) col[j][k] = number(column[j][k]);
    for (int l = 0; l < 32; l++)
      for (int r = 0; r < 4; r++) {
        const C *x = row[l / 4 + 8 * (r >> 1)], *y = col[l % 4 * 2 + (r & 1)];
        C sum = lanes[l]->c[r];  // products of 16-bit floats are exact in float32; the order of the sums is not documented
        for (int k = 0; k < kK; k++) sum += x[k] * y[k];
        lanes[l]->c[r] = sum;
      }
  });
}

template <class TA, class TB, int kK, class C>
void multiply_dense(const char* name, const Site& at, C (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  multiply<TA, TB, kK>(name, at, c, a, b, 0, [](auto&, int, const TA* kept, C* row, auto number) {
    for (int k = 0; k < kK; k++) row[k] = number(kept[k]);
  });
}

template <class TA, class TB, int kK, class C>
void multiply_sparse(const char* name, const Site& at, C (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                     uint32_t metadata) {
  multiply<TA, TB, kK>(name, at, c, a, b, metadata, [&](auto& lanes, int i, const TA* kept, C* row, auto number) {
    const int g = i % 8, upper = i / 8;
    const auto brought = [&](int t) { return uint64_t(lanes[4 * g + t]->metadata); };
    uint64_t indices;
    if (sizeof(TA) == 1)
      indices = brought(upper) | brought(upper + 2) << 32;
    else
      indices = (brought(0) >> 16 * upper & 0xFFFF) | (brought(1) >> 16 * upper & 0xFFFF) << 16;
    for (int k = 0; k < kK / 2; k += 2) {
      const int first = indices >> 2 * k & 3, second = indices >> 2 * (k + 1) & 3;
      if (first >= second) emu::fail(std::string(name) + " (" + emu::show(at) + "): metadata that does not ascend");
      row[2 * k + first] = number(kept[k]);
      row[2 * k + second] = number(kept[k + 1]);
    }
  });
}

inline void mma_s8u8(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const Site& at = Site::current()) {
  multiply_dense<int8_t, uint8_t, 32>("mma_s8u8", at, c, a, b);
}
inline void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const Site& at = Site::current()) {
  multiply_dense<Half, Half, 16>("mma_f16", at, c, a, b);
}
inline void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const Site& at = Site::current()) {
  multiply_dense<BFloat16, BFloat16, 16>("mma_bf16", at, c, a, b);
}
inline void mma_sp_s8u8(int (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata,
                        const Site& at = Site::current()) {
  multiply_sparse<int8_t, uint8_t, 64>("mma_sp_s8u8", at, c, a, b, metadata);
}
inline void mma_sp_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata,
                       const Site& at = Site::current()) {
  multiply_sparse<Half, Half, 32>("mma_sp_f16", at, c, a, b, metadata);
}
inline void mma_sp_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t metadata,
                        const Site& at = Site::current()) {
  multiply_sparse<BFloat16, BFloat16, 32>("mma_sp_bf16", at, c, a, b, metadata);
}

// Every lane reads its own four bytes, so that the sanitizers blame the lane that reads what nobody wrote for it.
template <int kMatrices>
void load_matrices(const char* name, const Site& at, uint32_t (&r)[kMatrices], const void* row) {
  struct Lane {
    const char* row;
    const char* rows[32];
  } mine{static_cast<const char*>(row), {}};
  emu::collective(name, at, kAllLanes, false, &mine, [&](auto& lanes) {
    for (int l = 0; l < 8 * kMatrices; l++) {
      if (reinterpret_cast<uintptr_t>(lanes[l]->row) % 16)
        emu::fail(std::string(name) + " (" + emu::show(at) + "): a row is not 16-byte aligned");
      for (Lane* other : lanes) other->rows[l] = lanes[l]->row;
    }
  });
  for (int i = 0; i < kMatrices; i++) std::memcpy(&r[i], mine.rows[8 * i + emu::lane() / 4] + emu::lane() % 4 * 4, 4);
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, const Site& at = Site::current()) {
  load_matrices("ldmatrix_x4", at, r, row);
}
inline void ldmatrix_x2(uint32_t (&r)[2], const void* row, const Site& at = Site::current()) {
  load_matrices("ldmatrix_x2", at, r, row);
}

inline void cp_async16(void* dst, const void* src, bool valid, const Site& at = Site::current()) {
  emu::start_async_copy(dst, src, valid, at);
}
inline void cp_async_commit() { emu::commit_async_copies(); }
template <int kLeft>
void cp_async_wait() {
  emu::land_groups(kLeft);
}

#endif

// ---- both
// ------------------------------------------------------------------------------------------------------------------------

SPARSEGAN_DEVICE float to_float(float f) { return f; }
template <>
SPARSEGAN_DEVICE float from_float<float>(float f) {
  return f;
}

SPARSEGAN_DEVICE int lane_id() { return static_cast<int>(threadIdx.x % 32); }

}  // namespace sparsegan::cuda

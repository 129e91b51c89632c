// The source of gemm.ptx, a kernel to try the interpreter on: y[m, n] = sum over k of a[m, k] * b[n, k], with a of s8, b of u8.
// One block of 64 threads computes 32 x 32 of y; k comes in steps of 32 by cp.async, in three stages of rows 48 bytes apart.
//
//   nvcc -std=c++20 -O3 -arch=compute_80 -ptx gemm.cu
#include <cstdint>

constexpr int kTile = 32, kStep = 32, kPitch = 48, kStages = 3, kStage = 2 * kTile * kPitch;

__device__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

extern "C" __global__ void __launch_bounds__(64) gemm(const int8_t* a, const uint8_t* b, int* y, int m, int n, int k) {
  extern __shared__ __align__(128) uint8_t stages[];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int m0 = blockIdx.y * kTile, n0 = blockIdx.x * kTile, row = thread / 2, piece = thread % 2 * 16;
  const auto load = [&](int step) {
    if (step * kStep < k) {
      const uint32_t to = shared_address(stages + step % kStages * kStage + row * kPitch + piece);
      const int at = step * kStep + piece;
      const bool has_a = m0 + row < m, has_b = n0 + row < n;
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(a + (has_a ? (m0 + row) * k + at : 0)),
                   "r"(has_a ? 16 : 0));
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to + kTile * kPitch),
                   "l"(b + (has_b ? (n0 + row) * k + at : 0)), "r"(has_b ? 16 : 0));
    }
    asm volatile("cp.async.commit_group;");
  };
  int c[4][4] = {};
  for (int step = 0; step < kStages - 1; step++) load(step);
  for (int step = 0; step * kStep < k; step++) {
    asm volatile("cp.async.wait_group 1;");
    __syncthreads();
    load(step + kStages - 1);
    const uint8_t* stage = stages + step % kStages * kStage;
    uint32_t w[4], x[2][4];
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                 : "r"(shared_address(stage + (warp * 16 + lane % 16) * kPitch + lane / 16 * 16)));
    for (int i = 0; i < 2; i++)
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(x[i][0]), "=r"(x[i][1]), "=r"(x[i][2]), "=r"(x[i][3])
                   : "r"(shared_address(stage + (kTile + i * 16 + lane % 8 + lane / 16 * 8) * kPitch + lane / 8 % 2 * 16)));
    for (int i = 0; i < 4; i++)
      asm volatile(
          "mma.sync.aligned.m16n8k32.row.col.s32.s8.u8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
          : "+r"(c[i][0]), "+r"(c[i][1]), "+r"(c[i][2]), "+r"(c[i][3])
          : "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "r"(x[i / 2][i % 2 * 2]), "r"(x[i / 2][i % 2 * 2 + 1]));
  }
  for (int i = 0; i < 4; i++)
    for (int r = 0; r < 4; r++) {
      const int to_m = m0 + warp * 16 + lane / 4 + r / 2 * 8, to_n = n0 + i * 8 + lane % 4 * 2 + r % 2;
      if (to_m < m && to_n < n) y[to_m * n + to_n] = c[i][r];
    }
}

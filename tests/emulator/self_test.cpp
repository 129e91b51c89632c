// What the emulator must report: one small kernel for each fault, and the same kernels without it. And what the host branch of
// warp.cuh must compute: every mma and ldmatrix against the definitions of the operand layouts, written apart from it.
//
//   self_test         runs all; prints a line each
//   self_test NAME    runs one kernel, faults and all; for the faults that a sanitizer reports by ending the process
//
// Exit code: 0 all is as it must be, 1 not, 2 (of a single kernel) the emulator reported a fault.
#include "checks.h"
#include "warp.cuh"

namespace sparsegan::cuda {

constexpr int kFaultThreads = 64;

// out[i] = in[63 - i] through shared memory, or one of the faults on the way.
template <class Fault>
__global__ void reverse_kernel(const int* in, int* out, Fault fault) {
  SmemCarver carver;
  int* shared = carver.take<int>(kFaultThreads);
  const int i = static_cast<int>(threadIdx.x);
  fault(shared, i);
  if (i % 4 == 0) cp_async16(shared + i, in + i, true);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  out[i] = shared[kFaultThreads - 1 - i];
}

__global__ void missing_barrier_kernel(const int* in, int* out) {
  SmemCarver carver;
  int* shared = carver.take<int>(kFaultThreads);
  const int i = static_cast<int>(threadIdx.x);
  shared[i] = in[i];
  out[i] = shared[kFaultThreads - 1 - i];
}

__global__ void missing_wait_kernel(const int* in, int* out) {
  SmemCarver carver;
  int* shared = carver.take<int>(kFaultThreads);
  const int i = static_cast<int>(threadIdx.x);
  if (i % 4 == 0) cp_async16(shared + i, in + i, true);
  cp_async_commit();
  __syncthreads();
  out[i] = shared[kFaultThreads - 1 - i];
}

// Two stages in turn; without the second barrier the next copy may land in a stage that is still read.
template <bool kBarrier>
__global__ void two_stages_kernel(const int* in, int* out, int rounds) {
  SmemCarver carver;
  int* shared = carver.take<int>(2 * kFaultThreads);
  const int i = static_cast<int>(threadIdx.x);
  const auto load = [&](int round) {
    if (i % 4 == 0 && round < rounds) cp_async16(shared + round % 2 * kFaultThreads + i, in + round * kFaultThreads + i, true);
    cp_async_commit();
  };
  load(0);
  for (int round = 0; round < rounds; round++) {
    load(round + 1);
    cp_async_wait<1>();
    __syncthreads();
    out[round * kFaultThreads + i] = shared[round % 2 * kFaultThreads + kFaultThreads - 1 - i];
    if constexpr (kBarrier) __syncthreads();
  }
}

// Writes one element past the end of its piece: into the next one on a GPU.
__global__ void past_the_end_kernel(const int* in, int* out) {
  SmemCarver carver;
  int* first = carver.take<int>(kFaultThreads);
  int* second = carver.take<int>(kFaultThreads);
  const int i = static_cast<int>(threadIdx.x);
  first[i + 1] = in[i];
  __syncthreads();
  second[i] = 0;
  out[i] = first[i];
}

__global__ void global_past_the_end_kernel(int* out) { out[threadIdx.x + 1] = 1; }

__global__ void uninitialised_kernel(const int* in, int* out) {
  SmemCarver carver;
  int* shared = carver.take<int>(kFaultThreads);
  const int i = static_cast<int>(threadIdx.x);
  if (i != 5) shared[i] = in[i];
  __syncthreads();
  out[i] = shared[i];
}

__global__ void too_much_shared_kernel(int* out) {
  SmemCarver carver;
  out[threadIdx.x] = carver.take<int>(2 * kFaultThreads)[0];
}

__global__ void different_pieces_kernel(int* out) {
  SmemCarver carver;
  out[threadIdx.x] = *carver.take<int>(1 + threadIdx.x % 2);
}

__global__ void deadlock_kernel(int* out) {
  if (threadIdx.x < 32) __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void divergent_barrier_kernel(int* out) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void divergent_warp_kernel(int* out) {
  if (threadIdx.x % 2)
    out[threadIdx.x] = __shfl_xor_sync(kAllLanes, 1, 2);
  else
    __syncwarp();
}

__global__ void lane_missing_kernel(int* out) {
  if (threadIdx.x % 32 != 7) out[threadIdx.x] = __shfl_xor_sync(kAllLanes, 1, 2);
}

__global__ void not_in_mask_kernel(int* out) { out[threadIdx.x] = __shfl_xor_sync(0xFFFFu, 1, 1); }

__global__ void outside_mask_kernel(int* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_xor_sync(0xFFFFu, 1, 16);
}

__global__ void halves_kernel(int* out) {  // no fault: two masks of one warp at a time
  const unsigned mask = threadIdx.x % 32 < 16 ? 0xFFFFu : 0xFFFF0000u;
  out[threadIdx.x] = __shfl_xor_sync(mask, static_cast<int>(threadIdx.x), 3);
}

__global__ void misaligned_copy_kernel(const int* in, int* out) {
  SmemCarver carver;
  int* shared = carver.take<int>(kFaultThreads);
  cp_async16(shared, in + 1, true);
  cp_async_commit();
  cp_async_wait<0>();
  out[threadIdx.x] = shared[0];
}

__global__ void misaligned_vector_kernel(const int* in, int* out) {
  out[threadIdx.x] = static_cast<int>(load_vector<Words2>(in + 1).word[0]);
}

__global__ void misaligned_matrix_kernel(int* out) {
  SmemCarver carver;
  unsigned char* shared = carver.take<unsigned char>(1024);
  uint32_t r[4];
  ldmatrix_x4(r, shared + lane_id() * 24);
  out[threadIdx.x] = static_cast<int>(r[0]);
}

__global__ void unordered_metadata_kernel(int* out) {
  int c[4] = {};
  const uint32_t a[4] = {}, b[4] = {};
  mma_sp_s8u8(c, a, b, 0x44444441);
  out[threadIdx.x] = c[0];
}

__global__ void blocks_race_kernel(int* out) {
  if (threadIdx.x == 0) out[0] = out[0] + 1;
}

__global__ void blocks_add_kernel(int* out) {  // no fault
  if (threadIdx.x == 0) atomicAdd(out, 1);
}

// A shuffle does not order memory, __syncwarp does.
template <bool kOrdered>
__global__ void warp_exchange_kernel(int* out) {
  SmemCarver carver;
  int* shared = carver.take<int>(kFaultThreads);
  const int i = static_cast<int>(threadIdx.x);
  shared[i] = i;
  if constexpr (kOrdered)
    __syncwarp();
  else
    __shfl_xor_sync(kAllLanes, i, 1);
  out[i] = shared[i ^ 1];
}

}  // namespace sparsegan::cuda

namespace checks {
namespace {

struct Case {
  const char* name;
  std::function<void(const int* in, int* out)> run;
  const char* fault;           // words of the report; nullptr: runs to its end
  const char* sanitizer = "";  // "address" or "thread": what ends the process, beside or instead of a report
  bool right = true;           // runs to its end with out[i] = in[63 - i], or whatever `run` compares itself
};

void run(const char* answer) { expect_launched(answer); }
constexpr auto kPlain = [](int*, int) {};
dim3 threads() { return dim3(kFaultThreads); }
constexpr size_t kShared = kFaultThreads * sizeof(int);

const Case kCases[] = {
    {"reverse",
     [](const int* in, int* out) {
       run(LAUNCH((reverse_kernel<decltype(kPlain)>), dim3(1), threads(), kShared, nullptr, in, out, kPlain));
     },
     nullptr},
    {"missing_barrier",
     [](const int* in, int* out) { run(LAUNCH(missing_barrier_kernel, dim3(1), threads(), kShared, nullptr, in, out)); }, nullptr,
     "thread", false},
    {"missing_wait",
     [](const int* in, int* out) { run(LAUNCH(missing_wait_kernel, dim3(1), threads(), kShared, nullptr, in, out)); }, nullptr,
     "thread", false},
    {"two_stages",
     [](const int* in, int* out) {
       run(LAUNCH((two_stages_kernel<true>), dim3(1), threads(), 2 * kShared, nullptr, in, out, 4));
     },
     nullptr},
    {"two_stages_unguarded",
     [](const int* in, int* out) {
       run(LAUNCH((two_stages_kernel<false>), dim3(1), threads(), 2 * kShared, nullptr, in, out, 4));
     },
     nullptr, "thread", false},
    {"past_the_end",
     [](const int* in, int* out) { run(LAUNCH(past_the_end_kernel, dim3(1), threads(), 2 * kShared, nullptr, in, out)); },
     "past the end of piece 0", "address"},
    {"global_past_the_end",
     [](const int*, int* out) {
       run(LAUNCH(global_past_the_end_kernel, dim3(1), threads(), 0, nullptr, out + 3 * kFaultThreads));
     },
     nullptr, "address", false},
    {"uninitialised",
     [](const int* in, int* out) { run(LAUNCH(uninitialised_kernel, dim3(1), threads(), kShared, nullptr, in, out)); }, nullptr,
     "", false},
    {"too_much_shared",
     [](const int*, int* out) { run(LAUNCH(too_much_shared_kernel, dim3(1), threads(), kShared, nullptr, out)); },
     "512 bytes taken, 256 launched"},
    {"different_pieces",
     [](const int*, int* out) { run(LAUNCH(different_pieces_kernel, dim3(1), threads(), kShared, nullptr, out)); },
     "threads take different pieces"},
    {"deadlock", [](const int*, int* out) { run(LAUNCH(deadlock_kernel, dim3(1), threads(), 0, nullptr, out)); },
     "deadlock: threads 0-31 in __syncthreads (self_test.cpp:"},
    {"divergent_barrier",
     [](const int*, int* out) { run(LAUNCH(divergent_barrier_kernel, dim3(1), threads(), 0, nullptr, out)); },
     "divergent barrier: threads 0-31 in __syncthreads"},
    {"divergent_warp", [](const int*, int* out) { run(LAUNCH(divergent_warp_kernel, dim3(1), threads(), 0, nullptr, out)); },
     "divergent warp: lane "},
    {"lane_missing", [](const int*, int* out) { run(LAUNCH(lane_missing_kernel, dim3(1), threads(), 0, nullptr, out)); },
     "deadlock: threads 0-6 in __shfl_xor_sync"},
    {"not_in_mask", [](const int*, int* out) { run(LAUNCH(not_in_mask_kernel, dim3(1), threads(), 0, nullptr, out)); },
     "is not in its own mask"},
    {"outside_mask", [](const int*, int* out) { run(LAUNCH(outside_mask_kernel, dim3(1), threads(), 0, nullptr, out)); },
     "reads a lane outside the mask"},
    {"misaligned_copy",
     [](const int* in, int* out) { run(LAUNCH(misaligned_copy_kernel, dim3(1), threads(), kShared, nullptr, in, out)); },
     "the source is not 16-byte aligned"},
    {"misaligned_vector",
     [](const int* in, int* out) { run(LAUNCH(misaligned_vector_kernel, dim3(1), threads(), 0, nullptr, in, out)); },
     "load_vector (self_test.cpp:"},
    {"misaligned_matrix",
     [](const int*, int* out) { run(LAUNCH(misaligned_matrix_kernel, dim3(1), threads(), 1024, nullptr, out)); },
     "ldmatrix_x4 (self_test.cpp:"},
    {"unordered_metadata",
     [](const int*, int* out) { run(LAUNCH(unordered_metadata_kernel, dim3(1), threads(), 0, nullptr, out)); },
     "metadata that does not ascend"},
    {"blocks_race", [](const int*, int* out) { run(LAUNCH(blocks_race_kernel, dim3(4), threads(), 0, nullptr, out)); }, nullptr,
     "thread", false},
    {"warp_exchange_unordered",
     [](const int*, int* out) { run(LAUNCH((warp_exchange_kernel<false>), dim3(1), threads(), kShared, nullptr, out)); }, nullptr,
     "thread", false},
    {"no_threads", [](const int*, int* out) { run(LAUNCH(blocks_add_kernel, dim3(1), dim3(0), 0, nullptr, out)); },
     "blocks of 0 threads"},
    {"large_grid", [](const int*, int* out) { run(LAUNCH(blocks_add_kernel, dim3(1, 65536), threads(), 0, nullptr, out)); },
     "a grid that CUDA refuses"},
    {"large_shared",
     [](const int*, int* out) { run(LAUNCH(blocks_add_kernel, dim3(1), threads(), size_t(100) << 10, nullptr, out)); },
     "102400 bytes of shared memory, at most 101376"},
};

// in, out: 4 x 64 numbers. Returns whether out is in with every 64 reversed.
bool run_case(const Case& c, uint64_t seed, bool eager, bool interleave) {
  Memory in(4 * kShared), out(4 * kShared);
  for (int i = 0; i < 4 * kFaultThreads; i++) in.as<int>()[i] = 1000 + i;
  emu::options.seed = seed;
  emu::options.eager_copies = eager;
  emu::options.interleave = interleave;
  c.run(in.as<int>(), out.as<int>());
  out.check("out");
  const int rounds = std::strncmp(c.name, "two_stages", 10) ? 1 : 4;
  for (int i = 0; i < rounds * kFaultThreads; i++)
    if (out.as<int>()[i] != in.as<int>()[i / kFaultThreads * kFaultThreads + kFaultThreads - 1 - i % kFaultThreads]) return false;
  return true;
}

#if defined(__SANITIZE_ADDRESS__)
constexpr const char* kSanitizer = "address";
#elif defined(__SANITIZE_THREAD__)
constexpr const char* kSanitizer = "thread";
#else
constexpr const char* kSanitizer = "none";
#endif

// Tries a case under several orders; what is wrong with what the emulator said of it, or an empty text.
std::string judge(const Case& c) {
  bool ever_wrong = false;
  for (int i = 0; i < 8; i++) {
    std::string said;
    try {
      if (!run_case(c, uint64_t(i), i / 2 % 2, i / 4)) ever_wrong = true;
    } catch (const emu::Error& error) {
      said = error.what();
    } catch (const Wrong& wrong) {
      ever_wrong = true;
    }
    if (c.fault && said.find(c.fault) == std::string::npos) return "wanted '" + std::string(c.fault) + "', got '" + said + "'";
    if (!c.fault && !said.empty()) return "wanted no report, got '" + said + "'";
  }
  if (!c.fault && c.right && ever_wrong) return "a wrong result without a fault";
  // A race between blocks, or between lanes, that a run on one thread cannot lose is for the thread sanitizer alone.
  const bool invisible = !std::strcmp(c.name, "blocks_race") || !std::strcmp(c.name, "warp_exchange_unordered");
  if (!c.fault && !c.right && !ever_wrong && !invisible) return "no order of execution showed the fault";
  return "";
}

// ---- what the instructions compute
// -----------------------------------------------------------------------------------------------

__global__ void mma_kernel(const uint32_t* a, const uint32_t* b, const uint32_t* metadata, int which, uint32_t* c) {
  const int l = lane_id();
  uint32_t wide[4], all[4], half[2];
  for (int r = 0; r < 4; r++) wide[r] = a[l * 4 + r], all[r] = b[l * 4 + r];
  half[0] = all[0], half[1] = all[1];
  int sums[4];
  float float_sums[4];
  for (int r = 0; r < 4; r++) sums[r] = r + 1, float_sums[r] = float(r + 1);
  switch (which) {
    case 0:
      mma_s8u8(sums, wide, half);
      break;
    case 1:
      mma_f16(float_sums, wide, half);
      break;
    case 2:
      mma_bf16(float_sums, wide, half);
      break;
    case 3:
      mma_sp_s8u8(sums, wide, all, metadata[l]);
      break;
    case 4:
      mma_sp_f16(float_sums, wide, all, metadata[l]);
      break;
    default:
      mma_sp_bf16(float_sums, wide, all, metadata[l]);
      break;
  }
  for (int r = 0; r < 4; r++) c[l * 4 + r] = which % 3 ? __float_as_uint(float_sums[r]) : uint32_t(sums[r]);
}

// The tables of the PTX manual, element by element: where element i of the fragment of a lane lies in its matrix.
void check_mma(int which, Random& random) {
  const bool sparse = which >= 3, bytes = which % 3 == 0;
  const Type type = which % 3 == 0 ? Type::kUint8 : which % 3 == 1 ? Type::kFloat16 : Type::kBFloat16;
  const int per_register = bytes ? 4 : 2, kept_k = bytes ? 32 : 16, k = sparse ? 2 * kept_k : kept_k;
  std::vector<float> a(16 * k, 0.0f), b(k * 8), kept(16 * kept_k);
  std::vector<int> index(16 * kept_k);
  for (int i = 0; i < 16; i++)
    for (int j = 0; j < kept_k; j++) {
      const float v = float(between(random, bytes ? -128 : -16, bytes ? 127 : 16));
      kept[i * kept_k + j] = v;
      if (j % 2 == 0)
        index[i * kept_k + j] = between(random, 0, 2);
      else
        index[i * kept_k + j] = between(random, index[i * kept_k + j - 1] + 1, 3);
      a[i * k + (sparse ? j / 2 * 4 + index[i * kept_k + j] : j)] = v;
    }
  for (float& v : b) v = float(between(random, bytes ? 0 : -16, bytes ? 255 : 16));

  Memory a_registers(32 * 16), b_registers(32 * 16), metadata(32 * 4), c_registers(32 * 16);
  for (int l = 0; l < 32; l++) {
    const int group = l / 4, in_group = l % 4;
    for (int i = 0; i < 4 * per_register; i++) {
      // A: row is the group for the registers 0 and 2, 8 more for 1 and 3; columns go on in registers 2 and 3.
      const int in_register = i % per_register, row = group + (i / per_register % 2 ? 8 : 0);
      const int column = in_group * per_register + in_register + (i / per_register >= 2 ? 4 * per_register : 0);
      const int64_t place = l * 4 * per_register + i;
      if (bytes)
        a_registers.as<int8_t>()[place] = int8_t(kept[row * kept_k + column]);
      else
        write(type, a_registers.data(), place, kept[row * kept_k + column]);
      // B: column is the group, rows go on by 4 registers' worth of the four lanes.
      const int b_row = in_group * per_register + in_register + i / per_register * 4 * per_register;
      write(type, b_registers.data(), place, b_row < k ? b[b_row * 8 + group] : 0.0f);
    }
    uint32_t word = 0;
    for (int i = 0; i < 16; i++) {
      int row, value;
      if (bytes)
        row = group + (in_group % 2 ? 8 : 0), value = (in_group / 2) * 16 + i;
      else
        row = group + (i >= 8 ? 8 : 0), value = in_group % 2 * 8 + i % 8;
      word |= uint32_t(index[row * kept_k + value]) << 2 * i;
    }
    metadata.as<uint32_t>()[l] = bytes || in_group < 2 ? word : 0;  // f16: lanes 2 and 3 are not asked
  }
  const uint32_t *pa = a_registers.as<uint32_t>(), *pb = b_registers.as<uint32_t>(), *pm = metadata.as<uint32_t>();
  run(LAUNCH(mma_kernel, dim3(1), dim3(32), 0, nullptr, pa, pb, pm, which, c_registers.as<uint32_t>()));
  for (int l = 0; l < 32; l++)
    for (int i = 0; i < 4; i++) {
      const int row = l / 4 + (i >= 2 ? 8 : 0), column = l % 4 * 2 + i % 2;
      double sum = i + 1;
      for (int j = 0; j < k; j++) sum += double(a[row * k + j]) * double(b[j * 8 + column]);
      const double got = bytes ? double(c_registers.as<int>()[l * 4 + i]) : double(c_registers.as<float>()[l * 4 + i]);
      if (got != sum)
        throw Wrong("element " + std::to_string(i) + " of lane " + std::to_string(l) + ": got " + std::to_string(got) +
                    ", wanted " + std::to_string(sum));
    }
}

__global__ void load_matrix_kernel(const unsigned char* in, uint32_t* out) {
  SmemCarver carver;
  unsigned char* shared = carver.take<unsigned char>(512);
  const int l = lane_id();
  cp_async16(shared + l * 16, in + l * 16, true);
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();
  uint32_t four[4], two[2];
  ldmatrix_x4(four, shared + (31 - l) * 16);  // rows in reverse
  ldmatrix_x2(two, shared + (l < 16 ? 31 - l : 0) * 16);
  for (int i = 0; i < 4; i++) out[l * 6 + i] = four[i];
  out[l * 6 + 4] = two[0], out[l * 6 + 5] = two[1];
}

void check_load_matrix(Random& random) {
  Memory in(512), out(32 * 6 * 4);
  for (size_t i = 0; i < 512; i++) in.data()[i] = static_cast<unsigned char>(random());
  const unsigned char* from = in.data();
  run(LAUNCH(load_matrix_kernel, dim3(1), dim3(32), 512, nullptr, from, out.as<uint32_t>()));
  for (int l = 0; l < 32; l++)
    for (int i = 0; i < 6; i++) {
      const int matrix = i % 4, row_lane = matrix * 8 + l / 4, row = 31 - row_lane;
      uint32_t wanted;
      std::memcpy(&wanted, in.data() + row * 16 + l % 4 * 4, 4);
      if (out.as<uint32_t>()[l * 6 + i] != wanted) throw Wrong("register " + std::to_string(i) + " of lane " + std::to_string(l));
    }
}

// Every f16, and many floats, against the compiler's own conversion.
void check_conversions(Random& random) {
  for (uint32_t i = 0; i < 65536; i++) {
    const float f = to_float(Half{uint16_t(i)}), wanted = of_half(uint16_t(i));
    if (std::memcmp(&f, &wanted, 4) && !(std::isnan(f) && std::isnan(wanted)))
      throw Wrong("to_float of f16 " + std::to_string(i));
  }
  for (int i = 0; i < 200000; i++) {
    uint32_t bits = uint32_t(random());
    if (i % 2) bits = (bits & 0x807FFFFF) | uint32_t(between(random, 100, 145)) << 23;  // about the range of f16
    if (i % 5 == 0) bits &= 0xFFFFF000;                                                 // ties
    const float f = __uint_as_float(bits);
    if (std::isnan(f)) {
      if (!std::isnan(to_float(from_float<Half>(f))) || !std::isnan(to_float(from_float<BFloat16>(f))))
        throw Wrong("a NaN was lost");
      continue;
    }
    if (from_float<Half>(f).bits != to_half(f)) throw Wrong("to f16: " + std::to_string(f));
    if (from_float<BFloat16>(f).bits != to_bfloat(f)) throw Wrong("to bf16: " + std::to_string(f));
  }
}

// Launches without a fault that the cases above do not have.
void check_rest() {
  Memory out(kShared);
  std::memset(out.data(), 0, out.size());
  run(LAUNCH(blocks_add_kernel, dim3(3, 2, 2), threads(), 0, nullptr, out.as<int>()));
  if (out.as<int>()[0] != 12) throw Wrong("atomicAdd over 12 blocks");
  run(LAUNCH(halves_kernel, dim3(1), threads(), 0, nullptr, out.as<int>()));
  for (int i = 0; i < kFaultThreads; i++)
    if (out.as<int>()[i] != (i ^ 3)) throw Wrong("shuffles of two halves");
  run(LAUNCH((warp_exchange_kernel<true>), dim3(1), threads(), kShared, nullptr, out.as<int>()));
  for (int i = 0; i < kFaultThreads; i++)
    if (out.as<int>()[i] != (i ^ 1)) throw Wrong("exchange by __syncwarp");
}

}  // namespace
}  // namespace checks

using namespace checks;

int main(int count, char** arguments) {
  if (count > 1) {
    for (const Case& c : kCases)
      if (!std::strcmp(c.name, arguments[1])) {
        try {
          const bool lazy = run_case(c, 1, false, true), eager = run_case(c, 1, true, true);
          std::printf("%s\n", lazy && eager ? "right" : "wrong");
          return 0;
        } catch (const std::exception& error) {
          std::printf("%s\n", error.what());
          return 2;
        }
      }
    std::printf("no kernel '%s'\n", arguments[1]);
    return 1;
  }
  int failures = 0;
  const auto report = [&](const std::string& name, const std::string& complaint) {
    std::printf("%s %s%s%s\n", complaint.empty() ? "ok" : "WRONG", name.c_str(), complaint.empty() ? "" : ": ",
                complaint.c_str());
    failures += !complaint.empty();
  };
  for (const Case& c : kCases)
    if (std::strcmp(c.sanitizer, kSanitizer)) report(c.name, judge(c));  // the others end the process
  Random random(4);
  const auto check = [&](const char* name, const std::function<void()>& run) {
    try {
      run();
      report(name, "");
    } catch (const std::exception& error) {
      report(name, error.what());
    }
  };
  const char* const names[] = {"mma_s8u8", "mma_f16", "mma_bf16", "mma_sp_s8u8", "mma_sp_f16", "mma_sp_bf16"};
  for (int which = 0; which < 6; which++)
    check(names[which], [&] {
      for (int i = 0; i < 5; i++) check_mma(which, random);
    });
  check("ldmatrix", [&] { check_load_matrix(random); });
  check("conversions", [&] { check_conversions(random); });
  check("rest", check_rest);
  return failures ? 1 : 0;
}

// A program of sparsegan/ops/program.py, which says what slots, steps and stores are: planned once for each shape of the inputs,
// then run over one block of memory that the slots share. Torch-free.
#pragma once
#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "gather_gemm.h"
#include "team.h"

namespace sparsegan {

// Runs body(0) .. body(workers - 1), at the same time where it can; body(0) does not wait for any other to end.
struct Parallel {
  int threads = 1;
  void (*run)(int64_t workers, Body body) = nullptr;
};

enum class Padding { kZeros, kReflect, kReplicate };

struct SlotSpec {
  int64_t channels = 0;
  Format format = Format::kFloat32;
  double scale = 1;
  int32_t zero = 0;
  Padding padding = Padding::kZeros;
};

// References: index >= 0 is a slot, ~k an input (or, of a store, an output).
struct StoreSpec {
  int64_t slot = 0, channel = 0;
  const float* scale = nullptr;  // [channels of the step]; nullptr: no affine
  const float* bias = nullptr;
  Activation activation = Activation::kNone;
  float slope = 0;
  int64_t modulation = kNoInput;  // index of an input
  static constexpr int64_t kNoInput = -1;
};

struct StepSpec {
  bool pointwise = false;
  int64_t x = 0;
  Layer layer;  // of a gather-GEMM; pointwise: nothing
  int64_t view[3] = {0, 0, 0};
  int upsample = 1, shuffle = 1;
  int64_t norm_groups = 0;  // 0: no normalisation
  double norm_eps = 0;
  const float* norm_scale = nullptr;  // [channels] or nullptr
  const float* norm_bias = nullptr;
  int64_t demodulation = StoreSpec::kNoInput;
  Activation activation = Activation::kNone, post_activation = Activation::kNone;
  float slope = 0, post_slope = 0;
  bool has_residual = false;
  int64_t residual = 0;
  int residual_upsample = 1;
  bool stats = false, prescaled = false;
  int64_t affine_channels = 0;  // length of the stores' arrays, where there are any
  std::vector<StoreSpec> stores;
};

struct ProgramSpec {
  std::vector<SlotSpec> slots;
  std::vector<StepSpec> steps;
  int64_t inputs = 0, outputs = 0;
  bool prepare = true;  // weights may be laid out anew for the instruction set, which pays when a plan is used often
};

// float32 [n, c, h, w] with strides in elements; h = w = 1 for rows [n, c].
struct InputTensor {
  const float* data = nullptr;
  int64_t n = 0, c = 0, h = 1, w = 1;
  int64_t stride_n = 0, stride_c = 0, stride_h = 0, stride_w = 0;
};

struct OutputShape {
  int64_t n = 0, c = 0, h = 0, w = 0;
};

struct ProgramPlan;

class Program {
 public:
  // What the spec points to must live as long as the program. Throws std::invalid_argument for a spec that does not fit together.
  explicit Program(ProgramSpec spec);
  ~Program();

  // Plans for the shapes of these inputs, unless that was done before. Throws std::invalid_argument for inputs that do not fit.
  std::shared_ptr<const ProgramPlan> plan(const std::vector<InputTensor>& inputs, int threads);
  static const std::vector<OutputShape>& output_shapes(const ProgramPlan& plan);
  // Bytes of packed activations at their peak; of all of them where they are so few that they share no memory.
  static int64_t bytes(const ProgramPlan& plan);

  // outputs: contiguous float32 of output_shapes. Safe to call from several threads at once. The first run of a plan takes memory
  // and may throw std::bad_alloc; runs after it take none, except one for each more that runs at the same time.
  void run(const ProgramPlan& plan, const std::vector<InputTensor>& inputs, const std::vector<float*>& outputs,
           const Parallel& parallel);

 private:
  struct Free {
    void operator()(uint8_t* p) const;
  };
  using Memory = std::unique_ptr<uint8_t, Free>;
  struct Arena {
    Memory memory;
    int64_t size = 0;
  };
  // The epilogue's arrays by packed row.
  struct StepRows {
    PackedWeight weight;  // of a pointwise step: its rows only
    std::vector<int32_t> row_channels;
    std::vector<float> scale, bias;
    std::vector<std::vector<float>> store_scale, store_bias;
  };

  Arena take_arena(int64_t bytes);
  void give_back(Arena arena);
  std::shared_ptr<const ProgramPlan> make_program_plan(const std::vector<InputTensor>& inputs, int threads);
  void run_step(const ProgramPlan& plan, size_t index, const std::vector<InputTensor>& inputs, const std::vector<float*>& outputs,
                uint8_t* memory, Team* team);

  ProgramSpec spec_;
  std::vector<StepRows> rows_;
  std::mutex mutex_;
  std::map<std::vector<int64_t>, std::shared_ptr<const ProgramPlan>> plans_;
  std::vector<Arena> arenas_;
};

}  // namespace sparsegan

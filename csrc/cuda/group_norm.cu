// Checks a call of group normalisation, cuts it into blocks, and launches its three kernels; see group_norm.cuh.
#include "group_norm.cuh"

namespace sparsegan::cuda {
namespace {

constexpr int64_t kLimit = int64_t(1) << 31;
// Blocks that fill every GPU supported several times over.
constexpr int64_t kEnoughBlocks = 1024;
// Pixels of a block at least. In large maps what blocks read and write besides x and y, which is as much for any run, stays below
// a tenth of them; in small ones more blocks that wait for memory at the same time count for more than what they move.
constexpr int64_t kLeastRun = 256, kLeastSmallRun = 64, kSmallMap = 1024;
// Pixels of a block at most, so that a float counts them.
constexpr int64_t kMostRun = int64_t(1) << 20;

int64_t bytes_of(Type type) { return type == Type::kUint8 ? 1 : type == Type::kFloat32 ? 4 : 2; }

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What is wrong with the sizes, or nullptr.
const char* refuse(const GroupNorm& call) {
  if (call.batch < 0 || call.channels < 1 || call.height < 1 || call.width < 1)
    return "group_norm: sizes of x must be positive (an empty batch is allowed)";
  if (call.batch > 65535) return "group_norm: at most 65535 images";
  if (call.groups < 1 || call.channels % call.groups) return "group_norm: groups must divide the channels";
  const int64_t x_bytes = bytes_of(call.x_type), y_bytes = bytes_of(call.y_type);
  if (call.x_stride < call.channels || call.x_stride * x_bytes % 16)
    return "group_norm: x_stride must hold the channels and be a multiple of 16 bytes";
  if (call.y_stride < call.channels || call.y_stride * y_bytes % 16)
    return "group_norm: y_stride must hold the channels and be a multiple of 16 bytes";
  if (call.height >= kLimit || call.width >= kLimit || call.height * call.width >= kLimit || call.x_stride >= kLimit ||
      call.y_stride >= kLimit)
    return "group_norm: x and y must have fewer than 2^31 elements";
  const int64_t pixels = call.height * call.width, stride = call.x_stride > call.y_stride ? call.x_stride : call.y_stride;
  if (call.batch && pixels >= divide_up(kLimit, call.batch * stride))
    return "group_norm: x and y must have fewer than 2^31 elements";
  return nullptr;
}

// `vectors` is of one pixel. Blocks that the channels and images make are not made again by cutting the pixels.
NormTiles tiles_of(const GroupNorm& call, int64_t vectors) {
  const int64_t pixels = call.height * call.width, blocks = divide_up(vectors, kNormVectors) * (call.batch ? call.batch : 1);
  const int64_t wanted = divide_up(pixels, divide_up(kEnoughBlocks, blocks));
  const int64_t least = pixels < kSmallMap ? kLeastSmallRun : kLeastRun;
  const int64_t run = wanted < least ? least : wanted > kMostRun ? kMostRun : wanted;
  return {int32_t(vectors < kNormVectors ? vectors : kNormVectors), int32_t(run), int32_t(divide_up(pixels, run))};
}

struct Plan {
  NormTiles sums, apply;
  int64_t sums_blocks, apply_blocks;  // along the channels
  int64_t vector_channels;            // of group_norm_apply
  int64_t places;                     // channels of one plane of coefficients
  int64_t sums_bytes, coefficient_bytes;
};

Plan plan_of(const GroupNorm& call) {
  const int64_t x_bytes = bytes_of(call.x_type), y_bytes = bytes_of(call.y_type);
  Plan plan;
  const int64_t sums_vectors = divide_up(call.channels * x_bytes, 16);
  plan.sums = tiles_of(call, sums_vectors);
  plan.sums_blocks = divide_up(sums_vectors, plan.sums.vectors);
  plan.vector_channels = 16 / (x_bytes > y_bytes ? x_bytes : y_bytes);
  const int64_t apply_vectors = call.y_stride / plan.vector_channels;
  plan.apply = tiles_of(call, apply_vectors);
  plan.apply_blocks = divide_up(apply_vectors, plan.apply.vectors);
  plan.places = plan.apply_blocks * plan.apply.vectors * plan.vector_channels;
  plan.sums_bytes = divide_up(call.batch * plan.sums.runs * call.channels * int64_t(sizeof(Moments)), 16) * 16;
  plan.coefficient_bytes = call.batch * 3 * plan.places * int64_t(sizeof(float));
  return plan;
}

template <class TX>
const char* launch_sums(const GroupNorm& call, const Plan& plan, Stream stream) {
  const dim3 grid(plan.sums.runs, uint32_t(plan.sums_blocks), uint32_t(call.batch));
  return LAUNCH(group_norm_sums_kernel<TX>, grid, dim3(kNormThreads), norm_sums_shared<TX>(), stream,
                static_cast<const TX*>(call.x), static_cast<Moments*>(call.workspace), int32_t(call.height * call.width),
                int32_t(call.channels), int32_t(call.x_stride), plan.sums);
}

template <class TX>
const char* launch_apply(const NormApply& norm, Type y_type, dim3 grid, Stream stream) {
  const auto kernel = y_type == Type::kUint8      ? group_norm_apply_kernel<TX, uint8_t>
                      : y_type == Type::kFloat16  ? group_norm_apply_kernel<TX, Half>
                      : y_type == Type::kBFloat16 ? group_norm_apply_kernel<TX, BFloat16>
                                                  : group_norm_apply_kernel<TX, float>;
  return LAUNCH(kernel, grid, dim3(kNormThreads), size_t(0), stream, norm);
}

// function(T{}) with the type of the elements
template <class F>
const char* with_type(Type type, F function) {
  switch (type) {
    case Type::kUint8:
      return function(uint8_t{});
    case Type::kFloat16:
      return function(Half{});
    case Type::kBFloat16:
      return function(BFloat16{});
    default:
      return function(float{});
  }
}

}  // namespace

int64_t group_norm_workspace(const GroupNorm& call) {
  if (refuse(call)) return 0;
  const Plan plan = plan_of(call);
  return plan.sums_bytes + plan.coefficient_bytes;
}

const char* launch_group_norm(const GroupNorm& call, Stream stream) {
  if (const char* reason = refuse(call)) return reason;
  if (call.batch == 0) return nullptr;
  if (!call.x || !call.y) return "group_norm: x and y must not be null";
  if (reinterpret_cast<uintptr_t>(call.x) % 16 || reinterpret_cast<uintptr_t>(call.y) % 16)
    return "group_norm: x and y must be 16-byte aligned";
  if (!(call.eps >= 0)) return "group_norm: eps must not be negative";
  if (call.y_type == Type::kUint8 && (call.y_zero < 0 || call.y_zero > 255))
    return "group_norm: the zero point must lie in 0..255";
  const Plan plan = plan_of(call);
  if (!call.workspace || call.workspace_bytes < plan.sums_bytes + plan.coefficient_bytes)
    return "group_norm: the workspace must have group_norm_workspace(call) bytes";
  if (reinterpret_cast<uintptr_t>(call.workspace) % 16) return "group_norm: the workspace must be 16-byte aligned";
  if (plan.sums_blocks > 65535 || plan.apply_blocks > 65535) return "group_norm: too many channels";

  const char* failed = with_type(call.x_type, [&](auto x) { return launch_sums<decltype(x)>(call, plan, stream); });
  if (failed) return failed;

  float* coefficients = reinterpret_cast<float*>(static_cast<unsigned char*>(call.workspace) + plan.sums_bytes);
  const int32_t pixels = int32_t(call.height * call.width), group_channels = int32_t(call.channels / call.groups);
  const NormMerge norm_merge{
      .sums = static_cast<const Moments*>(call.workspace),
      .coefficients = coefficients,
      .weight = call.weight,
      .bias = call.bias,
      .pixels = pixels,
      .channels = int32_t(call.channels),
      .group_channels = group_channels,
      .places = int32_t(plan.places),
      .vector_channels = int32_t(plan.vector_channels),
      .vectors = plan.apply.vectors,
      .run = plan.sums.run,
      .runs = plan.sums.runs,
      .scale = call.x_type == Type::kUint8 ? call.x_scale : 1.0f,
      .eps = call.eps,
  };
  const int64_t block_groups = group_channels < kNormLanes ? kNormLanes / group_channels : 1;
  const dim3 merge_grid(uint32_t(divide_up(call.groups, block_groups)), uint32_t(call.batch));
  failed = LAUNCH(group_norm_merge_kernel, merge_grid, dim3(kNormThreads), kNormMergeShared, stream, norm_merge);
  if (failed) return failed;

  const NormApply norm_apply{
      .x = call.x,
      .y = call.y,
      .coefficients = coefficients,
      .pixels = pixels,
      .channels = int32_t(call.channels),
      .places = int32_t(plan.places),
      .x_stride = int32_t(call.x_stride),
      .y_stride = int32_t(call.y_stride),
      .tiles = plan.apply,
      .act = call.act,
      .slope = call.slope,
      .y_inverse_scale = call.y_inverse_scale,
      .y_zero = call.y_type == Type::kUint8 ? call.y_zero : 0,
  };
  const dim3 apply_grid(plan.apply.runs, uint32_t(plan.apply_blocks), uint32_t(call.batch));
  return with_type(call.x_type, [&](auto x) { return launch_apply<decltype(x)>(norm_apply, call.y_type, apply_grid, stream); });
}

}  // namespace sparsegan::cuda

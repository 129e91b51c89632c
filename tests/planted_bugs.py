"""Mistakes planted in the CUDA kernels, each in one line, and the checks that must find them; test_cuda_planted_bugs.py runs it.

The checks:

emulator     tests/emulator, plain: wrong results, deadlocks, misaligned accesses, writes into guards
threads      the same under the thread sanitizer: races
addresses    the same under the address sanitizer: accesses out of bounds
interpreter  tests/ptx on the PTX that nvcc makes: wrong results, races, memory never written or still in flight, bounds, and
             bank conflicts of the main loop
ptxas        compiles for sm_80: nothing may spill

What stands only in the device branch of warp.cuh can be seen by the interpreter alone.
"""

from dataclasses import dataclass, field

from ptx.layers import Layer


@dataclass(frozen=True)
class Bug:
    """`old` stands once in `file`; the kernels in `kernel`.cu are affected. `caught`: words of what each check says."""

    name: str
    kernel: str
    file: str
    old: str
    new: str
    caught: dict[str, str] = field(hash=False)
    layer: Layer | None = None  # for the interpreter and ptxas


# Shapes are tiny, but leave a rest in every dimension.
INT8 = Layer(size=(5, 5), channels=(64, 40), y="u8", y_zero=9, y_scale=64.0, multiprocessors=1000)
LARGE = Layer(size=(9, 8), batch=2, channels=(128, 32), multiprocessors=1)
FLOAT16 = Layer(kind="f16", block=(16, 16), size=(5, 5), channels=(64, 32), y="f16", multiprocessors=1000)
BRAIN = Layer(kind="bf16", block=(16, 16), size=(5, 5), channels=(64, 32), multiprocessors=1000)
TWO_FOUR = Layer(block=(32, 64), two_four=True, size=(5, 5), channels=(128, 32), multiprocessors=1000)
TWO_FOUR_FLOAT16 = Layer(
    kind="f16", block=(32, 32), two_four=True, size=(5, 5), channels=(64, 32), multiprocessors=1000
)
UPSAMPLED = Layer(
    transposed=True, kernel=(4, 4), stride=(2, 2), size=(4, 5), channels=(64, 32), multiprocessors=1000
)
SPLIT = Layer(size=(3, 3), channels=(640, 32), split=True, multiprocessors=108)
ROWS = Layer(size=(3, 3), channels=(64, 192), multiprocessors=1000)  # of different numbers of blocks
SHUFFLED = Layer(
    block=(16, 32), size=(4, 4), channels=(32, 40), dead_channels=tuple(range(0, 16, 2)), multiprocessors=1000
)
RAGGED = Layer(size=(4, 4), channels=(64, 30), multiprocessors=1000)

DIFFER = r"\d+ of \d+ differ|some of y was not written"
RACE = "data race"
WRONG = "WRONG.*got"

BUGS = [
    # Barriers and waits
    Bug(
        "no barrier before a stage is multiplied",
        "gather_gemm",
        "gather_gemm.cuh",
        "__syncthreads();  // the stage is there, for all threads, and the one before it is free",
        "",
        {"threads": RACE, "interpreter": "a race|in flight"},
        INT8,
    ),
    Bug(
        "no barrier behind the list of sources",
        "gather_gemm",
        "gather_gemm.cuh",
        "      sources[thread] = {0, kAlwaysOutside};\n    }\n    __syncthreads();",
        "      sources[thread] = {0, kAlwaysOutside};\n    }",
        {"threads": RACE, "interpreter": "a race|never written"},
        INT8,
    ),
    Bug(
        "no barrier between the last stage and the sums in its place",
        "gather_gemm",
        "gather_gemm.cuh",
        "  __syncthreads();\n  Sum* const tile_sums",
        "  Sum* const tile_sums",
        {"threads": RACE, "interpreter": "a race"},
        ROWS,
    ),
    Bug(
        "no wait for the copies of a stage",
        "gather_gemm",
        "gather_gemm.cuh",
        "cp_async_wait<T::kStages - 2>();",
        "",
        {"emulator": WRONG, "interpreter": "in flight"},
        INT8,
    ),
    Bug(
        "waits for one stage too few",
        "gather_gemm",
        "gather_gemm.cuh",
        "cp_async_wait<T::kStages - 2>();",
        "cp_async_wait<T::kStages - 1>();",
        {"emulator": WRONG, "interpreter": "in flight"},
        INT8,
    ),
    Bug(
        "no empty group behind the last stage",
        "gather_gemm",
        "gather_gemm.cuh",
        "          if (loaded < count) load_stage(next);\n          cp_async_commit();",
        "          if (loaded < count) load_stage(next), cp_async_commit();",
        {"emulator": WRONG, "interpreter": "in flight"},
        INT8,
    ),
    Bug(
        "next stage overwrites the one that is read",
        "gather_gemm",
        "gather_gemm.cuh",
        "stages + (s + T::kStages - 1) % T::kStages * T::kStage",
        "stages + s * T::kStage",
        {"emulator": WRONG, "interpreter": "in flight|a race"},
        INT8,
    ),
    # Places
    Bug(
        "one pixel beyond the last",
        "gather_gemm",
        "gather_gemm.cuh",
        "out_pixels[thread] = number < phase.pixels ?",
        "out_pixels[thread] = number <= phase.pixels ?",
        {
            "emulator": "written outside of y|got",
            "addresses": "AddressSanitizer",
            "interpreter": "out of bounds",
        },
        INT8,
    ),
    Bug(
        "the last stage is left out",
        "gather_gemm",
        "gather_gemm.cuh",
        "const int done = count + (T::kStages - 1) * T::kStageBlocks;",
        "const int done = count + (T::kStages - 2) * T::kStageBlocks;",
        {"emulator": WRONG, "interpreter": DIFFER},
        INT8,
    ),
    Bug(
        "taps that leave the image at its sides are not masked",
        "gather_gemm",
        "gather_gemm.cuh",
        "(static_cast<uint32_t>(x[i] + work.dx[t]) >= work.width)",
        "(static_cast<uint32_t>(x[i] + work.dx[t]) > work.width)",
        {"emulator": WRONG, "interpreter": f"{DIFFER}|out of bounds"},
        INT8,
    ),
    Bug(
        "taps that leave the image at its ends are not masked",
        "gather_gemm",
        "gather_gemm.cuh",
        "outside[i] & tap.leaves);",
        "0u);",
        {"emulator": WRONG, "addresses": "AddressSanitizer", "interpreter": "out of bounds"},
        INT8,
    ),
    Bug(
        "weights beyond the last block are not zeros",
        "gather_gemm",
        "gather_gemm.cuh",
        "loaded + block < count);",
        "true);",
        {"addresses": "AddressSanitizer", "interpreter": f"{DIFFER}|out of bounds"},
        INT8,
    ),
    Bug(
        "tile of the wrong phase",
        "gather_gemm",
        "gather_gemm.cuh",
        "tile >= work.phases[place.phase + 1].first_tile",
        "tile > work.phases[place.phase + 1].first_tile",
        {"emulator": WRONG, "interpreter": f"{DIFFER}|out of bounds|a race"},
        UPSAMPLED,
    ),
    Bug(
        "sums of pixels in the wrong order of lanes",
        "gather_gemm",
        "gather_gemm.cuh",
        "lane % 4 * 2 + r % 2) * T::kPitch",
        "lane % 4 + r % 2 * 4) * T::kPitch",
        {"emulator": WRONG, "interpreter": DIFFER},
        INT8,
    ),
    Bug(
        "lanes of ldmatrix in the wrong order",
        "gather_gemm",
        "gather_gemm.cuh",
        "lane % 8 + lane / 16 * 8, 2 * s + lane / 8 % 2)",
        "lane % 8 + lane / 8 % 2 * 8, 2 * s + lane / 16)",
        {"emulator": WRONG, "interpreter": DIFFER},
        INT8,
    ),
    Bug(
        "metadata of the wrong lanes",
        "gather_gemm",
        "gather_gemm.cuh",
        "lane / 4 * 2 + lane % 2) * 4",
        "lane / 4 * 2 + lane / 2 % 2) * 4",
        {"emulator": WRONG, "interpreter": DIFFER},
        TWO_FOUR_FLOAT16,
    ),
    Bug(
        "stages and sources overlap in shared memory",
        "gather_gemm",
        "gather_gemm.cuh",
        "shared.take<uint8_t>(T::kWorkBytes)",
        "shared.take<uint8_t>(T::kWorkBytes - T::kStage)",
        {
            "emulator": "past the end of piece|WRONG|signal",
            "addresses": "AddressSanitizer",
            "interpreter": f"{DIFFER}|a race|in flight",
        },
        LARGE,
    ),
    Bug(
        "pieces of rows keep their places",
        "gather_gemm",
        "gather_gemm.cuh",
        "(piece ^ row / kLineRows % kPieces) * 16",
        "piece * 16",
        {"interpreter": "bank conflicts"},
        LARGE,
    ),
    Bug(
        "splits share one place in the workspace",
        "gather_gemm",
        "gather_gemm.cuh",
        "const int64_t cta = static_cast<int64_t>(blockIdx.y) * gridDim.x + blockIdx.x;",
        "const int64_t cta = blockIdx.x;",
        {"emulator": WRONG, "threads": RACE, "interpreter": "a race"},
        SPLIT,
    ),
    Bug(
        "registers for too many CTAs",
        "gather_gemm",
        "gather_gemm.cuh",
        "T::kTile.resident[1])",
        "T::kTile.resident[1] * 2)",
        {"ptxas": "spill"},
        LARGE,
    ),
    # Epilogue
    Bug(
        "zero point of the wrong phase",
        "gather_gemm",
        "epilogue.cuh",
        "e.zero_sums + static_cast<int64_t>(phase) * e.out_channels",
        "e.zero_sums",
        {"emulator": WRONG, "interpreter": DIFFER},
        UPSAMPLED,
    ),
    Bug(
        "scale of a neighbouring channel",
        "gather_gemm",
        "epilogue.cuh",
        "values.e[i] = from[g.channel[i]]",
        "values.e[i] = from[g.channel[0] + i]",
        {"emulator": WRONG, "interpreter": f"{DIFFER}|out of bounds"},
        SHUFFLED,
    ),
    Bug(
        "channels of padding are stored",
        "gather_gemm",
        "epilogue.cuh",
        "if (g.channel[i] >= 0) to[",
        "to[",
        {"emulator": "WRONG", "interpreter": f"{DIFFER}|out of bounds|a race"},
        RAGGED,
    ),
    # Other kernels
    Bug(
        "no barrier between writing and reading the tile",
        "quantize",
        "quantize.cuh",
        "  __syncthreads();\n\n  const int left",
        "\n  const int left",
        {"emulator": "WRONG", "threads": RACE},
    ),
    Bug(
        "chunks of two pixels in one place",
        "quantize",
        "quantize.cuh",
        "((pixel % 2 * 4 + chunk) ^ flip)",
        "((pixel % 2 * 4 + chunk) | flip)",
        {"emulator": "WRONG", "threads": RACE},
    ),
    Bug(
        "channels beyond the last are read",
        "quantize",
        "quantize.cuh",
        "if (offset >= 0 && quad * 4 + c < channels)",
        "if (offset >= 0)",
        {"emulator": "WRONG", "addresses": "AddressSanitizer"},
    ),
    Bug(
        "no barrier between the steps of a reduction",
        "group_norm",
        "group_norm.cuh",
        "      shared_count[thread] = count;\n    }\n    __syncthreads();",
        "      shared_count[thread] = count;\n    }",
        {"threads": RACE},
    ),
    Bug(
        "the last run counts as a whole one",
        "group_norm",
        "group_norm.cuh",
        "const int pixels = norm.pixels - run * norm.run < norm.run ? norm.pixels - run * norm.run : norm.run;",
        "const int pixels = norm.run;",
        {"emulator": WRONG},
    ),
    Bug(
        "weight of another block's channel",
        "group_norm",
        "group_norm.cuh",
        "norm.weight[first + channel]",
        "norm.weight[channel]",
        {"emulator": WRONG},
    ),
    # Inline PTX
    Bug(
        "activations as signed bytes",
        "gather_gemm",
        "warp.cuh",
        "m16n8k32.row.col.s32.s8.u8.s32",
        "m16n8k32.row.col.s32.s8.s8.s32",
        {"interpreter": DIFFER},
        INT8,
    ),
    Bug(
        "bf16 as f16",
        "gather_gemm",
        "warp.cuh",
        "m16n8k16.row.col.f32.bf16.bf16.f32",
        "m16n8k16.row.col.f32.f16.f16.f32",
        {"interpreter": DIFFER},
        BRAIN,
    ),
    Bug(
        "matrices of ldmatrix swapped",
        "gather_gemm",
        "warp.cuh",
        '"=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])',
        '"=r"(r[0]), "=r"(r[2]), "=r"(r[1]), "=r"(r[3])',
        {"interpreter": DIFFER},
        FLOAT16,
    ),
    Bug(
        "copies do not fill with zeros",
        "gather_gemm",
        "warp.cuh",
        '"r"(valid ? 16 : 0)',
        '"r"(16)',
        {"interpreter": f"{DIFFER}|out of bounds"},
        FLOAT16,
    ),
    Bug(
        "pieces of shared memory counted in elements",
        "gather_gemm",
        "warp.cuh",
        "offset_ += smem_piece(count * sizeof(T));",
        "offset_ += smem_piece(count);",
        {"interpreter": f"{DIFFER}|a race|in flight|out of bounds"},
        INT8,
    ),
    Bug(
        "another lane's metadata is selected",
        "gather_gemm",
        "warp.cuh",
        '%12, 0x0;"\n      : "+r"(c[0])',
        '%12, 0x1;"\n      : "+r"(c[0])',
        {"interpreter": "selector"},
        TWO_FOUR,
    ),
    Bug(
        "rounds towards zero",
        "gather_gemm",
        "warp.cuh",
        "cvt.rn.f16.f32",
        "cvt.rz.f16.f32",
        {"interpreter": rf"{DIFFER}|rounding \.rz"},
        FLOAT16,
    ),
]

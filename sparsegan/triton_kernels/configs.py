"""Which tile a gather-GEMM is computed in: a short list by architecture and block height, best first (own).

A configuration is (BLOCK_M output pixels, warps, stages of a turn's x and w in shared memory). Nothing here was measured on a
GPU: the order comes from the machine code, and `autotune(True)` measures on the user's GPU, over these lists and nothing else.

Why these. The gathered tile BLOCK_M x BLOCK_K is read from memory once for BLOCK_O channels and the weights once for BLOCK_M
pixels. The f32 or s32 sums of a thread are BLOCK_M * BLOCK_O / (32 warps): 64 at most, which leaves registers for addresses;
wgmma wants 4 warps for 64 pixels. A turn of the loop takes two blocks, so 3 stages keep two to four blocks on their way; a
fourth would cost sm_86, 89 and 120, which have 100 KiB a multiprocessor, the second block that hides more.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch


class Config(NamedTuple):
    block_m: int
    warps: int
    stages: int


_64, _128, _256 = (Config(pixels, 4, 3) for pixels in (64, 128, 256))
_128_ON_8, _256_ON_8 = (Config(pixels, 8, 3) for pixels in (128, 256))

# By block_o.
CONFIGS: dict[int, tuple[Config, ...]] = {
    16: (_256, _128, _64),
    32: (_256_ON_8, _128, _64),
    64: (_128, _128_ON_8, _64),
}

# By architecture and block_o, best first. Of CONFIGS those stay that spill nothing and of which two blocks and eight warps fit on
# a multiprocessor, so that some compute while others wait, begin or end. More pixels go first: they read the weights less often,
# and reading bounds the kernels where maps are large (docs/gpu.md). Of as many pixels those with fewer instructions in the loop
# go first. tests/test_triton_compile.py derives the table from the machine code, and fails where it is another.
TILES: dict[int, dict[int, tuple[Config, ...]]] = {
    80: CONFIGS,  # 164 KiB of shared memory a multiprocessor: all fit
    # 100 KiB: 256 pixels x 32 channels of f16 take 72. Transposed int8 convolutions spill in 128 x 64 on 4 warps.
    86: {**CONFIGS, 32: (_128, _64), 64: (_128_ON_8, _64)},
    89: {**CONFIGS, 32: (_128, _64), 64: (_128_ON_8, _64)},  # as 86
    90: CONFIGS,  # 228 KiB; wgmma multiplies 64 pixels on 4 warps, and 128 x 64 on 8 would issue 1.6 times as much
    100: CONFIGS,  # 228 KiB; as 90, with tcgen05 for f16 and bf16
    120: {**CONFIGS, 32: (_128, _64)},  # 100 KiB as 86, but nothing spills
}

# Bytes of shared memory that one block may use, by compute capability.
SHARED_LIMITS = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}

# Multiprocessors of a middling device of each architecture, for a default without the device.
MULTIPROCESSORS = {80: 108, 86: 68, 89: 76, 90: 132, 100: 148, 120: 70}


class Device(NamedTuple):
    architecture: int  # of TILES
    multiprocessors: int


def nearest(capability: int) -> int:
    """The newest known architecture that is not newer than this compute capability (86 for 8.6)."""
    return max((known for known in TILES if known <= capability), default=min(TILES))


def default(block_o: int, pixels: int, rows: int, device: Device) -> Config:
    """The tile for `rows` packed rows of all phases over `pixels` output pixels of all images, in the largest phase.

    The best of the architecture that is not half empty and gives each multiprocessor a second block to run while the first
    waits; where the map is too small for any, the one of fewest pixels.
    """
    tiles = TILES[device.architecture][block_o]
    enough = (
        tile
        for tile in tiles
        if tile.block_m < 2 * pixels and -(-pixels // tile.block_m) * rows >= 2 * device.multiprocessors
    )
    return next(enough, tiles[-1])


@cache
def _device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device(nearest(properties.major * 10 + properties.minor), properties.multi_processor_count)


def device_of(x: torch.Tensor) -> Device:
    """The device of x; where there is none (a fake tensor, the interpreter), a middling one of the oldest architecture."""
    if x.device.type != "cuda" or not torch.cuda.is_available():
        return Device(80, MULTIPROCESSORS[80])
    return _device(x.device.index if x.device.index is not None else torch.cuda.current_device())

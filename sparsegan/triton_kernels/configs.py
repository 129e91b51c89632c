"""Which tile a gather-GEMM is computed in: a short list for each block height, and the one to take without measuring (own).

A configuration is (BLOCK_M output pixels, warps, stages of a turn's x and w in shared memory). Nothing here was measured on a
GPU: the defaults come from the resources of the compiled kernels and the costs of docs/cuda-and-triton.md, and `autotune(True)`
measures on the user's GPU, over these lists and nothing else.

Why these. The gathered tile BLOCK_M x BLOCK_K is read from memory once for BLOCK_O channels and the weights once for BLOCK_M
pixels, so BLOCK_M is 128, or 64 where the map is small. The f32 or s32 sums of a thread are BLOCK_M * BLOCK_O / (32 warps):
64 with the largest tile on 4 warps, which leaves room for addresses in 128 registers; wgmma wants 4 warps for 64 pixels.
A turn of the loop takes two blocks, so 3 stages keep two to four blocks on their way; a fourth would cost sm_86, 89 and 120,
which have 100 KiB a multiprocessor, the second block that hides more.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch


class Config(NamedTuple):
    block_m: int
    warps: int
    stages: int


# By block_o. The first is for large maps, the second for small ones (see `default`).
CONFIGS: dict[int, tuple[Config, ...]] = {
    16: (Config(128, 4, 3), Config(64, 4, 3), Config(256, 4, 3)),
    32: (Config(128, 4, 3), Config(64, 4, 3), Config(256, 8, 3)),
    64: (Config(128, 4, 3), Config(64, 4, 3), Config(128, 8, 3)),
}

# Bytes of shared memory that one block may use, by compute capability.
SHARED_LIMITS = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}

# Multiprocessors of a middling device of each architecture, for a default without the device.
MULTIPROCESSORS = {80: 108, 86: 68, 89: 76, 90: 132, 100: 148, 120: 70}


def nearest(capability: int) -> int:
    """The newest known architecture that is not newer than this compute capability (86 for 8.6)."""
    return max((known for known in SHARED_LIMITS if known <= capability), default=min(SHARED_LIMITS))


def default(block_o: int, pixels: int, rows: int, multiprocessors: int) -> Config:
    """The tile for `rows` packed rows over `pixels` output pixels of all images and phases.

    Small tiles where large ones would leave multiprocessors without a second block to run while the first waits.
    """
    large, small = CONFIGS[block_o][:2]
    return large if -(-pixels // large.block_m) * rows >= 2 * multiprocessors else small


class Device(NamedTuple):
    capability: int  # 86: compute capability 8.6
    multiprocessors: int


@cache
def _device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    return Device(properties.major * 10 + properties.minor, properties.multi_processor_count)


def device_of(x: torch.Tensor) -> Device:
    """The device of x; where there is none (a fake tensor, the interpreter), a middling one of the oldest architecture."""
    if x.device.type != "cuda" or not torch.cuda.is_available():
        return Device(80, MULTIPROCESSORS[80])
    return _device(x.device.index if x.device.index is not None else torch.cuda.current_device())

"""Runs PTX, as nvcc and Triton emit it, on the host: checked like compute-sanitizer does, and with its cost counted.

parse.py       text -> instructions
machine.py     launches, groups of lanes, barriers
arithmetic.py  instructions that compute
access.py      instructions that touch memory or other lanes, and branches
tensor.py      mma, mma.sp, ldmatrix
memory.py      global and shared memory that watch for mistakes
cost.py        instruction counts, bank conflicts, sectors
device.py      a CUDA runtime whose device is all this, for the launchers of csrc/cuda
layers.py      layers as calls of the gather-GEMM, and what they should compute
machine_code.py  what ptxas made of the kernels (SASS), read and not run

An instruction it does not know is an error that names it; add it to the file where its like are.
"""

from . import access, arithmetic, tensor  # noqa: F401  they register the instructions
from .cost import Cost, Figures
from .machine import launch, pack_params
from .memory import GlobalMemory
from .parse import Kernel, Module, PtxError

__all__ = ["Cost", "Figures", "GlobalMemory", "Kernel", "Module", "PtxError", "launch", "pack_params"]

"""sparsegan: prune image generators into structured sparsity, quantise them, and run them on block-sparse kernels.

prune(model, BlockPattern(8, 4), sparsity=0.75, example_inputs=(z,))    # in place: zeros, still trainable
fast = swap_to_sparse(model.eval(), example_inputs=(z,))                # a copy, never slower than before
save(fast, "generator.safetensors")
"""

from .checkpoint import load, save
from .compress import Compressed, compress, sweep
from .formats import PackedWeight
from .layers import SparseConv2d, SparseConvTranspose2d, SparseLinear
from .ops import BackendError
from .patterns import BlockPattern, ChannelPattern, NMPattern, pattern_for
from .prune import (
    least_damage,
    make_permanent,
    prune,
    reconstruct,
    recover,
    sensitivity,
    sparsity_report,
)
from .prune.channels import prune_channels
from .prune.permute import permute_channels
from .swap import SwapConfig, explain, swap_to_sparse

__all__ = [
    "BackendError",
    "BlockPattern",
    "ChannelPattern",
    "Compressed",
    "NMPattern",
    "PackedWeight",
    "SparseConv2d",
    "SparseConvTranspose2d",
    "SparseLinear",
    "SwapConfig",
    "compress",
    "explain",
    "least_damage",
    "load",
    "make_permanent",
    "pattern_for",
    "permute_channels",
    "prune",
    "prune_channels",
    "reconstruct",
    "recover",
    "save",
    "sensitivity",
    "sparsity_report",
    "swap_to_sparse",
    "sweep",
]

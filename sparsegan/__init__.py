"""sparsegan: prune image generators into structured sparsity, quantise them, and run them on block-sparse kernels.

prune(model, BlockPattern(8, 4), sparsity=0.75, example_inputs=(z,))    # in place: zeros, still trainable
fast = swap_to_sparse(model.eval(), example_inputs=(z,))                # a copy, never slower than before
save(fast, "generator.safetensors")
"""

from .checkpoint import load, save
from .compress import Compressed, compress
from .formats import PackedWeight
from .layers import SparseConv2d, SparseConvTranspose2d, SparseLinear
from .ops import BackendError
from .patterns import BlockPattern, ChannelPattern, NMPattern, pattern_for
from .prune import make_permanent, prune, recover, sparsity_report
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
    "load",
    "make_permanent",
    "pattern_for",
    "prune",
    "recover",
    "save",
    "sparsity_report",
    "swap_to_sparse",
]

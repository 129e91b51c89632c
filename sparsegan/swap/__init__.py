"""Exchange the layers of a pruned model for sparse ones, wherever that makes the model faster.

    model ──> dense copy ──> programs for the whole graph (`programs`) ──> right, and not slower? ──> swapped
                         └─> layers one by one (`single`), where there is no graph ──┘

config: what the user wants; dense: what there is to beat; explanation: what became of it.
"""

from sparsegan.swap.config import SwapConfig
from sparsegan.swap.exchange import swap_to_sparse
from sparsegan.swap.explanation import Explanation, LayerRow, explain
from sparsegan.swap.race import race

__all__ = ["Explanation", "LayerRow", "SwapConfig", "explain", "race", "swap_to_sparse"]

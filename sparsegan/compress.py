"""From a trained generator to a fast one, without data: prune, distil, quantise, swap."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import nn

from sparsegan.patterns import BlockPattern, Pattern
from sparsegan.prune import make_permanent, prune, recover
from sparsegan.prune.distill import SampleInputs
from sparsegan.swap import SwapConfig, swap_to_sparse

Progress: TypeAlias = Callable[[str, int, int], None]
"""``(stage, steps done, steps in all)``, the stage being "prune", "distil" or "swap"."""

CALIBRATION_BATCHES, CALIBRATION_BATCH = 4, 64


@dataclass(frozen=True)
class Compressed:
    """A generator on its way from dense to fast.

    model:   the swapped model, for inference.
    pruned:  the dense float32 model that it was made from, with plain zeros in its weights.
    history: the distillation loss of each step.
    seconds: that all of it took.
    """

    model: nn.Module
    pruned: nn.Module
    history: list[float]
    seconds: float


def compress(
    model: nn.Module,
    sample_inputs: SampleInputs,
    *,
    pattern: Pattern = BlockPattern(4, 4),  # noqa: B008  (frozen)
    sparsity: float | None = None,
    steps: int = 1000,
    dtype: Literal["auto", "int8", "bf16", "f32"] = "int8",
    seed: int = 0,
    progress: Progress | None = None,
) -> Compressed:
    """Remove the least important weights of `model`, let it teach the rest, and swap in the sparse layers.

    model:         a trained generator in eval mode, on the CPU; it is not changed, and is the teacher.
    sample_inputs: `(number of samples, generator) -> positional inputs`, such as latents: all the data used.
    pattern, sparsity: see `prune`; the score is "obd".
    steps:         of distillation, 48 samples each; 0 leaves it out.
    dtype:         number format of the sparse layers, see `SwapConfig`.
    seed:          of every random draw; the global generator is left alone. The weights are then the same
                   each time on the same kind of machine; which layers are swapped is measured, at batch 1.
    progress:      called as each stage begins and after each step of it.

    Raises ValueError for a model in training mode or fewer than 0 steps, and what `prune`, `recover` and
    `swap_to_sparse` raise.
    """
    if model.training:
        raise ValueError("the model is in training mode: call model.eval() first")
    if steps < 0:
        raise ValueError(f"steps must be a number >= 0, got {steps}")
    report = progress or (lambda stage, done, total: None)
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(seed)

    report("prune", 0, 1)
    pruned = copy.deepcopy(model).requires_grad_(True)
    prune(pruned, pattern, sparsity, "obd", example_inputs=sample_inputs(8, generator), seed=seed)
    report("prune", 1, 1)

    history: list[float] = []
    if steps:
        report("distil", 0, steps)
        with _fast_training():
            history = recover(
                pruned,
                model,
                sample_inputs,
                steps,
                seed=seed,
                progress=lambda done, loss: report("distil", done, steps),
            )
    make_permanent(pruned).requires_grad_(False)

    report("swap", 0, 1)
    # The sample that decides by its time is one latent: what someone waits for.
    config = SwapConfig(
        dtype=dtype,
        calibration=[sample_inputs(CALIBRATION_BATCH, generator) for _ in range(CALIBRATION_BATCHES)],
    )
    swapped = swap_to_sparse(pruned, config, example_inputs=sample_inputs(1, generator))
    report("swap", 1, 1)
    return Compressed(swapped, pruned, history, time.perf_counter() - start)


def _fast_training() -> torch.autocast | nullcontext[None]:
    """bfloat16 autocast where the CPU has instructions for it; elsewhere it is slower than float32."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)  # torch 2.10 does not have it
    if capabilities is not None and capabilities().get("avx512_bf16"):
        return torch.autocast("cpu", torch.bfloat16)
    return nullcontext()

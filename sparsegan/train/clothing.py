"""Train the small classifier whose features stand in where no larger network is at hand."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsegan.metrics.backbones import ClothingClassifier


def train_clothing(
    images: Tensor,
    labels: Tensor,
    *,
    steps: int,
    batch: int = 128,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> ClothingClassifier:
    """Train a classifier of images [N, 1, 32, 32] in [-1, 1] by labels [N] from 0 to 9; returned in eval mode.

    Cross-entropy on batches of which half are mirrored; AdamW, cosine to zero. Same seed, same thread count, same
    machine: same weights. `progress` gets the step and the loss after each step. Raises FloatingPointError when the
    loss is no longer finite.
    """
    rng = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # layers initialise themselves from the global generator
        torch.manual_seed(seed)
        model = ClothingClassifier()
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)

    for step in range(1, steps + 1):
        chosen = torch.randint(len(images), (batch,), generator=rng)
        mirrored = torch.rand(batch, 1, 1, 1, generator=rng) < 0.5
        batch_images = torch.where(mirrored, images[chosen].flip(3), images[chosen])
        loss = F.cross_entropy(model.logits(batch_images), labels[chosen])
        if not math.isfinite(loss.item()):
            raise FloatingPointError(
                f"the classifier's loss is {loss.item()} at step {step}; try another seed"
            )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if progress is not None:
            progress(step, loss.item())
    return model.eval().requires_grad_(False)

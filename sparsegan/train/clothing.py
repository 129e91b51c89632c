"""Train the small classifier whose features stand in where no larger network is at hand."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sparsegan.metrics.backbones import ClothingClassifier
from sparsegan.train.loop import Progress, Task, at_rest, descend, initialised, run


class _Classifier(Task):
    """Cross-entropy on batches of which half are mirrored; AdamW, cosine to zero."""

    def __init__(self, model: ClothingClassifier, images: Tensor, labels: Tensor, batch: int) -> None:
        self.model, self.images, self.labels, self.batch = model, images, labels, batch
        self.modules = {"classifier": model}
        self.optimisers = [torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=1e-2)]

    def step(self, rng: torch.Generator) -> Tensor:
        chosen = torch.randint(len(self.images), (self.batch,), generator=rng)
        mirrored = torch.rand(self.batch, 1, 1, 1, generator=rng) < 0.5
        images = torch.where(mirrored, self.images[chosen].flip(3), self.images[chosen])
        loss = F.cross_entropy(self.model.logits(images), self.labels[chosen])
        descend(loss, self.optimisers[0])
        return loss.detach()


def train_clothing(
    images: Tensor,
    labels: Tensor,
    *,
    steps: int,
    batch: int = 128,
    seed: int = 0,
    progress: Progress | None = None,
) -> ClothingClassifier:
    """Train a classifier of images [N, 1, 32, 32] in [-1, 1] by labels [N] from 0 to 9; returned in eval mode.

    Same seed, same thread count, same machine: same weights. Raises what `run` raises.
    """
    model = initialised(ClothingClassifier, seed)
    run(_Classifier(model, images, labels, batch), steps, seed=seed, settings=batch, progress=progress)
    at_rest(model)
    return model

"""What generator and discriminator minimise: five losses, of which each has its way of keeping the training stable.

r, f: scores [N, ...] that the discriminator gives to real and to generated images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class AdversarialLoss:
    """discriminator(r, f) and generator(f) are what each descends.

    penalty:      weight of `gradient_penalty`, 0 for none.
    clip:         bound of the discriminator's weights after each of its steps, None for none.
    critic_steps: steps of the discriminator for each of the generator.
    """

    discriminator: Callable[[Tensor, Tensor], Tensor]
    generator: Callable[[Tensor], Tensor]
    penalty: float = 0.0
    clip: float | None = None
    critic_steps: int = 1


def _wasserstein(r: Tensor, f: Tensor) -> Tensor:
    return f.mean() - r.mean()


def _negative(f: Tensor) -> Tensor:
    return -f.mean()


LOSSES = {
    # -log sigmoid(r) - log(1 - sigmoid(f)); -log sigmoid(f), which does not saturate. Goodfellow et al. 2014,
    # arXiv:1406.2661, section 3.
    "bce": AdversarialLoss(
        lambda r, f: F.softplus(-r).mean() + F.softplus(f).mean(), lambda f: F.softplus(-f).mean()
    ),
    # ((r - 1)^2 + f^2) / 2; (f - 1)^2 / 2. Mao et al. 2017, arXiv:1611.04076, equation 9.
    "lsgan": AdversarialLoss(
        lambda r, f: 0.5 * ((r - 1).square().mean() + f.square().mean()),
        lambda f: 0.5 * (f - 1).square().mean(),
    ),
    # f - r; -f, with weights clipped to [-0.01, 0.01]. Arjovsky et al. 2017, arXiv:1701.07875, algorithm 1.
    "wgan": AdversarialLoss(_wasserstein, _negative, clip=0.01, critic_steps=3),
    # f - r + 10 (|gradient| - 1)^2; -f. Gulrajani et al. 2017, arXiv:1704.00028, algorithm 1.
    "wgan-gp": AdversarialLoss(_wasserstein, _negative, penalty=10.0, critic_steps=3),
    # max(0, 1 - r) + max(0, 1 + f); -f. Lim and Ye 2017, arXiv:1705.02894, section 3.
    "hinge": AdversarialLoss(lambda r, f: (1 - r).relu().mean() + (1 + f).relu().mean(), _negative),
}
"""By name. The papers of the Wasserstein losses take 5 steps of the discriminator; 3 learn as well on images this small."""


def adversarial_loss(name: str) -> AdversarialLoss:
    """The loss called ``name``. Raises ValueError for another name."""
    if name not in LOSSES:
        raise ValueError(f"no loss is called {name!r}; there are {', '.join(LOSSES)}")
    return LOSSES[name]


def gradient_penalty(
    discriminator: nn.Module, real: Tensor, fake: Tensor, context: Sequence[Tensor], mix: Tensor
) -> Tensor:
    """Mean of (|∂D(x)/∂x| - 1)^2, x between real and generated images [N, C, H, W]: WGAN-GP, algorithm 1.

    mix: how much of the real image, [N, 1, 1, 1] in 0..1. context: what D takes beside the image.
    """
    x = torch.lerp(fake.detach(), real, mix).requires_grad_(True)
    (gradient,) = torch.autograd.grad(discriminator(x, *context).sum(), x, create_graph=True)
    return (gradient.flatten(1).norm(dim=1) - 1).square().mean()

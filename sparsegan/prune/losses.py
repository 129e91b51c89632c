"""What the distance of two images is while a pruned model learns from its teacher."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsegan import parallel
from sparsegan.prune.trace import prunable_layers

Loss: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""``(image of the model, image of the teacher) -> scalar``, both images float32"""


# Of Adam, for both that play a game: a first moment that remembers 10 steps follows where the other no longer is.
ADVERSARIAL_BETAS = (0.5, 0.99)


def l1(image: Tensor, target: Tensor) -> Tensor:
    """Mean absolute error."""
    return (image - target).abs().mean()


def l1_plus_l2(image: Tensor, target: Tensor) -> Tensor:
    """Mean absolute plus mean squared error: sharp edges from the first, no large errors by the second."""
    error = image - target
    return error.abs().mean() + error.square().mean()


class Weighted(nn.Module):
    """The sum of several losses, each times its weight. One that learns goes on learning."""

    def __init__(self, *parts: tuple[float, Loss]) -> None:
        super().__init__()
        self.parts = parts
        # Registered, so that what they have learnt is part of the state of a training; a fixed distance has nothing to save.
        self.learners = nn.ModuleList(
            loss for _, loss in parts if isinstance(loss, nn.Module) and hasattr(loss, "update")
        )

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        return torch.stack([weight * loss(image, target) for weight, loss in self.parts]).sum()

    def update(self, image: Tensor, target: Tensor) -> None:
        for loss in self.learners:
            loss.update(image, target)  # type: ignore[operator]


class LayerMatching(nn.Module):
    """Distance of what the layers of the model and of its teacher give out: the teacher's own features.

    The mean over layers of |y - t|^2 / |t|^2, y and t being the outputs of layers of the same name and the same shape in both.
    Works on the last call of both models. Own; the idea is that of FitNets (Romero et al. 2015, section 2.2).

    layers: names; None takes every Linear, Conv2d and ConvTranspose2d but the last that is registered, which gives the image.
    Raises ValueError when no layer is in both models. `close` removes the hooks.
    """

    def __init__(self, model: nn.Module, teacher: nn.Module, layers: Sequence[str] | None = None) -> None:
        super().__init__()
        names = list(prunable_layers(teacher))[:-1] if layers is None else list(layers)
        students, teachers = dict(model.named_modules()), dict(teacher.named_modules())
        names = [name for name in names if name in students and name in teachers]
        if not names:
            raise ValueError("the model and its teacher have no layer of the same name to match")
        self.found: dict[str, Tensor] = {}
        self.wanted: dict[str, Tensor] = {}
        self._hooks = [
            module[name].register_forward_hook(
                lambda _layer, _inputs, y, name=name, store=store: store.__setitem__(name, y)
            )
            for module, store in ((students, self.found), (teachers, self.wanted))
            for name in names
        ]

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        parts = [
            F.mse_loss(y.float(), t.float()) / t.float().square().mean().clamp_min(1e-12)
            for name, t in self.wanted.items()
            if (y := self.found[name]).shape == t.shape
        ]
        return torch.stack(parts).mean() if parts else image.new_zeros(())

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()


class Adversarial(nn.Module):
    """The hinge loss of a discriminator that learns, beside the model, to tell its images from the teacher's or from data.

    Lim and Ye 2017, arXiv:1705.02894, section 3: the discriminator descends max(0, 1 - D(real)) + max(0, 1 + D(image)), the model
    descends -D(image). `recover` calls `update` after each step.

    discriminator: images [N, C, H, W] to scores [N, ...]; trained in place by Adam (0.5, 0.99).
    data: ``number -> images``; None takes the teacher's images of the same step.
    """

    def __init__(
        self, discriminator: nn.Module, lr: float = 2e-4, data: Callable[[int], Tensor] | None = None
    ) -> None:
        super().__init__()
        self.discriminator, self.data = discriminator, data
        self.optimiser = torch.optim.Adam(discriminator.parameters(), lr=lr, betas=ADVERSARIAL_BETAS)
        self._shared: list[nn.Module] = []  # a list: not a second child with the same weights

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        self.discriminator.requires_grad_(False)
        return -self.discriminator(image).float().mean()

    def update(self, image: Tensor, target: Tensor) -> None:
        self.discriminator.requires_grad_(True)
        real = target if self.data is None else self.data(len(image))
        if not self._shared:
            self._shared.append(parallel.wrapped(self.discriminator))
        fakes, reals = self._shared[0](torch.cat([image, real])).float().split([len(image), len(real)])
        loss = F.relu(1 - reals).mean() + F.relu(1 + fakes).mean()
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()


class Balanced(nn.Module):
    """A distance, and an adversary that is held in proportion to it: where the image is wrong, and how it should look.

    Its value is that of the distance. Its gradient at the image is that of the distance plus that of the adversary, scaled to
    ``share`` times its norm (own; VQGAN, Esser et al. 2021, arXiv:2012.09841, equation 7, balances weights of a layer so). With
    a fixed weight in its place the adversary either did nothing or destroyed the image.

    distance: of the two images and nothing else: what it sees of the model by hooks (`LayerMatching`) has no gradient here.
    warm_up: updates of the adversary before its gradient counts: until then it knows nothing.
    """

    updates: Tensor

    def __init__(
        self, distance: Loss, adversary: Adversarial, share: float = 1.0, warm_up: int = 150
    ) -> None:
        super().__init__()
        self.adversary, self.share, self.warm_up = adversary, share, warm_up
        self._distance = (distance,)  # a tuple: not registered, because a fixed distance has nothing to save
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    def forward(self, image: Tensor, target: Tensor) -> Tensor:
        (distance,) = self._distance
        if not torch.is_grad_enabled() or int(self.updates) < self.warm_up:
            return distance(image, target)
        # Both gradients are taken at the image, once; the model's backward pass starts from their sum.
        at = image.detach().requires_grad_()
        value = distance(at, target)
        (pull,) = torch.autograd.grad(value, at)
        (push,) = torch.autograd.grad(self.adversary(at, target), at)
        push = push * (self.share * pull.norm() / push.norm().clamp_min(1e-12))
        along = (image * (pull + push)).sum()
        return value.detach() + along - along.detach()

    def update(self, image: Tensor, target: Tensor) -> None:
        self.adversary.update(image, target)
        self.updates += 1

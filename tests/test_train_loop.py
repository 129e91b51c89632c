"""The loop that everything is trained with: it resumes, undoes and stops; the losses of GANs by hand."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparsegan import training
from sparsegan.models import conv_discriminator, dcgan_generator
from sparsegan.patterns import BlockPattern
from sparsegan.prune.during import Sparsifier
from sparsegan.prune.trace import prunable_layers
from sparsegan.train import loop
from sparsegan.train.gan import Gan, latents
from sparsegan.train.loop import Task, descend, run
from sparsegan.train.losses import LOSSES, adversarial_loss, gradient_penalty


class Line(Task):
    """Finds the slope 2; goes wrong at the steps of ``bad``."""

    def __init__(self, bad: dict[int, float] | None = None, spoil: int = 0) -> None:
        self.weight = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(self.weight.weight)
        self.modules, self.optimisers = (
            {"line": self.weight},
            [torch.optim.Adam(self.weight.parameters(), 0.1)],
        )
        self.bad, self.spoil, self.count, self.rates = bad or {}, spoil, 0, []

    def step(self, rng: torch.Generator) -> Tensor:
        self.count += 1
        x = torch.randn(8, 1, generator=rng)
        loss = (self.weight(x) - 2 * x).square().mean()
        self.rates.append(self.optimisers[0].param_groups[0]["lr"])
        descend(loss, self.optimisers[0])
        if self.count == self.spoil:
            with torch.no_grad():
                self.weight.weight.fill_(torch.nan)
        return loss.detach() + self.bad.get(self.count, 0.0)

    def rate(self, progress: float) -> float:
        return 1.0


@pytest.mark.parametrize("fast", [False, True])  # casts of weights must not outlive them
def test_it_learns_and_reports_each_step(fast: bool):
    seen: list[int] = []
    task = Line()
    trained = run(task, 120, seed=0, fast=fast, progress=lambda step, loss: seen.append(step))
    assert seen == list(range(1, 121)) and len(trained.history) == 120 and not trained.events
    assert task.weight.weight.item() == pytest.approx(2, abs=0.05)


def test_what_is_not_finite_is_undone_at_half_the_rate():
    task = Line({60: math.nan})
    trained = run(task, 61, seed=0)
    assert trained.events == ["the loss is nan at step 60"]
    assert task.rates[59:] == [0.1, 0.05]
    untouched = Line()
    run(untouched, 50, seed=0)  # where the last good state was kept
    assert abs(task.weight.weight.item() - untouched.weight.weight.item()) == pytest.approx(0.05, rel=0.9)


def test_weights_that_are_not_finite_are_never_kept():
    # The loss of step 49 is fine, the weights after step 50 are not: the check there must see that, or nothing would.
    task = Line(spoil=50)
    trained = run(task, 60, seed=0)
    assert trained.events == ["weights are not finite at step 50"] and bool(
        task.weight.weight.isfinite().all()
    )


def test_it_gives_up_when_nothing_helps():
    with pytest.raises(FloatingPointError, match="at step 1; look at the data"):
        run(Line({1: math.inf}), 9, seed=0)
    with pytest.raises(FloatingPointError, match=r"does not hold.*at step 12; look"):
        run(Line(dict.fromkeys((4, 6, 8, 10, 12), math.nan)), 20, seed=0)


class Killed(Exception):
    pass


def die_at(step: int) -> Callable[[int, float], None]:
    def progress(done: int, loss: float) -> None:
        if done == step:
            raise Killed

    return progress


@pytest.mark.parametrize("kind", ["cubic", "rigl"])
def test_a_killed_training_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
):
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    images = torch.rand(16, 1, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def gan() -> Gan:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            models = dcgan_generator(8, (16, 8)), conv_discriminator(1, (8, 16), side=16, spectral=True)

        def sparsify(
            model: nn.Module, optimiser: torch.optim.Optimizer, inputs: tuple[Tensor, ...]
        ) -> Sparsifier:
            return Sparsifier(
                model, optimiser, BlockPattern(4, 4), 0.5, steps=12, every=2, kind=kind, example_inputs=inputs
            )

        return Gan(*models, latents(images, (8, 1, 1), 4), sparsify=sparsify)

    whole = gan()
    trained = run(whole, 12, seed=0, after=whole.after)
    for at in (5, 6):  # just before masks change, and just after
        path = tmp_path / f"{at}.safetensors"
        killed, resumed = gan(), gan()
        with pytest.raises(Killed):
            run(killed, 12, seed=0, after=killed.after, state=path, progress=die_at(at))
        again = run(resumed, 12, seed=0, after=resumed.after, state=path)
        assert again.history == trained.history
        for name, module in whole.modules.items():
            other = resumed.modules[name].state_dict()
            assert all(torch.equal(value, other[key]) for key, value in module.state_dict().items()), name
    with pytest.raises(ValueError, match="belongs to another run"):
        other = gan()
        run(other, 13, seed=0, after=other.after, state=path)
    assert prunable_layers(whole.generator)["3"].weight.eq(0).float().mean() > 0.4


def test_what_went_wrong_before_a_kill_is_not_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    path = tmp_path / "state.safetensors"
    with pytest.raises(Killed):
        run(Line({60: math.nan}), 90, seed=0, state=path, progress=die_at(80))
    resumed = Line()
    resumed.bad = dict.fromkeys(range(1, 9, 2), math.nan)
    monkeypatch.setattr(training.time, "monotonic", lambda: 1e9)
    with pytest.raises(FloatingPointError, match=r"at step 60; .* at step 87; look"):
        run(resumed, 90, seed=0, state=path)
    done = run(Line(), 90, seed=0, state=path)
    assert done.events[0] == "the loss is nan at step 60" and 0 < done.seconds < 60


# ------------------------------------------------------------------ GANs

REAL, FAKE = torch.tensor([[0.5], [2.0]]), torch.tensor([[-1.0], [0.25]])


def softplus(x: float) -> float:
    return math.log(1 + math.exp(x))


@pytest.mark.parametrize(
    ("name", "discriminator", "generator"),
    [
        (
            "bce",
            (softplus(-0.5) + softplus(-2)) / 2 + (softplus(-1) + softplus(0.25)) / 2,
            (softplus(1) + softplus(-0.25)) / 2,
        ),
        ("lsgan", 0.5 * ((0.25 + 1) / 2 + (1 + 0.0625) / 2), 0.5 * (4 + 0.5625) / 2),
        ("wgan", -0.375 - 1.25, 0.375),
        ("wgan-gp", -0.375 - 1.25, 0.375),
        ("hinge", (0.5 + 0) / 2 + (0 + 1.25) / 2, 0.375),
    ],
)
def test_losses_by_hand(name: str, discriminator: float, generator: float):
    loss = adversarial_loss(name)
    assert loss.discriminator(REAL, FAKE).item() == pytest.approx(discriminator)
    assert loss.generator(FAKE).item() == pytest.approx(generator)


def test_gradient_penalty_by_hand():
    class Sum(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 3 * x.flatten(1).sum(1, keepdim=True)

    # The gradient is 3 at each of 4 pixels: its norm is 6, whatever the images are.
    images = torch.rand(2, 1, 2, 2)
    penalty = gradient_penalty(Sum(), images, -images, (), torch.rand(2, 1, 1, 1))
    assert penalty.item() == pytest.approx(25)
    # Of a square it depends on where between both images it is taken: at 1/4 of the way from -1 to 1, x = -1/2, gradient -1.
    square = nn.Sequential(nn.Flatten(), Square())
    one = torch.ones(1, 1, 1, 1)
    assert gradient_penalty(square, one, -one, (), torch.full((1, 1, 1, 1), 0.25)).item() == pytest.approx(0)
    assert gradient_penalty(square, one, -one, (), one).item() == pytest.approx(1)


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.square().sum(1, keepdim=True)


def test_an_unknown_loss():
    with pytest.raises(ValueError, match="bce, lsgan, wgan, wgan-gp, hinge"):
        adversarial_loss("mse")


def small_gan(loss: str = "hinge", value: float | None = None, **settings: object) -> Gan:
    rng = torch.Generator().manual_seed(0)
    images = (
        torch.rand(32, 1, 16, 16, generator=rng) * 2 - 1
        if value is None
        else torch.full((32, 1, 16, 16), value)
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        models = dcgan_generator(8, (16, 8)), conv_discriminator(1, (8, 16), side=16)
    return Gan(*models, latents(images, (8, 1, 1), 8), loss=loss, rates=(2e-3, 2e-3), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_moves_images_towards_the_data(loss: str):
    z = torch.randn(16, 8, 1, 1, generator=torch.Generator().manual_seed(1))
    means = []
    for value in (0.9, -0.9):
        task = small_gan(loss, value)
        run(task, 30, seed=0)
        means.append(task.generator.eval()(z).mean().item())
    assert means[0] > means[1] + 0.05


def test_weights_are_clipped_for_the_wasserstein_loss():
    task = small_gan("wgan")
    run(task, 2, seed=0)
    assert max(p.abs().max().item() for p in task.discriminator.parameters()) <= 0.01


def test_a_collapse_is_detected_reported_and_rolled_back(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loop, "CHECK_EVERY", 5)
    task = small_gan()
    last = task.generator[-2]
    rates, weights = [], []

    def spoil(step: int, loss: float) -> None:
        rates.append(task.optimisers[0].param_groups[0]["lr"])
        if step == 7:
            weights.append(last.weight.detach().clone())
            with torch.no_grad():
                last.weight.zero_()  # one grey image, whatever goes in

    trained = run(task, 12, seed=0, progress=spoil)
    assert len(trained.events) == 1
    assert "collapsed" in trained.events[0] and trained.events[0].endswith("at step 10")
    assert last.weight.abs().mean() > 0.5 * weights[0].abs().mean()
    assert rates[10] == pytest.approx(0.5 * 2e-3 * min(1, 2 * (1 - 10 / 12)))


def test_a_generator_that_begins_with_one_image_has_not_collapsed():
    task = small_gan()
    with torch.no_grad():
        task.generator[-2].weight.mul_(1e-3)
    assert run(task, 60, seed=0).events == []


def test_images_that_do_not_differ_are_no_collapse():
    task = small_gan(value=0.5)
    assert run(task, 60, seed=0).events == []


def test_the_average_is_what_is_served_with_statistics_of_its_own():
    task = small_gan()
    run(task, 3, seed=0)
    served = task.finished(0)
    z = torch.randn(256, 8, 1, 1, generator=torch.Generator().manual_seed(5))
    seen = served[0](z)
    assert not served.training and not any(p.requires_grad for p in served.parameters())
    torch.testing.assert_close(served[1].running_mean, seen.mean((0, 2, 3)), atol=0.05, rtol=0.1)
    assert not torch.equal(served[0].weight, task.generator[0].weight)

"""Recovery of a pruned model from its dense teacher."""

import copy
import math

import pytest
import torch
from torch import nn

from sparsegan.prune import prune, recover


def teacher() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.ConvTranspose2d(8, 16, 4, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(True),
            nn.ConvTranspose2d(16, 16, 4, 2, 1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(True),
            nn.ConvTranspose2d(16, 1, 4, 2, 1),
            nn.Tanh(),
        )
        model(torch.randn(64, 8, 1, 1))  # statistics, in training mode
    return model.eval()


def sample(n: int, generator: torch.Generator) -> tuple[torch.Tensor]:
    return (torch.randn(n, 8, 1, 1, generator=generator),)


def pruned(sparsity: float = 0.3) -> nn.Module:
    return prune(teacher(), sparsity=sparsity, importance="l1", layers=["3"])


def error(model: nn.Module) -> float:
    z = sample(64, torch.Generator().manual_seed(9))
    with torch.no_grad():
        return (model(*z) - teacher()(*z)).square().mean().item()


def test_recovers_and_leaves_everything_else_alone():
    model, dense = pruned(0.5), teacher()
    model[1].train()
    zeros, before = model[3].weight == 0, error(model.eval())
    model[1].train()
    statistics = {name: b.clone() for name, b in model.named_buffers()}
    strides = [p.stride() for p in model.parameters()]
    dense_weights = copy.deepcopy(dense.state_dict())
    rng = torch.random.get_rng_state()
    seen = []
    history = recover(model, dense, sample, 80, batch=16, lr=5e-3, progress=lambda *args: seen.append(args))
    assert model[1].training and not model[0].training
    assert error(model.eval()) < 0.5 * before
    assert torch.equal(zeros, model[3].weight == 0)
    assert all(torch.equal(statistics[name], b) for name, b in model.named_buffers())
    assert all(torch.equal(dense_weights[name], w) for name, w in dense.state_dict().items())
    assert strides == [p.stride() for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(rng, torch.random.get_rng_state())
    assert seen == list(enumerate(history, 1)) and len(history) == 80
    assert sum(history[-10:]) < 0.7 * sum(history[:10])


def test_seed_decides():
    def train(seed: int) -> torch.Tensor:
        model = pruned()
        recover(model, teacher(), sample, 3, batch=4, seed=seed)
        return model[3].weight.detach()

    assert torch.equal(train(1), train(1))
    assert not torch.equal(train(1), train(2))


def test_own_loss_and_no_grad_outside():
    with torch.no_grad():
        history = recover(pruned(), teacher(), sample, 2, batch=4, loss=lambda a, b: (a - b).abs().sum())
    assert history[0] > 1


def test_autocast_trains_the_weights_it_computes_with():
    exact = recover(pruned(), teacher(), sample, 30, batch=8, lr=1e-2)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = recover(pruned(), teacher(), sample, 30, batch=8, lr=1e-2)
    assert rounded == pytest.approx(exact, rel=0.05)


def test_a_masked_layer_learns_only_where_it_is_kept():
    model = pruned()
    original = model[3].parametrizations.weight.original
    before, mask = original.detach().clone(), model[3].parametrizations.weight[0].mask
    recover(model, teacher(), sample, 3, batch=4)
    changed = original != before
    assert bool(changed.any()) and not bool(changed[~mask].any())


class Trouble:
    """A loss that goes wrong at some calls: its value, or only its gradient."""

    def __init__(self, calls: set[int], gradient: bool = False):
        self.calls, self.gradient, self.count, self.losses = calls, gradient, 0, []

    def __call__(self, image, target):
        self.count += 1
        loss = (image - target).square().mean()
        if self.count not in self.calls:
            return loss
        return loss + (0 * loss).sqrt() if self.gradient else loss * torch.nan


def test_a_loss_that_is_not_finite_is_undone_and_training_goes_on():
    model = pruned()
    history = recover(model, teacher(), sample, 60, batch=16, lr=5e-3, loss=Trouble({3, 30}))
    assert [step for step, loss in enumerate(history, 1) if not math.isfinite(loss)] == [3, 30]
    assert error(model) < error(pruned())


def test_undoing_restores_weights_and_halves_the_rate():
    # At step 2 the loss is NaN: back to the weights before step 1. Step 3 is then the first of a fresh Adam,
    # at half the rate of its place on the cosine, and the first step of Adam moves a weight by the rate.
    model = pruned()
    start = model[6].bias.detach().clone()
    rate = 0.5 * 1e-2 * 0.5 * (1 + math.cos(math.pi * 2 / 3))
    recover(model, teacher(), sample, 3, batch=4, lr=1e-2, loss=Trouble({2}))
    assert (model[6].bias - start).abs().item() == pytest.approx(rate, rel=1e-3)


@pytest.mark.parametrize("last", [20, 40])
def test_a_gradient_that_is_not_finite_cannot_spoil_the_model(last):
    model = pruned()
    history = recover(model, teacher(), sample, 40, batch=4, loss=Trouble({last}, gradient=True))
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert math.isfinite(history[-1]) and sum(map(math.isnan, history)) == (last < 40)


def test_not_finite_from_the_start():
    broken = teacher()
    with torch.no_grad():
        broken[0].weight[0] = torch.nan
    with pytest.raises(RuntimeError, match="loss is nan at the first step"):
        recover(pruned(), broken, sample, 3, batch=4)


@pytest.mark.parametrize(
    "message, arguments",
    [
        ("steps >= 1", {"steps": 0}),
        ("batch >= 1", {"steps": 1, "batch": 0}),
        ("positive learning rate", {"steps": 1, "lr": 0.0}),
        ("positive learning rate", {"steps": 1, "lr": math.nan}),
        ('loss is "l1\\+l2" or a callable', {"steps": 1, "loss": "lpips"}),
    ],
)
def test_bad_arguments(message, arguments):
    with pytest.raises(ValueError, match=message):
        recover(pruned(), teacher(), sample, **arguments)


def test_a_frozen_model():
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        recover(pruned().requires_grad_(False), teacher(), sample, 1)

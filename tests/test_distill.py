"""Recovery of a pruned model from its dense teacher."""

import copy
import math
import sys

import pytest
import torch
from torch import nn

from sparsegan import files, training
from sparsegan.patterns import BlockPattern
from sparsegan.prune import prune, recover
from sparsegan.prune.distill import Phase
from sparsegan.prune.losses import Adversarial, Balanced, LayerMatching, Weighted, l1
from sparsegan.prune.schedule import SCHEDULES, Schedule


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


@pytest.mark.parametrize(
    ("message", "rates"), [("only the last phase", (1e-3, None)), ("positive rate", (None, -1.0))]
)
def test_rates_of_phases_that_make_no_sense(message, rates):
    with pytest.raises(ValueError, match=message):
        recover(pruned(), teacher(), sample, 4, loss=[Phase(0.5, l1, 4, lr) for lr in rates])


def test_a_frozen_model():
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        recover(pruned().requires_grad_(False), teacher(), sample, 1)


# ------------------------------------------------------------------ phases, losses that learn, schedules


def test_phases_follow_each_other():
    seen = []

    def spy(name):
        def loss(image, target):
            seen.append((name, len(image)))
            return (image - target).square().mean()

        return loss

    recover(pruned(), teacher(), sample, 10, loss=[Phase(0.3, spy("a"), 4), Phase(0.7, spy("b"), 6)])
    assert seen == [("a", 4)] * 3 + [("b", 6)] * 7
    with pytest.raises(ValueError, match="shares of the phases must add up to 1"):
        recover(pruned(), teacher(), sample, 10, loss=[Phase(0.3, spy("a"), 4)])


def discriminator() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Conv2d(1, 4, 4, 2, 1), nn.LeakyReLU(0.2), nn.Flatten(), nn.Linear(256, 1))


def test_an_adversary_learns_to_tell_the_images_apart():
    critic = discriminator()
    adversary = Adversarial(critic, lr=1e-2)
    z = sample(64, torch.Generator().manual_seed(9))
    with torch.no_grad():
        fake, real = pruned(0.9)(*z), teacher()(*z)
    for _ in range(60):
        adversary.update(fake, real)
    assert critic(real).mean() > critic(fake).mean() + 0.5
    # The model's gain is to be taken for the teacher.
    assert adversary(real, real) < adversary(fake, real) - 0.5
    recover(pruned(), teacher(), sample, 3, batch=4, loss=Weighted((1.0, l1), (0.01, adversary)))


def test_a_balanced_adversary_pulls_as_hard_as_its_share_and_only_once_it_has_learnt():
    z = sample(8, torch.Generator().manual_seed(9))
    with torch.no_grad():
        fake, real = pruned(0.9)(*z), teacher()(*z)
    adversary = Adversarial(discriminator())
    loss = Balanced(l1, adversary, share=0.5, warm_up=2)

    def gradient(of):
        image = fake.clone().requires_grad_()
        value = of(image, real)
        assert value.item() == pytest.approx(of(fake, real).item())
        return torch.autograd.grad(value, image)[0]

    pull = gradient(l1)
    for _ in range(2):
        assert torch.equal(gradient(loss), pull)
        loss.update(fake, real)
    push = gradient(loss) - pull
    assert push.norm().item() == pytest.approx(0.5 * pull.norm().item(), rel=1e-4)
    torch.testing.assert_close(push / push.norm(), (g := gradient(adversary)) / g.norm())
    with torch.no_grad():
        assert loss(fake, real).item() == pytest.approx(l1(fake, real).item())
    assert torch.equal(gradient(lambda image, _: loss(image, image.detach())), torch.zeros_like(pull))


def test_a_phase_at_a_constant_rate_gives_the_average_of_its_weights(monkeypatch):
    rates, weights = [], []
    monkeypatch.setattr(sys.modules["sparsegan.prune.distill"], "_AVERAGED", 3)

    class Spy(torch.optim.Adam):
        def step(self, closure=None):
            super().step(closure)
            rates.append(self.param_groups[0]["lr"])
            weights.append(self.param_groups[0]["params"][0].detach().clone())

    monkeypatch.setattr(sys.modules["sparsegan.prune.distill"], "Adam", Spy)
    model = pruned()
    recover(model, teacher(), sample, 10, lr=1e-2, loss=[Phase(0.4, l1, 4), Phase(0.6, l1, 4, 3e-3)])
    falling = [1e-2 * 0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
    assert rates == pytest.approx(falling + [3e-3] * 6)
    mean = weights[4]
    for count, new in enumerate(weights[5:], 2):
        mean = mean + (new - mean) / min(count, 3)
    torch.testing.assert_close(next(p for p in model.parameters() if p.requires_grad), mean)


def test_an_average_of_no_steps_undoes_nothing():
    trained, expected = pruned(), pruned()
    recover(trained, teacher(), sample, 1, loss=[Phase(0.9, l1, 4), Phase(0.1, l1, 4, 1e-3)])
    recover(expected, teacher(), sample, 1, loss=[Phase(1.0, l1, 4)])
    assert torch.equal(trained[3].weight, expected[3].weight)
    assert not torch.equal(trained[3].weight, pruned()[3].weight)


def test_a_spoilt_last_step_leaves_the_average_of_what_was_kept():
    weights, model = [], pruned()
    phases = [Phase(0.25, l1, 4), Phase(0.75, Trouble({30}, gradient=True), 4, 1e-3)]
    recover(
        model,
        teacher(),
        sample,
        40,
        loss=phases,
        progress=lambda *_: weights.append(model[6].bias.detach().clone()),
    )
    # The weights of the phase up to step 25, when the state was kept last.
    torch.testing.assert_close(model[6].bias.detach(), torch.stack(weights[10:25]).mean(0))


def test_the_optimiser_forgets_faster_while_an_adversary_plays(monkeypatch):
    seen = []

    class Spy(torch.optim.Adam):
        def step(self, closure=None):
            seen.append(self.param_groups[0]["betas"][0])
            return super().step(closure)

    monkeypatch.setattr(sys.modules["sparsegan.prune.distill"], "Adam", Spy)
    recover(
        pruned(), teacher(), sample, 4, loss=[Phase(0.5, Weighted((1.0, l1)), 4), Phase(0.5, balanced(), 4)]
    )
    assert seen == [0.9, 0.9, 0.5, 0.5]


def test_data_in_place_of_the_teacher():
    asked = []

    def data(n):
        asked.append(n)
        return torch.ones(n, 1, 16, 16)

    critic = nn.Sequential(nn.Flatten(), nn.Linear(256, 1))
    adversary = Adversarial(critic, data=data)
    recover(pruned(), teacher(), sample, 3, batch=4, loss=Weighted((1.0, l1), (0.01, adversary)))
    assert asked == [4, 4, 4]


def test_layers_are_matched_by_name():
    model, dense = pruned(0.5), teacher()
    matching = LayerMatching(model, dense, ["0", "3"])
    z = sample(4, torch.Generator().manual_seed(1))
    with torch.no_grad():
        y, t = model(*z), dense(*z)
        found = matching(y, t).item()
        a, b = dense[3](dense[2](dense[1](dense[0](*z)))), model[3](dense[2](dense[1](dense[0](*z))))
    wanted = (0 + ((a - b).square().mean() / a.square().mean()).item()) / 2
    assert found == pytest.approx(wanted, rel=1e-4)
    matching.close()
    assert not model[3]._forward_hooks
    with pytest.raises(ValueError, match="no layer of the same name"):
        LayerMatching(model, dense, ["x"])


@pytest.mark.parametrize("kind", SCHEDULES)
def test_every_schedule_ends_at_the_whole_sparsity(kind):
    model, shares = teacher(), []

    def prune_to(share):
        shares.append(share)
        prune(model, BlockPattern(4, 4), sparsity=0.5 * share, importance="l1", layers=["3"])

    schedule = Schedule(kind, model, prune_to, 40)
    recover(model, teacher(), sample, 40, batch=4, lr=1e-3, tighten=schedule)
    assert shares == sorted(shares) and shares[-1] == 1.0
    assert len(shares) == {"one-shot": 1, "cubic": 11, "iterative": 3}[kind]
    assert (model[3].weight == 0).float().mean() == pytest.approx(0.5, abs=0.02)


def test_rewinding_starts_over_from_the_first_weights():
    model = teacher()
    first = model[3].weight.detach().clone()
    schedule = Schedule(
        "iterative",
        model,
        lambda share: prune(model, sparsity=0.5 * share, importance="l1", layers=["3"]),
        40,
    )
    with torch.no_grad():
        model[3].parametrizations.weight.original.add_(1.0)
        model[0].weight.add_(1.0)
    assert not schedule(9) and schedule(10)
    kept = model[3].weight != 0
    assert torch.equal(model[3].weight[kept], first[kept])
    assert torch.equal(model[0].weight, teacher()[0].weight)


def test_unknown_schedule():
    with pytest.raises(ValueError, match="one-shot, cubic, iterative"):
        Schedule("linear", teacher(), lambda share: None, 10)


# ------------------------------------------------------------------ a run that was interrupted


class Killed(Exception):
    pass


def weighted():
    return Weighted((1.0, l1), (0.01, Adversarial(discriminator())))


def balanced():
    return Weighted((1.0, Balanced(l1, Adversarial(discriminator()), warm_up=3)))


def averaged():
    return [Phase(0.3, l1, 4), Phase(0.7, balanced(), 4, 1e-3)]


def interrupted(path, monkeypatch, at, loss=weighted, **settings):
    """The weights after a training that was killed at a step and then started again."""
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)

    def kill(done, loss):
        if done == at:
            raise Killed

    def train(progress):
        model = pruned()
        steps = {"steps": 12, "batch": 4, "loss": loss(), "state": path, "progress": progress, **settings}
        return model, recover(model, teacher(), sample, **steps)

    if at:
        with pytest.raises(Killed):
            train(kill)
        assert path.exists()
    model, history = train(None)
    return model[3].weight.detach(), history


@pytest.mark.parametrize("loss", [weighted, balanced, averaged])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, monkeypatch, loss):
    whole, history = interrupted(tmp_path / "a", monkeypatch, at=0, loss=loss)
    resumed, resumed_history = interrupted(tmp_path / "b", monkeypatch, at=7, loss=loss)
    assert torch.equal(whole, resumed) and history == resumed_history


def test_the_state_of_another_run_is_refused(tmp_path, monkeypatch):
    interrupted(tmp_path / "a", monkeypatch, at=3)
    with pytest.raises(ValueError, match="belongs to another run"):
        interrupted(tmp_path / "a", monkeypatch, at=0, seed=5)
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:1000])
    with pytest.raises(ValueError, match="damaged"):
        interrupted(tmp_path / "a", monkeypatch, at=0)


def test_a_full_disk_leaves_the_last_state(tmp_path, monkeypatch):
    path = tmp_path / "state"
    files.write_atomically(path, b"before")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device; what was there before is unchanged"):
        files.write_atomically(path, b"after")
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_number_format_trains_and_resumes(tmp_path, dtype):
    def inputs(n, generator):
        return tuple(x.to(dtype) for x in sample(n, generator))

    def train(state, steps=3):
        model = pruned().to(dtype)
        return recover(model, teacher().to(dtype), inputs, steps, batch=4, state=state)

    assert train(None) == train(tmp_path / "state") == train(tmp_path / "state")

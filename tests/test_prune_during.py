"""Pruning while training: the schedules, what is dropped and regrown, the optimiser's state, and going on after a kill."""

import copy
import itertools
import math

import pytest
import torch
import torch.distributed as dist
from test_importance import linear
from test_prune import Z, generator, masks, removed
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations
from torch.nn.utils.parametrizations import spectral_norm

from sparsegan.patterns import BlockPattern, ChannelPattern, NMPattern, weight_view
from sparsegan.prune import Sparsifier, make_permanent, prune, sparsity_report
from sparsegan.prune.allocate import BudgetError
from sparsegan.prune.masks import find_mask, set_mask

SINGLE = BlockPattern(1, 1)
LAYERS = ["3", "6"]  # of `generator` that are not spared


def discriminator() -> nn.Sequential:
    """Images [N, 3, 16, 16] to scores [N, 1, 2, 2], under spectral norm."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        widths = (3, 16, 32, 32)
        layers = []
        for inner, outer in itertools.pairwise(widths):
            layers += [spectral_norm(nn.Conv2d(inner, outer, 4, 2, 1)), nn.LeakyReLU(0.1)]
        return nn.Sequential(*layers, spectral_norm(nn.Conv2d(32, 1, 1))).train()


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.5, 0.99), weight_decay=1e-3)


def originals(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: model.get_submodule(name).parametrizations.weight.original for name in LAYERS}


def mask_of(layer: nn.Module) -> torch.Tensor:
    found = find_mask(layer)
    assert found is not None
    return found.mask


def descend(model, optimiser, x) -> None:
    optimiser.zero_grad()
    model(x).square().mean().backward()
    optimiser.step()


def train(model, optimiser, sparsifier, steps) -> list[int]:
    """Returns the steps whose masks have changed."""
    changes = []
    for step in steps:
        noise = torch.randn(4, 16, 1, 1, generator=torch.Generator().manual_seed(step))
        descend(model, optimiser, noise)
        if sparsifier(step):
            changes.append(step)
    return changes


# ---- the schedules


def test_cubic_by_hand():
    # 128 single weights of falling magnitude; a half of them go, at t = 1/4, 1/2, 3/4 and 1: 64 · (1 - (1 - t)³).
    model = nn.Sequential(linear([[float(128 - i) for i in range(128)]]))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.0)
    sparsifier = Sparsifier(model, optimiser, SINGLE, 0.5, steps=10, every=2, until=0.9, layers=["0"])
    assert sparsifier.last_step == 8 and sparsifier.sparsity() == 0
    gone = []
    for step in range(1, 11):
        changed = sparsifier(step)
        assert changed == (step in (2, 4, 6, 8))
        gone.append(int((model[0].weight == 0).sum()))
        assert not model[0].weight[0, 128 - gone[-1] :].any() and sparsifier.sparsity() == gone[-1] / 128
    exact = [64 * (1 - (1 - t) ** 3) for t in (0.25, 0.5, 0.75, 1)]
    assert gone == [0, *(math.ceil(x) for x in exact for _ in (0, 1)), 64]


@pytest.mark.parametrize("kind", ["cubic", "rigl"])
@pytest.mark.parametrize("pattern", [BlockPattern(4, 4), ChannelPattern(), BlockPattern(5, 3)], ids=str)
def test_sparsity_is_reached_in_the_pattern_and_stays(kind, pattern):
    model = generator(0).train()
    optimiser = adam(model)
    sparsifier = Sparsifier(
        model, optimiser, pattern, 0.7, steps=20, every=3, until=0.8, kind=kind, example_inputs=Z
    )
    assert sparsifier.sparsity() == 0 if kind == "cubic" else sparsifier.sparsity() >= 0.7
    changes = train(model, optimiser, sparsifier, range(1, 21))
    if kind == "cubic":
        assert changes == [3, 6, 9, 12, 15]
    elif (
        pattern != ChannelPattern()
    ):  # a channel that ReLU holds at zero has no gradient that could bring it back
        assert changes[:3] == [3, 6, 9]
    with torch.no_grad():
        for original in originals(model).values():
            original.fill_(1.0)  # so that only what is masked is zero: "rigl" brings weights back at zero
    rows = {row.name: row for row in sparsity_report(model, Z)}
    assert 0.7 <= removed(model, Z) < 0.75
    assert sparsifier.sparsity() == pytest.approx(removed(model, Z))
    assert rows["0"].density == rows["8"].density == 1
    if pattern != ChannelPattern():
        assert rows["3"].density == pytest.approx(rows["6"].density, abs=0.02)
    for name in LAYERS:
        assert pattern.respected_by(weight_view(model.get_submodule(name)) != 0)
    assert removed(make_permanent(model), Z) >= 0.7


@pytest.mark.parametrize("kind", ["cubic", "rigl"])
def test_n_of_m(kind):
    model = generator(0)
    optimiser = adam(model)
    sparsifier = Sparsifier(model, optimiser, NMPattern(1, 4), steps=12, every=3, until=1, kind=kind)
    seen = []
    for step in range(1, 13):
        train(model, optimiser, sparsifier, [step])
        if step % 3 == 0:
            seen.append(int(mask_of(model[6]).sum()) * 4 / mask_of(model[6]).numel())
            assert NMPattern(round(seen[-1]), 4).respected_by(weight_view(model[6], mask_of(model[6])))
    # 3 · (1 - (1 - t)³) of four are to go: 1.73, 2.63, 2.95 and 3, of which whole ones have gone.
    assert seen == ([3, 2, 2, 1] if kind == "cubic" else [1, 1, 1, 1])


def below(model, pattern, threshold, **when):
    """Prunes layer 0 by a threshold, until the last step, to at most 75 %; nothing is learnt."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.0)
    settings = {"kind": "threshold", "threshold": threshold, "until": 1, "layers": ["0"], **when}
    return Sparsifier(model, optimiser, pattern, 0.75, **settings)


def test_threshold_by_hand():
    model = nn.Sequential(linear([[3.0, -4.0, 1.0, 1.0, 0.5, 0.5, 1.0, 0.0, 0.9]]))
    sparsifier = below(model, BlockPattern(1, 2), 0.8, steps=4, every=2)
    assert not sparsifier(1) and bool(model[0].weight[0, 4])
    # Root mean squares: 3.5, 1, 0.5, 0.71 and, of one weight, 0.9.
    assert sparsifier(2)
    assert model[0].weight.tolist() == [[3, -4, 1, 1, 0, 0, 0, 0, pytest.approx(0.9)]]
    with torch.no_grad():
        model[0].parametrizations.weight.original[0, 2] = 0.1
    assert not sparsifier(3) and sparsifier(4)
    assert model[0].weight[0, :4].tolist() == [3, -4, 0, 0]


def test_threshold_stops_at_the_sparsity():
    model = nn.Sequential(linear([[float(1 + i) for i in range(16)]]))
    sparsifier = below(model, SINGLE, 100.0, steps=1, every=1)
    assert sparsifier(1) and model[0].weight.tolist() == [[0.0] * 12 + [13, 14, 15, 16]]


def test_rigl_by_hand():
    x = torch.tensor([[5.0, 1.0, 0.1, 3.0, 7.0, 2.0, 0.2, 4.0]])  # the gradient of each weight is its input
    model = nn.Sequential(linear([[1.0] * 8]))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.0)
    sparsifier = Sparsifier(
        model, optimiser, SINGLE, 0.5, steps=4, every=1, until=1, regrow=1.0, kind="rigl", layers=["0"]
    )
    with torch.no_grad():
        set_mask(model[0], torch.tensor([[False, True, True, True, False, True, False, False]]), grow=True)
        model[0].parametrizations.weight.original.copy_(torch.tensor([[0.0, 4, -3, 2, 0, -1, 0, 0]]))
    optimiser.zero_grad()
    model(x).sum().backward()
    optimiser.step()
    assert sparsifier(1)
    # At t = 1/4 the share (1 + cos(π/4)) / 2 = 0.85 of four kept, three, go: all but 4. The gradients 7, 5, 4 come back.
    assert mask_of(model[0]).tolist() == [[True, True, False, False, True, False, False, True]]
    assert model[0].weight.tolist() == [[0, 4, 0, 0, 0, 0, 0, 0]]
    optimiser.zero_grad()
    model(x).sum().backward()
    # At t = 1/2 a half goes: two of the three zeros, the first ones; of what is then free 7 is back at once, and 5 too.
    assert not sparsifier(2)


def test_rigl_sees_the_gradient_that_the_dense_model_has():
    model, x = generator(0), torch.randn(4, 16, 1, 1)
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-2)
    sparsifier = Sparsifier(model, optimiser, sparsity=0.5, steps=10, every=2, kind="rigl", layers=LAYERS)
    descend(model, optimiser, x)
    for name, original in originals(model).items():
        assert not original.grad[~mask_of(model.get_submodule(name))].any()
    sparsifier(1)
    dense = make_permanent(copy.deepcopy(model))
    for one in (model, dense):
        one.zero_grad()
        one(x).square().mean().backward()
    for name, original in originals(model).items():
        gradient = dense.get_submodule(name).weight.grad
        assert torch.equal(original.grad, gradient)
        assert gradient[~mask_of(model.get_submodule(name))].any()


def test_rigl_starts_at_random():
    def first(seed):
        model = generator(0)
        Sparsifier(model, adam(model), sparsity=0.5, steps=10, kind="rigl", layers=LAYERS, seed=seed)
        return masks(model)

    one, same, other = first(0), first(0), first(1)
    assert all(torch.equal(one[name], same[name]) for name in LAYERS)
    assert not any(torch.equal(one[name], other[name]) for name in LAYERS)
    assert all(one[name].float().mean().item() == pytest.approx(0.5, abs=0.01) for name in LAYERS)


def test_rigl_wanders_less_and_less():
    model = generator(0)
    optimiser = adam(model)
    sparsifier = Sparsifier(model, optimiser, steps=20, every=4, until=1, regrow=0.5, kind="rigl")
    moved, before = [], mask_of(model[6]).clone()
    for step in range(1, 21):
        train(model, optimiser, sparsifier, [step])
        if step % 4 == 0:
            mask = mask_of(model[6]).clone()
            assert int(mask.sum()) == int(before.sum())
            moved.append(int((mask & ~before).sum()))
            before = mask
    assert moved[0] > moved[2] > moved[4] == 0


# ---- what the optimiser remembers


@pytest.mark.parametrize("kind", ["cubic", "rigl"])
@pytest.mark.parametrize(
    "make",
    [
        adam,
        lambda model: torch.optim.SGD(model.parameters(), lr=1e-2, momentum=0.9, weight_decay=1e-2),
        lambda model: torch.optim.RMSprop(model.parameters(), lr=1e-3, momentum=0.5),
    ],
    ids=["Adam", "SGD", "RMSprop"],
)
def test_optimiser_state_follows_the_masks(kind, make):
    model = generator(0)
    optimiser = make(model)
    sparsifier = Sparsifier(model, optimiser, BlockPattern(4, 4), 0.6, steps=12, every=3, until=1, kind=kind)
    came_back = 0
    for step in range(1, 13):
        before = {name: mask_of(model.get_submodule(name)).clone() for name in LAYERS}
        train(model, optimiser, sparsifier, [step])
        for name, original in originals(model).items():
            mask = mask_of(model.get_submodule(name))
            regrown = mask & ~before[name]
            came_back += int(regrown.sum())
            if step % 3 == 2 and kind == "rigl":
                continue  # the dense gradient is let through in the next step, and undone by the event after it
            new = ~mask | regrown
            state = [v for v in optimiser.state[original].values() if v.shape == original.shape]
            assert state and not any(bool(tensor[new].any()) for tensor in [original, *state])
            assert all(bool(tensor[~new].any()) for tensor in [original, *state])
    assert (came_back > 0) == (kind == "rigl")


def test_a_regrown_weight_learns():
    model = generator(0)
    optimiser = adam(model)
    sparsifier = Sparsifier(model, optimiser, sparsity=0.6, steps=20, every=2, until=1, kind="rigl")
    train(model, optimiser, sparsifier, [1])
    before = mask_of(model[6]).clone()
    train(model, optimiser, sparsifier, [2])
    regrown = mask_of(model[6]) & ~before
    assert bool(regrown.any()) and not model[6].weight[regrown].any()
    train(model, optimiser, sparsifier, [3])
    learnt = originals(model)["6"].grad[regrown] != 0
    assert bool(learnt.any()) and torch.equal(model[6].weight[regrown] != 0, learnt)


def test_a_copy_is_made_permanent_without_the_model():
    model = generator(0)
    optimiser = adam(model)
    sparsifier = Sparsifier(model, optimiser, sparsity=0.6, steps=10, every=2, kind="rigl")
    copied = make_permanent(copy.deepcopy(model))
    assert type(copied[6]) is nn.Conv2d and find_mask(copied[6]) is None
    train(model, optimiser, sparsifier, [1, 2])
    assert model[6].weight.shape == copied[6].weight.shape


# ---- spectral norm


@pytest.mark.parametrize("kind", ["cubic", "rigl"])
def test_discriminator_under_spectral_norm(kind):
    model = discriminator()
    optimiser = adam(model)
    x = torch.randn(8, 3, 16, 16)
    sparsifier = Sparsifier(
        model, optimiser, BlockPattern(4, 4), 0.6, steps=40, every=2, kind=kind, example_inputs=(x,)
    )
    for step in range(1, 41):
        descend(model, optimiser, x)
        sparsifier(step)
    assert find_mask(model[0]) is find_mask(model[6]) is None  # they touch the image, and are small
    assert removed(model.eval(), (x,)) >= 0.6
    for layer in (model[2], model[4]):
        mask, weight = mask_of(layer), layer.weight.detach()
        assert not weight[~mask].any() and not layer.parametrizations.weight.original[~mask].any()
        # The norm is that of the weights which are left; u and v follow it by one iteration a step.
        assert torch.linalg.matrix_norm(weight.flatten(1), 2).item() == pytest.approx(1, abs=0.02)


def test_reading_weights_leaves_spectral_norm_alone():
    model = discriminator()
    before = copy.deepcopy(model.state_dict())
    sparsifier = Sparsifier(model, adam(model), steps=4, every=2, layers=["2"])
    for step in range(1, 5):
        sparsifier(step)
    after = model.state_dict()
    assert torch.equal(
        after["2.parametrizations.weight.1._u"], before["2.parametrizations.weight.0._u"]
    ) and torch.equal(after["4.parametrizations.weight.0._u"], before["4.parametrizations.weight.0._u"])
    assert model[2].training


# ---- going on


@pytest.mark.parametrize("kind", ["cubic", "threshold", "rigl"])
@pytest.mark.parametrize(
    "killed", [3, 4, 5]
)  # before, at and after an event, of which "rigl" needs the gradient
def test_goes_on_after_a_kill(kind, killed):
    def start():
        model = discriminator()
        optimiser = adam(model)
        threshold = 0.05 if kind == "threshold" else None
        return (
            model,
            optimiser,
            Sparsifier(
                model,
                optimiser,
                sparsity=0.6,
                steps=10,
                every=2,
                until=1,
                kind=kind,
                threshold=threshold,
                layers=["2", "4"],
            ),
        )

    def run(model, optimiser, sparsifier, steps):
        for step in steps:
            x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(step))
            descend(model, optimiser, x)
            sparsifier(step)

    model, optimiser, sparsifier = start()
    run(model, optimiser, sparsifier, range(1, killed + 1))
    saved = copy.deepcopy((model.state_dict(), optimiser.state_dict(), sparsifier.state_dict()))
    run(model, optimiser, sparsifier, range(killed + 1, 11))
    assert sparsifier.sparsity() > 0.02

    again = start()
    for one, state in zip(again, saved, strict=True):
        one.load_state_dict(state)
    run(*again, range(killed + 1, 11))
    assert again[0].state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(again[0].state_dict()[n], tensor) for n, tensor in model.state_dict().items())
    for mine, theirs in zip(again[1].state.values(), optimiser.state.values(), strict=True):
        assert all(torch.equal(mine[key], theirs[key]) for key in theirs)


def test_steps_follow_one_another():
    model = generator(0)
    optimiser = adam(model)
    sparsifier = Sparsifier(model, optimiser, steps=20, every=5)
    with pytest.raises(ValueError, match="step 0 does not follow step 0: count the steps done from 1"):
        sparsifier(0)
    with pytest.raises(ValueError, match=r"step 7 does not follow step 0.*load_state_dict\(\{"):
        sparsifier(7)
    sparsifier.load_state_dict({"step": 6})
    assert not sparsifier(7) and sparsifier(11)  # which makes up for 10
    with pytest.raises(ValueError, match="step 11 does not follow step 11"):
        sparsifier(11)
    assert sparsifier.state_dict() == {"step": 11}


def test_what_is_not_finite_changes_nothing():
    model = generator(0)
    optimiser = adam(model)
    sparsifier = Sparsifier(model, optimiser, steps=10, every=1, kind="rigl")
    before = masks(model)
    descend(model, optimiser, torch.randn(4, 16, 1, 1))
    originals(model)["3"].grad[0, 0, 0, 0] = math.inf
    assert not sparsifier(1)
    assert all(torch.equal(before[name], mask) for name, mask in masks(model).items())
    good = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        originals(model)["6"][mask_of(model[6])] = math.nan
    with pytest.raises(FloatingPointError, match="layer '6' holds NaN"):
        sparsifier(2)
    model.load_state_dict(good)
    descend(model, optimiser, torch.randn(4, 16, 1, 1))
    assert sparsifier(3)
    optimiser.zero_grad()
    with pytest.raises(RuntimeError, match="before zero_grad"):
        sparsifier(4)


# ---- several processes


def _one_process(rank: int, address: str, found) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    sparsifier = Sparsifier(
        model, optimiser, BlockPattern(2, 2), 0.5, steps=8, every=2, until=1, kind="rigl", layers=["2"]
    )
    wrapped = DistributedDataParallel(model)
    first = mask_of(model[2]).clone()
    for step in range(1, 9):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * step + rank))  # other data in each
        descend(wrapped, optimiser, x)
        sparsifier(step)
    found[rank] = (first.tolist(), mask_of(model[2]).tolist(), model[2].weight.tolist())
    dist.destroy_process_group()


def test_masks_are_the_same_in_all_processes(tmp_path):
    with torch.multiprocessing.Manager() as manager:
        found = manager.dict()
        # Forked, because starting torch anew takes longer than all tests here.
        torch.multiprocessing.start_processes(
            _one_process, (f"file://{tmp_path}/meet", found), nprocs=2, start_method="fork"
        )
        assert found[0] == found[1]
        first, last, _ = found[0]
        assert first != last


# ---- bad arguments


def test_existing_zeros():
    model = prune(generator(0), sparsity=0.3, importance="l1", layers=LAYERS)
    before = masks(model)
    optimiser = adam(model)
    sparsifier = Sparsifier(model, optimiser, sparsity=0.6, steps=10, every=5, layers=LAYERS)
    assert sparsifier.sparsity() == pytest.approx(0.3, abs=0.01)
    train(model, optimiser, sparsifier, range(1, 11))
    assert sparsifier.sparsity() == pytest.approx(0.6, abs=0.01)
    assert not any(bool((mask & ~before[name]).any()) for name, mask in masks(model).items())


def test_masked_weights_go_before_weights_that_are_zero():
    model = nn.Sequential(linear([[0.0, 0, 0, 0, 1, 2, 3, 4]]))
    set_mask(model[0], torch.tensor([[False, False] + 6 * [True]]))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.0)
    sparsifier = Sparsifier(model, optimiser, SINGLE, 0.25, steps=1, until=1, layers=["0"])
    assert not sparsifier(1) and int(mask_of(model[0]).sum()) == 6


@pytest.mark.parametrize(
    "error, message, arguments",
    [
        (TypeError, "pattern must be a Pattern", {"pattern": "4x4"}),
        (ValueError, "unknown kind 'linear'; there are: cubic, threshold, rigl", {"kind": "linear"}),
        (ValueError, "needs a threshold above 0, and no other takes one; got None", {"kind": "threshold"}),
        (ValueError, "no other takes one; got 0.1", {"threshold": 0.1}),
        (ValueError, "threshold above 0", {"kind": "threshold", "threshold": -1.0}),
        (
            ValueError,
            "2:4 says how many",
            {"kind": "threshold", "threshold": 1.0, "pattern": NMPattern(2, 4)},
        ),
        (ValueError, "until=1.5", {"until": 1.5}),
        (ValueError, "regrow=0", {"regrow": 0}),
        (ValueError, "masks would never change: every 80 steps, until 0.75 of 100", {"every": 80}),
        (ValueError, "masks would never change: every 0", {"every": 0}),
        (ValueError, "masks would never change", {"steps": 1}),
        (ValueError, r"in \[0, 1\); got 1", {"sparsity": 1}),
        (ValueError, "a 2:4 pattern removes 0.5", {"pattern": NMPattern(2, 4), "sparsity": 0.75}),
        (ValueError, "no layer 'x' to prune", {"layers": ["x"]}),
        (BudgetError, "cannot be reached, at most", {"sparsity": 0.9999, "example_inputs": Z}),
    ],
)
def test_bad_arguments(error, message, arguments):
    model = generator(0)
    with pytest.raises(error, match=message):
        Sparsifier(model, adam(model), **{"steps": 100, **arguments})
    assert find_mask(model[6]) is None


def test_what_cannot_be_trained_sparse():
    model = generator(0)
    with pytest.raises(ValueError, match="does not train the weight of layer '3'"):
        Sparsifier(model, adam(generator(0)), steps=10, layers=LAYERS)
    parametrizations.weight_norm(model[6])
    with pytest.raises(ValueError, match="layer '6' is computed by _WeightNorm"):
        Sparsifier(model, adam(model), steps=10)
    with pytest.raises(TypeError, match="wrap it in DataParallel afterwards"):
        Sparsifier(nn.DataParallel(model), adam(model), steps=10)

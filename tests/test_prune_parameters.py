"""The classical ways to prune parameters: each against numbers worked out by hand."""

import copy
import math

import pytest
import torch
from test_importance import linear
from test_prune import Z, generator, weights
from torch import nn
from torch.nn.utils import parametrizations

from sparsegan.patterns import BlockPattern, ChannelPattern, NMPattern
from sparsegan.prune import (
    choose_threshold,
    group_lasso,
    l1_penalty,
    l2_penalty,
    make_permanent,
    prune,
    prune_below,
    prune_layers,
    prune_neurons,
    prune_random_rows,
    shrink_groups,
)

PAIRS = BlockPattern(1, 2)


def pairs() -> nn.Sequential:
    """One row of a whole pair, a pair with a zero, and a ragged single weight."""
    return nn.Sequential(linear([[3.0, -4.0, 0.0, 1.0, -2.0]]))


# ---- by threshold


def test_weights_below_the_threshold():
    model = prune_below(nn.Sequential(linear([[0.5, -0.25, 0.1], [-0.75, 0.2, 0.0]])), 0.25)
    assert model[0].weight.tolist() == [[0.5, -0.25, 0], [-0.75, 0, 0]]
    prune_below(model, 0.6)
    assert model[0].weight.tolist() == [[0, 0, 0], [-0.75, 0, 0]]
    with torch.no_grad():
        model[0].parametrizations.weight.original.fill_(1.0)
    assert model[0].weight.tolist() == [[0, 0, 0], [1, 0, 0]]


def test_groups_below_the_threshold():
    # Root mean squares: sqrt(25 / 2) = 3.54, sqrt(1 / 2) = 0.71 and, of one weight, 2.
    assert prune_below(pairs(), 0.7, PAIRS)[0].weight.tolist() == [[3, -4, 0, 1, -2]]
    assert prune_below(pairs(), 0.72, PAIRS)[0].weight.tolist() == [[3, -4, 0, 0, -2]]
    assert prune_below(pairs(), 2.01, PAIRS)[0].weight.tolist() == [[3, -4, 0, 0, 0]]
    # sqrt(30 / 5) = 2.45 for the row.
    assert prune_below(pairs(), 2.44, ChannelPattern())[0].weight.count_nonzero() == 4
    assert not prune_below(pairs(), 2.46, ChannelPattern())[0].weight.any()


def test_threshold_in_named_layers():
    model = prune_below(nn.Sequential(linear([[0.1]]), linear([[0.1]])), 1, layers=["1"])
    assert model[0].weight.item() != 0 == model[1].weight.item()


def test_threshold_of_what_spectral_norm_gives():
    model = nn.Sequential(parametrizations.spectral_norm(linear([[8.0, 0.0], [0.0, 2.0]])))
    before = copy.deepcopy(model.state_dict())
    prune_below(model, 0.3)  # of 1 and 1/4; the parameters are 8 and 2
    assert [row != 0 for row in model.eval()[0].weight.flatten().tolist()] == [True, False, False, False]
    assert torch.equal(
        model.state_dict()["0.parametrizations.weight.1._u"], before["0.parametrizations.weight.0._u"]
    )


def test_choice_of_the_threshold():
    model = nn.Sequential(linear([[0.1, 0.2, 0.3, 0.4]]))
    before = copy.deepcopy(model.state_dict())
    # The score is what is missing of the sum: 0, 0.1, 0.3, 0.6 and 1.
    choice = choose_threshold(model, [0.45, 0.15, 0.35, 0.25], lambda m: 1 - m[0].weight.sum().item(), 0.35)
    assert choice.threshold == 0.25
    expected = [(0, 0, 0), (0.15, 0.25, 0.1), (0.25, 0.5, 0.3), (0.35, 0.75, 0.6), (0.45, 1, 1)]
    assert [tuple(trial) for trial in choice.trials] == [pytest.approx(row, abs=1e-6) for row in expected]
    assert model.state_dict().keys() == before.keys() and torch.equal(model[0].weight, before["0.weight"])


def test_choice_of_the_threshold_where_none_will_do():
    scores = iter([1.0, math.nan, 1.2])
    assert choose_threshold(pairs(), [1, 2], lambda m: next(scores), 0.1).threshold == 0
    with pytest.raises(ValueError, match="score of the unpruned model is nan"):
        choose_threshold(pairs(), [1], lambda m: math.nan, 0.1)
    with pytest.raises(ValueError, match="at least 0; got -1"):
        choose_threshold(pairs(), [1], lambda m: 0.0, -1)


# ---- penalties


def test_penalties_by_hand():
    model = nn.Sequential(linear([[3.0, -4.0]]), nn.ReLU(), nn.Linear(1, 1))
    with torch.no_grad():
        model[2].weight.fill_(2.0)
        model[2].bias.fill_(100.0)
    assert l1_penalty(model).item() == 9 and l2_penalty(model).item() == 29
    assert l1_penalty(model, ["0"]).item() == 7 and l2_penalty(model, ["2"]).item() == 4
    (l1_penalty(model) + l2_penalty(model)).backward()
    assert model[0].weight.grad.tolist() == [[1 + 6, -1 - 8]] and model[2].bias.grad is None


def test_group_lasso_by_hand():
    # sqrt(2) · 5, sqrt(2) · 1 and sqrt(1) · 2
    model = pairs()
    value = group_lasso(model, PAIRS)
    assert value.item() == pytest.approx(6 * math.sqrt(2) + 2)
    value.backward()
    # sqrt(|g|) w / ||w_g||
    root = math.sqrt(2)
    assert model[0].weight.grad[0].tolist() == pytest.approx([0.6 * root, -0.8 * root, 0, root, -1])
    assert group_lasso(pairs(), ChannelPattern()).item() == pytest.approx(math.sqrt(5 * 30))
    assert group_lasso(pairs(), NMPattern(2, 4)).item() == l1_penalty(pairs()).item() == 10


def test_group_lasso_where_groups_are_zero():
    model = nn.Sequential(linear([[3.0, -4.0, 0.0, 0.0, -2.0]]))
    group_lasso(model, PAIRS).backward()
    assert model[0].weight.grad[0, 2:4].tolist() == [0, 0] and bool(model[0].weight.grad[0, [0, 1, 4]].all())
    masked = prune_below(pairs(), 0.72, PAIRS)
    group_lasso(masked, PAIRS).backward()
    assert masked[0].parametrizations.weight.original.grad[0, 2:4].tolist() == [0, 0]


def test_penalties_leave_spectral_norm_alone():
    model = nn.Sequential(parametrizations.spectral_norm(linear([[3.0, 1.0], [1.0, -2.0]]))).train()
    before = copy.deepcopy(model.state_dict())
    assert group_lasso(model, PAIRS).requires_grad and l1_penalty(model).item() > 0
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert model[0].training


def test_shrink_groups_by_hand():
    # Norms 5, 1 and 2 less amount · sqrt(|g|): factors 1 - sqrt(2) / 5, 0 (as sqrt(2) > 1) and 1/2.
    model = pairs()
    shrink_groups(model, PAIRS, 1.0)
    factor = 1 - math.sqrt(2) / 5
    assert model[0].weight[0].tolist() == pytest.approx([3 * factor, -4 * factor, 0, 0, -1])
    assert model[0].weight[0, 3].item() == 0


def test_shrink_groups_minimises_what_it_says():
    model = pairs()
    start = model[0].weight.detach().clone()
    shrink_groups(model, PAIRS, 0.3)
    value = group_lasso(model, PAIRS) * 0.3 + 0.5 * (model[0].weight - start).square().sum()
    value.backward()
    assert model[0].weight.grad.abs().max().item() < 1e-5


def test_training_with_shrinking_gives_blocks_of_zeros():
    torch.manual_seed(0)
    x = torch.randn(64, 8)
    model = nn.Sequential(nn.Linear(8, 4))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(200):
        optimiser.zero_grad()
        (model(x) - x[:, :4]).square().mean().backward()  # the last four inputs do not matter
        optimiser.step()
        shrink_groups(model, BlockPattern(4, 4), 0.1 * 0.02)
    assert not model[0].weight[:, 4:].any() and model[0].weight[:, :4].diagonal().min() > 0.5


def test_shrinking_what_cannot_be_set():
    model = nn.Sequential(parametrizations.spectral_norm(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="layer '0' is computed by a parametrization"):
        shrink_groups(model, PAIRS, 0.1)


# ---- rows, neurons and layers


def test_random_rows():
    model = generator(0)
    before = weights(model)
    prune_random_rows(model, 0.3, seed=1)
    for name, weight in weights(model).items():
        rows = (
            weight.transpose(0, 1) if name in ("0", "3", "8") else weight
        )  # transposed convolutions are [C, O, ...]
        gone = (rows == 0).flatten(1).all(1)
        assert int(gone.sum()) == (0 if name == "8" else int(0.3 * len(rows)))
        kept = before[name].transpose(0, 1) if name in ("0", "3", "8") else before[name]
        assert torch.equal(rows[~gone], kept[~gone])
    again, other = (prune_random_rows(generator(0), 0.3, seed=seed) for seed in (1, 2))
    assert torch.equal(again[6].weight, model[6].weight) and not torch.equal(other[6].weight, model[6].weight)


def test_rows_that_are_masked_count():
    model = nn.Sequential(linear([[1.0]] * 10))
    prune_random_rows(model, 0.4, ["0"], seed=1)
    first = model[0].weight != 0
    prune_random_rows(model, 0.6, ["0"], seed=2)
    assert model[0].weight.count_nonzero() == 4 and not bool((model[0].weight != 0)[~first].any())
    with pytest.raises(ValueError, match="only layer makes the outputs"):
        prune_random_rows(nn.Sequential(linear([[1.0]])), 0.5)


def test_neurons_by_hand():
    # y = h0 - 3 h1 + 0 h2 + 2 h3: the gradients of the hidden neurons are as 1 : 3 : 0 : 2, whatever their weights.
    first, last = linear([[1.0, 1], [0.1, 0.1], [9, 9], [1, 1]]), linear([[1.0, -3.0, 0.0, 2.0]])
    model = prune_neurons(nn.Sequential(first, last), 0.5, (torch.zeros(1, 2),))
    assert model[0].weight.any(1).tolist() == [False, True, False, True]
    assert model[1].weight.count_nonzero() == 3
    prune_neurons(model, 0.75, (torch.zeros(1, 2),))
    assert model[0].weight.any(1).tolist() == [False, True, False, False]


def test_layers_by_hand():
    # The gradient of ∂(y·v)/∂w of the three scalar layers z -> a z, of y = abc z, is bc z, ac z and ab z.
    def model():
        return nn.Sequential(linear([[2.0]]), linear([[4.0]]), linear([[1.0]]))

    z = (torch.zeros(1, 1),)
    assert [type(m).__name__ for m in prune_layers(model(), 1, z)] == ["Linear", "Identity", "Linear"]
    pruned = prune_layers(model(), 2, z)
    assert [type(m).__name__ for m in pruned] == ["Identity", "Identity", "Linear"]
    assert pruned(torch.ones(1, 1)).item() == 1
    assert isinstance(prune_layers(model(), 1, z, ["2"])[2], nn.Identity)


class Residual(nn.Module):
    def __init__(self, scale: float):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.scale = scale

    def forward(self, x):
        return x + self.scale * self.body(x)


def test_blocks_and_what_cannot_go():
    torch.manual_seed(0)
    z = (torch.randn(8, 8, 4, 4),)
    model = nn.Sequential(Residual(1.0), Residual(0.01), nn.Conv2d(8, 3, 1))
    blocks = prune_layers(copy.deepcopy(model), 1, z, ["0", "1"])
    assert isinstance(blocks[0], Residual) and isinstance(blocks[1], nn.Identity)
    by_layer = prune_layers(copy.deepcopy(model), 1, z)
    assert isinstance(by_layer[1].body[0], nn.Identity) and by_layer(*z).shape == (8, 3, 4, 4)
    for name, reason in (
        ("2", "does not give the shape"),
        ("0.body", "not an entry of an nn.Sequential, and what Residual does"),
        ("0.body.1", "holds no Linear"),
        ("7", "no module of that name"),
    ):
        with pytest.raises(ValueError, match=f"'{name}' cannot be removed as a whole: .*{reason}"):
            prune_layers(model, 1, z, [name])
    with pytest.raises(ValueError, match=r"3 layers cannot go: those that can are 0\.body\.0, 1\.body\.0;"):
        prune_layers(model, 3, z)
    assert isinstance(model[1].body[0], nn.Conv2d)


# ---- together, and bad input


def test_all_go_on_from_one_another():
    model = prune(generator(0), sparsity=0.5, importance="l1", layers=["3", "6"])
    zeros = {name: weight == 0 for name, weight in weights(model).items()}
    prune_below(model, 0.01)
    prune_random_rows(model, 0.1)
    prune_neurons(model, 0.2, Z)
    assert all(not bool(weight[zeros[name]].any()) for name, weight in weights(model).items())
    after = weights(model)
    assert all(torch.equal(after[name], weight) for name, weight in weights(make_permanent(model)).items())


@pytest.mark.parametrize(
    "message, call",
    [
        ("at least 0; got -0.1", lambda model: prune_below(model, -0.1)),
        ("at least 0; got nan", lambda model: prune_below(model, math.nan)),
        ("no layer '1' to prune", lambda model: prune_below(model, 0.1, layers=["1"])),
        (r"in \[0, 1\); got 1", lambda model: prune_random_rows(model, 1)),
        (r"in \[0, 1\); got 1", lambda model: prune_neurons(model, 1, Z)),
        ("at least 0; got -1", lambda model: shrink_groups(model, PAIRS, -1)),
        ("no layer 'x'", lambda model: l1_penalty(model, ["x"])),
        ("has no Linear", lambda model: l2_penalty(model[1])),
    ],
)
def test_bad_arguments(message, call):
    model = generator(0)
    before = weights(model)
    with pytest.raises(ValueError, match=message):
        call(model)
    assert all(torch.equal(before[name], weight) for name, weight in weights(model).items())

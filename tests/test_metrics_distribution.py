"""kid against its definition as sums over pairs, and its standard error against the spread of many draws."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsegan.metrics import inception_score, kid, kid_standard_error


def _draw(n: int, dimensions: int, rng: torch.Generator, scale: float = 1.0) -> Tensor:
    return torch.randn(n, dimensions, generator=rng) * scale


def _by_pairs(a: Tensor, b: Tensor) -> float:
    def kernel(x: Tensor, y: Tensor) -> float:
        return (float(x.double() @ y.double()) / len(x) + 1) ** 3

    def within(x: Tensor) -> float:
        values = [kernel(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j]
        return sum(values) / len(values)

    between = [kernel(x, y) for x in a for y in b]
    return 1000 * (within(a) + within(b) - 2 * sum(between) / len(between))


@settings(deadline=None, max_examples=15)
@given(n=st.integers(2, 9), m=st.integers(2, 9), dimensions=st.integers(1, 5), seed=st.integers(0, 99))
def test_kid_is_its_definition(n: int, m: int, dimensions: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    a, b = _draw(n, dimensions, rng), _draw(m, dimensions, rng, 2.0)
    assert kid(a, b) == pytest.approx(_by_pairs(a, b), rel=1e-9, abs=1e-9)


def test_the_standard_error_is_that_of_leaving_groups_out() -> None:
    rng = torch.Generator().manual_seed(0)
    a, b = _draw(11, 3, rng), _draw(8, 3, rng, 1.5)
    left_out = torch.tensor(
        [_by_pairs(*(x[torch.arange(len(x)).remainder(4) != group] for x in (a, b))) for group in range(4)]
    )
    wanted = (3 / 4 * (left_out - left_out.mean()).square().sum()).sqrt().item()
    assert kid_standard_error(a, b, groups=4) == pytest.approx(wanted, rel=1e-5)


def test_equal_distributions_are_at_0_on_average_and_others_are_not() -> None:
    rng = torch.Generator().manual_seed(0)
    same = torch.tensor([kid(_draw(60, 8, rng), _draw(60, 8, rng)) for _ in range(100)])
    assert same.mean().abs() < 3 * same.std() / 10
    assert (same < 0).any()  # unbiased, so of either sign
    assert kid(_draw(60, 8, rng), _draw(60, 8, rng) + 1) > 10 * same.std()


def test_the_standard_error_is_near_the_spread() -> None:
    rng = torch.Generator().manual_seed(0)
    for shift, most in ((0.0, 2.5), (1.0, 1.5)):  # near 0 it is known to be too large
        draws = [(_draw(100, 4, rng), _draw(100, 4, rng) + shift) for _ in range(60)]
        spread = torch.tensor([kid(*pair) for pair in draws]).std().item()
        error = sum(kid_standard_error(*pair) for pair in draws) / len(draws)
        assert 0.75 * spread < error < most * spread


def test_features_far_from_0_keep_their_precision() -> None:
    """In float32 the three terms, of the size of the cube, would leave nothing of their difference."""
    rng = torch.Generator().manual_seed(0)
    a, b = _draw(20, 2, rng) + 300, _draw(20, 2, rng) + 300
    assert kid(a, b) == pytest.approx(_by_pairs(a, b), rel=1e-4)


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ((4, 2), (4, 3), r"\[N, D\]"),
        ((4,), (4,), r"\[N, D\]"),
        ((1, 2), (4, 2), "2 samples or more"),
        ((4, 2), (0, 2), "2 samples"),
    ],
)
def test_kid_refuses_what_it_cannot_compare(a: tuple[int, ...], b: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kid(torch.zeros(a), torch.zeros(b))


def test_the_standard_error_needs_groups() -> None:
    with pytest.raises(ValueError, match="2 or more groups"):
        kid_standard_error(torch.zeros(40, 2), torch.zeros(40, 2), groups=1)
    with pytest.raises(ValueError, match="20 samples or more"):
        kid_standard_error(torch.zeros(19, 2), torch.zeros(40, 2))


def test_inception_score_counts_the_classes_that_are_told_apart():
    assert inception_score(torch.eye(4).repeat(3, 1)) == pytest.approx(4)  # sure of each, all alike often
    assert inception_score(torch.eye(4)[:1].repeat(9, 1)) == pytest.approx(1)  # one class only
    assert inception_score(torch.full((9, 4), 0.25)) == pytest.approx(1)  # never sure
    # By hand: p(y) = (1/2, 1/2); KL of each row (3/4, 1/4) is 3/4 log(3/2) + 1/4 log(1/2).
    unsure = torch.tensor([[0.75, 0.25], [0.25, 0.75]])
    assert inception_score(unsure) == pytest.approx(1.5**0.75 * 0.5**0.25)
    with pytest.raises(ValueError, match="add up to 1"):
        inception_score(torch.ones(3, 2))

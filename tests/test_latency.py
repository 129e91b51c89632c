"""Latencies: that the right steps are timed, that the table is kept, and the sums. How long anything takes is not asserted."""

import math

import pytest
import torch
from test_prune import Z, generator
from torch import nn

from sparsegan import latency
from sparsegan.graph import CaptureError, capture, lower, observe
from sparsegan.latency import Latencies, densities, measure, model_ms
from sparsegan.patterns import BlockPattern
from sparsegan.prune import least_damage, make_permanent, prune

PATTERN = BlockPattern(4, 4)
TABLE = Latencies({"a": {1.0: 4.0, 0.5: 3.0, 0.25: 1.0}, "b": {1.0: 2.0, 0.5: 2.0, 0.25: 2.0}}, 0.5, 2.0, 0.0)


@pytest.fixture(autouse=True)
def hurried(monkeypatch):
    monkeypatch.setattr(latency, "STEP_SECONDS", 0.0)
    monkeypatch.setattr(latency, "MODEL_SECONDS", 0.0)


@pytest.fixture
def by_size(monkeypatch):
    """Steps that take 1 ms a kilobyte of packed weights; returns what was timed."""
    timed = []

    def times(steps):
        timed.append((next(iter(steps.values())).step.name, sorted(steps)))
        return {density: step.bytes / 1024 for density, step in steps.items()}

    monkeypatch.setattr(latency, "_step_times", times)
    return timed


def test_between_densities_are_straight_lines():
    assert [TABLE.layer("a", d) for d in (1.0, 0.75, 0.5, 0.375, 0.25, 0.1, 0.0)] == [8, 7, 6, 4, 2, 2, 2]
    assert TABLE.predict({}) == 12.5 and TABLE.predict({"a": 0.375}) == 8.5
    assert TABLE.costs([1.0, 0.25]) == {"a": {1.0: 8, 0.25: 2}, "b": {1.0: 4, 0.25: 4}}


def test_a_budget_in_milliseconds():
    damage = {"a": {1.0: 0.0, 0.25: 5.0}, "b": {1.0: 0.0, 0.25: 0.1}}
    chosen = least_damage(damage, TABLE.costs([1.0, 0.25]), 7.0 - TABLE.fixed)
    assert chosen == {"a": 0.25, "b": 1.0}  # removing from b gains no time
    assert TABLE.predict(chosen) == 6.5


@pytest.mark.parametrize("ask", [lambda: TABLE.layer("c", 1.0), lambda: TABLE.predict({"c": 0.5})])
def test_a_layer_without_latencies(ask):
    with pytest.raises(ValueError, match="no latencies of a layer 'c'; there are: a, b"):
        ask()
    for density in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"in \[0, 1\]"):
            TABLE.layer("a", density)


def test_fixed_and_factor_come_from_whole_models():
    layers = {"a": {1.0: 4.0, 0.5: 3.0, 0.1: 1.0}, "b": {1.0: 2.0, 0.5: 1.0, 0.1: 0.5}}
    found = latency._fitted(layers, {1.0: 0.7 + 1.5 * 6, 0.5: 0.7 + 1.5 * 4, 0.1: 0.7 + 1.5 * 1.5})
    assert (found.fixed, found.factor, found.error) == pytest.approx((0.7, 1.5, 0), abs=1e-9)
    assert found.predict({"a": 0.5, "b": 0.5}) == pytest.approx(6.7)
    skewed = latency._fitted(layers, {1.0: 6.0, 0.5: 3.9, 0.1: 1.0})  # would need a fixed part below zero
    assert skewed.fixed == 0 and skewed.factor > 0 and 0 < skewed.error < 0.3


def test_measure_times_each_step_at_each_density(tmp_path, by_size):
    model, done = generator(0), []
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = measure(model, Z, PATTERN, (1.0, 0.5, 0.25), cache=tmp_path, progress=lambda *n: done.append(n))
    assert [name for name, _ in by_size] == list(found.layers) == ["0", "3", "6", "8"]
    assert all(at == [0.25, 0.5, 1.0] for _, at in by_size) and done[-1] == (4, 4)
    for name in ("3", "6"):  # the packed weights have the zeros that were asked for
        row = found.layers[name]
        assert row[0.5] == pytest.approx(row[1.0] / 2) and row[0.25] == pytest.approx(row[1.0] / 4)
    assert found.layers["3"][1.0] == 32 and found.factor > 0 and math.isfinite(found.error)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())


def test_the_table_is_kept_by_shape(tmp_path, by_size):
    first = measure(generator(0), Z, PATTERN, (1.0, 0.5), cache=tmp_path)
    by_size.clear()
    again = measure(generator(1), Z, PATTERN, (1.0, 0.5), cache=tmp_path)
    assert not by_size and again.layers == first.layers
    more = measure(generator(0), Z, PATTERN, (1.0, 0.75, 0.5), cache=tmp_path)
    assert by_size == [(name, [0.75]) for name in ("0", "3", "6", "8")] and set(more.layers["3"]) == {
        1,
        0.75,
        0.5,
    }
    for change in ({"example_inputs": (torch.zeros(2, 16, 1, 1),)}, {"pattern": BlockPattern(8, 4)}):
        by_size.clear()
        measure(
            generator(0), **{"example_inputs": Z, "pattern": PATTERN, **change}, at=(1.0, 0.5), cache=tmp_path
        )
        assert len(by_size) == 4
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"steps": {}}', '{"machine": "another", "steps": {}}', "SPOILT"]
)
def test_a_table_that_cannot_be_read_is_made_anew(tmp_path, text):
    latency._Table(tmp_path, PATTERN).put("step", {1.0: 2.0, 0.5: 1.0})
    (path,) = tmp_path.iterdir()
    assert latency._Table(tmp_path, PATTERN).get("step", 0.5) == 1.0
    path.write_text(path.read_text().replace("2.0", "-2.0") if text == "SPOILT" else text)
    with pytest.warns(UserWarning, match="cannot be read, so it is made anew"):
        table = latency._Table(tmp_path, PATTERN)
    assert table.get("step", 1.0) is None
    table.put("step", {1.0: 3.0})
    assert latency._Table(tmp_path, PATTERN).get("step", 1.0) == 3.0


def test_a_write_that_fails_leaves_the_old_table(tmp_path, monkeypatch):
    table = latency._Table(tmp_path, PATTERN)
    table.put("step", {1.0: 2.0})

    def full(*args):
        raise OSError("disk full")

    with monkeypatch.context() as patch, pytest.warns(UserWarning, match="cannot be kept .* disk full"):
        patch.setattr(latency.os, "replace", full)
        table.put("step", {1.0: 5.0})
    assert latency._Table(tmp_path, PATTERN).get("step", 1.0) == 2.0
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


def test_a_table_that_cannot_be_written_is_not_kept(tmp_path, by_size):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match=r"cannot be (kept|read)"):
        found = measure(generator(0), Z, PATTERN, (1.0, 0.5), cache=tmp_path / "file")
    assert list(found.layers) == ["0", "3", "6", "8"]


def test_the_default_folder(tmp_path, monkeypatch, by_size):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measure(generator(0), Z, PATTERN, (1.0, 0.5))
    assert [path.name for path in tmp_path.iterdir()] == ["sparsegan"]


class Skip(nn.Module):
    """A residual, a concatenation and an upsampling that is merged with the convolution after it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.c, self.up = nn.Conv2d(16, 8, 1), nn.Upsample(scale_factor=2)
        self.d = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x):
        x = torch.relu(self.a(x))
        y = x + torch.relu(self.b(x))
        return torch.tanh(self.d(self.up(self.c(torch.cat([x, y], 1)))))


def test_isolated_steps_are_programs_that_run(tmp_path):
    model, x = Skip().eval(), (torch.randn(1, 8, 6, 6),)
    captured = capture(model, x)
    lowered = lower(captured, observe(captured, [x]), default="int8", residual="u8")
    steps = latency._steps(lowered, x, model)
    assert sorted(step.step.name for step in steps) == ["a", "b", "c", "d"]
    for step in steps:
        program = step.program(3)
        assert sum(s.weight is not None for s in program.program.steps) == 3
        assert program(torch.rand(step.read))[0].shape == step.read
    merged = next(step for step in steps if step.step.name == "d")
    assert merged.step.kind == "conv_transpose2d" and "3x9x8" in merged.key
    found = measure(model, x, PATTERN, (1.0, 0.5), cache=tmp_path)
    assert set(found.layers) == {"a", "b", "c", "d"}
    assert all(ms > 0 for row in found.layers.values() for ms in row.values())


def test_a_step_takes_what_more_of_it_add(monkeypatch):
    model, x = Skip().eval(), (torch.randn(1, 8, 6, 6),)
    captured = capture(model, x)
    lowered = lower(captured, observe(captured, [x]), default="int8", residual="u8")
    step = latency._steps(lowered, x, model)[0]

    def shortest(runs, seconds):  # 5 ms a call and 2 ms a step with weights
        weights = {
            key: [s for s in run.func.program.steps if s.weight is not None] for key, run in runs.items()
        }
        return {key: 5.0 + 2.0 * len(steps) for key, steps in weights.items()}

    monkeypatch.setattr(latency, "_shortest", shortest)
    assert latency._step_times({1.0: step, 0.5: step}) == {1.0: 2.0, 0.5: 2.0}
    monkeypatch.setattr(latency, "_ADDED_BYTES", 1)
    assert latency._step_times({1.0: step}) == {1.0: 2.0}


def test_a_layer_called_twice_has_the_time_of_both(tmp_path, by_size):
    shared = nn.Conv2d(8, 8, 3, padding=1)
    once, twice = (
        measure(
            nn.Sequential(*layers).eval(), (torch.randn(1, 8, 6, 6),), PATTERN, (1.0, 0.5), cache=tmp_path
        )
        for layers in ([shared, nn.ReLU()], [shared, nn.ReLU(), shared, nn.ReLU()])
    )
    (a,), (b,) = once.layers.values(), twice.layers.values()
    assert b[1.0] == 2 * a[1.0]


def test_prediction_of_a_pruned_model_and_the_measurement(tmp_path, by_size):
    found = measure(generator(0), Z, PATTERN, (1.0, 0.5, 0.25), cache=tmp_path)
    model = prune(generator(0), PATTERN, {"3": 0.5, "6": 0.75}, "l1")
    expected = found.fixed + sum(
        found.layer(n, d) for n, d in {"0": 1.0, "3": 0.5, "6": 0.25, "8": 1.0}.items()
    )
    assert densities(model) == {"0": 1.0, "3": 0.5, "6": 0.25, "8": 1.0}
    assert found.predict(model) == pytest.approx(expected)
    assert model_ms(make_permanent(model), Z) > 0


def test_bad_arguments(tmp_path):
    for at in ((), (1.0,), (1.0, 0.0), (2.0, 1.0)):
        with pytest.raises(ValueError, match=r"two or more shares .* in \(0, 1\]"):
            measure(generator(0), Z, PATTERN, at, cache=tmp_path)
    with pytest.raises(CaptureError, match="training mode"):
        measure(generator(0).train(), Z, PATTERN, cache=tmp_path)

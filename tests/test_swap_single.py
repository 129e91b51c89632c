"""swap_to_sparse layer by layer, where there is no graph: what is swapped, what stays and why, and that outputs stay.

Decisions by timing are tested with times made up; no test depends on how fast anything is.
"""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from sparsegan.graph import CaptureError
from sparsegan.layers import SparseConv2d, SparseConvTranspose2d, SparseLayer, SparseLinear
from sparsegan.ops import BackendError
from sparsegan.ops import backend as ops_backend
from sparsegan.patterns import BlockPattern, from_weight_view, weight_view
from sparsegan.swap import SwapConfig, exchange, explain, race, single, swap_to_sparse

ALL = SwapConfig(dtype="f32", backend="reference", min_speedup=0)


@pytest.fixture(autouse=True)
def no_timing_and_no_graph(monkeypatch):
    """One round for each race: here it does not matter who wins."""

    def cannot(*_):
        raise CaptureError("there is no graph, says the test")

    monkeypatch.setattr(single, "LAYER_BUDGET", 0.0)
    monkeypatch.setattr(exchange, "MODEL_BUDGET", 0.0)
    monkeypatch.setattr(exchange, "swap_programs", cannot)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def prune_blocks(layer, keep=0.5, bo=4, bk=4):
    view = weight_view(layer).detach()
    o, t, c = view.shape
    kept = torch.rand(-(-o // bo), t, -(-c // bk), generator=seeded()) < keep
    mask = kept.repeat_interleave(bo, 0)[:o].repeat_interleave(bk, 2)[:, :, :c]
    layer.weight.data = from_weight_view(layer, view * mask)
    return layer


def trained_norm(channels):
    norm = nn.BatchNorm2d(channels)
    norm.running_mean.normal_(generator=seeded(1))
    norm.running_var.uniform_(0.5, 2.0, generator=seeded(2))
    return norm


def generator():
    """DCGAN in small: z [N, 6, 1, 1] to images [N, 3, 8, 8]."""
    return nn.Sequential(
        nn.ConvTranspose2d(6, 16, 4, bias=False),
        trained_norm(16),
        nn.ReLU(inplace=True),
        prune_blocks(nn.ConvTranspose2d(16, 8, 4, 2, 1, bias=False)),
        trained_norm(8),
        nn.LeakyReLU(0.2),
        prune_blocks(nn.Conv2d(8, 3, 3, padding=1)),
        nn.Tanh(),
    ).eval()


def latents(n=2):
    return torch.randn(n, 6, 1, 1, generator=seeded(3))


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


@torch.no_grad()
@pytest.mark.parametrize("dtype, tolerance", [("f32", 1e-5), ("bf16", 0.02), ("int8", 0.05), ("auto", 0.05)])
def test_all_layers_of_a_generator(dtype, tolerance):
    model, z = generator(), latents()
    before = copy.deepcopy(model.state_dict())
    wanted = model(z)
    swapped = swap_to_sparse(model, replace(ALL, dtype=dtype), (z,))
    layers = [part for part in swapped if not isinstance(part, nn.Identity)]
    assert [layer.activation for layer in layers] == ["relu", "leaky_relu", "tanh"]
    assert relative_error(swapped(z), wanted) < tolerance
    if dtype == "int8":  # int8 it was, with signed inputs where they are signed
        assert [layer.x_zero > 0 for layer in layers] == [True, False, True]
    # The caller's model is as it was.
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(model(z), wanted)


@torch.no_grad()
def test_the_default_backend_gives_the_same_numbers():
    model, z = generator(), latents()
    swapped = swap_to_sparse(model, SwapConfig(dtype="f32", min_speedup=0), (z,))
    assert isinstance(swapped[0], SparseConvTranspose2d)
    assert relative_error(swapped(z), model(z)) < 1e-5


@torch.no_grad()
def test_layers_inside_other_modules_and_linear_to_conv():
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.start = nn.Sequential(
                prune_blocks(nn.Linear(6, 32)), nn.ReLU(), nn.Linear(32, 64), nn.Unflatten(1, (4, 4, 4))
            )
            self.norm = nn.GroupNorm(2, 4)
            self.conv = prune_blocks(nn.Conv2d(4, 4, 3, padding=1))

        def forward(self, z):
            x = self.start(z)
            return x + self.conv(self.norm(x))

    model, z = Decoder().eval(), latents().flatten(1)
    swapped = swap_to_sparse(model, ALL, (z,))
    assert isinstance(swapped.start[0], SparseLinear) and isinstance(swapped.start[2], SparseLinear)
    assert isinstance(swapped.conv, SparseConv2d)
    torch.testing.assert_close(swapped(z), model(z))
    # Dense parameters are frozen, so that the model also runs with gradients enabled.
    with torch.enable_grad():
        assert not swapped(z).requires_grad


@torch.no_grad()
def test_a_single_layer_is_a_model():
    layer = prune_blocks(nn.Linear(8, 8)).eval()
    x = torch.randn(2, 8, generator=seeded())
    swapped = swap_to_sparse(layer, ALL, (x,))
    assert isinstance(swapped, SparseLinear)
    torch.testing.assert_close(swapped(x), layer(x))
    assert explain(swapped).rows[0].name == ""


@torch.no_grad()
def test_shared_modules_stay_shared_and_unfused():
    shared, act = prune_blocks(nn.Linear(8, 8)), nn.ReLU()
    model = nn.Sequential(shared, act, shared, act, nn.Linear(8, 4)).eval()
    x = torch.randn(2, 8, generator=seeded())
    swapped = swap_to_sparse(model, ALL, (x,))
    assert isinstance(swapped[0], SparseLinear) and swapped[0] is swapped[2]
    assert swapped[0].activation == "none" and isinstance(swapped[1], nn.ReLU)
    torch.testing.assert_close(swapped(x), model(x))
    assert [row.name for row in explain(swapped).rows] == ["0", "4"]


@torch.no_grad()
@pytest.mark.parametrize("how", ["torch prune", "parametrization", "spectral norm"])
def test_masks_of_any_kind(how):
    model = nn.Sequential(nn.Conv2d(4, 8, 3), trained_norm(8), nn.ReLU()).eval()
    if how == "torch prune":
        prune.ln_structured(model[0], "weight", 0.5, n=2, dim=0)
        prune.random_unstructured(model[0], "bias", 0.5)
    elif how == "parametrization":
        torch.nn.utils.parametrize.register_parametrization(model[0], "weight", FirstHalf())
    else:
        parametrizations.spectral_norm(model[0])
    model.eval()
    x = torch.randn(1, 4, 6, 6, generator=seeded())
    wanted = model(x)
    with torch.enable_grad():  # leaves a product that deepcopy refuses
        model(x)
    swapped = swap_to_sparse(model, ALL, (x,))
    row = explain(swapped).rows[0]
    assert row.swapped
    if how != "spectral norm":
        assert row.pattern == "channel" and row.density == 0.5
    torch.testing.assert_close(swapped(x), wanted)
    # Taking the masks off the copy must not take them off the model: they can share a class.
    torch.testing.assert_close(model(x), wanted)
    assert hasattr(model[0], "weight_mask") == (how == "torch prune")


class FirstHalf(nn.Module):
    def forward(self, weight):
        return torch.cat([weight[: len(weight) // 2], 0 * weight[len(weight) // 2 :]])


class OwnConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) * 2


class Wrapped(nn.Module):
    def __init__(self, layer, call):
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, x):
        return self.call(self.layer, x)


def with_hook(layer):
    layer.register_forward_hook(lambda *_: None)
    return layer


IMAGE = (1, 4, 5, 5)
TRANSPOSED = nn.ConvTranspose2d(4, 4, 3, 2, 1)


@torch.no_grad()
@pytest.mark.parametrize(
    "model, shape, why",
    [
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), IMAGE, "padding_mode 'circular'"),
        (nn.Conv2d(4, 4, 2, padding="same"), IMAGE, "padding 'same'"),
        (nn.Linear(4, 4).double(), (2, 4), "torch.float64"),
        (OwnConv(4, 4, 3), IMAGE, "its forward is not that of the plain layer"),
        (with_hook(nn.Conv2d(4, 4, 3)), IMAGE, "it has forward hooks"),
        (
            Wrapped(TRANSPOSED, lambda layer, x: layer(x, output_size=[10, 10])),
            IMAGE,
            "it is called with more than its input",
        ),
        (Wrapped(nn.Linear(4, 4), lambda layer, x: x), (2, 4), "the example inputs do not reach it"),
        (nn.TransformerEncoderLayer(4, 1, 4, batch_first=True), (2, 3, 4), "the module that holds it reads"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_stated_fall_backs(model, shape, why):
    model = model.eval()
    x = torch.randn(shape, generator=seeded(), dtype=next(model.parameters()).dtype)
    swapped = swap_to_sparse(model, ALL, (x,))
    rows = explain(swapped).rows
    assert rows and not any(row.swapped for row in rows)
    assert any(why in row.why for row in rows) and why in str(explain(swapped))
    torch.testing.assert_close(swapped(x), model(x))


@torch.no_grad()
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_stay_where_they_are(bad):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    model[1].weight[0, 0] = bad
    rows = explain(swap_to_sparse(model, ALL)).rows
    assert rows[0].swapped and not rows[1].swapped and "NaN or infinite" in rows[1].why


@torch.no_grad()
def test_a_layer_too_wide_for_int8_stays():
    model = nn.Sequential(nn.Linear(65540, 2), nn.Linear(2, 2)).eval()
    x = torch.ones(1, 65540)
    rows = explain(swap_to_sparse(model, replace(ALL, dtype="int8"), (x,))).rows
    assert not rows[0].swapped and "at most 65536 int8 weights" in rows[0].why and rows[1].swapped


def test_a_model_without_layers():
    swapped = swap_to_sparse(nn.Sequential(nn.ReLU()).eval(), None, (torch.ones(1),))
    assert explain(swapped).rows == () and "no Linear, Conv2d or ConvTranspose2d" in str(explain(swapped))


@torch.no_grad()
def test_all_zero_and_all_dense_layers():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 4, 3)).eval()
    model[1].weight.zero_()
    x = torch.randn(1, 4, 6, 6, generator=seeded())
    for dtype in ("f32", "int8"):
        swapped = swap_to_sparse(model, replace(ALL, dtype=dtype), (x,))
        assert [row.density for row in explain(swapped).rows] == [1.0, 0.0]
        assert torch.equal(swapped(x), model(x))


def test_layers_can_be_chosen():
    swapped = swap_to_sparse(generator(), replace(ALL, layers=["3"]), (latents(),))
    assert isinstance(swapped[3], SparseConvTranspose2d) and isinstance(swapped[0], nn.ConvTranspose2d)
    assert [row.why for row in explain(swapped).rows][::2] == ["not among the layers to consider"] * 2


@pytest.mark.parametrize("pattern", ["8x4", BlockPattern(8, 4)])
def test_a_named_pattern_is_demanded(pattern):
    model = nn.Sequential(prune_blocks(nn.Linear(64, 64), 0.4, 8, 4), prune_blocks(nn.Linear(64, 64), 0.4))
    first, second = explain(swap_to_sparse(model.eval(), replace(ALL, pattern=pattern))).rows
    assert first.swapped and first.pattern == "8x4"
    assert not second.swapped and second.why == "its zeros do not follow 8x4"


def test_the_rule_without_data(monkeypatch):
    model = nn.Sequential(prune_blocks(nn.Linear(64, 64), 0.3), nn.Linear(64, 64)).eval()
    monkeypatch.setattr(ops_backend, "_EXTENSION_ERROR", None)
    sparse, dense = explain(swap_to_sparse(model)).rows
    assert sparse.swapped and sparse.dtype == "float32" and sparse.why.startswith("rule: density 0.")
    assert not dense.swapped and dense.why == "rule: density 1.00 > 0.5"
    assert (sparse.before_ms, sparse.after_ms) == (None, None)
    # The reference is right but slow: it is never the better choice, unless it was asked for.
    monkeypatch.setattr(ops_backend, "_ENVIRONMENT", "reference")
    assert [row.swapped for row in explain(swap_to_sparse(model)).rows] == [False, False]
    assert "SPARSEGAN_BACKEND names it" in explain(swap_to_sparse(model)).rows[0].why
    monkeypatch.setattr(ops_backend, "_ENVIRONMENT", None)
    monkeypatch.setattr(ops_backend, "_EXTENSION_ERROR", "_C is not built")
    assert "_C is not built" in explain(swap_to_sparse(model)).rows[0].why
    assert explain(swap_to_sparse(model, SwapConfig(backend="reference"))).rows[0].swapped


@pytest.mark.parametrize("dtype", ["f32", "int8"])
@pytest.mark.parametrize("pattern", ["2:4", "1x1"])
def test_zeros_that_save_nothing_are_called_so(pattern, dtype):
    model = nn.Sequential(nn.Linear(64, 64), prune_blocks(nn.Linear(64, 64))).eval()
    draws = torch.rand(64, 16, 4, generator=seeded())
    zeros = draws.argsort(-1) < 2 if pattern == "2:4" else draws < 0.5
    model[0].weight.data[zeros.flatten(1)] = 0
    x = torch.randn(2, 64, generator=seeded())
    for min_speedup in (0, 1e9):  # swapped or not
        config = replace(ALL, dtype=dtype, min_speedup=min_speedup)
        useless, useful = explain(swap_to_sparse(model, config, (x,))).rows
        assert useless.why.endswith(f"no zero 4x4 blocks: {pattern} zeros save nothing on a CPU")
        assert useless.density == 1.0 and useless.pattern == pattern
        assert "blocks" not in useful.why and useful.density < 0.7


def test_zero_blocks_that_padding_outweighs_are_not_denied():
    layer = nn.Linear(64, 5).eval()
    layer.weight.data[:4, :16] = 0  # 4 of 32 blocks; two packed rows of 4 for 5 channels
    x = torch.randn(2, 64, generator=seeded())
    assert "blocks" not in explain(swap_to_sparse(layer, ALL, (x,))).rows[0].why


def made_up(monkeypatch, *times):
    """Let `race` return these times, one after another."""
    calls = iter(times)

    def fake(runners, budget):
        for runner in runners:
            runner()
        return list(next(calls))

    monkeypatch.setattr(single, "race", fake)
    monkeypatch.setattr(exchange, "race", fake)


TWO = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).eval()
X = torch.ones(1, 4)


def decided(min_speedup=1.0):
    swapped = swap_to_sparse(TWO, SwapConfig(backend="reference", min_speedup=min_speedup), (X,))
    return swapped, explain(swapped)


# race is called for each layer and the whole model.


def test_one_layer_can_gain_without_the_other(monkeypatch):
    made_up(monkeypatch, [1.0, 1.5], [1.0, 0.5], [2.0, 1.0])
    swapped, explanation = decided()
    assert isinstance(swapped[0], nn.Linear) and isinstance(swapped[1], nn.ReLU)
    assert isinstance(swapped[2], SparseLinear)
    assert [row.why for row in explanation.rows] == ["would be 0.67 times as fast", "2.00 times as fast"]
    assert [row.after_ms for row in explanation.rows] == [1.5, 0.5]
    assert (explanation.before_ms, explanation.after_ms, explanation.programs) == (2.0, 1.0, 0)
    assert "one by one: there is no graph, says the test" in str(explanation)


def test_min_speedup_is_kept(monkeypatch):
    made_up(monkeypatch, [1.0, 0.6], [1.0, 0.5], [2.0, 1.0])
    _, explanation = decided(min_speedup=2.0)
    assert [row.swapped for row in explanation.rows] == [False, True]


def test_a_slower_model_is_undone(monkeypatch):
    made_up(monkeypatch, [1.0, 0.5], [1.0, 0.5], [1.9, 1.95])
    swapped, explanation = decided()
    assert not any(isinstance(module, SparseLayer) for module in swapped.modules())
    assert all("undone: the whole model took 1.95 ms" in row.why for row in explanation.rows)
    assert explanation.rows[0].dtype == "float32"
    assert (explanation.before_ms, explanation.after_ms) == (1.9, 1.95)
    assert explanation.summary.startswith(
        "0 of 2 layers swapped; whole model 1.900 ms dense, 1.950 ms before that was undone: 0.97 times as fast"
    )


def test_the_folded_model_is_a_rival_too(monkeypatch):
    made_up(monkeypatch, [1.0, 0.5], [5.0, 2.0, 3.0])
    model = nn.Sequential(nn.Conv2d(4, 4, 1), trained_norm(4)).eval()
    config = SwapConfig(backend="reference")
    explanation = explain(swap_to_sparse(model, config, (torch.ones(1, 4, 3, 3),)))
    assert explanation.before_ms == 2.0 and not explanation.rows[0].swapped


def test_another_output_is_undone():
    """Something looks at what comes out of a layer inside an nn.Sequential, which fusing changes."""

    class Peeks(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))

        def forward(self, x):
            linear = self.body[0](x)
            return self.body[2](self.body[1](linear)), linear

    x = torch.randn(8, 4, generator=seeded())
    explanation = explain(swap_to_sparse(Peeks().eval(), ALL, (x,)))
    assert all(row.why.startswith("undone: the outputs") for row in explanation.rows)


@torch.no_grad()
def test_a_norm_is_not_folded_when_something_looks_at_it():
    class Peeks(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(4, 4, 1), trained_norm(4), nn.ReLU())

        def forward(self, x):
            outputs = []
            for part in self.body:
                outputs.append(x := part(x))
            return outputs

    model, x = Peeks().eval(), torch.randn(1, 4, 3, 3, generator=seeded())
    swapped = swap_to_sparse(model, ALL, (x,))
    assert isinstance(swapped.body[0], SparseConv2d) and isinstance(swapped.body[1], nn.BatchNorm2d)
    torch.testing.assert_close(swapped(x), model(x))


def test_racers_take_turns():
    calls = []
    times = race([lambda: calls.append("a"), lambda: calls.append("b")], budget=1.0)
    assert calls == ["a", "b"] * (len(calls) // 2)
    assert len(calls) == 2 * (2 + 100) and len(times) == 2 and min(times) >= 0


def test_a_race_keeps_to_its_budget(monkeypatch):
    clock = iter(range(1000))  # a second passes at every look
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    calls = []
    assert race([lambda: calls.append(1)], budget=5.0) == [1000.0]
    assert len(calls) == 1 + 1 + 5
    assert race([lambda: None] * 3, budget=0.0) == [1000.0] * 3


@torch.no_grad()
def test_noise_is_drawn_alike_and_the_users_random_state_stays():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(4, 4, 1), trained_norm(4))

        def forward(self, x):
            return self.body(x) + torch.randn(())

    x = torch.randn(1, 4, 3, 3, generator=seeded())
    model, state = Noisy().eval(), torch.get_rng_state()
    swapped = swap_to_sparse(model, ALL, (x,))
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(swapped.body[1], nn.Identity)  # folded: with other noise it would not have agreed


def test_calibration_batches_serve_as_inputs():
    config = replace(ALL, dtype="auto", calibration=(latents(n) for n in (1, 3)))
    for _ in range(2):  # a generator is not used up
        swapped = swap_to_sparse(generator(), config)
        assert swapped[0].dtype == torch.int8
        assert explain(swapped).rows[0].before_ms is not None
    wide = swap_to_sparse(
        generator(), replace(ALL, dtype="int8", calibration=[100 * latents()]), (latents(),)
    )
    assert wide[0].x_scale > 50 * swapped[0].x_scale


def test_a_percentile_leaves_out_outliers():
    x = torch.linspace(-1, 1, 8000).view(1000, 8)
    x[0, 0] = 100
    config = replace(ALL, dtype="int8", calibration=[(x,)])
    scales = [
        swap_to_sparse(nn.Linear(8, 8).eval(), replace(config, percentile=percentile), (x[1:],)).x_scale
        for percentile in (None, 99.9)
    ]
    assert scales[0] == pytest.approx(101 / 255, rel=1e-3) and scales[1] == pytest.approx(2 / 255, rel=0.02)


@pytest.mark.parametrize(
    "config, inputs, error, match",
    [
        (SwapConfig(dtype="int8"), None, ValueError, "int8 needs data"),
        (SwapConfig(dtype="fp4"), None, ValueError, "dtype must be 'auto'"),
        (SwapConfig(pattern="4y4"), None, ValueError, "unknown pattern"),
        (SwapConfig(layers=["9"]), None, ValueError, "is named 9; there are"),
        (SwapConfig(layers=["1"]), None, ValueError, "is named 1"),
        (SwapConfig(min_psnr=float("nan")), None, ValueError, "min_psnr"),
        (SwapConfig(min_speedup=-1.0), None, ValueError, "min_speedup"),
        (SwapConfig(min_speedup=float("nan")), None, ValueError, "min_speedup"),
        (SwapConfig(calibration=[]), None, ValueError, "holds no batches"),
        (
            SwapConfig(calibration=[torch.zeros(0, 6, 1, 1)], dtype="int8"),
            None,
            ValueError,
            "no calibration data",
        ),
        (None, latents(), TypeError, r"such as \(z,\), got Tensor"),
        (None, (latents(0),), ValueError, "empty tensor"),
        (None, (latents() * float("nan"),), ValueError, "NaN or infinite values during calibration"),
        (SwapConfig(dtype="int8", percentile=0.5), (latents(),), ValueError, "percentile must lie in"),
        (SwapConfig(backend="cuda"), (latents(),), BackendError, "no backend 'cuda'"),
    ],
)
def test_bad_requests(config, inputs, error, match):
    with pytest.raises(error, match=match):
        swap_to_sparse(generator(), config, inputs)


def test_a_model_without_data_is_refused():
    with torch.device("meta"), pytest.raises(ValueError, match="on the meta device"):
        swap_to_sparse(nn.Sequential(nn.Linear(4, 4)).eval())


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(ValueError, match=r"call model\.eval\(\)"):
        swap_to_sparse(generator().train())


def test_explain_is_one_line_a_layer():
    swapped = swap_to_sparse(generator(), ALL, (latents(),))
    lines = str(explain(swapped)).splitlines()
    assert len(lines) == 1 + 3 + 3
    assert lines[0].split() == [
        *("layer", "kind", "pattern", "density", "dtype"),
        *("before", "ms", "after", "ms", "why"),
    ]
    assert lines[2].split()[:6] == [
        "3",
        "ConvTranspose2d",
        "swapped",
        "4x4",
        f"{swapped[3].density:.2f}",
        "float32",
    ]
    assert lines[4].startswith("3 of 3 layers swapped; whole model")


def test_explain_of_other_models():
    model = nn.Sequential(SparseLinear.from_dense(nn.Linear(4, 4)), nn.Linear(4, 4), nn.ReLU())
    assert [row.swapped for row in explain(model).rows] == [True, False]

"""Integer parameters and calibration."""

import math

import pytest
import torch
from torch import nn

from sparsegan.layers import SparseConv2d, SparseConvTranspose2d, SparseLinear
from sparsegan.patterns import BlockPattern
from sparsegan.prune import prune
from sparsegan.quantize import activation_params, calibrate, quantize_weight
from sparsegan.quantize.aware import quantization_aware


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_weights_round_to_within_half_a_step_of_their_channel():
    view = torch.randn(5, 9, 7, generator=seeded()) * torch.tensor([1e-6, 1.0, 3.0, 1e6, 0.0])[:, None, None]
    integers, scale = quantize_weight(view)
    assert integers.dtype == torch.int8
    assert integers.abs().amax((1, 2)).tolist() == [127, 127, 127, 127, 0]
    assert scale[4] == 1.0
    step = scale[:, None, None]
    assert ((integers * step - view).abs() <= step * 0.5001).all()


def test_zeros_stay_zero():
    view = torch.randn(4, 1, 8, generator=seeded())
    view[:, :, ::2] = 0
    assert (quantize_weight(view)[0][:, :, ::2] == 0).all()


def test_denormal_weights_become_zero_instead_of_nan():
    integers, scale = quantize_weight(torch.full((2, 1, 3), 1e-40))
    assert (integers == 0).all() and (scale == 1).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_weights_must_be_finite(bad):
    with pytest.raises(ValueError, match="NaN or infinite"):
        quantize_weight(torch.tensor([[[1.0, bad]]]))


@pytest.mark.parametrize(
    "lo, hi", [(0.0, 6.0), (-1.0, 1.0), (-3.0, 0.1), (2.0, 5.0), (-5.0, -2.0), (-1e-20, 1e20)]
)
def test_activation_range_is_covered_and_zero_exact(lo, hi):
    scale, zero = activation_params(lo, hi)
    assert 0 <= zero <= 255 and isinstance(zero, int)
    # The ends of the range map into 0..255 up to half a step of rounding the zero point.
    assert min(lo, 0.0) / scale + zero >= -0.5 - 1e-9
    assert max(hi, 0.0) / scale + zero <= 255.5 + 1e-9
    # ... and no level is wasted: the range is cut into 255 steps.
    assert scale == pytest.approx((max(hi, 0.0) - min(lo, 0.0)) / 255)


def test_constant_zero_activations():
    assert activation_params(0.0, 0.0) == (1.0, 0)
    scale, _ = activation_params(-1e-38, 1e-38)
    assert torch.tensor(1 / scale, dtype=torch.float32).isfinite()


@pytest.mark.parametrize("lo, hi", [(math.nan, 1.0), (0.0, math.inf), (1.0, 0.0)])
def test_activation_range_must_be_a_range(lo, hi):
    with pytest.raises(ValueError, match="lo <= hi"):
        activation_params(lo, hi)


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()


def test_minmax_spans_all_batches_and_leaves_no_hooks():
    net = model()
    batches = [torch.full((2, 4), -3.0), (torch.full((1, 4), 7.0),), torch.zeros(0, 4)]
    ranges = calibrate(net, batches, ["0", "2"])
    assert ranges["0"] == (-3.0, 7.0)
    hidden = torch.cat([net[:2](torch.full((1, 4), v)) for v in (-3.0, 7.0)])
    assert ranges["2"] == pytest.approx((hidden.min().item(), hidden.max().item()))
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_percentile_cuts_outliers_on_both_sides():
    x = torch.linspace(-1, 1, 100_000)
    x[0], x[-1] = -3.0, 2.0
    net = nn.Sequential(nn.Identity())
    low, high = calibrate(net.eval(), [x[:50_000], x[50_000:]], ["0"], "percentile", 99.9)["0"]
    # A thousandth of the values is gone at each end, up to a bin of the histogram.
    bin_width = 5 / 2**14
    assert low == pytest.approx(-0.998, abs=1.5 * bin_width)
    assert high == pytest.approx(0.998, abs=1.5 * bin_width)
    assert calibrate(net, [x], ["0"], "percentile", 100)["0"] == pytest.approx((-3, 2))


def test_percentile_of_a_constant():
    assert calibrate(nn.Sequential(nn.Identity()).eval(), [torch.ones(3)], ["0"], "percentile")["0"] == (1, 1)


def test_a_shared_module_sees_every_use():
    linear = nn.Linear(2, 2, bias=False)
    nn.init.constant_(linear.weight, 2.0)
    net = nn.Sequential(linear, linear).eval()
    assert calibrate(net, [torch.ones(1, 2)], ["0"])["0"] == (1.0, 4.0)


@pytest.mark.parametrize(
    "batches, layers, options, match",
    [
        ([], ["0"], {}, "no calibration data"),
        ([torch.zeros(0, 4)], ["0"], {}, "no calibration data reached the layer '0'"),
        ([torch.zeros(1, 4)], ["9"], {}, "no layer named '9'"),
        ([torch.full((1, 4), math.nan)], ["0"], {}, "input of layer '0' holds NaN"),
        ([torch.full((1, 4), math.inf)], ["0"], {}, "input of layer '0' holds NaN or inf"),
        ([torch.zeros(1, 4)], ["0"], {"method": "entropy"}, "method must be"),
        ([torch.zeros(1, 4)], ["0"], {"method": "percentile", "percentile": 0.99}, "percentile must lie"),
    ],
)
def test_bad_calibration(batches, layers, options, match):
    net = model()
    with pytest.raises(ValueError, match=match):
        calibrate(net, batches, layers, **options)
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_a_model_in_training_mode_is_refused():
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        calibrate(model().train(), [torch.zeros(1, 4)], ["0"])


# ------------------------------------------------------------------ training with rounding in it


def layers() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.ConvTranspose2d(6, 8, 4, 2, 1),
            nn.ReLU(),
            nn.Conv2d(8, 4, 3),
            nn.Flatten(),
            nn.Linear(4 * 36, 5),
        ).eval()


def test_fake_rounding_is_what_the_int8_layers_compute():
    model, x = layers(), torch.randn(3, 6, 4, 4, generator=seeded())
    names = ["0", "2", "4"]
    ranges = calibrate(model, [x], names)
    prune(model, BlockPattern(4, 2), 0.5, "l1", layers=["2"])
    zeros = model[2].weight == 0
    sparse = nn.Sequential(*model)
    for name, kind in (("0", SparseConvTranspose2d), ("2", SparseConv2d), ("4", SparseLinear)):
        layer = model.get_submodule(name)
        sparse[int(name)] = kind.from_dense(
            layer, dtype=torch.int8, x_range=ranges[name], backend="reference"
        )
    weights = {name: t.detach().clone() for name, t in model.state_dict().items()}
    with quantization_aware(model, ranges):
        y = model(x * 1.1)  # beyond the range, too
        assert not model[2].weight[zeros].any()
        y.sum().backward()
    with torch.no_grad():
        assert torch.allclose(y, sparse(x * 1.1), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(y, model(x * 1.1), rtol=1e-4, atol=1e-4)
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in weights.items())
    assert model[0].weight.grad is not None and not model[0]._forward_pre_hooks


def test_training_with_rounding_lowers_its_error():
    model, x = layers(), torch.randn(16, 6, 4, 4, generator=seeded())
    with torch.no_grad():
        model[2].weight *= 1 + 10 * torch.rand(4, 8, 3, 3, generator=seeded())
        wanted = model(x)
    ranges = {
        "0": (-0.5, 0.5),
        "2": (0.0, 0.3),
        "4": (-2.0, 2.0),
    }  # too narrow, so that there is something to learn

    def error() -> float:
        with torch.no_grad(), quantization_aware(model, ranges):
            return float((model(x) - wanted).square().mean())

    before = error()
    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    with quantization_aware(model, ranges):
        for _ in range(40):
            optimiser.zero_grad()
            (model(x) - wanted).square().mean().backward()
            optimiser.step()
    assert error() < 0.7 * before


def test_what_cannot_be_rounded():
    with (
        pytest.raises(ValueError, match="'1' is no Linear, Conv2d or ConvTranspose2d"),
        quantization_aware(layers(), {"1": (0.0, 1.0)}),
    ):
        pass

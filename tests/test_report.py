"""Grids, tables and measurements: that they show what was measured, and refuse to show what is wrong."""

import json
import math
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn

from sparsegan.graph import CaptureError
from sparsegan.layers import SparseConv2d, SparseLayer, SparseProgram
from sparsegan.ops.program import Engine
from sparsegan.patterns import BlockPattern
from sparsegan.prune import make_permanent, prune
from sparsegan.report import (
    LayerResult,
    ModelResult,
    Speed,
    WrongKernelError,
    check_kernels,
    dense_counterpart,
    error_split,
    image_grid,
    layer_results,
    layer_table,
    machine_facts,
    mean_psnr,
    measure_speed,
    model_bytes,
    model_table,
    speed_table,
)
from sparsegan.report.dense import DenseProgram
from sparsegan.swap import SwapConfig, exchange, swap_to_sparse

Z = (torch.randn(2, 8, generator=torch.Generator().manual_seed(0)),)


def dense_model() -> nn.Module:
    """Every kind of layer and activation that there are sparse ones for, groups, and taps out of order."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(8, 128),
            nn.LeakyReLU(0.1),
            nn.Unflatten(1, (8, 4, 4)),
            nn.ConvTranspose2d(8, 8, 4, 2, 1, groups=2),
            nn.Sigmoid(),
            nn.Conv2d(8, 12, 3, padding=1, groups=2),
            nn.ReLU(),
            nn.Conv2d(12, 1, 3, padding=1),
            nn.Tanh(),
        )
    return model.eval().requires_grad_(False)


def pruned_model() -> nn.Module:
    model = dense_model()
    make_permanent(prune(model, BlockPattern(4, 4), 0.5, "l2", layers=["0", "3", "5"]))
    return model.requires_grad_(False)


def swapped(dtype: str = "f32", model: nn.Module | None = None) -> nn.Module:
    config = SwapConfig(dtype, min_speedup=0, calibration=[Z])  # type: ignore[arg-type]
    return swap_to_sparse(model or pruned_model(), config, Z)


def one_by_one(dtype: str = "f32", model: nn.Module | None = None) -> nn.Module:
    """The same, without a graph."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange, "swap_programs", no_graph)
        return swapped(dtype, model)


def no_graph(*_: object) -> None:
    raise CaptureError("not now")


def text(table: object, width: int = 80) -> str:
    console = Console(width=width, color_system=None)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


class TestGrid:
    def test_places_every_pixel(self):
        a = torch.tensor([-1.0, 0.0, 1.0, 5.0]).view(2, 1, 1, 2)
        picture = image_grid([("", a), ("", -a)], columns=1, scale=2)
        # Lines: a[0], -a[0], then a[1], -a[1]; 2x1 images doubled to 4x2, margins of two pixels.
        assert picture.mode == "L" and picture.size == (2 + 4 + 2, 2 * (2 * 4 + 4))
        assert [picture.getpixel((x, 2)) for x in range(8)] == [255, 255, 0, 0, 128, 128, 255, 255]
        assert [picture.getpixel((x, 6)) for x in (2, 4)] == [255, 128]
        assert [picture.getpixel((x, 14)) for x in (2, 4)] == [255, 255]  # 5 is clipped to white
        assert [picture.getpixel((x, 18)) for x in (2, 4)] == [0, 0]

    def test_keeps_colours(self):
        image = torch.tensor([1.0, -1.0, 0.0]).view(1, 3, 1, 1)
        assert image_grid([("", image)], 1).getpixel((2, 2)) == (255, 0, 128)

    def test_labels_take_room_and_ink(self):
        image = torch.ones(1, 1, 32, 32)
        plain, labelled = image_grid([("", image)], 1), image_grid([("dense", image)], 1)
        assert labelled.width > plain.width + 20
        assert plain.getextrema()[0] == 255 and labelled.getextrema()[0] < 100

    @pytest.mark.parametrize(
        ("rows", "wanted"),
        [
            ([], "sets of images"),
            ([("a", torch.zeros(0, 1, 4, 4))], "sets of images"),
            ([("a", torch.zeros(1, 2, 4, 4))], "1 or 3"),
            ([("a", torch.zeros(1, 1, 4, 4)), ("b", torch.zeros(2, 1, 4, 4))], "one shape"),
            ([("a", torch.full((1, 1, 4, 4), torch.nan))], "NaN"),
        ],
    )
    def test_refuses_what_is_no_image(self, rows: list[tuple[str, torch.Tensor]], wanted: str):
        with pytest.raises(ValueError, match=wanted):
            image_grid(rows, 1)

    def test_refuses_no_columns(self):
        with pytest.raises(ValueError, match="columns >= 1"):
            image_grid([("", torch.zeros(1, 1, 4, 4))], 0)


class TestKernelCheck:
    @pytest.mark.parametrize("dtype", ["int8", "bf16", "f32"])
    @pytest.mark.parametrize("make", [swapped, one_by_one])
    def test_passes_what_only_rounds(self, make: Callable[[str], nn.Module], dtype: str):
        assert check_kernels(make(dtype), Z) < (3e-2 if dtype == "bf16" else 1e-3)

    def test_refuses_wrong_programs(self, monkeypatch: pytest.MonkeyPatch):
        model = swapped("int8")
        right = Engine.run

        def wrong(self: Engine, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            return [y * (1.1 if self.backend is None else 1.0) for y in right(self, inputs)]

        monkeypatch.setattr(Engine, "run", wrong)
        with pytest.raises(WrongKernelError, match="no speed is reported"):
            check_kernels(model, Z)

    @pytest.mark.parametrize(("layers", "limit"), [(1, 0.03), (32, 0.06)])
    def test_allows_deep_networks_more(self, layers: int, limit: float, monkeypatch: pytest.MonkeyPatch):
        dense = nn.Conv2d(8, 8, 1, bias=False)
        model = nn.Sequential(*[SparseConv2d.from_dense(dense, dtype=torch.bfloat16) for _ in range(layers)])
        right = SparseConv2d._OP
        off = 1.0

        def wrong(*args: Any, backend: str | None = None, **kwargs: Any) -> torch.Tensor:
            y = right(*args, backend=backend, **kwargs)
            return y if backend == "reference" else y * off ** (1 / layers)

        monkeypatch.setattr(SparseConv2d, "_OP", staticmethod(wrong))
        x = (torch.randn(1, 8, 4, 4, generator=torch.Generator().manual_seed(0)),)
        off = 1 + limit * 0.8
        check_kernels(model, x)
        off = 1 + limit * 1.2
        with pytest.raises(WrongKernelError):
            check_kernels(model, x)

    def test_allows_what_next_to_nothing_does_to_the_reference(self, monkeypatch: pytest.MonkeyPatch):
        class Chaos(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x * (1 + 0.1 * torch.sin(1e6 * x))

        layer = SparseConv2d.from_dense(nn.Conv2d(8, 8, 1, bias=False), dtype=torch.bfloat16)
        right = SparseConv2d._OP
        off = 0.06

        def wrong(*args: Any, backend: str | None = None, **kwargs: Any) -> torch.Tensor:
            return right(*args, backend=backend, **kwargs) * (1 if backend == "reference" else 1 + off)

        monkeypatch.setattr(SparseConv2d, "_OP", staticmethod(wrong))
        x = (torch.randn(1, 8, 16, 16, generator=torch.Generator().manual_seed(0)),)
        assert check_kernels(nn.Sequential(Chaos(), layer), x) == pytest.approx(0.06, abs=1e-3)
        with pytest.raises(WrongKernelError, match=r"at most 0\.03"):
            check_kernels(nn.Sequential(layer), x)
        off = 0.3
        with pytest.raises(WrongKernelError):
            check_kernels(nn.Sequential(Chaos(), layer), x)

    def test_refuses_wrong_numbers(self, monkeypatch: pytest.MonkeyPatch):
        layer = nn.Sequential(SparseConv2d.from_dense(pruned_model()[5]))
        right = SparseConv2d._OP

        def wrong(
            x: torch.Tensor, *args: object, backend: str | None = None, **kwargs: object
        ) -> torch.Tensor:
            y = right(x, *args, backend=backend, **kwargs)
            if backend != "reference":
                y[..., -1, -1] += 0.1 * y.abs().max()  # the last pixel alone
            return y

        x = (torch.ones(1, 8, 6, 6),)
        check_kernels(layer, x)
        monkeypatch.setattr(SparseConv2d, "_OP", staticmethod(wrong))
        with pytest.raises(WrongKernelError, match="no speed is reported"):
            check_kernels(layer, x)

    def test_refuses_nan(self, monkeypatch: pytest.MonkeyPatch):
        layer = nn.Sequential(SparseConv2d.from_dense(pruned_model()[5]))
        right = SparseConv2d._OP
        monkeypatch.setattr(SparseConv2d, "_OP", staticmethod(lambda *a, **k: right(*a, **k) * torch.nan))
        with pytest.raises(WrongKernelError):
            check_kernels(layer, (torch.ones(1, 8, 6, 6),))

    def test_leaves_the_model_as_it_was(self):
        for model in (swapped(), one_by_one()):
            check_kernels(model, Z)
            sparse = [m for m in model.modules() if isinstance(m, SparseLayer | SparseProgram)]
            assert sparse and all(m.backend is None for m in sparse)


class TestErrorSplit:
    def test_each_error_shows_in_its_own_figure(self, monkeypatch: pytest.MonkeyPatch):
        split = error_split(dense_model(), pruned_model(), swapped("int8"), Z)
        assert 5 < split.pruning < 40
        assert 25 < split.quantisation < 70
        assert split.kernels > 80

        no_pruning = error_split(dense_model(), dense_model(), swapped("int8", dense_model()), Z)
        assert no_pruning.pruning == math.inf
        assert no_pruning.quantisation < 70
        no_int8 = error_split(dense_model(), pruned_model(), swapped("f32"), Z)
        assert no_int8.pruning == split.pruning
        assert no_int8.quantisation > 100

        model, right = swapped("int8"), Engine.run

        def wrong(self: Engine, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
            outputs = right(self, inputs)
            for y in outputs:
                y[0] += 0.1 if self.backend is None else 0.0
            return outputs

        monkeypatch.setattr(Engine, "run", wrong)
        bad = error_split(dense_model(), pruned_model(), model, Z)
        assert bad[:2] == split[:2]
        # 0.1 in one of two images: 10 log10(4 / (0.1² / 2)). The other image is equal, which must not hide it.
        assert bad.kernels == pytest.approx(29.03, abs=0.01)

    def test_refuses_what_is_no_image(self):
        model = dense_model()
        flat = nn.Sequential(model, nn.Flatten())
        with pytest.raises(ValueError, match="the pruned model should give images"):
            error_split(model, flat, flat, Z)
        with pytest.raises(ValueError, match=r"the dense model .* NaN"):
            error_split(nn.Sequential(model, nn.Threshold(2.0, math.nan)), model, model, Z)
        with pytest.raises(ValueError, match="same shape"):
            error_split(model, nn.Sequential(model, nn.Upsample(scale_factor=2)), model, Z)


class TestDenseCounterpart:
    def test_is_the_pruned_model_again(self):
        model = pruned_model()
        dense = dense_counterpart(one_by_one("f32", model))
        assert not any(isinstance(module, SparseLayer) for module in dense.modules())
        torch.testing.assert_close(dense(*Z), model(*Z), rtol=1e-5, atol=1e-6)
        layers = [m for m in dense.modules() if hasattr(m, "weight")]
        assert [getattr(layer, "groups", 1) for layer in layers] == [1, 2, 2, 1]
        assert all(
            torch.equal(a.weight, b.weight)
            for a, b in zip(layers, (model[i] for i in (0, 3, 5, 7)), strict=True)
        )

    def test_dequantises_int8(self):
        model = pruned_model()
        dense = dense_counterpart(one_by_one("int8", model))
        for got, wanted in zip(
            (m for m in dense.modules() if hasattr(m, "weight")),
            (model[i] for i in (0, 3, 5, 7)),
            strict=True,
        ):
            step = wanted.weight.abs().max() / 127
            assert (got.weight - wanted.weight).abs().max() <= step / 2 * 1.001
        assert mean_psnr(dense(*Z), model(*Z)) > 35

    def test_leaves_the_sparse_model_alone(self):
        sparse = one_by_one()
        before = sparse(*Z)
        dense_counterpart(sparse)
        assert any(isinstance(module, SparseLayer) for module in sparse.modules())
        assert torch.equal(sparse(*Z), before)

    @pytest.mark.parametrize("dtype", ["f32", "int8"])
    def test_of_a_program(self, dtype: str):
        model = pruned_model()
        dense = dense_counterpart(swapped(dtype, model))
        assert not any(isinstance(module, SparseProgram) for module in dense.modules())
        groups = [
            count for m in dense.modules() if isinstance(m, DenseProgram) for count in m._groups.values()
        ]
        assert all(count % wanted == 0 for count, wanted in zip(groups, (1, 2, 2, 1), strict=True))
        if dtype == "f32":
            torch.testing.assert_close(dense(*Z), model(*Z), rtol=1e-5, atol=1e-6)
        else:
            assert mean_psnr(dense(*Z), model(*Z)) > 35

    @torch.no_grad()
    def test_of_every_operation(self):
        """Norms, residuals, upsampling, shuffling, padding modes, modulation and several outputs."""

        class Everything(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.first = nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")
                self.norm = nn.GroupNorm(2, 8)
                self.second = nn.Conv2d(8, 16, 3, stride=2, padding=1)
                self.up = nn.ConvTranspose2d(4, 8, 4, 2, 1)
                self.last = nn.Conv2d(16, 3, 1)

            def forward(self, x: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                x = self.first(x)
                y = nn.functional.silu(self.norm(x)) + x
                z = nn.functional.pixel_shuffle(self.second(y), 2) * s[:, :, None, None]
                z = nn.functional.leaky_relu(self.up(z), 0.1)
                y = nn.functional.interpolate(y, scale_factor=2.0)
                return torch.tanh(self.last(torch.cat([y, z], 1))), nn.functional.gelu(z)

        model = Everything().eval()
        inputs = torch.randn(2, 3, 8, 8), torch.randn(2, 4)
        sparse = swap_to_sparse(model, SwapConfig("f32", min_speedup=0), inputs)
        dense = dense_counterpart(sparse)
        assert not any(isinstance(module, SparseProgram) for module in dense.modules())
        for got, wanted in zip(dense(*inputs), model(*inputs), strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


class TestLayerResults:
    def test_one_row_a_layer(self):
        dense, pruned = dense_model(), pruned_model()
        rows = layer_results(dense, pruned, swapped("int8", pruned), Z)
        assert [row.name for row in rows] == ["0", "3", "5", "7"]
        assert [row.kind for row in rows] == ["Linear", "ConvTranspose2d", "Conv2d", "Conv2d"]
        assert all(row.swapped and row.dtype == "int8" for row in rows)
        assert rows[0].dense_bytes == (8 * 128 + 128) * 4
        assert sum(row.dense_bytes for row in rows) == model_bytes(dense)
        assert 0 < rows[0].psnr < 100

    def test_kept_layers_keep_their_size(self):
        dense = dense_model()
        kept = swap_to_sparse(dense, SwapConfig("f32", min_speedup=1e9), Z)
        rows = layer_results(dense, dense, kept, Z)
        assert all(not row.swapped and row.sparse_bytes == row.dense_bytes for row in rows)
        assert all(row.psnr == float("inf") for row in rows)

    def test_outputs_are_those_of_the_layer_not_of_an_activation_in_place(self):
        model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True)).eval()
        other = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True)).eval()
        with torch.no_grad():
            model[0].bias.fill_(-1e3)  # all negative, so that the ReLU makes both equal
            other[0].bias.fill_(-2e3)
        config = SwapConfig("f32", min_speedup=0)
        (row,) = layer_results(model, other, swap_to_sparse(other, config, Z), Z)
        assert row.psnr < 0


def test_speeds_are_measured_for_each_batch():
    def sample(n: int, generator: torch.Generator) -> tuple[torch.Tensor]:
        return (torch.randn(n, 8, generator=generator),)

    speeds = measure_speed(dense_model(), swapped(), sample, batches=(1, 3), seconds=0.0)
    assert [speed.batch for speed in speeds] == [1, 3]
    assert all(speed.dense_ms > 0 and speed.sparse_ms > 0 for speed in speeds)
    assert Speed(1, 3.0, 1.5).speedup == 2.0


def a_result() -> ModelResult:
    swapped = LayerResult("0", "ConvTranspose2d", True, "fast", "8x4", 0.25, "int8", 4000, 500, 31.5)
    kept = LayerResult(
        "net.1",
        "Conv2d",
        False,
        "would be 0.80 times as fast",
        "dense",
        1.0,
        "float32",
        400,
        400,
        40.0,
    )
    return ModelResult(
        name="toy",
        removed=0.754,
        steps=7,
        compress_seconds=1.5,
        dense_bytes=4400,
        sparse_bytes=900,
        file_bytes=1200,
        psnr=25.25,
        ssim=0.875,
        psnr_pruned=25.5,
        psnr_swapped=40.0,
        kernel_error=1e-7,
        speeds=[Speed(1, 3.0, 1.5), Speed(16, 30.0, 3.0)],
        layers=[swapped, kept],
    )


class TestTables:
    def test_layers(self):
        shown = text(layer_table("toy", a_result().layers))
        for part in ("toy", "ConvTranspose2d", "int8 8x4", "0.25", "31.5", "as it was"):
            assert part in shown
        assert "net.1 stays: would be 0.80 times as fast" in shown
        assert "…" not in shown and max(map(len, shown.splitlines())) <= 80

    def test_models(self):
        shown = text(model_table([a_result()]))
        for part in ("toy", "75%", "2.00x", "10.0x", "25.2", "0.875"):
            assert part in shown
        assert "…" not in shown

    def test_speeds(self):
        assert "10.0x" in text(speed_table(a_result().speeds))


def test_results_are_json():
    result = replace(a_result(), psnr_swapped=float("inf"))
    read = json.loads(json.dumps(result.to_json(), allow_nan=False))
    assert read["psnr_swapped"] is None and read["psnr"] == 25.25
    assert [speed["speedup"] for speed in read["speeds"]] == [2.0, 10.0]
    assert read["layers"][1]["why"] == "would be 0.80 times as fast"


def test_machine_facts_tell_no_names_or_places():
    facts = machine_facts()
    assert facts["torch"] == torch.__version__ and facts["threads"] == torch.get_num_threads()
    shown = json.dumps(facts)
    assert f'"{platform.node()}"' not in shown and os.getcwd() not in shown

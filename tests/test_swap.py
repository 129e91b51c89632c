"""swap_to_sparse as a whole: programs for whole graphs, number formats by measured error, and when it is undone.

Decisions by timing are tested with times made up; no test depends on how fast anything is.
"""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparsegan.layers import SparseLayer, SparseLinear, SparseProgram
from sparsegan.models import dcgan_generator, seeded
from sparsegan.patterns import BlockPattern
from sparsegan.prune import make_permanent, prune
from sparsegan.swap import SwapConfig, exchange, explain, single, swap_to_sparse
from sparsegan.swap.dense import Judge

ALL = SwapConfig(backend="reference", min_speedup=0)
FORMATS = {"int8": 0.05, "bf16": 0.02, "f32": 1e-5}


@pytest.fixture(autouse=True)
def no_timing(monkeypatch):
    """One round for each race: here it does not matter who wins."""
    monkeypatch.setattr(single, "LAYER_BUDGET", 0.0)
    monkeypatch.setattr(exchange, "MODEL_BUDGET", 0.0)


class Decoder(nn.Module):
    """A skip, normalisation with statistics, upsampling, an operation that programs do not have."""

    def __init__(self):
        super().__init__()
        self.start = nn.Linear(6, 8 * 16)
        self.norm = nn.GroupNorm(2, 8)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.unused = nn.Linear(3, 3)
        self.out = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, z):
        x = self.start(z).view(-1, 8, 4, 4)
        x = x + self.conv(F.silu(self.norm(x)))
        return torch.tanh(self.out(F.interpolate(x, scale_factor=2.0))).clamp(-0.9, 0.9)


def decoder():
    return seeded(Decoder, 0).eval()


def latents(n=3, seed=1):
    return torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))


def programs(model):
    return [module for module in model.modules() if isinstance(module, SparseProgram)]


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


@torch.no_grad()
@pytest.mark.parametrize("dtype", FORMATS)
def test_a_whole_model_becomes_a_program(dtype):
    model, z = decoder().requires_grad_(), latents()
    before, wanted = copy.deepcopy(model.state_dict()), model(z)
    swapped = swap_to_sparse(model, replace(ALL, dtype=dtype), (z,))
    explanation = explain(swapped)
    assert len(programs(swapped)) == explanation.programs == 1
    assert relative_error(swapped(z), wanted) < FORMATS[dtype]
    assert relative_error(swapped(latents(5, 2)), model(latents(5, 2))) < 6 * FORMATS[dtype]  # another batch
    assert [row.swapped for row in explanation.rows] == [True, True, False, True]
    assert "do not depend on it" in explanation.rows[2].why
    assert explanation.psnr > 30 and explanation.eager_bytes > 3 * 8 * 64 * 4
    assert "4 layers swapped, in one program; whole model" in str(explanation)
    # The caller's model is as it was; the copy needs no gradients.
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    with torch.enable_grad():
        assert not swapped(z).requires_grad


@torch.no_grad()
def test_zero_blocks_are_left_out_and_patterns_demanded():
    model = seeded(lambda: dcgan_generator(8, (16, 8)), 0).eval()
    z = (torch.randn(2, 8, 1, 1),)
    make_permanent(prune(model, BlockPattern(8, 4), 0.5, "l2", example_inputs=z))
    explanation = explain(swap_to_sparse(model, ALL, z))
    pruned = [row for row in explanation.rows if row.pattern == "8x4"]
    assert pruned and all(row.swapped and row.density < 0.8 for row in pruned)
    rows = explain(swap_to_sparse(model, replace(ALL, pattern="8x4"), z)).rows
    assert {row.why for row in rows if not row.swapped} <= {"its zeros do not follow 8x4"}
    first, *others = explain(swap_to_sparse(model, replace(ALL, layers=[rows[0].name]), z)).rows
    assert first.swapped and not any(row.swapped for row in others)
    assert others[0].why == "not among the layers to consider"


def test_an_image_without_a_batch_is_as_the_dense_model_takes_it():
    model, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()).eval(), torch.randn(3, 6, 6)
    swapped = swap_to_sparse(model, replace(ALL, dtype="f32"), (x,))
    assert any(isinstance(module, SparseLayer) for module in swapped.modules())
    assert relative_error(swapped(x), model(x)) < 1e-5
    batched = swap_to_sparse(model, replace(ALL, dtype="f32"), (x[None],))
    assert batched(torch.randn(2, 3, 9, 8)).shape == (2, 4, 7, 6)
    with pytest.raises(ValueError, match="capture it again with such inputs"):
        batched(x)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, z):
        return self.layer(z) if z.sum() > 0 else self.layer(z) + 1


def hooked():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 4)).eval()
    model[1].register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize(
    "model, why",
    [
        (Branches().eval(), "torch.export cannot trace Branches"),
        (hooked(), "1 has forward hooks, which a graph would not run"),
        (nn.Sequential(nn.Linear(6, 6).double()).eval(), "no layer can be in a program"),
    ],
)
def test_where_there_is_no_graph_layers_are_swapped_one_by_one(model, why):
    z = latents().to(next(model.parameters()).dtype)
    swapped = swap_to_sparse(model, ALL, (z,))
    assert not programs(swapped) and f"one by one: {why}" in explain(swapped).summary
    assert relative_error(swapped(z), model(z)) < 0.05
    if z.dtype == torch.float32:
        assert any(isinstance(module, SparseLinear) for module in swapped.modules())


# Number formats


def decibels(monkeypatch, *psnr):
    """Let the judge find these, one after another; the last one again and again."""
    found = list(psnr)
    judged = Judge.quality

    def fake(self, model):
        quality = judged(self, model)
        return replace(quality, psnr=found.pop(0) if len(found) > 1 else found[0])

    monkeypatch.setattr(Judge, "quality", fake)


def formats(model):
    return [row.dtype for row in explain(model).rows if row.swapped]


def slots(model):
    return {slot.format for program in programs(model) for slot in program.program.slots}


def test_int8_stays_where_it_is_good_enough(monkeypatch):
    decibels(monkeypatch, 40.0)
    swapped = swap_to_sparse(decoder(), ALL, (latents(),))
    assert formats(swapped) == ["int8"] * 3 and explain(swapped).psnr == 40.0
    assert all("bf16" not in row.why for row in explain(swapped).rows)


def test_residuals_are_widened_first(monkeypatch):
    calls = []
    decibels(monkeypatch, 39.0, 41.0)
    monkeypatch.setattr("sparsegan.swap.programs.quantisation_errors", lambda *_: calls.append(1))
    swapped = swap_to_sparse(decoder(), ALL, (latents(),))
    assert formats(swapped) == ["int8"] * 3 and "bf16" in slots(swapped) and not calls


def test_then_layers_fall_to_bf16_worst_first(monkeypatch):
    decibels(monkeypatch, 38.0, 39.9, 40.1)
    monkeypatch.setattr(
        "sparsegan.swap.programs.quantisation_errors",
        lambda *_: {"start": 1e-6, "conv": 1e-3, "out": 1e-6},
    )
    swapped = swap_to_sparse(decoder(), ALL, (latents(),))
    # What makes the output falls first, and the worst one because without it the rest would not do.
    assert formats(swapped) == ["int8", "bfloat16", "bfloat16"]
    rows = {row.name: row.why for row in explain(swapped).rows}
    assert "bf16, as the model has 39.9 dB in int8" in rows["conv"] and "bf16" not in rows["start"]


def test_all_layers_fall_where_nothing_else_helps_and_that_is_said(monkeypatch):
    decibels(monkeypatch, 20.0, 21.0, 22.0, 23.0, 24.0)
    swapped = swap_to_sparse(decoder(), replace(ALL, min_psnr=60.0), (latents(),))
    assert formats(swapped) == ["bfloat16"] * 3
    assert "less than the 60 dB wanted, which bf16 does not reach either" in str(explain(swapped))


def test_none_switches_the_budget_off(monkeypatch):
    decibels(monkeypatch, 5.0)
    swapped = swap_to_sparse(decoder(), replace(ALL, min_psnr=None), (latents(),))
    assert formats(swapped) == ["int8"] * 3 and explain(swapped).psnr == 5.0


@torch.no_grad()
def test_a_model_that_int8_would_spoil():
    """One channel is a thousand times as large as the others, which int8 cannot tell from zero."""
    model = seeded(
        lambda: nn.Sequential(nn.Conv2d(4, 8, 1), nn.ReLU(), nn.Conv2d(8, 3, 3, padding=1)), 0
    ).eval()
    model[0].weight[0] *= 1000
    model[2].weight[:, 0] = 0
    x = torch.randn(2, 4, 12, 12, generator=torch.Generator().manual_seed(0))
    spoilt = swap_to_sparse(model, replace(ALL, min_psnr=None), (x,))
    assert explain(spoilt).psnr < 40
    swapped = swap_to_sparse(model, ALL, (x,))
    assert explain(swapped).psnr >= 40 and "bfloat16" in formats(swapped)
    noise = (swapped(x) - model(x)).square().mean()
    psnr = 10 * torch.log10((model(x).max() - model(x).min()) ** 2 / noise)
    assert psnr.item() == pytest.approx(explain(swapped).psnr, abs=0.01)


def test_the_judge():
    dense, batches = nn.Identity(), [(torch.tensor([0.0, 1.0]),), (torch.tensor([2.0]),)]
    judge = Judge(dense, batches[0], batches)
    assert judge.quality(dense).psnr == float("inf") and judge.quality(dense).error == 0
    off = judge.quality(Plus(0.1))
    assert off.psnr == pytest.approx(10 * math.log10(4 / 0.01), rel=1e-4)
    assert off.error == pytest.approx(0.1 * math.sqrt(2), rel=1e-4)
    assert judge.quality(nn.Unflatten(0, (-1, 1))).error == float("inf")
    flat = Judge(dense, batches[0], [(torch.ones(3),)])
    assert flat.quality(Plus(0.1)).psnr == -float("inf")


class Plus(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x):
        return x + self.value


# Never slower


def made_up(monkeypatch, *times):
    calls = iter(times)

    def fake(runners, budget):
        return list(next(calls))[: len(runners)]

    monkeypatch.setattr(single, "race", fake)
    monkeypatch.setattr(exchange, "race", fake)


TWO = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8)).eval()
TIMED = SwapConfig(backend="reference")


def test_a_faster_program_is_taken(monkeypatch):
    made_up(monkeypatch, [4.0, 2.0])
    explanation = explain(swap_to_sparse(TWO, TIMED, (latents(),)))
    assert (explanation.before_ms, explanation.after_ms, explanation.programs) == (4.0, 2.0, 1)
    assert "whole model 4.000 ms dense, 2.000 ms swapped: 2.00 times as fast" in explanation.summary


def test_layers_one_by_one_are_tried_where_the_program_is_slower(monkeypatch):
    made_up(monkeypatch, [4.0, 5.0], [1.0, 2.0], [2.0, 1.0], [4.0, 3.0])
    swapped = swap_to_sparse(TWO, TIMED, (latents(),))
    explanation = explain(swapped)
    assert [row.swapped for row in explanation.rows] == [False, True]
    assert isinstance(swapped[0], nn.Linear) and isinstance(swapped[2], SparseLinear)
    assert "as programs for the whole model were not faster" in explanation.summary


def test_nothing_is_swapped_where_nothing_helps(monkeypatch):
    made_up(monkeypatch, [4.0, 5.0], [2.0, 1.0], [2.0, 1.0], [4.0, 6.0])
    swapped = swap_to_sparse(TWO, TIMED, (latents(),))
    explanation = explain(swapped)
    assert isinstance(swapped[0], nn.Linear) and isinstance(swapped[2], nn.Linear)
    assert all(row.why == "undone: the whole model took 6.00 ms, dense 4.00 ms" for row in explanation.rows)
    assert (explanation.before_ms, explanation.after_ms) == (4.0, 6.0)


def test_a_program_is_undone_where_no_single_layer_gains(monkeypatch):
    made_up(monkeypatch, [4.0, 5.0], [1.0, 2.0], [1.0, 2.0])
    explanation = explain(swap_to_sparse(TWO, TIMED, (latents(),)))
    assert [row.why for row in explanation.rows] == ["would be 0.50 times as fast"] * 2
    assert "as programs for the whole model were not faster" in explanation.summary


def test_dense_layers_go_back_to_torch_where_their_numbers_are_no_gain(monkeypatch):
    model = copy.deepcopy(TWO)
    model[0].weight.data[:, 4:] = 0
    model[0].weight.data[4:] = 0
    made_up(monkeypatch, [4.0, 5.0], [4.0, 3.0])
    explanation = explain(swap_to_sparse(model, replace(TIMED, dtype="f32"), (latents(),)))
    assert [row.swapped for row in explanation.rows] == [True, False]
    assert explanation.rows[1].why == "density above 0.5: the model was slower with it in a program"
    assert explanation.after_ms == 3.0


def test_wrong_outputs_are_undone(monkeypatch):
    judged = Judge.quality
    monkeypatch.setattr(
        Judge, "quality", lambda self, model: replace(judged(self, model), error=float("nan"))
    )
    explanation = explain(swap_to_sparse(TWO, ALL, (latents(),)))
    assert all(row.why.startswith("undone: the outputs") for row in explanation.rows)


@torch.no_grad()
def test_traced_by_torch_compile_and_export():
    model, z = decoder(), latents()
    swapped = swap_to_sparse(model, SwapConfig(min_speedup=0), (z,))
    torch._dynamo.reset()
    compiled = torch.compile(swapped, fullgraph=True, backend="eager")
    assert torch.equal(compiled(z), swapped(z))
    assert torch.equal(compiled(latents(5)), swapped(latents(5)))
    exported = torch.export.export(swapped, (z,), strict=False).module()
    assert torch.equal(exported(z), swapped(z))


def test_explain_of_a_program_that_was_not_swapped_here():
    swapped = swap_to_sparse(TWO, ALL, (latents(),))
    del swapped.swap_explanation
    explanation = explain(nn.Sequential(swapped, nn.Linear(2, 2)))
    assert [(row.name, row.swapped) for row in explanation.rows] == [("0", True), ("2", True), ("1", False)]
    assert explanation.programs == 1 and "int8" in str(explanation)

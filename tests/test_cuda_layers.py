"""Weights, layers and saved models on their way to CUDA: 2:4 packing, blocks of another device, loading, swapping, reports.

What needs a device is in test_cuda_device.py.
"""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import emulated
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import blocked_view, dense_op, inputs
from torch import nn
from typer.testing import CliRunner

from benchmarks import bench_gpu
from sparsegan import (
    BackendError,
    BlockPattern,
    NMPattern,
    SparseConv2d,
    SparseConvTranspose2d,
    SparseLinear,
    SwapConfig,
    checkpoint,
    explain,
    formats,
    layers,
    load,
    make_permanent,
    ops,
    pattern_for,
    prune,
    save,
    swap_to_sparse,
)
from sparsegan.cli import app
from sparsegan.formats import TWO_FOUR_BLOCKS, pack, pack_two_four, unpack, validate
from sparsegan.ops import cuda
from sparsegan.swap.config import resolve

pytestmark = pytest.mark.usefixtures("quick")  # nothing here depends on what is faster

HALVED = [(dtype, block) for dtype, known in TWO_FOUR_BLOCKS.items() for block in known]


def two_four(view, seed=0):
    scores = torch.rand(view.shape, generator=torch.Generator().manual_seed(seed))
    return view * NMPattern(2, 4).best(scores)


# ---- 2:4 ----


@settings(max_examples=60, deadline=None)
@given(
    o=st.integers(1, 70),
    t=st.integers(1, 3),
    c=st.integers(1, 130),
    density=st.sampled_from([0.0, 0.4, 1.0]),
    which=st.sampled_from(HALVED),
    seed=st.integers(0, 99),
)
def test_two_four_round_trip(o, t, c, density, which, seed):
    dtype, block = which
    view = two_four(blocked_view(o, t, c, density, seed, True), seed)
    packed = pack_two_four(view, dtype, block)
    assert packed.block == block and packed.values.shape[1:] == (block[0], block[1] // 2)
    assert torch.equal(unpack(packed).float(), view)
    whole = pack(view, dtype, block)
    assert formats.density(packed) == formats.density(whole) / 2
    assert formats.nbytes(packed) < formats.nbytes(whole) or not len(packed.values)
    again = formats.from_dict(formats.as_dict(packed), packed.in_channels, packed.taps)
    assert torch.equal(unpack(again).float(), view)
    assert torch.equal(unpack(formats.repack(packed, (8, 4))).float(), view)


def test_two_four_metadata_is_in_the_order_of_the_kernels():
    """Against the text of csrc/cuda/launch.h, value by value."""
    for dtype, block in HALVED:
        packed = pack_two_four(two_four(blocked_view(64, 1, 128, 1.0, 3, True)), dtype, block)
        words = packed.metadata.to(torch.int64) & 0xFFFFFFFF
        per_tile = 32 if dtype == torch.int8 else 16
        view = unpack(packed)[:, 0]
        for b in range(len(packed.values)):
            row, column = b // (128 // block[1]), int(packed.cols[b])
            for o, v in ((0, 0), (5, 1), (8, 2), (block[0] - 1, block[1] // 2 - 1), (17, 9)):
                tile, r = divmod(o, 16)
                if dtype == torch.int8:
                    word, bit = r % 8 * 4 + v // 16 * 2 + r // 8, 2 * (v % 16)
                else:
                    word, bit = r % 8 * 2 + v // 8, 16 * (r // 8) + 2 * (v % 8)
                place = int(words[b, tile * per_tile + word]) >> bit & 3
                wanted = view[row * block[0] + o, column * block[1] + v // 2 * 4 + place]
                assert packed.values[b, o, v] == wanted


@pytest.mark.parametrize(
    ("view", "options", "said"),
    [
        (torch.ones(32, 1, 64), {}, "not 2:4: 4 consecutive input channels hold more than 2"),
        (
            torch.zeros(32, 1, 64),
            {"dtype": torch.float32},
            "no 2:4 kernels for torch.float32 blocks; there are for torch.int8 32x64",
        ),
        (torch.zeros(32, 1, 64), {"block": (16, 64)}, "no 2:4 kernels for torch.int8 blocks of 16x64"),
        (torch.full((4, 1, 4), 0.5), {}, "whole numbers"),
    ],
)
def test_pack_two_four_refuses(view, options, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        pack_two_four(view, **options)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"metadata": lambda m: m.long()}, "metadata must be int32"),
        ({"metadata": lambda m: m[:, :-1]}, "metadata must be int32"),
        ({"metadata": torch.zeros_like}, "metadata must name two places of each run, the lower first"),
        ({"values": lambda v: v[:, :, :16].contiguous()}, "values must be half of one of the 2:4 blocks"),
    ],
)
def test_a_damaged_two_four_weight_is_refused(change, said):
    packed = pack_two_four(two_four(blocked_view(40, 1, 70, 1.0, 0, True)), torch.int8, (32, 64))
    with pytest.raises(ValueError, match=re.escape(said)):
        validate(replace(packed, **{field: make(getattr(packed, field)) for field, make in change.items()}))


def test_only_cuda_and_the_reference_take_two_four():
    view = two_four(blocked_view(40, 1, 64, 1.0, 0, True))
    packed, x = pack_two_four(view), inputs((3, 64), 0, True)
    with pytest.raises(BackendError, match=r"cpu: .*2:4 packed.*|built"):
        ops.block_linear(x, packed)
    assert torch.equal(ops.block_linear(x, packed, x_zero=9, backend="reference"), x @ view[:, 0].T)


# ---- Blocks ----


def test_pack_takes_the_cheapest_blocks_of_the_device():
    """Ragged and fine zeros want low blocks, dense weights high ones."""
    assert pack(torch.ones(64, 1, 64), torch.int8, device="cuda").block == (64, 32)
    assert pack(torch.ones(3, 1, 64), torch.int8, device="cuda").block == (16, 32)
    view = torch.zeros(64, 1, 64)
    view[16:32, :, :32] = 1
    assert pack(view, torch.int8, device="cuda").block == (16, 32)
    for dtype, known in formats.BLOCKS["cuda"].items():
        assert pack(view, dtype, device="cuda").block in known
        assert isinstance(pattern_for("cuda", dtype), BlockPattern)
        wanted = pattern_for("cuda", dtype)
        assert (wanted.bo, wanted.bk) in known
    with pytest.raises(ValueError, match=r"no cuda kernels for torch.float32 weights"):
        pack(view, device="cuda")
    assert pattern_for("cuda") == BlockPattern(32, 32)


def test_constants_of_a_weight():
    geometry = {"kernel_size": (3, 3), "stride": (2, 2), "padding": (1, 1), "dilation": (1, 1)}
    taps = cuda.phase_taps("conv_transpose2d", geometry)
    assert taps == [1, 2, 2, 4] and cuda.phase_taps("conv2d", geometry) == [9]
    assert cuda.phase_taps("linear", {}) == [1]
    packed = pack(blocked_view(20, 9, 40, 0.5, 0, True), torch.int8, (16, 32))
    zero_sums, pad = cuda.validated(packed, taps, 7).constants
    assert torch.equal(zero_sums[3], 7 * packed.tap_sums[:, 5:].sum(1))
    assert zero_sums.shape == (4, 20) and zero_sums.dtype == torch.int32
    assert torch.equal(pad, torch.full((64,), 7, dtype=torch.uint8))
    zero_sums, pad = cuda.validated(pack(torch.ones(20, 9, 40), torch.float16, (16, 16)), [9], 0).constants
    assert zero_sums.numel() == 0 and torch.equal(pad, torch.zeros(48, dtype=torch.float16))


# ---- Layers ----


def pruned_layer(kind, pattern, dtype=torch.int8, seed=0):
    torch.manual_seed(seed)
    dense = {
        "linear": lambda: nn.Linear(96, 80),
        "conv2d": lambda: nn.Conv2d(96, 80, 3, padding=1),
        "conv_transpose2d": lambda: nn.ConvTranspose2d(96, 80, 4, 2, 1),
        "groups": lambda: nn.Conv2d(128, 64, 3, padding=1, groups=2),
    }[kind]()
    channels = 128 if kind == "groups" else 96
    x = torch.randn(2, channels) if kind == "linear" else torch.randn(2, channels, 5, 6)
    model = nn.Sequential(dense)
    make_permanent(prune(model, pattern, 0.5, "l2", example_inputs=(x,)))
    sparse = {nn.Linear: SparseLinear, nn.Conv2d: SparseConv2d, nn.ConvTranspose2d: SparseConvTranspose2d}[
        type(model[0])
    ]
    x_range = (-4.0, 4.0) if dtype == torch.int8 else None
    return sparse.from_dense(model[0], dtype=dtype, x_range=x_range, activation="relu"), x


@pytest.mark.parametrize("kind", ["linear", "conv2d", "conv_transpose2d", "groups"])
@pytest.mark.parametrize("pattern", [BlockPattern(32, 32), NMPattern(2, 4)], ids=str)
def test_a_layer_packed_for_the_cpu_is_packed_for_cuda(kind, pattern):
    layer, x = pruned_layer(kind, pattern)
    before, work = layer(x), layer.density
    layer.repack("cuda")
    assert cuda.refuse_weight(layer.packed) is None
    halved = isinstance(pattern, NMPattern)
    assert (layer.metadata is not None) == halved and layer.density <= 1.25 * work
    if halved:
        assert layer.density == pytest.approx(0.5, abs=0.15) or kind == "groups"
    with emulated.registered() as name:
        layer.backend = name
        assert torch.equal(layer(x), before)
    layer.backend = None
    layer.repack("cpu")
    assert layer.metadata is None and layer.packed.block in formats.BLOCKS["cpu"][torch.int8]
    assert torch.equal(layer(x), before)


def test_zeros_that_are_too_fine_say_which_pattern_to_prune_with():
    layer, x = pruned_layer("conv2d", BlockPattern(8, 4))
    before = layer(x)
    with pytest.raises(ValueError, match=r"pattern 8x4.*prune with pattern_for\('cuda', torch.int8\), 32x32"):
        layer.repack("cuda")
    assert torch.equal(layer(x), before), "a refused layer stays as it was"


def test_number_formats_without_kernels_are_refused():
    layer, _ = pruned_layer("linear", BlockPattern(32, 32), torch.float32)
    with pytest.raises(ValueError, match="the weight is float32, the kernels take int8, float16, bfloat16"):
        layer.repack("cuda")


def test_a_dense_layer_in_half_runs_on_the_cuda_kernels():
    dense = nn.Conv2d(40, 24, 3, padding=1)
    layer = SparseConv2d.from_dense(dense, dtype=torch.float16, block=(16, 16))
    x = torch.randn(1, 40, 6, 6)
    with emulated.registered() as name:
        layer.backend = name
        y = layer(x.half())
        assert y.dtype == torch.float16 and torch.allclose(y.float(), dense(x), atol=0.02)
        assert torch.allclose(layer(x), dense(x), atol=0.01)
    layer.backend = None
    with pytest.raises(
        BackendError, match="the weight is float16, the kernels take int8, bfloat16 and float32"
    ):
        layer(x)


def test_what_the_cuda_kernels_cannot_hold_is_a_reason():
    wide = nn.Conv2d(4, 4, 12).to("meta")
    wide.weight = nn.Parameter(torch.zeros(4, 4, 12, 12, device="meta"))
    assert "weights are on meta" in layers.unsupported_reason(wide)


def test_copies_and_state_dicts_of_a_repacked_layer():
    layer, x = pruned_layer("linear", NMPattern(2, 4))
    before = layer(x)
    layer.repack("cuda")
    other = copy.deepcopy(layer)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(
        other.half()(x) if not ops.cuda.unavailable() else unpack(other.packed), unpack(layer.packed)
    )
    other.repack("cpu")
    assert torch.equal(other(x), before)


# ---- Saved models ----


def saved(path, pattern, dtype="int8"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 32, 3, padding=1)).eval()
    x = torch.randn(2, 32, 6, 6)
    make_permanent(prune(model, pattern, 0.5, "l2", example_inputs=(x,)))
    config = SwapConfig(dtype, min_speedup=0, programs=False)
    swapped = swap_to_sparse(model, config, (x,))
    save(swapped, path)
    return swapped, x


def test_programs_can_be_left_out(tmp_path):
    swapped, _ = saved(tmp_path / "model.safetensors", BlockPattern(32, 32))
    assert explain(swapped).programs == 0 and "one by one: SwapConfig.programs is False" in str(
        explain(swapped)
    )
    assert isinstance(swapped[0], SparseConv2d)


@pytest.mark.parametrize("pattern", [BlockPattern(32, 32), NMPattern(2, 4)], ids=str)
def test_a_model_saved_on_the_cpu_fits_cuda(tmp_path, pattern):
    """All of `load(path, device="cuda")` but the device; then a file of the repacked model, 2:4 weights included."""
    path = tmp_path / "model.safetensors"
    swapped, x = saved(path, pattern)
    wanted = swapped(x)
    loaded = load(path)
    checkpoint._fit(loaded, "cuda")
    save(loaded, tmp_path / "again.safetensors")
    again = load(tmp_path / "again.safetensors")
    for model in (loaded, again):
        assert all(not cuda.refuse_weight(model[i].packed) for i in (0, 2))
        assert (model[0].metadata is not None) == isinstance(pattern, NMPattern)
        with emulated.registered() as name:
            for i in (0, 2):
                model[i].backend = name
            assert torch.equal(model(x), wanted)


def test_a_model_that_does_not_fit_says_which_layer_and_pattern(tmp_path):
    saved(tmp_path / "model.safetensors", BlockPattern(8, 4))
    with pytest.raises(ValueError, match=r"layer 0 does not fit cuda.*8x4.*prune with pattern_for\('cuda'"):
        checkpoint._fit(load(tmp_path / "model.safetensors"), "cuda")


def test_programs_do_not_load_on_cuda():
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU()).eval()
    swapped = swap_to_sparse(model, SwapConfig("f32", min_speedup=0), (torch.randn(2, 32),))
    if not explain(swapped).programs:
        pytest.skip("needs programs")
    with pytest.raises(
        ValueError, match=r"programs, which run on the CPU only.*SwapConfig\(programs=False\)"
    ):
        checkpoint._fit(swapped, "cuda")


def test_loading_without_a_device_says_so(tmp_path):
    if not (reason := cuda.unavailable()):
        pytest.skip("there is a device")
    saved(tmp_path / "model.safetensors", BlockPattern(32, 32))
    with pytest.raises(BackendError, match=re.escape(f"cannot load on cuda: {reason}")):
        load(tmp_path / "model.safetensors", device="cuda")


# ---- Swap and reports ----


def test_what_a_swap_on_cuda_would_do():
    x = (torch.ones(1),)
    assert resolve(SwapConfig(), None, on_cuda=True).dtype == "f16"
    assert resolve(SwapConfig(), x, on_cuda=True).dtype == "int8"
    assert resolve(SwapConfig(), None).dtype == "f32"
    assert (
        resolve(SwapConfig(), x, on_cuda=True).no_programs == "programs for whole models run on the CPU only"
    )
    assert resolve(SwapConfig("f16"), x).no_programs == "programs have no float16"
    assert resolve(SwapConfig(), x).no_programs is None


def test_float16_on_the_cpu_is_the_reference_or_nothing():
    model = nn.Sequential(nn.Linear(32, 32)).eval()
    x = torch.randn(4, 32)
    with pytest.raises(BackendError, match="float16"):
        swap_to_sparse(model, SwapConfig("f16", min_speedup=0), (x,))
    swapped = swap_to_sparse(model, SwapConfig("f16", min_speedup=0, backend="reference"), (x,))
    assert torch.allclose(swapped(x), model(x), atol=0.01) and swapped[0].dtype == torch.float16


def test_info_tells_of_cuda():
    done = CliRunner().invoke(app, ["info", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["cuda"]["unavailable"] == cuda.unavailable()
    assert told["cuda"]["architectures"] == cuda.architectures()
    assert "cuda" in told["backends"]["block_conv2d"]
    table = CliRunner().invoke(app, ["info"]).output
    assert "CUDA" in table and (
        "built for sm_80" in table or "built without CUDA" in table or "not built" in table
    )


def test_the_benchmark_times_nothing_that_is_wrong(monkeypatch):
    """Its contenders and its check, on the emulator; the timing needs a device."""
    library = emulated.library()
    patched = SimpleNamespace(
        quantize_pack=partial(cuda.quantize_pack, library=library),
        gather_gemm=partial(cuda.gather_gemm, library=library),
        validated=cuda.validated,
        phase_taps=cuda.phase_taps,
    )
    monkeypatch.setattr(bench_gpu, "cuda", patched)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    shapes = [
        bench_gpu.Shape("conv", "conv2d", (1, 64, 5, 6), 70, bench_gpu.CONV),
        bench_gpu.Shape("up", "conv_transpose2d", (1, 64, 3, 4), 70, bench_gpu.UP),
        bench_gpu.Shape("linear", "linear", (3, 64, 1, 1), 70, {}),
    ]
    for shape in shapes:
        x = inputs(shape.x, 0, True)
        for dtype in (torch.int8, torch.float16):
            for halved, share in ((False, 1.0), (False, 0.5), (True, 1.0)):
                contender = bench_gpu.ours(shape, x, dtype, share, halved)
                assert bench_gpu.check(contender) is None, contender.name
                contender.wanted = contender.wanted + 0.1 * contender.wanted.abs().max()
                assert "off by" in (bench_gpu.check(contender) or "")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.bench_gpu", "--only", "nothing"], capture_output=True, text=True
    )
    assert done.returncode == (1 if cuda.unavailable() else 0) and (cuda.unavailable() or "") in done.stdout


def test_emulated_kernels_are_not_in_the_table_by_themselves():
    with emulated.registered() as name:
        view, x = blocked_view(20, 1, 40, 0.5, 0, True), inputs((3, 40), 0, True)
        y = ops.block_linear(x, pack(view, torch.int8, (16, 32)), x_zero=9, backend=name)
        assert torch.equal(y.double(), dense_op("linear", x.double(), view, {}))
    with pytest.raises(BackendError, match="no backend 'cuda_emulated'"):
        ops.block_linear(x, pack(view), backend=name)

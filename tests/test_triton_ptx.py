"""The Triton kernels as the PTX that Triton emits for sm_80, run by the interpreter of ptx/: exact, and inside their memory."""

import re

import pytest
import torch
import torch.nn.functional as F
import triton_offline
from ptx import PtxError
from triton_cases import BASE, BUGS, DENSE, EPILOGUES, LAYERS, UP, as_map, broken, replace
from triton_offline import launching

from sparsegan.formats import pack
from sparsegan.ops import cuda
from sparsegan.ops.block_conv2d import reference
from sparsegan.ops.cuda import Numbers
from sparsegan.triton_kernels import layers, ops
from sparsegan.triton_kernels.configs import CONFIGS

LIBRARY = torch.ops.sparsegan_triton
BANK_CONFLICTS, SECTORS = 1.01, 1.1


def check(case, **settings):
    """Run a case; its launch."""
    with launching(**settings) as launcher:
        y = case.run(LIBRARY)
    assert torch.equal(y.dense().double(), case.wanted())
    return launcher.launches[-1]


def main_loop(launch):
    return launch.cost.figures(launch.cost.main_loop())


@pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS)
def test_layers(case):
    check(case)


@pytest.mark.parametrize("case", EPILOGUES.values(), ids=EPILOGUES)
def test_epilogues(case):
    check(case)


@pytest.mark.parametrize("activation", ["none", "relu", "tanh", "sigmoid", "silu", "gelu"])
def test_activations(activation):
    """Within the digits of float32; the sums are small whole numbers, some of them large enough to saturate."""
    case = replace(BASE, activation=activation, size=(1, 40, 5, 5))
    with launching():
        y = case.run(LIBRARY).dense()
    assert (y - case.wanted()).abs().max() <= 4e-6 * (1 if activation in ("tanh", "sigmoid") else 60)


@pytest.mark.parametrize(("dtype", "block"), DENSE, ids=[f"{str(t)[6:]}-{o}x{k}" for t, (o, k) in DENSE])
def test_blocks_and_tiles(dtype, block, monkeypatch):
    """Every block in every tile, with pixels, channels and blocks that fill none; and what the main loop does to memory."""
    case = replace(
        BASE, dtype=dtype, block=block, size=(2, 3 * block[1] - 8, 9, 11), outputs=2 * block[0] - 4
    )
    for config in CONFIGS[block[0]]:
        monkeypatch.setattr(ops, "default", lambda *_, config=config: config)
        launch = check(case)
        tiles = -(-198 // config.block_m)
        assert launch.grid == (2 * tiles,) and launch.warps == config.warps
        figures = main_loop(launch)
        assert figures.bank_conflicts <= BANK_CONFLICTS and figures.sector_overhead <= SECTORS, figures


def test_real_scales_are_rounded_once():
    """As on the CPU: fmaf(sum, scale, bias), and quantising on entry; every bit."""
    o, scale_of = 40, torch.Generator().manual_seed(3)
    view = BASE.view[:, :, :40].repeat(2, 1, 1)[:o] * 13
    scale, bias = torch.rand(o, generator=scale_of) * 0.01, torch.randn(o, generator=scale_of)
    x = torch.randn(2, 40, 7, 9, generator=scale_of)
    packed = cuda.validated(pack(view, torch.int8, (16, 32), scale, bias), [9], 117)
    settings = ([3, 3], [1, 1], [1, 1], [1, 1], 0.031, 117, "leaky_relu", 0.2)
    with launching():
        y = layers.block_conv2d(x, packed.tensors(), *settings)
    assert torch.equal(y, reference(x, pack(view, torch.int8, (16, 32), scale, bias).tensors(), *settings))


@pytest.mark.parametrize("out", [torch.uint8, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("came", [torch.float32, torch.float16])
def test_packing(out, came):
    x = torch.randn(2, 37, 6, 7, generator=torch.Generator().manual_seed(0)).to(came) * 40
    numbers = Numbers(out, 0.3, 101) if out == torch.uint8 else Numbers(out)
    for strided in (x, x.contiguous(memory_format=torch.channels_last), x[:, 3:, 1:, ::2]):
        with launching():
            made = cuda.quantize_pack(strided, numbers, LIBRARY)
        c = strided.shape[1]
        wanted = strided.to(out)
        if out == torch.uint8:
            steps = torch.round(strided.float() * torch.tensor(1 / 0.3, dtype=torch.float32)) + 101
            wanted = steps.clamp(0, 255).to(torch.uint8)
        assert torch.equal(made.data[..., :c], wanted.permute(0, 2, 3, 1))
        assert (made.data[..., c:] == (101 if out == torch.uint8 else 0)).all()


def test_packing_of_what_is_not_a_number():
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 3e38, 0.5])[None]
    with launching():
        made = cuda.quantize_pack(x, Numbers(torch.uint8, 1.0, 100), LIBRARY)
    assert made.data[0, 0, 0, :5].tolist() == [0, 255, 0, 255, 100]


@pytest.mark.parametrize("groups", [1, 5, 40])
@pytest.mark.parametrize(
    ("came", "out"),
    [(torch.uint8, torch.uint8), (torch.float16, torch.float16), (torch.float32, torch.uint8)],
)
def test_group_norm(groups, came, out):
    x = torch.randn(2, 40, 11, 13, generator=torch.Generator().manual_seed(0)) * 2 + 5
    weight, bias = torch.rand(40) + 0.5, torch.randn(40)
    seen = as_map(x, Numbers(came, 0.05, 110))
    made = Numbers(out, 0.03, 128) if out == torch.uint8 else Numbers(out)
    with launching() as launcher:
        y = cuda.group_norm_act(
            seen, groups, made, weight=weight, bias=bias, activation="silu", library=LIBRARY
        )
    assert [launch.name for launch in launcher.launches] == [
        "chunk_statistics_kernel",
        "group_statistics_kernel",
        "normalize_kernel",
    ]
    exact = F.silu(F.group_norm(seen.dense().double(), groups, weight.double(), bias.double()))
    wanted = exact.clamp(-128 * 0.03, 127 * 0.03) if out == torch.uint8 else exact
    assert (
        (y.dense().double() - wanted).abs() <= (0.0151 if out == torch.uint8 else 2e-3 * (1 + exact.abs()))
    ).all()
    assert (y.data[..., 40:] == made.zero).all()


def test_group_norm_far_from_zero():
    """The mean is 10,000 times the deviation: sums of squares would have no digits left."""
    x = torch.randn(1, 16, 20, 20, generator=torch.Generator().manual_seed(0)) + 1e4
    with launching():
        y = cuda.group_norm_act(
            as_map(x, Numbers(torch.float32, multiple=16)), 4, Numbers(torch.float32), library=LIBRARY
        )
    assert (y.dense().double() - F.group_norm(x.double(), 4)).abs().max() < 5e-3


# ---- Wrong kernels must be noticed ----


@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_planted_bugs(bug, tmp_path, monkeypatch):
    monkeypatch.setattr(ops, "gather_gemm_kernel", broken(bug, tmp_path).gather_gemm_kernel)
    try:
        with launching():
            y = bug.case.run(LIBRARY)
    except PtxError as error:
        caught = str(error)
    else:
        wrong = not torch.equal(y.dense().double(), bug.case.wanted())
        caught = "wrong result" if wrong else "nothing"
    assert re.search(bug.ptx, caught), caught


# What the PTX interpreter must say when a line of Triton's own PTX is missing.
PTX_BUGS = {
    "no wait for the copies": (r"cp\.async\.wait_group[^;]*;", "in flight"),
    "no barrier": (r"bar\.sync[^;]*;", "a race|in flight"),
}


@pytest.mark.parametrize(("line", "said"), PTX_BUGS.values(), ids=PTX_BUGS)
def test_planted_bugs_in_the_ptx(line, said):
    with launching(edit=lambda text: re.sub(line, "", text)), pytest.raises(PtxError, match=said):
        replace(BASE, size=(1, 160, 7, 9)).run(LIBRARY)


def test_the_launcher_notices_what_is_never_written():
    """Outputs are garbage until a kernel writes them, so that a skipped tile shows."""
    with launching(run=False):
        y = UP.run(LIBRARY)
    assert not torch.equal(y.dense().double(), UP.wanted())
    assert triton_offline.ARCHITECTURES[0] == 80

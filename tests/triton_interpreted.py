"""The Triton kernels under Triton's own interpreter. Run by test_triton_interpreted.py in a process of its own, because
TRITON_INTERPRET must be set before Triton is loaded.

It runs the kernel's Python on numpy arrays: other code than the PTX, so that both agreeing means something. It does not notice
accesses beyond a tensor, and it has no real bfloat16: it multiplies the bits, and cuts digits off instead of rounding.
"""

import os

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from triton_cases import BASE, BUGS, EPILOGUES, LAYERS, as_map, broken, replace

from sparsegan import triton_kernels
from sparsegan.ops import cuda
from sparsegan.ops.cuda import Numbers
from sparsegan.triton_kernels.configs import Config

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("wants TRITON_INTERPRET=1", allow_module_level=True)
if reason := triton_kernels.unavailable():
    pytest.skip(reason, allow_module_level=True)

from sparsegan.triton_kernels import ops

LIBRARY = torch.ops.sparsegan_triton


@pytest.fixture(autouse=True)
def interpreted(monkeypatch):
    """Small tiles, because every program is a step of Python."""
    monkeypatch.setattr(ops, "wrap_triton", lambda kernel: kernel)
    monkeypatch.setattr(ops, "default", lambda *_: Config(64, 4, 3))


def check(case):
    assert torch.equal(case.run(LIBRARY).dense().double(), case.wanted())


@pytest.mark.parametrize("case", LAYERS.values(), ids=LAYERS)
def test_layers(case):
    check(case)


EXACT = {name: case for name, case in EPILOGUES.items() if case.out != torch.bfloat16}


@pytest.mark.parametrize("case", EXACT.values(), ids=EXACT)
def test_epilogues(case):
    check(case)


@pytest.mark.parametrize("block", [(16, 16), (32, 32)])
def test_half_precision(block):
    check(replace(BASE, dtype=torch.float16, block=block, size=(1, 40, 5, 6)))


PAIR = st.tuples(st.integers(1, 3), st.integers(1, 3))


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(["conv2d", "conv_transpose2d"]),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=PAIR,
    dilation=PAIR,
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    size=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    seed=st.integers(0, 99),
)
def test_any_geometry(kind, kernel, stride, dilation, padding, size, seed):
    geometry = {"kernel_size": kernel, "stride": stride, "dilation": dilation, "padding": padding}
    case = replace(BASE, kind=kind, size=(1, 33, *size), outputs=5, seed=seed, **geometry)
    try:
        case.wanted()
    except RuntimeError:  # no output pixel
        return
    check(case)


@pytest.mark.parametrize("groups", [1, 5])
def test_group_norm(groups):
    x = torch.randn(2, 20, 9, 15, generator=torch.Generator().manual_seed(0)) + 2
    seen = as_map(x, Numbers(torch.float32))
    y = cuda.group_norm_act(seen, groups, Numbers(torch.float32), activation="silu", library=LIBRARY)
    assert (y.dense().double() - F.silu(F.group_norm(x.double(), groups))).abs().max() < 1e-5


def test_packing():
    x = torch.randn(2, 37, 6, 7, generator=torch.Generator().manual_seed(0)) * 40
    made = cuda.quantize_pack(x[:, :, ::2], Numbers(torch.uint8, 0.3, 101), LIBRARY)
    steps = torch.round(x[:, :, ::2] * torch.tensor(1 / 0.3, dtype=torch.float32)) + 101
    assert torch.equal(made.data[..., :37], steps.clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1))


@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_planted_bugs(bug, tmp_path, monkeypatch):
    """Which of them show here; an access out of bounds may read anything, and then the result is wrong by luck only."""
    monkeypatch.setattr(ops, "gather_gemm_kernel", broken(bug, tmp_path).gather_gemm_kernel)
    if not bug.interpreted:
        # Not run: it would read or write memory that is not its own, with nobody to notice.
        pytest.skip("an access out of bounds, which only the PTX interpreter notices")
    assert not torch.equal(bug.case.run(LIBRARY).dense().double(), bug.case.wanted())

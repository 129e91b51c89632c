"""Triton among the backends: where it stands, what it refuses and why, and that an explicit choice never falls back."""

import re

import pytest
import torch
from torch._subclasses import FakeTensorMode

from sparsegan import BackendError, ops, triton_kernels
from sparsegan.formats import BLOCKS, pack, pack_two_four
from sparsegan.ops.block_conv2d import BACKENDS as CONV
from sparsegan.ops.block_conv_transpose2d import BACKENDS as UP
from sparsegan.ops.block_linear import BACKENDS as LINEAR

KNOWN = triton_kernels.unavailable()


@pytest.mark.parametrize("table", [LINEAR, CONV, UP])
def test_order(table):
    names = [backend.name for backend in table]
    assert names.index("cuda") < names.index("triton") < names.index("reference")


def on_cuda(packed):
    moved = {
        name: torch.empty_like(t, device="cuda")
        for name, t in vars(packed).items()
        if isinstance(t, torch.Tensor)
    }
    return type(packed)(**{**vars(packed), **moved})


def test_explain_says_why():
    said = ops.explain("block_linear", torch.ones(1, 32), pack(torch.ones(16, 1, 32), torch.int8, (16, 32)))
    assert said.chosen != "triton"
    assert said.reasons["triton"] == (KNOWN or "x is on cpu, the kernels run on CUDA devices")
    assert f"triton: {said.reasons['triton']}" in str(said)


def test_an_explicit_choice_never_falls_back():
    with pytest.raises(BackendError, match=f"triton: {re.escape(KNOWN or 'x is on cpu')}"):
        ops.block_linear(torch.ones(1, 8), pack(torch.ones(8, 1, 8)), backend="triton")


@pytest.mark.skipif(KNOWN is not None, reason=str(KNOWN))
def test_what_it_takes_and_refuses():
    weights = {
        None: [
            pack(torch.ones(64, 1, 64), dtype, block)
            for dtype, blocks in BLOCKS["cuda"].items()
            for block in blocks
        ],
        "int8 blocks of 8x4, wanted 16x32, 32x32, 64x32": [pack(torch.ones(8, 1, 8), torch.int8, (8, 4))],
        "float32 blocks of 8x4": [pack(torch.ones(8, 1, 8), torch.float32, (8, 4))],
        "2:4 packed": [pack_two_four(torch.eye(64)[:, None], torch.int8, (32, 64))],
    }
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(2, 64, device="cuda")
        assert triton_kernels.refuse(x, None) is None
        for reason, several in weights.items():
            for weight in several:
                found = triton_kernels.refuse(x, on_cuda(weight))
                assert found is None if reason is None else reason in found, found
    assert "the weight on cpu" in triton_kernels.refuse(x, weights[None][0])


def test_the_description_names_the_version_or_the_reason():
    assert (
        re.fullmatch(r"triton \d+\.\d+\S*", triton_kernels.describe())
        if KNOWN is None
        else triton_kernels.describe() == KNOWN
    )

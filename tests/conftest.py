"""Fixtures shared by all tests."""

import pytest
import torch

from sparsegan import ops

ISAS = ("avx512_vnni", "avx2_vnni", "avx2", "portable")


@pytest.fixture(params=["reference", *ISAS])
def backend(request: pytest.FixtureRequest) -> str:
    """Every backend of an op in turn, the C++ one once for each instruction set; the name to pass as `backend`."""
    if request.param == "reference":
        yield "reference"
        return
    if ops.extension_error():
        pytest.skip(ops.extension_error())
    if request.param not in ops.available_isas():
        pytest.skip(f"this CPU has no {request.param}")
    ops.set_isa(request.param)
    yield "cpu"
    ops.set_isa(None)


@pytest.fixture
def uninitialised_is_nan():
    """Fresh float tensors hold NaN, C++ `empty` too, so that an output that is not written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)

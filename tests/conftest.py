"""Fixtures shared by all tests."""

from collections.abc import Iterator
from functools import partial
from importlib import import_module

import emulated
import pytest
import torch

from sparsegan import ops, swap

ISAS = ("avx512_amx", "avx512_vnni", "avx2_vnni", "avx2", "portable")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """The same random numbers in each run, so that a rare case of rounding fails always or never."""
    torch.manual_seed(0)


@pytest.fixture(params=["reference", *ISAS, "cuda_emulated", "cuda"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend of an op in turn, the C++ one once for each instruction set; the name to pass as `backend`."""
    if request.param == "reference":
        yield "reference"
        return
    if request.param == "cuda_emulated":
        with emulated.registered() as name:
            yield name
        return
    if request.param == "cuda":
        if reason := ops.cuda.unavailable():
            pytest.skip(reason)
        yield "cuda"
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


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """`compress` and the demo with little data; what can be swapped is, whatever the clock says."""
    # By import_module, because the package has functions of the same names as its modules.
    small = [
        ("sparsegan.prune.importance", "OBD_DRAWS", 5),
        ("sparsegan.compress", "CALIBRATION_BATCHES", 1),
        ("sparsegan.compress", "SwapConfig", partial(swap.SwapConfig, min_speedup=0)),
        ("sparsegan.swap.single", "LAYER_BUDGET", 0.0),
        ("sparsegan.swap.exchange", "MODEL_BUDGET", 0.0),
        ("sparsegan.demo", "_EVALUATED", 32),
    ]
    with pytest.MonkeyPatch.context() as patch:
        for module, name, value in small:
            patch.setattr(import_module(module), name, value)
        yield

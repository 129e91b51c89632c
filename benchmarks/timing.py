"""One row of a benchmark: first that the numbers are right, then how long they take, rivals in turn.

Every round calls each contender twice, once to warm up and once for the clock, and measures the speed of the
dot-product instruction, so that whatever else the machine does hits all of them. Medians are kept, and only
ratios and shares of the peak should be carried to another machine.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from sparsegan import ops
from sparsegan.report import check_kernels

Call = Callable[[], object]

DTYPES = {"int8": torch.int8, "f32": torch.float32}

# Largest error of a sparse layer or model against the dense float32 one with the same zeros, as a share of
# the root mean square of its output. For int8 that is rounding; more means that something else is computed.
DENSE_TOLERANCE = {"int8": 0.05, "f32": 1e-5}

_LEAST_ROUNDS, _MOST_ROUNDS = 5, 300


class WrongOutputError(AssertionError):
    """A contender computes something else than the model; there is no speed to report."""


@dataclass(frozen=True)
class Row:
    """What was measured. ms: medians by contender, "sparsegan" and its rivals; macs for the whole batch.

    steady_ms: of chains, the time that one more layer takes.
    """

    model: str
    layer: str
    what: str
    batch: int
    dtype: str
    sparsity: float
    pattern: str
    macs_dense: int
    macs_executed: float
    peak_gmacs: float
    kernel_error: float
    dense_error: float
    ms: dict[str, float]
    steady_ms: float | None = None
    steady_macs: float | None = None

    @property
    def executed_gmacs(self) -> float:
        return self.macs_executed / self.ms["sparsegan"] / 1e6

    @property
    def dense_equivalent_gmacs(self) -> float:
        return self.macs_dense / self.ms["sparsegan"] / 1e6

    @property
    def peak_share(self) -> float:
        return self.executed_gmacs / self.peak_gmacs if self.peak_gmacs else 0.0

    @property
    def steady_peak_share(self) -> float | None:
        if not self.steady_ms or not self.steady_macs or not self.peak_gmacs:
            return None
        return self.steady_macs / self.steady_ms / 1e6 / self.peak_gmacs

    def speedup(self, rival: str) -> float | None:
        """How many times faster than `rival`; None when that one was not timed."""
        return self.ms[rival] / self.ms["sparsegan"] if rival in self.ms else None

    def to_json(self) -> dict[str, Any]:
        computed = ("executed_gmacs", "dense_equivalent_gmacs", "peak_share", "steady_peak_share")
        speedups = {rival: self.speedup(rival) for rival in self.ms if rival != "sparsegan"}
        return asdict(self) | {name: getattr(self, name) for name in computed} | {"speedup": speedups}


@dataclass
class Samples:
    """Seconds of each contender and peaks, round by round."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    peaks: list[float] = field(default_factory=list)


def rivals_of(module: nn.Module, x: Tensor, with_compile: bool = True) -> dict[str, Call]:
    """The dense model as users of torch run it: eager, eager in channels-last, compiled.

    torch.compile is left out where it does not work, such as without a C++ compiler.
    """
    rivals: dict[str, Call] = {"eager": lambda: module(x)}
    if any(parameter.dim() == 4 for parameter in module.parameters()):
        last = copy.deepcopy(module).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        x_last = x.to(memory_format=torch.channels_last) if x.dim() == 4 else x
        rivals["channels_last"] = lambda: last(x_last)
    if with_compile:
        # Without a reset the ninth model would quietly run in eager mode. Freezing folds and prepacks weights;
        # given as an option to torch.compile it has no effect.
        torch._dynamo.reset()
        torch._inductor.config.freezing = True
        compiled = torch.compile(module, dynamic=False, fullgraph=True)
        try:
            with torch.no_grad():
                compiled(x)
        except Exception as error:
            print(f"without torch.compile: {type(error).__name__}: {str(error).strip().splitlines()[-1]}")
        else:
            rivals["compile"] = lambda: compiled(x)
    return rivals


def check_outputs(sparse: nn.Module, dense: nn.Module, x: Tensor, dtype: str) -> tuple[float, float]:
    """(kernel error, error against the dense float32 model with the same zeros).

    The first as `check_kernels` gives it, the second as a share of the root mean square of the output. Raises
    WrongKernelError or WrongOutputError when one is too large.
    """
    kernel_error = check_kernels(sparse, (x,))
    with torch.no_grad():
        got, wanted = sparse(x).double(), dense(x).double()
    dense_error = ((got - wanted).square().mean() / wanted.square().mean()).sqrt().item()
    if not dense_error <= DENSE_TOLERANCE[dtype]:
        raise WrongOutputError(
            f"{dtype} output is off by {dense_error:.2g} of its root mean square, which is not rounding "
            f"({DENSE_TOLERANCE[dtype]} allowed): no speed is reported for it"
        )
    return kernel_error, dense_error


def time_in_turn(
    benchmark: Any, ours: Call, rivals: Mapping[str, Call], dtype: str, seconds: float
) -> tuple[dict[str, float], float] | None:
    """Time `ours` by pytest-benchmark and the rivals in turn: median ms of each, median peak in GMAC/s.

    benchmark: the fixture. seconds: to spend, about; at least five rounds are made. Returns None when
    --benchmark-disable leaves nothing timed.
    """
    samples = Samples({name: [] for name in rivals})

    def before_ours() -> None:
        for name, rival in rivals.items():
            rival()
            samples.seconds[name].append(_seconds(rival))
        samples.peaks.append(ops.dot_peak(DTYPES[dtype]))
        ours()

    for _ in range(2):  # the first is slow: caches, thread pools
        start = time.perf_counter()
        before_ours()
        ours()
        once = time.perf_counter() - start
    samples.seconds, samples.peaks = {name: [] for name in rivals}, []
    rounds = min(max(int(seconds / once), _LEAST_ROUNDS), _MOST_ROUNDS)
    benchmark.pedantic(ours, setup=before_ours, rounds=rounds)
    if benchmark.stats is None:
        return None
    medians = {name: median(values) for name, values in samples.seconds.items()}
    medians["sparsegan"] = benchmark.stats["median"]
    return {name: value * 1e3 for name, value in medians.items()}, median(samples.peaks)


def _seconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start

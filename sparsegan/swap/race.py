"""Which of several is faster."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch

_MOST_ROUNDS = 100


def race(runners: Sequence[Callable[[], object]], budget: float) -> list[float]:
    """Median milliseconds of each runner. They take turns, so that what else the machine does hits all alike.

    budget: seconds to spend at most, after a first round to warm up and a second to learn how long one takes.
    """

    def once(runner: Callable[[], object]) -> float:
        start = time.perf_counter()
        runner()
        if torch.cuda.is_initialized():  # what it has begun there, it must have done
            torch.cuda.synchronize()
        return (time.perf_counter() - start) * 1e3

    for runner in runners:
        runner()
    samples = [[once(runner)] for runner in runners]
    rounds = int(budget * 1e3 / max(sum(sample[0] for sample in samples), 1e-3))
    for _ in range(min(rounds, _MOST_ROUNDS)):
        for runner, sample in zip(runners, samples, strict=True):
            sample.append(once(runner))
    return [median(sample) for sample in samples]

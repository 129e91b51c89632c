"""One generator at one batch size, in a process of its own: build every contestant, check it, time all in turn."""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import re
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.generators import GENERATORS
from benchmarks.peers.contestants import (
    CONTESTANTS,
    THREADS,
    Call,
    Case,
    Contender,
    Contestant,
    NotApplicableError,
)
from sparsegan import ops
from sparsegan.report import WrongKernelError, check_kernels, finite

# Largest error of a contestant that counts, as a share of the root mean square of the output. That much int8 may
# do to random weights, which a trained model would not let it; more means that something else is computed.
TOLERANCE = 0.25

# Seconds that building and checking one contestant may take, and all of them: so many, and so many eager calls,
# because quantising and swapping run the model often. What comes too late is not built.
CONTESTANT_LIMIT, BUILD_LIMIT = (100.0, 10), (300.0, 100)

# Seconds to spend on timing, about, and on the turn of one contestant in a round.
TIMING_SECONDS, TURN_SECONDS = 30.0, 0.15
LEAST_ROUNDS, MOST_ROUNDS = 2, 11
# A contestant warms up before its turn, unless its calls are longer than this: the caches hold nothing that long.
_LONG_MS = 500.0
# Thread pools spin for a moment after their work is done; the next contestant does not pay for that.
_PAUSE = 0.03

# --quick: this share of the limits and of the time for timing.
_QUICK = 0.3


def compare(output: Any, reference: Tensor) -> tuple[float, float]:
    """(error, PSNR): root mean square error as a share of that of the reference; dB, the peak being its range.

    An output of another shape or with NaN has an infinite error, PSNR -inf; equal outputs have PSNR +inf.
    """
    got, wanted = torch.as_tensor(output).double(), reference.double()
    if got.shape != wanted.shape or not bool(got.isfinite().all()):
        return math.inf, -math.inf
    mean_square = (got - wanted).square().mean().item()
    if mean_square == 0:
        return 0.0, math.inf
    peak = (wanted.max() - wanted.min()).item()
    error = math.sqrt(mean_square / max(wanted.square().mean().item(), 1e-30))
    return error, 10 * math.log10(max(peak**2, 1e-30) / mean_square)


def verdict(error: float, psnr: float) -> dict[str, Any]:
    """The entry of a contestant that runs, before it is timed."""
    entry: dict[str, Any] = {"state": "valid", "reason": None, "error": error, "psnr": psnr}
    if not error <= TOLERANCE:
        reason = f"its output is off by {error:.2g} of its root mean square, {TOLERANCE} allowed"
        entry |= {"state": "not valid", "reason": reason}
    return entry


class TimeLimitReached(BaseException):
    """No Exception: packages that catch those, and try something else, do not catch this."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """TimeLimitReached when the block takes longer; noticed when native code returns."""

    def stop(*_: object) -> None:
        raise TimeLimitReached(f"took longer than {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def enter(contestant: Contestant, case: Case, seconds: float) -> tuple[dict[str, Any], Call | None]:
    """Build and check one contestant: its entry, and the call to time; None when there is nothing to time."""
    start = time.perf_counter()
    call = None
    try:
        with time_limit(seconds):
            contender = contestant.build(case)
            output = contender.call()  # what compiles does it now
            entry = verdict(*compare(output, contender.reference)) | contender.facts
        if entry["state"] == "valid":
            entry |= _kernel_check(contender, case, seconds - (time.perf_counter() - start))
        if entry["state"] == "valid" or contestant.density is None:
            call = contender.call
    except NotApplicableError as error:
        entry = {"state": "left out", "reason": str(error)}
    except TimeLimitReached as error:
        entry = {"state": "failed", "reason": str(error)}
    except Exception as error:
        entry = {"state": "failed", "reason": _reason(error)}
    entry["build_s"] = time.perf_counter() - start
    return entry, call


def _kernel_check(contender: Contender, case: Case, seconds: float) -> dict[str, Any]:
    """Our kernels against our reference, which is slow: where time does not suffice that is said."""
    if contender.sparse is None:
        return {}
    try:
        with time_limit(max(seconds, 1.0)):
            return {"kernel_error": check_kernels(contender.sparse, (case.x,))}
    except WrongKernelError as error:
        return {"state": "not valid", "reason": _reason(error)}
    except TimeLimitReached as error:
        return {"kernel_error": None, "kernel_check": f"not done: {error}"}
    except Exception as error:
        return {"kernel_error": None, "kernel_check": f"not done: {_reason(error)}"}


def _reason(error: Exception) -> str:
    """One line, without the folders of this machine."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    line = re.sub(r"(?<!\w)/\S*/", ".../", lines[0])
    return f"{type(error).__name__}: {line[:300]}"


def take_turns(
    calls: Mapping[str, Call],
    seconds: float = TIMING_SECONDS,
    turn: float = TURN_SECONDS,
    least_rounds: int = LEAST_ROUNDS,
    between: Callable[[], None] = lambda: None,
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """(milliseconds by contestant, the median of each round; reasons of those that failed on the way).

    In each round everyone has a turn, of as many calls as fit into `turn` seconds, after one to warm up. The order
    rotates, so that nobody always follows the same one. `between` is called once a round. Takes about `seconds`,
    but at least `least_rounds` rounds are made.
    """
    once: dict[str, float] = {}
    failed: dict[str, str] = {}
    rounds: dict[str, list[float]] = {}
    start = time.perf_counter()
    number = 0
    while number < least_rounds or (number < MOST_ROUNDS and time.perf_counter() - start < seconds):
        between()
        for name in rotated(list(calls), number):
            if name in failed:
                continue
            time.sleep(_PAUSE)
            try:
                if once.get(name, 0.0) < _LONG_MS:
                    once[name] = min(once.get(name, math.inf), _milliseconds(calls[name]))
                count = max(1, min(100, int(turn * 1e3 / once[name])))
                samples = [_milliseconds(calls[name]) for _ in range(count)]
            except Exception as error:
                failed[name] = _reason(error)
                rounds.pop(name, None)
                continue
            rounds.setdefault(name, []).append(median(samples))
        number += 1
    return rounds, failed


def rotated(names: Sequence[str], number: int) -> list[str]:
    """The order of round `number`: one way and back, then from the next one on."""
    start = number // 2 % max(len(names), 1)
    order = [*names[start:], *names[:start]]
    return order[::-1] if number % 2 else order


def _milliseconds(call: Call) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def peak_growth(call: Call) -> int | None:
    """Bytes by which the resident memory of this process grows at most during a call; None where Linux does not tell."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _status("VmRSS")
    except OSError:
        call()
        return None
    call()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def _clocks() -> tuple[float, float, float] | None:
    """Seconds of processor time: of all programs, of this one, and idle; None where Linux does not tell."""
    try:
        fields = Path("/proc/stat").read_text().split(maxsplit=9)[1:9]
    except OSError:
        return None
    user, nice, system, idle, waiting, *interrupts = (
        int(value) / os.sysconf("SC_CLK_TCK") for value in fields
    )
    return user + nice + system + sum(interrupts), time.process_time(), idle + waiting


def _others_share(before: tuple[float, ...] | None, after: tuple[float, ...] | None) -> float | None:
    """The share of the processor that other programs took between two readings of the clocks."""
    if before is None or after is None:
        return None
    busy, own, idle = (end - start for start, end in zip(before, after, strict=True))
    return max(0.0, busy - own) / max(busy + idle, 1e-9)


def contest(
    case: Case, contestants: Sequence[Contestant], skip: Mapping[str, str], quick: bool, now: Path
) -> dict[str, Any]:
    """The row of one case. skip: reasons by name of those not to try; now: a file that tells whose turn it is."""
    _ = case.model, case.x  # made now: the memory of a call is measured without them
    start = time.perf_counter()
    memory = peak_growth(lambda: case.reference)
    eager = time.perf_counter() - start
    share = _QUICK if quick else 1.0
    limit, total = (share * (fixed + count * eager) for fixed, count in (CONTESTANT_LIMIT, BUILD_LIMIT))
    entries: dict[str, dict[str, Any]] = {}
    calls: dict[str, Call] = {}
    for contestant in contestants:
        name = contestant.name
        now.write_text(name)
        left = total - (time.perf_counter() - start)
        if name in skip:
            entries[name] = {"state": "failed", "reason": skip[name]}
        elif left <= 0:
            entries[name] = {
                "state": "failed",
                "reason": f"not built: the {total:.0f} s for building are over",
            }
        else:
            entries[name], call = enter(contestant, case, min(limit, max(left, 10.0)))
            if call is not None:
                calls[name] = call
        entries[name] |= {"density": contestant.density, "block": contestant.block}
        print(name, entries[name], flush=True)
    now.write_text("")
    peaks: list[float] = []
    clocks = _clocks()
    rounds, failed = take_turns(
        calls,
        share * TIMING_SECONDS,
        share * TURN_SECONDS,
        LEAST_ROUNDS,
        lambda: peaks.append(ops.dot_peak(torch.int8)),
    )
    others = _others_share(clocks, _clocks())
    for name, samples in rounds.items():
        entries[name] |= {"ms": median(samples), "rounds_ms": samples}
    for name, reason in failed.items():
        entries[name] |= {"state": "failed", "reason": reason}
    return {
        "model": case.generator.name,
        "title": case.generator.title,
        "batch": case.batch,
        "peak_gmacs": median(peaks),
        "eager_peak_bytes": memory,
        "others_share": others,
        "contestants": entries,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", choices=GENERATORS)
    parser.add_argument("batch", type=int)
    parser.add_argument(
        "folder", type=Path, help="for files; row.json is the result, now the one that is being built"
    )
    parser.add_argument("--contestants", default=",".join(CONTESTANTS))
    parser.add_argument("--skip", default="{}", help="JSON, reasons by name")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(THREADS)
    # Freezing folds and prepacks weights; given as an option to torch.compile it has no effect.
    torch._inductor.config.freezing = True
    torch._dynamo.config.recompile_limit = 64
    case = Case(GENERATORS[options.model], options.batch, options.folder)
    contestants = [CONTESTANTS[name] for name in options.contestants.split(",")]
    with torch.no_grad():
        row = contest(case, contestants, json.loads(options.skip), options.quick, options.folder / "now")
    (options.folder / "row.json").write_text(json.dumps(finite(row)))


if __name__ == "__main__":
    main()

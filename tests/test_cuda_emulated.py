"""The CUDA kernels in C++ on the host emulator (tests/emulator): against plain loops, under sanitizers, and the emulator itself.

No torch, no nvcc and no GPU: g++ compiles csrc/cuda/*.cu with the host branch of warp.cuh. What the emulator cannot see, wrong
inline PTX, is for tests/test_ptx.py.
"""

import shutil

import pytest
from emulator.build import CUDA, HERE, Checks, run, unavailable

KERNELS = ["quantize", "group_norm", "gather_gemm"]


@pytest.fixture(scope="module", params=["none", "address", "thread"])
def checks(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulated")
    if reason := unavailable(folder, request.param):
        pytest.skip(reason)
    return Checks(folder, request.param)


@pytest.fixture(scope="module")
def program(checks):
    return checks.program()


@pytest.fixture(scope="module")
def self_test(checks):
    return checks.link(checks.objects([HERE / "self_test.cpp"]), "self_test")


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_agree_with_plain_loops(checks, program, kernel):
    effort = [] if checks.sanitizer == "none" else ["--small"]
    outcome = run(program, *effort, kernel)
    assert (outcome.found_by, outcome.output) == ("ok", f"ok {kernel}\n")


def test_wrong_command_line(checks, program):
    assert run(program, "quantise").found_by == "command line"


def test_the_emulator_reports_planted_faults_and_computes_by_the_manual(self_test):
    outcome = run(self_test)
    assert outcome.found_by == "ok", outcome.output
    assert outcome.output.count("ok ") > 25


# What only a sanitizer sees, or sees first: kernel of self_test.cpp, words of its report.
REPORTS = {
    "none": {},
    "address": {
        "past_the_end": "use-after-poison",
        "global_past_the_end": "use-after-poison",
    },
    "thread": {
        "missing_barrier": "data race",
        "missing_wait": "data race",
        "two_stages_unguarded": "data race",
        "blocks_race": "data race",
        "warp_exchange_unordered": "data race",
    },
}


def test_sanitizers_report_planted_faults(checks, self_test):
    for kernel, words in REPORTS[checks.sanitizer].items():
        outcome = run(self_test, kernel)
        assert outcome.found_by == f"{checks.sanitizer} sanitizer", (kernel, outcome.output)
        assert words in outcome.output and "self_test.cpp" in outcome.output


def test_sanitizers_pass_what_is_right(checks, self_test):
    for kernel in ("reverse", "two_stages"):
        outcome = run(self_test, kernel)
        assert (outcome.found_by, outcome.output) == ("ok", "right\n")


# One line of a kernel changed: what finds it without a sanitizer, and with the race detector.
PLANTED = {
    "barrier": (
        "    __syncthreads();\n    if (row < half",
        "    if (row < half",
        "wrong result",
        "thread sanitizer",
    ),
    "tail": ("channel + i < norm.channels ? v[i] : 0.0f", "v[i]", "wrong result", "wrong result"),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_the_checks_can_fail(checks, tmp_path, bug):
    if checks.sanitizer == "address":
        pytest.skip("the same as without a sanitizer")
    before, after, *found_by = PLANTED[bug]
    shutil.copytree(CUDA, tmp_path / bug / "csrc" / "cuda")
    shutil.copy(CUDA.parent / "packed.h", tmp_path / bug / "csrc")
    changed = tmp_path / bug / "csrc" / "cuda" / "group_norm.cuh"
    text = changed.read_text()
    assert text.count(before) == 1
    changed.write_text(text.replace(before, after))
    program = checks.program(changed.parent, changed=("group_norm",))
    assert run(program, "--small", "group_norm").found_by == found_by[checks.sanitizer == "thread"]
    assert run(program, "--small", "quantize").found_by == "ok"

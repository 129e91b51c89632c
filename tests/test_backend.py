"""The choice of a backend, what PyTorch checks of custom ops, and that hostile weights cannot leave their memory."""

import os
import subprocess
import sys

import pytest
import torch
from op_cases import blocked_view, inputs, packed_weight

from sparsegan import ops
from sparsegan.ops.program import Act, Engine, Program, Slot, Step, Store

CONV = {"kernel_size": (3, 3), "padding": (1, 1)}
needs_extension = pytest.mark.skipif(ops.extension_error() is not None, reason=str(ops.extension_error()))


def conv_arguments(dtype=torch.int8, seed=0):
    packed = packed_weight("conv2d", blocked_view(8, 9, 12, 0.5, seed, True), CONV, dtype)
    return inputs((2, 12, 6, 7), seed, True), packed


def run_python(code, **environment):
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)


def test_an_explicit_backend_never_falls_back():
    x, packed = conv_arguments()
    with pytest.raises(ops.BackendError) as error:
        ops.block_conv2d(x, packed, **CONV, backend="cuda")
    for part in ("no backend 'cuda'", "cpu: ", "reference: available"):
        assert part in str(error.value)


def test_environment_names_the_backend():
    code = (
        "import torch; from sparsegan import ops; from sparsegan.formats import pack;"
        "ops.block_linear(torch.ones(1, 4), pack(torch.ones(4, 1, 4)))"
    )
    assert "no backend 'nonsense'" in run_python(code, SPARSEGAN_BACKEND="nonsense").stderr
    assert run_python(code, SPARSEGAN_BACKEND="reference").returncode == 0


@needs_extension
def test_environment_names_the_instruction_set():
    code = "from sparsegan import ops; print(ops.isa())"
    assert run_python(code, SPARSEGAN_ISA="portable").stdout.strip() == "portable"
    refused = run_python(code, SPARSEGAN_ISA="sse9")
    assert refused.returncode and "SPARSEGAN_ISA: no instruction set 'sse9'" in refused.stderr


@needs_extension
def test_forcing_an_instruction_set():
    assert "portable" in ops.available_isas()
    with pytest.raises(RuntimeError, match="no instruction set 'sse9'"):
        ops.set_isa("sse9")
    ops.set_isa("portable")
    assert ops.isa() == "portable"
    ops.set_isa(None)
    assert ops.isa() == ops.available_isas()[0] or "SPARSEGAN_ISA" in os.environ


@needs_extension
def test_dot_peak_is_a_rate():
    for dtype in (torch.int8, torch.bfloat16, torch.float32):
        assert 0.1 < ops.dot_peak(dtype) < 1e6


def test_without_the_extension_the_reference_serves():
    code = (
        "import sys; sys.modules['sparsegan._C'] = None\n"
        "import torch; from sparsegan import ops; from sparsegan.formats import pack\n"
        "assert 'not built' in ops.extension_error(), ops.extension_error()\n"
        "assert ops.available_isas() == [] and ops.isa() is None and ops.dot_peak() == 0.0\n"
        "print(ops.block_linear(torch.ones(1, 4), pack(torch.ones(3, 1, 4))))\n"
        "try: ops.block_linear(torch.ones(1, 4), pack(torch.ones(3, 1, 4)), backend='cpu')\n"
        "except ops.BackendError as error: print(error)\n"
        "try: ops.set_isa('avx2')\n"
        "except RuntimeError as error: print(error)\n"
    )
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert "[[4., 4., 4.]]" in done.stdout and "C++ compiler" in done.stdout
    assert "slow reference backend" in done.stderr


@needs_extension
@pytest.mark.parametrize("dtype", [torch.int8, torch.float32])
def test_opcheck(dtype):
    x, packed = conv_arguments(dtype)
    last = (1.0, 0, "relu", 0.0)
    window = ((3, 3), (1, 1), (1, 1))
    torch.library.opcheck(torch.ops.sparsegan.block_conv2d, (x, packed.tensors(), *window, (1, 1), *last))
    linear = packed_weight("linear", blocked_view(8, 1, 12, 0.5, 0, True), {}, dtype)
    torch.library.opcheck(torch.ops.sparsegan.block_linear, (x[:, :, 0, 0], linear.tensors(), *last))
    geometry = {**CONV, "stride": (1, 1), "dilation": (1, 1)}
    up = packed_weight("conv_transpose2d", blocked_view(8, 9, 12, 0.5, 0, True), geometry, dtype)
    torch.library.opcheck(
        torch.ops.sparsegan.block_conv_transpose2d, (x, up.tensors(), *window, (0, 0), (1, 1), *last)
    )
    engine = Engine(one_step(packed), "cpu")
    torch.library.opcheck(torch.ops.sparsegan.program_run, (engine.handle, [x]))


def one_step(packed):
    """A program of one convolution, from and to float32."""
    store = Store(~0, act=Act("relu"))
    steps = (
        Step("pointwise", ~0, (Store(0),)),
        Step("conv2d", 0, (store,), packed, (3, 3), (1, 1), (1, 1)),
    )
    number_format = "u8" if packed.values.dtype == torch.int8 else "f32"
    return Program((Slot(packed.in_channels, number_format),), steps, 1, 1)


@needs_extension
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_without_a_graph_break(compiler):
    x, packed = conv_arguments()
    up = packed_weight(
        "conv_transpose2d",
        blocked_view(5, 9, 8, 0.5, 0, True),
        {**CONV, "stride": (1, 1), "dilation": (1, 1)},
        torch.int8,
    )

    def model(x):
        y = ops.block_conv2d(x, packed, **CONV, activation="relu") * 0.5
        y = ops.block_conv_transpose2d(y, up, **CONV, x_zero=3)
        return ops.block_linear(y.mean(3).transpose(1, 2), packed_linear) + 1

    packed_linear = packed_weight("linear", blocked_view(6, 1, 5, 1.0, 0, True), {}, torch.float32)
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    assert torch.allclose(compiled(x), model(x), atol=1e-5)


@needs_extension
@pytest.mark.parametrize(
    ("field", "break_it", "said"),
    [
        (1, lambda t: t.fill_(2**31 - 1), "cols leaves 0 to 26"),
        (1, lambda t: t.fill_(-1), "cols leaves 0 to 26"),
        (2, lambda t: t.fill_(-5), "tap_ptr"),
        (2, lambda t: t.fill_(2**30), "tap_ptr"),
        (3, lambda t: t.fill_(99), "row_channels holds 99"),
        (3, lambda t: t.fill_(-1), "row_channels names 0 channels"),
        (3, lambda t: t.copy_(torch.tensor([0, 0, 2, 3, 4, 5, 6, 7])), "row_channels holds 0"),
    ],
)
def test_hostile_indices_are_refused_before_they_are_used(field, break_it, said):
    x, packed = conv_arguments()
    weight = [t.clone() for t in packed.tensors()]
    break_it(weight[field])
    with pytest.raises(RuntimeError, match=said):
        torch.ops.sparsegan.block_conv2d(x, weight, (3, 3), (1, 1), (1, 1), (1, 1), 1.0, 0, "none", 0.0)


@needs_extension
@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"x": lambda x: x.double()}, "x is Double, wanted Float"),
        ({"x": lambda x: x[0]}, "wanted 4 dimensions"),
        ({"x": lambda x: x[:, :4]}, "another number of channels"),
        ({"kernel": (2, 2)}, "tap_ptr holds"),
        ({"stride": (0, 1)}, "stride holds 0"),
        ({"padding": (1,)}, "padding has 1 values, wanted 2"),
        ({"scale": 0.0}, "x_scale is 0"),
        ({"zero": 256}, "x_zero is 256"),
        ({"activation": "swish"}, "activation is 'swish'"),
        ({"weight": lambda w: w[:-1]}, "weight holds 6 tensors"),
        ({"weight": lambda w: [w[0].short(), *w[1:]]}, "values"),
        ({"weight": lambda w: [w[0].transpose(1, 2), *w[1:]]}, "not contiguous"),
        ({"weight": lambda w: [*w[:-1], w[-1][:-1]]}, "bias holds 7 values, wanted 8"),
    ],
)
def test_the_op_itself_says_what_is_wrong(change, said):
    x, packed = conv_arguments()
    keep = {"x": lambda x: x, "weight": lambda w: w} | change
    arguments = (
        keep["x"](x),
        keep["weight"](packed.tensors()),
        change.get("kernel", (3, 3)),
        change.get("stride", (1, 1)),
        change.get("padding", (1, 1)),
        (1, 1),
        change.get("scale", 1.0),
        change.get("zero", 0),
        change.get("activation", "none"),
        0.0,
    )
    with pytest.raises(RuntimeError, match=said):
        torch.ops.sparsegan.block_conv2d(*arguments)


@needs_extension
@pytest.mark.parametrize(
    ("shape", "window", "said"),
    [
        ((1, 4, 2**15, 2**15), {"stride": (2**14, 2**14)}, "2 GiB packed"),
        ((1, 4, 4, 4), {"stride": (2**33, 2**33), "padding": (2**32, 2**32)}, "stride holds 8589934592"),
        ((1, 4, 4, 4), {"stride": (65535, 65535), "padding": (65535, 65535)}, "2 GiB packed"),
        ((1, 4, 1, 1), {"padding": (65535, 65535)}, "an output of 131071x131071"),
        ((2**28, 4, 1, 1), {}, "a batch of 268435456 rows"),
    ],
)
def test_sizes_beyond_the_offsets_are_refused(shape, window, said):
    """In a process of its own: the failure would be a crash. Only one element of x exists."""
    code = (
        "import torch; from sparsegan import ops; from sparsegan.formats import pack;"
        f"x = torch.zeros(1).expand({shape}); w = pack(torch.ones(4, 1, 4));"
        f"ops.block_conv2d(x, w, kernel_size=(1, 1), **{window})"
    )
    done = run_python(code)
    assert done.returncode == 1 and said in done.stderr, (done.returncode, done.stderr[-500:])


@needs_extension
def test_strides_beyond_32_bits(tmp_path):
    """Rows 2 GiB apart: the storage is a sparse file, nearly all of it never touched."""
    rows, step = 16, 150_000_000
    with (tmp_path / "far").open("wb") as file:
        file.truncate(rows * step * 4)
    flat = torch.from_file(str(tmp_path / "far"), shared=True, size=rows * step)
    x = flat.as_strided((rows, 4), (step, 1))
    x[:, :] = inputs((rows, 4), 0, True)
    packed = packed_weight("linear", blocked_view(8, 1, 4, 1.0, 0, True), {}, torch.float32)
    for isa in ops.available_isas():
        ops.set_isa(isa)
        assert torch.equal(ops.block_linear(x, packed), ops.block_linear(x, packed, backend="reference"))
    ops.set_isa(None)


@needs_extension
def test_threads_are_obeyed():
    """As many threads do work as torch was told to use, by the processor time that each has had."""
    code = (
        "import glob, time, torch; from sparsegan import ops; from sparsegan.formats import pack\n"
        "torch.set_num_threads({})\n"
        "x = torch.zeros(1, 64, 64, 64); w = pack(torch.ones(64, 9, 64))\n"
        "def ticks():\n"
        "    stats = {{f: open(f).read() for f in glob.glob('/proc/self/task/*/stat')}}\n"
        "    return {{f: int(text.rsplit(')', 1)[1].split()[11]) for f, text in stats.items()}}\n"
        "before, end = ticks(), time.perf_counter() + 1\n"
        "while time.perf_counter() < end: ops.block_conv2d(x, w, kernel_size=(3, 3))\n"
        "print(sum(t - before.get(f, 0) > 10 for f, t in ticks().items()))\n"
    )
    assert [int(run_python(code.format(n)).stdout) for n in (1, 2)] == [1, 2]


@needs_extension
def test_several_python_threads_at_once():
    from concurrent.futures import ThreadPoolExecutor

    x, packed = conv_arguments()
    wanted = ops.block_conv2d(x, packed, **CONV)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: ops.block_conv2d(x, packed, **CONV), range(64)))
    assert all(torch.equal(r, wanted) for r in results)

"""Every way of running a generator that is compared: how each is made from the dense float32 model.

Packages are imported where they are used, so that one that is missing costs only its own contestants.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.generators import Generator, prune_uniformly
from sparsegan import SwapConfig, explain, swap_to_sparse
from sparsegan.prune import count_macs
from sparsegan.prune.channels import prune_channels

THREADS = 2
# Of the multiply-adds: half the channels of a whole network are a little more than a quarter.
_WIDTH_TOLERANCE = 0.01

Call = Callable[[], Any]


class NotApplicableError(RuntimeError):
    """This way of running says nothing new about this model."""


@dataclass
class Case:
    """A generator at one batch size, and what several contestants need of it. folder: for their files."""

    generator: Generator
    batch: int
    folder: Path

    @cached_property
    def model(self) -> nn.Module:
        """Dense, float32. Contestants that change a model take `copy`."""
        return self.generator.build()

    @cached_property
    def x(self) -> Tensor:
        return self.generator.inputs(self.batch)[0]

    @cached_property
    def calibration(self) -> list[Tensor]:
        """Inputs for the ranges of int8: the same for all, and none of them the one that is timed."""
        seeds = range(1, 1 + self.generator.calibrations)
        return [self.generator.inputs(self.batch, seed)[0] for seed in seeds]

    @cached_property
    def reference(self) -> Tensor:
        output: Tensor = self.model(self.x)
        return output.clone()

    @cached_property
    def onnx(self) -> Path:
        """The model as an ONNX file, by the exporter that can."""
        path = self.folder / "model.onnx"
        names: dict[str, Any] = {"input_names": ["x"], "output_names": ["y"]}
        try:
            torch.onnx.export(
                self.copy(), (self.x,), path, dynamo=True, external_data=False, verbose=False, **names
            )
        except Exception as error:
            print(f"exporting by tracing, because of {type(error).__name__}: {error}")
            torch.onnx.export(self.copy(), (self.x,), path, dynamo=False, opset_version=17, **names)
        return path

    @cached_property
    def openvino_int8(self) -> Any:
        """The model as NNCF quantises it."""
        import nncf
        import openvino

        data = nncf.Dataset([x.numpy() for x in self.calibration])
        quantised = nncf.quantize(self.openvino(), data, subset_size=len(self.calibration))
        path = self.folder / "int8.xml"
        openvino.save_model(quantised, path, compress_to_fp16=False)
        return openvino.Core().read_model(path)

    def openvino(self) -> Any:
        import openvino

        model = openvino.convert_model(self.copy(), example_input=self.x)
        model.reshape({model.inputs[0]: list(self.x.shape)})
        return model

    def copy(self) -> nn.Module:
        return copy.deepcopy(self.model)

    @property
    def has_convolutions(self) -> bool:
        return any(parameter.dim() == 4 for parameter in self.model.parameters())


@dataclass
class Contender:
    """A contestant that is ready. reference: what its output is compared with; facts: what else to report."""

    call: Call
    reference: Tensor
    facts: dict[str, Any] = field(default_factory=dict)
    sparse: nn.Module | None = None


@dataclass(frozen=True)
class Contestant:
    """density: of ours, the share that is kept; block: of ours with blocks; of the others None."""

    name: str
    build: Callable[[Case], Contender]
    density: float | None = None
    block: tuple[int, int] | None = None


def _peer(name: str, prepare: Callable[[Case], Call]) -> Contestant:
    """A contestant that runs the dense model."""
    return Contestant(name, lambda case: Contender(prepare(case), case.reference))


def _eager(case: Case, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Call:
    model, x = case.copy().to(dtype), case.x.to(dtype)
    if channels_last:
        if dtype == torch.float32 and not case.has_convolutions:
            raise NotApplicableError("the model has no convolutions: the same as eager")
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = x.to(memory_format=torch.channels_last) if x.dim() == 4 else x
    return lambda: model(x)


def _compile(case: Case, autocast: bool = False) -> Call:
    model, x = torch.compile(case.copy(), dynamic=False), case.x

    def call() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            output: Tensor = model(x)
        return output

    return call


def _torch_int8(case: Case) -> Call:
    """Quantisation of an exported program, compiled: what torch recommends for int8 on x86."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    quantizer = x86.X86InductorQuantizer()
    quantizer.set_global(x86.get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(torch.export.export(case.copy(), (case.x,)).module(), quantizer)
    for x in case.calibration:
        prepared(x)
    model = torch.compile(convert_pt2e(prepared), dynamic=False)
    return lambda: model(case.x)


def _onnxruntime(case: Case, path: Path | None = None) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = THREADS, 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path or case.onnx, options, providers=["CPUExecutionProvider"])
    feed = {"x": case.x.numpy()}
    return lambda: session.run(None, feed)[0]


def _onnxruntime_int8(case: Case) -> Call:
    """Static quantisation as its documentation wants it for x86 with VNNI: QDQ, U8S8, per channel.

    Without transposed convolutions: it has no int8 kernel for them, and converting around them made models slower.
    """
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter([{"x": x.numpy()} for x in case.calibration])

        def get_next(self) -> Any:
            return next(self.batches, None)

    prepared, quantised = case.folder / "prepared.onnx", case.folder / "int8.onnx"
    quant_pre_process(case.onnx, prepared, skip_symbolic_shape=True)
    model = onnx.load(prepared)
    # The optimiser gives old names to new constants, and the quantiser would believe the types noted for those.
    del model.graph.value_info[:]
    quantize_static(
        model,
        quantised,
        Reader(),
        nodes_to_exclude=[node.name for node in model.graph.node if node.op_type == "ConvTranspose"],
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return _onnxruntime(case, quantised)


def _openvino(case: Case, int8: bool = False, **settings: str) -> Call:
    import openvino

    settings = {"INFERENCE_NUM_THREADS": str(THREADS), "PERFORMANCE_HINT": "LATENCY", **settings}
    model = case.openvino_int8 if int8 else case.openvino()
    request = openvino.Core().compile_model(model, "CPU", settings).create_infer_request()
    x = case.x.numpy()
    return lambda: request.infer([x], share_inputs=True, share_outputs=True)[0]


def _sparsegan(density: float, change: Callable[[Case], nn.Module]) -> Callable[[Case], Contender]:
    """Ours, of the model that ``change`` makes."""

    def build(case: Case) -> Contender:
        pruned = change(case)
        # All layers in int8, as the int8 peers are: none of them has a quality budget. The error is in the results.
        config = SwapConfig("int8", calibration=[(x,) for x in case.calibration], min_psnr=None)
        sparse = swap_to_sparse(pruned, config, (case.x,))
        explanation = explain(sparse)
        macs, rows = count_macs(pruned, (case.x,)), explanation.rows
        facts = {
            "summary": explanation.summary,
            "macs_dense": sum(count_macs(case.model, (case.x,)).values()),
            "macs_executed": sum(
                macs.get(row.name, 0) * (row.density if row.swapped else 1.0) for row in rows
            ),
            "peak_bytes": getattr(sparse, "peak_bytes", getattr(explanation, "peak_bytes", None)),
        }
        reference = case.reference if density == 1 else pruned(case.x)
        return Contender(lambda: sparse(case.x), reference, facts, sparse)

    return build


def _blocks(density: float, block: tuple[int, int]) -> Contestant:
    """This share of the blocks of each wide layer."""
    name = f"sparsegan {density:g} {block[0]}x{block[1]}"
    return Contestant(
        name, _sparsegan(density, lambda case: prune_uniformly(case.copy(), density, block)), density, block
    )


def _channels(density: float) -> Contestant:
    """This share of the multiply-adds, in narrower layers: an ordinary dense model, which a peer could run as well."""

    def narrow(case: Case) -> nn.Module:
        return prune_channels(
            case.model,
            (case.x,),
            1 - density - _WIDTH_TOLERANCE,
            align=16,
            refit=False,
            importance=lambda _name, _layer, view: view.abs(),
        )

    name = f"sparsegan {density:g} channels"
    return Contestant(name, _sparsegan(density, narrow), density)


_bf16 = torch.bfloat16

# In the order in which they are built: where time runs out, the last ones are missing.
CONTESTANTS = {
    contestant.name: contestant
    for contestant in (
        _peer("eager", _eager),
        _peer("eager channels_last", partial(_eager, channels_last=True)),
        _peer("eager bf16", partial(_eager, dtype=_bf16, channels_last=True)),
        _peer("OpenVINO", _openvino),
        _peer("OpenVINO int8", partial(_openvino, int8=True, INFERENCE_PRECISION_HINT="f32")),
        _peer("OpenVINO int8 bf16", partial(_openvino, int8=True, INFERENCE_PRECISION_HINT="bf16")),
        _blocks(1.0, (8, 4)),
        _blocks(0.25, (8, 4)),
        _blocks(0.1, (8, 4)),
        _blocks(0.25, (4, 4)),
        _blocks(0.25, (16, 4)),
        _blocks(0.1, (16, 4)),
        _channels(0.25),
        _channels(0.1),
        _peer("ONNX Runtime", _onnxruntime),
        _peer("ONNX Runtime int8", _onnxruntime_int8),
        _peer("compile", _compile),
        _peer("compile bf16", partial(_compile, autocast=True)),
        _peer("torch int8", _torch_int8),
    )
}

"""What people see of a compressed model: measured results, tables, image grids, machine facts."""

from sparsegan.report.chart import draw_quality
from sparsegan.report.dense import dense_counterpart
from sparsegan.report.errors import ErrorSplit, error_split
from sparsegan.report.formats import SCHEMES, FormatResult, compare_formats
from sparsegan.report.grid import image_grid
from sparsegan.report.machine import machine_facts
from sparsegan.report.results import (
    LayerResult,
    ModelResult,
    Speed,
    WrongKernelError,
    check_kernels,
    finite,
    layer_results,
    mean_psnr,
    measure_speed,
    model_bytes,
    with_reference_backend,
)
from sparsegan.report.tables import layer_table, model_table, speed_table, sweep_table, system_table

__all__ = [
    "SCHEMES",
    "ErrorSplit",
    "FormatResult",
    "LayerResult",
    "ModelResult",
    "Speed",
    "WrongKernelError",
    "check_kernels",
    "compare_formats",
    "dense_counterpart",
    "draw_quality",
    "error_split",
    "finite",
    "image_grid",
    "layer_results",
    "layer_table",
    "machine_facts",
    "mean_psnr",
    "measure_speed",
    "model_bytes",
    "model_table",
    "speed_table",
    "sweep_table",
    "system_table",
    "with_reference_backend",
]

"""From a trained generator to a fast one, without data: choose what goes, let the dense model teach the rest, quantise, swap."""

from __future__ import annotations

import copy
import json
import math
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from sparsegan import parallel
from sparsegan.checkpoint import load, save
from sparsegan.files import write_atomically
from sparsegan.latency import measure
from sparsegan.metrics import TextureDistance, extractors, features, kid, load_extractor, lpips
from sparsegan.metrics.features import Extractor
from sparsegan.models import conv_discriminator
from sparsegan.patterns import BlockPattern, ChannelPattern, Pattern, parse_pattern
from sparsegan.prune import make_permanent, prune, reconstruct, recover
from sparsegan.prune.allocate import DENSITIES, BudgetError, Table, least_damage, sensitivity
from sparsegan.prune.channels import prune_channels
from sparsegan.prune.distill import Phase, SampleInputs
from sparsegan.prune.importance import draw_inputs
from sparsegan.prune.losses import Adversarial, Balanced, Loss, Weighted, l1, l1_plus_l2
from sparsegan.prune.permute import permute_channels
from sparsegan.prune.schedule import Schedule
from sparsegan.prune.trace import Inputs, check_inputs, count_macs, image_of, prunable_layers
from sparsegan.quantize import calibrate
from sparsegan.quantize.aware import quantization_aware
from sparsegan.report import finite, mean_psnr, measure_speed
from sparsegan.swap import SwapConfig, swap_to_sparse
from sparsegan.train.loop import initialised
from sparsegan.training import fast_training

Progress: TypeAlias = Callable[[str, int, int], None]
"""``(stage, steps done, steps in all)``, the stage being "choose", "measure", "prune", "distil" or "swap"."""
Method: TypeAlias = Literal["auto", "blocks", "channels", "both"]
WantedFormat: TypeAlias = Literal["auto", "int8", "bf16", "f32"]
METHODS: tuple[Method, ...] = ("auto", "blocks", "channels", "both")

CALIBRATION_BATCHES, CALIBRATION_BATCH = 4, 64

# The first steps find the picture by its pixels, the others its look by a perceptual distance: without the first, 120 s of
# training ended at KID 37 instead of 22 (face GAN, 75 % in 4x4 blocks; features scaled as in docs/quality.md). The mean of the
# features over a batch is matched, too, because what a distribution is judged by is where its features lie: 22 -> 17.
_PIXEL_SHARE, _PIXEL_BATCH = 0.75, 48
_PERCEPTUAL_BATCH, _PIXEL_WEIGHT, _SHIFT_WEIGHT = 16, 0.3, 0.1
# Where nothing is fetched, what helps depends on how much is left, and on time (that GAN, narrower; KID of scaled features).
# Textures help where half is left: 1,600 steps 8.8, pixels alone 12.1; at a quarter 88.7 and 48.9; at a tenth they spoil what
# pixels learnt: 117 -> 182.
_TEXTURED_LEFT = 0.35
# In long trainings a discriminator learns beside the model to tell its images from the teacher's. At a quarter it led in 550
# steps from 28.4, where pixels alone had stopped gaining, to 14.3 beside textures (to 25 beside pixels); at a tenth, beside
# textures, from 117 to 163 (at a falling rate). It wants a constant rate and few steps: once it is ahead of the model, its
# gradient spoils the images. 100 steps more, with int8 rounding, gave 17.1 in int8, another 100 21.3.
_ADVERSARY_STEPS, _ADVERSARY_LEFT = 6400, 0.15
_ADVERSARY_PHASE, _ADVERSARY_FINISH, _BESIDE_ADVERSARY_RATE = 500, 100, 2e-4
_ADVERSARY_WIDTHS, _ADVERSARY_RATE, _ADVERSARY_BATCH, _LEAST_SIDE = (32, 64, 128, 256), 4e-4, 24, 16
_FINISH_SHARE, _FINISH_RATE = 0.05, 1e-4  # of the steps, with int8 rounding, at the end
# Of the values that enter a layer, the share that their int8 range holds. A few latents in 256 make values far beyond all others,
# and a range that holds them is coarse for the rest: KID 440 with the extremes, 290 without (that GAN, plain features).
_PERCENTILE = 99.97
_RACE_STEPS, _RACE_SAMPLES = 60, 96
_SPEED_TOLERANCE, _SPEED_TRIALS, _SPEED_SECONDS = 0.05, 7, 1.0
_ALIGN = 16
_NOTHING = "nothing removed"  # int8 alone is fast enough
DEFAULT_SPARSITY = 0.75
_LEVELS, _KID_SAMPLES = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95), 2000
# Seeds far from those of training: these latents are new to the model.
_RACE, _CALIBRATION, _KID, _EVALUATION = 2**32, 2**33, 2**34, 2**35


@dataclass(frozen=True)
class Plan:
    """What will go: a method, the widths of narrower layers, the pattern and the sparsity of blocks.

    widths:   output channels by layer, where there are fewer than in the dense model.
    sparsity: share of the multiply-adds *of the narrower model* that blocks of zeros remove; None: no blocks.
    by_layer: for a budget in milliseconds, the same by layer, as `allocate.least_damage` shared it out.
    """

    method: str
    pattern: str
    widths: dict[str, int] = field(default_factory=dict)
    sparsity: float | None = None
    by_layer: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Compressed:
    """A generator on its way from dense to fast, in one object that can be saved.

    model:    the swapped model, for inference.
    pruned:   the dense float32 model that it was made from, with plain zeros in its weights, narrower where channels went.
    plan:     what was removed.
    settings: the arguments of `compress` that are plain values.
    report:   what was measured: removed operations, PSNR to the dense model in dB, times as fast as eager at batch 1, KID where
              it was a budget, the candidates that were compared.
    history:  the distillation loss of each step.
    seconds:  that all of it took.
    """

    model: nn.Module
    pruned: nn.Module
    plan: Plan
    settings: dict[str, Any]
    report: dict[str, Any]
    history: list[float]
    seconds: float

    @property
    def masks(self) -> dict[str, Tensor]:
        """Which weights were kept: bool, shaped as the weight, by layer."""
        return {name: layer.weight != 0 for name, layer in prunable_layers(self.pruned).items()}

    def save(self, folder: Path) -> None:
        """Write everything to ``folder``: `swapped.safetensors`, `pruned.safetensors`, `compressed.json`. No pickle.

        A swapped model of a class of your own that `checkpoint.save` cannot describe has no file; `load` swaps the pruned one
        again. Each file is whole or not there. Raises OSError when there is no room.
        """
        folder.mkdir(parents=True, exist_ok=True)
        try:
            save(self.model, folder / "swapped.safetensors")
            described = True
        except ValueError as error:
            (folder / "swapped.safetensors").unlink(missing_ok=True)
            described = False
            warnings.warn(
                f"{error}; {folder} holds the pruned model, which is swapped again when it is loaded",
                stacklevel=2,
            )
        state = {name: t.detach().contiguous().clone() for name, t in self.pruned.state_dict().items()}
        write_atomically(folder / "pruned.safetensors", save_tensors(state))
        facts: dict[str, Any] = {"plan": asdict(self.plan), "settings": self.settings, "report": self.report}
        facts |= {"history": self.history, "seconds": self.seconds, "swapped": described}
        write_atomically(
            folder / "compressed.json", json.dumps(finite(facts), indent=2, allow_nan=False).encode()
        )

    @classmethod
    def load(cls, folder: Path, model: nn.Module, inputs: SampleInputs | Inputs) -> Compressed:
        """What `save` wrote. model: the dense model that was compressed; inputs: as for `compress`.

        A swapped model that had no file is made again: what is exchanged in it is measured anew, and `report` is of the first.

        Raises FileNotFoundError where nothing was saved, ValueError for damaged files and another model.
        """
        try:
            facts = json.loads((folder / "compressed.json").read_text())
            plan = Plan(**facts["plan"])
            pruned = _narrowed(model, _sampler(inputs), plan)
            pruned.load_state_dict(load_file(folder / "pruned.safetensors"))
            rest = {name: facts[name] for name in ("settings", "report", "history", "seconds")}
            dtype, seed = rest["settings"]["dtype"], int(rest["settings"]["seed"])
        except (AttributeError, KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
            raise ValueError(f"{folder} does not hold a compressed model of this one: {error}") from error
        pruned = pruned.eval().requires_grad_(False)
        again = facts.get("swapped") is False
        swapped = (
            _swapped(pruned, _sampler(inputs), dtype, seed) if again else load(folder / "swapped.safetensors")
        )
        return cls(swapped, pruned, plan, **rest)


def compress(
    model: nn.Module,
    inputs: SampleInputs | Inputs,
    *,
    sparsity: float | None = None,
    speedup: float | None = None,
    max_kid: float | None = None,
    method: Method = "auto",
    pattern: Pattern = BlockPattern(4, 4),  # noqa: B008  (frozen)
    importance: str = "obd",
    schedule: str = "one-shot",
    permute: bool = False,
    perceptual: str | Loss | None = "auto",
    also: Sequence[tuple[float, Loss]] = (),
    extractor: str | Extractor = "efficientnet-lite0",
    steps: int = 1000,
    dtype: WantedFormat = "int8",
    seed: int = 0,
    folder: Path | None = None,
    progress: Progress | None = None,
) -> Compressed:
    """Remove the least important weights of `model`, let it teach the rest, and swap in the sparse layers.

    model:         a trained generator in eval mode, on the CPU; it is not changed, and is the teacher.
    inputs:        `(number of samples, generator) -> positional inputs`, such as latents: all the data used. Or a tuple of
                   example inputs, of which latents are drawn anew and others taken in turn (`importance.draw_inputs`).

    One budget; without any, sparsity 0.75:
    sparsity:      share of the multiply-adds to remove.
    speedup:       times as fast as torch eager in float32, at batch 1, measured on this machine. What the int8 kernels gain
                   without a zero counts. The nearest that the search finds, within 5 % as a rule; `Compressed.report` says what
                   was reached, and ValueError what can be, where that is less.
    max_kid:       x1000, of `extractor`'s features of 2,000 images against 2,000 others of the dense model. Sparsity rises
                   from 0.5 until it is passed; the last model within it is the result.

    method:        "blocks" of zeros, fewer "channels", "both" (each the same share of what remains), or "auto": all three are
                   tried for a moment, at equal operations or, with `speedup`, equal measured time, and the one nearest to the
                   dense model's images is taken. So are, with `speedup`, blocks shared out alike and by measured latency.
    pattern, importance: of blocks, see `prune`.
    schedule:      "one-shot", "cubic" or "iterative", see `Schedule`.
    permute:       reorder channels first, so that blocks hold what belongs together (`permute_channels`).
    perceptual:    what is trained on after the pixels: "vgg16" (the distance LPIPS, fetched with pip), "texture"
                   (`TextureDistance`, which needs nothing), "adversary" (that, and a discriminator that learns beside the model,
                   `Balanced`; for long trainings of square pictures), any callable (image, target) -> scalar, None for pixels
                   alone. "auto" takes "vgg16" where it has been fetched, else what served best by how much is left and by
                   `steps`: "adversary" from 6,400 steps on, else "texture"; None where less than 0.15, else 0.35, is left.
    also:          more losses with their weights, such as `losses.Adversarial` with your discriminator or data.
    extractor:     of the features for `max_kid`, a name of `extractors()` or a callable.
    steps:         of distillation; with 0 the kept weights of blocks are fitted in closed form instead (`reconstruct`).
    dtype:         number format of the sparse layers, see `SwapConfig`.
    seed:          of every random draw; the global generator is left alone. The weights are then the same each time on the same
                   kind of machine; which layers are swapped is measured, at batch 1.
    folder:        where the state of the work is kept: a run that was killed goes on from there, losing less than a minute.
    progress:      called as each stage begins and after each step of it.

    Started by `torchrun`, the processes share the distillation; the first one swaps, measures and writes files.

    Raises ValueError for a model in training mode, inputs that the model does not take, arguments that make no sense and a budget
    that cannot be met, and what `prune`, `prune_channels`, `recover` and `swap_to_sparse` raise.
    """
    start = time.perf_counter()
    settings = {
        name: value
        for name, value in locals().items()
        if name in _PLAIN and isinstance(value, str | int | float | None)
    } | {"pattern": str(pattern)}
    _check(model, sparsity, speedup, max_kid, method, steps)
    if parallel.world() > 1 and (method == "auto" or speedup is not None):
        raise ValueError(
            "several processes would measure different times: name a method and a sparsity, or run one process"
        )
    if folder is not None and (folder / "compressed.json").exists():
        done = parallel.from_first(lambda: Compressed.load(folder, model, inputs))
        if done.settings != settings:
            raise ValueError(
                f"{folder} holds the result of other settings, {done.settings}: name another folder"
            )
        return done
    job = _Job(model, _sampler(inputs), pattern, importance, schedule, permute, dtype, seed, folder, progress)
    job.settings = settings
    job.check_inputs()
    if steps:
        job.set_loss(perceptual, also)
    if max_kid is not None:
        plan, pruned, history, report = job.until_kid(max_kid, extractor, method, steps)
    else:
        plan, report = job.kept_plan(method, sparsity, speedup)
        pruned, history = job.train(plan, steps)
    swapped, measured = parallel.from_first(lambda: job.served(pruned))
    report |= measured
    result = Compressed(swapped, pruned, plan, settings, report, history, time.perf_counter() - start)
    if folder is not None and parallel.rank() == 0:
        result.save(folder)
    return result


_PLAIN = (
    "sparsity",
    "speedup",
    "max_kid",
    "method",
    "importance",
    "schedule",
    "permute",
    "perceptual",
    "steps",
    "dtype",
    "seed",
)


def _check(
    model: nn.Module,
    sparsity: float | None,
    speedup: float | None,
    max_kid: float | None,
    method: str,
    steps: int,
) -> None:
    if model.training:
        raise ValueError("the model is in training mode: call model.eval() first")
    if steps < 0:
        raise ValueError(f"steps must be a number >= 0, got {steps}")
    if sum(budget is not None for budget in (sparsity, speedup, max_kid)) > 1:
        raise ValueError("give one budget: sparsity, speedup or max_kid")
    if speedup is not None and not 0 < speedup < math.inf:
        raise ValueError(f"speedup must be a positive number, got {speedup}")
    if max_kid is not None and not 0 < max_kid < math.inf:
        raise ValueError(f"max_kid must be a positive number, got {max_kid}")
    if method not in METHODS:
        raise ValueError(f"unknown method {method!r}; there are: {', '.join(METHODS)}")


def _sampler(inputs: SampleInputs | Inputs) -> SampleInputs:
    if callable(inputs):
        return inputs
    batch = check_inputs(inputs)

    def sample(n: int, generator: torch.Generator) -> Inputs:
        return draw_inputs(inputs, batch, int(torch.randint(batch, (), generator=generator)), generator, n)

    return sample


@dataclass(frozen=True)
class SweepPoint:
    """What one sparsity gives: times as fast as eager at batch 1, KID x1000 and PSNR in dB to the dense model."""

    sparsity: float
    speedup: float
    kid: float
    psnr: float
    pareto: bool


def sweep(
    model: nn.Module,
    inputs: SampleInputs | Inputs,
    sparsities: Sequence[float],
    *,
    extractor: str | Extractor = "efficientnet-lite0",
    folder: Path | None = None,
    **settings: Any,
) -> tuple[list[SweepPoint], list[Compressed]]:
    """`compress` at each of ``sparsities``, and what came of it: quality against measured speed.

    settings: of `compress`, but no budgets. extractor: of the features for KID, 2,000 images against 2,000 others of the dense
    model. folder: each sparsity has its own in it; what was done before is not done again.

    A point is on the Pareto front when no other is faster and nearer to the dense model. Raises what `compress` raises.
    """
    results = [
        compress(
            model,
            inputs,
            sparsity=s,
            folder=None if folder is None else folder / f"sparsity-{s:g}",
            **settings,
        )
        for s in sparsities
    ]
    extract = load_extractor(extractor) if isinstance(extractor, str) else extractor
    sample, seed = _sampler(inputs), int(settings.get("seed", 0))
    wanted = features(_images(model, sample, _KID_SAMPLES, seed + _KID + 1), extract)
    distances = [
        kid(features(_images(r.model, sample, _KID_SAMPLES, seed + _KID), extract), wanted) for r in results
    ]
    speeds = [r.report["speedup"] for r in results]
    points = [
        SweepPoint(s, speed, distance, r.report["psnr"], _undominated(i, speeds, distances))
        for i, (s, speed, distance, r) in enumerate(zip(sparsities, speeds, distances, results, strict=True))
    ]
    return points, results


def _undominated(i: int, speeds: Sequence[float], distances: Sequence[float]) -> bool:
    return not any(
        speed >= speeds[i] and distance <= distances[i] and (speed > speeds[i] or distance < distances[i])
        for speed, distance in zip(speeds, distances, strict=True)
    )


def _images(model: nn.Module, sample: SampleInputs, n: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        return torch.cat([image_of(model(*sample(100, generator))).float() for _ in range(n // 100)])


class _Job:
    """One compression: the teacher, its inputs, how to prune, and what has been learnt on the way."""

    def __init__(
        self,
        teacher: nn.Module,
        sample: SampleInputs,
        pattern: Pattern,
        importance: str,
        schedule: str,
        permute: bool,
        dtype: WantedFormat,
        seed: int,
        folder: Path | None,
        progress: Progress | None,
    ) -> None:
        self.teacher, self.sample, self.pattern, self.importance = teacher, sample, pattern, importance
        self.schedule, self.permute, self.dtype, self.seed, self.folder = (
            schedule,
            permute,
            dtype,
            seed,
            folder,
        )
        self.report = progress or (lambda stage, done, total: None)
        self.distance: Loss | None = None
        self.adversary: bool | None = False  # whether one learns beside the model; None: `phases` decides
        self.also: Sequence[tuple[float, Loss]] = ()
        self.settings: dict[str, Any] = {}
        self.fastest = 0.0
        self._tables: tuple[Table, Table] | None = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def drawn(self, n: int, offset: int = 0) -> Inputs:
        """n samples, the same each time; of another offset, others."""
        return self.sample(n, torch.Generator().manual_seed(self.seed + offset))

    def calibration(self) -> list[Inputs]:
        return _calibration(self.sample, self.seed)

    def check_inputs(self) -> None:
        try:
            with torch.no_grad():
                self.example = images = image_of(self.teacher(*self.drawn(2)))
        except (RuntimeError, TypeError, ValueError) as error:
            shapes = [list(x.shape) if isinstance(x, Tensor) else x for x in self.drawn(2)]
            raise ValueError(f"the model does not take the inputs {shapes}: {error}") from error
        if not bool(images.isfinite().all()):
            raise ValueError(
                "the model's own images hold NaN or infinite values: there is nothing to learn from"
            )

    def set_loss(self, perceptual: str | Loss | None, also: Sequence[tuple[float, Loss]]) -> None:
        self.also = also
        if perceptual is None or callable(perceptual):
            self.distance = perceptual
            return
        if perceptual not in ("auto", "vgg16", "texture", "adversary"):
            raise ValueError(
                f'perceptual is "auto", "vgg16", "texture", "adversary", a callable or None; got {perceptual!r}'
            )
        shape = list(self.example.shape)
        pictures = len(shape) == 4 and shape[1] in (1, 3)
        self.adversary = perceptual == "adversary"
        if perceptual == "auto":
            if not pictures:
                return  # vectors, such as those of an MLP, have no texture
            perceptual = "texture" if extractors()["vgg16"] else "vgg16"
            self.adversary = None if perceptual == "texture" else False
        if not pictures:
            raise ValueError(f"{perceptual!r} needs images [N, 1 or 3, H, W], the model gives {shape}")
        if self.adversary and not self.judgeable:
            raise ValueError(
                f"'adversary' needs square images of {_LEAST_SIDE} pixels or more, the model gives {shape}"
            )
        self.distance = (
            lpips("vgg16", shift=_SHIFT_WEIGHT) if perceptual == "vgg16" else TextureDistance(_SHIFT_WEIGHT)
        )

    @property
    def judgeable(self) -> bool:
        """Whether the discriminator takes such images."""
        _, _, height, width = self.example.shape
        return bool(height == width >= _LEAST_SIDE)

    @property
    def look(self) -> Loss:
        """How far images are from the teacher's, to someone who looks at them."""
        if self.distance is None:
            return l1_plus_l2
        return Weighted((_PIXEL_WEIGHT, l1), (1.0, self.distance))

    def phases(self, model: nn.Module, plan: Plan, steps: int) -> list[Phase]:
        """Of one training: the picture by its pixels, then its look. An adversary knows nothing of trainings before."""
        look, adversary = self.look, self.adversary
        if adversary is None:
            left = self.left(model, plan)
            adversary = steps >= _ADVERSARY_STEPS and self.judgeable and left >= _ADVERSARY_LEFT
            if not adversary and left < _TEXTURED_LEFT:
                look = l1_plus_l2
        if look is l1_plus_l2 and not self.also:
            return [Phase(1.0, l1_plus_l2, _PIXEL_BATCH)]
        if adversary:
            _, channels, _, side = self.example.shape
            build = partial(conv_discriminator, channels, _ADVERSARY_WIDTHS, side=side, spectral=True)
            judge = initialised(build, self.seed).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
            look = Balanced(look, Adversarial(judge, _ADVERSARY_RATE))
        share = 1 - _PIXEL_SHARE
        last = Phase(share, Weighted((1.0, look), *self.also), _PERCEPTUAL_BATCH)
        if adversary:
            share = min(share, _ADVERSARY_PHASE / steps)
            last = last._replace(share=share, batch=_ADVERSARY_BATCH, lr=_BESIDE_ADVERSARY_RATE)
        return [Phase(1 - share, l1_plus_l2, _PIXEL_BATCH), last]

    def left(self, narrowed: nn.Module, plan: Plan) -> float:
        """The share of the dense model's multiply-adds that a plan leaves; narrowed: the model with its widths."""
        one = self.drawn(1)
        even = plan.sparsity or 0.0
        kept = sum(
            macs * (1 - plan.by_layer.get(name, even)) for name, macs in count_macs(narrowed, one).items()
        )
        return kept / sum(count_macs(self.teacher, one).values())

    # ------------------------------------------------------------------ what goes

    def kept_plan(
        self, method: Method, sparsity: float | None, speedup: float | None, name: str = ""
    ) -> tuple[Plan, dict[str, Any]]:
        """As `plan`, which measures: a run that goes on in its folder takes the plan that it began with."""
        path = None if self.folder is None else self.folder / f"plan{name}.json"
        if path is not None and path.exists():
            try:
                facts = json.loads(path.read_text())
                kept = Plan(**facts["plan"]), facts["report"], facts["settings"]
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path} is damaged ({error}): delete it to start anew") from error
            if kept[2] != self.settings:
                raise ValueError(
                    f"{path} belongs to a run with other settings, {kept[2]}: name another folder"
                )
            return kept[:2]
        plan, report = self.plan(method, sparsity, speedup)
        if path is not None and parallel.rank() == 0:
            facts = {"plan": asdict(plan), "report": report, "settings": self.settings}
            write_atomically(path, json.dumps(facts).encode())
        return plan, report

    def plan(
        self, method: Method, sparsity: float | None, speedup: float | None
    ) -> tuple[Plan, dict[str, Any]]:
        if method != "auto" and speedup is None:  # nothing to choose
            return self._plan(method, DEFAULT_SPARSITY if sparsity is None else sparsity), {}
        methods = METHODS[1:] if method == "auto" else (method,)
        self.report("choose", 0, 1)
        nothing = Plan(_NOTHING, str(self.pattern))
        if speedup is not None and self._speed(nothing) >= speedup * (1 - _SPEED_TOLERANCE):
            return nothing, {}
        plans: list[Plan] = []
        refused: dict[str, str] = {}
        for one in methods:
            try:
                plans += (
                    [self._plan(one, DEFAULT_SPARSITY if sparsity is None else sparsity)]
                    if speedup is None
                    else self._plans_for(one, speedup)
                )
            except (ValueError, RuntimeError) as error:  # channels that cannot go, say
                if method != "auto" or one == "blocks":
                    raise
                refused[one] = str(error)
        if not plans:
            raise ValueError(
                f"{speedup} times as fast as eager cannot be reached with {', '.join(methods)}, at most {self.fastest:.3g} "
                "times; ask for less"
            )
        named = {plan.method + (" by latency" if plan.by_layer else ""): plan for plan in plans}
        distances = {name: self._tried(plan) for name, plan in named.items()} if len(named) > 1 else {}
        self.report("choose", 1, 1)
        best = min(named, key=lambda name: distances.get(name, 0.0))
        return named[best], {"distance after a short training": distances, "refused": refused}

    def _plan(self, method: str, sparsity: float) -> Plan:
        """Remove this share of the multiply-adds."""
        blocks = str(self.pattern)
        if method == "blocks":
            return Plan(method, blocks, sparsity=sparsity)
        channels = sparsity if method == "channels" else 1 - math.sqrt(1 - sparsity)
        small = prune_channels(
            self.teacher, self.drawn(8), channels, align=_ALIGN, seed=self.seed, refit=False
        )
        before, after = (prunable_layers(m) for m in (self.teacher, small))
        widths = {
            name: _width(layer) for name, layer in after.items() if _width(layer) != _width(before[name])
        }
        if method == "channels":
            return Plan(method, blocks, widths)
        left = self.left(small, Plan(method, blocks, widths))
        return Plan(method, blocks, widths, sparsity=max(0.0, 1 - (1 - sparsity) / left))

    def _tried(self, plan: Plan) -> float:
        """How far images are from the dense model's after a short training with that plan."""
        small = self._start(plan)[0]
        with fast_training():
            recover(small, self.teacher, self.sample, _RACE_STEPS, seed=self.seed)
        inputs = self.drawn(_RACE_SAMPLES, _RACE)
        with torch.no_grad():
            return float(
                Weighted((1.0, self.look), *self.also)(
                    image_of(small(*inputs)).float(), image_of(self.teacher(*inputs)).float()
                )
            )

    def _plans_for(self, method: str, speedup: float) -> list[Plan]:
        """The plans that come nearest to this speed when measured, one of each way to make them that reaches it.

        Blocks are shared out to all layers alike and by measured milliseconds: where most goes, what single layers cost the
        image no longer adds up to what they cost together, and either can be the better one.
        """
        makes: list[Callable[[float], Plan]] = [partial(self._plan, method)]
        if method == "blocks" and isinstance(self.pattern, BlockPattern):
            makes.append(self._by_latency)
        nearest, refused = [], []
        for make in makes:
            try:
                if trials := self._search(make, speedup):
                    nearest.append(min(trials, key=lambda trial: trial[0]))
            except BudgetError as error:  # one way may remove what the other cannot
                refused.append(error)
        if len(refused) == len(makes):
            raise refused[0]
        # A table of latencies has few steps, and may not come near enough.
        best = min((off for off, _ in nearest), default=0.0)
        return [plan for off, plan in nearest if off <= max(best, _SPEED_TOLERANCE)]

    def _search(self, make: Callable[[float], Plan], speedup: float) -> list[tuple[float, Plan]]:
        """Plans of one kind with how far each is from this speed, up to one that is near enough; none where it is not reached."""
        low, (high, reached) = 0.0, self._fastest(make)
        self.fastest = max(self.fastest, reached)
        tried: list[tuple[float, Plan]] = []
        if reached < speedup:
            return tried
        while len(tried) < _SPEED_TRIALS and (not tried or tried[-1][0] > _SPEED_TOLERANCE):
            middle = (low + high) / 2
            plan = make(middle)
            reached = self._speed(plan)
            tried.append((abs(reached / speedup - 1), plan))
            low, high = (middle, high) if reached < speedup else (low, middle)
        return tried

    def _by_latency(self, share: float) -> Plan:
        """The blocks whose removal saves this share of the milliseconds that blocks can save, for the least damage."""
        if self._tables is None:
            self.report("measure", 0, 1)
            latencies = measure(self.teacher, self.drawn(1), self.pattern)
            damage = sensitivity(
                self.teacher, self.pattern, self.drawn(32), importance=self.importance, seed=self.seed
            )
            damage = {name: row for name, row in damage.items() if name in latencies.layers}
            costs = latencies.costs(DENSITIES)
            self._tables = damage, {name: costs[name] for name in damage}
            self.report("measure", 1, 1)
        damage, cost = self._tables
        most, least = (sum(pick(row.values()) for row in cost.values()) for pick in (max, min))
        kept = least_damage(damage, cost, most - share * (most - least))
        by_layer = {name: 1 - density for name, density in kept.items() if density < 1}
        return (
            Plan("blocks", str(self.pattern), by_layer=by_layer)
            if by_layer
            else Plan(_NOTHING, str(self.pattern))
        )

    def _fastest(self, make: Callable[[float], Plan]) -> tuple[float, float]:
        """How far this can be taken, and the speed there."""
        for extreme in reversed(_LEVELS):
            try:
                return extreme, self._speed(make(extreme))
            except BudgetError as error:  # what stays dense holds more than that
                refused = error
        raise refused

    def _speed(self, plan: Plan) -> float:
        """Times as fast as eager, of a model with these zeros. Times do not depend on what the weights are."""
        swapped = self.swapped(make_permanent(self._start(plan, "l2")[0]).requires_grad_(False))
        return self.speed(swapped)

    def speed(self, swapped: nn.Module) -> float:
        (speed,) = measure_speed(self.teacher, swapped, self.sample, batches=(1,), seconds=_SPEED_SECONDS)
        return speed.speedup

    # ------------------------------------------------------------------ what is done

    def _start(
        self, plan: Plan, importance: str | None = None, steps: int = 0, fit: bool = False
    ) -> tuple[nn.Module, Schedule | None]:
        """The model as training finds it: narrower, reordered, and pruned as far as the schedule's first stage.

        importance: another than is asked for; quick ones serve where only the structure matters. steps: of the schedule; 0
        prunes at once. fit: whether the kept weights are to make up for those that went.
        """
        # Fitting what is left of narrower layers helps only without training: after 1,000 steps KID 2285 with, 1836 without
        # (face GAN, 75 % by channels, pixels alone; plain features).
        model = _narrowed(self.teacher, self.sample, plan, fit=fit)
        model.requires_grad_(True)
        if plan.sparsity is None and not plan.by_layer:
            return model, None
        inputs, pattern = self.drawn(8), parse_pattern(plan.pattern)
        if self.permute and importance is None:
            permute_channels(model, pattern, inputs, plan.sparsity or DEFAULT_SPARSITY, seed=self.seed)

        def prune_to(share: float) -> None:
            wanted: float | dict[str, float] = {name: share * s for name, s in plan.by_layer.items()}
            prune(
                model,
                pattern,
                wanted or share * (plan.sparsity or 0.0),
                importance or self.importance,
                example_inputs=inputs,
                seed=self.seed,
            )

        dense = copy.deepcopy(model) if fit else None
        schedule = Schedule(self.schedule, model, prune_to, steps)
        if dense is not None and not isinstance(pattern, ChannelPattern):
            # Without training: 26.2 dB in place of 23.1 (face GAN, half of the operations removed in 4x4 blocks).
            reconstruct(model, dense, self.calibration())
        return model, schedule

    def train(self, plan: Plan, steps: int, name: str = "") -> tuple[nn.Module, list[float]]:
        """The pruned model, taught. name: of the state that is kept."""
        self.report("prune", 0, 1)
        model, tighten = self._start(plan, steps=steps, fit=not steps)
        phases = self.phases(model, plan, steps) if steps else []
        self.report("prune", 1, 1)
        history: list[float] = []
        if steps:
            self.report("distil", 0, steps)
            finish = round(steps * _FINISH_SHARE) if self.dtype in ("int8", "auto") else 0
            if phases[-1].lr is not None:  # an adversary plays
                finish = min(finish, _ADVERSARY_FINISH)

            def shown(offset: int) -> Callable[[int, float], None]:
                return lambda done, loss: self.report("distil", offset + done, steps)

            def state(stage: str) -> Path | None:
                return None if self.folder is None else self.folder / f"{stage}{name}.safetensors"

            with fast_training():
                history = recover(
                    model,
                    self.teacher,
                    self.sample,
                    steps - finish,
                    seed=self.seed,
                    loss=phases,
                    progress=shown(0),
                    tighten=tighten,
                    state=state("training"),
                )
            if finish:
                layers = list(prunable_layers(model))
                ranges = calibrate(model.eval(), self.calibration(), layers, "percentile", _PERCENTILE)
                with quantization_aware(model, ranges), fast_training():
                    history += recover(
                        model,
                        self.teacher,
                        self.sample,
                        finish,
                        lr=_FINISH_RATE,
                        seed=self.seed + 1,
                        loss=[phases[-1]._replace(share=1.0)],
                        progress=shown(steps - finish),
                        state=state("finishing"),
                    )
        return make_permanent(model).eval().requires_grad_(False), history

    def swapped(self, pruned: nn.Module) -> nn.Module:
        self.report("swap", 0, 1)
        swapped = _swapped(pruned, self.sample, self.dtype, self.seed)
        self.report("swap", 1, 1)
        return swapped

    def until_kid(
        self, most: float, extractor: str | Extractor, method: Method, steps: int
    ) -> tuple[Plan, nn.Module, list[float], dict[str, Any]]:
        """More and more goes until the images are further from the dense model's than they may; the last model within that."""
        extract = load_extractor(extractor) if isinstance(extractor, str) else extractor
        wanted = features(_images(self.teacher, self.sample, _KID_SAMPLES, self.seed + _KID + 1), extract)
        good: tuple[Plan, nn.Module, list[float]] | None = None
        measured: dict[str, float] = {}
        for sparsity in _LEVELS:
            try:
                plan, _ = self.kept_plan(method, sparsity, None, name=f"-{sparsity}")
                pruned, history = self.train(plan, steps, name=f"-{sparsity}")
            except BudgetError:
                if good is None:
                    raise
                break  # no more can go: what stays dense holds the rest
            distance = kid(
                features(_images(pruned, self.sample, _KID_SAMPLES, self.seed + _KID), extract), wanted
            )
            measured[str(sparsity)] = distance
            if distance > most:
                break
            good = plan, pruned, history
        if good is None:
            raise ValueError(
                f"KID {most:g} cannot be met: with {_LEVELS[0]:.0%} of the operations removed it is "
                f"{measured[str(_LEVELS[0])]:.3g} after {steps} steps; allow more, or more steps"
            )
        return *good, {"KID x1000 by sparsity": measured}

    def served(self, pruned: nn.Module) -> tuple[nn.Module, dict[str, Any]]:
        """The swapped model, and what was measured of it."""
        swapped = self.swapped(pruned)
        return swapped, self.measured(pruned, swapped)

    def measured(self, pruned: nn.Module, swapped: nn.Module) -> dict[str, Any]:
        inputs = self.drawn(256, _EVALUATION)
        one = self.drawn(1)
        left = {
            name: float((layer.weight != 0).float().mean()) for name, layer in prunable_layers(pruned).items()
        }
        kept = sum(macs * left[name] for name, macs in count_macs(pruned, one).items())
        with torch.no_grad():
            dense, f32, int8 = (image_of(m(*inputs)) for m in (self.teacher, pruned, swapped))
        return {
            "removed": 1 - kept / sum(count_macs(self.teacher, one).values()),
            "psnr": mean_psnr(int8, dense),
            "psnr of pruning": mean_psnr(f32, dense),
            "psnr of int8": mean_psnr(int8, f32),
            "speedup": self.speed(swapped),
        }


def _calibration(sample: SampleInputs, seed: int) -> list[Inputs]:
    generator = torch.Generator().manual_seed(seed + _CALIBRATION)
    return [sample(CALIBRATION_BATCH, generator) for _ in range(CALIBRATION_BATCHES)]


def _swapped(pruned: nn.Module, sample: SampleInputs, dtype: WantedFormat, seed: int) -> nn.Module:
    config = SwapConfig(dtype=dtype, calibration=_calibration(sample, seed), percentile=_PERCENTILE)
    # The sample that decides by its time is one latent: what someone waits for.
    return swap_to_sparse(pruned, config, sample(1, torch.Generator().manual_seed(seed + _CALIBRATION)))


def _narrowed(model: nn.Module, sample: SampleInputs, plan: Plan, fit: bool = False) -> nn.Module:
    if not plan.widths:
        return copy.deepcopy(model)
    inputs = sample(8, torch.Generator().manual_seed(0))
    return prune_channels(model, inputs, widths=plan.widths, refit=fit)


def _width(layer: nn.Module) -> int:
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)  # type: ignore

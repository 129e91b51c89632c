"""More than one process: W of them, started by `torchrun`, train to what one does at the same global batch.

All processes draw the same random numbers for the whole batch, and each takes its share. Gradients are averaged by
`DistributedDataParallel`; what else looks at a whole batch (norm statistics, the logarithm of an error) is brought together
here. With one process everything here does nothing.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

_T = TypeVar("_T")


def world() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this one is, from 0; the first one writes files and shows progress."""
    return dist.get_rank() if world() > 1 else 0


@contextmanager
def processes() -> Iterator[torch.device]:
    """Join the processes that `torchrun` has started, if it has; gives the device of this one.

    NCCL for tensors on CUDA devices, gloo for those on the CPU. A process that waits ten minutes for another gives up.
    """
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if int(os.environ.get("WORLD_SIZE", 1)) < 2 or dist.is_initialized():
        yield device
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(minutes=10))
    try:
        yield device
    finally:
        dist.destroy_process_group()
        # DistributedDataParallel leaves references to the group behind, so gloo's threads outlive it. They drop the tensors of
        # the last collectives a moment after those have ended, for which they need the GIL; an interpreter that ends in that
        # moment aborts the process (pytorch #179291). There is nothing to wait for but time.
        time.sleep(0.2)


def share(batch: Tensor) -> Tensor:
    """This process's part of what all have drawn alike: rows ``[N / W, ...]`` of ``[N, ...]``.

    Raises ValueError if W does not divide N.
    """
    if len(batch) % world():
        raise ValueError(
            f"a batch of {len(batch)} cannot be shared by {world()} processes: take a multiple of {world()}"
        )
    return batch.chunk(world())[rank()]


def gather(rows: Tensor) -> Tensor:
    """The rows of all processes ``[N, ...]``, in the order in which `share` took them apart; without gradients.

    All processes give equally many.
    """
    if world() == 1:
        return rows
    found = [torch.empty_like(rows) for _ in range(world())]
    dist.all_gather(found, rows.detach().contiguous())
    return torch.cat(found)


def mean(x: Tensor) -> Tensor:
    """The mean over processes, with this one's gradient: averaging gradients then gives that of a function of the mean."""
    if world() == 1:
        return x
    total = x.detach().clone()
    dist.all_reduce(total)
    return x + (total / world() - x).detach()


def from_first(make: Callable[[], _T]) -> _T:
    """What ``make`` gives in the first process, in all of them (pickled on its way).

    The others wait, so that times that are measured are right, and what is decided by them is the same for all.
    """
    if world() == 1:
        return make()
    made = [make() if rank() == 0 else None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch warns of itself, where it unpickles graphs
        dist.broadcast_object_list(made)
    return cast(_T, made[0])


def wrapped(module: nn.Module) -> nn.Module:
    """``module`` whose gradients are averaged over the processes; with one process ``module`` itself."""
    if world() == 1:
        return module
    # Buffers are equal in all processes without being sent: norms below, and all else depends on weights alone. What is to
    # replace this argument is not in older releases of torch.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(module, broadcast_buffers=False)


class _Sum(torch.autograd.Function):
    """The sum over processes; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _Sum.forward(ctx, gradient)


def _sum(x: Tensor) -> Tensor:
    return cast(Tensor, _Sum.apply(x))


class _SharedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm with the statistics of the batches of all processes; `nn.SyncBatchNorm` does this on GPUs only."""

    def _check_input_dim(self, x: Tensor) -> None:
        pass  # the class that it stands for has checked the first batch

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        dtype = x.dtype
        x = x.to(torch.promote_types(dtype, torch.float32))  # autocast gives bfloat16, too coarse for sums
        over = [0, *range(2, x.dim())]
        count = x.numel() // x.shape[1] * world()
        shape = (1, -1, *[1] * (x.dim() - 2))
        # One after the other: a difference of two large sums could leave a variance below zero.
        average = _sum(x.sum(over)) / count
        centred = x - average.view(shape)
        variance = _sum(centred.square().sum(over)) / count
        if self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                assert self.num_batches_tracked is not None
                self.num_batches_tracked += 1
                step = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
                self.running_mean.lerp_(average, step)
                self.running_var.lerp_(variance * (count / max(count - 1, 1)), step)
        y = centred * (variance + self.eps).rsqrt().view(shape)
        if self.weight is not None:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(dtype)


@contextmanager
def shared_norms(*models: nn.Module) -> Iterator[None]:
    """Within this context BatchNorm layers that train see the whole global batch."""
    norms = [
        module
        for model in models
        for module in model.modules()
        if world() > 1 and type(module) in (nn.BatchNorm1d, nn.BatchNorm2d)
    ]
    classes = [type(module) for module in norms]
    for module in norms:
        module.__class__ = _SharedBatchNorm  # parameters, buffers and their names stay
    try:
        yield
    finally:
        for module, kind in zip(norms, classes, strict=True):
            module.__class__ = kind

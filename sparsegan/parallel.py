"""More than one process: W of them, started by `torchrun`, train to what one does at the same global batch.

All processes draw the same random numbers for the whole batch, and each takes its share. Gradients are averaged by
`DistributedDataParallel`; what else looks at a whole batch (norm statistics, the logarithm of an error) is brought together
here. With one process everything here does nothing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.parallel import DistributedDataParallel


def world() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this one is, from 0; the first one writes files and shows progress."""
    return dist.get_rank() if world() > 1 else 0


@contextmanager
def processes() -> Iterator[torch.device]:
    """Join the processes that `torchrun` has started, if it has; gives the device of this one.

    NCCL where CUDA devices are, gloo on CPUs. A process that waits ten minutes for another gives up.
    """
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) if torch.cuda.is_available() else 0)
    device = device if torch.cuda.is_available() else torch.device("cpu")
    if int(os.environ.get("WORLD_SIZE", 1)) < 2 or dist.is_initialized():
        yield device
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(minutes=10))
    try:
        yield device
    finally:
        dist.destroy_process_group()


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


def wrapped(module: nn.Module) -> nn.Module:
    """``module`` whose gradients are averaged over the processes; with one process ``module`` itself."""
    if world() == 1:
        return module
    # Buffers are equal in all processes without being sent: norms below, and all else depends on weights alone.
    return DistributedDataParallel(module, broadcast_buffers=False)


class _SharedBatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm with the statistics of the batches of all processes; `nn.SyncBatchNorm` does this on GPUs only."""

    def _check_input_dim(self, x: Tensor) -> None:
        pass  # the class that it stands for has checked the first batch

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        over = [0, *range(2, x.dim())]
        count = x.numel() // x.shape[1] * world()
        sums = all_reduce(torch.stack([x.sum(over), x.square().sum(over)])) / count
        average, variance = sums[0], sums[1] - sums[0].square()
        if self.running_mean is not None and self.running_var is not None:
            with torch.no_grad():
                assert self.num_batches_tracked is not None
                self.num_batches_tracked += 1
                step = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
                self.running_mean.lerp_(average, step)
                self.running_var.lerp_(variance * (count / max(count - 1, 1)), step)
        # In the form of the built-in one, so that it takes what autocast gives it.
        shape = (1, -1, *[1] * (x.dim() - 2))
        y = (x - average.view(shape)) * (variance + self.eps).rsqrt().view(shape)
        if self.weight is not None:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y


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

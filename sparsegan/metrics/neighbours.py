"""How a set of generated images lies among real ones, by nearest neighbours."""

import torch
from torch import Tensor


def density_coverage(samples: Tensor, real: Tensor, k: int = 5) -> tuple[float, float]:
    """Density and coverage of samples [N, ...] among real [M, ...].

    Naeem et al. 2020, arXiv:2002.09797, section 3. Around each real point lies a ball that reaches to its
    k-th nearest real neighbour. Density: balls a sample lies in, over k, averaged (1 for a perfect model;
    above 1 when samples crowd where real points are dense; 0 for noise). Coverage: share of the balls that
    hold a sample (1 at best). Distances are Euclidean between flattened tensors: pixels, or features computed
    by the caller. Raises ValueError when the two do not match or M <= k.
    """
    samples, real = _flat(samples, real)
    inside = _in_balls(samples, real, k)
    return inside.float().mean().item() * len(real) / k, inside.any(dim=1).float().mean().item()


def precision_recall(samples: Tensor, real: Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall of samples [N, ...] against real [M, ...].

    Kynkaanniemi et al. 2019, arXiv:1904.06991, section 2. Precision: share of the samples that lie in the ball
    of some real point, which reaches to its k-th nearest real neighbour. Recall: share of the real points that
    lie in the ball of some sample. Both depend on N and M: compare figures of equal numbers. Distances and
    errors as in `density_coverage`; N > k too.
    """
    samples, real = _flat(samples, real)
    precision, recall = (
        _in_balls(points, centres, k).any(dim=0).float().mean().item()
        for points, centres in ((samples, real), (real, samples))
    )
    return precision, recall


def _flat(samples: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
    if samples.shape[1:] != real.shape[1:] or len(samples) == 0:
        raise ValueError(
            "samples and real should be non-empty sets of tensors of one shape, "
            f"they are {list(samples.shape)} and {list(real.shape)}"
        )
    return samples.flatten(1).float(), real.flatten(1).float()


def _in_balls(points: Tensor, centres: Tensor, k: int) -> Tensor:
    """[centres, points]: whether the ball around a centre, out to its k-th nearest other centre, holds a point."""
    if not 1 <= k < len(centres):
        raise ValueError(f"k should be from 1 to {len(centres) - 1} (one less than the points), it is {k}")
    radii = torch.cdist(centres, centres).kthvalue(k + 1, dim=1).values  # the nearest is the point itself
    return torch.cdist(centres, points) <= radii[:, None]

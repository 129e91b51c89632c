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
    if samples.shape[1:] != real.shape[1:] or len(samples) == 0:
        raise ValueError(
            "samples and real should be non-empty sets of tensors of one shape, "
            f"they are {list(samples.shape)} and {list(real.shape)}"
        )
    if not 1 <= k < len(real):
        raise ValueError(f"k should be from 1 to {len(real) - 1} (one less than the real tensors), it is {k}")
    samples, real = samples.flatten(1).float(), real.flatten(1).float()
    radii = torch.cdist(real, real).kthvalue(k + 1, dim=1).values  # the nearest is the point itself
    inside = torch.cdist(real, samples) <= radii[:, None]
    return inside.float().mean().item() * len(real) / k, inside.any(dim=1).float().mean().item()

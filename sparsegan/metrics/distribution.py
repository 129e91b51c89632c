"""How far the distribution of one set of images is from that of another, by their features."""

from __future__ import annotations

import torch
from torch import Tensor


def kid(a: Tensor, b: Tensor) -> float:
    """Kernel distance, times 1000, of features a [N, D] and b [M, D]: 0 on average for equal distributions, of either sign.

    Binkowski et al. 2018, arXiv:1801.01401, section 4: the unbiased estimate of the squared maximum mean discrepancy with the
    kernel (x·y / D + 1)³, in float64, here of all samples at once. It is the paper's KID when the features are Inception's;
    figures of other features can be compared among themselves only. Raises ValueError when D differs, or N or M is below 2.
    """
    return 1000 * _estimates(a, b, torch.ones(1, 1)).item()


def kid_standard_error(a: Tensor, b: Tensor, groups: int = 10) -> float:
    """The standard error of `kid`, times 1000 too, from what leaving out one group of the samples after another changes.

    Jackknife (Efron and Stein 1981, "The jackknife estimate of variance") with `groups` parts of a and of b. For equal
    distributions it is too large, by about the root of 2. Raises ValueError for fewer than 2 groups or of fewer than 2 samples.
    """
    if groups < 2:
        raise ValueError(f"a standard error needs 2 or more groups, got {groups}")
    estimates = _estimates(a, b, 1 - torch.eye(groups))
    return 1000 * (estimates.var(correction=0) * (groups - 1)).sqrt().item()


def _estimates(a: Tensor, b: Tensor, kept: Tensor) -> Tensor:
    """[K] estimates, each from the groups that a row of `kept` [K, groups] has 1 for; sample i is in group i modulo groups."""
    groups = kept.shape[1]
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"features should be [N, D] and [M, D], they are {list(a.shape)} and {list(b.shape)}"
        )
    if min(len(a), len(b)) < 2 * groups:
        raise ValueError(
            f"{2 * groups} samples or more of each set are needed, there are {len(a)} and {len(b)}"
        )
    a, b, kept = a.double(), b.double(), kept.double()
    in_a, in_b = (torch.eye(groups).double()[torch.arange(len(x)).remainder(groups)] for x in (a, b))
    n, m = (kept @ members.sum(0) for members in (in_a, in_b))
    within_a, within_b, between = (
        ((kept @ in_x.T @ _kernel(x, y) @ in_y) * kept).sum(1)
        for x, in_x, y, in_y in ((a, in_a, a, in_a), (b, in_b, b, in_b), (a, in_a, b, in_b))
    )
    return within_a / (n * (n - 1)) + within_b / (m * (m - 1)) - 2 * between / (n * m)


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    """[N, M], with 0 for a sample and itself."""
    values = torch.mm(x, y.T).div_(x.shape[1]).add_(1).pow_(3)
    return values.fill_diagonal_(0) if x is y else values


def inception_score(probabilities: Tensor) -> float:
    """exp(E KL(p(y|x) || p(y))) of what a classifier says of images, [N, classes], rows that add up to 1: from 1 to classes.

    Salimans et al. 2016, arXiv:1606.03498, section 4, over all samples at once. It is the paper's score when the classifier is
    Inception; figures of other classifiers can be compared among themselves only. Raises ValueError for other shapes and sums.
    """
    p = probabilities.double()
    if p.dim() != 2 or len(p) == 0 or not torch.allclose(p.sum(1), torch.ones(len(p)).double(), atol=1e-4):
        raise ValueError(f"probabilities should be [N, classes] whose rows add up to 1, got {list(p.shape)}")
    return (torch.special.xlogy(p, p) - torch.special.xlogy(p, p.mean(0))).sum(1).mean().exp().item()

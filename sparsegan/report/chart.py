"""Quality against speed as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

_LEAST = 0.05  # KID can be below zero, which a logarithmic axis does not have


def draw_quality(families: Mapping[str, Sequence[tuple[float, float]]], path: Path) -> None:
    """Write a PNG of KID x1000 (logarithmic) against times as fast as eager: points (speed-up, KID), a line a family.

    Lower and further right is better. Points below 0.05 are drawn there.
    """
    import matplotlib  # here: it takes longer to import than all else

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name, points in families.items():
        speeds, distances = zip(*sorted(points), strict=True)
        axes.plot(speeds, [max(distance, _LEAST) for distance in distances], marker="o", label=name)
    axes.set(xlabel="times as fast as eager float32, batch 1", ylabel="KID x1000", yscale="log")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)

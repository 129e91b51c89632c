"""How good are images: against a reference (psnr, ssim) and as a set against real ones (density_coverage)."""

from sparsegan.metrics.neighbours import density_coverage
from sparsegan.metrics.pairs import psnr, ssim

__all__ = ["density_coverage", "psnr", "ssim"]

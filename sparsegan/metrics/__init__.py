"""How good are images: against a reference (psnr, ssim, lpips) and as a set against another (kid, precision_recall ...)."""

from sparsegan.metrics.backbones import Backbone, load_backbone
from sparsegan.metrics.distribution import inception_score, kid, kid_standard_error
from sparsegan.metrics.features import extractors, features, load_extractor
from sparsegan.metrics.neighbours import density_coverage, precision_recall
from sparsegan.metrics.pairs import psnr, ssim
from sparsegan.metrics.perceptual import FeatureDistance, lpips
from sparsegan.metrics.scattering import TextureDistance

__all__ = [
    "Backbone",
    "FeatureDistance",
    "TextureDistance",
    "density_coverage",
    "extractors",
    "features",
    "inception_score",
    "kid",
    "kid_standard_error",
    "load_backbone",
    "load_extractor",
    "lpips",
    "precision_recall",
    "psnr",
    "ssim",
]

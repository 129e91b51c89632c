"""Image generators: architectures, and the trained models by name."""

from sparsegan.models.dcgan import dcgan_generator
from sparsegan.models.faces import load_faces
from sparsegan.models.mlp import mlp_generator
from sparsegan.models.registry import MODELS, LoadedModel, load_model, load_vae
from sparsegan.models.residual import ResidualGenerator
from sparsegan.models.seeded import seeded
from sparsegan.models.stylegan2 import StyleGAN2Generator
from sparsegan.models.translation import UNetGenerator, cyclegan_generator
from sparsegan.models.vae import ConvVAE, vae_decoder

__all__ = [
    "MODELS",
    "ConvVAE",
    "LoadedModel",
    "ResidualGenerator",
    "StyleGAN2Generator",
    "UNetGenerator",
    "cyclegan_generator",
    "dcgan_generator",
    "load_faces",
    "load_model",
    "load_vae",
    "mlp_generator",
    "seeded",
    "vae_decoder",
]

"""Image generators and what they are trained with: architectures, and the trained models by name."""

from sparsegan.models.conditional import ConditionalGenerator
from sparsegan.models.dcgan import dcgan_generator, stem_generator
from sparsegan.models.discriminators import (
    ProjectionDiscriminator,
    conv_discriminator,
    mlp_discriminator,
    patch_discriminator,
)
from sparsegan.models.faces import load_faces
from sparsegan.models.mlp import mlp_generator
from sparsegan.models.recurrent import GRUCell, LSTMCell, RecurrentDecoder, RecurrentEncoder
from sparsegan.models.registry import MODELS, LoadedModel, load_model, load_vae
from sparsegan.models.residual import ResidualGenerator
from sparsegan.models.seeded import seeded
from sparsegan.models.stylegan2 import StyleGAN2Generator
from sparsegan.models.translation import UNetGenerator, cyclegan_generator
from sparsegan.models.vae import VAE, ConvVAE, vae_decoder, vae_encoder

__all__ = [
    "MODELS",
    "VAE",
    "ConditionalGenerator",
    "ConvVAE",
    "GRUCell",
    "LSTMCell",
    "LoadedModel",
    "ProjectionDiscriminator",
    "RecurrentDecoder",
    "RecurrentEncoder",
    "ResidualGenerator",
    "StyleGAN2Generator",
    "UNetGenerator",
    "conv_discriminator",
    "cyclegan_generator",
    "dcgan_generator",
    "load_faces",
    "load_model",
    "load_vae",
    "mlp_discriminator",
    "mlp_generator",
    "patch_discriminator",
    "seeded",
    "stem_generator",
    "vae_decoder",
    "vae_encoder",
]

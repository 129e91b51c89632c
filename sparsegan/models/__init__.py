"""Image generators: architectures, and the trained models by name."""

from sparsegan.models.dcgan import dcgan_generator
from sparsegan.models.faces import load_faces
from sparsegan.models.registry import MODELS, LoadedModel, load_model, load_vae
from sparsegan.models.vae import ConvVAE

__all__ = ["MODELS", "ConvVAE", "LoadedModel", "dcgan_generator", "load_faces", "load_model", "load_vae"]

"""Training of the shipped models: `python -m sparsegan.train gan|vae --out DIR`."""

from sparsegan.train.data import load_fashion_mnist
from sparsegan.train.gan import train_gan
from sparsegan.train.vae import fit_prior, train_vae

__all__ = ["fit_prior", "load_fashion_mnist", "train_gan", "train_vae"]

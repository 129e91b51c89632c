"""Training of what is shipped: `python -m sparsegan.train gan|vae|clothing --out DIR`."""

from sparsegan.train.clothing import train_clothing
from sparsegan.train.data import load_fashion_mnist, load_labels
from sparsegan.train.gan import train_gan
from sparsegan.train.vae import fit_prior, train_vae

__all__ = ["fit_prior", "load_fashion_mnist", "load_labels", "train_clothing", "train_gan", "train_vae"]

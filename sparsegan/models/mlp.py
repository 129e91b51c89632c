"""The generator of the first GAN, without convolutions (Goodfellow et al. 2014, arXiv:1406.2661, section 5)."""

from torch import nn


def mlp_generator(latent: int = 100, width: int = 1024, pixels: int = 784) -> nn.Sequential:
    """Generator from z [N, latent] to flat images [N, pixels] in [-1, 1]: three hidden layers of `width`."""
    layers: list[nn.Module] = []
    features = latent
    for _ in range(3):
        layers += [nn.Linear(features, width), nn.LeakyReLU(0.2)]
        features = width
    return nn.Sequential(*layers, nn.Linear(features, pixels), nn.Tanh())

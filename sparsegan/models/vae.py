"""Variational auto-encoders (Kingma and Welling 2014, arXiv:1312.6114): of any two parts, and the shipped one."""

from collections.abc import Sequence

from torch import Tensor, nn


def vae_encoder(
    latent: int = 16,
    side: int = 32,
    widths: Sequence[int] = (32, 64, 128),
    kernel: int = 4,
    image_channels: int = 1,
) -> nn.Sequential:
    """Encoder from images [N, image_channels, side, side] to mean and log-variance side by side, [N, 2 * latent].

    A kernel x kernel convolution of stride 2 for each of `widths`, BatchNorm, ReLU, and a linear layer. The defaults
    are the encoder of the shipped "vae" weights; a kernel of 5 rounds odd sides up, one of 4 down.
    """
    layers: list[nn.Module] = []
    channels, padding = image_channels, (kernel - 1) // 2
    for width in widths:
        layers += [
            nn.Conv2d(channels, width, kernel, 2, padding, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        ]
        channels, side = width, (side + 2 * padding - kernel) // 2 + 1
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * side * side, 2 * latent))


def vae_decoder(
    latent: int = 16,
    channels: int = 192,
    side: int = 4,
    widths: Sequence[int] = (128, 64, 64),
    image_channels: int = 1,
) -> nn.Sequential:
    """Decoder from codes [N, latent] to images [N, image_channels, S, S] in [-1, 1].

    A linear layer makes a map of `channels` and `side`, each transposed convolution of `widths` doubles it:
    S = side * 2 ** len(widths). The defaults are the decoder of the shipped "vae" weights (32x32 images).
    """
    layers: list[nn.Module] = [
        nn.Linear(latent, channels * side * side),
        nn.ReLU(inplace=True),
        nn.Unflatten(1, (channels, side, side)),
    ]
    for width in widths:
        layers += [
            nn.ConvTranspose2d(channels, width, 4, 2, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        ]
        channels = width
    return nn.Sequential(*layers, nn.Conv2d(channels, image_channels, 3, padding=1), nn.Tanh())


def _prior(latent: int) -> nn.Sequential:
    width = 192
    return nn.Sequential(
        nn.Linear(latent, width),
        nn.ReLU(inplace=True),
        nn.Linear(width, width),
        nn.ReLU(inplace=True),
        nn.Linear(width, latent),
    )


class VAE(nn.Module):
    """An encoder and a decoder, of images [N, C, H, W] in [-1, 1] and codes z [N, latent], z standard normal.

    encoder: images to mean and log-variance side by side, [N, 2 * latent], such as `vae_encoder` and
    `RecurrentEncoder`. decoder: codes to images, such as `vae_decoder`, `mlp_generator` and `RecurrentDecoder`.
    """

    def __init__(self, encoder: nn.Module, decoder: nn.Module, latent: int) -> None:
        super().__init__()
        self.latent = latent
        self.encoder, self.decoder = encoder, decoder

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of z given images [N, C, H, W], both [N, latent]."""
        mean, log_variance = self.encoder(images).chunk(2, dim=1)
        return mean, log_variance

    def forward(self, images: Tensor) -> Tensor:
        """The reconstruction [N, C, H, W] from the mean of z, without sampling."""
        mean, _ = self.encode(images)
        reconstruction: Tensor = self.decoder(mean)
        return reconstruction

    def generator(self) -> nn.Module:
        """What makes images of standard normal [N, latent]."""
        return self.decoder


class ConvVAE(VAE):
    """The shipped VAE, with a learnt prior. Images are [N, 1, 32, 32] in [-1, 1], codes z are [N, latent].

    The codes of real images do not fill the standard normal distribution, and what the decoder makes of the
    holes between them is no clothing. So `prior` maps standard normal u [N, latent] to codes such as the
    encoder gives (Li et al. 2015, arXiv:1502.02761, section 4: a generative moment matching network on the
    codes).
    """

    decoder: nn.Sequential

    def __init__(self, latent: int = 16) -> None:
        super().__init__(vae_encoder(latent), vae_decoder(latent), latent)
        self.prior = _prior(latent)

    def generator(self) -> nn.Sequential:
        """Prior and decoder as one plain nn.Sequential that shares them: standard normal u to images."""
        return nn.Sequential(*self.prior, *self.decoder).train(self.training)

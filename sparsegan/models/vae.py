"""A convolutional variational auto-encoder for 32x32 images (Kingma and Welling 2014, arXiv:1312.6114)."""

from collections.abc import Sequence

from torch import Tensor, nn


def _encoder(latent: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 1
    for width in (32, 64, 128):
        layers += [
            nn.Conv2d(channels, width, 4, 2, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        ]
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * 4 * 4, 2 * latent))


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


class ConvVAE(nn.Module):
    """Encoder, decoder and a learnt prior. Images are [N, 1, 32, 32] in [-1, 1], codes z are [N, latent].

    The codes of real images do not fill the standard normal distribution, and what the decoder makes of the
    holes between them is no clothing. So `prior` maps standard normal u [N, latent] to codes such as the
    encoder gives (Li et al. 2015, arXiv:1502.02761, section 4: a generative moment matching network on the
    codes).
    """

    def __init__(self, latent: int = 16) -> None:
        super().__init__()
        self.latent = latent
        self.encoder = _encoder(latent)
        self.decoder = vae_decoder(latent)
        self.prior = _prior(latent)

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of z given images [N, 1, 32, 32], both [N, latent]."""
        mean, log_variance = self.encoder(images).chunk(2, dim=1)
        return mean, log_variance

    def forward(self, images: Tensor) -> Tensor:
        """The reconstruction [N, 1, 32, 32] from the mean of z, without sampling."""
        mean, _ = self.encode(images)
        reconstruction: Tensor = self.decoder(mean)
        return reconstruction

    def generator(self) -> nn.Sequential:
        """Prior and decoder as one plain nn.Sequential that shares them: standard normal u to images."""
        return nn.Sequential(*self.prior, *self.decoder).train(self.training)

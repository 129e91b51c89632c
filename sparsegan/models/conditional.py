"""A generator that is told what to draw (Mirza and Osindero 2014, arXiv:1411.1784)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sparsegan.models.dcgan import stem_generator


class ClassEmbedding(nn.Embedding):
    """A learnt vector for each class: labels [N] int64 to [N, embedding_dim].

    Raises IndexError for labels that are not from 0 to num_embeddings - 1.
    """

    def forward(self, input: Tensor) -> Tensor:
        try:
            return super().forward(input)
        except IndexError:
            low, high = (int(label) for label in input.aminmax())
            raise IndexError(
                f"labels are whole numbers from 0 to {self.num_embeddings - 1}, got some from {low} to {high}"
            ) from None


class ConditionalGenerator(nn.Module):
    """Generator from z [N, latent] and labels [N] int64 to images [N, image_channels, side, side] in [-1, 1].

    A learnt vector of `embedding` numbers for each of `classes` stands beside z; `stem_generator` makes the
    image of both. Raises IndexError, in forward, for labels that are not from 0 to classes - 1.
    """

    def __init__(
        self,
        classes: int = 10,
        latent: int = 100,
        embedding: int = 32,
        stem: int = 256,
        side: int = 32,
        widths: Sequence[int] = (128, 64),
        image_channels: int = 1,
    ) -> None:
        super().__init__()
        self.embedding = ClassEmbedding(classes, embedding)
        self.body = stem_generator(latent + embedding, stem, side, widths, image_channels)

    def forward(self, z: Tensor, labels: Tensor) -> Tensor:
        image: Tensor = self.body(torch.cat([z, self.embedding(labels)], 1))
        return image

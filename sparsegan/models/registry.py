"""The trained models by name."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sparsegan.models.dcgan import dcgan_generator
from sparsegan.models.faces import load_faces
from sparsegan.models.vae import ConvVAE

WEIGHTS = Path(__file__).parent / "weights"

_M = TypeVar("_M", bound=nn.Module)


@dataclass(frozen=True)
class LoadedModel:
    """A trained image generator and what is needed to draw from it.

    model: in eval mode, latents [N, *latent_shape] to images [N, *image_shape] float32 in [-1, 1]. card: the
    Markdown file that says where data and weights come from, None when the weights are not ours.
    """

    name: str
    kind: Literal["gan", "vae decoder"]
    model: nn.Sequential
    latent_shape: tuple[int, ...]
    image_shape: tuple[int, int, int]
    card: Path | None

    def sample_inputs(self, n: int, generator: torch.Generator | None = None) -> tuple[Tensor]:
        """n standard normal latents, as the tuple of positional inputs of `model`.

        Without a generator, torch.Generator's default seed is used: the same latents each time.
        """
        return (torch.randn(n, *self.latent_shape, generator=generator or torch.Generator()),)


def _load_weights(build: Callable[[], _M], path: Path) -> _M:
    """Build a model and give it the weights of a safetensors file, as float32, in eval mode."""
    with torch.device("meta"):  # no initialisation: the weights replace it
        model = build()
    state = {name: t.float() if t.is_floating_point() else t for name, t in load_file(path).items()}
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def load_vae() -> ConvVAE:
    """The shipped VAE with its encoder; load_model("vae") is its prior and decoder alone."""
    return _load_weights(ConvVAE, WEIGHTS / "vae.safetensors")


def _dcgan() -> LoadedModel:
    model = _load_weights(dcgan_generator, WEIGHTS / "dcgan.safetensors")
    return LoadedModel("dcgan", "gan", model, (64, 1, 1), (1, 32, 32), WEIGHTS / "dcgan.md")


def _vae() -> LoadedModel:
    vae = load_vae()
    return LoadedModel("vae", "vae decoder", vae.generator(), (vae.latent,), (1, 32, 32), WEIGHTS / "vae.md")


def _faces() -> LoadedModel:
    return LoadedModel("faces", "gan", load_faces(), (100, 1, 1), (3, 64, 64), None)


MODELS: dict[str, Callable[[], LoadedModel]] = {"dcgan": _dcgan, "vae": _vae, "faces": _faces}


def load_model(name: str) -> LoadedModel:
    """Load a trained model: "dcgan" and "vae" (shipped, 32x32 clothing), "faces" (64x64, fetched with pip).

    Raises ValueError for another name, and what load_faces raises.
    """
    if name not in MODELS:
        raise ValueError(f"no model is called {name!r}; there are {', '.join(MODELS)}")
    return MODELS[name]()

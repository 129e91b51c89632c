"""What a training run leaves behind: weights, a grid of samples and a card."""

from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor, nn


def save_weights(model: nn.Module, path: Path) -> None:
    """Write a model's state as safetensors: float16 for tensors of two and more dimensions.

    The rest (normalisation, biases) is small and stays float32: a variance may lie outside float16's range.
    """
    state = {
        name: (t.half() if t.is_floating_point() and t.dim() > 1 else t).contiguous()
        for name, t in model.state_dict().items()
    }
    path.write_bytes(save(state))  # save_file would make a file that only its owner may read


def save_grid(images: Tensor, path: Path, columns: int) -> None:
    """Write images [N, 1 or 3, H, W] in [-1, 1] as one picture, row by row; columns divides N."""
    n, channels, height, width = images.shape
    if n == 0 or n % columns != 0 or channels not in (1, 3):
        raise ValueError(
            f"a grid of {columns} columns needs a multiple of {columns} images of 1 or 3 channels, "
            f"it got {list(images.shape)}"
        )
    rows = n // columns
    pixels = ((images.detach().cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    tiles = pixels.reshape(rows, columns, channels, height, width).permute(0, 3, 1, 4, 2)
    picture = tiles.reshape(rows * height, columns * width, channels).squeeze(2).numpy()
    Image.fromarray(picture).save(path, optimize=True)


def save_card(
    path: Path, *, title: str, what: str, command: str, settings: dict[str, object], figures: dict[str, str]
) -> None:
    """Write the card: what it is, its picture if there is one, data and licence, how to make it again, what was measured."""
    picture = f"\n![samples]({path.stem}.png)\n" if path.with_suffix(".png").is_file() else ""
    facts = "\n".join(f"- {name}: {value}" for name, value in settings.items())
    table = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    path.write_text(
        f"""# {title}

{what}
{picture}
## Data

Fashion-MNIST (Xiao, Rasul and Vollgraf 2017, arXiv:1708.07747): 60,000 training images, MIT licence,
copyright 2017 Zalando SE. The 28x28 images get a black frame of two pixels and values in [-1, 1].
On Debian: package `dataset-fashion-mnist`.

## To make it again

    {command}

{facts}

The same numbers come out bit for bit only with the same torch, number of threads and kind of processor.

## Measured

| | |
| --- | --- |
{table}
""",
        encoding="utf-8",
    )

"""Images side by side in one picture, rows labelled."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_GAP, _BACKGROUND, _INK = 2, 255, 0


def image_grid(rows: Sequence[tuple[str, Tensor]], columns: int, scale: int = 1) -> Image.Image:
    """One picture of labelled sets of images, for comparing them by eye.

    rows:    (label, images [N, 1 or 3, H, W] with values in [-1, 1]), all of one shape. The sets take turns
             line by line: images 1 to `columns` of each set, then the next ones.
    columns: images a line.
    scale:   pixels become squares of this side.

    Values beyond [-1, 1] are clipped. Raises ValueError for no images, sets of different shapes, other
    numbers of channels, and values that are not finite.
    """
    shapes = {tuple(images.shape) for _, images in rows}
    shape = next(iter(shapes), ())
    if len(shapes) != 1 or len(shape) != 4 or 0 in shape or shape[1] not in (1, 3):
        raise ValueError(f"a grid needs sets of images of one shape [N, 1 or 3, H, W], got {sorted(shapes)}")
    if columns < 1 or scale < 1:
        raise ValueError(f"a grid needs columns >= 1 and scale >= 1, got {columns} and {scale}")
    if any(not images.isfinite().all() for _, images in rows):
        raise ValueError("the images hold NaN or infinite values")

    count, channels, height, width = shape
    font = ImageFont.load_default(size=12)
    labelled = any(label for label, _ in rows)
    margin = int(max(font.getlength(label) for label, _ in rows)) + 2 * _GAP + 4 if labelled else _GAP
    step_x, step_y = width * scale + _GAP, height * scale + _GAP
    lines = -(-count // columns)
    size = (margin + min(columns, count) * step_x, lines * (len(rows) * step_y + 2 * _GAP))
    picture = Image.new("L" if channels == 1 else "RGB", size, (_BACKGROUND,) * channels)
    pen = ImageDraw.Draw(picture)
    for index, (label, images) in enumerate(rows):
        pixels = ((images.detach().cpu().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        for number, tile in enumerate(pixels):
            line, column = divmod(number, columns)
            y = line * (len(rows) * step_y + 2 * _GAP) + index * step_y + _GAP
            array = tile[0] if channels == 1 else tile.permute(1, 2, 0)
            image = Image.fromarray(array.numpy()).resize(
                (width * scale, height * scale), Image.Resampling.NEAREST
            )
            picture.paste(image, (margin + column * step_x, y))
            if column == 0:
                pen.text((_GAP, y + step_y // 2), label, fill=(_INK,) * channels, font=font, anchor="lm")
    return picture

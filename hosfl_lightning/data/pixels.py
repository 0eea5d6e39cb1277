"""From a picture in a file to pixels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

# Pillow's modes of at most 8 bits a channel, and what they become. Deeper ones would be clipped, not scaled.
_MODES = {"1": "L", "L": "L", "LA": "L", "P": "RGB", "RGB": "RGB", "RGBA": "RGB", "CMYK": "RGB", "YCbCr": "RGB"}


def read_image(path: Path, setting: str, image_size: int | None) -> Tensor:
    """The pixels of a picture file, see `to_pixels`.

    Raises:
        ValueError: If the file is no whole picture, or of a kind that is not read.
    """
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{setting}: {str(path)!r} cannot be read as an image ({error})") from error
    return to_pixels(image, str(path), image_size)


def to_pixels(image: Image.Image, where: str, image_size: int | None) -> Tensor:
    """uint8 (1, H, W) of a grey or (3, H, W) of a colour picture, turned as its camera says, without transparency.

    A picture larger than `image_size` is shrunk to it here, with Pillow's antialiased bilinear filter: photographs
    would alias otherwise, and fill the memory.

    Raises:
        ValueError: If it has more than 8 bits a channel or another unusual mode.
    """
    if image.mode not in _MODES:
        raise ValueError(f"{where}: an image of Pillow's mode {image.mode!r} is not read; save it as 8-bit grey or RGB")
    image = ImageOps.exif_transpose(image).convert(_MODES[image.mode])
    if image_size is not None and max(image.size) > image_size:
        image = image.resize((image_size, image_size), Image.Resampling.BILINEAR)
    pixels = np.array(image).reshape(image.height, image.width, -1)
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()

"""Image files as Pillow images of 8 bits a channel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from vitprune.images.image_tar import open_file


def read_image(path: str | Path, mode: str = "RGB") -> Image.Image:
    """Decode an image file, or one inside a .tar.

    As timm does: alpha is dropped, CMYK converted without profiles, the first frame taken, and orientation in EXIF
    ignored. Other than Pillow's own conversion, deep images are scaled, as ``as_8_bit`` says.

    Args:
        path: of the file.
        mode: ``RGB`` or ``L``.

    Raises:
        OSError, ValueError, SyntaxError: and whatever else a damaged file makes a decoder stumble over.
    """
    with open_file(path) as stream, Image.open(stream) as image:
        return convert(image, mode)


def convert(image: Image.Image, mode: str = "RGB") -> Image.Image:
    """Return an image in ``RGB`` or ``L``.

    >>> convert(Image.fromarray(np.full((1, 1), 0.5, np.float32))).getpixel((0, 0))
    (128, 128, 128)
    """
    if image.mode.startswith(("I", "F")):
        image = as_8_bit(image)
    elif image.mode == "RGBa":
        image = image.convert("RGBA")
    elif image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # as Pillow asks for; the colours are the same
    return image.convert(mode)


def as_8_bit(image: Image.Image) -> Image.Image:
    """Scale an image of integers or floats, which Pillow's conversion would clip, to 8 bits.

    16 bits by 257; 32-bit integers that reach at most 255 as they are, at most 65535 like 16 bits; floats that reach at
    most 1 by 255, at most 255 as they are.

    Args:
        image: of mode ``I;16`` (in any byte order), ``I`` or ``F``.

    Raises:
        ValueError: if its values are in no such range.

    >>> as_8_bit(Image.fromarray(np.full((1, 1), 65535, np.uint16))).getpixel((0, 0))
    255
    """
    values = np.asarray(image).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if not np.isfinite(values).all():
        raise ValueError("values that are infinite or no numbers")
    if image.mode == "F":
        scale = 255.0 if high <= 1 else 1.0
        known = high <= 255
    else:
        deep = image.mode != "I" or high > 255
        scale = 1 / 257 if deep else 1.0
        known = high <= 65535
    if low < 0 or not known:
        kind = "floats" if image.mode == "F" else "integers"
        raise ValueError(f"{kind} from {low:g} to {high:g}, of which nothing tells what is white")
    return Image.fromarray(np.floor(values * scale + 0.5).astype(np.uint8))

"""Small pictures of images, as text that an HTML page can hold."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vitprune.images.decode import convert
from vitprune.images.image_tar import open_file

SHORT_SIDE, LONG_SIDE = 96, 144
QUALITY = 80


@dataclass(frozen=True)
class Thumbnail:
    """A small picture.

    Attributes:
        uri: JPEG as a data URI.
        width, height: pixels; the short side is at most 96, the long one at most 144.
    """

    uri: str
    width: int
    height: int


def make_thumbnail(path: str | Path) -> Thumbnail | str:
    """Make a small JPEG of an image as the model sees it; the same file gives the same bytes.

    Smaller images stay as they are.

    Returns:
        The thumbnail, or why there is none.
    """
    try:
        with open_file(path) as stream, Image.open(stream) as image:
            scale = min(1.0, SHORT_SIDE / min(image.size), LONG_SIDE / max(image.size))
            size = tuple(max(1, round(side * scale)) for side in image.size)
            image.draft("RGB", size)
            small = convert(image).resize(size, Image.Resampling.LANCZOS)
    except FileNotFoundError:
        return "no longer there"
    except Exception:  # decoders raise whatever a damaged file makes them stumble over
        return "not to be decoded"
    stream = io.BytesIO()
    small.save(stream, "JPEG", quality=QUALITY, optimize=True)
    return Thumbnail(embed(stream.getvalue(), "image/jpeg"), *size)


def embed(content: bytes, media_type: str) -> str:
    """Return a data URI.

    >>> embed(b"hi", "text/plain")
    'data:text/plain;base64,aGk='
    """
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"

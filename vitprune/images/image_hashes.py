"""Hashes of what is in image files."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from vitprune.images.image_set import ImageSet
from vitprune.images.image_tar import open_file

_BLOCK_BYTES = 2**20


def hash_images(images: ImageSet) -> tuple[str, ...]:
    """Return a content hash of each image file (16 hexadecimal digits; empty for one that cannot be read)."""

    def hash_or_nothing(path: Path) -> str:
        try:
            with open_file(path) as stream:
                digest = hashlib.sha256()
                while block := stream.read(_BLOCK_BYTES):
                    digest.update(block)
                return digest.hexdigest()[:16]
        except OSError:  # such an image is skipped, or refused, when it is decoded
            return ""

    return tuple(hash_or_nothing(images.root / name) for name in images.files)


def digest_images(hashes: Iterable[str]) -> str:
    """Return one hash (64 hexadecimal digits) for a collection of images, whatever their names and their order.

    Args:
        hashes: of their contents, as ``hash_images`` gives them.

    >>> digest_images(["b", "a", ""]) == digest_images(["a", "b"])
    True
    """
    return hashlib.sha256("".join(sorted(set(hashes) - {""})).encode()).hexdigest()

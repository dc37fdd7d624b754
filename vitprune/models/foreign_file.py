"""What a file is that holds no weights: said by its first bytes, with what to do about it."""

from __future__ import annotations

import json
import tarfile
import zipfile
from pathlib import Path

_LFS = b"version https://git-lfs"
_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ": "xz",
    b"BZh": "bzip2",
    b"7z\xbc\xaf": "7-Zip",
    b"\x28\xb5\x2f\xfd": "zstd",
}
_PICTURES = {b"\x89PNG": "PNG", b"\xff\xd8\xff": "JPEG", b"GIF8": "GIF"}
_PICKLE = b"\x80"
_PAGES = (b"<!doctype", b"<html", b"<?xml", b"<head", b"<body", b"<script", b"<!--", b"<error")
_BYTES_READ = 4096


def explain_file(path: Path) -> str | None:
    """Say what a file is, if it is plainly no file of weights; None where it may be one.

    Args:
        path: of a file that is there.

    Returns:
        What it is and what to do, to stand behind the name of the file.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     page = Path(folder) / "weights.pth"
    ...     _ = page.write_text("<!DOCTYPE html><title>Sign in</title>")
    ...     explain_file(page)
    'is a web page (HTML), so the download failed; download the file itself'
    """
    if is_safetensors(path):
        return None
    start = _read_start(path)
    if not start.strip(b"\0"):
        return "is empty; download or copy it again"
    if start.startswith(_LFS):
        return "is a Git LFS pointer, which stands for the weights; 'git lfs pull' in its repository fetches them"
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(_PAGES):
        return "is a web page (HTML), so the download failed; download the file itself"
    if start.startswith(b"\x89HDF\r\n\x1a\n"):
        return "is an HDF5 file, as Keras and TensorFlow write them; convert it to a torch state dict first"
    if start.startswith(b"GGUF"):
        return "is a GGUF file; get the original weights as .safetensors"
    for magic, kind in (_COMPRESSED | _PICTURES).items():
        if start.startswith(magic):
            return f"is a {kind} {'picture' if magic in _PICTURES else 'archive; unpack it first'}"
    if start.lstrip()[:1] in (b"{", b"[") and _is_text(start):
        return _explain_json(path)
    if start.startswith(b"PK"):
        return _explain_zip(path)
    if path.suffix != ".safetensors" and tarfile.is_tarfile(path):
        return _explain_tar(path)
    if path.suffix == ".onnx":
        return "is an ONNX file, which is a model of its own; get the weights it was exported from"
    if path.suffix == ".safetensors" and not start.startswith(_PICKLE):
        return _explain_safetensors(path, start)
    if _is_text(start):
        begins = start.decode().split(maxsplit=1)[0][:20]
        return f"is a text file (it begins with {begins!r}), not a plain state dict; download or copy it again"
    return None


def is_safetensors(path: Path) -> bool:
    """Tell whether a file begins as a safetensors file does: with the length of a header that is there."""
    start = _read_start(path)
    return start[8:9] == b"{" and 8 + int.from_bytes(start[:8], "little") <= path.stat().st_size


def _read_start(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(_BYTES_READ)


def _is_text(start: bytes) -> bool:
    return b"\0" not in start and all(byte >= 32 or byte in b"\t\r\n\f" for byte in start[:512]) and start.isascii()


def _explain_json(path: Path) -> str:
    try:
        content = json.loads(path.read_text())
    except ValueError:
        return "is a text file of JSON or the like, which holds no weights"
    if isinstance(content, dict) and isinstance(content.get("weight_map"), dict):
        shards = sorted(set(map(str, content["weight_map"].values())))
        return (
            f"is the index of a checkpoint in {len(shards)} shards ({_name_members(shards)}); "
            "load them all in torch and save one .safetensors file"
        )
    return "is a JSON file, which holds no weights; pass the file of weights beside it"


def _explain_zip(path: Path) -> str | None:
    try:
        if not zipfile.is_zipfile(path):
            return "is cut off (a zip archive without its end); download or copy it again"
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError) as error:
        return f"is a damaged zip archive ({error}); download or copy it again"
    if any(name.endswith("/constants.pkl") or "/code/" in name or name == "constants.pkl" for name in names):
        return (
            "is a TorchScript archive, a program with its weights; in torch save the state_dict() of what "
            "torch.jit.load gives"
        )
    if any(name.endswith("data.pkl") for name in names) or (names and all(name.endswith(".npy") for name in names)):
        return None
    if any(name.endswith(".keras") or name in ("model.weights.h5", "metadata.json") for name in names):
        return "is a Keras archive; convert it to a torch state dict first"
    return f"is a zip archive of other files ({_name_members(names)}); unpack it and pass the file of weights"


def _explain_tar(path: Path) -> str | None:
    with tarfile.open(path) as archive:
        names = archive.getnames()
    if {"pickle", "storages"} <= set(names):
        return "is in torch's format before version 0.1.10; load and save it again with a newer torch"
    return f"is a tar archive ({_name_members(names)}); unpack it and pass the file of weights"


def _name_members(names: list[str]) -> str:
    files = [name for name in names if not name.endswith("/")]
    return ", ".join(files[:3]) + (", ..." if len(files) > 3 else "") if files else "nothing"


def _explain_safetensors(path: Path, start: bytes) -> str:
    length = int.from_bytes(start[:8], "little")
    size = path.stat().st_size
    if size < 8 or start[8:9] != b"{":
        return "is no safetensors file: it does not begin with the header; download or copy it again"
    return f"is cut off ({size} bytes, and its header alone has {length}); download or copy it again"

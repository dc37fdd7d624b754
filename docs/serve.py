"""Classify image files with an ONNX file that vitprune exported; needs numpy, pillow and onnxruntime, nothing else.

The transform, the number of classes and their names are read from the file's metadata. Letters: B images, C classes.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from PIL import Image


def open_model(path: str, num_threads: int = 0) -> tuple[onnxruntime.InferenceSession, dict[str, Any]]:
    """Return a session (0 threads: ONNX Runtime chooses) and what the file says about its model."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = num_threads
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's exceptions have no public base class
        raise ValueError(f"{path}: ONNX Runtime cannot open it ({_one_line(error)})") from error
    text = session.get_modelmeta().custom_metadata_map.get("vitprune")
    if text is None:
        raise ValueError(f"{path}: does not say which transform its images need; export it with 'vitprune export'")
    facts = json.loads(text)
    if facts["num_classes"] < 1:
        raise ValueError(f"{path}: the model has no classifier (num_classes=0)")
    if (crop_mode := facts["data_config"]["crop_mode"]) not in ("center", "squash"):
        raise ValueError(f"{path}: crop_mode must be 'center' or 'squash', got '{crop_mode}'")
    if isinstance(batch := session.get_inputs()[0].shape[0], int):
        raise ValueError(f"{path}: runs exactly {batch} images at a time; export it without --fixed-batch")
    return session, facts


def preprocess(image: Image.Image, config: Mapping[str, Any]) -> np.ndarray:
    """Return an image as timm's evaluation transform does: float32 [channels, height, width], normalised."""
    channels, height, width = config["input_size"]
    image = _as_8_bit(image)
    image = image.convert("L" if channels == 1 else "RGB")
    to_height, to_width = (math.floor(size / config["crop_pct"]) for size in (height, width))
    if config["crop_mode"] == "center" and to_height == to_width:  # torchvision rounds the longer side down
        shorter = min(image.size)
        to_width, to_height = (int(to_height * side / shorter) for side in image.size)
    elif config["crop_mode"] == "center":  # timm covers a target that is not square, and rounds to the nearest
        ratio = min(image.width / to_width, image.height / to_height)
        to_width, to_height = (round(side / ratio) for side in image.size)
    image = image.resize((to_width, to_height), Image.Resampling[config["interpolation"].upper()])
    left, top = _crop_start(to_width, width), _crop_start(to_height, height)
    image = image.crop((left, top, left + width, top + height))  # black where that is outside the image
    pixels = np.asarray(image, np.float32).reshape(height, width, channels) / np.float32(255)
    return ((pixels - np.float32(config["mean"])) / np.float32(config["std"])).transpose(2, 0, 1)


def classify(session: onnxruntime.InferenceSession, facts: Mapping[str, Any], files: Sequence[str]) -> np.ndarray:
    """Return the probability of each class [B, C] (float64) of B image files, in one run of the model."""
    images = np.stack([preprocess(_decode(path), facts["data_config"]) for path in files])
    (logits_BC,) = session.run(None, {session.get_inputs()[0].name: images})
    exp_BC = np.exp(logits_BC.astype(np.float64) - logits_BC.max(axis=1, keepdims=True))
    return exp_BC / exp_BC.sum(axis=1, keepdims=True)


def _as_8_bit(image: Image.Image) -> Image.Image:
    """Scale 16-bit and float images, which Pillow would clip: by 257; floats that reach at most 1 by 255."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image).astype(np.float64)
    low, high, floats = values.min(), values.max(), image.mode == "F"
    if not 0 <= low <= high <= (255 if floats else 65535):
        raise ValueError(f"an image of values from {low:g} to {high:g}, of which nothing tells what is white")
    scale = (255 if high <= 1 else 1) if floats else (1 / 257 if image.mode != "I" or high > 255 else 1)
    return Image.fromarray(np.floor(values * scale + 0.5).astype(np.uint8))


def _crop_start(size: int, target: int) -> int:
    return round((size - target) / 2) if size >= target else -((target - size) // 2)


def _decode(path: str) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.copy()
    except Exception as error:  # decoders raise whatever a damaged file makes them stumble over
        raise ValueError(f"{path}: cannot be decoded ({_one_line(error)})") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def main() -> None:
    """Print the five most probable classes of each image."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="ONNX file that 'vitprune export' wrote")
    parser.add_argument("images", nargs="+", help="image files")
    parser.add_argument("--labels", help="text file with one class name per line, in the order of the model's outputs")
    parser.add_argument("--threads", type=int, default=0, help="of ONNX Runtime's operators (default: it chooses)")
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    args = parser.parse_args()
    for path in (args.model, *args.images, *filter(None, [args.labels])):
        if not Path(path).is_file():
            raise ValueError(f"{path}: no such file")
    session, facts = open_model(args.model, args.threads)
    names = Path(args.labels).read_text("utf-8", "replace").splitlines() if args.labels else facts["class_names"]
    if args.labels and len(names) != facts["num_classes"]:
        raise ValueError(f"{args.labels}: has {len(names)} names, the model has {facts['num_classes']} classes")
    answers = []
    for start in range(0, len(args.images), 32):
        files = args.images[start : start + 32]
        for path, probabilities_C in zip(files, classify(session, facts, files), strict=True):
            top = [(int(index), float(probabilities_C[index])) for index in np.argsort(-probabilities_C)[:5]]
            rows = [{"class": i, "name": names[i] if names else None, "probability": p} for i, p in top]
            answers.append({"file": path, "top": rows})
    if args.json:
        print(json.dumps(answers))
    for answer in () if args.json else answers:
        print(answer["file"])
        for row in answer["top"]:
            print(f"  {row['probability']:.4f}  {row['name'] or row['class']}")


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

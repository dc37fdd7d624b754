"""Options that several commands share."""

from __future__ import annotations

from jsonargparse import ArgumentParser

# What may be said of a model beside its name, its checkpoint and the size of its images.
OPENING = ("checkpoint_key", "model_args", "mean", "std", "crop", "interpolation", "class_names")


def listed(choices) -> str:
    return "; ".join(f"{name}: {summary}" for name, summary in choices.items())


def add_checkpoint(parser: ArgumentParser, *, image_size: bool = True) -> None:
    """Add what may be said of a model beside its name; ``inputs.read_opening`` reads it."""
    parser = parser.add_argument_group("the model, where its name or file does not tell")
    parser.add_argument(
        "--checkpoint", type=str, help="weights: .safetensors, .pth (tensors and plain data), google-research .npz"
    )
    parser.add_argument(
        "--checkpoint-key", type=str, help="which weights of a file that has several, such as model beside model_ema"
    )
    parser.add_argument(
        "--model-args",
        type=str,
        nargs="+",
        metavar="KEY=VALUE",
        help="of timm's create_model, for --checkpoint: num_heads=4 img_size=(160,320); default: what the file tells",
    )
    if image_size:
        parser.add_argument("--image-size", type=int, nargs="+", help="feed images of this height and width instead")
    parser.add_argument(
        "--mean", type=float, nargs="+", help="of the channels of pixels in [0, 1]; default: the model's"
    )
    parser.add_argument("--std", type=float, nargs="+", help="of the channels; default: the model's")
    parser.add_argument("--crop", type=float, help="share of an image's shorter side to use; default: the model's")
    parser.add_argument(
        "--interpolation", type=str, help="to resize images with, such as bicubic; default: the model's"
    )
    parser.add_argument(
        "--class-names", type=str, help="file with the names of the outputs: a line each, or a JSON list"
    )


def add_device(parser: ArgumentParser) -> None:
    parser.add_argument("--device", type=str, help="cpu, cuda, cuda:1, ...; default: cuda where there is one")


def add_images(parser: ArgumentParser, *, required: bool, batch_size: int, what: str) -> None:
    parser = parser.add_argument_group("images")
    parser.add_argument(
        "--data", type=str, required=required, help=f"folder of class folders, list of images, or .tar: {what}"
    )
    parser.add_argument("--class-map", type=str, help="class name per line, CSV of names and indices, or JSON")
    parser.add_argument("--classes", type=str, nargs="+", help="only these: folder names, class indices, English names")
    parser.add_argument("--images-per-class", type=int, help="random sample of each class (default: all)")
    parser.add_argument("--strict", action="store_true", help="refuse undecodable images instead of skipping them")
    parser.add_argument("--batch-size", type=int, default=batch_size, help="images at once")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode images; 0: this one")
    parser.add_argument("--seed", type=int, default=0, help="of every random choice")


def add_output(parser: ArgumentParser, what: str) -> None:
    parser.add_argument("-o", "--output", type=str, required=True, help=what)
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")


def add_ratio(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--ratio", type=float, help="of an elastic file: share of the units of every part to be gone (0)"
    )
    parser.add_argument(
        "--merge", type=str, help="tokens that merge by block, in a model of any kind: as for prune, but not auto"
    )

"""Options that several commands share."""

from __future__ import annotations

from jsonargparse import ArgumentParser


def listed(choices) -> str:
    return "; ".join(f"{name}: {summary}" for name, summary in choices.items())


def add_checkpoint(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", type=str, help="weights: .safetensors, .pth (plain state dict), google-research .npz"
    )


def add_device(parser: ArgumentParser) -> None:
    parser.add_argument("--device", type=str, help="cpu, cuda, cuda:1, ...; default: cuda where there is one")


def add_images(parser: ArgumentParser, *, required: bool, batch_size: int, what: str) -> None:
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

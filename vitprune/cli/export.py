"""``vitprune export``: write an ONNX file and check it against torch."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser

from vitprune import options
from vitprune.cli.arguments import add_checkpoint, add_images, add_ratio, listed
from vitprune.cli.inputs import (
    check_data,
    check_model,
    choose,
    find_images,
    load_model,
    make_batches,
    refuse_without_data,
    report_skipped,
    say_transform,
)
from vitprune.cli.terminal import Tracked
from vitprune.errors import VitpruneError

SUFFIXES = {"onnx": ".onnx", "openvino": ".xml", "torch": ".pt2"}
SUMMARY = "write an ONNX file and check it against torch"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", type=str, help="folder of a saved model, elastic file, or timm name")
    parser.add_argument(
        "output",
        type=str,
        help="to write: ONNX file (.onnx), OpenVINO file (.xml), program of torch.export (.pt2), or a folder",
    )
    parser.add_argument("--format", choices=tuple(options.FORMATS), help=listed(options.FORMATS))
    add_checkpoint(parser)
    add_ratio(parser)
    add_images(parser, required=False, batch_size=16, what="images for parity (default: the plan's calibration)")
    parser.add_argument(
        "--num-images",
        type=int,
        help="images to compare with torch, and to quantise statically with (default: 64, 200)",
    )
    parser.add_argument("--int8", action="store_true", help="the short form of --precision int8")
    parser.add_argument("--precision", choices=tuple(options.PRECISIONS_ONNX), help=listed(options.PRECISIONS_ONNX))
    parser.add_argument(
        "--operators", choices=tuple(options.OPERATORS), default="onnxruntime", help=listed(options.OPERATORS)
    )
    parser.add_argument("--opset", type=int, help="version of ONNX's operators, 18 .. 23 (default: that of torch)")
    parser.add_argument("--fixed-batch", type=int, help="images per run of the file (default: any number)")
    parser.add_argument(
        "--dynamic-size", action="store_true", help="take images of any height and width, where the model has it"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")


def run(
    model, output, format, checkpoint, ratio, merge, data, class_map, classes, images_per_class, strict, batch_size,
    workers, seed, num_images, int8, precision, operators, opset, fixed_batch, dynamic_size, overwrite, **opening,
):  # fmt: skip
    from vitprune.export.onnx_file import export_onnx
    from vitprune.export.torch_program import export_program
    from vitprune.files import refuse_existing
    from vitprune.pruning.plan import find_plan
    from vitprune.twins.to_transformers import TRANSFORMERS_FILES

    refuse_existing(output, overwrite=overwrite, owned=TRANSFORMERS_FILES if format == "transformers" else None)
    format = _pick_format(output, format)
    of_onnx = {"int8": int8, "precision": precision, "opset": opset, "fixed-batch": fixed_batch}
    given = [name for name, value in of_onnx.items() if value]
    if given and format in ("torch", "transformers"):
        raise VitpruneError(f"--{given[0]} is of ONNX and OpenVINO files; leave it out for --format {format}")
    if dynamic_size and format == "transformers":
        raise VitpruneError("--dynamic-size is of files; leave it out for --format transformers")
    if int8 and precision not in (None, "int8"):
        raise VitpruneError(f"--int8 and --precision {precision} contradict each other; leave one out")
    precision = "int8" if int8 else precision or "float32"
    if num_images is None:
        is_static = precision == "int8-static" or (precision == "int8" and Path(output).suffix == ".xml")
        num_images = 200 if is_static else 64
    if num_images < 1:
        raise VitpruneError(f"num_images must be at least 1, got {num_images}")
    refuse_without_data(data, classes=classes, images_per_class=images_per_class)
    check_model(model, checkpoint, opening)
    check_data(data, class_map)
    network = load_model(model, checkpoint, ratio=ratio, merge=merge, opening=opening)
    if format == "transformers":
        return _write_transformers(network, output)
    plan = find_plan(model, ratio)
    if class_map is not None:
        _name_classes(network, class_map)
    if data is not None:
        images = find_images(choose(data, class_map, classes, images_per_class, seed), network, labels_matter=False)
    else:
        images = _calibration_images(model, plan)
    batches = make_batches(images.head(num_images), network, batch_size=batch_size, workers=workers, strict=strict)
    say_transform(network)
    tracked = Tracked(batches, "parity")
    if format == "torch":
        report = export_program(network, output, tracked, plan=plan, dynamic_size=dynamic_size)
    else:
        report = export_onnx(
            network,
            output,
            tracked,
            plan=plan,
            precision=precision,
            operators=operators,
            batch_size=fixed_batch,
            opset=opset,
            dynamic_size=dynamic_size,
        )
    answer = {
        "path": output,
        "precision": report.precision,
        "max_abs_diff": report.max_abs_diff,
        "top1_agreement": report.top1_agreement,
        "top1": report.top1,
        "mean_cosine": report.mean_cosine,
        "size_bytes": report.size_bytes,
        "num_images": report.num_images,
        "near_ties": report.near_ties,
        "float32": None if report.float32 is None else vars(report.float32),
        "speedup": None if report.speedup is None else vars(report.speedup),
        "skipped": report_skipped(batches),
    }

    def show() -> None:
        from vitprune.recipe.shipped import find_server

        print(report)
        server = find_server()
        if Path(output).suffix == ".onnx" and server is not None and network.num_classes:
            print(f"answer without torch: python {server} {output} IMAGE")

    return answer, show


def _name_classes(network, class_map: str) -> None:
    """Tell a model what a class map calls its classes, where it does not know."""
    from vitprune.data import label_names_of
    from vitprune.images.class_map import names_in_order, read_class_map

    numbered, known = read_class_map(class_map), label_names_of(network)
    names = names_in_order(numbered, network.num_classes)
    if not names:
        raise VitpruneError(
            f"{class_map} has {len(numbered)} names, not one for each of the {network.num_classes} classes"
        )
    if known and list(known) != list(names):
        place = next(place for place, pair in enumerate(zip(known, names, strict=True)) if pair[0] != pair[1])
        raise VitpruneError(
            f"{class_map} calls class {place} '{names[place]}', the model '{known[place]}'; leave --class-map out"
        )
    network.label_names = names


def _pick_format(output: str, asked: str | None) -> str:
    """Return what is to be written: as asked for, which the name must fit, else by the name."""
    suffix = Path(output).suffix
    by_suffix = next((name for name, known in SUFFIXES.items() if known == suffix), None)
    if asked is None and by_suffix is None:
        raise VitpruneError(
            f"{output}: an ONNX file ends in .onnx, OpenVINO's in .xml, a program of torch.export in .pt2; "
            "--format transformers writes a folder"
        )
    if asked is not None and asked != "transformers" and SUFFIXES[asked] != suffix:
        raise VitpruneError(f"{output}: --format {asked} writes a file that ends in {SUFFIXES[asked]}")
    if asked == "transformers" and by_suffix is not None:
        raise VitpruneError(f"{output}: --format transformers writes a folder")
    return asked or by_suffix


def _write_transformers(network, output: str):
    from vitprune.twins.to_transformers import TRANSFORMERS_FILES, save_transformers

    save_transformers(network, output)
    answer = {"path": output, "format": "transformers", "files": sorted(TRANSFORMERS_FILES)}
    return answer, lambda: print(f"wrote {output}: {', '.join(sorted(TRANSFORMERS_FILES))}")


def _calibration_images(model: str, plan):
    from vitprune.data import ImageSet

    seen = None if plan is None else plan.facts.calibration
    if seen is None or seen.data is None or not Path(seen.data).exists():
        raise VitpruneError(f"parity needs real images and {model} names none that are there; pass --data DIR")
    return ImageSet(Path(seen.data), seen.files, seen.labels)

"""``vitprune convert``: read result files of the paper's authors as a run, or write runs as such files."""

from __future__ import annotations

from jsonargparse import ArgumentParser

from vitprune import options
from vitprune.cli.arguments import add_checkpoint, add_device, add_output, listed
from vitprune.cli.inputs import check_data, check_model, choose, find_images, load_model, pick_device
from vitprune.cli.terminal import Tracked, note
from vitprune.errors import VitpruneError

SUMMARY = "read result files of the paper's authors as a run, or write runs as such files or as numpy arrays"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "sources",
        type=str,
        nargs="+",
        help="PREFIX.args.json of the authors' program; or run folders of 'discover', of the same images, one per "
        "method, to write",
    )
    parser.add_argument("--model", type=str, help="that the paths were found on: timm name or folder of a saved model")
    add_checkpoint(parser)
    parser.add_argument("--data", type=str, help="folder of class folders: the images of the paths")
    parser.add_argument("--class-map", type=str, help="class name per line, CSV of names and indices, or JSON")
    parser.add_argument("--classes", type=str, nargs="+", help="only these: folder names, class indices, English names")
    methods = options.AUTHORS_METHODS
    parser.add_argument("--method", choices=tuple(methods), help=f"whose paths to read; {listed(methods)} (jas)")
    parser.add_argument(
        "--least-agreement",
        type=float,
        help="refuse if the model agrees with less of the activation neurons (or scores) in the files; 0.9",
    )
    parser.add_argument("--batch-size", type=int, default=32, help="images at once")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode images; 0: this one")
    parser.add_argument(
        "--activations", action="store_true", help="of a run as .npz: what every layer computes of its images as well"
    )
    add_device(parser)
    add_output(parser, "run folder to write; for runs: folder and PREFIX of the files, or of one run a file .npz")


def run(
    sources, model, checkpoint, data, class_map, classes, method, least_agreement, batch_size, workers, activations,
    device, output, overwrite, **opening,
):  # fmt: skip
    from vitprune.discovery.run import is_run

    others = [source for source in sources if not is_run(source)]
    as_arrays = str(output).endswith(".npz")
    if activations and not as_arrays:
        raise VitpruneError("--activations is for a run that is written as arrays; name an output that ends in .npz")
    if others and len(sources) > 1:
        raise VitpruneError(f"name one PREFIX.args.json, or only runs; {others[0]} is no run")
    if not others:
        unused = {
            "model": model,
            "checkpoint": checkpoint,
            "data": data,
            "class_map": class_map,
            "classes": classes,
            "method": method,
            "least_agreement": least_agreement,
            **({} if activations else {"device": device}),
            **opening,
        }
        given = [name for name, value in unused.items() if value is not None]
        if given:
            raise VitpruneError(f"{', '.join(given)}: not for writing runs, which bring theirs; leave out")
        if as_arrays:
            return _write_arrays(sources, activations, batch_size, workers, device, output, overwrite)
        return _write(sources, output, overwrite)
    choice = None if data is None else choose(data, class_map, classes)
    return _read(
        sources[0], model, checkpoint, choice, method or "jas", least_agreement, batch_size, workers, device, output,
        overwrite, **opening,
    )  # fmt: skip


def _read(
    source, model, checkpoint, choice, method, least_agreement, batch_size, workers, device, output, overwrite,
    **opening,
):  # fmt: skip
    from vitprune.discovery.run import RUN_FILES, save_run
    from vitprune.files import refuse_existing
    from vitprune.interop.adopt import LEAST_AGREEMENT
    from vitprune.interop.authors import read_authors
    from vitprune.interop.convert import read_as_run

    refuse_existing(output, overwrite=overwrite, owned=RUN_FILES)
    paths = read_authors(source, method=method)
    _require(paths.args, model, choice)
    check_model(model, checkpoint, opening)
    if choice is not None:
        check_data(choice.root, choice.class_map)
    network = load_model(model, checkpoint, pick_device(device), opening=opening)
    converted = read_as_run(
        paths,
        network,
        find_images(choice, network),
        name=model,
        checkpoint=checkpoint,
        least_agreement=LEAST_AGREEMENT if least_agreement is None else least_agreement,
        batch_size=batch_size,
        num_workers=workers,
        note=note,
        track=Tracked,
    )
    save_run(converted.run, output)
    found, agreement = converted.run.found, converted.agreement
    answer = {
        "output": output,
        "method": found.method,
        "num_images": len(found.labels),
        "num_classes": len(found.classes),
        "top_k": found.neurons.shape[-1],
        "tokens": found.tokens,
        "quadrature": found.quadrature,
        "mean_joint_score": found.joint_scores.mean().item(),
        "joint_scores": "computed" if converted.scores_computed else "read",
        "compared": agreement.compared,
        "agreement": agreement.share,
        "transform": converted.transform,
        "transform_differs": list(converted.differs),
        "classes_without_paths": list(converted.without_paths),
    }

    def show() -> None:
        print(
            f"{len(found.labels)} {found.method} paths of {len(found.classes)} classes, {answer['top_k']} neurons per "
            f"FFN, tokens {found.tokens}; mean joint score {answer['mean_joint_score']:.3f} ({answer['joint_scores']})"
        )
        if agreement.compared is None:
            print("nothing in the files can be compared with the model: its weights and images are taken on trust")
        else:
            print(
                f"the model agrees with {agreement.share:.2%} of the {agreement.compared} in the files "
                f"({agreement.num_images} images)"
            )
        if converted.differs:
            differs = ", ".join(converted.differs)
            print(f"images prepared as the authors' program does, other than the model's own: {differs}")
        print("the files hold no scores of the other neurons: for prune --criterion jas, run 'vitprune discover'")
        print(f"wrote {output}")

    return answer, show


def _require(args, model: str | None, choice) -> None:
    """Ask for what the files lack, with what they say of it."""
    from vitprune.interop.convert import name_model

    if model is None:
        name, weights = name_model(args), args.get("pretrain_weight")
        hint = f", such as {name}" if name else ""
        weights_hint = f" with --checkpoint {weights}" if weights else ""
        raise VitpruneError(f"say which model the paths were found on with --model{hint}{weights_hint}")
    if choice is None:
        raise VitpruneError(f"name the images of the paths with --data (theirs were at {args.get('dataset_path')})")


def _write_arrays(sources, activations, batch_size, workers, device, output, overwrite):
    from vitprune.data import ImageBatches
    from vitprune.discovery.run import load_run, open_run
    from vitprune.files import refuse_existing
    from vitprune.interop.arrays import record_activations, write_arrays

    if len(sources) > 1:
        raise VitpruneError(f"one run is written as arrays, got {len(sources)}; write each to a file of its own")
    refuse_existing(output, overwrite=overwrite)
    recorded = None
    if activations:
        opened, network = open_run(sources[0], device=pick_device(device))
        images = ImageBatches(
            opened.images,
            network,
            batch_size=batch_size,
            num_workers=workers,
            strict=True,
            transform=opened.transform,
        )
        recorded = record_activations(network, Tracked(images, "activations"), opened.found)
    else:
        opened = load_run(sources[0])
    write_arrays(opened, output, activations=recorded)
    found = opened.found
    answer = {
        "output": str(output),
        "methods": [found.method],
        "num_images": len(found.labels),
        "num_classes": len(found.classes),
    }

    def show() -> None:
        print(f"{answer['num_images']} {found.method} paths of {answer['num_classes']} classes")
        print(f"wrote {output}: arrays, with the names of the places in timm and in Prisma")

    return answer, show


def _write(sources, output, overwrite):
    from vitprune.discovery.run import load_run
    from vitprune.files import refuse_existing
    from vitprune.interop.authors import ARGS_SUFFIX, write_authors

    prefix = str(output).removesuffix(ARGS_SUFFIX)
    refuse_existing(prefix + ARGS_SUFFIX, overwrite=overwrite)
    runs = [load_run(source) for source in sources]
    files = write_authors(runs, prefix)
    answer = {
        "output": str(files[0]),
        "methods": [each.found.method for each in runs],
        "num_images": len(runs[0].images),
        "num_classes": len(files) - 1,
    }

    def show() -> None:
        print(f"{answer['num_images']} images of {answer['num_classes']} classes: {', '.join(answer['methods'])}")
        print("left out, as their files have no place for it: class scores, predictions")
        print(f"wrote {files[0]} and {len(files) - 1} files beside it")

    return answer, show

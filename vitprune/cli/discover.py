"""``vitprune discover``: find the neuron paths of images and the scores of every class."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from vitprune import options
from vitprune.cli.arguments import add_checkpoint, add_device, add_images, add_output, listed
from vitprune.cli.inputs import as_stored, choose_images, load_model, pick_device
from vitprune.cli.terminal import note, print_table, track
from vitprune.errors import VitpruneError

SUMMARY = "find the neuron paths of images and the scores of every class"


# A run names its images in the header of a safetensors file, which may have 100 MB.
MOST_NAME_BYTES = 80_000_000


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", type=str, help="timm name or folder of a saved model")
    add_checkpoint(parser)
    add_images(parser, required=True, batch_size=8, what="images to find paths on")
    parser.add_argument("--method", choices=tuple(options.METHODS), default="jas", help=listed(options.METHODS))
    parser.add_argument("--top-k", type=int, default=1, help="neurons per FFN on a path")
    parser.add_argument(
        "--tokens",
        choices=tuple(options.TOKENS),
        help=listed(options.TOKENS) + "; default: cls where the head reads the class token, else patch",
    )
    parser.add_argument(
        "--quadrature",
        type=str,
        help="adaptive (2 nodes, 5 for several tokens, up to 23 in doubt; default of jas and jas-complete), "
        "gauss-legendre:NODES (default of the other methods: gauss-legendre:8), riemann:STEPS (the paper: riemann:20)",
    )
    parser.add_argument(
        "--target", type=str, default="label", help=listed(options.TARGET_CLASSES) + "; or a class for all images"
    )
    parser.add_argument(
        "--quantity",
        choices=tuple(options.QUANTITIES),
        default="probability",
        help=f"what of the target class is attributed: {listed(options.QUANTITIES)}",
    )
    parser.add_argument(
        "--precision",
        choices=tuple(options.PRECISIONS),
        default="float32",
        help=listed(options.PRECISIONS) + "; what its noise could change is decided again in float32",
    )
    parser.add_argument(
        "--shard-size", type=int, default=256, help="images per shard: a killed process loses its unfinished shard"
    )
    parser.add_argument(
        "--memory", type=float, help="GiB to use beside the weights (2 on a CPU, 80 percent of what is free on a GPU)"
    )
    add_device(parser)
    add_output(parser, "run folder to write; a killed run goes on")


def run(
    model, checkpoint, data, class_map, classes, images_per_class, strict, batch_size, workers, seed, method, top_k,
    tokens, quadrature, target, quantity, precision, shard_size, memory, device, output, overwrite,
):  # fmt: skip
    import time

    from vitprune.data import describe_class, digest_images
    from vitprune.discovery.discover import class_paths, count_correct, plan_search
    from vitprune.discovery.memory import budget_bytes
    from vitprune.discovery.run import PATHS_FILE, RUN_FILES, Run, save_run
    from vitprune.discovery.shards import Shards, find_shards, read_shards, share
    from vitprune.files import held, open_resumable, refuse_existing
    from vitprune.processes import join_processes
    from vitprune.progress import untracked

    refuse_existing(output, overwrite=overwrite, owned=RUN_FILES)
    if batch_size < 1 or shard_size < 1:
        name, value = ("batch_size", batch_size) if batch_size < 1 else ("shard_size", shard_size)
        raise VitpruneError(f"{name} must be at least 1, got {value}")
    folder = Path(output).absolute().with_name(f"{Path(output).absolute().name}.shards")
    with contextlib.ExitStack() as stack:
        processes = stack.enter_context(join_processes())
        network = load_model(model, checkpoint, pick_device(device, processes))
        images = choose_images(network, data, class_map, classes, images_per_class, seed)
        if sum(map(len, images.files)) > MOST_NAME_BYTES:
            raise VitpruneError(f"{len(images)} images are too many to name in one run; take some --classes at a time")
        search = plan_search(
            network,
            method=method,
            top_k=top_k,
            tokens=tokens,
            quadrature=quadrature,
            target=_target_class(images, target),
            quantity=quantity,
            precision=precision,
            seed=seed,
        )
        budget_bytes(memory, next(network.parameters()).device)
        request = _describe_search(network, search, images, batch_size, shard_size)
        shards = Shards(folder, request, images, batch_size, -(-shard_size // batch_size))
        if processes.rank == 0:
            stack.enter_context(held(folder.with_name(f"{folder.name}.lock"), what=folder))
            # Of the request before as well, which may have had more shards.
            owned = {path.name for path in folder.glob("shard-*.safetensors")}
            owned = frozenset(owned.union(shards.path(number).name for number in range(len(shards))))
            open_resumable(folder, request, owned=owned, overwrite=overwrite)
        processes.wait()
        missing = shards.missing(strict=strict)
        processes.wait()  # or another process might see fewer missing
        if len(missing) < len(shards) and processes.rank == 0:
            note(f"{len(shards) - len(missing)} of {len(shards)} shards are there already")
        started = time.perf_counter()
        with _keeping_what_is_finished(shards, processes):
            find_shards(
                network,
                search,
                shards,
                share(missing, processes),
                num_workers=workers,
                strict=strict,
                memory_gib=memory,
                track=track if processes.rank == 0 else untracked,
            )
            processes.wait()
            if processes.rank > 0:
                return None
            absent = shards.missing(strict=strict)
            if absent:
                raise VitpruneError(
                    f"{len(absent)} of {len(shards)} shards are missing, or of other images or arguments than these "
                    "(were all processes started alike, and do they see the same files?)"
                )
        seconds = time.perf_counter() - started
        num_searched = sum(len(shards.places(number)) for number in missing)
        found, used, hashes, skipped = read_shards(search, shards)
        if skipped:
            note(f"skipped {len(skipped)} images that cannot be decoded (first: {skipped[0]})")
        run = Run(
            found=found,
            images=used,
            model=as_stored(model),
            checkpoint=None if checkpoint is None else str(Path(checkpoint).resolve()),
            weights_sha256=request["weights"],
            images_sha256=digest_images(hashes),
            model_transform=request["transform"],
        )
        save_run(run, output)
        shards.remove()
    paths = class_paths(found)
    num_correct, num_images = (each.tolist() for each in count_correct(found))
    answer = {
        "num_images": len(found.labels),
        "paths": str(Path(output) / PATHS_FILE),
        "seconds": seconds,
        "output": output,
        "mean_joint_score": found.joint_scores.mean().item(),
        "class_paths": {images.class_names[index]: path.tolist() for index, path in paths.items()},
        "class_num_images": {images.class_names[index]: num_images[row] for row, index in enumerate(paths)},
        "class_num_correct": {images.class_names[index]: num_correct[row] for row, index in enumerate(paths)},
        "skipped": skipped,
    }
    if found.completeness_errors is not None:
        answer["max_completeness_error"] = found.completeness_errors.max().item()

    def show() -> None:
        rows = []
        for row, (index, path) in enumerate(list(paths.items())[:20]):
            members = found.labels == index
            rows.append(
                (
                    describe_class(images.class_names[index]),
                    str(num_images[row]),
                    str(num_correct[row]),
                    f"{found.joint_scores[members].mean():.3f}",
                    " ".join(str(int(neuron)) for neuron in path[:, 0]),
                )
            )
        suffix = "" if top_k == 1 else f" (first of {top_k} neurons per FFN)"
        print_table(f"class paths{suffix}", ("class", "images", "correct", "mean JAS", "neuron by FFN"), rows)
        if len(paths) > 20:
            print(f"... and {len(paths) - 20} more classes")
        if "max_completeness_error" in answer:
            print(f"largest completeness error {answer['max_completeness_error']:.2e}")
        rate = f" ({seconds / num_searched:.2f} s per image)" if num_searched else ""
        earlier = len(images) - num_searched
        print(
            f"{len(found.labels)} images"
            + (f", {earlier} of them searched before" if earlier else "")
            + f", in {seconds:.1f} s{rate}"
        )
        print(f"wrote {output}")

    return answer, show


def _target_class(images, target: str) -> str | int:
    """Return the class that is meant: as for --classes, or the index of a class without images."""
    from vitprune.data import find_class

    names = images.class_names
    if target in options.TARGET_CLASSES or (target.isdecimal() and target not in names.values()):
        return int(target) if target.isdecimal() else target
    return find_class(images.root, names, target)


@contextlib.contextmanager
def _keeping_what_is_finished(shards, processes) -> Iterator[None]:
    """Say what an interruption leaves behind; nothing, if no shard is finished."""
    try:
        yield
    except BaseException:
        finished = len(shards) - len(shards.missing())
        if finished and processes.rank == 0:
            note(f"{finished} of {len(shards)} shards are kept in {shards.folder}; the same command goes on from there")
        elif not finished and processes.count == 1:
            shards.remove()
        raise


def _describe_search(network, search, images, batch_size: int, shard_size: int) -> dict[str, Any]:
    """Say what the shards of a search depend on; the files of each are looked at beside that."""
    import hashlib

    from vitprune import __version__
    from vitprune.data import data_config
    from vitprune.models.identity import architecture, hash_weights

    listed = json.dumps([images.files, images.labels])
    return {
        "vitprune": __version__,
        "architecture": architecture(network),
        "transform": data_config(network),
        "weights": hash_weights(network),
        "data folder": str(images.root),
        "list of images": hashlib.sha256(listed.encode()).hexdigest()[:16],
        "method": search.method,
        "top_k": search.top_k,
        "tokens": search.tokens,
        "quadrature": search.rule.name,
        "target": search.objective.target,
        "quantity": search.objective.quantity,
        "precision": search.precision,
        **({"seed": search.seed} if search.method == "random" else {}),
        "batch size": batch_size,
        "shard size": shard_size,
    }

"""``vitprune discover``: find the neuron paths of images and the scores of every class."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser

from vitprune import options
from vitprune.cli.arguments import add_checkpoint, add_device, add_images, add_output, listed
from vitprune.cli.inputs import check_data, check_model, choose, find_images, load_model, pick_device, say_transform
from vitprune.cli.terminal import note, print_table, track

SUMMARY = "find the neuron paths of images and the scores of every class"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", type=str, help="timm name or folder of a saved model")
    add_checkpoint(parser)
    add_images(parser, required=True, batch_size=8, what="images to find paths on")
    parser.add_argument("--method", choices=tuple(options.METHODS), default="jas", help=listed(options.METHODS))
    parser.add_argument("--top-k", type=int, default=1, help="neurons per FFN (dimensions per attention) on a path")
    parser.add_argument(
        "--nodes",
        nargs="+",
        choices=tuple(options.NODES),
        default=["ffn"],
        help=f"what paths go through: {listed(options.NODES)}; with both, two stations in every block",
    )
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
    nodes, tokens, quadrature, target, quantity, precision, shard_size, memory, device, output, overwrite, **opening,
):  # fmt: skip
    from vitprune.data import describe_class
    from vitprune.discovery.discover import class_paths, count_correct, has_class_scores
    from vitprune.discovery.discover_run import discover_run
    from vitprune.discovery.heads import head_scores, node_names
    from vitprune.discovery.run import PATHS_FILE, RUN_FILES
    from vitprune.files import refuse_existing
    from vitprune.processes import join_processes

    refuse_existing(output, overwrite=overwrite, owned=RUN_FILES)
    check_model(model, checkpoint, opening)
    check_data(data, class_map)
    with join_processes() as processes:
        network = load_model(model, checkpoint, pick_device(device, processes), opening=opening)
        of_classes = bool(network.num_classes) or quantity != "cosine"
        choice = choose(data, class_map, classes, images_per_class, seed)
        images = find_images(choice, network, labels_matter=of_classes)
        say_transform(network)
        discovered = discover_run(
            network,
            images,
            output,
            source=model,
            checkpoint=checkpoint,
            batch_size=batch_size,
            num_workers=workers,
            strict=strict,
            shard_size=shard_size,
            memory_gib=memory,
            overwrite=overwrite,
            processes=processes,
            track=track,
            note=note,
            method=method,
            top_k=top_k,
            nodes=nodes,
            tokens=tokens,
            quadrature=quadrature,
            target=target,
            quantity=quantity,
            precision=precision,
            seed=seed,
        )
    if discovered is None:
        return None
    run, progress = discovered
    found, seconds, num_searched = run.found, progress.seconds, progress.num_searched
    paths, named = class_paths(found), node_names(found)
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
        "skipped": list(progress.skipped),
    }
    if found.heads and has_class_scores(found):
        answer["class_heads"] = {
            images.class_names[index]: {name: scores[row].tolist() for name, scores in head_scores(found).items()}
            for row, index in enumerate(found.classes)
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
                    " ".join(named(layer, int(node)) for layer, node in zip(found.layers, path[:, 0], strict=True)),
                )
            )
        what = "node by layer (attention: head.dimension)" if found.heads else "neuron by FFN"
        suffix = "" if top_k == 1 else f" (first of {top_k} {'nodes per layer' if found.heads else 'neurons per FFN'})"
        print_table(f"class paths{suffix}", ("class", "images", "correct", "mean JAS", what), rows)
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
        print(
            f"next: 'vitprune analyze {output} -o DIR' for what its paths do, 'vitprune prune {output} -o DIR' to prune"
        )

    return answer, show

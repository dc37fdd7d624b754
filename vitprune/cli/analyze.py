"""``vitprune analyze``: mask all but the top neurons of each class, as the paper does."""

from __future__ import annotations

from jsonargparse import ArgumentParser

from vitprune import options
from vitprune.cli.arguments import add_device, add_images, listed
from vitprune.cli.inputs import (
    choose_images,
    describe_calibration,
    make_batches,
    open_source,
    plan_of,
    refuse_shared,
    report_skipped,
)
from vitprune.cli.terminal import print_table, track
from vitprune.errors import VitpruneError

SUMMARY = "mask all but the top neurons of each class, as the paper does"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=str, help="run folder of 'discover'")
    add_images(parser, required=True, batch_size=50, what="test images, other than the run's")
    parser.add_argument(
        "--top-k", type=int, nargs="+", default=[1, 5, 10, 20, 50], help="neurons per FFN that are never masked"
    )
    parser.add_argument(
        "--mask-share", type=float, nargs="+", default=[0.1, 0.3, 0.5, 1.0], help="shares of the others to mask"
    )
    parser.add_argument(
        "--tokens", type=str, nargs="+", default=["cls", "all"], help=f"where to mask: {listed(options.TOKENS)}"
    )
    parser.add_argument("--depth", type=int, help="mask in the first so many FFNs only")
    add_device(parser)


def run(
    run, data, class_map, classes, images_per_class, strict, batch_size, workers, seed, top_k, mask_share, tokens,
    depth, device,
):  # fmt: skip
    from dataclasses import asdict

    from vitprune.evaluation.topk_mask import measure_topk_mask

    source, (run, network) = run, open_source(run, None, device)
    if run is None:
        raise VitpruneError(f"{source} is no run; run 'vitprune discover MODEL --data DIR -o RUN' first")
    for scope in tokens:
        options.check_choice("tokens", scope, options.TOKENS)
    images = choose_images(network, data, class_map, classes, images_per_class, seed)
    refuse_shared(images, describe_calibration(run.images, None, plan_of(run.model))["sha256"], source)
    batches = make_batches(images, network, batch_size=batch_size, workers=workers, strict=strict)
    rows = measure_topk_mask(
        network,
        batches,
        run.found,
        top_ks=top_k,
        mask_shares=mask_share,
        tokens=tokens,
        depth=depth,
        track=track,
    )
    answer = {"rows": [asdict(row) for row in rows], "skipped": report_skipped(batches)}

    def show() -> None:
        cells = [
            (
                row.mask,
                row.tokens,
                str(row.top_k),
                f"{row.mask_share:.0%}",
                str(row.num_neurons_masked),
                f"{row.probability:.4f}",
                f"{row.top1:.4f}",
            )
            for row in rows
        ]
        columns = ("mask", "tokens", "top-K", "masked of others", "neurons", "probability", "top-1")
        print_table(f"top-K neurons of each class ({rows[0].num_images} images)", columns, cells)
        print("oracle class: each image is masked by the scores of its true class, which no deployed model knows")

    return answer, show

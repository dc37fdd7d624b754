"""``vitprune analyze``: the paper's experiments on the paths of one or several runs."""

from __future__ import annotations

from collections.abc import Iterable

from jsonargparse import ArgumentParser

from vitprune import options
from vitprune.cli.arguments import add_device, add_images, listed
from vitprune.cli.inputs import check_data, choose, find_images, pick_device, refuse_without_data, say_transform
from vitprune.cli.terminal import note, show_table, track
from vitprune.errors import VitpruneError

SUMMARY = "repeat the paper's experiments on the paths of runs: scores, manipulation, similarity, top-K"

# Those of vitprune.analysis.topk_mask, which help does not wait for.
TOP_KS, MASK_SHARES = (1, 5, 10, 20, 50), (0.1, 0.3, 0.5, 1.0)


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "runs",
        type=str,
        nargs="+",
        help="run folders of 'discover', of the same model and images; the first is compared",
    )
    parser.add_argument(
        "--experiments",
        type=str,
        nargs="+",
        help=f"{listed(options.EXPERIMENTS)}; default: all but edges, cards, faithfulness and topk-mask, and transfer "
        "only with --data",
    )
    add_images(
        parser,
        required=False,
        batch_size=50,
        what="images other than the run's, for transfer, faithfulness and topk-mask",
    )
    parser.add_argument(
        "--factors", type=float, nargs="+", default=[0.0, 2.0], help="path neurons are multiplied by: 0 removes them"
    )
    parser.add_argument(
        "--tokens",
        type=str,
        nargs="+",
        help=f"where: {listed(options.TOKENS)}; default: the run's, and for faithfulness and topk-mask all as well",
    )
    parser.add_argument(
        "--top-k", type=int, nargs="+", help=f"topk-mask: neurons per FFN never masked ({_listed_numbers(TOP_KS)})"
    )
    parser.add_argument(
        "--mask-share",
        type=float,
        nargs="+",
        help=f"topk-mask: shares of the others to mask ({_listed_numbers(MASK_SHARES)})",
    )
    parser.add_argument("--depth", type=int, help="topk-mask: in the first so many FFNs only")
    parser.add_argument(
        "--ablations",
        nargs="+",
        choices=tuple(options.ABLATIONS),
        help=f"faithfulness: what neurons are set to: {listed(options.ABLATIONS)}; default: zero mean",
    )
    parser.add_argument(
        "--rank-by",
        nargs="+",
        choices=("class", "image"),
        help="faithfulness: by the scores of the class in the run, or by each image's own, which are searched for; "
        "default: class",
    )
    parser.add_argument(
        "--criteria",
        nargs="+",
        choices=tuple(options.CRITERIA),
        help="faithfulness: criteria of pruning to compare with, by the images of the run",
    )
    parser.add_argument(
        "--concepts",
        type=str,
        help="cards: .npz with the similarity of every image of the run and every concept, by any model of images and "
        "texts: arrays concepts, similarity, files",
    )
    parser.add_argument("--pairs", type=int, default=50, help="similarity: most and least similar classes to name")
    parser.add_argument(
        "--wordnet",
        type=str,
        help="similarity: folder of WordNet 3.0's data.noun, for classes named by it; default: where installed",
    )
    add_device(parser)
    parser.add_argument("-o", "--output", type=str, help="folder to write; a killed analysis goes on there")
    parser.add_argument("--overwrite", action="store_true", help="replace an output of other runs or images")


def _listed_numbers(numbers: Iterable[float]) -> str:
    return " ".join(f"{number:g}" for number in numbers)


def run(
    runs, experiments, data, class_map, classes, images_per_class, strict, batch_size, workers, seed, factors, tokens,
    top_k, mask_share, depth, ablations, rank_by, criteria, concepts, pairs, wordnet, device, output, overwrite,
):  # fmt: skip
    from vitprune.analysis.analysis_figures import save_analysis_figures
    from vitprune.analysis.analysis_folder import describe_analysis, save_analysis
    from vitprune.analysis.analysis_tables import analysis_tables
    from vitprune.analysis.analyze import analyze, load_runs
    from vitprune.data import remember_names
    from vitprune.discovery.run import is_run
    from vitprune.files import check_place

    if output is not None:
        check_place(output, is_folder=True)
    refuse_without_data(data, class_map=class_map, classes=classes, images_per_class=images_per_class)
    for source in runs:
        if not is_run(source):
            raise VitpruneError(f"{source} is no run; run 'vitprune discover MODEL --data DIR -o RUN' first")
    opened = load_runs(runs)
    first = next(iter(opened.values()))
    check_data(data, class_map)
    network = first.load(pick_device(device))
    remember_names(network, first.images.label_names)
    say_transform(network)
    others = None
    if data is not None:
        others = find_images(choose(data, class_map, classes, images_per_class, seed), network)
    analysis = analyze(
        network,
        opened,
        others=others,
        experiments=experiments,
        factors=factors,
        tokens=tokens,
        top_k=top_k,
        mask_share=mask_share,
        depth=depth,
        ablations=ablations,
        rank_by=rank_by,
        criteria=criteria,
        concepts=concepts,
        num_pairs=pairs,
        wordnet=wordnet,
        seed=seed,
        batch_size=batch_size,
        num_workers=workers,
        strict=strict,
        sources=dict(zip(opened, runs, strict=True)),
        folder=output,
        overwrite=overwrite,
        note=note,
        track=track,
    )
    if output is not None:
        save_analysis(analysis, output, runs=opened)
        save_analysis_figures(analysis, output, runs=opened, track=track)

    def show() -> None:
        for table in analysis_tables(analysis):
            show_table(table)
        if output is not None:
            print(f"wrote {output}: analysis.json, figures as .png and .svg")

    return {"output": output, **describe_analysis(analysis)}, show

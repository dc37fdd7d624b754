"""``vitprune analyze``: the paper's experiments on the paths of one or several runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from vitprune import options
from vitprune.cli.arguments import add_device, add_images, listed
from vitprune.cli.inputs import (
    choose_images,
    describe_calibration,
    images_of,
    make_batches,
    open_source,
    plan_of,
    refuse_shared,
    refuse_without_data,
    report_skipped,
)
from vitprune.cli.terminal import note, show_table, track
from vitprune.errors import VitpruneError

SUMMARY = "repeat the paper's experiments on the paths of runs: scores, manipulation, similarity, top-K"

NEED_DATA = ("transfer", "topk-mask")
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
        help=f"{listed(options.EXPERIMENTS)}; default: all but topk-mask, and transfer only with --data",
    )
    add_images(parser, required=False, batch_size=50, what="images other than the run's, for transfer and topk-mask")
    parser.add_argument(
        "--factors", type=float, nargs="+", default=[0.0, 2.0], help="path neurons are multiplied by: 0 removes them"
    )
    parser.add_argument(
        "--tokens",
        type=str,
        nargs="+",
        help=f"where: {listed(options.TOKENS)}; default: the run's, and for topk-mask all as well",
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
    top_k, mask_share, depth, pairs, wordnet, device, output, overwrite,
):  # fmt: skip
    from vitprune.analysis.analysis_views import ANALYSIS_FILES, analysis_tables, render_analysis
    from vitprune.analysis.experiments import run_experiments
    from vitprune.files import FORMAT_VERSION, open_resumable, write_json, write_tensors
    from vitprune.models.identity import architecture

    for scope in tokens or ():
        options.check_choice("tokens", scope, options.TOKENS)
    refuse_without_data(data, class_map=class_map, classes=classes, images_per_class=images_per_class)
    opened, network = _open_runs(runs, device)
    first = next(iter(opened.values()))
    chosen = _choose_experiments(experiments, first.found, with_data=data is not None)
    unused = {"--top-k": top_k, "--mask-share": mask_share, "--depth": depth}
    unused = [name for name, value in unused.items() if value is not None]
    if unused and "topk-mask" not in chosen:
        raise VitpruneError(f"{', '.join(unused)}: for the experiment topk-mask; add --experiments topk-mask")
    own = images_of(runs[0], first, network, None, None, None, None, seed)
    reading = {"batch_size": batch_size, "workers": workers, "transform": first.transform}
    batches = make_batches(own, network, strict=True, **reading)
    others = other_batches = None
    if data is not None:
        others = choose_images(network, data, class_map, classes, images_per_class, seed)
        used = describe_calibration(own, None, *(plan_of(each.model) for each in opened.values()))
        refuse_shared(others, used["sha256"], runs[0])
        other_batches = make_batches(others, network, strict=strict, **reading)
    folder = None
    if output is not None:
        request = _describe_analysis(runs, network, own, others, first.transform, seed)
        folder = open_resumable(output, request, owned=ANALYSIS_FILES, overwrite=overwrite)
    found = {method: each.found for method, each in opened.items()}
    class_names = {**first.images.class_names, **({} if others is None else others.class_names)}
    results = run_experiments(
        chosen,
        network,
        found,
        batches,
        other_batches,
        class_names=class_names,
        factors=factors,
        tokens=tokens,
        top_ks=TOP_KS if top_k is None else top_k,
        mask_shares=MASK_SHARES if mask_share is None else mask_share,
        depth=depth,
        num_pairs=pairs,
        wordnet=_find_wordnet(wordnet, first.images.class_names.values()) if "similarity" in chosen else None,
        seed=seed,
        folder=None if folder is None else folder / "passes",
        track=track,
    )
    cosines = _take_cosines(results)
    content = {
        "architecture": architecture(network),
        "weights_sha256": first.weights_sha256,
        "class_names": {str(index): name for index, name in class_names.items()},
        "runs": [
            {
                "source": source,
                "method": method,
                "tokens": each.found.tokens,
                "quadrature": each.found.quadrature,
                "top_k": each.found.neurons.shape[-1],
                "num_images": len(each.images),
            }
            for source, (method, each) in zip(runs, opened.items(), strict=True)
        ],
        "experiments": chosen,
        **results,
        "skipped": [] if other_batches is None else report_skipped(other_batches),
    }
    if folder is not None:
        if cosines:
            write_tensors(
                folder / "similarity.safetensors", cosines, kind="similarity", facts={"classes": first.found.classes}
            )
        write_json(folder / "analysis.json", {"kind": "analysis", "version": FORMAT_VERSION, **content})
        render_analysis(content, folder / "figures", runs=found, images=own, cosines=cosines, track=track)
    answer = {"output": output, **content}

    def show() -> None:
        for table in analysis_tables(content):
            show_table(table)
        if output is not None:
            print(f"wrote {output}: analysis.json, figures as .png and .svg")

    return answer, show


def _choose_experiments(experiments: Sequence[str] | None, found: Any, *, with_data: bool) -> list[str]:
    if experiments is None:
        left_out = {"topk-mask"} if with_data else set(NEED_DATA)
        if min(found.labels.unique(return_counts=True)[1]) < 2:
            note("left out halves: some classes have one image in the run, which has no halves")
            left_out.add("halves")
        return [name for name in options.EXPERIMENTS if name not in left_out]
    for name in experiments:
        options.check_choice("experiments", name, options.EXPERIMENTS)
        if name in NEED_DATA and not with_data:
            raise VitpruneError(f"{name} tests on images other than the run's; pass --data DIR")
    return [name for name in options.EXPERIMENTS if name in experiments]


def _find_wordnet(wordnet: str | None, names: Iterable[str]) -> str | None:
    """Return the folder of WordNet: the one asked for, or where classes are named by it, one that is installed."""
    from vitprune.analysis.wordnet import find_nouns, is_wnid

    if wordnet is not None:
        find_nouns(wordnet)
        return wordnet
    if not all(map(is_wnid, names)):
        return None
    try:
        nouns = find_nouns()
    except VitpruneError as error:
        note(f"left out the comparison with WordNet: {error}")
        return None
    return str(nouns.parent if isinstance(nouns, Path) else nouns.root.filename)


def _take_cosines(results: dict[str, Any]) -> dict[str, Any]:
    """Take the matrices of class similarities out of the results: for many classes they are no matter for JSON."""
    import torch

    return {
        of: torch.tensor(described[of].pop("cosines"), dtype=torch.float64)
        for described in results.get("similarity", {}).values()
        for of in ("visits", "scores")
        if of in described
    }


def _open_runs(sources: Sequence[str], device: str | None):
    """Open runs of the same model; they are named by their methods, or by their folders where these repeat."""
    from vitprune.discovery.run import is_run, load_run

    for source in sources:
        if not is_run(source):
            raise VitpruneError(f"{source} is no run; run 'vitprune discover MODEL --data DIR -o RUN' first")
    first, network = open_source(sources[0], None, device)
    opened = [first, *map(load_run, sources[1:])]
    for source, each in zip(sources, opened, strict=True):
        if each.weights_sha256 != first.weights_sha256:
            raise VitpruneError(f"{source} and {sources[0]} are runs of different weights")
        if (each.images.files, each.images.labels) != (first.images.files, first.images.labels):
            raise VitpruneError(
                f"{source} and {sources[0]} are runs of different images; discover both on the same --data with the "
                "same --images-per-class and --seed"
            )
    methods = [each.found.method for each in opened]
    names = methods if len(set(methods)) == len(methods) else [Path(source).name for source in sources]
    if len(set(names)) < len(names):
        raise VitpruneError(f"runs must differ in method or in folder name, got {', '.join(sources)}")
    return dict(zip(names, opened, strict=True)), network


def _describe_analysis(runs: Sequence[str], network, own, others, transform, seed: int) -> dict[str, Any]:
    """Say everything that the passes over the images depend on beside their own names."""
    from vitprune import __version__
    from vitprune.data import data_config, hash_images
    from vitprune.discovery.run import PATHS_FILE, SCORES_FILE
    from vitprune.files import hash_file
    from vitprune.models.identity import architecture, hash_weights

    return {
        "vitprune": __version__,
        "architecture": architecture(network),
        "transform": data_config(network) if transform is None else dict(transform),
        "weights": hash_weights(network),
        "runs": [{name: hash_file(Path(run) / name) for name in (PATHS_FILE, SCORES_FILE)} for run in runs],
        "images": hash_images(own),
        "other images": [] if others is None else sorted(zip(hash_images(others), others.labels, strict=True)),
        "seed": seed,
    }

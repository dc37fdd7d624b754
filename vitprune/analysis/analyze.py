"""The verb: repeat the paper's experiments on the paths of one or several runs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vitprune import options
from vitprune.analysis.ablation import RESAMPLE
from vitprune.analysis.analysis_folder import ANALYSIS_FILES, PASSES_FOLDER, AnalysedRun, Analysis
from vitprune.analysis.concepts import read_concepts
from vitprune.analysis.experiments import NEED_OTHERS, SLOW, check_experiments, run_experiments
from vitprune.analysis.faithfulness import BY_CLASS, BY_IMAGE
from vitprune.analysis.similarity import plain
from vitprune.analysis.topk_mask import MASK_SHARES, TOP_KS
from vitprune.analysis.wordnet import find_nouns, is_wnid
from vitprune.data import ImageBatches, ImageSet, hash_images
from vitprune.discovery.discover import Discovery, has_class_scores
from vitprune.discovery.run import Run, load_run
from vitprune.entry import entry
from vitprune.errors import VitpruneError
from vitprune.files import open_resumable
from vitprune.models.identity import architecture, hash_weights
from vitprune.progress import Track, untracked
from vitprune.seen_images import check_unseen, seen_by
from vitprune.sharing import sharing
from vitprune.views import data_config

Note = Callable[[str], None]


@entry
def analyze(
    model: nn.Module,
    runs: Mapping[str, Run],
    *,
    others: ImageSet | None = None,
    experiments: Sequence[str] | None = None,
    factors: Sequence[float] = (0.0, 2.0),
    tokens: Sequence[str] | None = None,
    top_k: Sequence[int] | None = None,
    mask_share: Sequence[float] | None = None,
    depth: int | None = None,
    ablations: Sequence[str] | None = None,
    rank_by: Sequence[str] | None = None,
    criteria: Sequence[str] | None = None,
    concepts: str | Path | None = None,
    num_pairs: int = 50,
    wordnet: str | Path | None = None,
    seed: int = 0,
    batch_size: int = 50,
    num_workers: int = 0,
    strict: bool = False,
    sources: Mapping[str, str] | None = None,
    folder: str | Path | None = None,
    overwrite: bool = False,
    note: Note | None = None,
    track: Track = untracked,
) -> Analysis:
    """Make experiments on the paths of runs: their scores, what path neurons do, how alike classes are.

    The images of the runs are read again, under the transform of the first run. With a folder, every finished pass
    over the images is kept in it, and a call with the same model, runs and images goes on from there;
    ``save_analysis`` and ``save_analysis_figures`` write the results into the same folder.

    Args:
        model: that the runs are of, in eval mode; images [B, channels, height, width] -> logits [B, C].
        runs: name in the results -> run, as ``load_runs`` returns them: all of this model and of the same images. The
            first is compared with the others, and ``heads``, ``edges``, ``cards``, ``top-images`` and ``topk-mask``
            are about it alone.
        others: images that no run was found on, for ``transfer``, ``faithfulness`` and ``topk-mask``.
        experiments: keys of ``options.EXPERIMENTS``. None makes all that can be made without another choice: not
            ``edges``, ``cards``, ``faithfulness`` and ``topk-mask``, ``transfer`` only with ``others``, ``halves`` and
            ``stability`` only where every class has two images, ``heads`` only where paths go through attention.
        factors: what path neurons are multiplied by: 0 removes them, 2 doubles them.
        tokens: where to intervene, each ``cls``, ``patch`` or ``all``; None: where the first run's paths were found,
            and for ``faithfulness`` and ``topk-mask`` everywhere as well.
        top_k: for ``topk-mask``: neurons per FFN that are never masked; None: 1, 5, 10, 20 and 50.
        mask_share: for ``topk-mask``: shares of the other neurons to mask, in [0, 1]; None: 0.1, 0.3, 0.5 and 1.
        depth: for ``topk-mask``: mask in the first so many FFNs only; None: in all.
        ablations: for ``faithfulness``: keys of ``options.ABLATIONS``; None: zero and mean.
        rank_by: for ``faithfulness``: by the scores of the ``class`` in the run, by those of each ``image``, which are
            searched for, or both; None: class.
        criteria: for ``faithfulness``: keys of ``options.CRITERIA`` to compare with; None: none.
        concepts: for ``cards``: a .npz with the similarity of every image of the runs and every concept, as
            ``read_concepts`` takes it; the words that fit a neuron best then stand on its card.
        num_pairs: for ``similarity``: most and least similar classes to name.
        wordnet: for ``similarity`` of classes that are named by WordNet id: folder of WordNet 3.0's ``data.noun``;
            None: where it is installed.
        seed: of the halves and of the permutation test.
        batch_size: B, images at once.
        num_workers: processes that decode images; 0: this one.
        strict: refuse one of ``others`` that cannot be decoded instead of leaving it out.
        sources: name of a run -> where it lies, for messages and the record; None: the names.
        folder: keeps finished passes; made where it is missing.
        overwrite: start anew where ``folder`` is of another model, other runs or images.
        note: receives one line for people on each thing that is left out.
        track: wraps (items, description), for progress.

    Returns:
        See ``Analysis``; intervals are over classes, at 95 %.

    Raises:
        VitpruneError: if the runs are of other weights or different images, ``others`` holds images that had a say in
            them, an experiment is unknown or needs ``others``, an option is for an experiment that is not made, or
            ``folder`` is of another request.

    Source:
        arXiv:2503.09046; ``halves`` and ``transfer`` are ours: the paper finds and tests paths on the same images.

    >>> import timm, vitprune
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=2, num_classes=2).eval()
    >>> images, labels = torch.zeros(4, 3, 224, 224), torch.tensor([0, 0, 1, 1])
    >>> found = vitprune.discover(model, [(images, labels)], method="random")
    >>> photos = ImageSet(Path("."), ("a.jpg", "b.jpg", "c.jpg", "d.jpg"), (0, 0, 1, 1), {0: "cat", 1: "dog"})
    >>> run = vitprune.Run(found, photos, "vit_tiny_patch16_224", None, hash_weights(model))
    >>> analysis = vitprune.analyze(model, {"random": run}, experiments=["scores", "similarity"])
    >>> sorted(analysis.results), analysis.cosines["visits"].shape
    (['scores', 'similarity'], torch.Size([2, 2]))
    """
    note = note or (lambda _line: None)
    sources = {name: (sources or {}).get(name, name) for name in runs}
    for scope in tokens or ():
        options.check_choice("tokens", scope, options.TOKENS)
    weights = hash_weights(model)
    _check_runs(runs, sources, weights)
    first = next(iter(runs.values()))
    chosen = _choose_experiments(experiments, first.found, with_others=others is not None, note=note)
    _refuse_unused(chosen, "topk-mask", top_k=top_k, mask_share=mask_share, depth=depth)
    _refuse_unused(chosen, "faithfulness", ablations=ablations, rank_by=rank_by, criteria=criteria)
    _refuse_unused(chosen, "cards", concepts=concepts)
    for name, given, choices in (
        ("ablation", ablations, options.ABLATIONS),
        ("rank_by", rank_by, (BY_CLASS, BY_IMAGE)),
        ("criterion", criteria, options.CRITERIA),
    ):
        for each in given or ():
            options.check_choice(name, each, choices)
    _check_images(model, runs, sources, others)
    words = None if concepts is None else read_concepts(concepts, first.images.files)
    reading = {"batch_size": batch_size, "num_workers": num_workers, "transform": first.transform}
    batches = ImageBatches(first.images, model, strict=True, **reading)
    other_batches = None if others is None else ImageBatches(others, model, strict=strict, **reading)
    passes = None
    if folder is not None:
        request = _describe_request(model, weights, runs, others, seed)
        opened = open_resumable(folder, request, owned=ANALYSIS_FILES, overwrite=overwrite)
        passes = opened / PASSES_FOLDER if sharing().count == 1 else None
    class_names = {**first.images.class_names, **({} if others is None else others.class_names)}
    results = run_experiments(
        chosen,
        model,
        {name: run.found for name, run in runs.items()},
        batches,
        other_batches,
        class_names=class_names,
        factors=factors,
        tokens=tokens,
        top_ks=TOP_KS if top_k is None else top_k,
        mask_shares=MASK_SHARES if mask_share is None else mask_share,
        depth=depth,
        ablations=options.DEFAULT_ABLATIONS if ablations is None else ablations,
        rank_by=(BY_CLASS,) if rank_by is None else rank_by,
        criteria=criteria or (),
        donors=_draw_donors(first.images, others, model, seed, reading) if RESAMPLE in (ablations or ()) else None,
        concepts=words,
        num_pairs=num_pairs,
        wordnet=_choose_wordnet(wordnet, first.images.class_names.values(), note) if "similarity" in chosen else None,
        seed=seed,
        folder=passes,
        track=track,
    )
    cosines = _take_cosines(results)
    pictures = _take_pictures(results)
    return Analysis(
        architecture=architecture(model),
        weights_sha256=weights,
        class_names=class_names,
        runs=tuple(_describe_run(name, sources[name], run) for name, run in runs.items()),
        experiments=tuple(chosen),
        results=results,
        cosines=cosines,
        pictures=pictures,
        skipped=() if other_batches is None else _name_skipped(other_batches, note),
    )


def load_runs(folders: Sequence[str | Path]) -> dict[str, Run]:
    """Read the runs to be analysed.

    Args:
        folders: of runs.

    Returns:
        Method that found the paths -> run; where two have one method, name of the folder -> run.

    Raises:
        VitpruneError: if a folder is no run, or runs differ neither in method nor in the name of their folder.
    """
    opened = [load_run(folder) for folder in folders]
    methods = [run.found.method for run in opened]
    names = methods if len(set(methods)) == len(methods) else [Path(folder).name for folder in folders]
    if len(set(names)) < len(names):
        raise VitpruneError(f"runs must differ in method or in folder name, got {', '.join(map(str, folders))}")
    return dict(zip(names, opened, strict=True))


def _check_runs(runs: Mapping[str, Run], sources: Mapping[str, str], weights: str) -> None:
    """Refuse runs of other weights than the model's, and runs of different images."""
    if not runs:
        raise VitpruneError("an analysis needs at least one run")
    (first_name, first), *others = runs.items()
    if first.weights_sha256 != weights:
        raise VitpruneError(f"{sources[first_name]}: its scores are of other weights than the model's; discover again")
    for name, run in others:
        if run.weights_sha256 != weights:
            raise VitpruneError(f"{sources[name]} and {sources[first_name]} are runs of different weights")
        if (run.images.files, run.images.labels) != (first.images.files, first.images.labels):
            raise VitpruneError(
                f"{sources[name]} and {sources[first_name]} are runs of different images; discover both on the same "
                "folder, with the same `images_per_class` and `seed`"
            )


def _choose_experiments(
    experiments: Sequence[str] | None, found: Discovery, *, with_others: bool, note: Note
) -> list[str]:
    if experiments is None:
        left_out = {*SLOW, *(() if with_others else NEED_OTHERS)}
        if not found.heads or not has_class_scores(found):
            left_out.add("heads")
        if min(found.labels.unique(return_counts=True)[1]) < 2:
            note("left out halves and stability: some classes have one image in the run, which has no halves")
            left_out |= {"halves", "stability"}
        return [name for name in options.EXPERIMENTS if name not in left_out]
    check_experiments(experiments, found, with_others=with_others)
    return [name for name in options.EXPERIMENTS if name in experiments]


def _refuse_unused(experiments: Sequence[str], experiment: str, **of_experiment: Any) -> None:
    unused = [f"`{name}`" for name, value in of_experiment.items() if value is not None]
    if unused and experiment not in experiments:
        raise VitpruneError(f"{', '.join(unused)}: for the experiment {experiment}; add {experiment} to `experiments`")


def _draw_donors(
    images: ImageSet, others: ImageSet, model: nn.Module, seed: int, reading: Mapping[str, Any]
) -> ImageBatches:
    """Draw an image of the run for each of the others, in as large batches."""
    places = torch.randint(len(images), (len(others),), generator=torch.Generator().manual_seed(seed))
    return ImageBatches(images.at(places.tolist()), model, strict=True, **reading)


def _check_images(
    model: nn.Module, runs: Mapping[str, Run], sources: Mapping[str, str], others: ImageSet | None
) -> None:
    """Refuse images of a run that are gone, and other images that had a say in the runs."""
    name, first = next(iter(runs.items()))
    if not first.images.root.exists():
        raise VitpruneError(
            f"the images of {sources[name]} are no longer at {first.images.root}; put them back, or discover again"
        )
    if others is None:
        return
    seen = {
        *hash_images(first.images),
        *seen_by(model),
        *(each for run in runs.values() for each in run.found.seen.sha256),
    }
    check_unseen(others, seen, sources[name])


def _describe_request(
    model: nn.Module, weights: str, runs: Mapping[str, Run], others: ImageSet | None, seed: int
) -> dict[str, Any]:
    """Say everything that the passes over the images depend on beside their own names."""
    from vitprune import __version__

    first = next(iter(runs.values()))
    return {
        "vitprune": __version__,
        "architecture": architecture(model),
        "transform": data_config(model) if first.transform is None else dict(first.transform),
        "weights": weights,
        "runs": [_hash_paths(run.found) for run in runs.values()],
        "images": hash_images(first.images),
        "other images": [] if others is None else sorted(zip(hash_images(others), others.labels, strict=True)),
        "seed": seed,
    }


def _hash_paths(found: Discovery) -> str:
    """Return the first 16 hexadecimal digits of a hash of paths and scores."""
    facts = (found.layers, found.classes, found.method, found.tokens, found.quadrature, found.target, found.quantity)
    digest = hashlib.sha256(repr(facts).encode())
    tensors = {name: getattr(found, name) for name in ("neurons", "joint_scores", "labels", "predictions")}
    for name, tensor in {**tensors, **found.class_scores}.items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _choose_wordnet(wordnet: str | Path | None, names: Iterable[str], note: Note) -> str | Path | None:
    """Return the folder of WordNet: the one asked for, or where classes are named by it, one that is installed."""
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


def _take_cosines(results: dict[str, Any]) -> dict[str, Tensor]:
    """Take the matrices of class similarities out of the results: for many classes they are no matter for JSON."""
    return {
        of: torch.tensor(described[of].pop("cosines"), dtype=torch.float64)
        for described in results.get("similarity", {}).values()
        for of in ("visits", "scores")
        if of in described
    }


def _take_pictures(results: dict[str, Any]) -> dict[str, Tensor]:
    """Take the pictures of neuron cards out of the results, and leave JSON values."""
    if "cards" not in results:
        return {}
    made = results["cards"]
    results["cards"] = {"tokens": made.tokens, "cards": plain(made.cards)}
    return {"pictures": made.pictures, "maps": made.maps}


def _describe_run(name: str, source: str, run: Run) -> AnalysedRun:
    found = run.found
    return AnalysedRun(
        source=source,
        method=name,
        tokens=found.tokens,
        quadrature=found.quadrature,
        top_k=found.neurons.shape[-1],
        num_images=len(run.images),
    )


def _name_skipped(batches: ImageBatches, note: Note) -> tuple[str, ...]:
    if batches.skipped:
        name, reason = batches.skipped[0]
        note(f"skipped {len(batches.skipped)} images that cannot be decoded (first: {name}, {reason})")
    return tuple(name for name, _reason in batches.skipped)

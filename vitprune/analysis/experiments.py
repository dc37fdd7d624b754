"""The paper's experiments on the paths of one or several methods, each a function of its name in ``EXPERIMENTS``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitprune.analysis.concepts import Concepts
from vitprune.analysis.edges import Edges, measure_edges
from vitprune.analysis.faithfulness import (
    BY_CLASS,
    BY_IMAGE,
    FOR_ALL,
    Ranking,
    measure_faithfulness,
    rank_alike,
    rank_by_class,
    rank_by_image,
)
from vitprune.analysis.held_out import assign_paths, halves_paths, paths_of, split_halves
from vitprune.analysis.hierarchy import cluster_classes, compare_with_wordnet
from vitprune.analysis.image_similarity import measure_path_similarity
from vitprune.analysis.interventions import Reactions
from vitprune.analysis.manipulation import (
    BEST_HEADS,
    CLASS,
    LEAST_HEADS,
    OTHER_CLASS,
    OTHER_HALF,
    OWN,
    compare_joint_scores,
    manipulate,
    measure_undisturbed,
)
from vitprune.analysis.mistakes import compare_mistakes
from vitprune.analysis.neuron_cards import make_cards
from vitprune.analysis.similarity import compare_scores, compare_visits, plain, rank_pairs
from vitprune.analysis.stability import measure_stability
from vitprune.analysis.top_images import find_top_images
from vitprune.analysis.topk_mask import MASK_SHARES, TOP_KS, measure_topk_mask
from vitprune.analysis.utilisation import measure_utilisation
from vitprune.analysis.wordnet import is_wnid
from vitprune.calibration.criteria import score_neurons
from vitprune.data import Batches
from vitprune.discovery.discover import Discovery, class_paths, count_correct, has_class_scores
from vitprune.discovery.heads import class_heads, head_scores, node_names
from vitprune.errors import VitpruneError
from vitprune.intervals import mean_interval
from vitprune.models.path_layers import ATTENTION, DEFAULT_NODES
from vitprune.options import DEFAULT_ABLATIONS, EXPERIMENTS, check_choice
from vitprune.progress import Track, untracked

# Experiments on images other than those that the paths were found on.
NEED_OTHERS = ("transfer", "faithfulness", "topk-mask")
# That are made only where they are asked for.
SLOW = ("edges", "cards", "faithfulness", "topk-mask")
# One row of a picture; a picture per neuron.
NUM_TOP_IMAGES, MOST_TOP_NEURONS = 6, 10
# Of each class, those that are named.
NUM_EDGES = 10


def run_experiments(
    experiments: Sequence[str],
    model: nn.Module,
    runs: Mapping[str, Discovery],
    batches: Batches,
    other_batches: Batches | None = None,
    *,
    class_names: Mapping[int, str],
    factors: Sequence[float] = (0.0, 2.0),
    tokens: Sequence[str] | None = None,
    top_ks: Sequence[int] = TOP_KS,
    mask_shares: Sequence[float] = MASK_SHARES,
    depth: int | None = None,
    ablations: Sequence[str] = DEFAULT_ABLATIONS,
    rank_by: Sequence[str] = (BY_CLASS,),
    criteria: Sequence[str] = (),
    donors: Batches | None = None,
    concepts: Concepts | None = None,
    num_pairs: int = 50,
    wordnet: str | Path | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    track: Track = untracked,
) -> dict[str, Any]:
    """Make experiments on paths.

    Args:
        experiments: keys of ``options.EXPERIMENTS``.
        model: timm Vision Transformer in eval mode.
        runs: method -> paths, all of the same images; the first is compared with the others, and ``heads``,
            ``edges``, ``cards``, ``top-images`` and ``topk-mask`` are about it alone.
        batches: the images of the runs with their labels, in their order; any number of passes.
        other_batches: other images and labels, for ``transfer``, ``faithfulness`` and ``topk-mask``.
        class_names: class index -> folder name; where all are WordNet ids and ``wordnet`` is given, the similarity of
            classes is compared with their distance there.
        factors: 0 removes path neurons, 2 doubles them.
        tokens: where to intervene, each ``cls``, ``patch`` or ``all``; None: where the first run's paths were found,
            and for ``faithfulness`` and ``topk-mask`` everywhere as well.
        top_ks: for ``topk-mask``, as in ``measure_topk_mask``.
        mask_shares: likewise.
        depth: likewise.
        ablations: for ``faithfulness``: keys of ``options.ABLATIONS``.
        rank_by: for ``faithfulness``: ``class``, ``image`` or both.
        criteria: for ``faithfulness``: keys of ``options.CRITERIA`` to compare with, measured on ``batches``.
        donors: for the ablation ``resample``, as in ``measure_faithfulness``.
        concepts: for ``cards``, as in ``make_cards``.
        num_pairs: for ``similarity``: most and least similar classes to name.
        wordnet: folder with WordNet 3.0's ``data.noun``.
        seed: of the halves and of the permutation test.
        folder: keeps the answers of finished passes, as in ``manipulate``.
        track: wraps (items, description), for progress.

    Returns:
        Name of the experiment, with ``_`` for ``-`` -> its results as JSON values: for ``scores`` a list of
        ``MethodScore``, for ``manipulation``, ``halves``, ``transfer`` and ``heads`` lists of ``DeviationRow``, for
        ``faithfulness`` a list of ``FaithfulnessRow``, for ``topk_mask`` of ``TopKRow``, for ``similarity``,
        ``stability``, ``edges`` and ``top_images`` objects. Only ``cards`` is no JSON value but a ``NeuronCards``.

    Raises:
        VitpruneError: if an experiment is unknown or needs what is not given.

    Source:
        arXiv:2503.09046; ``halves`` and ``transfer`` are ours: the paper finds and tests paths on the same images.
    """
    check_experiments(experiments, next(iter(runs.values())), with_others=other_batches is not None)
    first = next(iter(runs.values()))
    scopes = (first.tokens,) if tokens is None else tuple(tokens)
    scaling = {"factors": factors, "tokens": scopes, "folder": folder, "track": track}
    keeping = {"folder": folder, "track": track}

    @cache
    def clean() -> Reactions:
        return measure_undisturbed(model, batches, "undisturbed", **keeping)

    through = {method: found.nodes for method, found in runs.items()}

    def manipulation() -> list[Any]:
        own = {method: found.neurons for method, found in runs.items()}
        return manipulate(model, batches, clean(), own, whose=OWN, nodes=through, **scaling)

    def halves() -> list[Any]:
        halved = {method: halves_paths(found, seed=seed) for method, found in runs.items()}
        rows = manipulate(model, batches, clean(), halved, whose=OTHER_HALF, nodes=through, **scaling)
        if len(first.classes) > 1:
            shifted = {method: _paths_of_another_class(found, seed) for method, found in runs.items()}
            rows += manipulate(model, batches, clean(), shifted, whose=OTHER_CLASS, nodes=through, **scaling)
        return rows

    def transfer() -> list[Any]:
        undisturbed = measure_undisturbed(model, other_batches, "undisturbed, other images", **keeping)
        labels = undisturbed.label.tolist()
        assigned = {method: assign_paths(class_paths(found), labels) for method, found in runs.items()}
        return manipulate(model, other_batches, undisturbed, assigned, whose=CLASS, nodes=through, **scaling)

    def heads() -> list[Any]:
        name = next(iter(runs))
        rows = []
        for whose, highest in ((BEST_HEADS, True), (LEAST_HEADS, False)):
            chosen = assign_paths(class_heads(first, highest=highest), first.labels.tolist())
            of_heads = {"nodes": {name: (ATTENTION,)}, **scaling}
            rows += manipulate(model, batches, clean(), {name: chosen}, whose=whose, **of_heads)
        return rows

    def topk_mask() -> list[Any]:
        scopes_masked = tuple(dict.fromkeys((first.tokens, "all"))) if tokens is None else scopes
        return measure_topk_mask(
            model,
            other_batches,
            first,
            top_ks=top_ks,
            mask_shares=mask_shares,
            tokens=scopes_masked,
            depth=depth,
            track=track,
        )

    def faithfulness() -> list[Any]:
        different = [method for method, found in runs.items() if found.layers != first.layers]
        if different:
            raise VitpruneError(
                f"faithfulness compares paths through the same layers; {different[0]} goes through others"
            )
        if criteria and first.nodes != DEFAULT_NODES:
            raise VitpruneError("criteria rank FFN neurons alone; compare them with paths through `nodes` ffn")
        rankings: dict[tuple[str, str], Ranking] = {}
        for ranked in rank_by:
            for method, found in runs.items():
                by_image = ranked == BY_IMAGE
                rankings[method, ranked] = rank_by_image(model, found, seed=seed) if by_image else rank_by_class(found)
        for criterion in criteria:
            scores = score_neurons(model, criterion, batches=batches, found=first, seed=seed, track=track)
            rankings[criterion, FOR_ALL] = rank_alike(scores)
        return measure_faithfulness(
            model,
            other_batches,
            rankings,
            nodes=first.nodes,
            tokens=tuple(dict.fromkeys((first.tokens, "all"))) if tokens is None else scopes,
            ablations=ablations,
            classes=first.classes,
            reference=batches,
            donors=donors,
            **keeping,
        )

    make: Mapping[str, Callable[[], Any]] = {
        "scores": lambda: compare_joint_scores(runs),
        "manipulation": manipulation,
        "heads": heads,
        "halves": halves,
        "similarity": lambda: {
            method: {
                **describe_paths(found),
                **(
                    describe_classes(found, class_names, num_pairs=num_pairs, wordnet=wordnet, seed=seed)
                    if found is first
                    else {}
                ),
            }
            for method, found in runs.items()
        },
        "stability": lambda: {method: describe_stability(found, seed=seed) for method, found in runs.items()},
        "top-images": lambda: _top_images(model, batches, first, track),
        "edges": lambda: describe_edges(measure_edges(model, batches, first, seed=seed, track=track), first),
        "cards": lambda: make_cards(model, batches, first, class_names=class_names, concepts=concepts, track=track),
        "transfer": transfer,
        "faithfulness": faithfulness,
        "topk-mask": topk_mask,
    }
    results = {name.replace("-", "_"): make[name]() for name in experiments}
    # Pictures are no matter for JSON.
    return {name: result if name == "cards" else plain(result) for name, result in results.items()}


def check_experiments(experiments: Sequence[str], found: Discovery, *, with_others: bool) -> None:
    """Refuse an experiment that is unknown, or that needs other images or heads where there are none.

    Raises:
        VitpruneError: naming it.
    """
    for name in experiments:
        check_choice("experiments", name, EXPERIMENTS)
        if name in NEED_OTHERS and not with_others:
            raise VitpruneError(f"{name} tests on images other than the run's; pass `others`")
        if name == "heads":
            head_scores(found)


def _paths_of_another_class(found: Discovery, seed: int):
    """Give each image what the next class has on the same half as the paths that ``halves_paths`` gives."""
    second = split_halves(found.labels, seed=seed)
    tested = halves_paths(found, seed=seed).clone()
    for half in (False, True):
        donors, members = second != half, second == half
        tested[members] = assign_paths(paths_of(found, donors), found.labels[members].tolist(), shift=1)
    return tested


def describe_stability(found: Discovery, *, seed: int = 0) -> dict[str, Any]:
    """Measure which nodes of the class paths are sure.

    Returns:
        ``sure``: mean over classes of the share of a path's nodes that are, with its interval; ``by_class``: class
        index -> that share; ``membership``: class index -> [L][K], as in ``Stability``; ``num_draws``.
    """
    stability = measure_stability(found, seed=seed)
    by_class = {index: stability.sure(index).double().mean().item() for index in found.classes}
    return {
        "sure": mean_interval(list(by_class.values())),
        "by_class": by_class,
        "membership": stability.membership,
        "num_draws": stability.num_draws,
    }


def describe_edges(edges: Edges, found: Discovery) -> dict[str, Any]:
    """Return edges as JSON values tell them.

    Returns:
        ``agreement`` and ``num_exact`` as in ``Edges``; ``layers``, and ``strength``: [L][L], the mean size of an edge
        from one layer's nodes to another's; ``strongest``: of each class the ten largest, with ``start`` and ``end``
        (layer and node as it is written) and ``score``; ``nodes`` and ``scores`` by class index.
    """
    written, top_k = node_names(found), found.neurons.shape[-1]
    sizes = torch.stack([scores.abs() for scores in edges.scores.values()]).mean(0)
    num_layers = len(found.layers)
    strength = sizes.view(num_layers, top_k, num_layers, top_k).mean((1, 3))
    strongest = {}
    for index, scores in edges.scores.items():
        order = scores.abs().flatten().sort(descending=True, stable=True).indices[:NUM_EDGES].tolist()
        places = [divmod(place, len(scores)) for place in order]
        strongest[index] = [
            {
                **{
                    end: {"layer": name, "node": node, "name": written(name, node)}
                    for end, (name, node) in (("start", edges.nodes[index][a]), ("end", edges.nodes[index][b]))
                },
                "score": float(scores[a, b]),
            }
            for a, b in places
            if scores[a, b]
        ]
    return {
        "agreement": edges.agreement,
        "num_exact": edges.num_exact,
        "layers": found.layers,
        "strength": strength,
        "strongest": strongest,
        "nodes": edges.nodes,
        "scores": edges.scores,
    }


def describe_paths(found: Discovery) -> dict[str, Any]:
    """Measure how alike the paths of images are, and how many neurons they use.

    Returns:
        ``utilisation``, ``mistakes``, and where two classes have two images, ``images`` (``PathSimilarity``).
    """
    described: dict[str, Any] = {"utilisation": measure_utilisation(found), "mistakes": compare_mistakes(found)}
    if sum(count >= 2 for count in count_correct(found)[1].tolist()) >= 2:
        described["images"] = measure_path_similarity(found)
    return described


def describe_classes(
    found: Discovery,
    class_names: Mapping[int, str],
    *,
    num_pairs: int = 50,
    wordnet: str | Path | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Measure how alike the paths of classes are. Arguments as in ``run_experiments``.

    Returns:
        ``visits`` and, where the run has them, ``scores``, each with ``cosines`` [C, C], the most and the least similar
        classes, ``linkage``, ``leaf_order`` and ``wordnet``; nothing for a single class.

    Raises:
        VitpruneError: if ``wordnet`` is given and cannot be read, or a class name is no WordNet id.
    """
    if len(found.classes) < 2:
        return {}
    names = [class_names[index] for index in found.classes]
    foreign = [name for name in names if not is_wnid(name)]
    if wordnet is not None and foreign:
        raise VitpruneError(f"wordnet compares WordNet ids, and class {foreign[0]} is none; leave it out")
    described = {}
    for compare in (compare_visits, *([compare_scores] if has_class_scores(found) else [])):
        similarity = compare(found)
        most, least = rank_pairs(similarity, num_pairs)
        clustering = cluster_classes(similarity)
        described[similarity.of] = {
            "cosines": similarity.cosines,
            "most_similar": most,
            "least_similar": least,
            "linkage": clustering.linkage,
            "leaf_order": clustering.leaf_order,
            "wordnet": None if wordnet is None else compare_with_wordnet(similarity, names, wordnet=wordnet, seed=seed),
        }
    return described


def _top_images(model: nn.Module, batches: Batches, found: Discovery, track: Track) -> dict[str, Any]:
    """Find what excites the neurons at the end of the class paths."""
    last = found.layers[-1]
    neurons = dict.fromkeys(int(path[-1, 0]) for path in class_paths(found).values())
    chosen = list(neurons)[:MOST_TOP_NEURONS]
    ranked = find_top_images(
        model, track(batches, "top images"), {last: chosen}, tokens=found.tokens, num_images=NUM_TOP_IMAGES
    )
    return {
        "tokens": found.tokens,
        "neurons": [
            {"ffn": ffn, "neuron": neuron, "images": top.positions, "activations": top.activations}
            for (ffn, neuron), top in ranked.items()
        ],
    }

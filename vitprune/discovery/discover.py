"""The verb: find the paths of many images and the mean score of every neuron per class."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from vitprune.answers import check_label_range, check_one_class, of_classes
from vitprune.data import Batches, on_device
from vitprune.discovery.class_means import COSINE, answer_by_class_means
from vitprune.discovery.engine import PathBatch
from vitprune.discovery.memory import count_rows
from vitprune.discovery.methods import REGISTRY, plan_search
from vitprune.discovery.search import Search
from vitprune.entry import entry
from vitprune.errors import VitpruneError
from vitprune.models.path_layers import DEFAULT_NODES, count_layers, kind_of_layer
from vitprune.models.trunk import check_trunk, scope_slice
from vitprune.models.units import FFN, frozen
from vitprune.options import NODES
from vitprune.seen_images import SeenImages, check_labels, watch
from vitprune.table import align

# On a CPU, more rows (images x nodes) than these in the prefix and in the suffix only leave its caches.
CPU_PREFIX_ROWS, CPU_SUFFIX_ROWS = 64, 32


@dataclass(frozen=True)
class Discovery:
    """Paths of I images and scores per class.

    Attributes:
        layers: names of the layers that the paths go through, in the order in which they run.
        neurons: int64 [I, L, K]; per image the selected nodes of each layer, best first.
        joint_scores: float32 [I]; score of the path.
        labels: int64 [I]; class index of each image.
        predictions: int64 [I]; the class that the model answers.
        completeness_errors: float32 [I] for ``jas-complete``, else None.
        classes: the class indices present, ascending; rows of ``class_scores``.
        class_scores: layer name -> float32 [C, H]; mean score of every node over the images of a class. [0, H] where
            they are not known: paths of another program (``vitprune.interop.authors``) come without them.
        method: key of ``METHODS``.
        tokens: ``cls``, ``patch`` or ``all``.
        quadrature: as in ``parse_quadrature``.
        target: whose answer was attributed: ``label``, ``predicted`` or a class index.
        quantity: ``probability`` or ``logit``.
        precision: key of ``PRECISIONS``.
        seen: which images these are, by what is in them; empty where nobody looked.
        heads: attention among the layers -> how many heads its nodes are of, as many each, side by side.
    """

    layers: tuple[str, ...]
    neurons: Tensor
    joint_scores: Tensor
    labels: Tensor
    predictions: Tensor
    completeness_errors: Tensor | None
    classes: tuple[int, ...]
    class_scores: Mapping[str, Tensor]
    method: str
    tokens: str
    quadrature: str
    target: str | int = "label"
    quantity: str = "probability"
    precision: str = "float32"
    seen: SeenImages = field(default_factory=SeenImages)
    heads: Mapping[str, int] = field(default_factory=dict)

    @property
    def nodes(self) -> tuple[str, ...]:
        """What the paths go through, keys of ``NODES``."""
        kinds = {kind_of_layer(name) for name in self.layers}
        return tuple(kind for kind in NODES if kind in kinds)

    def __str__(self) -> str:
        rows = []
        for index in self.classes:
            of_class = self.labels == index
            right = (self.predictions[of_class] == index).sum()
            rows.append(
                (str(index), str(int(of_class.sum())), str(int(right)), f"{self.joint_scores[of_class].mean():.3f}")
            )
        images, _layers, top_k = self.neurons.shape
        return (
            f"{self.method}: paths of {images} images through {count_layers(self.layers)}, {top_k} "
            f"{'neurons' if self.nodes == DEFAULT_NODES else 'nodes'} each (tokens {self.tokens})"
            "\n" + align(("class", "images", "correct", "mean joint score"), rows)
        )

    def __repr__(self) -> str:
        return str(self)


@dataclass(frozen=True)
class Part:
    """Paths of some images and sums of their scores; on the CPU.

    Attributes:
        neurons: int64 [I, L, K].
        joint_scores: float32 [I].
        labels: int64 [I].
        predictions: int64 [I].
        completeness_errors: float32 [I] for ``jas-complete``, else None.
        classes: the class indices present, ascending.
        score_sums: layer name -> float64 [C, H]; sums over the images of a class.
    """

    neurons: Tensor
    joint_scores: Tensor
    labels: Tensor
    predictions: Tensor
    completeness_errors: Tensor | None
    classes: tuple[int, ...]
    score_sums: Mapping[str, Tensor]


@entry
def discover(
    model: nn.Module,
    batches: Batches,
    *,
    method: str = "jas",
    top_k: int = 1,
    tokens: str | None = None,
    quadrature: str | None = None,
    target: str | int = "label",
    quantity: str = "probability",
    precision: str = "float32",
    seed: int = 0,
    nodes: Sequence[str] = DEFAULT_NODES,
    memory_gib: float | None = None,
) -> Discovery:
    """Find the influential neuron path of each image, and the mean score of every neuron per class.

    Args:
        model: timm Vision Transformer with an isotropic trunk, in eval mode.
        batches: pairs of images [B, 3, height, width] (normalised by the model's own transform) and class labels [B]
            (int64). Read once; a batch may mix classes.
        method: key of ``METHODS``.
        top_k: K, nodes per layer; 1 .. the narrowest layer.
        tokens: whose hidden vectors count: ``cls`` (class token), ``patch`` or ``all``; None takes the class token
            where the head reads it, else the patches.
        quadrature: ``adaptive``, ``gauss-legendre:NODES`` or ``riemann:STEPS``; see ``parse_quadrature``. None takes
            ``adaptive`` for the layer-by-layer methods (jas, jas-complete) and ``gauss-legendre:8`` for the others.
            Scores come from the nodes that settled which K neurons are the best, the joint score of jas from the first.
        target: whose answer is attributed: ``label`` (each image's own class), ``predicted`` or a class index.
        quantity: ``probability`` of that class (the paper) or its ``logit``; of a model without classes, ``cosine``
            of the embedding to the mean of that class among ``batches``, which are then read twice.
        precision: of the matrix products behind the layer under test: ``float32`` (the weights' own), ``tf32`` or
            ``bf16``. Choices that the noise of a lower one could change are made again in the weights' own; scores that
            decide nothing keep the noise.
        seed: of method ``random``; the others draw nothing.
        nodes: keys of ``NODES``: ``ffn`` (the paper), ``attention`` or both. An attention's nodes are the dimensions of
            what its heads hand to the output projection; with both, a path has two stations in every block.
        memory_gib: to use beside the weights; None takes 2 on a CPU and four fifths of what is free on a GPU. Decides
            how many images and nodes go at once, as far as one image allows; where a GPU has less after all, half of
            them, and so on.

    Returns:
        See ``Discovery``; on the CPU.

    Raises:
        VitpruneError: if the model has no isotropic trunk, an argument is out of range, or ``batches`` is empty.

    Source:
        arXiv:2503.09046.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, num_classes=5).eval()
    >>> batches = [(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 1, 4]))]
    >>> found = discover(model, batches, top_k=2)
    >>> found.neurons.shape, found.classes
    (torch.Size([4, 2, 2]), (0, 1, 4))
    """
    check_labels(model, batches)
    if quantity == COSINE:
        model = answer_by_class_means(model, batches)
    search = plan_search(
        model,
        method=method,
        top_k=top_k,
        tokens=tokens,
        quadrature=quadrature,
        target=target,
        quantity=quantity,
        precision=precision,
        seed=seed,
        nodes=nodes,
    )
    watched = watch(batches)
    part = find_part(model, search, watched, memory_gib=memory_gib)
    return replace(combine(search, [] if part is None else [part]), seen=watched.seen)


@entry
def find_part(
    model: nn.Module,
    search: Search,
    batches: Batches,
    *,
    memory_gib: float | None = None,
    pace: Pace | None = None,
) -> Part | None:
    """Find the paths of some images.

    Args:
        model: in eval mode.
        search: as planned for this model.
        batches: pairs of images and labels; read once.
        memory_gib: as in ``discover``.
        pace: from ``set_pace`` on this model and request, where it is there already; halved where memory runs out.

    Returns:
        None where there are no images.

    Raises:
        VitpruneError: if the model has no isotropic trunk.
    """
    parts: dict[str, list[Tensor]] = {name: [] for name in ("neurons", "scores", "errors", "labels", "predictions")}
    sums: dict[str, dict[int, Tensor]] = {layer.name: {} for layer in search.layers}
    for batch_images, batch_labels in on_device(model, batches):
        check_one_class(batch_labels, "a path")
        check_label_range(batch_labels, model.num_classes, "the path search")
        if pace is None:
            pace = set_pace(model, search, batch_images, memory_gib=memory_gib)
        start = 0
        while start < len(batch_images):
            images, labels = (each[start : start + pace.images] for each in (batch_images, batch_labels))
            try:
                paths = _search(model, search, images, labels, pace)
            except torch.OutOfMemoryError:
                if (pace.images, pace.chunk_rows) == (1, 1):
                    raise
                pace.images, pace.chunk_rows = max(1, pace.images // 2), max(1, pace.chunk_rows // 2)
                torch.cuda.empty_cache()
                continue
            start += len(images)
            for layer, score_BH in zip(search.layers, paths.scores, strict=True):
                _add_by_class(sums[layer.name], score_BH, labels)
            parts["neurons"].append(paths.neurons_BLK.cpu())
            parts["scores"].append(paths.joint_scores_B.float().cpu())
            parts["labels"].append(labels.cpu())
            parts["predictions"].append(of_classes(paths.logits_BC).argmax(-1).cpu())
            if paths.completeness_errors_B is not None:
                parts["errors"].append(paths.completeness_errors_B.float().cpu())
    if not parts["labels"]:
        return None
    labels = torch.cat(parts["labels"])
    classes = tuple(sorted(set(labels.tolist())))
    return Part(
        neurons=torch.cat(parts["neurons"]),
        joint_scores=torch.cat(parts["scores"]),
        labels=labels,
        predictions=torch.cat(parts["predictions"]),
        completeness_errors=torch.cat(parts["errors"]) if parts["errors"] else None,
        classes=classes,
        score_sums={name: torch.stack([by_class[index] for index in classes]) for name, by_class in sums.items()},
    )


@dataclass
class Pace:
    """How much goes at once; changes memory and time, not results.

    Attributes:
        images: searched together.
        chunk_rows: images x nodes in one autograd graph of the suffix.
    """

    images: int
    chunk_rows: int


def set_pace(model: nn.Module, search: Search, images: Tensor, *, memory_gib: float | None = None) -> Pace:
    """Find out how much of a search fits into memory, on images [B, 3, height, width] of the right size.

    Raises:
        VitpruneError: if the model has no isotropic trunk, or the budget is not positive.
    """
    check_trunk(model, search.layers, images)
    with frozen(model):
        graph_rows, block_rows = count_rows(model, images, memory_gib)
    one_token = scope_slice(model, search.tokens) == slice(0, 1)
    if not one_token:
        # The graph of the prefix, of all nodes together, stands beside the suffix's; further nodes have their own.
        block_rows = graph_rows // (3 if search.rule.finer else 2)
    if images.device.type == "cpu":
        graph_rows, block_rows = min(graph_rows, CPU_SUFFIX_ROWS), min(block_rows, CPU_PREFIX_ROWS)
    num_nodes = REGISTRY[search.method].count_nodes(search, one_token=one_token)
    return Pace(max(1, min(block_rows // num_nodes, graph_rows)), graph_rows)


def _search(model: nn.Module, search: Search, images: Tensor, labels: Tensor, pace: Pace) -> PathBatch:
    with frozen(model):
        return REGISTRY[search.method].find(model, search, images, labels, chunk_rows=pace.chunk_rows)


def score_images(
    model: nn.Module, search: Search, images: Tensor, labels: Tensor, *, memory_gib: float | None = None
) -> dict[str, Tensor]:
    """Return the scores that a search gives every node for each image: layer name -> [B, H], on the model's device.

    Args:
        model: in eval mode.
        search: as planned for this model.
        images: [B, 3, height, width], normalised by the model's own transform.
        labels: int64 [B].
        memory_gib: as in ``discover``.

    Raises:
        VitpruneError: if the model has no isotropic trunk.
    """
    pace = set_pace(model, search, images, memory_gib=memory_gib)
    parts = [
        _search(model, search, images[start : start + pace.images], labels[start : start + pace.images], pace).scores
        for start in range(0, len(images), pace.images)
    ]
    names = [layer.name for layer in search.layers]
    return {name: torch.cat(scores).detach() for name, scores in zip(names, zip(*parts, strict=True), strict=True)}


def combine(search: Search, parts: Iterable[Part]) -> Discovery:
    """Put parts together in the order given; holds the paths of all images, and the score sums of one part at a time.

    Raises:
        VitpruneError: if there is no part.
    """
    kept: dict[str, list[Tensor]] = {}
    sums: dict[str, dict[int, Tensor]] = {layer.name: {} for layer in search.layers}
    for part in parts:
        for name in ("neurons", "joint_scores", "labels", "predictions", "completeness_errors"):
            kept.setdefault(name, []).append(getattr(part, name))
        for name, sum_CH in part.score_sums.items():
            for index, sum_H in zip(part.classes, sum_CH, strict=True):
                # A view would keep the file that it was read from in memory.
                sums[name][index] = sums[name][index] + sum_H if index in sums[name] else sum_H.clone()
    if not kept:
        raise VitpruneError("no images to discover paths on")
    errors = kept.pop("completeness_errors")
    whole = {name: torch.cat(tensors) for name, tensors in kept.items()}
    counts = Counter(whole["labels"].tolist())
    classes = tuple(sorted(counts))
    return Discovery(
        layers=tuple(layer.name for layer in search.layers),
        **whole,
        completeness_errors=None if errors[0] is None else torch.cat(errors),
        classes=classes,
        class_scores={
            name: torch.stack([by_class[index] / counts[index] for index in classes]).float()
            for name, by_class in sums.items()
        },
        method=search.method,
        tokens=search.tokens,
        quadrature=search.rule.name,
        target=search.objective.target,
        quantity=search.objective.quantity,
        precision=search.precision,
        heads=search.heads,
    )


def _add_by_class(sums: dict[int, Tensor], score_BH: Tensor, labels: Tensor) -> None:
    score_BH = score_BH.detach().double().cpu()
    for index in labels.unique().tolist():
        total = score_BH[(labels == index).cpu()].sum(0)
        sums[index] = sums[index] + total if index in sums else total


def has_class_scores(found: Discovery) -> bool:
    """Tell whether the scores of every neuron are known, beside the paths."""
    return all(len(scores) == len(found.classes) for scores in found.class_scores.values())


def check_class_scores(found: Discovery) -> None:
    """Refuse a discovery without scores of every neuron.

    Raises:
        VitpruneError: if it has only paths.
    """
    if not has_class_scores(found):
        raise VitpruneError(
            "the run has paths, but no scores of the neurons beside them (it was converted from files without any); "
            "discover its images anew, or ask for what needs paths only"
        )


def class_paths(found: Discovery, top_k: int | None = None) -> dict[int, Tensor]:
    """Return each class's path: per layer the K nodes most often on the paths of its images.

    Ties go to the higher mean score, where there are scores, then to the lower index. So do nodes on no path.

    Args:
        found: by any method.
        top_k: K; None: as many as were selected of each image.

    Returns:
        class index -> int64 [L, K].

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, num_classes=5).eval()
    >>> batches = [(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 1, 4]))]
    >>> {index: tuple(path.shape) for index, path in class_paths(discover(model, batches)).items()}
    {0: (2, 1), 1: (2, 1), 4: (2, 1)}
    """
    top_k = found.neurons.shape[-1] if top_k is None else top_k
    visits = count_visits(found)
    paths = {}
    for row, index in enumerate(found.classes):
        layers = []
        for name in found.layers:
            score_CH = found.class_scores[name]
            known_H = score_CH[row] if has_class_scores(found) else torch.zeros(score_CH.shape[1])
            by_score = known_H.sort(descending=True, stable=True).indices
            by_visits = visits[name][row][by_score].sort(descending=True, stable=True).indices
            layers.append(by_score[by_visits][:top_k])
        paths[index] = torch.stack(layers)
    return paths


def count_visits(found: Discovery) -> dict[str, Tensor]:
    """Count how many images of each class have a node on their path.

    Divided by ``count_correct(found)[1]`` they are the visit frequencies.

    Returns:
        Layer name -> int64 [C, H]; rows as ``found.classes``.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, num_classes=5).eval()
    >>> batches = [(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 1, 4]))]
    >>> count_visits(discover(model, batches))["blocks.0.mlp"].sum(1)
    tensor([1, 2, 1])
    """
    rows = torch.searchsorted(torch.tensor(found.classes), found.labels)
    visits = {}
    for position, name in enumerate(found.layers):
        num_classes, num_neurons = len(found.classes), found.class_scores[name].shape[1]
        places = rows.unsqueeze(1) * num_neurons + found.neurons[:, position]
        counted = torch.bincount(places.flatten(), minlength=num_classes * num_neurons)
        visits[name] = counted.view(num_classes, num_neurons)
    return visits


def count_correct(found: Discovery) -> tuple[Tensor, Tensor]:
    """Count the images of each class that the model answers with their class, and all images of each class.

    Not for what ``only_classes`` returns, where labels and predictions are numbered differently.

    Returns:
        Both int64 [C]; rows as ``found.classes``.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, num_classes=5).eval()
    >>> batches = [(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 1, 4]))]
    >>> count_correct(discover(model, batches, method="activation"))[1]
    tensor([1, 2, 1])
    """
    rows = torch.searchsorted(torch.tensor(found.classes), found.labels)
    correct = rows[found.predictions == found.labels]
    return tuple(torch.bincount(each, minlength=len(found.classes)) for each in (correct, rows))


def only_ffns(found: Discovery) -> Discovery:
    """Return the part of a discovery that is of FFNs; joint scores stay those of the whole paths.

    Raises:
        VitpruneError: if the paths go through attention alone.
    """
    places = [place for place, name in enumerate(found.layers) if kind_of_layer(name) == FFN]
    if not places:
        raise VitpruneError("the paths of the run go through attention alone, so it says nothing about FFN neurons")
    layers = tuple(found.layers[place] for place in places)
    scores = {name: found.class_scores[name] for name in layers}
    return replace(found, layers=layers, neurons=found.neurons[:, places], class_scores=scores, heads={})


def only_classes(found: Discovery, classes: Sequence[int]) -> Discovery:
    """Return what was found on the images of some classes, renumbered: ``classes[i]`` becomes i.

    Predictions keep the numbers of all classes.

    Raises:
        VitpruneError: if a class has no image in the discovery.
    """
    absent = [index for index in classes if index not in found.classes]
    if absent:
        raise VitpruneError(f"class {absent[0]} has no image in the run; discover its images as well")
    position = {index: place for place, index in enumerate(classes)}
    of_class = torch.tensor([int(label) in position for label in found.labels])
    rows = [found.classes.index(index) for index in classes]
    errors = found.completeness_errors
    return replace(
        found,
        neurons=found.neurons[of_class],
        joint_scores=found.joint_scores[of_class],
        labels=torch.tensor([position[int(label)] for label in found.labels[of_class]]),
        predictions=found.predictions[of_class],
        completeness_errors=None if errors is None else errors[of_class],
        classes=tuple(range(len(classes))),
        class_scores={
            name: scores[rows] if has_class_scores(found) else scores for name, scores in found.class_scores.items()
        },
    )

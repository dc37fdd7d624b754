"""What single nodes do: a card for each, of what excites it, where it points and what turning it up or down changes.

Letters: B images of a batch, I of all, P nodes with a card, n top images, N tokens, H nodes of a layer, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor, nn

from vitprune.analysis.concepts import Concepts, score_concepts
from vitprune.answers import ask, of_classes, run
from vitprune.data import Batches, on_device
from vitprune.data import class_names as names_of_classes
from vitprune.discovery.discover import Discovery, class_paths
from vitprune.discovery.heads import node_names
from vitprune.entry import entry
from vitprune.errors import VitpruneError
from vitprune.models.path_layers import find_path_layers, kind_of_layer
from vitprune.models.trunk import resolve_scope, scale_branch, scope_slice
from vitprune.models.units import FFN, hook_hidden
from vitprune.progress import Track, untracked
from vitprune.sharing import refuse_sharing
from vitprune.views import data_config, num_prefix_tokens

MOST_CARDS, NUM_IMAGES, NUM_ANSWERS, NUM_BINS = 120, 4, 5, 20
# What a node is multiplied by; 1 is the undisturbed model.
FACTORS = (0.0, 0.5, 1.0, 2.0, 4.0)
# Pixels of the side of a stored picture.
PICTURE_SIDE = 112


@dataclass(frozen=True)
class Answer:
    """A class and a number that goes with it.

    Attributes:
        index: of the class among the model's.
        name: what it is called, as far as that is known, else its index.
        value: a probability, or standard deviations.
    """

    index: int
    name: str
    value: float


@dataclass(frozen=True)
class Steering:
    """What the model answers to a node's top image with the node scaled.

    Attributes:
        factor: that its activation is multiplied by at the scoped tokens.
        answers: the five most probable classes.
    """

    factor: float
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class NeuronCard:
    """What is known of one node.

    Attributes:
        layer: name of its FFN or attention.
        node: index in it.
        name: as ``node_names`` writes it.
        paths: indices of the classes that have it on their path.
        images: positions of the images that excite it most, among those read; the most exciting first.
        activations: of these images, mean over the scoped tokens.
        peak: the class of the highest mean activation, with the chance that one of its images excites the node more
            than an image of another class (area under the ROC curve); None where there is one class only.
        towards: classes whose logits its output moves up most: the output's direction through the final norm and the
            classifier, in standard deviations over the classes; empty where the model has no linear classifier behind a
            LayerNorm.
        away: the classes that it moves down most.
        bins: edges of the histogram [21].
        all_counts: images by activation [20].
        peak_counts: the same of the images of the peak's class.
        steering: what turning it up or down changes.
        concepts: that fit it best, with their scores (``score_concepts``); empty where none are known.
    """

    layer: str
    node: int
    name: str
    paths: tuple[int, ...]
    images: tuple[int, ...]
    activations: tuple[float, ...]
    peak: Answer | None
    towards: tuple[Answer, ...]
    away: tuple[Answer, ...]
    bins: tuple[float, ...]
    all_counts: tuple[int, ...]
    peak_counts: tuple[int, ...]
    steering: tuple[Steering, ...]
    concepts: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class NeuronCards:
    """Cards, and the pictures on them.

    Attributes:
        cards: one for each node.
        tokens: where activations were read: ``cls``, ``patch`` or ``all``.
        pictures: uint8 [P, n, height, width, 3]; the top images as the model saw them, made small.
        maps: float32 [P, n, rows, columns]; the node's activation at every patch of them.
    """

    cards: tuple[NeuronCard, ...]
    tokens: str
    pictures: Tensor
    maps: Tensor


def choose_nodes(found: Discovery, most: int = MOST_CARDS) -> dict[str, list[int]]:
    """Choose the nodes on class paths, those of the most classes first: layer name -> node indices, ascending.

    >>> import timm
    >>> from vitprune import discover
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=32, num_classes=5).eval()
    >>> batches = [(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 4]))]
    >>> sum(map(len, choose_nodes(discover(model, batches), 3).values()))
    3
    """
    counts: dict[tuple[int, int], int] = {}
    for path_LK in class_paths(found).values():
        for layer, nodes in enumerate(path_LK.tolist()):
            for node in nodes:
                counts[layer, node] = counts.get((layer, node), 0) + 1
    chosen = sorted(counts, key=lambda place: (-counts[place], place))[:most]
    nodes: dict[str, list[int]] = {}
    for layer, node in sorted(chosen):
        nodes.setdefault(found.layers[layer], []).append(node)
    return nodes


@entry
@torch.no_grad()
def make_cards(
    model: nn.Module,
    batches: Batches,
    found: Discovery,
    *,
    most: int = MOST_CARDS,
    num_images: int = NUM_IMAGES,
    class_names: Mapping[int, str] | None = None,
    concepts: Concepts | None = None,
    track: Track = untracked,
) -> NeuronCards:
    """Make a card for the nodes on class paths.

    Args:
        model: timm Vision Transformer in eval mode.
        batches: pairs of images [B, 3, height, width] (normalised by the model's own transform) and labels. Read twice.
        found: whose class paths; at whose tokens activations are read and scaled.
        most: cards at most, for the nodes of the most classes.
        num_images: n, top images on a card.
        class_names: class index -> name, where they are known; the model's own names are used beside them.
        concepts: from ``read_concepts``, of these images in their order.
        track: wraps (items, description), for progress.

    Raises:
        VitpruneError: if there are no images, ``concepts`` are of more or fewer, or several processes share them.

    Source:
        Heat maps of single neurons as in Bau et al., CVPR 2017 (arXiv:1704.05796); the direction of an output in class
        space (the "logit lens") for ViTs as in Vilas et al., NeurIPS 2023 (arXiv:2310.18969).

    >>> import timm
    >>> from vitprune import discover
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=5).eval()
    >>> batches = [(torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 4, 4]))]
    >>> made = make_cards(model, batches, discover(model, batches), num_images=2)
    >>> made.cards[0].layer, made.maps.shape[1:], len(made.cards[0].steering)
    ('blocks.0.mlp', torch.Size([2, 2, 2]), 5)
    """
    refuse_sharing("the experiment cards", "make it on one process")
    if most < 1 or num_images < 1:
        raise VitpruneError(f"`most` and `num_images` must be at least 1, got {most} and {num_images}")
    nodes = choose_nodes(found, most)
    layers = {layer.name: layer for layer in find_path_layers(model, found.nodes) if layer.name in nodes}
    scope = scope_slice(model, resolve_scope(model, found.tokens))
    seen = _Seen(model, nodes, scope, num_images)
    for images, labels in on_device(model, track(batches, "cards: look at images")):
        with hook_hidden(model, list(layers.values()), seen.keep):
            run(model, images)
        seen.take(images, labels)
    if not len(seen.labels()):
        raise VitpruneError("no images to make cards of")
    best_PI, values_PI, labels_I = seen.best(), seen.values(), seen.labels()
    names = _Names(model, class_names or {})
    places = [(name, node) for name, own in nodes.items() for node in own]
    steered = _steer(model, layers, places, best_PI[:, 0], batches, scope, names, track)
    of_paths = class_paths(found)
    written = node_names(found)
    fitting = _fit_concepts(values_PI, concepts)
    cards = []
    for place, (name, node) in enumerate(places):
        values_I = values_PI[place]
        peak = _peak(values_I, labels_I, names)
        edges = np.linspace(values_I.min(), max(values_I.max(), values_I.min() + 1e-9), NUM_BINS + 1)
        own_I = labels_I == peak.index if peak is not None else np.zeros(len(labels_I), dtype=bool)
        towards, away = _point(model, layers[name], node, names)
        layer = found.layers.index(name)
        cards.append(
            NeuronCard(
                layer=name,
                node=node,
                name=written(name, node),
                paths=tuple(index for index, path_LK in of_paths.items() if node in path_LK[layer].tolist()),
                images=tuple(best_PI[place].tolist()),
                activations=tuple(float(values_I[image]) for image in best_PI[place].tolist()),
                peak=peak,
                towards=towards,
                away=away,
                bins=tuple(edges.tolist()),
                all_counts=tuple(np.histogram(values_I, edges)[0].tolist()),
                peak_counts=tuple(np.histogram(values_I[own_I], edges)[0].tolist()),
                steering=steered[place],
                concepts=fitting[place],
            )
        )
    pictures, maps = seen.pictures(best_PI)
    return NeuronCards(tuple(cards), found.tokens, pictures, maps)


class _Names:
    """What classes are called."""

    def __init__(self, model: nn.Module, known: Mapping[int, str]) -> None:
        self.known, self.own = known, names_of_classes(model)

    def __call__(self, index: int) -> str:
        if index in self.known:
            return self.known[index]
        # ImageNet's names list several words for one class.
        return self.own[index].split(", ")[0] if index < len(self.own) else str(index)

    def answers(self, values_C: Tensor, count: int = NUM_ANSWERS) -> tuple[Answer, ...]:
        """Return the classes of the highest values, ties by index."""
        order = values_C.sort(descending=True, stable=True).indices[:count].tolist()
        return tuple(Answer(index, self(index), float(values_C[index])) for index in order)


class _Seen:
    """What the images showed: every activation, and pictures and maps of those that may still be on a card."""

    def __init__(self, model: nn.Module, nodes: Mapping[str, Sequence[int]], scope: slice, num_images: int) -> None:
        self.nodes, self.scope, self.num_images = nodes, scope, num_images
        self.prefix, config = num_prefix_tokens(model), data_config(model)
        self.mean, self.std = (torch.tensor(config[key]).view(3, 1, 1) for key in ("mean", "std"))
        patch_size = getattr(getattr(model, "patch_embed", None), "patch_size", None)
        self.patch_size = patch_size if isinstance(patch_size, tuple) else (patch_size, patch_size)
        self.count = 0
        self.batch_values: dict[str, Tensor] = {}
        self.batch_maps: dict[str, Tensor] = {}
        self.kept_values: list[Tensor] = []
        self.kept_labels: list[Tensor] = []
        self.known: dict[int, tuple[Tensor, Tensor]] = {}
        num_nodes = sum(map(len, nodes.values()))
        self.top_values, self.top_images = torch.zeros(0, num_nodes), torch.zeros(0, num_nodes, dtype=torch.int64)

    def keep(self, name: str, h_BNH: Tensor) -> None:
        """Take the activations of a layer from a pass."""
        own_BNP = h_BNH[..., torch.tensor(self.nodes[name], device=h_BNH.device)].float()
        self.batch_values[name] = own_BNP[:, self.scope].mean(1).cpu()
        self.batch_maps[name] = own_BNP[:, self.prefix :].cpu()

    def take(self, images: Tensor, labels: Tensor) -> None:
        """Keep what a pass over images showed."""
        values_BP = torch.cat([self.batch_values[name] for name in self.nodes], 1)
        maps_BNP = torch.cat([self.batch_maps[name] for name in self.nodes], 2)
        self.kept_values.append(values_BP)
        self.kept_labels.append(labels.cpu())
        small = nn.functional.interpolate(images.float().cpu(), (PICTURE_SIDE, PICTURE_SIDE), mode="area")
        pixels = ((small * self.std + self.mean).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1)
        height, width = images.shape[-2] // self.patch_size[0], images.shape[-1] // self.patch_size[1]
        for place in range(len(images)):
            self.known[self.count + place] = (pixels[place], maps_BNP[place].T.reshape(-1, height, width))
        # Stable, and earlier images stand first: ties go to them.
        values = torch.cat([self.top_values, values_BP])
        places_BP = torch.arange(self.count, self.count + len(images)).unsqueeze(1).expand_as(values_BP)
        order = values.sort(dim=0, descending=True, stable=True).indices[: self.num_images]
        self.top_values = values.gather(0, order)
        self.top_images = torch.cat([self.top_images, places_BP]).gather(0, order)
        self.count += len(images)
        wanted = set(self.top_images.flatten().tolist())
        self.known = {place: kept for place, kept in self.known.items() if place in wanted}

    def best(self) -> Tensor:
        """Return the positions of the images that excite each node most, int64 [P, n]; ties go to those read first."""
        return self.top_images.T

    def values(self) -> np.ndarray:
        """Return all activations [P, I]."""
        return torch.cat(self.kept_values).T.double().numpy()

    def labels(self) -> np.ndarray:
        """Return the labels [I]."""
        return torch.cat(self.kept_labels).numpy() if self.kept_labels else np.zeros(0, dtype=np.int64)

    def pictures(self, best_PI: Tensor) -> tuple[Tensor, Tensor]:
        """Return the pictures and maps of the top images."""
        pictures = torch.stack([torch.stack([self.known[image][0] for image in row]) for row in best_PI.tolist()])
        maps = [
            torch.stack([self.known[image][1][place] for image in row]) for place, row in enumerate(best_PI.tolist())
        ]
        return pictures, torch.stack(maps)


def _fit_concepts(values_PI: np.ndarray, concepts: Concepts | None) -> list[tuple[tuple[str, float], ...]]:
    if concepts is None:
        return [()] * len(values_PI)
    if len(concepts.similarity) != values_PI.shape[1]:
        raise VitpruneError(f"concepts of {len(concepts.similarity)} images, where {values_PI.shape[1]} were read")
    scores_PT = score_concepts(torch.from_numpy(values_PI), concepts.similarity)
    order_PT = scores_PT.sort(dim=1, descending=True, stable=True).indices[:, :NUM_ANSWERS]
    return [
        tuple((concepts.names[place], float(scores_T[place])) for place in order_T.tolist())
        for scores_T, order_T in zip(scores_PT, order_PT, strict=True)
    ]


def _peak(values_I: np.ndarray, labels_I: np.ndarray, names: _Names) -> Answer | None:
    classes = np.unique(labels_I)
    if len(classes) < 2:
        return None
    index = int(max(classes, key=lambda each: values_I[labels_I == each].mean()))
    own = labels_I == index
    ranks, count = rankdata(values_I), int(own.sum())
    above = ranks[own].sum() - count * (count + 1) / 2
    return Answer(index, names(index), float(above / (count * (len(values_I) - count))))


def _point(model: nn.Module, layer, node: int, names: _Names) -> tuple[tuple[Answer, ...], tuple[Answer, ...]]:
    """Return the classes that a node's output moves up and down most."""
    head = getattr(model, "head", None)
    norm = next(
        (
            each
            for each in (getattr(model, "fc_norm", None), getattr(model, "norm", None))
            if isinstance(each, nn.LayerNorm)
        ),
        None,
    )
    if not isinstance(head, nn.Linear) or norm is None or head.out_features < 2:
        return (), ()
    block = model.get_submodule(layer.name.rpartition(".")[0])
    branch = 2 if kind_of_layer(layer.name) == FFN else 1
    column_D = scale_branch(block, branch, model.get_submodule(layer.read_by).weight[:, node])
    moved_C = (norm.weight * (column_D - column_D.mean())) @ head.weight.T
    z_C = ((moved_C - moved_C.mean()) / moved_C.std().clamp_min(1e-12)).cpu()
    away = tuple(Answer(each.index, each.name, -each.value) for each in names.answers(-z_C))
    return names.answers(z_C), away


def _steer(
    model: nn.Module,
    layers: Mapping[str, object],
    places: Sequence[tuple[str, int]],
    top_P: Tensor,
    batches: Batches,
    scope: slice,
    names: _Names,
    track: Track,
) -> list[tuple[Steering, ...]]:
    """Return what each node's top image is taken for with the node scaled."""
    of_image: dict[int, list[int]] = {}
    for place, image in enumerate(top_P.tolist()):
        of_image.setdefault(image, []).append(place)
    result: list[tuple[Steering, ...]] = [()] * len(places)
    factors = torch.tensor(FACTORS)
    count = 0
    for images, _labels in on_device(model, track(batches, "cards: turn neurons up and down")):
        for position, image in enumerate(images, count):
            for place in of_image.get(position, ()):
                name, node = places[place]

                def scale(_name: str, h_BNH: Tensor, node: int = node) -> Tensor:
                    h_BNH = h_BNH.clone()
                    h_BNH[:, scope, node] *= factors.to(h_BNH.device, h_BNH.dtype).unsqueeze(1)
                    return h_BNH

                with hook_hidden(model, [layers[name]], scale):
                    logits_FC = ask(model, image.expand(len(FACTORS), -1, -1, -1))
                probabilities_FC = of_classes(logits_FC).float().softmax(-1).cpu()
                result[place] = tuple(
                    Steering(factor, names.answers(row_C))
                    for factor, row_C in zip(FACTORS, probabilities_FC, strict=True)
                )
        count += len(images)
    return result

"""Make a discovery of paths that the authors' program found: give them their images, and see that a model agrees.

Their files lack the names of the images, what the model answers and, some of them, the joint scores. The names follow
from the order, the others are measured here, under the transform that their program uses. Class scores stay unknown.

Letters: I images, L FFNs, K neurons per FFN.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from vitprune.data import Batches, ImageSet, on_device
from vitprune.discovery.best import best_neurons
from vitprune.discovery.discover import Discovery, set_pace
from vitprune.discovery.engine import first_rule, score_paths
from vitprune.discovery.methods import plan_search
from vitprune.discovery.search import Search
from vitprune.errors import VitpruneError
from vitprune.interop.authors import ARGS_SUFFIX, AuthorsPaths, folder_order
from vitprune.models.trunk import record_clean, scope_slice
from vitprune.models.units import frozen
from vitprune.seen_images import watch
from vitprune.views import data_config

LEAST_AGREEMENT = 0.9
# Images with other weights, order or transform show after a few; a whole data set takes hours.
IMAGES_BEFORE_REFUSAL = 256
# Joint scores are expensive, and one alike by chance is unlikely.
SCORES_TO_COMPARE = 8
SCORE_TOLERANCE = 0.05


@dataclass(frozen=True)
class PathsOfImages:
    """Paths with the images that they are of.

    Attributes:
        images: in the order of ``find_images``.
        neurons: int64 [I, L, K].
        joint_scores: float32 [I]; None where unknown.
        activation_neurons: int64 [I, L, K]; None where unknown.
    """

    images: ImageSet
    neurons: Tensor
    joint_scores: Tensor | None
    activation_neurons: Tensor | None


@dataclass(frozen=True)
class Agreement:
    """How much of what files say a model says as well.

    Attributes:
        compared: ``activation neurons`` (of every image), ``joint scores`` (of ``SCORES_TO_COMPARE`` images), or None
            where the files hold neither.
        share: of them that agree, in [0, 1]; None where nothing was compared.
        num_images: compared.
    """

    compared: str | None
    share: float | None
    num_images: int


def describe_search(paths: AuthorsPaths, model: nn.Module) -> Search:
    """Say how paths were found, checked against a model: from ``args.json``, and by what their program always does.

    It takes the class token where the head reads it, else the patches, and a left Riemann sum.

    Raises:
        VitpruneError: if the model has other FFNs than the paths go through, or ``args.json`` lacks ``ig_total_step``.
    """
    (num_ffns, top_k) = next(iter(paths.neurons.values())).shape[1:]
    facts = paths.args.get("vitprune")
    if facts is None:
        steps = paths.args.get("ig_total_step")
        if type(steps) is not int or steps < 1:
            raise VitpruneError(
                f"{paths.prefix}{ARGS_SUFFIX}: ig_total_step must be a number of steps, found {steps!r}"
            )
        facts = {
            "tokens": None,
            "quadrature": {paths.method: f"riemann:{steps}"},
            "precision": {paths.method: "float32"},
        }
    search = plan_search(
        model, method=paths.method, top_k=top_k, tokens=facts["tokens"], quadrature=facts["quadrature"][paths.method]
    )
    if len(search.layers) != num_ffns:
        raise VitpruneError(f"{paths.prefix}: its paths go through {num_ffns} FFNs, the model has {len(search.layers)}")
    largest_L = torch.stack([neurons.amax((0, 2)) for neurons in paths.neurons.values()]).amax(0)
    for ffn, largest in zip(search.layers, largest_L.tolist(), strict=True):
        if largest >= ffn.num_neurons:
            raise VitpruneError(
                f"{paths.prefix}: names neuron {largest} of {ffn.name}, which has {ffn.num_neurons} in the model"
            )
    # Not asked of the model: the paths are there.
    return replace(search, precision=facts["precision"][paths.method])


def authors_transform(args: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return how images were prepared, in the words of ``data_config``.

    The authors' program squeezes images into a square and takes ImageNet's statistics, whatever the weights expect.

    Raises:
        VitpruneError: if the model takes images of another size.
    """
    own = data_config(model)
    if "vitprune" in args:
        return dict(args["vitprune"]["transform"] or own)
    size = args.get("img_size")
    channels, *expected = own["input_size"]
    if [size, size] != expected:
        raise VitpruneError(
            f"the paths are of images of {size} x {size} pixels (img_size in {ARGS_SUFFIX}), the model takes "
            f"{expected[0]} x {expected[1]}"
        )
    return {
        "input_size": [channels, size, size],
        "interpolation": "bilinear",
        "mean": list(IMAGENET_DEFAULT_MEAN),
        "std": list(IMAGENET_DEFAULT_STD),
        "crop_pct": 1.0,
        "crop_mode": "squash",
    }


def assign_images(paths: AuthorsPaths, images: ImageSet) -> PathsOfImages:
    """Give the paths of each class the images of that class, in the order of torchvision's ``ImageFolder``.

    Classes without paths, and paths without images, are left out.

    Raises:
        VitpruneError: if a class has another number of images than paths, or no class has both.
    """
    kept = [place for place, label in enumerate(images.labels) if label in paths.neurons]
    if not kept:
        raise VitpruneError(
            f"{images.root} has images of the classes {_list_few(images.labels)}, {paths.prefix} has paths of "
            f"{_list_few(paths.neurons)}: none in common"
        )
    images = images.at(kept)
    files_of: dict[int, list[str]] = {label: [] for label in sorted(set(images.labels))}
    for file, label in zip(images.files, images.labels, strict=True):
        files_of[label].append(file)
    row_of: dict[str, int] = {}
    for label, files in files_of.items():
        num_paths = len(paths.neurons[label])
        if num_paths != len(files):
            twice = num_paths > len(files) and num_paths % len(files) == 0
            remedy = (
                "its program appends where a file exists: keep one run's lines" if twice else "take the same images"
            )
            raise VitpruneError(
                f"{paths.prefix}-{label}.rlt.jsonl: {num_paths} paths, but {images.root} has {len(files)} images of "
                f"class {images.class_names[label]}; {remedy}"
            )
        row_of |= {file: row for row, file in enumerate(sorted(files, key=folder_order))}

    def gather(by_class: Mapping[int, Tensor] | None) -> Tensor | None:
        if by_class is None:
            return None
        places = zip(images.labels, images.files, strict=True)
        return torch.stack([by_class[label][row_of[file]] for label, file in places])

    return PathsOfImages(images, gather(paths.neurons), gather(paths.joint_scores), gather(paths.activation_neurons))


def _list_few(labels) -> str:
    ordered = sorted(set(labels))
    return ", ".join(map(str, ordered[:3])) + (f", .. {ordered[-1]}" if len(ordered) > 3 else "")


def adopt(
    model: nn.Module,
    search: Search,
    paths: PathsOfImages,
    batches: Batches,
    *,
    least_agreement: float = LEAST_AGREEMENT,
) -> tuple[Discovery, Agreement]:
    """Make a discovery of another program's paths, with what its files lack measured on the model.

    One clean forward pass of every image gives the predictions, and the neurons of highest activation to compare with
    the files'. Joint scores that the files lack are computed; where the files have scores but no activation neurons,
    those of a few images are computed to compare. Scores of every neuron would take the whole search again and are left
    out: ``class_scores`` are [0, H].

    Args:
        model: in eval mode.
        search: from ``describe_search``.
        paths: from ``assign_images``.
        batches: all of their images in order, under ``authors_transform``, and labels. Read once.
        least_agreement: in [0, 1]; 0 takes the paths whatever the model says.

    Raises:
        VitpruneError: if the model agrees with less than that, has no isotropic trunk, or there are more or fewer
            images than paths.

    Source:
        arXiv:2503.09046, its released program.
    """
    if not 0 <= least_agreement <= 1:
        raise VitpruneError(f"least_agreement must be in [0, 1], got {least_agreement}")
    measured = _Measured(paths)
    at_once = None
    watched = watch(batches)
    for images_B, _labels in on_device(model, watched):
        if at_once is None:
            at_once = set_pace(model, search, images_B[:1]).images
        measured.add(model, search, images_B, at_once)
        if measured.seen >= IMAGES_BEFORE_REFUSAL:
            _refuse_disagreement(measured.agreement(), least_agreement)
    if measured.seen != len(paths.neurons):
        raise VitpruneError(f"{measured.seen} images for {len(paths.neurons)} paths")
    agreement = measured.agreement()
    _refuse_disagreement(agreement, least_agreement)
    labels = torch.tensor(paths.images.labels)
    found = Discovery(
        layers=tuple(ffn.name for ffn in search.layers),
        neurons=paths.neurons,
        joint_scores=measured.own_scores if paths.joint_scores is None else paths.joint_scores,
        labels=labels,
        predictions=measured.predictions,
        completeness_errors=None,
        classes=tuple(sorted(set(labels.tolist()))),
        class_scores={ffn.name: torch.zeros(0, ffn.num_neurons) for ffn in search.layers},
        method=search.method,
        tokens=search.tokens,
        quadrature=search.rule.name,
        precision=search.precision,
        seen=watched.seen,
    )
    return found, agreement


class _Measured:
    """What the model says of images, filled batch by batch.

    Attributes:
        seen: images so far.
        predictions: int64 [I].
        own_scores: float32 [I]; joint scores of the paths, where they were computed.
        selected: float32 [I]; share of the files' activation neurons that the model has as well.
    """

    def __init__(self, paths: PathsOfImages) -> None:
        num_images = len(paths.neurons)
        self.paths, self.seen = paths, 0
        self.predictions = torch.zeros(num_images, dtype=torch.int64)
        self.own_scores, self.selected = torch.zeros(num_images), torch.zeros(num_images)
        self._scored = torch.full((num_images,), paths.joint_scores is None)
        if paths.joint_scores is not None and paths.activation_neurons is None:
            first = min(num_images, IMAGES_BEFORE_REFUSAL)
            self._scored[:: max(1, first // SCORES_TO_COMPARE)] = True
            self._scored[first:] = False

    def add(self, model: nn.Module, search: Search, images_B: Tensor, at_once: int) -> None:
        rows = slice(self.seen, self.seen + len(images_B))
        if rows.stop > len(self.predictions):
            raise VitpruneError(f"more images than the {len(self.predictions)} paths")
        scope = scope_slice(model, search.tokens)
        clean = record_clean(model, search.layers, images_B, tokens=scope)
        self.predictions[rows] = clean.logits_BC.argmax(-1).cpu()
        if self.paths.activation_neurons is not None:
            theirs_BLK = self.paths.activation_neurons[rows]
            best = [best_neurons(hidden_BTH.mean(1), search.top_k).cpu() for hidden_BTH in clean.hidden_BTH]
            same = theirs_BLK.unsqueeze(-1) == torch.stack(best, 1).unsqueeze(-2)
            self.selected[rows] = same.any(-1).float().mean((1, 2))
        self.seen = rows.stop
        places = self._scored[rows].nonzero().squeeze(1)
        if len(places) == 0:
            return
        asked = replace(search, rule=first_rule(search.rule, one_token=scope == slice(0, 1)))
        labels_B = torch.tensor(self.paths.images.labels[rows]).to(images_B.device)
        neurons_BLK = self.paths.neurons[rows].to(images_B.device)
        for part in places.split(at_once):
            with frozen(model):
                score = score_paths(model, asked, images_B[part], labels_B[part], neurons_BLK[part])
            self.own_scores[rows.start + part] = score.float().cpu()

    def agreement(self) -> Agreement:
        if self.paths.activation_neurons is not None:
            return Agreement("activation neurons", float(self.selected[: self.seen].mean()), self.seen)
        if self.paths.joint_scores is None:
            return Agreement(None, None, 0)
        scored = self._scored.clone()
        scored[self.seen :] = False
        theirs, own = self.paths.joint_scores[scored], self.own_scores[scored]
        # Against the usual size of a score: one that nearly vanishes is a difference of large terms.
        close = torch.isclose(own, theirs, rtol=SCORE_TOLERANCE, atol=SCORE_TOLERANCE * float(theirs.abs().median()))
        return Agreement("joint scores", float(close.float().mean()), len(theirs))


def _refuse_disagreement(agreement: Agreement, least: float) -> None:
    if agreement.share is not None and agreement.share < least:
        raise VitpruneError(
            f"the model agrees with {agreement.share:.0%} of the {agreement.compared} in the files "
            f"({agreement.num_images} images compared), where at least {least:.0%} are expected: its weights, the "
            "images or their order are not those of the paths; least_agreement 0 takes them all the same"
        )

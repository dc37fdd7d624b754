"""Paths that an image is tested with but had no part in: those of the other half of its class, or of other images.

Letters: I images, L FFNs, K neurons per FFN.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vitprune.discovery.discover import Discovery
from vitprune.errors import VitpruneError


def split_halves(labels: Tensor, *, seed: int = 0) -> Tensor:
    """Deal the images of every class into two halves at random; of an odd number, the second half gets one more.

    Args:
        labels: int64 [I].
        seed: of the dealing.

    Returns:
        bool [I]: whether an image is of the second half.

    Raises:
        VitpruneError: if a class has one image only.

    >>> split_halves(torch.tensor([4, 4, 9, 9, 9])).sum().item()
    3
    """
    generator = torch.Generator().manual_seed(seed)
    second = torch.zeros(len(labels), dtype=torch.bool)
    for index in labels.unique().tolist():
        members = (labels == index).nonzero().squeeze(1)
        if len(members) < 2:
            raise VitpruneError(f"class {index} has one image, so it has no halves; discover more images per class")
        order = members[torch.randperm(len(members), generator=generator)]
        second[order[len(order) // 2 :]] = True
    return second


def paths_of(found: Discovery, images: Tensor) -> dict[int, Tensor]:
    """Return the class paths of some images: per FFN the K neurons most often on the paths of a class.

    Unlike ``class_paths``, whose ties go by the mean score over all images of the class, ties go to the higher sum of
    the joint scores of these images, then to the lower index: the other images have no say.

    Args:
        found: paths of I images.
        images: bool [I]; those that count.

    Returns:
        class index -> int64 [L, K], for the classes of these images.
    """
    top_k = found.neurons.shape[-1]
    paths = {}
    for index in found.labels[images].unique().tolist():
        members = images & (found.labels == index)
        layers = []
        for position, name in enumerate(found.layers):
            neurons_IK = found.neurons[members, position]
            num_neurons = found.class_scores[name].shape[1]
            visits = torch.bincount(neurons_IK.flatten(), minlength=num_neurons)
            weights = found.joint_scores[members].double().unsqueeze(1).expand(neurons_IK.shape)
            scores = torch.zeros(num_neurons, dtype=torch.float64)
            scores.index_add_(0, neurons_IK.flatten(), weights.flatten())
            # Unvisited neurons come last even where visited ones have a negative score.
            by_score = torch.where(visits > 0, scores, -torch.inf).sort(descending=True, stable=True).indices
            by_visits = visits[by_score].sort(descending=True, stable=True).indices
            layers.append(by_score[by_visits][:top_k])
        paths[index] = torch.stack(layers)
    return paths


def halves_paths(found: Discovery, *, seed: int = 0) -> Tensor:
    """Give each image the path that its class has on the other half of its images.

    Returns:
        int64 [I, L, K].

    Raises:
        VitpruneError: if a class has one image only.
    """
    second = split_halves(found.labels, seed=seed)
    of_first, of_second = paths_of(found, ~second), paths_of(found, second)
    return torch.stack(
        [
            (of_first if half else of_second)[int(label)]
            for label, half in zip(found.labels, second.tolist(), strict=True)
        ]
    )


def assign_paths(paths: Mapping[int, Tensor], labels: Sequence[int], *, shift: int = 0) -> Tensor:
    """Give each image the path of its class, or of the class ``shift`` places further on: a control.

    Args:
        paths: class index -> int64 [L, K].
        labels: of the images.
        shift: classes to go on in ascending order of the index, around the end.

    Returns:
        int64 [I, L, K].

    Raises:
        VitpruneError: if a class has no path, or ``shift`` leads nowhere else.

    >>> assign_paths({3: torch.tensor([[7]]), 5: torch.tensor([[8]])}, [5, 3, 5], shift=1).flatten().tolist()
    [7, 8, 7]
    """
    classes = sorted(paths)
    absent = sorted({int(label) for label in labels} - set(classes))
    if absent:
        raise VitpruneError(f"class {absent[0]} has images but no path in the run; choose with `classes`")
    if shift % len(classes) == 0 and shift:
        raise VitpruneError(f"a run of {len(classes)} classes has no other class to take paths from")
    place = {index: classes[(number + shift) % len(classes)] for number, index in enumerate(classes)}
    return torch.stack([paths[place[int(label)]] for label in labels])

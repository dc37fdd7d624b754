"""The model that a pruned one came from, opened again to teach it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import nn

from vitprune.entry import entry
from vitprune.errors import VitpruneError
from vitprune.models.classifier import keep_classes
from vitprune.models.identity import hash_weights
from vitprune.models.image_size import set_image_size
from vitprune.models.load import load
from vitprune.pruning.plan import Plan
from vitprune.views import data_config


@entry
def open_teacher(
    model: nn.Module,
    plan: Plan | None,
    name: str | None = None,
    *,
    checkpoint: str | None = None,
    device: str = "cpu",
) -> nn.Module:
    """Open the teacher of a pruned model: the dense model of its plan, or another one.

    Of a teacher of more classes, those that the model knows by name are kept; one that was built for another image
    size is resampled to the model's.

    Args:
        model: that is taught.
        plan: of the model; None where it has none.
        name: as ``load`` takes it; None: the model that was pruned, as it was loaded then, whose weights must be the
            same.
        checkpoint: weights of the teacher.
        device: where to put it.

    Raises:
        VitpruneError: if there is no teacher to be found, or it is not the model that was pruned.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1)
    >>> open_teacher(model, None)
    Traceback (most recent call last):
        ...
    vitprune.errors.VitpruneError: the model has no plan that names the one it came from; pass `teacher`
    """
    if name is None and (plan is None or plan.facts.architecture is None):
        raise VitpruneError("the model has no plan that names the one it came from; pass `teacher`")
    opened = dict(plan.facts.opened or {}) if name is None else {}
    known = opened.pop("model", None if plan is None else plan.facts.architecture)
    opened = {key: value for key, value in opened.items() if key != "checkpoint" or checkpoint is None}
    try:
        told = {"checkpoint": checkpoint, "device": device, **opened}
        teacher = load(known if name is None else name, **told)
    except VitpruneError as error:
        raise VitpruneError(f"teacher: {str(error).replace('`checkpoint`', '`teacher_checkpoint`')}") from error
    found = hash_weights(teacher)
    if teacher.num_classes != model.num_classes and getattr(model, "label_names", None):
        teacher = _keep_named(teacher, model.label_names)
    if name is None and plan.facts.weights_sha256 not in (None, found, hash_weights(teacher)):
        raise VitpruneError(
            f"{plan.facts.architecture} with these weights is not the model that was pruned: pass its weights as "
            "`teacher_checkpoint`, or name another `teacher`"
        )
    size = data_config(model)["input_size"][1:]
    if data_config(teacher)["input_size"][1:] != size:
        teacher = set_image_size(teacher, tuple(size))
    return teacher.eval()


def _keep_named(teacher: nn.Module, wanted: Sequence[str]) -> nn.Module:
    known: Any = getattr(teacher, "label_names", None)
    if not known:
        subset = infer_imagenet_subset(teacher)
        known = ImageNetInfo(subset).label_names() if subset else ()
    places = {name: index for index, name in enumerate(known)}
    missing = [name for name in wanted if name not in places]
    if missing:
        raise VitpruneError(f"`teacher` does not know the model's class '{missing[0]}'; pass one that does")
    return keep_classes(teacher, [places[name] for name in wanted], label_names=wanted)

"""Take over a model of transformers, torchvision or open_clip: as its timm twin, which is proved to answer alike."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vitprune.errors import VitpruneError
from vitprune.twins.of_open_clip import read_open_clip, twin_of_open_clip
from vitprune.twins.of_torchvision import read_torchvision, rename_torchvision, twin_of_torchvision
from vitprune.twins.of_transformers import rename_transformers, twin_of_transformers
from vitprune.twins.twin import State, build_twin, join_queries
from vitprune.wrappers import OPEN_CLIP, TORCHVISION, TRANSFORMERS, evaluating, library_of

# Relative to the largest number of an answer.
TOLERANCE = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}


def adopt(model: nn.Module) -> nn.Module:
    """Return the timm twin of a model of another library, with a copy of its weights.

    Both are asked about random images, and a twin that answers otherwise is refused.

    Args:
        model: of transformers (ViT, DeiT, DINOv2, DINOv3, BEiT, SigLIP, CLIP, Swin), torchvision (ViT, Swin), or
            open_clip (the whole model, or its ``visual``); stays as it is.

    Returns:
        In eval mode. How its images are prepared is taken to be usual for its family.

    Raises:
        VitpruneError: if it has no twin.
    """
    library, name = library_of(model), type(model).__name__
    if library == TRANSFORMERS:
        twin = adopt_transformers(model.config.to_dict(), model.state_dict(), source=name)
    elif library == TORCHVISION:
        facts = read_torchvision(model)
        twin = build_twin(twin_of_torchvision(facts, model.state_dict(), source=name))
        twin.twin = {"library": TORCHVISION, "class": name, "names": list(model.state_dict())}
    elif library == OPEN_CLIP:
        model = getattr(model, "visual", model)
        if type(model).__name__ == "TimmModel":
            raise VitpruneError(f"{name} holds a timm model; pass it: model.visual.trunk")
        facts = read_open_clip(model)
        twin = build_twin(twin_of_open_clip(facts, model.state_dict(), source=name))
        config = {"ls_init_value": 1e-5} if any(".ls_1." in key for key in model.state_dict()) else {}
        twin.twin = {"library": OPEN_CLIP, "config": config, "names": list(model.state_dict())}
    else:
        raise VitpruneError(
            f"{name} is of no library with twins in timm; those are transformers, torchvision and open_clip"
        )
    _compare(model, twin, name)
    return twin


def adopt_transformers(
    config: Mapping[str, Any],
    state: State,
    *,
    processor: Mapping[str, Any] | None = None,
    source: str = "the model",
) -> nn.Module:
    """Return the timm twin of a vision model of transformers, of its description and weights alone.

    Args:
        config: its ``config.json``.
        state: its tensors.
        processor: its ``preprocessor_config.json``.
        source: what it is, for messages.

    Raises:
        VitpruneError: if it has no twin.
    """
    twin = build_twin(twin_of_transformers(config, state, processor=processor, source=source))
    twin.twin = {
        "library": TRANSFORMERS,
        "config": _without_origin(config),
        "processor": processor,
        "names": list(state),
    }
    return twin


def _without_origin(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a description without where it was read, which is nobody's business once the model is handed on."""
    return {
        key: _without_origin(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if not str(key).startswith("_name_or_path")
    }


def rename_checkpoint(state: State) -> dict[str, Tensor] | None:
    """Return a ViT's or DeiT's state dict of torchvision or transformers by timm's names; None where it is none.

    >>> rename_checkpoint({"head.weight": torch.ones(2, 2)}) is None
    True
    """
    try:
        if {"class_token", "conv_proj.weight"} <= state.keys():
            return rename_torchvision(state)
        if any(name.endswith("embeddings.patch_embeddings.projection.weight") for name in state):
            named = join_queries(rename_transformers("vit", state))
            if "head_dist.weight" in named:
                named["dist_token"] = named.pop("reg_token")
            return named
    except VitpruneError:  # of another family, which has more tensors
        return None
    return None


@torch.no_grad()
def _compare(model: nn.Module, twin: nn.Module, name: str) -> None:
    """Refuse a twin that answers otherwise than the model it stands for."""
    theirs, ours = next(model.parameters()), next(twin.parameters())
    size = twin.pretrained_cfg["input_size"]
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    with evaluating(model):
        told = _ask(model, images.to(theirs))
    got = twin(images.to(ours)).float().cpu()
    expected = _find_answer(told, got)
    if expected is None:
        raise VitpruneError(f"{name} answers nothing of the shape {list(got.shape)} that its timm twin answers")
    largest = float(expected.abs().max())
    difference = float((expected - got).abs().max())
    if not difference <= TOLERANCE[ours.dtype] * max(largest, 1.0):
        raise VitpruneError(
            f"{name} answers otherwise than timm's model of its description (by {difference:.3g} of {largest:.3g}); it "
            "cannot be taken over"
        )


def _ask(model: nn.Module, images: Tensor) -> Any:
    if library_of(model) != TRANSFORMERS:
        return model(images)
    if hasattr(model, "text_model"):  # of images and text: the images' side alone
        return model.get_image_features(pixel_values=images)
    return model(pixel_values=images)


def _find_answer(told: Any, got: Tensor) -> Tensor | None:
    """Return what of a model's output is what its twin answers; of several such, the nearest."""
    if isinstance(told, Tensor):
        candidates = [told]
    else:
        values = [told[key] for key in told] if isinstance(told, Mapping) else list(told)
        candidates = [each for each in values if isinstance(each, Tensor)]
        candidates += [each[:, 0] for each in candidates if each.ndim == 3]
    candidates = [each.float().cpu() for each in candidates]
    candidates = [each for each in candidates if each.shape == got.shape]
    return min(candidates, key=lambda each: float((each - got).abs().max()), default=None)

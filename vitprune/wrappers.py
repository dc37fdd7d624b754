"""Models that others have wrapped: the timm model inside, where the wrapper changes nothing that it answers.

``torch.compile``, data parallelism and training frameworks put a module of their own around a model. What surgery needs
is the model itself. A wrapper is taken off where that is proved to change nothing: by its type, by its having no
``forward`` of its own, or by the same answers to random images.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from vitprune.errors import VitpruneError

_PLAIN = (nn.DataParallel, nn.parallel.DistributedDataParallel)
_FEATURES_ONLY = "timm.models._features"
_SIZE_UNKNOWN = (3, 224, 224)
# Libraries whose models have twins in timm.
TRANSFORMERS, TORCHVISION, OPEN_CLIP = "transformers", "torchvision", "open_clip"
_HOME_OF = {TRANSFORMERS: "transformers.", TORCHVISION: "torchvision.models.", OPEN_CLIP: "open_clip."}


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside wrappers that do not change what it answers; any other model as it is.

    timm's ``features_only`` models do not say that they have no classes, nor how wide their last map is; from here on
    they do (``num_classes``, ``num_features``).

    Args:
        model: any module; stays as it is.

    Raises:
        VitpruneError: if this process has only a shard of its weights.

    >>> import timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32)
    >>> unwrap(nn.DataParallel(model)) is model
    True
    """
    while True:
        inner = _inner(model)
        if inner is None:
            if type(model).__module__ == _FEATURES_ONLY and not hasattr(model, "num_classes"):
                model.num_classes, model.num_features = 0, model.feature_info.channels()[-1]
            return model
        model = inner


def wrapped_model(model: nn.Module) -> tuple[str, nn.Module] | None:
    """Return name and module of the first timm model inside another module; None where there is none, or it is one.

    >>> import timm
    >>> wrapped_model(nn.Sequential(nn.Identity(), timm.create_model("resnet18")))[0]
    '1'
    """
    if _is_timm(model):
        return None
    return next(((name, module) for name, module in model.named_modules() if _is_timm(module)), None)


def library_of(model: nn.Module) -> str | None:
    """Return which other library a model's class is of; None for timm's and a user's own.

    >>> library_of(nn.Linear(2, 2)) is None
    True
    """
    home = type(model).__module__
    return next((name for name, prefix in _HOME_OF.items() if f"{home}.".startswith(prefix)), None)


def check_unwrapped(model: nn.Module) -> None:
    """Refuse a module that holds a timm model and does more than that, or is another library's.

    Raises:
        VitpruneError: naming the model inside, or what makes a timm model of it.
    """
    library = library_of(model)
    if library is not None:
        raise VitpruneError(
            f"{type(model).__name__} is of {library}; vitprune.load(model) gives the timm model that computes the "
            "same, for every verb"
        )
    inside = wrapped_model(model)
    if inside is not None:
        name, module = inside
        raise VitpruneError(
            f"{type(model).__name__} holds a {type(module).__name__} ('{name}') and does more than that; pass the "
            "model inside, and images as it reads them"
        )


def find_patch_embed(model: nn.Module) -> nn.Module | None:
    """Return what makes tokens of a model's images; None where it has no such module.

    >>> import timm
    >>> find_patch_embed(timm.create_model("vit_tiny_patch16_224", features_only=True)).patch_size
    (16, 16)
    """
    found = getattr(model, "patch_embed", None)
    return found if found is not None else getattr(getattr(model, "model", None), "patch_embed", None)


def input_size(model: nn.Module) -> tuple[int, int, int]:
    """Return channels, height and width of the images that a model was built for."""
    config = getattr(model, "pretrained_cfg", None) or {}
    size = tuple(config.get("input_size", _SIZE_UNKNOWN))
    built_for = getattr(find_patch_embed(model), "img_size", None)
    first = next((module for module in model.modules() if isinstance(module, nn.Conv2d)), None)
    channels = size[0] if first is None else first.in_channels
    return (channels, *(size[1:] if built_for is None else built_for))


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Put models into eval mode for a while; every submodule then gets its own mode back, also after an exception.

    >>> model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    >>> with evaluating(model):
    ...     model[0].training
    False
    >>> model[0].training, model[1].training
    (True, False)
    """
    modes = [(module, module.training) for model in models for module in model.modules() if module.training]
    try:
        for module, _training in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


def _is_timm(model: nn.Module) -> bool:
    return hasattr(model, "pretrained_cfg")


def _inner(model: nn.Module) -> nn.Module | None:
    if "_orig_mod" in model._modules:  # of torch.compile
        return model._modules["_orig_mod"]
    if "_fsdp_wrapped_module" in model._modules:
        raise VitpruneError(
            f"{type(model).__name__} holds a shard of the weights in each process; gather the full state dict and load "
            "it into a model of its own"
        )
    if isinstance(model, _PLAIN):
        return model.module
    if _is_timm(model):
        return None
    held = [child for child in model.children() if any(map(_is_timm, child.modules()))]
    if len(held) == 1 and not _has_forward(model):
        return held[0]
    return next((child for child in held if _answer_alike(model, child)), None)


def _has_forward(model: nn.Module) -> bool:
    return type(model).forward is not nn.Module.forward


@torch.no_grad()
def _answer_alike(model: nn.Module, child: nn.Module) -> bool:
    inside = next(module for module in child.modules() if _is_timm(module))
    parameter = next(inside.parameters())
    images = torch.randn(1, *input_size(inside), generator=torch.Generator().manual_seed(0)).to(parameter)
    with evaluating(model):
        try:
            expected, got = model(images), child(images)
        except NotImplementedError:  # Lightning's way to have no forward
            return True
        except Exception:  # a wrapper that reads something else than images does more than its model
            return False
    return isinstance(expected, torch.Tensor) and isinstance(got, torch.Tensor) and torch.equal(expected, got)

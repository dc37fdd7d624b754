"""What the shapes of a state dict tell about the arguments that its Vision Transformer was created with."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vitprune.errors import VitpruneError

# Pooling that timm norms after, in ``fc_norm``.
_POOLED = ("avg", "avgmax", "max")
_WIDTHS = {"tiny": 192, "small": 384, "base": 768, "large": 1024, "huge": 1280}
_DEPTHS = {"tiny": 12, "small": 12, "base": 12, "large": 24, "huge": 32}
_SYNONYMS = {"reg_tokens": "num_reg_tokens"}

State = Mapping[str, Tensor]


def infer_arguments(
    reference: nn.Module,
    state: State,
    *,
    name: str,
    source: str,
    said: Mapping[str, Any],
    told: Mapping[str, Any],
    image_size: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Return the arguments in which a state dict's model differs from the model of a name.

    Args:
        reference: model of the name, on any device; its weights do not matter.
        state: name -> tensor, in timm's names.
        name: timm name.
        source: of the state dict, for the message.
        said: arguments that the user gives, which are not questioned.
        told: arguments that the file tells, where shapes are silent.
        image_size: height and width that the user asks for, of use where shapes leave several grids.

    Raises:
        VitpruneError: if shapes and the name leave something open that changes the answers.

    >>> import timm
    >>> tuned = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=160, num_classes=7).state_dict()
    >>> reference = timm.create_model("vit_tiny_patch16_224")
    >>> infer_arguments(reference, tuned, name="vit_tiny_patch16_224", source="tuned.pth", said={}, told={})
    {'depth': 2, 'num_classes': 7, 'img_size': 160}
    """
    accepted = accepted_arguments(reference)
    own, usual = _read_shapes(state), _read_shapes(reference.state_dict())
    known = {**told, **said}
    told = {key: value for key, value in told.items() if key in accepted and key not in own}
    num_classes = _count_classes(reference, state)
    if "depth" not in own or getattr(getattr(reference, "patch_embed", None), "grid_size", None) is None:
        # Other names, or an architecture whose shapes are not read here.
        return {**told, **({} if num_classes == reference.num_classes else {"num_classes": num_classes}), **said}
    told = {key: value for key, value in told.items() if key not in ("global_pool", "img_size")}
    found = {key: value for key, value in own.items() if key not in ("pooling", "head_dim") and usual.get(key) != value}
    if num_classes != reference.num_classes:
        found["num_classes"] = num_classes
    if "init_values" in found:
        found["init_values"] = 1e-5 if found["init_values"] else 0.0
    found |= _infer_pooling(reference, own, usual, known)
    arguments = {**told, **found}
    if "embed_dim" in found:
        arguments |= _infer_heads(reference, own, name, source, known)
    arguments |= _infer_grid(reference, state, own, source, known, arguments, image_size)
    for key, other in _SYNONYMS.items():
        if key in arguments and key not in accepted and other in accepted:
            arguments[other] = arguments.pop(key)
    return {**{key: value for key, value in arguments.items() if key in accepted}, **said}


def accepted_arguments(model: nn.Module) -> frozenset[str]:
    """Return the names of what the class of a model can be created with."""
    return frozenset(
        key
        for kind in type(model).__mro__
        if kind is not nn.Module
        for key in inspect.signature(kind.__init__).parameters
    ) - {"self", "args", "kwargs", "device", "dtype"}


def _read_shapes(state: State) -> dict[str, Any]:
    """Return what shapes tell, by the names of timm's arguments."""
    facts: dict[str, Any] = {}
    projection = state.get("patch_embed.proj.weight")
    if projection is None or projection.dim() != 4:
        return facts
    width, facts["in_chans"], *patch = projection.shape
    facts["embed_dim"] = width
    facts["patch_size"] = patch[0] if patch[0] == patch[1] else tuple(patch)
    blocks = {int(number[1]) for number in (re.match(r"blocks\.(\d+)\.", key) for key in state) if number}
    if not blocks:
        return facts
    facts["depth"] = max(blocks) + 1
    hidden = [state[key].shape[0] for key in state if re.fullmatch(r"blocks\.\d+\.mlp\.fc1\.weight", key)]
    if hidden:
        # Widths may differ where neurons were removed: the layers are fitted to them one by one.
        most = max(hidden)
        facts["mlp_ratio"] = most / width if int(width * (most / width)) == most else (most + 0.5) / width
    if "blocks.0.attn.qkv.weight" in state:
        facts["qkv_bias"] = any(key in state for key in ("blocks.0.attn.qkv.bias", "blocks.0.attn.q_bias"))
        facts["proj_bias"] = "blocks.0.attn.proj.bias" in state
        facts["qk_norm"] = "blocks.0.attn.q_norm.weight" in state
        if facts["qk_norm"]:
            facts["head_dim"] = state["blocks.0.attn.q_norm.weight"].shape[0]
    biases = _find_bias_table(state)
    if biases is not None:
        facts["head_dim"] = width // biases.shape[1]
    facts["init_values"] = any(key in state for key in ("blocks.0.ls1.gamma", "blocks.0.gamma_1"))
    facts["class_token"] = "cls_token" in state
    facts["reg_tokens"] = state["reg_token"].shape[1] if "reg_token" in state else 0
    facts["pos_embed"] = "learn" if "pos_embed" in state else "none"
    facts["pre_norm"] = "norm_pre.weight" in state
    if any(key.startswith("attn_pool.") for key in state):
        facts["pooling"] = "map" if "attn_pool.latent" in state else "prr"
    else:
        facts["pooling"] = "fc_norm" if "fc_norm.weight" in state else "norm" if "norm.weight" in state else None
    return facts


def _count_classes(reference: nn.Module, state: State) -> int:
    classifier = (getattr(reference, "pretrained_cfg", None) or {}).get("classifier") or "head"
    classifier = classifier if isinstance(classifier, str) else classifier[0]
    weight = state.get(f"{classifier}.weight", state.get("head.weight"))
    return weight.shape[0] if weight is not None and weight.dim() in (2, 4) else 0


def _find_bias_table(state: State) -> Tensor | None:
    """Return a table of biases by relative position [differences of positions, heads]."""
    found = (value for key, value in state.items() if key.endswith("relative_position_bias_table"))
    return next((table for table in found if table.dim() == 2), None)


def _infer_pooling(
    reference: nn.Module, own: Mapping[str, Any], usual: Mapping[str, Any], known: Mapping[str, Any]
) -> dict[str, Any]:
    pooling, usual_pool = own.get("pooling"), getattr(reference, "global_pool", None)
    wanted = known.get("global_pool")
    if pooling in (None, usual.get("pooling")) and own["class_token"] == usual.get("class_token") and wanted is None:
        return {}
    if pooling in ("map", "prr"):
        return {"global_pool": pooling}
    if pooling == "fc_norm":
        pool = wanted if wanted in _POOLED else usual_pool if usual_pool in _POOLED else "avg"
        return {"global_pool": pool, **({"fc_norm": True} if "fc_norm" in known else {})}
    if pooling is None:
        return {}
    pool = wanted or usual_pool
    if pool in (None, "map", "prr") or (pool == "token" and not own["class_token"]):
        pool = "token" if own["class_token"] else "avg"
    elif pool in _POOLED and wanted is None and usual.get("pooling") == "fc_norm" and own["class_token"]:
        pool = "token"
    return {"global_pool": pool, **({"fc_norm": False} if pool in _POOLED else {})}


def _infer_heads(
    reference: nn.Module, own: Mapping[str, Any], name: str, source: str, known: Mapping[str, Any]
) -> dict[str, Any]:
    """Return how many heads a model of another width has: as wide as those of the name's model."""
    width = own["embed_dim"]
    if "num_heads" in known:
        return {}
    if "head_dim" in own:
        return {"num_heads": width // own["head_dim"]}
    sibling = _name_sibling(name, width, own.get("depth"))
    if sibling and "embed_dim" not in known:
        raise VitpruneError(
            f"{source} does not fit {name}: patch_embed.proj.weight is {list(_projection(own))} in the file, "
            f"{list(reference.get_parameter('patch_embed.proj.weight').shape)} in the model; it has the width of "
            f"{sibling}: name that, or give embed_dim and num_heads as `model_args`"
        )
    attention = reference.get_submodule("blocks.0.attn") if own.get("depth") else None
    num_heads = getattr(attention, "num_heads", None)
    head_dim = reference.embed_dim // num_heads if num_heads else None
    if head_dim is None or width % head_dim:
        raise VitpruneError(
            f"{source} has embeddings of {width}, {name} has heads of {head_dim}, which do not divide it, and shapes "
            "do not tell how many heads there are; give num_heads as `model_args`"
        )
    return {"num_heads": width // head_dim}


def _projection(own: Mapping[str, Any]) -> tuple[int, ...]:
    patch = own["patch_size"]
    return (own["embed_dim"], own["in_chans"], *((patch, patch) if isinstance(patch, int) else patch))


def _name_sibling(name: str, width: int, depth: int | None) -> str | None:
    """Return the name of the same family whose standard size this is, which a user may have meant."""
    from timm.models import is_model

    family, _, _tag = name.partition(".")
    mentioned = next((word for word in _WIDTHS if f"_{word}_" in family), None)
    if mentioned is None:
        return None
    for word, usual in _WIDTHS.items():
        other = family.replace(f"_{word if word == mentioned else mentioned}_", f"_{word}_")
        if word != mentioned and (usual, _DEPTHS[word]) == (width, depth) and is_model(other):
            return other
    return None


def _infer_grid(
    reference: nn.Module,
    state: State,
    own: Mapping[str, Any],
    source: str,
    known: Mapping[str, Any],
    arguments: Mapping[str, Any],
    image_size: tuple[int, int] | None,
) -> dict[str, Any]:
    """Return the image size that a position table is for, and whether prefix tokens are in it."""
    patch = _pair(own["patch_size"])
    told = _pair(known["img_size"]) if known.get("img_size") else None
    table = state.get("pos_embed")
    if table is None or table.dim() != 3:
        usual = getattr(reference.patch_embed, "img_size", None)
        grid = _grid_of_biases(reference, state)
        if grid is not None:
            told_grid = None if told is None else (told[0] // patch[0], told[1] // patch[1])
            if told_grid is None or _num_biases_of(told_grid) != _num_biases_of(grid):
                told = (grid[0] * patch[0], grid[1] * patch[1])
        return _resize(told or (usual if "patch_size" in arguments else None), reference)
    num_prefix = own["class_token"] + own["reg_tokens"] + ("dist_token" in state)
    usual_grid = getattr(reference.patch_embed, "grid_size", None)
    outside = getattr(reference, "no_embed_class", False)
    length = table.shape[1]
    for no_embed_class in (outside, not outside) if num_prefix else (outside,):
        num_patches = length - (0 if no_embed_class else num_prefix)
        grid = _find_grid(num_patches, patch, [told, image_size], usual_grid)
        if grid is not None:
            changed = {} if no_embed_class == outside else {"no_embed_class": no_embed_class}
            size = (grid[0] * patch[0], grid[1] * patch[1])
            if told and (told[0] // patch[0], told[1] // patch[1]) == grid:
                size = told
            return {**changed, **_resize(size, reference)}
    count = length - (0 if outside else num_prefix)
    raise VitpruneError(
        f"{source}: its position table has {length} rows, {num_prefix} of them for tokens that are no patches, and "
        f"{count} patches make no square; say height and width of the images it was trained on with `image_size`, or "
        "as img_size among `model_args`"
    )


def _grid_of_biases(reference: nn.Module, state: State) -> tuple[int, int] | None:
    """Return the grid whose relative positions a table of biases is for; None where it is the usual or no square."""
    own, usual = _find_bias_table(state), _find_bias_table(reference.state_dict())
    if own is None or usual is None or len(own) == len(usual):
        return None
    of_tokens = len(usual) - _num_biases_of(reference.patch_embed.grid_size)
    double = math.isqrt(max(len(own) - of_tokens, 0))
    return ((double + 1) // 2,) * 2 if double % 2 and double * double == len(own) - of_tokens else None


def _num_biases_of(grid: tuple[int, int]) -> int:
    return (2 * grid[0] - 1) * (2 * grid[1] - 1)


def _find_grid(
    num_patches: int,
    patch: tuple[int, int],
    sizes: list[tuple[int, int] | None],
    usual: tuple[int, int] | None,
) -> tuple[int, int] | None:
    """Return the grid of a number of patches: as an image size says, the usual one, or a square."""
    grids = [(size[0] // patch[0], size[1] // patch[1]) for size in sizes if size is not None]
    for grid in (*grids, *([] if usual is None else [usual])):
        if grid[0] * grid[1] == num_patches:
            return grid
    side = math.isqrt(max(num_patches, 0))
    return (side, side) if side and side * side == num_patches else None


def _resize(size: tuple[int, int] | None, reference: nn.Module) -> dict[str, Any]:
    usual = getattr(reference.patch_embed, "img_size", None)
    if size is None or (usual is not None and tuple(usual) == tuple(size)):
        return {}
    return {"img_size": size[0] if size[0] == size[1] else tuple(size)}


def _pair(size: Any) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return int(height), int(width)


def fold_class_position(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict whose registers have no place in the position table, in the form that timm has for it.

    The class token's position is added to the token itself, which is the same model.

    Args:
        state: in timm's names; stays as it is.
    """
    if "register_tokens" in state and "reg_token" not in state:  # as DINOv2's authors call them
        state = {"reg_token" if key == "register_tokens" else key: value for key, value in state.items()}
    table, registers = state.get("pos_embed"), state.get("reg_token")
    if table is None or registers is None or "cls_token" not in state or table.dim() != 3:
        return state
    num_patches = [table.shape[1] - count for count in (0, 1, 1 + registers.shape[1])]
    alone, with_class, with_all = (math.isqrt(max(count, 0)) ** 2 == count for count in num_patches)
    if not with_class or alone or with_all:
        return state
    with torch.no_grad():
        return {**state, "cls_token": state["cls_token"] + table[:, :1], "pos_embed": table[:, 1:]}

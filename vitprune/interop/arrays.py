"""Runs as plain numpy arrays, under the names by which other tools of the field know the places in a model."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from vitprune.data import Batches, on_device
from vitprune.discovery.discover import Discovery, has_class_scores
from vitprune.discovery.run import Run
from vitprune.entry import entry
from vitprune.errors import VitpruneError
from vitprune.files import atomic_file
from vitprune.models.path_layers import ATTENTION, find_path_layers, kind_of_layer, record_hidden
from vitprune.models.trunk import resolve_scope, scope_slice
from vitprune.sharing import gather_rows

SUFFIX = ".npz"
# One date for all, so that the same run gives the same bytes.
_DATE = (1980, 1, 1, 0, 0, 0)


def hook_names(layer: str) -> tuple[str, str]:
    """Return where a layer's nodes are found: the timm module that reads them, and Prisma's name for the place.

    The first is what nnsight and forward hooks go by (the module's input), the second the name in the cache of a
    ``HookedViT``, where attention has a dimension of its own for heads.

    >>> hook_names("blocks.3.mlp"), hook_names("blocks.3.attn")
    (('blocks.3.mlp.fc2', 'blocks.3.mlp.hook_post'), ('blocks.3.attn.proj', 'blocks.3.attn.hook_z'))
    """
    if kind_of_layer(layer) == ATTENTION:
        return f"{layer}.proj", f"{layer}.hook_z"
    return f"{layer}.fc2", f"{layer}.hook_post"


@entry
@torch.no_grad()
def record_activations(model: nn.Module, batches: Batches, found: Discovery) -> dict[str, Tensor]:
    """Return what every layer of a discovery's paths hands to its output projection.

    Args:
        model: timm Vision Transformer in eval mode.
        batches: pairs of images [B, 3, height, width] (normalised by the model's own transform) and labels.
        found: whose layers, at whose tokens.

    Returns:
        Layer name -> float32 [I, H], mean over the scoped tokens; on the CPU.

    Raises:
        VitpruneError: if there are no images.

    >>> import timm
    >>> from vitprune import discover
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=5).eval()
    >>> batches = [(torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 4]))]
    >>> record_activations(model, batches, discover(model, batches))["blocks.0.mlp"].shape
    torch.Size([2, 768])
    """
    layers = find_path_layers(model, found.nodes)
    tokens = scope_slice(model, resolve_scope(model, found.tokens))
    parts: dict[str, list[Tensor]] = {layer.name: [] for layer in layers}
    for images, _labels in on_device(model, batches):
        for name, h_BTH in record_hidden(model, layers, images, tokens=tokens).items():
            parts[name].append(h_BTH.float().mean(1).cpu())
    if not all(parts.values()):
        raise VitpruneError("no images to record activations of")
    return {name: gather_rows(torch.cat(each)) for name, each in parts.items()}


def write_arrays(run: Run, path: str | Path, *, activations: Mapping[str, Tensor] | None = None) -> None:
    """Write a run as a .npz of arrays that numpy opens without pickles; the same run gives the same bytes.

    Its arrays: ``neurons`` int64 [I, L, K], ``joint_scores`` float32 [I], ``labels`` and ``predictions`` int64 [I],
    ``files`` [I]; ``layers``, ``modules`` and ``prisma`` [L] (see ``hook_names``), ``heads`` int64 [L] (0 for an FFN);
    ``classes`` int64 [C] and ``class_names`` [C]; for every layer ``class_scores/LAYER`` float32 [C, H], where they are
    known, and ``activations/LAYER`` float32 [I, H], where they are given.

    Args:
        run: what to write.
        path: ending in .npz.
        activations: from ``record_activations``.

    Raises:
        VitpruneError: if the path ends otherwise.

    >>> import tempfile, timm, vitprune
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=2).eval()
    >>> found = vitprune.discover(model, [(torch.zeros(1, 3, 224, 224), torch.tensor([1]))], method="activation")
    >>> run = Run(found, vitprune.ImageSet(Path("photos"), ("b.png",), (1,), {1: "dog"}), "vit", None, "hash")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_arrays(run, Path(folder, "run.npz"))
    ...     np.load(Path(folder, "run.npz"))["modules"].tolist()
    ['blocks.0.mlp.fc2']
    """
    path = Path(path)
    if path.suffix != SUFFIX:
        raise VitpruneError(f"{path} must end in {SUFFIX}")
    found, images = run.found, run.images
    modules, prisma = zip(*map(hook_names, found.layers), strict=True)
    arrays = {
        "neurons": found.neurons.numpy(),
        "joint_scores": found.joint_scores.numpy(),
        "labels": found.labels.numpy(),
        "predictions": found.predictions.numpy(),
        "files": np.array(images.files),
        "layers": np.array(found.layers),
        "modules": np.array(modules),
        "prisma": np.array(prisma),
        "heads": np.array([found.heads.get(layer, 0) for layer in found.layers], dtype=np.int64),
        "classes": np.array(found.classes, dtype=np.int64),
        "class_names": np.array([images.class_names.get(index, str(index)) for index in found.classes]),
    }
    if has_class_scores(found):
        arrays |= {f"class_scores/{name}": found.class_scores[name].numpy() for name in found.layers}
    arrays |= {f"activations/{name}": each.numpy() for name, each in (activations or {}).items()}
    with atomic_file(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            stream = io.BytesIO()
            np.lib.format.write_array(stream, np.ascontiguousarray(array), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", _DATE), stream.getvalue(), zipfile.ZIP_DEFLATED)

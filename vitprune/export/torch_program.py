"""Programs of torch.export: a model in one file that runs with torch alone, without timm and without vitprune."""

from __future__ import annotations

import copy
import json
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim

from vitprune.data import Batches, remember_names
from vitprune.entry import entry
from vitprune.errors import VitpruneError
from vitprune.export.any_size import any_size_dims, check_other_sizes, example_size
from vitprune.export.onnx_file import ExportReport, describe_facts, measure_parity
from vitprune.files import atomic_file
from vitprune.models.merging import drop_unread_merge
from vitprune.pruning.plan import Plan
from vitprune.seen_images import names_in

FACTS_FILE = "vitprune.json"
MAX_BATCH_SIZE = 4096


@entry
def export_program(
    model: nn.Module, path: str | Path, batches: Batches, *, plan: Plan | None = None, dynamic_size: bool = False
) -> ExportReport:
    """Write a program that ``torch.export.load(path).module()`` runs, and compare it with the model.

    Args:
        model: a torch model in eval mode, dense or pruned; stays as it is.
        path: the file to write, ``.pt2``; it appears only if every check passed. Its extra file ``vitprune.json`` says
            how images are prepared and what the classes are called, as the metadata of an ONNX file do.
        batches: real images (normalised by the model's own transform) and labels, which only ``top1`` is for.
        plan: what the model was pruned by, kept in the file.
        dynamic_size: take images of any height and width in whole patches; for models that timm builds so
            (``dynamic_img_size``).

    Raises:
        VitpruneError: if there are no images, the model cannot be traced, or the program answers otherwise on any
            image, or at another size.

    >>> import tempfile, timm
    >>> model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=5).eval()
    >>> batches = [(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 1, 4]))]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export_program(model, Path(folder) / "model.pt2", batches).max_abs_diff < 1e-4
    True
    """
    path = Path(path)
    if path.suffix != ".pt2":
        raise VitpruneError(f"{path}: a program of torch.export ends in .pt2")
    model = copy.deepcopy(model).cpu().float().eval()
    remember_names(model, names_in(batches))
    facts = {**describe_facts(model, plan, "float32"), "kind": "torch program", "dynamic_size": dynamic_size}
    drop_unread_merge(model)
    program = _trace(model, dynamic_size)
    with atomic_file(path) as temporary:
        torch.export.save(program, temporary, extra_files={FACTS_FILE: json.dumps(facts, sort_keys=True)})
        loaded = torch.export.load(temporary).module()
        parity = measure_parity(model, loaded, batches, exact=True, runtime="the program")
        if dynamic_size:
            check_other_sizes(model, loaded, what="the program")
        size_bytes = temporary.stat().st_size
    return ExportReport(path, **vars(parity), size_bytes=size_bytes)


def read_program_facts(path: str | Path) -> Mapping[str, Any]:
    """Return what a program says of itself, without running anything of it.

    Raises:
        VitpruneError: if the file is no such program.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith(f"/{FACTS_FILE}"))
            return json.loads(archive.read(name))
    except (OSError, zipfile.BadZipFile, StopIteration, ValueError) as error:
        raise VitpruneError(f"{path} is no program that vitprune wrote ({error or type(error).__name__})") from error


def _trace(model: nn.Module, dynamic_size: bool) -> torch.export.ExportedProgram:
    dims: dict[int, Any] = {0: Dim("batch", min=1, max=MAX_BATCH_SIZE)}
    if dynamic_size:
        dims.update(any_size_dims(model))
    example = torch.zeros(2, *example_size(model, dynamic_size=dynamic_size))
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            return torch.export.export(model, (example,), dynamic_shapes=(dims,))
    except Exception as error:  # whatever torch.export's own compiler raises
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise VitpruneError(
            f"{type(model).__name__} cannot be written as a program of torch.export ({reason})"
        ) from error

"""The README.md of a saved model's folder, which the hub shows as its card: what it is, what went, how to load it.

It is written for people from the description and the plan beside it, and decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vitprune.models.facts import Facts
from vitprune.models.macs import Sizes

MODEL_CARD_FILE = "README.md"
_KINDS = {"ffn": "FFN neurons", "qk": "query/key dimensions", "vo": "value/output dimensions", "heads": "heads"}


def write_model_card(
    config: Mapping[str, Any],
    facts: Facts | None,
    removed: Mapping[str, tuple[int, int]],
    *,
    measured: Sequence[str] = (),
    name: str = "FOLDER",
) -> str:
    """Return the text of a card.

    Args:
        config: of the folder.
        facts: of its plan; None for a dense model.
        removed: kind of units -> how many are gone, and of how many.
        measured: lines of Markdown about accuracy and speed.
        name: by which the model is loaded.

    >>> config = {"architecture": "vit_tiny_patch16_224", "num_classes": 5, "pretrained_cfg": {"license": "mit"}}
    >>> print(write_model_card(config, None, {}).splitlines()[1])
    license: mit
    """
    cfg = config.get("pretrained_cfg") or {}
    licence, classes = cfg.get("license"), config.get("num_classes", 0)
    head = {
        "license": licence,
        "library_name": "vitprune",
        "pipeline_tag": "image-classification" if classes else "image-feature-extraction",
    }
    lines = ["---", *(f"{key}: {value}" for key, value in head.items() if value), "tags:", "- vitprune"]
    lines += ["- pruned", "---", ""] if facts is not None else ["---", ""]
    base = config.get("architecture", "a Vision Transformer")
    title = f"{base}, pruned" if facts is not None else str(base)
    answers = f"{classes} classes" if classes else "embeddings (no classifier)"
    lines += [f"# {title}", "", f"A Vision Transformer of timm (`{base}`) that answers {answers}."]
    twin = config.get("twin")
    if isinstance(twin, Mapping):
        lines += ["", f"Its weights came from a model of {twin.get('library')}."]
    if facts is not None:
        lines += ["", "## What was removed", "", *_describe_removal(facts, removed)]
    lines += ["", "## What it costs and what it brings", ""]
    lines += list(measured) or ["Nothing was measured when this was written."]
    lines += ["", "## Use", "", "```python", "import vitprune", ""]
    lines += [f'model = vitprune.load("{name}")  # an ordinary torch.nn.Module in eval mode']
    lines += ["transform = vitprune.data.data_config(model)  # how its images are prepared", "```", ""]
    lines += _describe_images(cfg)
    lines += ["", "## Licence", ""]
    lines += [
        f"{licence}, as the model that it was made from."
        if licence
        else "That of the model that it was made from, which does not say."
    ]
    return "\n".join(lines) + "\n"


def _describe_removal(facts: Facts, removed: Mapping[str, tuple[int, int]]) -> list[str]:
    lines = [
        f"- {gone:,} of {total:,} {_KINDS.get(kind, kind)} ({gone / total:.0%})"
        for kind, (gone, total) in removed.items()
        if gone
    ]
    if facts.stand_ins:
        lines.append(f"- {len(facts.stand_ins)} whole layers: {', '.join(sorted(facts.stand_ins))}")
    if facts.merge and any(facts.merge):
        lines.append(f"- tokens that merge: {sum(facts.merge)} (by block: {' '.join(map(str, facts.merge))})")
    if facts.image_size:
        lines.append(f"- images are {facts.image_size[0]} x {facts.image_size[1]} pixels now")
    chosen = [f"chosen by {facts.criterion}"] if facts.criterion else []
    chosen += [f"made good by {facts.compensation}"] if facts.compensation else []
    if facts.calibration:
        count = len(facts.calibration.files)
        chosen.append(f"from {count} calibration images" if count else "from calibration images")
    if chosen:
        lines.append(f"- {', '.join(chosen)}; no training")
    if facts.sizes is not None and facts.sizes_dense is not None:
        lines += ["", "| | dense | this |", "|---|---|---|", *_size_rows(facts.sizes_dense, facts.sizes)]
    return lines or ["Nothing; all of its units are there."]


def _size_rows(dense: Sizes, sizes: Sizes) -> list[str]:
    return [
        f"| parameters | {dense.num_parameters:,} | {sizes.num_parameters:,} |",
        f"| multiply-accumulates per image | {dense.macs:,} | {sizes.macs:,} |",
        f"| bytes of weights | {dense.size_bytes:,} | {sizes.size_bytes:,} |",
    ]


def _describe_images(cfg: Mapping[str, Any]) -> list[str]:
    told = ("input_size", "mean", "std", "interpolation", "crop_pct")
    known = [f"{key.replace('_', ' ')} {cfg[key]}" for key in told if key in cfg]
    return [f"Images: {', '.join(known)}."] if known else []

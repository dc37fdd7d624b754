"""Small random models of other libraries, and what vitprune can do with the twin of each.

``python tests/twins.py`` prints the table of docs/libraries.md.
"""

from __future__ import annotations

import tempfile
import warnings

import open_clip
import torch
import torchvision
import transformers
from families import try_verb

import vitprune
from vitprune.models.merging import why_no_merging
from vitprune.models.trunk import check_trunk
from vitprune.views import data_config

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
SMALL = {**SHAPE, "image_size": 32, "patch_size": 16}
DINO = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 42, "patch_size": 14}
SWIN = {"image_size": 64, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [1, 2], "window_size": 4}

# Kind -> model class, configuration class, its arguments, and what of the answer is compared.
OF_TRANSFORMERS = {
    "vit": ("ViTForImageClassification", "ViTConfig", {**SMALL, "num_labels": 5}, "logits"),
    "vit-encoder": ("ViTModel", "ViTConfig", SMALL, "class token"),
    "deit": ("DeiTForImageClassification", "DeiTConfig", {**SMALL, "num_labels": 5}, "logits"),
    "deit-teacher": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", {**SMALL, "num_labels": 5}, "logits"),
    "dinov2": ("Dinov2Model", "Dinov2Config", {**DINO, "mlp_ratio": 2}, "class token"),
    "dinov2-gated": ("Dinov2Model", "Dinov2Config", {**DINO, "use_swiglu_ffn": True}, "class token"),
    "dinov2-registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", DINO, "class token"),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", {**SMALL, "num_register_tokens": 4}, "class token"),
    "dinov3-gated": (
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        {**SMALL, "num_register_tokens": 4, "use_gated_mlp": True, "hidden_act": "silu"},
        "class token",
    ),
    "beit": (
        "BeitForImageClassification",
        "BeitConfig",
        {**SMALL, "use_relative_position_bias": True, "num_labels": 5},
        "logits",
    ),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", SMALL, "pooler_output"),
    "siglip-classifier": ("SiglipForImageClassification", "SiglipConfig", {"vision_config": SMALL}, "logits"),
    "clip": ("CLIPVisionModel", "CLIPVisionConfig", SMALL, "pooler_output"),
    "clip-projection": (
        "CLIPVisionModelWithProjection",
        "CLIPVisionConfig",
        {**SMALL, "projection_dim": 24},
        "image_embeds",
    ),
    "swin": ("SwinForImageClassification", "SwinConfig", {**SWIN, "num_labels": 5}, "logits"),
}
WITHOUT_TRUNK = ("swin",)


def make(kind: str):
    """Build a small random model of transformers whose every weight matters."""
    name, config, arguments, _compared = OF_TRANSFORMERS[kind]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**arguments)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def make_torchvision(kind: str):
    """Build a small random model of torchvision."""
    torch.manual_seed(0)
    if kind == "swin":
        return torchvision.models.SwinTransformer([4, 4], 16, [2, 2], [1, 2], [7, 7], num_classes=5).eval()
    model = torchvision.models.VisionTransformer(32, 16, 2, 2, 32, 48, num_classes=5).eval()
    torch.nn.init.normal_(model.heads.head.weight)
    return model


def make_open_clip(*, quick_gelu: bool = False, **changed):
    """Build a small random model of images and text of open_clip."""
    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 16, "width": 32, "layers": 2, "head_width": 16, "mlp_ratio": 1.5}
    text = {"context_length": 8, "vocab_size": 32, "width": 32, "heads": 2, "layers": 1}
    towers = open_clip.CLIPVisionCfg(**{**vision, **changed}), open_clip.CLIPTextCfg(**text)
    return open_clip.CLIP(24, *towers, quick_gelu=quick_gelu).eval()


# Row of the table -> library and what makes a model.
ROWS = {
    **{kind: ("transformers", lambda kind=kind: make(kind)) for kind in OF_TRANSFORMERS},
    "torchvision-vit": ("torchvision", lambda: make_torchvision("vit")),
    "torchvision-swin": ("torchvision", lambda: make_torchvision("swin")),
    "open_clip": ("open_clip", lambda: make_open_clip().visual),
}


def halve(twin):
    """Return a twin without half of the neurons of each FFN; of a gated DINOv2, as many as its description can say."""
    groups = vitprune.find_feed_forwards(twin)
    counts = {group.name: 24 if group.num_units == 88 else group.num_units // 2 for group in groups}
    keep = {group.name: torch.arange(group.num_units) < counts[group.name] for group in groups}
    return vitprune.apply_plan(twin, vitprune.Plan(keep))


def row(kind: str) -> str:
    """Return the model's line of the table."""
    library, build = ROWS[kind]
    model = build()
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        twin = vitprune.load(model)
        half = halve(twin)
        images = torch.randn(1, *data_config(twin)["input_size"], generator=torch.Generator().manual_seed(0))
        paths = try_verb(lambda: check_trunk(twin, vitprune.find_feed_forwards(twin), images))
        merging = why_no_merging(twin)
        write = {
            "transformers": lambda: vitprune.save_transformers(half, f"{folder}/back"),
            "torchvision": lambda: vitprune.as_torchvision(half),
            "open_clip": lambda: vitprune.as_open_clip(half),
        }[library]
        back = try_verb(write)
    name = f"{library}, `{type(model).__name__}`" + (f" ({kind})" if kind.endswith("gated") else "")
    twins_name = twin.pretrained_cfg["architecture"]
    columns = (name, f"`{twins_name}`", paths.split(" (stem")[0], f"no: {merging}" if merging else "yes", back)
    return f"| {' | '.join(columns)} |"


if __name__ == "__main__":
    print("| model | timm twin | paths | merging | half of its neurons written back |\n|---|---|---|---|---|")
    for kind in ROWS:
        print(row(kind))

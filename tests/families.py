"""Stock timm models, random weights: what vitprune can do with each.

``python tests/families.py`` prints the table of docs/families.md.
Every entry is built whole at its own width and depth; only the image size is reduced where the stock one is large.
"""

from __future__ import annotations

from functools import lru_cache

import timm
import torch

import vitprune
from vitprune.models.trunk import check_trunk
from vitprune.pruning.plan import plan_from_widths
from vitprune.views import data_config

# model name -> arguments of create_model
FAMILIES = {
    "vit_tiny_patch16_224": {},
    "deit_tiny_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},
    "deit3_small_patch16_224": {},
    "beit_base_patch16_224": {},
    "vit_small_patch14_reg4_dinov2": {"img_size": 224},
    "vit_small_plus_patch16_dinov3": {"img_size": 224},
    "vit_base_patch16_siglip_224": {},
    "eva02_tiny_patch14_224": {},
    "eva02_base_patch14_224": {},
    "swin_tiny_patch4_window7_224": {},
    "cait_xxs24_224": {},
    "xcit_nano_12_p16_224": {},
    "samvit_base_patch16": {"img_size": 224},
    "convnextv2_atto": {},
    "convnext_atto": {},
    "resnet18": {},
}


@lru_cache(maxsize=1)
def build(name: str):
    """Build a model, which whoever uses it leaves as it was: the next who asks for the same one gets it too."""
    torch.manual_seed(0)
    return timm.create_model(name, **FAMILIES[name]).eval()


def example(model, count: int = 2):
    return torch.randn(count, *data_config(model)["input_size"], generator=torch.Generator().manual_seed(1))


def half_plan(model):
    """Keep a random half of each FFN's neurons."""
    ffns = vitprune.find_feed_forwards(model)
    generator = torch.Generator().manual_seed(2)
    scores = {ffn.name: torch.rand(ffn.num_neurons, generator=generator) for ffn in ffns}
    return plan_from_widths(scores, {ffn.name: ffn.num_neurons // 2 for ffn in ffns})


def try_verb(verb) -> str:
    try:
        verb()
    except vitprune.VitpruneError as error:
        return f"no: {str(error).split('; ')[0]}"
    return "yes"


def row(name: str) -> str:
    """Return the model's line of that table."""
    model = build(name)
    pruning = try_verb(lambda: vitprune.find_feed_forwards(model))
    if pruning == "yes":
        ffns = vitprune.find_feed_forwards(model)
        kinds = {type(model.get_submodule(ffn.name)).__name__ for ffn in ffns}
        pruning = f"yes ({len(ffns)} x {', '.join(sorted(kinds))})"
        paths = try_verb(lambda: check_trunk(model, ffns, example(model, 1)))
    else:
        paths = "no"
    return f"| `{name}` | {pruning} | {paths} |"


if __name__ == "__main__":
    print("| timm model | pruning | paths |\n|---|---|---|")
    for name in FAMILIES:
        print(row(name))

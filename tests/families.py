"""Stock timm models, random weights: what vitprune can do with each.

``python tests/families.py`` prints the table of docs/families.md.
Only the image size is reduced where the stock one is large, and width and depth where a family says so.
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
    # Of other shapes than a trunk of equal blocks: narrow and shallow here, counted as they are.
    "twins_svt_small": {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 64), "num_heads": (1, 2, 2, 4)},
    "twins_pcpvt_small": {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 64), "num_heads": (1, 2, 2, 4)},
    "davit_tiny": {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 64), "num_heads": (1, 2, 2, 4)},
    "crossvit_tiny_240": {"embed_dim": (16, 24), "depth": ((1, 1, 0),), "num_heads": (2, 2)},
    "pit_ti_224": {"base_dims": (8, 8, 8), "depth": (1, 1, 1), "heads": (1, 2, 4)},
    "coat_lite_tiny": {"embed_dims": (64, 64, 64, 64), "serial_depths": (1, 1, 1, 1)},
    "hiera_tiny_224": {"embed_dim": 16, "stages": (1, 1, 1, 1)},
    "hieradet_small": {"embed_dim": 16, "stages": (1, 1, 1, 1)},
    "edgenext_xx_small": {"dims": (16, 24, 32, 48), "depths": (2, 2, 2, 2)},
    "convit_tiny": {},
    "swinv2_cr_tiny_224": {"depths": (1, 1, 1, 1), "embed_dim": 16, "num_heads": (1, 2, 2, 4)},
    "tiny_vit_5m_224": {"depths": (1, 1, 1, 1), "embed_dims": (16, 32, 32, 64), "num_heads": (1, 2, 2, 4)},
    "tnt_s_patch16_224": {"depth": 1, "embed_dim": 32, "num_heads_outer": 2, "inner_dim": 8, "num_heads_inner": 2},
    "vit_relpos_small_patch16_224": {"depth": 1, "embed_dim": 24, "num_heads": 2},
    "naflexvit_base_patch16_gap": {"depth": 1, "embed_dim": 24, "num_heads": 2},
    "mobilevit_xxs": {},
    "maxvit_pico_rw_256": {"img_size": 64},
    "volo_d1_224": {},
    "nest_tiny": {},
    "gcvit_xxtiny": {},
    "mvitv2_tiny": {},
    "caformer_s18": {},
    "efficientformer_l1": {},
    "coat_tiny": {},
    "pvt_v2_b0": {},
    "levit_128s": {},
    "fastvit_sa12": {},
    "efficientformerv2_s0": {},
    "coatnet_nano_cc_224": {},
    "mobilevitv2_050": {},
    "nextvit_small": {},
}
# Of these, more than the size of the images.
NARROW = {name for name, changed in FAMILIES.items() if set(changed) - {"img_size"}}


@lru_cache(maxsize=1)
def build(name: str):
    """Build a model, which whoever uses it leaves as it was: the next who asks for the same one gets it too."""
    torch.manual_seed(0)
    return timm.create_model(name, **FAMILIES[name]).eval()


def count_stock(name: str) -> int:
    """Return how many FFNs the model has as timm builds it; no weights are made."""
    with torch.device("meta"):
        return len(vitprune.find_feed_forwards(timm.create_model(name)))


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
        pruning = f"yes ({count_stock(name)} x {', '.join(sorted(kinds))})"
        paths = try_verb(lambda: check_trunk(model, ffns, example(model, 1)))
    else:
        paths = "no"
    return f"| `{name}` | {pruning} | {paths} |"


if __name__ == "__main__":
    print("| timm model | pruning | paths |\n|---|---|---|")
    for name in FAMILIES:
        print(row(name))

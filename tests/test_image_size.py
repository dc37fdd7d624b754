"""Models that are fed images of another size."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from conftest import TINY, make_vit
from timm.layers import resample_abs_pos_embed

import vitprune
from vitprune.errors import VitpruneError
from vitprune.models.image_size import set_image_size
from vitprune.models.macs import count_macs
from vitprune.models.merging import set_merging
from vitprune.views import data_config, num_patches


@torch.no_grad()
@pytest.mark.parametrize("size", [24, (40, 24)])
def test_it_is_the_model_that_timm_builds_for_that_size(size, tiny_vit):
    height, width = (size, size) if isinstance(size, int) else size
    resized = set_image_size(tiny_vit, size)
    other = timm.create_model("vit_tiny_patch16_224", **{**TINY, "img_size": (height, width)}).double().eval()
    state = tiny_vit.state_dict()
    grid = (height // 8, width // 8)
    state["pos_embed"] = resample_abs_pos_embed(state["pos_embed"], new_size=grid, old_size=(4, 4))
    other.load_state_dict(state)
    images = torch.randn(2, 3, height, width, dtype=torch.float64)
    assert torch.equal(resized(images), other(images))
    assert data_config(resized)["input_size"] == [3, height, width]
    assert num_patches(resized) == grid[0] * grid[1]
    assert num_patches(tiny_vit) == 16


@torch.no_grad()
@pytest.mark.parametrize("merges", [False, True])
def test_a_saved_folder_loads_bit_for_bit(merges, saved_vit, tmp_path):
    model = set_image_size(vitprune.load(saved_vit), 24)
    model = set_merging(model, (0, 4, 0)) if merges else model
    vitprune.save(model, tmp_path / "small")
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["model_args"]["img_size"] == [24, 24]
    assert config["pretrained_cfg"]["input_size"] == [3, 24, 24]
    loaded = vitprune.load(tmp_path / "small")
    images = torch.randn(2, 3, 24, 24)
    assert torch.equal(loaded(images), model(images))
    assert data_config(loaded) == data_config(model)
    assert torch.equal(set_image_size(loaded, 24)(images), loaded(images))


def test_smaller_images_cost_less(tiny_vit):
    assert count_macs(set_image_size(tiny_vit, 16)) < count_macs(tiny_vit) / 3


@pytest.mark.parametrize(
    "kind", [{"reg_tokens": 2, "no_embed_class": True}, {"global_pool": "map"}, {"pos_embed": "none"}]
)
def test_other_kinds_of_vit(kind):
    assert set_image_size(make_vit(**kind), 16)(torch.randn(1, 3, 16, 16, dtype=torch.float64)).shape == (1, 5)


def test_sizes_that_the_patches_do_not_divide_are_refused(tiny_vit):
    with pytest.raises(VitpruneError, match=r"30 x 32 pixels are no whole patches of 8 x 8; try 32 x 32"):
        set_image_size(tiny_vit, (30, 32))
    with pytest.raises(VitpruneError, match=r"-8 x -8 pixels are no whole patches"):
        set_image_size(tiny_vit, -8)


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto"])
def test_models_that_timm_cannot_resize_are_refused(name):
    with pytest.raises(VitpruneError, match="cannot be resized"):
        set_image_size(timm.create_model(name), 192)


def test_too_many_merging_tokens_are_refused(tiny_vit):
    with pytest.raises(VitpruneError, match=r"blocks.1: 7 of 4 patches cannot merge at once"):
        set_image_size(set_merging(tiny_vit, (0, 7, 0)), 16)

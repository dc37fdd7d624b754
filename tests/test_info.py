"""What a model consists of: the shares add up to what is counted, and what cannot go says why."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from conftest import make_vit

import vitprune
from vitprune.cli import main
from vitprune.models.attention import split_attention
from vitprune.models.macs import count_macs
from vitprune.models.merging import set_merging
from vitprune.options import PARTS
from vitprune.pruning.apply import remove_neurons
from vitprune.pruning.plan import Plan


def by_part(model):
    return {each.part: each for each in vitprune.info(model).parts}


def test_shares_are_those_of_a_model_without_the_part():
    model = make_vit()
    found, whole = vitprune.info(model), count_macs(model)
    parts = by_part(model)
    assert list(parts) == list(PARTS)
    assert found.macs == whole
    assert found.rest_share + sum(parts[part].macs_share for part in ("ffn", "qk", "vo")) == pytest.approx(1)
    split = split_attention(model)
    for kind in ("ffn", "layers"):
        groups = vitprune.find_groups(split, [kind])
        kinds = {group.name: kind for group in groups if kind != "ffn"}
        keep = {group.name: torch.zeros(group.num_units, dtype=torch.bool) for group in groups}
        if kind == "ffn":  # a neuron of each has to stay: what goes with the others is counted
            keep = {name: torch.arange(len(mask)) < 1 for name, mask in keep.items()}
        gone = 1 - count_macs(remove_neurons(split, Plan(keep, kinds=kinds))) / whole
        one_left = 1 - len(groups) / parts["ffn"].num_units if kind == "ffn" else 1
        assert gone == pytest.approx(parts[kind].macs_share * one_left)
        assert parts[kind].ceiling == pytest.approx(1 / (1 - parts[kind].macs_share))


def test_weights_play_no_part():
    first, second = make_vit(seed=1), make_vit(seed=2)
    assert vitprune.info(first) == vitprune.info(second)


@pytest.mark.parametrize(
    ("name", "can", "why"),
    [
        ("swin_tiny_patch4_window7_224", {"ffn"}, "windows"),
        ("beit_base_patch16_224", {"ffn"}, "bias"),
        ("resnet18", set(), ""),
    ],
)
def test_what_cannot_go_says_why(name, can, why):
    small = {"img_size": 32} if name != "resnet18" else {}
    small |= {"window_size": 2, "depths": (1, 1), "num_heads": (1, 2), "embed_dim": 24} if "swin" in name else {}
    small |= {"depth": 1, "embed_dim": 24, "num_heads": 3} if "beit" in name else {}
    found = vitprune.info(timm.create_model(name, **small).eval())
    assert {each.part for each in found.parts if each.reason is None} == can
    for each in found.parts:
        if each.part not in can:
            assert each.reason
            assert why in each.reason
            assert (each.num_units, each.macs_share, each.ceiling) == (None, None, None)


def test_merging_models_and_encoders_are_told_apart():
    merged = by_part(set_merging(make_vit(), [4] + [0] * (len(make_vit().blocks) - 1)))
    assert "merge already" in merged["tokens"].reason
    encoder = vitprune.info(make_vit(num_classes=0))
    assert encoder.num_classes == 0
    assert not [each.part for each in encoder.parts if each.reason]


def test_the_command_fetches_nothing(monkeypatch, capsys, tmp_path):
    import huggingface_hub

    def refuse(*_arguments, **_options):
        raise AssertionError("something was fetched")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    assert main(["info", "vit_tiny_patch16_224", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["num_classes"] == 1000
    assert told["no_paths"] is None
    assert main(["info", "vit_tiny_patch16_224"]) == 0
    assert "whole attentions and FFNs" in capsys.readouterr().out
    for mistake in ("no_such_model", str(tmp_path / "absent.onnx"), str(tmp_path)):
        assert main(["info", mistake]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1

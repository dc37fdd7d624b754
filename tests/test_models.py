"""Loading: what fits loads bit for bit, what does not is refused with both sides of the mismatch."""

from __future__ import annotations

import argparse
import pickle
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from conftest import TINY, make_vit
from families import half_plan
from safetensors.torch import save_file

import vitprune
from vitprune.models.identity import hash_weights
from vitprune.models.saved_folder import build_dense
from vitprune.models.sources import find_hub_weights
from vitprune.models.trunk import resolve_scope

NAME = "vit_tiny_patch16_224"


@pytest.fixture(scope="module")
def vit_state():
    """Weights of the stock ViT-Tiny with 7 classes."""
    torch.manual_seed(0)
    return timm.create_model(NAME, num_classes=7).state_dict()


def same(model, state):
    own = model.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[key], state[key]) for key in own)


def test_safetensors_checkpoint_and_its_number_of_classes(vit_state, tmp_path):
    save_file(vit_state, tmp_path / "w.safetensors")
    model = vitprune.load(NAME, checkpoint=tmp_path / "w.safetensors")
    assert same(model, vit_state)
    assert model.num_classes == 7
    assert not model.training


@pytest.mark.parametrize("key", [None, "model", "state_dict"])
def test_pth_checkpoint_as_training_scripts_write_it(key, vit_state, tmp_path):
    content = vit_state if key is None else {key: vit_state, "epoch": 3, "args": argparse.Namespace(lr=0.1)}
    torch.save(content, tmp_path / "w.pth")
    assert same(vitprune.load(NAME, checkpoint=tmp_path / "w.pth"), vit_state)


def test_mae_checkpoint_pools_the_patches(tmp_path):
    torch.manual_seed(0)
    state = timm.create_model(NAME, num_classes=7, global_pool="avg").state_dict()
    assert "fc_norm.weight" in state
    torch.save({"model": state}, tmp_path / "mae.pth")
    model = vitprune.load(NAME, checkpoint=tmp_path / "mae.pth")
    assert same(model, state)
    assert model.global_pool == "avg"


def write_npz(state, path, *, depth=12, heads=3, leave_out=()):
    """Write a state dict in google-research's layout, the inverse of what timm reads."""
    width = state["cls_token"].shape[-1]
    head_dim = width // heads
    arrays = {
        "cls": state["cls_token"],
        "embedding/kernel": state["patch_embed.proj.weight"].permute(2, 3, 1, 0),
        "embedding/bias": state["patch_embed.proj.bias"],
        "Transformer/posembed_input/pos_embedding": state["pos_embed"],
        "Transformer/encoder_norm/scale": state["norm.weight"],
        "Transformer/encoder_norm/bias": state["norm.bias"],
        "head/kernel": state["head.weight"].T,
        "head/bias": state["head.bias"],
    }
    for index in range(depth):
        ours, theirs = f"blocks.{index}.", f"Transformer/encoderblock_{index}/"
        attention = f"{theirs}MultiHeadDotProductAttention_1/"
        weights, biases = state[f"{ours}attn.qkv.weight"].chunk(3), state[f"{ours}attn.qkv.bias"].chunk(3)
        for name, weight, bias in zip(("query", "key", "value"), weights, biases, strict=True):
            arrays[f"{attention}{name}/kernel"] = weight.T.reshape(width, heads, head_dim)
            arrays[f"{attention}{name}/bias"] = bias.reshape(heads, head_dim)
        arrays[f"{attention}out/kernel"] = state[f"{ours}attn.proj.weight"].T.reshape(heads, head_dim, width)
        arrays[f"{attention}out/bias"] = state[f"{ours}attn.proj.bias"]
        for number, norm in ((0, "norm1"), (2, "norm2")):
            arrays[f"{theirs}LayerNorm_{number}/scale"] = state[f"{ours}{norm}.weight"]
            arrays[f"{theirs}LayerNorm_{number}/bias"] = state[f"{ours}{norm}.bias"]
        for number in (0, 1):
            arrays[f"{theirs}MlpBlock_3/Dense_{number}/kernel"] = state[f"{ours}mlp.fc{number + 1}.weight"].T
            arrays[f"{theirs}MlpBlock_3/Dense_{number}/bias"] = state[f"{ours}mlp.fc{number + 1}.bias"]
    np.savez(path, **{key: value.numpy() for key, value in arrays.items() if key not in leave_out})


def test_npz_checkpoint_of_google_research(vit_state, tmp_path):
    write_npz(vit_state, tmp_path / "w.npz")
    assert same(vitprune.load(NAME, checkpoint=tmp_path / "w.npz"), vit_state)


def test_npz_checkpoint_of_384_pixels_is_used_at_224_as_the_paper_does(tmp_path):
    """ViT-B/32 and ViT-L/32 were fine-tuned at 384 pixels; here in the small size of the same family."""
    state = timm.create_model("vit_small_patch32_384").state_dict()
    write_npz(state, tmp_path / "w.npz", heads=6)
    model = vitprune.load("vit_small_patch32_224", checkpoint=tmp_path / "w.npz")
    assert model.pos_embed.shape == (1, 1 + 7**2, 384)
    assert torch.equal(model.pos_embed[:, 0], state["pos_embed"][:, 0])
    assert torch.equal(model.blocks[3].mlp.fc1.weight, state["blocks.3.mlp.fc1.weight"])
    assert vitprune.data.data_config(model)["input_size"] == [3, 224, 224]


def test_the_mae_of_the_paper(tmp_path):
    """Its file, by names and shapes: of zeros, which take no room."""
    name = "vit_base_patch16_224.mae"
    with torch.device("meta"):
        shapes = timm.create_model(name, num_classes=1000, global_pool="avg").state_dict()
    state = {key: torch.zeros(1).expand(value.shape) for key, value in shapes.items()}
    assert "fc_norm.weight" in state
    torch.save({"model": state}, tmp_path / "mae_finetuned_vit_base.pth")
    model = vitprune.load(name, checkpoint=tmp_path / "mae_finetuned_vit_base.pth")
    assert not any(parameter.any() for parameter in model.parameters())
    assert (model.global_pool, model.num_classes) == ("avg", 1000)
    assert resolve_scope(model, None) == "patch"
    config = vitprune.data.data_config(model)
    assert (config["mean"], config["std"]) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


@pytest.mark.parametrize(
    ("left_out", "message"),
    [("head/bias", "no 'head/bias'"), ("Transformer/encoder_norm/scale", "does not fit"), ("cls", "does not fit")],
)
def test_npz_checkpoint_with_holes_is_refused(left_out, message, vit_state, tmp_path):
    write_npz(vit_state, tmp_path / "w.npz", leave_out=(left_out,))
    with pytest.raises(vitprune.VitpruneError, match=message):
        vitprune.load(NAME, checkpoint=tmp_path / "w.npz")


def test_a_file_that_is_no_npz_is_refused(tmp_path):
    np.save(tmp_path / "array.npy", np.zeros(3))
    for content in (b"", b"PK\x03\x04 cut off", (tmp_path / "array.npy").read_bytes()):
        (tmp_path / "w.npz").write_bytes(content)
        with pytest.raises(vitprune.VitpruneError, match=r"not a plain \.npz of arrays"):
            vitprune.load(NAME, checkpoint=tmp_path / "w.npz")


def test_half_precision_reloads_bit_equal(tmp_path):
    model = make_vit().half()
    model.model_args = TINY
    vitprune.save(model, tmp_path / "m")
    again = vitprune.load(tmp_path / "m")
    assert again.head.weight.dtype == torch.float16
    assert hash_weights(again) == hash_weights(model)


def test_a_pickle_that_runs_code_is_refused_and_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    (tmp_path / "w.pth").write_bytes(pickle.dumps({"model": Bomb()}))
    with pytest.raises(vitprune.VitpruneError, match="not a plain state dict"):
        vitprune.load(NAME, checkpoint=tmp_path / "w.pth")
    torch.save({"model": Bomb()}, tmp_path / "z.pth")
    (tmp_path / "ran").unlink(missing_ok=True)
    with pytest.raises(vitprune.VitpruneError, match="not a plain state dict"):
        vitprune.load(NAME, checkpoint=tmp_path / "z.pth")
    assert not (tmp_path / "ran").exists()


def test_mismatches_name_both_sides(vit_state, tmp_path):
    save_file(vit_state, tmp_path / "w.safetensors")
    with pytest.raises(vitprune.VitpruneError, match=r"is \[.*\] in the file, \[.*\] in the model"):
        vitprune.load("vit_small_patch16_224", checkpoint=tmp_path / "w.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(vitprune.VitpruneError, match="the file lacks .* and 149 more; the model lacks a"):
        vitprune.load(NAME, checkpoint=tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("model", "checkpoint", "message"),
    [
        ("deit_tny_patch16_224", None, "unknown model .* did you mean deit_tiny_patch16_224"),
        ("no/such/folder", None, "no such folder"),
        (NAME, "absent.pth", "absent.pth: no such file"),
        (f"{NAME}.bogus", "absent.pth", "has no weights 'bogus'; timm knows augreg_in21k"),
    ],
)
def test_what_is_not_there_is_said(model, checkpoint, message):
    with pytest.raises(vitprune.VitpruneError, match=message):
        vitprune.load(model, checkpoint=checkpoint)


def test_weights_that_the_hub_does_not_give(monkeypatch, tmp_path):
    code = "import vitprune; vitprune.load('vit_tiny_patch16_224')"
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "could not be fetched from the hub" in result.stderr
    assert "pass it as `checkpoint`" in result.stderr


def test_weights_in_the_cache_of_the_hub(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    name = "deit_tiny_patch16_224"
    assert find_hub_weights(name) is None
    cache = tmp_path / f"models--timm--{name}.fb_in1k"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs/main").write_text("abc")
    file = cache / "snapshots/abc/model.safetensors"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"")
    assert find_hub_weights(name) == find_hub_weights(f"{name}.fb_in1k") == file
    assert find_hub_weights(f"hf-hub:timm/{name}.fb_in1k@abc") == file
    for unknown in (f"{name}.none", "none", "hf-hub:a/b/c", "hf-hub:", f"hf-hub:timm/{name}.fb_in1k@other"):
        assert find_hub_weights(unknown) is None


def test_an_absent_device_is_refused():
    with pytest.raises(vitprune.VitpruneError, match="device 'cuda:99' cannot be used here"):
        vitprune.load(NAME, device="cuda:99")


def test_a_pruned_model_reloads_bit_equal_in_a_fresh_process(tmp_path):
    model = make_vit().float()
    model.model_args = TINY
    pruned = vitprune.remove_neurons(model, half_plan(model))
    vitprune.save(pruned, tmp_path / "pruned", plan=half_plan(model))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = pruned(images)
    code = (
        "import sys, torch, vitprune\n"
        "images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))\n"
        "model = vitprune.load(sys.argv[1])\n"
        "assert isinstance(model, torch.nn.Module) and not model.training\n"
        "with torch.no_grad(): torch.save(model(images), sys.argv[2])\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "pruned", tmp_path / "logits.pt"], check=True)
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), expected)
    assert hash_weights(vitprune.load(tmp_path / "pruned")) == hash_weights(pruned)
    assert sorted(path.name for path in (tmp_path / "pruned").iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "plan.safetensors",
    ]


@pytest.mark.parametrize(
    ("name", "model_args"),
    [
        ("swin_tiny_patch4_window7_224", {}),
        ("beit_base_patch16_224", {"depth": 2}),
        ("eva02_tiny_patch14_224", {"depth": 2}),
        ("vit_small_plus_patch16_dinov3", {"depth": 2, "num_classes": 3}),
        ("deit_tiny_distilled_patch16_224", {"depth": 2}),
    ],
)
def test_families_reload_bit_equal(name, model_args, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model(name, **model_args).eval()
    model.model_args = model_args
    pruned = vitprune.remove_neurons(model, half_plan(model))
    vitprune.save(pruned, tmp_path / "m")
    assert same(vitprune.load(tmp_path / "m"), pruned.state_dict())


def test_the_dense_model_of_a_pruned_folder(saved_vit, tmp_path):
    model = vitprune.load(saved_vit)
    vitprune.save(vitprune.remove_neurons(model, half_plan(model)), tmp_path / "pruned")
    widths = [ffn.num_neurons for ffn in vitprune.find_feed_forwards(build_dense(tmp_path / "pruned"))]
    assert widths == [48, 48, 48]


def test_damaged_folders_are_refused(saved_vit, tmp_path):
    with pytest.raises(vitprune.VitpruneError, match=r"it has no config\.json"):
        vitprune.load(tmp_path)
    (tmp_path / "config.json").write_text((saved_vit / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((saved_vit / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(vitprune.VitpruneError, match="not a safetensors file"):
        vitprune.load(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(vitprune.VitpruneError, match=r"does not fit its config\.json"):
        vitprune.load(tmp_path)

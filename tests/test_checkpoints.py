"""A stranger's checkpoint: the model that comes of it answers as the one that was saved, or a line says why not."""

from __future__ import annotations

import argparse
import gzip
import json
import tarfile
import warnings
import zipfile

import pytest
import timm
import torch
from safetensors.torch import save_file

import vitprune
from vitprune.errors import VitpruneNote
from vitprune.models.sources import spell
from vitprune.views import data_config

NAME = "vit_tiny_patch16_224"
# Two blocks and few pixels are enough to tell one model from another, and quick.
SMALL = {"depth": 2, "img_size": 64, "num_classes": 6}


def make(name=NAME, **model_args):
    """Build a random model whose every tensor matters."""
    torch.manual_seed(0)
    model = timm.create_model(name, **{**SMALL, **model_args}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def answers(model, like=None):
    """Return the logits of random images of the size of a model."""
    like = model if like is None else like
    size = like.patch_embed.proj.in_channels, *like.patch_embed.img_size
    with torch.no_grad():
        return model(torch.randn(2, *size, generator=torch.Generator().manual_seed(1)))


def save_and_load(content, folder, **said):
    torch.save(content, folder / "w.pth")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = vitprune.load(NAME, checkpoint=folder / "w.pth", **said)
    return loaded, [str(each.message) for each in caught if each.category is VitpruneNote]


VARIANTS = {
    "larger images": {"img_size": 96},
    "the images of the name": {"img_size": 224, "depth": 1},
    "patches": {"patch_size": 32},
    "oblong patches": {"patch_size": (16, 8), "img_size": (64, 32)},
    "one channel": {"in_chans": 1},
    "four channels": {"in_chans": 4},
    "depth": {"depth": 3},
    "width": {"embed_dim": 128, "num_heads": 2},
    "FFN width": {"mlp_ratio": 2.7},
    "no bias of queries, keys and values": {"qkv_bias": False},
    "no bias of projections": {"proj_bias": False},
    "registers": {"reg_tokens": 4},
    "registers without positions": {"reg_tokens": 4, "no_embed_class": True},
    "no class token": {"class_token": False, "global_pool": "avg"},
    "no class token, norm before pooling": {"class_token": False, "global_pool": "avg", "fc_norm": False},
    "layer scale": {"init_values": 0.1},
    "norm after pooling": {"global_pool": "avg"},
    "pooling by attention": {"global_pool": "map"},
    "norm before the blocks": {"pre_norm": True},
    "normed queries and keys": {"qk_norm": True, "embed_dim": 128, "num_heads": 4},
    "no positions": {"pos_embed": "none", "img_size": 224, "depth": 1},
    "encoder": {"num_classes": 0},
}


@pytest.mark.parametrize("model_args", VARIANTS.values(), ids=VARIANTS)
def test_what_shapes_tell_is_used_and_kept(model_args, tmp_path):
    model = make(**model_args)
    loaded, _notes = save_and_load(model.state_dict(), tmp_path)
    assert torch.equal(answers(loaded, model), answers(model))
    assert data_config(loaded)["input_size"] == [model.patch_embed.proj.in_channels, *model.patch_embed.img_size]
    vitprune.save(loaded, tmp_path / "saved")
    again = vitprune.load(tmp_path / "saved")
    assert torch.equal(answers(again, model), answers(model))
    assert data_config(again) == data_config(loaded)


def test_heads_that_shapes_do_not_tell_are_asked_for(tmp_path):
    model = make(embed_dim=120, num_heads=5)
    with pytest.raises(vitprune.VitpruneError, match=r"heads of 64.*give num_heads as `model_args`"):
        save_and_load(model.state_dict(), tmp_path)
    loaded, _notes = save_and_load(model.state_dict(), tmp_path, model_args={"num_heads": 5})
    assert torch.equal(answers(loaded), answers(model))
    content = {"state_dict": model.state_dict(), "args": argparse.Namespace(model_kwargs={"num_heads": 5})}
    assert torch.equal(answers(save_and_load(content, tmp_path)[0]), answers(model))


def test_the_width_of_another_size_of_the_family_is_not_guessed_at(tmp_path):
    state = timm.create_model("vit_small_patch16_224", img_size=32, num_classes=2).state_dict()
    with pytest.raises(vitprune.VitpruneError, match="the width of vit_small_patch16_224: name that"):
        save_and_load(state, tmp_path)


@pytest.mark.parametrize("said", [{"image_size": (32, 96)}, {"model_args": {"img_size": (32, 96)}}])
def test_an_oblong_grid_is_said(said, tmp_path):
    model = make(img_size=(32, 96))
    with pytest.raises(vitprune.VitpruneError, match="12 patches make no square; say height and width"):
        save_and_load(model.state_dict(), tmp_path)
    assert torch.equal(answers(save_and_load(model.state_dict(), tmp_path, **said)[0]), answers(model))
    content = {"model": model.state_dict(), "args": argparse.Namespace(img_size=None, input_size=[3, 32, 96])}
    assert torch.equal(answers(save_and_load(content, tmp_path)[0]), answers(model))


def test_positions_are_resampled_when_asked(tmp_path):
    model = make(reg_tokens=4)
    loaded, _notes = save_and_load(model.state_dict(), tmp_path, image_size=96)
    expected = vitprune.set_image_size(model, 96)
    assert torch.equal(answers(loaded), answers(expected))
    vitprune.save(model, tmp_path / "saved")
    assert torch.equal(answers(vitprune.load(tmp_path / "saved", image_size=[96, 96])), answers(expected))


@pytest.mark.parametrize("called", ["reg_token", "register_tokens"])
def test_registers_beside_a_table_for_the_class_and_patches_alone(called, tmp_path):
    """The layout of DINOv2's authors: registers have no position, the class token has one."""
    model = make(reg_tokens=3, no_embed_class=True)
    state = model.state_dict()
    position = torch.randn(1, 1, 192) * 0.1
    state = {**state, "cls_token": state["cls_token"] - position}
    state["pos_embed"] = torch.cat([position, state["pos_embed"]], dim=1)
    state[called] = state.pop("reg_token")
    state["mask_token"] = torch.zeros(1, 192)
    torch.testing.assert_close(answers(save_and_load(state, tmp_path)[0]), answers(model))


@pytest.mark.parametrize("named", [NAME, "deit_small_distilled_patch16_224"])
def test_a_distillation_token_decides_about_the_distilled_head(named, tmp_path):
    model = make("deit_tiny_distilled_patch16_224")
    torch.save({"model": model.state_dict()}, tmp_path / "w.pth")
    model_args = {"embed_dim": 192, "num_heads": 3}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = vitprune.load(named, checkpoint=tmp_path / "w.pth", model_args=model_args)
    assert torch.equal(answers(loaded), answers(model))
    vitprune.save(loaded, tmp_path / "saved")
    assert torch.equal(answers(vitprune.load(tmp_path / "saved")), answers(model))


ARGUMENTS = {
    "mean": [0.1, 0.2, 0.3],
    "std": (0.4, 0.5, 0.6),
    "crop_pct": 0.95,
    "interpolation": "bilinear",
    "img_size": 64,
    "num_classes": 6,
    "model": NAME,
    "model_kwargs": {},
    "lr": 0.1,
}


@pytest.mark.parametrize("wrap", [dict, lambda arguments: argparse.Namespace(**arguments)])
def test_the_transform_of_a_training_script_is_used(wrap, tmp_path):
    content = {"arch": NAME, "state_dict": make().state_dict(), "args": wrap(ARGUMENTS), "epoch": 3}
    loaded, notes = save_and_load(content, tmp_path)
    assert not notes
    config = data_config(loaded)
    assert (config["mean"], config["std"]) == ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert (config["crop_pct"], config["interpolation"]) == (0.95, "bilinear")
    assert config["input_size"] == [3, 64, 64]
    overruled, _notes = save_and_load(content, tmp_path, mean=0.5, crop_pct=1.0)
    assert data_config(overruled) == {**config, "mean": [0.5, 0.5, 0.5], "crop_pct": 1.0}


def test_the_transform_travels_to_folders_elastic_and_onnx_files(tmp_path):
    said = {
        "mean": 0.25,
        "std": [0.5, 0.6, 0.7],
        "crop_pct": 0.8,
        "interpolation": "lanczos",
        "class_names": list("abcdef"),
    }
    loaded, _notes = save_and_load(make().state_dict(), tmp_path, **said)
    config = data_config(loaded)
    pruned, plan = vitprune.prune(loaded, pruning_ratio=0.5, criterion="magnitude", compensation="none")
    vitprune.save(pruned, tmp_path / "pruned", plan=plan)
    elastic = vitprune.make_elastic(loaded, ratios=[0.5], criterion="magnitude", compensation="none")
    vitprune.save_elastic(loaded, elastic, tmp_path / "e.safetensors")
    batch = (torch.randn(2, 3, 64, 64), torch.zeros(2, dtype=torch.int64))
    vitprune.export_onnx(loaded, tmp_path / "m.onnx", [batch])
    of_file = vitprune.open_onnx(tmp_path / "m.onnx")
    for other in (vitprune.load(tmp_path / "pruned"), vitprune.load(tmp_path / "e.safetensors", ratio=0.5), of_file):
        assert data_config(other) == config
        assert tuple(other.label_names) == tuple("abcdef")


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"mean": [0.1, 0.2]}, "one for each of 3 channels"),
        ({"mean": 127.5}, r"pixels in \[0, 1\].*divide by 255"),
        ({"std": 0.0}, "`std` must be above 0"),
        ({"crop_pct": 1.2}, r"`crop_pct` must be in \(0, 1\]"),
        ({"interpolation": "cubic"}, "must be one of nearest, bilinear"),
        ({"class_names": ["a"]}, "names 1 classes, the model has 6 outputs"),
        ({"class_names": list("aabcde")}, "names 'a' twice"),
        ({"class_names": "absent.txt"}, "absent.txt: no such file"),
        ({"image_size": 65}, "try 64 x 64"),
        ({"image_size": [1, 2, 3]}, "one number of pixels, or height and width"),
        ({"model_args": ["num_heads=3"]}, "arguments by name, such as"),
        ({"model_args": {"img_size": "large"}}, "one number of pixels, or height and width"),
        ({"model_args": {"nonsense": 3}}, "does not fit .* nonsense"),
        ({"checkpoint_key": "ema"}, "no weights of the model below `checkpoint_key` 'ema'"),
    ],
)
def test_what_cannot_be_said_is_refused(said, message, tmp_path):
    with pytest.raises(vitprune.VitpruneError, match=message):
        save_and_load(make().state_dict(), tmp_path, **said)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("names.txt", "dog\ncat\n\n"),
        ("names.json", '["dog", "cat"]'),
        ("names.json", '{"cat": 1, "dog": 0}'),
        ("names.json", '{"0": "dog", "1": "cat"}'),
    ],
)
def test_names_of_classes_in_a_file(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    loaded, _notes = save_and_load(make(num_classes=2).state_dict(), tmp_path, class_names=tmp_path / name)
    assert loaded.label_names == ("dog", "cat")


def prefixed(prefix, state):
    return {f"{prefix}{key}": value for key, value in state.items()}


LAYOUTS = {
    "DataParallel": lambda state: prefixed("module.", state),
    "a chain": lambda state: prefixed("module.model.backbone._orig_mod.", state),
    "OpenCLIP": lambda state: prefixed("visual.trunk.", state),
    "an unheard-of name": lambda state: prefixed("my_net.vit.", state),
    "nested": lambda state: {"a": {"b": {"net": state}}},
    "nested with prefixes": lambda state: {"checkpoint": {"model_state_dict": prefixed("encoder.", state)}},
    "compiled blocks": lambda state: {key.replace(".attn.", "._orig_mod.attn."): v for key, v in state.items()},
    "an optimizer by names": lambda state: {"net": state, "optimizer": {"exp_avg": dict(state)}},
    "the same twice": lambda state: {"best": state, "last": dict(state)},
    "a head beside its encoder": lambda state: {
        f"{'model.' if key.startswith('head') else 'model.backbone.'}{key}": value for key, value in state.items()
    },
    "losses and decoders": lambda state: {
        **prefixed("model.", state),
        "criterion.weight": torch.zeros(3),
        "model.decoder_blocks.0.norm1.weight": torch.zeros(3),
        "epoch": 3,
    },
}


@pytest.mark.parametrize("lay_out", LAYOUTS.values(), ids=LAYOUTS)
def test_layouts_are_read_by_what_fits(lay_out, tmp_path):
    model = make()
    assert torch.equal(answers(save_and_load(lay_out(model.state_dict()), tmp_path)[0]), answers(model))


def test_what_is_left_out_is_counted(tmp_path):
    content = {"model": {**make().state_dict(), "decoder.a": torch.zeros(1)}, "loss": {"b": torch.zeros(1)}}
    _loaded, notes = save_and_load(content, tmp_path)
    assert len(notes) == 1
    assert "left out 2 (loss: 1, decoder: 1) tensors" in notes[0]


def test_a_tensor_of_the_body_that_the_model_has_no_place_for_is_not_left_out(tmp_path):
    state = {**make().state_dict(), "blocks.1.adapter.weight": torch.zeros(1)}
    with pytest.raises(vitprune.VitpruneError, match="the model lacks blocks.1.adapter.weight"):
        save_and_load(state, tmp_path)
    state = make().state_dict()
    del state["blocks.1.norm2.bias"]
    with pytest.raises(vitprune.VitpruneError, match="the file lacks blocks.1.norm2.bias"):
        save_and_load(state, tmp_path)


@pytest.mark.parametrize(
    ("raw", "averaged"), [("model", "model_ema"), ("state_dict", "state_dict_ema"), ("student", "teacher")]
)
def test_averaged_weights_are_taken_and_that_is_said(raw, averaged, tmp_path):
    one, other = make(), make()
    with torch.no_grad():
        other.head.bias.add_(1)
    content = {raw: one.state_dict(), averaged: prefixed("module.", other.state_dict())}
    loaded, notes = save_and_load(content, tmp_path)
    assert torch.equal(answers(loaded), answers(other))
    assert any(f"'{averaged}.module'" in note and "`checkpoint_key` chooses" in note for note in notes)
    loaded, notes = save_and_load(content, tmp_path, checkpoint_key=raw)
    assert torch.equal(answers(loaded), answers(one))
    assert torch.equal(answers(save_and_load(content, tmp_path, checkpoint_key=averaged)[0]), answers(other))


def test_several_weights_of_one_rank_are_not_chosen_among(tmp_path):
    one, other = make(), make()
    with torch.no_grad():
        other.head.bias.add_(1)
    content = {"encoder_q": one.state_dict(), "encoder_k": other.state_dict()}
    with pytest.raises(vitprune.VitpruneError, match="'encoder_q', 'encoder_k'; say which with `checkpoint_key`"):
        save_and_load(content, tmp_path)


def test_weights_of_half_precision_are_computed_in_single(tmp_path):
    loaded, _notes = save_and_load({key: value.half() for key, value in make().state_dict().items()}, tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}


def test_the_state_dict_of_a_pruned_model(tmp_path):
    model = make()
    asked = {"pruning_ratio": 0.5, "criterion": "magnitude", "allocation": "global", "compensation": "none"}
    pruned, plan = vitprune.prune(model, **asked)
    assert len(set(plan.widths.values())) == 2
    assert torch.equal(answers(save_and_load(pruned.state_dict(), tmp_path)[0]), answers(pruned))


def write_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")


def write_tar(path):
    path.with_name("readme.txt").write_text("hello")
    with tarfile.open(path, "w") as archive:
        archive.add(path.with_name("readme.txt"), "readme.txt")


def write_script(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(path))


def cut(path):
    torch.save({"a": torch.zeros(100)}, path)
    path.write_bytes(path.read_bytes()[:-200])


def write_index(path):
    path.write_text(json.dumps({"metadata": {}, "weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}))


NO_CHECKPOINTS = {
    "LFS pointer": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid"),
        "is a Git LFS pointer",
    ),
    "web page": (lambda path: path.write_text("\n <!DOCTYPE html>\n<title>404</title>"), "is a web page"),
    "empty": (lambda path: path.write_bytes(b""), "is empty"),
    "zeros": (lambda path: path.write_bytes(bytes(100)), "is empty"),
    "cut": (cut, "cut off"),
    "zip": (write_zip, r"is a zip archive of other files \(readme.txt\)"),
    "tar": (write_tar, r"is a tar archive \(readme.txt\)"),
    "gzip": (lambda path: path.write_bytes(gzip.compress(b"x" * 999)), "is a gzip archive; unpack it first"),
    "TorchScript": (write_script, "is a TorchScript archive"),
    "whole model": (lambda path: torch.save(timm.create_model("test_vit"), path), "is a whole pickled model"),
    "Keras": (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99)), "is an HDF5 file"),
    "index": (write_index, "is the index of a checkpoint in 2 shards"),
    "JSON": (lambda path: path.write_text('{"lr": 0.1}'), "is a JSON file"),
    "text": (lambda path: path.write_text("epoch 1 loss 0.3\n"), "is a text file"),
    "picture": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(99)), "is a PNG picture"),
    "folder": (lambda path: path.mkdir(), "is a folder"),
    "list": (lambda path: torch.save([torch.zeros(1)], path), "not a plain state dict: it holds a list"),
    "no tensors": (lambda path: torch.save({"epoch": 3}, path), "no tensor is in it"),
    "noise": (
        lambda path: path.write_bytes(bytes(range(128, 256)) * 20),
        "is no file of weights|not a plain state dict",
    ),
}


@pytest.mark.parametrize(("write", "message"), NO_CHECKPOINTS.values(), ids=NO_CHECKPOINTS)
@pytest.mark.parametrize("name", ["w.pth", "w.bin"])
def test_a_file_that_is_no_checkpoint_is_called_what_it_is(write, message, name, tmp_path):
    write(tmp_path / name)
    with pytest.raises(vitprune.VitpruneError, match=message) as raised:
        vitprune.load(NAME, checkpoint=tmp_path / name)
    assert "\n" not in str(raised.value)


SAFETENSORS = {
    "cut": lambda whole: whole[:-10],
    "cut in the header": lambda whole: whole[:40],
    "no header": lambda whole: whole[8:],
    "another header": lambda whole: whole[:8] + b"{" * 20 + whole[28:],
    "pickle": lambda _whole: b"\x80\x02}q\x00.",
    "pointer": lambda _whole: b"version https://git-lfs.github.com/spec/v1\n",
    "page": lambda _whole: b"<html>Sign in</html>",
    "nothing": lambda _whole: b"",
}


@pytest.mark.parametrize("damage", SAFETENSORS.values(), ids=SAFETENSORS)
def test_a_damaged_safetensors_file_is_refused_as_checkpoint_in_a_folder_and_as_elastic_file(damage, tmp_path):
    vitprune.save(make(), tmp_path / "saved")
    path = tmp_path / "saved" / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    for load in (
        lambda: vitprune.load(NAME, checkpoint=path),
        lambda: vitprune.load(tmp_path / "saved"),
        lambda: vitprune.load(path),
    ):
        with pytest.raises(vitprune.VitpruneError) as raised:
            load()
        assert str(path) in str(raised.value)
        assert "\n" not in str(raised.value)


def test_a_folder_of_timm_with_a_pickle_of_tensors(tmp_path):
    model = make()
    vitprune.save(model, tmp_path / "saved")
    (tmp_path / "saved" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "saved" / "pytorch_model.bin")
    assert torch.equal(answers(vitprune.load(tmp_path / "saved")), answers(model))
    torch.save(model, tmp_path / "saved" / "pytorch_model.bin")
    with pytest.raises(vitprune.VitpruneError, match="whole pickled model"):
        vitprune.load(tmp_path / "saved")


def test_a_folder_of_another_library_is_called_that(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(vitprune.VitpruneError, match=r"has no config\.json; pass a timm name as the model"):
        vitprune.load(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["ViTForImageClassification"], "hidden_size": 192}')
    with pytest.raises(vitprune.VitpruneError, match="names no architecture .it is transformers' ViTForImage"):
        vitprune.load(tmp_path)


@pytest.mark.parametrize(
    "spelled",
    [
        "timm/deit_tiny_patch16_224.fb_in1k",
        "hf-hub:timm/deit_tiny_patch16_224.fb_in1k",
        "hf_hub:timm/deit_tiny_patch16_224.fb_in1k",
        "HF-HUB:timm/deit_tiny_patch16_224.fb_in1k",
        "https://huggingface.co/timm/deit_tiny_patch16_224.fb_in1k",
        "https://huggingface.co/timm/deit_tiny_patch16_224.fb_in1k/",
        "huggingface.co/timm/deit_tiny_patch16_224.fb_in1k/tree/main",
        "https://hf.co/timm/deit_tiny_patch16_224.fb_in1k?x=1",
    ],
)
def test_spellings_of_a_hub_model(spelled):
    assert spell(spelled) == "hf-hub:timm/deit_tiny_patch16_224.fb_in1k"


def test_the_folder_of_a_local_dir(saved_vit):
    assert vitprune.load(f"local-dir:{saved_vit}").num_classes == 5


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        (
            "google/vit-base-patch16-224",
            "type the timm name vit_base_patch16_224 .*, or hf-hub:google/vit-base-patch16-224",
        ),
        ("facebook/deit-tiny-patch16-224", "the timm name deit_tiny_patch16_224"),
        ("https://huggingface.co/facebook/dinov2-small", "the timm name vit_small_patch14_dinov2"),
        ("somebody/mine", "type .*hf-hub:somebody/mine"),
        ("https://example.org/w.pth", "is an address; download the file"),
        ("deit-tiny-patch16-224", "did you mean deit_tiny_patch16_224"),
    ],
)
def test_other_spellings_are_refused_with_what_to_type(name, hint):
    with pytest.raises(vitprune.VitpruneError, match=hint):
        vitprune.load(name)


@pytest.mark.parametrize("name", ["w.pth", "w.bin", "w.ckpt", "w"])
def test_what_is_in_a_file_matters_and_not_its_name(name, tmp_path):
    model = make()
    save_file(model.state_dict(), tmp_path / name)
    assert torch.equal(answers(vitprune.load(NAME, checkpoint=tmp_path / name)), answers(model))
    torch.save(model.state_dict(), tmp_path / "w.safetensors")
    assert torch.equal(answers(vitprune.load(NAME, checkpoint=tmp_path / "w.safetensors")), answers(model))


@pytest.mark.parametrize(
    ("name", "model_args"),
    [
        ("swin_tiny_patch4_window7_224", {"num_classes": 3}),
        ("beit_base_patch16_384", {"img_size": 64}),
        ("vit_relpos_small_patch16_224", {"img_size": 96}),
        ("eva02_tiny_patch14_224", {"img_size": 56}),
        ("deit3_small_patch16_224", {"img_size": 96}),
        ("vit_base_patch16_siglip_224", {"img_size": 96}),
        ("hiera_tiny_224", {"num_classes": 3}),
    ],
)
def test_families_with_positions_of_other_kinds(name, model_args, tmp_path):
    shallow = {} if name.startswith(("swin", "hiera")) else {"depth": 1}
    state = timm.create_model(name, **shallow, **model_args).state_dict()
    torch.save({"model": prefixed("module.", state)}, tmp_path / "w.pth")
    own = vitprune.load(name, checkpoint=tmp_path / "w.pth").state_dict()
    assert own.keys() == state.keys()
    assert all(torch.equal(own[key], state[key]) for key in state)

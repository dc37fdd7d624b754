"""Models of other libraries: their timm twins answer alike, are pruned, saved and written back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import make_vit, shared
from safetensors.torch import save_file

import vitprune
from vitprune import VitpruneError
from vitprune.models.trunk import check_trunk
from vitprune.twins.find_twin import adopt_transformers
from vitprune.twins.of_transformers import read_processor, resample_positions, twin_of_transformers
from vitprune.views import data_config
from vitprune.wrappers import library_of

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
torchvision = pytest.importorskip("torchvision", reason="torchvision is not installed")
pytest.importorskip("open_clip", reason="open_clip is not installed")

from twins import OF_TRANSFORMERS, ROWS, SHAPE, SMALL, WITHOUT_TRUNK, make, make_open_clip, make_torchvision, row  # noqa: E402


@torch.no_grad()
def answer(kind: str, model, images):
    told, compared = model(pixel_values=images), OF_TRANSFORMERS[kind][3]
    return told.last_hidden_state[:, 0] if compared == "class token" else getattr(told, compared)


def images_for(twin, count: int = 3):
    return torch.randn(count, *data_config(twin)["input_size"], generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", OF_TRANSFORMERS)
@torch.no_grad()
def test_a_twin_answers_alike_from_memory_and_from_a_folder(kind, tmp_path):
    model = make(kind)
    assert library_of(model) == "transformers"
    twin = vitprune.load(model)
    images = images_for(twin)
    torch.testing.assert_close(twin(images), answer(kind, model, images), rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "folder")
    from_files = vitprune.load(tmp_path / "folder")
    torch.testing.assert_close(from_files(images), twin(images), rtol=0, atol=0)
    vitprune.save(twin, tmp_path / "twin")
    torch.testing.assert_close(vitprune.load(tmp_path / "twin")(images), twin(images), rtol=0, atol=0)


@pytest.mark.parametrize("kind", OF_TRANSFORMERS)
@torch.no_grad()
def test_a_twin_is_pruned_masked_exported_and_followed(kind, tmp_path):
    twin = vitprune.load(make(kind))
    images = images_for(twin)
    groups = vitprune.find_feed_forwards(twin)
    scores = vitprune.score_neurons(twin, "magnitude")
    plan = vitprune.plan_pruning(twin, scores, criterion="magnitude", ratio=0.5)
    removed, masked = (vitprune.apply_plan(twin, plan, mode=mode) for mode in ("remove", "mask"))
    torch.testing.assert_close(removed(images), masked(images), rtol=1e-5, atol=1e-6)
    vitprune.save(removed, tmp_path / "half", plan=plan)
    torch.testing.assert_close(vitprune.load(tmp_path / "half")(images), removed(images), rtol=0, atol=0)
    parity = vitprune.export_onnx(removed, tmp_path / "half.onnx", [(images, torch.zeros(3, dtype=torch.int64))])
    assert parity.max_abs_diff < 1e-4
    if kind in WITHOUT_TRUNK:
        with pytest.raises(VitpruneError, match="no isotropic trunk"):
            check_trunk(twin, groups, images)
    else:
        check_trunk(twin, groups, images)


@pytest.mark.parametrize("name", ["CLIP", "Siglip"])
@torch.no_grad()
def test_the_image_towers_of_models_of_images_and_text(name, tmp_path):
    """Their texts are left out, in memory and in files, and they are not written back without them."""
    torch.manual_seed(0)
    text = {**SHAPE, "vocab_size": 40, "max_position_embeddings": 8}
    width = {"projection_dim": 24} if name == "CLIP" else {}
    text |= {"projection_size": 32} if name == "Siglip" else {}
    config = getattr(transformers, f"{name}Config")(text_config=text, vision_config=SMALL, **width)
    model = getattr(transformers, f"{name}Model")(config).eval()
    twin = vitprune.load(model)
    images = images_for(twin)
    told = model.get_image_features(pixel_values=images)
    told = told if isinstance(told, torch.Tensor) else told.pooler_output
    torch.testing.assert_close(twin(images), told, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path / "both")
    torch.testing.assert_close(vitprune.load(tmp_path / "both")(images), twin(images), rtol=0, atol=0)
    with pytest.raises(VitpruneError, match="load its vision model alone"):
        vitprune.save_transformers(twin, tmp_path / "x")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_twin_has_the_numbers_of_its_model(dtype):
    twin = vitprune.load(make("vit").to(dtype).train())
    assert twin.head.weight.dtype == dtype
    assert not twin.training


def test_files_of_shards_and_pickles_are_read(tmp_path):
    model = make("vit")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    twin = vitprune.load(tmp_path / "shards")
    assert twin(images_for(twin)).shape == (3, 5)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "config.json").write_text((tmp_path / "shards" / "config.json").read_text())
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    assert torch.equal(vitprune.load(tmp_path / "bin").head.weight, twin.head.weight)
    index["weight_map"]["classifier.bias"] = "../elsewhere.safetensors"
    (tmp_path / "shards" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(VitpruneError, match="lies outside of the folder"):
        vitprune.load(tmp_path / "shards")


def test_where_a_model_was_read_does_not_go_with_its_twin(tmp_path):
    make("vit").save_pretrained(tmp_path / "private")
    model = transformers.ViTForImageClassification.from_pretrained(tmp_path / "private")
    vitprune.save(vitprune.load(model), tmp_path / "twin")
    assert "private" not in (tmp_path / "twin" / "config.json").read_text()


def test_what_has_no_twin_is_refused(tmp_path):
    config = make("vit").config.to_dict()
    state = make("vit").state_dict()
    with pytest.raises(VitpruneError, match="is a bert of transformers, for which there is no twin"):
        twin_of_transformers({**config, "model_type": "bert"}, state)
    with pytest.raises(VitpruneError, match="has a tensor that no timm model has: vit.adapter.weight"):
        twin_of_transformers(config, {**state, "vit.adapter.weight": torch.zeros(2)})
    with pytest.raises(VitpruneError, match="activation function mish"):
        twin_of_transformers({**config, "hidden_act": "mish"}, state)
    few = {name: value for name, value in state.items() if name != "vit.layernorm.bias"}
    with pytest.raises(VitpruneError, match=r"it lacks norm.bias"):
        adopt_transformers(config, few)
    named = transformers.SiglipConfig(vision_config=SMALL, id2label={0: "cat", 1: "dog"})
    assert vitprune.load(transformers.SiglipForImageClassification(named)).label_names == ("cat", "dog")
    with pytest.raises(VitpruneError, match="reads tokens that are not normed"):
        vitprune.load(transformers.CLIPForImageClassification(transformers.CLIPConfig(vision_config=SMALL)))
    with pytest.raises(VitpruneError, match="no library with twins"):
        vitprune.load(torch.nn.Linear(2, 2))
    with pytest.raises(VitpruneError, match="ResNet of torchvision has no twin"):
        vitprune.load(torchvision.models.resnet18())


def test_a_twin_that_would_answer_otherwise_is_refused(monkeypatch):
    model = make("vit")
    monkeypatch.setattr(model.config, "num_attention_heads", 4)  # the description lies
    with pytest.raises(VitpruneError, match="answers otherwise than timm's model of its description"):
        vitprune.load(model)


def test_every_verb_says_what_to_do_with_a_model_of_another_library():
    for model in (make("vit"), torchvision.models.vit_b_32()):
        with pytest.raises(VitpruneError, match=r"vitprune.load\(model\) gives the timm model"):
            vitprune.find_feed_forwards(model)
    with pytest.raises(VitpruneError, match=r"vitprune.load\(model\) gives"):
        vitprune.evaluate(make("vit"), [(torch.zeros(1, 3, 32, 32), torch.zeros(1, dtype=torch.int64))])


def test_preprocessing_is_what_the_library_does(tmp_path):
    """The pixels that a processor of transformers gives, for the three ways in which they resize."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (50, 70, 3), generator=generator, dtype=torch.uint8)
    image = Image.fromarray(pixels.numpy()).resize((140, 100), Image.Resampling.BICUBIC)
    image.save(tmp_path / "photo.png")
    model = make("vit")
    for options in (
        {"size": {"height": 32, "width": 32}, "resample": 2},
        {"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}, "resample": 3},
    ):
        kind = transformers.CLIPImageProcessorPil if "crop_size" in options else transformers.ViTImageProcessorPil
        processor = kind(do_center_crop="crop_size" in options, image_mean=[0.4] * 3, image_std=[0.3] * 3, **options)
        model.save_pretrained(tmp_path / "folder")
        processor.save_pretrained(tmp_path / "folder")
        twin = vitprune.load(tmp_path / "folder")
        images = vitprune.find_images(tmp_path, None, labels_matter=False)
        images = images.only(("photo.png",))
        ((got, _labels),) = vitprune.ImageBatches(images, twin)
        expected = processor(image, return_tensors="pt")["pixel_values"]
        # PIL rounds to 256 levels of grey, and one of them is 0.013 here.
        assert float((got - expected).abs().max()) < 0.05, options
        assert float((got - expected).abs().mean()) < 0.005, options


def test_dinov2_runs_at_the_size_that_its_images_are_prepared_in(tmp_path):
    """Positions are interpolated as the library does it, once."""
    for kind in ("dinov2", "dinov2-registers"):
        model = make(kind)
        model.save_pretrained(tmp_path / kind)
        told = {"size": {"shortest_edge": 32}, "crop_size": {"height": 28, "width": 28}, "image_mean": [0.5] * 3}
        (tmp_path / kind / "preprocessor_config.json").write_text(json.dumps(told))
        twin = vitprune.load(tmp_path / kind)
        images = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            torch.testing.assert_close(twin(images), answer(kind, model, images), rtol=1e-4, atol=1e-5)


def test_positions_of_the_same_grid_stay():
    table = torch.randn(1, 10, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(resample_positions(table, (3, 3), (3, 3), 1), table)


def test_descriptions_of_preprocessing():
    usual = {"input_size": (3, 224, 224), "mean": (0.1,), "interpolation": "bicubic"}
    assert read_processor({"do_normalize": False, "size": 160}, usual)["mean"] == (0.0, 0.0, 0.0)
    assert read_processor({"size": 160}, usual)["input_size"] == (3, 160, 160)
    assert read_processor({"size": {"height": 96, "width": 64}}, usual)["crop_mode"] == "squash"
    with pytest.raises(VitpruneError, match="pixels are in"):
        read_processor({"rescale_factor": 1 / 127.5}, usual)


@pytest.mark.parametrize("name", ["vit", "swin"])
@torch.no_grad()
def test_twins_of_torchvision(name):
    model = make_torchvision(name)
    twin = vitprune.load(model)
    images = images_for(twin)
    torch.testing.assert_close(twin(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["vit", "swin"])
@torch.no_grad()
def test_pruned_twins_are_written_back_for_torchvision(name, tmp_path):
    twin = vitprune.load(make_torchvision(name))
    images = images_for(twin)
    options = {"criterion": "magnitude", "allocation": "uniform"}
    plan = vitprune.plan_pruning(twin, vitprune.score_neurons(twin, "magnitude"), ratio=0.5, **options)
    vitprune.save(vitprune.apply_plan(twin, plan), tmp_path / "half", plan=plan)
    half = vitprune.load(tmp_path / "half")
    arguments, state = vitprune.as_torchvision(half)
    kind = {"vit": torchvision.models.VisionTransformer, "swin": torchvision.models.SwinTransformer}[name]
    told = kind(**arguments).eval()
    told.load_state_dict(state)
    torch.testing.assert_close(told(images), half(images), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_twins_of_open_clip():
    for quick_gelu in (False, True):
        model = make_open_clip(quick_gelu=quick_gelu)
        twin = vitprune.load(model)
        images = images_for(twin)
        assert twin.num_classes == 0
        torch.testing.assert_close(twin(images), model.visual(images), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_pruned_tower_is_written_back_for_open_clip(tmp_path):
    model = make_open_clip()
    twin = vitprune.load(model)
    images = images_for(twin)
    options = {"criterion": "magnitude", "allocation": "uniform"}
    plan = vitprune.plan_pruning(twin, vitprune.score_neurons(twin, "magnitude"), ratio=0.5, **options)
    vitprune.save(vitprune.apply_plan(twin, plan), tmp_path / "half", plan=plan)
    half = vitprune.load(tmp_path / "half")
    config, state = vitprune.as_open_clip(half)
    smaller = make_open_clip(**config)
    smaller.visual.load_state_dict(state)
    torch.testing.assert_close(smaller.visual(images), half(images), rtol=1e-4, atol=1e-5)
    assert config["mlp_ratio"] == 0.75


@pytest.mark.parametrize("kind", ROWS)
def test_the_table_of_other_libraries_says_what_happens(kind):
    page = Path(__file__).parents[1] / "docs" / "libraries.md"
    assert row(kind) in page.read_text().splitlines()


def test_the_same_neurons_whichever_library_a_model_comes_from(tmp_path):
    """A timm model's weights in transformers and in torchvision: the same scores, and answers to 1e-4."""
    dense = make_vit(num_classes=5, depth=2).float()
    others = {"transformers": as_transformers(dense), "torchvision": as_torchvision(dense)}
    copies = {"timm": dense, **{name: vitprune.load(model) for name, model in others.items()}}
    batches = [(torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(2)), torch.arange(6) % 5)]
    plans = {}
    for name, model in copies.items():
        with torch.no_grad():
            torch.testing.assert_close(model(batches[0][0]), dense(batches[0][0]), rtol=1e-4, atol=1e-4)
        _pruned, plans[name] = vitprune.prune(model, batches, ratio=0.5)
    for name in ("transformers", "torchvision"):
        for group, keep in plans["timm"].keep.items():
            assert torch.equal(plans[name].keep[group], keep), (name, group)


def test_copies_of_real_weights_lose_the_same_neurons():
    """DeiT-Tiny from timm, transformers and torchvision, on real photos."""
    dense = vitprune.load("deit_tiny_patch16_224", checkpoint=shared("weights/deit_tiny_patch16_224.safetensors"))
    images = vitprune.find_images(shared("data/imagenet-train-1000"), None).head(16)
    batches = list(vitprune.ImageBatches(images, dense, batch_size=16))
    copies = {"timm": dense}
    with torch.no_grad():
        for library, made in (("transformers", as_transformers(dense)), ("torchvision", as_torchvision(dense))):
            copies[library] = vitprune.load(made)
            torch.testing.assert_close(copies[library](batches[0][0]), dense(batches[0][0]), rtol=0, atol=1e-4)
    options = {"ratio": 0.5, "criterion": "variance", "compensate": "ridge", "step": 1}
    plans = {name: vitprune.prune(model, batches, **options)[1] for name, model in copies.items()}
    for name in ("transformers", "torchvision"):
        for group, keep in plans["timm"].keep.items():
            assert torch.equal(plans[name].keep[group], keep), (name, group)


def as_transformers(dense):
    """Return a model of transformers with the weights of a timm one."""
    width, heads = dense.embed_dim, dense.blocks[0].attn.num_heads
    config = transformers.ViTConfig(
        hidden_size=width,
        num_hidden_layers=len(dense.blocks),
        num_attention_heads=heads,
        intermediate_size=dense.blocks[0].mlp.fc1.out_features,
        image_size=dense.patch_embed.img_size[0],
        patch_size=dense.patch_embed.patch_size[0],
        num_labels=dense.num_classes,
        layer_norm_eps=1e-6,
    )
    model, state = transformers.ViTForImageClassification(config).eval(), {}
    names = {
        "norm.": "vit.layernorm.",
        "head.": "classifier.",
        "patch_embed.proj.": "vit.embeddings.patch_embeddings.projection.",
    }
    in_block = {
        "norm1.": "layernorm_before.",
        "norm2.": "layernorm_after.",
        "attn.proj.": "attention.o_proj.",
        "mlp.": "mlp.",
    }
    for name, value in dense.state_dict().items():
        if name in ("cls_token", "pos_embed"):
            state[f"vit.embeddings.{'cls_token' if name == 'cls_token' else 'position_embeddings'}"] = value
        elif name.startswith("blocks."):
            _blocks, number, rest = name.split(".", 2)
            if rest.startswith("attn.qkv."):
                for part, piece in zip("qkv", value.chunk(3), strict=True):
                    state[f"vit.layers.{number}.attention.{part}_proj.{rest.rpartition('.')[2]}"] = piece
                continue
            ours = next(piece for piece in in_block if rest.startswith(piece))
            state[f"vit.layers.{number}.{in_block[ours]}{rest.removeprefix(ours)}"] = value
        else:
            ours = next(piece for piece in names if name.startswith(piece))
            state[names[ours] + name.removeprefix(ours)] = value
    model.load_state_dict(state)
    return model


def as_torchvision(dense):
    """Return a model of torchvision with the weights of a timm one."""
    model = torchvision.models.VisionTransformer(
        dense.patch_embed.img_size[0],
        dense.patch_embed.patch_size[0],
        len(dense.blocks),
        dense.blocks[0].attn.num_heads,
        dense.embed_dim,
        dense.blocks[0].mlp.fc1.out_features,
        num_classes=dense.num_classes,
    ).eval()
    state = {}
    pieces = {
        "norm1.": "ln_1.",
        "norm2.": "ln_2.",
        "attn.qkv.": "self_attention.in_proj_",
        "attn.proj.": "self_attention.out_proj.",
        "mlp.fc1.": "mlp.0.",
        "mlp.fc2.": "mlp.3.",
    }
    whole = {"cls_token": "class_token", "pos_embed": "encoder.pos_embedding"}
    for name, value in dense.state_dict().items():
        if name.startswith("blocks."):
            _blocks, number, rest = name.split(".", 2)
            ours = next(piece for piece in pieces if rest.startswith(piece))
            theirs = f"encoder.layers.encoder_layer_{number}.{pieces[ours]}{rest.removeprefix(ours)}"
        else:
            theirs = whole.get(name) or name.replace("patch_embed.proj", "conv_proj").replace("head.", "heads.head.")
            theirs = theirs.replace("norm.", "encoder.ln.")
        state[theirs] = value
    model.load_state_dict(state)
    return model


@pytest.mark.parametrize("kind", [kind for kind in OF_TRANSFORMERS if "siglip" not in kind])
@torch.no_grad()
def test_a_pruned_twin_is_written_back_for_its_own_library(kind, tmp_path):
    model = make(kind)
    twin = vitprune.load(model)
    images = images_for(twin)
    scores = vitprune.score_neurons(twin, "magnitude")
    width = next(iter(scores.values())).numel()
    options = {"criterion": "magnitude", "allocation": "uniform"}
    keep = 32 if kind == "dinov2" else 24 if "dinov2" in kind else width // 2
    if kind == "dinov2-registers":
        keep = 64
    plan = vitprune.plan_pruning(twin, scores, ratio=1 - keep / width, **options)
    half = vitprune.apply_plan(twin, plan)
    vitprune.save(half, tmp_path / "ours")
    vitprune.save_transformers(vitprune.load(tmp_path / "ours"), tmp_path / "theirs")
    told, info = type(model).from_pretrained(tmp_path / "theirs", output_loading_info=True)
    unread = ("mask_token", "pooler.dense", "k_proj.bias", "head.", "relative_position_index")
    assert not [name for name in info["missing_keys"] if not any(piece in name for piece in unread)]
    assert not info["unexpected_keys"]
    assert sum(p.numel() for p in told.parameters()) < sum(p.numel() for p in model.parameters())
    torch.testing.assert_close(answer(kind, told.eval(), images), half(images), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(vitprune.load(tmp_path / "theirs")(images), half(images), rtol=0, atol=0)


def test_what_transformers_cannot_express_is_not_written_back(tmp_path):
    twin = vitprune.load(make("vit"))
    batches = [(images_for(twin, 6), torch.arange(6) % 5)]
    uneven = vitprune.Plan({f"blocks.{block}.mlp": torch.arange(48) < 20 + 4 * block for block in range(2)})
    with pytest.raises(VitpruneError, match="FFNs keep 20 to 24 neurons, and transformers has one width for all"):
        vitprune.save_transformers(vitprune.apply_plan(twin, uneven), tmp_path / "x")
    even = vitprune.Plan({f"blocks.{block}.mlp": torch.arange(48) < 20 for block in range(2)})
    with pytest.raises(VitpruneError, match="its pooling has an FFN"):
        vitprune.save_transformers(vitprune.apply_plan(vitprune.load(make("siglip")), even), tmp_path / "x")
    with pytest.raises(VitpruneError, match="nothing of the model stands for .*head.probe"):
        vitprune.save_transformers(vitprune.load(make("siglip-classifier")), tmp_path / "x")
    dense = vitprune.load(make("siglip"))
    vitprune.save_transformers(dense, tmp_path / "siglip")
    assert torch.equal(vitprune.load(tmp_path / "siglip").attn_pool.latent, dense.attn_pool.latent)
    with pytest.raises(VitpruneError, match="is a SplitAttention"):
        narrow, _plan = vitprune.prune(twin, batches, ratio=0.5, parts=["qk"], allocation="uniform")
        vitprune.save_transformers(narrow, tmp_path / "x")
    with pytest.raises(VitpruneError, match="was not loaded from transformers"):
        vitprune.save_transformers(make_vit(), tmp_path / "x")
    few = vitprune.keep_classes(twin, [3, 1], label_names=["cat", "dog"])
    vitprune.save_transformers(few, tmp_path / "few")
    told = transformers.ViTForImageClassification.from_pretrained(tmp_path / "few")
    assert told.config.id2label == {0: "cat", 1: "dog"}
    assert told.classifier.out_features == 2
    assert not (tmp_path / "x").exists()


@torch.no_grad()
def test_state_dicts_of_other_libraries_are_checkpoints_of_the_timm_model(tmp_path):
    """The file alone, with the timm name: the way in for weights without their description."""
    dense = make_vit(num_classes=5).float()
    models = {"transformers": as_transformers(dense), "torchvision": as_torchvision(dense)}
    images = images_for(dense)
    for name, model in models.items():
        torch.save(model.state_dict(), tmp_path / f"{name}.pth")
        told = vitprune.load("vit_tiny_patch16_224", checkpoint=tmp_path / f"{name}.pth", model_args={"num_heads": 3})
        torch.testing.assert_close(told(images), dense(images), rtol=1e-4, atol=1e-4)
    model = make("deit-teacher")
    save_file(model.state_dict(), tmp_path / "deit.safetensors")
    named = {"checkpoint": tmp_path / "deit.safetensors", "model_args": {"num_heads": 2}}
    told = vitprune.load("deit_tiny_distilled_patch16_224", **named)
    torch.testing.assert_close(told(images), answer("deit-teacher", model, images), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", ["dino", "dinov2", "dinov2-registers", "mae"])
@torch.no_grad()
def test_original_checkpoints_are_read_with_the_timm_name(layout, tmp_path):
    """The layouts that the authors of DINO, DINOv2 and MAE publish, with what is beside the encoder in their files."""
    torch.manual_seed(0)
    registers = {"reg_tokens": 4, "no_embed_class": True} if layout == "dinov2-registers" else {}
    scaled = {"init_values": 1e-5} if "dinov2" in layout else {}
    dense = make_vit(num_classes=0, **registers, **scaled).float()
    state, extra = dict(dense.state_dict()), {}
    if layout == "dino":
        extra = {"student": {f"module.backbone.{name}": torch.zeros_like(value) for name, value in state.items()}}
        state = {f"backbone.{name}": value for name, value in state.items()} | {"head.last_layer.weight": torch.ones(2)}
    elif layout == "mae":
        state |= {"mask_token": torch.zeros(1, 1, 8), "decoder_embed.weight": torch.zeros(8, 24)}
    else:
        state["mask_token"] = torch.zeros(1, dense.embed_dim)
    if registers:
        position = torch.randn(1, 1, dense.embed_dim) * 0.1
        state["register_tokens"] = state.pop("reg_token")
        state["cls_token"] = state["cls_token"] - position
        state["pos_embed"] = torch.cat([position, state["pos_embed"]], 1)
    content = {"dino": {"teacher": state, **extra}, "mae": {"model": state}}.get(layout, state)
    torch.save(content, tmp_path / "weights.pth")
    heads = {"model_args": {"num_heads": dense.blocks[0].attn.num_heads}}
    name = {"dino": "vit_tiny_patch16_224", "mae": "vit_tiny_patch16_224"}.get(layout, "vit_small_patch14_dinov2")
    name = "vit_small_patch14_reg4_dinov2" if registers else name
    loaded = vitprune.load(name, checkpoint=tmp_path / "weights.pth", **heads)
    images = images_for(dense)
    assert loaded.num_classes == 0
    torch.testing.assert_close(loaded(images), dense(images), rtol=1e-4, atol=1e-5)

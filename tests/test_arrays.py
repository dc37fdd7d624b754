"""Runs as numpy arrays."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import vitprune
from vitprune.cli import main
from vitprune.discovery.run import load_run


@pytest.fixture(scope="module")
def run(tmp_path_factory, saved_vit, image_folder):
    folder = tmp_path_factory.mktemp("arrays") / "run"
    arguments = ["--data", str(image_folder), "--tokens", "cls", "--nodes", "ffn", "attention", "-o", str(folder)]
    assert main(["discover", str(saved_vit), *arguments]) == 0
    return folder


def test_all_of_a_run_is_there_and_the_places_are_those_of_timm(run, saved_vit, tmp_path, capsys):
    path = tmp_path / "paths.npz"
    assert main(["convert", str(run), "--activations", "-o", str(path)]) == 0
    loaded, model = load_run(run), vitprune.load(saved_vit)
    with np.load(path, allow_pickle=False) as arrays:
        assert np.array_equal(arrays["neurons"], loaded.found.neurons.numpy())
        assert np.array_equal(arrays["joint_scores"], loaded.found.joint_scores.numpy())
        assert tuple(arrays["files"]) == loaded.images.files
        assert arrays["class_names"].tolist() == [loaded.images.class_names[index] for index in loaded.found.classes]
        assert arrays["prisma"].tolist()[:2] == ["blocks.0.attn.hook_z", "blocks.0.mlp.hook_post"]
        assert arrays["heads"].tolist()[:2] == [model.blocks[0].attn.num_heads, 0]
        for name in loaded.found.layers:
            assert np.array_equal(arrays[f"class_scores/{name}"], loaded.found.class_scores[name].numpy())
        batches = vitprune.ImageBatches(loaded.images, model, batch_size=7)
        for layer, module in zip(arrays["layers"], arrays["modules"], strict=True):
            read = []
            handle = model.get_submodule(module).register_forward_pre_hook(
                lambda _module, inputs, read=read: read.append(inputs[0][:, 0])
            )
            with torch.no_grad():
                for images, _labels in batches:
                    model(images)
            handle.remove()
            np.testing.assert_allclose(arrays[f"activations/{layer}"], torch.cat(read).numpy(), rtol=1e-4, atol=1e-5)


def test_the_same_run_gives_the_same_bytes(run, tmp_path):
    for name in ("one.npz", "two.npz"):
        vitprune.write_arrays(load_run(run), tmp_path / name)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    with np.load(tmp_path / "one.npz") as arrays:
        assert not any(name.startswith("activations/") for name in arrays)


def test_refusals(run, tmp_path, capsys):
    with pytest.raises(vitprune.VitpruneError, match=r"must end in \.npz"):
        vitprune.write_arrays(load_run(run), tmp_path / "run.npy")
    for arguments, message in (
        ([str(run), str(run), "-o", str(tmp_path / "a.npz")], "one run is written as arrays, got 2"),
        ([str(run), "--activations", "-o", str(tmp_path / "prefix")], "name an output that ends in .npz"),
        ([str(run), "--model", "x", "-o", str(tmp_path / "a.npz")], "not for writing runs"),
    ):
        assert main(["convert", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "a.npz").exists()
    path = tmp_path / "there.npz"
    path.write_bytes(b"")
    assert main(["convert", str(run), "-o", str(path)]) == 2
    assert path.read_bytes() == b""
    assert main(["convert", str(run), "-o", str(path), "--overwrite"]) == 0

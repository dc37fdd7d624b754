"""What a stranger's file can do to who opens it: nothing but be read or refused. SECURITY.md says what is promised."""

from __future__ import annotations

import ast
import json
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper
from safetensors.torch import load_file, save_file

import vitprune
from vitprune.cli import main
from vitprune.errors import VitpruneError
from vitprune.seal import SEAL, seal

PACKAGE = Path(vitprune.__file__).parent
# Functions that run what they read.
RUN_CODE = {"eval", "exec", "compile", "__import__", "system", "popen", "load_module"}
UNPICKLE = {"loads", "load", "Unpickler", "read_pickle"}


def calls_in(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Attribute) and function.attr == "eval":
                continue  # of a module: eval mode
            name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            owner = (
                function.value.id
                if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name)
                else ""
            )
            yield owner, name, {keyword.arg: keyword.value for keyword in node.keywords}, node.lineno


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_no_line_runs_or_unpickles_what_it_reads(path):
    for owner, name, keywords, line in calls_in(path):
        where = f"{path.name}:{line}"
        if name in RUN_CODE:
            # re.compile and torch.compile make no program of text.
            assert (owner, name) in {("re", "compile"), ("torch", "compile")}, where
        if owner in ("pickle", "cPickle", "dill", "joblib", "cloudpickle", "marshal", "shelve"):
            assert name not in UNPICKLE, where
        if owner == "torch" and name == "load":
            assert getattr(keywords.get("weights_only"), "value", None) is True, where
        if owner in ("np", "numpy") and name == "load":
            assert getattr(keywords.get("allow_pickle"), "value", None) is False, where
        assert getattr(keywords.get("trust_remote_code"), "value", False) is False, where
        assert getattr(keywords.get("shell"), "value", False) is False, where


class Malicious:
    """Whoever unpickles it makes a file."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


def pickled(path, trace):
    path.write_bytes(pickle.dumps({"model": Malicious(trace)}))


def torch_saved(path, trace):
    torch.save({"state_dict": {"weight": torch.zeros(2)}, "args": Malicious(trace)}, path)


def numpy_saved(path, trace):
    with path.open("wb") as stream:
        np.savez(stream, weight=np.array([Malicious(trace)], dtype=object))


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.pth", pickled), ("a.pt", torch_saved), ("a.bin", torch_saved), ("a.ckpt", pickled), ("a.npz", numpy_saved),
        ("a.safetensors", pickled), ("a.tar", torch_saved),
    ],
)  # fmt: skip
def test_a_checkpoint_that_holds_code_is_refused_and_does_not_run(name, write, saved_vit, tmp_path, capsys):
    path, trace = tmp_path / name, tmp_path / "it-ran"
    write(path, trace)
    assert main(["info", str(saved_vit), "--checkpoint", str(path)]) == 2
    assert name in capsys.readouterr().err
    assert not trace.exists()


def test_weights_of_a_folder_that_hold_code_are_refused_and_do_not_run(saved_vit, tmp_path, capsys):
    folder, trace = tmp_path / "model", tmp_path / "it-ran"
    shutil.copytree(saved_vit, folder)
    (folder / "model.safetensors").unlink()
    torch_saved(folder / "pytorch_model.bin", trace)
    assert main(["info", str(folder)]) == 2
    assert "pytorch_model.bin" in capsys.readouterr().err
    assert not trace.exists()


def changed(folder, to, **values):
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    config.pop(SEAL)
    for name, value in values.items():
        config[name] = {**config.get(name, {}), **value} if isinstance(value, dict) else value
    (to / "config.json").write_text(json.dumps(seal(config)))
    return to


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"architecture": "hf-hub:somebody/something"}, "has no architecture 'hf-hub:somebody/something'"),
        ({"architecture": "local-dir:/tmp"}, "has no architecture"),
        ({"architecture": "os.system"}, "has no architecture"),
        ({"model_args": {"checkpoint_path": "/tmp/other.pth"}}, "checkpoint_path says where to load from"),
        ({"model_args": {"pretrained": True}}, "pretrained says where to load from"),
        ({"model_args": {"pretrained_cfg_overlay": {"file": "x"}}}, "pretrained_cfg_overlay says where to load from"),
    ],
)
def test_a_description_names_an_architecture_and_nothing_else(values, told, saved_vit, tmp_path, capsys):
    folder = changed(saved_vit, tmp_path / "model", **values)
    assert main(["info", str(folder)]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/tmp/elsewhere.safetensors", "below/shard.safetensors"])
def test_shards_lie_beside_their_index(name, tmp_path, capsys):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "vit", "architectures": ["ViTModel"]}))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    save_file({"a": torch.zeros(1)}, tmp_path / "elsewhere.safetensors")
    assert main(["info", str(folder)]) == 2
    assert "lies outside of the folder" in capsys.readouterr().err


def test_a_tar_reads_nothing_outside_itself(saved_vit, image_folder, tmp_path, capsys):
    image = next(image_folder.rglob("*.png"))
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        archive.add(image, "class0/good.png")
        archive.add(image, "../../escaped.png")
        link = tarfile.TarInfo("class0/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    model = vitprune.load(str(saved_vit))
    try:
        found = vitprune.data.ImageChoice(tmp_path / "images.tar").find(model, labels_matter=False)
    except VitpruneError as error:
        assert "escaped" in str(error)  # noqa: PT017
        return
    assert not [name for name in found.files if ".." in name or "link" in name]
    assert not (tmp_path.parent / "escaped.png").exists()


@pytest.mark.parametrize("location", ["../../../../etc/passwd", "/etc/passwd"])
def test_an_onnx_file_has_its_weights_beside_it(location, tmp_path, capsys):
    weight = TensorProto(name="weight", data_type=TensorProto.FLOAT, dims=[3, 3, 1, 1])
    weight.data_location = TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=location)
    weight.external_data.add(key="length", value="36")
    graph = helper.make_graph(
        [helper.make_node("Conv", ["images", "weight"], ["answers"])],
        "graph",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("answers", TensorProto.FLOAT, None)],
        [weight],
    )
    path = tmp_path / "escape.onnx"
    path.write_bytes(helper.make_model(graph).SerializeToString())
    for command in (["doctor", str(path)], ["prune", str(path), "--plan", str(path), "-o", str(tmp_path / "out.onnx")]):
        assert main(command) == 2
        assert "root:" not in capsys.readouterr().err


def test_own_files_hold_no_pickle(saved_vit, image_folder, tmp_path):
    half = tmp_path / "half"
    assert main(["prune", str(saved_vit), "--data", str(image_folder), "-o", str(half), "--step", "1"]) == 0
    for path in half.rglob("*"):
        assert path.suffix in (".json", ".safetensors", ".md")
        if path.suffix == ".safetensors":
            load_file(path)


def test_weights_that_others_changed_are_theirs(saved_vit, tmp_path):
    """A file that another program wrote anew has no seal, and is read."""
    folder = tmp_path / "model"
    shutil.copytree(saved_vit, folder)
    state = load_file(folder / "model.safetensors")
    state["head.bias"] += 1
    save_file(state, folder / "model.safetensors")
    assert torch.equal(vitprune.load(str(folder)).head.bias, state["head.bias"])

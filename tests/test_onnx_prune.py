"""Plans applied to ONNX files: the law, torch's compensation, a donor's, refusals, and what others' files hold."""

from __future__ import annotations

import copy
import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import TINY, make_vit
from families import half_plan
from test_fuse import export_plainly
from timm.layers import SwiGLU, SwiGLUPacked

import vitprune
from vitprune.export import onnx_file, onnx_prune
from vitprune.export.graph import read_graph
from vitprune.export.graph_ffns import find_graph_ffns, find_linears
from vitprune.export.runtime import open_onnx
from vitprune.models.facts import Facts
from vitprune.seen_images import SeenImages, hash_pixels

FFNS = {"Mlp": {}, "SwiGLUPacked": {"mlp_layer": SwiGLUPacked}, "SwiGLU": {"mlp_layer": SwiGLU}}
WRITERS = {
    "dynamo": export_plainly,
    "older": lambda model, path: export_plainly(model, path, dynamo=False, opset=17),
    "fused": lambda model, path: vitprune.export_onnx(model, path, [photos(2)]).path,
}
# Float32 sums in another order, through the inverse of a covariance.
CLOSE = {"rtol": 1e-3, "atol": 1e-4}


def photos(count, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, 32, 32, generator=generator), torch.zeros(count, dtype=torch.long)


def calibration():
    return [photos(16, seed) for seed in (4, 5)]


def answers(path, images):
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


def save_pruned(model, plan, folder, **arguments):
    """What ``vitprune prune MODEL -o FOLDER`` leaves, loaded again."""
    pruned = vitprune.apply_plan(model, plan, **arguments)
    pruned.model_args = {**TINY, **({"mlp_layer": arguments["mlp_layer"]} if "mlp_layer" in arguments else {})}
    vitprune.save(pruned, folder, plan=plan)
    return vitprune.load(folder)


@pytest.fixture(scope="module", params=[(kind, writer) for kind in FFNS for writer in WRITERS], ids="-".join)
def dense(request, tmp_path_factory):
    """A dense float32 model and its file, for each FFN and each exporter."""
    kind, writer = request.param
    model = make_vit(**FFNS[kind]).float()
    path = tmp_path_factory.mktemp("dense") / "dense.onnx"
    WRITERS[writer](copy.deepcopy(model), path)
    return model, path


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A dense float32 model and the file that torch alone writes."""
    model = make_vit().float()
    return model, export_plainly(copy.deepcopy(model), tmp_path_factory.mktemp("plain") / "dense.onnx")


def test_ffns_of_a_graph_are_those_of_the_model(dense):
    model, path = dense
    of_torch = vitprune.find_feed_forwards(model)
    of_graph = find_graph_ffns(read_graph(path))
    assert [ffn.num_neurons for ffn in of_graph] == [ffn.num_neurons for ffn in of_torch]
    for position, (mine, other) in enumerate(zip(of_graph, of_torch, strict=True)):
        assert mine.name == f"ffn {position} ({other.down_proj}.bias)"
        assert mine.packed == (other.owned[0].copies == 2)
        for up, name in zip(mine.ups, other.up_projs, strict=True):
            np.testing.assert_array_equal(up.weight_IO.T, model.get_submodule(name).weight.detach())
            np.testing.assert_array_equal(up.bias_O, model.get_submodule(name).bias.detach())
        down = model.get_submodule(other.down_proj)
        np.testing.assert_array_equal(mine.down.weight_IO.T, down.weight.detach())
        np.testing.assert_array_equal(mine.down.bias_O, down.bias.detach())


def test_a_pruned_file_gives_the_pruned_models_logits(dense, tmp_path):
    model, path = dense
    plan = half_plan(model)
    report = vitprune.prune_onnx(path, plan, tmp_path / "small.onnx")
    images = photos(3)[0]
    with torch.no_grad():
        expected = vitprune.remove_neurons(model, plan)(images)
    torch.testing.assert_close(answers(report.path, images), expected, **CLOSE)
    smaller = find_graph_ffns(read_graph(report.path))
    assert [ffn.num_neurons for ffn in smaller] == list(plan.widths.values()) == list(report.widths.values())
    assert (report.num_neurons, report.num_neurons_dense) == (plan.num_neurons, plan.num_neurons_dense)
    assert report.max_abs_diff < 1e-4
    assert report.size_bytes == report.path.stat().st_size
    assert [file.name for file in tmp_path.iterdir()] == ["small.onnx"]


def test_a_plan_that_keeps_all_neurons_changes_no_weight(plain, tmp_path):
    model, path = plain
    plan = vitprune.Plan({name: torch.ones_like(keep) for name, keep in half_plan(model).keep.items()})
    vitprune.prune_onnx(path, plan, tmp_path / "same.onnx", compensation="ridge", batches=calibration())
    before, after = (read_graph(file).graph.initializers for file in (path, tmp_path / "same.onnx"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(value.const_value.numpy(), after[name].const_value.numpy())


@pytest.mark.parametrize("compensation", ["bias", "ridge"])
@pytest.mark.parametrize("kind", FFNS)
def test_compensation_in_the_graph_is_torchs(kind, compensation, tmp_path):
    model = make_vit(**FFNS[kind]).float()
    path = export_plainly(copy.deepcopy(model), tmp_path / "dense.onnx")
    plan = half_plan(model)
    asked = {"compensation": compensation, "batches": calibration()}
    vitprune.prune_onnx(path, plan, tmp_path / "small.onnx", **asked)
    images = photos(3)[0]
    with torch.no_grad():
        expected = vitprune.apply_plan(model, plan, **asked)(images)
    assert not torch.allclose(expected, vitprune.remove_neurons(model, plan)(images), **CLOSE)
    torch.testing.assert_close(answers(tmp_path / "small.onnx", images), expected, **CLOSE)


def test_a_file_for_the_class_token_is_compensated_on_that_token(tmp_path):
    """With one FFN left to compensate, its mean output at the class token is the dense one."""
    model = make_vit().float()
    path = WRITERS["fused"](model, tmp_path / "dense.onnx")
    plan = vitprune.Plan({name: keep | ("2" not in name) for name, keep in half_plan(model).keep.items()})
    batches = calibration()
    vitprune.prune_onnx(path, plan, tmp_path / "small.onnx", compensation="bias", batches=batches)
    images = torch.cat([images for images, _labels in batches])
    streams = []
    for file in (path, tmp_path / "small.onnx"):
        graph = read_graph(file)
        last = find_graph_ffns(graph)[-1].down
        last.output.type = graph.graph.outputs[0].type
        graph.graph.outputs.append(last.output)
        onnx_file.write_graph(graph, tmp_path / "open.onnx")
        session = onnxruntime.InferenceSession(str(tmp_path / "open.onnx"), providers=["CPUExecutionProvider"])
        streams.append(session.run(None, {"images": images.numpy()})[1].mean((0, 1)))
    np.testing.assert_allclose(*streams, rtol=1e-4, atol=1e-5)


def test_an_output_projection_without_bias_gets_one(tmp_path):
    model = make_vit().float()
    for block in model.blocks:
        block.mlp.fc2.bias = None
    path = export_plainly(copy.deepcopy(model), tmp_path / "dense.onnx")
    asked = {"compensation": "bias", "batches": calibration()}
    vitprune.prune_onnx(path, half_plan(model), tmp_path / "small.onnx", **asked)
    images = photos(3)[0]
    with torch.no_grad():
        expected = vitprune.apply_plan(model, half_plan(model), **asked)(images)
    torch.testing.assert_close(answers(tmp_path / "small.onnx", images), expected, **CLOSE)


@pytest.mark.parametrize("compensation", ["sequential", "distill", "none"])
def test_a_donors_compensation_arrives_in_the_file(compensation, tmp_path):
    model = make_vit().float()
    plan = half_plan(model)
    arguments = {} if compensation == "none" else {"batches": calibration()}
    donor = save_pruned(model, plan, tmp_path / "donor", compensation=compensation, **arguments)
    images = photos(3)[0]
    for name, write in WRITERS.items():
        path = write(copy.deepcopy(model), tmp_path / f"{name}.onnx")
        report = vitprune.prune_onnx(path, plan, tmp_path / f"small_{name}.onnx", donor=donor)
        with torch.no_grad():
            torch.testing.assert_close(answers(report.path, images), donor(images), **CLOSE)
        assert report.donor_max_abs_diff < 1e-4


@pytest.mark.parametrize("kind", ["SwiGLUPacked", "SwiGLU"])
def test_a_donor_may_have_gated_ffns(kind, tmp_path):
    model = make_vit(**FFNS[kind]).float()
    plan = half_plan(model)
    donor = vitprune.apply_plan(model, plan, compensation="sequential", batches=calibration())
    path = WRITERS["fused"](model, tmp_path / "dense.onnx")
    assert vitprune.prune_onnx(path, plan, tmp_path / "small.onnx", donor=donor).donor_max_abs_diff < 1e-4


def test_a_fine_tuned_file_is_compensated_anew_and_refuses_the_donor(plain, tmp_path):
    model, _path = plain
    plan = half_plan(model)
    donor = vitprune.apply_plan(model, plan, compensation="sequential", batches=calibration())
    tuned = make_vit(seed=1).float()
    path = export_plainly(copy.deepcopy(tuned), tmp_path / "tuned.onnx")
    with pytest.raises(vitprune.VitpruneError, match="not those the plan was compensated for; .*pass `batches`"):
        vitprune.prune_onnx(path, plan, tmp_path / "small.onnx", donor=donor)
    assert not (tmp_path / "small.onnx").exists()
    asked = {"compensation": "ridge", "batches": calibration()}
    vitprune.prune_onnx(path, plan, tmp_path / "small.onnx", **asked)
    images = photos(3)[0]
    with torch.no_grad():
        expected = vitprune.apply_plan(tuned, plan, **asked)(images)
    torch.testing.assert_close(answers(tmp_path / "small.onnx", images), expected, **CLOSE)


@torch.no_grad()
def test_a_file_that_differs_elsewhere_does_not_become_the_donor(plain, tmp_path):
    """Its FFNs are the donor's, another weight is not: only the answers can tell."""
    model, _path = plain
    plan = half_plan(model)
    donor = vitprune.remove_neurons(model, plan)
    tuned = copy.deepcopy(model)
    tuned.head.bias[2] += 0.5
    path = export_plainly(tuned, tmp_path / "tuned.onnx")
    with pytest.raises(vitprune.VitpruneError, match="does not become the donor: an output is .* in ONNX Runtime"):
        vitprune.prune_onnx(path, plan, tmp_path / "small.onnx", donor=donor)
    assert not (tmp_path / "small.onnx").exists()


def test_the_files_own_facts_follow_and_nobody_elses_are_invented(plain, tmp_path):
    model, foreign = plain
    own = WRITERS["fused"](model, tmp_path / "dense.onnx")
    plan = half_plan(model)
    plan = vitprune.Plan(plan.keep, Facts(criterion="random", calibration=SeenImages(frozenset({"ab"}), "/home/me")))
    asked = {"compensation": "ridge", "batches": calibration()}
    before, after = (json.loads(facts_of(path)) for path in (own, prune_to(tmp_path / "o.onnx", own, plan, **asked)))
    assert after["widths"] == plan.widths
    assert after["plan"]["criterion"] == "random"
    assert after["plan"]["compensation"] == "ridge"
    seen = {"ab", *(digest for images, _labels in calibration() for digest in hash_pixels(images))}
    assert after["calibration_sha256"] == sorted(seen)
    changed = {"widths", "plan", "calibration_sha256"}
    assert {key: before[key] for key in before.keys() - changed} == {key: after[key] for key in after.keys() - changed}
    assert open_onnx(tmp_path / "o.onnx").calibration == seen
    assert facts_of(prune_to(tmp_path / "f.onnx", foreign, plan, **asked)) is None


def facts_of(path):
    return {entry.key: entry.value for entry in onnx.load(path).metadata_props}.get("vitprune")


def prune_to(output, source, plan, **arguments):
    return vitprune.prune_onnx(source, plan, output, **arguments).path


def test_a_fixed_batch_size_stays(plain, tmp_path):
    model, _path = plain
    path = vitprune.export_onnx(model, tmp_path / "dense.onnx", [photos(4)], batch_size=3).path
    plan = half_plan(model)
    prune_to(tmp_path / "small.onnx", path, plan, compensation="bias", batches=calibration())
    opened, images = open_onnx(tmp_path / "small.onnx"), photos(5)[0]
    assert opened.batch_size == 3
    other = prune_to(tmp_path / "open.onnx", WRITERS["fused"](model, tmp_path / "any.onnx"), plan,
                     compensation="bias", batches=calibration())  # fmt: skip
    torch.testing.assert_close(opened(images), answers(other, images), rtol=1e-4, atol=1e-5)


def test_weights_beyond_the_limit_go_into_a_file_beside_it(plain, tmp_path, monkeypatch):
    model, path = plain
    monkeypatch.setattr(onnx_file, "LARGEST_FILE_BYTES", 1000)
    plan = half_plan(model)
    report = vitprune.prune_onnx(path, plan, tmp_path / "large.onnx", compensation="bias", batches=calibration())
    assert sorted(file.name for file in tmp_path.iterdir()) == ["large.onnx", "large.onnx.data"]
    assert report.size_bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    again = vitprune.Plan({name: keep[keep] for name, keep in plan.keep.items()})
    monkeypatch.undo()
    prune_to(tmp_path / "whole" / "small.onnx", tmp_path / "large.onnx", again)
    assert [file.name for file in (tmp_path / "whole").iterdir()] == ["small.onnx"]
    images = photos(3)[0]
    torch.testing.assert_close(
        answers(tmp_path / "whole" / "small.onnx", images), answers(tmp_path / "large.onnx", images), **CLOSE
    )


def test_shared_constants_stay_what_they_are_for_others(plain, tmp_path):
    """Exporters keep equal constants once; a pruned FFN must not change its neighbour's."""
    model = copy.deepcopy(plain[0])
    with torch.no_grad():
        for block in model.blocks:
            for linear in (block.mlp.fc1, block.mlp.fc2):
                linear.bias.zero_()
        model.blocks[1].mlp.fc1.weight.copy_(model.blocks[0].mlp.fc1.weight)
    path = export_plainly(model, tmp_path / "dense.onnx")
    graph = onnx.load(path)
    first, *others = ([n.input[1] for n in graph.graph.node if n.op_type == "MatMul"][index] for index in (4, 10))
    for node in graph.graph.node:
        for at, name in enumerate(node.input):
            node.input[at] = first if name in others else name
            if name.endswith("fc1.bias"):
                node.input[at] = "blocks.0.mlp.fc1.bias"
    onnx.save(graph, path)
    plan = half_plan(model)
    images = photos(3)[0]
    with torch.no_grad():
        expected = vitprune.remove_neurons(model, plan)(images)
    torch.testing.assert_close(answers(prune_to(tmp_path / "small.onnx", path, plan), images), expected, **CLOSE)


def test_ffns_beside_the_blocks_are_left_alone(tmp_path):
    """SigLIP's attention pooling has an FFN of its own, which no plan covers: the names tell."""
    model = make_vit("vit_base_patch16_siglip_224").float()
    path = export_plainly(copy.deepcopy(model), tmp_path / "dense.onnx")
    plan = half_plan(model)
    found = find_graph_ffns(read_graph(path))
    assert len(found) == len(plan.keep) + 1
    images = photos(3)[0]
    with torch.no_grad():
        expected = vitprune.remove_neurons(model, plan)(images)
    torch.testing.assert_close(answers(prune_to(tmp_path / "small.onnx", path, plan), images), expected, **CLOSE)


@pytest.fixture
def by_hand(tmp_path):
    """A packed GLU as torch writes none: Gemm, a scale for each value, constant slices, weights turned when it runs."""
    generator = np.random.default_rng(0)
    up, bias, scale, down = (
        generator.standard_normal(shape, dtype=np.float32) for shape in ((12, 4), (12,), (1, 12), (4, 6))
    )
    constants = {"up": up, "bias": bias, "scale": scale, "down": down, "gate": generator.random(6, dtype=np.float32)}
    bounds = {"zero": [0], "half": [6], "end": [2**63 - 1], "axis": [-1]}
    constants |= {name: np.array(value, np.int64) for name, value in bounds.items()}
    node = onnx.helper.make_node
    nodes = [
        node("Flatten", ["images"], ["flat"]),
        node("Gemm", ["flat", "up", "bias"], ["both"], transB=1),
        node("Mul", ["scale", "both"], ["scaled"]),
        node("Slice", ["scaled", "zero", "half", "axis"], ["left"]),
        node("Slice", ["scaled", "half", "end", "axis"], ["right"]),
        node("PRelu", ["right", "gate"], ["active"]),
        node("Mul", ["left", "active"], ["hidden"]),
        node("Transpose", ["down"], ["turned"]),
        node("MatMul", ["hidden", "turned"], ["logits"]),
    ]
    value, floats = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    inputs, outputs = value("images", floats, ["n", 1, 2, 2]), value("logits", floats, ["n", 4])
    held = [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = onnx.helper.make_graph(nodes, "by hand", [inputs], [outputs], held)
    onnx.save(onnx.helper.make_model(graph, ir_version=8, opset_imports=[onnx.helper.make_opsetid("", 17)]),
              tmp_path / "by_hand.onnx")  # fmt: skip

    def hidden_of(images):
        left, right = np.split((images.reshape(-1, 4) @ up.T + bias) * scale, 2, axis=1)
        return left * np.where(right > 0, right, right * constants["gate"])

    return tmp_path / "by_hand.onnx", hidden_of, down


@pytest.mark.parametrize("compensation", ["none", "bias"])
def test_a_graph_written_by_hand(compensation, by_hand, tmp_path):
    path, hidden_of, down = by_hand
    keep = torch.tensor([True, False, True, True, False, False])
    images = torch.randn(7, 1, 2, 2)
    asked = {"compensation": compensation, "batches": [(images, None)]}
    prune_to(tmp_path / "small.onnx", path, vitprune.Plan({"any": keep}), **asked)
    hidden = hidden_of(images.numpy())
    # With the bias, removed neurons are worth their mean.
    stead = hidden.mean(0) if compensation == "bias" else np.zeros(6)
    expected = np.where(keep.numpy(), hidden, stead) @ down.T
    np.testing.assert_allclose(answers(tmp_path / "small.onnx", images), expected, rtol=1e-4, atol=1e-5)
    (found,) = find_graph_ffns(read_graph(tmp_path / "small.onnx"))
    assert (found.num_neurons, found.packed) == (3, True)


def test_every_product_with_weights_is_a_linear(plain):
    model, path = plain
    linears = find_linears(read_graph(path))
    modules = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert len(linears) == len(modules)
    for linear, module in zip(linears, modules, strict=True):
        np.testing.assert_array_equal(linear.weight_IO.T, module.weight.detach())
        np.testing.assert_array_equal(linear.bias_O, module.bias.detach())


def test_wrong_slicing_is_found_and_nothing_is_written(plain, tmp_path, monkeypatch):
    model, path = plain
    right = onnx_prune.remove_neurons
    monkeypatch.setattr(onnx_prune, "remove_neurons", lambda graph, ffn, kept: right(graph, ffn, kept[::-1] * 0))
    with pytest.raises(vitprune.VitpruneError, match=r"an output is .* removed, .* masked"):
        vitprune.prune_onnx(path, half_plan(model), tmp_path / "small.onnx")
    assert list(tmp_path.iterdir()) == []


def other_widths(plan):
    return vitprune.Plan({name: keep[:-1] for name, keep in plan.keep.items()})


def fewer(plan):
    return vitprune.Plan(dict(list(plan.keep.items())[:-1] + [("encoder.mlp", keep) for keep in plan.keep.values()]))


def empty(plan):
    return vitprune.Plan({name: keep & False for name, keep in plan.keep.items()})


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (other_widths, {}, r"ffn 0 \(blocks.0.mlp.fc2.bias\) has 48 neurons, the plan covers 47 for blocks.0.mlp"),
        (empty, {}, "plan leaves blocks.0.mlp without neurons"),
        (None, {"compensation": "ridge"}, "ridge needs calibration images; pass `batches`"),
        (None, {"compensation": "ridge", "batches": []}, "no calibration images"),
        (
            None,
            {"compensation": "sequential"},
            "sequential cannot be computed in an ONNX graph, only none, bias, ridge",
        ),
        (None, {"compensation": "magic"}, "compensation must be one of none, bias, ridge, got 'magic'"),
        (None, {"ridge": 0.0}, "ridge must be positive"),
        (None, {"compensation": "bias", "batches": [(torch.zeros(1, 3, 16, 16), None)]}, "images are 3 x 16 x 16"),
    ],
)
def test_refusals(change, arguments, message, plain, tmp_path):
    model, path = plain
    plan = half_plan(model)
    with pytest.raises(vitprune.VitpruneError, match=message):
        vitprune.prune_onnx(path, plan if change is None else change(plan), tmp_path / "small.onnx", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_files_that_do_not_fit_are_refused(plain, tmp_path):
    model, path = plain
    plan = half_plan(model)

    def refuses(message, source=path, plan=plan, **arguments):
        with pytest.raises(vitprune.VitpruneError, match=message):
            vitprune.prune_onnx(source, plan, tmp_path / "small.onnx", **arguments)
        assert not (tmp_path / "small.onnx").exists()

    deeper = half_plan(make_vit(depth=4).float())
    refuses(r"it covers 4 FFNs \(blocks.0.mlp .. blocks.3.mlp\), the file has 3 \(ffn 0 .* ffn 2", plan=deeper)
    pruned = prune_to(tmp_path / "pruned.onnx", WRITERS["fused"](model, tmp_path / "own.onnx"), plan)
    refuses("has 24 neurons, the plan covers 48 for blocks.0.mlp; the file is pruned already", pruned)
    elsewhere = vitprune.Plan(plan.keep, Facts(architecture="deit_tiny_patch16_224"))
    refuses("it is for deit_tiny_patch16_224, the file is vit_tiny_patch16_224", tmp_path / "own.onnx", plan=elsewhere)
    int8 = vitprune.export_onnx(make_vit().float(), tmp_path / "int8.onnx", [photos(2)], precision="int8").path
    refuses("its weights are quantised .*; prune the float32 file", int8)
    refuses("blocks.0.mlp has 48 neurons, the plan keeps 24 of 48; prune it with `mode` remove", donor=model)
    refuses("the donor brings its own compensation", donor=model, compensation="bias", batches=[photos(2)])
    larger = make_vit(img_size=64).float()
    donor = vitprune.remove_neurons(larger, half_plan(larger))
    refuses(r"takes images of \[3, 32, 32\], the model that it should be \[3, 64, 64\]", donor=donor)
    without = export_plainly(make_vit().float(), tmp_path / "without.onnx")
    (tmp_path / "without.onnx.data").unlink()
    refuses("its weights cannot be read", without)
    normed = make_vit(mlp_layer=SwiGLU, scale_mlp_norm=True).float()
    refuses("no FFN among its 16 products", export_plainly(normed, tmp_path / "normed.onnx"))


BEYOND = {
    "qk": ({"blocks.0.attn.qk": "qk"}, {}, r"part qk: blocks.0.attn.qk: dimensions of queries and keys"),
    "vo": ({"blocks.0.attn.vo": "vo"}, {}, r"part vo: blocks.0.attn.vo: dimensions of values"),
    "heads": ({"blocks.0.attn.heads": "heads"}, {}, r"part heads: blocks.0.attn.heads: only neurons .* no heads"),
    "layers": ({"blocks.1.attn.layers": "layers"}, {}, r"part layers: blocks.1.attn.layers: .* no whole layers"),
    "merging": ({}, {"merge": (3, 0, 6)}, r"merging: tokens of an ONNX graph cannot be made to merge"),
    "image size": ({}, {"image_size": (24, 24)}, r"image size: .* cannot be made to take images of 24 x 24"),
}


@pytest.mark.parametrize("part", BEYOND)
def test_what_is_no_neuron_is_refused_with_what_to_do_instead(part, plain, tmp_path):
    kinds, facts, message = BEYOND[part]
    model, path = plain
    neurons = half_plan(model)
    gone = {name: torch.zeros(1, dtype=torch.bool) for name in kinds}
    plan = vitprune.Plan({**neurons.keep, **gone}, Facts(**facts), kinds)
    with pytest.raises(vitprune.VitpruneError, match=f"^{message}.*; export the pruned model's folder instead$"):
        vitprune.prune_onnx(path, plan, tmp_path / "pruned.onnx")
    assert list(tmp_path.iterdir()) == []


def test_parts_that_lose_nothing_are_not_in_the_way(plain, tmp_path):
    model, path = plain
    neurons = half_plan(model)
    kept = {"blocks.0.attn.qk": torch.ones(8, dtype=torch.bool)}
    plan = vitprune.Plan({**neurons.keep, **kept}, Facts(merge=(0, 0, 0)), {"blocks.0.attn.qk": "qk"})
    assert vitprune.prune_onnx(path, plan, tmp_path / "pruned.onnx").pruning_ratio == 0.5

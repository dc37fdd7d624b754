"""Result files of the paper's authors: what is read is what they say, and what is written they can read."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import pytest
import torch
from conftest import make_vit, shared
from safetensors.torch import load_file
from test_cli import run
from timm.models.vision_transformer import VisionTransformer
from torchvision import datasets, transforms

import vitprune
from vitprune.analysis.similarity import compare_scores, compare_visits
from vitprune.analysis.topk_mask import measure_topk_mask
from vitprune.analysis.utilisation import measure_utilisation
from vitprune.cli import main
from vitprune.data import ImageBatches, ImageSet, find_images
from vitprune.discovery.discover import class_paths, count_visits, discover, only_classes
from vitprune.discovery.run import Run, load_run, save_run
from vitprune.errors import VitpruneError
from vitprune.interop.adopt import (
    IMAGES_BEFORE_REFUSAL,
    LEAST_AGREEMENT,
    adopt,
    assign_images,
    authors_transform,
    describe_search,
)
from vitprune.interop.authors import folder_order, read_authors, write_authors
from vitprune.interop.convert import read_as_run
from vitprune.models.trunk import record_clean
from vitprune.models.units import find_feed_forwards
from vitprune.views import data_config

# What argparse stores of the arguments of their path search.
ARGS = {
    "batch_size": 2, "dataset": "imagenet1k", "dataset_path": "../dataset/imagenet2012/val", "gpus": "0",
    "ig_total_step": 20, "img_size": 32, "model_type": "ViT-B_16", "no_cuda": False, "output_dir": "../results/",
    "output_prefix": "imgnet_all", "pretrain_weight": "../ckpt/ViT-B_16-224.npz", "seed": 42,
}  # fmt: skip

# Two batches of two images and one image.
SEARCH = (
    '[{"ja": [[5, 0, 47]], "ja_score": [[0.125]], "base": [[1, 2, 3]], "base_score": [[-0.5]]}, '
    '{"ja": [[6, 0, 46]], "ja_score": [[0.25]], "base": [[1, 2, 4]], "base_score": [[0.0]]}]\n'
    '[{"ja": [[7, 1, 45]], "ja_score": [[1e-3]], "base": [[1, 2, 5]], "base_score": [[2]]}]\n'
)
TOP_K = (
    '{"ja": [[5, 6], [0, 1], [47, 3]], "ja_score": [[0.125]], '
    '"base": [[1, 2], [3, 4], [5, 6]], "base_score": [[1.0]]}\n'
)
PATTERN = '{"path": [[5.0, 0.0, 47.0]]}\n{"path": [[6.0, 0.0, 46.0]]}\n'
PATTERN_ON_MAE = '{"path": [[5.0, 0.0, 47.0]], "score": [[0.75]]}\n'
SCORED_PATTERN = '[{"ja": [[5, 0, 47]], "ja_score": [0.5]}, {"ja": [[6, 0, 46]], "ja_score": [-0.5]}]\n'


@pytest.fixture
def results(tmp_path):
    """Write files as their programs do; returns the prefix."""

    def write(files, **args):
        (tmp_path / "imgnet_all.args.json").write_text(json.dumps({**ARGS, **args}, sort_keys=True, indent=2))
        for label, text in files.items():
            (tmp_path / f"imgnet_all-{label}.rlt.jsonl").write_text(text)
        return tmp_path / "imgnet_all"

    return write


def test_a_record_is_read_as_it_says(results):
    prefix = results({0: SEARCH, 10: SEARCH.splitlines()[1] + "\n"})
    found = read_authors(f"{prefix}.args.json")
    assert list(found.neurons) == [0, 10]
    assert found.neurons[0].tolist() == [[[5], [0], [47]], [[6], [0], [46]], [[7], [1], [45]]]
    assert found.joint_scores[0].tolist() == pytest.approx([0.125, 0.25, 1e-3], rel=1e-7)
    assert found.activation_neurons[0].tolist() == [[[1], [2], [3]], [[1], [2], [4]], [[1], [2], [5]]]
    base = read_authors(prefix, method="activation")
    assert torch.equal(base.neurons[0], found.activation_neurons[0])
    assert base.joint_scores[0].tolist() == [-0.5, 0.0, 2.0]


def test_top_k_records_keep_their_order_and_lose_a_score_of_other_meaning(results):
    prefix = results({3: TOP_K}, topK=2)
    found = read_authors(prefix)
    assert found.neurons[3].tolist() == [[[5, 6], [0, 1], [47, 3]]]
    assert found.activation_neurons[3].tolist() == [[[1, 2], [3, 4], [5, 6]]]
    assert found.joint_scores is None


def test_influence_patterns_have_three_forms(results):
    plain = read_authors(results({1: PATTERN}), method="influence-pattern")
    assert plain.neurons[1].tolist() == [[[5], [0], [47]], [[6], [0], [46]]]
    assert plain.joint_scores is None
    assert plain.activation_neurons is None
    on_mae = read_authors(results({1: PATTERN_ON_MAE}), method="influence-pattern")
    assert on_mae.joint_scores[1].tolist() == [0.75]
    scored = read_authors(results({1: SCORED_PATTERN}, method="influence_pattern"), method="influence-pattern")
    assert torch.equal(scored.neurons[1], plain.neurons[1])
    assert scored.joint_scores[1].tolist() == [0.5, -0.5]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (SEARCH[:-20], "line 2: not JSON"),
        (SEARCH + "3\n", "line 3: expected a record or a list of records, found a number"),
        ("[[1, 2]]\n", "line 1: expected a record, found a list"),
        ("", "no paths in it"),
        (SEARCH.replace('"ja_score": [[0.25]], ', ""), "line 1: no 'ja_score' in the record"),
        (PATTERN, "line 1: no 'ja' in the record, which has 'path'; ask for method influence-pattern"),
        (SEARCH.replace("[[7, 1, 45]]", "[[7, 1]]"), "line 2: 'ja' and 'base' have different numbers of FFNs"),
        (SCORED_PATTERN.replace("[[6, 0, 46]]", "[[6, 0]]"), "line 1: a path of 2 FFNs with 1 neurons each, where"),
        (TOP_K.replace("[0, 1]", "[0]"), "line 1: ja: ragged, with rows of 1 and 2 neurons"),
        (TOP_K.replace("[0, 1]", "[1, 1]"), "line 1: ja: names a neuron of FFN 1 twice"),
        (SEARCH.replace("[[7, 1, 45]]", "[[7, -1, 45]]"), "line 2: ja: a neuron must be an index of at least 0"),
        (SEARCH.replace("[[7, 1, 45]]", "[[7, 1.5, 45]]"), "found 1.5"),
        (SEARCH.replace("[[7, 1, 45]]", "[[7, true, 45]]"), "found true"),
        (SEARCH.replace("[[7, 1, 45]]", "[]"), "line 2: ja: expected a list of lists"),
        (SEARCH.replace("[[7, 1, 45]]", "[[7, 1, 45], [7, 1, 45]]"), "line 2: ja: 2 paths where one is expected"),
        (SEARCH.replace("[[1e-3]]", "[[NaN]]"), "line 2: ja_score: expected one finite number, found [[NaN]]"),
        (SEARCH.replace("[[1e-3]]", "[[1, 2]]"), "line 2: ja_score: expected one finite number, found [[1, 2]]"),
        (SEARCH.replace(', "base": [[1, 2, 5]]', ""), "line 2: some records have 'base' and others have not"),
        ('[{"ja": [[1]], "remove": [0.1], "base": [0.2], "enhance": [0.3]}]\n', "line 1: results of the manipulation"),
    ],
)
def test_malformed_files_are_refused_by_file_and_line(results, text, complaint):
    prefix = results({0: text})
    with pytest.raises(VitpruneError) as caught:
        read_authors(prefix)
    assert str(caught.value).startswith(f"{prefix}-0.rlt.jsonl")
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)


def test_influence_patterns_of_a_batch_are_refused(results):
    with pytest.raises(VitpruneError, match="2 paths where one is expected .* with a batch_size of 1"):
        read_authors(results({0: '{"path": [[1.0, 2.0], [1.0, 2.0]]}\n'}), method="influence-pattern")


def test_files_that_are_no_paths_are_refused(results, tmp_path):
    with pytest.raises(VitpruneError, match="missing.args.json: no such file"):
        read_authors(tmp_path / "missing")
    with pytest.raises(VitpruneError, match="there is no such file beside imgnet_all.args.json"):
        read_authors(results({}))
    with pytest.raises(VitpruneError, match="manipulation experiment"):
        read_authors(results({0: SEARCH}, edit_operation="remove"))
    with pytest.raises(VitpruneError, match="dataset 'cifar10'"):
        read_authors(results({0: SEARCH}, dataset="cifar10"))
    with pytest.raises(VitpruneError, match="ask for method influence-pattern"):
        read_authors(results({0: SCORED_PATTERN}, method="influence_pattern"))
    with pytest.raises(VitpruneError, match="method must be one of jas, activation, influence-pattern"):
        read_authors(results({0: SEARCH}), method="knowledge-neurons")
    (tmp_path / "imgnet_all.args.json").write_text("[1]")
    with pytest.raises(VitpruneError, match="args.json: expected a JSON object of arguments, found a list"):
        read_authors(tmp_path / "imgnet_all")


def test_one_class_may_not_differ_from_another(results):
    prefix = results({0: SEARCH, 2: '[{"ja": [[1, 2]], "ja_score": [[1.0]], "base": [[1, 2]], "base_score": [[1]]}]\n'})
    with pytest.raises(VitpruneError, match="imgnet_all-2.rlt.jsonl, line 1: a path of 2 FFNs .* before have 3"):
        read_authors(prefix)


# --- images ------------------------------------------------------------------------------------------------------


def test_images_come_in_the_order_of_image_folder(results, tmp_path):
    root = tmp_path / "data"
    names = ["b.jpg", "a/2.jpg", "a/10.jpg", "a-b/1.jpg", "B.JPG", "z/a/1.png"]
    for name in [f"{folder}/{name}" for folder in ("fish", "bird") for name in names]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    theirs = [(path.removeprefix(f"{root}/"), label) for path, label in datasets.ImageFolder(str(root)).samples]
    images = find_images(root, 2)
    lines = [f'[{{"ja": [[{row}]], "ja_score": [[{row}]]}}]\n' for row in range(6)]
    paths = assign_images(read_authors(results({0: "".join(lines), 1: "".join(lines)})), images)
    row_of = {file: int(neuron) for file, neuron in zip(paths.images.files, paths.neurons.flatten(), strict=True)}
    assert [row_of[file] for file, _label in theirs] == [*range(6), *range(6)]
    assert paths.images.files == images.files
    assert sorted(images.files, key=folder_order) != list(images.files)


def test_the_transform_is_theirs(image_folder, tiny_vit):
    transform = authors_transform(ARGS, tiny_vit)
    images = find_images(image_folder, 5)
    by_hand = transforms.Compose(
        [
            transforms.Resize((32, 32)),
            transforms.ToTensor(),
            transforms.Normalize(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225]),
        ]
    )
    expected = torch.stack([image for image, _label in datasets.ImageFolder(str(image_folder), by_hand)])
    ours = torch.cat([batch for batch, _labels in ImageBatches(images, tiny_vit, transform=transform)])
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)
    with pytest.raises(VitpruneError, match=r"224 x 224 pixels .* the model takes 32 x 32"):
        authors_transform({**ARGS, "img_size": 224}, tiny_vit)


def test_other_numbers_of_images_are_refused(results, image_folder):
    images = find_images(image_folder, 5)
    line = '[{"ja": [[1]], "ja_score": [[0]]}]\n'
    with pytest.raises(VitpruneError, match=r"imgnet_all-1.rlt.jsonl: 3 paths, but .* has 4 images of class class1"):
        assign_images(read_authors(results({1: line * 3})), images)
    with pytest.raises(VitpruneError, match="8 paths, .*appends where a file exists: keep one run's lines"):
        assign_images(read_authors(results({1: line * 8})), images)
    assert len(assign_images(read_authors(results({1: line * 4})), images).neurons) == 4


def test_no_class_in_common_is_refused(results, image_folder):
    with pytest.raises(VitpruneError, match=r"classes 0, 1, 2, .. 4, .* has paths of 900: none in common"):
        assign_images(read_authors(results({900: SEARCH})), find_images(image_folder, 5))


# --- the authors' own numbers ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def golden():
    """The float64 model, and what the authors' program printed for 24 images."""
    model = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=4, num_heads=3, mlp_ratio=2, num_classes=10
    ).double()
    model.load_state_dict(load_file(shared("golden/tiny_vit.safetensors")))
    return model.eval(), load_file(shared("golden/tiny_expected.safetensors"))


def golden_files(expected, record):
    """Write the lines of each class, one per image; and return the places of the images in the order of the files."""
    labels = expected["labels"].tolist()
    files = {
        label: "".join(json.dumps(record(place)) + "\n" for place, index in enumerate(labels) if index == label)
        for label in sorted(set(labels))
    }
    order = sorted(range(len(labels)), key=lambda place: labels[place])
    names = tuple(f"class{labels[place]}/{place:02}.png" for place in order)
    class_names = {label: f"class{label}" for label in files}
    return files, order, ImageSet("photos", names, tuple(labels[place] for place in order), class_names)


def search_record(expected):
    def record(place):
        keys = ("jas_paths", "jas_scores", "activation_paths", "activation_path_jas")
        jas, score, base, base_score = (expected[key][place].tolist() for key in keys)
        return [{"ja": [jas], "ja_score": [[score]], "base": [base], "base_score": [[base_score]]}]

    return record


def adopt_golden(golden, prefix, method, order, images, **options):
    model, expected = golden
    paths = read_authors(prefix, method=method)
    batch = [(expected["images"][order], expected["labels"][order])]
    return adopt(model, describe_search(paths, model), assign_images(paths, images), batch, **options)


@pytest.mark.parametrize(("method", "key"), [("jas", "jas"), ("activation", "activation_path_jas")])
def test_the_authors_own_numbers_are_adopted(golden, results, method, key):
    _model, expected = golden
    files, order, images = golden_files(expected, search_record(expected))
    found, agreement = adopt_golden(golden, results(files), method, order, images)
    assert (agreement.compared, agreement.share, agreement.num_images) == ("activation neurons", 1.0, 24)
    assert torch.equal(found.neurons[..., 0], expected[f"{method}_paths"][order])
    scores = expected["jas_scores" if key == "jas" else key][order].float()
    assert torch.equal(found.joint_scores, scores)
    assert torch.equal(found.predictions, expected["clean_probs"][order].argmax(-1))
    assert (found.tokens, found.quadrature, found.method) == ("cls", "riemann:20", method)


def test_scores_that_the_files_lack_are_computed(golden, results):
    _model, expected = golden
    files, order, images = golden_files(
        expected, lambda place: {"path": [expected["jas_paths"][place].double().tolist()]}
    )
    found, agreement = adopt_golden(golden, results(files), "influence-pattern", order, images)
    torch.testing.assert_close(found.joint_scores, expected["jas_scores"][order].float(), rtol=1e-6, atol=1e-9)
    assert (agreement.compared, agreement.share) == (None, None)


@pytest.mark.parametrize(("factor", "share"), [(1.0, 1.0), (1.5, 0.0)])
def test_scores_are_compared_where_nothing_else_can_be(golden, results, factor, share):
    _model, expected = golden

    def record(place):
        return [
            {"ja": [expected["jas_paths"][place].tolist()], "ja_score": [expected["jas_scores"][place].item() * factor]}
        ]

    files, order, images = golden_files(expected, record)
    prefix = results(files, method="influence_pattern")
    if share < LEAST_AGREEMENT:
        with pytest.raises(VitpruneError, match="agrees with 0% of the joint scores in the files"):
            adopt_golden(golden, prefix, "influence-pattern", order, images)
    _found, agreement = adopt_golden(golden, prefix, "influence-pattern", order, images, least_agreement=0)
    assert (agreement.compared, agreement.share) == ("joint scores", share)
    assert 8 <= agreement.num_images < 24


def test_batches_make_no_difference(golden, results):
    model, expected = golden
    files, order, images = golden_files(
        expected, lambda place: {"path": [expected["jas_paths"][place].double().tolist()]}
    )
    paths = read_authors(results(files), method="influence-pattern")
    search, assigned = describe_search(paths, model), assign_images(paths, images)
    batches = [
        (expected["images"][order[at : at + 5]], expected["labels"][order[at : at + 5]]) for at in range(0, 24, 5)
    ]
    parts, _ = adopt(model, search, assigned, batches)
    whole, _ = adopt_golden(golden, results(files), "influence-pattern", order, images)
    torch.testing.assert_close(parts.joint_scores, whole.joint_scores)
    assert torch.equal(parts.predictions, whole.predictions)
    for wrong in (batches[:-1], [*batches, batches[0]]):
        with pytest.raises(VitpruneError, match="images"):
            adopt(model, search, assigned, wrong)


def test_other_models_are_refused(golden, results):
    _model, expected = golden
    files, _order, _images = golden_files(expected, search_record(expected))
    paths = read_authors(results(files))
    with pytest.raises(VitpruneError, match="its paths go through 4 FFNs, the model has 3"):
        describe_search(paths, make_vit())
    with pytest.raises(VitpruneError, match=r"names neuron \d+ of blocks.\d.mlp, which has 24 in the model"):
        describe_search(paths, make_vit(depth=4, mlp_ratio=1))
    with pytest.raises(VitpruneError, match="ig_total_step must be a number of steps, found None"):
        describe_search(replace(paths, args={}), make_vit(depth=4, mlp_ratio=4))


def test_the_wrong_order_or_transform_lies_far_below_what_is_asked(deit_tiny, results):
    """On real photos: their transform and order agree fully, images of the same class in another order do not."""
    images = find_images(shared("data/imagenette/val"), 1000, images_per_class=3)
    transform = authors_transform({**ARGS, "img_size": 224}, deit_tiny)
    ((photos, _labels),) = ImageBatches(images, deit_tiny, transform=transform)
    hidden = record_clean(deit_tiny, find_feed_forwards(deit_tiny), photos, tokens=slice(0, 1)).hidden_BTH
    paths = torch.stack([h_BTH[:, 0].argmax(-1) for h_BTH in hidden], 1).tolist()
    records = [[{"base": [path], "base_score": [[0.0]]}] for path in paths]

    def agreement_of(shift, transform=transform):
        files = {}
        for label in images.class_names:
            lines = [json.dumps(records[place]) + "\n" for place, index in enumerate(images.labels) if index == label]
            files[label] = "".join(lines[shift:] + lines[:shift])
        paths = read_authors(results(files, img_size=224), method="activation")
        batches = ImageBatches(images, deit_tiny, transform=transform)
        search = describe_search(paths, deit_tiny)
        return adopt(deit_tiny, search, assign_images(paths, images), batches, least_agreement=0)[1].share

    assert agreement_of(0) == 1.0
    assert agreement_of(1) < LEAST_AGREEMENT - 0.2
    assert agreement_of(0, data_config(deit_tiny)) < LEAST_AGREEMENT - 0.05


def test_a_wrong_model_is_refused_early(tiny_vit, results):
    num_images = 3 * IMAGES_BEFORE_REFUSAL
    generator = random.Random(0)
    lines = [
        json.dumps([{"base": [[generator.randrange(48) for _ffn in range(3)]], "base_score": [[0]]}]) + "\n"
        for _image in range(num_images)
    ]
    paths = read_authors(results({0: "".join(lines)}), method="activation")
    images = ImageSet(
        "photos", tuple(f"a/{number:04}.png" for number in range(num_images)), (0,) * num_images, {0: "a"}
    )
    read = []

    def batches():
        for start in range(0, num_images, 64):
            read.append(start)
            yield torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(start)), torch.zeros(64).long()

    search = describe_search(paths, tiny_vit)
    with pytest.raises(VitpruneError, match=r"of the activation neurons in the files \(256 images compared\)"):
        adopt(tiny_vit, search, assign_images(paths, images), batches())
    assert len(read) == IMAGES_BEFORE_REFUSAL // 64
    with pytest.raises(VitpruneError, match=r"least_agreement must be in \[0, 1\], got 2"):
        adopt(tiny_vit, search, assign_images(paths, images), batches(), least_agreement=2)


# --- paths without scores of the other neurons -------------------------------------------------------------------


@pytest.fixture
def paths_only(golden, results):
    _model, expected = golden
    files, order, images = golden_files(expected, search_record(expected))
    return adopt_golden(golden, results(files), "jas", order, images)[0], images


def test_paths_do_without_class_scores(paths_only):
    found, _images = paths_only
    assert {tuple(scores.shape) for scores in found.class_scores.values()} == {(0, 96)}
    visits = count_visits(found)
    assert all(int(count.sum()) == 24 for count in visits.values())
    for row, (label, path) in enumerate(class_paths(found).items()):
        members = found.neurons[found.labels == label, :, 0]
        assert path[:, 0].tolist() == [int(column.mode().values) for column in members.T]
        assert visits["blocks.0.mlp"][row, path[0, 0]] == visits["blocks.0.mlp"][row].max()
    kept = only_classes(found, found.classes[:2])
    assert len(kept.neurons) == int((found.labels <= found.classes[1]).sum())


def test_whatever_needs_class_scores_refuses(paths_only, golden):
    model, expected = golden
    found, _images = paths_only
    with pytest.raises(VitpruneError, match="paths, but no scores of the neurons beside them"):
        vitprune.score_neurons(model, "jas", found=found)
    with pytest.raises(VitpruneError, match="paths, but no scores of the neurons beside them"):
        measure_topk_mask(model, [(expected["images"], expected["labels"])], found)
    with pytest.raises(VitpruneError, match="paths, but no scores of the neurons beside them"):
        compare_scores(found)
    assert compare_visits(found).cosines.shape == (len(found.classes), len(found.classes))
    assert sum(row.num_visits for row in measure_utilisation(found)) == 4 * 24


def test_a_run_of_paths_only_is_saved_and_loaded(paths_only, tmp_path):
    found, images = paths_only
    transform = {"mean": [0.5, 0.5, 0.5], "crop_mode": "squash"}
    save_run(Run(found, images, "name", None, "hash", transform=transform), tmp_path / "run")
    again = load_run(tmp_path / "run")
    assert again.transform == transform
    assert torch.equal(again.found.neurons, found.neurons)
    assert [tuple(scores.shape) for scores in again.found.class_scores.values()] == [(0, 96)] * 4


# --- writing -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_folders(saved_vit, image_folder, tmp_path_factory):
    """Runs of all images by each method that their files have a place for, and one of two neurons per FFN."""
    root = tmp_path_factory.mktemp("runs")
    for method in ("jas", "activation", "influence-pattern", "jas-complete"):
        discovered(saved_vit, image_folder, root / method, "--method", method, "--quadrature", "riemann:20")
    for method in ("jas", "activation"):
        discovered(saved_vit, image_folder, root / f"{method}-2", "--method", method, "--top-k", "2")
    return root


def discovered(model, data, output, *options):
    assert main(["discover", str(model), "--data", str(data), "-o", str(output), *options]) == 0
    return output


def changed(run_folder, **facts):
    run = load_run(run_folder)
    return replace(run, found=replace(run.found, **facts))


def test_their_notebooks_find_what_they_look_for(run_folders, tmp_path):
    """The look-ups are those of the authors' scripts: nesting, key names, one file per class."""
    write_authors([load_run(run_folders / method) for method in ("activation", "jas")], tmp_path / "imgnet_all")
    jas, activation = (load_run(run_folders / method).found for method in ("jas", "activation"))
    for label in range(5):
        lines = (tmp_path / f"imgnet_all-{label}.rlt.jsonl").read_text().splitlines()
        records = [record for line in lines for record in json.loads(line)]
        rows = jas.labels == label
        assert [record["ja"][0] for record in records] == jas.neurons[rows, :, 0].tolist()
        assert [record["base"][0] for record in records] == activation.neurons[rows, :, 0].tolist()
        assert [record["ja_score"][0][0] for record in records] == jas.joint_scores[rows].tolist()
        assert [record["base_score"][0][0] for record in records] == activation.joint_scores[rows].tolist()
    assert json.loads((tmp_path / "imgnet_all.args.json").read_text())["ig_total_step"] == 20
    pattern = load_run(run_folders / "influence-pattern")
    write_authors([pattern], tmp_path / "ip")
    lines = (tmp_path / "ip-0.rlt.jsonl").read_text().splitlines()
    records = [record for line in lines for record in json.loads(line)]
    assert [record["ja"][0] for record in records] == pattern.found.neurons[:4, :, 0].tolist()
    assert [record["ja_score"][0] for record in records] == pattern.found.joint_scores[:4].tolist()
    write_authors([changed(run_folders / "influence-pattern", tokens="patch")], tmp_path / "mae")
    record = json.loads((tmp_path / "mae-0.rlt.jsonl").read_text().splitlines()[0])
    assert record["path"] == [[float(neuron) for neuron in pattern.found.neurons[0, :, 0]]]
    assert record["score"] == [[pattern.found.joint_scores[0].item()]]


def test_what_their_files_have_no_place_for_is_refused(run_folders, tmp_path):
    jas, pattern = load_run(run_folders / "jas"), load_run(run_folders / "influence-pattern")
    activation = load_run(run_folders / "activation")
    refused = {
        "no place for method jas-complete": [load_run(run_folders / "jas-complete")],
        "target label, quantity logit": [changed(run_folders / "jas", quantity="logit")],
        "tokens all": [changed(run_folders / "jas", tokens="all")],
        "one run per method, got jas, jas": [jas, jas],
        "influence patterns have files of their own": [jas, pattern],
        "must be of the same images": [jas, replace(activation, images=activation.images.head(3))],
        "must be of the same weights, transform": [jas, replace(activation, weights_sha256="x", transform={})],
        "must be of the same top_k": [jas, load_run(run_folders / "activation-2")],
        "more than one neuron per FFN of influence-pattern": [
            changed(run_folders / "influence-pattern", neurons=pattern.found.neurons.expand(-1, -1, 2))
        ],
        "no runs to write": [],
    }
    for complaint, runs in refused.items():
        with pytest.raises(VitpruneError, match=complaint):
            write_authors(runs, tmp_path / "out" / "imgnet_all")
    assert not (tmp_path / "out").exists()
    (tmp_path / "imgnet_all-77.rlt.jsonl").touch()
    with pytest.raises(VitpruneError, match="imgnet_all-77.rlt.jsonl is of a class that the runs do not have"):
        write_authors([jas], tmp_path / "imgnet_all")


@pytest.mark.parametrize("methods", [("jas", "activation"), ("influence-pattern",), ("jas-2", "activation-2")])
def test_there_and_back_again_is_the_same(methods, run_folders, saved_vit, image_folder, tmp_path, capsys):
    folders = [run_folders / method for method in methods]
    written = run("convert", *folders, "-o", tmp_path / "one" / "imgnet_all", "--json", capsys=capsys)
    assert (written["num_images"], written["num_classes"]) == (20, 5)
    for method in methods:
        answer = run(
            "convert", written["output"], "--model", saved_vit, "--data", image_folder, "--method",
            method.removesuffix("-2"), "-o", tmp_path / method, "--json", capsys=capsys,
        )  # fmt: skip
        before, after = load_run(run_folders / method), load_run(tmp_path / method)
        for name in ("neurons", "joint_scores", "labels", "predictions"):
            assert torch.equal(getattr(after.found, name), getattr(before.found, name)), name
        for name in ("layers", "classes", "method", "tokens", "quadrature", "target", "quantity", "precision"):
            assert getattr(after.found, name) == getattr(before.found, name), name
        assert (after.images, after.weights_sha256) == (before.images, before.weights_sha256)
        assert after.transform is None
        assert (answer["num_images"], answer["joint_scores"]) == (20, "read")
        assert answer["agreement"] == (1.0 if answer["compared"] else None) == 1.0
    again = run(
        "convert", *[tmp_path / method for method in methods], "-o", tmp_path / "two" / "imgnet_all", "--json",
        capsys=capsys,
    )  # fmt: skip
    assert again["num_images"] == 20
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / file.name).read_bytes()


def test_paths_on_patches_are_read_where_the_head_reads_patches(image_folder, results, tmp_path):
    model = make_vit(global_pool="avg", class_token=True).float()
    images = find_images(image_folder, 5)
    transform = authors_transform(ARGS, model)
    batches = ImageBatches(images, model, transform=transform)
    found = discover(model, batches, method="activation", quadrature="riemann:1")
    assert found.tokens == "patch"
    files = {
        label: "".join(
            json.dumps([{"base": [path[:, 0].tolist()], "base_score": [[0.5]]}]) + "\n"
            for path in found.neurons[found.labels == label]
        )
        for label in found.classes
    }
    paths = read_authors(results(files, model_type=""), method="activation")
    adopted, agreement = adopt(model, describe_search(paths, model), assign_images(paths, images), batches)
    assert (adopted.tokens, agreement.share) == ("patch", 1.0)


# --- the command line --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def theirs(saved_vit, image_folder, tmp_path_factory):
    """What their program would write for the first three classes, under its own transform."""
    folder = tmp_path_factory.mktemp("theirs")
    model = vitprune.load(saved_vit)
    images = find_images(image_folder, 5, classes=["class0", "class1", "class2"])
    transform = authors_transform(ARGS, model)
    jas, base = (
        discover(model, ImageBatches(images, model, transform=transform), method=method, quadrature="riemann:20")
        for method in ("jas", "activation")
    )
    (folder / "imgnet_all.args.json").write_text(json.dumps(ARGS))
    for label in range(3):
        batch = [
            {
                "ja": [jas.neurons[place, :, 0].tolist()],
                "ja_score": [[jas.joint_scores[place].item()]],
                "base": [base.neurons[place, :, 0].tolist()],
                "base_score": [[base.joint_scores[place].item()]],
            }
            for place in range(12)
            if images.labels[place] == label
        ]
        (folder / f"imgnet_all-{label}.rlt.jsonl").write_text(json.dumps(batch) + "\n")
    return folder / "imgnet_all.args.json", jas


def test_earlier_results_become_a_run_that_prune_takes(theirs, saved_vit, image_folder, tmp_path, capsys):
    source, jas = theirs
    output = tmp_path / "run"
    arguments = ("convert", source, "--model", saved_vit, "--data", image_folder, "-o", output)
    answer = run(*arguments, "--json", capsys=capsys)
    assert (answer["num_images"], answer["num_classes"], answer["agreement"]) == (12, 3, 1.0)
    assert answer["classes_without_paths"] == ["class3", "class4"]
    assert {"crop_mode", "crop_pct", "mean", "std"} <= {*answer["transform_differs"]}
    found = load_run(output)
    assert found.transform["crop_mode"] == "squash"
    assert torch.equal(found.found.neurons, jas.neurons)
    assert torch.equal(found.found.joint_scores, jas.joint_scores)
    assert torch.equal(found.found.predictions, jas.predictions)
    assert "run exists; choose another output or add --overwrite" in run(*arguments, code=2, capsys=capsys)
    before = (output / "paths.safetensors").read_bytes()
    assert main([str(each) for each in (*arguments, "--overwrite")]) == 0
    shown = capsys.readouterr()
    assert "12 jas paths of 3 classes" in shown.out
    assert "the model agrees with 100.00% of the activation neurons" in shown.out
    assert "left out 2 classes" in shown.err
    assert (output / "paths.safetensors").read_bytes() == before
    refused = run("prune", output, "--criterion", "jas", "-o", tmp_path / "pruned", code=2, capsys=capsys)
    assert "no scores of the neurons beside them" in refused
    pruned = run("prune", output, "--criterion", "variance", "-o", tmp_path / "pruned", "--json", capsys=capsys)
    assert pruned["pruning_ratio"] == pytest.approx(0.5, abs=0.05)


def test_python_gets_what_the_command_line_gets(theirs, saved_vit, image_folder, tmp_path, capsys):
    source, _jas = theirs
    typed = ("convert", source, "--model", saved_vit, "--data", image_folder, "-o", tmp_path / "typed")
    answer = run(*typed, "--json", capsys=capsys)
    notes = []
    network, images = vitprune.load(saved_vit), find_images(image_folder, 5)
    converted = read_as_run(read_authors(source), network, images, name=str(saved_vit), note=notes.append)
    save_run(converted.run, tmp_path / "called")
    for path in (tmp_path / "called").iterdir():
        assert path.read_bytes() == (tmp_path / "typed" / path.name).read_bytes()
    assert (converted.scores_computed, converted.without_paths) == (False, ("class3", "class4"))
    assert list(converted.differs) == answer["transform_differs"]
    assert notes == [f"left out 2 classes of {image_folder} that have no paths (first: class3)"]
    with pytest.raises(VitpruneError, match="batch_size must be at least 1, got 0"):
        read_as_run(read_authors(source), network, images, name="vit", batch_size=0)


def test_mistakes_on_the_command_line_are_one_line(theirs, run_folders, saved_vit, image_folder, tmp_path, capsys):
    source, _jas = theirs
    output = ("-o", tmp_path / "run")
    given = ("--model", saved_vit, "--data", image_folder, *output)

    def refusal(*arguments):
        return run("convert", *arguments, code=2, capsys=capsys)

    assert "--model, such as vit_base_patch16_224 with --checkpoint ../ckpt/ViT-B_16-224.npz" in refusal(
        source, *output
    )
    assert "name the images of the paths with --data" in refusal(source, "--model", saved_vit, *output)
    assert "nothing.args.json: no such file" in refusal(tmp_path / "nothing", *given)
    assert "no 'path' in the record" in refusal(source, "--method", "influence-pattern", *given)
    assert "least_agreement must be in [0, 1], got 1.5" in refusal(source, "--least-agreement", "1.5", *given)
    assert "name one PREFIX.args.json, or only runs" in refusal(source, source, *given)
    assert "imgnet_all.args.json is no run" in refusal(run_folders / "jas", source, *output)
    assert "model, data: not for writing runs" in refusal(run_folders / "jas", *given)
    assert "batch_size must be at least 1" in refusal(source, "--batch-size", "0", *given)
    assert not (tmp_path / "run").exists()
    assert (
        run("convert", run_folders / "jas", "-o", tmp_path / "out" / "p", "--json", capsys=capsys)["num_images"] == 20
    )
    assert "p.args.json exists" in refusal(run_folders / "activation", "-o", tmp_path / "out" / "p")

"""Folders of images: which class is which, what is refused, and what is skipped by name."""

from __future__ import annotations

import shutil

import pytest
import timm
import torch
from conftest import make_vit
from PIL import Image

from vitprune import ImageBatches, VitpruneError, find_images
from vitprune.data import describe_class, hash_images


def make_folder(root, names, *, files=("a.png",)):
    for name in names:
        (root / name).mkdir(parents=True)
        for file in files:
            Image.new("RGB", (8, 8), (len(name), 0, 0)).save(root / name / file)
    return root


def test_wnids_are_looked_up_even_when_only_some_are_there(tmp_path):
    make_folder(tmp_path, ["n01443537", "n15075141", "n02102040"])
    images = find_images(tmp_path, 1000)
    assert images.labels == (1, 217, 999)
    assert images.class_names[1] == "n01443537"
    assert describe_class("n01443537") == "goldfish"


def test_sorted_order_when_the_counts_are_equal(tmp_path):
    make_folder(tmp_path, ["zebra", "ant", "bee"])
    assert find_images(tmp_path, 3).class_names == {0: "ant", 1: "bee", 2: "zebra"}


@pytest.mark.parametrize(("name", "text"), [("map.txt", "bee\nzebra\nant\n"), ("map.json", '{"ant": 2, "zebra": 1}')])
def test_class_map(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    make_folder(tmp_path / "data", ["zebra", "ant"])
    images = find_images(tmp_path / "data", 10, class_map=tmp_path / name)
    assert images.labels == (2, 1)


def test_classes_by_name_or_index_and_a_sample_of_each(tmp_path):
    make_folder(tmp_path, ["a", "b", "c"], files=[f"{i}.png" for i in range(9)])
    images = find_images(tmp_path, 3, classes=["b", "2"], images_per_class=4, seed=1)
    assert sorted(set(images.labels)) == [1, 2]
    assert len(images) == 8
    again = find_images(tmp_path, 3, classes=["c", "b"], images_per_class=4, seed=1)
    assert images == again
    assert images != find_images(tmp_path, 3, classes=["c", "b"], images_per_class=4, seed=2)


def test_a_folder_called_by_a_number_is_meant_before_an_index(tmp_path):
    make_folder(tmp_path, [str(index) for index in range(12)])
    assert find_images(tmp_path, 12, classes=["10"]).class_names == {10: "10"}


def test_classes_by_english_name(tmp_path):
    make_folder(tmp_path, ["n01440764", "n02102040", "n02012849", "n03126707"])
    assert find_images(tmp_path, 1000, classes=["Tench", "English springer spaniel"]).labels == (0, 217)
    with pytest.raises(VitpruneError, match="'crane' may be n02012849 or n03126707; name one"):
        find_images(tmp_path, 1000, classes=["crane"])


def test_folders_that_share_a_class_are_picked_one_by_one(tmp_path):
    (tmp_path / "map.json").write_text('{"ant": 0, "bee": 0, "cat": 1}')
    make_folder(tmp_path / "data", ["ant", "bee", "cat"])
    for asked, files in ((["ant"], ("ant/a.png",)), (["bee"], ("bee/a.png",)), (["0"], ("ant/a.png", "bee/a.png"))):
        assert find_images(tmp_path / "data", 2, class_map=tmp_path / "map.json", classes=asked).files == files


def test_wnids_that_timm_does_not_know_keep_their_name(tmp_path):
    assert describe_class("n00000001") == "n00000001"


def test_labels_that_are_not_used_need_no_classes(tmp_path):
    assert find_images(make_folder(tmp_path, ["x", "y"]), None).labels == (0, 1)


def test_head_spreads_over_the_set(tmp_path):
    make_folder(tmp_path, ["a", "b", "c"], files=["1.png", "2.png"])
    assert find_images(tmp_path, 3).head(3).labels == (0, 1, 2)
    assert len(find_images(tmp_path, 3).head(99)) == 6


@pytest.mark.parametrize(
    ("folders", "arguments", "message"),
    [
        (["ant", "bee"], {}, "has 2 class folders .* but the model has 1000 outputs"),
        (["n01443537", "n00000001"], {}, "'n00000001' .* is not in imagenet-1k"),
        (["train", "val"], {}, "holds the splits train, val; name one of them"),
        ([], {}, "holds no class folders"),
        (["n01443537"], {"classes": ["n02102040"]}, "'n02102040' is neither a folder"),
        (["n01443537"], {"class_map": "absent.txt"}, "absent.txt: no such file"),
    ],
)
def test_folders_that_are_refused(folders, arguments, message, tmp_path):
    make_folder(tmp_path, folders)
    with pytest.raises(VitpruneError, match=message):
        find_images(tmp_path, 1000, **arguments)


def test_more_refusals(tmp_path):
    with pytest.raises(VitpruneError, match="no such data folder"):
        find_images(tmp_path / "absent", 1000)
    with pytest.raises(VitpruneError, match="no images"):
        find_images(make_folder(tmp_path / "bare", ["n01443537"], files=[]), 1000)
    with pytest.raises(VitpruneError, match="no classifier"):
        find_images(tmp_path, 0)
    (tmp_path / "map.json").write_text('{"ant": 12}')
    make_folder(tmp_path / "data", ["ant"])
    with pytest.raises(VitpruneError, match="class 12 of 'ant' is beyond the 10 outputs"):
        find_images(tmp_path / "data", 10, class_map=tmp_path / "map.json")


@pytest.fixture
def damaged(image_folder, tmp_path):
    """A copy of the image folder with one truncated and one alien file."""
    root = tmp_path / "damaged"
    shutil.copytree(image_folder, root)
    victim = root / "class1" / "0.jpg"
    victim.write_bytes(victim.read_bytes()[:300])
    (root / "class3" / "1.png").write_text("not an image")
    return root


def test_undecodable_images_are_skipped_by_name(damaged):
    batches = ImageBatches(find_images(damaged, 5), make_vit(), batch_size=3)
    labels = torch.cat([labels for _, labels in batches])
    assert [name for name, _ in batches.skipped] == ["class1/0.jpg", "class3/1.png"]
    assert len(labels) == len(batches.files_read) == 18
    assert labels.tolist() == [int(name[5]) for name in batches.files_read]


def test_strict_refuses_undecodable_images(damaged):
    with pytest.raises(VitpruneError, match=r"class1/0\.jpg: cannot be decoded"):
        list(ImageBatches(find_images(damaged, 5), make_vit(), strict=True))


def test_a_set_without_one_good_image_is_refused(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_text("no")
    with pytest.raises(VitpruneError, match="no image could be decoded"):
        list(ImageBatches(find_images(tmp_path, 1), make_vit()))


def test_batches_are_timms_own_transform_whatever_the_workers(image_folder):
    model = make_vit()
    images = find_images(image_folder, 5)
    config = {**timm.data.resolve_model_data_config(model), "input_size": (3, 32, 32)}
    transform = timm.data.create_transform(**config, is_training=False)
    expected = torch.stack([transform(Image.open(images.root / name).convert("RGB")) for name in images.files])
    for num_workers in (0, 2):
        got = torch.cat([batch for batch, _ in ImageBatches(images, model, batch_size=8, num_workers=num_workers)])
        assert torch.equal(got, expected)


def test_content_hashes_tell_images_apart(image_folder):
    hashes = hash_images(find_images(image_folder, 5))
    assert len(set(hashes)) == 20
    assert all(len(digest) == 16 for digest in hashes)

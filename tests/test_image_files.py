"""Which files are images, in folders, lists and archives; and what their pixels are."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
import warnings

import numpy as np
import pytest
import timm
import torch
from conftest import make_vit
from PIL import Image, features

import vitprune
from vitprune import ImageBatches, VitpruneError, find_images
from vitprune.cli.commands import main
from vitprune.data import hash_images
from vitprune.images.decode import read_image

NAMES = ("bird", "cat", "dog", "fish")


def picture(shade=0):
    return Image.new("RGB", (12, 12), (shade % 256, 7, 200))


def photos(root, names=NAMES):
    for place, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for number in range(2):
            picture(60 * place + number).save(root / name / f"{number}.png")
    return root


@pytest.mark.parametrize(
    "name",
    ["a.jpg", "a.JPG", "a.jfif", "a.jpe", "a.PnG", "a.tiff", "a.webp", "a.jp2", "a.tga", "a.qoi", "a.avif", "a.bmp"],
)
def test_whatever_pillow_decodes_is_taken(name, tmp_path):
    suffix = name.partition(".")[2].lower()
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    (tmp_path / "cat").mkdir()
    picture().save(tmp_path / "cat" / name)
    images = find_images(tmp_path, 1)
    assert images.files == (f"cat/{name}",)
    assert len(next(iter(ImageBatches(images, make_vit())))[0]) == 1


@pytest.mark.parametrize("name", ["0001", "photo.2023", "a.jpg_large", "b.img"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_without_a_known_suffix_the_content_decides(name, kind, tmp_path):
    (tmp_path / "cat").mkdir()
    picture().save(tmp_path / "cat" / name, kind)
    (tmp_path / "cat" / "README").write_text("no image")
    (tmp_path / "cat" / "data.npy").write_bytes(b"\x93NUMPY" + bytes(60))
    images = find_images(tmp_path, 1)
    assert (images.files, images.passed_over) == ((f"cat/{name}",), ())


JUNK = [
    "cat/.ipynb_checkpoints/0-checkpoint.png", "cat/.cache/0.png", "cat/._0.png", "cat/Thumbs.db", "cat/.DS_Store",
    "cat/__MACOSX/0.png", "__MACOSX/cat/0.png", ".git/0.png", "cat/@eaDir/0.png", "cat/desktop.ini", "cat/notes.txt",
    "$RECYCLE.BIN/0.png",
]  # fmt: skip


def test_hidden_things_and_what_systems_leave_behind_are_left_out(tmp_path):
    expected = find_images(photos(tmp_path), 4)
    for name in JUNK:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "cat" / "0.png", tmp_path / name)
    (tmp_path / "cat" / "x.jpg").mkdir()  # a folder is never an image
    picture().save(tmp_path / "cat" / "x.jpg" / "deeper.png")
    images = find_images(tmp_path, 4)
    assert [name for name in images.files if name not in expected.files] == ["cat/x.jpg/deeper.png"]
    assert images.passed_over == ()
    assert images.label_names == NAMES


def test_what_was_meant_as_an_image_is_said_once(tmp_path, dense, capsys):
    photos(tmp_path)
    for name in ("cat/a.heic", "cat/b.svg", "dog/c.CR2"):
        (tmp_path / name).write_bytes(b"\0" * 20)
    picture().save(tmp_path / "stray.png")
    images = find_images(tmp_path, 4)
    assert images.passed_over == ("cat/a.heic", "cat/b.svg", "dog/c.CR2", "stray.png")
    assert main(["evaluate", str(dense), "--data", str(tmp_path)]) == 0
    told = capsys.readouterr().err
    assert told.count("left out 4 files") == told.count("cat/a.heic") == 1


def test_linked_folders_are_followed_but_not_in_circles(tmp_path):
    photos(tmp_path / "elsewhere", ["bird"])
    photos(tmp_path / "data", ["cat"])
    (tmp_path / "data" / "bird").symlink_to(tmp_path / "elsewhere" / "bird")
    (tmp_path / "data" / "cat" / "back").symlink_to(tmp_path / "data")
    assert find_images(tmp_path / "data", 2).labels[:2] == (0, 0)


def levels(kind):
    """Return grey levels 0 .. 255 as another kind of number, whose conversion to 8 bits must give them back."""
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16)
    return {
        "16 bits": grey.astype(np.uint16) * 257,
        "32 bits of 16": grey.astype(np.int32) * 257,
        "32 bits of 8": grey.astype(np.int32),
        "floats to 1": (grey / 255).astype(np.float32),
        "floats to 255": grey.astype(np.float32),
    }[kind]


@pytest.mark.parametrize("suffix", ["tif", "png"])
@pytest.mark.parametrize("kind", ["16 bits", "32 bits of 16", "32 bits of 8", "floats to 1", "floats to 255"])
def test_deep_images_keep_their_levels(kind, suffix, tmp_path):
    if suffix == "png" and kind != "16 bits":
        pytest.skip("PNG has no such numbers")
    (tmp_path / "cat").mkdir()
    Image.fromarray(levels(kind)).save(tmp_path / "cat" / f"a.{suffix}")
    expected = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(read_image(tmp_path / "cat" / f"a.{suffix}", "L"), expected)
    # And through a model's transform they are what the same picture in 8 bits is.
    Image.fromarray(expected).save(tmp_path / "cat" / "b.png")
    ((batch, _labels),) = ImageBatches(find_images(tmp_path, 1), make_vit())
    assert torch.equal(batch[0], batch[1])


@pytest.mark.parametrize("order", ["<u2", ">u2"])
def test_16_bits_in_any_order_of_bytes_are_rounded_to_the_nearest(order, tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (20, 20)).astype(np.uint16)
    header = b"P5 20 20 65535\n"
    (tmp_path / "a.pgm").write_bytes(header + values.astype(">u2").tobytes())
    exact = np.rint(values / 257)
    assert np.abs(np.asarray(read_image(tmp_path / "a.pgm", "L")) - exact).max() == 0
    mode = "I;16" if order == "<u2" else "I;16B"
    image = Image.frombytes(mode, (20, 20), values.astype(order).tobytes())
    assert np.array_equal(vitprune.images.decode.convert(image, "L"), exact)


@pytest.mark.parametrize("values", [[[-1.0, 0.5]], [[0.0, 700.0]], [[float("nan"), 0.5]], [[0.0, float("inf")]]])
def test_floats_of_which_nothing_tells_what_is_white_are_refused(values, tmp_path):
    (tmp_path / "cat").mkdir()
    picture().save(tmp_path / "cat" / "0.png")
    Image.fromarray(np.asarray(values, np.float32)).save(tmp_path / "cat" / "1.tif")
    batches = ImageBatches(find_images(tmp_path, 1), make_vit())
    assert sum(len(labels) for _images, labels in batches) == 1
    assert [name for name, _reason in batches.skipped] == ["cat/1.tif"]
    with pytest.raises(VitpruneError, match=r"1\.tif: cannot be decoded"):
        list(ImageBatches(batches.images, make_vit(), strict=True))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_eight_bits_are_converted_as_timm_does(mode, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3)).astype(np.uint8)
    image = Image.fromarray(pixels).convert("P" if mode == "PA" else mode).convert(mode)
    path = tmp_path / ("a.tif" if mode in ("CMYK", "YCbCr", "PA") else "a.png")
    try:
        image.save(path)
    except OSError:
        pytest.skip("no file format has it")
    assert np.array_equal(read_image(path), Image.open(path).convert("RGB"))


def test_transparent_palettes_draw_no_warning(tmp_path):
    picture().convert("P").save(tmp_path / "a.png", transparency=bytes([0, 128]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = np.asarray(read_image(tmp_path / "a.png"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert np.array_equal(got, Image.open(tmp_path / "a.png").convert("RGB"))


def test_orientation_is_left_as_timm_leaves_it(tmp_path):
    pixels = np.zeros((4, 8, 3), np.uint8)
    pixels[:, :4] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    assert read_image(tmp_path / "a.png").size == (8, 4)


def flat(root):
    root.mkdir()
    for number in range(6):
        picture(40 * number).save(root / f"{number}.png")
    return root


def deep(root):
    for number in range(6):
        folder = root / f"year{number % 2}" / f"month{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        picture(40 * number).save(folder / f"{number}.png")
    return root


def listed(root):
    deep(root)
    (root / "list.txt").write_text("".join(f"{path.relative_to(root)}\n" for path in sorted(root.rglob("*.png"))))
    return root / "list.txt"


def packed(root):
    deep(root)
    with tarfile.open(root.with_suffix(".tar"), "w") as archive:
        archive.add(root, ".")
    return root.with_suffix(".tar")


def ten(root):
    return photos(root, [f"x{number}" for number in range(10)])


TREES = {"flat": flat, "deep": deep, "listed": listed, "packed": packed, "ten": ten}


@pytest.mark.parametrize("tree", TREES)
def test_calibration_takes_any_images(tree, dense, tmp_path, capsys):
    data = str(TREES[tree](tmp_path / "data"))
    asked = ["--ratio", "0.3", "--step", "1", "--criterion", "variance", "--compensate", "ridge"]
    assert main(["prune", str(dense), "--data", data, *asked, "-o", str(tmp_path / "pruned"), "--strict"]) == 0
    assert capsys.readouterr().err.count("without labels") == 1
    # They are known again, and serve for parity without labels.
    assert main(["export", str(tmp_path / "pruned"), str(tmp_path / "a.onnx"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["top1"] is None
    labelled = photos(tmp_path / "val")
    first = find_images(data, 4, labels_matter=False)
    seen = (first.root / first.files[0]) if first.root.is_dir() else None
    if seen is not None:
        shutil.copy(seen, labelled / "cat" / "seen.png")
        assert main(["evaluate", str(tmp_path / "pruned"), "--data", str(labelled)]) == 2
        assert "were calibration images" in capsys.readouterr().err


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize(
    "arguments",
    [
        ["prune", "--criterion", "taylor", "-o", "x"],
        ["prune", "--criterion", "integrated-gradients", "-o", "x"],
        ["prune", "--criterion", "variance", "--keep-classes", "cat", "dog", "-o", "x"],
        ["discover", "-o", "x"],
        ["evaluate"],
    ],
    ids=lambda arguments: " ".join(arguments[:3]),
)
def test_labels_are_asked_for_where_they_are_read(tree, arguments, dense, tmp_path, capsys, monkeypatch):
    data = str(TREES[tree](tmp_path / "data"))
    monkeypatch.chdir(tmp_path)
    command, *rest = arguments
    assert main([command, str(dense), "--data", data, *rest]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "nothing tells the classes" in told or "say which is which with --class-map" in told
    assert not (tmp_path / "x").exists()


def test_python_is_told_where_labels_are_missing(tmp_path):
    model = make_vit(num_classes=4).float()
    batches = ImageBatches(find_images(flat(tmp_path / "data"), 4, labels_matter=False), model)
    vitprune.prune(model, batches, criterion="variance", compensation="ridge", step=1)
    for read in (
        lambda: vitprune.evaluate(model, batches),
        lambda: vitprune.discover(model, batches),
        lambda: vitprune.prune(model, batches, criterion="taylor", step=1),
    ):
        with pytest.raises(VitpruneError, match="these images have no labels, which are needed here"):
            read()


LISTS = {
    "list.txt": "val/cat/0.png cat\nval/dog/1.png dog\nval/bird/0.png bird\nval/fish/0.png fish\n",
    "tabs.txt": "val/cat/0.png\tcat\nval/dog/1.png\tdog\nval/bird/0.png\tbird\nval/fish/0.png\tfish\n",
    "indices.txt": "val/cat/0.png 1\nval/dog/1.png 2\nval/bird/0.png 0\nval/fish/0.png 3\n",
    "plain.csv": "val/cat/0.png,cat\nval/dog/1.png,dog\nval/bird/0.png,bird\nval/fish/0.png,fish\n",
    "reversed.csv": "cat,val/cat/0.png\ndog,val/dog/1.png\nbird,val/bird/0.png\nfish,val/fish/0.png\n",
    "header.csv": "path,label\nval/cat/0.png,cat\nval/dog/1.png,dog\nval/bird/0.png,bird\nval/fish/0.png,fish\n",
    "wide.csv": "id,label,file\n9,1,val/cat/0.png\n8,2,val/dog/1.png\n7,0,val/bird/0.png\n6,3,val/fish/0.png\n",
    "windows.csv": "file;label\r\nval\\cat\\0.png;1\r\nval\\dog\\1.png;2\r\n"
    "val\\bird\\0.png;0\r\nval\\fish\\0.png;3\r\n",
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("name", LISTS)
def test_lists_of_many_kinds_say_the_same(name, encoding, tmp_path):
    photos(tmp_path / "val")
    (tmp_path / name).write_bytes(LISTS[name].encode(encoding))
    images = find_images(tmp_path / name, 4)
    found = {file.split("/")[1]: label for file, label in zip(images.files, images.labels, strict=True)}
    assert found == {"bird": 0, "cat": 1, "dog": 2, "fish": 3}
    assert len(list(hash_images(images))) == 4


def test_a_list_without_labels_goes_by_folders(tmp_path):
    photos(tmp_path)
    (tmp_path / "list.txt").write_text("".join(f"{name}/1.png\n" for name in NAMES))
    assert find_images(tmp_path / "list.txt", 4).labels == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cat/0.png\ncat/9.png\n", "line 2: no such file 'cat/9.png'"),
        ("cat/0.png,cat\ndog/0.png,\n", "line 2: no label, but other lines have one"),
        ("cat/0.png\ncat/0.png\n", r"line 2: 'cat/0.png' is there already \(line 1\)"),
        ("cat/0.png,7\n", "no indices of the model's outputs"),
        ("", "holds no files"),
        ("file,label\n", "holds no files"),
        ("a,b,c\nd,e,f\n", "head its 3 columns"),
    ],
)
def test_lists_that_are_refused_name_the_line(text, message, tmp_path):
    photos(tmp_path)
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(VitpruneError, match=message):
        find_images(tmp_path / "list.csv", 4)


def test_one_image_is_no_folder(tmp_path):
    photos(tmp_path)
    with pytest.raises(VitpruneError, match="is one image; name its folder"):
        find_images(tmp_path / "cat" / "0.png", 4)


@pytest.mark.parametrize("prefix", ["", "./", "val/", "./data/val/"])
def test_an_archive_is_as_good_as_its_folder(prefix, tmp_path):
    folder, model = find_images(photos(tmp_path / "val"), 4), make_vit(num_classes=4)
    with tarfile.open(tmp_path / "val.tar", "w") as archive:
        for name in reversed(folder.files):
            archive.add(folder.root / name, prefix + name)
        archive.add(folder.root / folder.files[0], f"{prefix}cat/._0.png")
    packed = find_images(tmp_path / "val.tar", 4)
    assert packed.labels == folder.labels
    assert hash_images(packed) == hash_images(folder)
    for num_workers in (0, 2):
        pairs = zip(ImageBatches(packed, model, num_workers=num_workers), ImageBatches(folder, model), strict=True)
        assert all(torch.equal(got[0], expected[0]) for got, expected in pairs)


@pytest.mark.parametrize("beside", ["cls", "json"])
def test_a_webdataset_brings_its_labels(beside, tmp_path):
    labels = [3, 0, 2, 1]
    with tarfile.open(tmp_path / "shard.tar", "w") as archive:
        for number, label in enumerate(labels):
            stream = io.BytesIO()
            picture(number).save(stream, "PNG")
            text = str(label) if beside == "cls" else json.dumps({"label": label})
            for suffix, content in (("png", stream.getvalue()), (beside, text.encode())):
                member = tarfile.TarInfo(f"{number:06}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    assert list(find_images(tmp_path / "shard.tar", 4).labels) == labels


@pytest.mark.parametrize("name", ["../x.png", "/etc/x.png", "cat/../../x.png"])
def test_an_archive_that_leads_out_of_itself_is_refused(name, tmp_path):
    photos(tmp_path)
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        member = archive.gettarinfo(tmp_path / "cat" / "0.png")
        member.name = name
        with (tmp_path / "cat" / "0.png").open("rb") as stream:
            archive.addfile(member, stream)
    with pytest.raises(VitpruneError, match="leads out of the archive"):
        find_images(tmp_path / "a.tar", 1)


def test_links_in_an_archive_are_not_followed(tmp_path):
    (tmp_path / "secret.png").write_bytes(b"secret")
    photos(tmp_path / "data", ["cat"])
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(tmp_path / "data" / "cat", "cat")
        link = tarfile.TarInfo("cat/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "secret.png")
        archive.addfile(link)
    assert find_images(tmp_path / "a.tar", 1).files == ("cat/0.png", "cat/1.png")


def test_compressed_archives_are_refused_with_the_remedy(tmp_path):
    photos(tmp_path / "data", ["cat"])
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "data" / "cat", "cat")
    with pytest.raises(VitpruneError, match=r"not an uncompressed \.tar"):
        find_images(tmp_path / "a.tar.gz", 1)


def test_a_run_on_an_archive_goes_on_to_the_end(dense, tmp_path, capsys):
    data = photos(tmp_path / "data")
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.add(data, ".")
    for arguments in (
        ["discover", dense, "--data", tmp_path / "a.tar", "--method", "activation", "-o", tmp_path / "run"],
        [
            "prune",
            tmp_path / "run",
            "--ratio",
            "0.3",
            "--step",
            "1",
            "--compensate",
            "ridge",
            "-o",
            tmp_path / "pruned",
        ],
        ["evaluate", dense, "--data", tmp_path / "a.tar", "-o", tmp_path / "val"],
        ["report", tmp_path / "run", tmp_path / "val", "-o", tmp_path / "report.html"],
    ):
        assert main([*map(str, arguments)]) == 0
    assert "data:image/jpeg;base64" in (tmp_path / "report.html").read_text()
    assert main(["evaluate", str(tmp_path / "pruned"), "--data", str(data)]) == 2
    assert "8 of 8 evaluation images were calibration images" in capsys.readouterr().err


def test_a_sampled_run_converts_back(dense, tmp_path, capsys):
    data = tmp_path / "data"
    for place, name in enumerate(NAMES):
        (data / name).mkdir(parents=True)
        for number in range(6):
            picture(place * 50 + number).save(data / name / f"{number}.png")
    sample = ["--images-per-class", "2", "--seed", "3"]
    assert main(["discover", str(dense), "--data", str(data), *sample, "-o", str(tmp_path / "run")]) == 0
    assert main(["convert", str(tmp_path / "run"), "-o", str(tmp_path / "theirs" / "mine")]) == 0
    source = str(tmp_path / "theirs" / "mine.args.json")
    asked = ["--model", str(dense), "--data", str(data), "-o", str(tmp_path / "back")]
    assert main(["convert", source, *asked]) == 0
    before, after = vitprune.load_run(tmp_path / "run"), vitprune.load_run(tmp_path / "back")
    assert after.images == before.images
    assert torch.equal(after.found.neurons, before.found.neurons)


def test_timms_own_folder_reader_gives_the_same_pixels(tmp_path):
    photos(tmp_path)
    model = make_vit(num_classes=4)
    config = {**timm.data.resolve_model_data_config(model), "input_size": (3, 32, 32)}
    theirs = timm.data.ImageDataset(str(tmp_path), transform=timm.data.create_transform(**config, is_training=False))
    ((images, labels),) = ImageBatches(find_images(tmp_path, 4), model)
    assert labels.tolist() == [label for _image, label in theirs]
    assert torch.equal(images, torch.stack([image for image, _label in theirs]))

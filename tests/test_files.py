"""Whole or absent: nothing half-written, whatever happens in between."""

from __future__ import annotations

import resource

import pytest
import torch
from quick import start

from vitprune import VitpruneError
from vitprune.files import (
    atomic_file,
    atomic_folder,
    open_resumable,
    read_json,
    read_tensors,
    refuse_existing,
    write_json,
    write_tensors,
)


@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("atomic", [atomic_file, atomic_folder])
def test_a_failure_leaves_the_old_content(atomic, failure, tmp_path):
    target = tmp_path / "out"
    if atomic is atomic_file:
        target.write_text("old")
    else:
        target.mkdir()
        (target / "old").touch()
    with pytest.raises(failure), atomic(target) as temporary:
        (temporary if atomic is atomic_file else temporary / "new").write_text("half")
        raise failure
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert target.read_text() == "old" if atomic is atomic_file else [f.name for f in target.iterdir()] == ["old"]


def test_a_folder_is_replaced_whole(tmp_path):
    for content in ("first", "second"):
        with atomic_folder(tmp_path / "out") as temporary:
            (temporary / content).touch()
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["second"]


def test_tensors_and_facts_read_back_and_the_bytes_repeat(tmp_path):
    tensors, facts = {"b": torch.arange(3), "a": torch.eye(2)[:, :1]}, {"x": [1, 2], "ffns": ["a"]}
    for name in ("1", "2"):
        write_tensors(tmp_path / name, tensors, kind="paths", facts=facts)
    assert (tmp_path / "1").read_bytes() == (tmp_path / "2").read_bytes()
    got, got_facts = read_tensors(tmp_path / "1", kind="paths")
    assert torch.equal(got["a"], tensors["a"])
    assert got_facts["x"] == [1, 2]


def test_other_kinds_and_newer_versions_are_refused(tmp_path):
    write_tensors(tmp_path / "a", {"x": torch.zeros(1)}, kind="plan", facts={})
    with pytest.raises(VitpruneError, match="expected a vitprune file of kind 'paths', found 'plan'"):
        read_tensors(tmp_path / "a", kind="paths")
    write_json(tmp_path / "b", {"kind": "run", "version": 99})
    with pytest.raises(VitpruneError, match="format version 99 is newer"):
        read_json(tmp_path / "b", kind="run")
    (tmp_path / "c").write_text("{")
    with pytest.raises(VitpruneError, match="not a JSON file"):
        read_json(tmp_path / "c", kind="run")
    with pytest.raises(VitpruneError, match="not a safetensors file"):
        read_tensors(tmp_path / "c", kind="plan")
    with pytest.raises(VitpruneError, match="no such file"):
        read_tensors(tmp_path / "d", kind="plan")


def test_overwriting_spares_what_is_not_vitprunes(tmp_path):
    folder, owned = tmp_path / "run", frozenset({"run.json"})
    folder.mkdir()
    refuse_existing(folder, overwrite=False, owned=owned)
    (folder / "run.json").touch()
    with pytest.raises(VitpruneError, match="exists; choose another output or add `overwrite`"):
        refuse_existing(folder, overwrite=False, owned=owned)
    refuse_existing(folder, overwrite=True, owned=owned)
    (folder / "mine.txt").touch()
    with pytest.raises(VitpruneError, match=r"holds mine\.txt, which this command does not write"):
        refuse_existing(folder, overwrite=True, owned=owned)


def test_outputs_that_cannot_be_written_are_refused_beforehand(tmp_path):
    (tmp_path / "file").touch()
    for path, owned, message in (
        (tmp_path / "file", frozenset({"x"}), "is a file"),
        (tmp_path, None, "is a folder"),
        (tmp_path / "file" / "run", frozenset({"x"}), "file is not a folder"),
    ):
        with pytest.raises(VitpruneError, match=message):
            refuse_existing(path, overwrite=True, owned=owned)
    refuse_existing(tmp_path / "new" / "deep" / "run", overwrite=False, owned=frozenset())


def write_on_a_full_disk(path, kind):
    """In a process of its own: nothing takes such a limit back."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
    with pytest.raises(VitpruneError, match="no space left to write it; nothing was kept"), atomic_folder(path) as made:
        if kind == "json":
            write_json(made / "a", {"x": "y" * 50000})
        else:
            write_tensors(made / "a", {"x": torch.zeros(50000)}, kind="plan", facts={})


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs a file size limit")
@pytest.mark.parametrize("kind", ["json", "tensors"])
def test_a_full_disk_is_one_line_and_leaves_nothing(kind, tmp_path):
    process = start(write_on_a_full_disk, tmp_path / "out", kind)
    process.join()
    assert process.exitcode == 0
    assert list(tmp_path.iterdir()) == []


def test_a_run_killed_before_it_had_written_its_request_begins_anew(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / ".request.json.ab12cd34.json").write_text("{")
    assert open_resumable(folder, {"a": 1}, owned=frozenset(), overwrite=False) == folder
    assert sorted(path.name for path in folder.iterdir()) == ["request.json"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(VitpruneError, match="exists"):
        open_resumable(tmp_path / "other", {"a": 1}, owned=frozenset(), overwrite=False)

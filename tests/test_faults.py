"""Faults at random points: the short form of ``faults``."""

from __future__ import annotations

import faults
import pytest

NUM_FAULTS = 24
SEED = 7


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return faults.prepare(tmp_path_factory.mktemp("faults"))


@pytest.mark.parametrize("number", range(NUM_FAULTS))
def test_a_fault_loses_nothing(place, number):
    fault = faults.draw(number, SEED)
    print(f"python tests/faults.py --seed {SEED} --only {number}  # {fault}")
    assert faults.inject(place, fault) in ("undisturbed", "refused", "ended")


def test_the_harness_notices_half_of_a_file(place, tmp_path):
    """A check that cannot fail would be none."""
    wanted = place.references["prune"]
    got = tmp_path / "out"
    got.mkdir()
    for path in wanted.iterdir():
        (got / path.name).write_bytes(path.read_bytes())
    assert faults.same_files(got, wanted) is None
    weights = got / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert faults.same_files(got, wanted) == "model.safetensors differ"
    weights.unlink()
    assert "other files" in faults.same_files(got, wanted)

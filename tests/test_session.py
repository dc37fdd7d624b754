"""A session makes each thing once, and registries say what their rows need."""

from __future__ import annotations

import pytest
import torch
from conftest import make_vit

import vitprune
from vitprune import options
from vitprune.calibration.criteria import REGISTRY as CRITERIA
from vitprune.discovery.methods import REGISTRY as METHODS
from vitprune.pruning import session as session_module
from vitprune.pruning.compensations import REGISTRY as COMPENSATIONS
from vitprune.pruning.compensations import needed_statistics
from vitprune.pruning.session import Session

IMAGES = torch.randn(8, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(5))


class Counted:
    """Batches that count how often they are read to the end."""

    def __init__(self):
        self.passes = 0

    def __iter__(self):
        yield IMAGES, torch.arange(8) % 5
        self.passes += 1


@pytest.mark.parametrize(
    ("registry", "named"),
    [(COMPENSATIONS, options.COMPENSATIONS), (CRITERIA, options.CRITERIA), (METHODS, options.METHODS)],
)
def test_every_choice_has_its_row(registry, named):
    assert list(registry) == list(named)


def test_one_pass_measures_all_that_is_wanted():
    batches = Counted()
    wanted = needed_statistics(criteria=["obs", "taylor"], compensations=["sequential", "ridge"])
    session = Session(make_vit(), batches, wanted=wanted)
    assert batches.passes == 0  # nothing is made before it is asked for
    session.score("obs"), session.score("taylor"), session.token_weights
    assert batches.passes == 1


def test_blocks_are_studied_once(monkeypatch):
    studied = []
    study = session_module.study_blocks
    monkeypatch.setattr(session_module, "study_blocks", lambda *given: studied.append(1) or study(*given))
    session = Session(make_vit(), Counted())
    assert session.calls is session.calls
    assert studied == [1]


@pytest.mark.parametrize("name", COMPENSATIONS)
def test_a_compensation_lives_on_what_its_row_declares(name):
    """With those statistics alone, and with no images where it reads none."""
    model, row = make_vit(), COMPENSATIONS[name]
    plan = vitprune.plan_pruning(model, CRITERIA["magnitude"].score(model), criterion="magnitude", pruning_ratio=0.5)
    session = Session(model, Counted() if row.reads_images else None, wanted=row.statistics)
    result = row.apply(session, plan)
    assert result.state_dict().keys() == model.state_dict().keys()
    changed = [key for key, value in result.state_dict().items() if not torch.equal(value, model.state_dict()[key])]
    assert any(key.endswith("weight") for key in changed) == row.changes_weights
    assert bool(changed) == row.reads_images
    assert row.bridge in COMPENSATIONS
    assert COMPENSATIONS[row.bridge].stand_in is not None or not COMPENSATIONS[row.bridge].reads_images


def test_statistics_without_images_are_refused():
    with pytest.raises(vitprune.VitpruneError, match="needs calibration images; pass `batches`"):
        Session(make_vit(), wanted={"moments"}).statistics  # noqa: B018


def test_kinds_of_units_that_nobody_knows_are_refused(tmp_path):
    with pytest.raises(vitprune.VitpruneError, match="kinds of units are ffn, qk, vo, heads, layers, got 'experts'"):
        vitprune.find_groups(make_vit(), ["experts"])
    plan = vitprune.Plan({"blocks.0.moe": torch.ones(3).bool()}, kinds={"blocks.0.moe": "experts"})
    plan.write(tmp_path / "plan.safetensors")
    with pytest.raises(vitprune.VitpruneError, match=r"blocks\.0\.moe has units of kind 'experts'"):
        vitprune.read_plan(tmp_path / "plan.safetensors")

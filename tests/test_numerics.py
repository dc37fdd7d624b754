"""Numbers at the edge: nothing that varies, everything kept, a model that knows nothing, half precision."""

from __future__ import annotations

import pytest
import torch
from conftest import make_vit

import vitprune
from vitprune.options import COMPENSATIONS, CRITERIA

BATCHES = [(torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 5)]
OF_STATISTICS = [name for name in CRITERIA if name not in ("jas", "random", "magnitude")]


def with_dead(model, ffn, neurons):
    """Neurons that answer nothing, whatever the image: their rows and columns are zero."""
    mlp = model.get_submodule(ffn)
    with torch.no_grad():
        mlp.fc1.weight[neurons] = 0
        mlp.fc1.bias[neurons] = 0
        mlp.fc2.weight[:, neurons] = 0
    return model


@pytest.mark.parametrize("criterion", OF_STATISTICS)
def test_dead_neurons_go_first_and_cost_nothing(criterion):
    """A neuron that is zero for every image is worth the least that there is."""
    model = with_dead(make_vit().float(), "blocks.1.mlp", slice(0, 10))
    scores = vitprune.score_neurons(model, criterion, batches=BATCHES)["blocks.1.mlp"]
    assert bool(torch.isfinite(scores).all())
    assert scores[:10].max() <= scores[10:].min()
    pruned, plan = vitprune.prune(model, BATCHES, ratio=10 / 144, criterion=criterion, compensate="none", step=1)
    if criterion in ("obs", "fisher", "taylor", "integrated-gradients"):  # one ranking over all FFNs
        assert not bool(plan.keep["blocks.1.mlp"][:10].any())
        torch.testing.assert_close(pruned(BATCHES[0][0]), model(BATCHES[0][0]))


@pytest.mark.parametrize("compensate", COMPENSATIONS)
def test_an_ffn_that_never_varies_is_compensated_by_its_bias(compensate):
    """All its neurons are one constant: covariance zero, and nothing to solve for."""
    model = make_vit().float()
    with torch.no_grad():
        model.blocks[1].mlp.fc1.weight.zero_()
    pruned, _plan = vitprune.prune(model, BATCHES, ratio=0.5, compensate=compensate, step=1, allocation="uniform")
    assert all(bool(torch.isfinite(value).all()) for value in pruned.state_dict().values())
    assert bool(torch.isfinite(pruned(BATCHES[0][0])).all())


def test_one_image_is_enough_to_be_finite():
    """One image has no variance between images, but has its tokens'."""
    one = [(BATCHES[0][0][:1], BATCHES[0][1][:1])]
    pruned, _plan = vitprune.prune(make_vit().float(), one, ratio=0.5)
    assert bool(torch.isfinite(pruned(BATCHES[0][0])).all())


@pytest.mark.parametrize("parts", [["ffn"], ["ffn", "qk", "vo"]])
def test_ratio_0_is_the_dense_model(parts):
    model = make_vit().float()
    pruned, plan = vitprune.prune(model, BATCHES, ratio=0.0, parts=parts, compensate="none")
    assert plan.pruning_ratio == 0
    torch.testing.assert_close(pruned(BATCHES[0][0]), model(BATCHES[0][0]), rtol=1e-4, atol=1e-5)


def test_paths_of_all_neurons_are_all_neurons():
    """K = H: every neuron of every FFN, in the order of their scores."""
    found = vitprune.discover(make_vit().float(), BATCHES, top_k=48)
    assert found.neurons.shape == (6, 3, 48)
    assert torch.equal(found.neurons.sort(-1).values, torch.arange(48).expand(6, 3, 48))
    with pytest.raises(vitprune.VitpruneError, match="top_k"):
        vitprune.discover(make_vit().float(), BATCHES, top_k=49)


def test_a_class_without_images_has_no_path_and_breaks_nothing():
    images, labels = BATCHES[0][0], torch.tensor([0, 0, 0, 4, 4, 4])
    model = make_vit().float()
    found = vitprune.discover(model, [(images, labels)])
    assert sorted(vitprune.class_paths(found)) == [0, 4]
    pruned, _plan = vitprune.prune(model, [(images, labels)], criterion="jas", found=found, ratio=0.5)
    assert bool(torch.isfinite(pruned(images)).all())


def test_a_model_at_chance_is_pruned_and_evaluated():
    """All logits the same: every probability 1/C, no gradient of a label that is drawn from them vanishes."""
    model = make_vit().float()
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.zero_()
    # Whichever class stands for all of them, one or two of the six images are of it.
    assert vitprune.evaluate(model, BATCHES).top1 in (1 / 6, 2 / 6)
    scores = vitprune.score_neurons(model, "obs", batches=BATCHES)
    assert all(bool(torch.isfinite(each).all()) for each in scores.values())
    pruned, _plan = vitprune.prune(model, BATCHES, ratio=0.5)
    torch.testing.assert_close(pruned(BATCHES[0][0]), torch.zeros(6, 5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_pruned_as_single_is(dtype, tmp_path):
    """Sums are taken in more bits: the same units stay as in float32, but for near ties."""
    model = make_vit().float().to(dtype)
    vitprune.save(model, tmp_path / "half")
    loaded = vitprune.load(str(tmp_path / "half"))
    assert next(loaded.parameters()).dtype == dtype
    pruned, plan = vitprune.prune(loaded, BATCHES, ratio=0.5, step=1)
    _single, wanted = vitprune.prune(loaded.float(), BATCHES, ratio=0.5, step=1)
    assert next(pruned.parameters()).dtype == dtype
    same = sum(int((keep == wanted.keep[name]).sum()) for name, keep in plan.keep.items())
    assert same / 144 > 0.9
    assert bool(torch.isfinite(pruned(BATCHES[0][0].to(dtype))).all())

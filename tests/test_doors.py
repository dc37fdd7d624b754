"""Every door of the library: whatever model, batches or weights a stranger brings, right numbers or one clear line."""

from __future__ import annotations

import atexit
import functools
import inspect
import shutil
import tempfile
import warnings
from pathlib import Path

import pytest
import timm
import torch
from conftest import make_vit
from torch import nn

import vitprune
from vitprune.analysis.faithfulness import rank_alike
from vitprune.evaluation.accuracy import average_precision
from vitprune.wrappers import unwrap

DROP = {"drop_rate": 0.3, "proj_drop_rate": 0.2, "attn_drop_rate": 0.2}
MODELS = {"model", "compensated", "dense", "donor", "models"}


def parameters_of(name):
    value = getattr(vitprune, name)
    return set(inspect.signature(value).parameters) if inspect.isfunction(value) else set()


# What ``load`` calls a model is a name of one.
VERBS = sorted(name for name in vitprune.__all__ if MODELS & parameters_of(name) and name != "load")


def make_float_vit(**model_args):
    """Small and random, with dropout everywhere, so that train mode would show."""
    return make_vit(**{**DROP, **model_args}).float()


def make_batches(count: int = 6, num_classes: int = 5):
    images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return [(images[:4], torch.arange(4) % num_classes), (images[4:], torch.arange(count - 4) % num_classes)]


def half(model):
    return vitprune.plan_pruning(model, vitprune.score_neurons(model, "magnitude"), criterion="magnitude", ratio=0.5)


# Name -> a call of it, with a model and a folder to write to; of those that another one's result is needed for as well.
CALLS = {
    "analyze": lambda model, at: vitprune.analyze(model, {}),
    "apply_plan": lambda model, at: vitprune.apply_plan(model, half(model), compensate="ridge", batches=make_batches()),
    "bench": lambda model, at: vitprune.bench({"a": model}, backends=["torch-eager"], batch_sizes=[1], seconds=0.01),
    "choose_schedule": lambda model, at: vitprune.choose_schedule(model, make_batches(), 0.9, max_candidates=1),
    "compensate": lambda model, at: vitprune.compensate(model, half(model), statistics(model)),
    "compensate_sequentially": lambda model, at: vitprune.compensate_sequentially(
        model, half(model), make_batches(), towards_stream=True
    ),
    "count_macs": lambda model, at: vitprune.count_macs(model),
    "discover": lambda model, at: vitprune.discover(model, make_batches()).joint_scores,
    "discover_run": lambda model, at: vitprune.discover_run(model, None, at, source="x"),
    "distill": lambda model, at: vitprune.distill(model, model, half(model), make_batches(), num_steps=1),
    "export_program": lambda model, at: [
        vitprune.export_program(model, at / "model.pt2", make_batches()).max_abs_diff < 1e-4
    ],
    "as_open_clip": lambda model, at: vitprune.as_open_clip(model),
    "as_torchvision": lambda model, at: vitprune.as_torchvision(model),
    "save_transformers": lambda model, at: vitprune.save_transformers(model, at / "folder"),
    "embed": lambda model, at: vitprune.embed(model, make_batches()),
    "compare_embeddings": lambda model, at: vitprune.compare_embeddings(model, model, make_batches()).cosines,
    "evaluate": lambda model, at: vitprune.evaluate(model, make_batches()).correct,
    "export_onnx": lambda model, at: vitprune.export_onnx(model, at / "a.onnx", make_batches()).top1,
    "ffn_share": lambda model, at: vitprune.ffn_share(model),
    "fit_latency": lambda model, at: vitprune.fit_latency(model, []),
    "find_feed_forwards": lambda model, at: vitprune.find_feed_forwards(model),
    "find_groups": lambda model, at: vitprune.find_groups(model),
    "make_cards": lambda model, at: [
        card.activations
        for card in vitprune.make_cards(model, make_batches(), vitprune.discover(model, make_batches())).cards
    ],
    "record_activations": lambda model, at: vitprune.record_activations(
        model, make_batches(), vitprune.discover(model, make_batches())
    ),
    "measure_edges": lambda model, at: (
        vitprune.measure_edges(model, make_batches(), vitprune.discover(model, make_batches()), num_exact=0).scores
    ),
    "measure_faithfulness": lambda model, at: [
        row.kept
        for row in vitprune.measure_faithfulness(
            model, make_batches(), {("drawn", "all"): rank_alike({"blocks.0.mlp": torch.arange(48.0)})}, shares=[0.5]
        )
    ],
    "find_top_images": lambda model, at: [
        each.values for each in vitprune.find_top_images(model, make_batches(), {"blocks.0.mlp": [0]}).values()
    ],
    "info": lambda model, at: [each.macs_share for each in vitprune.info(model).parts],
    "keep_classes": lambda model, at: vitprune.keep_classes(model, [0, 1]),
    "make_elastic": lambda model, at: vitprune.make_elastic(model, make_batches(), ratios=[0.5], compensation="ridge"),
    "mask_neurons": lambda model, at: vitprune.mask_neurons(model, half(model)),
    "masked": lambda model, at: vitprune.masked(model, half(model)),
    "measure_front": lambda model, at: vitprune.measure_front(model, make_batches(), make_batches(4), [1.0], at),
    "measure_statistics": lambda model, at: statistics(model)["blocks.1.mlp"].mean_H,
    "new_classifier": lambda model, at: vitprune.new_classifier(model, ["a", "b"]),
    "open_teacher": lambda model, at: vitprune.open_teacher(model, None),
    "parse_schedule": lambda model, at: vitprune.parse_schedule("constant:2", model),
    "plan_paths": lambda model, at: vitprune.plan_paths(model, vitprune.discover(model, make_batches()), 4).widths,
    "plan_pruning": lambda model, at: half(model).widths,
    "predict": lambda model, at: [
        each.probabilities for each in vitprune.predict(model, [photos().root / "a" / "1.png"])
    ],
    "prune": lambda model, at: vitprune.prune(model, make_batches(), step=1)[1].widths,
    "prune_for_speed": lambda model, at: vitprune.prune_for_speed(model, make_batches(), 1.0),
    "prune_onnx": lambda model, at: vitprune.prune_onnx(at / "absent.onnx", half(model), at / "b.onnx", donor=model),
    "prune_within_drop": lambda model, at: vitprune.prune_within_drop(model, make_batches(), make_batches(4), 0.01),
    "record_curve": lambda model, at: vitprune.record_curve(
        model, make_batches(), make_batches(4), vitprune.Curve(["obs"], ["global"], ["ridge"]), at, ratios=[2.0]
    ),
    "recover": lambda model, at: [
        row.loss for row in vitprune.recover(model, photos(), teacher=model, training=ONE_EPOCH).rows
    ],
    "remove_neurons": lambda model, at: vitprune.remove_neurons(model, half(model)),
    "save": lambda model, at: vitprune.save(with_args(model), at / "saved"),
    "save_elastic": lambda model, at: vitprune.save_elastic(model, None, at / "elastic.safetensors"),
    "score_neurons": lambda model, at: vitprune.score_neurons(model, "obs", batches=make_batches())["blocks.0.mlp"],
    "set_image_size": lambda model, at: vitprune.set_image_size(model, 16),
    "set_merging": lambda model, at: vitprune.set_merging(model, [2, 0, 0]),
    "set_transform": lambda model, at: vitprune.set_transform(model, mean=0.4),
    "split_attention": lambda model, at: vitprune.split_attention(model),
    "target_latency": lambda model, at: vitprune.target_latency(model, 1.0, total=2.0, tables={}),
    "target_macs": lambda model, at: vitprune.target_macs(model, 1e5),
    "target_neurons": lambda model, at: vitprune.target_neurons(model, 0.5),
    "target_parameters": lambda model, at: vitprune.target_parameters(model, 1e4),
}


ONE_EPOCH = vitprune.Training(epochs=1, batch_size=2, losses={"answers": 1.0}, held_back=0.0)


@functools.cache
def photos():
    from PIL import Image

    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    (folder / "a").mkdir()
    for number in range(4):
        Image.new("RGB", (40, 40), (60 * number, 0, 0)).save(folder / "a" / f"{number}.png")
    return vitprune.find_images(folder, None)


def statistics(model):
    return vitprune.measure_statistics(model, vitprune.find_groups(model), make_batches(), {"moments"})


def with_args(model):
    from conftest import TINY

    model.model_args = TINY
    return model


def modes_of(model):
    return [module.training for module in model.modules()]


def test_every_verb_that_takes_a_model_is_a_door_and_is_called_here():
    """A new verb has to come through the same door, and to stand above."""
    assert set(CALLS) == set(VERBS)
    assert not [name for name in VERBS if not getattr(getattr(vitprune, name), "is_entry", False)]


def run_verb(name, model, folder):
    try:
        return CALLS[name](model, folder)
    except (vitprune.VitpruneError, AttributeError, TypeError, KeyError) as error:  # what it was given may not do
        return str(error)


@pytest.mark.parametrize("name", sorted(CALLS))
def test_a_verb_runs_in_eval_mode_and_gives_every_module_its_own_mode_back(name, tmp_path):
    model = make_float_vit().train()
    model.blocks[1].eval()
    before = modes_of(model)
    in_train = run_verb(name, model, tmp_path / "1")
    assert modes_of(model) == before
    in_eval = run_verb(name, make_float_vit().eval(), tmp_path / "2")
    if isinstance(in_train, torch.Tensor | tuple | dict | float | int | bool):
        torch.testing.assert_close(in_train, in_eval, rtol=0, atol=0)


def test_modes_come_back_after_an_exception_of_whatever_kind():
    model = make_float_vit().train()

    def batches():
        yield make_batches()[0]
        raise ZeroDivisionError

    for verb in (vitprune.evaluate, vitprune.prune, vitprune.discover):
        with pytest.raises(ZeroDivisionError):
            verb(model, batches())
        assert all(modes_of(model))


WEIGHTS = ["patch_embed.proj.weight", "blocks.1.mlp.fc2.bias", "norm.weight", "head.bias", "cls_token"]


@pytest.mark.parametrize("key", WEIGHTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_named_by_every_verb(key, value, tmp_path):
    model = make_float_vit()
    model.get_parameter(key).data.flatten()[0] = value
    asked = set(CALLS)
    for name in asked if (key, value != value) == ("head.bias", True) else ("evaluate", "save", "count_macs"):
        with pytest.raises(vitprune.VitpruneError, match=f"{key} holds NaN or infinity"):
            CALLS[name](model, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_mask_of_minus_infinity_is_no_broken_weight():
    model = make_float_vit()
    model.register_buffer("mask", torch.tensor([0.0, -float("inf")]))
    assert vitprune.evaluate(model, make_batches()).num_images == 6


def test_images_and_answers_that_are_no_numbers_are_named_by_their_batch():
    model, batches = make_float_vit(), make_batches()
    batches[1][0][1, 2, 5, 5] = float("nan")
    for verb in (vitprune.evaluate, vitprune.prune, vitprune.discover):
        with pytest.raises(vitprune.VitpruneError, match=r"images of batch 2 hold NaN or infinity \(image 1 of 2\)"):
            verb(model, batches)
    model.head.weight.data.fill_(3e38)
    for verb in (vitprune.evaluate, vitprune.prune, vitprune.discover):
        with pytest.raises(vitprune.VitpruneError, match="answers (NaN|infinity).* to batch 1"):
            verb(model, make_batches())


class Framework(nn.Module):
    """As training frameworks wrap a model."""

    def __init__(self, inner):
        super().__init__()
        self.model, self.loss = inner, nn.CrossEntropyLoss()

    def forward(self, images):
        return self.model(images)


class Headless(nn.Module):
    """A wrapper that has no forward pass of its own."""

    def __init__(self, inner):
        super().__init__()
        self.network = inner


class Normalise(nn.Module):
    def forward(self, images):
        return 2 * images - 1


PLAIN = {
    "data parallel": nn.DataParallel,
    "compiled": torch.compile,
    "framework": Framework,
    "headless": Headless,
    "sequence": lambda model: nn.Sequential(nn.Identity(), model),
    "averaged": torch.optim.swa_utils.AveragedModel,
    "twice": lambda model: Framework(torch.compile(nn.DataParallel(model))),
}


@pytest.mark.parametrize("wrapper", PLAIN)
def test_wrappers_that_change_nothing_are_taken_off(wrapper):
    model = make_float_vit()
    wrapped = PLAIN[wrapper](model)
    inner = unwrap(wrapped)
    assert inner is model or wrapper == "averaged"
    assert type(vitprune.prune(wrapped, make_batches(), step=1)[0]) is type(model)
    assert vitprune.evaluate(wrapped, make_batches()).correct == vitprune.evaluate(model, make_batches()).correct


def test_wrappers_that_do_more_are_evaluated_as_they_are_and_refused_elsewhere():
    model = make_float_vit()
    wrapped = nn.Sequential(Normalise(), model)
    expected = vitprune.evaluate(model, [(2 * images - 1, labels) for images, labels in make_batches()])
    assert vitprune.evaluate(wrapped, make_batches()).correct == expected.correct
    for verb in (vitprune.prune, vitprune.discover):
        with pytest.raises(vitprune.VitpruneError, match=r"Sequential holds a VisionTransformer \('1'\)"):
            verb(wrapped, make_batches())


IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(3))
LABELS = torch.arange(4)


@pytest.mark.parametrize(
    "batch",
    [
        {"image": IMAGES, "label": LABELS},
        {"pixel_values": IMAGES, "labels": LABELS},
        {"id": ["a"], "images": IMAGES, "target": LABELS.tolist()},
        (IMAGES.double(), LABELS.int()),
        [IMAGES.half().float(), LABELS.float()],
        (IMAGES.numpy(), LABELS.numpy()),
        (IMAGES, LABELS.unsqueeze(1)),
    ],
    ids=range(7),
)
def test_batches_of_other_shapes_give_the_same_answers(batch):
    model = make_float_vit()
    same = [IMAGES.half().float() if isinstance(batch, list) else IMAGES, LABELS]
    assert vitprune.evaluate(model, [batch]).correct == vitprune.evaluate(model, [same]).correct


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([{"picture": IMAGES}], "entries picture"),
        ([(IMAGES, LABELS, LABELS)], "3 entries"),
        ([(IMAGES[0], LABELS)], r"are \[3, 32, 32\]"),
        ([((IMAGES * 50).byte(), LABELS)], "uint8"),
        ([(IMAGES, LABELS[:3])], "4 images and 3 labels"),
        ([(IMAGES, LABELS + 3)], "label 5 in batch 1 is none of the model's 5 classes"),
        ([(IMAGES, LABELS - 1)], "label -1 in batch 1"),
        ([(IMAGES, nn.functional.one_hot(LABELS, 5))], "one-hot"),
        ([(IMAGES, torch.full((4, 5), 0.2))], "shares of classes"),
        ([(IMAGES, LABELS + 0.5)], "no whole numbers"),
        ([(IMAGES, ["a", "b", "c", "d"])], "labels of batch 1 are a list"),
        ([IMAGES], "needs labels, and batch 1 has none"),
        ((IMAGES, LABELS), "one pair"),
        ("photos", "is a str"),
        ([], "no images"),
        (iter(()), "without any batch left"),
        ([(IMAGES[:, :1], LABELS)], r"images are \[1, 32, 32\], VisionTransformer reads \[3, 32, 32\]"),
        ([(torch.zeros(4, 3, 48, 48), LABELS)], r"images are \[3, 48, 48\]"),
    ],
    ids=range(18),
)
def test_batches_that_mean_nothing_are_refused_in_one_line(batches, message):
    with pytest.raises(vitprune.VitpruneError, match=message) as refusal:
        vitprune.evaluate(make_float_vit(), batches)
    assert "\n" not in str(refusal.value)


def test_images_alone_are_enough_where_labels_are_not_used(tmp_path):
    model = make_float_vit()
    alone, labelled = (vitprune.prune(model, [batch], step=1)[1] for batch in (IMAGES, (IMAGES, LABELS)))
    assert alone.widths == labelled.widths
    assert vitprune.export_onnx(model, tmp_path / "a.onnx", [IMAGES]).top1 is None
    with pytest.raises(vitprune.VitpruneError, match="criterion taylor needs labels"):
        vitprune.prune(model, [IMAGES], criterion="taylor")


def test_an_iterator_is_read_as_often_as_a_list_or_refused(monkeypatch):
    model = make_float_vit()
    expected = vitprune.prune(model, make_batches())[1].widths
    assert vitprune.prune(model, (batch for batch in make_batches()))[1].widths == expected
    monkeypatch.setattr("vitprune.batches.KEPT_BYTES", 10)
    with pytest.raises(vitprune.VitpruneError, match="can be read only once"):
        vitprune.prune(model, iter(make_batches()))


def test_one_output_is_two_classes():
    """Softmax over [0, z] is what the sigmoid of z is: a head with two outputs answers the same."""
    one = make_float_vit(num_classes=1)
    two = make_float_vit(num_classes=2)
    two.load_state_dict({key: value for key, value in one.state_dict().items() if "head" not in key}, strict=False)
    with torch.no_grad():
        two.head.weight.copy_(torch.cat([torch.zeros_like(one.head.weight), one.head.weight]))
        two.head.bias.copy_(torch.cat([torch.zeros_like(one.head.bias), one.head.bias]))
    batches = make_batches(num_classes=2)
    assert vitprune.evaluate(one, batches) == vitprune.evaluate(two, batches)
    first, second = (vitprune.discover(each, batches) for each in (one, two))
    torch.testing.assert_close(first.joint_scores, second.joint_scores)
    assert torch.equal(first.neurons, second.neurons)
    assert torch.equal(first.predictions, second.predictions)
    for wanted in ("taylor", "integrated-gradients"):
        scores = [vitprune.score_neurons(each, wanted, batches=batches)["blocks.0.mlp"] for each in (one, two)]
        torch.testing.assert_close(*scores, rtol=1e-4, atol=1e-6)


def test_the_fisher_information_of_sigmoids_is_that_of_their_labels():
    """Summed exactly over both answers of every output, against the estimate from many signs."""
    from vitprune.answer_loss import draw_class_directions

    logits = torch.tensor([[0.5, -1.0, 2.0]], dtype=torch.float64).expand(40000, 3)
    drawn = draw_class_directions(logits, torch.Generator().manual_seed(0), several=True)
    share = logits[0].sigmoid()
    second_moment = drawn.T @ drawn / len(drawn)
    torch.testing.assert_close(second_moment, torch.diag(share * (1 - share)), rtol=0.02, atol=0.01)


def test_several_classes_for_one_image_have_a_mean_average_precision_and_no_paths():
    model = make_float_vit()
    hot = torch.tensor([[1, 0, 0, 1, 0], [0, 1, 0, 1, 0], [1, 1, 0, 0, 0], [0, 0, 0, 1, 1.0]])
    with torch.inference_mode():
        logits = model(IMAGES)
    accuracy = vitprune.evaluate(model, [(IMAGES[:2], hot[:2]), (IMAGES[2:], hot[2:])])
    by_hand = {}
    for index in (0, 1, 3, 4):
        ranked = logits[:, index].argsort(descending=True).tolist()
        hits = [place for place, image in enumerate(ranked, 1) if hot[image, index]]
        by_hand[index] = sum(found / place for found, place in enumerate(hits, 1)) / len(hits)
    assert accuracy.average_precision_by_class == pytest.approx(by_hand)
    assert accuracy.mean_average_precision == pytest.approx(sum(by_hand.values()) / 4)
    for criterion in ("fisher", "taylor", "obs"):
        assert vitprune.prune(model, [(IMAGES, hot)], criterion=criterion, step=1)[1].pruning_ratio >= 0.5
    with pytest.raises(vitprune.VitpruneError, match="a path is about one class"):
        vitprune.discover(model, [(IMAGES, hot)])
    with pytest.raises(vitprune.VitpruneError, match="bring one kind"):
        vitprune.evaluate(model, [(IMAGES, hot), (IMAGES, LABELS)])


def test_images_of_one_score_come_together():
    scores, belongs = torch.tensor([1.0, 1.0, 0.0]), torch.tensor([True, False, True])
    assert average_precision(scores, belongs) == average_precision(scores, belongs[[1, 0, 2]])


class Answers(nn.Module):
    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, images):
        return self.answer(images)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda images: (images.flatten(1), images), "answers a tuple"),
        (lambda images: {"logits": images.flatten(1)}, "answers a dict"),
        (lambda images: images.flatten(2).transpose(1, 2), r"answers \[4, 1024, 3\]"),
        (lambda images: images, r"answers \[4, 3, 32, 32\]"),
        (lambda images: images.flatten(1)[0], r"answers \[3072\]"),
    ],
    ids=["tuple", "dict", "tokens", "map", "one"],
)
def test_answers_that_are_no_logits_are_refused(answer, message):
    for model in (answer, Answers(answer)):
        with pytest.raises(vitprune.VitpruneError, match=message):
            vitprune.evaluate(model, [(IMAGES, LABELS)])


def test_a_model_without_pooling_is_pruned_by_its_tokens_and_not_exported(tmp_path):
    model = make_float_vit(global_pool="")
    batches = make_batches()
    vitprune.prune(model, batches, criterion="variance", compensate="ridge")
    with pytest.raises(vitprune.VitpruneError, match="build it with a pooling"):
        vitprune.prune(model, batches)
    with pytest.raises(vitprune.VitpruneError, match="build it with a pooling"):
        vitprune.export_onnx(model, tmp_path / "a.onnx", batches)
    assert not list(tmp_path.iterdir())


def test_probabilities_are_taken_as_they_are():
    model = make_float_vit()
    plain, ends = (vitprune.evaluate(each, make_batches()) for each in (model, nn.Sequential(model, nn.Softmax(1))))
    assert (plain.are_shares, ends.are_shares) == (False, True)
    assert plain.correct == ends.correct
    assert "probabilities" in str(ends)


def test_one_parameter_has_two_words_and_is_given_once():
    model = make_float_vit()
    assert vitprune.prune(model, make_batches(), ratio=0.25, compensate="ridge", step=1)[1].pruning_ratio == 0.25
    assert vitprune.prune(model, make_batches(), pruning_ratio=0.25, compensation="ridge", step=1)[1].widths
    for both in ({"ratio": 0.5, "pruning_ratio": 0.5}, {"compensate": "ridge", "compensation": "ridge"}):
        with pytest.raises(vitprune.VitpruneError, match="give it once"):
            vitprune.prune(model, make_batches(), **both)


def test_progress_is_said_where_it_is_asked_for(capsys):
    vitprune.prune(make_float_vit(), make_batches(), step=1)
    assert capsys.readouterr().err == ""
    vitprune.prune(make_float_vit(), make_batches(), step=1, progress=True)
    assert "rank neurons 3/3" in capsys.readouterr().err


def test_warnings_of_other_libraries_stay_inside():
    model = make_float_vit()
    model.head.register_forward_hook(lambda *_: warnings.warn("old", FutureWarning, stacklevel=1))
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        vitprune.evaluate(model, make_batches())
    assert not heard


def test_other_timm_models_take_train_mode_too():
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32, num_classes=5, drop_path_rate=0.9)
    assert model.training
    first, second = (vitprune.evaluate(model, make_batches()).correct for _ in range(2))
    assert first == second

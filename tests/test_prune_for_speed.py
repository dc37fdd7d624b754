"""As fast as asked for: times follow from shapes, the least loss is taken, and what cannot be is refused beforehand."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import make_vit

import vitprune
from vitprune import VitpruneError
from vitprune.images.resized_batches import resize_batches
from vitprune.models.attention import split_attention
from vitprune.models.left_out import describe_left_out
from vitprune.models.merging import describe_merging, set_merging
from vitprune.pruning.choose_tokens import ask_dense, weigh
from vitprune.pruning.latency_model import RATES, LatencyModel, fit_rates, shape_of, target_time
from vitprune.pruning.meters import MACS
from vitprune.speed.fit_latency import Fitted, Format, Writer, list_formats, sample_shapes
from vitprune.speed.prune_for_speed import prune_for_speed
from vitprune.speed.speed_reach import check_reach
from vitprune.views import num_patches

SIZES = {"embed_dim": 48, "patch_size": 4, "depth": 4}
EAGER = Format("torch-eager")
KINDS = ["ffn", "qk", "vo"]


def make_latency(seed=0, **changed):
    rates = dict(zip(RATES, np.random.default_rng(seed).uniform(0.5, 2, len(RATES)), strict=True))
    sizes = {"model": 1, "layers": 0.1, "merges": 0.1, "steps": 1e-5, "softmax": 1e-5}
    rates = {name: float(value) * sizes.get(name, 1e-6) for name, value in rates.items()} | changed
    return LatencyModel("torch-eager", "float32", tuple(rates[name] for name in RATES), reads_last_block=True)


def test_rates_are_found_again_from_the_times_of_the_shapes_that_are_sampled():
    latency = make_latency()
    samples = list(sample_shapes(make_vit(**SIZES), 24))
    shapes = [shape_of(each, reads_last_block=True) for each in samples]
    rates, error = fit_rates(shapes, [latency.of_shape(shape) for shape in shapes])
    assert error < 1e-6
    others = [shape_of(each, reads_last_block=True) for each in sample_shapes(make_vit(**SIZES), 12, seed=5)]
    fitted = LatencyModel("torch-eager", "float32", rates, reads_last_block=True)
    for shape in others:
        assert fitted.of_shape(shape) == pytest.approx(latency.of_shape(shape), rel=1e-4)


def test_rates_of_products_alone_count_multiply_accumulates():
    """With the price of a multiply-accumulate for every product, time differs from MACs by what never changes."""
    products = dict.fromkeys(("projections", "attention", "ffn"), 1.0)
    rates = {name: products.get(name, 0.0) for name in RATES}
    latency = LatencyModel("torch-eager", "float32", tuple(rates.values()), reads_last_block=True)
    model = make_vit(**SIZES)
    samples = [each for each in sample_shapes(model, 12) if reads_all_tokens(each, model)]
    assert len(samples) > 3
    beside = {round(vitprune.count_macs(each) - latency.predict(each)) for each in samples}
    assert len(beside) == 1


def reads_all_tokens(sample, model):
    return describe_merging(sample) is None and num_patches(sample) == num_patches(model)


@pytest.mark.parametrize("schedule", [None, [10, 0, 7, 0]])
def test_a_target_costs_what_the_whole_model_is_predicted_to_take(schedule):
    latency, model = make_latency(1), split_attention(make_vit(**SIZES))
    model = model if schedule is None else set_merging(model, schedule)
    target = target_time(model, latency.predict(model) * 0.9, latency=latency, kinds=KINDS)
    assert target.dense == pytest.approx(latency.predict(model))
    whole = [each for each in sample_shapes(make_vit(**SIZES), 20) if not describe_left_out(each)]
    for narrow in (each for each in whole if reads_all_tokens(each, make_vit(**SIZES))):
        narrow = split_attention(narrow if schedule is None else set_merging(narrow, schedule))
        groups = vitprune.find_groups(narrow, KINDS)
        predicted = target.predict({group.name: group.num_units for group in groups})
        assert predicted == pytest.approx(latency.predict(narrow))


def test_the_share_of_a_schedule_is_that_of_the_merged_model():
    latency, model = make_latency(2), make_vit(**SIZES)
    share = latency.meter().share_of(model)
    for schedule in ([0, 0, 0, 0], [20, 0, 10, 0], [5, 5, 5, 5]):
        merged = latency.predict(set_merging(model, schedule))
        assert share(schedule) == pytest.approx(merged / latency.predict(model))
    assert MACS.share_of is None


def make_batches(num_batches=2, num_images=16):
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(num_images, 3, 32, 32, dtype=torch.float64, generator=generator), torch.arange(num_images) % 5)
        for _ in range(num_batches)
    ]


@pytest.fixture(scope="module")
def fast():
    """A model pruned for a machine that takes longer for merging, and less for FFNs, than the fit believes."""
    model, believed = make_vit(**SIZES), make_latency(3)
    rates = dict(zip(RATES, believed.rates, strict=True))
    true = make_latency(3, ffn=rates["ffn"] * 0.9, merges=rates["merges"] * 2)

    def measure(other, _format):
        return [true.predict(model) / true.predict(other)] * 2

    options = {
        "formats": [EAGER],
        "batch_sizes": [1, 8],
        "fitted": Fitted(believed.predict(model), {EAGER: believed}, EAGER),
    }
    return model, true, prune_for_speed(model, make_batches(), 1.3, step=0.5, measure=measure, **options)


def test_the_speed_is_reached_though_the_fit_was_wrong(fast):
    model, true, result = fast
    assert true.predict(model) / true.predict(result.model) >= 1.3 * 0.985
    assert result.speedup == pytest.approx(true.predict(model) / true.predict(result.model))
    assert result.predicted_speedup == pytest.approx(result.speedup, rel=0.03)


def test_the_first_candidates_meet_the_speed_by_the_fit_and_the_least_loss_is_taken(fast):
    model, _true, result = fast
    assert len(result.candidates) > 1
    assert [each.loss for each in result.candidates] == sorted(each.loss for each in result.candidates)
    assert all(each.predicted_speedup >= 1.3 * (1 - 1e-9) for each in result.candidates)
    (chosen,) = (each for each in result.candidates if each.chosen)
    assert chosen.measured_speedup is not None
    assert result.plan.facts.merge == chosen.merge
    assert result.plan.facts.sizes_dense.macs == vitprune.count_macs(model)
    assert result.speedup == min(result.speedups)


def test_an_encoder_gets_as_fast_as_asked_for_at_the_least_cosine_distance():
    model, latency = make_vit(**{**SIZES, "num_classes": 0}), make_latency(3)
    options = {"formats": [EAGER], "fitted": Fitted(latency.predict(model), {EAGER: latency}, EAGER), "step": 1}

    def measure(other, _format):
        return [latency.predict(model) / latency.predict(other)]

    result = prune_for_speed(model, make_batches(), 1.3, measure=measure, **options)
    assert latency.predict(model) / latency.predict(result.model) >= 1.3 * 0.985
    assert all(0 <= each.loss <= 2 for each in result.candidates)
    assert result.model.num_classes == 0


def test_a_result_that_is_faster_than_asked_for_is_pruned_more_mildly():
    model, latency = make_vit(**SIZES), make_latency(3)
    asked, timed = 1.3, []

    def measure(other, _format):
        timed.append(other)
        # What is pruned at last is faster than its candidate told.
        return [(1.06 if len(timed) > 1 else 1.0) * latency.predict(model) / latency.predict(other)]

    fitted = Fitted(latency.predict(model), {EAGER: latency}, EAGER)
    options = {"formats": [EAGER], "fitted": fitted, "measure": measure, "step": 1}
    result = prune_for_speed(model, make_batches(), asked, parts=["ffn", "qk"], **options)
    # Widths are timed before weights are fitted to them, and so only once; twice where they turn out off.
    _candidate, first, again, second, last = timed
    assert first is again
    assert result.model is last
    assert latency.predict(first) < latency.predict(last)
    assert vitprune.count_macs(second) == vitprune.count_macs(last)
    assert asked * 0.985 <= result.speedup <= asked * 1.02


@pytest.mark.parametrize(("wrong_by", "num_pruned"), [(0.975, 1), (1.035, 1), (0.9, 2)])
def test_a_result_is_not_pruned_again_for_the_noise_of_one_measurement(wrong_by, num_pruned):
    """It is timed once more, its widths were timed before: all draws decide; what is told is of the last two."""
    model, latency = make_vit(**SIZES), make_latency(3)
    timed = []

    def measure(other, _format):
        timed.append(other)
        # The candidate, its widths, and what was pruned to them; with the next widths the noise is gone.
        return [(wrong_by if len(timed) == 3 else 1.0) * latency.predict(model) / latency.predict(other)]

    fitted = Fitted(latency.predict(model), {EAGER: latency}, EAGER)
    options = {"formats": [EAGER], "fitted": fitted, "measure": measure, "step": 1}
    result = prune_for_speed(model, make_batches(), 1.3, parts=["ffn", "qk"], **options)
    assert vitprune.count_macs(timed[1]) == vitprune.count_macs(timed[2])
    assert timed[2] is timed[3]
    assert len(timed) == 4 if num_pruned == 1 else len(timed) > 4
    if num_pruned == 1:
        assert result.speedup == pytest.approx(wrong_by**0.5 * 1.3, rel=0.01)


def test_merging_that_turns_out_too_slow_is_known_before_anything_is_pruned(monkeypatch):
    """Its candidate was timed as fast enough; a second draw says it is not, and units go as well."""
    model, latency = make_vit(**SIZES), make_latency(3)
    timed, pruned = [], []

    def measure(other, _format):
        timed.append(other)
        return [(1.0 if len(timed) == 1 else 0.95) * latency.predict(model) / latency.predict(other)]

    def count(*args, **kwargs):
        pruned.append(args)
        return vitprune.prune(*args, **kwargs)

    monkeypatch.setattr("vitprune.speed.prune_for_speed.prune", count)
    fitted = Fitted(latency.predict(model), {EAGER: latency}, EAGER)
    options = {"formats": [EAGER], "fitted": fitted, "measure": measure, "step": 1}
    result = prune_for_speed(model, make_batches(), 1.5, parts=["tokens", "qk"], **options)
    (chosen,) = (each for each in result.candidates if each.chosen)
    assert vitprune.count_macs(timed[0]) == vitprune.count_macs(set_merging(model, chosen.merge))
    assert result.speedup >= 1.5 * 0.985
    assert not all(bool(keep.all()) for keep in result.plan.only("qk").keep.values())
    assert len(pruned) == 1


@pytest.mark.parametrize("faster", [1.0, 1.25])
def test_merging_that_turns_out_much_faster_is_looked_for_anew(faster):
    """The fit took merged models for slower than they are: a milder schedule is as fast as asked for."""
    model, latency = make_vit(**SIZES), make_latency(3)

    def measure(other, _format):
        return [faster * latency.predict(model) / latency.predict(other)]

    fitted = Fitted(latency.predict(model), {EAGER: latency}, EAGER)
    options = {"formats": [EAGER], "fitted": fitted, "measure": measure, "step": 1}
    result = prune_for_speed(model, make_batches(), 1.5, parts=["tokens"], **options)
    (chosen,) = (each for each in result.candidates if each.chosen)
    assert result.speedup >= 1.5 * 0.985
    others = [each for each in result.candidates if not each.chosen]
    if faster == 1.0:
        assert len(result.candidates) == 1
    else:
        assert min(sum(each.merge) for each in others) > sum(chosen.merge)
        assert all(chosen.loss < each.loss for each in others)


@pytest.mark.parametrize(
    ("speedup", "options", "message"),
    [
        (1.0, {}, "speedup must be above 1"),
        (float("nan"), {}, "speedup must be above 1"),
        (None, {}, "either `speedup` or `latency_ms`"),
        (2.0, {"latency_ms": 3.0}, "either `speedup` or `latency_ms`"),
        (None, {"latency_ms": -1.0}, "latency_ms must be above 0"),
        (None, {"latency_ms": 1e6}, "the dense model takes .* already"),
        (1000.0, {}, "out of reach: with next to nothing left .* ask for less"),
        (4.0, {"parts": ["qk"]}, "out of reach: .* let ffn, vo, layers, tokens, pixels go as well"),
        (2.0, {"parts": ["nothing"]}, "parts must be one of"),
    ],
)
def test_what_cannot_be_is_refused_before_images_are_read(speedup, options, message):
    model, latency = make_vit(**SIZES), make_latency(3)
    fitted = Fitted(latency.predict(model), {EAGER: latency}, EAGER)

    class Unread:
        def __iter__(self):
            raise AssertionError("images were read")

    with pytest.raises(VitpruneError, match=message):
        prune_for_speed(model, Unread(), speedup, formats=[EAGER], fitted=fitted, **options)


def test_a_fit_that_gives_nothing_for_an_empty_model_sets_no_limit():
    """Non-negative rates are often 0: what all shapes share may be told by what they share beside it."""
    model = make_vit(**SIZES)
    latency = make_latency(3, model=0.0, layers=0.0, steps=0.0, merges=0.0, matching=0.0)
    fitted = Fitted(latency.predict(model), {EAGER: latency}, EAGER)
    check_reach(model, 1.5, ["ffn", "qk", "vo", "layers", "tokens"], fitted, [EAGER], 0.02)


def test_formats_are_float32_first_and_then_what_a_backend_of_files_has():
    assert list_formats(["torch-eager", "onnxruntime-cpu"], ["int8"]) == [
        EAGER,
        Format("onnxruntime-cpu"),
        Format("onnxruntime-cpu", "int8"),
    ]
    with pytest.raises(VitpruneError, match="torch-eager has no int8"):
        list_formats(["torch-eager"], ["int8"])
    assert list_formats(["onnxruntime-cpu", "openvino"], ["int8"])[2:] == [
        Format("onnxruntime-cpu", "int8"),
        Format("openvino", "int8"),
    ]
    with pytest.raises(VitpruneError, match="openvino has no float16"):
        list_formats(["openvino"], ["float16"])


def test_candidates_are_kept_beside_the_model(fast, tmp_path):
    from vitprune.speed.speed_folder import SPEED_FILES, load_speed, save_for_speed

    _model, _true, result = fast
    save_for_speed(result, tmp_path / "fast")
    assert {path.name for path in (tmp_path / "fast").iterdir()} == SPEED_FILES
    record = load_speed(tmp_path / "fast")
    assert record.candidates == result.candidates
    assert record.facts["asked_speedup"] == 1.3
    image = make_batches()[0][0]
    with torch.no_grad():
        assert torch.equal(vitprune.load(tmp_path / "fast")(image), result.model(image))
    json.loads((tmp_path / "fast" / "speed.json").read_text())


def test_a_report_shows_the_candidates(fast, tmp_path):
    from vitprune.cli import main
    from vitprune.speed.speed_folder import save_for_speed

    save_for_speed(fast[2], tmp_path / "fast")
    assert main(["report", str(tmp_path / "fast"), "-o", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "It was to be 1.30 times as fast in torch-eager" in page
    assert "candidates" in page


@pytest.fixture(scope="module")
def budget():
    """A model whose machine is as the fit believes, and images to judge by that it answers rightly, most of them."""
    model, latency = make_vit(**SIZES), make_latency(3)
    generator = torch.Generator().manual_seed(11)
    images = torch.randn(300, 3, 32, 32, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        labels = torch.cat([model(part).argmax(1) for part in images.split(50)])
    evaluation = list(zip(images.split(50), labels.split(50), strict=True))

    def measure(other, _format):
        return [latency.predict(model) / latency.predict(other)]

    options = {
        "formats": [EAGER],
        "fitted": Fitted(latency.predict(model), {EAGER: latency}, EAGER),
        "measure": measure,
    }
    return model, evaluation, {**options, "step": 1}


def test_the_fastest_within_a_drop_is_found(budget):
    model, evaluation, options = budget
    found = vitprune.prune_within_drop(model, make_batches(), evaluation, 0.5, **options)
    assert found.dense_top1 == 1
    within = [each for each in found.tried if each.within]
    assert found.result.speedup == max(each.speedup for each in within)
    for each in found.tried:
        assert each.within == (each.drop_bound is not None and each.drop_bound <= 0.5)
    accuracy = vitprune.evaluate(found.result.model, resize_batches(evaluation, found.result.model))
    assert accuracy.top1 == next(each.top1 for each in within if each.speedup == found.result.speedup)
    asked = [each.asked_speedup for each in found.tried]
    assert asked[0] == 1.5
    assert len(set(asked)) == len(asked)


def test_a_budget_that_nothing_meets_and_images_that_cannot_tell_are_refused(budget):
    model, evaluation, options = budget
    with pytest.raises(VitpruneError, match="no speed-up of 1.25 or more is within it; the least upper bound"):
        vitprune.prune_within_drop(model, make_batches(), evaluation, 0.01, **options)
    with pytest.raises(VitpruneError, match="300 images cannot prove it even of an unchanged model; 539 can"):
        vitprune.prune_within_drop(model, make_batches(), evaluation, 0.005, **options)
    with pytest.raises(VitpruneError, match="max_drop must be in"):
        vitprune.prune_within_drop(model, make_batches(), evaluation, 0.0, **options)


@pytest.mark.parametrize("max_drop", [0.005, 0.01, 0.02, 0.1])
def test_as_many_images_are_asked_for_as_it_takes(max_drop):
    from vitprune.evaluation.accuracy import drop_bound
    from vitprune.evaluation.prune_within_drop import images_needed

    def bound(count):
        one = torch.zeros(1, 2)
        one[0, 0] = 1
        images = [(torch.zeros(count, 1, 1, 1), torch.zeros(count, dtype=torch.int64))]
        accuracy = vitprune.evaluate(lambda x: one.expand(len(x), 2), images)
        return drop_bound(accuracy, accuracy)

    needed = images_needed(max_drop)
    assert bound(needed) <= max_drop < bound(needed - 1)


def test_an_8_bit_candidate_is_weighed_as_its_file_answers(tmp_path):
    from vitprune.answer_loss import mean_divergence
    from vitprune.speed.speed_candidates import _open, open_as

    model, batches = make_vit(**SIZES).float(), [(images.float(), labels) for images, labels in make_batches()]
    file = open_as(model, Format("onnxruntime-cpu", "int8"), Writer(tmp_path), "model")
    assert isinstance(file, type(_open(model, next(tmp_path.glob("*int8.onnx")), "onnxruntime-cpu")))
    weighed = weigh(model, batches, (), ridge=1e-3)
    loss = ask_dense(model, weighed.kept_back).loss_of(file)
    with torch.no_grad():
        assert loss == mean_divergence(model, file, [images for images, _labels in weighed.kept_back])
    assert 0 < loss < 1


class Killed(Exception):
    pass


@pytest.mark.parametrize("kill_at", [1, 2])
def test_a_killed_call_ends_as_an_undisturbed_one(kill_at, tmp_path):
    """Killed before the candidate is timed, and before the result is; true times stand for measured ones."""
    model, believed = make_vit(**SIZES), make_latency(3)
    true = make_latency(3, ffn=dict(zip(RATES, believed.rates, strict=True))["ffn"] * 2.5)
    fitted = Fitted(believed.predict(model), {EAGER: believed}, EAGER)
    calls, made = [], []

    def measure(other, _format):
        calls.append(other)
        if len(calls) == kill_at:
            raise Killed
        return [true.predict(model) / true.predict(other)]

    def call(folder, batches):
        options = {"formats": [EAGER], "fitted": fitted, "measure": measure, "step": 1, "stages": folder}
        return prune_for_speed(model, batches, 1.3, **options)

    class Counted(list):
        def __iter__(self):
            made.append(self)
            return super().__iter__()

    folder = tmp_path / "stages"
    with pytest.raises(Killed):
        call(folder, make_batches())
    result = call(folder, Counted(make_batches()))
    passes = len(made)
    undisturbed = call(None, Counted(make_batches()))
    assert result.candidates == undisturbed.candidates
    assert result.speedups == undisturbed.speedups
    assert result.predicted_speedup == undisturbed.predicted_speedup
    with torch.no_grad():
        for images, _labels in resize_batches(make_batches(), result.model):
            assert torch.equal(result.model(images), undisturbed.model(images))
    # What was finished is not done again: of the images, nothing is weighed anew once a candidate was taken.
    assert passes < len(made) - passes or kill_at == 1
    made.clear()
    again = call(folder, Counted(make_batches()))
    assert again.speedups == result.speedups
    assert not made


def test_a_folder_of_something_else_is_no_place_for_stages(tmp_path):
    model, latency = make_vit(**SIZES), make_latency(3)
    (tmp_path / "curve.json").write_text("{}")
    fitted = Fitted(latency.predict(model), {EAGER: latency}, EAGER)
    with pytest.raises(VitpruneError, match="exists; choose another output"):
        prune_for_speed(model, make_batches(), 1.3, formats=[EAGER], fitted=fitted, stages=tmp_path)
    assert (tmp_path / "curve.json").exists()

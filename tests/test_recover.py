"""Training after pruning: as a plain loop does it, killed or not, on one process or two; nothing pruned comes back."""

from __future__ import annotations

import copy
import json
import math
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import timm
import torch
from conftest import TINY, make_vit
from families import half_plan
from quick import run_on_processes

import vitprune
from vitprune import VitpruneError
from vitprune.data import find_images, hash_images
from vitprune.models.attention import split_attention
from vitprune.models.merging import set_merging
from vitprune.pruning.apply import mask_neurons, remember, remove_neurons
from vitprune.seen_images import seen_by
from vitprune.training import loop
from vitprune.training.augmented_images import AugmentedImages, seed_of
from vitprune.training.loop import STATE_FILE, STEPS_FILE
from vitprune.training.losses import choose_losses
from vitprune.training.recover import recover, split_images
from vitprune.training.recovery_folder import save_recovery
from vitprune.training.settings import Augmentation, Training
from vitprune.training.teacher import open_teacher
from vitprune.views import data_config

QUICK = Training(epochs=2, batch_size=4, held_back=0.2, lr=1e-3, warmup_epochs=0.25)
ANSWERS = replace(QUICK, losses={"answers": 1.0})


@pytest.fixture
def images(image_folder):
    return find_images(image_folder, 5)


def halved(model):
    return remove_neurons(model, half_plan(model))


def same(got, expected):
    got, expected = got.state_dict(), expected.state_dict()
    return got.keys() == expected.keys() and all(torch.equal(got[key], expected[key]) for key in expected)


def train_plainly(student, teacher, images, training):
    """What a user would write: timm's optimiser, the rate by hand, the loss by its formula."""
    student, teacher = copy.deepcopy(student).train(), teacher.eval()
    batches = AugmentedImages(images, data_config(student), training)
    decayed = [
        each for name, each in student.named_parameters() if each.ndim > 1 and name not in ("pos_embed", "cls_token")
    ]
    others = [each for each in student.parameters() if all(each is not other for other in decayed)]
    groups = [{"params": decayed, "weight_decay": training.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=training.lr)
    steps = training.epochs * batches.num_batches
    warmup = round(training.warmup_epochs * batches.num_batches)
    losses = []
    for epoch in range(training.epochs):
        for number, batch in enumerate(batches.read(epoch)):
            step = epoch * batches.num_batches + number
            low = training.lr / 100
            rate = low + (training.lr - low) * 0.5 * (1 + math.cos(math.pi * step / steps))
            if step < warmup:
                rate = low + (training.lr - low) * step / warmup
            for group in optimizer.param_groups:
                group["lr"] = rate
            pixels = batch.images.double()
            with torch.no_grad():
                wanted = (teacher(pixels) / training.temperature).softmax(-1)
            got = (student(pixels) / training.temperature).log_softmax(-1)
            loss = training.temperature**2 * (wanted * (wanted.log() - got)).sum(-1).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), training.clip_grad)
            optimizer.step()
            losses.append(loss.item())
    return student, losses


def test_it_is_what_a_plain_loop_does(images):
    dense = make_vit()
    student = halved(dense)
    steps = []
    training = replace(ANSWERS, held_back=0.0)
    got = recover(student, images, teacher=dense, training=training, log_step=steps.append)
    expected, losses = train_plainly(student, dense, images, training)
    assert [row["loss"] for row in steps] == pytest.approx(losses, rel=1e-5)
    for mine, theirs in zip(got.model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("losses", [{"answers": 1.0, "features": 1.0}, {"blocks": 1.0}, {"labels": 1.0}], ids="+".join)
def test_every_loss_falls_and_the_best_epoch_is_kept(losses, images):
    dense = make_vit().float()
    training = replace(QUICK, losses=losses, epochs=6, lr=2e-3)
    got = recover(halved(dense), images, teacher=dense, training=training)
    assert got.rows[-1].loss < got.rows[0].loss
    judged = [row.held_back for row in got.rows]
    assert got.best == judged.index(min(judged)) + 1
    assert (got.rows[0].accuracy is not None) == ("labels" in losses)
    trained_on, held_back = split_images(images, training)
    assert not set(trained_on.files) & set(held_back.files)
    batches = list(vitprune.ImageBatches(held_back, dense, batch_size=4))
    with torch.no_grad():
        if "labels" in losses:
            parts = [torch.nn.functional.cross_entropy(got.model(x).double(), y, reduction="sum") for x, y in batches]
        else:
            parts = [
                (dense(x).softmax(-1) * (dense(x).log_softmax(-1) - got.model(x).log_softmax(-1))).sum()
                for x, _ in batches
            ]
    assert min(judged) == pytest.approx(float(sum(parts)) / len(held_back), rel=1e-4)


def test_the_model_before_stays_and_modes_are_kept(images):
    dense = make_vit().float()
    student = halved(dense)
    before = copy.deepcopy(student)
    state = torch.get_rng_state()
    got = recover(student, images, teacher=dense, training=replace(QUICK, epochs=1))
    assert same(student, before)
    assert not student.training
    assert not got.model.training
    assert torch.equal(torch.get_rng_state(), state)


class _Killed(Exception):
    pass


@pytest.mark.parametrize("options", [{}, {"ema_decay": 0.9}, {"grad_accum_steps": 2}], ids=["plain", "ema", "accum"])
@pytest.mark.parametrize("killed_at", [(1, 2), (2, 1)])
def test_a_killed_run_ends_as_an_undisturbed_one(killed_at, options, images, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)  # after every step
    dense = make_vit().float()
    student = halved(dense)
    training = replace(QUICK, augmentation=Augmentation(mixup=0.2, color_jitter=0.4, re_prob=0.3), **options)
    whole = recover(student, images, teacher=dense, training=training, folder=tmp_path / "whole")

    def kill(row):
        if (row["epoch"], row["step"]) == killed_at:
            raise _Killed

    arguments = {"teacher": dense, "training": training, "folder": tmp_path / "killed"}
    with pytest.raises(_Killed):
        recover(student, images, log_step=kill, **arguments)
    steps = []
    got = recover(student, images, log_step=steps.append, **arguments)
    assert 0 < len(steps) < len((tmp_path / "whole" / STEPS_FILE).read_text().splitlines())
    assert same(got.model, whole.model)
    assert (tmp_path / "killed" / STEPS_FILE).read_text() == (tmp_path / "whole" / STEPS_FILE).read_text()
    for mine, theirs in zip(got.rows, whole.rows, strict=True):
        assert (mine.loss, mine.losses, mine.held_back) == (theirs.loss, theirs.losses, theirs.held_back)


def test_another_run_does_not_go_on_in_the_folder(images, tmp_path):
    dense = make_vit().float()
    arguments = {"teacher": dense, "folder": tmp_path / "f"}
    recover(halved(dense), images, training=replace(QUICK, epochs=1), **arguments)
    with pytest.raises(VitpruneError, match="was made with another training"):
        recover(halved(dense), images, training=replace(QUICK, epochs=1, lr=0.1), **arguments)


def test_batches_of_one_step_are_one_batch(images):
    """Gradients of two batches of four are those of one of eight, and so are those of parts that memory asks for."""
    dense = make_vit()
    student = halved(dense)
    training = replace(ANSWERS, held_back=0.2, epochs=1)
    whole = recover(student, images, teacher=dense, training=replace(training, batch_size=8))
    parts = recover(student, images, teacher=dense, training=replace(training, grad_accum_steps=2))
    for mine, theirs in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)


def test_what_memory_does_not_hold_is_cut_in_parts(images):
    dense = make_vit()
    student = halved(dense)
    whole = recover(student, images, teacher=dense, training=ANSWERS)

    class Small(type(dense)):
        def forward_features(self, pixels, **options):
            if self.training and len(pixels) > 1:
                raise torch.OutOfMemoryError("no more than one image")
            return super().forward_features(pixels, **options)

    small = copy.deepcopy(student)
    small.__class__ = Small
    parts = recover(small, images, teacher=dense, training=ANSWERS)
    for mine, theirs in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-9)

    class Full(type(dense)):
        def forward_features(self, pixels, **options):
            if self.training:
                raise torch.OutOfMemoryError("nothing")
            return super().forward_features(pixels, **options)

    small.__class__ = Full
    with pytest.raises(VitpruneError, match="out of memory at epoch 1, step 1; lower `batch_size`"):
        recover(small, images, teacher=dense, training=ANSWERS)


def test_masked_units_stay_masked_and_are_cut_afterwards(images, tmp_path):
    dense = make_vit().float()
    plan = half_plan(dense).with_facts(mode="mask")
    got = recover(mask_neurons(dense, plan), images, teacher=dense, training=QUICK, plan=plan)
    batch = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert not torch.allclose(got.model(batch), mask_neurons(dense, plan)(batch))
        torch.testing.assert_close(remove_neurons(got.model, plan)(batch), got.model(batch), rtol=1e-4, atol=1e-5)


def test_narrow_attention_and_merged_tokens_train(images):
    dense = make_vit().float()
    split = split_attention(dense)
    plan = vitprune.Plan(
        {f"blocks.{i}.attn.qk": torch.arange(8) < 4 for i in range(3)},
        kinds={f"blocks.{i}.attn.qk": "qk" for i in range(3)},
    )
    student = set_merging(remove_neurons(split, plan), (0, 4, 0))
    training = replace(QUICK, losses={"answers": 1.0, "features": 1.0, "blocks": 1.0}, epochs=4, lr=2e-3)
    got = recover(student, images, teacher=dense, training=training)
    assert got.rows[-1].loss < got.rows[0].loss
    before = dict(student.named_parameters())
    still = [name for name, each in got.model.named_parameters() if torch.equal(each, before[name])]
    # A bias of the keys changes no answer where every key has it.
    assert all(name.endswith(".k.bias") for name in still)


def test_an_encoder_is_taught_features(images):
    dense = make_vit(num_classes=0).float()
    training = replace(QUICK, losses={"features": 1.0}, epochs=3, lr=2e-3)
    got = recover(halved(dense), images, teacher=dense, training=training)
    assert min(row.held_back for row in got.rows) < got.before[0]


def test_what_is_compared_by_default_is_what_the_models_have(images):
    dense = make_vit().float()
    assert choose_losses(halved(dense), dense) == {"answers": 1.0, "blocks": 5.0}
    assert set(recover(halved(dense), images, teacher=dense, training=QUICK).rows[0].losses) == {"answers", "blocks"}
    encoder = make_vit(num_classes=0)
    assert choose_losses(encoder, encoder) == {"blocks": 5.0}
    swin = timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1), embed_dim=24)
    assert choose_losses(swin, swin) == {"answers": 1.0, "features": 1.0}
    for name in ("twins_svt_small", "crossvit_tiny_240"):  # 'blocks' that are stages, or answer with several tensors
        model = timm.create_model(name)
        assert choose_losses(model, model) == {"answers": 1.0, "features": 1.0}
    assert choose_losses(make_vit(depth=2), dense) == {"answers": 1.0, "features": 1.0}
    pooled = set_merging(make_vit(class_token=False, global_pool="avg"), (0, 4, 0))
    assert choose_losses(pooled, make_vit(class_token=False, global_pool="avg")) == {"answers": 1.0, "features": 1.0}


def test_blocks_of_another_number_are_refused(images):
    training = replace(QUICK, losses={"blocks": 1.0})
    with pytest.raises(VitpruneError, match="the model has 2 blocks, the teacher 3; leave it out"):
        recover(make_vit(depth=2), images, teacher=make_vit(), training=training)


def test_it_says_so_where_pruning_saw_the_images_held_back(images):
    dense = make_vit().float()
    assert not recover(halved(dense), images, teacher=dense, training=replace(QUICK, epochs=1)).is_flattered
    pruned = remember(halved(dense), frozenset(hash_images(images)))
    assert recover(pruned, images, teacher=dense, training=replace(QUICK, epochs=1)).is_flattered


def test_half_precision_trains(images):
    dense = make_vit().float()
    got = recover(halved(dense), images, teacher=dense, training=replace(QUICK, amp_dtype="bfloat16"))
    assert {each.dtype for each in got.model.parameters()} == {torch.float32}
    assert math.isfinite(got.rows[-1].loss)


def test_images_that_had_a_say_are_refused_afterwards(images, image_folder, tmp_path):
    dense = make_vit().float()
    dense.model_args = TINY
    plan = half_plan(dense)
    got = recover(remove_neurons(dense, plan), images, teacher=dense, training=replace(QUICK, epochs=1), plan=plan)
    assert len(seen_by(got.model)) == len(images)
    save_recovery(got, QUICK, tmp_path / "out")
    loaded = vitprune.load(tmp_path / "out")
    assert same(loaded, got.model)
    assert vitprune.read_plan(tmp_path / "out").calibration == seen_by(got.model)
    with pytest.raises(VitpruneError, match="20 of 20 evaluation images were calibration images"):
        vitprune.evaluate(loaded, vitprune.ImageBatches(images, loaded))
    recovery = json.loads((tmp_path / "out" / "recovery.json").read_text())
    assert recovery["epochs"][0]["loss"] == got.rows[0].loss
    assert (tmp_path / "out" / "recovery.png").stat().st_size > 5000


def test_training_by_the_clock_ends_in_time(images):
    dense = make_vit().float()
    started = time.perf_counter()
    got = recover(halved(dense), images, teacher=dense, training=replace(QUICK, minutes=0.02, epochs=1000))
    assert time.perf_counter() - started < 20
    assert len(got.rows) >= 1


def test_it_stops_where_nothing_gets_better(images):
    dense = make_vit().float()
    training = replace(QUICK, epochs=50, lr=0.5, patience=2)
    got = recover(halved(dense), images, teacher=dense, training=training)
    assert len(got.rows) == got.best + 2 < 50


def test_what_is_no_number_stops_it_and_leaves_the_checkpoint(images, tmp_path, monkeypatch):
    dense = make_vit().float()
    student = halved(dense)
    recover(student, images, teacher=dense, training=replace(QUICK, epochs=2), folder=tmp_path / "f")
    lost = lambda *_outputs: (torch.tensor(torch.nan, requires_grad=True), {})  # noqa: E731
    monkeypatch.setattr(loop, "sum_losses", lost)
    with pytest.raises(VitpruneError, match=r"epoch 1, step 1: the loss is nan \(4 images, first class"):
        recover(student, images, teacher=dense, training=replace(QUICK, held_back=0.0), folder=tmp_path / "g")
    assert not (tmp_path / "g" / STATE_FILE).exists()
    assert (tmp_path / "f" / STATE_FILE).is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"losses": {"wrong": 1.0}}, "losses must be one of"),
        ({"losses": {}}, "`losses` must name at least one"),
        ({"epochs": 0}, "`epochs` must be positive, got 0"),
        ({"opt": "nosuch"}, "`opt` nosuch: timm cannot make it"),
        ({"sched": "nosuch"}, "`sched` nosuch"),
        ({"held_back": 0.0, "patience": 1}, "`patience` asks images that are held back"),
        ({"amp_dtype": "int8"}, "amp_dtype must be one of"),
        ({"augmentation": Augmentation(scale=(0.9, 0.2))}, "`scale` must be two rising shares"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes, message, images):
    dense = make_vit().float()
    with pytest.raises(VitpruneError, match=message):
        recover(dense, images, teacher=dense, training=replace(QUICK, **changes))


def test_teachers_that_do_not_fit_are_refused(images):
    dense = make_vit().float()
    for other, message in (
        (make_vit(num_classes=7), "answers 7 classes, the model 5"),
        (make_vit(img_size=48), r"images of input_size \[3, 48, 48\], the model of \[3, 32, 32\]"),
        (make_vit(embed_dim=48), "features of width 48, the model of 24"),
    ):
        with pytest.raises(VitpruneError, match=message):
            recover(dense, images, teacher=other.float(), training=QUICK)
    with pytest.raises(VitpruneError, match="a `teacher`, which is missing"):
        recover(dense, images, training=QUICK)
    with pytest.raises(VitpruneError, match="loss answers compares classes"):
        recover(make_vit(num_classes=0), images, teacher=make_vit(num_classes=0), training=ANSWERS)


def test_the_teacher_is_the_model_that_was_pruned(saved_vit, tmp_path):
    dense = vitprune.load(saved_vit)
    plan = half_plan(dense).with_facts(weights_sha256="0" * 64, architecture="vit_tiny_patch16_224")
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5)
    from safetensors.torch import save_file

    save_file(model.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(VitpruneError, match="is not the model that was pruned"):
        open_teacher(model, plan, checkpoint=tmp_path / "w.safetensors")
    assert open_teacher(model, plan, str(saved_vit)).num_classes == 5
    named = vitprune.load(saved_vit)
    named.label_names = ("class1", "class3")
    with pytest.raises(VitpruneError, match="does not know the model's class 'class1'"):
        named.num_classes = 2
        open_teacher(named, None, str(saved_vit))


def test_the_order_of_images_is_shared_out():
    images = vitprune.ImageSet(None, tuple("abcdefghijk"), (0,) * 11)
    one = AugmentedImages(images, {}, Training(batch_size=4))
    two = [AugmentedImages(images, {}, Training(batch_size=2), rank=rank, count=2) for rank in range(2)]
    assert one.num_batches == two[0].num_batches == 2
    for epoch in (0, 3):
        together = [a + b for a, b in zip(two[0].indices(epoch), two[1].indices(epoch), strict=True)]
        assert together == one.indices(epoch)
        assert len({index for batch in together for index in batch}) == 8
    assert one.indices(0) != one.indices(1)
    assert seed_of(1, 2) != seed_of(12)


def test_two_processes_are_one_with_twice_the_batch(saved_vit, image_folder, tmp_path):
    asked = [
        "recover", saved_vit, "--data", image_folder, "--teacher", saved_vit, "--losses", "answers", "--epochs", 2,
        "--held-back", 0.2, "--lr", 0.05, "--device", "cpu",
        "--opt", "sgd",  # Adam makes steps of the rounding of gradients that are zero
    ]  # fmt: skip
    student = halved(vitprune.load(saved_vit))
    student.model_args = TINY
    vitprune.save(student, tmp_path / "half")
    asked[1] = tmp_path / "half"
    from vitprune.cli import main

    went_well, told = run_on_processes(2, [*asked, "--batch-size", 4, "-o", tmp_path / "two"], tmp_path)
    assert went_well, told
    assert main([str(each) for each in [*asked, "--batch-size", 8, "-o", tmp_path / "one"]]) == 0
    one, two = (vitprune.load(tmp_path / name).state_dict() for name in ("one", "two"))
    assert not torch.equal(one["head.weight"], student.state_dict()["head.weight"])
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-5, atol=1e-5)
    assert not list(tmp_path.glob("*.unfinished"))


def test_a_stock_model_learns_the_names_of_folders(saved_vit, image_folder, tmp_path, capsys):
    from vitprune.cli import main

    for split, names in (("train", ["class4", "class0", "class2"]), ("val", ["class0", "class2"])):
        for name in names:
            (tmp_path / split).mkdir(exist_ok=True)
            (tmp_path / split / name).symlink_to(image_folder / name)
    asked = [
        "finetune", saved_vit, "--data", tmp_path / "train", "--epochs", 12, "--batch-size", 4, "--lr", 0.003,
        "--held-back", 0.25, "-o", tmp_path / "mine", "--json",
    ]  # fmt: skip
    assert main([str(each) for each in asked]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["classes"] == ["class0", "class2", "class4"]
    assert answer["epochs"][-1]["loss"] < answer["epochs"][0]["loss"]
    mine = vitprune.load(tmp_path / "mine")
    assert mine.label_names == ("class0", "class2", "class4")
    assert mine.num_classes == 3
    refused = ["evaluate", str(tmp_path / "mine"), "--data", str(tmp_path / "val")]
    assert main(refused) == 2
    assert "8 of 8 evaluation images" in capsys.readouterr().err
    assert main([*refused, "--allow-overlap", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["num_images"] == 8


def test_a_new_classifier_is_the_same_for_the_same_seed():
    model = make_vit()
    first, again, other = (vitprune.new_classifier(model, ["a", "b"], seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.head.weight, again.head.weight)
    assert not torch.equal(first.head.weight, other.head.weight)
    assert model.num_classes == 5
    with pytest.raises(VitpruneError, match="at least two different classes"):
        vitprune.new_classifier(model, ["a", "a"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{elastic}"], "only a folder can be trained"),
        (["{vit}"], "pass --teacher"),
        (["{vit}", "--teacher", "{vit}", "--losses", "answers=x"], "expected NAME or NAME=WEIGHT"),
        (["{vit}", "--teacher", "{vit}", "--lr", "0"], "--lr must be positive"),
        (["{vit}", "--teacher", "{vit}", "--model-ema-decay", "2"], "--model-ema-decay must be in (0, 1)"),
        (["{vit}", "--teacher", "{narrow}"], "--teacher answers 4 classes, the model 5"),
    ],
)
def test_the_command_line_refuses_in_one_line(arguments, message, saved_vit, image_folder, tmp_path, capsys):
    from vitprune.cli import main

    narrow = make_vit(num_classes=4).float()
    narrow.model_args = {**TINY, "num_classes": 4}
    vitprune.save(narrow, tmp_path / "narrow")
    known = {"vit": saved_vit, "elastic": tmp_path / "e.safetensors", "narrow": tmp_path / "narrow"}
    asked = ["recover", *(each.format(**known) for each in arguments), "--data", image_folder, "-o", tmp_path / "out"]
    assert main([str(each) for each in asked]) == 2
    told = capsys.readouterr().err.strip().splitlines()
    assert message in told[-1]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "student.backbone._orig_mod."])
@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_weights_that_were_trained_elsewhere_come_back(prefix, suffix, tmp_path):
    from safetensors.torch import save_file

    dense = make_vit().float()
    dense.model_args = TINY
    narrow = halved(split_attention(dense))
    narrow.model_args = TINY
    vitprune.save(narrow, tmp_path / "narrow")
    trained = copy.deepcopy(narrow)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(torch.randn_like(parameter))
    state = {prefix + name: value for name, value in trained.state_dict().items()}
    path = tmp_path / f"last.{suffix}"
    save_file(state, path) if suffix == "safetensors" else torch.save({"epoch": 3, "state_dict": state}, path)
    assert same(vitprune.load(tmp_path / "narrow", checkpoint=path), trained)
    others = {prefix + name: value for name, value in dense.state_dict().items()}
    save_file(others, tmp_path / "dense.safetensors")
    with pytest.raises(VitpruneError, match="does not fit the model of the folder: .*fc1"):
        vitprune.load(tmp_path / "narrow", checkpoint=tmp_path / "dense.safetensors")
    with pytest.raises(VitpruneError, match="leave `model_args` out"):
        vitprune.load(tmp_path / "narrow", model_args={"depth": 2})


def test_the_plan_knows_where_its_dense_model_was(image_folder, tmp_path, capsys):
    from safetensors.torch import save_file

    from vitprune.cli import main

    dense = make_vit().float()
    dense.model_args = TINY
    vitprune.save(dense, tmp_path / "dense")
    shared = ["--data", str(image_folder), "--json"]
    pruned = ["--criterion", "magnitude", "--compensate", "none", "-o"]
    assert main(["prune", str(tmp_path / "dense"), *shared, *pruned, str(tmp_path / "half")]) == 0
    assert main(["recover", str(tmp_path / "half"), *shared, "--epochs", "1", "-o", str(tmp_path / "first")]) == 0
    changed = {key: value + 1 for key, value in dense.state_dict().items()}
    save_file(changed, tmp_path / "dense" / "model.safetensors")
    capsys.readouterr()
    again = ["recover", str(tmp_path / "half"), *shared, "--epochs", "1", "-o", str(tmp_path / "second")]
    assert main(again) == 2
    assert "is not the model that was pruned" in capsys.readouterr().err
    (tmp_path / "dense").rename(tmp_path / "gone")
    assert main(again) == 2
    assert "vitprune: teacher: " in capsys.readouterr().err


def test_a_report_shows_how_it_was_trained(images, tmp_path):
    from vitprune.cli import main

    dense = make_vit().float()
    dense.model_args = TINY
    plan = half_plan(dense)
    training = replace(QUICK, losses={"labels": 1.0})
    got = recover(remove_neurons(dense, plan), images, training=training, plan=plan)
    save_recovery(got, training, tmp_path / "out")
    assert main(["report", str(tmp_path / "out"), "-o", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    assert (
        f"the loss of images held back went from {got.before[0]:.4f} to {got.rows[got.best - 1].held_back:.4f}" in page
    )
    assert "pruned-1-recovery" in page


@pytest.mark.parametrize("losses", [{"answers": 1.0}, {"labels": 1.0}], ids="+".join)
def test_one_output_is_trained_as_two_classes(losses, image_folder, tmp_path):
    """As the model of two outputs that answers the same: [0, z]."""
    for name in ("class1", "class4"):
        (tmp_path / name).symlink_to(image_folder / name)
    images = find_images(tmp_path, 2)
    one, two = make_vit(num_classes=1), make_vit(num_classes=2)
    with torch.no_grad():
        two.load_state_dict({**one.state_dict(), "head.weight": two.head.weight, "head.bias": two.head.bias})
        for parameter, own in zip(two.head.parameters(), one.head.parameters(), strict=True):
            parameter.copy_(torch.cat([torch.zeros_like(own), own]))
    training = replace(QUICK, losses=losses, epochs=1)
    first, second = (recover(halved(each), images, teacher=each, training=training) for each in (one, two))
    assert first.before[0] > 0
    assert first.before[0] == pytest.approx(second.before[0], rel=1e-9)
    assert first.rows[0].losses != dict.fromkeys(losses, 0.0)
    steps = [[], []]
    for each, log in zip((one, two), steps, strict=True):
        recover(halved(each), images, teacher=each, training=training, log_step=log.append)
    assert steps[0][0]["loss"] == pytest.approx(steps[1][0]["loss"], rel=1e-9)


def test_a_teacher_that_is_shared_out_teaches_the_same(saved_vit, image_folder, tmp_path):
    student = halved(vitprune.load(saved_vit))
    student.model_args = TINY
    vitprune.save(student, tmp_path / "half")
    asked = [
        "recover", tmp_path / "half", "--data", image_folder, "--teacher", saved_vit, "--epochs", 1, "--held-back", 0.2,
        "--batch-size", 4, "--device", "cpu",
    ]  # fmt: skip
    for name, more in (("whole", []), ("shared", ["--shard-teacher"])):
        went_well, told = run_on_processes(2, [*asked, *more, "-o", tmp_path / name], tmp_path)
        assert went_well, told
    whole, shared = (vitprune.load(tmp_path / name) for name in ("whole", "shared"))
    assert same(whole, shared)
    assert not same(whole, student)


def test_each_process_holds_its_share_of_a_teacher(saved_vit, tmp_path):
    """Otherwise sharing it out would be a name: half of the blocks' weights in each of two, and the same answers."""
    script = tmp_path / "share.py"
    script.write_text(
        "import sys, torch, vitprune\n"
        "from vitprune.processes import join_processes\n"
        "from vitprune.training.sharded_teacher import spread_teacher\n"
        "with join_processes(exchanging=True) as processes:\n"
        "    model = vitprune.load(sys.argv[1]).requires_grad_(False)\n"
        "    images = torch.randn(2, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(0))\n"
        "    expected, whole = model(images), sum(each.numel() for each in model.blocks.parameters())\n"
        "    shared = spread_teacher(model, processes, torch.device('cpu'))\n"
        "    for _ in range(2):\n"
        "        with torch.no_grad():\n"
        "            torch.testing.assert_close(shared(images), expected)\n"
        "        held = sum(each.to_local().numel() for each in model.blocks.parameters())\n"
        "        assert held <= 0.51 * whole, (held, whole)\n"
    )
    with socket.create_server(("localhost", 0)) as server:
        place = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(server.getsockname()[1])}
    ranks = [
        subprocess.Popen(
            [sys.executable, script, saved_vit],
            env={**os.environ, **place, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = [process.communicate()[1] for process in ranks]
    assert not any(process.returncode for process in ranks), told


def test_tensorboard_has_every_loss(saved_vit, image_folder, tmp_path, capsys):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from vitprune.cli import main

    asked = ["recover", saved_vit, "--data", image_folder, "--teacher", saved_vit, "--epochs", 2, "--batch-size", 4]
    asked += ["--losses", "answers", "--tensorboard", tmp_path / "logs", "-o", tmp_path / "out"]
    assert main([str(each) for each in asked]) == 0
    found = events.EventAccumulator(str(tmp_path / "logs"))
    found.Reload()
    steps = [json.loads(line) for line in (tmp_path / "out" / STEPS_FILE).read_text().splitlines()]
    rows = json.loads((tmp_path / "out" / "recovery.json").read_text())["epochs"]
    logged = found.Scalars("step/answers")
    assert [each.step for each in logged] == list(range(1, len(steps) + 1)) == [row["steps"] for row in steps]
    assert [each.value for each in logged] == pytest.approx([row["answers"] for row in steps], rel=1e-6)
    assert [each.value for each in found.Scalars("held back/loss")] == pytest.approx(
        [row["held_back"] for row in rows], rel=1e-6
    )


def test_tensorboard_is_refused_where_it_is_absent(saved_vit, image_folder, tmp_path, capsys, monkeypatch):
    from vitprune.cli import main

    monkeypatch.setitem(sys.modules, "tensorboard", None)
    asked = ["recover", saved_vit, "--data", image_folder, "--tensorboard", tmp_path / "logs", "-o", tmp_path / "out"]
    assert main([str(each) for each in asked]) == 2
    assert "the package tensorboard is not installed" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_progress_is_of_the_whole_training(images):
    seen, told = [], []

    def track(items, description):
        told.append((len(items), description))
        for item in items:
            seen.append(item)
            yield item

    model = make_vit(num_classes=5)
    training = replace(ANSWERS, epochs=3)
    steps = recover(model, images, teacher=model, training=training, track=track).rows[-1].steps
    assert told == [(steps, "train")]
    assert seen == list(range(steps))

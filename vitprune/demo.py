"""The whole job on a small Vision Transformer and scikit-learn's scanned digits; nothing is downloaded."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from vitprune.card import make_card, write_card
from vitprune.data import ImageBatches, ImageSet, digest_images, find_images, hash_images
from vitprune.discovery.discover import Discovery, class_paths, discover
from vitprune.discovery.run import Run, save_run
from vitprune.evaluation.accuracy import compare, count_right
from vitprune.evaluation.curve import Curve, measure_curve
from vitprune.evaluation.evaluation_folder import Evaluation, save_evaluation
from vitprune.evaluation.judge import judge_network
from vitprune.evaluation.open_model import Reading
from vitprune.export.onnx_file import export_onnx
from vitprune.figures.curve_figure import draw_curve
from vitprune.figures.style import save_figure
from vitprune.files import FORMAT_VERSION, atomic_folder, refuse_existing, write_json
from vitprune.models.identity import hash_weights
from vitprune.models.load import load
from vitprune.models.macs import count_parameters
from vitprune.models.saved_folder import save
from vitprune.progress import Track
from vitprune.pruning.prune import prune
from vitprune.report.page import write_report
from vitprune.speed.bench import BenchRow, bench, describe_hardware
from vitprune.speed.bench_folder import BenchRecord, save_bench
from vitprune.views import data_config

RATIOS = (0.5, 0.75, 0.9)
NUM_TEST_IMAGES = 500
IMAGES_PER_CLASS = 20
EPOCHS, BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY, LABEL_SMOOTHING = 110, 64, 2e-3, 0.05, 0.1
# What the report shows, and everything that the demo writes.
SHOWN = ("pruned", "evaluation", "bench", "run")
REPORT_FILE = "report.html"
DEMO_FILES = frozenset({*SHOWN, REPORT_FILE, "curve.png", "demo.json", "pruned.onnx"})
MODEL_ARGS = {
    "img_size": 8,
    "patch_size": 2,
    "in_chans": 1,
    "embed_dim": 64,
    "depth": 4,
    "num_heads": 4,
    "num_classes": 10,
}
DATA_CONFIG = {"input_size": (1, 8, 8), "mean": (0.5,), "std": (0.5,), "crop_pct": 1.0}


@dataclass(frozen=True)
class DemoResult:
    """What the demo measured and wrote.

    Attributes:
        output: folder with ``files``.
        files: names in it.
        model: folder of the trained model, in the user's cache.
        data: folder of the digits to find paths on.
        answer: all figures, as JSON values.
        tables: (title, columns, rows) for people.
    """

    output: str
    files: tuple[str, ...]
    model: str
    data: str
    answer: dict[str, Any]
    tables: tuple[tuple[str, tuple[str, ...], list[tuple[str, ...]]], ...]


def run_demo(output: str | Path, *, seed: int, command: str, track: Track, note: Callable[[str], None]) -> DemoResult:
    """Train (or take from the cache), discover, prune, evaluate, export, time, and write a report of it all.

    Args:
        output: folder to write; an earlier demo there is replaced.
        seed: of the training and of every random choice.
        command: as one would type it, for the cards of the folders.
        track: wraps sequences for progress.
        note: receives one line per stage.

    Raises:
        VitpruneError: if ``output`` exists and was not written by the demo.
    """
    started = time.perf_counter()
    refuse_existing(output, overwrite=True, owned=DEMO_FILES)
    cache = Path(platformdirs.user_cache_dir("vitprune"))
    data = _write_digits(cache / "digits")
    model_folder = cache / f"digits-vit-seed{seed}"
    if (model_folder / "config.json").is_file():
        note(f"trained model taken from {model_folder}")
    else:
        note("training a small ViT on 1,297 scanned digits")
        save(_train(data / "train", seed=seed, track=track), model_folder)
    model = load(model_folder)
    train_images = find_images(data / "train", 10)
    calibration = list(ImageBatches(train_images, model, batch_size=128))
    test_images = find_images(data / "test", 10)
    evaluation = list(ImageBatches(test_images, model, batch_size=128))
    path_images = find_images(data / "train", 10, images_per_class=IMAGES_PER_CLASS, seed=seed)
    found = discover(model, track(list(ImageBatches(path_images, model, batch_size=20)), "paths"))
    curve = Curve(("jas", "taylor", "obs"), ("uniform",), ("none", "ridge"), step=1.0, seed=seed)
    points = measure_curve(model, calibration, evaluation, curve, ratios=RATIOS, found=found, track=track)
    pruned, plan = prune(model, calibration, seed=seed)
    compared = _compare(model, pruned, test_images, names=(model_folder, output))
    dense, after = count_right(compared.against.answers), count_right(compared.judged.answers)
    with atomic_folder(output) as folder:
        run = Run(
            found,
            path_images,
            str(model_folder),
            None,
            hash_weights(model),
            images_sha256=digest_images(hash_images(path_images)),
            model_transform=data_config(model),
        )
        save_run(run, folder / "run")
        save(pruned, folder / "pruned", plan=plan)
        save_evaluation(compared, folder / "evaluation")
        note("exporting to ONNX and comparing with torch on the test images")
        report = export_onnx(pruned, folder / "pruned.onnx", evaluation)
        rows = bench(
            {"dense": model, "pruned": pruned},
            batch_sizes=(1, 64),
            seconds=1.0,
            track=track,
        )
        save_bench(BenchRecord(tuple(rows), describe_hardware()), folder / "bench")
        save_figure(draw_curve(points, title="ViT on scanned digits, 500 test images"), folder / "curve.png")
        answer = {
            "dense_top1": dense.top1,
            "pruned_top1": after.top1,
            "pruning_ratio": plan.pruning_ratio,
            "p_value": compare(dense, after).p_value,
            "num_parameters_dense": count_parameters(model),
            "num_parameters": count_parameters(pruned),
            "mean_joint_score": found.joint_scores.mean().item(),
            "curve": [vars(point) for point in points[1:]],
            "max_abs_diff": report.max_abs_diff,
            "top1_agreement": report.top1_agreement,
            "size_bytes": report.size_bytes,
        }
        write_json(folder / "demo.json", {"kind": "demo", "version": FORMAT_VERSION, **answer})
        card = make_card(command, {"seed": seed}, seconds=time.perf_counter() - started)
        for name in SHOWN:
            write_card(card, folder / name)
    note("writing the report")
    write_report([Path(output) / name for name in SHOWN], Path(output) / REPORT_FILE)
    files = tuple(sorted(entry.name for entry in Path(output).iterdir()))
    answer = {"output": str(output), "latency": [vars(row) for row in rows], **answer}
    tables = (
        _paths_table(found),
        _curve_table(dense.top1, answer["curve"]),
        _latency_table(rows),
        (
            f"default pruning: {plan.pruning_ratio:.0%} of the FFN neurons removed",
            ("", "dense", "pruned"),
            [
                ("top-1 (500 test images)", f"{dense.top1:.3f}", f"{after.top1:.3f}"),
                ("parameters", f"{answer['num_parameters_dense']:,}", f"{answer['num_parameters']:,}"),
                ("largest logit difference, ONNX Runtime to torch", "", f"{report.max_abs_diff:.1e}"),
                ("same first answer, ONNX Runtime and torch", "", f"{report.top1_agreement:.1%}"),
            ],
        ),
    )
    return DemoResult(str(output), files, str(model_folder), str(data / "test"), answer, tables)


def _compare(model: nn.Module, pruned: nn.Module, images: ImageSet, *, names: tuple[Path, Path]) -> Evaluation:
    """Ask the dense and the pruned model about the same images."""
    dense_folder, output = names
    reading = Reading(batch_size=128)
    return Evaluation(
        root=images.root,
        files=images.files,
        images_sha256=digest_images(hash_images(images)),
        skipped=(),
        judged=judge_network(pruned, images, name=str(Path(output).absolute() / "pruned"), reading=reading),
        against=judge_network(model, images, name=str(dense_folder), reading=reading),
    )


def _paths_table(found: Discovery):
    rows = [
        (str(index), f"{found.joint_scores[found.labels == index].mean():.2f}", " ".join(map(str, path[:, 0].tolist())))
        for index, path in class_paths(found).items()
    ]
    return "influential neuron path of each digit", ("digit", "mean JAS", "neuron by FFN"), rows


def _curve_table(dense_top1: float, curve: list[dict[str, Any]]):
    columns = ("criterion", "compensation", *(f"-{ratio:.0%}" for ratio in RATIOS))
    of_line: dict[tuple[str, str], list[str]] = {}
    for point in curve:
        of_line.setdefault((point["criterion"], point["compensation"]), []).append(f"{point['top1']:.3f}")
    rows = [(*line, *values) for line, values in of_line.items()]
    return f"top-1 by share of FFN neurons removed (dense {dense_top1:.3f}; same share in each FFN)", columns, rows


def _latency_table(rows: list[BenchRow]):
    cells = [
        (row.backend, str(row.batch_size), row.model, f"{row.median_ms:.3f}", f"{row.p95_ms:.3f}", f"{row.speedup:.2f}")
        for row in rows
    ]
    return "latency here", ("backend", "batch", "model", "median ms", "p95 ms", "speed-up"), cells


def _write_digits(folder: Path) -> Path:
    """Write the digits as class folders of 8 x 8 PNG files, once."""
    if folder.is_dir():
        return folder
    digits = load_digits()
    train, test = train_test_split(
        np.arange(len(digits.target)), test_size=NUM_TEST_IMAGES, stratify=digits.target, random_state=0
    )
    with atomic_folder(folder) as temporary:
        for split, indices in (("train", train), ("test", test)):
            for index in sorted(indices.tolist()):
                of_class = temporary / split / str(digits.target[index])
                of_class.mkdir(parents=True, exist_ok=True)
                pixels = np.round(digits.images[index] * (255 / 16)).astype(np.uint8)
                Image.fromarray(pixels).save(of_class / f"{index:04d}.png")
    return folder


def _train(data: Path, *, seed: int, track: Track) -> nn.Module:
    images: ImageSet = find_images(data, 10)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = timm.create_model("vit_tiny_patch16_224", pretrained_cfg_overlay=DATA_CONFIG, **MODEL_ARGS)
        model.model_args = MODEL_ARGS
        x, y = (torch.cat(parts) for parts in zip(*ImageBatches(images, model, batch_size=256), strict=True))
        steps_per_epoch = math.ceil(len(x) / BATCH_SIZE)
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, LEARNING_RATE, total_steps=EPOCHS * steps_per_epoch, pct_start=0.1
        )
        model.train()
        for _epoch in track(range(EPOCHS), "train"):
            for rows in torch.randperm(len(x)).split(BATCH_SIZE):
                loss = nn.functional.cross_entropy(model(_distort(x[rows])), y[rows], label_smoothing=LABEL_SMOOTHING)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
    return model.eval()


def _distort(images: Tensor, *, degrees: float = 10, scale: float = 0.1, pixels: float = 0.5) -> Tensor:
    """Turn, scale and move each image a little; what comes in from outside is background (-1)."""
    count = len(images)

    def draw(limit: float) -> Tensor:
        return (torch.rand(count) * 2 - 1) * limit

    angle, factor = draw(math.radians(degrees)), 1 + draw(scale)
    cos, sin = factor * angle.cos(), factor * angle.sin()
    shift_x, shift_y = draw(2 * pixels / images.shape[-1]), draw(2 * pixels / images.shape[-2])
    rows = (torch.stack([cos, -sin, shift_x], 1), torch.stack([sin, cos, shift_y], 1))
    grid = nn.functional.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return nn.functional.grid_sample(images + 1, grid, align_corners=False) - 1

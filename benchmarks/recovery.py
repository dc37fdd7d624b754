"""Images per second of the training loop, against a plain PyTorch loop with the same models, images and losses.

    python benchmarks/recovery.py --pruned runs/half --checkpoint deit_tiny_patch16_224.safetensors \
        --data imagenet-train-1000

Both loops train in turns, a few steps each, in one process; the ratio is the median over the turns. What of a turn is
decoding is the same for both.
"""

from __future__ import annotations

import copy
import json
import statistics
import time
from datetime import date

import torch
from common import RESULTS, describe_machine, log
from jsonargparse import auto_cli
from torch.utils.data import DataLoader

import vitprune
from vitprune.training.augmented_images import AugmentedImages, _Augmented, _collate
from vitprune.training.loop import train
from vitprune.training.losses import pair_up
from vitprune.views import data_config


def train_plainly(student, teacher, images, config, training) -> None:
    """Train as one would by hand."""
    student.train()
    optimizer = torch.optim.AdamW(student.parameters(), lr=training.lr, weight_decay=training.weight_decay)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(images) // training.batch_size)
    order = torch.randperm(len(images)).tolist()
    size = training.batch_size
    batches = [[(0, index) for index in order[start : start + size]] for start in range(0, len(order) - size + 1, size)]
    for batch in DataLoader(_Augmented(images, config, training), batch_sampler=batches, collate_fn=_collate):
        with torch.no_grad():
            wanted = (teacher(batch.images) / training.temperature).log_softmax(-1)
        got = (student(batch.images) / training.temperature).log_softmax(-1)
        loss = training.temperature**2 * torch.nn.functional.kl_div(got, wanted, reduction="batchmean", log_target=True)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), training.clip_grad)
        optimizer.step()
        scheduler.step()
        loss.item()


def main(pruned: str, checkpoint: str, data: str, num_images: int = 96, batch_size: int = 16, turns: int = 5):
    """Measure both loops.

    Args:
        pruned: folder of a pruned model.
        checkpoint: weights of the dense model of its plan.
        data: folder of class folders.
        num_images: of each turn.
        batch_size: images of a step.
        turns: of each loop.
    """
    student = vitprune.load(pruned)
    teacher = vitprune.open_teacher(student, vitprune.read_plan(pruned), checkpoint=checkpoint).requires_grad_(False)
    images = vitprune.find_images(data, student.num_classes).head(num_images)
    training = vitprune.Training(losses={"answers": 1.0}, epochs=1, batch_size=batch_size)
    config = data_config(student)

    def run_ours() -> None:
        pair = pair_up(copy.deepcopy(student).requires_grad_(True), teacher, training)
        train(*pair, AugmentedImages(images, config, training), training, judge=lambda _model: (None, None))

    def run_plain() -> None:
        train_plainly(copy.deepcopy(student), teacher, images, config, training)

    seconds: dict[str, list[float]] = {"recover": [], "plain": []}
    for turn in range(turns + 1):
        for name, run in (("recover", run_ours), ("plain", run_plain)):
            started = time.perf_counter()
            run()
            if turn:  # the first warms up
                seconds[name].append(time.perf_counter() - started)
    ratios = [plain / ours for ours, plain in zip(seconds["recover"], seconds["plain"], strict=True)]
    result = {
        **describe_machine(),
        "threads": torch.get_num_threads(),
        "num_images": len(images),
        "batch_size": batch_size,
        "images_per_second": {name: round(len(images) / statistics.median(each), 2) for name, each in seconds.items()},
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(each, 3) for each in ratios],
    }
    path = RESULTS / f"{date.today()}-recovery-loop.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    log(f"{result['ratio']} x as many images per second as the plain loop; wrote {path.name}")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)

"""Bytes, seconds and memory that a large run costs after its search; writes a dated JSON file.

    python benchmarks/shard_merge.py --num_shards 500
    python benchmarks/shard_merge.py --num_shards 3907

Written, looked at as a killed run does that goes on, merged, saved, read, analysed and reported.

Shards as ``vitprune discover`` writes them for ViT-B/16 on ImageNet's training images in the order of their class
folders: 256 images of one or two of 1,000 classes, paths of one neuron per FFN. Their numbers are random.
"""

from __future__ import annotations

import json
import tempfile
import time
from datetime import date
from pathlib import Path

import torch
from common import RESULTS, describe_machine
from jsonargparse import auto_cli

import vitprune
from vitprune.analysis.experiments import describe_classes, describe_paths
from vitprune.discovery.discover import Part
from vitprune.discovery.objective import DEFAULT_OBJECTIVE
from vitprune.discovery.quadrature import parse_quadrature
from vitprune.discovery.search import Search
from vitprune.discovery.shards import Shards, read_shards, write_shard
from vitprune.models.units import group_of_neurons
from vitprune.processes import peak_memory_bytes
from vitprune.report.page import write_report

NUM_FFNS, NUM_NEURONS, PER_SHARD, PER_CLASS = 12, 3072, 256, 1281


def main(num_shards: int = 500):
    """Write and merge shards.

    Args:
        num_shards: of 256 images each; ImageNet's training images make 5,005.
    """
    names = [f"blocks.{index}.mlp" for index in range(NUM_FFNS)]
    ffns = tuple(group_of_neurons(name, (f"{name}.fc1",), f"{name}.fc2", NUM_NEURONS) for name in names)
    search = Search(ffns, "jas", 1, "cls", parse_quadrature("gauss-legendre:4"), DEFAULT_OBJECTIVE)
    labels = torch.arange(num_shards * PER_SHARD) // PER_CLASS
    files = tuple(f"class{label:04}/image{index:08}.JPEG" for index, label in enumerate(labels.tolist()))
    peaks: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        class_names = {label: f"class{label:04}" for label in set(labels.tolist())}
        images = vitprune.ImageSet(Path(folder), files, tuple(labels.tolist()), class_names)
        shards = Shards(Path(folder), {}, images, batch_size=32, batches_per_shard=PER_SHARD // 32)
        started = time.perf_counter()
        for number, labels_I in enumerate(labels.split(PER_SHARD)):
            classes = tuple(sorted(set(labels_I.tolist())))
            part = Part(
                neurons=torch.randint(NUM_NEURONS, (PER_SHARD, NUM_FFNS, 1)),
                joint_scores=torch.rand(PER_SHARD),
                labels=labels_I.clone(),
                predictions=labels_I.clone(),
                completeness_errors=None,
                classes=classes,
                score_sums={name: torch.rand(len(classes), NUM_NEURONS, dtype=torch.float64) for name in names},
            )
            of_shard = [files[place] for place in shards.places(number)]
            identity, hashes = shards.identity(number), [f"{place:016x}" for place in shards.places(number)]
            write_shard(shards.path(number), part, of_shard, (), identity=identity, hashes=hashes)
        write_seconds = time.perf_counter() - started
        peaks["write"] = peak_memory_bytes() / 2**30
        size = sum(path.stat().st_size for path in Path(folder).iterdir())
        started = time.perf_counter()
        if shards.missing():
            raise SystemExit("a shard is missing")
        resume_seconds = time.perf_counter() - started
        peaks["resume"] = peak_memory_bytes() / 2**30
        started = time.perf_counter()
        found, _images, _hashes, _skipped = read_shards(search, shards)
        merge_seconds = time.perf_counter() - started
        peaks["merge"] = peak_memory_bytes() / 2**30
        started = time.perf_counter()
        run = vitprune.Run(found, images, "vit_base_patch16_224", None, "0" * 64)
        vitprune.save_run(run, Path(folder) / "run")
        found = vitprune.load_run(Path(folder) / "run").found
        save_seconds = time.perf_counter() - started
        peaks["save"] = peak_memory_bytes() / 2**30
        started = time.perf_counter()
        describe_paths(found)
        describe_classes(found, class_names)
        analysis_seconds = time.perf_counter() - started
        peaks["analysis"] = peak_memory_bytes() / 2**30
        started = time.perf_counter()
        write_report([Path(folder) / "run"], Path(folder) / "report.html")
        report_seconds = time.perf_counter() - started
        peaks["report"] = peak_memory_bytes() / 2**30
    result = {
        **describe_machine(),
        "num_shards": num_shards,
        "num_images": len(found.labels),
        "bytes": size,
        "write_seconds": write_seconds,
        "resume_seconds": resume_seconds,
        "merge_seconds": merge_seconds,
        "save_and_load_seconds": save_seconds,
        "analysis_seconds": analysis_seconds,
        "report_seconds": report_seconds,
        "peak_gib_after": peaks,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{date.today()}-shard-merge.json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"{len(found.labels)} images, {size / 1e6:.0f} MB")
    for what in ("write", "resume", "merge", "save_and_load", "analysis", "report"):
        print(f"{what.replace('_', ' ')}: {result[f'{what}_seconds']:.1f} s")
    print(f"most memory by then: {', '.join(f'{what} {peak:.2f} GiB' for what, peak in peaks.items())}")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)

"""``vitprune bench``: time models in torch and ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from vitprune import options
from vitprune.cli.arguments import add_checkpoint, listed
from vitprune.cli.inputs import check_model, load_model, refuse_elastic, refuse_run
from vitprune.cli.terminal import print_table, track
from vitprune.errors import VitpruneError

SUMMARY = "time models in torch and ONNX Runtime"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "models",
        type=str,
        nargs="+",
        help="timm names, folders, .onnx or .xml files; a single pruned folder is timed against its dense model",
    )
    add_checkpoint(parser)
    parser.add_argument(
        "--backend",
        type=str,
        nargs="+",
        help=listed(options.BACKENDS) + "; default: onnxruntime-cpu, and torch-eager without files; "
        "openvino for .xml files",
    )
    parser.add_argument(
        "--precision",
        type=str,
        nargs="+",
        default=["float32"],
        help=f"torch: {', '.join(options.PRECISIONS_TORCH)}; ONNX Runtime: float32, float16, int8",
    )
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 8], help="images per run")
    parser.add_argument("--threads", type=int, nargs="+", help="of the operators; default: torch's")
    parser.add_argument(
        "--baseline",
        type=str,
        help="MODEL or MODEL@BACKEND that every speed-up refers to, on all backends in the same rounds (default: the "
        "first model, on each backend)",
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="per backend, batch size and number of threads")
    parser.add_argument("--device", type=str, default="cpu", help="of the torch backends: cpu, cuda, cuda:1, ...")
    parser.add_argument("-o", "--output", type=str, help="folder for bench.csv, bench.json, bench.png and bench.svg")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")


def run(
    models, checkpoint, backend, precision, batch_size, threads, baseline, seconds, device, output, overwrite, **opening
):
    from dataclasses import asdict

    from vitprune.files import refuse_existing
    from vitprune.speed.bench import bench, describe_hardware
    from vitprune.speed.bench_folder import BENCH_FILES, BenchRecord, save_bench

    if output is not None:
        refuse_existing(output, overwrite=overwrite, owned=BENCH_FILES)
    networks = _models_to_bench(models, checkpoint, opening)
    rows = bench(
        networks,
        backends=backend or _default_backends(networks),
        precisions=precision,
        batch_sizes=batch_size,
        num_threads=threads,
        device=device,
        seconds=seconds,
        memory=True,
        baseline=baseline,
        track=track,
    )
    hardware = describe_hardware([row.backend for row in rows], device)
    answer = {"rows": [asdict(row) for row in rows], "hardware": hardware}
    if output is not None:
        save_bench(BenchRecord(tuple(rows), hardware), output)

    def show() -> None:
        # What is the same in every row goes into the title: the table shall fit a terminal.
        names = ("model", "backend", "precision", "batch_size", "num_threads")
        varied = [name for name in names if name == "model" or len({getattr(row, name) for row in rows}) > 1]
        cells = [
            (
                *(str(getattr(row, name)) for name in varied),
                f"{row.median_ms:.2f}",
                f"{row.p95_ms:.2f}",
                f"{row.images_per_second:.1f}",
                "" if row.peak_bytes is None else f"{row.peak_bytes / 2**20:.0f}",
                "1" if row.speedup == 1 else f"{row.speedup:.2f} ± {(row.speedup_high - row.speedup_low) / 2:.2f}",
                "" if row.speedup_ceiling is None else f"{row.speedup_ceiling:.2f}",
                "" if row.ceiling_share is None or row.speedup == 1 else f"{row.ceiling_share:.2f}",
            )
            for row in rows
        ]
        titles = {"batch_size": "batch", "num_threads": "threads"}
        columns = (
            *(titles.get(name, name) for name in varied),
            *("median ms", "p95 ms", "images/s", "peak MiB", "speed-up", "ceiling", "share"),
        )
        shared = [f"{titles.get(name, name)} {getattr(rows[0], name)}" for name in names if name not in varied]
        print_table(
            ", ".join(
                [f"latency, speed-up over {baseline or rows[0].model} in {rows[0].precision} ± 95 % interval", *shared]
            ),
            columns,
            cells,
        )
        print("ceiling: what fewer multiply-accumulates allow at most (Amdahl); share: of it that was reached")
        if any((row.backend, row.precision) == ("openvino", "int8") for row in rows):
            print("int8 in OpenVINO pays on processors with 8-bit instructions only (AVX-512 VNNI, AVX-VNNI)")
        if any(row.ceiling_share is not None and row.speedup_low > row.speedup_ceiling for row in rows):
            print(
                "above the ceiling: this backend ran the wider model at fewer multiply-accumulates per second "
                "(memory, caches, kernels), so there is more to win than they tell"
            )
        if output is not None:
            print(f"wrote {output}: {', '.join(sorted(BENCH_FILES))}")

    return answer, show


def _default_backends(networks: Mapping[str, Any]) -> Sequence[str]:
    from vitprune.speed.bench import DEFAULT_BACKENDS

    suffixes = {network.suffix for network in networks.values() if isinstance(network, Path)}
    if suffixes == {".xml"} and len(networks) == sum(isinstance(each, Path) for each in networks.values()):
        return ("openvino",)
    if ".xml" in suffixes:
        return (*DEFAULT_BACKENDS[-1:], "openvino")
    return DEFAULT_BACKENDS[-1:] if suffixes else DEFAULT_BACKENDS


def _models_to_bench(models: Sequence[str], checkpoint: str | None, opening: Mapping[str, Any]) -> dict[str, Any]:
    """Load what is to be timed by name; files stay paths."""
    from vitprune.models.saved_folder import build_dense

    folders = [name for name in models if Path(name).is_dir()]
    files = [name for name in models if Path(name).suffix in (".onnx", ".xml")]
    for name in models:
        refuse_elastic(name)
    if checkpoint is not None and len(folders) + len(files) == len(models):
        raise VitpruneError(f"{models[0]} has its own weights; leave --checkpoint out")
    for name in models:
        if name not in files:
            check_model(name, checkpoint, opening)
    if len(set(models)) < len(models) or "dense" in models:
        raise VitpruneError(f"models must be different, and not called 'dense', got {', '.join(models)}")
    networks: dict[str, Any] = {}
    if len(models) == 1 and folders:
        refuse_run(models[0])
        networks["dense"] = build_dense(models[0])
    for name in models:
        own = name in folders or name in files
        networks[name] = (
            Path(name)
            if name in files
            else load_model(
                name,
                None if own else checkpoint,
                opening={} if own and len(folders) + len(files) < len(models) else opening,
            )
        )
    return networks

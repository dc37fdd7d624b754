"""``vitprune doctor``: tell why a model is not faster here, and what each cause costs."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser

from vitprune import options
from vitprune.cli.arguments import add_checkpoint, listed
from vitprune.cli.inputs import check_model, load_model, refuse_elastic
from vitprune.cli.terminal import print_table, track
from vitprune.cli.wording import in_flags
from vitprune.errors import VitpruneError

SUMMARY = "tell why a model is not faster here, and what each cause costs"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("model", type=str, help="any .onnx or .xml file with one input of images, folder, or timm name")
    add_checkpoint(parser)
    backends = {name: text for name, text in options.BACKENDS.items() if name.startswith("onnxruntime")}
    parser.add_argument(
        "--backend",
        choices=tuple(backends),
        help=listed(backends) + "; default: onnxruntime-cpu; .xml files run in OpenVINO",
    )
    parser.add_argument("--batch-size", type=int, default=1, help="images per run")
    parser.add_argument("--threads", type=int, help="of the operators; default: the runtime's choice")
    parser.add_argument("--seconds", type=float, default=20.0, help="to spend on timing the whole model")


def run(model, checkpoint, backend, batch_size, threads, seconds, **opening):
    import tempfile
    from dataclasses import asdict, replace

    from vitprune.speed.doctor import VERDICTS, diagnose
    from vitprune.speed.doctor_openvino import diagnose_openvino

    for name, value in (("batch_size", batch_size), ("threads", threads)):
        if value is not None and value < 1:
            raise VitpruneError(f"{name} must be at least 1, got {value}")
    refuse_elastic(model)
    is_openvino, is_file = Path(model).suffix == ".xml", Path(model).suffix in (".onnx", ".xml")
    if is_file and checkpoint is not None:
        raise VitpruneError(f"{model} holds its own weights; leave --checkpoint out")
    if is_openvino and backend is not None:
        raise VitpruneError(f"{model} is an OpenVINO file, which runs there alone; leave --backend out")
    backend = "openvino" if is_openvino else backend or "onnxruntime-cpu"
    if is_file:
        given = [name.replace("_", "-") for name, value in opening.items() if value is not None]
        if given:
            raise VitpruneError(f"{model} is an exported file, where this is fixed; leave --{given[0]} out")
    else:
        check_model(model, checkpoint, opening)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(model)
        if not is_file:
            from vitprune.export.onnx_file import export_onnx
            from vitprune.pruning.plan import find_plan
            from vitprune.speed.bench import random_batch

            network = load_model(model, checkpoint, opening=opening)
            path = Path(folder) / "model.onnx"
            export_onnx(network, path, [random_batch(network, 2)], plan=find_plan(model))
        timing = {"batch_size": batch_size, "num_threads": threads, "seconds": seconds, "track": track}
        found = diagnose_openvino(path, **timing) if is_openvino else diagnose(path, backend=backend, **timing)
    findings = [replace(finding, remedy=in_flags(finding.remedy)) for finding in found.findings]
    answer = {**asdict(found), "path": model, "findings": [asdict(finding) for finding in findings]}

    def show() -> None:
        cells = [
            (
                finding.name,
                finding.verdict,
                "" if finding.cost_ms is None else f"{finding.cost_ms:.2f}",
                finding.text + (f" -> {finding.remedy}" if finding.remedy else ""),
            )
            for finding in findings
        ]
        columns = ("what", "verdict", "ms", "finding -> remedy")
        print_table(f"{model} on {backend}, batch {found.batch_size}", columns, cells, texts=columns[1::2])
        share = "" if found.ffn_share is None else f", {found.ffn_share:.0%} of them in FFNs"
        print(f"one run takes {found.median_ms:.2f} ms")
        if found.macs is not None:
            print(f"{found.macs / 1e6:,.1f} M multiply-accumulates per image{share}")
        print("; ".join(f"{verdict}: {meaning}" for verdict, meaning in VERDICTS.items()))

    return answer, show

"""Why is an OpenVINO file not faster here? The same questions as of an ONNX file, of what OpenVINO makes of it."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from vitprune.errors import VitpruneError
from vitprune.export.openvino_file import (
    OPENVINO,
    OperatorRun,
    facts_in,
    find_capabilities,
    make_openvino_runner,
    profile_openvino,
    quantize_openvino,
    random_images,
    read_openvino,
)
from vitprune.progress import Track, untracked
from vitprune.speed.doctor import (
    BATCHES,
    COSTS,
    FINE,
    GAIN,
    KNOW,
    VERDICTS,
    WORTH,
    Diagnosis,
    Finding,
    about_facts,
    thread_counts,
)
from vitprune.timing import Latency, measure_latency, paired_speedup

# Kinds of operators that are named with what they take.
NUM_KINDS = 4
_NOW = "as it is"


def diagnose_openvino(
    path: str | Path,
    *,
    batch_size: int = 1,
    num_threads: int | None = None,
    seconds: float = 20.0,
    track: Track = untracked,
) -> Diagnosis:
    """Look at an OpenVINO file, and time it against what could be changed about it.

    Args:
        path: an .xml file with one input of images; its weights lie beside it.
        batch_size: images per run, where the file leaves it open.
        num_threads: of the operators; None leaves the choice to OpenVINO.
        seconds: to spend on timed runs; a quarter of that again goes to batch sizes.
        track: wraps (steps, description), for progress.

    Raises:
        VitpruneError: if OpenVINO is not installed, or the file cannot be read or run.
    """
    path = Path(path)
    model = read_openvino(path)
    facts = facts_in(model)
    is_quantised = any(op.get_type_name() == "FakeQuantize" for op in model.get_ops())
    stages = iter(track(("operators", "changes", "batch sizes"), "doctor"))
    next(stages)
    operators = profile_openvino(path, batch_size, num_threads)
    next(stages)
    with tempfile.TemporaryDirectory() as folder:
        runners = {_NOW: make_openvino_runner(path, batch_size, num_threads)}
        for count in thread_counts():
            runners[f"{count} threads"] = make_openvino_runner(path, batch_size, count)
        if "BF16" in find_capabilities():
            runners["bf16"] = make_openvino_runner(path, batch_size, num_threads, precision="bf16")
        untried = "" if not is_quantised else "it is quantised already"
        if not is_quantised:
            narrow = Path(folder) / "int8.xml"
            try:
                quantize_openvino(path, narrow, [random_images(path, batch_size)], {})
                runners["int8"] = make_openvino_runner(narrow, batch_size, num_threads)
            except VitpruneError as error:
                untried = str(error)
        measured = measure_latency(runners, seconds=seconds)
    findings = [
        _about_threads(num_threads, measured),
        _about_kernels(operators),
        _about_attention(operators),
        _about_precision(operators, is_quantised),
        *(_about_change(name, measured) for name in ("bf16", "int8") if name in measured),
        about_facts(facts),
    ]
    if untried:
        findings.append(Finding("int8", KNOW, f"not tried: {untried}"))
    next(stages)
    findings.append(_about_batch(path, model, num_threads, seconds / 4))
    next(stages, None)
    order = list(VERDICTS)
    findings.sort(key=lambda finding: (order.index(finding.verdict), -(finding.cost_ms or 0.0)))
    median_ms = measured[_NOW].median_ms
    return Diagnosis(path, OPENVINO, batch_size, num_threads, median_ms, facts.get("macs"), None, tuple(findings))


def _about_threads(num_threads: int | None, measured: Mapping[str, Latency]) -> Finding:
    counts = [name for name in measured if name.endswith(" threads")]
    listed = ", ".join(f"{name.removesuffix(' threads')}: {measured[name].median_ms:.2f} ms" for name in counts)
    best = min(counts, key=lambda name: measured[name].median_ms)
    speedup = paired_speedup(measured[_NOW], measured[best])
    asked = "OpenVINO's own choice" if num_threads is None else f"{num_threads} threads"
    number = best.removesuffix(" threads")
    if speedup.low > WORTH:
        saved = measured[_NOW].median_ms * (1 - 1 / speedup.ratio)
        text = f"{asked} is slower than {number} ({listed})"
        return Finding("threads", COSTS, text, saved, f"set INFERENCE_NUM_THREADS to {number}")
    return Finding("threads", FINE, f"{asked} is as fast as any number ({listed})")


def _about_kernels(operators: Sequence[OperatorRun]) -> Finding:
    """Tell which operators take the time, and whether some run in OpenVINO's plain reference code."""
    total = sum(each.milliseconds for each in operators)
    taken = Counter()
    for each in operators:
        taken[each.kind] += each.milliseconds
    listed = ", ".join(f"{kind} {value / total:.0%}" for kind, value in taken.most_common(NUM_KINDS))
    plain = [each for each in operators if each.kernel.startswith("ref")]
    cost = sum(each.milliseconds for each in plain)
    if cost > 0.01 * total:
        kinds = ", ".join(sorted({each.kind for each in plain}))
        text = f"{len(plain)} operators run in reference code ({kinds}); of all time: {listed}"
        return Finding("kernels", COSTS, text, cost, "export it anew, or try another version of OpenVINO")
    return Finding("kernels", FINE, f"no operator that takes time runs in reference code; of all time: {listed}")


def _about_attention(operators: Sequence[OperatorRun]) -> Finding:
    fused = [each for each in operators if each.kind == "ScaledDotProductAttention"]
    softmax = [each for each in operators if each.kind == "Softmax"]
    if not softmax:
        return Finding("attention", FINE, "no softmax is computed by itself: OpenVINO runs attention whole")
    text = (
        f"OpenVINO computes {len(softmax)} attentions by products and softmax one by one, the softmax alone takes "
        f"{sum(each.milliseconds for each in softmax):.2f} ms"
    )
    return Finding("attention", KNOW, f"{text}; {len(fused)} are one operator" if fused else text)


def _about_precision(operators: Sequence[OperatorRun], is_quantised: bool) -> Finding:
    total = sum(each.milliseconds for each in operators)
    narrow = sum(each.milliseconds for each in operators if each.kernel.lower().endswith("i8"))
    between = [each for each in operators if each.kind in ("Convert", "Reorder", "FakeQuantize")]
    cost = sum(each.milliseconds for each in between)
    kind = f"int8, which takes {narrow / total:.0%} of the time" if is_quantised else "float32"
    if cost > 0.1 * total:
        text = f"{kind}; {len(between)} changes of precision take {cost / total:.0%} of the time"
        return Finding("precision", COSTS, text, cost, "run it in float32 here")
    return Finding("precision", FINE, f"{kind}; changes of precision take {cost / total:.0%} of the time")


def _about_change(name: str, measured: Mapping[str, Latency]) -> Finding:
    before = measured[_NOW]
    speedup = paired_speedup(before, measured[name])
    told = f"{speedup.ratio:.2f} x as fast ({speedup.low:.2f} .. {speedup.high:.2f})"
    saved = before.median_ms * (1 - 1 / speedup.ratio)
    if speedup.low <= WORTH:
        return Finding(name, KNOW, f"in {name}: {told}", saved)
    remedy = "set INFERENCE_PRECISION_HINT to bf16"
    if name == "int8":
        remedy = "export it with `precision` int8, and evaluate what it costs in accuracy"
    return Finding(name, GAIN, f"in {name}: {told}", saved, remedy)


def _about_batch(path: Path, model, num_threads: int | None, seconds: float) -> Finding:
    batch = model.inputs[0].partial_shape[0]
    if not batch.is_dynamic:
        return Finding("batch", KNOW, f"the file runs exactly {batch.get_length()} images at a time")
    runners = {str(size): make_openvino_runner(path, size, num_threads) for size in BATCHES}
    measured = measure_latency(runners, seconds=seconds)
    rates = ", ".join(f"{size}: {1000 * size / measured[str(size)].median_ms:.0f} images/s" for size in BATCHES)
    return Finding("batch", KNOW, f"any batch size; {rates}")

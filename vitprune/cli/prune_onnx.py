"""``vitprune prune`` of an ONNX file: a plan applied to the weights in its graph."""

from __future__ import annotations

from pathlib import Path

from vitprune.cli.inputs import choose, find_images, make_batches, refuse_without_data, report_skipped, say_transform
from vitprune.cli.terminal import Tracked, track
from vitprune.errors import VitpruneError


def run_onnx(
    source, plan, given_plan, output, compensate, ridge, data, class_map, classes, images_per_class, strict, batch_size,
    workers, seed,
):  # fmt: skip
    from vitprune.export.onnx_prune import prune_onnx
    from vitprune.export.runtime import open_onnx, open_session, read_facts
    from vitprune.models.load import load

    if Path(output).suffix != ".onnx":
        raise VitpruneError(f"{output}: of an ONNX file comes an ONNX file; end the output in .onnx")
    folder = Path(plan).is_dir()
    if compensate is None and folder and data is not None:
        raise VitpruneError(
            f"{plan} brings its own compensation; leave --data out to take it over, or say --compensate ridge (or bias)"
        )
    if compensate is None and not folder and data is None:
        raise VitpruneError(
            f"{plan} has no compensated weights: pass the pruned folder as --plan, --data DIR (ridge), or "
            "--compensate none"
        )
    refuse_without_data(data, class_map=class_map, classes=classes, images_per_class=images_per_class)
    donor = load(plan) if folder and compensate is None else None
    if compensate is None:
        compensate = "none" if donor is not None else "ridge"
    batches = None
    if data is not None:
        # A file of another tool does not know its transform; the pruned model of the same architecture does.
        knows = bool(read_facts(open_session(source), source))
        if not knows and not folder:
            raise VitpruneError(
                f"{source} does not say which transform its images need; pass the pruned folder as --plan"
            )
        network = open_onnx(source) if knows else load(plan)
        images = find_images(choose(data, class_map, classes, images_per_class, seed), network, labels_matter=False)
        batches = make_batches(images, network, batch_size=batch_size, workers=workers, strict=strict)
        say_transform(network)
    report = prune_onnx(
        source,
        given_plan,
        output,
        compensation=compensate,
        batches=None if batches is None else Tracked(batches, "calibrate"),
        ridge=ridge,
        donor=donor,
        track=track,
    )
    taken_over = given_plan.facts.compensation or "none"
    answer = {
        "output": output,
        "widths": dict(report.widths),
        "num_neurons": report.num_neurons,
        "num_neurons_dense": report.num_neurons_dense,
        "pruning_ratio": report.pruning_ratio,
        "compensation": taken_over if donor is not None else compensate,
        "max_abs_diff": report.max_abs_diff,
        "donor_max_abs_diff": report.donor_max_abs_diff,
        "size_bytes": report.size_bytes,
        "skipped": [] if batches is None else report_skipped(batches),
    }

    def show() -> None:
        print(f"removed {report.pruning_ratio:.1%} of {report.num_neurons_dense} FFN neurons in the graph")
        print(f"compensation: {answer['compensation']}{' (taken from ' + plan + ')' if donor is not None else ''}")
        print(f"largest logit difference between removed and masked neurons {report.max_abs_diff:.2e}")
        if report.donor_max_abs_diff is not None:
            print(f"largest logit difference to {plan} in torch {report.donor_max_abs_diff:.2e}")
        print(f"wrote {output} ({report.size_bytes / 1e6:.1f} MB)")

    return answer, show

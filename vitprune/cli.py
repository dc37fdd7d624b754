"""The command line: unpack, call, save, print; nothing else happens here."""

from __future__ import annotations

import contextlib
import json
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from vitprune import options
from vitprune.errors import VitpruneError
from vitprune.processes import count_processes
from vitprune.recipe import explain_mistake, option_names, read_recipe

EXIT_MISTAKE, EXIT_INTERRUPTED = 2, 130
SECONDS_BETWEEN_LINES = 20
# A run names its images in the header of a safetensors file, which may have 100 MB.
MOST_NAME_BYTES = 80_000_000


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 2 for a user's mistake, 130 after Ctrl-C."""
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    parser, commands = _build_parser()
    try:
        arguments = _parse(parser, commands, argv)
        command, given = arguments.subcommand, arguments[arguments.subcommand]
        _run_command(command, given.as_dict())
    except VitpruneError as error:
        print(f"vitprune: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_MISTAKE
    except KeyboardInterrupt:
        print("vitprune: interrupted; nothing half-written was kept", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def _parse(parser: ArgumentParser, commands: dict[str, ArgumentParser], argv: Sequence[str] | None) -> Namespace:
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv in (["--version"], ["-V"]):
        from vitprune import __version__

        print(__version__)
        raise SystemExit(0)
    if not argv:
        parser.print_help()
        raise SystemExit(EXIT_MISTAKE)
    try:
        return parser.parse_args(argv)
    except UnicodeDecodeError as error:
        raise VitpruneError(f"--config: not a text file ({error.reason})") from error
    except ArgumentError as error:
        command = commands.get(argv[0])
        raise VitpruneError(explain_mistake(error, option_names(command) if command else commands)) from error


def _run_command(command: str, given: dict[str, Any]) -> None:
    """Run one command, or the commands of a recipe, and print the answer on stdout."""
    as_json = given.pop("json", False)
    if command != "discover" and count_processes() > 1:
        raise VitpruneError(f"'{command}' runs on one process; only 'discover' shares its images with others")
    if command == "run":
        answer = _run_recipe(**given, as_json=as_json)
    else:
        outcome = _execute(command, given)
        if outcome is None:
            return
        answer, show = outcome
        if not as_json:
            show()
    if as_json:
        print(json.dumps(answer, indent=2))


def _execute(command: str, given: dict[str, Any]) -> tuple[dict[str, Any], Callable[[], None]] | None:
    """Run one command with stdout kept for its result; what libraries print goes to stderr.

    None where another process has the result.
    """
    given = {key: value for key, value in given.items() if key not in ("config", "json")}
    seed = given.get("seed", 0)
    if not 0 <= seed < 2**63:
        raise VitpruneError(f"seed must be in [0, 2^63), got {seed}")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return _COMMANDS[command](**given)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, named so that torch need not be imported here
            raise
        remedy = "a smaller model" if command == "discover" else "a smaller --batch-size"
        raise VitpruneError(f"out of memory on the device; try {remedy}, or --device cpu") from error


def _run_recipe(recipe: str, dry_run: bool, as_json: bool) -> dict[str, Any]:
    _parser, commands = _build_parser()
    steps = read_recipe(recipe, {name: parser for name, parser in commands.items() if name != "run"})
    answers = []
    for position, (command, options_given) in enumerate(steps, 1):
        given = options_given.as_dict()
        shown = " ".join(f"{key}={value}" for key, value in given.items() if value not in (None, False))
        _note(f"{position}/{len(steps)} {command} {shown}")
        if dry_run:
            continue
        answer, show = _execute(command, given)
        answers.append(answer)
        if not as_json:
            show()
    return {"recipe": recipe, "steps": [command for command, _given in steps], "answers": answers}


# --- arguments ---------------------------------------------------------------------------------------------------


def _build_parser() -> tuple[ArgumentParser, dict[str, ArgumentParser]]:
    parser = ArgumentParser(
        prog="vitprune",
        description="Influential neuron paths of timm Vision Transformers, and smaller models without the rest.",
        exit_on_error=False,
    )
    subcommands = parser.add_subcommands(
        required=True, title="commands", description="'vitprune COMMAND --help' explains one."
    )
    commands = {}
    for name, (summary, add_arguments) in _ARGUMENTS.items():
        command = ArgumentParser(description=summary, exit_on_error=False)
        add_arguments(command)
        command.add_argument("--json", action="store_true", help="print one JSON object on stdout")
        if name != "run":
            command.add_argument("--config", action="config", help="YAML file with any of these options")
        subcommands.add_subcommand(name, command, help=summary)
        commands[name] = command
    return parser, commands


def _listed(choices) -> str:
    return "; ".join(f"{name}: {summary}" for name, summary in choices.items())


def _add_checkpoint(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--checkpoint", type=str, help="weights: .safetensors, .pth (plain state dict), google-research .npz"
    )


def _add_device(parser: ArgumentParser) -> None:
    parser.add_argument("--device", type=str, help="cpu, cuda, cuda:1, ...; default: cuda where there is one")


def _add_images(parser: ArgumentParser, *, required: bool, batch_size: int, what: str) -> None:
    parser.add_argument("--data", type=str, required=required, help=f"folder of class folders: {what}")
    parser.add_argument("--class-map", type=str, help="folder name per line, or JSON {folder: class index}")
    parser.add_argument("--classes", type=str, nargs="+", help="only these: folder names, class indices, English names")
    parser.add_argument("--images-per-class", type=int, help="random sample of each class (default: all)")
    parser.add_argument("--strict", action="store_true", help="refuse undecodable images instead of skipping them")
    parser.add_argument("--batch-size", type=int, default=batch_size, help="images at once")
    parser.add_argument("--workers", type=int, default=0, help="processes that decode images; 0: this one")
    parser.add_argument("--seed", type=int, default=0, help="of every random choice")


def _add_output(parser: ArgumentParser, what: str) -> None:
    parser.add_argument("-o", "--output", type=str, required=True, help=what)
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")


def _add_discover(parser: ArgumentParser) -> None:
    parser.add_argument("model", type=str, help="timm name or folder of a saved model")
    _add_checkpoint(parser)
    _add_images(parser, required=True, batch_size=8, what="images to find paths on")
    parser.add_argument("--method", choices=tuple(options.METHODS), default="jas", help=_listed(options.METHODS))
    parser.add_argument("--top-k", type=int, default=1, help="neurons per FFN on a path")
    parser.add_argument(
        "--tokens",
        choices=tuple(options.TOKENS),
        help=_listed(options.TOKENS) + "; default: cls where the head reads the class token, else patch",
    )
    parser.add_argument(
        "--quadrature",
        type=str,
        help="adaptive (2 nodes, 5 for several tokens, up to 23 in doubt; default of jas and jas-complete), "
        "gauss-legendre:NODES (default of the other methods: gauss-legendre:8), riemann:STEPS (the paper: riemann:20)",
    )
    parser.add_argument(
        "--target", type=str, default="label", help=_listed(options.TARGET_CLASSES) + "; or a class for all images"
    )
    parser.add_argument(
        "--quantity",
        choices=tuple(options.QUANTITIES),
        default="probability",
        help=f"what of the target class is attributed: {_listed(options.QUANTITIES)}",
    )
    parser.add_argument(
        "--precision",
        choices=tuple(options.PRECISIONS),
        default="float32",
        help=_listed(options.PRECISIONS) + "; what its noise could change is decided again in float32",
    )
    parser.add_argument(
        "--shard-size", type=int, default=256, help="images per shard: a killed process loses its unfinished shard"
    )
    parser.add_argument(
        "--memory", type=float, help="GiB to use beside the weights (2 on a CPU, 80 percent of what is free on a GPU)"
    )
    _add_device(parser)
    _add_output(parser, "run folder to write; a killed run goes on")


def _add_prune(parser: ArgumentParser) -> None:
    parser.add_argument(
        "source",
        type=str,
        help="run folder of 'discover', timm name, or folder of a saved model; with --plan also the .onnx file of the "
        "dense model, whose weights are sliced in the graph",
    )
    _add_checkpoint(parser)
    _add_images(parser, required=False, batch_size=32, what="calibration images (default: those of the run)")
    # No defaults here: a plan that is given decides these, and what was asked for beside it must not be ignored.
    parser.add_argument("--ratio", type=float, help=f"share of FFN neurons to remove ({options.DEFAULT_RATIO})")
    parser.add_argument("--target-params", type=float, help="parameters of the whole model instead, such as 4.5e6")
    parser.add_argument("--target-macs", type=float, help="multiply-accumulates of one image instead, such as 0.9e9")
    parser.add_argument("--target-latency", type=float, help="ms per run on --backend instead, measured here")
    parser.add_argument(
        "--backend", type=str, help=f"of --target-latency and --round-to auto: {_listed(options.BACKENDS)}"
    )
    parser.add_argument("--latency-batch-size", type=int, help="images per run of --target-latency (1)")
    parser.add_argument(
        "--keep-classes",
        type=str,
        nargs="+",
        help="only these classes will be asked for (named as for --classes); 'data': those of --data",
    )
    parser.add_argument(
        "--criterion",
        choices=tuple(options.CRITERIA),
        help=f"{_listed(options.CRITERIA)} ({options.DEFAULT_CRITERION})",
    )
    parser.add_argument(
        "--allocation",
        choices=tuple(options.ALLOCATIONS),
        help=f"{_listed(options.ALLOCATIONS)} ({options.DEFAULT_ALLOCATION})",
    )
    parser.add_argument(
        "--round-to", type=str, help="every width is a multiple of it (1); auto: what --backend is fastest at here"
    )
    parser.add_argument(
        "--floor", type=float, help=f"share that global leaves to each FFN at least ({options.DEFAULT_FLOOR})"
    )
    parser.add_argument(
        "--step", type=float, help=f"share that goes before scores are measured anew; 1: never ({options.DEFAULT_STEP})"
    )
    parser.add_argument(
        "--compensate",
        choices=tuple(options.COMPENSATIONS),
        help=f"{_listed(options.COMPENSATIONS)} ({options.DEFAULT_COMPENSATION}; for an .onnx file: that of the plan's "
        "folder)",
    )
    parser.add_argument("--mode", choices=tuple(options.MODES), default="remove", help=_listed(options.MODES))
    parser.add_argument(
        "--ridge", type=float, default=options.DEFAULT_RIDGE, help="regularisation, relative to the mean variance"
    )
    parser.add_argument("--plan", type=str, help="apply this plan (file or pruned folder) instead of making one")
    _add_device(parser)
    _add_output(parser, "folder of the pruned model to write (for an .onnx file: the .onnx file)")


def _add_elastic(parser: ArgumentParser) -> None:
    parser.add_argument("source", type=str, help="run folder of 'discover', timm name, or folder of a saved model")
    _add_checkpoint(parser)
    _add_images(parser, required=False, batch_size=32, what="calibration images (default: those of the run)")
    parser.add_argument(
        "--ratios",
        type=str,
        nargs="+",
        default=["0.1:0.7:0.1"],
        help="shares to remove at which the model is compensated: numbers or FIRST:LAST:STEP",
    )
    parser.add_argument(
        "--criterion",
        choices=tuple(options.CRITERIA),
        default=options.DEFAULT_CRITERION,
        help=_listed(options.CRITERIA),
    )
    parser.add_argument(
        "--allocation",
        choices=tuple(options.ALLOCATIONS),
        default=options.DEFAULT_ALLOCATION,
        help=_listed(options.ALLOCATIONS),
    )
    parser.add_argument(
        "--compensate",
        choices=tuple(options.COMPENSATIONS),
        default=options.DEFAULT_COMPENSATION,
        help=_listed(options.COMPENSATIONS),
    )
    _add_device(parser)
    _add_output(parser, "elastic file to write (.safetensors)")


def _add_ratio(parser: ArgumentParser) -> None:
    parser.add_argument("--ratio", type=float, help="of an elastic file: share of FFN neurons to be gone (0)")


def _add_evaluate(parser: ArgumentParser) -> None:
    parser.add_argument("model", type=str, help="timm name, folder of a saved model, elastic file, or .onnx file")
    _add_checkpoint(parser)
    _add_ratio(parser)
    _add_images(parser, required=True, batch_size=64, what="evaluation images")
    _add_device(parser)


def _add_curve(parser: ArgumentParser) -> None:
    parser.add_argument("source", type=str, help="run folder of 'discover', timm name, or folder of a saved model")
    _add_checkpoint(parser)
    _add_images(parser, required=False, batch_size=32, what="calibration images (default: those of the run)")
    parser.add_argument("--eval-data", type=str, required=True, help="folder of class folders: evaluation images")
    parser.add_argument("--eval-images-per-class", type=int, help="random sample of each class of --eval-data")
    parser.add_argument(
        "--ratios", type=str, nargs="+", help="shares to remove: numbers or FIRST:LAST:STEP (0.1:0.8:0.1)"
    )
    parser.add_argument(
        "--criteria", type=str, nargs="+", default=[options.DEFAULT_CRITERION], help=_listed(options.CRITERIA)
    )
    parser.add_argument(
        "--allocations", type=str, nargs="+", default=[options.DEFAULT_ALLOCATION], help=_listed(options.ALLOCATIONS)
    )
    parser.add_argument(
        "--compensations",
        type=str,
        nargs="+",
        default=[options.DEFAULT_COMPENSATION],
        help=_listed(options.COMPENSATIONS),
    )
    parser.add_argument(
        "--step", type=float, default=options.DEFAULT_STEP, help="share that goes before scores are measured anew"
    )
    parser.add_argument(
        "--max-drop",
        type=float,
        help="find the largest ratio that costs less top-1 than this at 95 percent confidence, instead of --ratios",
    )
    _add_device(parser)
    parser.add_argument("-o", "--output", type=str, required=True, help="folder to write; a killed run goes on there")
    parser.add_argument("--overwrite", action="store_true", help="replace an output of other arguments")


def _add_analyze(parser: ArgumentParser) -> None:
    parser.add_argument("run", type=str, help="run folder of 'discover'")
    _add_images(parser, required=True, batch_size=50, what="test images, other than the run's")
    parser.add_argument(
        "--top-k", type=int, nargs="+", default=[1, 5, 10, 20, 50], help="neurons per FFN that are never masked"
    )
    parser.add_argument(
        "--mask-share", type=float, nargs="+", default=[0.1, 0.3, 0.5, 1.0], help="shares of the others to mask"
    )
    parser.add_argument(
        "--tokens", type=str, nargs="+", default=["cls", "all"], help=f"where to mask: {_listed(options.TOKENS)}"
    )
    parser.add_argument("--depth", type=int, help="mask in the first so many FFNs only")
    _add_device(parser)


def _add_export(parser: ArgumentParser) -> None:
    parser.add_argument("model", type=str, help="folder of a saved model, elastic file, or timm name")
    parser.add_argument("output", type=str, help="ONNX file to write")
    _add_checkpoint(parser)
    _add_ratio(parser)
    _add_images(parser, required=False, batch_size=16, what="images for parity (default: the plan's calibration)")
    parser.add_argument("--num-images", type=int, default=64, help="images to compare with torch")
    parser.add_argument("--int8", action="store_true", help="quantise products with weights to 8 bits, dynamically")
    parser.add_argument(
        "--operators", choices=tuple(options.OPERATORS), default="onnxruntime", help=_listed(options.OPERATORS)
    )
    parser.add_argument("--fixed-batch", type=int, help="images per run of the file (default: any number)")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")


def _add_bench(parser: ArgumentParser) -> None:
    parser.add_argument(
        "models",
        type=str,
        nargs="+",
        help="timm names, folders or .onnx files; a single pruned folder is timed against its dense model",
    )
    _add_checkpoint(parser)
    parser.add_argument(
        "--backend",
        type=str,
        nargs="+",
        help=_listed(options.BACKENDS) + "; default: onnxruntime-cpu, and torch-eager without .onnx files",
    )
    parser.add_argument(
        "--precision",
        type=str,
        nargs="+",
        default=["float32"],
        help=f"torch: {', '.join(options.PRECISIONS_TORCH)}; ONNX Runtime: {', '.join(options.PRECISIONS_ONNX)}",
    )
    parser.add_argument("--batch-size", type=int, nargs="+", default=[1, 8], help="images per run")
    parser.add_argument("--threads", type=int, nargs="+", help="of the operators; default: torch's")
    parser.add_argument("--seconds", type=float, default=5.0, help="per backend, batch size and number of threads")
    parser.add_argument("--device", type=str, default="cpu", help="of the torch backends: cpu, cuda, cuda:1, ...")
    parser.add_argument("-o", "--output", type=str, help="folder for bench.csv, bench.json, bench.png and bench.svg")
    parser.add_argument("--overwrite", action="store_true", help="replace an output that exists")


def _add_doctor(parser: ArgumentParser) -> None:
    parser.add_argument("model", type=str, help="any .onnx file with one input of images, folder, or timm name")
    _add_checkpoint(parser)
    backends = {name: text for name, text in options.BACKENDS.items() if name.startswith("onnxruntime")}
    parser.add_argument("--backend", choices=tuple(backends), default="onnxruntime-cpu", help=_listed(backends))
    parser.add_argument("--batch-size", type=int, default=1, help="images per run")
    parser.add_argument("--threads", type=int, help="of the operators; default: ONNX Runtime's choice")
    parser.add_argument("--seconds", type=float, default=20.0, help="to spend on timing the whole model")


def _add_demo(parser: ArgumentParser) -> None:
    parser.add_argument("-o", "--output", type=str, default="vitprune-demo", help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of every random choice")


def _add_run(parser: ArgumentParser) -> None:
    parser.add_argument("recipe", type=str, help="YAML file: a list of commands with their options")
    parser.add_argument("--dry-run", action="store_true", help="check the recipe and print its commands")


_ARGUMENTS: dict[str, tuple[str, Callable[[ArgumentParser], None]]] = {
    "demo": ("everything on a small ViT and scanned digits, no downloads", _add_demo),
    "discover": ("find the neuron paths of images and the scores of every class", _add_discover),
    "prune": ("remove the FFN neurons that matter least", _add_prune),
    "elastic": ("write one file from which any ratio can be loaded", _add_elastic),
    "curve": ("measure accuracy at many sizes", _add_curve),
    "evaluate": ("measure accuracy", _add_evaluate),
    "analyze": ("mask all but the top neurons of each class, as the paper does", _add_analyze),
    "export": ("write an ONNX file and check it against torch", _add_export),
    "bench": ("time models in torch and ONNX Runtime", _add_bench),
    "doctor": ("tell why a model is not faster here, and what each cause costs", _add_doctor),
    "run": ("execute the commands of a recipe", _add_run),
}

# --- progress and tables -----------------------------------------------------------------------------------------


class _Tracked:
    """Batches with progress on stderr each time they are read."""

    def __init__(self, batches: Any, description: str) -> None:
        self.batches, self.description = batches, description
        self.passes = 0

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.batches)
        for first in batches:
            yield first
            break
        # A reader that only looked at the first batch made no pass.
        self.passes += 1
        suffix = f" (pass {self.passes})" if self.passes > 1 else ""
        yield from _track(batches, self.description + suffix, total=len(self.batches), done=1)


def _track(items: Iterable[Any], description: str, *, total: int | None = None, done: int = 0) -> Iterable[Any]:
    """Show progress and time left while items are taken: a bar on a terminal, a line now and then in a log."""
    total = len(items) if total is None else total
    show = _draw_bar if sys.stderr.isatty() else _log_lines
    return show(items, description, total, done)


def _log_lines(items: Iterable[Any], description: str, total: int, done: int) -> Iterator[Any]:
    from time import monotonic

    started = said = monotonic()
    for count, item in enumerate(items, done):
        if monotonic() - said >= SECONDS_BETWEEN_LINES:
            said = monotonic()
            left = (said - started) / max(count - done, 1) * (total - count)
            _note(f"{description} {count}/{total}, {_clock(said - started)} so far, about {_clock(left)} left")
        yield item
    if total > done:
        _note(f"{description} {total}/{total}, {_clock(monotonic() - started)}")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def _draw_bar(items: Iterable[Any], description: str, total: int, done: int) -> Iterator[Any]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=_console(stderr=True)) as progress:
        task = progress.add_task(description, total=total, completed=done)
        for item in items:
            yield item
            progress.advance(task)


def _console(*, stderr: bool = False):
    from rich.console import Console

    # Tables keep their columns where nobody watches: a pipe or a file has no width to fit.
    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else 120, highlight=False)


def _table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, texts: Sequence[str] = ()) -> None:
    """Print a table; its first column and those of ``texts`` are words, the others numbers."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for position, column in enumerate(columns):
        table.add_column(column, justify="left" if position == 0 or column in texts else "right")
    for row in rows:
        table.add_row(*map(escape, row))
    _console().print(table)


def _note(text: str) -> None:
    print(text, file=sys.stderr)


# --- shared steps ------------------------------------------------------------------------------------------------


def _warn_of_few_classes(network: Any, images: Any, what: str) -> None:
    seen = len(set(images.labels))
    if seen < network.num_classes / 2:
        _note(
            f"warning: the {what} images show {seen} of the {network.num_classes} classes that the model chooses "
            "among; nothing is learned of the others (prune --keep-classes drops them)"
        )


def _pick_device(device: str | None, processes: Any = None) -> str:
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return f"cuda:{processes.local_rank}" if device == "cuda" and processes and processes.count > 1 else device


def _find_images(network, data: str, class_map, classes, images_per_class, seed: int, *, labels_matter: bool = True):
    from vitprune.data import find_images

    if images_per_class is not None and images_per_class < 1:
        raise VitpruneError(f"images_per_class must be at least 1, got {images_per_class}")
    label_names = getattr(network, "label_names", None)
    images = find_images(
        data,
        network.num_classes if labels_matter else network.num_classes or None,
        class_map=class_map,
        label_names=label_names,
        classes=classes,
        images_per_class=images_per_class,
        seed=seed,
    )
    if label_names is not None:
        others = [entry.name for entry in Path(data).iterdir() if entry.is_dir() and entry.name not in label_names]
        if others and class_map is None:
            _note(f"left out {len(others)} folders of {data} that are none of the model's {len(label_names)} classes")
    return images


def _batches(images, model, *, batch_size: int, workers: int, strict: bool):
    from vitprune.data import ImageBatches

    if batch_size < 1:
        raise VitpruneError(f"batch_size must be at least 1, got {batch_size}")
    if workers < 0:
        raise VitpruneError(f"workers must not be negative, got {workers}")
    return ImageBatches(images, model, batch_size=batch_size, num_workers=workers, strict=strict)


def _report_skipped(batches) -> list[str]:
    if batches.skipped:
        name, reason = batches.skipped[0]
        _note(f"skipped {len(batches.skipped)} images that cannot be decoded (first: {name}, {reason})")
    return [name for name, _reason in batches.skipped]


def _load(model: str, checkpoint: str | None, device: str = "cpu", ratio: float | None = None):
    from vitprune.models import load

    _refuse_run(model)
    return load(model, checkpoint=checkpoint, device=device, ratio=ratio)


def _refuse_run(model: str) -> None:
    from vitprune.discovery.run import is_run

    if is_run(model):
        raise VitpruneError(f"{model} is a run, not a model; 'vitprune prune {model} -o PRUNED' makes one of it")


def _as_stored(model: str) -> str:
    return str(Path(model).resolve()) if Path(model).is_dir() else model


# --- commands: each returns its answer for --json and a function that prints it for people -----------------------


def _discover(
    model, checkpoint, data, class_map, classes, images_per_class, strict, batch_size, workers, seed, method, top_k,
    tokens, quadrature, target, quantity, precision, shard_size, memory, device, output, overwrite,
):  # fmt: skip
    import time

    from vitprune.data import describe_class
    from vitprune.discovery.discover import class_paths, count_correct, plan_search
    from vitprune.discovery.memory import budget_bytes
    from vitprune.discovery.run import PATHS_FILE, RUN_FILES, Run, save_run
    from vitprune.discovery.shards import Shards, find_shards, read_shards, share
    from vitprune.files import held, open_resumable, refuse_existing
    from vitprune.processes import join_processes
    from vitprune.progress import untracked

    refuse_existing(output, overwrite=overwrite, owned=RUN_FILES)
    if batch_size < 1 or shard_size < 1:
        name, value = ("batch_size", batch_size) if batch_size < 1 else ("shard_size", shard_size)
        raise VitpruneError(f"{name} must be at least 1, got {value}")
    folder = Path(output).absolute().with_name(f"{Path(output).absolute().name}.shards")
    with contextlib.ExitStack() as stack:
        processes = stack.enter_context(join_processes())
        network = _load(model, checkpoint, _pick_device(device, processes))
        images = _find_images(network, data, class_map, classes, images_per_class, seed)
        if sum(map(len, images.files)) > MOST_NAME_BYTES:
            raise VitpruneError(f"{len(images)} images are too many to name in one run; take some --classes at a time")
        search = plan_search(
            network,
            method=method,
            top_k=top_k,
            tokens=tokens,
            quadrature=quadrature,
            target=_target_class(images, target),
            quantity=quantity,
            precision=precision,
        )
        budget_bytes(memory, next(network.parameters()).device)
        request = _describe_search(network, search, images, batch_size, shard_size)
        shards = Shards(folder, request, images, batch_size, -(-shard_size // batch_size))
        if processes.rank == 0:
            stack.enter_context(held(folder.with_name(f"{folder.name}.lock"), what=folder))
            # Of the request before as well, which may have had more shards.
            owned = {path.name for path in folder.glob("shard-*.safetensors")}
            owned = frozenset(owned.union(shards.path(number).name for number in range(len(shards))))
            open_resumable(folder, request, owned=owned, overwrite=overwrite)
        processes.wait()
        missing = shards.missing(strict=strict)
        processes.wait()  # or another process might see fewer missing
        if len(missing) < len(shards) and processes.rank == 0:
            _note(f"{len(shards) - len(missing)} of {len(shards)} shards are there already")
        started = time.perf_counter()
        with _keeping_what_is_finished(shards, processes):
            find_shards(
                network,
                search,
                shards,
                share(missing, processes),
                num_workers=workers,
                strict=strict,
                memory_gib=memory,
                track=_track if processes.rank == 0 else untracked,
            )
            processes.wait()
            if processes.rank > 0:
                return None
            absent = shards.missing(strict=strict)
            if absent:
                raise VitpruneError(
                    f"{len(absent)} of {len(shards)} shards are missing, or of other images or arguments than these "
                    "(were all processes started alike, and do they see the same files?)"
                )
        seconds = time.perf_counter() - started
        num_searched = sum(len(shards.places(number)) for number in missing)
        found, used, skipped = read_shards(search, shards)
        if skipped:
            _note(f"skipped {len(skipped)} images that cannot be decoded (first: {skipped[0]})")
        run = Run(
            found=found,
            images=used,
            model=_as_stored(model),
            checkpoint=None if checkpoint is None else str(Path(checkpoint).resolve()),
            weights_sha256=request["weights"],
        )
        save_run(run, output)
        shards.remove()
    paths = class_paths(found)
    num_correct, num_images = (each.tolist() for each in count_correct(found))
    answer = {
        "num_images": len(found.labels),
        "paths": str(Path(output) / PATHS_FILE),
        "seconds": seconds,
        "output": output,
        "mean_joint_score": found.joint_scores.mean().item(),
        "class_paths": {images.class_names[index]: path.tolist() for index, path in paths.items()},
        "class_num_images": {images.class_names[index]: num_images[row] for row, index in enumerate(paths)},
        "class_num_correct": {images.class_names[index]: num_correct[row] for row, index in enumerate(paths)},
        "skipped": skipped,
    }
    if found.completeness_errors is not None:
        answer["max_completeness_error"] = found.completeness_errors.max().item()

    def show() -> None:
        rows = []
        for row, (index, path) in enumerate(list(paths.items())[:20]):
            members = found.labels == index
            rows.append(
                (
                    describe_class(images.class_names[index]),
                    str(num_images[row]),
                    str(num_correct[row]),
                    f"{found.joint_scores[members].mean():.3f}",
                    " ".join(str(int(neuron)) for neuron in path[:, 0]),
                )
            )
        suffix = "" if top_k == 1 else f" (first of {top_k} neurons per FFN)"
        _table(f"class paths{suffix}", ("class", "images", "correct", "mean JAS", "neuron by FFN"), rows)
        if len(paths) > 20:
            print(f"... and {len(paths) - 20} more classes")
        if "max_completeness_error" in answer:
            print(f"largest completeness error {answer['max_completeness_error']:.2e}")
        rate = f" ({seconds / num_searched:.2f} s per image)" if num_searched else ""
        earlier = len(images) - num_searched
        print(
            f"{len(found.labels)} images"
            + (f", {earlier} of them searched before" if earlier else "")
            + f", in {seconds:.1f} s{rate}"
        )
        print(f"wrote {output}")

    return answer, show


def _target_class(images, target: str) -> str | int:
    """Return the class that is meant: as for --classes, or the index of a class without images."""
    from vitprune.data import find_class

    names = images.class_names
    if target in options.TARGET_CLASSES or (target.isdecimal() and target not in names.values()):
        return int(target) if target.isdecimal() else target
    return find_class(images.root, names, target)


@contextlib.contextmanager
def _keeping_what_is_finished(shards, processes) -> Iterator[None]:
    """Say what an interruption leaves behind; nothing, if no shard is finished."""
    try:
        yield
    except BaseException:
        finished = len(shards) - len(shards.missing())
        if finished and processes.rank == 0:
            _note(
                f"{finished} of {len(shards)} shards are kept in {shards.folder}; the same command goes on from there"
            )
        elif not finished and processes.count == 1:
            shards.remove()
        raise


def _describe_search(network, search, images, batch_size: int, shard_size: int) -> dict[str, Any]:
    """Say what the shards of a search depend on; the files of each are looked at beside that."""
    import hashlib

    from vitprune import __version__
    from vitprune.data import data_config
    from vitprune.models import architecture, hash_weights

    listed = json.dumps([images.files, images.labels])
    return {
        "vitprune": __version__,
        "architecture": architecture(network),
        "transform": data_config(network),
        "weights": hash_weights(network),
        "data folder": str(images.root),
        "list of images": hashlib.sha256(listed.encode()).hexdigest()[:16],
        "method": search.method,
        "top_k": search.top_k,
        "tokens": search.tokens,
        "quadrature": search.rule.name,
        "target": search.objective.target,
        "quantity": search.objective.quantity,
        "precision": search.precision,
        "batch size": batch_size,
        "shard size": shard_size,
    }


def _prune(
    source, checkpoint, data, class_map, classes, images_per_class, strict, batch_size, workers, seed, ratio,
    target_params, target_macs, target_latency, backend, latency_batch_size, keep_classes, criterion, allocation,
    compensate, mode, round_to, floor, step, ridge, plan, device, output, overwrite,
):  # fmt: skip
    import time

    from vitprune.evaluation.macs import amdahl_ceiling, count_macs, count_parameters, ffn_share
    from vitprune.files import refuse_existing
    from vitprune.models import FOLDER_FILES, hash_weights, save
    from vitprune.pruning.plan import Plan, read_plan
    from vitprune.pruning.prune import apply_plan, prune
    from vitprune.pruning.schedule import needs_steps

    is_onnx = Path(source).suffix == ".onnx"
    refuse_existing(output, overwrite=overwrite, owned=None if is_onnx else FOLDER_FILES)
    if criterion is not None:
        options.check_choice("criterion", criterion, options.CRITERIA)
    if Path(output).resolve() == Path(source).resolve():
        raise VitpruneError(f"{output} is the model itself; choose another output")
    decisions = {"pruning_ratio": ratio, "criterion": criterion, "allocation": allocation}
    round_to = _parse_round_to(round_to)
    decisions = {**decisions, "round_to": round_to, "floor": floor, "step": step}
    decisions = {name: value for name, value in decisions.items() if value is not None}
    targets = {"target_params": target_params, "target_macs": target_macs, "target_latency": target_latency}
    targets = {name: value for name, value in targets.items() if value is not None}
    given_plan = None if plan is None else read_plan(plan)
    if given_plan is not None and (decisions or targets):
        raise VitpruneError(f"--plan decides which neurons stay; leave {', '.join({**decisions, **targets})} out")
    timed = target_latency is not None or round_to == "auto"
    if not timed and (backend, latency_batch_size) != (None, None):
        raise VitpruneError("--backend and --latency-batch-size go with --target-latency or --round-to auto")
    if latency_batch_size is not None and latency_batch_size < 1:
        raise VitpruneError(f"latency_batch_size must be at least 1, got {latency_batch_size}")
    if target_latency is not None and mode == "mask":
        raise VitpruneError("--target-latency is for --mode remove; a masked model is as slow as the dense one")
    if is_onnx:
        if given_plan is None:
            raise VitpruneError(f"{source}: an ONNX file is pruned by a plan; pass --plan (a file, or a pruned folder)")
        unused = {"checkpoint": checkpoint, "keep_classes": keep_classes, "device": device}
        unused = [name for name, value in unused.items() if value is not None]
        if unused or mode != "remove":
            raise VitpruneError(f"{', '.join(unused or ['mode mask'])}: not for ONNX files, whose neurons are removed")
        return _prune_onnx(
            source, plan, given_plan, output, compensate, ridge, data, class_map, classes, images_per_class,
            strict, batch_size, workers, seed,
        )  # fmt: skip
    compensate = options.DEFAULT_COMPENSATION if compensate is None else compensate
    if len(targets) + (ratio is not None) > 1:
        raise VitpruneError(
            f"one target at a time, got {', '.join([*targets, *(['ratio'] if ratio is not None else [])])}"
        )
    if floor is not None and allocation == "uniform":
        raise VitpruneError("--floor is for --allocation global; uniform leaves every FFN the same share")
    if step not in (None, 1) and not needs_steps(criterion or options.DEFAULT_CRITERION):
        raise VitpruneError(f"--step: the scores of criterion {criterion} do not change on the way; leave it out")
    run, network = _open_source(source, checkpoint, device)
    _refuse_without_data(data, class_map=class_map, classes=classes, images_per_class=images_per_class)
    images = _images_of(source, run, network, data, class_map, classes, images_per_class, seed)
    found = None if run is None else run.found
    if keep_classes is not None:
        network, images, found = _keep_classes(network, images, found, keep_classes, data_given=data is not None)
    batches = None
    if images is not None:
        batches = _batches(images, network, batch_size=batch_size, workers=workers, strict=strict)
        if compensate != "none":
            _warn_of_few_classes(network, images, "calibration")
    tracked = None if batches is None else _Tracked(batches, "calibrate")
    started = time.perf_counter()
    if given_plan is None:
        if timed and backend is None:
            backend = "onnxruntime-cpu" if next(network.parameters()).device.type == "cpu" else "torch-eager"
        target = _make_target(network, backend, latency_batch_size, **targets)
        if round_to == "auto":
            decisions["round_to"] = _find_round_to(network, target, ratio, backend, latency_batch_size)
        if tracked is not None:
            tracked.description = _describe_passes(network, ratio, target, criterion, step, compensate)
        pruned, made = prune(
            network,
            tracked,
            **decisions,
            target=target,
            compensation=compensate,
            mode=mode,
            found=found,
            ridge=ridge,
            seed=seed,
            track=_track,
        )
    else:
        applied = {"compensation": compensate, "mode": mode, "ridge": ridge, "weights_sha256": hash_weights(network)}
        made = Plan(given_plan.keep, {**given_plan.facts, **applied})
        pruned = apply_plan(
            network, made, mode=mode, compensation=compensate, ridge=ridge, batches=tracked, seed=seed, track=_track
        )
    seconds = time.perf_counter() - started
    skipped = _report_skipped(batches) if tracked is not None and tracked.passes else []
    used = images.only(batches.files_read) if tracked is not None and tracked.passes else None
    scored_on = run.images if run is not None and made.facts["criterion"] == "jas" else None
    made = Plan(made.keep, {**made.facts, "calibration": _calibration(used, scored_on, _plan_of(source), given_plan)})
    save(pruned, output, plan=made)
    latency = None
    if target_latency is not None:
        latency = _measure_latency(network, pruned, made.facts["target"], backend, latency_batch_size)
    macs, macs_dense = count_macs(pruned), count_macs(network)
    answer = {
        "output": output,
        "latency": latency,
        "widths": made.widths,
        "num_neurons": made.num_neurons,
        "num_neurons_dense": made.num_neurons_dense,
        "pruning_ratio": made.pruning_ratio,
        "target": made.facts.get("target"),
        "round_to": made.facts.get("round_to"),
        "classes": list(getattr(network, "label_names", None) or ()),
        "num_parameters": count_parameters(pruned),
        "num_parameters_dense": count_parameters(network),
        "macs": macs,
        "macs_dense": macs_dense,
        "ffn_share": ffn_share(network),
        "speedup_ceiling": amdahl_ceiling(macs_dense, macs),
        "seconds": seconds,
        "skipped": skipped,
    }

    def show() -> None:
        from vitprune.data import describe_class

        dense_widths = {name: len(keep) for name, keep in made.keep.items()}
        rows = [(name, str(dense_widths[name]), str(width)) for name, width in made.widths.items()]
        _table("neurons", ("FFN", "dense", "kept"), rows)
        print(f"removed {made.pruning_ratio:.1%} of {made.num_neurons_dense} FFN neurons ({mode}) in {seconds:.0f} s")
        if targets:
            asked = made.facts["target"]
            unit = options.TARGETS[asked["kind"]]
            print(f"target {asked['limit']:g} {unit}; predicted {asked['predicted']:.6g}")
        if latency is not None:
            print(
                f"measured {latency['median_ms']:.2f} ms, in the same run dense {latency['dense_median_ms']:.2f} ms: "
                f"{latency['speedup']:.2f} x as fast (predicted {latency['predicted_speedup']:.2f} x)"
            )
        if answer["classes"]:
            shown = ", ".join(map(describe_class, answer["classes"][:10]))
            print(f"answers {len(answer['classes'])} classes: {shown}{', ...' if len(answer['classes']) > 10 else ''}")
        print(f"parameters {answer['num_parameters_dense']:,} -> {answer['num_parameters']:,}")
        print(
            f"multiply-accumulates {macs_dense / 1e6:,.1f} -> {macs / 1e6:,.1f} M: "
            f"at most {answer['speedup_ceiling']:.2f} x faster"
        )
        print(f"(the FFNs of the dense model are {answer['ffn_share']:.0%} of its multiply-accumulates)")
        print(f"wrote {output}")

    return answer, show


def _prune_onnx(
    source, plan, given_plan, output, compensate, ridge, data, class_map, classes, images_per_class, strict, batch_size,
    workers, seed,
):  # fmt: skip
    from vitprune.export.onnx_prune import prune_onnx
    from vitprune.export.runtime import open_onnx, open_session, read_facts
    from vitprune.models import load
    from vitprune.pruning.plan import Plan

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
    _refuse_without_data(data, class_map=class_map, classes=classes, images_per_class=images_per_class)
    donor = load(plan) if folder and compensate is None else None
    if compensate is None:
        compensate = "none" if donor is not None else "ridge"
    batches = None
    if data is not None:
        # A file of another tool does not know its transform; the pruned model of the same architecture does.
        knows = bool(read_facts(open_session(source)))
        if not knows and not folder:
            raise VitpruneError(
                f"{source} does not say which transform its images need; pass the pruned folder as --plan"
            )
        network = open_onnx(source) if knows else load(plan)
        images = _find_images(network, data, class_map, classes, images_per_class, seed, labels_matter=False)
        batches = _batches(images, network, batch_size=batch_size, workers=workers, strict=strict)
        facts = {key: value for key, value in given_plan.facts.items() if key != "weights_sha256"}
        if compensate != "none":
            facts["calibration"] = _calibration(images, None, given_plan)
        given_plan = Plan(given_plan.keep, facts)
    report = prune_onnx(
        source,
        given_plan,
        output,
        compensation=compensate,
        batches=None if batches is None else _Tracked(batches, "calibrate"),
        ridge=ridge,
        donor=donor,
        track=_track,
    )
    taken_over = given_plan.facts.get("compensation", "none")
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
        "skipped": [] if batches is None else _report_skipped(batches),
    }

    def show() -> None:
        print(f"removed {report.pruning_ratio:.1%} of {report.num_neurons_dense} FFN neurons in the graph")
        print(f"compensation: {answer['compensation']}{' (taken from ' + plan + ')' if donor is not None else ''}")
        print(f"largest logit difference between removed and masked neurons {report.max_abs_diff:.2e}")
        if report.donor_max_abs_diff is not None:
            print(f"largest logit difference to {plan} in torch {report.donor_max_abs_diff:.2e}")
        print(f"wrote {output} ({report.size_bytes / 1e6:.1f} MB)")

    return answer, show


def _elastic(
    source, checkpoint, data, class_map, classes, images_per_class, strict, batch_size, workers, seed, ratios,
    criterion, allocation, compensate, device, output, overwrite,
):  # fmt: skip
    import time
    from dataclasses import replace

    from vitprune.evaluation.curve import parse_ratios
    from vitprune.files import refuse_existing
    from vitprune.models import save_elastic
    from vitprune.pruning.elastic import make_elastic

    if Path(output).suffix != ".safetensors":
        raise VitpruneError(f"{output}: an elastic file ends in .safetensors")
    refuse_existing(output, overwrite=overwrite)
    stops = [ratio for ratio in parse_ratios(ratios) if ratio > 0]
    run, network = _open_source(source, checkpoint, device)
    _refuse_without_data(data, class_map=class_map, classes=classes, images_per_class=images_per_class)
    images = _images_of(source, run, network, data, class_map, classes, images_per_class, seed)
    batches = tracked = None
    if images is not None:
        batches = _batches(images, network, batch_size=batch_size, workers=workers, strict=strict)
        tracked = _Tracked(batches, "calibrate")
        if compensate != "none":
            _warn_of_few_classes(network, images, "calibration")
    started = time.perf_counter()
    made = make_elastic(
        network,
        tracked,
        ratios=stops,
        criterion=criterion,
        allocation=allocation,
        compensation=compensate,
        found=None if run is None else run.found,
        seed=seed,
        track=_track,
    )
    seconds = time.perf_counter() - started
    skipped = _report_skipped(batches) if tracked is not None and tracked.passes else []
    used = images.only(batches.files_read) if tracked is not None and tracked.passes else None
    scored_on = run.images if run is not None and criterion == "jas" else None
    facts = {**made.facts, "calibration": _calibration(used, scored_on, _plan_of(source))}
    save_elastic(network, replace(made, facts=facts), output)
    answer = {
        "output": output,
        "ratios": stops,
        "widths": {f"{stop.ratio:g}": stop.widths for stop in made.stops},
        "size_bytes": Path(output).stat().st_size,
        "seconds": seconds,
        "skipped": skipped,
    }

    def show() -> None:
        rows = [
            (
                f"{stop.ratio:g}",
                str(sum(stop.widths.values())),
                f"{min(stop.widths.values())} .. {max(stop.widths.values())}",
            )
            for stop in made.stops
        ]
        _table("compensated at", ("removed", "neurons", "of each FFN"), rows)
        print(f"any ratio up to {stops[-1]:g}: 'vitprune export {output} model.onnx --ratio R', load(.., ratio=R)")
        print(f"wrote {output} ({answer['size_bytes'] / 1e6:.1f} MB) in {seconds:.0f} s")

    return answer, show


def _open_source(source: str, checkpoint: str | None, device: str | None):
    """Open what 'prune' and 'curve' start from: a run (with its model) or a model."""
    from vitprune.discovery.run import is_run, load_run
    from vitprune.models import hash_weights

    if not is_run(source):
        return None, _load(source, checkpoint, _pick_device(device))
    run = load_run(source)
    if checkpoint is not None:
        raise VitpruneError(f"{source} is a run and names its own weights; leave --checkpoint out")
    network = _load(run.model, run.checkpoint, _pick_device(device))
    if hash_weights(network) != run.weights_sha256:
        raise VitpruneError(
            f"{source}: its scores are of other weights than {run.checkpoint or run.model} holds; discover again"
        )
    return run, network


def _images_of(source: str, run, network, data, class_map, classes, images_per_class, seed: int):
    """Find the calibration images: those of --data, else those of the run, else None."""
    if data is not None:
        return _find_images(network, data, class_map, classes, images_per_class, seed, labels_matter=False)
    if run is None:
        return None
    if not run.images.root.is_dir():
        raise VitpruneError(f"the images of {source} are no longer at {run.images.root}; pass --data DIR")
    return run.images


def _keep_classes(network, images, found, wanted: Sequence[str], *, data_given: bool):
    """Reduce a model's classifier, its calibration images and its discovery to some classes."""
    from vitprune.data import find_class
    from vitprune.discovery.discover import only_classes
    from vitprune.models import keep_classes

    if images is None:
        raise VitpruneError("--keep-classes needs images of these classes; pass --data DIR")
    if list(wanted) == ["data"]:
        if not data_given:
            raise VitpruneError("--keep-classes data takes the classes of --data DIR, which is missing")
        indices = sorted(images.class_names)
    else:
        indices = sorted({find_class(images.root, images.class_names, name) for name in wanted})
    reduced = keep_classes(network, indices, label_names=[images.class_names[index] for index in indices])
    return reduced, images.only_classes(indices), None if found is None else only_classes(found, indices)


def _refuse_elastic(model: str) -> None:
    if Path(model).suffix == ".safetensors":
        raise VitpruneError(f"{model}: name the ONNX file of one ratio; 'vitprune export {model} OUT.onnx --ratio R'")


def _describe_passes(
    network, ratio: float | None, target, criterion: str | None, step: float | None, compensate: str
) -> str:
    """Say what the images are read for, so that a user sees how much is still to come."""
    from vitprune.pruning.schedule import list_stops, needs_steps
    from vitprune.pruning.target import target_neurons

    if not needs_steps(criterion or options.DEFAULT_CRITERION):
        return "calibrate"
    target = target or target_neurons(network, options.DEFAULT_RATIO if ratio is None else ratio)
    stops = list_stops(target.share, options.DEFAULT_STEP if step is None else step)
    then = "" if compensate == "none" else ", then compensation"
    return f"calibrate: {len(stops)} {'ranking' if len(stops) == 1 else 'rankings'}{then}"


def _parse_round_to(round_to: str | None) -> int | str | None:
    if round_to in (None, "auto"):
        return round_to
    if not round_to.isdecimal() or int(round_to) < 1:
        raise VitpruneError(f"round_to must be a number of at least 1, or auto; got {round_to}")
    return int(round_to)


def _find_round_to(network, target, ratio: float | None, backend: str, batch_size: int | None) -> int:
    from vitprune.export.alignment import find_round_to
    from vitprune.export.ffn_latency import ffn_shapes

    share = target.share if target is not None else options.DEFAULT_RATIO if ratio is None else ratio
    largest = max(ffn_shapes(network).values(), key=lambda shape: shape.num_neurons)
    device = str(next(network.parameters()).device)
    _note(f"timing widths of {largest.num_neurons * (1 - share):.0f} neurons on {backend}")
    found = find_round_to(largest, share, backend=backend, batch_size=batch_size or 1, device=device)
    _note(f"widths are multiples of {found}")
    return found


def _make_target(network, backend: str | None, batch_size: int | None, **targets: float):
    """Build the target that was asked for; None where the ratio decides."""
    from vitprune.evaluation.macs import count_macs
    from vitprune.pruning.target import target_latency, target_macs, target_parameters

    if not targets:
        return None
    ((name, limit),) = targets.items()
    if name == "target_params":
        return target_parameters(network, limit)
    if name == "target_macs":
        return target_macs(network, limit, total=count_macs(network))
    from vitprune.export.ffn_latency import measure_ffn_latency

    device = str(next(network.parameters()).device)
    total, tables = measure_ffn_latency(
        network, backend=backend, batch_size=batch_size or 1, device=device, track=_track
    )
    return target_latency(network, limit, total=total, tables=tables)


def _measure_latency(network, pruned, asked: dict, backend: str, batch_size: int | None) -> dict[str, Any]:
    """Time the pruned model beside the dense one, which tells a prediction's error from a change of the machine."""
    from vitprune.export.bench import bench

    device = "cpu" if backend.startswith("onnxruntime") else str(next(network.parameters()).device)
    rows = bench(
        {"dense": network, "pruned": pruned},
        backends=[backend],
        batch_sizes=[batch_size or 1],
        device=device,
        track=_track,
    )
    dense, small = rows
    return {
        "backend": small.backend,
        "batch_size": small.batch_size,
        "median_ms": small.median_ms,
        "dense_median_ms": dense.median_ms,
        "speedup": small.speedup,
        "predicted_ms": asked["predicted"],
        "predicted_speedup": asked["dense"] / asked["predicted"],
    }


def _curve(
    source, checkpoint, data, class_map, classes, images_per_class, strict, batch_size, workers, seed, eval_data,
    eval_images_per_class, ratios, criteria, allocations, compensations, step, max_drop, device, output, overwrite,
):  # fmt: skip
    from dataclasses import asdict

    from vitprune.evaluation.curve import Curve, find_largest_ratio, measure_curve, parse_ratios
    from vitprune.files import FORMAT_VERSION, open_resumable, write_json
    from vitprune.models import architecture
    from vitprune.report.curve import render_curve, write_table

    several = {"criteria": criteria, "allocations": allocations, "compensations": compensations}
    if max_drop is not None:
        if ratios is not None:
            raise VitpruneError("--max-drop looks for the ratio itself; leave --ratios out")
        for name, values in several.items():
            if len(values) > 1:
                raise VitpruneError(f"--max-drop prunes in one way; name one of --{name}, not {len(values)}")
    shares = parse_ratios(["0.1:0.8:0.1"] if ratios is None else ratios)
    run, network = _open_source(source, checkpoint, device)
    _refuse_without_data(data, class_map=class_map, classes=classes, images_per_class=images_per_class)
    images = _images_of(source, run, network, data, class_map, classes, images_per_class, seed)
    if images is None:
        raise VitpruneError("curve needs calibration images; pass --data DIR")
    others = _find_images(network, eval_data, class_map, None, eval_images_per_class, seed)
    used = _calibration(images, None if run is None else run.images, _plan_of(source if run is None else run.model))
    _refuse_shared(others, used["sha256"], source)
    calibration, evaluation = (
        _batches(each, network, batch_size=batch_size, workers=workers, strict=strict) for each in (images, others)
    )
    request = {**_describe_run(source, run, network, images, others), "step": step, "seed": seed}
    owned = frozenset({"points", "curve.json", "curve.csv", "curve.png", "curve.svg"})
    folder = open_resumable(output, request, owned=owned, overwrite=overwrite)
    curve = Curve(**several, step=step, seed=seed, folder=folder / "points")
    calibrated = set(compensations) != {"none"}
    for each, what in ((images, "calibration"), (others, "evaluation"))[0 if calibrated else 1 :]:
        _warn_of_few_classes(network, each, what)
    found = None if run is None else run.found
    largest = None
    if max_drop is None:
        points = measure_curve(network, calibration, evaluation, curve, ratios=shares, found=found, track=_track)
    else:
        largest, points = find_largest_ratio(
            network, calibration, evaluation, curve, max_drop=max_drop, found=found, track=_track
        )
    skipped = [name for batches in (calibration, evaluation) for name in _report_skipped(batches)]
    rows = [asdict(point) for point in points]
    answer = {"output": output, "points": rows, "max_drop": max_drop, "largest_ratio": largest, "skipped": skipped}
    evaluated = {"evaluation_data": str(others.root), "evaluation_files": others.files}
    write_json(folder / "curve.json", {"kind": "curve", "version": FORMAT_VERSION, **answer, **evaluated})
    write_table(points, folder / "curve.csv")
    # Not the name of a run's folder: the picture travels without it.
    title = f"{architecture(network)}, {points[0].num_images} images, no retraining"
    for suffix in ("png", "svg"):
        render_curve(points, folder / f"curve.{suffix}", title=title, max_drop=max_drop)

    def show() -> None:
        dense, *pruned = points
        # What is the same in every row goes into the title: the table shall fit 80 columns.
        names = ("criterion", "allocation", "compensation")
        varied = [name for name in names if len({getattr(point, name) for point in pruned}) > 1]
        shared = [str(getattr(pruned[0], name)) for name in names if name not in varied] if pruned else []
        cells = [
            (
                *(getattr(point, name) for name in varied),
                "dense" if point is dense else f"{point.pruning_ratio:.2f}",
                f"{point.num_parameters / 1e6:.2f} M",
                f"{point.top1:.4f}",
                f"{point.top1_low:.3f} .. {point.top1_high:.3f}",
                *(
                    ("", "", "")
                    if point is dense
                    else (f"{point.drop:+.4f}", f"{point.drop_bound:+.4f}", f"{point.p_value:.2g}")
                ),
            )
            for point in points
        ]
        columns = (*varied, "removed", "params", "top-1", "95 % interval", "drop", "at most", "p")
        _table(", ".join(["accuracy against size", *shared]), columns, cells)
        print("at most: 95 % upper bound of the drop, paired with the dense model; p: McNemar")
        if largest is not None:
            print(
                f"largest ratio that costs at most {max_drop:g} top-1, at 95 % confidence: {largest:.2f} "
                f"({points[0].num_images} images)"
            )
        print(f"wrote {output}: curve.csv, curve.json, curve.png, curve.svg")

    return answer, show


def _evaluate(
    model, checkpoint, ratio, data, class_map, classes, images_per_class, strict, batch_size, workers, seed, device
):
    from vitprune.data import describe_class
    from vitprune.evaluation.accuracy import evaluate

    network = _open(model, checkpoint, device, ratio)
    images = _find_images(network, data, class_map, classes, images_per_class, seed)
    _refuse_overlap(model, network, images)
    batches = _batches(images, network, batch_size=batch_size, workers=workers, strict=strict)
    measured = evaluate(network, _Tracked(batches, "evaluate"))
    skipped = _report_skipped(batches)
    answer = {
        "top1": measured.top1,
        "top5": measured.top5,
        "num_images": measured.num_images,
        "num_classes": network.num_classes,
        "top1_interval": list(measured.top1_interval),
        "per_class": {
            images.class_names[index]: {"top1": top1, "num_images": measured.images_by_class[index]}
            for index, top1 in measured.top1_by_class.items()
        },
        "skipped": skipped,
    }

    def show() -> None:
        low, high = measured.top1_interval
        print(f"top-1 {measured.top1:.4f} (95 % interval {low:.4f} .. {high:.4f})")
        print(f"top-5 {measured.top5:.4f}")
        seen = len(measured.top1_by_class)
        print(f"{measured.num_images} images of {seen} classes; the model chooses among {network.num_classes}")
        ranked = sorted(measured.top1_by_class.items(), key=lambda pair: pair[1])[:10]
        rows = [
            (describe_class(images.class_names[index]), str(measured.images_by_class[index]), f"{top1:.3f}")
            for index, top1 in ranked
        ]
        title = "per class" if len(ranked) == len(measured.top1_by_class) else "per class, the ten lowest (--json: all)"
        _table(title, ("class", "images", "top-1"), rows)

    return answer, show


def _analyze(
    run, data, class_map, classes, images_per_class, strict, batch_size, workers, seed, top_k, mask_share, tokens,
    depth, device,
):  # fmt: skip
    from dataclasses import asdict

    from vitprune.evaluation.topk_mask import measure_topk_mask

    source, (run, network) = run, _open_source(run, None, device)
    if run is None:
        raise VitpruneError(f"{source} is no run; run 'vitprune discover MODEL --data DIR -o RUN' first")
    for scope in tokens:
        options.check_choice("tokens", scope, options.TOKENS)
    images = _find_images(network, data, class_map, classes, images_per_class, seed)
    _refuse_shared(images, _calibration(run.images, None, _plan_of(run.model))["sha256"], source)
    batches = _batches(images, network, batch_size=batch_size, workers=workers, strict=strict)
    rows = measure_topk_mask(
        network,
        batches,
        run.found,
        top_ks=top_k,
        mask_shares=mask_share,
        tokens=tokens,
        depth=depth,
        track=_track,
    )
    answer = {"rows": [asdict(row) for row in rows], "skipped": _report_skipped(batches)}

    def show() -> None:
        cells = [
            (
                row.mask,
                row.tokens,
                str(row.top_k),
                f"{row.mask_share:.0%}",
                str(row.num_neurons_masked),
                f"{row.probability:.4f}",
                f"{row.top1:.4f}",
            )
            for row in rows
        ]
        columns = ("mask", "tokens", "top-K", "masked of others", "neurons", "probability", "top-1")
        _table(f"top-K neurons of each class ({rows[0].num_images} images)", columns, cells)
        print("oracle class: each image is masked by the scores of its true class, which no deployed model knows")

    return answer, show


def _open(model: str, checkpoint: str | None, device: str | None, ratio: float | None = None):
    if Path(model).suffix != ".onnx":
        return _load(model, checkpoint, _pick_device(device), ratio)
    if ratio is not None:
        raise VitpruneError(f"{model} has one width only; leave --ratio out")
    if checkpoint is not None:
        raise VitpruneError(f"{model} holds its own weights; leave --checkpoint out")
    if device not in (None, "cpu"):
        raise VitpruneError(f"{model} runs on ONNX Runtime's CPU provider, not on '{device}'")
    from vitprune.export.runtime import open_onnx

    return open_onnx(model)


def _refuse_without_data(data: str | None, **options_of_data: Any) -> None:
    """Refuse options that choose among images where no images are named."""
    given = [name for name, value in options_of_data.items() if value is not None]
    if data is None and given:
        raise VitpruneError(f"{', '.join(given)}: choose among the images of --data DIR, which is missing")


def _plan_of(model: str, ratio: float | None = None):
    from vitprune.models import PLAN_FILE
    from vitprune.pruning.elastic import read_elastic_plan
    from vitprune.pruning.plan import read_plan

    if Path(model).suffix == ".safetensors" and Path(model).is_file():
        return read_elastic_plan(model, ratio)
    return read_plan(model) if (Path(model) / PLAN_FILE).is_file() else None


def _calibration(used, scored_on, *plans) -> dict[str, Any]:
    """Record every image that had a say: those read now, those of the run's scores, and those of earlier plans."""
    from vitprune.data import hash_images

    hashes = {digest for plan in plans if plan is not None for digest in plan.calibration}
    for images in (used, scored_on):
        if images is not None:
            hashes.update(hash_images(images))
    named = used or scored_on
    facts = {} if named is None else {"data": str(named.root), "files": named.files, "labels": named.labels}
    return {**facts, "sha256": sorted(hashes - {""})}


def _refuse_overlap(model: str, network, images) -> None:
    plan = _plan_of(model)
    used = getattr(network, "calibration", frozenset()) if plan is None else plan.calibration
    if used:
        _refuse_shared(images, used, model)


def _refuse_shared(images, used: Iterable[str], source: str) -> None:
    """Refuse to measure accuracy on images that had a say, whose content hashes are given."""
    from vitprune.data import hash_images

    used = set(used) - {""}
    shared = [name for name, digest in zip(images.files, hash_images(images), strict=True) if digest in used]
    if shared:
        raise VitpruneError(
            f"{len(shared)} of {len(images)} evaluation images were calibration images of {source} "
            f"(first: {shared[0]}); evaluate on others"
        )


def _describe_run(source: str, run, network, images, others) -> dict[str, Any]:
    """Say everything that a curve's points depend on beside their own names."""
    from vitprune import __version__
    from vitprune.data import data_config, hash_images
    from vitprune.discovery.run import RUN_FILES
    from vitprune.files import hash_file
    from vitprune.models import architecture, hash_weights

    return {
        "vitprune": __version__,
        "architecture": architecture(network),
        "transform": data_config(network),
        "weights": hash_weights(network),
        "calibration images": sorted(zip(hash_images(images), images.labels, strict=True)),
        "evaluation images": sorted(zip(hash_images(others), others.labels, strict=True)),
        "run": None if run is None else {name: hash_file(Path(source) / name) for name in sorted(RUN_FILES)},
    }


def _export(
    model, output, checkpoint, ratio, data, class_map, classes, images_per_class, strict, batch_size, workers, seed,
    num_images, int8, operators, fixed_batch, overwrite,
):  # fmt: skip
    from vitprune.export.onnx_file import export_onnx
    from vitprune.files import refuse_existing

    refuse_existing(output, overwrite=overwrite)
    if num_images < 1:
        raise VitpruneError(f"num_images must be at least 1, got {num_images}")
    network = _load(model, checkpoint, ratio=ratio)
    plan = _plan_of(model, ratio)
    _refuse_without_data(data, class_map=class_map, classes=classes, images_per_class=images_per_class)
    if data is not None:
        images = _find_images(network, data, class_map, classes, images_per_class, seed, labels_matter=False)
    else:
        images = _calibration_images(model, plan)
    batches = _batches(images.head(num_images), network, batch_size=batch_size, workers=workers, strict=strict)
    report = export_onnx(
        network,
        output,
        _Tracked(batches, "parity"),
        plan=plan,
        precision="int8" if int8 else "float32",
        operators=operators,
        batch_size=fixed_batch,
    )
    answer = {
        "path": output,
        "precision": report.precision,
        "max_abs_diff": report.max_abs_diff,
        "top1_agreement": report.top1_agreement,
        "top1": report.top1 if network.num_classes else None,
        "size_bytes": report.size_bytes,
        "num_images": report.num_images,
        "float32": None if report.float32 is None else vars(report.float32),
        "speedup": None if report.speedup is None else vars(report.speedup),
        "skipped": _report_skipped(batches),
    }

    def show() -> None:
        for precision, parity in (("float32", report.float32), (report.precision, report)):
            if parity is not None:
                print(
                    f"{precision}: largest logit difference to torch {parity.max_abs_diff:.2e}, same first answer on "
                    f"{parity.top1_agreement:.2%} of {parity.num_images} images"
                    + (f", top-1 {parity.top1:.4f}" if network.num_classes else "")
                )
        print(f"wrote {output} ({report.size_bytes / 1e6:.1f} MB)")
        if report.speedup is not None:
            low, high = report.speedup.low, report.speedup.high
            print(f"int8 runs {report.speedup.ratio:.2f} x as fast as float32 here ({low:.2f} .. {high:.2f})")

    return answer, show


def _calibration_images(model: str, plan):
    from vitprune.data import ImageSet

    facts = {} if plan is None else plan.facts.get("calibration", {})
    if "data" not in facts or not Path(facts["data"]).is_dir():
        raise VitpruneError(f"parity needs real images and {model} names none that are there; pass --data DIR")
    return ImageSet(Path(facts["data"]), tuple(facts["files"]), tuple(facts["labels"]))


def _bench(models, checkpoint, backend, precision, batch_size, threads, seconds, device, output, overwrite):
    from dataclasses import asdict

    from vitprune.export.bench import DEFAULT_BACKENDS, bench, describe_hardware
    from vitprune.files import FORMAT_VERSION, atomic_folder, refuse_existing, write_json
    from vitprune.report.bench import BENCH_FILES, render_bench, write_bench

    if output is not None:
        refuse_existing(output, overwrite=overwrite, owned=BENCH_FILES)
    networks = _models_to_bench(models, checkpoint)
    has_files = any(isinstance(network, Path) for network in networks.values())
    rows = bench(
        networks,
        backends=backend or (DEFAULT_BACKENDS[-1:] if has_files else DEFAULT_BACKENDS),
        precisions=precision,
        batch_sizes=batch_size,
        num_threads=threads,
        device=device,
        seconds=seconds,
        memory=True,
        track=_track,
    )
    hardware = describe_hardware([row.backend for row in rows], device)
    answer = {"rows": [asdict(row) for row in rows], "hardware": hardware}
    if output is not None:
        with atomic_folder(output) as folder:
            write_json(folder / "bench.json", {"kind": "bench", "version": FORMAT_VERSION, **answer})
            write_bench(rows, folder / "bench.csv")
            for suffix in ("png", "svg"):
                render_bench(rows, folder / f"bench.{suffix}", title=hardware["processor"])

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
                f"{row.speedup_ceiling:.2f}",
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
        _table(
            ", ".join([f"latency, speed-up over {rows[0].model} in {rows[0].precision} ± 95 % interval", *shared]),
            columns,
            cells,
        )
        print("ceiling: what fewer multiply-accumulates allow at most (Amdahl); share: of it that was reached")
        if any(row.ceiling_share is not None and row.speedup_low > row.speedup_ceiling for row in rows):
            print(
                "above the ceiling: this backend ran the wider model at fewer multiply-accumulates per second "
                "(memory, caches, kernels), so there is more to win than they tell"
            )
        if output is not None:
            print(f"wrote {output}: {', '.join(sorted(BENCH_FILES))}")

    return answer, show


def _doctor(model, checkpoint, backend, batch_size, threads, seconds):
    import tempfile
    from dataclasses import asdict

    from vitprune.export.doctor import VERDICTS, diagnose

    for name, value in (("batch_size", batch_size), ("threads", threads)):
        if value is not None and value < 1:
            raise VitpruneError(f"{name} must be at least 1, got {value}")
    _refuse_elastic(model)
    if Path(model).suffix == ".onnx" and checkpoint is not None:
        raise VitpruneError(f"{model} holds its own weights; leave --checkpoint out")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(model)
        if path.suffix != ".onnx":
            from vitprune.export.bench import random_batch
            from vitprune.export.onnx_file import export_onnx

            network = _load(model, checkpoint)
            path = Path(folder) / "model.onnx"
            export_onnx(network, path, [random_batch(network, 2)], plan=_plan_of(model))
        found = diagnose(
            path, backend=backend, batch_size=batch_size, num_threads=threads, seconds=seconds, track=_track
        )
    answer = {**asdict(found), "path": model, "findings": [asdict(finding) for finding in found.findings]}

    def show() -> None:
        cells = [
            (
                finding.name,
                finding.verdict,
                "" if finding.cost_ms is None else f"{finding.cost_ms:.2f}",
                finding.text + (f" -> {finding.remedy}" if finding.remedy else ""),
            )
            for finding in found.findings
        ]
        columns = ("what", "verdict", "ms", "finding -> remedy")
        _table(f"{model} on {backend}, batch {found.batch_size}", columns, cells, texts=columns[1::2])
        share = "" if found.ffn_share is None else f", {found.ffn_share:.0%} of them in FFNs"
        print(f"one run takes {found.median_ms:.2f} ms")
        print(f"{found.macs / 1e6:,.1f} M multiply-accumulates per image{share}")
        print("; ".join(f"{verdict}: {meaning}" for verdict, meaning in VERDICTS.items()))

    return answer, show


def _models_to_bench(models: Sequence[str], checkpoint: str | None) -> dict[str, Any]:
    """Load what is to be timed by name; ONNX files stay paths."""
    from vitprune.models import build_dense

    folders = [name for name in models if Path(name).is_dir()]
    files = [name for name in models if Path(name).suffix == ".onnx"]
    for name in models:
        _refuse_elastic(name)
    if checkpoint is not None and len(folders) + len(files) == len(models):
        raise VitpruneError(f"{models[0]} has its own weights; leave --checkpoint out")
    if len(set(models)) < len(models) or "dense" in models:
        raise VitpruneError(f"models must be different, and not called 'dense', got {', '.join(models)}")
    networks: dict[str, Any] = {}
    if len(models) == 1 and folders:
        _refuse_run(models[0])
        networks["dense"] = build_dense(models[0])
    for name in models:
        networks[name] = Path(name) if name in files else _load(name, None if name in folders else checkpoint)
    return networks


def _demo(output, seed):
    from vitprune.demo import run_demo

    result = run_demo(output, seed=seed, track=_track, note=_note)

    def show() -> None:
        for title, columns, rows in result.tables:
            _table(title, columns, rows)
        print(f"wrote {result.output}: " + ", ".join(result.files))
        print(f"try next: vitprune discover {result.model} --data {result.data} -o RUN")

    return result.answer, show


_COMMANDS: dict[str, Callable[..., tuple[dict[str, Any], Callable[[], None]]]] = {
    "demo": _demo,
    "discover": _discover,
    "prune": _prune,
    "elastic": _elastic,
    "curve": _curve,
    "evaluate": _evaluate,
    "analyze": _analyze,
    "export": _export,
    "bench": _bench,
    "doctor": _doctor,
}

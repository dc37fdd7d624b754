"""Faults at random points of real commands: killed, no space, no memory, damaged and vanished files, two at once.

``python tests/faults.py --faults 312 --seed 1`` injects so many and prints the table of docs/trust.md. After each, what
was written is what an undisturbed run writes, or the command ended with one line that says why; and in the end the same
command finishes with the files of an undisturbed run. What is left is never half of a file.
"""

from __future__ import annotations

import argparse
import errno
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from conftest import TINY, make_vit, photos
from quick import free_port, start

import vitprune
from vitprune.files import CARD_FILE

CLASSES = ["ant", "bee", "cat", "dog", "elk"]
# Seconds after which a command that hangs is a failure.
PATIENCE = 120
COMMANDS = {
    "discover": "discover DENSE --data PHOTOS --strict --shard-size 3 --batch-size 3",
    "prune": "prune DENSE --data PHOTOS --strict",
    "prune parts": "prune DENSE --data PHOTOS --strict --parts ffn qk --step 1",
    "elastic": "elastic DENSE --data PHOTOS --strict --ratios 0.25 0.5",
    "evaluate": "evaluate HALF --data OTHERS --against DENSE --strict",
    "curve": "curve DENSE --data PHOTOS --eval-data OTHERS --ratios 0.25 0.5 --step 1 --strict",
    "analyze": "analyze RUN --experiments scores manipulation similarity",
    "recover": "recover HALF --data PHOTOS --epochs 3 --batch-size 4",
}
OF_TWO = "one of two processes killed"
# Of a folder: what holds times or speeds, which no two runs share, and what a killed run goes on from.
VARY = (CARD_FILE, "recovery.json", "steps.jsonl", "recovery.png", "request.json")


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        kind: key of ``KINDS``.
        command: key of ``COMMANDS``.
        amount: in [0, 1): when, or how much.
        seed: of everything else that is chosen.
    """

    kind: str
    command: str
    amount: float
    seed: int


@dataclass(frozen=True)
class Place:
    """Where faults are injected.

    Attributes:
        root: folder with models, photos, a run and a pruned folder.
        references: command -> what it writes undisturbed.
        of_two: the same on two processes, whose sums are rounded differently.
        seconds: command -> how long that takes.
    """

    root: Path
    references: dict[str, Path]
    of_two: dict[str, Path]
    seconds: dict[str, float]


def arguments_of(command: str, root: Path, output: Path) -> list[str]:
    words = {"DENSE": "dense", "PHOTOS": "photos", "OTHERS": "others", "RUN": "run", "HALF": "half"}
    given = [str(root / words[word]) if word in words else word for word in COMMANDS[command].split()]
    name = f"{output}.safetensors" if command == "elastic" else str(output)
    return [*given, "-o", name, "--device", "cpu"]


def output_of(command: str, output: Path) -> Path:
    return Path(f"{output}.safetensors") if command == "elastic" else output


def _child(arguments: Sequence[str], log: str, prepare: Callable[..., None] | None, extra: tuple, environment) -> None:
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # As a command of its own has it.
    multiprocessing.set_start_method("fork", force=True)
    from vitprune.cli import main

    if prepare is not None:
        prepare(*extra)
    Path(f"{log}.begun").touch()
    sys.exit(main(list(arguments)))


def begin(arguments: Sequence[str], log: Path, prepare=None, extra=(), **environment: str) -> BaseProcess:
    begun = Path(f"{log}.begun")
    begun.unlink(missing_ok=True)
    process = start(_child, list(arguments), str(log), prepare, extra, environment)
    while not begun.exists() and process.is_alive():
        time.sleep(0.002)
    return process


def finish(processes: Sequence[BaseProcess]) -> list[int]:
    """Wait for processes; -9 for those that had to be killed because they hung."""
    deadline = time.monotonic() + PATIENCE
    waiting = {process.sentinel: process for process in processes}
    while waiting and time.monotonic() < deadline:
        for sentinel in wait(list(waiting), timeout=1):
            waiting.pop(sentinel)
    for process in waiting.values():
        process.kill()
    for process in processes:
        process.join()
    if waiting:
        raise AssertionError(f"hung for {PATIENCE} s")
    return [process.exitcode for process in processes]


def limit_files(num_bytes: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes))


def limit_memory(num_bytes: int) -> None:
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + num_bytes, held + num_bytes))


def fail_call(name: str, number: int, code: int) -> None:
    """Let the n-th call of a function of ``os`` fail."""
    function, calls = getattr(os, name), Counter()

    def failing(*args, **kwargs):
        calls[name] += 1
        if calls[name] == number:
            raise OSError(code, os.strerror(code))
        return function(*args, **kwargs)

    setattr(os, name, failing)


def begin_two(arguments: Sequence[str], log: Path) -> tuple[list[Path], list[BaseProcess]]:
    """Start a command on two processes, as torchrun does; return their logs and them."""
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    logs = [log, log.with_name("rank1.log")]
    ranks = [begin(arguments, logs[rank], RANK=str(rank), LOCAL_RANK=str(rank), **together) for rank in range(2)]
    return logs, ranks


def children_of(pid: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = status.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            found.append(int(status.parent.name))
    return found


def same_files(got: Path, wanted: Path) -> str | None:
    """Say how an output differs from an undisturbed one; None where it does not."""
    if not got.exists():
        return f"{got.name} is not there"
    if wanted.is_file():
        return None if got.read_bytes() == wanted.read_bytes() else f"{got.name} differs"
    names = [
        {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name not in VARY}
        for folder in (got, wanted)
    ]
    if names[0] != names[1]:
        return f"other files: {sorted(names[0] ^ names[1])[:3]}"
    different = [name for name in sorted(names[0]) if (got / name).read_bytes() != (wanted / name).read_bytes()]
    return f"{', '.join(different[:3])} differ" if different else None


# Kind -> how a fault of it is injected: (place, fault, arguments, log, output) -> exit codes.
KINDS: dict[str, Callable[[Place, Fault, list[str], Path, Path], list[int]]] = {}


def kind(name: str):
    def add(inject):
        KINDS[name] = inject
        return inject

    return add


def signalled(number: int):
    def inject(place: Place, fault: Fault, arguments: list[str], log: Path, output: Path) -> list[int]:
        process = begin(arguments, log)
        wait([process.sentinel], timeout=fault.amount * place.seconds[fault.command])
        if process.is_alive():
            os.kill(process.pid, number)
        return finish([process])

    return inject


KINDS["SIGKILL"] = signalled(signal.SIGKILL)
KINDS["SIGTERM"] = signalled(signal.SIGTERM)
KINDS["SIGINT"] = signalled(signal.SIGINT)


@kind("no space left")
def _(place, fault, arguments, log, output):
    # From less than any weights to more than any file of these commands; what they tell goes into a file as well.
    return finish([begin(arguments, log, limit_files, (8_000 + int(200_000 * fault.amount**3),))])


@kind("fsync fails")
def _(place, fault, arguments, log, output):
    return finish([begin(arguments, log, fail_call, ("fsync", 1 + int(6 * fault.amount), errno.ENOSPC))])


@kind("rename fails")
def _(place, fault, arguments, log, output):
    return finish([begin(arguments, log, fail_call, ("replace", 1 + int(6 * fault.amount), errno.ENOSPC))])


@kind("memory capped")
def _(place, fault, arguments, log, output):
    return finish([begin(arguments, log, limit_memory, (int(100 * 2**20 * fault.amount**2),))])


@kind("image deleted or replaced")
def _(place, fault, arguments, log, output):
    process = begin(arguments, log)
    wait([process.sentinel], timeout=fault.amount * place.seconds[fault.command])
    image = random.Random(fault.seed).choice(sorted((place.root / "photos").rglob("*.png")))
    kept = image.read_bytes()
    if fault.seed % 2:
        image.unlink()
    else:
        image.write_bytes(kept[: len(kept) // 2])
    try:
        return finish([process])
    finally:
        image.write_bytes(kept)


@kind("two at once over one output")
def _(place, fault, arguments, log, output):
    first = begin(arguments, log)
    wait([first.sentinel], timeout=0.3 * fault.amount * place.seconds[fault.command])
    second = begin(arguments, log.with_name("second.log"))
    codes = finish([first, second])
    log.write_text(log.read_text() + log.with_name("second.log").read_text())
    return codes if any(codes) else [0]


@kind("loader worker killed")
def _(place, fault, arguments, log, output):
    arguments.extend(["--workers", "2"])
    process = begin(arguments, log)
    deadline = time.monotonic() + 2 * place.seconds[fault.command]
    time.sleep(fault.amount * place.seconds[fault.command])
    while process.is_alive() and time.monotonic() < deadline:
        workers = children_of(process.pid)
        if workers:
            os.kill(random.Random(fault.seed).choice(workers), signal.SIGKILL)
            break
        time.sleep(0.005)
    return finish([process])


@kind(OF_TWO)
def _(place, fault, arguments, log, output):
    logs, ranks = begin_two(arguments, log)
    wait([process.sentinel for process in ranks], timeout=fault.amount * place.seconds[fault.command])
    victim = ranks[fault.seed % 2]
    if victim.is_alive():
        victim.kill()
    wait([process.sentinel for process in ranks])
    if any(process.exitcode for process in ranks):  # torchrun ends the others
        wait([process.sentinel for process in ranks if process.is_alive()] or [victim.sentinel], timeout=5)
        for process in ranks:
            process.terminate()
    codes = finish(ranks)
    log.write_text("".join(each.read_text() for each in logs))
    return codes


@kind("input damaged")
def _(place, fault, arguments, log, output):
    """A byte flipped, or the tail cut off, in a file of the folder that the command reads."""
    rng = random.Random(fault.seed)
    source = next(Path(word) for word in arguments if Path(word).name in ("dense", "half", "run"))
    files = [path for path in source.iterdir() if path.suffix in (".json", ".safetensors") and path.name != CARD_FILE]
    damaged = rng.choice(sorted(files))
    kept = damaged.read_bytes()
    content = bytearray(kept)
    if rng.random() < 0.3:
        del content[int(fault.amount * len(content)) :]
    else:
        content[int(fault.amount * len(content))] ^= 1 << rng.randrange(8)
    damaged.write_bytes(bytes(content))
    try:
        return finish([begin(arguments, log)])
    finally:
        damaged.write_bytes(kept)


def applies(kind: str, command: str) -> bool:
    if kind == "loader worker killed":
        return command not in ("recover", "analyze")
    if kind == OF_TWO:
        # What is recovered depends on how many processes there are.
        return command in ("discover", "prune", "prune parts", "evaluate", "curve")
    if kind == "image deleted or replaced":
        return command in ("discover", "prune", "prune parts", "curve")
    if kind == "input damaged":
        return command != "recover"
    return True


def inject(place: Place, fault: Fault) -> str:
    """Inject a fault; return ``undisturbed``, ``refused`` or ``ended``, how the command took it.

    Raises:
        AssertionError: if anything is lost, wrong or told in another way than in one line.
    """
    folder = Path(tempfile.mkdtemp(dir=place.root, prefix="fault-"))
    try:
        output, log = folder / "out", folder / "log"
        for name in ("log", "second.log", "rank1.log"):
            (folder / name).touch()
        arguments = arguments_of(fault.command, place.root, output)
        codes = KINDS[fault.kind](place, fault, arguments, log, output)
        told = log.read_text()
        on_two = fault.kind == OF_TWO
        result, wanted = output_of(fault.command, output), (place.of_two if on_two else place.references)[fault.command]
        # What Python's own threads tell of a killed worker's connection, and of torch's tidying up, ends no command.
        of_others = told.count("Exception ignored in") + told.count("resource_sharer.py")
        tracebacks = told.count("Traceback (most") - of_others
        assert tracebacks <= 0, f"traceback: {told[told.index('Traceback (most') :][:1500]}"
        if 2 in codes:
            lines = [line for line in told.splitlines() if line.startswith("vitprune: ")]
            assert lines, f"exit code 2 without a reason: {told[-300:]}"
        unexpected = [code for code in codes if code not in (0, 2, 130, 143, -9, -15, -2)]
        assert not unexpected, f"exit code {unexpected[0]}: {told[-500:]}"
        # The next try: the same command, nothing in its way.
        if not (result.exists() and same_files(result, wanted) is None):
            again = folder / "again.log"
            codes_again = finish(begin_two(arguments, again)[1] if on_two else [begin(arguments, again)])
            assert not any(codes_again), f"the next try: {(folder / 'again.log').read_text()[-500:]}"
        difference = same_files(result, wanted)
        assert difference is None, f"afterwards {difference}"
        if all(code == 0 for code in codes):
            return "undisturbed"
        return "refused" if 2 in codes else "ended"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def prepare(root: Path) -> Place:
    """Make what the commands read, and what they write undisturbed."""
    model = make_vit(depth=2).float()
    model.model_args = {**TINY, "depth": 2}
    vitprune.save(model, root / "dense")
    photos(root / "photos", CLASSES, count=4, seed=1)
    photos(root / "others", CLASSES, count=4, seed=2)
    for name, command in (("run", "discover"), ("half", "prune")):
        (code,) = finish([begin(arguments_of(command, root, root / name), root / f"{name}.log")])
        assert code == 0, (root / f"{name}.log").read_text()
    references, of_two, seconds = {}, {}, {}
    for command in COMMANDS:
        output, twice = (root / name / command.replace(" ", "-") / "out" for name in ("undisturbed", "of-two"))
        output.parent.mkdir(parents=True)
        started = time.perf_counter()
        (code,) = finish([begin(arguments_of(command, root, output), root / "log")])
        assert code == 0, (root / "log").read_text()
        references[command], seconds[command] = output_of(command, output), time.perf_counter() - started
        if applies(OF_TWO, command):
            twice.parent.mkdir(parents=True)
            codes = finish(begin_two(arguments_of(command, root, twice), root / "log")[1])
            assert not any(codes), (root / "log").read_text()
            of_two[command] = output_of(command, twice)
    return Place(root, references, of_two, seconds)


def draw(number: int, seed: int) -> Fault:
    """Return the n-th fault of a seed; kinds take turns."""
    rng = random.Random(f"{seed} {number}")
    kind = list(KINDS)[number % len(KINDS)]
    command = rng.choice([name for name in COMMANDS if applies(kind, name)])
    return Fault(kind, command, rng.random(), rng.randrange(2**31))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--faults", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, nargs="+", help="numbers of faults")
    asked = parser.parse_args()
    took: dict[str, Counter] = {name: Counter() for name in KINDS}
    lost = 0
    with tempfile.TemporaryDirectory() as made:
        place = prepare(Path(made))
        for number in asked.only or range(asked.faults):
            fault = draw(number, asked.seed)
            try:
                how = inject(place, fault)
            except AssertionError as error:
                how = "lost"
                lost += 1
                print(f"{number}: {fault}: {error}", file=sys.stderr, flush=True)
            took[fault.kind][how] += 1
    print("| fault | injected | finished as if nothing were | refused in one line | ended, then went on | lost |")
    print("|---|---|---|---|---|---|")
    for name, counts in took.items():
        cells = (counts.total(), *(counts[how] for how in ("undisturbed", "refused", "ended", "lost")))
        print(f"| {name} | {' | '.join(map(str, cells))} |")
    total = sum(took.values(), Counter())
    cells = (total.total(), *(total[how] for how in ("undisturbed", "refused", "ended", "lost")))
    print(f"| all | {' | '.join(map(str, cells))} |")
    sys.exit(lost > 0)

"""``vitprune run``: execute the commands of a recipe; what is there from the same inputs is not made again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

from jsonargparse import ArgumentParser

from vitprune.cli.terminal import note, print_table, track
from vitprune.files import held, refuse_existing
from vitprune.recipe.command_options import command_line
from vitprune.recipe.contents import Contents
from vitprune.recipe.missing_inputs import check_inputs
from vitprune.recipe.read import Recipe, Step, read_recipe
from vitprune.recipe.schema import recipe_schema
from vitprune.recipe.shipped import describe_recipe, find_recipe, shipped_recipes
from vitprune.recipe.state import HASHES_FILE, LOCK_FILE, Decision, State, state_file

SUMMARY = "execute the commands of a recipe"

# (command, its options) -> its answer and what prints it, or None where another process has them.
Execute = Callable[[str, dict[str, Any]], tuple[dict[str, Any], Callable[[], None]] | None]


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "recipe",
        type=str,
        nargs="?",
        help="YAML file: commands with their options; or name of a recipe of vitprune's; without it, these are listed",
    )
    parser.add_argument("keys", type=str, nargs="*", metavar="KEY=VALUE", help="for keys that the recipe declares")
    parser.add_argument(
        "--dry-run", action="store_true", help="check the recipe and print what it would run, and why; write nothing"
    )
    parser.add_argument("--print-schema", action="store_true", help="print the JSON schema of recipes, for editors")


def run_recipe(
    recipe: str | None,
    keys: Sequence[str],
    dry_run: bool,
    print_schema: bool,
    *,
    as_json: bool,
    commands: Mapping[str, ArgumentParser],
    summaries: Mapping[str, str],
    execute: Execute,
) -> dict[str, Any]:
    """Run a recipe, print what its commands answer, and return all answers."""
    if print_schema:
        schema = recipe_schema(commands, summaries)
        if not as_json:
            print(json.dumps(schema, indent=2))
        return schema
    if recipe is None:
        known = shipped_recipes()
        if not as_json:
            rows = [(name, describe_recipe(path)) for name, path in known.items()]
            print_table("recipes that come with vitprune", ("name", "what it does"), rows, texts=("what it does",))
            print("'vitprune run NAME --dry-run' prints what one would run; a path runs your own")
        return {"recipes": {name: str(path) for name, path in known.items()}}
    read = read_recipe(find_recipe(recipe), commands, keys or [])
    check_inputs(read)
    if dry_run:
        return _plan(read, commands, as_json=as_json)
    answers, cached = [], []
    with nullcontext() if read.output is None else _held(read):
        state = _open_state(read)
        for position, step in enumerate(read.steps):
            place = f"{position + 1}/{len(read.steps)}"
            decision = Decision(None, "") if state is None else state.decide(position)
            typed = _typed(read, position, decision, commands)
            is_cached = state is not None and not decision.reason
            cached.append(is_cached)
            if is_cached:
                note(f"{place} unchanged, not run again: {typed}")
                answers.append(decision.answer)
                continue
            note(f"{place} {typed}" + (f"  # {decision.reason}" if decision.reason else ""))
            answer, show = _run_step(position, step.command, _options(step, decision), execute, state)
            if state is not None:
                state.finish(position, decision.basis, answer)
            answers.append(answer)
            if not as_json:
                show()
    return {**_summary(read), "answers": answers, "cached": cached}


def _run_step(position: int, command: str, options: dict[str, Any], execute: Execute, state: State | None):
    if state is None:
        return execute(command, options)
    state.begin(position)
    try:
        answer, show = execute(command, options)
    except BaseException:
        state.give_up(position)
        raise
    return json.loads(json.dumps(answer)), show


def _held(recipe: Recipe):
    """Hold a recipe's output folder against a second program."""
    refuse_existing(state_file(recipe), overwrite=True)
    return held(state_file(recipe).with_name(LOCK_FILE), what=recipe.output)


def _open_state(recipe: Recipe) -> State | None:
    from vitprune import __version__

    if recipe.output is None:
        return None
    hashes = state_file(recipe).with_name(HASHES_FILE)
    return State(recipe, Contents(hashes, track=track), version=__version__)


def _plan(recipe: Recipe, commands: Mapping[str, ArgumentParser], *, as_json: bool) -> dict[str, Any]:
    """Print what a recipe would run, and why."""
    state = _open_state(recipe)
    decisions = [Decision(None, "")] * len(recipe.steps) if state is None else state.foresee()
    plan = []
    for position, decision in enumerate(decisions):
        will_run = state is None or bool(decision.reason)
        plan.append(
            {"command": _typed(recipe, position, decision, commands), "runs": will_run, "reason": decision.reason}
        )
    if not as_json:
        for name, value in recipe.keys.items():
            print(f"# {name}={json.dumps(value) if not isinstance(value, str) else value}")
        for step in plan:
            print(step["command"])
            if state is not None:
                print(f"    # {'runs: ' + step['reason'] if step['runs'] else 'unchanged, not run again'}")
    return {**_summary(recipe), "answers": [], "plan": plan}


def _typed(recipe: Recipe, position: int, decision: Decision, commands: Mapping[str, ArgumentParser]) -> str:
    """Return a step as a user would type it."""
    step = recipe.steps[position]
    return shlex.join(command_line(commands[step.command], step.command, _options(step, decision)))


def _options(step: Step, decision: Decision) -> dict[str, Any]:
    gives_way = decision.overwrite and bool(decision.reason) and "overwrite" in step.options
    return {**step.options, **({"overwrite": True} if gives_way else {})}


def _summary(recipe: Recipe) -> dict[str, Any]:
    return {"recipe": str(recipe.path), "keys": dict(recipe.keys), "steps": [step.command for step in recipe.steps]}

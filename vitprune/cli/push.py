"""``vitprune push``: put a saved model onto the hub, with a card of what was measured."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser

from vitprune.errors import VitpruneError

SUMMARY = "put a saved model onto the hub"


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument("folder", type=str, help="of a saved model, pruned or dense")
    parser.add_argument("repository", type=str, help="OWNER/NAME on the hub; made where there is none")
    parser.add_argument(
        "--measured",
        type=str,
        nargs="+",
        metavar="DIR",
        help="outputs of evaluate and bench about this model, for its card",
    )
    parser.add_argument("--private", action="store_true", help="a repository that is made now is for its owner alone")
    parser.add_argument("--message", type=str, help="of the commit")


def run(folder, repository, measured, private, message):
    from vitprune.hub.push import push

    missing = next((each for each in measured or () if not Path(each).is_dir()), None)
    if missing is not None:
        raise VitpruneError(f"--measured {missing}: no such folder")
    pushed = push(folder, repository, measured=measured or (), private=private, message=message)
    answer = {
        "repository": pushed.repository,
        "revision": pushed.revision,
        "model": pushed.model,
        "url": pushed.url,
        "files": list(pushed.files),
    }

    def show() -> None:
        print(f"{pushed.url}: {', '.join(pushed.files)}")
        print(f"load these weights with {pushed.model}")

    return answer, show

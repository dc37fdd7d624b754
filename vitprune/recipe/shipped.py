"""What comes with the package beside its modules: recipes by name, and the program that serves a file."""

from __future__ import annotations

import sysconfig
from pathlib import Path

# Where they lie in the repository, and where `pip install` puts them.
_REPOSITORY = Path(__file__).resolve().parents[2]
_INSTALLED = Path(sysconfig.get_path("data")) / "share" / "vitprune"


def shipped_recipes() -> dict[str, Path]:
    """Return name -> file of every recipe that comes with the package; none where it was installed without them."""
    places = (_REPOSITORY / "recipes", _INSTALLED / "recipes")
    folder = next((place for place in places if (place / "demo.yaml").is_file()), None)
    return {} if folder is None else {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_server() -> Path | None:
    """Return the program that answers with an exported file without torch; None where it was not installed."""
    places = (_REPOSITORY / "docs" / "serve.py", _INSTALLED / "serve.py")
    return next((place for place in places if place.is_file()), None)


def find_recipe(name: str | Path) -> Path:
    """Return the file that a name means: a path, or a recipe that comes with the package.

    >>> find_recipe("mine.yaml").name
    'mine.yaml'
    """
    path = Path(name)
    if path.exists() or len(path.parts) > 1:
        return path
    return shipped_recipes().get(path.name.removesuffix(".yaml"), path)


def describe_recipe(path: Path) -> str:
    """Return what a recipe says at its head that it is, in a line."""
    comments = (line.strip("# ").rstrip() for line in path.read_text().splitlines() if line.startswith("#"))
    return next((line for line in comments if line and not line.startswith("yaml-language-server")), "")

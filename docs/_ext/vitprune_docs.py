"""What the pages take from the code, so that they cannot go stale: options of commands, choices, formulas.

- ``command-options`` shows every option of a command, read from its parser.
- ``command-list`` shows what every command is for.
- ``choices`` shows what can be chosen, read from a mapping of ``vitprune.options``.
- ``recipe`` shows the header and the keys of a recipe of the repository.
- ``keys`` shows what a file holds; the tests compare its keys with the file that a page's commands write.
- Formulas become MathML, which browsers draw without scripts, fonts or network.
- In docstrings, ``arXiv:2503.09046`` and literals that name something public become links.
"""

from __future__ import annotations

import re
from argparse import Action
from collections.abc import Iterable, Sequence
from pathlib import Path
from textwrap import dedent, indent

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

import vitprune
from vitprune import options
from vitprune.cli.commands import COMMANDS, build_parser

ROOT = Path(__file__).resolve().parents[2]
_LINKED = {
    **{name: f"vitprune.{name}" for name in vitprune.__all__},
    **{name: f"vitprune.options.{name}" for name in vars(options) if name.isupper()},
    "parse_quadrature": "vitprune.discovery.quadrature.parse_quadrature",
}
_ARXIV = re.compile(r"(?<![`/\w])arXiv:(\d{4}\.\d{4,5})")


class CommandOptions(SphinxDirective):
    """The usage line of a command and a list of its options."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        _parser, commands = build_parser()
        name = self.arguments[0]
        actions = [action for action in commands[name]._actions if action.dest != "help"]
        needed = [action for action in actions if action.required or not action.option_strings]
        # What is not an option goes first, as a user types it.
        needed.sort(key=lambda action: bool(action.option_strings))
        usage = " ".join(["vitprune", name, *map(_as_typed, needed), "[options]"])
        block = nodes.literal_block(usage, usage, language="text")
        return [block, _definitions(map(_describe, actions), self.lineno)]


class CommandList(SphinxDirective):
    """A table of all commands, each with a link to its page."""

    def run(self) -> list[nodes.Node]:
        lines = ["| command | what it does |", "|---|---|"]
        lines += [f"| [{name}]({name}.md) | {module.SUMMARY} |" for name, module in COMMANDS.items()]
        return self.parse_text_to_nodes("\n".join(lines))


class Keys(SphinxDirective):
    """A table of the keys of a file: lines ``key: meaning``; a key that may be absent ends in a question mark."""

    required_arguments = 1
    optional_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        path, *part = self.arguments
        what = "".join([f"`{path.rsplit('/')[-1]}`", *(f", {each.replace('/0', '')}" for each in part)])
        lines = [f"| {what} | |", "|---|---|"]
        for line in self.content:
            key, _, meaning = line.partition(": ")
            optional = " (may be absent)" if key.endswith("?") else ""
            lines.append(f"| `{key.removesuffix('?')}`{optional} | {meaning} |")
        return self.parse_text_to_nodes("\n".join(lines))


class Recipe(SphinxDirective):
    """The header and the keys of a recipe of the repository."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        path = ROOT / "recipes" / f"{self.arguments[0]}.yaml"
        self.env.note_dependency(str(path))
        header, _, rest = path.read_text(encoding="utf-8").partition("\nkeys:\n")
        keys = re.findall(r"^  (\w+): (.*?)  # (.*)$", rest.partition("\noutput:")[0], re.M)
        items = [_item(name, f"default {default}", meaning) for name, default, meaning in keys]
        return [*self.parse_text_to_nodes(_as_markdown(header)), _definitions(items, self.lineno)]


def _as_markdown(header: str) -> str:
    """Return a recipe's header as a paragraph and a list of what stands before a colon at the beginning of a line.

    Lines that are indented beyond the others keep their shape.
    """
    text = re.sub(r"^# ?", "", header.partition("#\n")[2], flags=re.M)
    summary, *parts = re.split(r"^(\w+): +", text, flags=re.M)
    lines = [summary]
    for name, part in zip(parts[::2], parts[1::2], strict=True):
        if name == "Command":
            part = f"`{' '.join(part.split())}`"
        part = re.sub(r"^ {10}", "", part, flags=re.M)
        part = re.sub(r"(?:^ .*(?:\n|$))+", lambda kept: f"```text\n{dedent(kept[0])}```\n", part, flags=re.M)
        lines.append("- " + indent(f"*{name}*: {part}", "  ").strip())
    return re.sub(r"'(\w+)'", r"`\1`", "\n".join(lines))


class Choices(SphinxDirective):
    """A table of what a mapping of ``vitprune.options`` offers."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        choices = getattr(options, self.arguments[0])
        rows = [(nodes.literal(text=name), text) for name, text in choices.items()]
        return [_table(("name", "meaning"), rows, widths=(25, 75))]


def _describe(action: Action) -> nodes.definition_list_item:
    names = " ".join([", ".join(action.option_strings), _value(action)]).strip()
    return _item(names, "required" if action.required else "", action.help)


def _item(name: str, default: str, meaning: str) -> nodes.definition_list_item:
    parts = re.split(r"((?<!\S)--\w[\w-]*)", meaning)
    texts = [nodes.literal(text=part) if part.startswith("--") else nodes.Text(part) for part in parts if part]
    term = nodes.term("", "", nodes.literal(text=name))
    defaults = [nodes.classifier(text=default)] if default else []
    return nodes.definition_list_item("", term, *defaults, nodes.definition("", nodes.paragraph("", "", *texts)))


def _definitions(items: Iterable[nodes.definition_list_item], line: int) -> nodes.definition_list:
    found = nodes.definition_list("", *items, classes=["options"])
    for item in found:
        item.line = line  # Sphinx counts from it
    return found


def _as_typed(action: Action) -> str:
    return " ".join([*action.option_strings[-1:], _value(action)])


def _value(action: Action) -> str:
    if action.nargs == 0:
        return ""
    kind = str(getattr(action, "_typehint", ""))  # such as typing.Optional[int]
    numbers = [letter for name, letter in (("int", "N"), ("float", "X")) if name in kind]
    name = numbers[0] if numbers else action.dest.rpartition("_")[-1].upper()
    return f"{name} .." if action.nargs == "+" else name


def _table(titles: Sequence[str], rows: Iterable[Sequence[nodes.Node | str]], widths: Sequence[int]) -> nodes.table:
    group = nodes.tgroup(cols=len(titles))
    group += [nodes.colspec(colwidth=width) for width in widths]
    group += nodes.thead("", _row(titles))
    group += nodes.tbody("", *map(_row, rows))
    return nodes.table("", group, classes=["choices"])


def _row(cells: Sequence[nodes.Node | str]) -> nodes.row:
    texts = [nodes.Text(cell) if isinstance(cell, str) else cell for cell in cells]
    return nodes.row("", *(nodes.entry("", nodes.paragraph("", "", text)) for text in texts))


def visit_math(self, node: nodes.math) -> None:
    """Write a formula within a line."""
    self.body.append(convert(node.astext()))
    raise nodes.SkipNode


def visit_math_block(self, node: nodes.math_block) -> None:
    """Write a formula on a line of its own."""
    self.body.append(f'<div class="math">{convert(node.astext(), display="block")}</div>\n')
    raise nodes.SkipNode


def add_links(_app, _what, own_name: str, _object, _options, lines: list[str]) -> None:
    """Turn a docstring's arXiv numbers, and its literals that name something on these pages, into links."""

    def link(found: re.Match) -> str:
        target = _LINKED.get(found[1])
        return f":py:obj:`{found[1]} <{target}>`" if target not in (None, own_name) else found[0]

    for number, line in enumerate(lines):
        line = _ARXIV.sub(r"`arXiv:\1 <https://arxiv.org/abs/\1>`__", line)
        lines[number] = re.sub(r"``(\w+)``", link, line)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register all of this."""
    app.add_directive("command-options", CommandOptions)
    app.add_directive("command-list", CommandList)
    app.add_directive("recipe", Recipe)
    app.add_directive("choices", Choices)
    app.add_directive("keys", Keys)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math_block, None))
    app.connect("autodoc-process-docstring", add_links)
    return {"parallel_read_safe": True, "parallel_write_safe": True}

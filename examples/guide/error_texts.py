"""Error texts of the library, read from its source, for the pages of troubleshooting.

The source is parsed, not run: every ``raise X("...")`` and every warning gives its text, with … for
what is filled in. Blocks of the pages call `show_errors`.
"""

from __future__ import annotations

import ast
import html
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
GAP = "…"
# Calls that warn, with the position of the category among their arguments.
WARNERS = {"warnings.warn": 1, "warn_user": 1}


@dataclass(frozen=True)
class ErrorText:
    """A text that a module raises or warns with.

    Args:
        kind: Name of the exception or warning.
        text: The message, with … for what is filled in.
        module: Path of the module, relative to the repository.
        subject: First line of the module's docstring.
    """

    kind: str
    text: str
    module: str
    subject: str


def show_errors(*folders: str) -> None:
    """Print the texts of the modules in some folders, under their subjects.

    Args:
        folders: Paths relative to the repository, such as "hesscurv/metrics"; of a folder its own
            modules, not those of folders in it. A path of a module takes that alone.
    """
    write = sys._getframe(1).f_globals.get("print", print)  # as in guide_support
    lines = [""]
    subject = None
    for found in find(*folders):
        if found.subject != subject:
            subject = found.subject
            lines += ["", f"### {html.escape(subject)}", ""]
        text, _, remedy = found.text.replace("`", "'").partition("; ")
        lines.append(f"- **{found.kind}**: `{text}`")
        if remedy:
            lines.append(f"  <br>Remedy: {escape(remedy)}")
    write("\n".join(lines))


def escape(text: str) -> str:
    """Return a text whose characters Markdown shows as they are."""
    return re.sub(r"([\\`*_\[\]|#<>$])", lambda found: f"&#{ord(found[1])};", text)


def find(*folders: str) -> list[ErrorText]:
    """Return the texts of the modules in some folders, each once, in the order of the source."""
    texts: dict[tuple[str, str], ErrorText] = {}
    for folder in folders:
        path = REPOSITORY / folder
        for module in [path] if path.suffix else sorted(path.glob("*.py")):
            for found in of_module(module):
                texts.setdefault((found.text, found.subject), found)
    return list(texts.values())


def of_module(path: Path) -> Iterator[ErrorText]:
    """Yield the texts of one module."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    constants = {
        target.id: node.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    subject = (ast.get_docstring(tree) or path.stem).splitlines()[0].rstrip(".")
    calls = sorted(messages(tree), key=lambda found: found[1].lineno)
    for kind, node in calls:
        text = " ".join(template(node, constants).split())
        if sum(char.isalpha() for char in text) >= 8:  # not a text that was made elsewhere
            yield ErrorText(kind, text, path.relative_to(REPOSITORY).as_posix(), subject)


def messages(tree: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Yield the kind and the message of everything raised or warned of."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            call = node.exc
            if ast.unparse(call.func) == "make_known" and isinstance(call.args[0], ast.Call):
                call = call.args[0]
            if call.args:
                # OSError(errno, text, path)
                yield ast.unparse(call.func), call.args[1 if len(call.args) == 3 else 0]
        elif isinstance(node, ast.Call) and (name := ast.unparse(node.func)) in WARNERS:
            place = WARNERS[name]
            if len(node.args) > place:
                yield ast.unparse(node.args[place]), node.args[0]


def template(node: ast.expr, constants: dict[str, ast.expr]) -> str:
    """Return a message as text, with … for what is known only when it is raised."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(template(part, constants) for part in node.values)
    if isinstance(node, ast.FormattedValue):
        name = node.value
        known = isinstance(name, ast.Name) and name.id.lstrip("_").isupper()
        return template(name, constants) if known else GAP
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left, constants) + template(node.right, constants)
    if isinstance(node, ast.Name) and node.id in constants:
        return template(constants[node.id], constants)
    return GAP

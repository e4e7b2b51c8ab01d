"""Short representations of objects, without addresses and long listings."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

_LONGEST = 80  # characters of a part
_MOST = 4  # numbers, or parts of a container, that are written out
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def brief(value: Any) -> str:
    """Represent a value in at most one line: numbers as such, tensors by shape, functions by name.

    Args:
        value: Anything; an object whose `repr` raises is represented by its type.

    Cost: no computation; tensors of a few entries are read.
    """
    try:
        return _brief(value)
    except Exception:  # a representation must never raise
        return f"{type(value).__name__}(...)"


def describe_object(owner: Any, **parts: Any) -> str:
    """Return ``Type(part=..., ...)``, on several lines if one would be long.

    Args:
        owner: The object, named by its type.
        **parts: The shown parts, in this order, each formatted by `brief`.
    """
    name = type(owner).__name__
    texts = [f"{key}={brief(value)}" for key, value in parts.items()]
    line = f"{name}({', '.join(texts)})"
    if len(line) <= 100:
        return line
    lines, now = [], ""
    for text in texts:
        if now and len(now) + len(text) > 94:
            lines.append(now.rstrip())
            now = ""
        now += f"{text}, "
    lines.append(now.rstrip(", "))
    return f"{name}(\n  " + "\n  ".join(lines) + "\n)"


class Described:
    """Mixin with a `repr` of the public attributes."""

    def __repr__(self) -> str:
        """Name the public attributes."""
        names = (
            [field.name for field in dataclasses.fields(self)]
            if dataclasses.is_dataclass(self)
            else [name for name in vars(self) if not name.startswith("_")]
        )
        return describe_object(self, **{name: getattr(self, name, None) for name in names})


class Words(str):
    """Text that `brief` shows without quotation marks."""

    __slots__ = ()


def _brief(value: Any) -> str:
    if isinstance(value, Words):
        return str(value)
    if isinstance(value, Tensor):
        return _tensor(value)
    if isinstance(value, bool) or value is None:
        return repr(value)
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, functools.partial):
        return f"partial({_brief(value.func)})"
    if isinstance(value, type) or inspect.isroutine(value):
        return _ADDRESS.sub("", str(getattr(value, "__qualname__", None) or type(value).__name__))
    if isinstance(value, nn.Module):
        text = _one_line(value) if not any(True for _ in value.children()) else ""
        return text or type(value).__name__
    if isinstance(value, (list, tuple, set, frozenset, dict)):
        return _container(value)
    return _one_line(value) or f"{type(value).__name__}(...)"


def _tensor(value: Tensor) -> str:
    place = "" if value.device.type == "cpu" else f" on {value.device}"
    kind = f"{str(value.dtype).removeprefix('torch.')}{place}"
    plain = type(value) in (Tensor, nn.Parameter) and value.device.type == "cpu"
    if plain and value.layout == torch.strided and value.ndim < 2 and value.numel() <= _MOST:
        numbers = value.detach().tolist()
        return _brief(numbers) if value.ndim == 0 or numbers else f"tensor([], {kind})"
    return f"tensor({tuple(value.shape)}, {kind})"


def _container(value: Collection[Any]) -> str:
    if len(value) > _MOST:
        return f"<{type(value).__name__} of {len(value):,}>"
    if isinstance(value, Mapping):
        text = ", ".join(f"{_brief(key)}: {_brief(part)}" for key, part in value.items())
        text = f"{{{text}}}"
    else:
        text = ", ".join(map(_brief, value))
        marks = {list: "[]", tuple: "()"}.get(type(value), "{}")
        text = f"{marks[0]}{text}{',' * (marks == '()' and len(value) == 1)}{marks[1]}"
    return text if len(text) <= 2 * _LONGEST else f"<{type(value).__name__} of {len(value):,}>"


def _one_line(value: Any) -> str:
    """Return an object's own `repr` if it is one short line; text is truncated."""
    if getattr(type(value), "__repr__", None) is object.__repr__:
        return ""
    text = _ADDRESS.sub("", repr(value))
    if "\n" not in text and len(text) <= _LONGEST:
        return text
    return f"{text[: _LONGEST - 4]}..." + text[-1] if isinstance(value, str) else ""


def inherit_arguments(cls: type) -> None:
    """Copy the "Args" and "Raises" sections of a base class into a subclass's docstring.

    Only for classes that inherit `__init__` and do not document it; an example stays at the end.

    Args:
        cls: The new class.
    """
    doc = cls.__dict__.get("__doc__")
    if not doc or "__init__" in cls.__dict__ or re.search(r"^\s*Args:$", doc, re.MULTILINE):
        return
    init: Callable[..., Any] = cls.__init__  # type: ignore[misc]
    for base in cls.__mro__[1:]:
        if base.__init__ is not init:  # type: ignore[misc]
            break
        found = _sections(inspect.cleandoc(base.__dict__.get("__doc__") or ""))
        if "Args" in found:
            own = _sections(inspect.cleandoc(doc))
            last = {name: own.pop(name) for name in ("Example", "Examples") if name in own}
            taken = {name: found[name] for name in ("Args", "Raises") if name in found}
            parts = own | {name: text for name, text in taken.items() if name not in own} | last
            cls.__doc__ = "\n\n".join(text for text in parts.values() if text)
            return


def _sections(doc: str) -> dict[str, str]:
    """Return a docstring's sections by name, with their headings; the preamble is named ""."""
    found: dict[str, str] = {}
    for part in re.split(r"\n+(?=[A-Z][a-z]+:\n    )", doc):
        heading = re.match(r"([A-Z][a-z]+):\n    ", part)
        name = heading.group(1) if heading else ""
        found[name] = f"{found[name]}\n\n{part}" if name in found else part
    return found

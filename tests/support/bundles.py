"""Keywords of the tests' builders, those that lie in an option object put into one."""

from __future__ import annotations

import dataclasses
from typing import Any


def bundled(kind: type, keywords: dict[str, Any]) -> dict[str, Any]:
    """The keywords of a call, the fields of an option object among them as its ``options``."""
    names = {field.name for field in dataclasses.fields(kind)} & keywords.keys()
    if not names:
        return keywords
    options = kind(**{name: keywords[name] for name in names})
    return {k: v for k, v in keywords.items() if k not in names} | {"options": options}

"""Extension of griffe: formulas and examples of docstrings, as those of the pages."""

from __future__ import annotations

import re
from typing import Any

import griffe

INLINE = re.compile(r":math:`([^`]+)`")
# The formula beside the directive, and what goes on below it, indented further.
BLOCK = re.compile(r"^(?P<indent> *)\.\. math:: *(?P<formula>.*(?:\n(?P=indent) +\S.*)*)", re.M)


class DocstringFormulas(griffe.Extension):
    """Rewrite Sphinx's formulas to dollars, and "Example:" to the plural that griffe knows."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring is not None:
            obj.docstring.value = rewrite(obj.docstring.value)


def rewrite(text: str) -> str:
    """Return a docstring with its formulas in dollars, and its examples as examples."""
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.M)
    text = INLINE.sub(lambda found: f"${' '.join(found[1].split())}$", text)
    return BLOCK.sub(
        lambda found: f"\n{found['indent']}$${' '.join(found['formula'].split())}$$\n", text
    )

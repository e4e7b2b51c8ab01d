"""Cards of the first page: a section each, with links to its pages, from what the folders hold."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

PAGES = Path(__file__).resolve().parent / "pages"


def show_cards(sections: Mapping[str, tuple[str, str]], pages: Path = PAGES) -> None:
    """Print a card for each section that has pages.

    Args:
        sections: By folder, or by page for a section of one, its title and a sentence about it.
        pages: The folder of all pages.
    """
    lines = ['<div class="grid cards" markdown>', ""]
    for name, (title, sentence) in sections.items():
        paths = sorted((pages / name).glob("*.md"), key=lambda p: (p.stem != "index", p))
        own = pages / f"{name}.md"
        paths = [own, *paths] if own.exists() else paths
        if not paths:
            continue
        # The title leads to the section's first page, and the rest of the card to all others.
        rest = paths[1:] if own.exists() or paths[0].stem == "index" else paths
        lines += [f"- **[{title}]({link(paths[0], pages)})**", "", f"    {sentence}", ""]
        if rest:
            links = (f"[{heading(path)}]({link(path, pages)})" for path in rest)
            lines += [f"    {' · '.join(links)}", ""]
    write = sys._getframe(1).f_globals.get("print", print)  # as in guide_support
    write("\n".join([*lines, "</div>"]))


def link(path: Path, pages: Path) -> str:
    """Return a page's address in the site, as links of executed blocks are not rewritten."""
    return path.relative_to(pages).with_suffix(".html").as_posix()


def heading(path: Path) -> str:
    """Return the first heading of a page."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# "):
            return line[2:].strip()
    return path.stem

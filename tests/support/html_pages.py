"""Reports as a browser reads them, for tests of pages."""

from __future__ import annotations

import base64
from html.parser import HTMLParser
from pathlib import Path
from typing import Any


class Page(HTMLParser):
    """Tags left open, text, links, figures, findings, cards and values on hover of a page."""

    VOID = ("meta", "img", "br", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.links: list[str] = []
        self.figures: list[tuple[str, str]] = []
        self.titles: list[str] = []  # of figures
        self.findings: list[str] = []
        self.values: list[str] = []  # on hover
        self.cards: dict[str, list[str]] = {}  # value and what stands beside it, by name
        self.downloads: dict[str, str] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        found = dict(attrs)
        self.links += [found[key] for key in ("src", "href") if key in found]
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "img":
            kind, _, data = found["src"].partition(";base64,")
            assert kind == "data:image/svg+xml"
            self.figures.append((found["alt"], base64.b64decode(data).decode()))
        if "download" in found:
            data = found["href"].partition(";base64,")[2]
            self.downloads[found["download"]] = base64.b64decode(data).decode()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)
        if not self.open or not data.strip():
            return
        inner = self.open[-1]
        if inner == "title" and "svg" in self.open:
            self.values.append(data)
        elif inner == "h3":
            self.titles.append(data)
        elif inner == "p" and "section" in self.open:
            self.findings.append(data)
        elif inner == "dt":
            self.cards[data] = []
        elif inner == "dd":
            self.cards[list(self.cards)[-1]].append(data)

    @property
    def text(self) -> str:
        return "\n".join(self.words)


def read(path: Path) -> tuple[Page, str]:
    """A page that is well-formed, and its source."""
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    return page, text

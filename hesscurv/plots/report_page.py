"""HTML reports: one self-contained page of findings, cards, figures and tables."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path

from hesscurv.interface.descriptions import Described
from hesscurv.storage.atomic_files import write_atomically

_CSS = """
:root { --ink: #1f2328; --soft: #59636e; --paper: #fff; --page: #f4f5f7; --line: #d8dce1;
  --bad: #a83c00; --mark: #0072b2; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --soft: #9aa4ae; --paper: #1b1e22;
  --page: #121417; --line: #363b42; --bad: #ff9d66; --mark: #56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 88rem; padding: 1.5rem 1rem 3rem; color: var(--ink);
  background: var(--page); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 .75rem; }
h3 { font-size: 1rem; line-height: 1.3; font-weight: 600; margin: 0 0 .5rem; }
p { margin: 0 0 1rem; color: var(--soft); }
a { color: var(--mark); }
.findings { background: var(--paper); border: 1px solid var(--line); border-radius: 8px;
  border-left: 4px solid var(--mark); padding: .75rem 1rem; margin: 0 0 1rem; }
.findings p { margin: 0; color: var(--ink); max-width: 70rem; }
.findings p + p { margin-top: .35rem; }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(9.5rem, 1fr)); gap: .75rem;
  margin: 0; }
.numbers div, figure, .table { background: var(--paper); border: 1px solid var(--line);
  border-radius: 8px; }
.numbers div { padding: .6rem .8rem; display: flex; flex-direction: column; }
.numbers dt { order: 1; color: var(--soft); font-size: .85rem; }
.numbers dd { margin: 0; font-size: 1.3rem; font-variant-numeric: tabular-nums; }
.numbers dd.beside { order: 2; font-size: .85rem; }
.figures { display: grid; gap: .75rem; align-items: start;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); }
figure { margin: 0; padding: .75rem; min-width: 0; }
figure.wide { grid-column: 1 / -1; }
.scroll { overflow-x: auto; }
.plot { position: relative; margin: 0 auto; }
.plot img { display: block; width: 100%; height: auto; }
.plot svg { position: absolute; inset: 0; width: 100%; height: 100%; }
.plot svg * { fill: transparent; stroke: none; }
.plot svg :hover { stroke: var(--ink); stroke-width: 1.5; }
figcaption { color: var(--soft); font-size: .9rem; margin-top: .5rem; }
.table { overflow: auto; max-height: 46rem; }
table { border-collapse: separate; border-spacing: 0; font-size: .9rem; width: 100%;
  font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; text-align: right; white-space: nowrap; overflow-wrap: normal;
  border-bottom: 1px solid var(--line); }
thead th { position: sticky; top: 0; background: var(--paper); color: var(--soft); z-index: 1;
  font-weight: 500; vertical-align: bottom; white-space: normal; min-width: 4.6rem; }
tbody th { position: sticky; left: 0; background: var(--paper); font-weight: 600; }
.names tbody th { position: static; text-align: left; white-space: normal; min-width: 9rem;
  max-width: 30rem; overflow-wrap: anywhere; }
.names thead th:first-child { text-align: left; }
thead th:first-child { left: 0; z-index: 2; min-width: 0; }
tbody tr:last-child > * { border-bottom: 0; }
details { margin-top: .75rem; }
.download { margin-top: .5rem; }
summary { cursor: pointer; color: var(--soft); margin-bottom: .5rem; }
.bad, .bad th { color: var(--bad); }
td.bad { text-align: left; }
ul { margin: 0; padding-left: 1.2rem; }
li { margin-bottom: .4rem; white-space: pre-wrap; }
"""

# Not while somebody reads a value or an open table, and not in a hidden tab.
_RELOAD = (
    "setInterval(()=>{{if(!document.hidden&&!document.querySelector('details[open],.plot :hover'))"
    "location.reload()}},{milliseconds})"
)
# Whatever text gets into the page, it loads nothing and runs nothing but its own script.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; base-uri 'none'; " + (
    "form-action 'none'"
)


@dataclass(frozen=True, repr=False)
class Card(Described):
    """A number in large type.

    Args:
        name: What it is, plain text.
        value: The number, formatted.
        beside: The number to compare it with, such as "limit 20"; empty for none.
        bad: Whether it is a failure.
    """

    name: str
    value: str
    beside: str = ""
    bad: bool = False


def assemble_page(
    title: str,
    *,
    about: str,
    findings: Iterable[str],
    cards: Iterable[Card],
    sections: Iterable[tuple[str, str]],
    refresh: float | None = None,
) -> str:
    """Return a page as HTML.

    Args:
        title: The heading, plain text.
        about: A line below it, plain text.
        findings: Sentences that say what was found, plain text.
        cards: The numbers.
        sections: Headings, plain text, with their HTML; those without content are left out.
        refresh: Seconds after which an open page loads itself again; None for never.
    """
    sentences = "\n".join(f"<p>{escape(sentence)}</p>" for sentence in findings)
    script = "" if refresh is None else _RELOAD.format(milliseconds=max(1, round(1000 * refresh)))
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_policy(script)}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title>\n<style>{_CSS}</style>",
        _reloading(script, refresh),
        f"</head>\n<body>\n<h1>{escape(title)}</h1>\n<p>{escape(about)}</p>",
        f'<section class="findings" aria-label="Findings">\n{sentences}\n</section>'
        if sentences
        else "",
        f'<dl class="numbers">{"".join(map(_card, cards))}</dl>',
        *(f"<h2>{escape(heading)}</h2>\n{content}" for heading, content in sections if content),
        "</body>\n</html>\n",
    ]
    return "\n".join(part for part in parts if part)


def check_file_path(path: str | os.PathLike[str]) -> Path:
    """Return a path for a page.

    Raises:
        IsADirectoryError: If it is a folder.
        FileNotFoundError: If its folder does not exist.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"expected a file to write, got the folder {str(path)!r}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"expected an existing folder, got {str(path.parent)!r}")
    return path


def encode_page(page: str) -> bytes:
    """Return a page as UTF-8; lone surrogates, as in a module's name, as character references."""
    return page.encode("utf-8", "xmlcharrefreplace")


def write_page(content: bytes, path: Path) -> None:
    """Write an encoded page atomically.

    Raises:
        OSError: If the disk is full; a file that was there before is untouched.
    """
    write_atomically(path, lambda file: file.write(content))


def _policy(script: str) -> str:
    if not script:
        return _POLICY
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"{_POLICY}; script-src 'sha256-{digest}'"


def _reloading(script: str, refresh: float | None) -> str:
    if refresh is None:
        return ""
    seconds = max(1, round(refresh))
    return (
        # The icon, for which a browser would otherwise ask the server.
        f'<link rel="icon" href="data:,">\n<script>{script}</script>\n'
        f'<noscript><meta http-equiv="refresh" content="{seconds}"></noscript>'
    )


def _card(card: Card) -> str:
    beside = f'<dd class="beside">{escape(card.beside)}</dd>' if card.beside else ""
    return (
        f"<div><dt>{escape(card.name)}</dt>"
        f"<dd{' class=bad' if card.bad else ''}>{escape(card.value)}</dd>{beside}</div>"
    )

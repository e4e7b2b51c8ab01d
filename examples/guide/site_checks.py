"""Checks of the documentation site that its build does not make; `make docs` runs both parts.

    python examples/guide/site_checks.py sources    # spelling, and public names on the reference
    python examples/guide/site_checks.py site       # built pages: length, links, nothing fetched

Spelling knows English and the words of `words.txt`. Links to other sites are not followed.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

HERE = Path(__file__).resolve().parent
PAGES = HERE / "pages"
SITE = HERE.parents[1] / "build" / "docs"
LONGEST = 1500  # words
# Generated from docstrings and from the source, and as long as these.
GENERATED = ("reference/", "troubleshooting/")
PACKAGES = ["hesscurv"] + [
    f"hesscurv.{part}"
    for part in ("distributed", "eigensolvers", "hooks", "integrations", "metrics", "operators")
]
PACKAGES += [f"hesscurv.{part}" for part in ("optim", "plots", "pruning", "spectra")]
# Public, though their libraries keep them out of __all__.
LAZY = ("CurvatureCallback", "CurvatureTrainerCallback")
NOT_PROSE = (
    r"^---\n.*?\n---\n",  # front matter
    r"^ *(`{3,}|~{3,}).*?^ *\1",  # blocks of code
    r"\$\$.*?\$\$|\$[^$\n]+\$",  # formulas
    r"`[^`]*`",
    r"\]\([^)]*\)|\]\[[^\]]*\]|^\[[^\]]+\]: .*$",  # targets of links
    r"<[^>]*>|\{[^}]*\}|https?://\S+|:[a-z-]+:|&#?\w+;",
)


def main(part: str) -> int:
    """Run the checks of the sources or of the built site, print what fails, and return 1 then."""
    if part == "sources":
        from spellchecker import SpellChecker

        own = {word.lower() for word in (HERE / "words.txt").read_text().split()}
        checker = SpellChecker()

        def is_known(word: str) -> bool:
            return any(form in own or form in checker for form in (word, american(word)))

        faults = [*misspelt(PAGES, is_known), *missing_names(PAGES)]
    elif part == "site":
        faults = [*too_long(SITE), *broken_links(SITE), *fetched(SITE)]
    else:
        raise ValueError(f"expected sources or site, got {part!r}")
    for fault in faults:
        print(fault)
    return bool(faults)


def misspelt(pages: Path, is_known: Callable[[str], bool]) -> Iterator[str]:
    """Yield the words of each page's prose that are not known."""
    for path in sorted(pages.rglob("*.md")):
        words = Counter(words_of(prose(path.read_text(encoding="utf-8"))))
        for word in words:
            # Abbreviations, names with capitals inside, and letters of formulas are not words.
            if len(word) < 3 or word[1:] != word[1:].lower() or is_known(word.lower()):
                continue
            yield f"{path.relative_to(pages)}: unknown word {word!r}; add it to words.txt if right"


def prose(text: str) -> str:
    """Return the text of a page without code, formulas, targets of links, and markup."""
    for pattern in NOT_PROSE:
        text = re.sub(pattern, " ", text, flags=re.DOTALL | re.MULTILINE)
    return text


def words_of(text: str) -> list[str]:
    """Return the words of a text, without names that hold digits, dots or underscores."""
    names = re.sub(r"\S*[\d_/\\@=]\S*|\b\w+\.\w[\w.]*", " ", text)
    return [re.sub(r"['’]s?$", "", w) for w in re.findall(r"[^\W\d_]+(?:['’][^\W\d_]+)?", names)]


def american(word: str) -> str:
    """Return the American form of a British word, which is what the dictionary knows."""
    word = re.sub(r"is(e[drs]?|ers?|ing|ations?)$", r"iz\1", word)
    return re.sub(r"(?<=[a-z]{2})our", "or", word)


def public_names() -> dict[str, set[str]]:
    """Return each public object's home path and the paths under which it may be documented."""
    objects: dict[object, set[str]] = {}
    for package in PACKAGES:
        module = importlib.import_module(package)
        lazy = LAZY if package == "hesscurv.integrations" else ()
        for name in (*module.__all__, *lazy):
            value = getattr(module, name)
            if not inspect.ismodule(value):
                home = f"{getattr(value, '__module__', package)}.{name}"
                objects.setdefault(id(value), set()).update({f"{package}.{name}", home})
    return {min(paths, key=len): paths for paths in objects.values()}


def missing_names(pages: Path, names: dict[str, set[str]] | None = None) -> Iterator[str]:
    """Yield the public names that are not on exactly one page of the reference."""
    found: Counter[str] = Counter()
    for path in (pages / "reference").glob("*.md"):
        found.update(re.findall(r"^::: (\S+)", path.read_text(encoding="utf-8"), re.MULTILINE))
    known = public_names() if names is None else names
    for name, paths in sorted(known.items()):
        if (count := sum(found[path] for path in paths)) != 1:
            yield f"reference: expected {name} on one page, got it on {count}"
    for path in sorted(set(found) - set().union(*known.values())):
        yield f"reference: {path} is no public name"


class Page(HTMLParser):
    """A built page: words of its article, anchors, links, and what it fetches."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self._article = 0
        self._skipped: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take note of an element's anchor, link and source."""
        values = {name: value or "" for name, value in attrs}
        self.anchors.update(value for name, value in attrs if name in ("id", "name") and value)
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if tag == "link" and values.get("rel") not in ("canonical", "next", "prev"):
            self.fetched.append(values.get("href", ""))
        if tag in ("script", "img", "iframe", "source", "video") and "src" in values:
            self.fetched.append(values["src"])
        self._article += tag == "article"
        if tag in ("pre", "script", "style", "svg", "math"):
            self._skipped.append(tag)

    def handle_endtag(self, tag: str) -> None:
        """Leave an element."""
        self._article -= tag == "article"
        if self._skipped and self._skipped[-1] == tag:
            self._skipped.pop()

    def handle_data(self, data: str) -> None:
        """Count the words of the article that are not code or pictures."""
        if self._article and not self._skipped:
            self.words += re.findall(r"[^\W_]\S*", data)


def read_site(site: Path) -> dict[Path, Page]:
    """Return all pages of a built site by their resolved path."""
    if not site.is_dir():
        raise FileNotFoundError(f"expected the built site in {site}; run make docs")
    paths = [path.resolve() for path in sorted(site.rglob("*.html"))]
    return {path: Page(path.read_text(encoding="utf-8")) for path in paths}


def too_long(site: Path, longest: int = LONGEST) -> Iterator[str]:
    """Yield the pages of more words than a reader finishes; generated ones may have them."""
    for path, page in read_site(site).items():
        name = path.relative_to(site.resolve()).as_posix()
        if len(page.words) > longest and not name.startswith(GENERATED):
            yield f"{name}: expected at most {longest} words, got {len(page.words)}"


def broken_links(site: Path) -> Iterator[str]:
    """Yield the links within a site whose file or anchor does not exist."""
    pages = read_site(site)
    for path, page in pages.items():
        if path.name == "404.html":  # its links are those of the server's root
            continue
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = path if not parts.path else (path.parent / unquote(parts.path)).resolve()
            if target.is_dir():
                target /= "index.html"
            known = pages[target].anchors if target in pages else None
            anchor = unquote(parts.fragment)
            if not target.exists() or (anchor and known is not None and anchor not in known):
                yield f"{path.relative_to(site.resolve())}: {link} leads nowhere"


def fetched(site: Path) -> Iterator[str]:
    """Yield what pages or style sheets would fetch from other sites."""
    for path, page in read_site(site).items():
        yield from outside(path.relative_to(site.resolve()), page.fetched)
    for path in site.rglob("*.css"):
        text = path.read_text(encoding="utf-8")
        yield from outside(path.relative_to(site), re.findall(r"url\(['\"]?([^'\")]+)", text))


def outside(page: Path, addresses: Iterable[str]) -> Iterator[str]:
    """Yield the addresses that are on another site."""
    for address in addresses:
        if urlsplit(address).netloc:
            yield f"{page}: fetches {address}"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.exit(main(sys.argv[1]))

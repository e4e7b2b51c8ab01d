"""Hooks of the site's build: where pages run, which pages a section has, formulas as MathML."""

from __future__ import annotations

import html
import logging
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
FORMULA = re.compile(
    r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<formula>.*?)\\[)\]]</(?P=tag)>', re.DOTALL
)

logger = logging.getLogger("mkdocs.hooks")
started: dict[str, float] = {}  # processor time at which the rendering of a page began


@event_priority(100)  # before mkdocstrings reads where the sources are
def on_config(config: Any) -> Any:
    """Prepare the process for the code of the pages, and expand the navigation."""
    config.config_file_path = str(HERE / "mkdocs.yml")  # whole, as the folder changes below
    sys.path.insert(0, str(HERE))
    os.environ["MPLBACKEND"] = "Agg"
    # What pages write lands in a folder that is gone afterwards, and every build starts without it.
    config.extra["workplace"] = tempfile.TemporaryDirectory(prefix="guide-")
    os.chdir(config.extra["workplace"].name)
    os.environ["HESSCURV_CACHE"] = str(Path("calibration").absolute())
    sources = mirror(Path("sources").absolute())
    reference = config.plugins["mkdocstrings"].config.handlers["python"]
    reference["paths"] = [str(sources)]
    reference["options"]["extensions"] = [str(HERE / "docstring_formulas.py")]
    config.nav = expand(config.nav, Path(config.docs_dir))
    return config


def mirror(folder: Path) -> Path:
    """Fill a folder with links to the package as it is installed, integrations inside it."""
    package = folder / "hesscurv"
    package.mkdir(parents=True)
    for path in [*(REPOSITORY / "hesscurv").iterdir(), REPOSITORY / "integrations"]:
        (package / path.name).symlink_to(path)
    return folder


def on_post_build(config: Any) -> None:
    """Leave the folder that pages wrote into, and remove it."""
    os.chdir(REPOSITORY)
    config.extra["workplace"].cleanup()


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Give a page a folder of its own, and start its clock: its code runs while it is rendered."""
    folder = Path(config.extra["workplace"].name) / Path(page.file.src_uri).with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    started[page.file.src_uri] = time.process_time()
    return markdown


def on_page_content(content: str, page: Any, **_: Any) -> str:
    """Report pages that take long, and replace formulas by MathML, which needs no script."""
    seconds = time.process_time() - started[page.file.src_uri]
    if seconds > 5:
        logger.info(f"{page.file.src_uri} took {seconds:.0f} s of processor time")
    return FORMULA.sub(
        lambda found: as_mathml(found["formula"], "block" if found["tag"] == "div" else "inline"),
        content,
    )


def as_mathml(formula: str, display: str) -> str:
    """Return a formula of LaTeX, as HTML shows it, as a MathML element."""
    from latex2mathml.converter import convert

    element = convert(html.unescape(formula).strip(), display=display)
    if display == "block":
        return f'<div class="formula">{element}</div>'
    # A long one scrolls on a phone; a short one stays on the baseline of its line.
    return f'<span class="formula-long">{element}</span>' if len(formula) > 60 else element


def expand(nav: list[Any], pages: Path) -> list[Any]:
    """Replace each ``FOLDER/*`` by the pages of the folder that the navigation does not name."""
    named = set(names(nav))
    out: list[Any] = []
    for item in nav:
        if isinstance(item, dict):
            out += [
                {title: expand_in(value, pages, named) if isinstance(value, list) else value}
                for title, value in item.items()
            ]
        else:
            out.append(item)
    # A section without pages yet has no tab.
    return [item for item in out if not isinstance(item, dict) or all(item.values())]


def expand_in(items: list[Any], pages: Path, named: set[str]) -> list[Any]:
    """Return one section's items, with ``FOLDER/*`` expanded."""
    out: list[Any] = []
    for item in items:
        if isinstance(item, str) and item.endswith("/*"):
            found = sorted((pages / item[:-2]).glob("*.md"))
            paths = [path.relative_to(pages).as_posix() for path in found]
            out += [path for path in paths if path not in named]
        else:
            out.append(item)
    return out


def names(nav: Any) -> list[str]:
    """Return the paths that a navigation names."""
    if isinstance(nav, str):
        return [nav]
    values = nav.values() if isinstance(nav, dict) else nav
    return [name for value in values for name in names(value)]

"""The pages in a headless Chromium: no error, nothing wider than a phone, values on hover."""

import pytest
from plots import recorded
from plots.test_pruning_pages import report_of
from support.browser import Browser, find_browser

from hesscurv.hooks import LiveReport
from hesscurv.plots.monitor_report import write_report
from hesscurv.plots.pruning_report import write_pruning_report

pytest.importorskip("matplotlib")
PROGRAM = find_browser()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium; HESSCURV_BROWSER names one")

# Whether anything reaches beyond the window, other than inside of what scrolls by itself.
WIDER = """
[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, .table') &&
  e.getBoundingClientRect().right > document.documentElement.clientWidth + 1
).map(e => e.outerHTML.slice(0, 80))
"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(PROGRAM, tmp_path_factory.mktemp("browser")) as browser:
        yield browser


@pytest.fixture(scope="module", params=["monitor", "pruning"])
def address(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    if request.param == "monitor":
        write_report(recorded.run(), path, title="W" * 80, pairs=recorded.pairs())
    else:
        write_pruning_report(report_of(), path, title="W" * 80, accuracy=[0.9, 0.8, 0.7])
    return path.as_uri()


@pytest.mark.parametrize("width", [1280, 390])
def test_a_page_fits_and_raises_no_error(browser, address, width):
    colors = set()
    for dark in (False, True):
        browser.show(address, width, dark=dark)
        assert browser.errors() == []
        assert browser.value("document.documentElement.scrollWidth") == width
        assert browser.value(WIDER) == []
        assert browser.value("[...document.images].every(i => i.naturalWidth > 0)")
        colors.add(browser.value("getComputedStyle(document.body).backgroundColor"))
    assert len(colors) == 2


def test_the_mark_under_the_pointer_has_the_value_of_the_picture(browser, address):
    browser.show(address)
    found = browser.value("""
        [...document.querySelectorAll('.plot svg *:not(title)')].map(e => {
          e.scrollIntoView({block: 'center'});
          const b = e.getBoundingClientRect(), p = e.closest('.plot').getBoundingClientRect();
          const x = b.x + b.width / 2, y = b.y + b.height / 2;
          const hit = document.elementFromPoint(x, y);
          return [hit.tagName, !!hit.querySelector('title'),
                  p.left <= x && x <= p.right && p.top <= y && y <= p.bottom];
        })
    """)
    assert len(found) > 5
    assert all(has_value and inside for _, has_value, inside in found)


def test_a_served_page_reloads_itself_under_its_policy(browser, tmp_path):
    with LiveReport(tmp_path / "run.html", serve=True, every=0) as live:
        browser.show(live.url)
        assert browser.value("document.body.innerText").count("No measurement yet") == 1
        live.log({"status": "ok", "loss": 1.5}, 0)
        browser.until("document.body.innerText.includes('1 measurement at step 0')")
        assert browser.errors() == []

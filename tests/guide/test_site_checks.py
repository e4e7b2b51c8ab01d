"""What `make docs` checks is found where it is wrong, and the reference has every public name."""

import pytest
import site_checks


def write(folder, name, text):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_every_public_name_is_on_one_page_of_the_reference():
    assert list(site_checks.missing_names(site_checks.PAGES)) == []


def test_a_name_on_no_page_on_two_and_an_unknown_one_are_found(tmp_path):
    write(tmp_path, "reference/a.md", "::: lib.twice\n\n::: lib.unknown\n")
    write(tmp_path, "reference/b.md", "::: lib.part.twice\n\n::: lib.once\n")
    names = {"lib.twice": {"lib.twice", "lib.part.twice"}, "lib.once": {"lib.once"}}
    names["lib.never"] = {"lib.never"}
    faults = list(site_checks.missing_names(tmp_path, names))
    assert [fault.split()[2] for fault in faults[:2]] == ["lib.never", "lib.twice"]
    assert "lib.unknown is no public name" in faults[2]
    assert len(faults) == 3


def test_spelling_reads_prose_and_neither_code_nor_links(tmp_path):
    page = (
        "A wrod, `wrod`, [right](wrod.md), $wrod$ and <b>wrod</b>'s.\n\n"
        "```python\nwrod\n```\n\n    wrod_name, wrod.name, GGN\n"
    )
    write(tmp_path, "page.md", page)
    known = {"right", "and"}
    faults = list(site_checks.misspelt(tmp_path, lambda word: word in known))
    assert [fault.partition(":")[0] for fault in faults] == ["page.md"]
    assert "'wrod'" in faults[0]


@pytest.mark.parametrize(
    ("british", "american"),
    [("normalised", "normalized"), ("initialisation", "initialization"), ("colour", "color")],
)
def test_british_words_are_looked_up_in_american(british, american):
    assert site_checks.american(british) == american


def test_long_pages_are_found_and_code_does_not_count(tmp_path):
    write(tmp_path, "long.html", "<article>" + "word " * 11 + "</article>")
    write(tmp_path, "code.html", "<article>word<pre>" + "word " * 11 + "</pre></article>")
    write(tmp_path, "reference/x.html", "<article>" + "word " * 11 + "</article>")
    faults = list(site_checks.too_long(tmp_path, longest=10))
    assert faults == ["long.html: expected at most 10 words, got 11"]


def test_links_without_a_target_are_found(tmp_path):
    write(tmp_path, "a.html", '<a href="b.html#there">x</a><a href="https://example.org">x</a>')
    write(tmp_path, "b.html", '<h1 id="there">x</h1><a href="b.html#not">x</a><a href="c.md">x</a>')
    assert list(site_checks.broken_links(tmp_path)) == [
        "b.html: b.html#not leads nowhere",
        "b.html: c.md leads nowhere",
    ]


def test_what_a_page_would_fetch_is_found(tmp_path):
    page = '<script src="https://cdn.example/x.js"></script><img src="own.png"><a href="https://x.org">'
    write(tmp_path, "a.html", page)
    write(tmp_path, "own.css", "@font-face { src: url(https://fonts.example/x.woff2) }")
    assert list(site_checks.fetched(tmp_path)) == [
        "a.html: fetches https://cdn.example/x.js",
        "own.css: fetches https://fonts.example/x.woff2",
    ]


def test_a_site_that_is_not_built_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="run make docs"):
        list(site_checks.too_long(tmp_path / "none"))

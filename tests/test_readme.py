"""The README's Python blocks run as they stand, and what it links to is there."""

import re

import pytest
from readme_blocks import README, readme_blocks


def test_the_blocks_run_as_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks, names = readme_blocks(), {}
    assert len(blocks) == 4
    for block in blocks:
        assert len(block.splitlines()) <= 8
        exec(block, names)
    assert {path.name for path in tmp_path.iterdir()} == {"run.html", "pruning.html"}
    assert "Eigenpairs(k=50" in capsys.readouterr().out


def test_it_is_short():
    assert len(README.read_bytes()) <= 8192


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README.read_text()))))
def test_what_it_links_to_is_there(path):
    assert (README.parent / path).exists()

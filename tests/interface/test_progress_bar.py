"""A bar is drawn in terminals and notebooks; elsewhere the log has a line now and then."""

import io
import logging
import sys
from types import SimpleNamespace

import pytest
import torch
from prunable import network, run

import hesscurv
from hesscurv.interface import progress_bar
from hesscurv.interface.progress_bar import ProgressBar, is_shown_somewhere
from hesscurv.linalg.device_memory import used_memory


class Stream(io.StringIO):
    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize(
    ("stream", "shown"),
    [(Stream(True), True), (Stream(False), False), (None, False), (object(), False)],
)
def test_bars_are_for_terminals(stream, shown, monkeypatch):
    monkeypatch.setattr(sys, "stderr", stream)
    assert is_shown_somewhere() is shown


def test_a_closed_stream_has_no_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", closed())
    assert is_shown_somewhere() is False


@pytest.mark.parametrize(("config", "shown"), [({"IPKernelApp": {}}, True), ({}, False)])
def test_a_notebook_has_bars_and_ipython_in_a_pipe_has_not(config, shown, monkeypatch):
    shell = SimpleNamespace(config=config)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setattr(sys, "stderr", Stream(False))
    assert is_shown_somewhere() is shown


def test_nothing_is_written_outside_a_terminal(capfd):
    hesscurv.eigsh(torch.eye(30, dtype=torch.float64), 3, progress=True)
    hesscurv.trace(torch.eye(30, dtype=torch.float64), 12, progress=True)
    run(network(), progress=True)
    assert capfd.readouterr() == ("", "")


def test_outside_a_terminal_the_log_has_lines(caplog, monkeypatch):
    monkeypatch.setattr(progress_bar, "_SECONDS_BETWEEN_LINES", 0.0)
    with caplog.at_level(logging.INFO, "hesscurv"):
        hesscurv.eigsh(torch.eye(30, dtype=torch.float64), 3, progress=True)
    assert "eigenpairs: 3 of 3 pairs after" in caplog.text
    assert " products, " in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, "hesscurv"):
        hesscurv.eigsh(torch.eye(30, dtype=torch.float64), 3)
    assert "pairs after" not in caplog.text


def test_lines_of_the_log_are_seldom(caplog):
    with caplog.at_level(logging.INFO, "hesscurv"), bar(1000) as shown:
        for _ in range(1000):
            shown.update()
    assert shown.done == 1000
    assert caplog.text == ""


def bar(total):
    return ProgressBar(total, "units", " units", True, lambda: 1_500_000_000)


def test_a_bar_has_rate_end_memory_and_note(terminal):
    with bar(4) as shown:
        shown.update(2, "half way")
        shown.say("a line above")
        shown.show(4)
    written = terminal.readouterr()
    assert written.out == ""  # all of it goes to stderr
    for part in ("units: ", "2/4", "4/4", "half way, 1.5 GB", "a line above\n", "units/s", "00:00"):
        assert part in written.err


def test_pruning_shows_sparsity_loss_and_memory(terminal):
    run(network(), progress=True)
    shown = terminal.readouterr().err
    for part in ("pruning: 100%", "measuring curvature", "sparsity 0.699, loss ", " GB"):
        assert part in shown


def test_used_memory_of_a_process_grows_with_its_tensors():
    before = used_memory(torch.device("cpu"))
    kept = torch.ones(8_000_000)
    grown = used_memory(torch.device("cpu")) - before
    # The allocator may have had a part of it at hand.
    assert before > 0
    assert 0 <= grown < 2 * kept.nbytes

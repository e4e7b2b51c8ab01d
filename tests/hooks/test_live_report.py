"""The page that is rewritten while training: how often, whole, to whom it is served, until when."""

import gc
import http.client
import os
import random
import subprocess
import sys
import textwrap
import warnings

import numpy
import pytest
import torch
from hooks import watched
from support.html_pages import read

import hesscurv
from hesscurv.hooks import LiveReport, MonitorWarning


class Clock:
    """Seconds that pass only when told to, and by `cost` with each page that is drawn."""

    def __init__(self):
        self.now, self.cost = 100.0, 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    """A clock; no figures are drawn, which take most of the time."""
    clock = Clock()

    def draw(*_):
        clock.now += clock.cost
        return []

    monkeypatch.setattr("hesscurv.plots.monitor_report.draw_all", draw)
    return clock


def record(step, **values):
    return {"step": step, "status": "ok", "loss": 1.5, **values}


def steps_of(path):
    page, text = read(path)
    assert "Rewritten while training" in text
    lines = page.downloads["measurements.csv"].splitlines()[1:]
    return [int(line.split(",")[0]) for line in lines]


def test_a_page_is_rewritten_at_most_so_often(tmp_path, clock):
    path = tmp_path / "run.html"
    live = LiveReport(path, every=10, max_fraction=1.0, clock=clock)
    assert not path.exists()
    live.log(record(0), 0)
    assert steps_of(path) == [0]
    clock.now += 9
    live.log(record(1), 1)
    assert steps_of(path) == [0]
    clock.now += 1
    live.log(record(2), 2)
    assert steps_of(path) == [0, 1, 2]
    live.log(record(3), 3)
    live.close()
    page, text = read(path)
    assert page.downloads["measurements.csv"].count("\n") == 5  # the last one too
    assert "<script" not in text  # nobody waits for another page


def test_pages_take_a_bounded_fraction_of_the_time(tmp_path, clock):
    clock.cost = 3.0
    live = LiveReport(tmp_path / "run.html", every=0, max_fraction=0.1, clock=clock)
    start, drawn = clock.now, 0
    for step in range(300):
        before = clock.now
        live.log(record(step), step)
        drawn += clock.now - before
        clock.now += 1
    spent = clock.now - start
    assert 0.08 * spent < drawn <= 0.1 * spent + clock.cost
    live.close()


def test_earlier_records_are_continued_and_the_last_of_a_step_counts(tmp_path, clock):
    earlier = [record(step, loss=9.0) for step in (10, 0, 20)]
    live = LiveReport(tmp_path / "run.html", records=earlier, title="Resumed", clock=clock)
    live.log({"status": "ok", "loss": 2.25}, 20)
    page, _ = read(live.path)
    assert [line.split(",")[::2] for line in page.downloads["measurements.csv"].split()] == [
        ["step", "loss"],
        ["0", "9.0"],
        ["10", "9.0"],
        ["20", "2.25"],
    ]
    assert "Resumed" in page.words
    live.close()


def test_a_relative_path_stays_where_it_was(tmp_path, clock, monkeypatch):
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)
    live = LiveReport("run.html", clock=clock)
    monkeypatch.chdir(tmp_path / "other")
    live.log(record(0), 0)
    live.close()
    assert (tmp_path / "run.html").exists()
    assert not list((tmp_path / "other").iterdir())


def test_a_page_that_fails_leaves_the_old_one_and_training_goes_on(tmp_path, clock, monkeypatch):
    model = watched.net()
    live = LiveReport(tmp_path / "run.html", every=0, max_fraction=1.0, clock=clock)
    monitor = hesscurv.hooks.CurvatureMonitor(
        model, watched.TASK, watched.data(), k=2, schedule=hesscurv.hooks.every(1), loggers=[live]
    )
    monitor.measure(0)
    old = live.path.read_bytes()

    def fail(*_):
        raise RuntimeError("no figure today")

    with monkeypatch.context() as patch:
        patch.setattr("hesscurv.plots.monitor_report.draw_all", fail)
        with pytest.warns(MonitorWarning, match="no figure today"):
            monitor.measure(1)
        assert live.path.read_bytes() == old
        assert [file.name for file in tmp_path.iterdir()] == ["run.html"]
    monitor.measure(2)
    assert steps_of(live.path) == [0, 1, 2]
    live.close()
    with pytest.raises(ValueError, match="expected an open LiveReport"):
        live.log(record(3), 3)


def test_a_page_with_figures_changes_no_random_state(tmp_path):
    pytest.importorskip("matplotlib")

    def states():
        return torch.get_rng_state().tolist(), random.getstate(), str(numpy.random.get_state())

    before = states()
    with LiveReport(tmp_path / "run.html") as live:
        live.log(record(0, sharpness=2.0), 0)
    assert len(read(live.path)[0].figures) == 2
    assert states() == before


def ask(url, path="/", method="GET", **headers):
    host, port = url.removeprefix("http://").rstrip("/").split(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=20)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer, body


def test_nothing_but_the_page_is_served_and_to_this_machine_only(tmp_path, clock):
    (tmp_path / "secret.txt").write_text("secret")
    with LiveReport(tmp_path / "run.html", serve=True, clock=clock) as live:
        assert live.url.startswith("http://127.0.0.1:")
        answer, body = ask(live.url)
        assert answer.status == 200
        assert b"No measurement yet" in body
        live.log(record(0), 0)
        answer, body = ask(live.url)
        assert body == live.path.read_bytes()
        assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
        assert answer.headers["Cache-Control"] == "no-store"
        assert ask(live.url, "/?again=1")[1] == body
        assert ask(live.url, Host="localhost:8000")[1] == body  # through a tunnel
        answer, nothing = ask(live.url, method="HEAD")
        assert (answer.status, nothing) == (200, b"")
        assert int(answer.headers["Content-Length"]) == len(body)
        for path in ("/run.html", "/secret.txt", "/../secret.txt", "//secret.txt", str(tmp_path)):
            answer, text = ask(live.url, path)
            assert answer.status == 404
            assert b"secret</" not in text
        assert ask(live.url, Host="evil.example")[0].status == 403
        assert ask(live.url, method="POST")[0].status == 501
        # The file may change or go: what was written is served.
        live.path.unlink()
        assert ask(live.url)[1] == body
    with pytest.raises(ConnectionRefusedError):
        ask(live.url)


def test_a_taken_port_is_refused_at_once(tmp_path, clock):
    with LiveReport(tmp_path / "a.html", serve=True, clock=clock) as live:
        port = int(live.url.rstrip("/").rpartition(":")[2])
        with pytest.raises(OSError, match="expected a free port on 127"):
            LiveReport(tmp_path / "b.html", serve=True, port=port, clock=clock)
        LiveReport(tmp_path / "b.html", port=port, clock=clock).close()  # not served


def test_the_server_stops_and_the_final_page_is_written_with_the_monitor(tmp_path, clock):
    path = tmp_path / "run.html"
    live = LiveReport(path, serve=True, clock=clock)
    url = live.url
    monitor = hesscurv.hooks.CurvatureMonitor(
        watched.net(), watched.TASK, watched.data(), k=2, loggers=[live]
    )
    del live
    monitor.measure(0)
    monitor.measure(1)
    assert steps_of(path) == [0]
    assert ask(url)[0].status == 200
    del monitor
    gc.collect()
    page, text = read(path)
    assert "from step 0 to step 1" in page.text
    assert "<script" not in text
    with pytest.raises(ConnectionRefusedError):
        ask(url)


def test_a_forked_worker_ends_nothing(tmp_path, clock):
    if not hasattr(os, "fork"):
        pytest.skip("this system does not fork")
    with LiveReport(tmp_path / "run.html", serve=True, clock=clock) as live:
        live.log(record(0), 0)
        old = live.path.stat().st_ino
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python warns of forks beside threads
            child = os.fork()
        if child == 0:
            live.close()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert live.path.stat().st_ino == old  # not replaced
        assert ask(live.url)[0].status == 200


@pytest.mark.slow
def test_the_final_page_is_written_when_python_ends_by_an_error(tmp_path):
    code = """
        import hesscurv
        live = hesscurv.hooks.LiveReport("run.html", serve=True)
        for step in range(3):
            live.log({"status": "ok", "loss": 1.0}, step)
        raise SystemExit(3)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=tmp_path,
        capture_output=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, b"", b"")
    assert "from step 0 to step 2" in read(tmp_path / "run.html")[0].text


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every": -1}, ValueError, "every >= 0"),
        ({"every": "10"}, TypeError, "every to be a number"),
        ({"max_fraction": 0}, ValueError, "max_fraction > 0"),
        ({"max_fraction": 1.5}, ValueError, "max_fraction <= 1"),
        ({"port": -1}, ValueError, "port >= 0"),
        ({"port": 70000}, ValueError, "port <= 65535"),
        ({"port": "80"}, TypeError, "port to be an int"),
        ({"records": [{"loss": 1}]}, TypeError, "expected records"),
        ({"clock": 3}, TypeError, "clock to be callable"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, options, error, message):
    with pytest.raises(error, match=message):
        LiveReport(tmp_path / "run.html", **options)
    assert not list(tmp_path.iterdir())


def test_a_path_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="existing folder"):
        LiveReport(tmp_path / "missing" / "run.html")
    with pytest.raises(IsADirectoryError, match="got the folder"):
        LiveReport(tmp_path)

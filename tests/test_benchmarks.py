"""The benchmarks run, measure the networks that they name, and report what they measured."""

import argparse
import importlib
import importlib.util
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[1] / "examples" / "benchmarks"
PEERS = ("curvlinops", "skerch", "scipy")


@pytest.fixture
def load(monkeypatch):
    """Import modules of the benchmarks as their scripts do, and forget them afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(FOLDER)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(FOLDER) in str(getattr(sys.modules[name], "__file__", None)):
            del sys.modules[name]


def run(name, *arguments, folder, timeout):
    """What a benchmark prints, with no results written."""
    done = subprocess.run(
        [sys.executable, str(FOLDER / f"{name}.py"), *arguments, "--results", "none"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *("products", "eigensolvers", "memory", "spectra", "storage", "scaling"),
        *("pruning", "structured", "equal_time", "optimizers", "pinns", "monitor", "deep_nets"),
        *("prune_when_stable", "checks", "missed_pairs"),
    ],
)
def test_benchmark_runs(name, tmp_path):
    if name in ("products", "eigensolvers", "spectra") and any(
        importlib.util.find_spec(peer) is None for peer in PEERS
    ):
        pytest.skip("needs the extra hesscurv[bench]")
    kept = FOLDER / "results.jsonl"
    before = kept.read_bytes() if kept.exists() else None
    printed = run(name, "--quick", folder=tmp_path, timeout=300)
    verdicts = [line for line in printed.splitlines() if line.startswith(("PASS", "MISS"))]
    assert len(verdicts) >= (1 if name in ("checks", "missed_pairs") else 2)
    assert (kept.read_bytes() if kept.exists() else None) == before
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_benchmark_of_a_gpu_runs_on_a_cpu_and_judges_nothing(tmp_path):
    sizes = ("--small", "--device", "cpu", "--threads", "1")
    printed = run("gpu", *sizes, folder=tmp_path, timeout=600)
    lines = printed.splitlines()
    for part in ("products", "eigsh", "resnet18", "storage", "overhead"):
        assert any(line.startswith(f"{part}: ") and "minutes" in line for line in lines)
    assert not any(line.startswith(("PASS", "MISS")) for line in lines)
    assert sum(line.startswith("n/a") for line in lines) > 10
    assert "10 of 10 converged" in printed  # the pairs of ResNet-18
    assert list(tmp_path.iterdir()) == []


def test_a_time_limit_ends_the_work_and_no_other(load):
    peers = load("gpu_peers")
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(peers.TimeUpError, match="stopped after 0"), peers.time_limit(0.2):
        time.sleep(60)
    with peers.time_limit(60.0):
        pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGALRM) is before


def test_a_width_that_memory_is_short_of_is_left_out(load):
    class Narrow:
        shape, dtype, device = (5, 5), torch.float32, torch.device("cpu")

        def __matmul__(self, V):
            if V.shape[1] > most:
                raise torch.OutOfMemoryError
            return V

    fastest_width, most = load("contenders").fastest_width, 4
    assert fastest_width(Narrow(), 32) <= most
    most = 0
    with pytest.raises(torch.OutOfMemoryError):
        fastest_width(Narrow(), 32)


def test_overhead_is_a_share_of_a_plain_training(load):
    overhead = load("gpu_overhead")
    training = object.__new__(overhead.Training)
    training.network = argparse.Namespace(name="net")
    training.kind, training.monitor, training.steps = "optimizer", None, 25
    training.model = torch.nn.Linear(1, 1)
    # Turns of 5 steps of 1 s each without; 5 % more with, and refreshes in the 2nd and 4th turn.
    training.seconds = [9.0, 7.25, 5.25, 7.25, 5.25]
    training.measuring = [0.0, 2.0, 0.0, 2.0, 0.0]
    training.measured_at = [10, 20]
    row = overhead.summary(training, [5.0] * 5)
    assert row["between"] == pytest.approx(0.05)
    assert (row["interval"], row["measuring_seconds"]) == (10, 2.0)
    assert row["steady"] == pytest.approx(0.05 + 2.0 / 10)
    assert row["whole"] == pytest.approx(34.0 / 25 - 1)


@pytest.mark.parametrize(
    ("name", "size"),
    [("mlp", 7030), ("convnet", 72010), ("3c3d", 895210), ("resnet20", 272474), ("gpt", 354336)],
)
def test_networks_have_their_published_sizes(name, size, load):
    model = load("models").RECIPES[name].model()
    assert sum(p.numel() for p in model.parameters()) == size


def test_balanced_takes_equal_numbers_of_every_class(load):
    labels = torch.arange(10).repeat(30)
    chosen = load("samples").balanced(labels, 64)
    counts = labels[chosen].bincount(minlength=10)
    assert int(chosen.sum()) == 64
    assert int(counts.max() - counts.min()) <= 1


def test_contenders_take_turns(load):
    calls = []
    timing = load("timing")
    times = timing.interleaved(
        {name: lambda name=name: calls.append(name) for name in "abc"}, 4, keep=str
    )
    assert calls[:3] == ["a", "b", "c"]  # the warm-up
    rounds = [calls[i : i + 3] for i in range(3, 15, 3)]
    assert [sorted(r) for r in rounds] == [["a", "b", "c"]] * 4
    assert [len(t.seconds) for t in times.values()] == [4, 4, 4]
    assert times["a"].first == "None"


def test_a_long_contender_has_fewer_rounds(load):
    calls = []
    times = load("timing").interleaved({"a": lambda: calls.append("a")}, 9, long=0.0)
    assert len(times["a"].seconds) == len(calls) == 3


def test_ratios_are_taken_round_by_round(load):
    timing = load("timing")
    ratios = timing.Times([2.0, 8.0, 6.0]).over(timing.Times([1.0, 2.0, 1.0]), parts=2)
    assert ratios.seconds == [1.0, 2.0, 3.0]
    assert ratios.median == 2.0
    assert ratios.quartiles == (1.5, 2.5)


def test_results_are_appended_as_lines(tmp_path, capsys, load):
    results = load("results")
    path = tmp_path / "results.jsonl"
    for _ in range(2):
        options = argparse.Namespace(quick=False, results=str(path), data=tmp_path, rounds=3)
        report = results.Report("products", options)
        report.rows.append({"seconds": 1.5})
        report.judge("at most 2", True, "1.5")
        report.write()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 2
    assert lines[0]["rows"] == [{"seconds": 1.5}]
    assert lines[0]["verdicts"] == [{"target": "at most 2", "reached": True, "detail": "1.5"}]
    assert lines[0]["environment"]["threads"] >= 1
    assert str(tmp_path) not in path.read_text()
    assert "PASS  at most 2: 1.5" in capsys.readouterr().out


def test_quick_runs_leave_no_results(tmp_path, monkeypatch, load):
    results = load("results")
    monkeypatch.setattr(results, "DEFAULT_RESULTS", tmp_path / "results.jsonl")
    results.Report("products", argparse.Namespace(quick=True, results=None)).write()
    assert list(tmp_path.iterdir()) == []


def test_tables_are_aligned(capsys, load):
    load("results").print_table(["name", "n"], [("a", 1), ("longer", 12.5), ("b", None)])
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["name       n", "------  ----", "a          1", "longer  12.5", "b          -"]


def test_a_curve_tells_when_a_smoothed_loss_was_reached(load):
    curve = load("deep_training").Curve([0.0, 1.0, 2.0, 3.0], [0, 10, 20, 30], [9.0, 6.0, 3.0, 0.0])
    assert curve.smooth() == [9.0, 7.5, 6.0, 3.0]
    assert curve.final == 3.0
    assert curve.time_to(4.5) == (2.5, 25.0)
    assert curve.loss_after(15) == 6.75
    assert curve.loss_after(99) == 3.0
    assert curve.time_to(9.0) == (0.0, 0)
    assert curve.time_to(2.9) == (math.inf, math.inf)
    curve.losses[-1] = math.inf
    assert curve.final == math.inf


def test_looking_at_the_loss_of_training_changes_nothing(load):
    training = load("deep_training")
    recipe = training.Recipe(
        lambda: torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)),
        lambda _: ("noise", torch.randn(60, 3), torch.randint(4, (60,))),
        torch.nn.CrossEntropyLoss,
        **{"batch": 8, "warm_up": 5, "warm_up_lr": 0.1, "lr": 0.1, "adaptive_lr": 0.01},
        **{"samples": 4, "seconds": 1.0, "looked_at": 20},
    )
    training.RECIPES["noise"] = recipe
    first, again = training.start("noise", None), training.start("noise", None)
    before = {name: value.clone() for name, value in first.model.state_dict().items()}
    assert first.look(first.model) == again.look(again.model)
    for name, value in first.model.state_dict().items():
        assert torch.equal(value, before[name])
    # Neither steps nor looks take the samples that curvature is measured on.
    (x, _), *_ = first.curvature_batches
    assert torch.equal(x, first.x[:4])
    batches = first.batches(0)
    seen = torch.cat([next(batches)[0] for _ in range(7)])
    assert not (seen[:, None] == x).all(2).any()


def test_a_text_is_cut_into_sequences_and_what_follows(tmp_path, load):
    path = tmp_path / "text.txt"
    path.write_text("abcabdabcz")
    name, inputs, targets = load("samples").shakespeare(path, 4)
    assert name == "text"
    assert inputs.tolist() == [[0, 1, 2, 0], [1, 3, 0, 1]]
    assert targets.tolist() == [[1, 2, 0, 1], [3, 0, 1, 2]]

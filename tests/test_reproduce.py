"""The scripts that reproduce the paper run, go on after a kill, and have networks of its sizes."""

import argparse
import importlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from itertools import islice
from pathlib import Path

import pytest
import torch
from support.forks import run_script

import hesscurv
from hesscurv.hooks import CurvatureMonitor

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
FOLDER, BENCHMARKS = EXAMPLES / "reproduce", EXAMPLES / "benchmarks"
RESULTS = BENCHMARKS / "results.jsonl"
SCRIPTS = {"cifar10_3c3d": [0, 3], "resnet18": [2], "gpt2": [3]}  # steps of --quick
FIGURES = ["mlp_crystallisation", "mlp_metrics", "mlp_overlap", "cifar10_monitor", "beyond"]


@pytest.fixture
def load(monkeypatch):
    """Import modules as the scripts do, and forget them afterwards."""
    before = set(sys.modules)
    for folder in (BENCHMARKS, FOLDER):
        monkeypatch.syspath_prepend(folder)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if str(EXAMPLES) in str(getattr(sys.modules[name], "__file__", None)):
            del sys.modules[name]


def command(name, *arguments):
    return [sys.executable, str(FOLDER / f"{name}.py"), *map(str, arguments)]


def run(name, *arguments, cwd, fails=False):
    """What a script prints."""
    done = run_script(FOLDER / f"{name}.py", *arguments, cwd=cwd)
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    return done.stderr if fails else done.stdout


def contents(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


# -- networks and data --------------------------------------------------------------------------


def test_networks_have_their_published_sizes(load):
    with torch.device("meta"):
        networks = {
            895_210: load("models").three_c_three_d(),
            11_173_962: load("resnet18").resnet18(),
            11_689_512: load("resnet18").resnet18(image_size=224, classes=1000),
            124_439_808: load("gpt2").GPT2(),
        }
    for size, network in networks.items():
        assert sum(p.numel() for p in network.parameters()) == size


def test_gpt2_sees_the_past_alone(load):
    torch.manual_seed(0)
    net = load("gpt2").GPT2(depth=2, heads=2, width=16, vocabulary=11, positions=8).initialise_()
    x = torch.randint(11, (2, 8))
    later = x.clone()
    later[:, 5:] = (later[:, 5:] + 1) % 11
    a, b = net(x), net(later)
    torch.testing.assert_close(a[:, :5], b[:, :5])
    assert not torch.allclose(a[:, 5:], b[:, 5:])


def test_gpt2_is_initialised_as_published(load):
    torch.manual_seed(0)
    net = load("gpt2").GPT2(depth=3, heads=2, width=64, vocabulary=100).initialise_()
    # Standard deviations of thousands of draws are good to a few per cent.
    net.requires_grad_(False)
    for weight, std in [
        (net.tokens.weight, 0.02),
        (net.blocks[0].qkv.weight, 0.02),
        (net.blocks[1].project.weight, 0.02 / 6**0.5),
        (net.blocks[2].mlp[2].weight, 0.02 / 6**0.5),
    ]:
        assert float(weight.std()) == pytest.approx(std, rel=0.1)
    assert float(net.blocks[0].qkv.bias.abs().max()) == 0
    assert float(net.norm.weight.min()) == 1


def test_every_shifted_image_is_a_window_of_the_padded_one(load):
    x = torch.rand(20, 3, 5, 6)
    y = load("resnet18").augmented(x, torch.Generator().manual_seed(0), most=2)
    assert y.shape == x.shape
    for before, after in zip(x, y, strict=True):
        sides = [torch.nn.functional.pad(z, (2,) * 4) for z in (before, before.flip(2))]
        windows = [z[:, i : i + 5, j : j + 6] for z in sides for i in range(5) for j in range(5)]
        assert any(torch.equal(after, window) for window in windows)


def test_every_epoch_takes_every_sample_at_most_once(load):
    batches = list(islice(load("training").shuffled(10, 3, seed=0), 6))
    for epoch in (batches[:3], batches[3:]):
        assert len(torch.cat(epoch).unique()) == 9
    again = list(islice(load("training").shuffled(10, 3, seed=0), 6))
    assert all(torch.equal(a, b) for a, b in zip(batches, again, strict=True))


# -- the paper's figures ------------------------------------------------------------------------


@pytest.fixture
def small():
    """A net, its task and data, its eigenpairs, and the mask of its largest parameters."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh(), torch.nn.Linear(2, 2))
    net.double()
    task = hesscurv.supervised(torch.nn.CrossEntropyLoss())
    batches = [(torch.randn(20, 3, dtype=torch.float64), torch.randint(2, (20,)))]
    pairs = hesscurv.eigsh(hesscurv.HessianOperator(net, task, batches), 4)
    return net, task, batches, pairs, hesscurv.magnitude_mask(net, 4)


def test_chance_by_layer_is_the_mean_over_all_masks_with_as_many_entries_of_each(load, small):
    _, _, _, pairs, mask = small
    parts = pairs.layout.slices().values()
    choices = [
        list(itertools.combinations(range(part.start, part.stop), int(mask[part].sum())))
        for part in parts
    ]
    overlaps = []
    for kept in itertools.product(*choices):
        other = torch.zeros_like(mask)
        other[list(itertools.chain(*kept))] = True
        overlaps.append(hesscurv.overlap(other, pairs))
    assert len(overlaps) > 10
    expected = sum(overlaps) / len(overlaps)
    assert load("mlp").chance_by_layer(mask, pairs) == pytest.approx(expected, rel=1e-10)


def test_a_record_gives_the_chance_by_layer_too(load, small, monkeypatch):
    net, task, batches, *_ = small
    script = load("cifar10_monitor")
    monkeypatch.setattr(script, "SIZE", sum(p.numel() for p in net.parameters()))
    monitor = CurvatureMonitor(net, task, batches, k=4, quantities="overlap")
    record = monitor.measure(0)
    expected = load("mlp").chance_by_layer(monitor.mask, monitor.pairs) / record["overlap_chance"]
    # The record's fractions are of the same masks and shares: equal but for rounding to float32.
    assert script.derived(record)["layers"] == pytest.approx(expected, rel=1e-5)


def test_nets_of_a_comparison_are_kept_and_found_for_the_same_settings_alone(load, tmp_path):
    beyond = load("beyond")
    options = argparse.Namespace(data=None, fixed=3, rows=tmp_path / "rows.jsonl")
    case = beyond.Case(seed=0, width=10)
    row = {**vars(case), "data": "scikit-learn's digits", "fixed": 3, "moment": "start"}
    options.rows.write_text(json.dumps(row) + "\n")
    assert beyond.found(case, options) == [row]
    assert beyond.found(beyond.Case(seed=1, width=10), options) == []
    options.fixed = 4
    assert beyond.found(case, options) == []


def test_nets_that_serve_several_parts_are_trained_once(load):
    beyond = load("beyond")
    options = argparse.Namespace(seeds=[0, 1], widths=[10, 20], parts=list(beyond.PARTS))
    cases = beyond.cases(options)
    assert len(cases) == len(set(cases)) == 2 * 3  # two widths, and AdamW
    options.parts = ["optimizers"]
    assert {case.optimizer for case in beyond.cases(options)} == {"SGD", "AdamW"}


# -- resuming -----------------------------------------------------------------------------------


def test_training_that_was_killed_ends_with_the_same_weights(load, tmp_path, monkeypatch):
    training = load("training")
    monkeypatch.setattr(training, "SAVE_SECONDS", -1.0)  # a state at every step
    x, killed_at = torch.randn(20, 4), 5

    def trained(folder, die_at=None):
        def make():
            torch.manual_seed(0)
            net = torch.nn.Linear(4, 1)
            return net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)

        def loss_of(net, part, step):
            if step == die_at:
                raise KeyboardInterrupt
            return net(x[part]).square().mean()

        folder.mkdir(exist_ok=True)
        batches = training.shuffled(20, 3, seed=0)
        training.train(folder, [0, 9], make, batches, loss_of, rate=lambda step: 0.1 / (1 + step))
        return torch.load(training.weights_path(folder, 9), weights_only=True)

    whole = trained(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        trained(tmp_path / "killed", killed_at)
    saved = torch.load(tmp_path / "killed" / "training.pt", weights_only=True)
    assert saved["step"] == killed_at
    resumed = trained(tmp_path / "killed")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    names = {path.name for path in (tmp_path / "killed").iterdir()}
    assert names == {"weights-0.pt", "weights-9.pt", "training.pt"}


def test_seconds_are_summed_up_over_processes(load, tmp_path):
    meter, options = load("meter"), argparse.Namespace(device="cpu", storage=None)
    totals = []
    for _ in range(2):
        with meter.Meter(tmp_path / "meter.json", options) as measured:
            time.sleep(0.05)
        totals.append(measured.totals())
    assert [t["pieces"] for t in totals] == [1, 2]
    assert totals[1]["seconds"] >= totals[0]["seconds"] + 0.05
    assert totals[1]["peak_bytes"] >= totals[0]["peak_bytes"] > 0
    assert json.loads((tmp_path / "meter.json").read_text()) == totals[1]


def test_a_folder_of_other_settings_is_refused(load, tmp_path):
    claim = load("decompositions").claim
    claim(tmp_path / "run", {"seed": 0, "data": "digits"})
    claim(tmp_path / "run", {"seed": 0, "data": "digits"})
    with pytest.raises(SystemExit, match="seed 0, now 1"):
        claim(tmp_path / "run", {"seed": 1, "data": "digits"})


def test_missing_data_is_said_before_any_work(tmp_path):
    work = tmp_path / "work"
    for name, missing in [("cifar10_3c3d", "data_batch_1"), ("gpt2", "tinyshakespeare.txt")]:
        message = run(
            name, "--quick", "--data", tmp_path, "--folder", work, cwd=tmp_path, fails=True
        )
        assert "--data: found no" in message
        assert missing in message
        assert "Traceback" not in message
    assert not work.exists()
    for name, missing in [
        ("cifar10_monitor", "data_batch_1"),
        ("mlp_overlap", "train-images-idx3-ubyte"),
    ]:
        message = run(name, "--quick", "--data", tmp_path, cwd=tmp_path, fails=True)
        assert missing in message
        assert "Traceback" not in message


def test_a_figure_that_cannot_be_written_is_said_before_any_work(tmp_path):
    where = tmp_path / "none" / "figure.png"
    message = run("mlp_metrics", "--figure", where, cwd=tmp_path, fails=True)
    assert "--figure: there is no folder" in message
    assert "Traceback" not in message


# -- the scripts --------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_and_finds_its_work_done(name, tmp_path):
    kept = RESULTS.read_bytes() if RESULTS.exists() else None
    work, cwd = tmp_path / "work", tmp_path / "cwd"
    cwd.mkdir()
    first = run(name, "--quick", "--folder", work, cwd=cwd)
    verdicts = [line for line in first.splitlines() if line.startswith(("PASS", "MISS", "n/a"))]
    assert len(verdicts) >= 3
    assert not any(line.startswith("MISS") for line in verdicts)
    for step in SCRIPTS[name]:
        (result,) = work.glob(f"step-{step}-*/result.json")
        row = json.loads(result.read_text())["row"]
        assert row["converged"] == row["k"] == row["checked"] == row["checked_within_tol"]
        # Of one quantity, computed twice in float32.
        assert row["measured_over_reported"] == pytest.approx(1, abs=0.05)
    assert not list(work.rglob("checkpoint"))
    before = contents(work)
    second = run(name, "--quick", "--folder", work, cwd=cwd)
    assert second.count("done before") == len(SCRIPTS[name])
    assert contents(work) == before
    assert list(cwd.iterdir()) == []
    assert (RESULTS.read_bytes() if RESULTS.exists() else None) == kept


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_drawn_and_its_table_printed(name, tmp_path):
    kept = RESULTS.read_bytes() if RESULTS.exists() else None
    cwd = tmp_path / "cwd"
    cwd.mkdir()
    options = ("--quick", "--figure", tmp_path / "figure.png")
    options += ("--rows", tmp_path / "rows") if name == "beyond" else ()
    out = run(name, *options, cwd=cwd)
    verdicts = [line for line in out.splitlines() if line.startswith(("PASS", "MISS", "n/a"))]
    assert len(verdicts) >= 2
    assert not any(line.startswith("MISS") for line in verdicts)
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    if name == "beyond":
        again = run(name, *options, cwd=cwd)
        assert "seed 0, start" in out
        assert "seed 0, start" not in again
        assert out.partition("widths: ")[2] == again.partition("widths: ")[2]
    assert list(cwd.iterdir()) == []
    assert (RESULTS.read_bytes() if RESULTS.exists() else None) == kept


@pytest.mark.slow
def test_a_script_writes_its_rows_to_the_file_of_results(tmp_path):
    results = tmp_path / "results.jsonl"
    run("gpt2", "--quick", "--results", results, cwd=tmp_path)
    (line,) = map(json.loads, results.read_text().splitlines())
    assert line["benchmark"] == "reproduce gpt2"
    assert line["rows"][0]["converged"] == 3
    assert [path.name for path in tmp_path.iterdir()] == ["results.jsonl"]


@pytest.mark.slow
def test_products_of_large_images_are_timed(tmp_path):
    out = run("resnet18", "--quick", "--image-size", 224, "--repeats", 2, cwd=tmp_path)
    assert "ms" in out.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("storage", [(), ("--storage", "disk", "--storage-dtype", "bfloat16")])
def test_a_killed_decomposition_goes_on(storage, tmp_path):
    options = ("--quick", "--k", 40, "--steps", 0, *storage)
    arguments = (*options, "--folder", tmp_path / "killed")
    process = subprocess.Popen(
        command("cifar10_3c3d", *arguments),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "killed").glob("step-0-*/checkpoint/state-*")):
            assert process.poll() is None, "ended before its first checkpoint"
            assert time.monotonic() < deadline
            time.sleep(0.05)
        time.sleep(6)  # its seconds are written down every five
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    time.sleep(2)  # the worker notices that it is alone, and ends
    run("cifar10_3c3d", *arguments, cwd=tmp_path)
    (result,) = (tmp_path / "killed").glob("step-0-*/result.json")
    row = json.loads(result.read_text())["row"]
    assert row["pieces"] == 2
    assert row["seconds"] > row["solver_seconds"] > 0
    assert row["converged"] == 40

"""Every script in examples/ runs to its end: each asserts what it shows."""

import re
import shlex
from pathlib import Path

import pytest
from support.forks import run_script

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))  # examples/benchmarks/ and reproduce/ measure
# Those that take half a minute and more even with --quick; other tests do most of what they show.
SLOW = {"many_processes.py", "measurement_jobs.py", "precondition.py", "prune_resnet20.py"}
DEMO = ROOT / "examples" / "overlap.py"  # what `make demo` runs

pytestmark = pytest.mark.skipif(not SCRIPTS, reason="there is no example yet")


def run(script: Path, *arguments: str, folder: Path) -> str:
    """What a script prints, run from a folder of its own and with figures drawn off screen."""
    done = run_script(script, *arguments, cwd=folder)
    assert done.returncode == 0, f"{script.name} {' '.join(arguments)}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(path, id=path.stem, marks=pytest.mark.slow if path.name in SLOW else ())
        for path in SCRIPTS
        if path != DEMO
    ],
)
def test_example_runs(script, tmp_path):
    quick = ["--quick"] if "--quick" in run(script, "--help", folder=tmp_path) else []
    run(script, *quick, folder=tmp_path)


def test_the_demo_tells_what_it_does_shows_and_what_comes_next(tmp_path):
    folder = tmp_path / "with spaces"
    folder.mkdir()
    shown = run(DEMO, "--quick", folder=folder)
    lines = shown.splitlines()
    assert lines[0].startswith("Loading")
    assert "if they overlap far above chance" in shown
    picture = folder.resolve() / "overlap.png"
    assert str(picture) in shown
    assert picture.read_bytes().startswith(b"\x89PNG")
    numbers = {line[:18].strip(): line[18:] for line in lines}
    overlap, ratio = re.search(
        r"^([0-9.]+) at .* ([0-9.]+) times chance", numbers["Overlap"]
    ).groups()
    assert 0 < float(overlap) < 1 < float(ratio)
    assert float(numbers["Largest residual"].split()[0]) < 1e-3  # tol times an eigenvalue below 1
    assert re.search(r"[0-9.]+ by hesscurv.eigsh, [0-9.]+ by SciPy's eigsh", numbers["Seconds"])
    command = lines[lines.index("Next:") + 1]
    assert shlex.split(command)[1:] == [str(DEMO), "--full"]


@pytest.mark.slow
def test_the_full_demo_agrees_with_the_dense_hessian(tmp_path):
    run(DEMO, "--quick", "--full", folder=tmp_path)  # asserts it


def test_the_demo_refuses_a_picture_that_it_cannot_write(tmp_path):
    done = run_script(DEMO, "--out", tmp_path, cwd=tmp_path)
    assert done.returncode == 2
    assert "name another file" in done.stderr

"""Every script in examples/ runs to its end: each asserts what it shows."""

from pathlib import Path

import pytest
from support.forks import run_script

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "examples").glob("*.py"))  # examples/benchmarks/ and reproduce/ measure
# Those that take half a minute and more even with --quick; other tests do most of what they show,
# and `make demo` all that overlap.py does.
SLOW = {
    *("many_processes.py", "measurement_jobs.py", "overlap.py", "precondition.py"),
    "prune_resnet20.py",
}

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
    ],
)
def test_example_runs(script, tmp_path):
    quick = ["--quick"] if "--quick" in run(script, "--help", folder=tmp_path) else []
    run(script, *quick, folder=tmp_path)


def test_the_main_job_is_an_example():
    assert "overlap.py" in {script.name for script in SCRIPTS}

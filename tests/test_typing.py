"""A user's script with each public name passes mypy --strict and pyright; no result is Any."""

import importlib
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tests" / "typing_user_script.py"
PARTS = ("hooks", "integrations", "optim", "plots", "pruning")

CHECKERS = {
    "mypy": ("--strict", "--config-file=", "--follow-imports=silent"),
    "pyright": (f"--pythonpath={sys.executable}",),
}


@pytest.mark.slow
@pytest.mark.parametrize("checker", CHECKERS)
def test_a_users_script_passes(checker, tmp_path):
    if importlib.util.find_spec(checker) is None:
        pytest.skip(f"{checker} is not installed")
    # As it lies in site-packages: type checkers do not follow the hooks of editable installs.
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "hesscurv", tmp_path / "hesscurv", ignore=ignored)
    shutil.copytree(ROOT / "integrations", tmp_path / "hesscurv" / "integrations", ignore=ignored)
    shutil.copy(SCRIPT, tmp_path / "user.py")
    command = [sys.executable, "-m", checker, *CHECKERS[checker], "user.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_script_uses_each_public_name():
    text = SCRIPT.read_text()
    missing = []
    for part in ("", *PARTS):
        module = importlib.import_module(f"hesscurv.{part}" if part else "hesscurv")
        prefix = part or "hesscurv"
        missing += [
            f"{prefix}.{name}"
            for name in module.__all__
            if name not in PARTS and not re.search(rf"\b{prefix}\.{name}\b", text)
        ]
    assert missing == []

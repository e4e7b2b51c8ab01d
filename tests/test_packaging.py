"""The package holds what it should and imports from everywhere, as a wheel and when editable.

All is built from a copy of the source in a temporary folder, with the setuptools at hand and
nothing downloaded.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import hesscurv

ROOT = Path(__file__).resolve().parents[1]
FIND_PACKAGE = """
import hesscurv, hesscurv.integrations
print(hesscurv.__file__)
print(hesscurv.integrations.__file__)
print(hesscurv.integrations.__name__)
"""


def run(*command: object, folder: Path, **environment: str) -> list[str]:
    """The lines that a command prints, run in a folder and blind to the path of this process."""
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env={**inherited, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of what the package is built from."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ["hesscurv", "integrations", "tests", "examples"]:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__")
            )
    for name in ["pyproject.toml", "README.md", "LICENSE"]:
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory) -> Path:
    """The wheel that pip builds."""
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", folder]
    run(sys.executable, "-m", "pip", "wheel", *options, checkout, folder=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def editable_python(checkout, tmp_path_factory) -> Path:
    """The interpreter of an environment with an editable install, and this one's other packages."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    (packages,) = run(
        python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=folder
    )
    # A folder named in a .pth file lends its packages, but its own .pth files are not read: what
    # is installed here in editable mode, this package above all, does not come along.
    here = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (Path(packages) / "lent.pth").write_text("\n".join(sorted(here)))
    options = ["--no-deps", "--no-build-isolation", "--no-index"]
    run(python, "-m", "pip", "install", *options, "--editable", checkout, folder=folder)
    return python


def test_wheel_holds_the_library_and_nothing_else(wheel):
    sources = {
        f"{package}/{path.relative_to(ROOT / folder).as_posix()}"
        for folder, package in [("hesscurv", "hesscurv"), ("integrations", "hesscurv/integrations")]
        for path in (ROOT / folder).rglob("*.py")
    }
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        metadata = next(name for name in names if name.endswith(".dist-info/METADATA"))
        described = archive.read(metadata).decode()
    in_package = {name for name in names if ".dist-info/" not in name}
    assert in_package == sources | {"hesscurv/py.typed"}, "is a subpackage not in pyproject.toml?"
    assert any(name.endswith("LICENSE") for name in names - in_package)
    assert "Name: hesscurv\n" in described
    assert f"Version: {hesscurv.__version__}\n" in described
    assert "License-Expression: MIT\n" in described
    assert (ROOT / "README.md").read_text().strip() in described


def test_wheel_imports_from_outside(wheel, tmp_path):
    target = tmp_path / "installed"
    options = ["--no-deps", "--no-index", "--target", target]
    run(sys.executable, "-m", "pip", "install", *options, wheel, folder=tmp_path)
    found = run(sys.executable, "-c", FIND_PACKAGE, folder=tmp_path, PYTHONPATH=str(target))
    assert found == [
        str(target / "hesscurv" / "__init__.py"),
        str(target / "hesscurv" / "integrations" / "__init__.py"),
        "hesscurv.integrations",
    ]


# At the root, `import hesscurv` finds the folder itself before any installed package.
@pytest.mark.parametrize("place", ["outside", "root", "folder in it"])
def test_editable_install_imports_from(place, editable_python, checkout, tmp_path):
    folder = {"outside": tmp_path, "root": checkout, "folder in it": checkout / "tests"}[place]
    found = run(editable_python, "-c", FIND_PACKAGE, folder=folder)
    assert found == [
        str(checkout / "hesscurv" / "__init__.py"),
        str(checkout / "integrations" / "__init__.py"),
        "hesscurv.integrations",
    ]

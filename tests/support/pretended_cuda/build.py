"""Compile the pretended device once for each torch and source; say why where that cannot be."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("device.cpp")
SECONDS = 300.0


class CannotBuild(Exception):  # noqa: N818 - a reason to skip, not a failure
    """The pretended device cannot be made here; the message says why, for `pytest.skip`."""


def build() -> Path:
    """Return the compiled device, compiling it where no earlier run has left it.

    A library lies in the system's temporary folder under a name that holds torch's version, the
    interpreter's platform, the compiler and a hash of the source, so a changed source is compiled
    anew. Of several test processes that come at the same time one compiles, the others wait for it.

    Returns:
        The path of the shared library.

    Raises:
        CannotBuild: Where the system is not Linux, no compiler or header is there, or the
            compiler refuses the source, such as for a torch with other interfaces.
    """
    if sys.platform != "linux":
        raise CannotBuild(f"the pretended CUDA device needs Linux (LD_PRELOAD), not {sys.platform}")
    if torch.backends.cuda.is_built():
        raise CannotBuild("this torch has a CUDA backend of its own, which cannot be pretended")
    compiler = find_compiler()
    torch_folder = Path(torch.__file__).parent
    if not (torch_folder / "include/ATen/ATen.h").exists():
        raise CannotBuild(f"the headers of torch are missing in {torch_folder / 'include'}")
    target = cache_folder() / f"{build_key(compiler)}.so"
    if not target.exists():
        with _alone(target.parent):
            if not target.exists():
                _compile(compiler, torch_folder, target)
    return target


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one process at a time compile: the others find its result."""
    import fcntl  # not on Windows

    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _compile(compiler: str, torch_folder: Path, target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as own:
        made = Path(own) / target.name
        try:
            done = subprocess.run(
                command(compiler, torch_folder, made),
                capture_output=True,
                text=True,
                timeout=SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired as late:
            raise CannotBuild(f"{compiler} took more than {SECONDS:.0f} s") from late
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "error" in line]
            said = (errors or [done.stderr[-300:]])[0]
            what = f"{SOURCE.name}, torch {torch.__version__}"
            raise CannotBuild(f"{compiler} fails on {what}: {said}")
        os.replace(made, target)  # whole, or not there


def find_compiler() -> str:
    """Return the C++ compiler, $CXX or g++ or the like, or raise `CannotBuild`."""
    named = os.environ.get("CXX")
    for name in [named] if named else ["g++", "clang++", "c++"]:
        if found := shutil.which(name):
            return found
    raise CannotBuild(f"no C++ compiler: {f'$CXX is {named}' if named else 'g++'}, not found")


def cache_folder() -> Path:
    """Return the folder of compiled devices: this user's own, since what lies there is run."""
    folder = Path(tempfile.gettempdir()) / f"hesscurv-pretended-cuda-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise CannotBuild(f"{folder} belongs to another user")
    return folder


def build_key(compiler: str) -> str:
    """Return a name that differs where the compiled device may."""
    parts = [torch.__version__, str(Path(torch.__file__)), platform.machine(), compiler]
    sources = sorted(p for p in SOURCE.parent.iterdir() if p.suffix in (".cpp", ".h"))
    contents = b"".join(source.read_bytes() for source in sources)
    digest = hashlib.sha256("\n".join(parts).encode() + contents).hexdigest()
    return f"device-{torch.__version__.replace('+', '-')}-{digest[:16]}"


def command(compiler: str, torch_folder: Path, target: Path) -> list[str]:
    """Return the compiler's command; no header of Python is needed."""
    abi = int(torch.compiled_with_cxx11_abi())
    headers = [torch_folder / "include", torch_folder / "include/torch/csrc/api/include"]
    libraries = torch_folder / "lib"
    newer = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)
    return [
        compiler,
        f"-std=c++{20 if newer else 17}",
        *("-O1", "-g0", "-w", "-fPIC", "-shared", f"-D_GLIBCXX_USE_CXX11_ABI={abi}"),
        *(f"-I{folder}" for folder in headers),
        *(str(SOURCE), "-o", str(target)),
        *(f"-L{libraries}", "-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{libraries}"),
    ]

"""The rules that hold the library together, read off its source, and what importing it does."""

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import hesscurv

ROOT = Path(__file__).resolve().parents[1]

# Which parts of hesscurv each part may import. "hesscurv" is the package's own __init__.py, which
# imports all parts: only what nothing in it imports may come in through it.
BASE = {"interface", "linalg", "storage", "distributed"}
FOUNDATION = BASE | {"objective", "operators", "eigensolvers", "spectra", "metrics"}
MAY_IMPORT = {
    "interface": {"interface"},
    "linalg": {"linalg"},
    "storage": {"linalg", "storage"},
    "distributed": {"linalg", "storage", "distributed"},
    "objective": BASE | {"objective"},
    "operators": BASE | {"objective", "operators"},
    "eigensolvers": BASE | {"objective", "operators", "eigensolvers"},
    "spectra": BASE | {"objective", "operators", "eigensolvers", "spectra"},
    "metrics": FOUNDATION,
    "pruning": FOUNDATION | {"plots", "pruning"},
    "optim": FOUNDATION | {"optim"},
    "plots": BASE | {"objective", "eigensolvers", "metrics", "plots"},
    "hooks": FOUNDATION | {"pruning", "optim", "plots", "hooks"},
    "integrations": FOUNDATION | {"pruning", "optim", "hooks", "integrations", "hesscurv"},
    "hesscurv": FOUNDATION | {"pruning", "optim", "plots", "hooks"},
}
# Libraries that each part stands on. Optional ones are imported inside the functions that need
# them; those that an integration adapts are imported by integrations alone.
LIBRARIES = {part: {"torch", "numpy", "tqdm"} for part in MAY_IMPORT} | {"linalg": {"torch"}}
OPTIONAL = {"matplotlib", "sklearn", "scipy"}
IMPORT_CALLS = {"__import__", "import_module", "importlib.import_module"}
PICKLES = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


# What creates tensors on the default device, and which of these in the default dtype.
CREATE_FLOATS = {"empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randn", "zeros"}
CREATE = CREATE_FLOATS | {"arange", "asarray", "as_tensor", "randint", "randperm", "tensor"}
CREATE |= {"empty_strided", "scalar_tensor", "sparse_coo_tensor", "tril_indices", "triu_indices"}


def find_undecided(source: str) -> list[str]:
    """Calls that leave the device, or a floating dtype, to the defaults."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
            continue
        name, said = node.func.attr, {keyword.arg for keyword in node.keywords}
        if ast.unparse(node.func.value) != "torch" or name not in CREATE or None in said:
            continue
        needed = {"device", "dtype"} if name in CREATE_FLOATS else {"device"}
        if not needed <= said | ({"dtype", "device"} if "out" in said else set()):
            found.append(ast.unparse(node))
    return found


@dataclass(frozen=True)
class Import:
    """One imported name: its full dotted path, where it stands, whether importing runs it."""

    path: str
    line: int
    at_the_top: bool


def find_imports(source: str, module: str, is_package: bool = False) -> list[Import]:
    """All imports of a source, also inside functions; those for the type checker alone are not."""
    package = module if is_package else module.rpartition(".")[0]

    def visit(node: ast.AST, at_the_top: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, at_the_top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join(above + ([base] if base else []))
            yield from (
                Import(f"{base}.{alias.name}", node.lineno, at_the_top) for alias in node.names
            )
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in IMPORT_CALLS and node.args:
            yield Import(ast.unparse(node.args[0]).strip("'\""), node.lineno, at_the_top)
        children: list[ast.AST] = list(ast.iter_child_nodes(node))
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            children = list(node.orelse)
        inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child in children:
            yield from visit(child, at_the_top and not inside)

    return list(visit(ast.parse(source), at_the_top=True))


def part_of(path: str) -> str:
    """The part of hesscurv that a dotted path lies in."""
    name = path.split(".")[1] if "." in path else ""
    return name if name in MAY_IMPORT else "hesscurv"


def find_wrong_imports(source: str, module: str, is_package: bool = False) -> list[str]:
    """What a module imports against the rules, one sentence each."""
    part = part_of(module)
    wrong = []
    for found in find_imports(source, module, is_package):
        top = found.path.split(".")[0]
        where = f"{module}, line {found.line}:"
        if top == "hesscurv":
            if part_of(found.path) not in MAY_IMPORT[part]:
                wrong.append(f"{where} {part} may not import {found.path}")
        elif top in PICKLES or found.path == "torch.load":
            wrong.append(f"{where} {found.path} can run code that a file brings along")
        elif top in OPTIONAL and part != "linalg":
            if found.at_the_top:
                wrong.append(f"{where} {top} is optional: import it inside the function")
        elif part != "integrations" and top not in LIBRARIES[part] | sys.stdlib_module_names:
            wrong.append(f"{where} {part} may not import {top}")
    return wrong


def find_unsafe_loads(source: str) -> list[str]:
    """Calls that would unpickle what a file holds."""
    unsafe = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        given = {
            keyword.arg: getattr(keyword.value, "value", "not a constant")
            for keyword in node.keywords
        }
        is_torch_load = ast.unparse(node.func) in {"torch.load", "torch.serialization.load"}
        if (is_torch_load and given.get("weights_only") is not True) or given.get("allow_pickle"):
            unsafe.append(f"line {node.lineno}: {ast.unparse(node)}")
    return unsafe


def library_modules() -> dict[str, Path]:
    """All modules of the library by their dotted names."""
    modules = {}
    for folder, package in [("hesscurv", "hesscurv"), ("integrations", "hesscurv.integrations")]:
        for path in sorted((ROOT / folder).rglob("*.py")):
            inner = path.relative_to(ROOT / folder).with_suffix("").parts
            modules[".".join((package, *inner)).removesuffix(".__init__")] = path
    return modules


MODULES = library_modules()


def found_in_modules(find):
    """What a function of module and path finds, by module, where it finds anything."""
    found = {module: find(module, path) for module, path in MODULES.items()}
    return {module: what for module, what in found.items() if what}


def test_imports_go_one_way():
    def find(module, path):
        return find_wrong_imports(path.read_text(), module, path.name == "__init__.py")

    assert found_in_modules(find) == {}


def find_circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others (Tarjan 1972)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    circles: list[list[str]] = []

    def visit(module: str) -> None:
        order[module] = low[module] = len(order)
        stack.append(module)
        for other in sorted(imports.get(module, ())):
            if other not in order:
                visit(other)
            if other in stack:
                low[module] = min(low[module], low[other])
        if low[module] == order[module]:
            group = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(group) > 1:
                circles.append(sorted(group))

    for module in imports:
        if module not in order:
            visit(module)
    return circles


def test_no_modules_import_each_other_in_a_circle():
    """Not inside functions either, nor for the type checker alone."""
    imports: dict[str, set[str]] = {}
    for module, path in MODULES.items():
        source = path.read_text().replace("if TYPE_CHECKING:", "if True:")
        paths = [found.path for found in find_imports(source, module, path.name == "__init__.py")]
        known = (p if p in MODULES else p.rpartition(".")[0] for p in paths)
        imports[module] = {other for other in known if other in MODULES} - {module}
    assert find_circles(imports) == []


def test_a_circle_is_found():
    assert find_circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]
    assert find_circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_nothing_is_unpickled():
    assert found_in_modules(lambda _, path: find_unsafe_loads(path.read_text())) == {}


def test_every_created_tensor_says_its_device_and_dtype():
    """Otherwise torch.set_default_device and set_default_dtype decide."""
    assert found_in_modules(lambda _, path: find_undecided(path.read_text())) == {}


def test_every_module_lies_in_a_known_part():
    strays = [name for name in MODULES if name != "hesscurv" and part_of(name) == "hesscurv"]
    assert strays == [], "give it a place in MAY_IMPORT, or move it into one of the parts"


@pytest.mark.parametrize("folder", ["hesscurv", "integrations", "tests", "examples"])
def test_no_module_is_named_after_nothing(folder):
    vague = {"util", "utils", "helper", "helpers", "misc"}
    found = [path for path in (ROOT / folder).rglob("*") if path.stem.strip("_") in vague]
    assert found == [], "name it after what it does"


def test_an_init_only_re_exports():
    def find(_, path):
        body = ast.parse(path.read_text()).body if path.name == "__init__.py" else []
        return [ast.unparse(node) for node in body if not re_exports(node)]

    assert found_in_modules(find) == {}


def re_exports(node):
    is_dunder = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).startswith("__")
    is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return is_dunder or is_docstring or isinstance(node, (ast.Import, ast.ImportFrom))


def test_all_names_in_all_exist_once():
    def find(module, _):
        if part_of(module) == "integrations":  # some need libraries that are optional
            return []
        names = getattr(importlib.import_module(module), "__all__", [])
        lost = [name for name in names if not hasattr(sys.modules[module], name)]
        return lost + [name for name in set(names) if names.count(name) > 1]

    assert found_in_modules(find) == {}


def test_the_package_says_what_it_exports():
    assert hesscurv.__all__


READ_GLOBAL_STATE = """
import logging, os, random, sys, warnings
import numpy, torch

def state():
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "grad mode": torch.is_grad_enabled(),
        "inference mode": torch.is_inference_mode_enabled(),
        "anomaly detection": torch.is_anomaly_enabled(),
        "threads": torch.get_num_threads(),
        "interop threads": torch.get_num_interop_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "deterministic, warn only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "cudnn": [getattr(torch.backends.cudnn, flag)
                  for flag in ("enabled", "benchmark", "deterministic", "allow_tf32")],
        "attention": [torch.backends.cuda.flash_sdp_enabled(),
                      torch.backends.cuda.math_sdp_enabled(),
                      torch.backends.cuda.mem_efficient_sdp_enabled()],
        "sharing": torch.multiprocessing.get_sharing_strategy(),
        "torch's random numbers": torch.get_rng_state().tolist(),
        "python's random numbers": random.getstate(),
        "numpy's random numbers": str(numpy.random.get_state()),
        "environment": dict(os.environ),
        "log level": logging.getLogger().level,
        "log handlers": list(logging.getLogger().handlers),
    }
"""


def run_python(code: str) -> str:
    """What a fresh interpreter prints, started beside the source."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("statement", "expected"),
    [
        ("import hesscurv", ""),
        # This one does change a flag, so that the comparison is seen to notice.
        ("torch.set_num_threads(torch.get_num_threads() + 1)", "threads"),
    ],
    ids=["hesscurv", "a culprit"],
)
def test_importing_changes_no_global_flag(statement, expected):
    changed = run_python(
        f"{READ_GLOBAL_STATE}\nbefore = state()\n"
        f"with warnings.catch_warnings():\n    warnings.simplefilter('error')\n    {statement}\n"
        "print(*[key for key, value in state().items() if value != before[key]])"
    )
    assert changed.strip() == expected


def test_importing_brings_in_no_optional_library():
    loaded = run_python(
        "import sys, hesscurv.integrations; print(*{m.split('.')[0] for m in sys.modules})"
    )
    optional = {
        *("matplotlib", "sklearn", "scipy", "torch_pruning"),
        *("lightning", "transformers", "tensorboard", "wandb"),
    }
    assert {"torch", "hesscurv"} <= set(loaded.split())
    assert optional & set(loaded.split()) == set()


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("hesscurv.linalg.new", "import hesscurv.operators"),
        ("hesscurv.linalg.new", "from hesscurv import operators"),
        ("hesscurv.linalg.new", "from hesscurv.operators.hessian import HessianOperator"),
        ("hesscurv.linalg.new", "from .. import operators"),
        ("hesscurv.linalg.new", "from ..operators import hessian"),
        ("hesscurv.linalg.new", "def f():\n    from ..operators import hessian"),
        ("hesscurv.linalg.new", "import importlib\nimportlib.import_module('hesscurv.metrics')"),
        ("hesscurv.linalg.new", "import numpy as np"),
        ("hesscurv.linalg.new", "def f():\n    import numpy as np"),
        ("hesscurv.operators.new", "from hesscurv.eigensolvers import Eigenpairs"),
        ("hesscurv.operators.new", "from hesscurv import eigsh"),
        ("hesscurv.eigensolvers.new", "import hesscurv"),
        ("hesscurv.eigensolvers.new", "from hesscurv.plots import plot_spectrum"),
        ("hesscurv.metrics.new", "from ..pruning.saliency import saliency"),
        ("hesscurv.metrics.new", "if TYPE_CHECKING:\n    pass\nelse:\n    import hesscurv.optim"),
        ("hesscurv.pruning.new", "from hesscurv.optim import NewtonCG"),
        ("hesscurv.optim.new", "from hesscurv.hooks import CurvatureMonitor"),
        ("hesscurv.hooks.new", "from hesscurv.integrations import loggers"),
        ("hesscurv.pruning.new", "import torch_pruning"),
        ("hesscurv.plots", "import matplotlib.pyplot as plt"),
        ("hesscurv.plots", "from .hooks import monitor"),
        ("hesscurv.metrics.new", "try:\n    import scipy\nexcept ImportError:\n    pass"),
        ("hesscurv.linalg.new", "def f():\n    import scipy"),
        ("hesscurv.metrics.new", "def f():\n    import lightning"),
        ("hesscurv.integrations.new", "import matplotlib"),
        ("hesscurv.integrations.new", "from hesscurv import plots"),
        ("hesscurv.eigensolvers.new", "def f():\n    import pickle"),
        ("hesscurv.eigensolvers.new", "from torch import load"),
    ],
)
def test_a_wrong_import_is_found(module, source):
    assert len(find_wrong_imports(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("hesscurv.linalg.new", "from __future__ import annotations\nimport math\nimport torch"),
        (
            "hesscurv.linalg.new",
            "from .woodbury import solve\nimport hesscurv.linalg.woodbury",
        ),
        ("hesscurv.linalg.new", "if TYPE_CHECKING:\n    from hesscurv.metrics import overlap"),
        ("hesscurv.operators.new", "from ..linalg.rayleigh_ritz import ritz_pairs\nimport numpy"),
        ("hesscurv.hooks.new", "from hesscurv.pruning import prune_model"),
        ("hesscurv.hooks.new", "from hesscurv.optim import stable_rate"),
        ("hesscurv.hooks.new", "def f():\n    from .. import plots"),
        ("hesscurv.plots", "def f():\n    import matplotlib.pyplot as plt"),
        ("hesscurv.operators.new", "def f():\n    from scipy.sparse import linalg"),
        ("hesscurv.integrations.new", "from hesscurv import eigsh\nimport torch_pruning"),
    ],
)
def test_a_right_import_is_left_alone(module, source):
    assert find_wrong_imports(source, module) == []


def test_relative_imports_start_from_the_package():
    assert find_wrong_imports("from . import metrics", "hesscurv", is_package=True) == []
    assert find_wrong_imports("from .hooks import f", "hesscurv.linalg", is_package=True) == []
    assert find_wrong_imports("from ..hooks import f", "hesscurv.linalg", is_package=True) != []


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("torch.load(path)", 1),
        ("torch.load(path, weights_only=False)", 1),
        ("torch.load(path, weights_only=safe)", 1),
        ("numpy.load(path, allow_pickle=True)", 1),
        ("torch.load(path, map_location='cpu', weights_only=True)", 0),
        ("numpy.load(path, mmap_mode='r', allow_pickle=False)", 0),
    ],
)
def test_an_unsafe_load_is_found(source, count):
    assert len(find_unsafe_loads(source)) == count

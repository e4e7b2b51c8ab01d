"""What is printed says what it is, in at most ten lines, and help shows a class's own arguments."""

import copy
import functools
import importlib
import inspect
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import hesscurv
from hesscurv import Eigenpairs, ParameterLayout, hooks, integrations, operators, pruning, spectra
from hesscurv.eigensolvers.sketch.folder import MeasurementFolder
from hesscurv.interface.descriptions import brief, describe_object
from hesscurv.operators.linear_operator import LinearOperator
from hesscurv.operators.matrix_operators import ForeignOperator

PARTS = (
    "hesscurv",
    "hesscurv.distributed",
    "hesscurv.eigensolvers",
    "hesscurv.hooks",
    "hesscurv.integrations",
    "hesscurv.metrics",
    "hesscurv.operators",
    "hesscurv.optim",
    "hesscurv.plots",
    "hesscurv.pruning",
    "hesscurv.spectra",
)


def public_classes():
    found = {}
    for part in PARTS:
        module = importlib.import_module(part)
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            if inspect.isclass(value) and not getattr(value, "_is_protocol", False):
                found[f"{value.__module__}.{value.__qualname__}"] = value
    return found


def data():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(12, 4, generator=generator).double()
    return [(inputs, torch.arange(12) % 3)]


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


TASK = hesscurv.supervised(nn.CrossEntropyLoss())


class Foreign:
    shape = (3, 3)

    def __matmul__(self, other):
        return other


class OwnTask(hesscurv.Task):
    def __init__(self):
        self.temperature, self.table = 0.5, torch.zeros(1000)


def monitor(**options):
    return hooks.CurvatureMonitor(net(), TASK, data(), k=2, **options)


def measured_monitor():
    found = monitor()
    found.measure(0)
    return found


def solved():
    H = hesscurv.HessianOperator(net(), TASK, data())
    return H, hesscurv.eigsh(H, k=3)


def folder(tmp_path):
    hesscurv.measure(torch.eye(20, dtype=torch.float64), 2, tmp_path / "m")
    return MeasurementFolder.open(tmp_path / "m")


BUILDERS = {
    "hessian": lambda _: solved()[0],
    "hessian of a function": lambda _: hesscurv.HessianOperator(
        net(), lambda model, batch: model(batch[0]).square().mean(), data()
    ),
    "hessian of a closure": lambda _: hesscurv.HessianOperator(
        net(), lambda model: model[0].weight.square().sum()
    ),
    "hessian, many parameters": lambda _: hesscurv.HessianOperator(
        nn.Sequential(*(nn.Linear(2, 2) for _ in range(300))),
        functools.partial(lambda scale, model, batch: scale * model(batch).square().mean(), 2.0),
        [torch.ones(2, 2)],
        check=False,
    ),
    "ggn": lambda _: hesscurv.GGNOperator(net(), TASK, data()),
    "fisher": lambda _: hesscurv.EmpiricalFisherOperator(net(), TASK, data()),
    "half-built operator": lambda _: hesscurv.HessianOperator.__new__(hesscurv.HessianOperator),
    "dense": lambda _: operators.DenseOperator(torch.eye(500)),
    "foreign": lambda _: ForeignOperator(Foreign()),
    "half-built foreign": lambda _: ForeignOperator.__new__(ForeignOperator),
    "task": lambda _: TASK,
    "task of a function": lambda _: hesscurv.supervised(nn.functional.cross_entropy),
    "task of weights": lambda _: hesscurv.supervised(nn.CrossEntropyLoss(weight=torch.ones(1000))),
    "own task": lambda _: OwnTask(),
    "model's loss": lambda _: integrations.ModelLossTask(),
    "language model": lambda _: integrations.CausalLMTask(),
    "training step": lambda _: integrations.TrainingStepTask(),
    "pairs": lambda _: solved()[1],
    "no pairs": lambda _: solved()[1][3:],
    "one pair": lambda _: solved()[1][0],
    "pairs without memory": lambda _: solved()[1].to("meta"),
    "layout": lambda _: ParameterLayout(
        tuple(f"layers.{i}.weight" for i in range(1000)), ((3, 4),) * 1000
    ),
    "empty layout": lambda _: ParameterLayout((), ()),
    "calibration": lambda _: solved()[0].calibrate(8),
    "memory plan": lambda _: solved()[0].memory_plan,
    "density": lambda _: hesscurv.spectral_density(solved()[0], num_steps=20, num_probes=9),
    "estimate of a density": lambda _: hesscurv.spectral_density(
        solved()[0], num_steps=9, num_probes=4
    ).density(torch.linspace(0, 1, 900).double()),
    "trace": lambda _: hesscurv.trace(solved()[0], 12),
    "diagonal": lambda _: hesscurv.diagonal(solved()[0], 12),
    "error": lambda _: hesscurv.a_posteriori_error(*solved(), 3),
    "monitor": lambda _: measured_monitor(),
    "monitor, nothing measured": lambda _: monitor(schedule=lambda step: step == 3),
    "trigger": lambda _: hooks.PruneWhenStable(monitor(quantities="overlap"), data()),
    "stability": lambda _: hooks.Stability(),
    "schedule": lambda _: hooks.every(10),
    "json lines": lambda path: hooks.JSONLinesWriter(path / "a.jsonl"),
    "csv": lambda path: hooks.CSVWriter(path / "a.csv"),
    "pruning method": lambda _: pruning.CurvatureUnstructured(0.5),
    "quadratic model": lambda _: pruning.QuadraticModel(
        ParameterLayout(("w",), ((3,),)),
        SimpleNamespace(rows=[torch.zeros(500, 3)]),
        residual=torch.zeros(500),
    ),
    "weight": lambda _: pruning.find_weights(net())["0.weight"],
    "importance": lambda _: integrations.EigenspaceImportance(net(), solved()[1]),
    "folder": folder,
    "manifest": lambda path: folder(path).manifest,
    "tridiagonal": lambda _: spectra.lanczos.Tridiagonal(torch.zeros(500), torch.zeros(499)),
}


@pytest.mark.parametrize("name", BUILDERS)
def test_it_prints_in_ten_lines_without_an_address(name, tmp_path):
    thing = BUILDERS[name](tmp_path)
    text = repr(thing)
    assert "0x" not in text
    assert len(text.splitlines()) <= 10
    assert len(text) < 700
    assert max(map(len, text.splitlines())) < 250
    assert type(thing).__name__.removesuffix("Task") in text or text.startswith("supervised(")
    assert str(thing)


def test_printing_an_operator_computes_nothing():
    H, _ = solved()
    before = H.num_matvecs, copy.deepcopy(H.settings())
    repr(H)
    assert (H.num_matvecs, H.settings()) == before


def test_an_operator_tells_its_size_model_and_task():
    text = repr(solved()[0])
    for part in ("model=Sequential", "D=43", "supervised(CrossEntropyLoss())", "weight 12 in all"):
        assert part in text


def test_a_monitor_tells_what_it_has_done():
    text = repr(measured_monitor())
    for part in ("Sequential", "k=2", "records=1", "failed=0", "last_step=0", "dense_then_sparse"):
        assert part in text


class Raises:
    def __repr__(self):
        raise RuntimeError("not built yet")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (Raises(), "Raises(...)"),
        (object(), "object(...)"),
        (nn.Sequential(nn.Linear(2, 2)), "Sequential"),
        (nn.MSELoss(), "MSELoss()"),
        (torch.zeros(3, 4), "tensor((3, 4), float32)"),
        (torch.tensor(0.25), "0.25"),
        (torch.empty(2, device="meta"), "tensor((2,), float32 on meta)"),
        ({i: i for i in range(10_000)}, "<dict of 10,000>"),
        ([1, (2,), None], "[1, (2,), None]"),
        (functools.partial(max, 3), "partial(max)"),
        (1 / 3, "0.333333"),
    ],
)
def test_parts_are_brief(value, text):
    assert brief(value) == text


def test_long_text_is_cut():
    assert len(brief("x" * 5000)) <= 81
    assert len(describe_object(object(), a="x" * 5000, b=list(range(1000))).splitlines()) <= 4


CLASSES = public_classes()


def test_there_are_classes_to_look_at():
    assert len(CLASSES) > 25


@pytest.mark.parametrize("name", CLASSES)
def test_help_shows_each_argument(name):
    cls = CLASSES[name]
    assert cls.__dict__.get("__doc__"), "a docstring of its own, not its base's"
    documented = inspect.getdoc(cls)
    try:
        parameters = inspect.signature(cls).parameters.values()
    except ValueError:  # an exception's
        parameters = ()
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    missing = [
        p.name
        for p in parameters
        if not re.search(rf"^ +\**{p.name}: ", documented, re.MULTILINE)
        and not (p.kind in variadic and issubclass(cls, (Exception, nn.Module)))
    ]
    assert missing == []


@pytest.mark.parametrize(
    "cls", [hesscurv.HessianOperator, hesscurv.GGNOperator, hesscurv.EmpiricalFisherOperator]
)
def test_an_operators_help_has_its_own_words_and_all_sections(cls):
    doc = inspect.getdoc(cls)
    assert doc.count("Args:") == doc.count("Raises:") == 1
    assert doc.index("by products") < doc.index("Args:") < doc.index("Raises:")
    assert "    process_group: " in doc
    if "Example:" in doc:
        assert doc.index("Raises:") < doc.index("Example:")
    assert list(inspect.signature(cls).parameters)[:3] == ["model", "task", "batches"]


def test_a_users_operator_shows_the_arguments_it_takes():
    class Doubled(hesscurv.HessianOperator):
        """Twice the Hessian."""

    class Own(LinearOperator):
        """An operator of three."""

        def __init__(self):
            super().__init__(3, torch.float32, torch.device("cpu"))

        def _matmat(self, vectors_DB):
            return vectors_DB

    class Silent(hesscurv.HessianOperator):
        pass

    assert Doubled.__doc__.startswith("Twice the Hessian.\n\nArgs:\n    model: ")
    assert Own.__doc__ == "An operator of three."
    assert Silent.__doc__ is None
    assert repr(Own()).startswith("Own(D=3")


def test_pairs_are_not_printed_by_the_page():
    pairs = Eigenpairs(
        torch.ones(2000), torch.zeros(3, 2000), torch.ones(2000), torch.ones(2000).bool(), 7
    )
    assert len(repr(pairs)) < 250

"""Option objects check themselves, and errors say where the keywords of long signatures went."""

import copy
import dataclasses
import functools
import inspect
import math
import pickle

import pytest
import torch
from hooks.watched import TASK, data, net

import hesscurv
from hesscurv.hooks import CurvatureMonitor, MonitorOptions, PruneWhenStable
from hesscurv.interface.moved_arguments import forwarded, moved_to_options
from hesscurv.interface.options import Options, as_typed
from hesscurv.optim import NewtonCG, NewtonOptions, PreconditionedOptimizer, PreconditionerOptions
from hesscurv.pruning import Measuring, PruningOptions, prune_model

# What moved, by the class of the options.
FIELDS = {
    PruningOptions: "schedule compensate measuring calibration max_calibration layer_losses "
    "recalibrate_batch_norm on_step",
    MonitorOptions: "max_matvecs mask_size trace_matvecs history clock operator_options",
    PreconditionerOptions: "drift_tol check_every mode rate_fraction max_growth tol process_group "
    "operator_options",
    NewtonOptions: "refresh_tol refresh_matvecs adapt_damping damping_bounds sufficient_decrease "
    "backtracking max_backtracks damping_search solver vectorize",
}
OF_OPERATORS = "compute_dtype way memory_budget check process_group precision"


def monitor(**keywords):
    return CurvatureMonitor(net(), TASK, data(1), quantities="overlap", **keywords)


def trigger(**keywords):
    return PruneWhenStable(monitor(), data(1), **keywords)


def preconditioned(**keywords):
    model = net()
    base = torch.optim.SGD(model.parameters(), 0.1)
    return PreconditionedOptimizer(base, model, TASK, data(1), **keywords)


TAKERS = {
    "prune_model": (lambda **k: prune_model(net(), TASK, data(1), **k), PruningOptions),
    "PruneWhenStable": (trigger, PruningOptions),
    "CurvatureMonitor": (monitor, MonitorOptions),
    "PreconditionedOptimizer": (preconditioned, PreconditionerOptions),
    "NewtonCG": (lambda **k: NewtonCG(net().parameters(), **k), NewtonOptions),
}


@pytest.mark.parametrize("name", TAKERS)
def test_what_has_moved_is_refused_with_the_line_to_type(name):
    call, kind = TAKERS[name]
    assert {f.name for f in dataclasses.fields(kind)} == set(FIELDS[kind].split())
    for moved in FIELDS[kind].split():
        with pytest.raises(TypeError) as caught:
            call(**{moved: 0.25})
        assert str(caught.value) == (
            f"{name}() takes {moved}= in its options now: "
            f"{name}(..., options={kind.__name__}({moved}=0.25))"
        )
    for moved in OF_OPERATORS.split() if kind is MonitorOptions else ():
        with pytest.raises(TypeError) as caught:
            call(**{moved: True})
        line = f"{name}(..., options=MonitorOptions(operator_options={{'{moved}': True}}))"
        assert str(caught.value) == f"{name}() takes {moved}= in its options now: {line}"


def test_several_at_once_are_one_line_to_type():
    with pytest.raises(TypeError) as caught:
        TAKERS["prune_model"][0](max_calibration=500, schedule=[0.4, 0.8], on_step=print)
    assert str(caught.value) == (
        "prune_model() takes max_calibration=, schedule= and on_step= in its options now: "
        "prune_model(..., options=PruningOptions(max_calibration=500, schedule=[0.4, 0.8], "
        "on_step=print))"
    )


@pytest.mark.parametrize("name", TAKERS)
def test_unknown_keywords_and_other_options_are_refused(name):
    call, kind = TAKERS[name]
    with pytest.raises(TypeError, match=r"got an unexpected keyword argument 'max_callibration'"):
        call(max_callibration=3)
    other = next(other for other in FIELDS if other is not kind)
    first = dataclasses.fields(kind)[0].name
    for wrong, words in (
        ({first: 3}, rf"got a dict; pass options={kind.__name__}\({first}=3\)"),
        (kind, f"got the class {kind.__name__}; pass options={kind.__name__}"),
        (other(), f"got a {other.__name__}"),
        (3, "got an int"),
    ):
        with pytest.raises(TypeError, match=f"expected options to be a {kind.__name__}, {words}"):
            call(options=wrong)


@pytest.mark.parametrize(
    "taker", [prune_model, CurvatureMonitor, PreconditionedOptimizer, NewtonCG, hesscurv.measure]
)
def test_signatures_take_no_other_keywords(taker):
    parameters = inspect.signature(taker).parameters
    assert "generator" in parameters
    assert "seed" not in parameters
    assert all(p.kind is not p.VAR_KEYWORD for p in parameters.values())


@pytest.mark.parametrize(
    "call",
    [
        *(TAKERS[name][0] for name in ("CurvatureMonitor", "PreconditionedOptimizer", "NewtonCG")),
        functools.partial(hesscurv.measure, torch.eye(3), 1, "folder"),
    ],
)
def test_a_seed_is_refused_with_the_generator_to_pass(call):
    with pytest.raises(TypeError) as caught:
        call(seed=3)
    assert str(caught.value) == "seed= has moved: pass generator=torch.Generator().manual_seed(3)"


BAD = {
    PruningOptions: [
        (ValueError, {"schedule": "square"}),
        (TypeError, {"schedule": 3}),
        (TypeError, {"schedule": [0.5, "a"]}),
        (TypeError, {"compensate": 1}),
        (TypeError, {"measuring": {"rank": 3}}),
        (ValueError, {"calibration": (torch.ones(2), torch.ones(2))}),
        (TypeError, {"calibration": iter([])}),
        (ValueError, {"max_calibration": 0}),
        (TypeError, {"max_calibration": 2.5}),
        (TypeError, {"layer_losses": "no"}),
        (TypeError, {"recalibrate_batch_norm": None}),
        (TypeError, {"on_step": 3}),
    ],
    MonitorOptions: [
        (ValueError, {"max_matvecs": 0}),
        (ValueError, {"mask_size": 1.5}),
        (ValueError, {"mask_size": 0}),
        (TypeError, {"mask_size": "half"}),
        (ValueError, {"trace_matvecs": 1}),
        (ValueError, {"history": -1}),
        (TypeError, {"clock": 3}),
        (TypeError, {"operator_options": {"params": None}}),
        (TypeError, {"operator_options": 3}),
    ],
    PreconditionerOptions: [
        (ValueError, {"drift_tol": 0}),
        (ValueError, {"check_every": 0}),
        (ValueError, {"mode": "both"}),
        (ValueError, {"rate_fraction": math.inf}),
        (TypeError, {"max_growth": "2"}),
        (ValueError, {"tol": 0.0}),
        (TypeError, {"operator_options": {"training": True}}),
    ],
    NewtonOptions: [
        (ValueError, {"refresh_tol": 0}),
        (TypeError, {"refresh_matvecs": 2.5}),
        (TypeError, {"adapt_damping": "no"}),
        (TypeError, {"damping_bounds": 1.0}),
        (ValueError, {"damping_bounds": (1, 0)}),
        (ValueError, {"sufficient_decrease": 1.0}),
        (ValueError, {"backtracking": math.nan}),
        (ValueError, {"max_backtracks": -1}),
        (TypeError, {"damping_search": "yes"}),
        (TypeError, {"vectorize": None}),
    ],
    Measuring: [
        (ValueError, {"rows": "hessian"}),
        (ValueError, {"damping": 0.0}),
        (TypeError, {"rank": 2.5}),
    ],
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_values_are_refused_by_name(kind):
    for error, bad in BAD[kind]:
        (name,) = bad
        with pytest.raises(error, match=f"expected .*{'' if name == 'calibration' else name}"):
            kind(**bad)


GOOD = {
    PruningOptions: {"schedule": (0.4, 0.8), "measuring": Measuring(rank=3)},
    MonitorOptions: {"history": 3, "operator_options": {"way": "retained"}},
    PreconditionerOptions: {"tol": 0.01, "operator_options": {"check": False}},
    NewtonOptions: {"damping_bounds": (0.25, 0.5), "damping_search": True},
    Measuring: {"rows": "fisher"},
}


@pytest.mark.parametrize("kind", GOOD)
def test_an_option_object_is_a_value(kind):
    plain, options = kind(), kind(**GOOD[kind])
    assert repr(plain) == f"{kind.__name__}()"
    text = ", ".join(f"{name}={value!r}" for name, value in GOOD[kind].items())
    assert repr(options) == f"{kind.__name__}({text})"
    assert eval(repr(options)) == options
    for same in (kind(**GOOD[kind]), copy.deepcopy(options), pickle.loads(pickle.dumps(options))):
        assert same == options
        assert hash(same) == hash(options)
    assert plain != options
    name = next(iter(GOOD[kind]))
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(options, name, getattr(plain, name))
    assert dataclasses.replace(options, **{name: getattr(plain, name)}) != options


def test_what_the_caller_changes_later_does_not_reach_the_options():
    given, path = {"way": "retained"}, [0.4, 0.8]
    options = MonitorOptions(operator_options=given), PruningOptions(schedule=path)
    given["way"], path[0] = "reference", 0.5
    assert options[0].operator_options == {"way": "retained"}
    assert options[1].schedule == (0.4, 0.8)


def test_batches_in_options_are_compared_by_identity():
    batches = data(1)
    options = PruningOptions(calibration=batches)
    assert options == PruningOptions(calibration=batches)
    assert options != PruningOptions(calibration=data(1))
    assert hash(options) == hash(PruningOptions(calibration=data(1)))
    assert repr(options).startswith("PruningOptions(calibration=[(tensor(")


def test_values_are_typed_where_they_can_be():
    for value in (3, 0.5, True, None, "a", (1,), [1, 2], {"a": (1, "b")}, torch.float64):
        assert eval(as_typed(value)) == value
    assert as_typed(math.inf) == "float('inf')"
    assert as_typed(print) == "print"
    for value in (lambda: 3, torch.ones(2), object(), "long" * 30):
        assert as_typed(value) == "..."


def test_keywords_that_are_passed_on_are_checked_at_once():
    @dataclasses.dataclass(frozen=True, repr=False)
    class Some(Options):
        a: int = 1

    def callee(model, b=2, options=None):
        return b

    @moved_to_options(Some)
    @forwarded(callee, "model")
    def caller(c, **arguments):
        return callee(c, **arguments)

    assert caller(1, b=3) == 3
    with pytest.raises(TypeError, match=r"caller\(..., options=Some\(a=2\)\)"):
        caller(1, a=2)
    for unknown in ("model", "d", "arguments"):
        with pytest.raises(TypeError, match=f"unexpected keyword argument '{unknown}'"):
            caller(1, **{unknown: 3})

"""Curvature monitor: measurements during training that leave it bit-identical."""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hesscurv.distributed.steps import is_known
from hesscurv.eigensolvers import Eigenpairs
from hesscurv.hooks.loggers import Logger, Loggers, warn
from hesscurv.hooks.monitoring.budget import Budget
from hesscurv.hooks.monitoring.curvature_probe import Probe, check_model
from hesscurv.hooks.monitoring.layouts import dense_names
from hesscurv.hooks.monitoring.monitor_options import OPERATOR_OPTIONS, MonitorOptions
from hesscurv.hooks.monitoring.quantities import QUANTITIES, choose_quantities
from hesscurv.hooks.monitoring.record import Measurements, check_optimizer
from hesscurv.hooks.monitoring.record_list import Records, records_html
from hesscurv.hooks.monitoring.unchanged import unchanged_random_states
from hesscurv.hooks.schedules import Schedule, dense_then_sparse
from hesscurv.interface.descriptions import Words, describe_object
from hesscurv.interface.integers import as_int
from hesscurv.interface.moved_arguments import moved_to_options, seed_moved
from hesscurv.interface.options import as_options
from hesscurv.interface.ranges import (
    check_callable,
    check_count,
    check_generator,
    check_positive,
)
from hesscurv.interface.uncompiled import uncompiled
from hesscurv.linalg.random_matrices import draw_seed, next_seeds
from hesscurv.objective.parameters import ParamSelection, unwrap
from hesscurv.operators.summed_operator import device_of
from hesscurv.plots.records import failed

_VERSION = 1


class CurvatureMonitor:
    r"""Measures a model's top Hessian eigenspace, and derived quantities, in a training loop.

    Call `step` after the optimizer's step. Training stays bit-identical: weights, buffers,
    gradients, random numbers and losses are those of a run without monitor. The model runs on
    copies of weights and buffers, in eval mode by default, with autocast and inference mode off,
    and random generators are restored. This also holds if a measurement fails, which is recorded
    and warned of once. Forward hooks run in measurements too, since the model may depend on them.

    Curvature is that of the mean loss on a fixed probe set, read once and kept, not of the training
    batch, whose noise would hide changes. Each solve has the last eigenspace as warm start, so a
    refresh costs at most three matvecs per eigenpair.

    A record is a flat dict of plain values. It always has ``step``, ``status`` ("ok", or "failed"
    with ``error``), ``seconds``, ``num_matvecs``, ``fraction`` (of the time so far spent in
    measurements), and after `notify` ``event``. The quantities, each on or off:

    - "loss": ``loss``, on the probe set.
    - "eigenvalues": ``eigenvalues`` (k, largest magnitude first), ``residuals``, and how many have
      ``converged`` to `tol`.
    - "sharpness": ``sharpness``, the largest signed one; if all k are negative, from a separate
      solve, with ``sharpness_converged``; with an optimizer ``learning_rate`` (the
      largest of its groups), ``stable_rate``, up to which gradient descent is stable (2 /
      sharpness, more with momentum), ``sharpness_ratio`` = sharpness x rate / 2.
    - "gradient_share": ``gradient_share``, :math:`\|U^T g\|^2 / \|g\|^2` of the probe's gradient.
    - "overlap": ``overlap`` of the mask of largest weights with the eigenspace,
      ``overlap_chance``, ``overlap_chance_std`` and ``overlap_z_score``.
    - "overlap_by_k": ``overlap_by_k``, of the j largest with the first j eigenvectors, by str(j).
    - "overlap_by_parameter": by name, ``overlap_by_parameter`` (they sum to the overlap),
      ``leverage_by_parameter`` (shares of the eigenspace, sum 1), ``mask_by_parameter`` (fraction
      of each that the mask keeps).
    - "space_overlap": ``space_overlap`` of the eigenspace with that of the last measurement,
      ``space_overlap_first`` with the first one, and with ``options.history``
      ``space_overlaps``, lists of [earlier step, overlap].
    - "mask_iou": the same for the mask by intersection over union, ``mask_iou``,
      ``mask_iou_first``, ``mask_ious``.
    - "trace": ``trace``, ``trace_standard_error`` and ``effective_rank``, that is
      :math:`\operatorname{tr} H / |\lambda_1|`.
    - "sparsity": ``sparsity``, the fraction of weights that are zero, and
      ``sparsity_by_parameter``.

    Presets: "cheap" is loss, eigenvalues, sharpness and gradient share; "overlap" adds overlap (by
    parameter too), space overlap, mask IoU and sparsity; "full" is all.

    If `torch.distributed` is initialised, each rank passes its own share of the probe set, all call
    `step` with the same number after each step, and rank 0 logs.

    Args:
        model: The trained module; torch.compile and DDP wrappers are unwrapped.
        task: A callable ``(model, batch) -> scalar mean loss`` such as `supervised(loss)`; without
            batches a closure.
        batches: The probe set: re-iterable batches, read here; None for a closure.
        k: Number of eigenpairs; default 10.
        quantities: A preset or a quantity, or several of either, default "cheap"; the string
            "overlap" is the preset, ("overlap",) the quantity.
        schedule: Called with the step, returns whether to measure: `every`, `logarithmic`,
            `dense_then_sparse` (default), or your own function of the step only.
        optimizer: For the learning rate; default none is recorded.
        loggers: A list of objects with ``log(record, step)``, such as `JSONLinesWriter`.
        max_fraction: Maximal time for measurements, as a fraction of the training time, which is
            the time between calls; a measurement that would exceed it is postponed. None: no limit.
        params: The selected parameters, as for the operators; pruned ones stay selected.
        curvature: "hessian" (default), "ggn" or "fisher".
        samples: Maximal number of samples, from the front of the batches; default all.
        tol: Relative residual with which an eigenpair counts as converged; default 1e-2.
        training: Mode during measurements: False (default) as in inference, True, None unchanged.
        generator: Source of the seed of random vectors, and of the order of a shuffling loader; in
            the same state on all ranks. Default None: seed 0. The global one is never used.
        options: Effort of a refresh, mask, comparisons with earlier measurements, clock, arguments
            of the operator; default `MonitorOptions()`.

    Attributes:
        records: All records, a list of dicts.
        pairs: The last `Eigenpairs`, on the CPU, in the dense model's parameter names; or None.
        mask: The last mask (D,), bool, on the CPU; or None.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If one is out of range, or the probe set is empty.

    Cost: with "cheap" a gradient over the probe set and k to 3 k matvecs, the first time up to
    12 k; 16 more with "trace". During a measurement about 4 k D floats on the device; between them
    the probe set, and on the CPU k D floats for the last space, half as much for each earlier one.

    References:
        Fernandez et al., TMLR 2025, arXiv 2504.14701, for overlap and crystallisation.
        Cohen et al., ICLR 2021, for sharpness; Gur-Ari et al., arXiv 1812.04754, for the gradient.

    Example:
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> monitor = hesscurv.hooks.CurvatureMonitor(model, task, batches, k=3, optimizer=sgd)
        >>> record = monitor.step(0)  # after each optimizer.step()
        >>> len(record["eigenvalues"]), record["learning_rate"]
        (3, 0.1)
    """

    @seed_moved
    @moved_to_options(MonitorOptions, {"operator_options": OPERATOR_OPTIONS})
    def __init__(
        self,
        model: nn.Module,
        task: Callable[..., Tensor],
        batches: Iterable[Any] | None = None,
        k: int = 10,
        *,
        quantities: str | Iterable[str] = "cheap",
        schedule: Schedule = dense_then_sparse(),  # noqa: B008, frozen
        optimizer: Any = None,
        loggers: Iterable[Logger] = (),
        max_fraction: float | None = None,
        params: ParamSelection = None,
        curvature: str = "hessian",
        samples: int | None = None,
        tol: float = 1e-2,
        training: bool | None = False,
        generator: torch.Generator | None = None,
        options: MonitorOptions | None = None,
    ) -> None:
        own = as_options(MonitorOptions, options)
        check_model(model, task, curvature, batches)
        k = as_int("k", k)
        check_count("k", k)
        check_count("samples", samples, optional=True)
        check_positive("tol", tol)
        check_callable(
            "schedule",
            schedule,
            remedy=f"for an interval use hesscurv.hooks.every({schedule!r})",
        )
        check_positive("max_fraction", max_fraction, below=1.0, optional=True)
        check_generator(generator)
        check_optimizer(optimizer)
        self.quantities = choose_quantities(quantities)
        self.model, self.task, self.schedule = model, task, schedule
        self.records = Records()
        self._loggers = Loggers(loggers)
        self._budget = Budget(max_fraction, own.clock)
        history = own.history
        if history is None:
            history = _HISTORY if len(self.quantities) == len(QUANTITIES) else 0
        with unchanged_random_states(device_of(model) or torch.device("cpu")):
            self._probe = Probe(
                model,
                task,
                batches,
                params,
                curvature=curvature,
                samples=samples,
                tol=tol,
                max_matvecs=own.max_matvecs,
                seed=0 if generator is None else next_seeds(generator, 1)[0],
                options={"training": training, **own.operator_options},
            )
        self._measurements = Measurements(
            self._probe,
            self.quantities,
            k,
            mask_size=own.mask_size,
            trace_matvecs=own.trace_matvecs,
            history=history,
            optimizer=optimizer,
        )
        self._last: int | None = None  # the step measured last
        self._ask_again: int | None = None  # the step at which a postponed one is reconsidered
        self._event: str | None = None
        self._has_warned = False
        if generator is not None:  # last, so that a refused argument draws nothing
            draw_seed(generator)

    def __repr__(self) -> str:
        """Return the quantities, the schedule, and the number of measurements."""
        num_failed = sum(map(failed, self.records))
        return describe_object(
            self,
            model=Words(type(unwrap(self.model)).__name__),
            task=self.task,
            k=self._measurements.k,
            quantities=Words(", ".join(self.quantities)),
            schedule=self.schedule,
            records=len(self.records),
            failed=num_failed,
            last_step=self._last,
        )

    def _repr_html_(self) -> str:
        return records_html(f"Curvature of {type(unwrap(self.model)).__name__}", self.records)

    @property
    def pairs(self) -> Eigenpairs | None:
        """The last eigenpairs, on the CPU."""
        return self._measurements.pairs

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """The measured parameters, by their names in the dense model."""
        return dense_names(tuple(self._probe.selected()))

    @property
    def mask(self) -> Tensor | None:
        """The last mask of largest weights, (D,), bool, on the CPU."""
        return self._measurements.mask

    # -- called from training -------------------------------------------------------------------

    @uncompiled
    def step(self, step: int) -> dict[str, Any] | None:
        """Measure if due; call it after the optimizer's step.

        Args:
            step: The number of the step. A repeated call for a measured step does nothing, as with
                accumulated gradients.

        Returns:
            The record of a measurement, or None.

        Raises:
            TypeError: If the step is not an integer.
        """
        step = operator.index(step)
        self._budget.enter()
        try:
            return self._measure(step) if self.due(step) else None
        finally:
            self._budget.leave()

    def due(self, step: int) -> bool:
        """Return whether to measure after this step, by schedule and time budget.

        Collective: all ranks get the decision of rank 0.
        """
        if step == self._last:
            return False
        if self._ask_again is None and not self.schedule(step):
            return False
        if self._ask_again is not None and step < self._ask_again:
            return False
        wait, ranks = self._budget.wait(), self._probe.ranks
        if ranks.size > 1 and self._budget.max_fraction is not None:
            wait = int(ranks.broadcast_(torch.tensor(wait, device="cpu")))
        self._ask_again = step + wait if wait else None
        return not wait

    @uncompiled
    def measure(self, step: int) -> dict[str, Any]:
        """Measure now, regardless of schedule and budget; collective.

        Args:
            step: The number of the step.

        Returns:
            The record.

        Raises:
            TypeError: If the step is not an integer.
        """
        step = operator.index(step)
        self._budget.enter()
        try:
            return self._measure(step)
        finally:
            self._budget.leave()

    def notify(self, event: str) -> None:
        """Announce a change of the model: the next record has ``event``.

        Pruned, renamed or replaced parameters are detected without it.

        Args:
            event: Name of the event, such as "pruned".
        """
        self._event = str(event)
        self._probe.forget()

    def notify_pruned(self) -> None:
        """Announce that weights were pruned: the next record has ``event`` "pruned"."""
        self.notify("pruned")

    def report(self, path: str | os.PathLike[str], **options: Any) -> Path:
        """Write the records as a page with figures; see `plots.monitor_report.write_report`.

        Args:
            path: The file, such as "run.html".
            **options: Further arguments of `write_report`.
        """
        from hesscurv.plots.monitor_report import write_report

        return write_report(self.records, path, **{"pairs": self.pairs} | options)

    # -- state ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state for the next measurement, and all records.

        Tensors and plain values only, so ``torch.load(weights_only=True)`` reads it. The probe set
        is not included: pass the same batches to the resumed monitor.
        """
        return {
            "version": _VERSION,
            "records": [dict(record) for record in self.records],
            "measurements": self._measurements.state_dict(),
            "budget": self._budget.state_dict(),
            "last": self._last,
            "ask_again": self._ask_again,
            "event": self._event,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a `state_dict`.

        The time since then counts neither as training nor as measuring.

        Raises:
            ValueError: If it is not the state of a monitor of this version; nothing is changed.
        """
        version = state.get("version") if isinstance(state, dict) else None
        if version != _VERSION or not {"records", "measurements", "budget"} <= set(state):
            raise ValueError(
                f"expected the state dict of a CurvatureMonitor, version {_VERSION}, got "
                f"{f'version {version}' if version else type(state).__name__}"
            )
        budget = self._budget.state_dict()
        try:
            records = [{**r, "step": operator.index(r["step"])} for r in state["records"]]
            last, ask_again, event = state["last"], state["ask_again"], state["event"]
            self._budget.load_state_dict(state["budget"])
            self._measurements.load_state_dict(state["measurements"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            self._budget.load_state_dict(budget)
            raise ValueError(
                f"expected the state dict of a CurvatureMonitor, got a damaged one: {error!r}; "
                "take another checkpoint, or begin without its state"
            ) from error
        self.records[:] = records
        self._last, self._ask_again, self._event = last, ask_again, event

    # -- measuring ------------------------------------------------------------------------------

    def _measure(self, step: int) -> dict[str, Any]:
        device = device_of(self.model) or torch.device("cpu")
        _synchronize(device)  # queued work of earlier steps does not count as measuring
        start = self._budget.clock()
        record: dict[str, Any] = {"step": step, "status": "ok"}
        messages: list[str] = []
        self._probe.begin()
        try:
            with (
                unchanged_random_states(device),
                torch.inference_mode(False),
                torch.no_grad(),
                torch.autocast(device.type, enabled=False),
            ):
                record |= self._measurements.take(step)
        except Exception as error:
            text = f"{type(error).__name__}: {error}"
            record |= {"status": "failed", "error": text}
            messages += self._failed(step, error, text)
        finally:
            record["num_matvecs"] = self._probe.end()
        if record["status"] == "failed":
            self._probe.forget()
        _synchronize(device)
        record["seconds"] = self._budget.clock() - start
        record["fraction"] = self._budget.fraction(record["seconds"])
        if self._event is not None:
            record["event"], self._event = self._event, None
        self.records.append(record)
        self._last, self._ask_again = step, None
        if self._probe.ranks.rank == 0:
            messages += self._loggers.log(record, step)
        # The first solve takes more matvecs than a warm-started one may.
        share = min(1.0, self._measurements.most_matvecs / max(record["num_matvecs"], 1))
        self._budget.measured(self._budget.clock() - start, share)
        warn(messages)
        return record

    def _failed(self, step: int, error: Exception, text: str) -> list[str]:
        """Announce a failure to the other ranks; return the warning, the first time."""
        ranks = self._probe.ranks
        if ranks.size > 1 and not is_known(error):
            ranks.announce(error)
        if self._has_warned:
            return []
        self._has_warned = True
        return [
            f"the measurement at step {step} failed with {text}; training goes on, its record has "
            "status='failed', and the next ones that fail are not warned of"
        ]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


_HISTORY = 16

"""Watch a model's curvature while it trains, without changing the training."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from hesscurv.distributed.steps import is_known
from hesscurv.eigensolvers import Eigenpairs
from hesscurv.hooks import quantities as q
from hesscurv.hooks.budget import CLOCK, Budget
from hesscurv.hooks.history import History
from hesscurv.hooks.loggers import Logger, Loggers, warn
from hesscurv.hooks.probe import OPERATORS, Probe
from hesscurv.hooks.schedules import Schedule, every
from hesscurv.hooks.unchanged import unchanged_random_states
from hesscurv.metrics import top_k_mask
from hesscurv.operators.parameters import ParameterLayout, ParamSelection
from hesscurv.operators.summed_operator import device_of


class CurvatureMonitor:
    """TODO."""

    def __init__(
        self,
        model: nn.Module,
        task: Callable[..., Tensor],
        batches: Iterable[Any] | None = None,
        k: int = 10,
        *,
        quantities: str | Iterable[str] = "cheap",
        schedule: Schedule | None = None,
        optimizer: Any = None,
        loggers: Iterable[Logger] = (),
        max_fraction: float | None = None,
        params: ParamSelection = None,
        curvature: str = "hessian",
        samples: int | None = None,
        tol: float = 1e-2,
        mask_size: int | float | None = None,
        trace_matvecs: int = 16,
        history: int | None = None,
        training: bool | None = False,
        seed: int = 0,
        clock: Callable[[], float] = CLOCK,
        **options: Any,
    ) -> None:
        self.model, self.task = model, task
        self.quantities = q.choose_quantities(quantities)
        self.k, self.mask_size, self.trace_matvecs = k, mask_size, trace_matvecs
        self.schedule = every(100) if schedule is None else schedule
        self.optimizer = optimizer
        self.records: list[dict[str, Any]] = []
        self.pairs: Eigenpairs | None = None
        self.mask: Tensor | None = None
        if history is None:
            history = 16 if set(self.quantities) >= set(q.QUANTITIES) else 0
        self._loggers = Loggers(loggers)
        self._budget = Budget(max_fraction, clock)
        self._spaces, self._masks = History(history), History(history)
        self._probe = Probe(
            model,
            task,
            batches,
            params,
            curvature=curvature,
            samples=samples,
            tol=tol,
            seed=seed,
            options={"training": training, **options},
        )
        self._count = 0
        self._last: int | None = None
        self._ask_again: int | None = None
        self._event: str | None = None
        self._warned = False

    # -- called from training -------------------------------------------------------------------

    def step(self, step: int) -> dict[str, Any] | None:
        """Measure, if it is time to."""
        step = operator.index(step)
        self._budget.enter()
        try:
            return self._measure(step) if self.due(step) else None
        finally:
            self._budget.leave()

    def due(self, step: int) -> bool:
        """Return whether to measure after this step."""
        if step == self._last:
            return False
        waiting = self._ask_again is not None and step >= self._ask_again
        if not waiting and not (self._ask_again is None and self.schedule(step)):
            return False
        wait = self._decide()
        self._ask_again = step + wait if wait else None
        return not wait

    def measure(self, step: int) -> dict[str, Any]:
        """Measure now, whatever schedule and budget say."""
        step = operator.index(step)
        self._budget.enter()
        try:
            return self._measure(step)
        finally:
            self._budget.leave()

    def notify(self, event: str) -> None:
        """Say that the model was changed from outside."""
        self._event = event
        self._probe.forget()

    def notify_pruned(self) -> None:
        """Say that weights of the model were pruned."""
        self.notify("pruned")

    def report(self, path: str | os.PathLike[str], **options: Any) -> Any:
        """Write a page about the records."""
        from hesscurv.hooks.report import write_report  # type: ignore[import-not-found]

        return write_report(self.records, path, **options)

    # -- measuring ------------------------------------------------------------------------------

    def _decide(self) -> int:
        """Return in how many steps to ask again, 0 for now: rank 0's word."""
        ranks = self._probe.ranks
        if self._budget.max_fraction is None or ranks.size == 1:
            return self._budget.wait()
        return int(ranks.broadcast_(torch.tensor(self._budget.wait(), device="cpu")))

    def _measure(self, step: int) -> dict[str, Any]:
        device = device_of(self._probe.model) or torch.device("cpu")
        _synchronize(device)
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
                record |= self._quantities(step)
        except Exception as error:
            record |= {"status": "failed", "error": f"{type(error).__name__}: {error}"}
            messages += self._failed(step, error)
        record["num_matvecs"] = self._probe.end()
        _synchronize(device)
        record["seconds"] = self._budget.clock() - start
        record["fraction"] = self._budget.fraction(record["seconds"])
        if self._event is not None:
            record["event"], self._event = self._event, None
        self.records.append(record)
        self._count += 1
        self._last, self._ask_again = step, None
        if self._probe.ranks.rank == 0:
            messages += self._loggers.log(record, step)
        self._budget.measured(self._budget.clock() - start, record["seconds"])
        warn(messages)
        return record

    def _quantities(self, step: int) -> dict[str, Any]:
        probe, wanted = self._probe, set(self.quantities)
        out: dict[str, Any] = {}
        gradient = pairs = None
        trace: tuple[float, float] | None = None
        if wanted & q.NEED_GRADIENT:
            loss, gradient = probe.loss_and_gradient()
            if "loss" in wanted:
                out["loss"] = loss
        if wanted & q.NEED_PAIRS:
            last = self._spaces.last
            pairs = probe.solve(
                self.k,
                self._count,
                None if last is None else last.rows,
                None if last is None else last.layout,
            )
            if "trace" in wanted:
                trace = probe.trace(pairs, self.trace_matvecs, self._count)
        weights, kept, layout = probe.weights()
        with probe.ranks.together("the quantities of a measurement"):
            return out | self._local(step, pairs, gradient, trace, weights, kept, layout)

    def _local(
        self,
        step: int,
        pairs: Eigenpairs | None,
        gradient: Tensor | None,
        trace: tuple[float, float] | None,
        weights: Tensor,
        kept: Tensor,
        layout: ParameterLayout,
    ) -> dict[str, Any]:
        """Return what is computed without a word to other ranks, and keep it once all is done."""
        wanted, mask = set(self.quantities), None
        out: dict[str, Any] = {}
        magnitudes = weights.abs()
        if wanted & q.NEED_MASK:
            mask = top_k_mask(magnitudes, self._mask_entries(len(magnitudes)))
        if pairs is not None:
            if "eigenvalues" in wanted:
                out |= q.spectrum(pairs)
            if "sharpness" in wanted:
                out |= q.sharpness(pairs, self.optimizer)
            if "gradient_share" in wanted and gradient is not None:
                out |= q.gradient_share(pairs, gradient)
            if "overlap" in wanted and mask is not None:
                out |= q.mask_overlap(mask, pairs)
            if "overlap_by_parameter" in wanted and mask is not None:
                out |= q.overlaps_by_parameter(mask, pairs, layout)
            if "overlap_by_k" in wanted:
                out |= q.overlaps_by_k(magnitudes, pairs)
            if "space_overlap" in wanted:
                out |= q.space_overlaps(self._spaces, pairs, layout)
        if trace is not None and pairs is not None:
            out["trace"], out["trace_standard_error"] = trace
            out["effective_rank"] = trace[0] / float(pairs.eigenvalues[0].abs())
        if "mask_iou" in wanted and mask is not None:
            out |= q.mask_overlaps(self._masks, mask, layout)
        if "sparsity" in wanted:
            out |= q.sparsities(weights == 0, layout)
        if pairs is not None:
            self._spaces.add(step, layout, pairs.eigenvectors)
            self.pairs = pairs.to("cpu")
        if mask is not None:
            self._masks.add(step, layout, mask)
            self.mask = self._masks.last.rows if self._masks.last else None
        return out

    def _mask_entries(self, dim: int) -> int:
        size = self.k if self.mask_size is None else self.mask_size
        return max(1, min(dim, math.floor(size * dim) if isinstance(size, float) else size))

    def _failed(self, step: int, error: Exception) -> list[str]:
        self._probe.ranks.announce(error) if not is_known(error) else None
        self._probe.forget()
        if self._warned:
            return []
        self._warned = True
        return [
            f"the measurement at step {step} failed with {type(error).__name__}: {error}; training "
            "goes on, the record says status='failed', and further failures are not warned of"
        ]


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


_ = OPERATORS

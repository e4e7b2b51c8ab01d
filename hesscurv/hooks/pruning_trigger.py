"""Pruning during training, once the magnitude mask and the top eigenspace are stable."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hesscurv.hooks.monitoring.monitor import CurvatureMonitor
from hesscurv.hooks.monitoring.quantities import NEED_PAIRS
from hesscurv.hooks.rank_pruning import prune_on_first_rank
from hesscurv.hooks.stability import Stability, relative_change
from hesscurv.interface.descriptions import describe_object
from hesscurv.interface.moved_arguments import forwarded, moved_to_options
from hesscurv.interface.options import as_options
from hesscurv.interface.ranges import check_count
from hesscurv.interface.uncompiled import uncompiled
from hesscurv.metrics import intersection_over_union, leverage_scores, magnitude_mask
from hesscurv.objective.parameters import unwrap
from hesscurv.pruning import PruningOptions, mask_optimizer_state_, masks_of, prune_model
from hesscurv.pruning.weights import (
    Weight,
    WeightSelection,
    current_mask,
    current_parameter,
    find_weights,
)

logger = logging.getLogger(__name__)

Prune = Callable[[nn.Module, float], Any]


class PruneWhenStable:
    r"""Prune a model in training as soon as its magnitude mask and top eigenspace are stable.

    After each measurement of a `CurvatureMonitor` three quantities are compared with the previous
    measurement: the mask of the weights that magnitude pruning would keep (intersection over
    union), the top eigenspace (overlap), and the share of the eigenspace that lies in the mask
    (relative change). The mask is that of the next sparsity, not the monitor's, which keeps so few
    weights that its overlap is noisy. Once all three are within their bounds for `patience`
    consecutive measurements, the model is pruned to the first sparsity; further ones follow every
    `every` steps, or whenever it is stable again. The optimizer's momentum of pruned weights is set
    to zero, a `PreconditionedOptimizer` recomputes its eigenspace, and the monitor continues with
    the pruned model::

        monitor = CurvatureMonitor(model, task, probe, schedule=every(50), quantities="overlap")
        trigger = PruneWhenStable(monitor, batches, sparsity=0.8, optimizer=optimizer)
        for step, (inputs, targets) in enumerate(loader):
            ...
            optimizer.step()
            monitor.step(step)
            trigger.step(step)

    Args:
        monitor: Measures the eigenspace; must measure "space_overlap" if `stability` bounds it.
        batches: Re-iterable batches for `prune_model`, about 1000 samples or more, preferably not
            the few of the monitor. None is allowed only with `prune`.
        sparsity: Fraction of the selected weights to prune, in (0, 1); or several, increasing.
        stability: The bounds; default `Stability()`. None: prune only at `deadline`.
        every: Steps from one sparsity to the next; default None: each waits for stability.
        not_before: The first step at which pruning is allowed; default 0.
        deadline: The step at which the first sparsity is due even without stability; default None:
            never.
        optimizer: The optimizer that trains the model, adapted after pruning; default None.
        prune: Prunes in place, ``prune(model, sparsity) -> anything``; default `prune_model` with
            the monitor's task, `batches` and `arguments`. Masks must be those of
            ``torch.nn.utils.prune``.
        weights: The weights to prune, see `find_weights`; default all prunable ones.
        on_prune: Called after each pruning with the step and the result of `prune`.
        **arguments: More arguments of `prune_model`, such as ``method="magnitude"``, ``stages=4``,
            ``options=PruningOptions(...)``.

    Attributes:
        signals: A dict for each inspected measurement: ``step``, ``mask_iou``, ``space_overlap``,
            ``overlap_change`` (None without an earlier one), ``share`` (of the eigenspace, in the
            mask), ``stable``, ``in_a_row``.
        pruned: Steps and sparsities of the prunings so far, as (int, float).

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If one is out of range, no weight can be pruned, or the monitor does not measure
            what is needed.

    Cost:
        D bits for the mask, a selection in O(D) and a sum in O(k D) for each measurement; that of
        `prune_model` when it prunes.

    With a learning rate near zero everything is stable: choose bounds for the interval between
    measurements and the learning rate.

    References:
        You et al., "Drawing early-bird tickets", ICLR 2020, for the distance of masks as a signal;
        Fernandez et al., TMLR 2025, for that of eigenspaces.

    Example:
        >>> net = copy.deepcopy(model)
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.0)
        >>> watch = hesscurv.hooks.CurvatureMonitor(
        ...     net, task, batches, k=3, quantities="overlap", schedule=hesscurv.hooks.every(1))
        >>> trigger = hesscurv.hooks.PruneWhenStable(
        ...     watch, batches, 0.5, optimizer=sgd, stability=hesscurv.hooks.Stability(patience=1))
        >>> for step in range(2):  # nothing moves at a learning rate of zero
        ...     _ = watch.step(step)
        ...     _ = trigger.step(step)
        >>> trigger.done
        True
    """

    @moved_to_options(PruningOptions)
    @forwarded(prune_model, "model", "task")
    def __init__(
        self,
        monitor: CurvatureMonitor,
        batches: Iterable[Any] | None = None,
        sparsity: float | Sequence[float] = 0.8,
        *,
        stability: Stability | None = Stability(),  # noqa: B008, frozen
        every: int | None = None,
        not_before: int = 0,
        deadline: int | None = None,
        optimizer: Optimizer | None = None,
        prune: Prune | None = None,
        weights: WeightSelection = None,
        on_prune: Callable[[int, Any], None] | None = None,
        **arguments: Any,
    ) -> None:
        if not isinstance(monitor, CurvatureMonitor):
            raise TypeError(f"expected a CurvatureMonitor, got {type(monitor).__name__}")
        if stability is not None and not isinstance(stability, Stability):
            raise TypeError(
                f"expected stability=Stability(...) or None, got {type(stability).__name__}"
            )
        if optimizer is not None and not isinstance(optimizer, Optimizer):
            raise TypeError(f"expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
        self.sparsities = _as_sparsities(sparsity)
        check_count("every", every, optional=True)
        check_count("not_before", not_before, least=0)
        check_count("deadline", deadline, least=0, optional=True)
        if stability is None and deadline is None:
            raise ValueError("expected a stability or a deadline, got None for both")
        if prune is None and batches is None:
            raise ValueError(
                "expected batches for prune_model, got None; pass some 1000 samples of the "
                "training set, or a function `prune`"
            )
        if prune is not None and arguments:
            raise TypeError(
                f"expected no arguments of prune_model beside `prune`, got {sorted(arguments)}; "
                "bind them to your function"
            )
        as_options(PruningOptions, arguments.get("options"))
        found = find_weights(unwrap(monitor.model), weights)
        if stability is not None:
            _check_measured(monitor, stability, set(found))
        self.monitor, self.batches, self.stability = monitor, batches, stability
        self.every, self.not_before, self.deadline = every, not_before, deadline
        self.optimizer, self.weights, self.on_prune = optimizer, weights, on_prune
        self._prune, self._arguments = prune or self._prune_model, arguments
        self.signals: list[dict[str, Any]] = []
        self.pruned: list[tuple[int, float]] = []
        self._mask: Tensor | None = None
        self._share: float | None = None
        self._seen = -1  # step of the last inspected record
        self._in_a_row = 0

    def __repr__(self) -> str:
        """Return the sparsities, the conditions, and the prunings so far."""
        return describe_object(
            self,
            sparsities=self.sparsities,
            stability=self.stability,
            every=self.every,
            not_before=self.not_before,
            deadline=self.deadline,
            pruned=self.pruned,
            stable_in_a_row=self._in_a_row,
        )

    @property
    def done(self) -> bool:
        """Whether the last sparsity has been reached."""
        return len(self.pruned) == len(self.sparsities)

    @uncompiled
    def step(self, step: int) -> Any:
        """Inspect new measurements and prune if due; call it after the monitor's `step`.

        Args:
            step: The training step, as for the monitor.

        Returns:
            The result of pruning, a `PruningReport` by default; None if nothing was pruned.

        Raises:
            Exception: Any error of pruning. The model and the trigger are unchanged then.
        """
        if self.done:
            return None
        self._look()
        if step < self.not_before or not self._is_due(step):
            return None
        sparsity, model = self.sparsities[len(self.pruned)], unwrap(self.monitor.model)
        report = prune_on_first_rank(model, lambda: self._prune(model, sparsity))
        self.pruned.append((step, sparsity))
        logger.info("pruned to %.4g at step %d", sparsity, step)
        self._mask, self._share, self._in_a_row = None, None, 0
        if self.optimizer is not None:
            mask_optimizer_state_(self.optimizer, model)
        self.monitor.notify(f"pruned to {sparsity:g}")
        if self.on_prune is not None:
            self.on_prune(step, report)
        return report

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the trigger as tensors and plain values, without the masks."""
        return {
            "signals": [dict(signal) for signal in self.signals],
            "pruned": [list(event) for event in self.pruned],
            "mask": self._mask,
            "share": self._share,
            "seen": self._seen,
            "in_a_row": self._in_a_row,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from a `state_dict`; load the pruned model by `load_pruned_` first.

        Raises:
            ValueError: If the state has other sparsities than this trigger, or the model is not
                pruned as the state says.
        """
        try:
            pruned = [(int(step), float(sparsity)) for step, sparsity in state["pruned"]]
            signals = [dict(signal) for signal in state["signals"]]
            mask, share = state["mask"], state["share"]
            seen, in_a_row = int(state["seen"]), int(state["in_a_row"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"expected the state dict of a PruneWhenStable, got a damaged one: {error!r}; "
                "take another checkpoint"
            ) from error
        if [s for _, s in pruned] != self.sparsities[: len(pruned)]:
            raise ValueError(
                f"expected a state with the sparsities {self.sparsities}, got one that has pruned "
                f"to {[s for _, s in pruned]}"
            )
        if pruned and not masks_of(self.monitor.model):
            raise ValueError(
                f"expected a model pruned to {pruned[-1][1]:g}, got a dense one; load it by "
                "hesscurv.pruning.load_pruned_ before the trigger's state"
            )
        self.pruned, self.signals, self._mask, self._share = pruned, signals, mask, share
        self._seen, self._in_a_row = seen, in_a_row

    def _is_due(self, step: int) -> bool:
        if self.pruned and self.every is not None:
            return step >= self.pruned[-1][0] + self.every
        if not self.pruned and self.deadline is not None and step >= self.deadline:
            return True
        return self.stability is not None and self._in_a_row >= self.stability.patience

    def _look(self) -> None:
        """Compare the last record, if it is new, with the one inspected before."""
        # From the end: this is called after every step of training.
        new = takewhile(lambda r: r["step"] > self._seen, reversed(self.monitor.records))
        record = next((r for r in new if r["status"] == "ok"), None)
        if record is not None:
            self._seen = record["step"]
            if self.stability is not None:
                self._compare(record, self.stability)

    def _compare(self, record: dict[str, Any], stability: Stability) -> None:
        found = find_weights(unwrap(self.monitor.model), self.weights)
        mask = self._magnitude_mask(found.values())
        iou = None if self._mask is None else intersection_over_union(self._mask, mask)
        share = None if stability.overlap_change is None else self._share_in(mask, found)
        signal = {
            "step": record["step"],
            "mask_iou": iou,
            "space_overlap": record.get("space_overlap"),
            "overlap_change": relative_change(self._share, share),
            "share": share,
        }
        self._mask, self._share = mask, share
        stable = stability.holds(signal)
        self._in_a_row = self._in_a_row + 1 if stable else 0
        self.signals.append(signal | {"stable": stable, "in_a_row": self._in_a_row})

    def _magnitude_mask(self, weights: Iterable[Weight]) -> Tensor:
        """Return the mask that magnitude pruning to the next sparsity would give, on the CPU."""
        values = []
        for weight in weights:
            value, mask = current_parameter(*weight).detach(), current_mask(*weight)
            values.append((value if mask is None else value * mask).flatten().cpu())
        flat = torch.cat(values)
        sparsity = self.sparsities[len(self.pruned)]
        return magnitude_mask(flat, max(1, round((1 - sparsity) * len(flat))))

    def _share_in(self, mask: Tensor, weights: dict[str, Weight]) -> float | None:
        """Return the share of the last eigenspace that lies in the weights of a mask."""
        pairs = self.monitor.pairs
        if pairs is None or pairs.layout is None:
            return None
        leverages, slices = leverage_scores(pairs), pairs.layout.slices()
        parts = mask.split([current_parameter(*weight).numel() for weight in weights.values()])
        held = [
            float(leverages[slices[name]][part].sum())
            for name, part in zip(weights, parts, strict=True)
            if name in slices
        ]
        return sum(held) / len(pairs)

    def _prune_model(self, model: nn.Module, sparsity: float) -> Any:
        assert self.batches is not None
        return prune_model(
            model,
            self.monitor.task,
            self.batches,
            sparsity,
            weights=self.weights,
            **self._arguments,
        )


def _check_measured(monitor: CurvatureMonitor, stability: Stability, weights: set[str]) -> None:
    """Raise unless the monitor measures all bounded quantities."""
    measured = set(monitor.quantities)
    missing = set(stability.needs) - measured
    if stability.overlap_change is not None and not measured & NEED_PAIRS:
        missing.add("eigenvalues")
    if missing:
        raise ValueError(
            f"expected a monitor with the quantities {sorted(missing)}, got one with "
            f"{sorted(measured)}; use quantities='overlap', or leave their bounds out by "
            "Stability(space_overlap=None, overlap_change=None)"
        )
    if stability.overlap_change is not None and not weights & set(monitor.parameter_names):
        raise ValueError(
            f"expected a monitor of some of the weights {sorted(weights)}, got one of "
            f"{sorted(monitor.parameter_names)}; give it these by `params`, or leave the bound out "
            "by Stability(overlap_change=None)"
        )


def _as_sparsities(sparsity: float | Sequence[float]) -> list[float]:
    """Return sparsities as a list, increasing within (0, 1)."""
    given = [sparsity] if isinstance(sparsity, (int, float)) else list(sparsity)
    if not all(isinstance(s, (int, float)) and not isinstance(s, bool) for s in given):
        raise TypeError(f"expected sparsity as a number or several, got {sparsity!r}")
    rising = all(a < b for a, b in zip([0.0, *given], [*given, 1.0], strict=True))
    if not given or not rising:
        raise ValueError(f"expected sparsities that rise within (0, 1), got {sparsity!r}")
    return [float(s) for s in given]

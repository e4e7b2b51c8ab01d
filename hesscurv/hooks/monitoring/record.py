"""Measurements: the enabled quantities, compared with earlier measurements."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch import Tensor

from hesscurv.eigensolvers import Eigenpairs
from hesscurv.hooks.monitoring import quantities as q
from hesscurv.hooks.monitoring.curvature_probe import Probe
from hesscurv.hooks.monitoring.history import History
from hesscurv.metrics import top_k_mask
from hesscurv.objective.parameters import ParameterLayout


class Measurements:
    """Takes successive measurements, each with the last eigenspace as warm start.

    Args:
        probe: The model and its samples.
        quantities: Names of `QUANTITIES` to measure.
        k: Number of eigenpairs; fewer if D is smaller.
        mask_size: Entries of the magnitude mask, or as a float their fraction of D; None takes k.
        trace_matvecs: Matvecs for the trace.
        history: Recent spaces and masks to keep, in addition to the first and the last.
        optimizer: Its learning rate is recorded; or None.

    Attributes:
        pairs: The last eigenpairs, on the CPU, or None.
        mask: The last magnitude mask (D,), bool, on the CPU, or None.
    """

    def __init__(
        self,
        probe: Probe,
        quantities: tuple[str, ...],
        k: int,
        *,
        mask_size: int | float | None,
        trace_matvecs: int,
        history: int,
        optimizer: Any,
    ) -> None:
        self.probe, self.quantities, self.k = probe, set(quantities), k
        self.mask_size, self.trace_matvecs, self.optimizer = mask_size, trace_matvecs, optimizer
        self.pairs: Eigenpairs | None = None
        self.mask: Tensor | None = None
        self.count = 0
        self._history = history
        self._spaces, self._masks = History(history), History(history)
        self._largest = History(0)  # vectors of largest eigenvalues outside the spaces

    def take(self, step: int) -> dict[str, Any]:
        """Measure; return the quantities of a record.

        Collective: all ranks succeed or all fail. A failure leaves the state unchanged.

        Raises:
            Exception: Any error of the model's code, an operator or a solver.
        """
        probe, wanted = self.probe, self.quantities
        self.count += 1
        out: dict[str, Any] = {}
        gradient = pairs = trace = largest = None
        if wanted & q.NEED_GRADIENT:
            loss, gradient = probe.loss_and_gradient()
            out |= {"loss": loss} if "loss" in wanted else {}
        if wanted & q.NEED_PAIRS:
            last = self._spaces.last
            pairs = probe.solve(
                self.k,
                self.count,
                None if last is None else last.rows,
                None if last is None else last.layout,
            )
            if "sharpness" in wanted:
                above = self._largest.last
                largest = probe.largest(
                    pairs,
                    self.count,
                    None if above is None else above.rows,
                    None if above is None else above.layout,
                )
            if "trace" in wanted:
                trace = probe.trace(pairs, self.trace_matvecs, self.count)
        weights, layout = probe.weights()
        with probe.ranks.together("the quantities of a measurement"):
            mask = None
            if wanted & q.NEED_MASK:
                mask = top_k_mask(weights.abs(), self._mask_entries(len(weights)))
            if pairs is not None:
                out |= self._of_pairs(pairs, weights, mask, layout)
                if "sharpness" in wanted:
                    out |= q.sharpness(pairs, self.optimizer, largest)
                if gradient is not None and "gradient_share" in wanted:
                    out |= q.gradient_share(pairs, gradient)
                if trace is not None:
                    out |= q.trace_and_rank(pairs, *trace)
            if mask is not None and "mask_iou" in wanted:
                out |= q.mask_overlaps(self._masks, mask, layout)
            if "sparsity" in wanted:
                out |= q.sparsities(weights == 0, layout)
            self._keep(step, layout, pairs, mask)
            if largest is not None:
                self._largest.add(step, layout, largest.eigenvectors.cpu())
        return out

    @property
    def most_matvecs(self) -> int:
        """Maximal number of matvecs of a measurement with a warm start."""
        traced = self.trace_matvecs if "trace" in self.quantities else 0
        return (self.probe.max_matvecs or 3 * self.k) + traced

    def state_dict(self) -> dict[str, Any]:
        """Return the state for the next measurement, as plain values and tensors."""
        pairs = None
        if self.pairs is not None:
            pairs = {
                "eigenvalues": self.pairs.eigenvalues.clone(),
                "residuals": self.pairs.residuals.clone(),
                "converged": self.pairs.converged.clone(),
                "num_matvecs": self.pairs.num_matvecs,
                "method": self.pairs.method,
                "info": dict(self.pairs.info),
            }
        return {
            "count": self.count,
            "pairs": pairs,  # without eigenvectors, which are the last of `spaces`
            "spaces": self._spaces.state_dict(),
            "masks": self._masks.state_dict(),
            "largest": self._largest.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict`; on an error nothing is changed."""
        spaces, masks = History(self._history), History(self._history)
        largest = History(0)
        spaces.load_state_dict(state["spaces"])
        masks.load_state_dict(state["masks"])
        if "largest" in state:  # states of earlier versions have none
            largest.load_state_dict(state["largest"])
        count = int(state["count"])
        last, pairs = spaces.last, state["pairs"]
        kept = None
        if last is not None and pairs is not None:
            tensors = {
                name: pairs[name].cpu() for name in ("eigenvalues", "residuals", "converged")
            }
            plain = {name: pairs[name] for name in ("num_matvecs", "method", "info")}
            kept = Eigenpairs(eigenvectors=last.rows, layout=last.layout, **tensors, **plain)
        self._spaces, self._masks, self._largest = spaces, masks, largest
        self.count, self.pairs = count, kept
        self.mask = None if masks.last is None else masks.last.rows

    def _of_pairs(
        self, pairs: Eigenpairs, weights: Tensor, mask: Tensor | None, layout: ParameterLayout
    ) -> dict[str, Any]:
        wanted = self.quantities
        out: dict[str, Any] = {}
        if "eigenvalues" in wanted:
            out |= q.spectrum(pairs)
        if "overlap" in wanted and mask is not None:
            out |= q.mask_overlap(mask, pairs)
        if "overlap_by_parameter" in wanted and mask is not None:
            out |= q.overlaps_by_parameter(mask, pairs, layout)
        if "overlap_by_k" in wanted:
            out |= q.overlaps_by_k(weights.abs(), pairs)
        if "space_overlap" in wanted:
            out |= q.space_overlaps(self._spaces, pairs, layout)
        return out

    def _keep(
        self, step: int, layout: ParameterLayout, pairs: Eigenpairs | None, mask: Tensor | None
    ) -> None:
        if pairs is not None:
            on_cpu = pairs.to("cpu")
            self._spaces.add(step, layout, on_cpu.eigenvectors)
            self.pairs = replace(on_cpu, layout=layout)
        if mask is not None:
            self.mask = mask.cpu()
            self._masks.add(step, layout, self.mask)

    def _mask_entries(self, dim: int) -> int:
        size = self.k if self.mask_size is None else self.mask_size
        return max(1, min(dim, math.ceil(size * dim) if isinstance(size, float) else size))


def check_optimizer(optimizer: Any) -> None:
    """Require an optimizer with parameter groups.

    Raises:
        TypeError: If it has none.
    """
    if optimizer is not None and not hasattr(optimizer, "param_groups"):
        raise TypeError(
            f"expected an optimizer with param_groups, got {type(optimizer).__name__}; leave it "
            "out to record no learning rate"
        )

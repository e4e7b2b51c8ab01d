"""Mean of an operator over ranks, each with its own share of the data."""

from __future__ import annotations

import math
import sys
from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hesscurv.distributed import Communicator
from hesscurv.distributed.checksums import checksum, sample_checksum
from hesscurv.distributed.sharded import require_members
from hesscurv.interface.descriptions import Words, brief
from hesscurv.objective.objective import Objective
from hesscurv.objective.parameters import ParameterLayout
from hesscurv.operators.compared_products import ComparedProducts
from hesscurv.operators.linear_operator import LinearOperator

_MOST_NAMES = 3  # of parameters that are printed
_SAME_VECTORS = "draw them with the same seed on all ranks, or broadcast them"


class SummedOperator(LinearOperator):
    """An operator whose products are sums over the ranks, one all-reduce for each block.

    Each rank multiplies the same vectors by its own share, which is weighted by its part of the
    total weight. In a single process nothing is added to the product of the share.

    Args:
        objective: What is measured, with this rank's batches; its values are not yet taken.
        communicator: The ranks.

    Raises:
        ValueError: On all ranks, if they build different operators.
    """

    products: ComparedProducts  # what multiplies this rank's share

    def __init__(self, objective: Objective, communicator: Communicator) -> None:
        super().__init__(objective.layout.numel, objective.dtype, objective.device)
        self.objective = objective
        self.communicator = communicator
        self._solving = False  # whether a solver looks at every product itself
        self._counted = 0  # how often the batches had been read when they were last counted
        if communicator.size > 1:
            self._agree()
        require_members(objective.model.parameters(), communicator)
        refresh_together(objective, communicator, "reading the weights")

    def _description(self) -> dict[str, Any]:
        objective = getattr(self, "objective", None)
        if objective is None:
            return super()._description()
        weight, count = getattr(self, "total_weight", 0.0), objective.batches.count
        batches = f"{count} (weight {weight:g} in all)" if weight else f"{count}"
        ranks = getattr(self.communicator, "size", 1)
        return {
            "model": Words(type(objective.model).__name__),
            "params": Words(_names(objective.layout)),
            "task": objective.task,
            "batches": None if objective.is_closure else Words(batches),
            **super()._description(),
            **({"way": self.way} if hasattr(self, "way") else {}),
            **({"ranks": ranks} if ranks > 1 else {}),
        }

    @property
    def own_weight(self) -> float:
        """The weight of this rank's batches."""
        return self.products.local.own_weight

    @property
    def total_weight(self) -> float:
        """The weight of all ranks' batches."""
        return self.products.local.total_weight

    @abstractmethod
    def _forget(self) -> None:
        """Forget what was computed with the weights and batches before."""

    def _matmat(self, vectors_DB: Tensor) -> Tensor:
        vectors_BD = vectors_DB.mT.contiguous()
        if self.communicator.size == 1:
            self.refresh()
            return self.products.multiply(vectors_BD, self.num_matvecs, unchecked=self._solving).mT
        what = f"a product with {len(vectors_BD)} vectors"
        self._refresh(what, sample_checksum(vectors_BD))
        with self.communicator.together(what):
            out_BD = self.products.multiply(vectors_BD, self.num_matvecs, unchecked=self._solving)
        return self.communicator.sum_(out_BD).mT

    def product_rows(self, rows_RB: Tensor) -> Tensor:
        """Return this rank's rows of ``H @ V``, given its rows of V; see `LinearOperator`."""
        communicator, dim = self.communicator, self.shape[0]
        if communicator.size == 1:
            return self @ rows_RB
        with torch.inference_mode(False), torch.no_grad():
            self._announcing(self._check_rows, rows_RB)
            what = f"a product with the rows of {rows_RB.shape[1]} vectors"
            self._refresh(what)
            vectors_BD = communicator.gather_rows(rows_RB.detach().mT.contiguous(), dim)
            with communicator.together(what):
                out_BD = self.products.multiply(
                    vectors_BD, self.num_matvecs, unchecked=self._solving
                )
            del vectors_BD
            out_RB = communicator.reduce_rows(out_BD).mT
        self.num_matvecs += rows_RB.shape[1]
        return out_RB

    @contextmanager
    def solving(self) -> Iterator[None]:
        """Compare values with the copies taken at the first product inside alone."""
        with self.objective.values_compared_once():
            yield

    def refresh(self) -> bool:
        """Detect changes of the weights and batches, on all ranks; return whether there are any.

        Products do so automatically.
        """
        return self._refresh("looking for changes")

    def _refresh(self, what: str, block: int | None = None) -> bool:
        try:
            changed = refresh_together(self.objective, self.communicator, what, block)
            if changed:
                self._forget()
                self._count_together("counting the batches")
        except BaseException:
            self.objective.invalidate()  # what was noted and not acted on is to be noted again
            raise
        return changed

    def _agree(self) -> None:
        objective, remedy = self.objective, "build the same operator on all ranks"
        with self.communicator.together("building the operator") as step:
            for what, value in (
                ("kind of operator", type(self).__name__),
                ("number of parameters", objective.layout.numel),
                ("names and shapes of parameters", objective.layout.to_dict()),
                ("dtype", str(objective.dtype)),
                ("mode, training=", objective.training),
                ("use of a closure", objective.is_closure),
            ):
                step.require_same(what, value, remedy)

    def _count(self) -> None:
        """Add up the weights of this rank's batches."""
        for i, batch in enumerate(self.objective.batches):
            self._add_weight(i, batch)

    def _add_weight(self, index: int, batch: Any) -> float:
        weight = self.objective.weight(batch)
        if not 0 <= weight < math.inf:
            raise ValueError(f"expected a batch weight >= 0, got {weight} for batch {index}")
        self.products.local.own_weight += weight
        return weight

    def _count_together(self, what: str) -> None:
        """Count this rank's batches if they were read again, and add up all ranks' weights."""
        batches, local = self.objective.batches, self.products.local
        with (
            self.communicator.together(what) as step,
            torch.inference_mode(False),
            torch.no_grad(),
        ):
            if batches.reads == 0 or batches.reads != self._counted:
                local.own_weight = 0.0
                self._count()
                self._counted, step.note = batches.reads, 1
        if not any(step.notes):
            return
        own = torch.tensor(local.own_weight, dtype=torch.float64, device="cpu")
        local.total_weight = float(self.communicator.sum_(own))
        if not local.total_weight > 0:
            raise ValueError(
                f"expected a positive total weight, got {local.total_weight}: "
                f"{_why_nothing_counts(self.objective.task)}"
            )

    def largest_of_all(self, number: float) -> float:
        """Return the largest of a number over the ranks."""
        return float(
            self.communicator.max_(torch.tensor(number, dtype=torch.float64, device="cpu"))
        )

    def _check(self, other: Any) -> None:
        self._announcing(super()._check, other)

    def _announcing(self, check: Any, operand: Any) -> None:
        handled = sys.exc_info()[1]
        try:
            check(operand)
        except Exception as error:
            # The others wait for this rank at the end of their first step, `refresh_together`'s.
            self.communicator.announce(error, handled)
            raise


def _why_nothing_counts(task: Any) -> str:
    known = getattr(task, "torch_loss", None)
    ignored = getattr(known, "ignore_index", None)
    weighted = getattr(known, "weight", None) is not None
    if known is None or known.counted != "classes":
        return "the task's weight(batch) is 0 for every batch; pass batches that it counts"
    return (
        f"every target of every batch is {ignored}, the loss's ignore_index"
        + (", or of a class of weight 0" if weighted else "")
        + ", or there is none, so that there is no loss; look at the labels (masking, padding, "
        "truncation), and pass batches with some that count"
    )


def refresh_together(
    objective: Objective, communicator: Communicator, what: str, block: int | None = None
) -> bool:
    """Refresh an objective on all ranks: where one rank's model changed, all copy theirs again.

    Args:
        objective: The objective.
        communicator: The ranks.
        what: What it is done for, which must be the same on all ranks.
        block: A checksum that must be the same on all ranks.

    Returns:
        Whether the model or the batches of any rank changed.

    Raises:
        ValueError: On all ranks, if their weights differ.
        DistributedError: If another rank fails.

    Cost: an exchange of 32 bytes; after a change, one reading of the weights.
    """
    if communicator.size == 1:
        return objective.refresh()
    with communicator.together(what) as step, torch.no_grad():
        if block is not None:
            step.require_same("vectors to multiply", block, _SAME_VECTORS)
        weights, data = objective.find_changes()
        step.note = 2 * weights + data
    changed = any(step.notes)
    if any(note & 2 for note in step.notes):
        if objective.is_sharded():  # not within a step, since it gathers
            communicator.answered(objective.take_values)
        else:
            with communicator.together("copying the weights"):
                objective.take_values()
        if objective.broadcasts_buffers:
            _take_buffers_of_first(objective, communicator)
        _require_same_weights(objective, communicator)
    if objective.is_closure:
        with communicator.together("evaluating the closure") as step:
            step.note = int(objective.closure_differs())
        changed |= any(step.notes)
    return changed


def device_of(model: Any) -> torch.device | None:
    """Return where a model's first parameter lies; None of what is no model, or has none."""
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    return next((p.device for p in parameters), None)


def _take_buffers_of_first(objective: Objective, communicator: Communicator) -> None:
    """Compute with rank 0's buffers, as a DDP forward does: batch statistics differ after it."""
    for name, _ in objective.model.named_buffers():
        constant = objective.constants[name].clone()
        objective.constants[name] = communicator.broadcast_(constant)


def _require_same_weights(objective: Objective, communicator: Communicator) -> None:
    with communicator.together("comparing the weights") as step:
        constants = objective.constants
        modes = [m.training for m in objective.model.modules()]
        step.require_same(
            "weights (the number is their checksum)",
            checksum(objective.parameters()),
            "broadcast them from one rank: for p in model.parameters(): "
            "torch.distributed.broadcast(p.data, 0)",
        )
        step.require_same(
            "frozen parameters and buffers (the number is their checksum)",
            checksum(constants[name] for name in sorted(constants)),
            "broadcast them from one rank; batch statistics that each rank took of its own data "
            "differ: torch.distributed.broadcast(buffer, 0) for each of model.buffers()",
        )
        if objective.training is None:
            step.require_same("training flags of the modules", modes, "set the same mode")


def _names(layout: ParameterLayout) -> str:
    """Return how many parameters there are, and the names of the first."""
    more = len(layout.names) - _MOST_NAMES
    return f"{len(layout.names):,} ({', '.join(map(brief, layout.names[:_MOST_NAMES]))}" + (
        f", and {more:,} more)" if more > 0 else ")"
    )

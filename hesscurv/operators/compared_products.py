"""Products by the fastest way, verified against the reference on every micro-batch."""

from __future__ import annotations

import logging
import warnings
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from hesscurv.linalg.transfers import all_finite
from hesscurv.operators.checks.agreement import (
    CONFIRM_FROM,
    Agreement,
    Combination,
    agree,
    relative_gap,
)
from hesscurv.operators.checks.references import with_reference
from hesscurv.operators.linear_operator import require_finite
from hesscurv.operators.local_product import LocalProduct
from hesscurv.operators.timing.way_choice import WayChoice
from hesscurv.operators.ways.linearization import Linearization
from hesscurv.operators.ways.way import on_batch

logger = logging.getLogger(__name__)


class ComparedProducts:
    """Products with the mean curvature of this rank's batches, by the way that is chosen.

    A micro-batch on which the way fails, or gives other products than the reference, takes the
    reference from then on.

    Args:
        local: What multiplies.
        way: "auto" measures and chooses; "reference", or the name of the way for all products.
        checking: Whether all products of a solve are compared at its end.
        late: Whether vectors and products are looked at for NaN together, after the product.

    Attributes:
        choice: Which way is taken.
    """

    def __init__(self, local: LocalProduct, way: str, *, checking: bool, late: bool) -> None:
        self.local, self.way = local, way
        self._checking, self._late = checking, late
        self._comparing = checking or way == "auto"
        known = (*local.curvature.ways, *local.curvature.fallbacks)
        looped = [known_way.name for known_way in known if known_way.looped]
        self._agreement = Agreement(local.reference, looped)
        self.choice = WayChoice(local, self._agreement, way)
        self._record: Combination | None = None  # of all products that the reference has not given
        local.changed = self._note_change

    def multiply(self, vectors_BD: Tensor, done: int, *, unchecked: bool = False) -> Tensor:
        """Return the products (B, D) with vectors (B, D).

        Args:
            vectors_BD: The vectors.
            done: The number of products before, by which the way is chosen.
            unchecked: Whether the caller looks for NaN and inf itself.

        Raises:
            ValueError: If the way was named by the user, and is not right on a micro-batch; or if
                there are NaN or inf entries.
            MissingDerivativeError: If no way has the model's derivatives.
        """
        local = self.local
        if local.own_weight == 0:
            return torch.zeros_like(vectors_BD)

        def multiply() -> Tensor:
            self.choice.prepare(len(vectors_BD), done)
            return local.within_memory(lambda: self._block(vectors_BD, unchecked))

        return with_reference(local, multiply)

    def expect(self, products: int) -> None:
        """Choose the way for so many products from here on, and begin a record of them."""
        self.choice.expect(products)
        self._record = None

    def forget_values(self, *, same_batches: bool) -> None:
        """Compare again with the present weights and batches."""
        self._record = None
        if same_batches:
            self._agreement.weights_changed(self.choice.expected)
        else:
            self._agreement.forget()

    def confirm(self) -> None:
        """Compare the products since `expect` with the reference, by one product; warn of a gap.

        Nothing is done after fewer than 64 products, or where the reference computed all of them.

        Warns:
            RuntimeWarning: If they differ by more than rounding, with the way and the micro-batch
                that make the difference.
        """
        record, self._record = self._record, None
        if record is None or record.count < CONFIRM_FROM or not self._checking:
            return
        local = self.local

        def multiply() -> Tensor:
            out_D = torch.zeros_like(record.x_D)
            for index, batch, weight in local.shares():
                product_1D = self._by_reference(index, batch, record.x_D[None])
                out_D.add_(product_1D[0], alpha=weight)
            return out_D

        with torch.inference_mode(False):
            expected_D = with_reference(local, lambda: local.within_memory(multiply))
        # Products of many vectors add up here, and so does their rounding.
        precision = local.objective.precision
        if agree(expected_D, record.y_D, rounding=4.0, precision=precision):
            return
        way = self.choice.choose(len(expected_D))[0]
        warnings.warn(
            f"the last {record.count} products, by way {way!r}, differ from those of "
            f"{local.reference!r} by {relative_gap(expected_D, record.y_D):.1e} of their norm, so "
            f"results made of them are off by as much; {self._find_cause(way, record.x_D)}; build "
            f"the operator with way={local.reference!r}, or report it",
            RuntimeWarning,
            stacklevel=4,
        )

    # -- one block ------------------------------------------------------------------------------

    def _block(self, vectors_BD: Tensor, unchecked: bool) -> Tensor:
        """Multiply by all micro-batches, each in the chosen way where that is right on it."""
        local, out_BD = self.local, torch.empty_like(vectors_BD)
        while True:
            way, chunk = self.choice.choose(len(vectors_BD))
            failed: dict[int, Exception] = {}
            for number, (index, batch, weight) in enumerate(local.shares()):
                used = self._agreement.way_for(index, way)
                width = min(chunk, len(vectors_BD))
                due = self._comparing and self._agreement.is_due(index, used, width)
                seen = Combination(local.layout, vectors_BD, seed=index) if due else None
                try:
                    with on_batch(used, batch) if used == local.reference else nullcontext():
                        apply = local.prepared(index, batch, used)
                        local.multiply_into(
                            *(out_BD, used, apply, vectors_BD, weight, chunk),
                            add=number > 0,
                            seen=seen,
                        )
                    if seen is not None:
                        self._compare(index, batch, used, apply, seen)
                        self._agreement.passed(index, used, width)
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:
                    if used == local.reference:
                        raise
                    failed[index] = error
            if not failed:
                break
            if self._late:
                require_finite(vectors_BD)  # NaN agrees with nothing, whatever the way
            self._leave_out(way, failed)  # and multiply again: `out` holds what is wrong
        if not unchecked:  # a solver's own look ends the record as well
            self._require_finite(vectors_BD, out_BD)
        if way != local.reference:
            if self._record is None:
                self._record = Combination(local.layout, vectors_BD)
            self._record.add(vectors_BD, out_BD)
        return out_BD

    def _compare(
        self, index: int, batch: Any, way: str, apply: Linearization, seen: Combination
    ) -> None:
        """Compare the products in `seen` with the reference's.

        Few vectors, or sparse ones, need not reach all parameters: a random one is multiplied too.
        """
        if seen.count < 4 or bool((seen.x_D == 0).any()):
            extra_1D = seen.random_vector()
            seen.add(extra_1D, self.local.apply(apply, extra_1D, way))
        expected_1D = self._by_reference(index, batch, seen.x_D[None])
        if not agree(expected_1D[0], seen.y_D, precision=self.local.objective.precision):
            raise ValueError(
                f"it gives other products than {self.local.reference!r}, by "
                f"{relative_gap(expected_1D[0], seen.y_D):.1e} of their norm"
            )

    def _by_reference(self, index: int, batch: Any, vectors_BD: Tensor) -> Tensor:
        """Multiply by a micro-batch; its graph is kept for the next time, where it takes little."""
        local, way = self.local, self.local.reference
        with on_batch(way, batch):
            if local.plan.keep_references:
                apply = local.prepared(index, batch, way)
            else:
                apply = local.prepare(batch, way)
            return local.apply(apply, vectors_BD, way)

    def _require_finite(self, vectors_BD: Tensor, out_BD: Tensor) -> None:
        if all_finite(out_BD, *((vectors_BD,) if self._late else ())):
            return
        require_finite(vectors_BD)
        raise ValueError(
            "the product has NaN or inf entries, so the loss has no finite second derivative "
            "here; look for overflow, sqrt or norm at zero, or try compute_dtype=torch.float64"
        )

    # -- ways that are not right ----------------------------------------------------------------

    def _leave_out(self, way: str, failed: dict[int, Exception]) -> None:
        """Take the reference on the micro-batches that a way is not right on, or in its place."""
        local, (index, cause) = self.local, next(iter(failed.items()))
        what = local.describe(index)
        reason = str(cause) if isinstance(cause, ValueError) else f"{type(cause).__name__}: {cause}"
        if self.way == way:
            raise ValueError(
                f"way={way!r} cannot be used: on {what}, {reason}; use way='auto', which takes "
                "another way where this one is not right"
            ) from cause
        for i, error in failed.items():
            self._agreement.refuse(i, way, str(error))
            local.drop(i, way)
        # Not right on the first, which was measured on, or on most: there is nothing to gain.
        count = sum(1 for _ in local.shares())
        everywhere = 0 in failed or 2 * self._agreement.num_refused(way) > count
        if everywhere:
            self.choice.leave_out(way)
        logger.warning(
            "way %r is not right on %d of %d micro-batches (%s: %s); going on with %r %s",
            way,
            len(failed),
            count,
            what,
            reason.partition("\n")[0][:200],
            local.reference,
            "or another way on all" if everywhere else "there",
        )

    def _find_cause(self, way: str, vector_D: Tensor) -> str:
        local = self.local
        for index, batch, _ in local.shares():
            used = self._agreement.way_for(index, way)
            expected_D, got_D = (
                local.product_on(batch, vector_D[None], w)[0] for w in (None, used)
            )
            if not agree(expected_D, got_D, precision=local.objective.precision):
                return f"{local.describe(index)} makes the difference"
        return "no micro-batch alone makes the difference at the present weights"

    def _note_change(self, what: str) -> None:
        if what == "micro-batches":
            self._agreement.forget()
            return
        if what == "reference":
            self._agreement.start_over(self.local.reference)
            self._record = None
        self.choice.forget()

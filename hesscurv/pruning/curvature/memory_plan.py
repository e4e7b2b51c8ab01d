"""Memory planning of `prune_model`: number of rows and size of blocks.

Sizes at their defaults are lowered to fit; sizes given by the caller are not.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

from hesscurv.pruning.curvature.layer_inputs import num_blocks
from hesscurv.pruning.curvature.quadratic_model import Measuring

DEFAULT_GRADIENTS = 1000
_DEFAULTS = Measuring()
# With fewer rows a quadratic model of millions of weights is useless.
_LEAST_ROWS = 16
_SMALLER_BLOCKS = (256, 64)
# Fraction of the free memory; the rest is for the model's work on a batch.
_SHARE = 0.8
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sizes:
    """Sizes that determine the memory of a stage.

    Args:
        numels: Entries of each weight.
        columns: Inputs of each weight with an input covariance.
        itemsize: Bytes per number.
    """

    numels: Sequence[int]
    columns: Sequence[int]
    itemsize: int

    @property
    def numel(self) -> int:
        """The entries of all weights."""
        return sum(self.numels)

    def num_bytes(self, rows: int, largest_block: int) -> int:
        """Return the bytes of rows and factors, with the temporaries of the largest weight."""
        per_row = 2 * self.numel + 2 * max(self.numels)
        inputs = sum(i * (i // num_blocks(i, largest_block)) for i in self.columns)
        return (rows * per_row + 4 * rows**2 + 8 * self.numel + inputs) * self.itemsize

    def most_rows(self, limit: float, largest_block: int) -> int:
        """Return how many rows fit into a number of bytes; -1 if not even zero rows fit."""
        # Doubling, then bisection: the bytes grow monotonically with the rows.
        low, high = -1, 1
        while self.num_bytes(high, largest_block) <= limit:
            low, high = high, 2 * high
        low = 0 if low < 0 and self.num_bytes(0, largest_block) <= limit else low
        while high - low > 1:
            middle = (low + high) // 2
            fits = self.num_bytes(middle, largest_block) <= limit
            low, high = (middle, high) if fits else (low, middle)
        return low


@dataclass(frozen=True)
class MemoryPlan:
    """Sizes that fit.

    Args:
        gradients: Samples per stage.
        measuring: Options of the curvature, with a rank and blocks that fit.
        num_bytes: Memory of rows and factors.
    """

    gradients: int
    measuring: Measuring
    num_bytes: int


def plan_memory(
    sizes: Sizes,
    measuring: Measuring,
    gradients: int | None,
    free: int,
    num_samples: int | None = None,
) -> MemoryPlan:
    """Return the number of gradients and eigenpairs, and the block size.

    Args:
        sizes: Sizes of the weights.
        measuring: The requested options; rank and largest block may be lowered if at the defaults.
        gradients: Samples per stage; None for 1000, or fewer if these do not fit.
        free: Bytes of free memory.
        num_samples: Total number of samples, if known.

    Raises:
        MemoryError: If it does not fit; the message names the argument to change, and its value.
    """
    n = DEFAULT_GRADIENTS if gradients is None else gradients
    k = min(measuring.rank, sizes.numel)
    uses_n, uses_k = measuring.rows != "eigenspace", measuring.rows in ("eigenspace", "both")
    present = n if num_samples is None else min(n, num_samples)
    rows = uses_n * present + uses_k * k
    need = sizes.num_bytes(rows, measuring.largest_block)
    free_n = uses_n and gradients is None
    free_k = uses_k and measuring.rank == _DEFAULTS.rank
    # With a margin first; all of the free memory only if nothing fits otherwise.
    limits = [_SHARE * free, free] if free_n or free_k else [free]
    if need <= limits[0]:
        return MemoryPlan(n, measuring, need)
    blocks = [measuring.largest_block]
    if measuring.largest_block == _DEFAULTS.largest_block and sizes.columns:
        blocks += _SMALLER_BLOCKS
    for limit, block in product(limits, blocks):
        left = sizes.most_rows(limit, block) - (0 if free_n or not uses_n else present)
        left -= 0 if free_k or not uses_k else k
        if left < 0:
            continue
        # Split the room in the proportion of the defaults.
        share = k / (present + k) if free_n else 1.0
        taken_k = min(k, round(share * left)) if free_k else k
        taken_n = min(present, left - (taken_k if free_k else 0)) if free_n else n
        if (free_n and taken_n < min(_LEAST_ROWS, present)) or (
            free_k and taken_k < min(_LEAST_ROWS, k)
        ):
            continue
        lowered = {
            "gradients_per_stage": (n, taken_n if taken_n < present else n),
            "rank": (k, taken_k),
            "largest_block": (measuring.largest_block, block),
        }
        said = [f"{what}={now} for {was}" for what, (was, now) in lowered.items() if now != was]
        logger.warning(
            "the defaults need %s and %s are free: pruning goes on with %s",
            *(_gb(need), _gb(free), ", ".join(said)),
        )
        how = replace(measuring, rank=min(taken_k, measuring.rank), largest_block=block)
        taken = uses_n * min(taken_n, present) + uses_k * taken_k
        return MemoryPlan(lowered["gradients_per_stage"][1], how, sizes.num_bytes(taken, block))
    raise MemoryError(
        f"pruning {sizes.numel:,} weights with {n} gradients a stage needs about {_gb(need)}, and "
        f"{_gb(free)} are free; {_remedy(sizes, measuring, present, k, free, uses_n, uses_k)}"
    )


def _remedy(
    sizes: Sizes, measuring: Measuring, n: int, k: int, free: int, uses_n: bool, uses_k: bool
) -> str:
    """The argument to change, and its value, so that it fits."""
    most = sizes.most_rows(free, measuring.largest_block)
    least_n, least_k = min(_LEAST_ROWS, n), min(_LEAST_ROWS, k)
    if uses_n and most - uses_k * k >= least_n:
        return f"use gradients_per_stage={most - uses_k * k}"
    if uses_k and most - uses_n * n >= least_k:
        return f"use a rank={most - uses_n * n} in `measuring`"
    if uses_n and uses_k and most >= least_n + least_k:
        return f"use gradients_per_stage={most - least_k} and a rank={least_k} in `measuring`"
    for block in _SMALLER_BLOCKS:
        if block < measuring.largest_block and sizes.most_rows(free, block) >= (
            uses_n * n + uses_k * k
        ):
            return f"use a largest_block={block} in `measuring`"
    rows = uses_n * least_n + uses_k * least_k
    least = sizes.num_bytes(rows, _SMALLER_BLOCKS[-1])
    numel = int((free / sizes.itemsize - 4 * rows**2) / (4 * rows + 8))
    numel = min(numel, int(sizes.numel * free / least))
    some = f"name `weights` of at most {numel:,} entries, or " if numel > 0 else ""
    return (
        f"with {rows} rows, the minimum, it needs {_gb(least)}: {some}use method='magnitude', "
        "which needs none of it"
    )


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.3g} GB"

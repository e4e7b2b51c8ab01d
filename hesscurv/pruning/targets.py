"""Pruning targets: sparsity budgets by scope, and N:M patterns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hesscurv.metrics.masks import top_k_mask
from hesscurv.objective.parameters import ParameterLayout
from hesscurv.pruning.masks.methods import CurvatureNM
from hesscurv.pruning.weight_axes import axes_of
from hesscurv.pruning.weights import Weight

Scope = str | Mapping[str, float]


@dataclass(frozen=True)
class Budget:
    """Weights that share a target sparsity.

    Args:
        name: For messages: "all weights", or the name of a weight.
        index: Indices into the flat vector, shape (p,), int64.
        sparsity: The final fraction to prune.
    """

    name: str
    index: Tensor
    sparsity: float

    def num_kept(self, sparsity: float) -> int:
        """Return how many entries are left at a sparsity."""
        return len(self.index) - round(sparsity * len(self.index))


def make_budgets(
    layout: ParameterLayout, scope: Scope, sparsity: float, device: torch.device
) -> list[Budget]:
    """Return the budgets of a scope: one for all weights, one per weight, or as given.

    Raises:
        ValueError: If the scope is unknown, names an unknown weight, or has a sparsity outside
            [0, 1).
    """
    slices = layout.slices()
    everything = torch.arange(layout.numel, device=device)
    if scope == "global":
        return [Budget("all weights", everything, sparsity)]
    if scope == "layer":
        return [Budget(name, everything[part], sparsity) for name, part in slices.items()]
    if not isinstance(scope, Mapping):
        raise ValueError(
            f"expected scope 'global', 'layer' or a dict from name to sparsity, got {scope!r}"
        )
    out: list[Budget] = []
    named: set[str] = set()
    for given, value in scope.items():
        if isinstance(value, bool) or not 0 <= value < 1:
            raise ValueError(f"expected a sparsity in [0, 1) for {given!r}, got {value!r}")
        found = [n for n in slices if n == given or n.startswith(given.rstrip(".") + ".")]
        if not found or named & set(found):
            problem = "names a weight twice" if found else "is no weight or module to prune"
            raise ValueError(f"the scope's {given!r} {problem}; there are {list(slices)}")
        named |= set(found)
        index = torch.cat([everything[slices[n]] for n in found])
        out.append(Budget(given, index, float(value)))
    return out


def next_mask(scores: Tensor, mask: Tensor, budgets: list[Budget], progress: float) -> Tensor:
    """Return the mask after one more step.

    Args:
        scores: Shape (D,), lowest pruned first; scores of pruned entries are ignored.
        mask: Shape (D,), bool, the present mask.
        budgets: The targets; entries in none of them stay.
        progress: Sparsity at the end of the step, relative to each budget's, in [0, 1].

    Returns:
        Shape (D,), bool: exactly the number kept by each budget, or the fewer that are left.
    """
    out = mask.clone()
    for budget in budgets:
        kept = budget.num_kept(progress * budget.sparsity)
        alive = mask[budget.index]
        if kept >= int(alive.sum()):
            continue
        ranked = torch.where(alive, scores[budget.index], -torch.inf)
        out[budget.index] = top_k_mask(ranked, kept) if kept else torch.zeros_like(alive)
    return out


@dataclass(frozen=True)
class Pattern:
    """An N:M pattern: at most n of m neighbours along the input dimension are kept."""

    n: int
    m: int

    @classmethod
    def parse(cls, structure: str | None) -> Pattern | None:
        """Parse a pattern such as "2:4"; None for no pattern.

        Raises:
            ValueError: If it is not of the form "N:M" with 0 < N < M.
        """
        if structure is None:
            return None
        parts = structure.split(":") if isinstance(structure, str) else []
        if len(parts) != 2 or not all(p.isdigit() for p in parts):
            raise ValueError(f"expected structure None or 'N:M' such as '2:4', got {structure!r}")
        n, m = map(int, parts)
        if not 0 < n < m:
            raise ValueError(f"expected 0 < N < M in structure 'N:M', got {structure!r}")
        return cls(n, m)

    def fits(self, weight: Weight, shape: tuple[int, ...], dotted: str | None = None) -> bool:
        """Whether m divides the number of inputs of the weight, or of each of its groups.

        Raises:
            ValueError: If the input dimension is unknown; it names `dotted`.
        """
        return len(shape) > 1 and axes_of(*weight, dotted).num_inputs(shape) % self.m == 0

    def next_mask(
        self,
        scores: Tensor,
        mask: Tensor,
        layout: ParameterLayout,
        weights: Mapping[str, Weight],
        progress: float,
    ) -> Tensor:
        """Return the mask after one more step, which drops the lowest scores outside the pattern.

        At ``progress`` 1 the pattern holds everywhere.
        """
        ranked = layout.split(scores)
        alive = layout.split(mask)
        final = torch.cat(
            [
                CurvatureNM(self.n, self.m, axes_of(*weights[name], name).inputs)
                .compute_mask(s, alive[name])
                .flatten()
                for name, s in ranked.items()
            ]
        )
        going = mask & ~final
        drop = round(progress * int((~final).sum())) - int((~mask).sum())
        if drop <= 0:
            return mask.clone()
        out = mask.clone()
        candidates = going.nonzero()[:, 0]
        order = torch.argsort(scores[candidates], stable=True)
        out[candidates[order[:drop]]] = False
        return out

"""Transfer of parameter vectors between a dense model and its pruned form."""

from __future__ import annotations

import torch
from torch import Tensor

from hesscurv.objective.parameters import ParameterLayout


def dense_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names that parameters have in the dense model.

    ``torch.nn.utils.prune`` stores a pruned ``weight`` as ``weight_orig``, after all others of its
    module. Names that would coincide are kept.
    """
    dense = tuple(name.removesuffix("_orig") for name in names)
    return dense if len(set(dense)) == len(dense) else names


def dense_layout(layout: ParameterLayout) -> ParameterLayout:
    """Return a layout with its `dense_names`."""
    return ParameterLayout(dense_names(layout.names), layout.shapes)


def carry_over(
    rows: Tensor, source: ParameterLayout, target: ParameterLayout, *, partly: bool = False
) -> Tensor | None:
    """Return rows over one layout's parameters in the order of another's.

    Args:
        rows: Shape (D,) or (D, k).
        source: Their layout, with dense names.
        target: The target layout, with dense names.
        partly: Whether new or reshaped parameters may get rows of zeros.

    Returns:
        Shape (D',) or (D', k); None if the parameters differ, or, with `partly`, if none match.
    """
    if source == target:
        return rows
    pieces = dict(zip(source.names, source.shapes, strict=True))
    wanted = dict(zip(target.names, target.shapes, strict=True))
    common = {name for name, shape in wanted.items() if pieces.get(name) == shape}
    if not common or (not partly and (len(common) < len(wanted) or len(wanted) < len(pieces))):
        return None
    out = rows.new_zeros((target.numel, *rows.shape[1:]))
    source_slices = source.slices()
    for name, part in target.slices().items():
        if name in common:
            out[part] = rows[source_slices[name]]
    return out


def fractions(flags: Tensor, layout: ParameterLayout) -> dict[str, float]:
    """Return the fraction of True among each parameter's entries, by name.

    Args:
        flags: Shape (D,), bool.
        layout: The parameters.
    """
    counts = torch.stack([flags[part].sum() for part in layout.slices().values()]).tolist()
    sizes = [part.stop - part.start for part in layout.slices().values()]
    return {
        name: count / size
        for name, count, size in zip(layout.names, counts, sizes, strict=True)
        if size
    }

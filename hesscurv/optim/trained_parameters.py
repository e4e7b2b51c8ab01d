"""Parameters that a model and an optimizer share, and that a Hessian can be taken of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from hesscurv.objective.parameters import ParamSelection, select_parameters, unwrap

# Names, or a predicate (name, parameter) -> bool, or None for all that can be differentiated twice.
Selection = frozenset[str] | Callable[[str, nn.Parameter], bool] | None


def resolve_selection(model: nn.Module, params: ParamSelection) -> Selection:
    """Return a selection by names where it is not a predicate: parameters may be frozen later.

    Raises:
        ValueError: If a name or a parameter is not the model's, or is frozen.
        TypeError: If `params` is no selection, or a parameter is not of a real floating type.
    """
    if params is None:
        return None
    names = frozenset(select_parameters(model, params))
    return params if callable(params) and not isinstance(params, nn.Module) else names


def trained_parameters(
    model: nn.Module, groups: Iterable[Mapping[str, Any]], selection: Selection
) -> dict[str, nn.Parameter]:
    """Return the parameters of the groups that are the model's, by name, in the model's order.

    Only those that require grad. Without a selection, embeddings with sparse gradients, which
    cannot be differentiated again, are left out, and complex parameters.
    """
    wanted = {id(p) for group in groups for p in group["params"]}
    model = unwrap(model)
    if selection is None:
        wanted -= {
            id(m.weight)
            for m in model.modules()
            if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.sparse
        }
    found = {n: p for n, p in model.named_parameters() if id(p) in wanted and p.requires_grad}
    if selection is None:
        return {name: p for name, p in found.items() if p.is_floating_point()}
    if isinstance(selection, frozenset):
        # torch.nn.utils.prune renames what it prunes.
        return {n: p for n, p in found.items() if {n, n.removesuffix("_orig")} & selection}
    return {name: p for name, p in found.items() if selection(name, p)}


def require_some(found: Mapping[str, nn.Parameter]) -> None:
    """Refuse an optimizer that trains none of the model's parameters.

    Raises:
        ValueError: If there are none.
    """
    if not sum(p.numel() for p in found.values()):
        raise ValueError(
            "expected an optimizer of the model's parameters, got one that has none of those "
            "selected which require grad; build it from this very model's parameters, after "
            "moving or wrapping it"
        )

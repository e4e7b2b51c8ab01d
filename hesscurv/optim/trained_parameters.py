"""Which parameters both a model and an optimizer have, and a Hessian can be taken of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from hesscurv.operators.parameters import ParamSelection, select_parameters, unwrap


def trained_parameters(
    model: nn.Module, groups: Iterable[Mapping[str, Any]], params: ParamSelection
) -> dict[str, nn.Parameter]:
    """Return the parameters of the groups that are the model's, by name, in the model's order.

    Without a selection: all that require grad, but for embeddings with sparse gradients, which
    cannot be differentiated again.

    Raises:
        ValueError: If there are none.
    """
    in_groups = {id(p) for group in groups for p in group["params"]}
    if params is None:
        sparse = {
            id(m.weight)
            for m in unwrap(model).modules()
            if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.sparse
        }
        wanted = in_groups - sparse
        found = {
            name: p
            for name, p in unwrap(model).named_parameters()
            if id(p) in wanted and p.requires_grad
        }
    else:
        selected = select_parameters(model, params)
        found = {name: p for name, p in selected.items() if id(p) in in_groups}
    if not found:
        raise ValueError(
            "expected an optimizer of the model's parameters, got one that has none of those "
            "selected which require grad; build it from this very model's parameters, after "
            "moving or wrapping it"
        )
    return found

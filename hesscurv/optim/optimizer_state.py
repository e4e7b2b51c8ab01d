"""State dicts of an optimizer that keeps more for each parameter than its base does."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from hesscurv.optim.tracked_preconditioner import OWN_STATE


def join_state(
    base: dict[str, Any],
    groups: Iterable[Mapping[str, Any]],
    entries: Mapping[nn.Parameter, dict[str, Tensor]],
) -> dict[str, Any]:
    """Return a base's state dict with entries added to its parameters' states.

    Args:
        base: What its `state_dict` returned; parameters are numbered in the order of the groups.
        groups: Its parameter groups.
        entries: What to add, by parameter.
    """
    state = dict(base["state"])
    for number, p in enumerate(p for group in groups for p in group["params"]):
        if p in entries:
            state[number] = {**state.get(number, {}), **entries[p]}
    return {**base, "state": state}


def split_state(
    state_dict: dict[str, Any],
    groups: Iterable[Mapping[str, Any]],
    parameters: Sequence[nn.Parameter],
) -> tuple[dict[str, Any], list[dict[str, Any] | None]]:
    """Return a base's part of a state dict, and the added entries of some parameters.

    The keys of the state are those in the state dict's own groups, numbers or, from a distributed
    checkpoint, names.

    Returns:
        The base's state dict, and an entry for each of `parameters`; None for all of them where
        the entries are those of other parameters.

    Raises:
        ValueError: If groups or their sizes differ.
    """
    saved = [group["params"] for group in state_dict["param_groups"]]
    present = [group["params"] for group in groups]
    if [len(keys) for keys in saved] != [len(group) for group in present]:
        raise ValueError(
            f"expected a state dict with groups of {[len(group) for group in present]} parameters, "
            f"got {[len(keys) for keys in saved]}; add the same groups before loading"
        )
    key_of = {
        id(p): key
        for keys, group in zip(saved, present, strict=True)
        for key, p in zip(keys, group, strict=True)
    }
    base, found = {}, {}
    for key, entry in state_dict["state"].items():
        base[key] = entry
        if isinstance(entry, Mapping) and any(name in entry for name in OWN_STATE):
            found[key] = {name: entry[name] for name in OWN_STATE if name in entry}
            base[key] = {name: value for name, value in entry.items() if name not in OWN_STATE}
            if not base[key]:  # a base may take an empty state for one that has begun
                del base[key]
    keys = [key_of.get(id(p)) for p in parameters]
    # Parts of the vectors of more parameters, or of fewer, are no eigenspace of these.
    same = set(keys) == set(found)
    return {**state_dict, "state": base}, [found[key] if same else None for key in keys]

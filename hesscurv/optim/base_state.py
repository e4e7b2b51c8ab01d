"""State dicts of an optimizer that keeps more for each parameter than its base does."""

from __future__ import annotations

from collections import ChainMap, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from hesscurv.optim.group_settings import with_prefix
from hesscurv.optim.preconditioner.tracked_preconditioner import OWN_STATE

# Where a base's state dict is that has a form of its own, as those of optimizers around others.
BASE = "curvature_base"


def merged_state(
    base: Mapping[Any, Any], entries: Mapping[nn.Parameter, dict[str, Tensor]]
) -> defaultdict[Any, Any]:
    """Return a base's state with entries added, where what is written to one is the base's."""
    out: defaultdict[Any, Any] = defaultdict(dict, base)
    for p, entry in entries.items():
        out[p] = ChainMap(base[p], entry) if p in base else entry
    return out


def join_state(
    base: dict[str, Any],
    groups: Sequence[Mapping[str, Any]],
    entries: Mapping[nn.Parameter, dict[str, Tensor]],
) -> dict[str, Any]:
    """Return a base's state dict with entries added to its parameters' states.

    One of another form than torch's (a `state` by parameter, and `param_groups`) is put whole
    beside a `state` and `param_groups` of ours.

    Args:
        base: What its `state_dict` returned; parameters are numbered in the order of the groups.
        groups: Its parameter groups.
        entries: What to add, by parameter.
    """
    numbers: dict[nn.Parameter, int] = {}
    for group in groups:
        for p in group["params"]:
            numbers.setdefault(p, len(numbers))
    if not _is_torchs(base):
        packed = [{**g, "params": [numbers[p] for p in g["params"]]} for g in groups]
        base = {BASE: base, "state": {}, "param_groups": packed}
    state = dict(base["state"])
    for p, number in numbers.items():
        if p in entries:
            state[number] = {**state.get(number, {}), **entries[p]}
    return {**base, "state": state}


def split_state(
    state_dict: dict[str, Any],
    groups: Sequence[Mapping[str, Any]],
    parameters: Sequence[nn.Parameter],
) -> tuple[dict[str, Any], list[dict[str, Any] | None], list[dict[str, Any]]]:
    """Return a base's part of a state dict, the added entries of some parameters, and the groups.

    The keys of the state are those in the state dict's own groups, numbers or, from a distributed
    checkpoint, names.

    Returns:
        The base's state dict; an entry for each of `parameters`, None for all of them where the
        entries are those of other parameters; and the saved groups, empty if there are none.

    Raises:
        ValueError: If groups or their sizes differ.
    """
    if not _is_torchs(state_dict):  # of a base alone, in a form of its own
        return state_dict, [None for _ in parameters], []
    saved_groups = [with_prefix(group) for group in state_dict["param_groups"]]
    saved = [group["params"] for group in saved_groups]
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
    entries = [found[key] if same else None for key in keys]
    if BASE in state_dict:
        return state_dict[BASE], entries, saved_groups
    return {**state_dict, "state": base, "param_groups": saved_groups}, entries, saved_groups


def _is_torchs(state_dict: Mapping[str, Any]) -> bool:
    return isinstance(state_dict.get("state"), Mapping) and isinstance(
        state_dict.get("param_groups"), (list, tuple)
    )

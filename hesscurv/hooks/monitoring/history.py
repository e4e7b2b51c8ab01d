"""History of eigenspaces and masks, for comparison with the present ones."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hesscurv.hooks.monitoring.layouts import carry_over
from hesscurv.interface.descriptions import Described
from hesscurv.objective.parameters import ParameterLayout


@dataclass(frozen=True, repr=False)
class Earlier(Described):
    """Basis or mask of one step, on the CPU.

    Args:
        step: The step.
        layout: Its parameters, with dense names.
        rows: A basis (D, k), or a mask (D,).
    """

    step: int
    layout: ParameterLayout
    rows: Tensor

    def on(self, layout: ParameterLayout, device: torch.device) -> Tensor | None:
        """Return the rows for a layout, on a device; None if the parameters differ."""
        rows = carry_over(self.rows, self.layout, layout)
        return None if rows is None else rows.to(device)

    def state_dict(self) -> dict[str, Any]:
        """Return plain values and a tensor."""
        return {"step": self.step, "layout": self.layout.to_dict(), "rows": self.rows.clone()}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> Earlier:
        """Rebuild from a `state_dict`."""
        rows = state["rows"].cpu()
        return cls(int(state["step"]), ParameterLayout.from_dict(state["layout"]), rows)


class History:
    """The first, the last and several recent values of one kind.

    Bases other than the last are kept in float16, whose rounding changes an overlap by about 1e-5
    at most.

    Args:
        most: Number of recent values to keep, in addition to the first and the last.

    Memory: on the CPU, D k float32 for the last basis and D k float16 for each other; D bytes for
    each mask.
    """

    def __init__(self, most: int) -> None:
        self.first: Earlier | None = None
        self.last: Earlier | None = None
        self.kept: deque[Earlier] = deque(maxlen=most)

    def add(self, step: int, layout: ParameterLayout, rows: Tensor) -> None:
        """Add the value of a step, on the CPU; it must not be modified afterwards."""
        self.last = Earlier(step, layout, rows)
        rounded = self.last
        if rows.is_floating_point():
            rounded = Earlier(step, layout, self.last.rows.to(torch.float16))
        if self.first is None:
            self.first = rounded
        if self.kept.maxlen:
            self.kept.append(rounded)

    def state_dict(self) -> dict[str, Any]:
        """Return plain values and tensors."""
        return {
            "first": None if self.first is None else self.first.state_dict(),
            "last": None if self.last is None else self.last.state_dict(),
            "kept": [earlier.state_dict() for earlier in self.kept],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict`, as far as `most` allows."""
        first, last = state["first"], state["last"]
        self.first = None if first is None else Earlier.from_state_dict(first)
        self.last = None if last is None else Earlier.from_state_dict(last)
        self.kept.clear()
        self.kept.extend(map(Earlier.from_state_dict, state["kept"]))

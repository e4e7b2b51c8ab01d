"""LSTM and GRU from elementary operations, since fused CUDA kernels lack forward mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._decomp import decomposition_table
from torch.overrides import TorchFunctionMode


def has_cells(module: nn.Module) -> bool:
    """Whether a module is a recurrent layer or cell with a fused GPU kernel."""
    return isinstance(module, (nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell))


class UnfusedCells(TorchFunctionMode):
    """Compute recurrent layers and cells by their formulas.

    Their fused CUDA kernels have no forward-mode derivative, which would leave only the slowest
    linearizations. Layers use torch's decompositions.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _PLAIN.get(func, func)(*args, **(kwargs or {}))


def _layer(name: str) -> Callable[..., Any]:
    """Return the decomposition of a layer, for padded or packed sequences."""
    overloads = getattr(torch.ops.aten, name)
    plain = {kind: decomposition_table[getattr(overloads, kind)] for kind in ("input", "data")}

    def apply(first: Tensor, second: Any, third: Any, *rest: Any) -> Any:
        # Packed: data, batch_sizes, hx, params; padded: input, hx, params.
        packed = isinstance(third, Tensor) or (isinstance(second, Tensor) and _is_sizes(second))
        return plain["data" if packed else "input"](first, second, third, *rest)

    return apply


def _is_sizes(value: Tensor) -> bool:
    return value.dtype == torch.int64 and value.ndim == 1


def _lstm_cell(
    x: Tensor,
    hidden: tuple[Tensor, Tensor],
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    h, c = hidden
    i, f, g, o = (F.linear(x, w_ih, b_ih) + F.linear(h, w_hh, b_hh)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    return o.sigmoid() * c.tanh(), c


def _gru_cell(
    x: Tensor,
    h: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None = None,
    b_hh: Tensor | None = None,
) -> Tensor:
    r, z, n = F.linear(x, w_ih, b_ih).chunk(3, -1)
    hidden_r, hidden_z, hidden_n = F.linear(h, w_hh, b_hh).chunk(3, -1)
    z = (z + hidden_z).sigmoid()
    n = (n + (r + hidden_r).sigmoid() * hidden_n).tanh()
    return (1 - z) * n + z * h


_PLAIN: dict[Any, Callable[..., Any]] = {
    torch._VF.lstm: _layer("lstm"),
    torch._VF.gru: _layer("gru"),
    torch._VF.lstm_cell: _lstm_cell,
    torch._VF.gru_cell: _gru_cell,
}

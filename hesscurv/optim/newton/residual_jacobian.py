r"""The Jacobian of a closure's residuals from a few backward passes, by weights of each sample.

Where residuals belong to single samples, all rows come at once: a linear layer's weight W is
:math:`W + E_s` for each sample s, with E = 0; the derivative of a sum of residuals by E has the row
of each sample, also where the residuals are made of the net's derivatives. Which sample a residual
belongs to shows in a second backward pass, with the residuals' numbers as weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass
class _Layer:
    """One call of a linear layer: its parameters' places among all, and the samples' own parts."""

    weight: int
    bias: int | None
    own_weights: Tensor
    own_biases: Tensor | None


class SampleWeights:
    """Gives each sample weights of its own in linear layers.

    Args:
        params: The parameters whose rows are asked for.
    """

    def __init__(self, params: Sequence[nn.Parameter]) -> None:
        self._params = list(params)
        self._index = {id(p): i for i, p in enumerate(self._params)}
        self._layers: list[_Layer] = []

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return what `torch.nn.functional.linear` does, with the samples' own weights in it."""
        out = F.linear(x, weight, bias)
        index = self._index.get(id(weight))
        if index is None or x.ndim < 2:
            return out
        n = len(x)
        own_weights = weight.new_zeros(n, *weight.shape).requires_grad_()
        extra = (x.reshape(n, -1, x.shape[-1]) @ own_weights.mT).view_as(out)
        at = None if bias is None else self._index.get(id(bias))
        own_biases = None
        if at is not None:
            own_biases = weight.new_zeros(n, len(weight)).requires_grad_()
            extra = extra + own_biases.view(n, *[1] * (out.ndim - 2), -1)
        self._layers.append(_Layer(index, at, own_weights, own_biases))
        return out + extra

    def jacobian(self, parts: Sequence[Tensor]) -> Tensor | None:
        """Return the rows of all residuals, shape (N, D), in the order of the parameters.

        Args:
            parts: The residuals, as the closure returns them, with their graph.

        Returns:
            None where residuals belong to several samples, or depend on parameters otherwise than
            through linear layers.

        Cost: three backward passes for each part, N D numbers.
        """
        if not self._layers:
            return None
        pieces = []
        for part in parts:
            rows = self._rows(part.reshape(-1))
            if rows is None and part.ndim == 2 and part.shape[1] <= _MOST_COLUMNS:
                columns = [self._rows(column) for column in part.unbind(1)]
                if any(column is None for column in columns):
                    return None
                rows = torch.stack([c for c in columns if c is not None], 1).flatten(0, 1)
            if rows is None:
                return None
            pieces.append(rows)
        J_ND = torch.cat(pieces)
        values = torch.cat([part.reshape(-1) for part in parts])
        return J_ND if self._agrees(J_ND, values) else None

    def _rows(self, values: Tensor) -> Tensor | None:
        """Return the rows of residuals of which each sample has one at most."""
        count = len(values)
        own: list[Tensor] = []
        for layer in self._layers:
            own += [t for t in (layer.own_weights, layer.own_biases) if t is not None]
        numbers = torch.arange(1, count + 1, dtype=values.dtype, device=values.device)
        sums, numbered = (
            torch.autograd.grad(values, own, weights, retain_graph=True, allow_unused=True)
            for weights in (torch.ones_like(values), numbers)
        )
        found = dict(zip(map(id, own), zip(sums, numbered, strict=True), strict=True))
        sizes = [p.numel() for p in self._params]
        out_ND = values.new_zeros(count, sum(sizes))
        for layer in self._layers:
            parts = [(layer.weight, layer.own_weights), (layer.bias, layer.own_biases)]
            known = [(i, *found[id(t)]) for i, t in parts if i is not None and t is not None]
            known = [entry for entry in known if entry[1] is not None]
            if not known:
                continue
            slopes = torch.cat([a.flatten(1) for _, a, _ in known], 1)
            counted = torch.cat([b.flatten(1) for _, _, b in known], 1)
            size = slopes.square().sum(1)
            used = size > 0
            number = ((slopes * counted).sum(1)[used] / size[used]).round()
            gap = (counted[used] - number.unsqueeze(1) * slopes[used]).norm()
            if not float(gap) <= _TOLERANCE * float(counted.norm()):
                return None  # a sample has several of these residuals
            row = (number.long() - 1).clamp(0, count - 1)
            for i, a, _ in known:
                start = sum(sizes[:i])
                out_ND[:, start : start + sizes[i]].index_add_(0, row, a.flatten(1)[used])
        return out_ND

    def _agrees(self, J_ND: Tensor, values: Tensor) -> bool:
        """Whether J^T c is autograd's gradient of c^T r, for random c."""
        generator = torch.Generator().manual_seed(0)
        c = torch.randn(len(values), generator=generator, dtype=torch.float64, device="cpu")
        c = c.to(values)
        slopes: Any = torch.autograd.grad(
            values, self._params, c, retain_graph=True, allow_unused=True
        )
        flat = [
            (torch.zeros_like(p) if s is None else s).reshape(-1)
            for p, s in zip(self._params, slopes, strict=True)
        ]
        expected = torch.cat(flat).detach()
        gap = float((J_ND.mT @ c - expected).norm())
        return gap <= torch.finfo(values.dtype).eps ** 0.5 * float(expected.norm())


_MOST_COLUMNS = 16
_TOLERANCE = 1e-4  # of products with numbers up to N; a residual of another sample is off by 1

r"""The Jacobian of a closure's residuals from a few backward passes, by weights of each sample.

Where residuals belong to single samples, all rows come at once: a linear layer's weight W is
:math:`W + E_s` for each sample s, with E = 0; the derivative of a sum of residuals by E has the row
of each sample, also where the residuals are made of the net's derivatives. Which sample a residual
belongs to shows in a second backward pass, with the residuals' numbers as weights, once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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

    @property
    def num_own(self) -> int:
        """Tensors that samples have of their own."""
        return 1 if self.own_biases is None else 2


@dataclass(frozen=True)
class RowPlaces:
    """Which residual each sample has a part in, by groups of residuals of different samples.

    Args:
        weights: For each group shape (N,): 1 for its residuals, else 0.
        rows: For each group and layer the number of the residual of each sample, -1 for none.
    """

    weights: list[Tensor]
    rows: list[list[Tensor]]


class SampleWeights:
    """Gives each sample weights of its own in linear layers.

    Args:
        params: The parameters whose rows are asked for.
        budget: Bytes that the samples' weights and the rows may take.
    """

    def __init__(self, params: Sequence[nn.Parameter], budget: int) -> None:
        self._params = list(params)
        self._index = {id(p): i for i, p in enumerate(self._params)}
        self._layers: list[_Layer] = []
        self._left = budget

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return what `torch.nn.functional.linear` does, with the samples' own weights in it."""
        out = F.linear(x, weight, bias)
        index = self._index.get(id(weight))
        if index is None or x.ndim < 2:
            return out
        n = len(x)
        self._left -= _COPIES * n * weight.numel() * weight.element_size()
        if self._left < 0:
            self._layers.clear()
            return out
        own_weights = weight.new_zeros(n, *weight.shape).requires_grad_()
        extra = (x.reshape(n, -1, x.shape[-1]) @ own_weights.mT).view_as(out)
        at = None if bias is None else self._index.get(id(bias))
        own_biases = None
        if at is not None:
            own_biases = weight.new_zeros(n, len(weight)).requires_grad_()
            extra = extra + own_biases.view(n, *[1] * (out.ndim - 2), -1)
        self._layers.append(_Layer(index, at, own_weights, own_biases))
        return out + extra

    def jacobian(
        self, parts: Sequence[Tensor], values: Tensor, known: RowPlaces | None
    ) -> tuple[Tensor, list[Tensor | None], RowPlaces] | None:
        """Return J of all residuals, the gradient of their sum of squares, and where rows lie.

        Args:
            parts: The residuals, as the closure returns them, with their graph.
            values: All of them, shape (N,).
            known: What an earlier call returned; the same closure mostly has the same places.

        Returns:
            J, shape (N, D), in the order of the parameters, and 2 J^T r by parameter, None where
            the residuals do not depend on it. None where residuals belong to several samples, or
            depend on parameters otherwise than through linear layers; or where there are too many
            of both, or too little memory.

        Cost: a backward pass for the gradient, with which the rows are compared, and mostly one for
        them; the first time two for each part. N D numbers.
        """
        size = sum(p.numel() for p in self._params)
        if not self._layers or self._left < 0 or min(len(values), size) > _LARGEST:
            return None
        with torch.enable_grad():
            slopes = torch.autograd.grad(
                values, self._params, 2 * values.detach(), retain_graph=True, allow_unused=True
            )
            for places in (known, None):
                if places is None:
                    places = self._find_places(parts)
                if places is None or len(places.rows[0]) != len(self._layers):
                    continue
                J_ND = self._rows(values, places)
                if J_ND is not None and self._agrees(J_ND, values, slopes):
                    return J_ND, list(slopes), places
        return None

    def _find_places(self, parts: Sequence[Tensor]) -> RowPlaces | None:
        """Find out which residual each sample of each layer has a part in."""
        found: list[list[Tensor]] = []
        numbers: list[Tensor] = []
        start = 0
        for part in parts:
            flat = torch.arange(start, start + part.numel(), device=part.device)
            start += part.numel()
            if not part.requires_grad:
                continue
            rows = self._places_of(part.reshape(-1), flat)
            if rows is not None:
                found.append(rows)
                numbers.append(flat)
                continue
            if part.ndim != 2 or part.shape[1] > _MOST_COLUMNS:
                return None
            for column, own in zip(part.unbind(1), flat.view(part.shape).unbind(1), strict=True):
                rows = self._places_of(column, own)
                if rows is None:
                    return None
                found.append(rows)
                numbers.append(own)
        return _group(found, numbers, start) if found else None

    def _places_of(self, values: Tensor, numbers: Tensor) -> list[Tensor] | None:
        """Return for each layer the residual that each of its samples has a part in, -1 for none.

        None where a sample has a part in several of these.
        """
        own = self._own()
        count = torch.arange(1, len(values) + 1, dtype=values.dtype, device=values.device)
        sums, counted = (
            torch.autograd.grad(values, own, weights, retain_graph=True, allow_unused=True)
            for weights in (torch.ones_like(values), count)
        )
        out, at = [], 0
        for layer in self._layers:
            parts = slice(at, at + layer.num_own)
            at += layer.num_own
            pairs = [
                (s.flatten(1), c.flatten(1))
                for s, c in zip(sums[parts], counted[parts], strict=True)
                if s is not None
            ]
            rows = torch.full((len(layer.own_weights),), -1, dtype=torch.long, device=values.device)
            out.append(rows)
            if not pairs:
                continue
            slopes, numbered = (torch.cat(each, 1) for each in zip(*pairs, strict=True))
            size = slopes.square().sum(1)
            used = size > 0
            place = ((slopes * numbered).sum(1)[used] / size[used]).round()
            gap = (numbered[used] - place.unsqueeze(1) * slopes[used]).norm()
            if not float(gap) <= _TOLERANCE * float(numbered.norm()):
                return None
            rows[used] = numbers[(place.long() - 1).clamp(0, len(values) - 1)]
        return out

    def _rows(self, values: Tensor, places: RowPlaces) -> Tensor | None:
        """Return J, by one backward pass for each group of residuals."""
        sizes = [p.numel() for p in self._params]
        J_ND = values.new_zeros(len(values), sum(sizes))
        own = self._own()
        for weights, rows_of_layers in zip(places.weights, places.rows, strict=True):
            if len(weights) != len(values):
                return None
            sums = torch.autograd.grad(
                values, own, weights.to(values), retain_graph=True, allow_unused=True
            )
            at = 0
            for layer, rows in zip(self._layers, rows_of_layers, strict=True):
                if len(rows) != len(layer.own_weights):
                    return None
                used = rows >= 0
                for index in (layer.weight, layer.bias)[: layer.num_own]:
                    piece, start = sums[at], sum(sizes[: index or 0])
                    at += 1
                    if piece is not None and index is not None:
                        target = J_ND[:, start : start + sizes[index]]
                        target.index_add_(0, rows[used], piece.flatten(1)[used])
        return J_ND

    def _own(self) -> list[Tensor]:
        pairs = [(layer.own_weights, layer.own_biases) for layer in self._layers]
        return [t for pair in pairs for t in pair if t is not None]

    def _agrees(self, J_ND: Tensor, values: Tensor, slopes: Sequence[Tensor | None]) -> bool:
        """Whether 2 J^T r is autograd's gradient."""
        parts = zip(self._params, slopes, strict=True)
        expected = torch.cat(
            [(torch.zeros_like(p) if s is None else s).detach().reshape(-1) for p, s in parts]
        )
        gap = float((2 * (J_ND.mT @ values.detach()) - expected).norm())
        # Rounding is relative to what cancels in the gradient.
        size = float(J_ND.norm() * values.detach().norm())
        return gap <= torch.finfo(values.dtype).eps ** 0.75 * size


def _group(found: list[list[Tensor]], numbers: list[Tensor], total: int) -> RowPlaces:
    """Put parts together whose samples differ, so that one backward pass has the rows of all."""
    weights: list[Tensor] = []
    groups: list[list[Tensor]] = []
    for rows_of_layers, own in zip(found, numbers, strict=True):
        for number, group in enumerate(groups):
            both = zip(group, rows_of_layers, strict=True)
            if not any(bool(((a >= 0) & (b >= 0)).any()) for a, b in both):
                groups[number] = [
                    torch.maximum(a, b) for a, b in zip(group, rows_of_layers, strict=True)
                ]
                weights[number][own] = 1
                break
        else:
            groups.append(list(rows_of_layers))
            weights.append(torch.zeros(total, dtype=torch.float64, device=own.device))
            weights[-1][own] = 1
    return RowPlaces(weights, groups)


_MOST_COLUMNS = 16
_COPIES = 6  # of a sample's weights: their parts in the graph, backward passes, the rows
_LARGEST = 2048  # of the matrix that is factorised a few times in each step
_TOLERANCE = 1e-4  # of products with numbers up to N; a residual of another sample is off by 1

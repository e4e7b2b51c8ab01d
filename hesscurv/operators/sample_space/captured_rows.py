"""Rows of all parameters on one batch: from what layers saw, or sample by sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from hesscurv.objective.objective import Objective
from hesscurv.operators.sample_space.layer_rules import Factors, rule_of
from hesscurv.operators.sample_space.output_rows import NoRowsError
from hesscurv.operators.sample_space.sample_gradients import SampleGradients, random_signs
from hesscurv.operators.ways.way import Curvature


@dataclass
class _Use:
    """One call of a layer in the forward pass."""

    module: nn.Module
    names: dict[str, str]  # its selected parameters: own name -> name in the layout
    given: Tensor
    edge: GradientEdge


def capture_rows(
    curvature: Curvature, batch: Any, share: float, names: Sequence[str]
) -> dict[str, Factors]:
    """Return factors of the rows of some parameters on one batch, scaled by the root of its share.

    Parameters of layers with a rule come from one backward pass for each column of the root; what
    these give is compared with autograd's gradient of a random combination. All others, and those
    that differ (shared with something that has no rule, changed by a hook), are differentiated
    sample by sample.

    Args:
        curvature: What is factored.
        batch: The batch, on the device.
        share: Its share in the mean.
        names: The parameters.

    Raises:
        NoRowsError: If the matrix has no rows by sample.
    """
    objective = curvature.objective
    leaves = objective.leaves()
    by_name = dict(zip(objective.layout.names, leaves, strict=True))
    uses: list[_Use] = []
    with objective.environment(), torch.enable_grad():
        with _recording(objective.model, by_name, uses):
            z = objective.outputs(leaves, batch)
        if z.ndim == 0:
            raise NoRowsError("expected outputs with one row a sample, got a scalar")
        columns = curvature.output_rows(z.detach(), batch) * share**0.5
        found = _from_layers(uses, z, columns, set(names))
        if found:
            signs = random_signs((len(z),), z.detach(), torch.Generator().manual_seed(0))
            mix = random_signs((len(columns),), z.detach(), torch.Generator().manual_seed(1))
            wanted = list(found)
            together = torch.einsum("c,n,cn...->n...", mix, signs, columns)
            expected = torch.autograd.grad(
                z, [by_name[n] for n in wanted], together, retain_graph=True, allow_unused=True
            )
            for name in _differing(found, wanted, expected, torch.outer(mix, signs)):
                del found[name]
        left = [name for name in names if name not in found]
        if left and len(columns) and z.requires_grad:
            # Of a parameter that the outputs do not depend on, no sample has a gradient.
            slopes = torch.autograd.grad(
                z, [by_name[n] for n in left], columns[0], allow_unused=True
            )
            unused = [n for n, slope in zip(left, slopes, strict=True) if slope is None]
        else:
            unused = left
        for name in unused:
            rows = columns.new_zeros(len(columns), len(z), by_name[name].numel())
            found[name] = Factors(None, rows)
    left = [name for name in names if name not in found]
    return found | (_sample_by_sample(objective, batch, columns, left) if left else {})


@contextmanager
def _recording(model: nn.Module, leaves: dict[str, Tensor], uses: list[_Use]) -> Iterator[None]:
    """Record each call of a layer that has a rule."""
    own = {id(leaf): name for name, leaf in leaves.items()}

    def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        given = args[0] if args else next(iter(kwargs.values()), None)
        if not (isinstance(given, Tensor) and isinstance(out, Tensor) and out.requires_grad):
            return
        tensors = {n: getattr(module, n, None) for n in ("weight", "bias")}
        names = {n: own[id(t)] for n, t in tensors.items() if id(t) in own}
        if names:
            # The edge is that of the output as it is now: a later operation may write to it.
            uses.append(_Use(module, names, given.detach(), get_gradient_edge(out)))

    handles = [
        module.register_forward_hook(hook, with_kwargs=True)
        for module in model.modules()
        if rule_of(module) is not None
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _from_layers(
    uses: list[_Use], z: Tensor, columns: Tensor, names: set[str]
) -> dict[str, Factors]:
    """Return the factors that rules give; of several uses the places of all."""
    uses = [u for u in uses if names & set(u.names.values()) and len(u.given) == len(z)]
    if not uses or not len(columns):
        return {}
    edges = [use.edge for use in uses]
    passes = [
        torch.autograd.grad(z, edges, column, retain_graph=True, allow_unused=True)
        for column in columns
    ]
    found: dict[str, Factors] = {}
    refused: set[str] = set()
    for use, slopes in zip(uses, zip(*passes, strict=True), strict=True):
        rule, known = rule_of(use.module), [s for s in slopes if s is not None]
        if rule is None or not known:
            continue
        zero = torch.zeros_like(known[0])
        stacked = torch.stack([zero if s is None else s for s in slopes])
        given = rule(use.module, use.given, stacked)
        for own, name in use.names.items():
            if name not in names:
                continue
            if own not in given:
                refused.add(name)
                continue
            try:
                found[name] = given[own] if name not in found else _join(found[name], given[own])
            except ValueError:
                refused.add(name)
    return {name: factors for name, factors in found.items() if name not in refused}


def _join(a: Factors, b: Factors) -> Factors:
    """Return the factors of a parameter that was used twice."""
    if (a.inputs is None) != (b.inputs is None) or a.is_transposed != b.is_transposed:
        raise ValueError("uses of different kinds")
    if a.inputs is None or b.inputs is None:
        return Factors(None, a.slopes + b.slopes)
    inputs, slopes = torch.cat([a.inputs, b.inputs], 1), torch.cat([a.slopes, b.slopes], 2)
    return Factors(inputs, slopes, a.is_transposed)


def _differing(
    found: dict[str, Factors],
    names: list[str],
    expected: Sequence[Tensor | None],
    signs_cn: Tensor,
) -> list[str]:
    """Return the parameters whose rows, combined, are not autograd's gradient."""
    gaps, sizes = {}, {}
    for name, slope in zip(names, expected, strict=True):
        mine = _combine(found[name], signs_cn)
        flat = torch.zeros_like(mine) if slope is None else slope.reshape(-1).to(mine)
        if flat.shape != mine.shape:
            gaps[name], sizes[name] = float("inf"), 0.0
            continue
        gaps[name], sizes[name] = float((mine - flat).norm()), float(flat.norm())
    # Some gradients are zero but for rounding, such as that of a bias before a softmax.
    floor = max(sizes.values(), default=0.0)
    tolerance = torch.finfo(signs_cn.dtype).eps ** 0.5
    return [n for n in names if not gaps[n] <= tolerance * max(sizes[n], 1e-2 * floor)]


def _combine(factors: Factors, signs_cn: Tensor) -> Tensor:
    if factors.inputs is None:
        return torch.einsum("cn,cnp->p", signs_cn, factors.slopes)
    mixed = torch.einsum("cn,cnto->nto", signs_cn, factors.slopes)
    equation = "nti,nto->io" if factors.is_transposed else "nto,nti->oi"
    operands = (factors.inputs, mixed) if factors.is_transposed else (mixed, factors.inputs)
    return torch.einsum(equation, *operands).reshape(-1)


def _sample_by_sample(
    objective: Objective, batch: Any, columns: Tensor, names: list[str]
) -> dict[str, Factors]:
    """Return rows by vectorised gradients of single samples, or by a loop over them.

    Raises:
        NoRowsError: If the model fails on a single sample.
    """
    everything = dict(zip(objective.layout.names, objective.parameters(), strict=True))
    values = {name: everything[name] for name in names}
    with objective.environment(), torch.enable_grad():
        gradients = SampleGradients(objective)
        try:
            parts = [gradients(values, batch, column.flatten(1)) for column in columns]
        except torch.OutOfMemoryError:
            raise
        except (ValueError, RuntimeError) as error:  # batch statistics of a single sample
            raise NoRowsError(
                f"expected a model that takes single samples, got {type(error).__name__}: {error}; "
                "use method='block_krylov'"
            ) from error
    return {
        name: Factors(None, torch.stack([part[name].flatten(1) for part in parts]))
        for name in names
    }

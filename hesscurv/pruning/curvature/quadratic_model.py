"""Quadratic models of the loss: few rows plus a structured rest.

``loss(w + d) - loss(w) ~ 1/2 |R d + r|^2 - 1/2 |r|^2 + mu/2 d^T K d``

R (n, D) are rows of the Gauss-Newton or Fisher matrix of n samples, or the top eigenspace; r gives
the first-order term R^T r; K approximates the curvature outside the span of the rows.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor

from hesscurv.interface.options import Options
from hesscurv.interface.ranges import check_choice, check_count, check_positive
from hesscurv.linalg.woodbury import (
    Block,
    DiagonalBlock,
    KroneckerBlock,
    LowRankPlusBlocks,
    PermutedBlock,
)
from hesscurv.objective.data.batches import split
from hesscurv.objective.objective import Objective
from hesscurv.objective.parameters import ParameterLayout
from hesscurv.operators.sample_space.sample_gradients import (
    MOST_OUTPUTS,
    SampleGradients,
    output_roots,
    output_slopes,
    random_signs,
    refuse_outputs,
)
from hesscurv.pruning.curvature.eigenspace_rows import eigenspace_rows
from hesscurv.pruning.curvature.layer_inputs import has_input_rows, input_covariances
from hesscurv.pruning.curvature.sample_weights import (
    WeighedBatch,
    check_mean_over_samples,
    count_samples,
    weigh,
)
from hesscurv.pruning.weight_axes import axes_of
from hesscurv.pruning.weights import Weight

Rows = Literal["ggn", "fisher", "eigenspace", "both"]
Rest = Literal["kronecker", "diagonal", "isotropic"]
Target = Literal["outputs", "loss"]

logger = logging.getLogger(__name__)

_MOST_AT_ONCE = 32
# Batches on which checks and scales are computed, as representatives of all.
_MOST_LOOKED_AT = 4


@dataclass(frozen=True, repr=False)
class QuadraticModel:
    """A quadratic model of the loss in some weights.

    Args:
        layout: The weights' dense names and shapes, in the vector's order.
        matrix: ``R^T R + mu K``.
        mu: The weight of K; positive.
        residual: r, shape (n,); None for zeros.
        gradient: First-order term in addition to R^T r, shape (D,); None for zeros.
        cost: Number of per-sample gradients; a matvec with the Hessian counts as two.

    Example:
        >>> quadratic = hesscurv.pruning.quadratic_model_of(model, pairs)
        >>> float(quadratic.change(torch.zeros(18).double()))
        0.0
    """

    layout: ParameterLayout
    matrix: LowRankPlusBlocks
    mu: float = 1.0
    residual: Tensor | None = None
    gradient: Tensor | None = None
    cost: int = 0

    @property
    def num_rows(self) -> int:
        """The number of rows of R."""
        return len(self.matrix.rows[0])

    def __repr__(self) -> str:
        """Return a one-line summary."""
        order = self.residual is not None or self.gradient is not None
        return (
            f"QuadraticModel({self.num_rows} rows, {self.layout.numel:,} entries of "
            f"{len(self.layout.names)} weights, mu={self.mu:.3g}, "
            f"{'with' if order else 'without'} a first-order term, "
            f"{self.matrix.rows[0].dtype} on {self.matrix.rows[0].device})"
        )

    def change(self, delta_D: Tensor) -> float:
        """Return the predicted change of the loss for a change of the weights."""
        y_n = self.matrix.rows_times(delta_D)
        parts = delta_D.split([block.numel for block in self.matrix.blocks])
        rest = sum(
            float(part @ block.multiply(part))
            for block, part in zip(self.matrix.blocks, parts, strict=True)
        )
        out = 0.5 * float(y_n @ y_n) + 0.5 * self.mu * rest
        if self.residual is not None:
            out += float(self.residual @ y_n)
        return out if self.gradient is None else out + float(self.gradient @ delta_D)


@dataclass(frozen=True, repr=False)
class Measuring(Options):
    """Options for measuring a `QuadraticModel`.

    A row of "ggn" or "fisher" represents one sample s of a batch b: its own loss, that of a batch
    of one, times the square root of its share in the mean over all samples, ``w_s / sum w_s`` of
    the batch's ``w_b / N`` by `task.weight`. So R^T R is, in expectation over the signs, the matrix
    of `GGNOperator` on these samples. For a language model that counts unmasked tokens, a row is a
    sequence and its share that of its tokens. Samples of zero weight have no row.

    Args:
        rows: "ggn", one random combination per sample of the rows of a square root of the
            Gauss-Newton matrix; "fisher", the gradients of the samples' losses; "eigenspace", the
            top eigenpairs of the Hessian on the samples, ``sqrt|lambda_j| v_j^T``, without a
            first-order term; or "both", half "ggn" and half "eigenspace".
        rest: K: "kronecker", the input covariance of linear and conv layers, scaled by output to
            the trace of the rows; "diagonal", the mean square of the rows by weight; "isotropic".
        damping: Damping of K, relative to its mean diagonal by layer; default 1e-2.
        largest_block: Maximal number of rows of one block of K; default 1024.
        root_floor: For "ggn": damping of the samples' Hessian in the outputs, relative to its mean
            eigenvalue over the samples; positive. The loss of a trained network is nearly flat at
            its confident outputs; the damping preserves these, and outputs that the loss does not
            depend on, such as those of masked tokens.
        target: For "ggn", the target of r: "outputs" of the dense network, or lower "loss". Fisher
            rows always use the loss.
        rank: For "eigenspace" and "both": the number of eigenpairs.

    Raises:
        TypeError: If a number has the wrong type.
        ValueError: If an option is unknown or out of range.

    Example:
        >>> hesscurv.pruning.Measuring(rows="fisher").rows
        'fisher'
    """

    rows: Rows = "ggn"
    rest: Rest = "kronecker"
    damping: float = 1e-2
    largest_block: int = 1024
    root_floor: float = 5.0
    target: Target = "outputs"
    rank: int = 100

    def __post_init__(self) -> None:
        """Check the options."""
        check_choice("rows", self.rows, ("ggn", "fisher", "eigenspace", "both"))
        check_choice("rest", self.rest, ("kronecker", "diagonal", "isotropic"))
        check_choice("target", self.target, ("outputs", "loss"))
        check_positive("damping", self.damping)
        check_positive("root_floor", self.root_floor)
        check_count("largest_block", self.largest_block)
        check_count("rank", self.rank)


def with_rows_that_run(objective: Objective, batch: Any, how: Measuring | None) -> Measuring:
    """Return the given options, or by default rows that support the model's number of outputs.

    Args:
        objective: The model and the task, refreshed.
        batch: Samples, on the device, of which the first is used.
        how: The options; None for the default.

    Raises:
        ValueError: If there are more outputs than the given rows support.
    """
    chosen = how or Measuring()
    if chosen.rows not in ("ggn", "both"):
        return chosen
    with objective.environment(), torch.no_grad():
        out = objective.outputs(objective.parameters(), split(batch, 1)[0])
    if not isinstance(out, Tensor) or (count := prod(out.shape[1:])) <= MOST_OUTPUTS:
        return chosen
    if how is not None:
        refuse_outputs(count)
    logger.warning(
        "a sample has %d outputs, and rows='ggn' takes at most %d: pruning goes on with "
        "options=PruningOptions(measuring=Measuring(rows='fisher'))",
        *(count, MOST_OUTPUTS),
    )
    return replace(chosen, rows="fisher")


def measure_quadratic_model(
    objective: Objective,
    weights: Mapping[str, Weight],
    params: dict[str, Tensor],
    batches: list[Any],
    how: Measuring,
    generator: torch.Generator,
    dense: dict[str, Tensor],
) -> QuadraticModel:
    """Measure the model of a loss around some weights, on some samples.

    Args:
        objective: The model and the task, refreshed; its parameters are those of `weights`.
        weights: The weights by dense name, in the order of the objective's parameters.
        params: Values of these.
        batches: n samples, on the device.
        how: See `Measuring`.
        generator: Source of the random signs.
        dense: The dense weights, whose outputs are the target.

    Raises:
        ValueError: If a batch's loss is not the `task.weight`-weighted mean of its samples' losses,
            no sample has a weight, or the loss does not depend on the weights.

    Cost:
        n gradients, one or two more forward passes, and memory for n D numbers.
    """
    samples = list(weigh(objective, batches))
    n = count_samples(samples)
    values = tuple(params.values())
    rows: list[Tensor] = []
    residual, cost = values[0].new_zeros(0), 0
    if how.rows != "eigenspace":
        for weighed in samples[:_MOST_LOOKED_AT]:
            check_mean_over_samples(objective, values, weighed)
        rows, residual = _sample_rows(objective, params, samples, how, generator, dense)
        cost += n
    if how.rows in ("eigenspace", "both"):
        top, products = eigenspace_rows(objective, values, batches, how.rank, generator)
        # Half of each, so that curvature seen by both is not counted twice.
        share = 0.5**0.5 if rows else 1.0
        if rows:
            top = [torch.cat([r, t]) for r, t in zip(rows, top, strict=True)]
        rows = [part * share for part in top]
        # Eigenspace rows have no first-order term: their residuals are zero.
        missing = len(rows[0]) - len(residual)
        residual = torch.cat([residual, residual.new_zeros(missing)]) * share
        cost += 2 * products * n
    layout = ParameterLayout(tuple(params), tuple(tuple(p.shape) for p in values))
    by_name = dict(zip(params, rows, strict=True))
    blocks = _blocks(objective, weights, params, samples, by_name, how)
    return QuadraticModel(layout, LowRankPlusBlocks(rows, blocks), residual=residual, cost=cost)


def _sample_rows(
    objective: Objective,
    params: dict[str, Tensor],
    samples: list[WeighedBatch],
    how: Measuring,
    generator: torch.Generator,
    dense: dict[str, Tensor],
) -> tuple[list[Tensor], Tensor]:
    """Return one row per sample, (n, p) for each weight, and the residuals (n,)."""
    n = count_samples(samples)
    values = tuple(params.values())
    rows = [p.new_empty(n, p.numel()) for p in values]
    # For Fisher rows r = 1: R^T r is then the weighted sum of the gradients.
    residual = values[0].new_ones(n)
    gradients = SampleGradients(objective)
    stored = dict(zip(objective.layout.names, values, strict=True))
    with objective.environment():
        directions = None
        floor = 0.0 if how.rows == "fisher" else _floor(objective, samples, dense, how)
        start = 0
        for batch, weights_n in _parts(samples, _samples_at_once(objective)):
            stop = start + len(weights_n)
            if how.rows != "fisher":
                directions, residual[start:stop] = _directions(
                    objective, batch, values, dense, floor, how.target, generator
                )
            found = gradients(stored, batch, directions)
            for part, name in zip(rows, stored, strict=True):
                part[start:stop] = found[name].detach().flatten(1)
            start = stop
    weights_n = torch.cat([w for _, w in samples])
    # Square roots of the shares on rows and residual: R^T R and R^T r are both quadratic in them.
    roots_n = (weights_n / weights_n.sum()).sqrt().to(residual)
    for part in rows:
        part *= roots_n[:, None]
    return rows, residual * roots_n


def _directions(
    objective: Objective,
    batch: Any,
    values: tuple[Tensor, ...],
    dense: dict[str, Tensor],
    floor: float,
    target: Target,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Return one combination of outputs per sample, a = S e (n, c), and its residual r (n,).

    ``E[a a^T] = S S^T``, and ``E[a r]`` is the gradient in the outputs: of the distance to the
    dense ones in the metric S S^T, or of the loss.
    """
    with torch.no_grad():
        there = objective.outputs(tuple(dense.values()), batch)
        same = all(a is b for a, b in zip(dense.values(), values, strict=True))
        here = there if same else objective.outputs(values, batch)
    at = there if target == "outputs" else here
    root = output_roots(objective.task_parts, at, batch, floor)
    n, c, _ = root.shape
    signs = random_signs((n, c, 1), root, generator)
    directions = (root @ signs)[:, :, 0]
    if target == "outputs":
        return directions, ((here - there).reshape(n, c) * directions).sum(1)
    # r = e^T S^-1 slope, so that E[a r] = S E[e e^T] S^-1 slope = slope.
    slope = output_slopes(objective.task_parts, here, batch).reshape(n, c, 1)
    return directions, (torch.linalg.solve(root, slope) * signs).sum((1, 2))


def _floor(
    objective: Objective, samples: list[WeighedBatch], params: dict[str, Tensor], how: Measuring
) -> float:
    total = weight = 0.0
    for batch, weights_n in _parts(samples[:_MOST_LOOKED_AT], _MOST_AT_ONCE):
        with torch.no_grad():
            out = objective.outputs(tuple(params.values()), batch)
        root = output_roots(objective.task_parts, out, batch)
        # The mean eigenvalue of S S^T: its trace, the sum of squared entries of S, over c.
        total += float(root.square().mean(1).sum(1).cpu().double() @ weights_n)
        weight += float(weights_n.sum())
    if total == 0:
        raise ValueError(
            "expected a loss with curvature in the outputs for rows='ggn', got one whose Hessian "
            "there is zero, as that of nn.L1Loss or of a saturated softmax; use "
            "options=PruningOptions(measuring=Measuring(rows='fisher'))"
        )
    return how.root_floor * total / weight


def _parts(samples: list[WeighedBatch], size: int) -> Iterator[WeighedBatch]:
    """Split batches and their samples' weights into parts of at most `size` samples."""
    for batch, weights_n in samples:
        yield from zip(split(batch, size), weights_n.split(size), strict=True)


def _blocks(
    objective: Objective,
    weights: Mapping[str, Weight],
    params: dict[str, Tensor],
    samples: list[WeighedBatch],
    rows: dict[str, Tensor],
    how: Measuring,
) -> list[Block]:
    """Return K in blocks, one for each weight."""
    squares = {name: torch.linalg.vector_norm(r, dim=0).square() for name, r in rows.items()}
    mean = float(torch.cat(list(squares.values())).mean())
    if mean == 0:
        raise ValueError("all gradients are zero: the loss does not depend on the weights")
    if how.rest == "isotropic":
        return [DiagonalBlock(torch.full_like(s, mean)) for s in squares.values()]
    covariances = {}
    if how.rest == "kronecker":
        known = {name: w for name, w in weights.items() if has_input_rows(w)}
        covariances = input_covariances(
            objective, tuple(params.values()), samples, known, how.largest_block
        )
    blocks: list[Block] = []
    for name, p in params.items():
        # A layer without gradients gets a fraction of the overall mean, to stay positive definite.
        damping = how.damping * max(float(squares[name].mean()), 1e-3 * mean)
        if name not in covariances:
            blocks.append(DiagonalBlock(squares[name] + damping))
            continue
        a_cii = covariances[name]
        # Scaled by output, so that the diagonal of K sums to that of R^T R over each output.
        trace = float(a_cii.diagonal(dim1=1, dim2=2).sum())
        axes = axes_of(*weights[name], name)
        scale_o = axes.to_matrix(squares[name].view(p.shape)).sum(1) / max(trace, 1e-30)
        # With few samples an output may have no gradient by chance.
        scale_o = scale_o.clamp(min=1e-2 * float(scale_o.mean()))
        block: Block = KroneckerBlock(a_cii, scale_o, damping)
        if (order := axes.order(p.ndim)) != tuple(range(p.ndim)):
            block = PermutedBlock(block, p.shape, order)
        blocks.append(block)
    return blocks


def _samples_at_once(objective: Objective) -> int:
    size = 3 * objective.layout.numel * objective.dtype.itemsize
    return max(1, min(_MOST_AT_ONCE, objective.budget // (4 * size)))

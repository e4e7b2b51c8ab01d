"""Per-sample gradients of losses or of combinations of outputs.

Gradients of the losses are the rows of the empirical Fisher; those of combinations of outputs, with
weights from a square root S of the Hessian of the loss in the outputs, are rows of the Gauss-Newton
matrix: for random signs e, ``E[(J^T S e)(J^T S e)^T] = J^T S S^T J``.

The loss of a sample is that of a batch of one; its weight in the mean is left to `sample_weights`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from math import prod
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.func import grad, vjp, vmap

from hesscurv.objective.data.batches import split
from hesscurv.objective.data.samples import map_tensors, num_samples, tensors_of
from hesscurv.objective.objective import Objective
from hesscurv.objective.running.environment import without_fallback_warnings
from hesscurv.objective.running.plain_embeddings import dense
from hesscurv.objective.tasks import Task

Values = dict[str, Tensor]

MOST_OUTPUTS = 1024
_logger = logging.getLogger(__name__)


class SampleGradients:
    """Per-sample gradients in some of an objective's parameters.

    Use it inside ``objective.environment()``, after ``objective.refresh()``. Samples are vectorised
    by vmap; a random combination of their gradients is compared with that from one backward pass
    over the whole batch. Batches on which these differ are processed sample by sample, and so are
    all batches if vmap has no rule for an operation.

    Args:
        objective: The model, the task and the selected parameters.
    """

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._by_sample = vmapped

    def __call__(self, params: Values, batch: Any, directions: Tensor | None) -> Values:
        """Return each sample's gradient at some parameters, by name, shape (n, *shape).

        Args:
            params: Values by name of the parameters to differentiate; others keep the model's.
            batch: n samples.
            directions: None for the gradients of the samples' losses; otherwise shape (n, c), and
                the gradients are those of ``directions . outputs``.

        Cost: a backward pass for each sample, and one for the batch.
        """
        objective, task = self._objective, self._objective.task_parts
        everything = dict(zip(objective.layout.names, objective.parameters(), strict=True))

        def scalar(values: Values, sample: Any, direction: Tensor | None) -> Tensor:
            out = objective.outputs(tuple((everything | values).values()), sample)
            if direction is not None:
                return (out.flatten() * direction).sum()
            return one_loss(task.sample_losses(out, sample))

        def together(values: Values, signs_n: Tensor) -> Tensor:
            """Combine the samples' scalars, from the outputs of the batch, without vmap."""
            out = objective.outputs(tuple((everything | values).values()), batch)
            if directions is not None:
                return signs_n @ (out.reshape(directions.shape) * directions).sum(1)
            own = [
                _plain_loss(task, row.unsqueeze(0), sample)
                for row, sample in zip(out, split(batch, 1), strict=True)
            ]
            return signs_n @ torch.stack(own)

        with without_fallback_warnings():
            try:
                found = self._by_sample(scalar, params, batch, directions)
                if self._by_sample is one_by_one:
                    return found
                gap = _gap(together, params, found)
                if gap <= _tolerance(found):
                    return found
                # If samples of a batch interact (batch norm), the loop differs from the batch as
                # well and agrees with vmap.
                single = one_by_one(scalar, params, batch, directions)
                _logger.info(
                    "a batch of %d samples is taken one by one, since what vmap returns differs "
                    "by %.1e from the batch's gradient",
                    num_samples(batch),
                    gap,
                )
                return single
            except Exception as error:
                if self._by_sample is one_by_one or isinstance(error, torch.OutOfMemoryError):
                    raise
                # Some operations have no rule for vmap; in a loop all of them have a gradient.
                _logger.info("samples are taken one by one, since vmap failed: %s", error)
                self._by_sample = one_by_one
                return one_by_one(scalar, params, batch, directions)


def _plain_loss(task: Any, row: Tensor, sample: Any) -> Tensor:
    """Return a single sample's loss by `task.loss`, unless the task overrides `sample_losses`."""
    if getattr(type(task), "sample_losses", None) is Task.sample_losses:
        return task.loss(row, sample).reshape(())
    return one_loss(task.sample_losses(row, sample))


def _gap(together: Callable[[Values, Tensor], Tensor], params: Values, found: Values) -> float:
    """Return the relative difference of a combination of gradients from that of the batch."""
    rows = next(iter(found.values()))
    # Random signs, so that errors that cancel in the plain sum do not.
    signs_n = random_signs((len(rows),), rows, torch.Generator().manual_seed(0))
    with torch.enable_grad():
        leaves = {name: t.detach().requires_grad_() for name, t in params.items()}
        slopes = torch.autograd.grad(
            together(leaves, signs_n), list(leaves.values()), allow_unused=True
        )
    square = size = 0.0
    for rows, slope in zip(found.values(), slopes, strict=True):
        rows = rows.detach().flatten(1)
        mine = signs_n.to(rows) @ rows
        expected = torch.zeros_like(mine) if slope is None else dense(slope).reshape(-1)
        square += float((mine - expected).double().square().sum())
        size += float(rows.double().square().sum())
    if not square + size < float("inf"):
        return 0.0  # not finite: refused elsewhere, with a better message
    return (square / size) ** 0.5 if size else square**0.5


def _tolerance(found: Values) -> float:
    # Rounding is a few eps; a wrong vmap rule is off by far more than sqrt(eps).
    return max(torch.finfo(t.dtype).eps for t in found.values()) ** 0.5


def output_roots(task: Any, outputs: Tensor, batch: Any, floor: float = 0.0) -> Tensor:
    """Return the square root S of each sample's loss Hessian in its outputs, shape (n, c, c).

    ``S S^T`` is the Hessian's positive part plus `floor` times the identity.

    Raises:
        ValueError: If there are more than 1024 outputs per sample, or a Hessian is not finite.
    """
    c = prod(outputs.shape[1:])
    if c > MOST_OUTPUTS:
        refuse_outputs(c)
    try:
        # Reverse over reverse: forward mode would use decompositions that torch deprecates.
        curvature = _of_own_loss(_hessian_of, task, outputs, batch)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise ValueError(
            "expected a loss that is twice differentiable in the outputs for rows='ggn', got one "
            f"that is not: {' '.join(str(error).split())[:200]}; use rows='fisher'"
        ) from error
    if not bool(curvature.isfinite().all()):
        raise ValueError(
            "expected a finite Hessian of the loss in the outputs, got NaN or inf; look at the "
            "data and the model's outputs"
        )
    eigenvalues, vectors = torch.linalg.eigh(curvature.detach().reshape(-1, c, c))
    return vectors * (eigenvalues.clamp(min=0) + floor).sqrt()[:, None, :]


def _hessian_of(loss: Callable[..., Tensor], size: int | None) -> Callable[..., Tensor]:
    """Return the Hessian of a loss in its first argument z, flat: shape (z.numel(), *z.shape)."""

    def hessian(z: Tensor, *parts: Tensor) -> Tensor:
        pull: Any = vjp(lambda z: grad(loss)(z, *parts), z)[1]
        # Not jacrev, which creates its unit vectors on the default device (torch 2.6).
        basis = torch.eye(z.numel(), dtype=z.dtype, device=z.device).view(-1, *z.shape)
        columns: Tensor = vmap(lambda e: pull(e)[0], chunk_size=size)(basis)
        return columns

    return hessian


def refuse_outputs(count: int) -> NoReturn:
    """Raise for too many outputs per sample for rows="ggn"."""
    raise ValueError(
        f"expected at most {MOST_OUTPUTS} outputs a sample for rows='ggn', got {count}; use "
        "rows='fisher', in prune_model by "
        "options=PruningOptions(measuring=Measuring(rows='fisher'))"
    )


def output_slopes(task: Any, outputs: Tensor, batch: Any) -> Tensor:
    """Return the gradient of each sample's loss in its outputs, of the outputs' shape."""
    return _of_own_loss(lambda loss, _: grad(loss), task, outputs, batch).detach()


def _of_own_loss(
    derivative: Callable[[Callable[..., Tensor], int | None], Callable[..., Tensor]],
    task: Any,
    outputs: Tensor,
    batch: Any,
) -> Tensor:
    """Return a derivative of each sample's loss in its outputs.

    `derivative` takes the loss and the number of vectors to batch, None for all.
    """
    rows, rebuild = rows_of(batch)
    outputs = outputs.detach()

    def loss(z: Tensor, *parts: Tensor) -> Tensor:
        return one_loss(task.sample_losses(z.unsqueeze(0), rebuild(parts)))

    with without_fallback_warnings():
        try:
            return vmap(derivative(loss, None), randomness="different")(outputs, *rows)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # such as a loss with data-dependent control flow
            _logger.info("samples are taken one by one, since vmap failed: %s", error)
        # A chunk size of 1 is a loop, which needs no vmap rule.
        samples = zip(outputs, *rows, strict=True)
        return torch.stack([derivative(loss, 1)(*sample) for sample in samples])


def random_signs(shape: Sequence[int], like: Tensor, generator: torch.Generator) -> Tensor:
    """Return random signs, drawn on the generator's device, the same for any dtype."""
    drawn = torch.randint(2, tuple(shape), generator=generator, device=generator.device)
    return (2 * drawn - 1).to(like)


def vmapped(
    scalar: Callable[..., Tensor], chosen: Values, batch: Any, directions: Tensor | None
) -> Values:
    """Return each sample's gradient of a scalar function, shape (n, *shape), by vmap."""
    rows, rebuild = rows_of(batch)

    def one(values: Values, direction: Tensor | None, *parts: Tensor) -> Tensor:
        return scalar(values, rebuild(parts), direction)

    in_dims = (None, None if directions is None else 0, *(0 for _ in rows))
    return vmap(grad(one), in_dims, randomness="different")(chosen, directions, *rows)


def one_by_one(
    scalar: Callable[..., Tensor], chosen: Values, batch: Any, directions: Tensor | None
) -> Values:
    """Return the same as `vmapped`, by one backward pass per sample."""
    found = []
    for i, sample in enumerate(split(batch, 1)):
        leaves = {name: t.detach().requires_grad_() for name, t in chosen.items()}
        value = scalar(leaves, sample, None if directions is None else directions[i])
        slopes = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
        found.append([None if s is None else dense(s) for s in slopes])
    return {
        name: torch.stack([torch.zeros_like(t) if s[i] is None else s[i] for s in found])
        for i, (name, t) in enumerate(chosen.items())
    }


def rows_of(batch: Any) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Any]]:
    """Return the tensors with one row per sample, and a function that rebuilds a sample."""
    n = num_samples(batch)

    def has_rows(t: Tensor) -> bool:
        return t.ndim > 0 and t.shape[0] == n

    def rebuild(rows: Sequence[Tensor]) -> Any:
        left = iter(rows)
        return map_tensors(batch, lambda t: next(left).unsqueeze(0) if has_rows(t) else t)

    return [t for t in tensors_of(batch) if has_rows(t)], rebuild


def one_loss(losses: Tensor) -> Tensor:
    """Return the loss of a single sample.

    Raises:
        ValueError: If it is not a single number.
    """
    if losses.shape != (1,):
        raise ValueError(
            f"expected sample_losses of shape (1,) for one sample, got {tuple(losses.shape)}; give "
            "one loss a sample in a subclass of hesscurv.Task"
        )
    return losses[0]

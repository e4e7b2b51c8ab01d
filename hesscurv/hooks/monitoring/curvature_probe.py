"""Probe of a model in training: curvature, weights and masks, on a fixed set of samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hesscurv import spectra
from hesscurv.distributed import Communicator
from hesscurv.distributed.sharded import whole
from hesscurv.eigensolvers import Eigenpairs
from hesscurv.eigensolvers.krylov.plan import narrow_block
from hesscurv.eigensolvers.tracked_eigenspace import RefreshLimit, refresh_eigenspace
from hesscurv.hooks.monitoring.layouts import carry_over, dense_layout, dense_names
from hesscurv.linalg.precision import require_float64
from hesscurv.linalg.projections import project_out_
from hesscurv.objective.data.batches import check_source
from hesscurv.objective.data.curvature_samples import take_samples
from hesscurv.objective.data.samples import map_tensors
from hesscurv.objective.parameters import (
    ParameterLayout,
    ParamSelection,
    layout_of,
    select_parameters,
    unwrap,
)
from hesscurv.operators.curvature_operator import CurvatureOperator
from hesscurv.operators.kinds import OPERATORS
from hesscurv.operators.linear_operator import LinearOperator
from hesscurv.operators.loss_gradient import loss_and_gradient
from hesscurv.operators.summed_operator import device_of

# Bounded from random vectors too: at initialisation, clustered eigenvalues converge slowly.
_COLD = 4  # a cold solve's limit, as a multiple of a refresh's
_LIMIT = RefreshLimit(cold=3 * _COLD, warm=3)
_SEARCH = RefreshLimit(cold=150, warm=50)  # of the largest eigenvalue by value


class Probe:
    """Measures a model on samples that are read once and kept.

    The operator is built on first use, and rebuilt once parameters have other names or shapes, as
    after pruning. Between measurements only the samples are held.

    Args:
        model: The module.
        task: See `CurvatureOperator`.
        batches: Re-iterable batches, or None for a closure.
        params: The selected parameters; those that are pruned later stay selected.
        curvature: "hessian", "ggn" or "fisher".
        samples: Maximal number of samples, from the front of the batches; None takes all.
        tol: Relative tolerance of the eigenpairs.
        max_matvecs: Maximal number of matvecs of a solve with a warm start; None: three for each
            pair. The first solve may take four times as many.
        seed: Seed of random vectors, and of the order of a shuffling loader.
        options: Further arguments of the operator.

    Attributes:
        num_matvecs: Matvecs since `begin`.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Callable[..., Tensor],
        batches: Iterable[Any] | None,
        params: ParamSelection,
        *,
        curvature: str,
        samples: int | None,
        tol: float,
        max_matvecs: int | None,
        seed: int,
        options: dict[str, Any],
    ) -> None:
        self.model, self.task, self.max_matvecs = model, task, max_matvecs
        self._kind = OPERATORS[curvature]
        self.tol, self.seed, self.options = tol, seed, options
        selected = select_parameters(model, params)
        self._wanted = None if params is None else set(dense_names(tuple(selected)))
        self._batches: list[Any] | None = None
        if batches is not None:
            read = take_samples(batches, [samples], seed)[0]
            self._batches = [map_tensors(batch, _copied) for batch in read]
            if not read and self.ranks.size == 1:
                raise ValueError("expected at least one probe batch, got none")
        self._operator: CurvatureOperator | None = None
        self.num_matvecs = 0

    @property
    def ranks(self) -> Communicator:
        """The processes that measure together."""
        return Communicator.of(self.options.get("process_group"), device_of(self.model))

    def selected(self) -> dict[str, nn.Parameter]:
        """Return the measured parameters, by their present names."""
        found = {n: p for n, p in unwrap(self.model).named_parameters() if p.requires_grad}
        if self._wanted is not None:
            dense = dense_names(tuple(found))
            found = {n: found[n] for n, d in zip(found, dense, strict=True) if d in self._wanted}
        return select_parameters(self.model, list(found) or None)

    def weights(self) -> tuple[Tensor, ParameterLayout]:
        """Return the present weights (D,), zero where they are pruned, and the dense layout.

        Collective, with the same result on all ranks: sharded parameters are gathered.
        """
        selected, values = self.selected(), []
        for name, p in selected.items():
            value, mask = whole(p.detach()), self._mask_of(name)
            value = (value if mask is None else value * mask).flatten()
            values.append(value.to(torch.promote_types(value.dtype, torch.float32)))
        return torch.cat(values), dense_layout(layout_of(selected))

    def _mask_of(self, name: str) -> Tensor | None:
        """Return the mask that torch.nn.utils.prune has for a parameter of this name, if any."""
        path, _, own = name.rpartition(".")
        if not own.endswith("_orig"):
            return None
        module = unwrap(self.model).get_submodule(path)
        mask = module._buffers.get(own.removesuffix("_orig") + "_mask")
        return None if mask is None else whole(mask)

    @property
    def operator(self) -> CurvatureOperator:
        """The curvature operator at the present parameters."""
        selected = self.selected()
        if self._operator is None or self._operator.layout != layout_of(selected):
            self._operator = None
            device = device_of(self.model)
            if self._batches is not None:  # from here on, there
                self._batches = [map_tensors(b, partial(_moved, device)) for b in self._batches]
            self._operator = self._kind(
                self.model, self.task, self._batches, params=list(selected), **self.options
            )
        return self._operator

    def loss_and_gradient(self) -> tuple[float, Tensor]:
        """Return the mean loss on the samples and its gradient (D,)."""
        return loss_and_gradient(self.operator)

    def solve(
        self, count: int, seed: int, initial: Tensor | None, source: ParameterLayout | None
    ) -> Eigenpairs:
        """Return the top `count` pairs at the present weights.

        Args:
            count: Number of pairs; fewer if D is smaller.
            seed: Seed, distinct for each solve.
            initial: Vectors (D', k) for a warm start, or None.
            source: Their layout, with dense names.
        """
        H = self.operator
        count = min(count, H.shape[0])
        if initial is not None and source is not None:
            initial = self._start(initial, source)
        is_warm = initial is not None
        most = _LIMIT.matvecs(count, is_warm)
        if self.max_matvecs is not None:
            most = max(count, self.max_matvecs) * (1 if is_warm else _COLD)
        return self._refresh(count, seed, initial, most, block_size=narrow_block(count, count))

    def largest(
        self, pairs: Eigenpairs, seed: int, initial: Tensor | None, source: ParameterLayout | None
    ) -> Eigenpairs | None:
        """Return the largest eigenvalue by value, if it is not among the top pairs.

        A positive eigenvalue among the top pairs by magnitude is the largest of all. If all of
        these are negative, a separate solve searches the other end of the spectrum.

        Args:
            pairs: The top pairs at the present weights.
            seed: As in `solve`.
            initial: Its vector (D', 1) from the last search, or None.
            source: As in `solve`.

        Returns:
            None if it is among the top pairs; otherwise a single pair.

        Cost: where it is looked for, at most 150 matvecs, 50 with a vector to start from.
        """
        H = self.operator
        if len(pairs) == H.shape[0] or float(pairs.eigenvalues.max()) >= 0:
            return None
        if initial is not None and source is not None:
            initial = self._start(initial, source)
        most = _SEARCH.matvecs(1, initial is not None)
        return self._refresh(1, seed, initial, most, which="LA", block_size=min(4, H.shape[0]))

    def trace(self, pairs: Eigenpairs, num_matvecs: int, seed: int) -> tuple[float, float]:
        """Return an estimate of the trace and its standard error.

        The part of the top space is known; the rest is estimated with random signs.
        """
        H, V_kD = self.operator, pairs.eigenvectors.mT.contiguous()
        top = float(pairs.eigenvalues.double().sum())
        if len(pairs) == H.shape[0]:
            return top, 0.0
        rest = spectra.trace(
            _Outside(H, V_kD),
            num_matvecs,
            method="hutchinson",
            generator=torch.Generator().manual_seed(self.seed + seed),
        )
        return top + rest.value, rest.standard_error

    def begin(self) -> None:
        """Start counting the matvecs of a measurement."""
        self._counted = 0 if self._operator is None else self._operator.num_matvecs

    def end(self) -> int:
        """Free memory for training; return the matvecs since `begin`."""
        if self._operator is None:
            return 0
        self._operator.release()
        return self._operator.num_matvecs - self._counted

    def forget(self) -> None:
        """Rebuild the operator on its next use."""
        self._operator = None

    def _refresh(
        self, count: int, seed: int, initial: Tensor | None, most: int, **options: Any
    ) -> Eigenpairs:
        return refresh_eigenspace(
            self.operator,
            count,
            max_matvecs=most,
            tol=self.tol,
            generator=torch.Generator().manual_seed(self.seed + seed),
            initial=initial,
            verify_cold=True,
            **options,
        )

    def _start(self, initial: Tensor, source: ParameterLayout) -> Tensor | None:
        """Return warm-start vectors over the present parameters, zero where pruned or new."""
        selected, H = self.selected(), self.operator
        masks = [self._mask_of(name) for name in selected]
        with self.ranks.together("carrying the eigenspace over"):
            start = carry_over(initial, source, dense_layout(layout_of(selected)), partly=True)
            if start is None:
                return None
            start = start.to(H.device, H.dtype, copy=any(m is not None for m in masks))
            for part, mask in zip(H.layout.slices().values(), masks, strict=True):
                if mask is not None:
                    start[part] *= mask.reshape(-1, 1).to(start)
            return start if bool(start.any()) else None


def check_model(model: Any, task: Any, curvature: Any, batches: Any) -> None:
    """Check that curvature can be measured.

    Raises:
        TypeError: If the model is not a module, the task is not callable or lacks the parts that
            the curvature needs, or the batches cannot be read.
        ValueError: If the curvature is unknown, the batches are a single one, or the model is on a
            device without float64.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, got {type(model).__name__}")
    if not callable(task):
        raise TypeError(
            f"expected a task (model, batch) -> scalar mean loss, got {type(task).__name__}; for a "
            "loss module use hesscurv.supervised(loss)"
        )
    if curvature not in OPERATORS:
        raise ValueError(f"expected curvature among {list(OPERATORS)}, got {curvature!r}")
    parts = hasattr(task, "outputs") and hasattr(task, "loss")
    if curvature != "hessian" and (batches is None or not parts):
        raise TypeError(
            f"curvature={curvature!r} needs batches and a task with the parts outputs and loss, as "
            "hesscurv.supervised(loss) has; curvature='hessian' takes any callable"
        )
    check_source(batches)
    for device in {p.device for p in model.parameters()}:
        require_float64(device)


class _Outside(LinearOperator):
    """P H P with the projector P onto the complement of some orthonormal vectors."""

    def __init__(self, H: CurvatureOperator, V_kD: Tensor) -> None:
        super().__init__(H.shape[0], H.dtype, H.device)
        self.communicator = H.communicator
        self._H, self._V_kD = H, V_kD

    def _matmat(self, vectors_DB: Tensor) -> Tensor:
        inside_BD = vectors_DB.mT.clone()
        project_out_(inside_BD, [self._V_kD])
        out_BD = (self._H @ inside_BD.mT).mT.contiguous()
        project_out_(out_BD, [self._V_kD])
        return out_BD.mT


def _moved(device: torch.device | None, tensor: Tensor) -> Tensor:
    return tensor.detach().to(device).requires_grad_(tensor.requires_grad)


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)

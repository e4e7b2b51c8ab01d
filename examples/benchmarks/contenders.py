"""The other ways to multiply with a Hessian: curvlinops, and plain double backward.

Import it; it is not run. Both are used in their best settings: data in memory, checks off, the
number of samples given, attention without its fused kernels (which have no second derivative), and
blocks cut into the width that a measurement finds fastest.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from typing import Any

import torch
from models import Problem
from timing import wait_for
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

WIDTHS = (1, 4, 8, 16, 32, 64)


class DoubleBackward:
    """Products by two backward passes, the gradient's graph built anew for every vector."""

    def __init__(self, problem: Problem) -> None:
        self.shape = (problem.size, problem.size)
        self.dtype = problem.params[0].dtype
        self.device = problem.params[0].device
        self._problem = problem

    def __matmul__(self, V: Tensor) -> Tensor:
        if V.ndim == 1:
            return self._product(V)
        return torch.stack([self._product(v) for v in V.mT.contiguous()]).mT

    def _product(self, v: Tensor) -> Tensor:
        params = self._problem.params
        parts = v.split([p.numel() for p in params])
        pieces = [part.view_as(p) for part, p in zip(parts, params, strict=True)]
        out = torch.zeros_like(v)
        for inputs, targets in self._problem.batches:
            loss = self._problem.loss_fn(self._problem.model(inputs), targets)
            slopes = torch.autograd.grad(loss, params, create_graph=True)
            product = torch.autograd.grad(slopes, params, pieces)
            flat = torch.cat([piece.reshape(-1) for piece in product])
            out.add_(flat, alpha=len(inputs) / self._problem.num_samples)
        return out


class Counted:
    """An operator whose products are counted and taken at most `width` at a time.

    It has what hesscurv and skerch look for: `shape`, `dtype`, `device` and ``@``.
    """

    def __init__(self, operator: Any, width: int | None = None) -> None:
        self.shape, self.dtype, self.device = operator.shape, operator.dtype, operator.device
        self.num_matvecs = 0
        self.width = width
        self._operator = operator

    def __matmul__(self, V: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            if V.ndim == 1:
                self.num_matvecs += 1
                return (self._operator @ V).detach()
            self.num_matvecs += V.shape[1]
            if self.width is None or V.shape[1] <= self.width:
                return (self._operator @ V).detach()
            return torch.cat(
                [(self._operator @ part).detach() for part in V.split(self.width, 1)], 1
            )


def is_installed(*packages: str) -> bool:
    """Return whether packages can be imported; say which cannot."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        print(f"left out for want of {', '.join(missing)}: pip install 'hesscurv[bench]'")
    return not missing


def curvlinops_hessian(problem: Problem) -> Any:
    """Return curvlinops' Hessian operator."""
    from curvlinops import HessianLinearOperator

    return HessianLinearOperator(
        problem.model,
        problem.loss_fn,
        problem.params,
        problem.batches,
        check_deterministic=False,
        num_data=problem.num_samples,
    )


def fastest_width(operator: Any, most: int, rounds: int = 3) -> int:
    """Return how many vectors at once, up to `most`, cost an operator the least per vector.

    Those that the device has no memory for are left out, unless a single one is too many.
    """
    best: dict[int, float] = {}
    for width in [w for w in WIDTHS if w < most] + [most]:
        block, chunked = block_of_vectors(operator, width), Counted(operator)
        times: list[float] = []
        try:
            chunked @ block
            while len(times) < rounds and sum(times) < 5:
                wait_for(operator.device)
                start = time.perf_counter()
                chunked @ block
                wait_for(operator.device)
                times.append(time.perf_counter() - start)
        except torch.OutOfMemoryError:
            if not best:
                raise
            break
        best[width] = min(times) / width
        if best[width] > 1.7 * min(best.values()):
            break  # wider is worse still
    return min(best, key=lambda width: best[width])


def block_of_vectors(operator: Any, width: int) -> Tensor:
    """Return random vectors (D, width), each contiguous: the order that suits all contenders."""
    device = operator.device
    generator = torch.Generator(device).manual_seed(width)
    size = (width, operator.shape[0])
    return torch.randn(size, generator=generator, dtype=operator.dtype, device=device).mT


def fastest_operator(problem: Problem) -> tuple[str, Callable[[], Any], int | None]:
    """Return the faster of curvlinops' operator, at its best width, and plain double backward."""
    peer, plain = curvlinops_hessian(problem), DoubleBackward(problem)
    width = fastest_width(peer, 64)
    seconds = {}
    for name, operator in [("curvlinops", Counted(peer, width)), ("double backward", plain)]:
        block = block_of_vectors(operator, 64)
        start = time.perf_counter()
        operator @ block
        seconds[name] = time.perf_counter() - start
    if min(seconds, key=lambda name: seconds[name]) == "curvlinops":
        return "curvlinops", lambda: curvlinops_hessian(problem), width
    return "double backward", lambda: DoubleBackward(problem), None


def scipy_eigenpairs(
    problem: Problem, k: int, dtype: type | None = None, ncv: int | None = None
) -> tuple[Tensor, Tensor, int]:
    """Solve by SciPy's eigsh on the host, with products of curvlinops' operator, which are counted.

    Args:
        problem: The problem.
        k: The number of pairs.
        dtype: NumPy's dtype of the vectors; None for the operator's own.
        ncv: The number of Lanczos vectors; None for SciPy's choice.

    Returns:
        Eigenvalues (k,) and vectors (D, k), by magnitude, and the number of products.
    """
    import numpy as np
    from scipy.sparse.linalg import LinearOperator, eigsh

    operator = curvlinops_hessian(problem).to_scipy(dtype=dtype)
    products = 0

    def multiply(v: Any) -> Any:
        nonlocal products
        products += 1
        return operator.matvec(v)

    counted = LinearOperator(operator.shape, matvec=multiply, dtype=operator.dtype)
    start = np.random.default_rng(0).standard_normal(problem.size).astype(operator.dtype)
    values, vectors = eigsh(counted, k, which="LM", tol=1e-3, ncv=ncv, v0=start)
    order = np.argsort(-np.abs(values))
    vectors = torch.from_numpy(np.ascontiguousarray(vectors[:, order]))
    return torch.from_numpy(values[order].copy()), vectors, products

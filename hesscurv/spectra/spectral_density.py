"""Stochastic Lanczos quadrature: spectral density and expectations over a whole spectrum."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hesscurv.distributed.sharded import whole
from hesscurv.eigensolvers.counted_operator import CountedOperator
from hesscurv.eigensolvers.eigenpairs import Eigenpairs
from hesscurv.interface.descriptions import describe_object
from hesscurv.interface.notebook_html import Points, draw_points, notebook_html
from hesscurv.interface.ranges import check_choice, check_count
from hesscurv.linalg.random_matrices import KINDS, default_generator, draw_seed, make_test_matrix
from hesscurv.operators.matrix_operators import as_floating_operator
from hesscurv.spectra.lanczos import Tridiagonal, lanczos


class Estimate(NamedTuple):
    """An estimate and its standard error over the probes, of the same shape, float64.

    Attributes:
        value: The mean over the probes.
        standard_error: Its estimated standard deviation; NaN for a single probe.

    Example:
        >>> value, standard_error = hesscurv.spectral_density(H).moment(1)
        >>> value.shape
        torch.Size([])
    """

    value: Tensor
    standard_error: Tensor

    def __repr__(self) -> str:
        """Return the value and its error, tensors by their shape."""
        return describe_object(self, **self._asdict())


@dataclass(frozen=True, eq=False, repr=False)
class SpectralDensity:
    """Spectral density of H from p probes: nodes and weights of a quadrature for each.

    ``tr f(H) ~ sum_i f(lambda_i) + (D - k) mean_p sum_j w_pj f(x_pj)``, the first sum over k known
    eigenvalues. All methods are sums over the stored nodes, without matvecs. Standard errors
    measure the scatter of the probes. They do not include the error of a quadrature with n nodes,
    which all probes share: zero for polynomials up to degree 2 n - 1, and small for functions that
    vary little between neighbouring nodes.

    Args:
        nodes: Shape (p, n), float64 on the CPU, ascending: each probe's Ritz values. A process that
            ended early repeats its last one with weight 0.
        weights: Shape (p, n), nonnegative; each row sums to 1.
        eigenvalues: Shape (k,): the known, deflated ones; empty by default.
        dim: D, the number of eigenvalues.
        num_matvecs: Matvecs with H.
        info: Plain values about the run.

    Example:
        >>> A = torch.diag(torch.tensor([1.0, 2.0, 3.0]))
        >>> density = hesscurv.spectral_density(A, num_probes=4)
        >>> round(float(density.moment(1).value), 4)
        2.0
    """

    nodes: Tensor
    weights: Tensor
    eigenvalues: Tensor
    dim: int
    num_matvecs: int
    info: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        """Return sizes, range of the spectrum and cost."""
        probes, steps = self.nodes.shape
        low, high = self.range if self.nodes.numel() else (math.nan, math.nan)
        return describe_object(
            self,
            D=self.dim,
            num_probes=probes,
            num_steps=steps,
            num_known=len(self.eigenvalues),
            range=(low, high),
            num_matvecs=self.num_matvecs,
        )

    def _repr_html_(self) -> str:
        """Show sizes, range of the spectrum, cost, and the smoothed density."""
        probes, steps = self.nodes.shape
        facts = {"D": self.dim, "probes": probes, "steps": steps, "known": len(self.eigenvalues)}
        facts["products"] = self.num_matvecs
        drawing = ""
        if self.nodes.numel():
            grid = self.grid(200)
            values = self.density(grid).value
            values = values.clamp(min=1e-6 * float(values.max()))  # Gaussian tails say nothing
            line = Points("density", grid.tolist(), values.tolist(), joined=True)
            drawing = draw_points([line], x="eigenvalue", y="density", logarithmic=True)
        return notebook_html("Spectral density", facts, drawing=drawing)

    def expectation(self, fn: Callable[[Tensor], Tensor]) -> Estimate:
        """Estimate the mean of a function over the eigenvalues, ``tr f(H) / D``.

        Args:
            fn: Maps float64 eigenvalues (...) to values (...), entrywise. Times D, the identity
                gives the trace, `torch.log` the log-determinant of a positive definite H.

        Returns:
            The mean (), and its standard error.

        Raises:
            ValueError: If the function is not finite at a node.
        """
        # Nodes of zero weight are copies of others, so they add no points to the domain of fn.
        values, known = fn(self.nodes), fn(self.eigenvalues)
        if not (values.isfinite().all() and known.isfinite().all()):
            low, high = self.range
            raise ValueError(
                f"expected a function that is finite on all Ritz values, which lie in [{low:.6g}, "
                f"{high:.6g}]; got NaN or inf; shift or clamp its argument"
            )
        return self._mean((self.weights * values).sum(dim=1), known.sum())

    def moment(self, power: int) -> Estimate:
        """Estimate the mean of ``lambda^power`` over the eigenvalues, ``tr H^power / D``.

        Free of quadrature error up to power 2 n - 1.

        Args:
            power: A nonnegative integer.

        Returns:
            The moment (), and its standard error.

        Raises:
            ValueError: If power is negative.
            TypeError: If power is not an int.
        """
        check_count("power", power, least=0)
        return self.expectation(lambda x: x**power)

    def cumulative(self, x: Any) -> Estimate:
        """Estimate the number of eigenvalues at or below x.

        ``N(x) ~ #{lambda_i <= x} + (D - k) mean_p sum_{nodes <= x} w``. A step function with steps
        at the nodes, about D/n high in the bulk; N is off by up to one step, in addition to its
        standard error.

        Args:
            x: A number, or a tensor of any shape.

        Returns:
            The number, of x's shape, between 0 and D, and its standard error.
        """
        x = torch.as_tensor(x, dtype=torch.float64, device="cpu")
        points = x.flatten().contiguous()
        # A leading zero for points below all nodes; right=True counts a node at the point itself.
        sums = torch.nn.functional.pad(self.weights.cumsum(dim=1), (1, 0))
        index = torch.searchsorted(self.nodes, points.repeat(len(self.nodes), 1), right=True)
        known = (self.eigenvalues <= points[:, None]).sum(dim=1).double()
        mean, error = self._mean(sums.gather(1, index), known)
        return Estimate((self.dim * mean).view_as(x), (self.dim * error).view_as(x))

    def density(self, grid: Tensor | None = None, sigma: float | None = None) -> Estimate:
        """Estimate the density of the eigenvalues, smoothed by a Gaussian; it integrates to 1.

        ``phi(t) = (1/D) sum_i g(t - lambda_i)``, g the normal density with deviation sigma.

        Args:
            grid: Shape (G,): the points t; default `grid()`.
            sigma: Positive, in units of the eigenvalues; default `default_sigma`. With a narrower
                one, single nodes show, which are not eigenvalues except at the ends.

        Returns:
            Shape (G,), in inverse units of the eigenvalues, and its standard error.

        Raises:
            ValueError: If sigma is not positive and finite.
        """
        sigma = self.default_sigma if sigma is None else float(sigma)
        if not 0 < sigma < math.inf:
            raise ValueError(f"expected a positive finite sigma, got {sigma}")
        grid = self.grid() if grid is None else grid
        t_G = torch.as_tensor(grid, dtype=torch.float64, device="cpu")

        def smoothed(x: Tensor, weights: Tensor) -> Tensor:
            bumps = torch.exp(-0.5 * ((t_G[:, None] - x) / sigma) ** 2)
            return bumps @ weights / (sigma * math.sqrt(2 * math.pi))

        # One probe at a time: G n temporaries instead of p G n.
        rows = [smoothed(x, w) for x, w in zip(self.nodes, self.weights, strict=True)]
        known = smoothed(self.eigenvalues, torch.ones_like(self.eigenvalues))
        return self._mean(torch.stack(rows), known)

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and largest node or known eigenvalue, both within the spectrum of H."""
        points = torch.cat([self.nodes.flatten(), self.eigenvalues])
        return points.min().item(), points.max().item()

    @property
    def default_sigma(self) -> float:
        """Default smoothing, which bridges the gaps between n nodes: ``(pi / 4) width / n``.

        Half the distance of n Chebyshev nodes in the middle of the spectrum, which leaves a ripple
        of 1.4 % there. The width of a single point is taken as 1 % of its magnitude.
        """
        return math.pi / 4 * self._width() / self.nodes.shape[1]

    def grid(self, num_points: int = 1024, margin: float = 0.05) -> Tensor:
        """Return points that cover the spectrum and a margin on both sides for the smoothing.

        Args:
            num_points: G, at least 2; default 1024.
            margin: Relative to the width of the spectrum, nonnegative; default 0.05. At least four
                default sigmas are added.

        Returns:
            Shape (G,), float64 on the CPU, equally spaced.

        Raises:
            ValueError: If an argument is out of range.
            TypeError: If num_points is not an int.
        """
        check_count("num_points", num_points, least=2)
        if not 0 <= margin < math.inf:
            raise ValueError(f"expected a finite margin >= 0, got {margin}")
        low, high = self.range
        extra = max(margin * self._width(), 4 * self.default_sigma)
        return torch.linspace(
            low - extra, high + extra, num_points, dtype=torch.float64, device="cpu"
        )

    def _width(self) -> float:
        low, high = self.range
        scale = max(abs(low), abs(high))
        # A single point, up to rounding, has no width: use its magnitude.
        return high - low if high - low > 1e-6 * scale else 0.01 * scale or 0.01

    def _mean(self, per_probe: Tensor, known: Tensor) -> Estimate:
        """Average over the probes and add the known part, as a mean over all eigenvalues."""
        # A unit probe stands for the D - k unknown eigenvalues; the known part has no scatter.
        share = 1 - len(self.eigenvalues) / self.dim
        p = len(per_probe)
        error = per_probe.std(dim=0, correction=1) if p > 1 else per_probe[0] * math.nan
        return Estimate(
            share * per_probe.mean(dim=0) + known / self.dim, share * error / math.sqrt(p)
        )


def spectral_density(
    H: Any,
    num_steps: int = 80,
    num_probes: int = 10,
    *,
    measurements: str = "rademacher",
    reorthogonalize: bool = True,
    eigenpairs: Eigenpairs | None = None,
    generator: torch.Generator | None = None,
    block_size: int = 8,
    progress: bool = False,
) -> SpectralDensity:
    """Estimate the spectral density of a symmetric operator by stochastic Lanczos quadrature.

    ``tr f(H) = D E[v^T f(H) v] ~ (D/p) sum_p sum_j w_pj f(x_pj)`` for random unit vectors v, with
    the nodes x and weights w of n Lanczos steps from each. The density has ``f = g(t - .)``, a
    Gaussian; grid and smoothing are chosen afterwards, on the result.

    Args:
        H: A hesscurv operator, a dense symmetric tensor (D, D), or any object with `shape`,
            `dtype`, `device` and ``@`` on tensors (D,) and (D, b); float32 or float64.
        num_steps: n, the nodes of a probe, at least 1 and effectively at most D - k; default 80.
            They set the resolution: the nodes lie about ``width / n`` apart, closer at both ends.
        num_probes: p, at least 1; default 10; error bars need 2. They set the scatter, which falls
            as 1 / sqrt(p D) for smooth functions.
        measurements: "rademacher" (default: the least scatter), "gaussian" or "ssrft", each
            normalised; "ssrft" probes are orthogonal, at most D.
        reorthogonalize: Whether to orthogonalise each Lanczos vector against all earlier ones;
            default True. That takes block_size n D floats. Otherwise five vectors per probe of a
            group suffice, and converged eigenvalues reappear (ghosts): the weights of a node and
            its ghosts sum to the right one, so density, counts and traces stay right, but the steps
            spent on ghosts do not resolve the bulk.
        eigenpairs: Known pairs, which are counted exactly and projected out of probes and products,
            so that the probes see only the other D - k eigenvalues. The eigenvalues are used as
            given, with errors up to their residuals. The estimates are unbiased with "gaussian"
            probes, and have a relative bias of sqrt(k) / D with others.
        generator: Source of the probes' seed; default a new one with seed 0. The global generator
            is never used.
        block_size: Maximal number of probes, and matvecs, per block; default 8. The probes are
            split into groups of equal size.
        progress: Whether to show a progress bar over the matvecs, see `eigsh`.

    Returns:
        Nodes and weights, with `density`, `cumulative`, `moment` and `expectation`, each with a
        standard error over the probes.

    Raises:
        TypeError: If H is not an operator, or not float32 or float64, or an argument has the wrong
            type.
        ValueError: If an argument is out of range, or a product has NaN or inf entries.

    Cost: p n matvecs, fewer if a process finds an invariant subspace. With reorthogonalisation
    block_size n D floats and p n^2 D multiply-adds.

    References:
        Ubaru, Chen, Saad, "Fast estimation of tr(f(A)) via stochastic Lanczos quadrature", SIAM J.
        Matrix Anal. Appl. 38 (2017), algorithm 1.
        Ghorbani, Krishnan, Xiao, "An investigation into neural net optimization via Hessian
        eigenvalue density", ICML 2019, algorithms 1 and 2.
        Papyan, "The full spectrum of deepnet Hessians at scale" (2018), arXiv 1811.07062:
        deflation of the outliers.
        Chen, Trogdon, Ubaru, "Analysis of stochastic Lanczos quadrature for spectrum
        approximation", ICML 2021: the error of `cumulative`.

    Example:
        >>> density = hesscurv.spectral_density(H, num_steps=10, num_probes=4)
        >>> x = density.grid()
        >>> values, errors = density.density(x)
        >>> values.shape == x.shape, bool((values >= 0).all())
        (True, True)
    """
    H = as_floating_operator(H)
    dim = H.shape[0]
    check_count("num_steps", num_steps)
    check_count("num_probes", num_probes)
    check_count("block_size", block_size)
    check_choice("measurements", measurements, tuple(KINDS))
    known, slabs = _known_part(eigenpairs, dim)
    num_steps = min(num_steps, dim - len(known))
    generator = default_generator(generator)
    probes = make_test_matrix(
        measurements, dim, num_probes, draw_seed(generator), H.dtype, H.device
    )
    # Equal groups instead of full blocks and a remainder: the same number of products, in less
    # memory.
    groups = math.ceil(num_probes / block_size)
    size = math.ceil(num_probes / groups)
    H.expect(num_probes * num_steps)
    results: list[Tridiagonal] = []
    with CountedOperator(H, num_probes * num_steps, "spectral_density", progress) as counted:
        basis_bnD = None
        if reorthogonalize:
            basis_bnD = torch.empty(size, num_steps, dim, dtype=H.dtype, device=H.device)
        for start in range(0, num_probes, size):
            start_BD = probes.columns(start, min(start + size, num_probes)).mT
            results += lanczos(counted, start_BD, num_steps, basis_bnD=basis_bnD, deflated=slabs)
    nodes, weights = _padded(results)
    info = {
        "num_steps": num_steps,
        "num_probes": num_probes,
        "measurements": measurements,
        "reorthogonalize": reorthogonalize,
    }
    return SpectralDensity(nodes, weights, known, dim, counted.num_matvecs, info)


def _known_part(pairs: Eigenpairs | None, dim: int) -> tuple[Tensor, list[Tensor]]:
    """Return the known eigenvalues, float64 on the CPU, and their vectors in rows."""
    if pairs is None:
        return torch.empty(0, dtype=torch.float64, device="cpu"), []
    if not isinstance(pairs, Eigenpairs):
        raise TypeError(f"expected Eigenpairs, as eigsh returns them, got {type(pairs).__name__}")
    length, k = pairs.eigenvectors.shape
    if length != dim:
        raise ValueError(f"expected eigenvectors of length {dim}, got {length}")
    if k >= dim:
        raise ValueError(
            f"expected fewer than D = {dim} eigenpairs, got {k}: their eigenvalues are the spectrum"
        )
    known = pairs.eigenvalues.detach().to("cpu", torch.float64)
    return known, [whole(pairs.eigenvectors).detach().mT]


def _padded(results: list[Tridiagonal]) -> tuple[Tensor, Tensor]:
    """Return the quadratures (p, n), padded with nodes of zero weight."""
    n = max(len(T.diagonal) for T in results)
    nodes = torch.empty(len(results), n, dtype=torch.float64, device="cpu")
    weights = torch.zeros(len(results), n, dtype=torch.float64, device="cpu")
    for i, T in enumerate(results):
        x, w = T.quadrature()
        # The last node is repeated, so that rows stay ascending, as searchsorted requires.
        nodes[i, : len(x)], nodes[i, len(x) :] = x, x[-1]
        weights[i, : len(w)] = w
    return nodes, weights

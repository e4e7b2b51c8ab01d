"""Newton's method by preconditioned conjugate gradients on exact Hessian products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, ParamsT

from hesscurv.interface.moved_arguments import moved_to_options, seed_moved
from hesscurv.interface.options import as_options
from hesscurv.interface.ranges import check_generator
from hesscurv.interface.uncompiled import uncompiled
from hesscurv.linalg.random_matrices import draw_seed
from hesscurv.optim.newton.closure_gauss_newton import ClosureGaussNewton
from hesscurv.optim.newton.closure_hessian import ClosureHessian
from hesscurv.optim.newton.closure_loss import Closure, ClosureLoss, Loss, LossGraph
from hesscurv.optim.newton.conjugate_gradients import (
    NewtonDirection,
    ensure_descent,
    newton_direction,
)
from hesscurv.optim.newton.dense_model import DenseModel
from hesscurv.optim.newton.krylov_model import StepModel, krylov_model
from hesscurv.optim.newton.newton_eigenspace import (
    BASIS,
    EIGENVALUES,
    NewtonEigenspace,
    compute_eigenspace,
    read_eigenspace,
    write_eigenspace,
)
from hesscurv.optim.newton.newton_options import NewtonOptions, check_parameters, check_settings
from hesscurv.optim.newton.newton_steps import take_step
from hesscurv.optim.newton.residual_jacobian import RowPlaces
from hesscurv.optim.preconditioner.low_rank_preconditioner import LowRankPreconditioner
from hesscurv.optim.snapshot import Snapshot


class NewtonCG(Optimizer):
    r"""Minimise a deterministic loss by Newton steps from preconditioned conjugate gradients.

    A step goes from w to :math:`w + t d` with :math:`(H + \mu I) d = -g` solved roughly by
    conjugate gradients on exact products with the Hessian H, preconditioned by its top eigenspace,

    .. math:: P = (|\lambda_{r+1}| + \mu) U (|\Lambda| + \mu I)^{-1} U^T + (I - U U^T),

    with t from a backtracking line search (Armijo), so that the loss falls in every step that is
    taken. For ill-conditioned losses over fixed data, such as those of physics-informed networks,
    where L-BFGS stalls; not for mini-batches that change from step to step. Far from a minimum,
    where H is indefinite, a step gains less than its products would as plain gradients: begin with
    Adam or L-BFGS.

    `step` takes the closures of torch.optim.LBFGS as they are::

        optimizer = hesscurv.optim.NewtonCG(net.parameters())

        def closure():
            optimizer.zero_grad()
            loss = residual(net).square().mean()
            loss.backward()
            return loss

        for _ in range(100):
            optimizer.step(closure)

    Where the loss is a sum of squares, as with these networks, the Gauss-Newton matrix came to
    lower losses than the Hessian in the same time, once plateaus were left behind:
    ``curvature="gauss_newton"``, with a closure that returns what is squared and summed. It is
    positive, and its model holds over longer steps; but it knows of no negative curvature to leave
    a plateau by::

        optimizer = hesscurv.optim.NewtonCG(net.parameters(), curvature="gauss_newton")
        optimizer.step(lambda: residual(net) / len(points) ** 0.5)

    Args:
        params: Parameters, or groups of them, named or not; real floating tensors on one device.
            All are moved together: hyperparameters are those of the first group.
        rank: r, the number of eigenpairs in the preconditioner; default 60, 0 for none. At most D.
        damping: The first mu, not negative, in units of the Hessian; default 1e-3.
        lr: The first t that the line search tries; default 1, Newton's own. Float or tensor.
        refresh_every: Steps between computations of the eigenpairs; default 20.
        cg_tol: Conjugate gradients end at ``||(H + mu I) d + g|| <= cg_tol ||g||``; default 0.1.
        max_cg: The most iterations for one direction; default 200.
        curvature: "hessian" (default), or "gauss_newton": H is then :math:`2 J^T J` for the loss
            :math:`||r||^2`, and the closure returns r, a tensor or several, of any shapes.
        generator: Source of the seed of the vectors that a refresh starts from; default seed 0.
        options: Effort of a refresh, adaption of mu, line search; default `NewtonOptions()`.

    Raises:
        TypeError: If an argument or a parameter has another type.
        ValueError: If a value is out of range, or groups have other hyperparameters than the first.

    All hyperparameters lie in ``param_groups`` and may be changed between steps; a new `damping`
    replaces the adapted one. `torch.optim.lr_scheduler` sets the first step length.

    ``state[p]`` holds, for every parameter that the loss depends on, ``basis`` (the parameter's
    shape and r), ``eigenvalues`` (r,), and numbers, the same for all parameters: see `diagnostics`.
    A run resumed from `state_dict` goes on with the same bits on a CPU.

    Cost of a step: one gradient; one product for each iteration of conjugate gradients, about two
    gradients each; one loss for each t or mu; every `refresh_every` steps 1.3 r products. Memory:
    the graph of the gradient until the direction is found, 2 r D numbers for the basis (4 r D in a
    refresh) and 12 D for vectors; with `options.damping_search` D for each iteration besides.

    Not supported: models wrapped in DDP or FSDP (NotImplementedError) and DTensors; sparse
    gradients; several devices; operations without a second derivative, except with "gauss_newton",
    which then takes a backward pass for each residual in every step. What a closure does to
    ``.grad``, such as clipping, does not change the step, which is that of the loss itself; a
    weight decay belongs in the loss. In several processes each would make its own steps.

    Deviations from NysNewton-CG: exact Ritz pairs of a block Krylov space instead of a Nystrom
    sketch; magnitudes of eigenvalues, since H is indefinite far from a minimum; conjugate gradients
    stop at negative curvature; mu is adapted, or looked for; the Gauss-Newton matrix is offered.

    References:
        Rathore, Lei, Frangella, Lu, Udell, "Challenges in training PINNs: a loss landscape
        perspective", ICML 2024 (NysNewton-CG). Frangella, Tropp, Udell, "Randomized Nystrom
        preconditioning", SIAM J. Matrix Anal. Appl. 44 (2023). Nocedal, Wright, "Numerical
        optimization", 2nd edition, algorithm 7.1 (line search Newton-CG), section 10.3
        (Levenberg-Marquardt). Martens, "Deep learning via Hessian-free optimization", ICML 2010.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(2, dtype=torch.float64))
        >>> scale = torch.tensor([1.0, 1e6], dtype=torch.float64)
        >>> optimizer = hesscurv.optim.NewtonCG([w], damping=0.0, cg_tol=1e-12)
        >>> loss = optimizer.step(lambda: (scale * w**2).sum() / 2)
        >>> bool(w.abs().max() < 1e-9)
        True
    """

    _has_rows = True  # until a closure turns out to have none
    _places: RowPlaces | None = None

    @seed_moved
    @moved_to_options(NewtonOptions)
    def __init__(
        self,
        params: ParamsT,
        rank: int = 60,
        damping: float = 1e-3,
        lr: float | Tensor = 1.0,
        *,
        refresh_every: int = 20,
        cg_tol: float = 0.1,
        max_cg: int = 200,
        curvature: str = "hessian",
        generator: torch.Generator | None = None,
        options: NewtonOptions | None = None,
    ) -> None:
        defaults = {
            "rank": rank,
            "damping": damping,
            "lr": lr,
            "refresh_every": refresh_every,
            "cg_tol": cg_tol,
            "max_cg": max_cg,
            "curvature": curvature,
            **as_options(NewtonOptions, options).as_settings(),
            "seed": 0,
        }
        check_settings(defaults)
        check_generator(generator)
        super().__init__(params, defaults)
        if generator is not None:  # last, so that a refused argument draws nothing
            seed = {"seed": draw_seed(generator)}
            for values in (self.defaults, *self.param_groups):
                values.update(seed)

    def __repr__(self) -> str:
        """Tell what is minimised how, and how far it has come."""
        options, done = self.param_groups[0], self.diagnostics()
        params = self._params()
        every = f"refreshed every {options['refresh_every']}"
        lines = [
            f"  {options['curvature']} of {sum(p.numel() for p in params)} numbers in "
            f"{len(params)} parameters",
            f"  rank={options['rank']}, {every}; first damping {options['damping']:g}, "
            f"lr {float(options['lr']):g}",
            f"  {done['step']} steps, {done['num_refused']} refused, {done['num_matvecs']} products"
            if done
            else "  no steps yet",
        ]
        return "\n".join([f"{type(self).__name__}(", *lines, ")"])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters to move together with the others.

        Raises:
            TypeError: If a parameter is complex, sparse or a DTensor.
            ValueError: If it is on another device than the others, or the group has a
                hyperparameter with another value than the first group's.
        """
        if self.param_groups and isinstance(param_group, dict):
            first = self.param_groups[0]
            for name in self.defaults.keys() & param_group.keys():
                if param_group[name] != first[name]:
                    raise ValueError(
                        f"expected {name}={first[name]!r} as in the first group, got "
                        f"{param_group[name]!r}: one Newton step moves all parameters; leave it out"
                    )
        super().add_param_group(param_group)
        try:
            check_settings(self.param_groups[0])
            check_parameters(self._params())
        except BaseException:
            self.param_groups.pop()
            raise

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], Loss]) -> Loss: ...

    @uncompiled
    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Any:
        """Take one Newton step, or none where the line search finds no decrease.

        The closure is that of `torch.optim.LBFGS.step`. It runs once to build the graph, where
        ``loss.backward()`` fills ``.grad`` and keeps the graph, and once for each t that the line
        search tries, where backward fills in the same gradient again and computes nothing. A
        closure that only returns the loss does as well. With several calls of backward the loss is
        the sum; what the closure returns counts only if there are none. With "gauss_newton" it
        returns residuals, calls no backward, and ``.grad`` stays as it is.

        In each run within a step torch's random numbers are the same, so that dropout or random
        points do not change while losses are compared; other random numbers (NumPy's, Python's) are
        up to the closure. BatchNorm in train mode normalises by the batch, which the Hessian knows
        of; its running statistics move in every run, as with L-BFGS. Attention takes its plain form
        and compiled models run uncompiled, since what is fused has no second derivative.

        A refused step leaves the weights as they were, bit for bit, raises mu tenfold, and shows as
        ``step_length`` 0 in `diagnostics`. Near the smallest loss that the dtype can tell, every
        step is refused.

        Args:
            closure: Computes the loss, a scalar. May be None only for distributed checkpoints,
                which ask for a step with lr 0 before they load a state.

        Returns:
            What the closure returned in its first run, at the weights before the step; a tensor
            comes without its graph. Of residuals the sum of squares.

        Raises:
            TypeError: If there is no closure, or it neither calls backward nor returns a tensor, or
                returns no residuals where they are asked for.
            ValueError: If there is no scalar loss with a graph that reaches the parameters; if the
                loss, its gradient or a product with the Hessian is not finite, or the gradient is
                sparse.
            NotImplementedError: If the model is wrapped in DDP or FSDP; if an operation lacks a
                derivative that is needed (a MissingDerivativeError), with its name and what to do.

        After an error, weights, ``.grad``, ``requires_grad``, random numbers and the state are as
        they were; buffers are the closure's own.
        """
        params = self._params()
        options = self.param_groups[0]
        check_settings(options)
        if closure is None:
            self._initialize_state(params, options)
            return None
        before = Snapshot(params)
        try:
            return self._step(closure, params, options, before)
        except BaseException:
            before.restore()
            raise

    def diagnostics(self) -> dict[str, float]:
        """Return numbers about the last step and all steps so far; empty before the first.

        Returns:
            Of the last step: ``loss`` before it; ``step_length`` t, 0 if it was refused;
            ``cg_iterations``; ``negative_curvature``, 1 if conjugate gradients met any;
            ``fallback``, 0 for the Newton direction, 1 for the preconditioned gradient, 2 for the
            gradient; ``ratio`` of the actual to the predicted decrease. For the next one:
            ``damping``, mu. In all: ``step``, ``num_refused``, ``num_evaluations`` of the closure,
            ``num_matvecs``, products with the Hessian; ``refreshed_at``, the step that computed the
            eigenpairs, -1 for none; ``next_eigenvalue``, ``|lambda_{r+1}|``, -1 for none;
            ``first_damping``, where mu started.
        """
        for p in self._params():
            state = self.state.get(p)
            if state:
                return {k: v for k, v in state.items() if not isinstance(v, Tensor)}
        return {}

    def _params(self) -> list[nn.Parameter]:
        return [p for group in self.param_groups for p in group["params"]]

    def _step(
        self,
        closure: Closure,
        params: list[nn.Parameter],
        options: dict[str, Any],
        before: Snapshot,
    ) -> Any:
        least_squares = options["curvature"] == "gauss_newton"
        loss = ClosureLoss(closure, params, residuals=least_squares)
        numbers = self._numbers(options)
        new_space = solved = None
        with loss.explaining():
            dense = least_squares and self._tries_rows(options)
            graph = loss.differentiate(rows=dense, places=self._places)
            if graph.residuals is not None:
                self._places = graph.residuals.places
            if dense and graph.residuals is not None and graph.residuals.rows is None:
                self._has_rows = False
                if options["solver"] == "dense":
                    raise ValueError(
                        "expected residuals that belong to one sample each and depend on the "
                        "parameters through linear layers, at most 2048 of them or of the "
                        "parameters, for solver='dense'; use solver='auto' or 'krylov'"
                    )
            returned, moving = graph.returned, graph.params
            numbers |= {"loss": graph.value, "step_length": 0.0, "ratio": 0.0}
            if float(options["lr"]) > 0 and any(bool(slope.any()) for slope in graph.slopes):
                solved, new_space = self._solve(graph, options, numbers)
        del graph  # before the line search builds others
        if solved is not None:
            take_step(solved, loss, moving, before, options, numbers)
        numbers["step"] += 1
        numbers["num_evaluations"] += loss.num_evaluations
        # The state is written at the end, so that an error leaves it as it was.
        if new_space is not None:
            write_eigenspace(self.state, moving, new_space)
        for p in {*self.state, *moving}:
            self.state[p].update(numbers)
        return returned

    def _solve(
        self, graph: LossGraph, options: dict[str, Any], numbers: dict[str, Any]
    ) -> tuple[NewtonDirection | StepModel, NewtonEigenspace | None]:
        """Return the direction, or a model of many, and the eigenspace if it is a new one."""
        if graph.residuals is not None and graph.residuals.rows is not None:
            numbers |= {"cg_iterations": 0, "fallback": 0, "negative_curvature": 0}
            return DenseModel(graph.residuals.rows, graph.residuals.values), None
        kind = ClosureHessian if graph.residuals is None else ClosureGaussNewton
        H = kind(graph, vectorize=options["vectorize"])
        rank = min(options["rank"], H.shape[0])
        age = numbers["step"] - numbers["refreshed_at"]
        due = numbers["refreshed_at"] < 0 or age >= options["refresh_every"]
        space = None if due else self._read_eigenspace(graph.params, rank, numbers)
        new_space = None
        if rank > 0 and space is None:
            space = new_space = compute_eigenspace(
                H,
                graph.params,
                rank,
                self.state,
                tol=options["refresh_tol"],
                max_matvecs=options["refresh_matvecs"],
                generator=torch.Generator().manual_seed(options["seed"]),
            )
            numbers["refreshed_at"] = numbers["step"]
            numbers["next_eigenvalue"] = -1.0 if space.left is None else space.left
        damping = numbers["damping"]
        gradient_D = graph.gradient()
        precondition = (
            LowRankPreconditioner.identity(gradient_D)
            if space is None
            else space.preconditioner(damping, H.dtype)
        )
        how = {"tol": options["cg_tol"], "max_iterations": options["max_cg"]}
        search = options["damping_search"]
        if search if search is not None else graph.residuals is not None:
            model = krylov_model(H, gradient_D, damping, precondition, **how)
            numbers["cg_iterations"], numbers["fallback"] = model.num_matvecs, 0
            numbers["negative_curvature"] = int(model.num_negative > 0)
            numbers["num_matvecs"] += H.num_matvecs
            return model, new_space
        solved = newton_direction(H, gradient_D, damping, precondition, **how)
        numbers["num_matvecs"] += H.num_matvecs
        numbers["cg_iterations"] = solved.num_matvecs
        numbers["negative_curvature"] = int(solved.negative_curvature)
        solved, numbers["fallback"] = ensure_descent(solved, gradient_D, precondition)
        return solved, new_space

    def _tries_rows(self, options: dict[str, Any]) -> bool:
        """Whether to look for the rows of the Jacobian: not again where there were none."""
        if options["solver"] == "auto":
            return self._has_rows and options["damping_search"] is not False
        return bool(options["solver"] == "dense")

    def _read_eigenspace(
        self, params: Sequence[nn.Parameter], rank: int, numbers: dict[str, Any]
    ) -> NewtonEigenspace | None:
        left = numbers["next_eigenvalue"]
        return read_eigenspace(self.state, params, rank, None if left < 0 else left)

    def _numbers(self, options: dict[str, Any]) -> dict[str, Any]:
        """Return the numbers of the state, a damping that the user has changed taken over."""
        numbers = {
            "step": 0,
            "loss": 0.0,
            "step_length": 0.0,
            "ratio": 0.0,
            "damping": options["damping"],
            "first_damping": options["damping"],
            "cg_iterations": 0,
            "negative_curvature": 0,
            "fallback": 0,
            "num_refused": 0,
            "num_evaluations": 0,
            "num_matvecs": 0,
            "refreshed_at": -1,
            "next_eigenvalue": -1.0,
        } | self.diagnostics()
        if numbers["first_damping"] != options["damping"]:
            numbers["damping"] = numbers["first_damping"] = options["damping"]
        return numbers

    def _initialize_state(self, params: Sequence[nn.Parameter], options: dict[str, Any]) -> None:
        """Lay out a state of zeros, for a distributed checkpoint to load into."""
        if float(options["lr"]) != 0 or self.state:
            raise TypeError(
                "expected a closure that computes the loss, got None: NewtonCG evaluates the loss "
                "several times a step; see torch.optim.LBFGS.step for how to write one"
            )
        moving = [p for p in params if p.requires_grad]
        rank = min(options["rank"], sum(p.numel() for p in moving))
        numbers = self._numbers(options)
        for p in moving:
            if rank:
                self.state[p][BASIS] = p.new_zeros(*p.shape, rank)
                self.state[p][EIGENVALUES] = p.new_zeros(rank)
            self.state[p].update(numbers)

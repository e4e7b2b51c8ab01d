"""Any optimizer of torch, with the top eigenspace of the loss Hessian damped."""

from __future__ import annotations

import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from hesscurv.distributed.sharded import own_shard
from hesscurv.operators.parameters import ParamSelection
from hesscurv.optim.arguments import check_base, check_choice, check_count, check_positive
from hesscurv.optim.eigenspace_tracker import OPERATORS, EigenspaceTracker
from hesscurv.optim.low_rank_preconditioner import LowRankPreconditioner
from hesscurv.optim.optimizer_state import join_state, split_state
from hesscurv.optim.preconditioner_report import CurvatureWarning, PreconditionerReport
from hesscurv.optim.refresh_schedule import RefreshSchedule
from hesscurv.optim.stable_rate import stable_rate
from hesscurv.optim.tracked_preconditioner import TrackedPreconditioner
from hesscurv.optim.trained_parameters import trained_parameters

# Counters, in every group and the same in all: what a state dict has to have beside the tensors.
STEP, DUE, DECIDED = "curvature_step", "curvature_due", "curvature_decided"
FACTOR, INITIAL = "curvature_rate_factor", "curvature_initial_lr"
_LITTLE_TO_GAIN = 2.0


class PreconditionedOptimizer(Optimizer):
    r"""Wraps an optimizer, and damps the top eigenspace of the loss Hessian in its steps.

    .. math:: P = I + U (S - I) U^T, \qquad
        s_i = \frac{|\lambda_r| + \mu}{|\lambda_i| + \mu}

    With U the top r eigenvectors. A base like SGD steps along P times the gradient; of an adaptive
    base (Adam, ...) the update is multiplied by P. On all but the top r directions nothing changes,
    and the base's learning rate keeps its meaning, but it can be larger: the stable rate rises
    from :math:`2/|\lambda_1|` to :math:`2/\max(|\lambda_r| + \mu, |\lambda_{r+1}|)`, see `report`.
    No direction is amplified, whatever the sign of its curvature.

    It is used as the base was: learning rate schedulers, `GradScaler`, clipping, accumulation,
    closures, checkpoints. `param_groups` are the base's own, so that both see every change.

    Args:
        base: The optimizer, an instance, with its parameters and hyperparameters.
        model: The module whose parameters it trains.
        task: The loss whose curvature is measured, see `HessianOperator`:
            ``supervised(loss)``, a callable ``(model, batch) -> scalar``, or a closure.
        batches: Re-iterable batches for the curvature, best others than the gradient's: on the same
            samples eigenvalues come out too large. None for a closure.
        rank: The number r of eigenpairs; default 10, 40 to 60 for PINNs.
        damping: mu, in the unit of the eigenvalues; default .1 |lambda_r|; never below the pairs'
            residuals.
        refresh_every: Steps from one refresh of the eigenspace to the next. By default as many as
            keep refreshes within `max_fraction` of the time.
        max_fraction: The largest share of the training time for refreshes, without
            `refresh_every`; default .2.
        drift_tol: If given, the eigenspace is also refreshed once
            ``||H v - U Lambda U^T v|| > drift_tol ||U Lambda U^T v||`` for a random v of it.
        check_every: Steps between such checks, of one product each; default 20.
        mode: What is preconditioned, "gradient" or "update"; default "gradient" for
            `torch.optim.SGD`, "update" for all other bases.
        curvature: "hessian" (default), "ggn" or "fisher".
        samples: Curvature is measured on at most so many samples, the first of the batches;
            default 512; None for all.
        learning_rate: "auto" sets the rate to a share `rate_fraction` of the largest stable one,
            by the preconditioned Hessian of a second batch, the `samples` that follow, at each
            refresh; at most `max_growth` times the group's own rate. What a scheduler does to the
            group's rate scales it. For bases like SGD. Default None: the rate is the base's.
        rate_fraction: See `learning_rate`; default .5.
        max_growth: See `learning_rate`; default 100.
        params: Which of the model's parameters, see `HessianOperator`; default all that the base
            has and that require grad.
        tol: Of the eigenpairs, residual relative to eigenvalue; default .1: the directions need
            not be exact, and each digit costs products.
        training: Mode of the modules in products, see `HessianOperator`; default None: batch norms
            as found, since their batches' statistics are in the loss that is trained, and all else
            as in inference.
        seed: Of the random numbers of the eigensolver, apart from torch's global ones.
        process_group: See `HessianOperator`.
        operator_options: More arguments of the operator: `memory_budget`, `way`, `compute_dtype`.

    Raises:
        TypeError: If an argument is of a wrong type, such as a base class for an instance.
        ValueError: If a value is out of range, no parameter of the base is the model's, or the
            base evaluates its closure by itself (LBFGS).

    Warns:
        CurvatureWarning: Once, if curvature cannot be computed, say of a loss that is not finite:
            the steps are the base's then, and it is tried again at the next refresh. Once, if
            ``|lambda_1| / |lambda_{r+1}| < 2``: there is little to gain.

    Hyperparameters `rank`, `damping`, `refresh_every` are in every group, and may be changed there;
    the first group's count.

    Cost: a step reads the basis twice, 4 r D operations. A refresh takes r products while the space
    stays within `tol`, else two to five times as many. Memory: (r + 1) D numbers, and D for a base
    that is not like SGD; during a refresh 2 r + 60 vectors more at most.

    References:
        Frangella, Rathore, Zhao, Udell, "SketchySGD", SIMODS 2024, for the automatic rate.
        Rathore et al., "Challenges in training PINNs", ICML 2024, for the unit gain.

    Example:
        >>> task = hesscurv.supervised(torch.nn.CrossEntropyLoss())
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> optimizer = PreconditionedOptimizer(sgd, model, task, curvature_batches)
    """

    def __init__(
        self,
        base: Optimizer,
        model: nn.Module,
        task: Callable[..., Tensor],
        batches: Iterable[Any] | None = None,
        rank: int = 10,
        damping: float | None = None,
        refresh_every: int | None = None,
        *,
        max_fraction: float = 0.2,
        drift_tol: float | None = None,
        check_every: int = 20,
        mode: str | None = None,
        curvature: str = "hessian",
        samples: int | None = 512,
        learning_rate: str | None = None,
        rate_fraction: float = 0.5,
        max_growth: float = 100.0,
        params: ParamSelection = None,
        tol: float = 0.1,
        training: bool | None = None,
        seed: int = 0,
        process_group: Any = None,
        operator_options: dict[str, Any] | None = None,
    ) -> None:
        check_base(base, model, task)
        check_count("rank", rank)
        check_positive("damping", damping, zero=True, optional=True)
        check_count("refresh_every", refresh_every, optional=True)
        check_positive("max_fraction", max_fraction, below=1.0)
        check_positive("drift_tol", drift_tol, optional=True)
        check_count("check_every", check_every)
        check_choice("mode", mode, (None, "gradient", "update"))
        check_choice("curvature", curvature, tuple(OPERATORS))
        check_count("samples", samples, optional=True)
        check_choice("learning_rate", learning_rate, (None, "auto"))
        check_positive("rate_fraction", rate_fraction)
        check_positive("max_growth", max_growth)
        check_positive("tol", tol)
        self.base = base
        self.mode = mode or ("gradient" if isinstance(base, SGD) else "update")
        if learning_rate == "auto" and self.mode != "gradient":
            raise ValueError(
                "expected a base like SGD for learning_rate='auto', got "
                f"{type(base).__name__}: the stable rate of an adaptive one depends on its own "
                "state; leave learning_rate out"
            )
        own = {"rank": rank, "damping": damping, "refresh_every": refresh_every}
        super().__setstate__({"defaults": base.defaults | own})
        self._warned_capturable_if_run_uncaptured = True
        self.model, self._selection = model, params
        self._rate = (rate_fraction, max_growth) if learning_rate == "auto" else None
        self._drift_tol, self._check_every, self._seed = drift_tol, check_every, seed
        self._schedule = RefreshSchedule(max_fraction)
        # "retained" is the fastest way for few products with the same weights, and a choice by
        # measured seconds could end in other bits after a resumption.
        options = {"training": training, "way": "retained", "process_group": process_group}
        self._tracker = EigenspaceTracker(
            model,
            task,
            batches,
            curvature=curvature,
            samples=samples,
            rate_samples=(samples or 0) if self._rate else 0,
            tol=tol,
            seed=seed,
            options=options | (operator_options or {}),
        )
        self._refreshes = self._failures = 0
        self._step_seconds = 0.0
        self._said: set[str] = set()
        self._complete_groups()
        self._tracked = self._track(trained_parameters(model, self.param_groups, params))

    # -- what the base has too ------------------------------------------------------------------

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The base's parameter groups, the very same."""
        return self.base.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[dict[str, Any]]) -> None:
        self.base.param_groups = groups

    @property
    def state(self) -> defaultdict[Any, Any]:  # type: ignore[override]
        """The base's state and, for each parameter, its part of the eigenspace; to read."""
        out: defaultdict[Any, Any] = defaultdict(dict, self.base.state)
        for p, entry in self._tracked.state().items():
            out[p] = {**out[p], **entry}
        return out

    def __getattr__(self, name: str) -> Any:
        """Find in the base what is not here: `train` and `eval` of schedule-free ones, say."""
        # Not private names: GradScaler asks for _step_supports_amp_scaling, which is not ours.
        if name.startswith("_") or "base" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.base, name)

    def __repr__(self) -> str:
        """Show the base within."""
        return f"{type(self).__name__}(rank={self._group['rank']}, mode={self.mode!r}, {self.base})"

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, as the base does."""
        self.base.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base; the eigenspace is computed anew, with it, at the next step.

        Raises:
            ValueError: As the base does.
        """
        self.base.add_param_group(param_group)
        self._complete_groups()

    # -- steps ----------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step of the base, preconditioned; refresh the eigenspace before it if it is due.

        Args:
            closure: Evaluates the model anew and returns the loss; called once.

        Returns:
            The closure's loss, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        group, schedule = self._group, self._schedule
        schedule.due, schedule.is_decided = group[DUE], group[DECIDED]
        self._follow_parameters()
        if schedule.now(group[STEP], group["refresh_every"], self._tracker.largest) or (
            self._has_drifted()
        ):
            self._refresh()
        P = self._tracked.current
        if P is None or P.is_identity:
            self._step_base()
        else:
            self._tracked.set_damping(group["damping"])
            start = time.perf_counter()
            own = self._step_gradient(P) if self.mode == "gradient" else self._step_update(P)
            self._step_seconds += time.perf_counter() - start - own
        self._count(
            {STEP: group[STEP] + 1, DUE: schedule.due, DECIDED: schedule.is_decided},
        )
        return loss

    def report(self) -> PreconditionerReport:
        """Return what was done so far, what it took, and the spectrum found; ``print`` it."""
        group, P = self._group, self._tracked.current
        known = P is not None and not P.is_identity
        values = P.eigenvalues if P is not None and known else []
        return PreconditionerReport(
            steps=group[STEP],
            refreshes=self._refreshes,
            failures=self._failures,
            num_matvecs=self._tracker.num_matvecs,
            seconds=self._schedule.elapsed(),
            refresh_seconds=self._schedule.refresh_seconds,
            step_seconds=self._step_seconds,
            eigenvalues=list(values),
            gains=list(P.gains) if P is not None and known else [],
            damping=P.damping if P is not None and known else 0.0,
            stable_rate=stable_rate(abs(values[0]), group) if values else float("nan"),
            stable_rate_after=stable_rate(P.largest_after, group)
            if P is not None and values
            else float("nan"),
            rate_factor=group[FACTOR],
        )

    def _step_gradient(self, P: LowRankPreconditioner) -> float:
        """Step along P g, which takes the place of .grad; return the seconds of the base's own."""
        flat = self._tracked.flat
        found = [p.grad for p in flat.parameters]
        # A sparse gradient, of an embedding, stays what it is: its few rows are all that a step
        # should touch.
        dense = [None if g is None or g.is_sparse else g for g in found]
        damped = flat.split(P.multiply_(flat.flatten(dense)))
        try:
            for i, (p, g) in enumerate(zip(flat.parameters, dense, strict=True)):
                if g is not None:
                    p.grad = flat.like(i, damped[i].to(g.dtype))
            return self._step_base()
        finally:
            for p, g in zip(flat.parameters, found, strict=True):
                p.grad = g

    def _step_update(self, P: LowRankPreconditioner) -> float:
        """Step as the base does, then damp what that has changed; return the base's seconds."""
        flat = self._tracked.flat
        before = flat.flatten(flat.parameters)
        seconds = self._step_base()
        correction = flat.split(P.correction_(flat.flatten(flat.parameters).sub_(before)))
        moved = [
            (own_shard(p), part.to(p.dtype))
            for p, part in zip(flat.parameters, correction, strict=True)
            if p.grad is not None
        ]
        if moved:
            torch._foreach_add_([p for p, _ in moved], [part for _, part in moved])
        return seconds

    def _step_base(self) -> float:
        """Let the base step, at the automatic rate if there is one; return the seconds."""
        start, factor = time.perf_counter(), self._group[FACTOR]
        rates = [group.get("lr") for group in self.param_groups]
        try:
            if factor != 1.0:
                for group in self.param_groups:
                    group["lr"] = group["lr"] * factor
            self.base.step()
        finally:
            if factor != 1.0:
                for group, rate in zip(self.param_groups, rates, strict=True):
                    group["lr"] = rate
        return time.perf_counter() - start

    # -- the eigenspace -------------------------------------------------------------------------

    def _refresh(self) -> None:
        """Compute the eigenspace at the present weights, from the last one; or fall back."""
        group, tracked, start = self._group, self._tracked, time.perf_counter()
        if not tracked.flat.any_of(p.grad for g in self.param_groups for p in g["params"]):
            # Nothing to precondition: so distributed checkpoints ask for the state's shapes.
            tracked.allocate(group["rank"])
            return
        factor = 1.0
        try:
            tracked.solve(group["rank"], group["damping"], group[STEP])
            if self._rate:
                factor = self._rate_factor()
            self._refreshes += 1
        except Exception as error:
            # Training goes on: curvature that cannot be had is no reason to end it.
            tracked.current = None
            self._failures += 1
            self._say_once(
                "failure",
                f"the curvature could not be computed; until it can, steps are those of "
                f"{type(self.base).__name__} alone. {type(error).__name__}: {error}",
            )
        else:
            little = self._little_gain()
            if little:
                self._say_once("gain", little)
        self._count({FACTOR: factor})
        self._schedule.refreshed(group[STEP], group["refresh_every"], time.perf_counter() - start)

    def _has_drifted(self) -> bool:
        step = self._group[STEP]
        if self._drift_tol is None or step % self._check_every or self._tracked.is_identity:
            return False
        start = time.perf_counter()
        try:
            return not self._tracked.drift(self._seed + step) <= self._drift_tol
        except Exception:
            return True  # the refresh meets it too, and says so
        finally:
            self._schedule.refresh_seconds += time.perf_counter() - start

    def _rate_factor(self) -> float:
        """Return what makes the groups' rates a share of the largest stable one."""
        assert self._rate is not None
        fraction, most = self._rate
        curvature = self._tracked.largest_curvature(self._group[STEP])
        if not curvature > 0:
            return most
        rates = [(stable_rate(curvature, g), float(g[INITIAL])) for g in self.param_groups]
        return min(most, *(fraction * stable / rate for stable, rate in rates if rate > 0))

    def _little_gain(self) -> str | None:
        """Return what to say where the damped directions hardly stand out."""
        P = self._tracked.current
        if P is None or len(P.eigenvalues) <= P.rank:
            return None
        first, left = abs(P.eigenvalues[0]), abs(P.eigenvalues[P.rank])
        if first >= _LITTLE_TO_GAIN * left:
            return None
        return (
            f"there is little to gain: |lambda_1| = {first:.3g} is less than {_LITTLE_TO_GAIN:g} "
            f"times |lambda_{P.rank + 1}| = {left:.3g}, so that damping the top {P.rank} "
            "directions changes little; raise rank, or use the base alone"
        )

    def _follow_parameters(self) -> None:
        """Begin anew where parameters were added to the groups, frozen, or freed."""
        chosen = trained_parameters(self.model, self.param_groups, self._selection)
        before = self._tracked.flat.parameters
        if len(chosen) != len(before) or any(
            p is not q for p, q in zip(chosen.values(), before, strict=True)
        ):
            self._tracked = self._track(chosen)
            self._count({DUE: self._group[STEP], DECIDED: True, FACTOR: 1.0})
            self._schedule.due, self._schedule.is_decided = self._group[STEP], True

    def _track(self, chosen: dict[str, nn.Parameter]) -> TrackedPreconditioner:
        self._tracker.follow(list(chosen))
        return TrackedPreconditioner(list(chosen.values()), self._tracker)

    # -- groups, state, copies ------------------------------------------------------------------

    @property
    def _group(self) -> dict[str, Any]:
        return self.base.param_groups[0]

    def _complete_groups(self) -> None:
        """Give every group the hyperparameters and counters that it lacks: the first one's."""
        first = self._group
        begun = {STEP: 0, DUE: 0, DECIDED: True, FACTOR: 1.0}
        own = {key: self.defaults[key] for key in ("rank", "damping", "refresh_every")} | begun
        for group in self.param_groups:
            for key, value in own.items():
                group.setdefault(key, first.get(key, value))
            if "lr" in group:
                group.setdefault(INITIAL, group.get("initial_lr", group["lr"]))

    def _count(self, counters: dict[str, Any]) -> None:
        for group in self.param_groups:
            group.update(counters)

    def _say_once(self, kind: str, message: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            # From `step`, with two wrappers of torch's around it.
            warnings.warn(message, CurvatureWarning, stacklevel=6)

    def state_dict(self) -> dict[str, Any]:
        """Return the base's state dict with the eigenspace, by parameter, and the counters.

        It holds tensors and plain values alone, for ``torch.load(weights_only=True)``.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        out = join_state(self.base.state_dict(), self.param_groups, self._tracked.state())
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, out)
            out = out if changed is None else changed
        return out

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken, with the same bits if the model does so too.

        A state dict of the base alone is taken as well: the eigenspace is computed at the next
        step then.

        Raises:
            ValueError: If it is another model's; nothing has changed then, unless the base's own
                `load_state_dict` raised it.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        self._follow_parameters()
        base, entries = split_state(state_dict, self.param_groups, self._tracked.flat.parameters)
        self._tracked.check(entries)
        self.base.load_state_dict(base)
        self._complete_groups()
        self._tracked.load(entries, self._group["rank"], self._group["damping"])
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        """Return all there is, model and base among it: a copy's model is its `model`."""
        kept = {k: v for k, v in self.__dict__.items() if k != "step"}  # a scheduler's wrapper
        return {k: v for k, v in kept.items() if not k.startswith("_optimizer_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take what `__getstate__` returned."""
        super().__setstate__(state)

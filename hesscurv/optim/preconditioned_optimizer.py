"""Any optimizer of torch, with the top eigenspace of the loss Hessian damped."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hesscurv.interface.moved_arguments import moved_to_options, seed_moved
from hesscurv.interface.options import as_options
from hesscurv.interface.uncompiled import uncompiled
from hesscurv.interface.user_warning import warn_user
from hesscurv.linalg.random_matrices import draw_seed
from hesscurv.objective.parameters import ParamSelection
from hesscurv.optim.automatic_rate import AutomaticRate, multiplied_rates
from hesscurv.optim.base_optimizer import (
    PARTS_OF_A_STEP,
    check_automatic_rate,
    check_base,
    copies_of_weights,
    evaluate,
    last_part,
    perturbs,
    resolve_mode,
    say_copies,
)
from hesscurv.optim.base_state import join_state, merged_state, split_state
from hesscurv.optim.group_settings import (
    DAMPING,
    DUE,
    EVERY,
    FACTOR,
    LAST,
    RANK,
    STEP,
    begin_groups,
    complete_groups,
    own_settings,
    write_to_groups,
)
from hesscurv.optim.newton.closure_loss import Loss
from hesscurv.optim.preconditioner.damped_steps import DampedUpdate, damp_gradient
from hesscurv.optim.preconditioner.eigenspace_refresh import EigenspaceRefresh
from hesscurv.optim.preconditioner.eigenspace_tracker import EigenspaceTracker
from hesscurv.optim.preconditioner.preconditioner_description import describe_wrapper, make_report
from hesscurv.optim.preconditioner.preconditioner_options import (
    PreconditionerOptions,
    check_arguments,
)
from hesscurv.optim.preconditioner.preconditioner_report import (
    CurvatureWarning,
    PreconditionerReport,
)
from hesscurv.optim.preconditioner.refresh_schedule import RefreshSchedule
from hesscurv.optim.preconditioner.tracked_preconditioner import TrackedPreconditioner
from hesscurv.optim.trained_parameters import (
    require_some,
    resolve_selection,
    trained_parameters,
)


class PreconditionedOptimizer(Optimizer):
    r"""Wraps an optimizer, and damps the top eigenspace of the loss Hessian in its steps.

    .. math:: P = I + U (S - I) U^T, \qquad
        s_i = \frac{|\lambda_{r+1}| + \mu}{|\lambda_i| + \mu}

    With U the top r eigenvectors. A base like SGD steps along P times the gradient; of an adaptive
    base (Adam, ...) the update is multiplied by P. On all but the top r directions nothing changes,
    and the base's learning rate keeps its meaning, but it can be larger: the stable rate rises
    from :math:`2/|\lambda_1|` to :math:`2/(|\lambda_{r+1}| + \mu)`, see `report`. No direction is
    amplified, whatever the sign of its curvature. See `LowRankPreconditioner` for matrices of
    lower rank.

    It is used as the base was: learning rate schedulers, `GradScaler`, clipping, accumulation,
    closures, checkpoints, `torch.compile`. `param_groups` are the base's own, so that both see
    every change, and what the base alone has (`train`, `eval`, ...) is found here too.

    Args:
        base: The optimizer, an instance, with its parameters and hyperparameters: torch's, or any
            other with their methods, also one around another (Lookahead, SAM, schedule-free).
        model: The module whose parameters it trains.
        task: The loss whose curvature is measured, see `HessianOperator`:
            ``supervised(loss)``, a callable ``(model, batch) -> scalar``, or a closure.
        batches: Re-iterable batches for the curvature, best others than the gradient's: on the same
            samples eigenvalues come out too large. None for a closure.
        rank: The number r of eigenpairs; default 10, 40 to 60 for PINNs.
        damping: mu, in the unit of the eigenvalues; default 0.1 |lambda_r|; never below the pairs'
            residuals.
        refresh_every: Steps from one refresh of the eigenspace to the next. By default as many as
            keep refreshes within `max_fraction` of the time, with 2 (r + 1) products each at most
            (or 8), where the next goes on from the last; and more while there is little to gain.
        max_fraction: The largest share of the training time for refreshes, without
            `refresh_every`; default 0.2.
        curvature: "hessian" (default), "ggn" or "fisher".
        samples: Curvature is measured on at most so many samples, the first of the batches;
            default 256; None for all.
        learning_rate: "auto" sets the rate to a share, `options.rate_fraction`, of the largest
            stable one, by the preconditioned Hessian of a second batch, the `samples` that follow,
            at each refresh; at most `options.max_growth` times the group's own rate. What a
            scheduler does to the group's rate scales it. For bases like SGD. Default None: the rate
            is the base's.
        params: Which of the model's parameters, see `HessianOperator`; default all that the base
            has and that require grad.
        training: Mode of the modules in products, see `HessianOperator`; default None: batch norms
            as found, since their batches' statistics are in the loss that is trained, and all else
            as in inference.
        generator: Source of the eigensolver's seed; default seed 0. The global one is never used.
        options: What is preconditioned, check of drift, tolerance, arguments of the operator;
            default `PreconditionerOptions()`.

    Raises:
        TypeError: If an argument is of a wrong type, such as a base class for an instance.
        ValueError: If a value is out of range, no parameter of the base is the model's, the base
            evaluates its closure by itself (LBFGS), or the options' mode would be
            wrong with it.

    Warns:
        CurvatureWarning: Once, if curvature cannot be computed, say of a loss that is not finite:
            the steps are the base's then, and it is tried again at the next refresh. Once, if
            ``|lambda_1| / |lambda_{r+1}| < 2``: there is little to gain. Once, if the base turns
            out to keep copies of weights in its state with mode "update".

    Hyperparameters are in every group, as `curvature_rank`, `curvature_damping` and
    `curvature_refresh_every`, and may be changed there; the first group's count. Another rank is
    a refresh. All keys of ours in a group begin with ``curvature_``.

    Cost: a step reads the basis twice, 4 r D operations, in 6 to 10 kernels on a GPU whatever the
    number of parameters, of one dtype and contiguous. A refresh takes about r + 5 products while
    the space stays within `tol`, else two to five times as many. Memory: (r + 2) D numbers, with
    the automatic rate D more; during a step 2 D more, during a refresh 2 r + 60 vectors at most;
    and the samples. Where the model is sharded (FSDP2), each process has its shards of the basis,
    and the whole during a refresh.

    References:
        Frangella, Rathore, Zhao, Udell, "SketchySGD", SIMODS 2024, for the automatic rate.
        Rathore et al., "Challenges in training PINNs", ICML 2024, for the unit gain.

    Example:
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> optimizer = hesscurv.optim.PreconditionedOptimizer(sgd, model, task, batches, rank=8)
        >>> optimizer.report().steps
        0
    """

    @seed_moved
    @moved_to_options(PreconditionerOptions)
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
        curvature: str = "hessian",
        samples: int | None = 256,
        learning_rate: str | None = None,
        params: ParamSelection = None,
        training: bool | None = None,
        generator: torch.Generator | None = None,
        options: PreconditionerOptions | None = None,
    ) -> None:
        given, own = dict(locals()), as_options(PreconditionerOptions, options)
        check_base(base)
        if isinstance(base, PreconditionedOptimizer):
            raise ValueError(
                "expected a base that is not preconditioned yet, got a PreconditionedOptimizer; "
                "pass its `base`, or a larger rank in place of two spaces"
            )
        check_arguments(given, own)
        self.base, self.mode = base, resolve_mode(base, own.mode)
        rate = None
        if learning_rate == "auto":
            check_automatic_rate(base, self.mode)
            rate = AutomaticRate(own.rate_fraction, own.max_growth)
        self._own = {RANK: rank, DAMPING: damping, EVERY: refresh_every}
        super().__setstate__({"defaults": getattr(base, "defaults", {}) | self._own})
        self._warned_capturable_if_run_uncaptured = True
        self.model, self._selection = model, resolve_selection(model, params)
        self._schedule = RefreshSchedule(max_fraction)
        # The reference is the fastest way for few products with the same weights, and a choice by
        # measured seconds could end in other bits after a resumption.
        fixed = {"training": training, "way": "reference", "process_group": own.process_group}
        self._tracker = EigenspaceTracker(
            model,
            task,
            batches,
            curvature=curvature,
            samples=samples,
            rate_samples=(samples or 0) if rate else 0,
            tol=own.tol,
            options=fixed | dict(own.operator_options),
        )
        self._refresh = EigenspaceRefresh(
            self._tracker, self._schedule, rate, own.drift_tol, own.check_every
        )
        self._step_seconds = self._base_seconds = 0.0
        self._said: set[str] = set()
        self._halfway: DampedUpdate | None = None
        chosen = trained_parameters(model, base.param_groups, self._selection)
        require_some(chosen)
        self._tracked = self._track(chosen)
        begin_groups(base.param_groups, self._own)
        if generator is not None:  # last, so that a refused argument draws nothing
            self._tracker.seed = draw_seed(generator)

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
        """The base's state and, for each parameter, its part of the eigenspace, to read.

        What is written to a parameter's entry is written to the base's.
        """
        return merged_state(getattr(self.base, "state", {}), self._tracked.state())

    def __getattr__(self, name: str) -> Any:
        """Find in the base what is not here: `train` and `eval` of schedule-free ones, say."""
        # Not private names: GradScaler asks for _step_supports_amp_scaling, which is not ours.
        if name.startswith("_") or "base" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        found = getattr(self.base, name)
        if name in PARTS_OF_A_STEP:
            return partial(self._take_part, name)
        return found

    def __repr__(self) -> str:
        """Tell what is wrapped, what is damped, and how far it has come."""
        return describe_wrapper(
            type(self).__name__, self.base, self.mode, self._refresh, self._tracked
        )

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, as the base does."""
        self.base.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the base; the next step recomputes the eigenspace with it.

        Raises:
            ValueError: As the base does.
        """
        self.base.add_param_group(param_group)
        self._follow_parameters()

    # -- steps ----------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], Loss]) -> Loss: ...

    @uncompiled
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take a step of the base, preconditioned; refresh the eigenspace before it if it is due.

        Args:
            closure: Evaluates the model again and returns the loss; called once, before the step.
                Sharpness-aware bases (SAM, ...) call it themselves, at the weights that they
                choose.

        Returns:
            The closure's loss, or None.

        Within `torch.compile` it runs uncompiled; compile the base's own ``step`` for a compiled
        update.
        """
        within = perturbs(self.base)
        loss, given = evaluate(closure, self.base, self.mode)
        self._prepare(any_gradient=within)
        P = self._tracked.current
        start, base = time.perf_counter(), self._base_seconds
        if P is None or P.is_identity:
            returned = self._step_base(given)
        elif self.mode == "gradient":
            returned = damp_gradient(self._tracked.flat, P, lambda: self._step_base(given))
        else:
            update = DampedUpdate(self._tracked.flat, within=within)
            returned = self._step_base(given)
            self._finish(update)
        self._step_seconds += time.perf_counter() - start - (self._base_seconds - base)
        self._count_step()
        return returned if within else loss

    @uncompiled
    @torch.no_grad()
    def _take_part(self, part: str, *args: Any, **kwargs: Any) -> Any:
        """Take a part of a sharpness-aware base's step: refresh before, precondition after it."""
        if part == "first_step":
            self._prepare(any_gradient=False)
            known = not self._tracked.is_identity
            self._halfway = DampedUpdate(self._tracked.flat, within=True) if known else None
        returned = getattr(self.base, part)(*args, **kwargs)
        if part == last_part(self.base):
            update, self._halfway = self._halfway, None
            if update is not None:
                self._finish(update)
            self._count_step()
        return returned

    def report(self) -> PreconditionerReport:
        """Return what was done so far, what it took, and the spectrum found; ``print`` it."""
        return make_report(
            self._group, self._tracked.current, self._refresh, self._step_seconds, self.base
        )

    def _prepare(self, any_gradient: bool) -> None:
        """Bring the eigenspace up to date before a step."""
        self._follow_parameters()
        group, tracked = self._group, self._tracked
        if self._refresh.is_due(tracked, group):
            gradients = (p.grad for g in self.param_groups for p in g["params"])
            if any_gradient or tracked.flat.any_of(gradients):
                name = type(self.base).__name__
                self._refresh.run(tracked, self.param_groups, name, self._say_once)
            else:
                tracked.allocate(group[RANK])  # nothing to precondition; the next step will see
        tracked.set_damping(group[DAMPING])

    def _step_base(self, closure: Callable[[], Any] | None) -> Any:
        """Let the base step, at the automatic rate if there is one."""
        start = time.perf_counter()
        with multiplied_rates(self.param_groups, self._group[FACTOR]):
            returned = self.base.step() if closure is None else self.base.step(closure)
        self._base_seconds += time.perf_counter() - start
        return returned

    def _finish(self, update: DampedUpdate) -> None:
        """Multiply an update by P."""
        P, flat = self._tracked.current, self._tracked.flat
        if P is None:
            return
        if "copies" not in self._said and not flat.is_sharded and not perturbs(self.base):
            self._said.add("copies")  # looked for once
            found = copies_of_weights(self.base, update.moving())
            if found:
                warn_user(say_copies(self.base, found), CurvatureWarning)
        update.finish(P)

    def _count_step(self) -> None:
        # A step before the first gradient is none: so distributed checkpoints ask for the state.
        schedule = self._schedule
        steps = self._group[STEP] + (schedule.last is not None)
        self._write({STEP: steps, LAST: schedule.last, DUE: schedule.due})

    # -- the eigenspace -------------------------------------------------------------------------

    def _follow_parameters(self) -> None:
        """Start over where parameters were added, frozen, freed, moved or replaced."""
        complete_groups(self.param_groups, self._own)
        chosen = trained_parameters(self.model, self.param_groups, self._selection)
        same = self._tracked.flat.are(chosen.values()) and self._tracker.names == list(chosen)
        if chosen and not same:  # pruning gives the same parameters other names
            self._tracked = self._track(chosen)
            self._write({LAST: None, DUE: None, FACTOR: 1.0})

    def _track(self, chosen: dict[str, nn.Parameter]) -> TrackedPreconditioner:
        self._tracker.follow(list(chosen))
        return TrackedPreconditioner(list(chosen.values()), self._tracker)

    # -- groups, state, copies ------------------------------------------------------------------

    @property
    def _group(self) -> dict[str, Any]:
        return self.base.param_groups[0]

    def _write(self, counters: dict[str, Any]) -> None:
        write_to_groups(self.param_groups, counters)

    def _say_once(self, kind: str, message: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            warn_user(message, CurvatureWarning)

    def state_dict(self) -> dict[str, Any]:
        """Return the base's state dict with the eigenspace, by parameter, and the counters.

        It holds tensors and plain values alone, for ``torch.load(weights_only=True)``.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        self._follow_parameters()
        out = join_state(self.base.state_dict(), self.param_groups, self._tracked.state())
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            changed = post_hook(self, out)
            out = out if changed is None else changed
        return out

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken, with the same bits if the model does so too.

        A state dict of the base alone is taken as well, and one with the eigenspace of other
        parameters, say of those that were not frozen then: it is computed at the next step.

        Raises:
            ValueError: If it is another model's; nothing has changed then, unless the base's own
                `load_state_dict` raised it.
        """
        state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = pre_hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        self._follow_parameters()
        base, entries, groups = split_state(
            state_dict, self.param_groups, self._tracked.flat.parameters
        )
        read = self._tracked.read(entries)
        self.base.load_state_dict(base)
        for group, saved in zip(self.param_groups, groups, strict=False):
            group.update(own_settings(saved))
        complete_groups(self.param_groups, self._own)
        self._tracked.take(read, self._group[RANK], self._group[DAMPING])
        if read is None:
            self._write({LAST: None, DUE: None, FACTOR: 1.0})
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __getstate__(self) -> dict[str, Any]:
        """Return all there is, model and base among it: a copy's model is its `model`."""
        kept = {k: v for k, v in self.__dict__.items() if k != "step"}  # a scheduler's wrapper
        return {k: v for k, v in kept.items() if not k.startswith("_optimizer_")}

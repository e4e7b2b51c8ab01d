"""Report of a preconditioned optimizer: refreshes, costs and findings."""

from __future__ import annotations

from dataclasses import dataclass

from hesscurv.interface.notebook_html import Points, draw_points, notebook_html
from hesscurv.optim.preconditioner.low_rank_preconditioner import LowRankPreconditioner

_LITTLE_TO_GAIN = 2.0


class CurvatureWarning(UserWarning):
    """Curvature could not be computed, or there is little to gain by it; training goes on.

    Example:
        >>> issubclass(hesscurv.optim.CurvatureWarning, UserWarning)
        True
    """


@dataclass(frozen=True)
class PreconditionerReport:
    """What `PreconditionedOptimizer.report` returns; ``print`` it.

    Args:
        steps: Steps taken.
        refreshes: Times that the eigenspace was computed.
        failures: Times that it could not be.
        num_matvecs: Products with the curvature.
        seconds: Since the first step.
        refresh_seconds: Of these, refreshes, checks of drift among them.
        step_seconds: Of these, preconditioning the steps.
        eigenvalues: The top r + 1, largest magnitude first; empty where none are known.
        gains: s_1 .. s_r.
        damping: mu.
        stable_rate: The largest stable learning rate without preconditioning, on the quadratic
            model, for the first group's momentum if it has any.
        stable_rate_after: The same with it.
        rate_factor: What multiplies the groups' learning rates; 1 but for the automatic rate.
        last_failure: Why the eigenspace could not be computed the last time; empty without any.

    Example:
        >>> net = copy.deepcopy(model)
        >>> sgd = torch.optim.SGD(net.parameters(), lr=0.1)
        >>> optimizer = hesscurv.optim.PreconditionedOptimizer(sgd, net, task, batches, rank=2)
        >>> report = optimizer.report()
        >>> report.steps, report.eigenvalues
        (0, [])
    """

    steps: int
    refreshes: int
    failures: int
    num_matvecs: int
    seconds: float
    refresh_seconds: float
    step_seconds: float
    eigenvalues: list[float]
    gains: list[float]
    damping: float
    stable_rate: float
    stable_rate_after: float
    rate_factor: float
    last_failure: str = ""

    @property
    def refresh_fraction(self) -> float:
        """The share of the time that refreshes took."""
        return self.refresh_seconds / max(self.seconds, 1e-9)

    def _repr_html_(self) -> str:
        """Show the numbers, and the eigenvalues by rank."""
        facts = {
            "steps": self.steps,
            "refreshes": self.refreshes,
            "failures": self.failures,
            "products": self.num_matvecs,
            "time in refreshes": f"{self.refresh_fraction:.1%}",
            "damping": self.damping,
            "stable rate": self.stable_rate,
            "with it": self.stable_rate_after,
        }
        if self.last_failure:
            facts["last failure"] = self.last_failure
        values = self.eigenvalues
        line = Points("eigenvalues", range(1, len(values) + 1), [abs(v) for v in values])
        return notebook_html(
            "Preconditioned optimizer",
            facts,
            drawing=draw_points([line], x="rank", y="|eigenvalue|", logarithmic=True),
        )

    def __str__(self) -> str:
        """Tell it in two to four lines."""
        lines = [
            f"{self.steps} steps in {self.seconds:.3g} s; {self.refreshes} refreshes of the "
            f"eigenspace, {self.num_matvecs} products, {self.refresh_fraction:.1%} of the time; "
            f"preconditioning of steps {self.step_seconds / max(self.seconds, 1e-9):.1%}"
        ]
        if self.failures:
            why = self.last_failure.partition("\n")[0]
            times = f"{self.failures} time{'s' * (self.failures != 1)}"
            lines.append(f"curvature failed {times}" + (f", at last by {why}" if why else ""))
        if not self.gains:
            return "\n".join([*lines, "no eigenspace: steps are the base's own"])
        r = len(self.gains)
        after = (
            f", |lambda_{r + 1}| = {abs(self.eigenvalues[r]):.3g}"
            if len(self.eigenvalues) > r
            else ""
        )
        lines.append(
            f"|lambda_1| = {abs(self.eigenvalues[0]):.3g}, |lambda_{r}| = "
            f"{abs(self.eigenvalues[r - 1]):.3g}{after}; damping {self.damping:.3g}, gains "
            f"{min(self.gains):.3g} to {max(self.gains):.3g}"
        )
        rate = f"stable learning rate {self.stable_rate:.3g} -> {self.stable_rate_after:.3g}"
        if self.rate_factor != 1:
            rate += f"; the groups' rates are multiplied by {self.rate_factor:.3g}"
        return "\n".join([*lines, rate])


def little_to_gain(P: LowRankPreconditioner | None) -> str | None:
    """Return what to say of a preconditioner whose directions hardly stand out; None else."""
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

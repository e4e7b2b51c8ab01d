"""The common part of the Hessian, GGN and Fisher: data, memory, way of computing, checks."""

from __future__ import annotations

import gc
import logging
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hesscurv.distributed import Communicator
from hesscurv.linalg.precision import ROUNDING
from hesscurv.objective.means.mean_check import MeanCheck
from hesscurv.objective.memory import MemoryPlan
from hesscurv.objective.micro_batches import MicroBatches
from hesscurv.objective.objective import Objective
from hesscurv.objective.parameters import ParamSelection
from hesscurv.objective.running.environment import differentiable
from hesscurv.operators.blocks import BlockCutter, put_block
from hesscurv.operators.checks.agreement import CONFIRM_FROM, Agreement, Combination
from hesscurv.operators.checks.compared_products import (
    confirm,
    multiply_compared,
    require_finite_product,
)
from hesscurv.operators.checks.construction import (
    check_dependent,
    check_deterministic,
    check_loss,
    check_symmetric,
)
from hesscurv.operators.checks.derivative_check import Slope
from hesscurv.operators.checks.embedding_gradients import check_gradients
from hesscurv.operators.checks.missing_derivatives import Differentiation
from hesscurv.operators.checks.references import explaining, on_batch, with_reference
from hesscurv.operators.summed_operator import SummedOperator, device_of
from hesscurv.operators.timing.calibration import Calibration
from hesscurv.operators.timing.way_choice import EXPECTED, WayChoice
from hesscurv.operators.ways.linearizations import Linearization

logger = logging.getLogger(__name__)


class CurvatureOperator(SummedOperator):
    """A curvature matrix of a model's mean loss over all batches, by products.

    Products loop over batches outside and vectors inside: a batch is read, and its derivative
    set up, once for all vectors of a block; what fits the memory budget is kept for later blocks
    until a weight changes.

    On many ranks, where `torch.distributed` is initialised, each passes its own share of the
    batches, which may differ in number and size and be none: ``H @ V`` with the same V on every
    rank is the product with the mean over all ranks' samples, the same on every rank. Closures
    without batches count alike. All ranks must have the same weights, and call the same methods;
    what fails on one of them is an error on all. `product_on`, `prepare` and `run` are local.

    Args:
        model: The module, on its device, in any mode; left as found.
        task: See `Objective`; `supervised(loss)` for ``(inputs, targets)`` batches.
        batches: An iterable of batches that can be iterated again, on many ranks this one's share;
            None for a closure.
        params: Which parameters: None (all that require grad), names, parameters, or a predicate.
        training: Mode of the modules during products: False (default) as in inference, True as in
            training, None as found.
        compute_dtype: Dtype of computation and vectors; default the parameters' own, float32 for
            half-precision weights. float64 gives products free of float32 noise.
        way: How to compute: "auto" measures and chooses; "reference" takes the way that others are
            compared with; otherwise one of the class's `ways`.
        memory_budget: Bytes for graphs and blocks of vectors; default an eighth of the machine's
            memory, or a quarter of the GPU's. Batches that need more are cut into micro-batches.
        check: Evaluate every batch once, test that a loss which is not one of torch's is a mean
            over samples, and probe determinism and symmetry at construction.
        precision: What the model's products are computed in: "highest" (default), the compute
            dtype's own whatever the process allows; "tf32", float32 on tensor cores; "bf16",
            autocast to bfloat16. With the last two `eigsh` measures the error of the products, and
            adds it to the residuals.
        process_group: The ranks that share the batches; default all where `torch.distributed` is
            initialised. A model that FSDP2 shards needs all ranks that hold its shards.

    Raises:
        TypeError: If an argument is of a wrong type, or batches are a one-shot iterator.
        ValueError: If batches are empty, the loss is not a finite scalar or no mean over samples,
            nothing requires grad, or the operator is not deterministic or not symmetric; on all
            ranks, if their weights or arguments differ.
        DistributedError: If another rank fails.
    """

    ways: tuple[str, ...] = ()  # the first is the reference that others must agree with
    loops: tuple[str, ...] = ()  # those that take vectors one by one
    traced: tuple[str, ...] = ()  # those with a long set-up
    needs_parts = False  # whether the task must have the parts `outputs` and `loss`
    extra_ways: tuple[str, ...] = ()  # not tried by themselves on CPUs
    fallbacks: tuple[str, ...] = ()  # further references, where the first has no derivative

    def __init__(
        self,
        model: nn.Module,
        task: Callable[..., Tensor],
        batches: Iterable[Any] | None = None,
        params: ParamSelection = None,
        *,
        training: bool | None = False,
        compute_dtype: torch.dtype | None = None,
        way: str = "auto",
        memory_budget: int | None = None,
        check: bool = True,
        process_group: Any = None,
        precision: str = "highest",
    ) -> None:
        communicator = Communicator.of(process_group, device_of(model))
        known = self.ways + self.extra_ways
        with communicator.together("reading the arguments"), torch.inference_mode(False):
            if way not in ("auto", "reference", *known):
                raise ValueError(f"expected way 'auto', 'reference' or one of {known}, got {way!r}")
            if precision not in ROUNDING:
                raise ValueError(f"expected precision among {list(ROUNDING)}, got {precision!r}")
            objective = Objective(
                model,
                task,
                batches,
                params,
                training=training,
                compute_dtype=compute_dtype,
                budget=memory_budget,
                may_be_empty=communicator.size > 1,
            )
            if self.needs_parts:
                _ = objective.task_parts
        super().__init__(objective, communicator)
        self.layout = objective.layout
        self._cutter = BlockCutter(self.layout)
        self.way = way
        if self.device.type == "cuda":
            self.ways = known
            # A GPU is waited for once, for the vectors and their products together.
            self.checks_late = communicator.size == 1
        self._micro_batches = MicroBatches(objective)
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self._choice = WayChoice(self)
        self._kept: dict[tuple[int, str], Linearization] = {}
        self.agreement = Agreement(self.ways[0], self.loops)
        self._record: Combination | None = None  # of all products that the reference has not given
        self._solving = False
        self._checking = check
        self.compares = check or way == "auto"  # ways with the reference, on every micro-batch
        self._count_together("the first pass over the batches")
        objective.precision = precision  # what was checked until here needs all digits

    # -- what subclasses say --------------------------------------------------------------------

    @abstractmethod
    def _linearize(self, way: str, params: tuple[Tensor, ...], batch: Any) -> Linearization:
        """Set up the product of one batch's curvature with blocks of vectors."""

    @abstractmethod
    def needs(self, batch: Any) -> Iterable[Differentiation]:
        """Return what is differentiated on a batch, and how often."""

    def _slope(self) -> Slope:
        """Return what this curvature differentiates, to be compared with differences."""
        return Slope("the loss", True, self.objective.loss)

    def _check_batch(self, params: tuple[Tensor, ...], batch: Any, loss: Tensor) -> None:
        """Refuse a batch that this kind of curvature cannot be computed on."""

    # -- products -------------------------------------------------------------------------------

    def _own_product(self, vectors_BD: Tensor) -> Tensor:
        if self.own_weight == 0:
            return torch.zeros_like(vectors_BD)

        def multiply() -> Tensor:
            self._choice.prepare(len(vectors_BD))
            return self.within_memory(lambda: self._accumulate(vectors_BD))

        return with_reference(self, multiply)

    def within_memory(self, fn: Callable[[], Any]) -> Any:
        """Run, with less at once each time that memory runs out."""
        while True:
            try:
                return fn()
            except torch.OutOfMemoryError:
                pass  # and leave the handler, which keeps the failed frames' tensors alive
            self._shrink()

    def _accumulate(self, vectors_BD: Tensor) -> Tensor:
        out_BD, way = multiply_compared(self, vectors_BD)
        if not self._solving:
            # Before any of it is added to the record, which a solver's own look ends with.
            require_finite_product(self, vectors_BD, out_BD)
        if way != self.ways[0]:
            if self._record is None:
                self._record = Combination(self.layout, vectors_BD)
            self._record.add(vectors_BD, out_BD)
        return out_BD

    @contextmanager
    def solving(self) -> Iterator[None]:
        """Leave the look at products to the solver, where it would take a wait for a GPU."""
        before, self._solving = self._solving, self.checks_late
        try:
            with super().solving():
                yield
        finally:
            self._solving = before

    def confirm(self) -> None:
        """Compare all products since `expect` with the reference, by one product; warn of a gap.

        Solvers do so at their end. Every micro-batch has been compared on its first block already;
        this sees what a way does on later ones too. Nothing is done after fewer than 64 products,
        or where the reference computed all of them. The product for it does not count.

        Warns:
            RuntimeWarning: If the products differ by more than rounding, with the way and the
                micro-batch that make the difference.
        """
        record, self._record = self._record, None
        if record is None or record.count < CONFIRM_FROM or not self._checking:
            return
        confirm(self, record)

    def multiply_into(
        self,
        out_BD: Tensor,
        way: str,
        apply: Linearization,
        vectors_BD: Tensor,
        weight: float,
        chunk: int,
        *,
        add: bool,
        seen: Combination | None = None,
    ) -> None:
        """Write weight x one batch's products to `out`, or add it, `chunk` vectors at once.

        Where they are to be compared, `seen` takes them in.
        """

        def multiply() -> None:
            start = 0
            while start < len(vectors_BD):
                size = 1 if way in self.loops else min(chunk, self.memory_plan.max_vectors)
                part_BD = vectors_BD[start : start + size]
                try:
                    product = self._cutter.apply(apply, part_BD)
                except torch.OutOfMemoryError:
                    if len(part_BD) == 1:
                        raise
                    product = None
                if product is not None:
                    if seen is not None:
                        seen.add(part_BD, product)
                    put_block(self.layout, out_BD[start : start + size], product, weight, add)
                    start += size
                    continue
                plan = self.memory_plan.with_fewer_vectors(len(part_BD) // 2)
                self._micro_batches.plan = plan
                _empty_cache(self.device)
                logger.warning("out of memory: going on with %d vectors at once", plan.max_vectors)

        # Checkpointed models run their forward again inside a backward pass, so wherever the model
        # as found would compute something else, it has to be put into its mode here too.
        graph = way not in self.traced and not self.objective.computes_as_found()
        if graph or way in _RUN_MODEL_CODE:
            self.objective.run(multiply, compiling=way == "compiled")
            return
        with differentiable(self.device, self.objective.precision):
            multiply()

    def prepared(self, index: int, batch: Any, way: str) -> Linearization:
        """Return what is kept for a micro-batch, or set it up and keep it."""
        if (index, way) in self._kept:
            return self._kept[index, way]
        apply = self.prepare(batch, way)
        self.keep(way, apply, index)
        return apply

    def keep(self, way: str, apply: Linearization, index: int = 0) -> None:
        """Keep what was set up for a micro-batch, as long as weights and memory allow."""
        if self.memory_plan.keep_graphs and self.objective.batches.kept is not None:
            self._kept[index, way] = apply

    def microbatches(self) -> Iterator[tuple[int, Any, float]]:
        """Yield number, samples and share in the mean of all that goes through at once."""
        return self._micro_batches.shares(self.total_weight)

    def first_microbatch(self) -> Any:
        """Return the first batch, or the part of it that goes through at once."""
        return next(iter(self.microbatches()))[1]

    @property
    def largest_batch(self) -> Any:
        """The batch with the most samples."""
        return self._micro_batches.largest

    @property
    def memory_plan(self) -> MemoryPlan:
        """How much goes through a product at once."""
        return self._micro_batches.plan

    def product_errors(self, vectors_DB: Tensor) -> Tensor | None:
        """Return how far products in "tf32" or "bf16" are off; see `LinearOperator`.

        Cost: two products a vector, one of them in full precision; they do not count.
        """
        if self.objective.precision == "highest":
            return None
        before = self.num_matvecs
        reduced_DB = self @ vectors_DB
        with self.objective.at_precision("highest"):
            self._drop_graphs()
            exact_DB = self @ vectors_DB
        self._drop_graphs()
        self.num_matvecs = before
        return (exact_DB - reduced_DB).double().norm(dim=0).cpu()

    def memory_needed(self, width: int) -> int:
        """Return the bytes that graphs and vectors passing through take; see `MemoryPlan`."""
        return self.memory_plan.needed(width)

    def prepare(self, batch: Any, way: str) -> Linearization:
        """Set one batch's product up, in one way, without keeping it."""
        params = self.objective.parameters()
        return self.objective.run(lambda: self._linearize(way, params, batch))

    def run(self, apply: Linearization, vectors_BD: Tensor, way: str) -> Tensor:
        """Apply what `prepare` returned to vectors (B, D), uncounted and unweighted."""
        out_BD = torch.empty_like(vectors_BD)
        self.multiply_into(out_BD, way, apply, vectors_BD, 1.0, len(vectors_BD), add=False)
        return out_BD

    def product_on(self, batch: Any, vectors_BD: Tensor, way: str | None = None) -> Tensor:
        """Return one batch's curvature times vectors (B, D), by the reference way by default."""

        def multiply() -> Tensor:
            chosen = way or self.ways[0]
            with on_batch(chosen, batch):
                return self.run(self.prepare(batch, chosen), vectors_BD, chosen)

        return with_reference(self, multiply)

    def release(self) -> None:
        """Give up graphs and copies of the weights; the next product takes them anew."""
        self._forget()
        self.objective.release()

    # -- the reference --------------------------------------------------------------------------

    def take_reference(self, way: str) -> None:
        """Let products agree with another way from here on, the first one having failed."""
        failed = self.ways[0]
        self.ways = (way, *(w for w in self.ways if w not in (way, failed)))
        self.agreement = Agreement(way, self.loops)
        self._record = None
        self._drop_graphs()
        self._choice.forget()

    def refuse_way(self, index: int, way: str, reason: str) -> None:
        """Take the reference on a micro-batch from here on, in place of a way."""
        self.agreement.refuse(index, way, reason)
        self._kept.pop((index, way), None)

    def leave_out(self, way: str) -> None:
        """Choose among the other ways from here on."""
        self._choice.leave_out(way)

    def describe_microbatch(self, index: int) -> str:
        """Say which micro-batch a number is, for messages."""
        return self._micro_batches.describe(index, self.total_weight)

    # -- choosing the way -----------------------------------------------------------------------

    def choice(self, width: int) -> tuple[str, int]:
        """Return the way and the number of vectors at once for a block of `width` vectors."""
        return self._choice.choose(width)

    def calibrate(self, expected: int = EXPECTED) -> Calibration:
        """Measure which way is fastest for how many vectors, on the first micro-batch.

        Done once, by itself when products come in numbers; eigensolvers call it first. The products
        done for it do not count in `num_matvecs`.

        Args:
            expected: The number of products to come with the same weights, in all: ways with a long
                set-up pay off over many. From here on choices are made for at least so many.

        Returns:
            The measured seconds per vector of every way, on this rank.
        """
        with self.communicator.together("measuring the ways of computing"):
            return with_reference(self, lambda: self._choice.calibrate(expected))

    def expect(self, products: int) -> None:
        """Choose the way for so many products from here on, whatever was computed before.

        A solver says so first: the same call then takes the same steps on a new operator and on one
        that has been used.
        """
        self._choice.expect(products)
        self.objective.compare_loss()
        self._record = None

    def settings(self) -> dict[str, Any]:
        """Return what the choice of the way rests on; see `LinearOperator`."""
        return self._choice.state()

    def adopt(self, settings: dict[str, Any]) -> None:
        """Choose from here on as the operator did whose `settings` these are."""
        self._choice.load(settings)

    def seconds_per_vector(self, block: int) -> float:
        """Return the predicted seconds per vector and pass over the data, in blocks of `block`.

        On many ranks the slowest one's, the same on all of them, and to be called on all.
        """
        with self.communicator.together("measuring the ways of computing"):
            block = max(1, min(block, self.memory_plan.max_vectors))
            seconds = with_reference(self, lambda: self._choice.seconds_per_vector(block))
            own = seconds * self.objective.batches.count
        return own if self.communicator.size == 1 else self.largest_of_all(own)

    # -- set-up and memory ----------------------------------------------------------------------

    def _look_at_data(self) -> None:
        objective, micro_batches = self.objective, self._micro_batches
        means = MeanCheck(objective)
        for i, batch in enumerate(objective.batches.first_pass()):
            if not self._add_weight(i, batch):
                continue
            micro_batches.note(batch)
            if self._checking:
                with explaining(self, batch), objective.environment():
                    loss = check_loss(objective, i, batch)
                    self._check_batch(objective.parameters(), batch, loss)
                means.look_at(i, batch)
        if self.own_weight == 0:
            return
        if self._checking:
            check_deterministic(objective, micro_batches.largest)
            means.refuse(self.communicator.size)
        with explaining(self, micro_batches.largest):
            micro_batches.make_plan(self._checking)
        if self._checking:
            few = micro_batches.few(32)
            with explaining(self, few):
                check_dependent(objective, few)
            with_reference(self, lambda: check_symmetric(self, few))
            check_gradients(objective, micro_batches.few(8), self._slope())

    def _forget(self) -> None:
        self._drop_graphs()
        self._micro_batches.forget_weights()
        self._record = None
        if self.objective.batches.reads == self._counted:
            self.agreement.weights_changed(self._choice.expected)
        else:
            self.agreement.forget()
        if self.objective.is_closure:  # what it has captured is compiled in
            self._compiled.clear()

    def _count(self) -> None:
        if self.largest_batch is None:  # the first batches of this rank
            with self.objective.at_precision("highest"):
                self._look_at_data()
        else:
            super()._count()

    def _drop_graphs(self) -> None:
        traced = any(way in self.traced for _, way in self._kept)
        self._kept.clear()
        if traced:  # a recorded graph is a cycle, which else would stay a while
            gc.collect()

    def _shrink(self) -> None:
        self._drop_graphs()
        _empty_cache(self.device)
        if self._micro_batches.shrink():
            self.agreement.forget()
        else:
            self._choice.forget()


_RUN_MODEL_CODE = ("vmapped", "compiled", "forward")


def _empty_cache(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()

"""The common part of the Hessian, GGN and Fisher: data, memory, way of computing, checks."""

from __future__ import annotations

import gc
import logging
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hesscurv.distributed import Communicator
from hesscurv.operators.batches import split
from hesscurv.operators.blocks import cut_block, put_block
from hesscurv.operators.calibration import Calibration
from hesscurv.operators.environment import differentiable
from hesscurv.operators.linearizations import Linearization
from hesscurv.operators.mean_check import MeanCheck
from hesscurv.operators.memory import (
    MemoryPlan,
    is_mean_over_parts,
    is_mean_over_samples,
    plan_memory,
    weighed_part,
)
from hesscurv.operators.objective import Objective
from hesscurv.operators.parameters import ParamSelection
from hesscurv.operators.probe import (
    check_dependent,
    check_deterministic,
    check_finite,
    check_symmetric,
)
from hesscurv.operators.samples import num_rows
from hesscurv.operators.summed_operator import SummedOperator, device_of
from hesscurv.operators.way_choice import EXPECTED, WayChoice

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
        way: How to compute: "auto" measures and chooses; otherwise one of the class's `ways`.
        memory_budget: Bytes for graphs and blocks of vectors; default an eighth of the machine's
            memory, or a quarter of the GPU's. Batches that need more are cut into micro-batches.
        check: Evaluate every batch once, test that a loss which is not one of torch's is a mean
            over samples, and probe determinism and symmetry at construction.
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
    ) -> None:
        communicator = Communicator.of(process_group, device_of(model))
        known = self.ways + self.extra_ways
        with communicator.together("reading the arguments"), torch.inference_mode(False):
            if way != "auto" and way not in known:
                raise ValueError(f"expected way 'auto' or one of {known}, got {way!r}")
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
        self.way = way
        if self.device.type == "cuda":
            self.ways = known
        self._plan = MemoryPlan(self.objective.budget)
        self._separable = False
        self._largest: Any = None
        self._compiled: dict[Any, Callable[..., Any]] = {}
        self._choice = WayChoice(self, check)
        self._kept: dict[tuple[int, str], Linearization] = {}
        self.verified = {self.ways[0]}  # the ways known to agree with the reference
        self._checking = check
        self._count_together("the first pass over the batches")

    # -- what subclasses say --------------------------------------------------------------------

    @abstractmethod
    def _linearize(self, way: str, params: tuple[Tensor, ...], batch: Any) -> Linearization:
        """Set up the product of one batch's curvature with blocks of vectors."""

    def _check_batch(self, params: tuple[Tensor, ...], batch: Any, loss: Tensor) -> None:
        """Refuse a batch that this kind of curvature cannot be computed on."""

    # -- products -------------------------------------------------------------------------------

    def _own_product(self, vectors_BD: Tensor) -> Tensor:
        if self.own_weight == 0:
            return torch.zeros_like(vectors_BD)
        self._choice.prepare(len(vectors_BD))
        out_BD = self.within_memory(lambda: self._accumulate(vectors_BD))
        if not bool(torch.stack(out_BD.aminmax()).isfinite().all()):  # NaN propagates
            raise ValueError(
                "the product has NaN or inf entries, so the loss has no finite second derivative "
                "here; look for overflow, sqrt or norm at zero, or try compute_dtype=torch.float64"
            )
        return out_BD

    def within_memory(self, fn: Callable[[], Any]) -> Any:
        """Run, with less at once each time that memory runs out."""
        while True:
            try:
                return fn()
            except torch.OutOfMemoryError:
                pass  # and leave the handler, which keeps the failed frames' tensors alive
            self._shrink()

    def _accumulate(self, vectors_BD: Tensor) -> Tensor:
        out_BD = torch.empty_like(vectors_BD)
        way, chunk = self.choice(vectors_BD.shape[0])
        for number, (index, batch, weight) in enumerate(self.microbatches()):
            apply = self._prepared(index, batch, way)
            self._multiply_into(out_BD, way, apply, vectors_BD, weight, chunk, add=number > 0)
        return out_BD

    def _multiply_into(
        self,
        out_BD: Tensor,
        way: str,
        apply: Linearization,
        vectors_BD: Tensor,
        weight: float,
        chunk: int,
        *,
        add: bool,
    ) -> None:
        """Write weight x one batch's products to `out`, or add it, `chunk` vectors at once."""

        def multiply() -> None:
            start = 0
            while start < len(vectors_BD):
                size = 1 if way in self.loops else min(chunk, self._plan.max_vectors)
                part_BD = vectors_BD[start : start + size]
                try:
                    product = apply(cut_block(self.layout, part_BD))
                except torch.OutOfMemoryError:
                    if len(part_BD) == 1:
                        raise
                    product = None
                if product is not None:
                    put_block(self.layout, out_BD[start : start + size], product, weight, add)
                    start += size
                    continue
                self._plan = self._plan.with_fewer_vectors(len(part_BD) // 2)
                _empty_cache(self.device)
                logger.warning(
                    "out of memory: going on with %d vectors at once", self._plan.max_vectors
                )

        # Checkpointed models run their forward again inside a backward pass, so wherever the model
        # as found would compute something else, it has to be put into its mode here too.
        graph = way not in self.traced and not self.objective.computes_as_found()
        if graph or way in _RUN_MODEL_CODE:
            self.objective.run(multiply, compiling=way == "compiled")
            return
        with differentiable(self.device):
            multiply()

    def _prepared(self, index: int, batch: Any, way: str) -> Linearization:
        if (index, way) in self._kept:
            return self._kept[index, way]
        apply = self.prepare(batch, way)
        self.keep(way, apply, index)
        return apply

    def keep(self, way: str, apply: Linearization, index: int = 0) -> None:
        """Keep what was set up for a micro-batch, as long as weights and memory allow."""
        if self._plan.keep_graphs and self.objective.batches.kept is not None:
            self._kept[index, way] = apply

    def microbatches(self) -> Iterator[tuple[int, Any, float]]:
        """Yield number, samples and share in the mean of all that goes through at once."""
        index = 0
        for batch in self.objective.batches:
            share = self.objective.weight(batch) / self.total_weight
            if share == 0:  # nothing in it to average over
                continue
            parts = split(batch, self._plan.max_samples) if self._separable else [batch]
            # Each part has its own mean: weigh the parts of one batch by their weights.
            weights = [self.objective.weight(p) for p in parts] if len(parts) > 1 else [1.0]
            for part, w in zip(parts, weights, strict=True):
                if w != 0:
                    yield index, part, share * w / sum(weights)
                    index += 1

    def first_microbatch(self) -> Any:
        """Return the first batch, or the part of it that goes through at once."""
        return next(iter(self.microbatches()))[1]

    @property
    def memory_plan(self) -> MemoryPlan:
        """How much goes through a product at once."""
        return self._plan

    def prepare(self, batch: Any, way: str) -> Linearization:
        """Set one batch's product up, in one way, without keeping it."""
        params = self.objective.parameters()
        return self.objective.run(lambda: self._linearize(way, params, batch))

    def run(self, apply: Linearization, vectors_BD: Tensor, way: str) -> Tensor:
        """Apply what `prepare` returned to vectors (B, D), uncounted and unweighted."""
        out_BD = torch.empty_like(vectors_BD)
        self._multiply_into(out_BD, way, apply, vectors_BD, 1.0, len(vectors_BD), add=False)
        return out_BD

    def product_on(self, batch: Any, vectors_BD: Tensor, way: str | None = None) -> Tensor:
        """Return one batch's curvature times vectors (B, D), by the reference way by default."""
        way = way or self.ways[0]
        return self.run(self.prepare(batch, way), vectors_BD, way)

    def release(self) -> None:
        """Give up graphs and copies of the weights; the next product takes them anew."""
        self._forget()
        self.objective.release()

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
            return self._choice.calibrate(expected)

    def expect(self, products: int) -> None:
        """Choose the way for so many products from here on, whatever was computed before.

        A solver says so first: the same call then takes the same steps on a new operator and on one
        that has been used.
        """
        self._choice.expect(products)

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
            block = max(1, min(block, self._plan.max_vectors))
            own = self._choice.seconds_per_vector(block) * self.objective.batches.count
        return own if self.communicator.size == 1 else self.largest_of_all(own)

    # -- set-up and memory ----------------------------------------------------------------------

    def _look_at_data(self) -> None:
        objective, means = self.objective, MeanCheck(self.objective)
        for i, batch in enumerate(objective.batches.first_pass()):
            weight = self._add_weight(i, batch)
            is_larger = num_rows(batch) > num_rows(self._largest)
            if weight and (self._largest is None or is_larger):
                self._largest = batch
            if self._checking and weight:
                with objective.environment():
                    params = objective.parameters()
                    loss = objective.loss(params, batch).detach()
                    check_finite(loss, i)
                    self._check_batch(params, batch, loss)
                means.look_at(i, batch)
        if self.own_weight == 0:
            return
        if self._checking:
            check_deterministic(objective, self._largest)
            means.refuse(self.communicator.size)
        self._set_separable(is_mean_over_samples(objective, self._largest))
        if self._checking:
            if not self._may_cut(self._plan.max_samples):
                self._set_separable(False)
            few = weighed_part(objective, self._largest, 32) if self._separable else self._largest
            check_dependent(objective, few)
            check_symmetric(self, few)

    def _set_separable(self, separable: bool) -> None:
        self._separable = separable
        self.objective.batches.ordered = not separable
        self._plan = plan_memory(self.objective, self.objective.budget, self._largest, separable)

    def _may_cut(self, size: int) -> bool:
        """Whether every batch's loss is its parts' mean; cheap where no batch has to be cut."""
        return num_rows(self._largest) <= size or all(
            is_mean_over_parts(self.objective, batch, size)
            for batch in self.objective.batches
            if num_rows(batch) > size and self.objective.weight(batch)
        )

    def _forget(self) -> None:
        self._drop_graphs()
        if self.objective.is_closure:  # what it has captured is compiled in
            self._compiled.clear()

    def _count(self) -> None:
        if self._largest is None:  # the first batches of this rank
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
        if self._plan.keep_graphs:
            logger.warning("out of memory: going on without keeping graphs between products")
            self._plan = self._plan.without_kept_graphs()
            self._choice.forget()
            return
        samples = min(self._plan.max_samples, num_rows(self._largest)) // 2
        if samples == 0 or not self._separable or not self._may_cut(samples):
            raise torch.OutOfMemoryError(
                "out of memory for a single vector on "
                + ("one sample" if samples == 0 else "one batch, which cannot be cut")
                + "; use smaller batches, a subset of the parameters, or a larger device"
            )
        logger.warning("out of memory: going on with micro-batches of %d samples", samples)
        self._plan = self._plan.with_fewer_samples(samples)


_RUN_MODEL_CODE = ("vmapped", "compiled")


def _empty_cache(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()

"""Test that a loss is the mean over samples implied by the weights of its batches.

The loss over all data is ``sum_b (w_b / W) L_b``, with w_b from `weight(batch)`. It is independent
of the batching if a batch's loss is the weighted mean over any two parts:
``L = (w_1 L_1 + w_2 L_2) / (w_1 + w_2)``. This is tested for tasks that do not define `weight`: on
rows of fixed outputs if the task has two parts, so that batch statistics inside the model do not
matter, otherwise through the model.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hesscurv.objective.data.batches import select_rows
from hesscurv.objective.data.samples import (
    TARGET_KEYS,
    counts_graphs_by_chance,
    describe,
    first_dimensions,
    is_cuttable,
    is_list_of_samples,
    map_tensors,
    num_rows,
    tensors_of,
)
from hesscurv.objective.means.mean_dimensions import OtherDimensions
from hesscurv.objective.means.mean_findings import Finding, judge
from hesscurv.objective.memory import coarser, losses_of_parts, moved_parameters
from hesscurv.objective.objective import Objective
from hesscurv.objective.tasks import SupervisedTask, Task, split_batch

_MOST_JOINED = 2  # batches that are joined and run through the model
_MOST_MOVED = 4  # batches that are also run at other weights


class MeanCheck:
    """Tests the batches of an operator as they are first read.

    Args:
        objective: The objective, refreshed.

    Cost: about one forward pass over the data, and a few more evaluations of the loss on fixed
    outputs; for torch's own losses one forward pass of the first batch.
    """

    def __init__(self, objective: Objective) -> None:
        self._objective = objective
        self._task: Any = objective.task
        self._is_torch_loss = getattr(self._task, "torch_loss", None) is not None
        self._tested = not objective.is_closure and not says_its_weight(self._task)
        self._has_parts = (
            callable(getattr(self._task, "outputs", None))
            and callable(getattr(self._task, "loss", None))
            and isinstance(self._task, Task)
            and type(self._task).__call__ is Task.__call__
        )
        self._failure: tuple[int, Any, Finding] | None = None
        self._before: tuple[Any, Tensor | None] | None = None  # the previous batch and its outputs
        self._uncut: tuple[int, Any] | None = None
        self._layouts: set[tuple[int, ...]] = set()
        self._others = OtherDimensions(objective)
        self._along: tuple[int, Any, int] | None = None  # a second dimension of the mean
        self._seen = self._joined = 0

    def look_at(self, index: int, batch: Any) -> None:
        """Test one batch, of positive weight, and its union with the previous one."""
        self._seen += 1
        if not self._tested or (self._is_torch_loss and self._seen > 1):
            return
        self._layouts.add(first_dimensions(batch))
        objective, out, found = self._objective, None, None
        with objective.environment(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an unsplittable batch may warn about shapes
            if self._has_parts:
                with contextlib.suppress(TypeError):  # several output tensors: fine for the Hessian
                    out = objective.outputs(objective.parameters(), batch).detach()
            if out is not None:
                found = self._on_fixed_outputs(out, batch)
        if self._is_torch_loss:
            # The divisor is known, unless outputs broadcast against their targets.
            self._note(index, batch, found)
            return
        if found is None or not found.holds:
            found = self._through_the_model(batch) or found
        self._note(index, batch, found)
        if self._along is None and (found is None or found.holds):
            size = self._others.look_at(out, batch)
            self._along = None if size is None else (index, batch, size)
        if found is None and num_rows(batch) > 1:
            self._uncut = self._uncut or (index, batch)
        if self._before is not None and (
            out is not None or self._joined < _MOST_JOINED or num_rows(batch) == 1
        ):
            self._note(index, batch, self._on_union(batch, out))
        self._before = batch, out

    def refuse(self, ranks: int = 1) -> None:
        """Refuse a loss that is not a mean over samples.

        The curvature of a single batch is well defined, however its loss depends on the samples: it
        is refused only if the loss is a sum, whose size depends on their number.

        Args:
            ranks: Number of ranks over which batches are averaged.

        Raises:
            ValueError: With the remedy.
        """
        many = self._seen > 1 or ranks > 1
        if self._failure is not None and (many or self._failure[2].is_sum):
            index, batch, found = self._failure
            cause, remedy = self._explain(found)
            raise ValueError(
                f"expected a loss that is a mean over samples, got {found.loss:.6g} for samples of "
                f"batch {index}, {describe(batch)}, together, and {found.mean:.6g} as the mean of "
                f"their parts: {cause}, so that the matrix would depend on how data are batched; "
                f"{remedy}"
            )
        if many and self._along is not None:
            index, batch, size = self._along
            raise ValueError(
                f"expected batches whose number of samples is certain, got batch {index}, "
                f"{describe(batch)}: its loss is a mean over the first dimension, {num_rows(batch)}"
                f", and over another one as well, {size}, in which batches differ; say whether "
                "rows, columns or entries count: define weight(batch) in a subclass of "
                "hesscurv.Task"
            )
        if many and self._uncut is not None:
            self._require_certain_number(*self._uncut)

    # -- the tests ------------------------------------------------------------------------------

    def _on_fixed_outputs(self, out: Tensor, batch: Any) -> Finding | None:
        """Compare the loss of some outputs with that of their rows; None if not splittable."""
        n = len(out) if out.ndim else 1
        if n < 2 or not is_cuttable(batch) or not self._has_rows(batch, n):
            return None
        found = self._on_rows(out, batch)
        if found is not None and not found.holds:
            return found
        # If all outputs are equal, as for a zero last layer, every weighted mean is the same.
        for other in _other_outputs(out):
            also = self._on_rows(other, batch)
            if also is not None:
                return also
        return found

    def _on_rows(self, out: Tensor, batch: Any) -> Finding | None:
        n = len(out)
        generator = torch.Generator("cpu").manual_seed(0)
        order = torch.randperm(n, generator=generator, device="cpu").to(out.device)
        # Consecutive and random halves: in ordered data either may coincide by chance.
        cuts: list[list[Any]] = [[slice(0, n // 2), slice(n // 2, n)]]
        if n > 2:
            cuts.append([order[: n // 3], order[n // 3 :]])
        found = None
        for cut in cuts:
            parts = [(out[i], select_rows(batch, i, n)) for i in (slice(None), *cut)]
            found = self._compare(parts)
            if found is None or not found.holds:
                break
        return found

    def _through_the_model(self, batch: Any) -> Finding | None:
        """Compare the loss of a batch with that of its halves; None if it cannot be split."""
        n = num_rows(batch)
        if n < 2 or not is_cuttable(batch):
            return None
        objective, half, found = self._objective, -(-n // 2), None
        try:
            for moved in (False, True)[: 1 + (self._seen <= _MOST_MOVED)]:
                params = moved_parameters(objective) if moved else objective.parameters()
                if params is None:
                    break
                got = losses_of_parts(objective, batch, half, params)
                if got is None:
                    break
                judged = judge(got.loss, got.weights, got.losses, got.dtype)
                found = judged or found
                if judged is not None and not judged.holds:
                    break
        except torch.OutOfMemoryError:
            return None
        return self._unless_of_batch(found)

    def _on_union(self, batch: Any, out: Tensor | None) -> Finding | None:
        """Compare two batches with their union; None if they cannot be joined."""
        assert self._before is not None
        objective, (before, out_before) = self._objective, self._before
        try:
            union = _join(before, batch)
            if union is None:
                return None
            with objective.environment(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if out is not None and out_before is not None and out.ndim and out_before.ndim:
                    both = torch.cat([out_before, out])
                    if self._has_rows(union, len(both)):
                        return self._compare([(both, union), (out_before, before), (out, batch)])
                self._joined += 1
                params, weights = (
                    objective.parameters(),
                    list(map(objective.weight, (before, batch))),
                )
                losses = [objective.loss(params, b).detach() for b in (union, before, batch)]
        except Exception:  # samples of different sizes, or too many at once
            return None
        dtype = coarser(losses[0].dtype, objective.dtype)
        whole, *parts = map(float, losses)
        return self._unless_of_batch(judge(whole, weights, parts, dtype))

    def _compare(self, pairs: list[tuple[Tensor, Any]]) -> Finding | None:
        """Compare the first of some outputs and batches with the others, its parts.

        In float64, so that the rounding of a loss that is a small difference does not pass for a
        different mean; in the original dtype if the loss does not support float64.
        """
        for cast in (_double, lambda value: value):
            try:
                found = [cast(pair) for pair in pairs]
                weights = [self._objective.weight(batch) for _, batch in found[1:]]
                whole = self._task.loss(*found[0]).detach()
                losses = [
                    float(self._task.loss(*pair).detach()) if w > 0 else 0.0
                    for w, pair in zip(weights, found[1:], strict=True)
                ]
                return judge(float(whole), weights, losses, whole.dtype)
            except torch.OutOfMemoryError:
                return None
            except Exception:  # rows are not samples; the loss may raise any error
                continue
        return None

    def _has_rows(self, batch: Any, n: int) -> bool:
        """Whether targets, or anything in a batch of a custom task, have n rows."""
        is_pair = isinstance(self._task, SupervisedTask)
        tensors = tensors_of(split_batch(batch)[1] if is_pair else batch)
        return any(t.ndim > 0 and len(t) == n for t in tensors)

    def _unless_of_batch(self, found: Finding | None) -> Finding | None:
        """Drop a finding explained by batch statistics, since training averages over batches too.

        A sum is kept.
        """
        if found is None or found.holds or found.is_sum:
            return found
        mode = self._objective.training
        for module in self._objective.model.modules():
            training = module.training if mode is None else mode
            if isinstance(module, nn.modules.batchnorm._NormBase):
                if training or module.running_mean is None:
                    return None
            elif training and any(name.startswith("running_") for name in module._buffers):
                return None
        return found

    # -- the outcome ----------------------------------------------------------------------------

    def _note(self, index: int, batch: Any, found: Finding | None) -> None:
        if found is None or found.holds:
            return
        if self._failure is None or (found.is_sum and not self._failure[2].is_sum):
            self._failure = index, batch, found

    def _explain(self, found: Finding) -> tuple[str, str]:
        own = "define weight(batch) in a subclass of hesscurv.Task"
        if found.is_sum:
            return (
                "the loss is a sum (reduction='sum')",
                f"use reduction='mean', or say what a batch counts: {own}",
            )
        if self._is_torch_loss:
            return (
                "the outputs and the targets have other shapes and broadcast against each other",
                f"give both the same shape, or say what a batch counts: {own}",
            )
        return (
            "it averages something else than samples (class weights, ignored targets, tokens), its "
            "samples depend on each other, or they are not along the first dimension",
            f"say what each batch counts, which is what its mean is divided by: {own}",
        )

    def _require_certain_number(self, index: int, batch: Any) -> None:
        """Refuse batches that could not be split for the test and have an ambiguous count."""
        if is_list_of_samples(batch):
            return
        if counts_graphs_by_chance(batch):
            raise ValueError(
                f"expected batches whose number of samples is known, got batch {index}, "
                f"{describe(batch)}, of {num_rows(batch)} graphs or targets, with a mask, or with "
                "no tensor of as many rows; say what each batch counts in the mean (nodes, graphs, "
                "those in the mask): define weight(batch) in a subclass of hesscurv.Task"
            )
        dimensions = {n for n in first_dimensions(batch) if n != 1}
        as_many = len({len(layout) for layout in self._layouts}) == 1
        if len(self._layouts) == 1 or (as_many and len(dimensions) < 2):
            return
        if isinstance(self._task, SupervisedTask) or _names_targets(batch):
            return
        raise ValueError(
            f"expected batches whose number of samples is known, got batch {index}, "
            f"{describe(batch)}, whose tensors have the first dimensions "
            f"{list(first_dimensions(batch))}, and which the loss does not take in parts, to tell; "
            "say what each batch counts in the mean: define weight(batch) in a subclass of "
            "hesscurv.Task"
        )


def says_its_weight(task: Any) -> bool:
    """Whether a task defines the weight of a batch, which is trusted."""
    own = getattr(task, "weight", None)
    if not callable(own) or getattr(task, "tests_mean", False):
        return False
    return getattr(own, "__func__", None) not in (Task.weight, SupervisedTask.weight)


def _other_outputs(out: Tensor) -> Iterator[Tensor]:
    """Yield outputs that differ between rows; the second are within the range of the given ones."""
    generator = torch.Generator("cpu").manual_seed(1)
    draw = torch.randn(out.shape, generator=generator, dtype=torch.float32, device="cpu").to(out)
    yield out + draw * out.square().mean().sqrt().clamp(min=1)
    yield out * (0.5 + 0.5 * draw.sigmoid())


def _double(value: Any) -> Any:
    return map_tensors(value, lambda t: t.double() if t.is_floating_point() else t)


def _names_targets(batch: Any) -> bool:
    if isinstance(batch, Mapping):
        return any(key in batch.keys() for key in TARGET_KEYS)  # noqa: SIM118 - TensorDict
    return not isinstance(batch, (list, Tensor)) and any(hasattr(batch, k) for k in TARGET_KEYS)


def _join(first: Any, second: Any) -> Any | None:
    """Join two batches; None if some part can neither be joined nor is equal."""
    if not (is_cuttable(first) and is_cuttable(second)):
        return None
    if map_tensors(first, _nothing) != map_tensors(second, _nothing):
        return None
    sizes, joined = (num_rows(first), num_rows(second)), []
    for a, b in zip(tensors_of(first), tensors_of(second), strict=True):
        if a.ndim and b.ndim and (len(a), len(b)) == sizes and a.layout is torch.strided:
            joined.append(torch.cat([a, b]).detach().requires_grad_(a.requires_grad))
        elif a.shape == b.shape and bool((a == b).all()):
            joined.append(a)
        else:
            return None
    left = iter(joined)
    return map_tensors(first, lambda _: next(left))


def _nothing(tensor: Tensor) -> None:
    return None

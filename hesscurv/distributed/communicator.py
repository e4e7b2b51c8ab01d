"""Collectives of a process group, in which a failure on one rank raises on every rank.

Shapes: B vectors of length D; a rank holds the D_local entries ``rows(D)`` of each.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hesscurv.distributed.steps import (
    DistributedError,
    Step,
    hash_text,
    is_known,
    make_known,
    name_ranks,
    who_has_what,
)

_TEXT_BYTES = 2000  # longest text sent of an error or of a value that differs
_SLAB_NUMEL = 2**22  # entries of full vectors sent per collective


class Communicator:
    """A process group, or a single process, for which every method returns its input.

    All ranks of the group call the same methods in the same order. Tensors may lie on any device:
    those that the backend cannot send are copied to a device that it can. `together` reports a
    failure on one rank to the others, which would otherwise wait for it.

    Args:
        group: The group; None for a single process.
        device: The device to send from if the backend has no CPU transport (NCCL); default the
            current one.

    Raises:
        TypeError: If `group` is not a process group.
        ValueError: If this process is not in it.

    Example:
        >>> from hesscurv.distributed import Communicator
        >>> alone = Communicator()
        >>> alone.size, alone.rank
        (1, 0)
    """

    def __repr__(self) -> str:
        """Name this process among its ranks."""
        return f"Communicator(rank={self.rank}, size={self.size})"

    def __init__(self, group: Any = None, device: torch.device | None = None) -> None:
        self.rank, self.size = 0, 1
        self.group = group
        self._routes: dict[str, str] = {}  # by the type of device, the backend
        self._device = torch.device("cpu")
        if group is None:
            return
        if group is getattr(dist.GroupMember, "NON_GROUP_MEMBER", None):
            raise ValueError(
                "expected a process group that contains this process, got one that does not; build "
                "the operator on the group's own ranks"
            )
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(
                f"expected a torch.distributed process group or None, got {type(group).__name__}"
            )
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        pairs = str(dist.get_backend_config(group)).split(",")
        self._routes = dict(pair.split(":")[:2] for pair in pairs)
        if "cpu" not in self._routes:
            kind = next(iter(self._routes))
            if device is None or device.type != kind or device.index is None:
                index = torch.get_device_module(kind).current_device()
                device = torch.device(kind, index)
            self._device = device

    @classmethod
    def of(cls, process_group: Any = None, device: torch.device | None = None) -> Communicator:
        """Return the communicator of a group, of the initialised default one, or of this process.

        Args:
            process_group: The group; None for the default one where `torch.distributed` is
                initialised, and for a single process elsewhere.
            device: See the class.
        """
        if process_group is None and dist.is_available() and dist.is_initialized():
            process_group = dist.group.WORLD
        if process_group is None:
            return cls()
        found = cls(process_group, device)
        return found if found.size > 1 else cls()

    # -- rows -----------------------------------------------------------------------------------

    def rows(self, dim: int, rank: int | None = None) -> tuple[int, int]:
        """Return the half-open range ``(start, stop)`` of a rank's rows.

        Rows are split as by `torch.chunk` and DTensor: equal parts of ceil(dim / size) rows, the
        remainder on the last ranks.

        Args:
            dim: Total number of rows.
            rank: The rank; default this one.
        """
        rank = self.rank if rank is None else rank
        share = -(-dim // self.size)
        return min(rank * share, dim), min((rank + 1) * share, dim)

    def gather_rows(self, local_BR: Tensor, dim: int) -> Tensor:
        """Gather vectors of which each rank holds its `rows`.

        Args:
            local_BR: Shape (B, D_local), B the same on all ranks.
            dim: The length D.

        Returns:
            Shape (B, D), the same on all ranks, on the device of `local_BR`. Each rank receives
            B D entries, plus a buffer for one slab of vectors in flight.
        """
        if self.size == 1:
            return local_BR
        full_BD = local_BR.new_empty(len(local_BR), dim)
        spans = [self.rows(dim, rank) for rank in range(self.size)]
        most = max(stop - start for start, stop in spans)
        for vectors in self._slabs(len(local_BR), dim):
            sent = local_BR.new_zeros(len(range(*vectors.indices(len(local_BR)))), most)
            sent[:, : local_BR.shape[1]] = local_BR[vectors]
            parts = self._all_gather(sent)
            for (start, stop), part in zip(spans, parts, strict=True):
                full_BD[vectors, start:stop] = part[:, : stop - start]
        return full_BD

    def reduce_rows(self, full_BD: Tensor) -> Tensor:
        """Sum vectors over the ranks and return this rank's `rows` of the sums.

        Args:
            full_BD: Shape (B, D), contiguous; overwritten.

        Returns:
            Shape (B, D_local), its own memory.
        """
        if self.size == 1:
            return full_BD
        start, stop = self.rows(full_BD.shape[1])
        scatter = getattr(dist, "reduce_scatter_single", None)
        scatter = scatter or getattr(dist, "reduce_scatter_tensor", None)
        # Gloo all-reduces whole vectors: older versions have no reduce-scatter, and the rows are
        # bit-identical to those of a product that is not split by rows.
        if scatter is None or self._route(full_BD) != "nccl":
            for vectors in self._slabs(*full_BD.shape):
                self.sum_(full_BD[vectors])
            return full_BD[:, start:stop].clone()
        local_BR = full_BD.new_empty(len(full_BD), stop - start)
        spans = [self.rows(full_BD.shape[1], rank) for rank in range(self.size)]
        most = max(last - first for first, last in spans)
        for vectors in self._slabs(*full_BD.shape):
            slab_BD = full_BD[vectors]
            sent = slab_BD.new_zeros(self.size, len(slab_BD), most)
            for part, (first, last) in zip(sent, spans, strict=True):
                part[:, : last - first] = slab_BD[:, first:last]
            got = slab_BD.new_empty(len(slab_BD), most)
            self.answered(lambda got=got, sent=sent: scatter(got, sent, group=self.group))  # type: ignore[misc]
            local_BR[vectors] = got[:, : stop - start]
        return local_BR

    def _slabs(self, count: int, dim: int) -> Iterator[slice]:
        width = max(1, _SLAB_NUMEL // max(dim, 1))
        for start in range(0, count, width):
            yield slice(start, start + width)

    # -- sums and copies ------------------------------------------------------------------------

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the ranks, in place; bit-identical on all of them."""
        return self._reduce_(tensor, "SUM")

    def max_(self, tensor: Tensor) -> Tensor:
        """Take the entrywise maximum over the ranks, in place."""
        return self._reduce_(tensor, "MAX")

    def broadcast_(self, tensor: Tensor, src: int = 0) -> Tensor:
        """Overwrite a tensor with that of one rank of the group, in place."""
        if self.size == 1 or tensor.numel() == 0:
            return tensor
        source = dist.get_global_rank(self.group, src)
        return self._in_place(
            tensor, lambda sent: dist.broadcast(sent, src=source, group=self.group)
        )

    def barrier(self) -> None:
        """Wait until all ranks have called this."""
        if self.size > 1:
            self._exchange("a barrier", Step())

    def gather_texts(self, text: str) -> list[str]:
        """Return the text of every rank, in rank order, each truncated to 2000 bytes."""
        if self.size == 1:
            return [text]
        data = text.encode()[:_TEXT_BYTES]
        lengths = [int(n) for n in self._all_gather(torch.tensor([len(data)], device="cpu"))[:, 0]]
        sent = torch.zeros(max(*lengths, 1), dtype=torch.uint8, device="cpu")
        sent[: len(data)] = torch.tensor(list(data), dtype=torch.uint8, device="cpu")
        rows = self._all_gather(sent).tolist()
        return [
            bytes(row[:n]).decode(errors="replace") for row, n in zip(rows, lengths, strict=True)
        ]

    # -- failures -------------------------------------------------------------------------------

    @contextmanager
    def together(self, what: str) -> Iterator[Step]:
        """Run local work, and raise on every rank if it fails on one.

        Call no collective inside: the other ranks wait for a failing one here and nowhere else.
        The failing rank raises its own error, the others raise one that quotes it. An exception
        that is not an `Exception` (an interrupt) ends the process; the others notice the closed
        connection.

        Args:
            what: The step, in words; the same on all ranks.

        Yields:
            The step, for a note to all ranks or a value that must be the same on all.

        Raises:
            DistributedError: If another rank failed, is in another step, or does not answer.
            ValueError: If a value differs between the ranks; on all of them.

        Cost: one exchange of 32 bytes.
        """
        step = Step()
        if self.size == 1:
            yield step
            step.notes = [step.note]
            return
        handled = sys.exc_info()[1]
        try:
            yield step
        except Exception as error:
            self.announce(error, handled)
            raise
        self._exchange(what, step)

    def announce(self, error: BaseException, handled: BaseException | None = None) -> None:
        """Announce this rank's error to the others, at the end of the step that they are in.

        An error that all ranks know of already is not announced again.

        Args:
            error: The error.
            handled: The error in whose handler the step began; it is not announced.
        """
        if self.size == 1 or is_known(error, handled):
            return
        make_known(error)
        try:
            self._all_gather(torch.tensor([1, 0, 0, 0], device="cpu"))
            self.gather_texts(f"{type(error).__name__}: {error}")
        except DistributedError:
            pass  # the others have failed as well; this rank's error says more

    def agree(self, value: Any, what: str, remedy: str = "make it the same on all ranks") -> None:
        """Require a value, by its `repr`, to be the same on all ranks.

        Args:
            value: An int, float, str or similar; a hash of anything larger.
            what: Name of the value in the error.
            remedy: Advice in the error.

        Raises:
            ValueError: On all ranks, with the ranks that differ.
        """
        with self.together(f"comparing {what}") as step:
            step.require_same(what, value, remedy)

    def _exchange(self, what: str, step: Step) -> None:
        values = {name: value for name, (value, _) in step.same.items()}
        row = torch.tensor([0, hash_text(what), hash_text(repr(values)), step.note], device="cpu")
        rows = self._all_gather(row).tolist()
        failed = [rank for rank, row in enumerate(rows) if row[0]]
        if failed:
            texts = self.gather_texts("")
            raise make_known(
                DistributedError(
                    f"{name_ranks(failed)} failed while rank {self.rank} was at {what}: "
                    + "; ".join(texts[rank] for rank in failed)
                )
            )
        if len({row[1] for row in rows}) > 1:
            raise make_known(
                DistributedError(
                    "expected all ranks to take the same steps, got "
                    f"{who_has_what(self.gather_texts(what))}; call the same methods with the "
                    "same arguments on all of them"
                )
            )
        if len({row[2] for row in rows}) > 1:
            self._refuse_difference(step)
        step.notes = [row[3] for row in rows]

    def _refuse_difference(self, step: Step) -> None:
        for what, (value, remedy) in step.same.items():
            texts = self.gather_texts(value)
            hashes = self.gather_texts(str(hash_text(value)))  # truncated texts may agree
            if len(set(hashes)) > 1:
                raise make_known(
                    ValueError(
                        f"expected all ranks to have the same {what}, got {who_has_what(texts)}; "
                        f"{remedy}"
                    )
                )

    # -- transport ------------------------------------------------------------------------------

    def _reduce_(self, tensor: Tensor, operation: str) -> Tensor:
        if self.size == 1 or tensor.numel() == 0:
            return tensor
        op = getattr(dist.ReduceOp, operation)
        return self._in_place(tensor, lambda sent: dist.all_reduce(sent, op=op, group=self.group))

    def _in_place(self, tensor: Tensor, collective: Callable[[Tensor], Any]) -> Tensor:
        sent = self._carried(tensor).contiguous()
        self.answered(lambda: collective(sent))
        if sent.data_ptr() != tensor.data_ptr():
            tensor.copy_(sent)
        return tensor

    def _all_gather(self, tensor: Tensor) -> Tensor:
        """Stack the tensors of all ranks, of equal shape, on the device of this one."""
        sent = self._carried(tensor).contiguous()
        out = sent.new_empty(self.size, *sent.shape)
        # The name since torch 2.13; the former one warns there.
        gather: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        flat = out.view(self.size * sent.shape[0], *sent.shape[1:])
        self.answered(lambda: gather(flat, sent, group=self.group))
        return out.to(tensor.device)

    def _route(self, tensor: Tensor) -> str:
        return self._routes.get(tensor.device.type, "")

    def _carried(self, tensor: Tensor) -> Tensor:
        """Return a tensor on a device that the group's backend can send from."""
        kind, route = tensor.device.type, self._route(tensor)
        if route and (route != "gloo" or kind == "cpu"):
            return tensor
        return tensor.to(self._device)

    def answered(self, collective: Callable[[], Any]) -> None:
        """Call a collective of torch, and treat its errors as the failure of another rank.

        Raises:
            DistributedError: In place of any `RuntimeError` except out of memory.
        """
        try:
            collective()
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            cause = DistributedError(
                f"rank {self.rank} got no answer from the other ranks: one of them has ended or "
                "failed, or has been in another step for longer than the timeout of the process "
                "group; look for the first error in the output of the others, and where they were "
                "only slow, give init_process_group a longer timeout. The backend says: "
                f"{str(error).splitlines()[0] if str(error) else type(error).__name__}"
            )
            raise make_known(cause) from error

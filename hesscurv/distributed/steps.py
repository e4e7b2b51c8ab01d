"""Steps taken by all ranks, and errors known to all of them."""

from __future__ import annotations

import hashlib
from typing import Any


class DistributedError(RuntimeError):
    """Another rank has failed, does not answer, or is in a different step.

    Example:
        >>> issubclass(hesscurv.DistributedError, RuntimeError)
        True
    """


class Step:
    """A rank's message at the end of a step that all ranks take, see `Communicator.together`.

    Attributes:
        note: This rank's integer, sent to all others.
        notes: After the step, the notes of all ranks, in rank order.
        same: Values that must agree between the ranks: name to (`repr`, remedy).

    Example:
        >>> from hesscurv.distributed import Communicator
        >>> with Communicator().together("choosing a size") as step:
        ...     step.note = 3
        >>> step.notes
        [3]
    """

    def __init__(self) -> None:
        self.note = 0
        self.notes: list[int] = []
        self.same: dict[str, tuple[str, str]] = {}

    def require_same(self, what: str, value: Any, remedy: str) -> None:
        """Require a value, by its `repr`, to be the same on all ranks when the step ends.

        Args:
            what: Name of the value in the error.
            value: An int, float, str or similar.
            remedy: Advice in the error.
        """
        self.same[what] = repr(value), remedy


def make_known(error: Any) -> Any:
    """Mark an error as known to all ranks, and return it."""
    error._known_to_all_ranks = True
    return error


def is_known(error: BaseException | None, handled: BaseException | None = None) -> bool:
    """Whether an error, or one that it was raised from, is known to all ranks.

    Args:
        error: The error.
        handled: The error that was being handled before; it and its causes do not count.
    """
    seen: set[int] = set()
    while error is not None and error is not handled and id(error) not in seen:
        if getattr(error, "_known_to_all_ranks", False):
            return True
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return False


def hash_text(text: str) -> int:
    """Return a 64-bit hash of a text, the same in every process."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big", signed=True)


def name_ranks(ranks: list[int]) -> str:
    """Return "rank 3" or "ranks 0, 1, ...", the first eight of them."""
    shown = ", ".join(map(str, ranks[:8])) + (f", ... ({len(ranks)})" if len(ranks) > 8 else "")
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {shown}"


def who_has_what(texts: list[str]) -> str:
    """Say which ranks hold which text; `texts` is in rank order."""
    by_text: dict[str, list[int]] = {}
    for rank, text in enumerate(texts):
        by_text.setdefault(text, []).append(rank)
    shown = [
        f"{text if len(text) <= 120 else text[:117] + '...'} on {name_ranks(ranks)}"
        for text, ranks in list(by_text.items())[:4]
    ]
    return " but ".join(shown) + (", ..." if len(by_text) > 4 else "")

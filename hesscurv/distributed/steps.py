"""Steps that all ranks take, and the errors that end them on all ranks."""

from __future__ import annotations

import hashlib
from typing import Any


class DistributedError(RuntimeError):
    """Another rank has failed, does not answer, or does something else than this one."""


class Step:
    """What a rank says at the end of a step that all ranks take, see `Communicator.together`.

    Attributes:
        note: An integer of this rank's own, for all others to see.
        notes: After the step, the notes of all ranks, by rank.
        same: What must be the same on all ranks: its `repr`, and the remedy where it is not.
    """

    def __init__(self) -> None:
        self.note = 0
        self.notes: list[int] = []
        self.same: dict[str, tuple[str, str]] = {}

    def require_same(self, what: str, value: Any, remedy: str) -> None:
        """Require a value, by its `repr`, to be the same on all ranks when the step ends.

        Args:
            what: What the value is, for the error.
            value: An int, float, str or the like.
            remedy: What to do where it is not.
        """
        self.same[what] = repr(value), remedy


def make_known(error: Any) -> Any:
    """Mark an error as one that all ranks know of, and return it."""
    error._known_to_all_ranks = True
    return error


def is_known(error: BaseException | None, handled: BaseException | None = None) -> bool:
    """Whether an error, or what it was raised from, is one that all ranks know of.

    Args:
        error: The error.
        handled: The error that was being handled before; it and what it came from do not count.
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
    """Name ranks in words, the first eight of them."""
    shown = ", ".join(map(str, ranks[:8])) + (f", ... ({len(ranks)})" if len(ranks) > 8 else "")
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {shown}"


def who_has_what(texts: list[str]) -> str:
    """Say which ranks have which of the texts, given by rank."""
    by_text: dict[str, list[int]] = {}
    for rank, text in enumerate(texts):
        by_text.setdefault(text, []).append(rank)
    shown = [
        f"{text if len(text) <= 120 else text[:117] + '...'} on {name_ranks(ranks)}"
        for text, ranks in list(by_text.items())[:4]
    ]
    return " but ".join(shown) + (", ..." if len(by_text) > 4 else "")

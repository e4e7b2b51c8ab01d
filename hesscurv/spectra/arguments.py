"""Argument checks of the spectral estimators, before the first matvec."""

from __future__ import annotations

from typing import Any

import torch

from hesscurv.operators.linear_operator import LinearOperator
from hesscurv.operators.matrix_operators import as_linear_operator


def check_operator(H: Any) -> LinearOperator:
    """Return H as an operator.

    Args:
        H: A hesscurv operator, a dense symmetric tensor (D, D), or any object with `shape`,
            `dtype`, `device` and ``@`` on tensors (D,) and (D, b).

    Raises:
        TypeError: If it is not an operator, or not float32 or float64.
        ValueError: If it is not square, or a tensor that is not symmetric and finite.
    """
    H = as_linear_operator(H)
    if H.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"expected a float32 or float64 operator, got {H.dtype}; convert the model or matrix "
            "with .float()"
        )
    return H


def check_count(name: str, value: Any, least: int, remedy: str = "") -> None:
    """Require an integer of at least `least`.

    Raises:
        TypeError: If it is not an int.
        ValueError: If it is too small.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"expected an integer {name}, got {value!r}; convert it with int()")
    if value < least:
        raise ValueError(f"expected {name} >= {least}, got {value}{remedy and '; ' + remedy}")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Require one of the choices.

    Raises:
        ValueError: If the value is not among them.
    """
    if value not in choices:
        raise ValueError(f"expected {name} among {list(choices)}, got {value!r}")


def check_estimate(
    H: Any,
    num_matvecs: Any,
    method: Any,
    fewest: dict[str, int],
    block_size: Any,
    generator: torch.Generator | None,
) -> tuple[LinearOperator, torch.Generator]:
    """Check the arguments shared by `trace` and `diagonal`.

    Args:
        H: The operator.
        num_matvecs: Maximal number of matvecs.
        method: One of the keys of `fewest`.
        fewest: Minimal number of matvecs of each method; D always suffice.
        block_size: Matvecs per block.
        generator: The caller's generator, or None.

    Returns:
        The operator, and the generator to draw from.

    Raises:
        TypeError: If H is not an operator, or not float32 or float64, or a number is not an int.
        ValueError: If an argument is out of range.
    """
    H = check_operator(H)
    check_choice("method", method, tuple(fewest))
    check_count("block_size", block_size, 1)
    least = min(fewest[method], H.shape[0])
    check_count("num_matvecs", num_matvecs, least, f"{method!r} needs two samples for an error bar")
    return H, default_generator(generator)


def default_generator(generator: torch.Generator | None) -> torch.Generator:
    """Return the generator, or a new one with seed 0; the global one is never used."""
    return torch.Generator().manual_seed(0) if generator is None else generator

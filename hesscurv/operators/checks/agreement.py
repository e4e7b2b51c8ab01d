"""Agreement of the ways of computing with the reference: by micro-batch, and over a whole solve.

Both tests rest on linearity. If a way multiplies a block V to give P, then for random signs s the
reference must multiply ``V s`` to give ``P s``: one reference product tests all vectors of the
block, and misses an error only where the signs happen to cancel it (Freivalds 1979).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from hesscurv.linalg.precision import ROUNDING
from hesscurv.objective.parameters import ParameterLayout

# From so many products on, comparing every micro-batch again after a change of the weights costs
# less than 3 % of them: the reference's graph and product take about three products' time.
_MANY_PRODUCTS = 90
# From so many products on, a solve ends with one more comparison, of all of its products.
CONFIRM_FROM = 64


class Agreement:
    """Which micro-batches each way is known to agree with the reference on, and which not.

    A micro-batch on which a way disagrees or fails takes the reference from then on.

    Args:
        reference: The way that all others are compared with.
        loops: The ways that take vectors one by one, for which the width of a block is no matter.
    """

    def __init__(self, reference: str, loops: Iterable[str]) -> None:
        self.reference = reference
        self._loops = tuple(loops)
        self._widths: dict[tuple[int, str], int] = {}  # the widest block that was compared
        self._reasons: dict[tuple[int, str], str] = {}
        self._turn = 0

    def way_for(self, index: int, way: str) -> str:
        """Return the way itself, or the reference where it is known not to agree."""
        return self.reference if (index, way) in self._reasons else way

    def is_due(self, index: int, way: str, width: int) -> bool:
        """Whether a product of `width` vectors on a micro-batch is to be compared."""
        width = 1 if way in self._loops else width
        return way != self.reference and width > self._widths.get((index, way), 0)

    def passed(self, index: int, way: str, width: int | None = None) -> None:
        """Note that blocks up to a width agree on a micro-batch; None for any width."""
        self._widths[index, way] = 1 << 30 if width is None else width

    def refuse(self, index: int, way: str, reason: str) -> None:
        """Note that a way is not to be used on a micro-batch, and why."""
        self._reasons[index, way] = reason

    def num_refused(self, way: str) -> int:
        """Return how many micro-batches a way is not used on."""
        return sum(known == way for _, known in self._reasons)

    def weights_changed(self, expected: int) -> None:
        """Let micro-batches be compared again, as many as the products to come are worth.

        A model may take another branch at other weights. Where few products follow, one micro-batch
        is compared at each change, in turns.
        """
        if expected >= _MANY_PRODUCTS:
            self._widths.clear()
            return
        known = sorted({index for index, _ in self._widths})
        if known:
            turn = known[self._turn % len(known)]
            self._widths = {key: w for key, w in self._widths.items() if key[0] != turn}
            self._turn += 1

    def start_over(self, reference: str) -> None:
        """Forget everything, and compare with another reference from here on."""
        self.reference, self._turn = reference, 0
        self.forget()

    def forget(self) -> None:
        """Forget everything: the micro-batches are other ones now."""
        self._widths.clear()
        self._reasons.clear()


class Combination:
    """Random combinations ``x = V s`` of vectors and ``y = P s`` of their products, as they come.

    Args:
        layout: Where each parameter lies in a vector.
        like: A tensor of the vectors' dtype and device.
        seed: Of the signs.
    """

    def __init__(self, layout: ParameterLayout, like: Tensor, seed: int = 0) -> None:
        self._layout = layout
        self._generator = torch.Generator().manual_seed(seed)
        self._signs_left = torch.empty(0, dtype=like.dtype, device=like.device)
        self.x_D = torch.zeros(layout.numel, dtype=like.dtype, device=like.device)
        self.y_D = torch.zeros_like(self.x_D)
        self.count = 0

    def add(self, vectors_BD: Tensor, products: Tensor | tuple[Tensor | None, ...]) -> None:
        """Take in some vectors and their products, as a block (B, D) or in pieces."""
        size = len(vectors_BD)
        self.count += size
        signs_B = self._signs(size)
        self.x_D.addmv_(vectors_BD.T, signs_B)
        if isinstance(products, Tensor):
            self.y_D.addmv_(products.T, signs_B)
            return
        for span, piece in zip(self._layout.slices().values(), products, strict=True):
            if piece is not None:
                self.y_D[span].addmv_(piece.detach().reshape(size, -1).T.to(signs_B.dtype), signs_B)

    def random_vector(self) -> Tensor:
        """Return a random vector (1, D) of the norm of x.

        Taken in as well, it reaches directions that no vector so far has a part in.
        """
        shape = (1, len(self.x_D))
        vector = torch.randn(shape, generator=self._generator, dtype=torch.float32, device="cpu")
        vector = vector.to(self.x_D)
        size = self.x_D.norm()
        return vector * torch.where(size > 0, size, torch.ones_like(size)) / vector.norm()

    def _signs(self, size: int) -> Tensor:
        if len(self._signs_left) < size:  # some hundred at once: blocks of few vectors are many
            draws = torch.randint(0, 2, (max(size, 256),), generator=self._generator, device="cpu")
            self._signs_left = (draws * 2 - 1).to(self.x_D)
        signs_B, self._signs_left = self._signs_left[:size], self._signs_left[size:]
        return signs_B


def agree(expected: Tensor, got: Tensor, rounding: float = 1.0, precision: str = "highest") -> bool:
    """Whether two blocks of products are the same to rounding.

    Args:
        expected: The reference's products.
        got: Another way's.
        rounding: How many times the square root of the machine's epsilon the gap may be.
        precision: What both are computed in.
    """
    eps = max(torch.finfo(expected.dtype).eps, ROUNDING[precision])
    return relative_gap(expected, got) <= rounding * eps**0.5


def relative_gap(expected: Tensor, got: Tensor) -> float:
    """Return ``||got - expected|| / ||expected||``, 0 where both are zero."""
    gap = float((expected - got).double().norm())
    size = float(expected.double().norm())
    tiny = torch.finfo(expected.dtype).tiny
    return 0.0 if gap <= tiny else gap / max(size, tiny)

"""Random matrices for sketching, generated column by column: Gaussian, Rademacher, SSRFT.

A test matrix Omega (D, n) is never stored. Column j depends on (seed, j) only, so any number of
processes can each generate a range of columns of the same matrix, and a lost column can be
regenerated. Random numbers are drawn on the CPU: every device gets the same matrix.

All kinds have the same scale: columns are isotropic, ``E[omega omega^T] = I``, hence
``E[||omega||^2] = D`` and ``E[Omega Omega^T] = n I``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from hesscurv.linalg.projections import inner_products

_BLOCK_NUMEL = 2**23  # entries drawn or transformed at once: 32 MiB in float32
_MASK = 2**32 - 1


class TestMatrix(ABC):
    """A random matrix Omega (D, n) defined by its seed; subclasses implement drawing a column.

    Args:
        dim: D, the length of a column.
        num_columns: n.
        seed: Any integer; the same seed, the same matrix.
        dtype: float32 (default) or float64. The two are different matrices, except for
            Rademacher and, up to rounding, SSRFT.
        device: Device of the returned columns; default the CPU.

    Raises:
        TypeError: If dtype is not float32 or float64.
        ValueError: If dim is not positive or num_columns negative.
    """

    __test__ = False  # pytest collects classes named Test*

    def __init__(
        self,
        dim: int,
        num_columns: int,
        seed: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        if dtype not in (torch.float32, torch.float64):
            raise TypeError(f"expected float32 or float64, got {dtype}; cast the columns")
        if dim < 1 or num_columns < 0:
            raise ValueError(f"expected D >= 1 and n >= 0, got D={dim}, n={num_columns}")
        self.shape = torch.Size((dim, num_columns))
        self.seed = int(seed)
        self.dtype = dtype
        self.device = torch.device(device)

    def columns(self, start: int, stop: int) -> Tensor:
        """Return ``Omega[:, start:stop]``, bit-identical however the range is split.

        Args:
            start: The first column, 0 <= start.
            stop: One past the last, start <= stop <= n.

        Returns:
            Shape (D, stop - start), a view of row-contiguous storage: each column is contiguous.

        Raises:
            ValueError: If the range does not lie within the columns.
        """
        dim, n = self.shape
        if not 0 <= start <= stop <= n:
            raise ValueError(f"expected 0 <= start <= stop <= {n}, got [{start}, {stop})")
        block_BD = torch.empty(stop - start, dim, dtype=self.dtype, device=self.device)
        for row, j in enumerate(range(start, stop)):
            self._fill(block_BD[row], j)
        return block_BD.mT

    def transpose_matmul(self, V_DB: Tensor) -> Tensor:
        """Return ``Omega^T V``, drawing Omega block by block.

        Args:
            V_DB: Shape (D, B), in the dtype and on the device of Omega.

        Returns:
            Shape (n, B), float64 on the CPU; computed in the dtype of Omega.

        Raises:
            ValueError: If V's shape does not fit.

        Cost: n D random numbers, drawn once for all of V, and n D B multiply-adds.
        """
        self._check(V_DB)
        dim, n = self.shape
        out = torch.empty(n, V_DB.shape[1], dtype=torch.float64, device="cpu")
        block = max(1, _BLOCK_NUMEL // dim)
        for start in range(0, n, block):
            stop = min(start + block, n)
            out[start:stop] = inner_products(self.columns(start, stop).mT, V_DB.mT)
        return out

    @abstractmethod
    def _fill(self, out_D: Tensor, j: int) -> None:
        """Write column j."""

    def _check(self, V_DB: Tensor) -> None:
        if V_DB.ndim != 2 or V_DB.shape[0] != self.shape[0]:
            raise ValueError(f"expected shape ({self.shape[0]}, B), got {tuple(V_DB.shape)}")

    def _generator(self, j: int) -> torch.Generator:
        return torch.Generator().manual_seed(mix_seed(self.seed, j))


class GaussianMatrix(TestMatrix):
    """Independent standard normal entries."""

    def _fill(self, out_D: Tensor, j: int) -> None:
        out_D.copy_(
            torch.randn(len(out_D), generator=self._generator(j), dtype=self.dtype, device="cpu")
        )


class RademacherMatrix(TestMatrix):
    """Independent entries +1 and -1, each with probability one half."""

    def _fill(self, out_D: Tensor, j: int) -> None:
        out_D.copy_(_signs(len(out_D), self._generator(j)))


class SSRFTMatrix(TestMatrix):
    """Subsampled scrambled randomised trigonometric transform: n orthogonal columns.

    ``Omega = sqrt(D) F^T S``, ``F = C E_2 P_2 C E_1 P_1``: P_i random permutations, E_i random
    signs, C the orthonormal DCT-II, S the first n unit vectors in a random order, so that
    ``Omega^T Omega = D I``. Permutations, signs and order depend on the seed and are shared by all
    columns. A real counterpart of the transform in Section 3.2 of Tropp et al.

    The random parts are drawn on the CPU and the transforms run on `device`, in `dtype`: columns on
    different devices agree up to the rounding of an FFT.

    Args:
        dim: D, the length of a column.
        num_columns: n <= D.
        seed: Any integer; the same seed, the same matrix.
        dtype: float32 (default) or float64.
        device: Device of the columns; default the CPU.

    Raises:
        TypeError: If dtype is not float32 or float64.
        ValueError: If n > D: there are only D orthogonal columns.

    Cost: two FFTs of length D for each column, and for each column of V in `transpose_matmul`,
    independent of n. Storage: two vectors of 64-bit integers, two of bytes, D / 2 complex numbers.

    References:
        Tropp, Yurtsever, Udell, Cevher, "Streaming low-rank matrix approximation with an
        application to scientific simulation", SIAM J. Sci. Comput. 41 (2019).
    """

    def __init__(
        self,
        dim: int,
        num_columns: int,
        seed: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(dim, num_columns, seed, dtype, device)
        if num_columns > dim:
            raise ValueError(
                f"expected at most D={dim} orthogonal SSRFT columns, got n={num_columns}; "
                "take fewer, or kind='gaussian'"
            )
        # Negative streams: the columns of the other kinds use streams 0, 1, ...
        self._permutations = [
            torch.randperm(dim, generator=self._generator(stream), device="cpu").to(self.device)
            for stream in (-1, -2)
        ]
        self._signs = [_signs(dim, self._generator(stream)).to(self.device) for stream in (-3, -4)]
        rows = torch.randperm(dim, generator=self._generator(-5), device="cpu")[:num_columns]
        self._rows = rows.clone().to(self.device)  # a view would keep all D indices alive
        self._twiddle = dct_twiddle(dim, dtype, self.device)  # once for all transforms

    def transpose_matmul(self, V_DB: Tensor) -> Tensor:
        """Return ``Omega^T V`` by fast transforms: 2 B FFTs of length D. See `TestMatrix`."""
        self._check(V_DB)
        dim, n = self.shape
        out = torch.empty(n, V_DB.shape[1], dtype=torch.float64, device="cpu")
        block = max(1, _BLOCK_NUMEL // (4 * dim))  # a transform holds about four copies
        for start in range(0, V_DB.shape[1], block):
            x_BD = V_DB[:, start : start + block].mT
            for permutation, signs in zip(self._permutations, self._signs, strict=True):
                x_BD = dct(x_BD[:, permutation].mul_(signs), self._twiddle)
            out[:, start : start + block] = x_BD[:, self._rows].mT
        return out.mul_(math.sqrt(dim))

    def _fill(self, out_D: Tensor, j: int) -> None:
        # One column at a time: an FFT of several rounds differently from an FFT of one.
        x_D = torch.zeros_like(out_D)
        x_D[self._rows[j]] = math.sqrt(self.shape[0])
        steps = zip(reversed(self._permutations), reversed(self._signs), strict=True)
        for permutation, signs in steps:
            out_D[permutation] = inverse_dct(x_D, self._twiddle).mul_(signs)
            x_D = out_D


KINDS: dict[str, type[TestMatrix]] = {
    "gaussian": GaussianMatrix,
    "rademacher": RademacherMatrix,
    "ssrft": SSRFTMatrix,
}


def make_test_matrix(
    kind: str,
    dim: int,
    num_columns: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> TestMatrix:
    """Return the random matrix Omega (D, n) of a kind and seed.

    Args:
        kind: "gaussian", "rademacher" or "ssrft".
        dim: D, the length of a column.
        num_columns: n; at most D for "ssrft".
        seed: Any integer; the same arguments, the same matrix.
        dtype: float32 (default) or float64.
        device: Device of the returned columns; default the CPU.

    Returns:
        An object with `shape`, ``columns(start, stop)`` and ``transpose_matmul(V)``.

    Raises:
        ValueError: If the kind is unknown, or the sizes do not fit.
        TypeError: If dtype is not float32 or float64.
    """
    if kind not in KINDS:
        raise ValueError(f"expected a kind of test matrix among {list(KINDS)}, got {kind!r}")
    return KINDS[kind](dim, num_columns, seed, dtype, device)


def default_generator(generator: torch.Generator | None) -> torch.Generator:
    """Return the generator, or a new one with seed 0; the global one is never used."""
    return torch.Generator().manual_seed(0) if generator is None else generator


def draw_seed(generator: torch.Generator) -> int:
    """Draw the seed of a random matrix from a generator."""
    bits = torch.randint(2**62, (), generator=generator, device=generator.device)
    return int(bits.item())


def next_seeds(generator: torch.Generator, count: int) -> list[int]:
    """Return the seeds that `draw_seed` draws next; the generator stays as it is."""
    state = generator.get_state()
    try:
        return [draw_seed(generator) for _ in range(count)]
    finally:
        generator.set_state(state)


def mix_seed(seed: int, stream: int) -> int:
    """Return the seed in [0, 2^32) for one stream of a seeded family of random numbers.

    torch's CPU generator uses only the lower 32 bits of its seed. For one family seed this is a
    bijection of the stream's 32 bits, so no two columns of a matrix coincide; hashing 64 bits
    would repeat a column among 6000 in one of 240 matrices. Families with nearby seeds share no
    run of streams, as they would if seed and stream were added.

    Args:
        seed: The family's seed, any integer of up to 64 bits.
        stream: The index within the family, any integer of up to 32 bits.
    """
    high = _mix32((seed >> 32) & _MASK)
    return _mix32(_mix32((seed & _MASK) ^ high) ^ _mix32(stream & _MASK))


def dct(x: Tensor, twiddle: Tensor | None = None) -> Tensor:
    """Return the orthonormal DCT-II along the last dimension, by one real FFT of the same length.

    ``X_k = s_k sum_j x_j cos(pi k (2j + 1) / 2N)``, ``s_0 = sqrt(1/N)``, ``s_k = sqrt(2/N)``.

    Args:
        x: Shape (..., N), float32 or float64, any N >= 1.
        twiddle: ``dct_twiddle(N, x.dtype, x.device)``, computed here if None.

    Returns:
        Same shape and dtype.

    References:
        Makhoul, "A fast cosine transform in one and two dimensions", IEEE Trans. ASSP 28 (1980).
    """
    n = x.shape[-1]
    if twiddle is None:
        twiddle = dct_twiddle(n, x.dtype, x.device)
    # Even entries, then odd ones reversed (Makhoul): one FFT of length N instead of 2N.
    interleaved = torch.cat([x[..., ::2], x[..., 1::2].flip(-1)], dim=-1)
    spectrum = torch.fft.rfft(interleaved) * twiddle
    # The second half of the outputs lies in the imaginary parts: X_{N-k} = -Im.
    mirrored = -spectrum.imag[..., 1 : (n + 1) // 2].flip(-1)
    out = torch.cat([spectrum.real, mirrored], dim=-1)
    out[..., 0] *= math.sqrt(0.5)
    return out


def inverse_dct(x: Tensor, twiddle: Tensor | None = None) -> Tensor:
    """Return the inverse of `dct`, which is its transpose (the orthonormal DCT-III).

    Args:
        x: Shape (..., N), float32 or float64, any N >= 1.
        twiddle: ``dct_twiddle(N, x.dtype, x.device)``, computed here if None.

    Returns:
        Same shape and dtype.
    """
    n = x.shape[-1]
    if twiddle is None:
        twiddle = dct_twiddle(n, x.dtype, x.device)
    half = n // 2 + 1
    x = x.clone()
    x[..., 0] *= math.sqrt(2.0)
    mirrored = torch.zeros_like(x[..., :half])  # X_{N-k} for k = 0, ..., N/2, with X_N = 0
    mirrored[..., 1:] = x.flip(-1)[..., : half - 1]
    spectrum = torch.complex(x[..., :half], -mirrored) / twiddle
    # n=n: the spectrum of N // 2 + 1 entries does not tell an odd length from an even one.
    interleaved = torch.fft.irfft(spectrum, n=n)
    out = torch.empty_like(x)
    out[..., ::2] = interleaved[..., : (n + 1) // 2]
    out[..., 1::2] = interleaved[..., (n + 1) // 2 :].flip(-1)
    return out


def dct_twiddle(n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the factors ``sqrt(2/N) exp(-i pi k / 2N)``, k = 0, ..., N/2, of the DCT of length N.

    Args:
        n: N.
        dtype: The real dtype of the vectors.
        device: Their device.

    Returns:
        Shape (N // 2 + 1,), complex.
    """
    # Angles in float64: k / 2N is not exact in float32 for large N.
    angles = torch.arange(n // 2 + 1, dtype=torch.float64, device="cpu") * (-math.pi / (2 * n))
    modulus = torch.full_like(angles, math.sqrt(2.0 / n))
    return torch.polar(modulus, angles).to(device, dtype.to_complex())


def _signs(dim: int, generator: torch.Generator) -> Tensor:
    """Return random signs as int8."""
    bits = torch.empty(dim, dtype=torch.int8, device="cpu").random_(0, 2, generator=generator)
    return bits.mul_(2).sub_(1)


def _mix32(x: int) -> int:
    """Mix 32 bits bijectively: the finaliser of MurmurHash3, shifted off its fixed point 0."""
    x = (x + 0x9E3779B9) & _MASK
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _MASK
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _MASK
    return x ^ (x >> 16)

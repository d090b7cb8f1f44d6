"""Exact products of public masks and ternary secrets in Z[X]/(X^N + 1), by complex FFT of length N/2.

With ζ = exp(iπ/N), the twisted folding z_j = (a_j + i·a_{j+N/2})·ζ^j turns negacyclic convolution of length N
into cyclic convolution of length N/2. Coefficients of a product are at most 2^31·2048 = 2^42 in size; the
error of a double-precision FFT on such values is below 2^-6, so rounding to the nearest integer is exact
(tests compare with plain integers, extremes included).
"""

from __future__ import annotations

import functools
import math
from typing import NoReturn

import torch

# 1.5·2^52: adding it to |v| < 2^51 leaves round(v) modulo 2^32 in the low word of the double's mantissa.
_ROUND_TO_LOW_WORD = 1.5 * 2.0**52


@functools.lru_cache(maxsize=16)
def _twiddles(ring_degree: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.arange(ring_degree // 2, dtype=torch.float64) * (math.pi / ring_degree)
    twist = torch.polar(torch.ones_like(angle), angle)
    return twist, twist.conj().resolve_conj()


def _transform(polynomials: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
    """Negacyclic spectra: integers [..., N] -> complex128 [..., N/2], in place of `into`."""
    half = polynomials.shape[-1] // 2
    parts = torch.view_as_real(into)
    parts[..., 0] = polynomials[..., :half]
    parts[..., 1] = polynomials[..., half:]
    into *= _twiddles(2 * half)[0]
    spectra: torch.Tensor = torch.fft.fft(into)
    return spectra


class TransformedSecret:
    """The spectrum of one secret, ready to multiply masks: s has shape [d, N], int8 in {-1, 0, 1}."""

    def __init__(self, secret: torch.Tensor) -> None:
        self.rank, self.ring_degree = secret.shape
        half = self.ring_degree // 2
        spectrum = _transform(secret, torch.empty(self.rank, half, dtype=torch.complex128))
        self._spectrum = spectrum / half  # folds in the inverse transform's scale

    def __reduce__(self) -> NoReturn:
        """Refuses to be pickled or copied: a secret never leaves the memory it was drawn in."""
        raise TypeError("a secret cannot be serialised or copied")

    def dot(self, masks: torch.Tensor) -> torch.Tensor:
        """a·s = Σ_i a_i·s_i modulo 2^32, for a block of masks.

        Args:
            masks: int32 [rows, d·N], the d polynomials of a mask side by side. Up to 2^17 words stay within
                a core's cache; larger blocks take 2.5 to 4 times as long.

        Returns:
            int32 view [rows, 2, N/2] of the block's coefficients, low half first.
        """
        rows, half = masks.shape[0], self.ring_degree // 2
        buffer = torch.empty(rows, self.rank, half, dtype=torch.complex128)
        spectra = _transform(masks.view(rows, self.rank, self.ring_degree), buffer)
        spectra *= self._spectrum
        summed = spectra[:, 0] if self.rank == 1 else spectra.sum(dim=1)
        folded = torch.fft.ifft(summed, norm="forward")
        folded *= _twiddles(self.ring_degree)[1]
        values = torch.view_as_real(folded)
        values += _ROUND_TO_LOW_WORD
        return values.view(torch.int32)[..., ::2].transpose(1, 2)

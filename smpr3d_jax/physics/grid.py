"""A sampled plane: its pixels in real space and its frequencies in reciprocal space.

Arrays are (..., y, x); lengths in Å, spatial frequencies in 1/Å without 2 pi. The zero of both
coordinates is in the corner (index 0), as the FFT wants it.
"""

import equinox as eqx
import numpy as np
from jaxtyping import Float


class Grid(eqx.Module):
    """A plane of `shape` (y, x) pixels, `sampling` (y, x) Å apart."""

    shape: tuple[int, int] = eqx.field(static=True)
    sampling: tuple[float, float] = eqx.field(static=True)

    def __check_init__(self):
        if min(self.shape) < 1 or min(self.sampling) <= 0:
            raise ValueError(
                f"A grid needs at least one pixel and a positive sampling, got "
                f"shape={self.shape}, sampling={self.sampling} Å."
            )

    @property
    def extent(self) -> tuple[float, float]:
        """Length (y, x) of the plane, Å."""
        return self.shape[0] * self.sampling[0], self.shape[1] * self.sampling[1]

    @property
    def pixel_area(self) -> float:
        """Å² of one pixel."""
        return self.sampling[0] * self.sampling[1]

    def coordinates(self) -> tuple[Float[np.ndarray, "y 1"], Float[np.ndarray, "1 x"]]:
        """Pixel positions (y, x) in Å, zero at index 0."""
        y, x = (np.arange(n) * d for n, d in zip(self.shape, self.sampling, strict=True))
        return y[:, None], x[None, :]

    def frequencies(self) -> tuple[Float[np.ndarray, "ky 1"], Float[np.ndarray, "1 kx"]]:
        """Spatial frequencies (ky, kx) in 1/Å, zero at index 0."""
        ky, kx = (np.fft.fftfreq(n, d) for n, d in zip(self.shape, self.sampling, strict=True))
        return ky[:, None], kx[None, :]

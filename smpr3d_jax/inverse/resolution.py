"""How far two images of one thing agree, frequency by frequency: Fourier ring correlation.

FRC(q) = Re sum F1 conj(F2)/sqrt(sum |F1|² sum |F2|²) over the ring |q| (Saxton & Baumeister 1982).
Of two reconstructions from half of the frames each it says where noise takes over: with the
signal-to-noise ratio s of a half it is s/(1 + s). What both have wrong in the same way, such as
an error of the probe, it does not see.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float


FEWEST_PIXELS = 8
"""Fewer along an axis make no ring to speak of."""


class RingCorrelation(NamedTuple):
    """FRC at frequencies `radius` (1/Å), how many pixels a ring has, and the half-bit threshold."""

    radius: Float[np.ndarray, " rings"]
    correlation: Float[np.ndarray, " rings"]
    pixels: Float[np.ndarray, " rings"]
    half_bit: Float[np.ndarray, " rings"]

    @property
    def resolution(self) -> float | None:
        """Å: one over the frequency where the curve falls below half a bit; None: nowhere.

        Infinite where it never rises above. Rings of a few pixels, which say nothing, come before.
        """
        over = self.correlation - self.half_bit
        falls = np.flatnonzero((over[:-1] >= 0) & (over[1:] < 0))
        if len(falls) == 0:
            return None if over[-1] >= 0 else math.inf
        at = int(falls[0])
        part = over[at] / (over[at] - over[at + 1])
        return 1 / float(self.radius[at] + part * (self.radius[at + 1] - self.radius[at]))


def ring_correlation(
    first: Float[np.ndarray, "y x"],
    second: Float[np.ndarray, "_y _x"],
    sampling: tuple[float, float],
) -> RingCorrelation:
    """Correlation of two images of one place, `sampling` (y, x) in Å, over rings of one pixel.

    Images lose their mean and fade to their edges (Hann), so that edges do not correlate. The
    half-bit threshold is that of van Heel & Schatz (2005) for the pixels that a ring has after
    fading.

    **Raises:** ValueError for images of different shapes, or fewer than `FEWEST_PIXELS` wide.
    """
    if first.shape != second.shape or min(first.shape) < FEWEST_PIXELS:
        raise ValueError(
            f"`ring_correlation`: images of {first.shape} and {second.shape} pixels; they must "
            f"have one shape, of {FEWEST_PIXELS} pixels or more."
        )
    fade = np.outer(*(np.hanning(n + 2)[1:-1] for n in first.shape))
    spectra = [np.fft.fft2((a - np.average(a, weights=fade)) * fade) for a in (first, second)]
    ky, kx = (np.fft.fftfreq(n, d) for n, d in zip(first.shape, sampling, strict=True))
    step = max(1 / (n * d) for n, d in zip(first.shape, sampling, strict=True))
    ring = np.rint(np.hypot(ky[:, None], kx[None]) / step).astype(int)
    last = int(min(0.5 / d for d in sampling) / step)
    total = lambda values: np.bincount(ring.ravel(), values.ravel())[1 : last + 1]
    cross = total((spectra[0] * np.conj(spectra[1])).real)
    power = np.sqrt(total(np.abs(spectra[0]) ** 2) * total(np.abs(spectra[1]) ** 2))
    pixels = total(np.ones(first.shape))
    # A faded image has fewer independent frequencies; half of a real image's are the other half.
    free = np.maximum(pixels * (fade**2).mean() ** 2 / (fade**4).mean() / 2, 1)
    root = 1 / np.sqrt(free)
    half_bit = (0.2071 + 1.9102 * root) / (1.2071 + 0.9102 * root)
    radius = step * np.arange(1, last + 1)
    return RingCorrelation(radius, cross / np.maximum(power, 1e-300), pixels, half_bit)

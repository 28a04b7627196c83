"""The patterns that an exchange stands for, in plain numpy: slow, short, and double precision.

To see whether what was imported explains the data, and for the tests of every format.
"""

import numpy as np
from jaxtyping import Float, Integer

from .record import Exchange


def patterns(
    exchange: Exchange, index: Integer[np.ndarray, " batch"] | slice = slice(None)
) -> Float[np.ndarray, "batch ky kx"]:
    """Expected patterns of the frames in `index`, zero frequency in the corner.

    The window of a frame is where its probe lies nearest to pixel n//2; the rest is a shift by
    Fourier phases. Beyond the object there is vacuum.
    """
    shape = exchange.probes.shape[1:]
    frames = np.arange(len(exchange))[index]
    tilts = np.broadcast_to(exchange.tilts, (len(exchange), 2))
    corners = np.rint(exchange.corners).astype(int)
    ky, kx = (np.fft.fftfreq(n, d) for n, d in zip(shape, exchange.sampling, strict=True))
    spectra = np.fft.fft2(exchange.probes.astype(complex))
    mask = _pass(exchange, ky, kx)
    result = np.empty((len(frames), *shape))
    for row, frame in enumerate(frames):
        rest = (exchange.corners[frame] - corners[frame]) * exchange.sampling
        wave = np.fft.ifft2(spectra * _ramp(ky, kx, rest))
        plates = _window(exchange.transmission, corners[frame], shape)
        slopes = np.tan(tilts[frame] * 1e-3)
        result[row] = 0
        for weight, plate in zip(exchange.weights, plates, strict=True):
            exit_wave = wave * plate[0]
            for gap, slice_ in zip(exchange.thicknesses, plate[1:], strict=False):
                step = np.exp(-1j * np.pi * exchange.wavelength * gap * (ky[:, None] ** 2 + kx**2))
                step = step * _ramp(ky, kx, gap * slopes) * mask
                exit_wave = np.fft.ifft2(np.fft.fft2(exit_wave) * step) * slice_
            result[row] += weight * np.sum(
                np.abs(np.fft.fft2(exit_wave, norm="ortho")) ** 2, axis=0
            )
    return result


def _ramp(ky, kx, shift):
    """exp(-2 pi i k.shift)."""
    return np.exp(-2j * np.pi * (ky[:, None] * shift[0] + kx[None] * shift[1]))


def _pass(exchange: Exchange, ky, kx):
    """1 for frequencies that free propagation lets pass."""
    if exchange.band_limit is None:
        return 1.0
    cutoff = exchange.band_limit * 0.5 / max(exchange.sampling)
    return (ky[:, None] ** 2 + kx[None] ** 2 <= cutoff**2).astype(float)


def _window(planes, corner, shape):
    """The window of `shape` pixels that begins at `corner`, 1 outside `planes`."""
    window = np.ones((*planes.shape[:2], *shape), complex)
    inside, there = [], []
    for start, length, size in zip(corner, shape, planes.shape[2:], strict=True):
        low, high = np.clip([start, start + length], 0, size)
        there.append(slice(low, high))
        inside.append(slice(low - start, high - start))
    window[:, :, *inside] = planes[:, :, *there]
    return window

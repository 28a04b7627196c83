"""Whole experiments, simulated: a true probe at every position, multislice, the camera.

Each frame has its own probe on the whole periodic cell of the slices, independent of any window or
S-matrix, so that simulated data can test reconstructions. Zero frequency in the corner.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float, Int, Key, UInt

from .detector import bin_centred
from .fourier import fft, ifft, phase_factor
from .grid import Grid
from .optics import Optics, spectra
from .propagation import multislice, Pair
from .scan import Scan
from .specimen import Slices


def simulate_series(
    slices: Slices,
    optics: Optics,
    scan: Scan,
    detector_shape: tuple[int, int],
    bin: int,
    key: Key[Array, ""] | None = None,
    dose: Float[Array, " scans"] | float | None = None,
    chunk: int = 2,
    tilt: Pair = (0.0, 0.0),
    band_limit: float | None = 2 / 3,
    soft: bool = True,
) -> Float[Array, "frames ky kx"] | UInt[np.ndarray, "frames ky kx"]:
    """Frames of a series, expected or, given a `key`, counted.

    `scan.positions` and `slices.origin` are in one frame. A detector pixel is `bin` pixels of the
    cell's Fourier transform wide, lambda bin/extent in angle, and one is centred on k = 0; the
    middle `detector_shape` (y, x) of them is kept. `dose`: electrons per frame of each scan;
    without it a frame is the fraction of the beam on each pixel. `tilt` and `band_limit` are those
    of `multislice`, `soft` that of `aperture`; `chunk` frames are computed at once. Counts have the
    smallest of uint8, uint16, uint32 that holds them.

    **Raises:** ValueError for a detector that the sampling of the cell cannot hold, an aperture
    beyond the frequencies that `band_limit` keeps, and a `key` without a `dose`.
    """
    _check(slices.grid, optics, detector_shape, bin, band_limit or 1.0)
    if key is not None and dose is None:
        raise ValueError("`simulate_series(key=...)` counts electrons: give the `dose` as well.")
    scans = jax.tree.leaves(optics.aberrations)[0].shape[0]
    total = jnp.asarray(1.0 if dose is None else dose, scan.positions.dtype)
    total = jnp.broadcast_to(total.reshape(-1), (scans,))
    frames = _expected(
        slices, optics, scan, total, tilt, tuple(detector_shape), bin, chunk, band_limit, soft
    )
    return frames if key is None else count_electrons(frames, key)


def count_electrons(
    expected: Float[Array, "*shape"], key: Key[Array, ""]
) -> UInt[np.ndarray, "*shape"]:
    """Poisson counts in the smallest of uint8, uint16, uint32 that holds them (on the host)."""
    seed = np.asarray(jax.random.key_data(key)).tolist()
    counts = np.random.default_rng(seed).poisson(np.asarray(expected, float))
    most = counts.max(initial=0)
    kind = next(t for t in (np.uint8, np.uint16, np.uint32) if most <= np.iinfo(t).max)
    return counts.astype(kind)


def _check(grid: Grid, optics: Optics, detector_shape, bin: int, fraction: float) -> None:
    kept = fraction * 0.5 / max(grid.sampling)
    if optics.cutoff > kept:
        raise ValueError(
            f"An aperture of {optics.semiangle} mrad reaches {optics.cutoff:.3g} 1/Å, beyond the "
            f"{kept:.3g} 1/Å that a band limit of {fraction:.3g} keeps of pixels of "
            f"{max(grid.sampling):.3g} Å; sample the slices finer."
        )
    for axis, wanted, pixels in zip("yx", detector_shape, grid.shape, strict=True):
        if pixels % bin or wanted > pixels // bin:
            raise ValueError(
                f"{pixels} pixels of the cell along {axis}, binned by {bin}, do not make a "
                f"detector of {wanted} pixels: the cell's must be a multiple of {bin} and at "
                f"least {wanted * bin}."
            )


def _shift(grid: Grid, position: Float[Array, "2"]) -> Complex[Array, "ky kx"]:
    """exp(-2 pi i k.position), the product of a factor an axis."""
    ramps = [
        phase_factor(-2 * math.pi * position[axis] * jnp.asarray(k, position.dtype))
        for axis, k in enumerate(grid.frequencies())
    ]
    return ramps[0] * ramps[1]


def _corner(wanted: int, pixels: int) -> Int[np.ndarray, " wanted"]:
    """Where the middle `wanted` frequencies of `pixels` lie, zero first."""
    return (np.fft.fftfreq(wanted) * wanted).round().astype(int) % pixels


@eqx.filter_jit
def _expected(
    slices, optics, scan, dose, tilt, detector_shape, bin, chunk, band_limit, soft
) -> Float[Array, "frames ky kx"]:
    grid, energy = slices.grid, optics.energy
    origin = jnp.asarray(slices.origin, scan.positions.dtype)
    waves = spectra(optics, grid, scan.positions.dtype, soft)
    rows, columns = (_corner(n, m // bin) for n, m in zip(detector_shape, grid.shape, strict=True))

    def frame(where):
        position, series = where
        ramp = _shift(grid, position - origin)

        def add(total, spectrum):
            wave = ifft(spectrum * ramp)
            wave = multislice(wave, slices, energy, 0.0, slices.depths[-1], tilt, band_limit)
            far = fft(wave)
            return total + (far.real**2 + far.imag**2), None

        # One state after the other: together they would need the memory of all.
        fine, _ = jax.lax.scan(add, jnp.zeros(grid.shape, ramp.real.dtype), waves[series])
        coarse = bin_centred(bin_centred(fine, bin, -2), bin, -1)
        return dose[series] * coarse[rows[:, None], columns[None, :]]

    return jax.lax.map(frame, (scan.positions, scan.series), batch_size=chunk)

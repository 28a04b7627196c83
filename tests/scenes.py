"""Known phases, scanned: what the tests of the direct methods share."""

import jax.numpy as jnp
import numpy as np

from smpr3d_jax.data.counts import Counts, Frames
from smpr3d_jax.data.dataset import Dataset
from smpr3d_jax.physics.detector import Detector
from smpr3d_jax.physics.grid import Grid
from smpr3d_jax.physics.optics import interaction_parameter, Optics, wavelength
from smpr3d_jax.physics.scan import raster, Scan, series_of
from smpr3d_jax.physics.simulation import simulate_series
from smpr3d_jax.physics.specimen import Slices


ENERGY, SEMIANGLE = 80e3, 25.0
CELL = Grid((60, 50), (0.5, 0.6))
"""30 × 30 Å, periodic, so that the detector's pixels are square."""
ORIENTATIONS = [(turns, transpose) for turns in range(4) for transpose in (False, True)]


def waves(cutoff: float, strength: float, seed: int = 0, grid: Grid = CELL):
    """A real periodic phase (y, x) without frequencies above `cutoff`, of rms `strength` rad."""
    ky, kx = grid.frequencies()
    k = np.hypot(ky, kx)
    noise = np.fft.fft2(np.random.default_rng(seed).normal(size=grid.shape))
    phase = np.fft.ifft2(noise * ((k < cutoff) & (k > 0)) / (k + 0.05)).real
    return strength * phase / phase.std()


def at(phase, points, grid: Grid = CELL):
    """A periodic image of `grid` at any points (y, x) Å, by its Fourier series."""
    spectrum = np.fft.fft2(phase) / phase.size
    ky, kx = (k.ravel() for k in grid.frequencies())
    flat = np.asarray(points, float).reshape(-1, 2)
    rows = np.exp(2j * np.pi * np.outer(flat[:, 0], ky)) @ spectrum
    values = np.sum(rows * np.exp(2j * np.pi * np.outer(flat[:, 1], kx)), axis=1).real
    return values.reshape(points.shape[:-1])


def slices(phases, depths=(0.0,), grid: Grid = CELL) -> Slices:
    """The specimen of these phases (rad) at these depths."""
    potential = np.asarray(phases).reshape(len(depths), *grid.shape)
    return Slices(jnp.asarray(potential / interaction_parameter(ENERGY), float), depths, grid)


def over_cell(points: tuple[int, int], turns: int = 0, transpose: bool = False, grid: Grid = CELL):
    """Positions that fill the cell, `points` (y, x), scanned in one of the eight orientations."""
    along = {0: (0, 1), 1: (1, 0)}[(turns + transpose) % 2]
    shape = (points[along[0]], points[along[1]])
    step = (grid.extent[along[0]] / shape[0], grid.extent[along[1]] / shape[1])
    return shape, raster(shape, step, turns * np.pi / 2, transpose)


def detector(pixels: tuple[int, int], bin: int = 1, grid: Grid = CELL) -> Detector:
    """The camera of `simulate_series`; the cell must be as wide as high."""
    return Detector(pixels, wavelength(ENERGY) * bin / grid.extent[0] * 1e3)


def scanned(specimen: Slices, optics: Optics, shape, positions, pixels, dose=None, key=None, bin=1):
    """The dataset of scans of one raster, one for each scan of `optics`."""
    scans = len(np.asarray(optics.aberrations["C10"]))
    where = series_of([np.asarray(positions)] * scans)
    frames = simulate_series(
        specimen, optics, where, pixels, bin, key, dose, chunk=8, band_limit=None
    )
    counts: Counts = Frames(jnp.asarray(frames))
    return Dataset(counts, where, (tuple(shape),) * scans)


def single(data: Dataset) -> Dataset:
    """The same in single precision."""
    return _as(data, np.float32)


def double(data: Dataset) -> Dataset:
    """The same in double precision, where that is enabled."""
    return _as(data, np.float64)


def _as(data: Dataset, dtype) -> Dataset:
    positions = jnp.asarray(np.asarray(data.scan.positions, dtype))
    where = Scan(positions, jnp.asarray(np.asarray(data.scan.series)))
    values = np.asarray(data.counts.dense())
    whole = values if values.dtype.kind in "iu" else values.astype(dtype)
    return Dataset(Frames(jnp.asarray(whole)), where, data.scan_shapes)


def slope(image, truth, weights=None) -> tuple[float, float]:
    """Least-squares factor of `truth` in `image` and the relative rms of what is left."""
    w = np.ones(truth.shape) if weights is None else np.asarray(weights, float)
    mean = lambda a: np.sum(w * a) / w.sum()
    a, b = (np.asarray(v, float) - mean(np.asarray(v, float)) for v in (image, truth))
    factor = mean(a * b) / mean(b * b)
    return factor, float(np.sqrt(mean((a - b) ** 2) / mean(b * b)))

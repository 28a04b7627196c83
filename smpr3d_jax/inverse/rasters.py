"""Where a scan's raster lies in the frame of the detector.

Position (i, j) of a raster is origin + i slow + j fast, with two steps (y, x) in Å: its rotation,
its transposition and unequal steps are all in them. A Fourier transform over i and j therefore
gives an image's spectrum at spatial frequencies that are vectors in the frame of the detector, and
no direct method has to turn anything.
"""

import math

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..data.counts import Counts, InputError
from ..data.dataset import Dataset
from ..physics.smatrix import smooth


Pair = tuple[float, float]


class Raster(eqx.Module):
    """A lattice of `shape` (slow, fast) points; lengths (y, x) in Å, in the detector's frame."""

    shape: tuple[int, int] = eqx.field(static=True)
    origin: Pair = eqx.field(static=True)
    slow: Pair = eqx.field(static=True)
    fast: Pair = eqx.field(static=True)

    @property
    def lattice(self) -> Float[np.ndarray, "2 2"]:
        """The slow and the fast step in rows."""
        return np.array([self.slow, self.fast])

    @property
    def step(self) -> Pair:
        """Length of the slow and of the fast step, Å."""
        return math.hypot(*self.slow), math.hypot(*self.fast)

    def positions(self) -> Float[np.ndarray, "slow fast 2"]:
        """Every point (y, x), Å."""
        index = np.stack(np.meshgrid(*map(np.arange, self.shape), indexing="ij"), -1)
        return np.asarray(self.origin) + index @ self.lattice

    def index(self, points: Float[np.ndarray, "*batch 2"]) -> Float[np.ndarray, "*batch 2"]:
        """Fractional index (i, j) of points (y, x) in Å; inverse of `positions`."""
        return (points - np.asarray(self.origin)) @ np.linalg.inv(self.lattice)

    def frequencies(
        self, half: bool = False, odd: bool = False
    ) -> Float[np.ndarray, "2 slow frequencies"]:
        """Spatial frequency (y, x) in 1/Å of each term of a transform over the raster.

        `half`: those of a real transform (`rfft2`). `odd`: the Nyquist terms of even lengths,
        which stand for opposite frequencies and so have no slope, count as 0.
        """
        turns = [np.fft.fftfreq(n) for n in self.shape]
        if half:
            turns[1] = np.abs(turns[1][: self.shape[1] // 2 + 1])
        grid = np.stack(np.meshgrid(*turns, indexing="ij"))
        if odd:
            grid = grid * np.all(np.abs(grid) != 0.5, axis=0)
        return np.einsum("lsf,la->asf", grid, np.linalg.inv(self.lattice).T)

    def finer(self, factor: int) -> "Raster":
        """The same area with `factor` times as many points along each axis."""
        part = lambda step: (step[0] / factor, step[1] / factor)
        shape = (self.shape[0] * factor, self.shape[1] * factor)
        return Raster(shape, self.origin, part(self.slow), part(self.fast))

    def wider(self, margin: tuple[float | int, float | int]) -> "Raster":
        """With at least `margin` points more on each side, as many as are fast to transform."""
        sizes = [n + 2 * math.ceil(m) for n, m in zip(self.shape, margin, strict=True)]
        shape = [next(k for k in range(s, 2 * s + 1) if smooth(k)) for s in sizes]
        before = np.array([(s - n) // 2 for s, n in zip(shape, self.shape, strict=True)])
        y, x = np.asarray(self.origin) - before @ self.lattice
        return Raster((shape[0], shape[1]), (float(y), float(x)), self.slow, self.fast)


def frames_of(dataset: Dataset, scan: int = 0) -> slice:
    """The frames of one scan of a series.

    **Raises:** InputError if there is no such scan or the dataset does not fill its rasters.
    """
    sizes = [rows * columns for rows, columns in dataset.scan_shapes]
    if not 0 <= scan < len(sizes):
        raise InputError(
            f"`scan` {scan} of a series of {len(sizes)}; 0 to {len(sizes) - 1} are there."
        )
    expected = np.repeat(np.arange(len(sizes)), sizes)
    if not np.array_equal(np.asarray(dataset.scan.series), expected):
        raise InputError(
            f"The dataset's {len(dataset)} frames do not fill its rasters {dataset.scan_shapes} "
            "scan after scan; direct methods need whole scans, so take no subset before."
        )
    start = sum(sizes[:scan])
    return slice(start, start + sizes[scan])


def counts_of(dataset: Dataset, scan: int = 0) -> Counts:
    """The counts of one scan, row after row of its raster."""
    whole = frames_of(dataset, scan)
    return dataset.counts if whole == slice(0, len(dataset)) else dataset.counts[whole]


def raster_of(dataset: Dataset, scan: int = 0) -> Raster:
    """The lattice nearest to the positions of one scan, by least squares.

    A scan of one line is given a slow step across it, as long as the fast one.

    **Raises:** InputError for a scan of one position, and for positions that are farther from any
    lattice than half a step.
    """
    shape = dataset.scan_shapes[scan]
    points = np.asarray(dataset.scan.positions[frames_of(dataset, scan)], float)
    if len(points) < 2:
        raise InputError(f"Scan {scan} has one position; an image needs at least two.")
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1).reshape(-1, 2)
    columns = np.concatenate([index, np.ones((len(index), 1))], axis=1)
    (slow, fast, origin), _, _, _ = np.linalg.lstsq(columns, points, rcond=None)
    if 1 in shape:
        along = fast if shape[0] == 1 else slow
        across = np.array([along[1], -along[0]])
        slow, fast = (-across, along) if shape[0] == 1 else (along, across)
    raster = Raster(shape, *((float(v[0]), float(v[1])) for v in (origin, slow, fast)))
    off = np.abs(points - raster.positions().reshape(-1, 2)).max()
    area = abs(np.linalg.det(raster.lattice))
    if area == 0 or off > 0.5 * min(raster.step):
        raise InputError(
            f"The positions of scan {scan} are up to {off:.3g} Å away from any raster of {shape} "
            f"points, whose steps would be {raster.step} Å; direct methods need a raster. Check "
            "the scan's shape, or place the probes with `raster`."
        )
    return raster


def on_raster(
    values: Float[Array, "frames *rest"], raster: Raster
) -> Float[Array, "slow fast *rest"]:
    """Numbers of the frames, row after row, as an image."""
    return jnp.reshape(values, (*raster.shape, *values.shape[1:]))

"""Counts and where the probe stood for each of them: a whole series in one record.

Frames are flat and in the order of `scan.series`; the zero frequency is in the corner. Every
function returns a new record; an index is an array of frame numbers.
"""

import math
from collections.abc import Sequence
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer

from ..physics.scan import Scan
from .counts import Counts, InputError, join as join_counts, only


# The positive solutions of x² = x + 1 and x³ = x + 1.
GOLDEN, PLASTIC = 1.618033988749894848, 1.324717957244746026


Mask = Bool[Array, "ky kx"] | None
"""True where a pixel of the frames counts, zero frequency in the corner; None: everywhere."""


def _mask(values) -> Mask:
    return None if values is None else jnp.asarray(values)


class Dataset(eqx.Module):
    """The counts of a series, the scan they belong to, and its rasters (slow, fast).

    A subset keeps the rasters it was taken from. What pixels hold where `mask` is False is of no
    influence on anything that is computed from the dataset.
    """

    counts: Counts
    scan: Scan
    scan_shapes: tuple[tuple[int, int], ...] = eqx.field(static=True)
    mask: Mask = eqx.field(default=None, converter=_mask)

    def __check_init__(self):
        if len(self.counts) != len(self.scan.positions):
            raise InputError(
                f"`Dataset` has {len(self.counts)} frames but {len(self.scan.positions)} probe "
                "positions; each frame needs one."
            )
        if self.mask is not None and self.mask.shape != self.counts.frame_shape:
            raise InputError(
                f"`Dataset` has a mask of {self.mask.shape} pixels but frames of "
                f"{self.counts.frame_shape}; crop and turn the mask as the frames."
            )

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def pixels(self) -> int | Int[Array, ""]:
        """Pixels of a frame that count."""
        return _pixels(self)

    @property
    def dose(self) -> Float[Array, " scans"]:
        """Mean electrons per frame of each scan, on all pixels.

        Masked pixels are given the scan's mean over the pixels that count at the same distance from
        the zero frequency, or, where there are none, at the nearest distances.
        """
        scans = len(self.scan_shapes)
        if self.mask is None:
            return _means(self.counts.total(), self.scan.series, scans)
        return _beside_mask(self.counts, self.scan.series, self.mask, scans)


@partial(jax.jit, static_argnums=2)
def _means(electrons, series, scans: int):
    frames = jnp.zeros(scans, electrons.dtype).at[series].add(1)
    return jnp.zeros(scans, electrons.dtype).at[series].add(electrons) / frames


@partial(jax.jit, static_argnums=3)
def _beside_mask(counts, series, mask, scans: int):
    shape = counts.frame_shape
    like = jnp.zeros((scans, *shape))

    # Frame by frame, for all of them in floating point may not fit into memory.
    def add(patterns, at):
        frame = counts[at[None]].dense(patterns.dtype)
        return patterns.at[series[at]].add(only(frame[0], mask)), None

    patterns = jax.lax.scan(add, like, jnp.arange(len(counts), dtype=jnp.int32))[0]
    y, x = (np.fft.fftfreq(n, 1 / n) for n in shape)
    ring = np.rint(np.hypot(y[:, None], x[None, :])).astype(int)
    radii = jnp.arange(ring.max() + 1, dtype=like.dtype)
    size = jnp.zeros(radii.shape, like.dtype).at[ring].add(mask.astype(like.dtype))
    known = size > 0
    # Rings without a pixel are read off between those that have some, which come first.
    order = jnp.argsort(~known)

    def electrons(pattern):
        mean = jnp.zeros_like(radii).at[ring].add(pattern) / jnp.where(known, size, 1.0)
        missing = jnp.interp(radii, jnp.where(known, radii, jnp.inf)[order], mean[order])[ring]
        return jnp.sum(jnp.where(mask, pattern, missing))

    frames = jnp.zeros(scans, like.dtype).at[series].add(1)
    return jax.vmap(electrons)(patterns) / frames


class Batch(eqx.Module):
    """Some frames and their numbers in the dataset: what a loss compares a model with.

    Only pixels at which `mask` is True are compared.
    """

    counts: Counts
    index: Integer[Array, " batch"]
    mask: Mask = eqx.field(default=None, converter=_mask)

    @property
    def pixels(self) -> int | Int[Array, ""]:
        """Pixels of a frame that count."""
        return _pixels(self)


def _pixels(frames: Dataset | Batch) -> int | Int[Array, ""]:
    if frames.mask is None:
        return math.prod(frames.counts.frame_shape)
    return jnp.sum(frames.mask)


def batch(
    dataset: Dataset, index: Integer[Array, " batch"] | Integer[np.ndarray, " batch"]
) -> Batch:
    """The frames `index` of a dataset."""
    return Batch(dataset.counts[index], jnp.asarray(index, jnp.int32), dataset.mask)


def subset(
    dataset: Dataset, index: Integer[Array, " batch"] | Integer[np.ndarray, " batch"]
) -> Dataset:
    """The dataset of the frames `index` alone, with their positions."""
    scan = Scan(dataset.scan.positions[index], dataset.scan.series[index])
    return Dataset(dataset.counts[index], scan, dataset.scan_shapes, dataset.mask)


def join(datasets: Sequence[Dataset]) -> Dataset:
    """One series of all scans of several datasets, in their order; pixels count that do in all.

    **Raises:** InputError if there is none or the frames differ in shape.
    """
    joined = join_counts([d.counts for d in datasets])
    first = np.cumsum([0] + [len(d.scan_shapes) for d in datasets])
    scan = Scan(
        jnp.concatenate([d.scan.positions for d in datasets]),
        jnp.concatenate([d.scan.series + int(n) for d, n in zip(datasets, first, strict=False)]),
    )
    masks = [d.mask for d in datasets if d.mask is not None]
    mask = jnp.all(jnp.stack(masks), axis=0) if masks else None
    return Dataset(joined, scan, sum((d.scan_shapes for d in datasets), ()), mask)


def hold_out(
    dataset: Dataset, fraction: float = 0.05, seed: int = 0
) -> tuple[Int[np.ndarray, " training"], Int[np.ndarray, " held_out"]]:
    """Frame numbers to fit and frame numbers to keep aside for an honest test.

    The frames kept aside are spread evenly over the raster, and are at the same raster positions
    in all scans of one shape, so that no scan sees what another must predict. A fraction above 0
    keeps at least one position a scan aside and leaves at least one to fit.

    **Raises:** InputError for a fraction outside 0 <= fraction < 1, a scan of one position, or a
    dataset that does not fill its rasters.
    """
    sizes = [rows * columns for rows, columns in dataset.scan_shapes]
    if not 0 <= fraction < 1:
        raise InputError(
            f"`fraction` of held-out frames is {fraction}; 0 <= fraction < 1 is needed."
        )
    if sum(sizes) != len(dataset):
        raise InputError(
            f"The dataset has {len(dataset)} frames but its rasters {dataset.scan_shapes} have "
            f"{sum(sizes)}; hold frames out before taking a subset."
        )
    aside = np.zeros(len(dataset), bool)
    starts = np.cumsum([0, *sizes[:-1]])
    for start, shape in zip(starts, dataset.scan_shapes, strict=True):
        aside[start + _spread(shape, fraction, seed)] = True
    return np.flatnonzero(~aside), np.flatnonzero(aside)


def _spread(shape: tuple[int, int], fraction: float, seed: int) -> Int[np.ndarray, " chosen"]:
    """Flat positions spread evenly over a raster of `shape`, the same for the same arguments.

    The additive recurrence of low discrepancy: steps of the plastic number's powers in two
    dimensions, of the golden ratio along a line (M. Roberts, 2018, "The unreasonable effectiveness
    of quasirandom sequences").
    """
    size = shape[0] * shape[1]
    if fraction == 0:
        return np.zeros(0, int)
    if size < 2:
        raise InputError(
            f"A scan of {size} position has none to hold out; set the held-out fraction to 0."
        )
    wanted = min(max(1, round(fraction * size)), size - 1)
    # The sequence needs ever longer for the last free places: choose the fewer, then complement.
    few = min(wanted, size - wanted)
    start = np.random.default_rng(seed).random(2)
    step = np.array([GOLDEN, GOLDEN] if 1 in shape else [PLASTIC, PLASTIC**2])
    draws = 4 * few
    chosen = np.zeros(0, int)
    while len(chosen) < few:
        points = start + np.arange(draws)[:, None] / step
        row, column = np.floor(points % 1.0 * shape).astype(int).T
        flat, first = np.unique(row * shape[1] + column, return_index=True)
        chosen = flat[np.argsort(first)][:few]
        draws *= 2
    return np.sort(chosen) if few == wanted else np.setdiff1d(np.arange(size), chosen)

"""What calibration needs of the frames, gathered in one pass: moments, and bright-field images.

The bright-field disc is divided into square cells of pixels; the electrons that fall on a cell, as
the probe moves over the raster, are one bright-field image. All sums are whole electrons.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Bool, Float

from ..counts import Frames, InputError
from ..events import per_frame
from ..readers.source import Source


CELLS = 120
"""Cells of the disc, about."""
MOMENTS = 5
"""Sums that are taken beside the cells: all, outside the disc, near it, and near it times y, x."""


@dataclasses.dataclass(frozen=True)
class Signals:
    """Of one scan: `electrons` of each frame, `com` (y, x), and `images` of the cells of the disc.

    `com` is the centre of mass inside `reach` pixels, relative to the disc's centre, in pixels;
    `dark` the electrons outside of the disc. `cells` are the mean (y, x) of each cell's pixels
    from the disc's centre, `cell_pixels` how many they are, and `names` the (y, x) number of each
    cell, the same in all scans.
    """

    electrons: Float[np.ndarray, "scan_y scan_x"]
    dark: Float[np.ndarray, "scan_y scan_x"]
    com: Float[np.ndarray, "scan_y scan_x 2"]
    images: Float[np.ndarray, "scan_y scan_x cells"]
    cells: Float[np.ndarray, "cells 2"]
    cell_pixels: Float[np.ndarray, " cells"]
    names: Float[np.ndarray, "cells 2"]
    reach: float


def gather_signals(
    source: Source,
    center: tuple[float, float],
    radius: float,
    mask: Bool[np.ndarray, "ky kx"] | None = None,
    cells: int = CELLS,
) -> Signals:
    """One pass over the frames of a scan, block by block.

    `center` (y, x) and `radius` in pixels are those of the disc. The centre of mass is taken where
    a circle about the disc fits on the detector, so that its edges pull no side.

    **Raises:** InputError if the disc is too small to be divided, or leaves the detector.
    """
    good = np.ones(source.frame_shape, bool) if mask is None else mask
    y, x = (np.arange(n) - c for n, c in zip(source.frame_shape, center, strict=True))
    room = min(*(min(c + 0.5, n - 0.5 - c) for c, n in zip(center, good.shape, strict=True)))
    if radius < 3 or room < radius:
        raise InputError(
            f"{source}: a bright-field disc of {radius:.1f} pixels about ({center[0]:.1f}, "
            f"{center[1]:.1f}) in frames of {good.shape} pixels cannot be used: it must have a "
            "radius of 3 pixels or more and end on the detector."
        )
    away = np.hypot(y[:, None], x)
    weights, cell_yx, pixels, names = _cells(good, y, x, away, radius, cells)
    near = (away <= room) & good
    moments = [good, good & (away > radius + 1), near, near * y[:, None], near * x]
    columns = np.concatenate([np.stack(moments, -1).reshape(-1, MOMENTS), weights], 1)
    columns = columns.astype(np.float32)
    found = np.zeros((len(source), columns.shape[1]))
    for positions in source.blocks():
        found[positions] = _products(source, positions, columns)
    found = found.reshape(*source.scan_shape, -1)
    inside = np.maximum(found[..., 2:3], 1)
    return Signals(
        found[..., 0], found[..., 1], found[..., 3:MOMENTS] / inside, found[..., MOMENTS:],
        cell_yx, pixels, names, room,
    )  # fmt: skip


def _cells(good, y, x, away, radius, count):
    """Which pixels belong to which cell, as columns of ones, and where the cells lie."""
    side = max(1, round(radius * math.sqrt(math.pi / count)))
    inside = good & (away <= radius + 0.5)
    row, column = (np.floor(v / side + 0.5).astype(int) for v in (y, x))
    number = np.stack(np.broadcast_arrays(row[:, None], column), -1)[inside]
    names, owner = np.unique(number, axis=0, return_inverse=True)
    owner = owner.ravel()
    pixels = np.bincount(owner).astype(float)
    full = pixels >= side**2 / 2
    place = np.stack(np.broadcast_arrays(y[:, None], x), -1)[inside]
    middle = np.stack([np.bincount(owner, place[:, i]) for i in (0, 1)], -1) / pixels[:, None]
    weights = np.zeros((good.size, len(pixels)))
    weights[np.flatnonzero(inside), owner] = 1
    return weights[:, full], middle[full], pixels[full], names[full].astype(float)


def _products(source: Source, positions, columns) -> Float[np.ndarray, "frames columns"]:
    """Sums over the pixels of some frames, weighted by each column."""
    counts = source.host(positions)
    if isinstance(counts, Frames):
        values = np.asarray(counts.values).reshape(len(positions), -1).astype(np.float32)
        # What a masked pixel says may be no number at all.
        values[:, columns[:, 0] == 0] = 0
        return values @ columns
    pixels = np.asarray(counts.pixels)
    times = 1 if counts.multiplicity is None else np.asarray(counts.multiplicity)
    sums = [per_frame(counts, np.asarray(columns[pixels, j] * times)) for j in range(MOMENTS)]
    # A pixel belongs to one cell at most: its electrons are counted, not multiplied.
    cells = columns.shape[1] - MOMENTS
    inside = columns[:, MOMENTS:].any(1)
    cell = np.where(inside, columns[:, MOMENTS:].argmax(1), -1)[pixels]
    key = np.repeat(np.arange(len(counts)), np.diff(counts.indptr)) * cells + cell
    weights = np.broadcast_to(times, pixels.shape)[cell >= 0]
    images = np.bincount(key[cell >= 0], weights, len(counts) * cells)
    return np.concatenate([np.stack(sums, -1), images.reshape(-1, cells)], 1)

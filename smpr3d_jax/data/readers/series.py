"""From the files of a series to one dataset."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool

from ...physics.scan import raster, series_of
from .. import counts
from ..dataset import Dataset
from .masks import common_mask
from .source import Source


def load_series(
    sources: Sequence[Source],
    scan_step: float | tuple[float, float],
    rotation: float = 0.0,
    transpose: bool = False,
    center: tuple[float, float] | None = None,
    shifts: Sequence[tuple[float, float]] | None = None,
) -> Dataset:
    """Read all counts, bring the zero frequency to the corner, and place the probes.

    **Arguments:** `scan_step` Å, one number or (y, x); `rotation` of the scan against the detector
    in rad and `transpose`, as in `physics.scan.raster`; `center` (y, x) of the zero frequency in
    pixels, default n//2, rounded to whole pixels here (the rest is the detector's `offset`);
    `shifts` (y, x) Å of each scan. A pixel counts where it does in all sources.
    """
    step = (scan_step, scan_step) if isinstance(scan_step, float | int) else scan_step
    middle = None if center is None else (round(center[0]), round(center[1]))
    moves = shifts or [(0.0, 0.0)] * len(sources)
    positions = [
        raster(source.scan_shape, step, rotation, transpose) + np.asarray(move, float)
        for source, move in zip(sources, moves, strict=True)
    ]
    frames = counts.join([counts.to_corner(source.read(), middle) for source in sources])
    mask = _at_corner(common_mask(sources), middle)
    return Dataset(frames, series_of(positions), tuple(s.scan_shape for s in sources), mask)


def _at_corner(
    mask: Bool[np.ndarray, "ky kx"] | None, middle: tuple[int, int] | None
) -> Bool[np.ndarray, "cropped_ky cropped_kx"] | None:
    """The mask cropped and turned as the counts are."""
    if mask is None:
        return None
    turned = counts.to_corner(counts.Frames(jnp.asarray(mask[None], jnp.uint8)), middle)
    found = np.asarray(turned.dense(jnp.uint8)[0], bool)
    return None if found.all() else found

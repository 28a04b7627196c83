"""Where the probe stood, and in which scan of the series."""

from collections.abc import Sequence

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


class Scan(eqx.Module):
    """Every frame of a series: the probe's position and the scan it belongs to.

    Positions are (y, x) in Å, in the frame of the detector's axes, the first position of an
    unshifted raster at (0, 0). A single scan is a series of one.
    """

    positions: Float[Array, "frames 2"]
    series: Int[Array, " frames"]

    def __check_init__(self):
        if self.positions.shape[0] != self.series.shape[0]:
            raise ValueError(
                f"`Scan` has {self.positions.shape[0]} positions but {self.series.shape[0]} "
                "entries in `series`; each frame needs one of both."
            )


def raster(
    shape: tuple[int, int],
    step: tuple[float, float],
    rotation: float = 0.0,
    transpose: bool = False,
) -> Float[np.ndarray, "positions 2"]:
    """Positions (y, x) in Å of a raster of `shape` (slow, fast), row after row.

    `transpose` exchanges the scan's axes first; `rotation` (rad) then turns the scan about its
    first position, from the detector's x axis towards its y axis.
    """
    slow, fast = np.meshgrid(
        *(np.arange(n) * d for n, d in zip(shape, step, strict=True)), indexing="ij"
    )
    y, x = (fast.ravel(), slow.ravel()) if transpose else (slow.ravel(), fast.ravel())
    cos, sin = np.cos(rotation), np.sin(rotation)
    return np.stack([cos * y + sin * x, cos * x - sin * y], axis=-1)


def series_of(scans: Sequence[Float[np.ndarray, "_ 2"]]) -> Scan:
    """Join the positions of several scans."""
    index = np.repeat(np.arange(len(scans)), [len(p) for p in scans])
    return Scan(jnp.asarray(np.concatenate(scans), float), jnp.asarray(index, jnp.int32))

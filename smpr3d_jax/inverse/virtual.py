"""Virtual detectors: images of the electrons that fell on a part of the camera.

A detector is an array of weights (ky, kx), zero frequency in the corner, as the frames are; any
array will do. An image holds the weighted sum of each frame, on the raster of the scan; counts are
decoded in blocks that stay in cache, and events are never made dense.
"""

from collections.abc import Sequence

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..data.counts import Counts, Frames, InputError
from ..data.dataset import Dataset
from ..physics.detector import annulus, Detector
from ..physics.fourier import EXACT
from .rasters import counts_of, on_raster, raster_of


TOGETHER = 64
"""Frames decoded at once."""


def weighted_sums(
    counts: Counts, weights: Float[Array, "weights ky kx"]
) -> Float[Array, "frames weights"]:
    """Sum over the pixels of each frame of its counts times each of the `weights`.

    **Raises:** InputError if weights and frames differ in shape.
    """
    if weights.shape[1:] != counts.frame_shape:
        raise InputError(
            f"Weights of {weights.shape[1:]} pixels (ky, kx) cannot be laid over frames of "
            f"{counts.frame_shape}; make them with the `Detector` of these frames."
        )
    return _sums(counts, weights.reshape(len(weights), -1))


@eqx.filter_jit
def _sums(counts, weights):
    def dense(frame):
        return jnp.matmul(weights, frame.reshape(-1).astype(weights.dtype), precision=EXACT)

    def sparse(hits):
        pixels, multiplicity = hits
        # Rows of all weights of a pixel, so that a hit is looked up once.
        return jnp.matmul(multiplicity.astype(weights.dtype), by_pixel[pixels], precision=EXACT)

    if isinstance(counts, Frames):
        return jax.lax.map(dense, counts.values, batch_size=TOGETHER)
    by_pixel = weights.T
    return jax.lax.map(sparse, (counts.pixels, counts.multiplicity), batch_size=TOGETHER)


def images(
    dataset: Dataset, detectors: Float[Array, "detectors ky kx"], scan: int = 0
) -> Float[Array, "detectors slow fast"]:
    """What each of the `detectors` counts at each position of one scan, electrons.

    **Raises:** InputError if detectors and frames differ in shape, or a dataset without rasters.
    """
    sums = weighted_sums(counts_of(dataset, scan), detectors)
    return jnp.moveaxis(on_raster(sums, raster_of(dataset, scan)), -1, 0)


def angles(detector: Detector) -> tuple[Float[np.ndarray, "ky 1"], Float[np.ndarray, "1 kx"]]:
    """Scattering angle (y, x) of each pixel's centre, mrad; zero frequency in the corner."""
    y, x = (
        (np.fft.fftfreq(n, 1 / n) - o) * detector.pixel
        for n, o in zip(detector.shape, detector.offset, strict=True)
    )
    return y[:, None], x[None, :]


def ring(detector: Detector, outer: float, inner: float = 0.0) -> Float[Array, "ky kx"]:
    """1 on the pixels between `inner` and `outer` mrad from the beam's centre; 0 is a disc."""
    y, x = (o * detector.pixel for o in detector.offset)
    return annulus(detector, outer, inner, (y, x))


def standard(detector: Detector, semiangle: float) -> dict[str, Float[Array, "ky kx"]]:
    """The usual detectors of a probe of `semiangle` (mrad).

    `bf`: the whole disc; `abf`: its outer half, from semiangle/2; `adf`: what the camera holds
    beyond 1.2 semiangle.
    """
    far = float(np.hypot(*(np.abs(a).max() for a in angles(detector))))
    return {
        "bf": ring(detector, semiangle),
        "abf": ring(detector, semiangle, semiangle / 2),
        "adf": ring(detector, far, 1.2 * semiangle),
    }


def segments(
    detector: Detector, edges: Sequence[float | int], sectors: int = 4, start: float = 0.0
) -> Float[Array, "segments ky kx"]:
    """Rings between successive `edges` (mrad), each cut into equal `sectors`, ring after ring.

    Angles are counted from the detector's x axis towards its y axis, the first sector begins at
    `start` (rad). Each pixel whose centre lies in a ring belongs to exactly one segment of it.

    **Raises:** InputError for edges that do not increase or no sectors.
    """
    limits = np.asarray(edges, float)
    if limits.size < 2 or np.any(np.diff(limits) <= 0) or limits[0] < 0 or sectors < 1:
        raise InputError(
            f"`segments` needs two or more increasing `edges` in mrad and at least one sector, got "
            f"{edges} and {sectors}."
        )
    y, x = angles(detector)
    radius = np.hypot(y, x)
    turn = (np.arctan2(y, x) - start) / (2 * np.pi) % 1.0
    sector = np.minimum((turn * sectors).astype(int), sectors - 1)
    rings = [(radius >= a) & (radius < b) for a, b in zip(limits, limits[1:], strict=False)]
    parts = [r & (sector == s) for r in rings for s in range(sectors)]
    return jnp.asarray(np.stack(parts), float)

"""In which order frames are taken: neighbours together, so that what they share is loaded once."""

import numpy as np
from jaxtyping import Int

from ..physics.forward import Beamlets, Scattering
from ..physics.smatrix import Beams


def ordered(
    model: Scattering, index: Int[np.ndarray, " frames"], strip: int = 8
) -> Int[np.ndarray, " frames"]:
    """`index` sorted such that consecutive frames share what the model's plan shares.

    Beams: neighbouring positions, along strips `strip` positions wide, turning back at each end,
    all scans of a position together. Tilt modes: the same tabulated beamlets.
    """
    if isinstance(model.plan, Beamlets):
        return index[np.argsort(np.asarray(model.plan.entry)[index], kind="stable")]
    if not isinstance(model.specimen, Beams):
        return index
    positions = np.asarray(model.scan.positions, float)[index]
    low, spacing = positions.min(0), _spacing(positions)
    cell = np.round((positions - low) / spacing).astype(int)
    band = cell[:, 1] // strip
    along = np.where(band % 2, cell[:, 0].max() - cell[:, 0], cell[:, 0])
    series = np.asarray(model.scan.series)[index]
    return index[np.lexsort((series, cell[:, 1], along, band))]


def _spacing(positions) -> np.ndarray:
    """Typical distance between neighbours along each axis: the area of one position's cell."""
    spread = np.maximum(np.ptp(positions, axis=0), 1e-6)
    count = max(len(np.unique(np.round(positions, 3), axis=0)), 1)
    return np.full(2, max(np.sqrt(spread[0] * spread[1] / count), 1e-6))


def chunks(
    index: Int[np.ndarray, " frames"], size: int
) -> tuple[Int[np.ndarray, "chunks size"], Int[np.ndarray, " rest"]]:
    """Rows of `size` consecutive frames, and the fewer than `size` that are left."""
    whole = len(index) // size * size
    return index[:whole].reshape(-1, size), index[whole:]

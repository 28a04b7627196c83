"""In which order frames are taken: neighbours together, so that what they share is loaded once."""

from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Float, Int, PyTree

from ..data.dataset import Batch, batch, Dataset
from ..physics.beamlets import Beamlets, Ladder
from ..physics.forward import Blocks, Scattering
from ..physics.smatrix import Beams, place


def ordered(
    model: PyTree, index: Int[np.ndarray, " frames"], strip: int = 8
) -> Int[np.ndarray, " frames"]:
    """`index` sorted such that consecutive frames share what the model's plan shares.

    Beams: neighbouring positions, along strips `strip` positions wide, turning back at each end,
    all scans of a position together. Tilt modes: the same tabulated beamlets. Any other model
    keeps the order.
    """
    if not isinstance(model, Scattering):
        return index
    if isinstance(model.plan, Beamlets):
        return index[np.argsort(np.asarray(model.plan.entry)[index], kind="stable")]
    if isinstance(model.plan, Ladder):
        scan, table = model.scan, model.plan
        _, rest = place(model.specimen, scan.positions, model.window)
        rows = np.asarray(table.rows(scan.series, rest, model.window))
        return index[np.argsort(rows[index], kind="stable")]
    if not isinstance(model.specimen, Beams) or len(index) == 0:
        return index
    positions = np.asarray(model.scan.positions, float)[index]
    series = np.asarray(model.scan.series)[index]
    spacing = _spacing(positions, int(np.bincount(series).max()))
    cell = np.round((positions - positions.min(0)) / spacing).astype(int)
    band = cell[:, 1] // strip
    along = np.where(band % 2, cell[:, 0].max() - cell[:, 0], cell[:, 0])
    return index[np.lexsort((series, cell[:, 1], along, band))]


def _spacing(positions, count: int) -> float:
    """Typical distance between neighbours: the side of the square that each of `count` owns."""
    spread = np.maximum(np.ptp(positions, axis=0), 1e-6)
    return max(float(np.sqrt(spread[0] * spread[1] / count)), 1e-6)


def chunks(
    index: Int[np.ndarray, " frames"], size: int
) -> tuple[Int[np.ndarray, "chunks size"], Int[np.ndarray, " rest"]]:
    """Rows of `size` consecutive frames, and the fewer than `size` that are left."""
    whole = len(index) // size * size
    return index[:whole].reshape(-1, size), index[whole:]


def draw(
    model: PyTree, order: Int[np.ndarray, " frames"], size: int, rng: np.random.Generator
) -> Int[np.ndarray, "batches size"]:
    """The batches of one epoch, in random sequence; `order` is that of `ordered`.

    Frames are drawn without replacement, those that do not fill a batch are left to other epochs,
    and each batch keeps the order. Frames that are computed in blocks of neighbours are drawn
    block by block; the last block is then filled up with frames of the one before.
    """
    if isinstance(model, Scattering) and isinstance(model.plan, Blocks):
        rows, rest = chunks(order, size)
        rows = rows if len(rest) == 0 else np.concatenate([rows, order[None, -size:]])
        return rng.permutation(rows)
    rows, _ = chunks(rng.permutation(len(order)), size)
    return order[np.sort(rows, axis=1)]


def groups(
    positions: Float[np.ndarray, "frames 2"],
    index: Int[np.ndarray, " training"],
    size: int,
    grouping: str,
    rng: np.random.Generator,
) -> Int[np.ndarray, "batches size"]:
    """Batches of one epoch of the frames `index`, in random sequence.

    "random": frames from anywhere. "compact": neighbours along a Hilbert curve, cut at a random
    place. "hilbert": every n-th frame along that curve, so that each batch covers the scan evenly.
    Frames that do not fill a batch are left to other epochs.

    **Raises:** ValueError for another `grouping`.
    """
    count = len(index) // size
    if grouping == "random":
        return rng.permutation(index)[: count * size].reshape(count, size)
    if grouping not in ("compact", "hilbert"):
        raise ValueError(f"`grouping` is {grouping!r}; known are 'random', 'compact', 'hilbert'.")
    along = index[np.argsort(_hilbert(positions[index]), kind="stable")]
    along = np.roll(along, rng.integers(len(along)))[: count * size]
    rows = along.reshape(count, size) if grouping == "compact" else along.reshape(size, count).T
    return rng.permutation(rows)


def _hilbert(positions: Float[np.ndarray, "frames 2"], depth: int = 10):
    """How far along a Hilbert curve of 4^depth cells each position lies (Hilbert 1891)."""
    extent = max(float(np.ptp(positions, axis=0).max()), 1e-9)
    y, x = ((positions - positions.min(0)) / extent * (2**depth - 1)).astype(np.int64).T
    place = np.zeros(len(positions), np.int64)
    for side in 2 ** np.arange(depth - 1, -1, -1):
        up, right = (y & side) > 0, (x & side) > 0
        place += side * side * ((3 * right) ^ up)
        # Each quadrant is entered as the whole is, turned or mirrored.
        mirror = ~up & right
        x, y = (
            np.where(mirror, side - 1 - (x & (side - 1)), x & (side - 1)),
            np.where(mirror, side - 1 - (y & (side - 1)), y & (side - 1)),
        )
        x, y = np.where(~up, y, x), np.where(~up, x, y)
    return place


def each(
    function: Callable[[PyTree, Batch], PyTree],
    model: PyTree,
    data: Dataset,
    index: Int[np.ndarray, " frames"],
    chunk: int = 64,
) -> PyTree[np.ndarray]:
    """What `function(model, batch)` says of each of the frames `index`, `chunk` of them at once.

    The last chunk is filled up with its last frame, so that a compiled function is compiled once.
    """
    filled = np.concatenate([index, np.repeat(index[-1:], -len(index) % chunk)])
    parts = [function(model, batch(data, row)) for row in filled.reshape(-1, chunk)]
    whole = lambda *rows: np.concatenate([np.asarray(r, float) for r in rows])[: len(index)]
    return jax.tree.map(whole, *parts)

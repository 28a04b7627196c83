"""Frames brought to one place and size by whole pixels: descan, padding, masks of both.

What whole pixels leave over of a descan, up to half a pixel, acts as a blur of 0.29 pixels (rms)
along each axis and may be given to the model as `blur_pixels`; what is common to all frames is the
detector's `offset`. The forward model has one offset for all frames, so that a descan that changes
over the scan has to be removed here.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Integer

from .counts import Frames, InputError
from .electrons import Electrons, shift
from .events import event_rows, EventRows, to_events


class Descan(NamedTuple):
    """Where the undiffracted beam lies in each frame, and how well a smooth surface says so.

    `centers` (y, x) in pixels is a polynomial of the scan position; `residual` is the rms (y, x) of
    what was measured about it, without outliers.
    """

    centers: Float[np.ndarray, "frames 2"]
    residual: tuple[float, float]

    @property
    def shifts(self) -> Int[np.ndarray, "frames 2"]:
        """Whole pixels by which each frame must move to have its centre at the mean of all."""
        return np.rint(self.mean - self.centers).astype(int)

    @property
    def mean(self) -> Float[np.ndarray, " 2"]:
        """Of all frames, where a mean pattern has its centre."""
        return self.centers.mean(axis=0)


def descan_of(
    measured: Float[np.ndarray, "frames 2"], scan_shape: tuple[int, int], order: int = 1
) -> Descan:
    """A polynomial of `order` (0 to 3) in both scan directions through measured centres of frames.

    `measured` (y, x), such as `electrons.center_of_mass`, carries the specimen's deflections as
    well, so that only what is smooth over the whole scan is taken for descan. Frames that are not
    a number are left out, and those far from the fit count little (Huber's weights at 1.5 robust
    standard deviations).

    **Raises:** InputError for another number of frames, or too few to fit.
    """
    rows, columns = scan_shape
    if not 0 <= order <= 3 or len(measured) != rows * columns:
        raise InputError(
            f"`descan_of`: {len(measured)} centres for a scan of {rows} × {columns} positions and "
            f"order {order}; one centre a position and an order from 0 to 3 are needed."
        )
    # A line of positions has no slope across.
    limits = [min(order, max(0, n - 1)) for n in scan_shape]
    y, x = (np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in scan_shape)
    design = np.stack(
        [
            (y[:, None] ** i * x[None, :] ** j).ravel()
            for i in range(limits[0] + 1)
            for j in range(limits[1] + 1)
            if i + j <= order
        ],
        axis=1,
    )
    good = np.isfinite(measured).all(axis=1)
    if np.count_nonzero(good) < 2 * design.shape[1]:
        raise InputError(
            f"`descan_of`: {np.count_nonzero(good)} frames with a centre cannot determine the "
            f"{design.shape[1]} coefficients of order {order}; use a lower order."
        )
    centers, spread = np.empty_like(measured, float), []
    for axis in (0, 1):
        found, sigma = _huber(design[good], measured[good, axis])
        centers[:, axis] = design @ found
        spread.append(sigma)
    return Descan(centers, (spread[0], spread[1]))


def _huber(design, values):
    """Coefficients of a robust fit, and the robust standard deviation about it."""
    weight, sigma = np.ones(len(values)), 0.0
    found = np.zeros(design.shape[1])
    for _ in range(30):
        root = np.sqrt(weight)
        found = np.linalg.lstsq(design * root[:, None], values * root, rcond=None)[0]
        misfit = np.abs(values - design @ found)
        sigma = 1.4826 * float(np.median(misfit))
        if sigma == 0:
            break
        weight = np.minimum(1, 1.5 * sigma / np.maximum(misfit, 1e-30))
    return found, sigma


def without_descan(
    counts: Electrons, shifts: Integer[np.ndarray, "frames 2"]
) -> tuple[Electrons, Bool[np.ndarray, "ky kx"], Float[np.ndarray, " frames"]]:
    """Frames moved by whole pixels, the pixels that all of them still see, and electrons lost.

    What came in at an edge was never recorded: the mask is False there.
    """
    moved, lost = shift(counts, shifts)  # pyright: ignore
    return moved, seen_by_all(counts.frame_shape, shifts), np.asarray(lost, float)


def seen_by_all(
    shape: tuple[int, int], shifts: Integer[np.ndarray, "frames 2"]
) -> Bool[np.ndarray, "ky kx"]:
    """Pixels that lie inside every frame after these shifts."""
    inside = []
    for n, by in zip(shape, np.asarray(shifts).T, strict=True):
        place = np.arange(n)
        inside.append((place >= by.max(initial=0)) & (place < n + by.min(initial=0)))
    return inside[0][:, None] & inside[1][None, :]


def padded(
    counts: Electrons, shape: tuple[int, int]
) -> tuple[Electrons, Bool[np.ndarray, "ky kx"]]:
    """Frames in the middle of larger ones of `shape` (index n//2 goes to n//2), and what they see.

    Wider frames stand for a finer sampling in real space. The rim was never seen: it is dark, and
    the mask is False there.

    **Raises:** InputError for a shape that is smaller along an axis.
    """
    old = counts.frame_shape
    if min(a - b for a, b in zip(shape, old, strict=True)) < 0:
        raise InputError(f"`padded`: {shape} is smaller than the frames of {old}; use `crop`.")
    first = [a // 2 - b // 2 for a, b in zip(shape, old, strict=True)]
    mask = np.zeros(shape, bool)
    inner = tuple(slice(f, f + n) for f, n in zip(first, old, strict=True))
    mask[inner] = True
    if isinstance(counts, Frames):
        values = np.asarray(counts.values)
        wide = np.zeros((len(values), *shape), values.dtype)
        wide[(slice(None), *inner)] = values
        return Frames(wide), mask
    rows = counts if isinstance(counts, EventRows) else event_rows(counts)
    y, x = np.divmod(np.asarray(rows.pixels), old[1])
    moved = ((y + first[0]) * shape[1] + x + first[1]).astype(np.int32)
    wide = EventRows(rows.indptr, moved, shape, rows.multiplicity)
    return (wide if isinstance(counts, EventRows) else to_events(wide)), mask


def binned_mask(mask: Bool[np.ndarray, "ky kx"], factor: int) -> Bool[np.ndarray, "by bx"]:
    """The mask of frames binned by `bin_detector`: True where all that was summed may be used.

    **Raises:** InputError unless `factor` divides both sides.
    """
    ky, kx = mask.shape
    if factor < 1 or ky % factor or kx % factor:
        raise InputError(f"`binned_mask`: {ky} × {kx} pixels cannot be divided by {factor}.")
    blocks = mask.reshape(ky // factor, factor, kx // factor, factor)
    return np.asarray(blocks.all(axis=(1, 3)))

"""Sources that read otherwise: each step takes a source and gives one whose frames it has changed.

Nothing is read before frames are asked for, unless a step must look at the whole scan to know what
to do, which it says. Steps work on blocks of any size and leave counts Poisson's.
"""

import dataclasses
import math

import numpy as np
from jaxtyping import Bool, Int, Real

from ..alignment import binned_mask, Descan, descan_of, without_descan
from ..counts import Frames, InputError, window
from ..electrons import bin_detector, center_of_mass, crop, shift
from ..events import EventRows
from ..gain import to_electrons
from ..pixels import bad_pixels, BadPixels, pixel_statistics
from .masks import with_mask
from .source import Positions, Source


AGAIN = 4
"""How often a pattern that wanders far is looked at again."""


def in_electrons(source: Source, counts_per_electron: float) -> Source:
    """Whole electrons from a camera that integrates, as `gain.to_electrons` has them.

    **Raises:** InputError for events, which are electrons; and, when read, for frames in which
    single electrons cannot be told.
    """
    if source.kind == "events":
        raise InputError(
            f"{source}: holds single electrons; they are not to be divided by "
            f"{counts_per_electron:g} counts an electron."
        )

    def load(positions: Positions):
        try:
            return to_electrons(_values(source, positions), counts_per_electron)
        except InputError as error:
            raise InputError(f"{source}: {error}") from error

    facts = {name: fact for name, fact in source.facts.items() if name != "counts_per_electron"}
    return dataclasses.replace(
        source, load=load, dtype=np.dtype(np.uint16), facts=facts,
        frame_bytes=8.0 * math.prod(source.frame_shape),
    )  # fmt: skip


def _values(source: Source, positions: Positions) -> Real[np.ndarray, "frames ky kx"]:
    counts = source.usable(positions)
    assert isinstance(counts, Frames)  # for the kind is dense
    return np.asarray(counts.values)


def _bytes(source: Source) -> float:
    """Of a frame as it is read, however little is made of it."""
    return float(source.frame_bytes or math.prod(source.frame_shape) * source.dtype.itemsize)


def without_bad_pixels(source: Source) -> tuple[Source, BadPixels]:
    """The source with the pixels masked that are hot, dead or flickering.

    Looks at the whole scan.
    """
    seen = pixel_statistics(source.usable(positions) for positions in source.blocks())
    found = bad_pixels(seen, source.mask)
    return (source if found.mask.all() else with_mask(source, found.mask)), found


def descanned(
    source: Source, order: int, center: tuple[float, float], radius: float
) -> tuple[Source, Descan]:
    """The source with its frames moved by whole pixels, and the descan that was found.

    Looks at the whole scan, more than once if the disc wanders far: a polynomial of `order` in the
    scan position is fitted to the centres of mass within 1.5 times the `radius` of the disc about
    `center` (pixels, y, x). Their mean stays where it is. What some frames no longer see is masked,
    so that a mask grows by the range of the moves.

    **Raises:** InputError where frames do not determine the polynomial.
    """
    near = _disc(source.frame_shape, center, 1.5 * radius)
    near = near if source.mask is None else near & source.mask
    found = _descan(source, order, near, np.zeros((len(source), 2), int))
    # Of a disc that leaves the circle a part is missing: it is looked at again where it was moved.
    for _ in range(AGAIN):
        before = found.shifts
        if np.hypot(*before.T).max(initial=0) <= 0.4 * radius:
            break
        found = _descan(source, order, near, before)
        if np.array_equal(found.shifts, before):
            break
    shifts = found.shifts
    if not shifts.any():
        return source, found

    def load(positions: Positions):
        moved = without_descan(source.usable(positions), shifts[positions])[0]
        return np.asarray(moved.values) if isinstance(moved, Frames) else moved

    good = np.ones(source.frame_shape, bool) if source.mask is None else source.mask
    return dataclasses.replace(source, load=load, mask=_good_in_all(good, shifts)), found


def _descan(
    source: Source, order: int, near: Bool[np.ndarray, "ky kx"], moves: Int[np.ndarray, "frames 2"]
) -> Descan:
    """The descan, from centres of mass of the pixels `near` in frames that were moved before."""
    measured = np.zeros((len(source), 2))
    for block in source.blocks():
        moved = without_descan(source.usable(block), moves[block])[0]
        measured[block] = center_of_mass(moved, near) - moves[block]
    try:
        return descan_of(measured, source.scan_shape, order)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def _good_in_all(
    mask: Bool[np.ndarray, "ky kx"], shifts: Int[np.ndarray, "frames 2"]
) -> Bool[np.ndarray, "ky kx"]:
    """True where no shift brings a bad pixel or one that was never seen."""
    moves = np.unique(shifts, axis=0)
    masks = Frames(np.broadcast_to(mask, (len(moves), *mask.shape)).astype(np.uint8))
    return np.asarray(np.asarray(shift(masks, moves)[0].values).all(axis=0))


def _disc(shape: tuple[int, int], center, radius: float) -> Bool[np.ndarray, "ky kx"]:
    y, x = (np.arange(n) - c for n, c in zip(shape, center, strict=True))
    return np.hypot(y[:, None], x[None, :]) <= radius


def through_window(
    source: Source,
    center: tuple[int, int] | None = None,
    shape: tuple[int, int] | None = None,
    factor: int = 1,
) -> Source:
    """The pixels of a window about `center` (y, x), which comes to index n//2, summed by `factor`.

    `shape` (ky, kx) counts pixels before they are summed; by default the largest window that
    `factor` divides.

    **Raises:** InputError for a window that does not fit or that `factor` does not divide.
    """
    try:
        sides = window(source.frame_shape, shape, center)
        if shape is None:
            full = [s.stop - s.start for s in sides]
            shape = (full[0] - full[0] % factor, full[1] - full[1] % factor)
            sides = window(source.frame_shape, shape, center)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    if shape[0] % factor or shape[1] % factor or min(shape) < factor:
        raise InputError(
            f"{source}: a window of {shape[0]} × {shape[1]} pixels cannot be binned by {factor}; "
            f"crop it to multiples of {factor}."
        )
    mask = None if source.mask is None else binned_mask(source.mask[sides], factor)

    def load(positions: Positions):
        counts = source.usable(positions)
        if isinstance(counts, EventRows):
            return bin_detector(crop(counts, shape, center), factor)
        return np.asarray(bin_detector(crop(counts, shape, center), factor).values)

    facts = {name: fact for name, fact in source.facts.items() if name not in OF_PIXELS}
    size = (shape[0] // factor, shape[1] // factor)
    none = bin_detector(Frames(np.zeros((1, *shape), source.dtype)), factor)
    return dataclasses.replace(
        source, load=load, frame_shape=size, mask=mask, facts=facts,
        dtype=np.dtype(none.values.dtype), frame_bytes=_bytes(source),
    )  # fmt: skip


OF_PIXELS = ("center", "detector_pixel_mrad", "detector_pixel_inv_A", "semiangle_pixels")
"""What a file says in pixels as they were."""

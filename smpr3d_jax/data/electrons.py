"""One vocabulary for what is done to counts before a reconstruction.

Every function takes `Frames`, `Events` or `EventRows` (`Electrons`) and gives back the same kind;
what it does to events equals, electron for electron, what it does to frames. Counts of numpy arrays
stay in numpy, those of JAX arrays in JAX. The sums can be compiled for every kind, the rest for
`Frames`. Integers grow where a sum could overflow them; nothing is interpolated.

The zero frequency is wherever the frames have it: `crop` and `center` bring it to index n//2, the
other functions take it along.
"""

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Integer, Real

from .counts import Counts, Events, Frames, InputError, window
from .events import event_rows, EventRows, on_host, per_frame, to_events


Electrons = Counts | EventRows
"""Counted electrons of any kind."""


def sum_frames(counts: Electrons) -> Real[Array | np.ndarray, "ky kx"]:
    """The sum of all frames; of whole counts in whole numbers, in JAX of its default width."""
    if isinstance(counts, Frames):
        kind = counts.values.dtype.kind
        return counts.values.sum(axis=0, dtype=None if kind == "f" else int)
    ky, kx = counts.shape
    if isinstance(counts.pixels, np.ndarray):
        flat = np.bincount(counts.pixels, counts.multiplicity, minlength=ky * kx)
        return flat.astype(np.int64, copy=False).reshape(ky, kx)
    number = 1 if counts.multiplicity is None else counts.multiplicity.astype(int)
    return jnp.zeros(ky * kx, int).at[counts.pixels].add(number).reshape(ky, kx)


def virtual_images(
    counts: Electrons,
    weights: Bool[Array | np.ndarray, "*n ky kx"] | Real[Array | np.ndarray, "*n ky kx"],
) -> Float[Array | np.ndarray, "*n frames"]:
    """Σ over the pixels of weight × count of each frame: what detectors of any shape record.

    `weights` are those of one detector, or of several along a first axis: a mask, a sector, a
    ramp. In the layout of the frames as they are.
    """
    ky, kx = counts.frame_shape
    if weights.shape[-2:] != (ky, kx):
        raise InputError(
            f"`virtual_images`: weights of shape {weights.shape} do not belong to frames of "
            f"{ky} × {kx} pixels."
        )
    host = isinstance(counts.values if isinstance(counts, Frames) else counts.pixels, np.ndarray)
    flat = (np if host else jnp).asarray(weights, float).reshape(-1, ky * kx)
    if isinstance(counts, Frames):
        values = counts.values.reshape(len(counts), -1)
        # Without BLAS, numpy converts a few counts at a time: no frame ever stands in floats.
        images = np.einsum("fp,ip->if", values, flat) if host else flat @ values.T.astype(float)
    elif isinstance(counts, Events):
        number = counts.multiplicity.astype(float)
        images = jax.vmap(lambda w: jnp.sum(w[counts.pixels] * number, axis=1))(flat)
    elif host:
        number = counts.multiplicity
        seen = (w[counts.pixels] if number is None else w[counts.pixels] * number for w in flat)
        images = np.stack([per_frame(counts, values) for values in seen])
    else:
        number = 1.0 if counts.multiplicity is None else counts.multiplicity.astype(float)
        images = jax.vmap(lambda w: per_frame(counts, w[counts.pixels] * number))(flat)
    return images.reshape(*weights.shape[:-2], len(counts))


def center_of_mass(
    counts: Electrons, mask: Bool[Array | np.ndarray, "ky kx"] | None = None
) -> Float[Array | np.ndarray, "frames 2"]:
    """Mean position (y, x) of the electrons of each frame, in pixels from index 0.

    `mask` is True where electrons are taken. Not a number where a frame has none.
    """
    ky, kx = counts.frame_shape
    if isinstance(counts, EventRows) and isinstance(counts.pixels, np.ndarray):
        counts = counts if mask is None else masked(counts, np.asarray(mask))
        n, place = counts.multiplicity, counts.pixels
        row = place // place.dtype.type(kx)
        sums = [per_frame(counts, v if n is None else v * n.astype(np.int64)) for v in (row, place)]
        electrons, y, x = counts.total(), sums[0], sums[1] - kx * sums[0]
    else:
        xp = jnp if mask is not None and not isinstance(mask, np.ndarray) else np
        y, x = np.indices((ky, kx)).astype(float)
        weights = np.stack([np.ones((ky, kx)), y, x])
        weights = weights if mask is None else xp.where(mask[None], weights, xp.zeros(()))
        electrons, y, x = virtual_images(counts, weights)
    xp = np if isinstance(electrons, np.ndarray) else jnp
    none = electrons == 0
    safe = xp.where(none, xp.nan, electrons)
    return xp.stack([y / safe, x / safe], axis=-1)


Kind = TypeVar("Kind", bound=Electrons)


def _each(
    counts: Kind,
    of_frames: Callable[[Frames], Frames],
    of_rows: Callable[[EventRows], EventRows],
) -> Kind:
    """The same for every kind; padded events go by way of rows."""
    done: Any
    if isinstance(counts, Frames):
        done = of_frames(counts)
    elif isinstance(counts, Events):
        done = to_events(of_rows(event_rows(counts)))
    else:
        done = of_rows(on_host(counts))
    return done


def relocate(
    rows: EventRows, table: Int[np.ndarray, " pixels"], shape: tuple[int, int]
) -> EventRows:
    """Events whose pixel p went to `table[p]` of frames of `shape`; those at -1 are dropped."""
    return _kept(rows, table[rows.pixels], shape)


def _kept(rows: EventRows, pixels: Integer[np.ndarray, " events"], shape) -> EventRows:
    """Rows with other pixels, without those that are negative."""
    keep = pixels >= 0
    if keep.all():
        return EventRows(rows.indptr, pixels, shape, rows.multiplicity)
    indptr = np.append(0, np.cumsum(keep))[rows.indptr]
    number = None if rows.multiplicity is None else rows.multiplicity[keep]
    return EventRows(indptr, pixels[keep], shape, number)


def _rearranged(counts: Kind, view: Callable) -> Kind:
    """Counts in another order of the pixels: `view` takes an array (frames, ky, kx) to it."""
    ky, kx = counts.frame_shape

    def move(rows: EventRows) -> EventRows:
        origin = view(np.arange(ky * kx, dtype=np.int32).reshape(1, ky, kx))[0]
        table = np.full(ky * kx, -1, np.int32)
        table[origin.ravel()] = np.arange(origin.size)
        return relocate(rows, table, origin.shape)

    return _each(counts, lambda frames: Frames(view(frames.values)), move)


def crop(
    counts: Kind, shape: tuple[int, int] | None = None, center: tuple[int, int] | None = None
) -> Kind:
    """The window of `shape` (ky, kx) around the pixel `center` (y, x), which comes to index n//2.

    By default the centre is n//2 and the window the largest one around it.

    **Raises:** InputError if the window does not fit into the frame.
    """
    y, x = window(counts.frame_shape, shape, center)
    return _rearranged(counts, lambda values: values[:, y, x])


def orient(counts: Kind, quarter_turns: int = 0, transpose: bool = False) -> Kind:
    """One of the eight orientations of the detector, exactly.

    Exchanges the axes first if `transpose`, then turns by quarters from the x axis to the y axis,
    as `raster` turns a scan. Where a side is even, index n//2 may go to n//2 - 1.
    """

    def view(values):
        swapped = values.swapaxes(1, 2) if transpose else values
        match quarter_turns % 4:
            case 1:
                return swapped.swapaxes(1, 2)[:, :, ::-1]
            case 2:
                return swapped[:, ::-1, ::-1]
            case 3:
                return swapped.swapaxes(1, 2)[:, ::-1]
        return swapped

    return _rearranged(counts, view)


def flip(counts: Kind, y: bool = False, x: bool = False) -> Kind:
    """The detector mirrored along its axes. Where a side is even, n//2 goes to n//2 - 1."""
    return _rearranged(counts, lambda v: v[:, :: -1 if y else 1, :: -1 if x else 1])


def masked(counts: Kind, mask: Bool[Array | np.ndarray, "ky kx"]) -> Kind:
    """Counts without those on the pixels at which `mask` is False.

    A model does not know of them: tell the loss as well.
    """
    if mask.shape != counts.frame_shape:
        raise InputError(
            f"`masked`: a mask of shape {mask.shape} does not belong to frames of "
            f"{counts.frame_shape} pixels."
        )

    def hide(frames: Frames) -> Frames:
        values, xp = frames.values, frames.values.__array_namespace__()
        return Frames(xp.where(xp.asarray(mask)[None], values, values.dtype.type(0)))

    def drop(rows: EventRows) -> EventRows:
        flat = np.asarray(mask).ravel()
        table = np.where(flat, np.arange(flat.size, dtype=np.int32), np.int32(-1))
        return relocate(rows, table, rows.shape)

    return _each(counts, hide, drop)


def bin_detector(counts: Kind, factor: int) -> Kind:
    """Sums of `factor` × `factor` neighbouring pixels.

    What was at pixel c is at (c - (factor - 1) / 2) / factor; index n//2 goes to n//2.

    **Raises:** InputError unless `factor` divides both sides: crop first, no electron is lost here.
    """
    ky, kx = counts.frame_shape
    _divides("bin_detector", "frames", "pixels", (ky, kx), factor)
    if factor == 1:
        return counts
    parts = [np.s_[:, i::factor, j::factor] for i in range(factor) for j in range(factor)]
    y, x = (np.arange(n, dtype=np.int32) // factor for n in (ky, kx))
    table, shape = (y[:, None] * (kx // factor) + x).ravel(), (ky // factor, kx // factor)
    return _each(
        counts, lambda frames: _added(frames, parts), lambda rows: relocate(rows, table, shape)
    )


def _divides(name: str, what: str, of: str, sizes: tuple[int, int], factor: int) -> None:
    if factor < 1 or sizes[0] % factor or sizes[1] % factor:
        best = tuple(n - n % max(factor, 1) for n in sizes)
        raise InputError(
            f"`{name}`: the {what} of {sizes[0]} × {sizes[1]} {of} cannot be divided by {factor}; "
            f"give a whole number above 0, and crop to {best[0]} × {best[1]} first."
        )


def _added(counts: Frames, parts: Sequence) -> Frames:
    """The sum of parts of the frames, in a type that it fits in."""
    kind = _wide(counts.values, len(parts))
    # Slices added up: several times faster than a sum over short axes.
    total = functools.reduce(operator.add, (counts.values[part].astype(kind) for part in parts))
    return Frames(total)


def wide_enough(kind: np.dtype, number: int) -> np.dtype:
    """The narrowest type, not below `kind`, that holds the sum of any `number` of its counts."""
    if kind.kind == "f":
        return kind
    needed = int(np.iinfo(kind.str).max) * number
    sizes = [s for s in (1, 2, 4, 8) if s >= kind.itemsize]
    sizes = [s for s in sizes if np.iinfo(f"{kind.kind}{s}").max >= needed] or [8]
    return np.dtype(f"{kind.kind}{sizes[0]}")


def _wide(values: Real[Array | np.ndarray, "frames ky kx"], number: int) -> np.dtype:
    """The type for sums of `number` counts, in numpy or on the device."""
    wide = wide_enough(np.dtype(values.dtype), number)
    if isinstance(values, np.ndarray):
        return wide
    kept = np.dtype(jax.dtypes.canonicalize_dtype(wide))
    known = not isinstance(values, jax.core.Tracer)
    if kept != wide and known and int(values.max()) * number > np.iinfo(kept.str).max:
        raise InputError(
            f"sums of {number} counts of up to {int(values.max())} do not fit into {kept}; enable "
            "64-bit numbers in JAX, or keep the frames in numpy."
        )
    return kept


def shift(
    counts: Kind, shifts: Integer[Array | np.ndarray, "frames 2"]
) -> tuple[Kind, Float[Array | np.ndarray, " frames"]]:
    """Each frame moved by its own whole pixels (y, x), and the electrons of it that this lost.

    What leaves a frame is gone, what comes in is dark: mask the edges by the largest shift.
    """
    if shifts.shape[0] != len(counts):
        raise InputError(f"`shift`: {len(shifts)} shifts were given for {len(counts)} frames.")
    moved = _each(
        counts,
        lambda frames: Frames(_shifted(frames.values, shifts)),
        lambda rows: _shifted_rows(rows, np.asarray(shifts)),
    )
    return moved, counts.total() - moved.total()


def _shifted_rows(rows: EventRows, shifts: Integer[np.ndarray, "frames 2"]) -> EventRows:
    """Events, each moved by the shift of its frame."""
    ky, kx = rows.shape
    by = np.repeat(shifts.astype(np.int64), np.diff(rows.indptr), axis=0)
    y, x = rows.pixels // kx + by[:, 0], rows.pixels % kx + by[:, 1]
    inside = (y >= 0) & (y < ky) & (x >= 0) & (x < kx)
    return _kept(rows, np.where(inside, y * kx + x, -1).astype(np.int32), rows.shape)


def _shifted(values, shifts):
    """Dense frames, each moved by its own shift."""
    xp, (ky, kx) = values.__array_namespace__(), values.shape[1:]
    by = xp.asarray(shifts, int)
    row = xp.arange(ky)[None] - by[:, :1]
    column = xp.arange(kx)[None] - by[:, 1:]
    inside = ((row >= 0) & (row < ky))[:, :, None] & ((column >= 0) & (column < kx))[:, None]
    row, column = row.clip(0, ky - 1)[:, :, None], column.clip(0, kx - 1)[:, None]
    taken = values[xp.arange(len(values))[:, None, None], row, column]
    return xp.where(inside, taken, xp.zeros((), values.dtype))


def center(
    counts: Kind, centers: Real[Array | np.ndarray, "frames 2"]
) -> tuple[Kind, Float[Array | np.ndarray, " frames"]]:
    """Each frame moved so that the pixel nearest to its own centre (y, x) comes to index n//2.

    Returns the electrons that this lost as well; `crop` moves all frames alike and loses none of
    the window.
    """
    xp = centers.__array_namespace__()
    ky, kx = counts.frame_shape
    middle = xp.asarray([[ky // 2, kx // 2]])
    return shift(counts, middle - xp.round(centers).astype(int))


def crop_scan(
    counts: Kind, scan_shape: tuple[int, int], rows: slice, columns: slice = slice(None)
) -> Kind:
    """The frames at some rows and columns of a scan (slow, fast)."""
    some: Any = counts[_raster("crop_scan", counts, scan_shape)[rows, columns].ravel()]
    return some


def bin_scan(counts: Kind, scan_shape: tuple[int, int], factor: int) -> Kind:
    """Sums of the frames at `factor` × `factor` neighbouring positions of a scan (slow, fast).

    **Raises:** InputError unless `factor` divides both sides of the scan: crop it first.
    """
    raster = _raster("bin_scan", counts, scan_shape)
    _divides("bin_scan", "scan", "positions", scan_shape, factor)
    rows, columns = (n // factor for n in scan_shape)
    blocks = raster.reshape(rows, factor, columns, factor).swapaxes(1, 2)
    some: Any = counts[blocks.ravel()]
    return add_groups(some, factor**2)


def _raster(name: str, counts: Electrons, scan_shape: tuple[int, int]):
    if math.prod(scan_shape) != len(counts):
        raise InputError(
            f"`{name}`: a scan of {scan_shape[0]} × {scan_shape[1]} positions does not belong to "
            f"{len(counts)} frames."
        )
    return np.arange(len(counts)).reshape(scan_shape)


def add_groups(counts: Kind, size: int) -> Kind:
    """Sums of `size` frames, those that follow each other.

    **Raises:** InputError unless the number of frames is a multiple of it.
    """
    if size < 1 or len(counts) % size:
        raise InputError(f"`add_groups`: {len(counts)} frames are no groups of {size}.")
    if size == 1:
        return counts
    return _each(
        counts,
        lambda frames: _added(frames, [np.s_[i::size] for i in range(size)]),
        lambda rows: EventRows(rows.indptr[::size], rows.pixels, rows.shape, rows.multiplicity),
    )

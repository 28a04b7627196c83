"""Electron events of whole scans as compressed rows.

`EventRows` keeps the electrons of a scan in a few bytes each and nothing for the pixels that stayed
dark: numpy arrays on the host, JAX arrays on a device. It has what `Frames` and `Events` have,
`len`, `[index]`, `dense`, `total` and `frame_shape`; the functions of `electrons` take all three.
Readers of events hand it over; `to_events` makes of it the padded kind that a reconstruction takes.
"""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, Integer, Num

from .counts import Counts, Events, events_from_csr, Frames, Index, InputError, merged, whole


class EventRows(eqx.Module):
    """Compressed rows: frame i was hit at `pixels[indptr[i]:indptr[i + 1]]`.

    Pixels are flat indices row·kx + column, in any order and as often as they were hit;
    `multiplicity` says how many electrons each entry stands for, one if it is None.
    **Raises:** InputError for rows that do not fit together and pixels outside the frame; a memory
    map is not searched for these.
    """

    indptr: Integer[Array | np.ndarray, " frames_and_one"]
    pixels: Integer[Array | np.ndarray, " events"]
    shape: tuple[int, int] = eqx.field(static=True)
    multiplicity: Integer[Array | np.ndarray, " events"] | None = None

    def __check_init__(self):
        number = None if self.multiplicity is None else len(self.multiplicity)
        if number not in (None, len(self.pixels)):
            raise InputError(
                f"`EventRows` has {len(self.pixels)} pixels but {number} multiplicities; each "
                "entry needs one, or none has one."
            )
        if isinstance(self.indptr, np.ndarray):
            _check_rows(self)

    def __len__(self) -> int:
        return len(self.indptr) - 1

    def __getitem__(self, index: Index) -> "EventRows":
        if not isinstance(index, slice) and np.ndim(index) != 1:
            raise ValueError(
                f"Counts are indexed by a slice or by an array of frame numbers, got {index!r}; "
                "write counts[i : i + 1] for one frame."
            )
        wanted = np.arange(len(self))[index if isinstance(index, slice) else np.asarray(index)]
        indptr, entries = rows_of(np.asarray(self.indptr), wanted)
        number = None if self.multiplicity is None else self.multiplicity[entries]
        return EventRows(indptr, self.pixels[entries], self.shape, number)

    @property
    def frame_shape(self) -> tuple[int, int]:
        """Pixels (ky, kx) of one frame."""
        return self.shape

    def dense(self, dtype: DTypeLike = float) -> Num[Array | np.ndarray, "frames ky kx"]:
        """The counts as an array of `dtype`, which must be able to hold them."""
        size, frames = math.prod(self.shape), (len(self), *self.shape)
        number = 1 if self.multiplicity is None else self.multiplicity.astype(dtype)
        if isinstance(self.pixels, np.ndarray):
            flat = np.zeros(len(self) * size, dtype)
            np.add.at(flat, _owner(self) * size + self.pixels, number)
            return flat.reshape(frames)
        flat = jnp.zeros((len(self), size), dtype)
        return flat.at[_owner(self), self.pixels].add(number).reshape(frames)

    def total(self) -> Float[Array | np.ndarray, " frames"]:
        """Electrons of each frame."""
        if self.multiplicity is None:
            return (self.indptr[1:] - self.indptr[:-1]).astype(float)
        return per_frame(self, self.multiplicity).astype(float)


def _check_rows(rows: EventRows) -> None:
    indptr, pixels, shape = rows.indptr, rows.pixels, rows.shape
    steps = np.diff(indptr)
    if not len(indptr) or indptr[0] != 0 or indptr[-1] != len(pixels) or steps.min(initial=0) < 0:
        ends = f"{indptr[0]} to {indptr[-1]}" if len(indptr) else "no"
        raise InputError(
            f"the rows of the events ({len(indptr)} limits, {ends}) must begin with 0, never "
            f"decrease, and end with the number of entries, {len(pixels)}."
        )
    if not isinstance(pixels, np.ndarray) or isinstance(pixels, np.memmap) or not len(pixels):
        return
    size = math.prod(shape)
    if pixels.min() < 0 or pixels.max() >= size:
        outside = np.flatnonzero((pixels < 0) | (pixels >= size))
        frame = np.searchsorted(indptr, outside[0], side="right") - 1
        raise InputError(
            f"event index {pixels[outside[0]]} in frame {frame} is outside a frame of {shape[0]} × "
            f"{shape[1]} pixels (0 to {size - 1}); {len(outside)} events are. Give the shape "
            "(ky, kx) with which the events were numbered."
        )


def rows_of(
    indptr: Integer[np.ndarray, " frames_and_one"], wanted: Integer[np.ndarray, " rows"]
) -> tuple[Int[np.ndarray, " rows_and_one"], Int[np.ndarray, " entries"] | slice]:
    """Limits of the rows `wanted`, and the entries that they take from all: a slice if it can be.

    **Raises:** IndexError for a row that is not there.
    """
    start = indptr[:-1][wanted].astype(np.int64)
    lengths = indptr[1:][wanted].astype(np.int64) - start
    limits = np.append(0, np.cumsum(lengths))
    if len(wanted) == 0 or np.all(np.diff(wanted) == 1):
        first = int(start[0]) if len(start) else 0
        return limits, slice(first, first + int(limits[-1]))
    return limits, np.arange(limits[-1]) + np.repeat(start - limits[:-1], lengths)


def _owner(rows: EventRows) -> Integer[Array | np.ndarray, " events"]:
    """The frame of each entry."""
    if isinstance(rows.pixels, np.ndarray):
        return np.repeat(np.arange(len(rows)), np.diff(rows.indptr))
    frame = jnp.arange(len(rows), dtype=jnp.int32)
    return jnp.repeat(frame, jnp.diff(rows.indptr), total_repeat_length=len(rows.pixels))


def per_frame(
    rows: EventRows, values: Num[Array | np.ndarray, " events"]
) -> Num[Array | np.ndarray, " frames"]:
    """Sum of the values of each frame's entries."""
    if not isinstance(rows.pixels, np.ndarray):
        owner = _owner(rows)
        return jax.ops.segment_sum(values, owner, len(rows), indices_are_sorted=True)
    kind = float if values.dtype.kind == "f" else np.int64
    sums = np.zeros(len(rows), kind)
    # Over an empty row `reduceat` would give the entry that follows it.
    hit = np.flatnonzero(np.diff(rows.indptr))
    if len(hit):
        sums[hit] = np.add.reduceat(values, rows.indptr[hit], dtype=kind)
    return sums


def event_rows(counts: Counts) -> EventRows:
    """The electrons of frames or padded events as compressed rows on the host.

    **Raises:** InputError for frames whose counts are not all whole, or negative.
    """
    if isinstance(counts, Frames):
        values = whole(counts)
        flat = np.flatnonzero(values)
        size, number = math.prod(values.shape[1:]), values.reshape(-1)[flat]
        per = np.bincount(flat // size, minlength=len(values))
        pixels = (flat % size).astype(np.int32)
    else:
        padded, n = np.asarray(counts.pixels), np.asarray(counts.multiplicity)
        per, pixels, number = np.count_nonzero(n, axis=1), padded[n > 0], n[n > 0]
    kind = np.min_scalar_type(int(number.max(initial=0)))
    multiplicity = None if number.max(initial=1) == 1 else number.astype(kind)
    return EventRows(np.append(0, np.cumsum(per)), pixels, counts.frame_shape, multiplicity)


def merge(rows: EventRows) -> EventRows:
    """The same electrons with each pixel once a frame, in ascending order, and a multiplicity.

    The multiplicity takes the smallest unsigned type that holds it.
    """
    indptr, pixels, number = merged(*_arrays(rows))
    return EventRows(indptr, pixels, rows.shape, number)


def to_frames(rows: EventRows, dtype: DTypeLike | None = None) -> Frames:
    """Every pixel of every frame, in numpy; by default in the smallest type that holds the counts.

    **Raises:** InputError if `dtype` does not hold them.
    """
    rows = merge(rows)
    number = np.asarray(rows.multiplicity)
    kind = np.dtype(number.dtype if dtype is None else dtype)
    if kind.kind in "iu" and number.max(initial=0) > np.iinfo(kind.str).max:
        raise InputError(
            f"`to_frames`: a count of {number.max()} does not fit into {kind}, but into "
            f"{number.dtype}."
        )
    return Frames(rows.dense(kind))


def to_events(rows: EventRows) -> Events:
    """The same electrons padded to the longest frame, on the device: what a loss compares with."""
    indptr, pixels, number = _arrays(rows)
    return events_from_csr(indptr, pixels, rows.shape, number)


def _arrays(
    rows: EventRows,
) -> tuple[
    Integer[np.ndarray, " frames_and_one"],
    Integer[np.ndarray, " events"],
    Integer[np.ndarray, " events"] | None,
]:
    """Limits, pixels and multiplicity in numpy."""
    number = None if rows.multiplicity is None else np.asarray(rows.multiplicity)
    return np.asarray(rows.indptr), np.asarray(rows.pixels), number


def on_host(rows: EventRows) -> EventRows:
    """The same rows in numpy."""
    return jax.tree.map(np.asarray, rows)


def on_device(rows: EventRows) -> EventRows:
    """The same rows in JAX.

    **Raises:** InputError for more electrons than the device's integers count.
    """
    widest = np.iinfo(jax.dtypes.canonicalize_dtype(int)).max
    if len(rows.pixels) > widest:
        raise InputError(
            f"`on_device`: {len(rows.pixels)} events are more than the device counts ({widest}); "
            "take fewer frames at a time, or enable 64-bit numbers in JAX."
        )
    return jax.tree.map(jnp.asarray, rows)

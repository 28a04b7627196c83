"""Electron events in stempy's HDF5, versions 1 to 3: what counted 4D Camera data come as.

`/electron_events/frames` is a list of lists of flat detector indices, one per entry;
`/electron_events/scan_positions` says where each entry was taken (versions 1 and 2, in any order,
version 2 with several frames a position); in version 3 the entries are in raster order, a fixed
number for each position. All frames of a position are summed here. The format has no calibration
(ours is in attributes that stempy passes over), and it is not sure which of its two frame sizes
counts the rows: a frame that is not square needs the hint `frame_shape`, unless we wrote the file.
"""

import contextlib
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import h5py
import numpy as np
from jaxtyping import Int, Integer

from ..counts import Events, InputError
from ..events import event_rows, EventRows, merge, rows_of
from .hdf5 import attribute, dataset_at, is_hdf5, listing, number, opened, written
from .source import kept_facts, Load, MOST_PIXELS, Positions, Source


LIST = h5py.vlen_dtype(np.uint32)
FRAMES = "electron_events/frames"
SCAN = "electron_events/scan_positions"
# Our own attribute of the frames: (rows, columns), which Nx and Ny do not tell apart.
SHAPE = "frame_shape"
# Our own group: what is known of the experiment, as attributes.
FACTS = "metadata/smpr3d_jax"
# An entry is the length of a list and where it is.
ENTRY_BYTES = 16
# Positions without an entry are frames that were dropped; but not as many as these for each entry.
SPARSEST = 1000
MOST_ENTRIES = 255
GAP = 64


def recognises(path: pathlib.Path) -> bool:
    """Whether the file is HDF5 with a group of electron events."""
    if not is_hdf5(path):
        return False
    with opened(path) as file:
        return "electron_events" in file


def open_source(
    path: pathlib.Path,
    dataset: str | None = None,
    scan_shape: tuple[int, int] | None = None,
    frame_shape: tuple[int, int] | None = None,
    drop_flyback: bool = False,
) -> Source:
    """Describe the events in a file; hints must agree with it.

    `drop_flyback` leaves out the last column of the scan, during which the beam flew back.

    **Raises:** InputError if a part is missing, entries and positions do not fit together, or the
    frame is not square and nobody says which way round it is.
    """
    if dataset is not None:
        raise InputError(
            f"{path}: electron events are always in {FRAMES!r}; leave out dataset={dataset!r}."
        )
    with opened(path) as file:
        frames, scan, dtype = _parts(path, file)
        shape = _scan_shape(path, scan, scan_shape)
        frame = _frame_shape(path, frames, frame_shape)
        owner = _owner(path, _version(path, file), len(frames), scan, shape)
        facts = kept_facts(dict(file[FACTS].attrs) if FACTS in file else {})
    if drop_flyback:
        shape, owner = _without_last_column(path, shape, owner)
    size = math.prod(shape)
    # The position after the last one is where dropped entries go.
    per_position = np.bincount(owner, minlength=size + 1)[:size]
    notes = []
    if np.any(per_position == 0):
        notes.append(f"{np.count_nonzero(per_position == 0)} scan positions have no entry")
    if per_position.max() > 1:
        notes.append(f"up to {per_position.max()} frames a position, which are summed")
    load = _loader(path, owner, per_position, frame)
    # While it is read, an entry is also an array of numpy.
    memory = (path.stat().st_size + 128 * len(owner)) / size
    return Source(
        path, "stempy", FRAMES, shape, frame, dtype, "events", load, facts, tuple(notes),
        frame_bytes=memory,
    )  # fmt: skip


def _parts(path: pathlib.Path, file: h5py.File) -> tuple[h5py.Dataset, h5py.Dataset, np.dtype]:
    """Entries, their positions, and the type of the indices."""
    frames, scan = dataset_at(file, FRAMES), dataset_at(file, SCAN)
    if frames is None or scan is None:
        raise InputError(
            f"{path}: {FRAMES!r} and {SCAN!r} are both needed; the file has {listing(file)}."
        )
    listed = h5py.check_vlen_dtype(frames.dtype)
    kind = np.dtype(listed or frames.dtype)
    if listed is None or kind.kind not in "iu" or frames.ndim != 1:
        raise InputError(
            f"{path}: {FRAMES!r} holds {frames.ndim}D {kind}, not a list of lists of detector "
            "indices; write it again with stempy."
        )
    for item, each in ((frames, ENTRY_BYTES), (scan, scan.dtype.itemsize)):
        entries = math.prod(item.shape)
        if item.chunks is None and entries * each > path.stat().st_size:
            raise InputError(
                f"{path}: dataset {item.name!r} has {entries} entries, more than there is room for "
                "in the file; it is damaged or cut short: copy it again."
            )
    return frames, scan, kind


def _version(path: pathlib.Path, file: h5py.File) -> int:
    version = number(file.attrs.get("version", 1))
    if version not in (1, 2, 3):
        raise InputError(
            f"{path}: is of version {attribute(file, 'version')}, but 1, 2 and 3 are known; "
            "write it again with stempy 3, or correct the attribute 'version'."
        )
    return int(version)


def _sizes(path: pathlib.Path, item: h5py.Dataset) -> tuple[int, int]:
    """The attributes (Ny, Nx)."""
    missing = [name for name in ("Nx", "Ny") if name not in item.attrs]
    if missing:
        raise InputError(
            f"{path}: dataset {item.name!r} lacks the attribute {missing[0]!r}; stempy writes the "
            "sizes Nx and Ny there: write the file again, or add them with h5py."
        )
    ny, nx = (_whole(path, item, name) for name in ("Ny", "Nx"))
    return ny, nx


def _whole(path: pathlib.Path, item: h5py.Dataset, name: str) -> int:
    value = number(attribute(item, name))
    if value is None or value < 1 or value != int(value):
        raise InputError(
            f"{path}: the attribute {name!r} of {item.name!r} is {attribute(item, name)}; a "
            "whole number above 0 is needed: correct it with h5py."
        )
    return int(value)


def _scan_shape(path, scan: h5py.Dataset, hint: tuple[int, int] | None) -> tuple[int, int]:
    shape = _sizes(path, scan)
    if hint is not None and hint[0] * hint[1] != shape[0] * shape[1]:
        raise InputError(
            f"{path}: the scan is {shape[0]} × {shape[1]}, but scan_shape={tuple(hint)} was asked "
            f"for; leave it out, or give one of {shape[0] * shape[1]} positions."
        )
    return shape if hint is None else (int(hint[0]), int(hint[1]))


def _frame_shape(path, frames: h5py.Dataset, hint: tuple[int, int] | None) -> tuple[int, int]:
    ny, nx = _sizes(path, frames)
    ours = np.atleast_1d(attribute(frames, SHAPE))
    if ours.shape == (2,) and ours.dtype.kind in "iu":
        shape = (int(ours[0]), int(ours[1]))
    elif hint is not None:
        shape = (int(hint[0]), int(hint[1]))
    elif ny == nx:
        shape = (ny, nx)
    else:
        raise InputError(
            f"{path}: the frame is {nx} by {ny} pixels (Nx, Ny), and stempy writes a frame that is "
            f"not square either way round; say with `frame_shape` whether it is ({ny}, {nx}) or "
            f"({nx}, {ny}) (rows, columns)."
        )
    if sorted(shape) != sorted((ny, nx)) or (hint is not None and tuple(hint) != shape):
        raise InputError(
            f"{path}: the frame is {nx} by {ny} pixels (Nx, Ny), but frame_shape={hint} was asked "
            "for; give it as the file has it, and crop after reading."
        )
    if math.prod(shape) > MOST_PIXELS:
        raise InputError(
            f"{path}: the frame is {nx} by {ny} pixels, more than any detector has; correct the "
            f"attributes Nx and Ny of {FRAMES!r}."
        )
    return shape


def _owner(
    path, version: int, entries: int, scan: h5py.Dataset, shape: tuple[int, int]
) -> Int[np.ndarray, " entries"]:
    """The flat scan position of each entry."""
    size = shape[0] * shape[1]
    if version >= 3:
        if entries == 0 or entries % size:
            raise InputError(
                f"{path}: dataset {FRAMES!r} has {entries} entries, which is not a multiple of the "
                f"{size} positions of the {shape[0]} × {shape[1]} scan; the file may be cut short, "
                f"or the sizes Nx, Ny of {SCAN!r} wrong."
            )
        return np.repeat(np.arange(size), entries // size)
    if size > SPARSEST * entries:
        raise InputError(
            f"{path}: the scan is {shape[0]} × {shape[1]}, but there are only {entries} entries; "
            f"correct the sizes Nx and Ny of {SCAN!r}."
        )
    owner = np.asarray(scan[()]).ravel().astype(np.int64)
    if len(owner) != entries or not entries:
        raise InputError(
            f"{path}: dataset {FRAMES!r} has {entries} entries but {SCAN!r} {len(owner)}; each "
            "entry needs one position. Write the file again with stempy."
        )
    wrong = np.flatnonzero((owner < 0) | (owner >= size))
    if len(wrong):
        raise InputError(
            f"{path}: dataset {SCAN!r} says position {owner[wrong[0]]} for entry {wrong[0]}, "
            f"outside the {shape[0]} × {shape[1]} scan (0 to {size - 1}); {len(wrong)} entries are "
            "outside. Correct Nx and Ny, or the positions."
        )
    return owner


def _without_last_column(
    path: pathlib.Path, shape: tuple[int, int], owner: Int[np.ndarray, " entries"]
) -> tuple[tuple[int, int], Int[np.ndarray, " entries"]]:
    """Scan shape and positions of the entries without the flyback, whose entries come last."""
    rows, columns = shape
    if columns < 2:
        raise InputError(
            f"{path}: the scan is {rows} × {columns}, without a column to drop; leave out "
            "`drop_flyback`."
        )
    row, column = np.divmod(owner, columns)
    kept = row * (columns - 1) + column
    return (rows, columns - 1), np.where(column < columns - 1, kept, rows * (columns - 1))


def _loader(
    path: pathlib.Path,
    owner: Int[np.ndarray, " entries"],
    per_position: Int[np.ndarray, " frames"],
    frame: tuple[int, int],
) -> Load:
    """How to load the events of some positions: only their entries are read."""
    order = np.argsort(owner, kind="stable")
    first = np.append(0, np.cumsum(per_position))

    def load(positions: Positions) -> EventRows:
        limits, entries = rows_of(first, positions)
        with opened(path) as file:
            events = _entries(dataset_at(file, FRAMES), order[entries])
        lengths = np.fromiter(map(len, events), np.int64, len(events))
        ends = np.append(0, np.cumsum(lengths))[limits]
        pixels = np.concatenate(events) if len(events) else np.zeros(0, np.uint32)
        _check_inside(path, pixels, positions, ends, frame)
        return EventRows(ends, pixels, frame)

    return load


def _entries(
    frames: Any, wanted: Int[np.ndarray, " entries"]
) -> list[Integer[np.ndarray, " events"]]:
    """Lists of indices, read in runs of consecutive entries, in the order asked for."""
    if len(wanted) and np.all(np.diff(wanted) == 1):
        return list(frames[wanted[0] : wanted[-1] + 1])
    distinct, back = np.unique(wanted, return_inverse=True)
    # Entries between two that are wanted are read along where asking twice would take longer.
    apart = np.flatnonzero(np.diff(distinct) > GAP)
    read: dict[int, np.ndarray] = {}
    for some in np.split(distinct, apart + 1):
        if len(some):
            entries = frames[some[0] : some[-1] + 1]
            read.update(zip(some.tolist(), entries[some - some[0]], strict=True))
    return [read[i] for i in distinct[back].tolist()]


def _check_inside(path, pixels, positions, ends, frame: tuple[int, int]) -> None:
    size = frame[0] * frame[1]
    if len(pixels) and (pixels.min() < 0 or pixels.max() >= size):
        outside = np.flatnonzero((pixels < 0) | (pixels >= size))
        where = positions[np.searchsorted(ends, outside[0], side="right") - 1]
        raise InputError(
            f"{path}: dataset {FRAMES!r} has the detector index {int(pixels[outside[0]])} at scan "
            f"position {where}, outside a frame of {frame[0]} × {frame[1]} pixels (0 to "
            f"{size - 1}); {len(outside)} events are outside. Check the sizes Nx and Ny."
        )


def write_stempy(
    path: str | os.PathLike,
    events: Events | EventRows,
    scan_shape: tuple[int, int],
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write the events of one scan as a version 3 file; `facts` are those of a `Source`.

    A pixel hit n times is written in n entries of its position, as stempy counts a pixel once an
    entry. The zero frequency belongs in the centre, n//2. The file appears under its name when it
    is complete.

    **Raises:** InputError unless there are as many frames as positions.
    """
    size = math.prod(scan_shape)
    if len(events) != size:
        raise InputError(
            f"{path}: a {scan_shape[0]} × {scan_shape[1]} scan needs {size} frames of events, got "
            f"{len(events)}."
        )
    rows = merge(event_rows(events) if isinstance(events, Events) else events)
    largest = int(np.asarray(rows.multiplicity).max(initial=1))
    with writing(path, scan_shape, rows.shape, largest, facts) as append:
        append(rows)


@contextlib.contextmanager
def writing(
    path: str | os.PathLike,
    scan_shape: tuple[int, int],
    frame_shape: tuple[int, int],
    largest: int,
    facts: Mapping[str, Any] | None = None,
) -> Iterator[Callable[[EventRows], None]]:
    """Write a scan in parts: gives a function that takes the rows of the next positions.

    `largest` is the largest count of all, which every position gets as many entries as.

    **Raises:** InputError for one that would make more of the file than of the electrons.
    """
    if largest > MOST_ENTRIES:
        raise InputError(
            f"{path}: a pixel was hit {largest} times in one frame, and stempy writes as many "
            f"lists for every frame; up to {MOST_ENTRIES} make sense. Write raw_csr, which keeps "
            "any number, or mask the pixel."
        )
    size, each = math.prod(scan_shape), max(1, largest)
    with written(path) as file:
        file.attrs["version"] = 3
        scan = file.create_dataset(SCAN, data=np.arange(size))
        scan.attrs.update(Nx=scan_shape[1], Ny=scan_shape[0])
        frames = file.create_dataset(FRAMES, (size * each,), LIST)
        # stempy takes Nx for the rows.
        frames.attrs.update(Nx=frame_shape[0], Ny=frame_shape[1])
        frames.attrs[SHAPE] = frame_shape
        file.create_group("metadata")
        if facts:
            file.create_group(FACTS).attrs.update(kept_facts(facts))
        done = 0

        def append(rows: EventRows) -> None:
            nonlocal done
            start, done = done, done + len(rows)
            # Plain assignment would take lists of one length for a table.
            frames.write_direct(_lists(rows, each), dest_sel=np.s_[start * each : done * each])

        yield append


def _lists(rows: EventRows, each: int) -> np.ndarray:
    """An array of lists of indices, `each` for a frame; every list has a pixel at most once."""
    merged = merge(rows)
    n = np.asarray(merged.multiplicity)
    lists = np.empty((len(rows), each), object)
    for j in range(each):
        kept = np.append(0, np.cumsum(n > j))[merged.indptr]
        pixels = np.asarray(merged.pixels[n > j]).astype(np.uint32)
        lists[:, j] = np.fromiter(np.split(pixels, kept[1:-1]), object, len(rows))
    return lists.ravel().astype(LIST)

"""Electron events in stempy's HDF5, versions 1 to 3: what counted 4D Camera data come as.

`/electron_events/frames` is a list of lists of flat detector indices, one per entry;
`/electron_events/scan_positions` says where each entry was taken (versions 1 and 2, in any order,
version 2 with several frames a position); in version 3 the entries are in raster order, a fixed
number for each position. All frames of a position are summed here. The format has no calibration,
and it is not sure which of its two frame sizes counts the rows: a frame that is not square needs
the hint `frame_shape`, unless we wrote the file.
"""

import os
import pathlib
from typing import Any

import h5py
import numpy as np
from jaxtyping import Int

from ..counts import Events, InputError
from ..events import EventRows
from .hdf5 import attribute, dataset_at, is_hdf5, listing, opened, written
from .source import Load, Positions, Source


FRAMES = "electron_events/frames"
SCAN = "electron_events/scan_positions"
# Our own attribute of the frames: (rows, columns), which Nx and Ny do not tell apart.
SHAPE = "frame_shape"


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
) -> Source:
    """Describe the events in a file; hints must agree with it.

    **Raises:** InputError if a part is missing, entries and positions do not fit together, or the
    frame is not square and nobody says which way round it is.
    """
    if dataset is not None:
        raise InputError(
            f"{path}: electron events are always in {FRAMES!r}; leave out dataset={dataset!r}."
        )
    with opened(path) as file:
        version = int(attribute(file, "version") or 1)
        frames, scan = dataset_at(file, FRAMES), dataset_at(file, SCAN)
        if frames is None or scan is None:
            raise InputError(
                f"{path}: {FRAMES!r} and {SCAN!r} are both needed; the file has {listing(file)}."
            )
        listed = h5py.check_vlen_dtype(frames.dtype)
        if listed is None:
            raise InputError(
                f"{path}: {FRAMES!r} holds {frames.dtype}, not lists of detector indices; write it "
                "again with stempy."
            )
        shape = _scan_shape(path, scan, scan_shape)
        frame = _frame_shape(path, frames, frame_shape)
        owner = _owner(path, version, len(frames), scan, shape)
        dtype = np.dtype(listed)
    per_position = np.bincount(owner, minlength=shape[0] * shape[1])
    notes = []
    if np.any(per_position == 0):
        notes.append(f"{np.count_nonzero(per_position == 0)} scan positions have no entry")
    if per_position.max() > 1:
        notes.append(f"up to {per_position.max()} frames a position, which are summed")
    load = _loader(path, owner, shape[0] * shape[1], frame)
    return Source(path, "stempy", FRAMES, shape, frame, dtype, "events", load, notes=tuple(notes))


def _sizes(path: pathlib.Path, item: h5py.Dataset) -> tuple[int, int]:
    """The attributes (Ny, Nx)."""
    missing = [name for name in ("Nx", "Ny") if name not in item.attrs]
    if missing:
        raise InputError(
            f"{path}: dataset {item.name!r} lacks the attribute {missing[0]!r}; stempy writes the "
            "sizes Nx and Ny there: write the file again, or add them with h5py."
        )
    return int(attribute(item, "Ny")), int(attribute(item, "Nx"))


def _scan_shape(path, scan: h5py.Dataset, hint: tuple[int, int] | None) -> tuple[int, int]:
    shape = _sizes(path, scan)
    if hint is not None and hint[0] * hint[1] != shape[0] * shape[1]:
        raise InputError(
            f"{path}: the scan is {shape[0]} × {shape[1]}, but scan_shape={tuple(hint)} was asked "
            f"for; leave it out, or give one of {shape[0] * shape[1]} positions."
        )
    if min(shape) < 1:
        raise InputError(f"{path}: the scan is {shape[0]} × {shape[1]}: there is no frame in it.")
    return shape if hint is None else (int(hint[0]), int(hint[1]))


def _frame_shape(path, frames: h5py.Dataset, hint: tuple[int, int] | None) -> tuple[int, int]:
    ny, nx = _sizes(path, frames)
    ours = attribute(frames, SHAPE)
    if ours is not None:
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


def _loader(
    path: pathlib.Path, owner: Int[np.ndarray, " entries"], size: int, frame: tuple[int, int]
) -> Load:
    """How to load the events of some positions: only their entries are read."""
    order = np.argsort(owner, kind="stable")
    first = np.searchsorted(owner[order], np.arange(size + 1))

    def load(positions: Positions):
        start = first[positions]
        per_position = first[positions + 1] - start
        shift = np.repeat(start - (np.cumsum(per_position) - per_position), per_position)
        entries = order[np.arange(per_position.sum()) + shift]
        with opened(path) as file:
            events = _entries(dataset_at(file, FRAMES), entries)
        lengths = np.fromiter(map(len, events), np.int64, len(events))
        ends = np.append(0, np.cumsum(lengths))[np.append(0, np.cumsum(per_position))]
        pixels = np.concatenate([np.zeros(0, np.int64), *events])
        _check_inside(path, pixels, positions, ends, frame)
        return EventRows(ends, pixels, frame)

    return load


def _entries(frames: Any, wanted: Int[np.ndarray, " entries"]) -> list[np.ndarray]:
    """Lists of indices, read in runs of consecutive entries, in the order asked for."""
    distinct, back = np.unique(wanted, return_inverse=True)
    runs = np.split(distinct, np.flatnonzero(np.diff(distinct) != 1) + 1)
    read = [events for run in runs if len(run) for events in frames[run[0] : run[-1] + 1]]
    return [read[i] for i in back]


def _check_inside(path, pixels, positions, ends, frame: tuple[int, int]) -> None:
    size = frame[0] * frame[1]
    outside = np.flatnonzero((pixels < 0) | (pixels >= size))
    if len(outside):
        where = positions[np.searchsorted(ends, outside[0], side="right") - 1]
        raise InputError(
            f"{path}: dataset {FRAMES!r} has the detector index {int(pixels[outside[0]])} at scan "
            f"position {where}, outside a frame of {frame[0]} × {frame[1]} pixels (0 to "
            f"{size - 1}); {len(outside)} events are outside. Check the sizes Nx and Ny."
        )


def write_stempy(path: str | os.PathLike, events: Events, scan_shape: tuple[int, int]) -> None:
    """Write the events of one scan as a version 3 file.

    A pixel hit n times is written in n entries of its position, as stempy counts a pixel once an
    entry. The zero frequency belongs in the centre, n//2. The file appears under its name when it
    is complete.

    **Raises:** InputError unless there are as many frames as positions.
    """
    size = scan_shape[0] * scan_shape[1]
    if len(events) != size:
        raise InputError(
            f"{path}: a {scan_shape[0]} × {scan_shape[1]} scan needs {size} frames of events, got "
            f"{len(events)}."
        )
    n, pixels = np.asarray(events.multiplicity), np.asarray(events.pixels, np.uint32)
    per_position = max(1, int(n.max(initial=0)))
    entries = np.empty(size * per_position, object)
    for i in range(size):
        for j in range(per_position):
            entries[i * per_position + j] = pixels[i, n[i] > j]
    with written(path) as file:
        file.attrs["version"] = 3
        scan = file.create_dataset(SCAN, data=np.arange(size))
        scan.attrs.update(Nx=scan_shape[1], Ny=scan_shape[0])
        frames = file.create_dataset(FRAMES, (len(entries),), h5py.vlen_dtype(np.uint32))
        frames[...] = entries
        # stempy takes Nx for the rows.
        frames.attrs.update(Nx=events.shape[0], Ny=events.shape[1])
        frames.attrs[SHAPE] = events.shape
        file.create_group("metadata")

"""Master files of DECTRIS detectors (ARINA, ELA, QUADRO, EIGER), as their FileWriter leaves them.

Two layouts. The older: `/entry/data` links to `data_000001`, `data_000002`, ... in files beside the
master, each (frames, ky, kx). The newer, since 2024: one virtual dataset `/entry/data/data`
(frames, channels, ky, kx), a channel for each threshold; the hint `channel` names one, otherwise
the file's default slice or its only channel is taken. Neither knows the scan: where a row was
triggered, `ntrigger` × `nimages` is its shape, otherwise `scan_shape` is needed. A pixel whose mask
is not zero has a code instead of counts, and is left out. The detector's distance is that of a
beamline, so no scattering angles follow.
"""

import pathlib
import re
from typing import Any, NamedTuple

import h5py
import numpy as np
from jaxtyping import Bool

from ..counts import InputError
from .hdf5 import (
    attribute,
    dataset_at,
    frames_at,
    is_hdf5,
    listing,
    number,
    opened,
    storage_notes,
    text,
)
from .source import layout, Load, numeric, Positions, Source, Tiles
from .units import ENERGIES, sampling, scaled, SECONDS


NUMBERED = re.compile(r"data_\d+")
DETECTOR = "entry/instrument/detector"
SPECIFIC = f"{DETECTOR}/detectorSpecific"


class Part(NamedTuple):
    """A stack of frames in a file, or one channel of it."""

    path: pathlib.Path
    dataset: str
    shape: tuple[int, ...]
    dtype: np.dtype
    channel: int | None = None


class Channel:
    """One channel of (frames, channels, ky, kx), as a stack that is read when it is sliced."""

    ndim, chunks = 3, None

    def __init__(self, item: Any, channel: int):
        self.item, self.channel = item, channel
        self.shape, self.dtype = (item.shape[0], *item.shape[2:]), item.dtype

    def __getitem__(self, frames: slice) -> np.ndarray:
        return self.item[frames, self.channel]


def recognises(path: pathlib.Path) -> bool:
    """Whether the file is HDF5 with numbered stacks of frames, or frames in channels."""
    if not is_hdf5(path):
        return False
    with opened(path) as file:
        data = _group(file, "entry/data")
        return bool(_numbered(file)) or (data is not None and "channel" in _axes(data))


def open_source(
    path: pathlib.Path,
    dataset: str | None = None,
    scan_shape: tuple[int, int] | None = None,
    frame_shape: tuple[int, int] | None = None,
    channel: str | None = None,
) -> Source:
    """Describe the frames behind a master file; `channel` is one of its thresholds.

    **Raises:** InputError if a data file is missing or different, there is no such channel, or the
    scan shape is not known.
    """
    if dataset is not None:
        raise InputError(
            f"{path}: the frames of a master file are found through its links; leave out "
            f"dataset={dataset!r}, or read one of the data files."
        )
    with opened(path) as file:
        name, parts, notes = _parts(path, file, channel)
        frames, first = sum(part.shape[0] for part in parts), parts[0]
        triggered, said = _triggered(file, frames)
        notes += said
        label = f"{path}: dataset 'entry/data'"
        dtype = numeric(label, first.dtype)
        scan, frame = layout(
            label, (frames, *first.shape[1:]), scan_shape or triggered, frame_shape
        )
        mask, said = _mask(file, name, frame)
        facts = _facts(file, frame)
        notes += (*said, *_overload(file))
    step, said = _companion(path)
    load = _loader(parts)
    notes += said
    facts |= step
    return Source(
        path, "dectris", "entry/data", scan, frame, dtype, "dense", load, facts, notes, mask,
        together=Tiles(1, 1, frames),
    )  # fmt: skip


def _group(file: h5py.File, name: str) -> h5py.Group | None:
    item = file.get(name)
    return item if isinstance(item, h5py.Group) else None


def _axes(data: h5py.Group) -> list[str]:
    """The names of the axes, as NeXus lists them."""
    names = attribute(data, "axes")
    return [text(name) or "" for name in np.atleast_1d(names)] if names is not None else []


def _numbered(file: h5py.File) -> list[str]:
    """Names of the links to stacks of frames, in order; what they lead to may be missing."""
    for where in ("entry/data", "entry"):
        group = _group(file, where)
        names = [str(name) for name in group] if group is not None else []
        found = [name for name in names if NUMBERED.fullmatch(name)]
        if found:
            return [f"{where}/{name}" for name in sorted(found, key=lambda n: int(n[5:]))]
    return []


def _parts(
    path: pathlib.Path, file: h5py.File, channel: str | None
) -> tuple[str | None, list[Part], tuple[str, ...]]:
    """The channel read, its stacks in the order of the scan, and notes about their storage."""
    names = _numbered(file)
    if not names:
        return _channel(path, file, channel)
    if channel is not None:
        raise InputError(f"{path}: has no channels; leave out channel={channel!r}.")
    parts, notes = [], ()
    for name in names:
        part, said = _linked(path, file, name)
        parts.append(part)
        notes += said
        first = parts[0]
        if len(part.shape) != 3 or (part.shape[1:], part.dtype) != (first.shape[1:], first.dtype):
            raise InputError(
                f"{part.path}: dataset {part.dataset!r} has shape {part.shape} of {part.dtype}, but"
                f" the stack before has {first.shape} of {first.dtype}; the parts of a scan are "
                "(frames, ky, kx) of one kind. Look whether the files belong together."
            )
    return None, parts, notes


def _linked(path: pathlib.Path, file: h5py.File, name: str) -> tuple[Part, tuple[str, ...]]:
    """The stack behind a link, in this file or in another."""
    link = file.get(name, getlink=True)
    if not isinstance(link, h5py.ExternalLink):
        return _described(path, file, name)
    # Data are moved together with their master, so an absolute name may be out of date.
    places = path.parent / link.filename, path.parent / pathlib.PureWindowsPath(link.filename).name
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise InputError(
            f"{path}: its frames {name!r} are in {link.filename}, which is missing; copy the file "
            f"to {path.parent}. If the acquisition was stopped before it was written, read the "
            "data files that exist one by one."
        )
    with opened(found) as other:
        return _described(found, other, link.path)


def _described(path: pathlib.Path, file: h5py.File, name: str) -> tuple[Part, tuple[str, ...]]:
    item = dataset_at(file, name)
    if item is None:
        raise InputError(f"{path}: there is no dataset {name!r}; the file has {listing(file)}.")
    return Part(path, name, item.shape, item.dtype), storage_notes(path, item)


def _channel(
    path: pathlib.Path, file: h5py.File, wanted: str | None
) -> tuple[str, list[Part], tuple[str, ...]]:
    """The one channel of the newer layout that is asked for, or the file's choice."""
    item = dataset_at(file, "entry/data/data")
    data, names = _group(file, "entry/data"), dataset_at(file, "entry/data/channel")
    if item is None or data is None or item.ndim != 4:
        raise InputError(
            f"{path}: 'entry/data/data' must have the axes (frames, channels, ky, kx); the file has"
            f" {listing(file)}. Name a dataset and format='arrays' to read something else."
        )
    channels = [f"channel {i}" for i in range(item.shape[1])]
    if names is not None and names.shape == (len(channels),):
        channels = [text(name) or "" for name in names[()]]
    default = [text(part) for part in np.atleast_1d(attribute(data, "default_slice"))]
    if wanted is None:
        chosen = [name for name in channels if len(channels) == 1 or name in default]
    else:
        chosen = [name for name in channels if name == wanted]
    if len(chosen) != 1:
        raise InputError(
            f"{path}: has the channels {', '.join(channels)}; name one of them with `channel`"
            + ("." if wanted is None else f", not {wanted!r}.")
        )
    shape, number_of_it = (item.shape[0], *item.shape[2:]), channels.index(chosen[0])
    part = Part(path, "entry/data/data", shape, item.dtype, number_of_it)
    notes = storage_notes(path, item)
    if len(channels) > 1:
        notes += (f"{chosen[0]} is read, of the channels {', '.join(channels)}",)
    return chosen[0], [part], notes


def _triggered(file: h5py.File, frames: int) -> tuple[tuple[int, int] | None, tuple[str, ...]]:
    """The scan shape, if each row was triggered, and what does not fit."""
    counts = [number(file.get(f"{SPECIFIC}/{name}")) for name in ("ntrigger", "nimages")]
    rows, columns = (int(n) if n is not None else 0 for n in counts)
    if rows * columns == frames and min(rows, columns) > 1:
        return (rows, columns), (f"a row of the scan is a trigger: {rows} of {columns} images",)
    if rows * columns in (0, frames):
        return None, ()
    announced = f"{rows} triggers of {columns} images were planned, but there are {frames} images"
    return None, (announced,)


def _mask(
    file: h5py.File, channel: str | None, frame: tuple[int, int]
) -> tuple[Bool[np.ndarray, "ky kx"] | None, tuple[str, ...]]:
    """Which pixels can be used: those whose mask is zero."""
    own = [f"{DETECTOR}/{channel}_channel/pixel_mask"] if channel else []
    for name in (*own, f"{SPECIFIC}/pixel_mask", f"{DETECTOR}/pixel_mask"):
        item = dataset_at(file, name)
        if item is None:
            continue
        if item.shape != frame or item.dtype.kind not in "iub":
            return None, (f"the pixel mask {item.shape} does not fit the frames and is not used",)
        good = item[()] == 0
        bad = int(np.count_nonzero(~good))
        return (good, (f"{bad} pixels are masked and read as 0",)) if bad else (None, ())
    return None, ()


def _overload(file: h5py.File) -> tuple[str, ...]:
    for name in (f"{DETECTOR}/saturation_value", f"{SPECIFIC}/saturation_value"):
        value = number(file.get(name))
        if value is not None and value > 0:
            return (f"counts above {value:g} are overloads; compare them with the largest count",)
    return ()


def _facts(file: h5py.File, frame: tuple[int, int]) -> dict[str, Any]:
    """Energy, exposure and centre, where they were configured."""
    facts: dict[str, Any] = {}
    for fact, names, known, usual in (
        ("energy_ev", ("entry/instrument/beam/incident_energy",), ENERGIES, "eV"),
        ("exposure_s", (f"{DETECTOR}/count_time", f"{DETECTOR}/frame_time"), SECONDS, "s"),
    ):
        for name in names:
            item = dataset_at(file, name)
            unit = None if item is None else text(attribute(item, "units"))
            value = scaled(number(item), unit, known, usual)
            if value is not None:
                facts.setdefault(fact, value)
    center = [number(file.get(f"{DETECTOR}/beam_center_{axis}")) for axis in "yx"]
    if all(c is not None and 0 < c < n - 1 for c, n in zip(center, frame, strict=True)):
        facts["center"] = tuple(center)
    return facts


def _companion(path: pathlib.Path) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The scan step from the file of the scan beside the master: its pixel size is in nm."""
    other = path.with_name(path.name.replace("_master", ""))
    if other == path or not other.is_file() or not is_hdf5(other):
        return {}, ()
    try:
        with opened(other) as file:
            said = _group(file, "STEM Metadata")
            step = sampling(
                "R", None if said is None else number(attribute(said, "Pixel Size")), "nm"
            )
    except InputError as error:
        return {}, (str(error),)
    return ({step[0]: (step[1], step[1])} if step else {}), ()


def _loader(parts: list[Part]) -> Load:
    """How to load frames across the files; each is open only meanwhile."""
    starts = np.cumsum([0, *(part.shape[0] for part in parts)])

    def load(positions: Positions):
        owner = np.searchsorted(starts, positions, side="right") - 1
        read = []
        for i in np.unique(owner):
            part, mine = parts[i], positions[owner == i] - starts[i]
            with opened(part.path) as file:
                item: Any = dataset_at(file, part.dataset)
                if item is None or (item.shape[0], *item.shape[-2:]) != part.shape:
                    raise InputError(
                        f"{part.path}: dataset {part.dataset!r} has changed since it was described;"
                        " read it again."
                    )
                read.append(
                    frames_at(item if part.channel is None else Channel(item, part.channel), mine)
                )
        if len(read) == 1:
            return read[0]
        first = parts[0]
        frames = np.empty((len(positions), *first.shape[1:]), first.dtype.newbyteorder("="))
        for i, found in zip(np.unique(owner), read, strict=True):
            frames[owner == i] = found
        return frames

    return load

"""Dense frames in plain arrays: .npy, .npz and HDF5, of which only the frames asked for are read.

An array has four axes (scan_y, scan_x, ky, kx), or three and a `scan_shape` from the user. It is
the only such array in the file, or the one that `dataset` names. The formats say nothing else. An
array that .npz keeps compressed is unpacked when it is opened.
"""

import functools
import math
import pathlib
import zipfile
from typing import Any, NamedTuple

import h5py
import numpy as np
from jaxtyping import Shaped

from ..counts import InputError
from .binary import Planes, Records
from .damage import raised_in
from .hdf5 import (
    arrays as arrays_of,
    dataset_at,
    frames_of,
    is_hdf5,
    listing,
    opened,
    storage_notes,
    together,
)
from .source import gather, kept_facts, layout, Load, numeric, Positions, Source


# What deflation saves at most, https://zlib.net/zlib_tech.html.
DEFLATED = 1032


class _Stored(NamedTuple):
    """An array of numpy: the byte of the file at which it begins, or itself if compressed."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool
    start: int | None
    values: np.ndarray | None = None


def recognises(path: pathlib.Path) -> bool:
    """Whether the file is .npy, .npz or HDF5."""
    return _is_npy(path) or zipfile.is_zipfile(path) or is_hdf5(path)


def _is_npy(path: pathlib.Path) -> bool:
    with open(path, "rb") as file:
        return file.read(6) == b"\x93NUMPY"


def open_source(
    path: pathlib.Path,
    dataset: str | None = None,
    scan_shape: tuple[int, int] | None = None,
    frame_shape: tuple[int, int] | None = None,
) -> Source:
    """Describe the array of frames in a file.

    **Raises:** InputError if there is none, or more than one and no `dataset`, or its shape or type
    is not that of counts.
    """
    if is_hdf5(path):
        return _open_hdf5(path, dataset, scan_shape, frame_shape)
    try:
        stored = _npy(path) if _is_npy(path) else _npz(path, dataset)
    except Exception as error:
        known = isinstance(error, ValueError | OSError | EOFError | zipfile.BadZipFile)
        theirs = any(raised_in(name, error) for name in ("numpy", "zipfile", "zipfile.py"))
        if isinstance(error, InputError) or not (known or theirs):
            raise
        raise InputError(
            f"{path}: cannot be read as a numpy file ({error}). The file may be cut short, or hold "
            "Python objects: save a plain array of counts again."
        ) from error
    label = f"{path}: array {stored.name!r}"
    dtype = numeric(label, stored.dtype)
    scan, frame = layout(label, stored.shape, scan_shape, frame_shape)
    load = _loader(path, stored)
    at_once = math.prod(scan) if stored.fortran and stored.values is None else 1
    return Source(path, "numpy", stored.name, scan, frame, dtype, "dense", load, together=at_once)


def _open_hdf5(path, dataset, scan_shape, frame_shape) -> Source:
    with opened(path) as file:
        name = dataset or _only_array(path, file, scan_shape)
        item = dataset_at(file, name)
        if item is None:
            raise InputError(f"{path}: there is no dataset {name!r}; the file has {listing(file)}.")
        label = f"{path}: dataset {name!r}"
        dtype = numeric(label, item.dtype)
        scan, frame = layout(label, item.shape, scan_shape, frame_shape)
        facts = kept_facts(item.attrs)
        notes, stored = storage_notes(path, item), together(item)
    load = frames_of(path, name)
    return Source(
        path, "hdf5", name, scan, frame, dtype, "dense", load, facts, notes, together=stored
    )


def _only_array(path: pathlib.Path, file: h5py.File, scan_shape) -> str:
    """Name of the only 4D dataset, or with a scan shape of the only 3D one."""
    for axes in (4, 3) if scan_shape is not None else (4,):
        found = [name for name, item in arrays_of(file).items() if item.ndim == axes]
        if len(found) == 1:
            return found[0]
        if found:
            raise InputError(
                f"{path}: has {len(found)} {axes}D datasets: {', '.join(found)}; say which with "
                "`dataset`."
            )
    raise InputError(
        f"{path}: has no 4D dataset (scan_y, scan_x, ky, kx); it has {listing(file)}. Name a stack "
        "of frames with `dataset` and give its `scan_shape`."
    )


def _npy(path: pathlib.Path) -> _Stored:
    with open(path, "rb") as file:
        shape, fortran, dtype = _header(file)
        stored = _Stored(path.name, shape, dtype, fortran, file.tell())
    return _checked(stored, path.stat().st_size)


def _npz(path: pathlib.Path, dataset: str | None) -> _Stored:
    """The chosen member of an archive; unpacked if it is compressed."""
    with zipfile.ZipFile(path) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        shapes = {name: _member_header(archive, info)[0] for name, info in members.items()}
        frames = [name for name, shape in shapes.items() if len(shape) == 4] or [*members]
        name = frames[0] if dataset is None and len(frames) == 1 else dataset
        if name is None or name not in shapes:
            wrong = f"no array {name!r}" if name else f"{len(frames)} arrays to choose from"
            raise InputError(f"{path}: has {wrong}; it has {shapes}. Name one with `dataset`.")
        info = members[name]
        if info.compress_type == zipfile.ZIP_STORED:
            return _stored_member(path, name, info)
        shape, fortran, dtype = _member_header(archive, info)
        size = min(info.file_size, info.compress_size * DEFLATED)
        stored = _checked(_Stored(name, shape, dtype, fortran, 0), size)
        with archive.open(info) as file:
            return stored._replace(values=np.lib.format.read_array(file, allow_pickle=False))


def _stored_member(path: pathlib.Path, name: str, info: zipfile.ZipInfo) -> _Stored:
    """A member that the archive stores as it is."""
    with open(path, "rb") as file:
        # The archive's local header: 30 bytes, then a name and an extra field of given lengths.
        file.seek(info.header_offset + 26)
        lengths = np.frombuffer(file.read(4), "<u2")
        file.seek(info.header_offset + 30 + int(lengths.sum()))
        shape, fortran, dtype = _header(file)
        stored = _Stored(name, shape, dtype, fortran, file.tell())
    return _checked(stored, path.stat().st_size)


def _member_header(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Any:
    with archive.open(info) as file:
        return _header(file)


def _header(file) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and type of a .npy stream, which is left at its first number."""
    version = np.lib.format.read_magic(file)
    if version not in ((1, 0), (2, 0), (3, 0)):
        raise ValueError(f"version {version} of the format is not known")
    read = np.lib.format.read_array_header_1_0
    return (read if version == (1, 0) else np.lib.format.read_array_header_2_0)(file)


def _checked(stored: _Stored, size: int) -> _Stored:
    """`stored`, if it holds numbers that end within the `size` bytes there are."""
    if stored.dtype.hasobject:
        raise ValueError(f"{stored.name} holds {stored.dtype}")
    length = math.prod(stored.shape) * stored.dtype.itemsize
    if min(stored.shape, default=1) < 0 or (stored.start or 0) + length > size:
        raise ValueError(f"{stored.name} has shape {stored.shape} {stored.dtype}, in {size} bytes")
    return stored


def _loader(path: pathlib.Path, stored: _Stored) -> Load:
    """How to load frames at flat positions of the scan."""
    if stored.start is None or stored.values is not None:
        return functools.partial(gather, stored.values)
    frame, dtype = (stored.shape[-2], stored.shape[-1]), stored.dtype
    if not stored.fortran:
        length = math.prod(frame) * dtype.itemsize
        return Records(path, stored.start, length, frame, dtype)
    scan = stored.shape[:-2]
    planes = Planes(path, stored.start, (frame[1], frame[0]), math.prod(scan), dtype)

    def load(positions: Positions) -> Shaped[np.ndarray, "frames ky kx"]:
        # Every index runs the other way: the slow scan is the fastest in the file.
        numbers = np.ravel_multi_index(np.unravel_index(positions, scan), scan, order="F")
        return np.ascontiguousarray(planes(numbers).swapaxes(1, 2))

    return load

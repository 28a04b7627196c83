"""Dense frames in plain arrays: .npy and .npz, mapped into memory where possible, and HDF5.

An array has four axes (scan_y, scan_x, ky, kx), or three and a `scan_shape` from the user. It is
the only such array in the file, or the one that `dataset` names. The formats say nothing else.
"""

import functools
import pathlib
import zipfile

import h5py
import numpy as np

from ..counts import InputError
from .hdf5 import (
    arrays as arrays_of,
    dataset_at,
    frames_of,
    is_hdf5,
    listing,
    opened,
    storage_notes,
)
from .source import gather, layout, numeric, Source


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
    mapped = _map_npy if _is_npy(path) else functools.partial(_map_npz, dataset=dataset)
    try:
        name, array = mapped(path)
    except (ValueError, OSError, zipfile.BadZipFile, EOFError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{path}: cannot be read as a numpy file ({error}). The file may be cut short, or hold "
            "Python objects: save a plain array of counts again."
        ) from error
    label = f"{path}: array {name!r}"
    dtype = numeric(label, array.dtype)
    scan, frame = layout(label, array.shape, scan_shape, frame_shape)
    load = functools.partial(gather, array)
    return Source(path, "numpy", name, scan, frame, dtype, "dense", load)


def _open_hdf5(path, dataset, scan_shape, frame_shape) -> Source:
    with opened(path) as file:
        name = dataset or _only_array(path, file, scan_shape)
        item = dataset_at(file, name)
        if item is None:
            raise InputError(f"{path}: there is no dataset {name!r}; the file has {listing(file)}.")
        label = f"{path}: dataset {name!r}"
        dtype = numeric(label, item.dtype)
        scan, frame = layout(label, item.shape, scan_shape, frame_shape)
        notes = storage_notes(path, item)
    load = frames_of(path, name)
    return Source(path, "hdf5", name, scan, frame, dtype, "dense", load, notes=notes)


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


def _map_npy(path: pathlib.Path) -> tuple[str, np.ndarray]:
    return path.name, np.load(path, mmap_mode="r")


def _map_npz(path: pathlib.Path, dataset: str | None) -> tuple[str, np.ndarray]:
    """The chosen member of an archive: mapped if it was stored, unpacked if it was compressed."""
    with np.load(path) as archive:
        shapes = {name: _npz_shape(path, name) for name in archive.files}
        frames = [name for name, shape in shapes.items() if len(shape) == 4] or archive.files
        name = frames[0] if dataset is None and len(frames) == 1 else dataset
        if name is None or name not in shapes:
            wrong = f"no array {name!r}" if name else f"{len(frames)} arrays to choose from"
            raise InputError(f"{path}: has {wrong}; it has {shapes}. Name one with `dataset`.")
        mapped = _mapped_member(path, name)
        return name, archive[name] if mapped is None else mapped


def _npz_shape(path: pathlib.Path, name: str) -> tuple[int, ...]:
    with zipfile.ZipFile(path) as archive, archive.open(_member(archive, name)) as file:
        return _header(file)[0]


def _member(archive: zipfile.ZipFile, name: str) -> str:
    return f"{name}.npy" if f"{name}.npy" in archive.namelist() else name


def _header(file) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, Fortran order and type of a .npy stream, which is left at its first number."""
    version = np.lib.format.read_magic(file)
    read = np.lib.format.read_array_header_1_0
    return (read if version == (1, 0) else np.lib.format.read_array_header_2_0)(file)


def _mapped_member(path: pathlib.Path, name: str) -> np.ndarray | None:
    """A member that the archive stores as it is, mapped into memory; None if it is compressed."""
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo(_member(archive, name))
    if info.compress_type != zipfile.ZIP_STORED:
        return None
    with open(path, "rb") as file:
        # The archive's local header: 30 bytes, then a name and an extra field of given lengths.
        file.seek(info.header_offset + 26)
        lengths = np.frombuffer(file.read(4), "<u2")
        file.seek(info.header_offset + 30 + int(lengths.sum()))
        shape, fortran, dtype = _header(file)
        if dtype.hasobject:
            return None
        return np.memmap(path, dtype, "r", file.tell(), shape, "F" if fortran else "C")

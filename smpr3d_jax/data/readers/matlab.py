"""MATLAB files of version 7.3, which are HDF5 with every array's axes reversed.

MATLAB stores the first index fastest and hands HDF5 the sizes in reversed order. Here an array is
named as MATLAB shows it: `order` says what its indices are, by default "ky kx y x", and "ky kx
frames" with three of them (the `dp` of fold_slice); frames are numbered as they are stored. A file
says nothing about that order, so a note repeats the one that was taken. Older versions (-v7, -v6)
are another format, which MATLAB converts.
"""

import pathlib

import h5py

from ..counts import InputError
from .hdf5 import attribute, frames_of, opened, storage_notes, text, together
from .source import layout, numeric, Source
from .turned import places, Turned


SIGNS = b"MATLAB 7.3 MAT-file", b"MATLAB 5.0 MAT-file"
ORDERS = {4: "ky kx y x", 3: "ky kx frames"}


def recognises(path: pathlib.Path) -> bool:
    """Whether the file says that it is a MATLAB file, of version 7.3 or before."""
    with open(path, "rb") as file:
        return file.read(len(SIGNS[0])) in SIGNS


def open_source(
    path: pathlib.Path,
    dataset: str | None = None,
    scan_shape: tuple[int, int] | None = None,
    frame_shape: tuple[int, int] | None = None,
    order: str | None = None,
) -> Source:
    """Describe an array of a MATLAB file, whose indices in MATLAB are `order`.

    **Raises:** InputError for a file before version 7.3, if there is no such array of numbers or
    more than one and no `dataset`, or the order does not name its indices.
    """
    with open(path, "rb") as file:
        if file.read(len(SIGNS[1])) == SIGNS[1]:
            raise InputError(
                f"{path}: is a MATLAB file before version 7.3; save it in MATLAB with save(file, "
                "name, '-v7.3'), or in Python with scipy.io.loadmat and numpy.save."
            )
    with opened(path) as file:
        name, item = _chosen(path, file, dataset, 3 if scan_shape is not None else 4)
        label = f"{path}: variable {name!r}"
        dtype = numeric(label, item.dtype)
        order = order or ORDERS.get(item.ndim, "")
        reversed_axes = places(label, item.shape[::-1], order)
        axes = tuple(item.ndim - 1 - axis for axis in reversed_axes)
        scan, frame = layout(label, Turned(item, axes).shape, scan_shape, frame_shape)
        notes = (
            f"the size {item.shape[::-1]} in MATLAB is taken as ({order}); say `order` if not",
            *storage_notes(path, item),
        )
        stored = together(item, axes)
    load = frames_of(path, name, axes)
    return Source(
        path, "matlab", name, scan, frame, dtype, "dense", load, notes=notes, together=stored
    )


def _variables(file: h5py.File) -> dict[str, h5py.Dataset]:
    """Every array of numbers, by its name: not the text, and not what cells refer to."""
    found: dict[str, h5py.Dataset] = {}

    def visit(name: str, item: object) -> None:
        if not isinstance(item, h5py.Dataset) or name.startswith("#"):
            return
        kind = text(attribute(item, "MATLAB_class"))
        if kind not in ("char", "cell", "function_handle") and "MATLAB_empty" not in item.attrs:
            found[name] = item

    file.visititems(visit)
    return found


def _chosen(
    path: pathlib.Path, file: h5py.File, dataset: str | None, axes: int
) -> tuple[str, h5py.Dataset]:
    found = _variables(file)
    sizes = ", ".join(f"{name} {item.shape[::-1]}" for name, item in found.items()) or "none"
    if dataset is not None:
        name = dataset.strip("/").replace(".", "/")
        if name not in found:
            raise InputError(f"{path}: there is no array {dataset!r}; the arrays are {sizes}.")
        return name, found[name]
    chosen = [name for name, item in found.items() if axes <= item.ndim <= 4]
    if len(chosen) != 1:
        raise InputError(
            f"{path}: has {len(chosen)} arrays that could be frames; the arrays are {sizes}. Name "
            "one with `dataset`; a stack of frames (ky, kx, frames) also needs a `scan_shape`."
        )
    return chosen[0], found[chosen[0]]

"""Reading what has to be there in an HDF5 file, with its place in every complaint."""

import dataclasses
import pathlib
from typing import Any, NoReturn

import h5py
import numpy as np

from ..counts import InputError
from ..readers.hdf5 import listing, number, text
from .record import Exchange


REAL, COMPLEX = "biuf", "biufc"
# Beyond this many bytes an array is taken for damage.
MOST_BYTES = 2**40


def place(group: h5py.Group, key: str) -> str:
    """Where `key` would be in the file, in words."""
    return f"{group.file.filename}: {str(group.name).rstrip('/')}/{key}"


def group_at(group: h5py.Group, key: str) -> h5py.Group:
    """The group of this name.

    **Raises:** InputError if there is none.
    """
    found = group.get(key)
    if not isinstance(found, h5py.Group):
        raise InputError(f"{place(group, key)} is missing, or no group; there is {listing(group)}.")
    return found


def array_at(
    group: h5py.Group, key: str, axes: int | tuple[int, ...], kinds: str = REAL
) -> np.ndarray:
    """The array of this name, of one of these numbers of axes.

    **Raises:** InputError if there is none, or it is empty or of another type.
    """
    found = group.get(key)
    if not isinstance(found, h5py.Dataset) or found.shape is None:
        raise InputError(f"{place(group, key)} is missing, or no array; there is {listing(group)}.")
    known = (axes,) if isinstance(axes, int) else axes
    if found.ndim not in known or not found.size:
        raise InputError(
            f"{place(group, key)} has shape {found.shape}; expected "
            f"{' or '.join(map(str, known))} axes and at least one value."
        )
    if found.dtype.kind not in kinds or found.nbytes > MOST_BYTES:
        raise InputError(
            f"{place(group, key)} holds {found.nbytes} bytes of {found.dtype}; expected "
            f"{'real' if kinds == REAL else 'complex'} numbers."
        )
    return np.asarray(found[()])


def number_at(group: h5py.Group, key: str) -> float:
    """The finite number of this name.

    **Raises:** InputError if there is none.
    """
    found = group.get(key)
    value = number(found) if isinstance(found, h5py.Dataset) and found.size == 1 else None
    if value is None:
        raise InputError(f"{place(group, key)} is missing, or not a finite number.")
    return value


def text_at(group: h5py.Group, key: str) -> str | None:
    """The text of this name, None if there is none."""
    found = group.get(key)
    return text(found) if isinstance(found, h5py.Dataset) else None


def waves(values: np.ndarray) -> np.ndarray:
    """As complex numbers, of double precision only if they were."""
    kind = np.complex128 if values.dtype.itemsize > 8 else np.complex64
    return np.ascontiguousarray(values, kind)


def refuse(path: pathlib.Path, what: str, remedy: str) -> NoReturn:
    """**Raises:** InputError: a format has no place for `what`."""
    raise InputError(f"{path}: this format cannot hold {what}; {remedy}.")


def single_object(path: pathlib.Path, one: Exchange) -> Exchange:
    """With the share of the only object state in its first slice.

    **Raises:** InputError for a mixed object.
    """
    if len(one.weights) > 1:
        refuse(path, f"{len(one.weights)} object states", "choose one of them")
    planes = one.transmission.copy()
    planes[:, 0] *= np.sqrt(one.weights[0])
    return dataclasses.replace(one, transmission=planes, weights=np.ones(1))


def covering(one: Exchange) -> Exchange:
    """With vacuum around the object where windows would leave it."""
    window, field = one.probes.shape[1:], one.transmission.shape[2:]
    corners = np.rint(one.corners).astype(int)
    low = np.maximum(-corners.min(axis=0), 0)
    high = np.maximum((corners + window).max(axis=0) - field, 0)
    pads = [(0, 0), (0, 0), *zip(low, high, strict=True)]
    planes = np.pad(one.transmission, pads, constant_values=1)
    y, x = (float(o - n * d) for o, n, d in zip(one.origin, low, one.sampling, strict=True))
    return dataclasses.replace(one, transmission=planes, origin=(y, x))


def common(path: pathlib.Path, values: Any, what: str, format: str) -> float:
    """The one value that all of `values` have.

    **Raises:** InputError if they differ.
    """
    values = np.asarray(values, float)
    if values.size and np.ptp(values) > 1e-6 * max(1e-30, float(np.abs(values).max())):
        raise InputError(
            f"{path}: {format} has one {what} for all, but here they are {values.ravel()[:8]}; "
            "make them equal first."
        )
    return float(values.mean()) if values.size else 0.0

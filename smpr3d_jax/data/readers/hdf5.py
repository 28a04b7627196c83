"""HDF5 files opened with our own words when they cannot be, and written in one piece.

The compressions of `hdf5plugin` (bitshuffle, Blosc, LZ4, Zstandard, ...) are known. Damage shows
inside h5py as an error of almost any kind: each becomes an InputError that names the file, while an
error of our own code stays what it is.
"""

import contextlib
import math
import os
import pathlib
import uuid
from collections.abc import Iterator
from typing import Any

import h5py
import hdf5plugin  # noqa: F401 (its compressions are known once it is imported)
import numpy as np

from ..counts import InputError
from .binary import Records
from .chunked import gather_chunked, tiles_of
from .damage import raised_in
from .heaps import check_heaps
from .source import gather, Load, Positions, Tiles
from .turned import in_order, Turned


SIGNATURE = b"\x89HDF\r\n\x1a\n"
# Of unpacked chunks: some may be looked at again and again. Where each is taken once, keeping them
# costs time and memory.
CHUNK_CACHE_BYTES = 2**26
# What a chunk may take when unpacked: little, or so much more than all that is stored.
CHUNK_BYTES, PACKED = 2**26, 5000
# Integers, real numbers, text, and truth values.
READ = (h5py.h5t.INTEGER, h5py.h5t.FLOAT, h5py.h5t.STRING, h5py.h5t.ENUM)
# A number or a text of a description, or one for each scan position.
FEW = 2**24


def is_hdf5(path: pathlib.Path) -> bool:
    """Whether the file begins as an HDF5 file does, even if the rest is missing."""
    with open(path, "rb") as file:
        return file.read(len(SIGNATURE)) == SIGNATURE or h5py.is_hdf5(path)


@contextlib.contextmanager
def opened(path: pathlib.Path, kept: int = CHUNK_CACHE_BYTES) -> Iterator[h5py.File]:
    """The file, open for reading; `kept` bytes of unpacked chunks stay in memory.

    **Raises:** InputError if it, or what is read from it, is damaged.
    """
    check_heaps(path)
    try:
        with h5py.File(path, "r", rdcc_nbytes=kept) as file:
            yield file
    except Exception as error:
        if isinstance(error, InputError) or not raised_in("h5py", error):
            raise
        raise InputError(
            f"{path}: cannot be read as HDF5 ({error}). The file may be cut short or damaged: copy "
            "it again and compare the sizes; if a filter is missing, rewrite it with gzip."
        ) from error


@contextlib.contextmanager
def written(path: str | os.PathLike) -> Iterator[h5py.File]:
    """A new file that takes the name `path` only when it is complete."""
    path = pathlib.Path(path)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with h5py.File(part, "w") as file:
            yield file
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def arrays(file: h5py.File | h5py.Group) -> dict[str, h5py.Dataset]:
    """Every dataset with at least one axis, by its full name."""
    found: dict[str, h5py.Dataset] = {}

    def visit(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset) and item.ndim:
            found[f"/{name}"] = item

    file.visititems(visit)
    return found


def dataset_at(group: h5py.File | h5py.Group, name: str) -> h5py.Dataset | None:
    """The dataset of this name, if there is one with something in it."""
    item = group.get(name)
    return item if isinstance(item, h5py.Dataset) and item.shape is not None else None


def attribute(item: h5py.Group | h5py.Dataset, name: str) -> Any:
    """The attribute of this name: numbers or text, None if there is nothing of the kind.

    Of others nothing is read: a damaged list of a length of its own crashes the HDF5 library.
    """
    if name not in item.attrs:
        return None
    found = h5py.h5a.open(item.id, name.encode(errors="surrogateescape"))
    size = found.get_space().get_simple_extent_npoints()
    return item.attrs[name] if found.get_type().get_class() in READ and size <= FEW else None


def attributes(item: h5py.Group | h5py.Dataset) -> dict[str, Any]:
    """All attributes that are numbers or text, by name."""
    names = [str(name) for name in item.attrs]
    return {name: value for name in names if (value := attribute(item, name)) is not None}


def listing(file: h5py.File | h5py.Group) -> str:
    """The datasets of a file in words, for messages."""
    found = [f"{name} {item.shape} {item.dtype}" for name, item in arrays(file).items()]
    more = f" and {len(found) - 8} more" if len(found) > 8 else ""
    return ", ".join(found[:8]) + more or "no datasets"


def text(value: Any) -> str | None:
    """A string from an attribute or a scalar dataset, however it was stored."""
    if isinstance(value, h5py.Dataset):
        value = value[()] if value.size == 1 else None
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.item()
    if isinstance(value, str):
        value = value.encode(errors="surrogateescape")
    return bytes(value).decode(errors="replace") if isinstance(value, bytes) else None


def number(value: Any) -> float | None:
    """A finite number from an attribute or a dataset, the mean if it has several values."""
    if isinstance(value, h5py.Dataset):
        if value.dtype.kind not in "biuf" or not 0 < (value.size or 0) <= FEW:
            return None
        value = value[()]
    if not isinstance(value, bool | int | float | np.generic | np.ndarray):
        return None
    values = np.asarray(value)
    if values.dtype.kind not in "biuf" or not values.size:
        return None
    mean = float(np.mean(values, dtype=float))
    return mean if math.isfinite(mean) else None


def storage_notes(path: pathlib.Path, item: h5py.Dataset) -> tuple[str, ...]:
    """What deserves a second look about how the frames are stored.

    **Raises:** InputError if they are in other files that are missing, or the sizes are impossible.
    """
    if item.is_virtual:
        for source in item.virtual_sources():
            # A dot is the file itself; a missing one would be read as the fill value.
            if source.file_name != "." and not (path.parent / source.file_name).exists():
                raise InputError(
                    f"{path}: dataset {item.name!r} is put together from other files, of which "
                    f"{source.file_name} is missing; copy it beside this one."
                )
    if item.chunks is None:
        return ()
    unpacked, stored = math.prod(item.chunks) * item.dtype.itemsize, item.id.get_storage_size()
    if unpacked > max(CHUNK_BYTES, PACKED * stored):
        raise InputError(
            f"{path}: dataset {item.name!r} has chunks of {item.chunks}, of {unpacked} bytes each, "
            f"but only {stored} bytes in all; the file is damaged: copy it again."
        )
    chunks = math.prod(-(-n // c) for n, c in zip(item.shape, item.chunks, strict=True))
    missing = chunks - item.id.get_num_chunks()
    if missing <= 0:
        return ()
    return (f"{missing} of {chunks} chunks were never written, and read as {item.fillvalue}",)


def frames_of(path: pathlib.Path, dataset: str, axes: tuple[int, ...] | None = None) -> Load:
    """How to load frames from a dense dataset; the file is open only meanwhile.

    `axes`: which of its axes are ours, if they are not in our order.
    """

    def found(file: h5py.File) -> h5py.Dataset:
        item = dataset_at(file, dataset)
        if item is None:
            raise InputError(
                f"{path}: dataset {dataset!r} is not found again; the file is damaged, or has "
                "changed: copy it again."
            )
        return item

    def load(positions: Positions):
        with opened(path, kept) as file:
            item = found(file)
            return frames_at(item if axes is None else Turned(item, axes), positions)

    with opened(path) as file:
        item = found(file)
        kept = 0 if item.chunks is not None else CHUNK_CACHE_BYTES
        return _in_one_piece(path, item) or load if axes is None else load


def _in_one_piece(path: pathlib.Path, item: h5py.Dataset) -> Records | None:
    """Frames that the file keeps one after the other as they are, to be read without HDF5."""
    start, stored = item.id.get_offset(), item.id.get_type()
    if item.chunks is not None or start is None or item.external or item.dtype.kind not in "uif":
        return None
    length = math.prod(item.shape[-2:]) * item.dtype.itemsize
    end = start + math.prod(item.shape[:-2]) * length
    if not stored.equal(h5py.h5t.py_create(item.dtype)) or end > path.stat().st_size:
        return None
    return Records(path, start, length, item.shape[-2:], item.dtype)


def together(item: h5py.Dataset, axes: tuple[int, ...] | None = None) -> int | Tiles | None:
    """At which positions frames are stored in pieces that are read as a whole.

    `axes` as for `frames_of`.
    """
    if item.chunks is None:
        return 1 if axes is None else None
    return tiles_of(tuple(in_order(item.shape, axes)), tuple(in_order(item.chunks, axes)))


def frames_at(item: Any, positions: Positions) -> np.ndarray:
    """Frames of an open dataset at flat positions, each chunk unpacked once where it can be."""
    if item.chunks is None or math.prod(item.chunks[:-2]) == 1:
        return gather(item, positions)
    return gather_chunked(item, positions, item.chunks)

"""HDF5 files opened with our own words when they cannot be, and written in one piece."""

import contextlib
import os
import pathlib
import uuid
from collections.abc import Iterator
from typing import Any

import h5py

from ..counts import InputError
from .source import gather, Load, Positions


SIGNATURE = b"\x89HDF\r\n\x1a\n"
# Scattered frames share compressed chunks: keep some, so that each is unpacked once.
CHUNK_CACHE_BYTES = 2**26


def is_hdf5(path: pathlib.Path) -> bool:
    """Whether the file begins as an HDF5 file does, even if the rest is missing."""
    with open(path, "rb") as file:
        return file.read(len(SIGNATURE)) == SIGNATURE or h5py.is_hdf5(path)


@contextlib.contextmanager
def opened(path: pathlib.Path) -> Iterator[h5py.File]:
    """The file, open for reading.

    **Raises:** InputError if it, or what is read from it, is damaged.
    """
    try:
        with h5py.File(path, "r", rdcc_nbytes=CHUNK_CACHE_BYTES) as file:
            yield file
    except OSError as error:
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
    """The dataset of this name, if there is one."""
    item = group.get(name)
    return item if isinstance(item, h5py.Dataset) else None


def attribute(item: h5py.Group | h5py.Dataset, name: str) -> Any:
    """The attribute of this name, None if there is none."""
    return item.attrs.get(name)


def listing(file: h5py.File | h5py.Group) -> str:
    """The datasets of a file in words, for messages."""
    found = [f"{name} {item.shape} {item.dtype}" for name, item in arrays(file).items()]
    more = f" and {len(found) - 8} more" if len(found) > 8 else ""
    return ", ".join(found[:8]) + more or "no datasets"


def frames_of(path: pathlib.Path, dataset: str) -> Load:
    """How to load frames from a dense dataset; the file is open only meanwhile."""

    def load(positions: Positions):
        with opened(path) as file:
            return gather(dataset_at(file, dataset), positions)

    return load

"""Zarr stores, of format 2 or 3, a folder or a zip file, opened with our own words when they fail.

The library is imported when a store is opened. Groups are walked here, by looking at names: what
is in an array's folder, which may be a million files, is never listed.
"""

import contextlib
import json
import math
import os
import pathlib
import zipfile
from collections.abc import Iterator
from typing import Any

from ..counts import InputError
from .chunked import gather_chunked
from .damage import raised_in
from .source import Load, Positions


MARKS = ".zgroup", ".zarray", "zarr.json"
# Deeper than any group of frames, and not endless where a folder contains itself.
DEEPEST = 16
# Stores of at most so many chunks are searched for missing ones.
COUNTED = 4096
CHUNK_BYTES = 2**31


def is_store(path: pathlib.Path) -> bool:
    """Whether a folder, or a zip file, is a zarr group or array."""
    if path.is_dir():
        return any((path / mark).is_file() for mark in MARKS)
    if not zipfile.is_zipfile(path):
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return any(mark in archive.namelist() for mark in MARKS)
    except Exception as error:
        if not raised_in("zipfile.py", error):
            raise
        return False


@contextlib.contextmanager
def opened(path: pathlib.Path) -> Iterator[Any]:
    """The group or array in a store, open for reading.

    **Raises:** InputError if it, or what is read from it, is damaged.
    """
    import zarr
    import zarr.storage

    try:
        if path.is_dir():
            yield zarr.open(os.fspath(path), mode="r")
            return
        with contextlib.closing(zarr.storage.ZipStore(path, mode="r")) as store:
            yield zarr.open(store, mode="r")
    except Exception as error:
        libraries = ("zarr", "numcodecs", "zipfile.py")
        if isinstance(error, InputError) or not any(raised_in(name, error) for name in libraries):
            raise
        raise InputError(
            f"{path}: cannot be read as zarr ({type(error).__name__}: {error}). Files may be "
            "missing or damaged: copy the whole folder again and compare the number of files."
        ) from error


def attributes(item: Any) -> dict[str, Any]:
    """All attributes of a group or array, empty if there are none."""
    found = item.attrs.asdict()
    return found if isinstance(found, dict) else {}


def child(item: Any, name: str) -> Any:
    """What is in a group under this name, None if there is nothing."""
    import zarr

    return item.get(name) if isinstance(item, zarr.Group) else None


def is_array(item: Any) -> bool:
    """Whether this is a zarr array."""
    import zarr

    return isinstance(item, zarr.Array)


def arrays(path: pathlib.Path) -> list[str]:
    """Names of all arrays in a store, "" for the store itself if it is one."""
    if path.is_dir():
        return list(_walk(path, "", 0))
    with zipfile.ZipFile(path) as archive:
        marked = [name for name in archive.namelist() if name.rpartition("/")[2] in MARKS[1:]]
        kept = [n for n in marked if n.endswith(".zarray") or _says_array(archive.read(n))]
    return sorted(name.rpartition("/")[0] for name in kept)


def _walk(folder: pathlib.Path, name: str, depth: int) -> Iterator[str]:
    said = folder / "zarr.json"
    if (folder / ".zarray").is_file() or said.is_file() and _says_array(said.read_bytes()):
        yield name
        return
    if depth < DEEPEST:
        for inner in sorted(part for part in folder.iterdir() if part.is_dir()):
            yield from _walk(inner, f"{name}/{inner.name}" if name else inner.name, depth + 1)


def _says_array(text: bytes) -> bool:
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(said, dict) and said.get("node_type") == "array"


def array_at(path: pathlib.Path, root: Any, name: str) -> Any:
    """The array of this name in an open store, "" for the store itself.

    **Raises:** InputError if there is none.
    """
    item = child(root, name) if name else root
    if not is_array(item):
        raise InputError(f"{path}: there is no array {name!r}; the store has {listing(path)}.")
    return item


def listing(path: pathlib.Path) -> str:
    """The arrays of a store in words, for messages."""
    found = arrays(path)
    more = f" and {len(found) - 8} more" if len(found) > 8 else ""
    return ", ".join(repr(name) for name in found[:8]) + more or "no arrays"


def storage_notes(path: pathlib.Path, item: Any) -> tuple[str, ...]:
    """What deserves a second look about how the frames are stored.

    **Raises:** InputError if a chunk is larger than zarr can unpack.
    """
    size = math.prod(item.chunks) * item.dtype.itemsize
    if size > CHUNK_BYTES:
        raise InputError(
            f"{path}: array {item.name!r} has chunks of {item.chunks}, of {size} bytes each; chunks"
            f" beyond {CHUNK_BYTES} bytes cannot be unpacked. Write it again with smaller ones."
        )
    if item.nchunks > COUNTED:
        return ()
    missing = item.nchunks - item.nchunks_initialized
    if missing <= 0:
        return ()
    return (f"{missing} of {item.nchunks} chunks are not stored, and read as {item.fill_value}",)


def frames_of(path: pathlib.Path, name: str) -> Load:
    """How to load frames from an array in a store; the store is open only meanwhile."""

    def load(positions: Positions):
        with opened(path) as root:
            item = array_at(path, root, name)
            return gather_chunked(item, positions, item.chunks)

    return load

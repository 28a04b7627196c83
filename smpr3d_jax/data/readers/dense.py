"""Dense frames written part by part: .npy, plain HDF5 and zarr.

`writing_*` gives a function that takes the frames of the next positions, in the order of the scan.
A file, or zarr's folder, takes its name when it is complete. What is known of the experiment goes
into attributes, where the format has them.
"""

import contextlib
import math
import os
import pathlib
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Shaped

from .hdf5 import written
from .source import kept_facts, runs


Append = Callable[[Shaped[np.ndarray, "frames ky kx"]], None]
Shape = tuple[int, int]
# Of a chunk of zarr.
CHUNK_BYTES = 2**22


def appending(array: Any) -> Append:
    """How to fill an array of four axes on disk from its beginning, some frames at a time."""
    done, width = 0, array.shape[1]

    def append(frames: Shaped[np.ndarray, "frames ky kx"]) -> None:
        nonlocal done
        for start, stop in runs(np.arange(done, done + len(frames)), width):
            row, column = divmod(done + start, width)
            array[row, column : column + stop - start] = frames[start:stop]
        done += len(frames)

    return append


@contextlib.contextmanager
def writing_npy(
    path: str | os.PathLike,
    scan_shape: Shape,
    frame_shape: Shape,
    dtype: np.dtype,
    facts: Mapping[str, Any] | None = None,
) -> Iterator[Append]:
    """Write a .npy file in parts; it has no room for `facts`."""
    path = pathlib.Path(path)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        array = np.lib.format.open_memmap(part, "w+", dtype, (*scan_shape, *frame_shape))
        yield appending(array)
        array.flush()
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


@contextlib.contextmanager
def writing_hdf5(
    path: str | os.PathLike,
    scan_shape: Shape,
    frame_shape: Shape,
    dtype: np.dtype,
    facts: Mapping[str, Any] | None = None,
) -> Iterator[Append]:
    """Write the dataset `/data` of an HDF5 file in parts, with `facts` as its attributes."""
    with written(path) as file:
        item = file.create_dataset("data", (*scan_shape, *frame_shape), dtype)
        item.attrs.update(kept_facts(facts or {}))
        yield appending(item)


@contextlib.contextmanager
def writing_zarr(
    path: str | os.PathLike,
    scan_shape: Shape,
    frame_shape: Shape,
    dtype: np.dtype,
    facts: Mapping[str, Any] | None = None,
) -> Iterator[Append]:
    """Write a zarr array in parts, with `facts` as its attributes; a folder replaces a folder."""
    import zarr

    path = pathlib.Path(path)
    mark = uuid.uuid4().hex
    part, old = (path.with_name(f".{path.name}.{mark}.{end}") for end in ("part", "old"))
    fit = CHUNK_BYTES // (math.prod(frame_shape) * dtype.itemsize)
    chunks = (1, min(max(1, fit), scan_shape[1]), *frame_shape)
    try:
        array = zarr.create_array(
            os.fspath(part), shape=(*scan_shape, *frame_shape), chunks=chunks, dtype=dtype,
            attributes=kept_facts(facts or {}),
        )  # fmt: skip
        yield appending(array)
        if path.exists():
            os.replace(path, old)
        os.replace(part, path)
    finally:
        for folder in (part, old):
            shutil.rmtree(folder, ignore_errors=True)

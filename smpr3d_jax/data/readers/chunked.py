"""Frames of arrays that are stored in chunks over several positions of the scan.

Read row by row, a chunk would be unpacked once for each of its rows. Here the positions are taken
chunk by chunk, and what is wanted of a chunk is read at once.
"""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Int, Shaped

from .source import Positions, Tiles


# The largest part of the array that is read at once, wanted or not.
AT_ONCE = 2**27


def gather_chunked(
    array: Any, positions: Positions, chunks: tuple[int, ...]
) -> Shaped[np.ndarray, "frames ky kx"]:
    """Frames at flat `positions` of a 3D or 4D array whose chunks have the shape `chunks`."""
    wanted, back = np.unique(positions, return_inverse=True)
    width = array.shape[1] if array.ndim == 4 else array.shape[0]
    rows, columns = np.divmod(wanted, width)
    if len(wanted) and _is_box(rows, columns):
        down, across = (slice(n[0], n[-1] + 1) for n in (rows, columns))
        part = array[down, across] if array.ndim == 4 else array[across]
        frames = part.reshape(len(wanted), *part.shape[-2:])
        return frames if np.array_equal(back, np.arange(len(back))) else frames[back]
    high, wide = chunks[:2] if array.ndim == 4 else (1, chunks[0])
    frame = math.prod(array.shape[-2:]) * array.dtype.itemsize
    wide = max(1, min(wide, AT_ONCE // max(frame, 1)))
    high = max(1, min(high, AT_ONCE // max(frame * wide, 1)))
    frames = np.empty((len(wanted), *array.shape[-2:]), array.dtype.newbyteorder("="))
    for group in _groups(rows // high, columns // wide):
        row, column = rows[group], columns[group]
        top, left = row.min(), column.min()
        down, across = slice(top, row.max() + 1), slice(left, column.max() + 1)
        part = array[down, across] if array.ndim == 4 else array[across][None]
        frames[group] = part[row - top, column - left]
    return frames if np.array_equal(back, np.arange(len(back))) else frames[back]


def _is_box(row: Int[np.ndarray, " frames"], column: Int[np.ndarray, " frames"]) -> bool:
    """Whether sorted positions are all those between the first and the last row and column."""
    sides = row[-1] - row[0] + 1, column[-1] - column[0] + 1
    inside = column.min() == column[0] and column.max() == column[-1]
    return bool(inside and sides[0] * sides[1] == len(row))


def tiles_of(shape: tuple[int, ...], chunks: tuple[int, ...]) -> Tiles:
    """At which positions frames share chunks of an array of three or four axes."""
    scan = (1, shape[0]) if len(shape) == 3 else shape[:2]
    piece = (1, chunks[0]) if len(shape) == 3 else chunks[:2]
    rows, columns = (max(1, min(n, c)) for n, c in zip(scan, piece, strict=True))
    return Tiles(rows, columns, scan[1])


def _groups(
    row: Int[np.ndarray, " frames"], column: Int[np.ndarray, " frames"]
) -> Iterator[Int[np.ndarray, " some"]]:
    """Numbers of the positions in each chunk."""
    order = np.lexsort((column, row))
    new = (np.diff(row[order]) != 0) | (np.diff(column[order]) != 0)
    yield from (group for group in np.split(order, np.flatnonzero(new) + 1) if len(group))

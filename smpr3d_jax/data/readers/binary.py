"""Frames in plain binary files: records of one length, one after the other.

Only the records asked for are read, into memory of their own: a mapped file would count every page
ever looked at as memory in use. Sizes are compared with the file's length before any are allocated.
"""

import dataclasses
import math
import os
import pathlib

import numpy as np
from jaxtyping import Shaped

from ..counts import InputError
from .source import Positions, runs


# Small enough to stay in a processor's cache between the two copies of a record with a header.
PIECE_BYTES = 2**20
# Larger records are read to where they belong, so many of them at once.
SCATTERED_BYTES, ONE_CALL, CAN_SCATTER = 2**14, 256, hasattr(os, "preadv")
PLANES_BYTES = 2**24


@dataclasses.dataclass(frozen=True)
class Records:
    """Arrays of `shape` and `dtype` in a file, each at the beginning of `stride` bytes.

    The first one is at byte `start`. Calling it with the numbers of records reads them.
    """

    path: pathlib.Path
    start: int
    stride: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def __call__(self, numbers: Positions) -> Shaped[np.ndarray, "records ..."]:
        """The records of these numbers, in this order, in the machine's byte order.

        **Raises:** InputError if the file has become too short for one of them.
        """
        wanted, back = np.unique(numbers, return_inverse=True)
        found = np.empty((len(wanted), *self.shape), self.dtype.newbyteorder("="))
        with open(self.path, "rb", buffering=0) as file:
            for start, stop in runs(wanted):
                self._fill(file, found[start:stop], self.start + int(wanted[start]) * self.stride)
        return found if np.array_equal(back, np.arange(len(back))) else found[back]

    def _fill(self, file, found: np.ndarray, place: int) -> None:
        """Read as many consecutive records as there is room for, from a byte of the file."""
        length = math.prod(self.shape) * self.dtype.itemsize
        rest = self.stride - length
        whole = found.reshape(-1).view(np.uint8).data
        small = length < SCATTERED_BYTES or not CAN_SCATTER
        if not self.dtype.isnative or (rest and small):
            file.seek(place)
            self._through_buffer(file, found)
        elif not rest:
            file.seek(place)
            self._read(file, whole)
        else:
            between = memoryview(bytearray(rest))
            for first in range(0, len(found), ONE_CALL):
                last = min(first + ONE_CALL, len(found))
                parts = [whole[i * length : (i + 1) * length] for i in range(first, last)]
                # The last record of a file may lack what follows its array.
                parts = [part for array in parts for part in (array, between)][:-1]
                read = os.preadv(file.fileno(), parts, place + first * self.stride)
                self._complain(sum(map(len, parts)) - read)

    def _through_buffer(self, file, found: np.ndarray) -> None:
        """Read pieces of many records, and copy or convert the arrays out of them."""
        length = math.prod(self.shape) * self.dtype.itemsize
        step = max(1, PIECE_BYTES // self.stride)
        buffer = np.empty((min(step, len(found)), self.stride), np.uint8)
        for first in range(0, len(found), step):
            part = found[first : first + step]
            missing = self.stride - length if first + step >= len(found) else 0
            piece = buffer[: len(part)]
            self._read(file, piece.reshape(-1).data[: piece.size - missing])
            arrays = piece[:, :length].view(self.dtype)
            part[...] = arrays.reshape(part.shape)

    def _read(self, file, into: memoryview) -> None:
        done = 0
        while done < len(into):
            # One call of the system reads at most 2 GiB.
            read = file.readinto(into[done:])
            done += read
            if not read:
                self._complain(len(into) - done)

    def _complain(self, missing: int) -> None:
        if missing:
            raise InputError(
                f"{self.path}: ended {missing} bytes too early. The file has become shorter since "
                "it was opened; copy it again."
            )


def complete_records(path: pathlib.Path, start: int, stride: int) -> tuple[int, int]:
    """How many whole records of `stride` bytes follow byte `start`, and the bytes left over."""
    return divmod(max(0, path.stat().st_size - start), stride)


@dataclasses.dataclass(frozen=True)
class Planes:
    """Frames of which a file keeps pixel after pixel, each with its counts at all positions.

    The first count is at byte `start`. Calling it with flat positions reads those frames; every
    block of them is spread over the whole file.
    """

    path: pathlib.Path
    start: int
    shape: tuple[int, int]
    positions: int
    dtype: np.dtype

    def __call__(self, numbers: Positions) -> Shaped[np.ndarray, "frames ky kx"]:
        """The frames at these positions, in this order, in the machine's byte order.

        **Raises:** InputError if the file has become too short.
        """
        wanted, back = np.unique(numbers, return_inverse=True)
        found = np.empty((len(wanted), *self.shape), self.dtype.newbyteorder("="))
        if not len(wanted):
            return found
        pixels, length = math.prod(self.shape), self.positions * self.dtype.itemsize
        frames = found.reshape(len(wanted), pixels)
        first, last = int(wanted[0]), int(wanted[-1])
        columns = slice(first, last + 1) if last - first == len(wanted) - 1 else wanted
        step = max(1, PLANES_BYTES // length)
        for first in range(0, pixels, step):
            shape = (min(step, pixels - first), self.positions)
            try:
                # A map of its own for each part, so that its pages are given back.
                part = np.memmap(self.path, self.dtype, "r", self.start + first * length, shape)
            except ValueError as error:
                raise InputError(
                    f"{self.path}: has become shorter since it was opened ({error}); copy it again."
                ) from error
            frames[:, first : first + step] = part[:, columns].T
        return found if np.array_equal(back, np.arange(len(back))) else found[back]

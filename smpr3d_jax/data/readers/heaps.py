"""Heaps of HDF5 files that would keep the HDF5 library busy for ever.

Texts and lists of HDF5 are kept in heaps (https://docs.hdfgroup.org/hdf5/develop/_f_m_t3.html,
"Global Heap"): objects one after the other, each with its length. The library, as of version 2.0,
never comes to an end of a heap in which a length is zero, as where a block of the file was lost and
reads as zeros.
"""

import functools
import os
import pathlib

from ..counts import InputError


# Heaps with the texts of a file are near its beginning, or its end.
LOOKED_AT = 2**21
START = b"GCOL\1\0\0\0"


def check_heaps(path: pathlib.Path) -> None:
    """Look through the heaps at both ends of an HDF5 file, once as long as it stays the same.

    **Raises:** InputError for one that is damaged.
    """
    if not path.is_file():
        return
    state = os.stat(path)
    place = _damage(path, state.st_size, state.st_mtime_ns)
    if place is not None:
        raise InputError(
            f"{path}: cannot be read as HDF5 (the heap at byte {place} is damaged). The file may "
            "be cut short or damaged: copy it again and compare the sizes."
        )


@functools.lru_cache(maxsize=1024)
def _damage(path: pathlib.Path, size: int, changed: int) -> int | None:
    """Where the first damaged heap begins, if there is one."""
    starts = sorted({0, max(0, size - LOOKED_AT)})
    with open(path, "rb") as file:
        for start in starts:
            file.seek(start)
            data = file.read(LOOKED_AT)
            place = data.find(START)
            while place >= 0:
                if not _is_whole(data, place):
                    return start + place
                place = data.find(START, place + 1)
    return None


def _is_whole(data: bytes, start: int) -> bool:
    """Whether the objects of a heap follow one another to its end, as far as it is here."""
    place, end = start + 16, start + int.from_bytes(data[start + 8 : start + 16], "little")
    while place + 16 <= min(end, len(data)):
        number = int.from_bytes(data[place : place + 2], "little")
        length = int.from_bytes(data[place + 8 : place + 16], "little")
        # Number 0 is the free room, whose length includes these 16 bytes.
        step = length if number == 0 else 16 + -(-length // 8) * 8
        if step < 16 or place + step > end:
            return False
        place += step
    return True

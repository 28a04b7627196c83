"""Heaps of HDF5 files that would make the HDF5 library crash, or read for ever.

Texts and lists of HDF5 are kept in heaps (https://docs.hdfgroup.org/hdf5/develop/_f_m_t3.html,
"Global Heap"): objects one after the other, each with its length. The library, as of version 2.0,
never comes to an end of a heap in which a length is zero, as where a block of the file was lost and
reads as zeros. A list of what a virtual dataset is put together from has a checksum, which the
library compares only after it has believed the list.
"""

import functools
import os
import pathlib
import re
from collections.abc import Iterator

from ..counts import InputError


# Heaps with the texts of a file are near its beginning, or its end.
LOOKED_AT = 2**21
START = b"GCOL\1\0\0\0"
SIGNATURE = b"\x89HDF\r\n\x1a\n"


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
    base = 0
    with open(path, "rb") as file:
        for start in sorted({0, max(0, size - LOOKED_AT)}):
            file.seek(start)
            data = file.read(LOOKED_AT)
            base = base or max(0, data.find(SIGNATURE))
            place = data.find(START)
            while place >= 0:
                lists = _lists(data, start + place - base)
                if not all(_objects(data, place, lists)):
                    return start + place
                place = data.find(START, place + 1)
    return None


def _lists(data: bytes, address: int) -> set[int]:
    """Numbers of those objects in the heap at an address that virtual datasets refer to."""
    # A message on layout: its version, the class of virtual datasets, heap and number.
    message = rb"[\x04\x05]\x03" + re.escape(address.to_bytes(8, "little")) + rb"(.{4})"
    return {int.from_bytes(n, "little") for n in re.findall(message, data, re.DOTALL)}


def _objects(data: bytes, start: int, lists: set[int]) -> Iterator[bool]:
    """Whether each object of a heap is whole, as far as they are here."""
    place, end = start + 16, start + int.from_bytes(data[start + 8 : start + 16], "little")
    while place + 16 <= min(end, len(data)):
        number = int.from_bytes(data[place : place + 2], "little")
        length = int.from_bytes(data[place + 8 : place + 16], "little")
        # Number 0 is the free room, whose length includes these 16 bytes.
        step = length if number == 0 else 16 + -(-length // 8) * 8
        yield step >= 16 and place + step <= end
        first, last = place + 16, place + 16 + length
        if number in lists and last <= len(data):
            said = int.from_bytes(data[last - 4 : last], "little")
            yield length > 4 and checksum(data[first : last - 4]) == said
        place += step


def checksum(data: bytes) -> int:
    """That of HDF5: B. Jenkins' lookup3 (2006, public domain), beginning with 0."""
    bits = 0xFFFFFFFF
    turn = lambda x, n: (x << n | x >> (32 - n)) & bits
    a = b = c = (0xDEADBEEF + len(data)) & bits
    whole = max(0, (len(data) - 1) // 12 * 12)
    words = [int.from_bytes(data[i : i + 4], "little") for i in range(0, whole, 4)]
    for i in range(0, len(words), 3):
        a, b, c = a + words[i] & bits, b + words[i + 1] & bits, c + words[i + 2] & bits
        for n, m, k in ((4, 6, 8), (16, 19, 4)):
            a, c = (a - c & bits) ^ turn(c, n), c + b & bits
            b, a = (b - a & bits) ^ turn(a, m), a + c & bits
            c, b = (c - b & bits) ^ turn(b, k), b + a & bits
    if not data:
        return c
    rest = data[whole:].ljust(12, b"\0")
    a, b, c = (
        number + int.from_bytes(rest[4 * i : 4 * i + 4], "little") & bits
        for i, number in enumerate((a, b, c))
    )
    for n, m, k in ((14, 11, 25), (16, 4, 14)):
        c = (c ^ b) - turn(b, n) & bits
        a = (a ^ c) - turn(c, m) & bits
        b = (b ^ a) - turn(a, k) & bits
    return (c ^ b) - turn(b, 24) & bits

"""The tree of named tags that Gatan's DigitalMicrograph keeps in a file, versions 3 and 4.

A group holds groups and values; numbers of the tree itself are big-endian, values mostly little.
Arrays are described where they stand and not read, but for short ones. What the bytes mean was
worked out by C. Boothroyd, P. Raynal and others (https://imagej.net/formats/dm3).
"""

import os
import pathlib
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from ..counts import InputError


GROUP, VALUE = 20, 21
STRUCT, STRING, ARRAY = 15, 18, 20
CODES = {
    2: "i2",
    3: "i4",
    4: "u2",
    5: "u4",
    6: "f4",
    7: "f8",
    8: "u1",
    9: "i1",
    10: "u1",
    11: "i8",
    12: "u8",
}
DEPTH, TAGS, SHORT = 64, 2**20, 4096


class Array(NamedTuple):
    """Where the numbers of an array are, and those of a short one; `dtype` None for records."""

    start: int
    length: int
    dtype: np.dtype | None
    data: bytes | None

    def text(self) -> str:
        """What a short array of 16-bit characters says."""
        if self.data is None or self.dtype is None or self.dtype.itemsize != 2:
            return ""
        order = "utf-16-le" if self.dtype.newbyteorder("<") == self.dtype else "utf-16-be"
        return self.data.decode(order, errors="replace").rstrip("\0")


Tags = dict[str, Any]
"""Name, or number of a nameless entry -> number, Array, or Tags."""


def is_dm(path: pathlib.Path) -> bool:
    """Whether a file begins as those of DigitalMicrograph 3 and 4 do."""
    with open(path, "rb") as file:
        start = file.read(16)
    version = int.from_bytes(start[:4], "big")
    order = {3: start[8:12], 4: start[12:16]}.get(version, b"")
    return order in (b"\0\0\0\1", b"\0\0\0\0") and os.path.getsize(path) > 24


def read_tags(path: pathlib.Path) -> Tags:
    """All tags of a file.

    **Raises:** InputError if the tree is damaged or cut short.
    """
    with open(path, "rb") as file:
        return _Walk(path, file).tree()


def tag(tags: Tags, *names: str) -> Any:
    """The entry along a path of names, None if there is none."""
    found: Any = tags
    for name in names:
        found = found.get(name) if isinstance(found, dict) else None
    return found


class _Walk:
    """One pass through the tags of an open file."""

    def __init__(self, path: pathlib.Path, file: BinaryIO):
        self.path, self.file = path, file
        self.size = os.fstat(file.fileno()).st_size
        self.tags = 0
        version = int.from_bytes(self.bytes(4), "big")
        self.long = 8 if version == 4 else 4
        self.number()
        self.order = "<" if int.from_bytes(self.bytes(4), "big") else ">"

    def wrong(self, what: str) -> InputError:
        return InputError(
            f"{self.path}: the tags of DigitalMicrograph are damaged at byte {self.file.tell()}: "
            f"{what}. The file may be cut short: copy it again."
        )

    def bytes(self, count: int) -> bytes:
        if count > self.size - self.file.tell():
            raise self.wrong(f"{count} bytes are missing")
        return self.file.read(count)

    def skip(self, count: int) -> None:
        if count > self.size - self.file.tell():
            raise self.wrong(f"{count} bytes are missing")
        self.file.seek(count, os.SEEK_CUR)

    def number(self) -> int:
        return int.from_bytes(self.bytes(self.long), "big")

    def tree(self) -> Tags:
        return self.group(0)

    def group(self, depth: int) -> Tags:
        """The entries of a group, whose header comes next."""
        if depth > DEPTH:
            raise self.wrong(f"groups are nested more than {DEPTH} deep")
        self.bytes(2)
        count, found = self.number(), {}
        for i in range(min(count, TAGS + 1)):
            self.tags += 1
            if self.tags > TAGS:
                raise self.wrong(f"there are more than {TAGS} tags")
            kind, length = self.bytes(1)[0], int.from_bytes(self.bytes(2), "big")
            name = self.bytes(length).decode("latin-1") or str(i)
            if self.long == 8:
                self.number()
            if kind == GROUP:
                found[name] = self.group(depth + 1)
            elif kind == VALUE:
                found[name] = self.value()
            else:
                raise self.wrong(f"tag {name!r} is neither group nor value, but {kind}")
        return found

    def value(self) -> Any:
        """The number or array that comes next; None for records."""
        if self.bytes(4) != b"%%%%":
            raise self.wrong("a value does not begin with '%%%%'")
        words = self.number()
        if not 0 < words <= SHORT:
            raise self.wrong(f"a value is described by {words} numbers")
        kind, *more = (self.number() for _ in range(words))
        if kind in CODES and not more:
            return self.read(kind)
        if kind == STRUCT:
            self.skip(self.record(more))
            return None
        if kind == STRING and len(more) == 1:
            return self.array(CODES[4], more[0])
        if kind == ARRAY and len(more) == 2 and more[0] in CODES:
            return self.array(CODES[more[0]], more[1])
        if kind == ARRAY and len(more) > 3 and more[0] == STRUCT:
            start, length = self.file.tell(), self.record(more[1:-1])
            self.skip(length * more[-1])
            return Array(start, more[-1], None, None)
        raise self.wrong(f"a value is of the unknown kind {[kind, *more][:8]}")

    def read(self, kind: int) -> Any:
        dtype = np.dtype(self.order + CODES[kind])
        return np.frombuffer(self.bytes(dtype.itemsize), dtype)[0].item()

    def array(self, code: str, count: int) -> Array:
        dtype, start = np.dtype(self.order + code), self.file.tell()
        length = count * dtype.itemsize
        if length <= SHORT:
            return Array(start, count, dtype, self.bytes(length))
        self.skip(length)
        return Array(start, count, dtype, None)

    def record(self, words: list[int]) -> int:
        """Bytes of a record: words are the length of its name, its fields, and two for each."""
        kinds = words[3::2]
        if len(words) < 2 or words[1] != len(kinds) or not all(kind in CODES for kind in kinds):
            raise self.wrong(f"a record is described by {words[:8]}")
        return sum(np.dtype(CODES[kind]).itemsize for kind in kinds)

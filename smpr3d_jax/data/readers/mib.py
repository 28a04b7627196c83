"""Merlin and Medipix: .mib, a header and a frame, again and again, with an .hdr file beside it.

Either file can be opened. The camera software wrote assembled frames (U08, U16, U32), or the chips'
own bits (R64: counters of 1, 6, 12 or 24 bits), which are decoded here for one chip and for four in
a square: they stand side by side as [4|3|2|1] and become [[1, 2], [3, 4]], 3 and 4 turned by 180
degrees. Layout 2x2G has a cross of two pixels between the chips, in which `mask` is False.

**Convention:** the rows of a frame are in the order of the file, as LiberTEM has them, and raw
frames are assembled to that order. rosettasciio turns every frame upside down, and LiberTEM leaves
the cross out of raw frames: a rotation, transposition or centre found with one of them differs.

The scan shape is in the .hdr file if the camera was triggered once a row, else in `scan_shape`. The
frames must be those of the scan, unless `skip` says how many come before it (what follows it is
then left out, with a note) and `flyback` how many follow each row.
"""

import functools
import math
import pathlib
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Integer

from ..counts import InputError
from .binary import complete_records, Records
from .source import layout, Positions, Source


MAGIC = b"MQ1,"
# Four chips have 768 bytes.
HEADER_BYTES = 2**14
CHIP, GAP = 256, 2
STORED = {"U08": ">u1", "U16": ">u2", "U32": ">u4"}
RAW_WORDS = {1: ">u1", 6: ">u1", 12: ">u2", 24: ">u2"}
COUNTS = {1: np.uint8, 6: np.uint8, 12: np.uint16, 24: np.uint32}


class Header(NamedTuple):
    """What stands before a frame: sizes as stored, `depth` in bits and exposure where given."""

    number: int
    length: int
    chips: int
    shape: tuple[int, int]
    kind: str
    layout: str
    counter: str
    depth: int | None
    exposure_s: float | None


def recognises(path: pathlib.Path) -> bool:
    """Whether it begins with the header of a Merlin frame, or is an .hdr file beside frames."""
    with open(path, "rb") as file:
        start = file.read(4)
    return start == MAGIC or (path.suffix.lower() == ".hdr" and start[:3] == b"HDR")


def open_source(
    path: pathlib.Path,
    dataset: str | None = None,
    scan_shape: tuple[int, int] | None = None,
    frame_shape: tuple[int, int] | None = None,
    skip: int | None = None,
    flyback: int = 0,
) -> Source:
    """Describe the frames of a .mib file, or of the one beside an .hdr file.

    `skip` frames come before the scan, `flyback` after each of its rows.

    **Raises:** InputError if a header cannot be understood, frames are missing or more than those
    of the scan without a `skip`, or nothing says the scan shape.
    """
    if dataset is not None:
        raise InputError(f"{path}: a .mib file has one dataset; leave out dataset={dataset!r}.")
    mib, said = _pair(path)
    header = _header(mib, 0)
    depth = header.depth or _whole(said.get("Counter Depth (number)"))
    records, frame, dtype = _records(mib, header, depth)
    frames, rest = complete_records(mib, 0, records.stride)
    if not frames:
        raise InputError(
            f"{mib}: has {rest} bytes, less than one frame of {records.stride} (a header of "
            f"{header.length}, then {header.shape} pixels {header.kind}). Copy it again."
        )
    notes = [f"the last frame is cut short: {rest} bytes are left over"] if rest else []
    notes += _check_headers(mib, header, frames, records.stride)
    scan = _said_shape(said, frames) if scan_shape is None else scan_shape
    numbers = _numbers(mib, frames, scan, skip, flyback, notes)
    scan, frame = layout(str(mib), (math.prod(numbers.scan), *frame), numbers.scan, frame_shape)
    facts = {} if header.exposure_s is None else {"exposure_s": header.exposure_s}
    mask = _mask(header, frame)
    if mask is not None and said.get("Gap Fill Mode", "None").lower() not in ("none", ""):
        notes.append(
            f"counts were spread over the gap between the chips ({said['Gap Fill Mode']}), which "
            "is masked; the pixels along it have lost some of theirs"
        )
    load = functools.partial(_load, records, numbers, _decoder(header, depth))
    return Source(
        mib, "mib", "", scan, frame, dtype, "dense", load, facts, tuple(notes), mask, together=1
    )


def _pair(path: pathlib.Path) -> tuple[pathlib.Path, dict[str, str]]:
    """The .mib file, and what the .hdr file says, from either."""
    if path.suffix.lower() != ".hdr":
        beside = [path.with_suffix(suffix) for suffix in (".hdr", ".HDR")]
        return path, next((_read_hdr(p) for p in beside if p.is_file()), {})
    found = [p for p in sorted(path.parent.iterdir()) if p.suffix.lower() == ".mib"]
    own = [p for p in found if p.stem == path.stem] or [
        p for p in found if p.stem.startswith(path.stem)
    ]
    if len(own) != 1:
        names = ", ".join(p.name for p in own[:8]) or "none"
        raise InputError(
            f"{path}: describes the frames of one .mib file, but {len(own)} have its name: "
            f"{names}. Open one of them, with its `scan_shape`."
        )
    return own[0], _read_hdr(path)


def _read_hdr(path: pathlib.Path) -> dict[str, str]:
    """The lines `key:<tab>value` of an .hdr file."""
    with open(path, "rb") as file:
        text = file.read(2**16).decode("latin-1")
    pairs = (line.partition("\t") for line in text.splitlines())
    return {key.strip().rstrip(":"): value.strip() for key, tab, value in pairs if tab}


def _whole(text: str | None) -> int | None:
    """A whole number above zero, if it is one."""
    text = (text or "").strip()
    return (int(text) or None) if len(text) < 16 and text.isascii() and text.isdecimal() else None


def _header(path: pathlib.Path, start: int) -> Header:
    """The header at a byte of a .mib file.

    **Raises:** InputError if there is none, or it says something that cannot be.
    """
    with open(path, "rb") as file:
        file.seek(start)
        text = file.read(HEADER_BYTES)
    fields = [field.strip(b" \0\r\n") for field in text.split(b",")]
    if not text.startswith(MAGIC) or len(fields) < 8:
        raise InputError(
            f"{path}: byte {start} should begin the header of a frame ('MQ1,'), but has "
            f"{text[:16]!r}. The file may be damaged, or its frames not of one size."
        )
    number, length, chips, width, height = (
        _whole(field.decode("latin-1")) for field in fields[1:6]
    )
    kind, arranged = (field.decode("latin-1") for field in fields[6:8])
    if not (length and chips and width and height and length <= HEADER_BYTES):
        raise InputError(
            f"{path}: the header at byte {start} says {length} bytes of header, {chips} chips and "
            f"{height} × {width} pixels, which cannot be. The file may be damaged: copy it again."
        )
    fields = text[:length].split(b",")
    depth, exposure = None, _seconds(fields[10].decode("latin-1")) if len(fields) > 10 else None
    if b"MQ1A" in fields:
        _, _, nanoseconds, bits, *_ = (
            field.strip(b" \0\r\n").decode("latin-1")
            for field in (*fields[fields.index(b"MQ1A") :], b"", b"", b"")
        )
        depth = _whole(bits)
        exposure = _seconds(nanoseconds.removesuffix("ns"), 1e-9) or exposure
    counter = fields[11].decode("latin-1") if len(fields) > 11 else ""
    return Header(
        number or 0, length, chips, (height, width), kind, arranged, counter, depth, exposure
    )


def _seconds(text: str, unit: float = 1.0) -> float | None:
    try:
        value = float(text) * unit
    except ValueError:
        return None
    return value if math.isfinite(value) and value > 0 else None


def _records(
    path: pathlib.Path, header: Header, depth: int | None
) -> tuple[Records, tuple[int, int], np.dtype]:
    """Where the frames are as stored, and the shape and type of those that are handed over."""
    height, width = header.shape
    if header.kind in STORED:
        dtype = np.dtype(STORED[header.kind])
        stride = header.length + height * width * dtype.itemsize
        records = Records(path, header.length, stride, header.shape, dtype)
        return records, header.shape, dtype.newbyteorder("=")
    if header.kind != "R64" or depth not in RAW_WORDS:
        raise InputError(
            f"{path}: has pixels of kind {header.kind!r}, counters of {depth} bits; known are "
            f"{[*STORED]} and R64 with {[*RAW_WORDS]} bits. Save the frames as U16."
        )
    square = header.chips == 4 and header.layout in ("2x2", "2x2G")
    across = header.chips * height
    doubled = depth == 24 and width == 2 * across
    if not (square or header.chips == 1) or height % 64 or not (width == across or doubled):
        raise InputError(
            f"{path}: raw frames (R64, {depth} bits) of {header.chips} chips, layout "
            f"{header.layout!r}, stored as {header.shape}, cannot be assembled; known are one chip "
            "and four as 2x2 or 2x2G. Save the frames as U16."
        )
    dtype = np.dtype(RAW_WORDS[depth])
    stored = {1: (height, across // 8), 24: (2, height, across)}.get(depth, (height, across))
    stride = header.length + math.prod(stored) * dtype.itemsize
    side = height if not square else 2 * height + (GAP if header.layout == "2x2G" else 0)
    records = Records(path, header.length, stride, stored, dtype)
    return records, (side, side), np.dtype(COUNTS[depth])


def _check_headers(path: pathlib.Path, first: Header, frames: int, stride: int) -> list[str]:
    """What the headers of the second and of the last frame tell.

    **Raises:** InputError if there is no header, or it announces a frame of other size.
    """
    notes, other = [], first
    for frame in sorted({min(1, frames - 1), frames - 1}):
        other = _header(path, frame * stride)
        if (other.length, other.shape, other.kind) != (first.length, first.shape, first.kind):
            raise InputError(
                f"{path}: frame {frame} is {other.shape} {other.kind}, the first {first.shape} "
                f"{first.kind}; the frames of a scan are alike. The file may be damaged."
            )
        if frame == 1 and other.counter != first.counter:
            notes.append("frames alternate between two counters, which have other thresholds")
    # The counters' numbers are repeated, and a camera may be told to begin anywhere.
    seen = other.number - first.number + 1
    if not notes and seen != frames:
        notes.append(f"frames are numbered {first.number} to {other.number}, but are {frames}")
    return notes


def _said_shape(said: dict[str, str], frames: int) -> tuple[int, int] | None:
    """The scan shape of an .hdr file, None if it has none."""
    slow, fast = (_whole(said.get(key)) for key in ("ScanY", "ScanX"))
    if slow and fast:
        return slow, fast
    whole = _whole(said.get("Frames in Acquisition (Number)"))
    row = _whole(said.get("Frames per Trigger (Number)"))
    # One frame a trigger, or all of them, says nothing of rows.
    if not whole or not row or row in (1, whole) or whole % row:
        return None
    return whole // row, row


class _Numbers(NamedTuple):
    """Which frame of the file belongs to a position of the scan."""

    scan: tuple[int, int]
    skip: int
    flyback: int

    def __call__(self, positions: Positions) -> Positions:
        return self.skip + positions + positions // self.scan[1] * self.flyback


def _numbers(
    path: pathlib.Path,
    frames: int,
    scan_shape: tuple[int, int] | None,
    skip: int | None,
    flyback: int,
    notes: list[str],
) -> _Numbers:
    """Lay the scan over the frames.

    **Raises:** InputError if it is not known, or does not fit.
    """
    if scan_shape is None:
        raise InputError(
            f"{path}: has {frames} frames, and no .hdr file beside it says its scan shape. Give "
            f"`scan_shape` (slow, fast), whose product is {frames}, or less with `skip`."
        )
    slow, fast = (int(n) for n in scan_shape)
    first = 0 if skip is None else int(skip)
    if min(slow, fast) < 1 or min(first, flyback) < 0:
        raise InputError(
            f"{path}: scan_shape={(slow, fast)}, skip={skip}, flyback={flyback} cannot be; the "
            "shape needs numbers above zero, the others none below."
        )
    end = first + slow * fast + (slow - 1) * flyback
    # The last row need not be followed by the frames of its flyback.
    over = frames - end
    if over < 0 or (skip is None and over not in (0, flyback)):
        asks = f"a scan of {slow} × {fast}" + (f" and {flyback} more a row" if flyback else "")
        asks += f" after {first}" if first else ""
        raise InputError(
            f"{path}: has {frames} frames, but {asks} takes {end}. "
            + (
                f"Give the `scan_shape` of the rows that are complete, at most "
                f"{max(0, frames - first) // (fast + flyback)}, and skip={first}."
                if over < 0
                else f"Say with `skip` how many of the {over} others come before the scan (skip=0: "
                "all after it), or with `flyback` how many follow each row."
            )
        )
    if first or over > flyback:
        notes.append(f"{first} frames before the scan and {over} after it are left out")
    return _Numbers((slow, fast), first, int(flyback))


def _mask(header: Header, frame: tuple[int, int]) -> Bool[np.ndarray, "ky kx"] | None:
    """False in the gaps between the chips, if the layout has them."""
    if not header.layout.endswith("G"):
        return None
    mask = np.ones(frame, bool)
    chip = header.shape[0] if header.kind == "R64" else CHIP
    for axis, size in enumerate(frame):
        chips = size // chip
        gap = (size - chips * chip) // max(1, chips - 1)
        if 0 < gap < 16 and chips * chip + (chips - 1) * gap == size:
            within = np.arange(size) % (chip + gap) < chip
            mask &= within[:, None] if axis == 0 else within
    return None if mask.all() else mask


def _load(records: Records, numbers: _Numbers, decode, positions: Positions):
    found = records(numbers(positions))
    return found if decode is None else decode(found)


def _decoder(header: Header, depth: int | None):
    """How frames as stored become frames; None where they are the same."""
    if header.kind in STORED:
        return None
    assemble = None
    if header.chips == 4:
        assemble = functools.partial(_square, gap=GAP if header.layout == "2x2G" else 0)

    def decode(stored):
        counts = _counts(stored, depth)
        return counts if assemble is None else assemble(counts)

    return decode


def _counts(
    stored: Integer[np.ndarray, "frames ..."], depth: int | None
) -> Integer[np.ndarray, "frames rows columns"]:
    """The counters of the chips: their 64-bit words begin with the last pixel."""
    words = stored.reshape(*stored.shape[:-1], -1, 8 // stored.itemsize)[..., ::-1]
    if depth == 1:
        words = np.unpackbits(words, axis=-1, bitorder="little")
    counts = words.reshape(*stored.shape[:-1], -1)
    if depth == 24:
        high, low = counts[:, 0].astype(np.uint32), counts[:, 1]
        return (high << 12) | low
    return np.ascontiguousarray(counts)


def _square(
    counts: Integer[np.ndarray, "frames rows columns"], gap: int
) -> Integer[np.ndarray, "frames side side"]:
    """Four chips side by side put into a square."""
    n, rows, _ = counts.shape
    side = 2 * rows + gap
    found = np.zeros((n, side, side), counts.dtype)
    four, three, two, one = (counts[:, :, i * rows : (i + 1) * rows] for i in range(4))
    found[:, :rows, :rows], found[:, :rows, -rows:] = one, two
    found[:, -rows:, :rows], found[:, -rows:, -rows:] = three[:, ::-1, ::-1], four[:, ::-1, ::-1]
    return found

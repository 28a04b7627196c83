"""From one format to another, cropped and binned on the way, a part of the scan at a time.

No electron is lost or made: counts stay whole, types grow where sums need it, and what would need
another number is refused. Dense frames become events only if all their counts are whole.
"""

import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Int

from ..data.counts import Frames, InputError, window
from ..data.electrons import add_groups, bin_detector, crop, wide_enough
from ..data.events import event_rows, EventRows, merge, to_frames
from ..data.readers import dense, emd, raw_csr, stempy
from ..data.readers.source import kept_facts, NUMBERS, PAIRS, Source


EVERY = (*PAIRS, *NUMBERS, "transpose")
"""Names of all facts."""


class Target(NamedTuple):
    """A format that is written: what it holds, how, its file names' ending, and which facts."""

    kind: Literal["dense", "events"]
    writing: Callable[..., Any]
    ending: str
    facts: tuple[str, ...] = EVERY


UNKNOWN_TO_EMD = "counts_per_electron", "defocus_A", "exposure_s"
TARGETS: dict[str, Target] = {
    "emd": Target("dense", emd.writing, ".emd", tuple(f for f in EVERY if f not in UNKNOWN_TO_EMD)),
    "stempy": Target("events", stempy.writing, ".h5"),
    "raw_csr": Target("events", raw_csr.writing, ".toml"),
    "npy": Target("dense", dense.writing_npy, ".npy", ()),
    "hdf5": Target("dense", dense.writing_hdf5, ".hdf5"),
    "zarr": Target("dense", dense.writing_zarr, ".zarr"),
}
"""Every format that `convert` writes."""
# Memory that a part of the scan may take as it is read or written.
PART_BYTES = 2**25
MOST_AT_ONCE = 4
# A pixel of a frame that is searched for electrons takes eight times one byte.
SEARCHED = 8


@dataclasses.dataclass(frozen=True)
class Changes:
    """What is done on the way, in this order.

    `scan_window` (first row, last row + 1, first column, last column + 1) of the scan, `crop` to
    (ky, kx) pixels around the pixel `center` (y, x), default n//2, sums of `bin` × `bin` pixels,
    and sums of `scan_bin` × `scan_bin` positions.
    """

    scan_window: tuple[int, int, int, int] | None = None
    crop: tuple[int, int] | None = None
    center: tuple[int, int] | None = None
    bin: int = 1
    scan_bin: int = 1


@dataclasses.dataclass(frozen=True)
class Converted:
    """What was written, and what the user should know of it."""

    path: pathlib.Path
    format: str
    scan_shape: tuple[int, int]
    frame_shape: tuple[int, int]
    facts: dict[str, Any]
    notes: tuple[str, ...]


def convert(
    source: Source,
    path: str | os.PathLike,
    to: str | None = None,
    changes: Changes | None = None,
    force: bool = False,
    progress: Callable[[float], None] = lambda fraction: None,
) -> Converted:
    """Write what `source` reads to `path` in the format `to`, default the one that the name says.

    `progress` is told the fraction that is done. What is at `path` is replaced only by a complete
    file, and only with `force`.

    **Raises:** InputError if the format is not known or cannot hold the counts, the changes do not
    fit, or there is something at `path`.
    """
    path, changes = pathlib.Path(path), changes or Changes()
    name = _format(path, to)
    _check_free(path, source, force)
    target, plan = TARGETS[name], _plan(source, changes)
    facts = _changed_facts(plan)
    begun, largest, dtype = 0.0, 0, np.dtype(np.uint8)
    if name == "stempy" or (target.kind == "dense" and source.kind == "events"):
        largest = max(map(_largest, _told(plan, "events", progress, 0.0, 0.5)))
        begun, dtype = 0.5, np.min_scalar_type(largest)
    elif target.kind == "dense":
        stored = np.dtype(np.uint8) if source.dtype.kind == "b" else source.dtype
        dtype = wide_enough(stored.newbyteorder("="), changes.bin**2 * changes.scan_bin**2)
    how = (largest,) if name == "stempy" else (dtype,) if target.kind == "dense" else ()
    with target.writing(path, plan.scan_shape, plan.frame_shape, *how, facts) as append:
        for counts in _told(plan, target.kind, progress, begun, 1.0):
            append(_rows(counts, source) if target.kind == "events" else _frames(counts, dtype))
    kept = {fact: value for fact, value in facts.items() if fact in target.facts}
    notes = (*source.notes, *_lost(source, name, set(facts) - set(kept)))
    return Converted(path, name, plan.scan_shape, plan.frame_shape, kept, notes)


def _format(path: pathlib.Path, to: str | None) -> str:
    if to is None:
        for name, target in TARGETS.items():
            if path.suffix.lower() == target.ending:
                return name
        endings = ", ".join(f"{t.ending} ({name})" for name, t in TARGETS.items())
        raise InputError(f"{path}: the ending says no format; known are {endings}, or say which.")
    if to not in TARGETS:
        raise InputError(f"{path}: {to!r} is no format to write; known are {', '.join(TARGETS)}.")
    return to


def _check_free(path: pathlib.Path, source: Source, force: bool) -> None:
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}; make it first.")
    if path.resolve() == source.path.resolve():
        raise InputError(f"{path} is what is read; give the result another name.")
    if path.exists() and not force:
        raise InputError(f"{path} exists; give another name, or replace it with --force.")
    if path.is_dir() and not (path / "zarr.json").exists():
        raise InputError(f"{path} is a folder; give the name of a file.")


@dataclasses.dataclass(frozen=True)
class _Plan:
    """Which positions of the source make a position of the result, and which pixels a frame."""

    source: Source
    changes: Changes
    parents: Int[np.ndarray, "frames each"]
    scan_shape: tuple[int, int]
    frame_shape: tuple[int, int]
    corner: tuple[int, int]

    def parts(self, to: Literal["dense", "events"]) -> Iterator[tuple[float, Frames | EventRows]]:
        """The counts of the result in parts, and the fraction that is done after each."""
        each = self.parents.shape[1]
        pixels = math.prod(self.source.frame_shape)
        room = each * (self.source.frame_bytes or pixels * self.source.dtype.itemsize)
        if to == "events" and self.source.kind == "dense":
            room = each * pixels * SEARCHED
        if to == "dense":
            room = max(room, math.prod(self.frame_shape) * SEARCHED)
        step, piece = max(1, int(PART_BYTES / room)), self.scan_shape[1]
        if self.source.together and len(self.parents) == len(self.source):
            stored = self.source.together
            piece = stored if isinstance(stored, int) else stored.consecutive
            # Frames that are stored together are read together, if they are not far too many.
            step = max(step, min(piece, MOST_AT_ONCE * step))
        step -= step % piece if step > piece else 0
        for start in range(0, len(self.parents), step):
            some = self.parents[start : start + step]
            yield (start + len(some)) / len(self.parents), self.counts(some)

    def counts(self, parents: Int[np.ndarray, "frames each"]) -> Frames | EventRows:
        """The changed counts at some positions of the result."""
        counts = self.source.host(parents.ravel())
        changes = self.changes
        if changes.crop is not None or changes.center is not None:
            counts = crop(counts, changes.crop, changes.center)
        return add_groups(bin_detector(counts, changes.bin), parents.shape[1])


def _plan(source: Source, changes: Changes) -> _Plan:
    """The plan, once it is clear that it can be carried out."""
    rows, columns = source.scan_shape
    top, bottom, left, right = changes.scan_window or (0, rows, 0, columns)
    if not (0 <= top < bottom <= rows and 0 <= left < right <= columns):
        raise InputError(
            f"{source}: rows {top} to {bottom} and columns {left} to {right} are not in the scan "
            f"of {rows} × {columns} positions."
        )
    positions = np.arange(len(source)).reshape(rows, columns)[top:bottom, left:right]
    try:
        y, x = window(source.frame_shape, changes.crop, changes.center)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error
    frame = _binned(source, "frames", (y.stop - y.start, x.stop - x.start), changes.bin)
    scan = _binned(source, "scan", (bottom - top, right - left), changes.scan_bin)
    n = changes.scan_bin
    blocks = positions.reshape(scan[0], n, scan[1], n).swapaxes(1, 2)
    return _Plan(source, changes, blocks.reshape(-1, n * n), scan, frame, (y.start, x.start))


def _binned(source: Source, what: str, sizes: tuple[int, int], n: int) -> tuple[int, int]:
    if n < 1 or sizes[0] % n or sizes[1] % n:
        fit = " × ".join(str(size - size % max(n, 1)) for size in sizes)
        raise InputError(
            f"{source}: the {what} of {sizes[0]} × {sizes[1]} cannot be binned by {n}; give a "
            f"whole number above 0, and crop to {fit} first."
        )
    return sizes[0] // n, sizes[1] // n


def _told(
    plan: _Plan,
    to: Literal["dense", "events"],
    progress: Callable[[float], None],
    begun: float,
    end: float,
) -> Iterator[Frames | EventRows]:
    """The parts of a plan, telling after each how much is done."""
    for done, counts in plan.parts(to):
        yield counts
        progress(begun + (end - begun) * done)


def _largest(counts: Frames | EventRows) -> int:
    """The largest count."""
    if isinstance(counts, Frames):
        return math.ceil(np.asarray(counts.values).max(initial=0))
    return int(np.asarray(merge(counts).multiplicity).max(initial=0))


def _rows(counts: Frames | EventRows, source: Source) -> EventRows:
    try:
        return counts if isinstance(counts, EventRows) else event_rows(counts)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def _frames(counts: Frames | EventRows, dtype: np.dtype) -> np.ndarray:
    frames = counts if isinstance(counts, Frames) else to_frames(counts, dtype)
    return np.asarray(frames.values).astype(dtype, copy=False)


def _changed_facts(plan: _Plan) -> dict[str, Any]:
    """The facts as they are after the changes."""
    facts, n, m = kept_facts(plan.source.facts), plan.changes.bin, plan.changes.scan_bin
    factors = {
        "scan_step_A": m,
        "detector_pixel_mrad": n,
        "detector_pixel_inv_A": n,
        "semiangle_pixels": 1 / n,
        "exposure_s": m**2,
    }
    for name, factor in factors.items():
        if name in facts:
            value = facts[name]
            pair = isinstance(value, tuple)
            facts[name] = tuple(v * factor for v in value) if pair else value * factor
    if "center" in facts:
        y, x = (
            (at - start - (n - 1) / 2) / n
            for at, start in zip(facts["center"], plan.corner, strict=True)
        )
        facts["center"] = (y, x)
    return facts


def _lost(source: Source, name: str, facts: set[str]) -> Iterator[str]:
    """What the format has no place for."""
    if facts:
        yield f"{name} has no place for {', '.join(sorted(facts))}: note them down"
    if source.mask is not None and not source.mask.all():
        bad = source.mask.size - np.count_nonzero(source.mask)
        yield f"{bad} pixels that {source.format} declares unusable are written like the others"

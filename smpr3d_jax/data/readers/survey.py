"""What is in a scan, read once and in blocks, before anything long is begun with it."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from ..counts import InputError
from ..electrons import sum_frames
from ..events import EventRows, merge
from .source import FAULTS, faults, Source, UNUSABLE


@dataclasses.dataclass(frozen=True)
class Survey:
    """Electrons of each frame, the sum of all frames, the largest count, and the faulty frames.

    `faulty` says for each kind of fault which frames have it; `pattern` has the zero frequency
    where the file has it.
    """

    electrons: Float[np.ndarray, " frames"]
    pattern: Float[np.ndarray, "ky kx"]
    largest: float
    faulty: dict[str, Bool[np.ndarray, " frames"]]


def survey(source: Source) -> Survey:
    """Look at every count of a source once, a block at a time.

    **Raises:** InputError for an event outside the frame.
    """
    ky, kx = source.frame_shape
    pattern, largest = np.zeros(ky * kx), 0.0
    electrons = np.zeros(len(source))
    faulty = {name: np.zeros(len(source), bool) for name in FAULTS}
    for positions in source.blocks():
        counts = source.usable(positions)
        if isinstance(counts, EventRows):
            per_frame, times = np.asarray(counts.total()), np.asarray(merge(counts).multiplicity)
            found = {"empty": per_frame == 0}
            pattern += sum_frames(counts).ravel()
        else:
            data = np.asarray(counts.values)
            found = faults(data)
            finite = np.nan_to_num(data, posinf=0, neginf=0) if data.dtype.kind == "f" else data
            per_frame, times = finite.sum(axis=(1, 2), dtype=float), finite
            pattern += finite.sum(axis=0, dtype=float).ravel()
        largest = max(largest, float(times.max(initial=0)))
        electrons[positions] = per_frame
        for name, frames in found.items():
            faulty[name][positions] = frames
    return Survey(electrons, pattern.reshape(ky, kx), largest, faulty)


def check_counts(
    source: Source, allow_empty: bool = False, seen: Survey | None = None
) -> tuple[str, ...]:
    """Refuse a scan whose counts cannot be used; say what else deserves a second look.

    Frames without a count are taken where noise explains them: at the mean of the others at least
    a thousandth of such a frame is to be expected in the scan. `seen` is the scan's survey, where
    there is one already.

    **Raises:** InputError for counts that are negative or not a number, events outside the frame,
    and empty frames that noise does not explain, unless `allow_empty` (a scan without any electron
    is refused always).
    """
    seen = seen or survey(source)
    empty = seen.faulty["empty"]
    allowed = not empty.all() and (allow_empty or _expected_empty(seen) > 1e-3)
    for what in (*UNUSABLE, *(() if allowed else ("empty",))):
        source.complain(what, np.flatnonzero(seen.faulty[what]))
    return _remarks(seen)


def _expected_empty(seen: Survey) -> float:
    """How many frames Poisson noise leaves empty at the mean dose of those that are not."""
    hit = seen.electrons[~seen.faulty["empty"]]
    return len(seen.electrons) * math.exp(-float(hit.mean())) if len(hit) else 0.0


def _remarks(seen: Survey) -> tuple[str, ...]:
    counts = {what: int(np.count_nonzero(rows)) for what, rows in seen.faulty.items()}
    return tuple(
        f"{n} of {len(seen.electrons)} frames {FAULTS[what]}, the first is frame "
        f"{int(np.argmax(seen.faulty[what]))}"
        for what, n in counts.items()
        if n
    )


def describe(source: Source) -> dict[str, Any]:
    """What a file says and what its counts look like, as plain numbers and words.

    `center_of_mass` (y, x) is that of the sum of all frames, in pixels from index 0.

    **Raises:** InputError for an event outside the frame.
    """
    seen = survey(source)
    total = float(seen.electrons.sum())
    rows, columns = (np.arange(n) for n in source.frame_shape)
    center = None
    if total > 0:
        center = (
            float(rows @ seen.pattern.sum(axis=1) / total),
            float(columns @ seen.pattern.sum(axis=0) / total),
        )
    return {
        "path": str(source.path),
        "format": source.format,
        "dataset": source.dataset,
        "kind": source.kind,
        "scan_shape": source.scan_shape,
        "frame_shape": source.frame_shape,
        "dtype": str(source.dtype),
        "facts": dict(source.facts),
        "total_counts": total,
        "mean_electrons_per_frame": total / len(source),
        "fewest_and_most_in_a_frame": (float(seen.electrons.min()), float(seen.electrons.max())),
        "largest_count": seen.largest,
        "empty_frames": int(np.count_nonzero(seen.faulty["empty"])),
        "center_of_mass": center,
        "notes": (*source.notes, *_remarks(seen)),
    }


def check_series(sources: Sequence[Source], same_raster: bool = True) -> tuple[str, ...]:
    """Refuse scans that cannot be one series; say where they differ otherwise.

    All need one frame shape and, as far as the files say, one detector sampling and energy; with
    `same_raster` also one scan shape.

    **Raises:** InputError naming the first scan that differs from the first.
    """
    if not sources:
        raise InputError("A series needs at least one scan; none was given.")
    first = sources[0]
    notes = []
    for other in sources[1:]:
        for name in ("frame_shape", "scan_shape") if same_raster else ("frame_shape",):
            if getattr(other, name) != getattr(first, name):
                raise InputError(
                    f"{other.path}: {name} is {getattr(other, name)}, but that of {first.path} is "
                    f"{getattr(first, name)}; the scans of a series need the same. Crop the larger "
                    "one, or give a hint if the file was read with the wrong shape."
                )
        for fact in ("detector_pixel_mrad", "detector_pixel_inv_A", "energy_ev", "scan_step_A"):
            if fact in first.facts and fact in other.facts:
                a, b = (np.ravel(s.facts[fact]) for s in (first, other))
                if all(math.isclose(x, y, rel_tol=1e-3) for x, y in zip(a, b, strict=True)):
                    continue
                there, here = other.facts[fact], first.facts[fact]
                said = f"{other.path}: {fact} is {there}, in {first.path} it is {here}"
                if fact != "scan_step_A":
                    raise InputError(
                        f"{said}; the scans of a series share one camera length and energy. "
                        "Correct the wrong file, or leave the scan out."
                    )
                notes.append(said)
    return tuple(notes)

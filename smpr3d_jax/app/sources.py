"""The data files of an experiment, opened, with what it says about their pixels applied."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..data.alignment import Descan
from ..data.counts import InputError
from ..data.pixels import BadPixels
from ..data.readers import common_mask, read, read_mask, Source, with_mask
from ..data.readers.steps import descanned, in_electrons, through_window, without_bad_pixels
from ..inverse.design import Finding
from .experiment import Experiment, where
from .schema import ScanEntry


MOST = 0.5
"""A mask that leaves out more than this part of all pixels is questioned."""


def open_sources(experiment: Experiment) -> tuple[Source, ...]:
    """The scans' files, described and not yet read.

    **Raises:** InputError for a file that cannot be read.
    """
    return tuple(read(scan.file, **_hints(scan)) for scan in experiment.scans)


def _hints(scan: ScanEntry) -> dict[str, Any]:
    hints = {"dataset": scan.dataset, "scan_shape": scan.scan_shape}
    return {name: value for name, value in hints.items() if value is not None}


def preprocessed(
    experiment: Experiment, sources: Sequence[Source]
) -> tuple[tuple[Source, ...], list[str]]:
    """The sources as the experiment wants them, and what was found on the way.

    In this order: the mask, electrons, bad pixels, descan, crop and bin. Bad pixels and descan look
    at whole scans; bad pixels of one scan are bad in all.

    **Raises:** InputError for what cannot be done to these frames.
    """
    how, sources, notes = experiment.preprocess, tuple(sources), []
    if (file := experiment.geometry.mask) is not None:
        mask = read_mask(file, sources[0].frame_shape)
        sources = tuple(with_mask(source, mask) for source in sources)
    notes += [_integrating(experiment, source) for source in sources]
    if (counts := how.counts_per_electron) is not None:
        with _blaming(experiment, "preprocess.counts_per_electron"):
            sources = tuple(in_electrons(source, counts) for source in sources)
    if how.bad_pixels:
        found = [without_bad_pixels(source) for source in sources]
        notes += [_bad(source, bad) for source, bad in found]
        common = np.all([bad.mask for _, bad in found], axis=0)
        if not common.all():
            sources = tuple(with_mask(source, common) for source in sources)
    if (order := how.descan) is not None:
        center, radius = _disc(experiment, sources[0].frame_shape)
        with _blaming(experiment, "preprocess.descan"):
            moved = [descanned(source, order, center, radius) for source in sources]
        notes += [_wandering(source, descan) for source, descan in moved]
        sources = tuple(source for source, _ in moved)
    if windowed(experiment):
        given = experiment.geometry.center
        center = None if given is None else (round(given[0]), round(given[1]))
        with _blaming(experiment, "preprocess.crop" if how.crop else "preprocess.bin"):
            sources = tuple(through_window(source, center, how.crop, how.bin) for source in sources)
    return sources, [note for note in notes if note]


@contextlib.contextmanager
def _blaming(experiment: Experiment, key: str) -> Iterator[None]:
    """Say which key asked for what cannot be done."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{where(experiment, key)}: {error}") from error


def _integrating(experiment: Experiment, source: Source) -> str:
    """A word where the file's idea of an electron is not what is used."""
    said, used = source.facts.get("counts_per_electron"), experiment.preprocess.counts_per_electron
    if said is None or abs(said / (used or 1.0) - 1) < 0.01:
        return ""
    key = where(experiment, "preprocess.counts_per_electron")
    if used is None:
        return f"{key}: {source.path.name} says {said:.4g}, not used unless it is written here"
    return f"{key} = {used:.4g} is used, not {said:.4g} as in {source.path.name}"


def _bad(source: Source, bad: BadPixels) -> str:
    number = [np.count_nonzero(part) for part in (bad.hot, bad.dead, bad.flickering)]
    if not any(number):
        return ""
    hot, dead, flickering = number
    return f"{source.path.name}: {hot} hot, {dead} dead, {flickering} flickering pixels are masked"


def _wandering(source: Source, descan: Descan) -> str:
    y, x = np.ptp(descan.centers, axis=0)
    moved = "undone by whole pixels" if descan.shifts.any() else "too little to be undone"
    return f"{source.path.name}: the pattern wanders by {y:.2f}, {x:.2f} pixels (y, x), {moved}"


def windowed(experiment: Experiment) -> bool:
    """Whether frames are cropped or binned, and the zero frequency then at index n//2."""
    return experiment.preprocess.crop is not None or experiment.preprocess.bin > 1


def detector_pixel(experiment: Experiment) -> float:
    """Angle (mrad) of a pixel of the preprocessed frames."""
    assert experiment.geometry.detector_pixel_mrad  # by `merge_facts`
    return experiment.geometry.detector_pixel_mrad * experiment.preprocess.bin


def detector_center(experiment: Experiment, shape: tuple[int, int]) -> tuple[float, float] | None:
    """Where the zero frequency lies in preprocessed frames of `shape`, in pixels; None: at n//2.

    Boxes of pixels are seldom centred on one, so that binning brings a fraction.
    """
    given, factor = experiment.geometry.center, experiment.preprocess.bin
    if not windowed(experiment):
        return given
    rest = [c - round(c) for c in given or (0.0, 0.0)]
    y, x = (
        (r + factor * n // 2 - (factor - 1) / 2) / factor for r, n in zip(rest, shape, strict=True)
    )
    return y, x


def detector_offset(experiment: Experiment, shape: tuple[int, int]) -> tuple[float, float]:
    """What is left when the pixel of the zero frequency has been brought to the corner."""
    center = detector_center(experiment, shape)
    if center is None:
        return 0.0, 0.0
    whole = [n // 2 for n in shape] if windowed(experiment) else [round(c) for c in center]
    return center[0] - whole[0], center[1] - whole[1]


def _disc(experiment: Experiment, shape: tuple[int, int]) -> tuple[tuple[float, float], float]:
    """Centre and radius (pixels) of the bright-field disc in the frames of the files."""
    geometry = experiment.geometry
    assert experiment.beam.semiangle_mrad and geometry.detector_pixel_mrad  # by `merge_facts`
    center = geometry.center or (float(shape[0] // 2), float(shape[1] // 2))
    return center, experiment.beam.semiangle_mrad / geometry.detector_pixel_mrad


def mask_findings(experiment: Experiment, sources: Sequence[Source]) -> list[Finding]:
    """What the mask leaves out of the frames and of the bright-field disc."""
    mask = common_mask(sources)
    if mask is None:
        return []
    key, half = "geometry.mask", (mask.shape[0] // 2, mask.shape[1] // 2)
    center = detector_center(experiment, (mask.shape[0], mask.shape[1])) or half
    y, x = (np.arange(n) - c for n, c in zip(mask.shape, center, strict=True))
    assert experiment.beam.semiangle_mrad  # by `merge_facts`
    disc = np.hypot(y[:, None], x) <= experiment.beam.semiangle_mrad / detector_pixel(experiment)
    out, inside = int(np.count_nonzero(~mask)), int(np.count_nonzero(disc & ~mask))
    said = f"{out} of {mask.size} pixels are left out"
    said += f", {inside} of the {np.count_nonzero(disc)} in the bright-field disc" * bool(inside)
    if out > MOST * mask.size:
        said += "; a mask is 1 where a pixel is good: is it inverted?"
        return [Finding("error", key, said)]
    if inside > MOST * np.count_nonzero(disc):
        said += "; too few are left to tell the dose from"
        return [Finding("error", key, said)]
    return [Finding("warning", key, said)]

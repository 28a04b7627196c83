"""The data files of an experiment, opened, with what it says about their pixels applied."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..data.readers import common_mask, read, read_mask, Source, with_mask
from ..inverse.design import Finding
from .experiment import Experiment
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


def preprocessed(experiment: Experiment, sources: Sequence[Source]) -> tuple[Source, ...]:
    """The sources as the experiment wants them; nothing is computed before they are read.

    **Raises:** InputError for a mask that does not belong to the frames.
    """
    sources = tuple(sources)
    if (file := experiment.geometry.mask) is not None:
        mask = read_mask(file, sources[0].frame_shape)
        sources = tuple(with_mask(source, mask) for source in sources)
    return sources


def mask_findings(experiment: Experiment, sources: Sequence[Source]) -> list[Finding]:
    """What the mask leaves out of the frames and of the bright-field disc."""
    mask, geometry = common_mask(sources), experiment.geometry
    if mask is None:
        return []
    key, half = "geometry.mask", [n // 2 for n in mask.shape]
    y, x = (np.arange(n) - c for n, c in zip(mask.shape, geometry.center or half, strict=True))
    assert experiment.beam.semiangle_mrad and geometry.detector_pixel_mrad  # by `merge_facts`
    radius = experiment.beam.semiangle_mrad / geometry.detector_pixel_mrad
    disc = np.hypot(y[:, None], x[None, :]) <= radius
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

"""From data files and a rough idea of the settings to an experiment that `run` takes.

Stages: what the files say, what an electron is worth, the disc, one pass for the signals, the scan
step where a lattice is known, the rotation from the curl, the lens from the bright-field images,
the displacements as a check, and the experiment that follows.
Lengths Å, angles mrad, energies eV.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from ..data.calibration import (
    Disc,
    find_disc,
    find_orientation,
    fit_lens,
    fit_shifts,
    gather_signals,
    LensFit,
    measure_shifts,
    Orientation,
    overlaps,
    ShiftFit,
    Shifts,
    Signals,
)
from ..data.counts import InputError
from ..data.readers import check_series, read, Source, Survey, survey
from ..physics.optics import polar, wavelength
from .calibration_notes import about_discs, about_lens
from .calibration_steps import Electrons, electrons_of, Step, step_of
from .experiment import Experiment, from_mapping


SIGNIFICANT = 3.0
"""Standard errors from which on an aberration is written into the experiment."""
SHIFTED = 4.0
"""λ/α² of defocus from which on the images are displaced enough to be aligned."""


@dataclasses.dataclass(frozen=True)
class Known:
    """What the user, or else the files, say: `pixel` and `semiangle` may be missing, not both.

    `scan_step` is not a number until it has been measured, where nobody says it.
    """

    energy: float
    scan_step: tuple[float, float]
    semiangle: float | None
    pixel: float | None
    rotation: float | None = None
    transpose: bool | None = None
    defoci: tuple[float, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Everything that was measured, and the experiment that follows from it.

    `sources` are in electrons, if `electrons` says so; `step` is None unless it was measured.
    `title` and `hints` (those of `read`) are for the experiment file.
    """

    sources: tuple[Source, ...]
    surveys: tuple[Survey, ...]
    known: Known
    discs: tuple[Disc, ...]
    pixel: float
    semiangle: float
    signals: tuple[Signals, ...]
    orientations: tuple[Orientation, ...]
    lens: LensFit
    shifts: tuple[tuple[Shifts, ShiftFit] | None, ...]
    defoci: tuple[float, ...]
    aberrations: dict[str, float]
    notes: tuple[str, ...]
    electrons: Electrons
    step: Step | None = None
    title: str = ""
    hints: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def center(self) -> tuple[float, float]:
        """Of the disc, the mean of all scans, in pixels."""
        y, x = np.mean([disc.center for disc in self.discs], axis=0)
        return float(y), float(x)

    @property
    def dose(self) -> tuple[float, float]:
        """Counts of a mean frame, of all scans, and its standard error."""
        each = np.concatenate([seen.electrons for seen in self.surveys])
        return float(each.mean()), float(each.std() / math.sqrt(len(each)))

    @property
    def dose_per_area(self) -> tuple[float, float]:
        """Counts per Å² of a scan, and its standard error: that of the dose and of the step."""
        (dose, error), area = self.dose, math.prod(self.known.scan_step)
        parts = [error / max(dose, 1e-30)]
        if self.step is not None:
            parts += [s / d for s, d in zip(self.step.sigma, self.step.step, strict=True)]
        return dose / area, dose / area * math.hypot(*parts)

    @property
    def content(self) -> dict[str, Any]:
        """What an experiment file says of it, in nested dictionaries."""
        step = [_short(d) for d in self.known.scan_step]
        extra: dict[str, Any] = {}
        if self.electrons.divided_by is not None:
            extra["preprocess"] = {"counts_per_electron": _short(self.electrons.divided_by)}
        if not self.electrons.sure and not self.electrons.charge.whole:
            extra["method"] = {"loss": "amplitude"}
        return {
            "title": self.title or self.sources[0].path.stem,
            "beam": {
                "energy_ev": self.known.energy,
                "semiangle_mrad": _short(self.semiangle),
                "aberrations": {name: _short(value) for name, value in self.aberrations.items()},
            },
            "scans": _scans(self),
            "geometry": {
                "scan_step": step[0] if step[0] == step[1] else step,
                "rotation_deg": _short(math.degrees(float(self.lens.lens.rotation)) % 360),
                "transpose": bool(self.lens.transpose),
                "detector_pixel_mrad": _short(self.pixel, 6),
                "center": [_short(c) for c in self.center],
            },
        } | extra

    @property
    def experiment(self) -> Experiment:
        """The experiment with everything that was found."""
        return from_mapping(self.content, source="calibration")


def _scans(found: Calibration) -> list[dict[str, Any]]:
    """The scans of the experiment; a drift that does not stand out of its error is none."""
    shifts = (np.asarray(of.shift, float) for of in (found.lens.lens, found.lens.sigma))
    hints = {name: found.hints[name] for name in ("dataset", "scan_shape") if name in found.hints}
    scans = []
    for source, defocus, moved, sigma in zip(found.sources, found.defoci, *shifts, strict=True):
        scan: dict[str, Any] = {"file": str(source.path.resolve()), "defocus": _short(defocus)}
        if len(found.sources) > 1 and math.hypot(*moved) > SIGNIFICANT * math.hypot(*sigma):
            scan["shift"] = [_short(moved[0]), _short(moved[1])]
        plain = {name: list(v) if isinstance(v, tuple) else v for name, v in hints.items()}
        scans.append(scan | plain)
    return scans


def calibrate(
    files: Sequence[str | pathlib.Path],
    *,
    energy: float | int | None = None,
    semiangle: float | int | None = None,
    scan_step: float | int | tuple[float, float] | None = None,
    lattice: float | int | None = None,
    detector_pixel: float | int | None = None,
    counts_per_electron: float | int | None = None,
    defoci: Sequence[float | int] | None = None,
    rotation_deg: float | int | None = None,
    transpose: bool | None = None,
    order: int = 1,
    title: str | None = None,
    hints: Mapping[str, Any] | None = None,
) -> Calibration:
    """Measure centre, camera length, rotation, defoci and aberrations of the scans of a series.

    What is given wins over what the files say. `lattice`: a spacing (Å) of a crystal in the images,
    from which the scan step is measured; `scan_step` then says which peaks are meant, and is
    compared. `counts_per_electron`: else found from the frames. `defoci`: nominal ones, which
    decide the sign and say where z = 0 lies; without them, and if the files do not say any, z = 0
    is the middle of the specimen as the scans see it.
    `order`: radial order of the aberrations that are fitted. `hints` are those of `read`.

    **Raises:** InputError for files that do not belong together, and for numbers that nobody says.
    """
    sources = tuple(read(file, **(hints or {})) for file in files)
    notes = [*check_series(sources, same_raster=True)]
    if defoci is not None and len(defoci) != len(sources):
        raise InputError(f"{len(defoci)} nominal defoci for {len(sources)} scans; give one a scan.")
    said = _said(sources)
    defoci = defoci if defoci is not None else said.get("defocus_A")
    known = _known(
        sources, said, energy, semiangle, scan_step, detector_pixel, defoci, rotation_deg,
        transpose, lattice is not None,
    )  # fmt: skip
    sources, electrons, told = electrons_of(
        sources, counts_per_electron, said.get("counts_per_electron")
    )
    notes += told
    surveys = tuple(survey(source) for source in sources)
    discs = tuple(
        find_disc(seen.pattern, source.mask) for seen, source in zip(surveys, sources, strict=True)
    )
    radius = float(np.mean([disc.radius for disc in discs]))
    pixel, measured, told = _camera(known, radius)
    notes += told + about_discs(discs)
    signals = tuple(
        gather_signals(source, disc.center, radius, source.mask)
        for source, disc in zip(sources, discs, strict=True)
    )
    step = None
    if lattice is not None:
        nominal = None if math.isnan(known.scan_step[0]) else known.scan_step
        step, told = step_of(signals, float(lattice), nominal)
        known, notes = dataclasses.replace(known, scan_step=step.step), notes + told
    orientations = tuple(find_orientation(one.com, known.scan_step) for one in signals)
    data = overlaps(signals, known.scan_step, known.energy, measured, pixel)
    field = min(n * d for n, d in zip(sources[0].scan_shape, known.scan_step, strict=True))
    lens = fit_lens(data, field, order, known.rotation, known.transpose, known.defoci)
    shifts = _displacements(signals, known, pixel, measured, lens)
    found = _z_zero(-np.asarray(lens.lens.aberrations["C10"], float), known.defoci)
    notes += about_lens(lens, orientations, known, shifts, measured, found)
    return Calibration(
        sources, surveys, known, discs, pixel, measured, signals, orientations, lens, shifts,
        tuple(float(f) for f in found), _aberrations(lens), tuple(dict.fromkeys(notes)),
        electrons, step, title or "", hints or {},
    )  # fmt: skip


def _said(sources: Sequence[Source]) -> dict[str, Any]:
    """What the files agree upon, the first one's word where they differ by less than 1 %.

    Each scan has its own defocus; together they are said if all of them are.
    """
    facts: dict[str, Any] = {}
    if all("defocus_A" in source.facts for source in sources):
        facts["defocus_A"] = [float(source.facts["defocus_A"]) for source in sources]
    for source in sources:
        for name, value in source.facts.items():
            if name in ("defocus_A", "exposure_s"):
                continue
            first = facts.setdefault(name, value)
            if not np.allclose(np.asarray(first, float), np.asarray(value, float), rtol=0.01):
                raise InputError(
                    f"The files disagree about {name}: {sources[0].path.name} says {first}, "
                    f"{source.path.name} {value}; calibrate them one by one, or give the value."
                )
    return facts


def _known(
    sources,
    said,
    energy,
    semiangle,
    scan_step,
    detector_pixel,
    defoci,
    rotation_deg,
    transpose,
    measured,
) -> Known:
    """What was given, completed by what the files say; complains about all that is missing.

    The scan step may be missing where it will be `measured`.
    """
    energy = energy if energy is not None else said.get("energy_ev")
    step = scan_step if scan_step is not None else said.get("scan_step_A")
    pixel = detector_pixel if detector_pixel is not None else said.get("detector_pixel_mrad")
    if pixel is None and "detector_pixel_inv_A" in said and energy:
        pixel = np.multiply(said["detector_pixel_inv_A"], wavelength(energy) * 1e3)
    semiangle = semiangle if semiangle is not None else said.get("semiangle_mrad")
    missing = [
        f"{name} ({option})"
        for name, option, value in (
            ("the energy", "--energy, eV", energy),
            ("the scan step", "--scan-step or --lattice, Å", 0 if measured else step),
            ("the semi-angle or the detector pixel", "--semiangle or --detector-pixel, mrad",
             semiangle if semiangle is not None else pixel),
        )
        if value is None
    ]  # fmt: skip
    if missing:
        raise InputError(
            f"{sources[0].path}: does not say, and nobody else does: {'; '.join(missing)}."
        )
    assert energy is not None
    step = math.nan if step is None else step
    steps = (step, step) if isinstance(step, int | float) else (float(step[0]), float(step[1]))
    return Known(
        float(energy), (float(steps[0]), float(steps[1])),
        None if semiangle is None else float(semiangle),
        None if pixel is None else float(np.mean(pixel)),
        None if rotation_deg is None else math.radians(rotation_deg), transpose,
        None if defoci is None else tuple(float(f) for f in defoci),
    )  # fmt: skip


def _camera(known: Known, radius: float) -> tuple[float, float, list[str]]:
    """Angle of a pixel and semi-angle, of which the disc's radius ties one to the other."""
    if known.pixel is None:
        assert known.semiangle is not None
        return known.semiangle / radius, known.semiangle, []
    measured = known.pixel * radius
    if known.semiangle is None or abs(measured / known.semiangle - 1) < 0.01:
        return known.pixel, measured, []
    return known.pixel, measured, [
        f"the disc has a radius of {radius:.2f} pixels, which at {known.pixel:.5g} mrad a pixel is "
        f"a semi-angle of {measured:.4g} mrad, not {known.semiangle:.4g}. The detector's "
        "calibration is taken to be right and the nominal semi-angle to be a label; if it is the "
        f"other way round, give --detector-pixel {known.semiangle / radius:.5g}"
    ]  # fmt: skip


def _displacements(signals, known: Known, pixel, semiangle, lens: LensFit):
    """Displacements of the images of scans whose defocus moves them visibly, and their fit."""
    unit = wavelength(known.energy) / (semiangle * 1e-3) ** 2
    cos, sin = math.cos(float(lens.lens.rotation)), math.sin(float(lens.lens.rotation))
    turn = np.array([[cos, sin], [-sin, cos]])
    found = []
    for one, c10 in zip(signals, np.asarray(lens.lens.aberrations["C10"], float), strict=True):
        if abs(c10) < SHIFTED * unit:
            found.append(None)
            continue
        start = -turn.T * c10 * 1e-3
        start = start[::-1] if lens.transpose else start
        moved = measure_shifts(one, known.scan_step, pixel, start)
        size = float(np.median(np.hypot(*moved.moved.T)))
        # Images that do not resemble each other cannot be aligned: then there is no check.
        fit = fit_shifts(moved) if moved.used.sum() >= 6 else None
        found.append((moved, fit) if fit and fit.residual < 0.15 * size else None)
    return tuple(found)


def _z_zero(found: Float[np.ndarray, " scans"], nominal) -> Float[np.ndarray, " scans"]:
    """Defoci counted from the plane that the nominal ones are counted from."""
    if nominal is None or len(found) == 1:
        return found
    return found + (float(np.mean(nominal)) - float(np.mean(found)))


def _aberrations(lens: LensFit) -> dict[str, float]:
    """Polar coefficients of all aberrations beside the defocus that stand out of their errors."""
    values, errors = lens.lens.aberrations, lens.sigma.aberrations
    kept: dict[str, float] = {}
    for name in values:
        if name == "C10":
            continue
        pair = {name, name[:-1] + "a", name[:-1] + "b"} & set(values)
        size = math.hypot(*(float(values[n][0]) for n in pair))
        error = math.hypot(*(float(errors[n][0]) for n in pair))
        if size > SIGNIFICANT * error:
            kept[name] = float(values[name][0])
    return {name: float(value) for name, value in polar(kept).items()}


def _short(value: float, digits: int = 5) -> float:
    """A float with few digits."""
    return float(f"{float(value):.{digits}g}")

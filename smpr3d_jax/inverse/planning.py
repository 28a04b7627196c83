"""The experiment to do: from a lens, a camera and a specimen to a focal series and what it costs.

Numbers in, numbers out: energies in eV, angles in mrad, lengths in Å, doses in electrons per Å² and
scan, times in s. The specimen lies between z = 0, its entrance surface, on which a scan of defocus
0 is focused, and its thickness. The rules are those of `sampling`; `design.check` asks a plan the
same questions as data that exist.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from ..physics.limits import Limit
from ..physics.optics import wavelength
from . import design, sampling
from .sampling import AIRY_MARGIN, DARK_FIELD, HIGHEST_TRANSFER


SCANS = 4
"""Foci of a series that is free to choose; measured: 4, 2, 1 of the same dose each hold a tube's
section to 0.978, 0.963, 0.931."""
ORDER_LEAST, ORDER_MOST = 6, 40
"""Of the tilt polynomials: what hardly costs, and what the experiment file takes."""
EVENT_BYTES = 4
"""Of an electron in an event file: its flat pixel number."""
ELEMENTARY_CHARGE = 1.602176634e-19  # C


@dataclasses.dataclass(frozen=True)
class Plan:
    """A focal series and what follows from it.

    `detector_pixel` and `detector_shape` are as recorded; frames may be binned by `binning` without
    cutting the `window` that the probes need. `step_limit` is the coarsest step of the
    representation. Counts of what depends on the dose are None without one, times without a dwell.
    """

    energy: float
    semiangle: float
    thickness: float
    depth_of_focus: float
    lateral_resolution: float
    axial_resolution: float
    defoci: tuple[float, ...]
    depth_range: tuple[float, float]
    window: float
    detector_pixel: float
    detector_shape: tuple[int, int]
    binning: int
    sampling: tuple[float, float]
    representation: str
    order: int
    components: int
    scan_step: float
    step_limit: float
    scan_shape: tuple[int, int]
    dose: float | None
    least_dose: float
    dwell: float | None

    @property
    def plane(self) -> float:
        """Reference plane of S: the middle of the specimen, Å."""
        return sum(self.depth_range) / 2

    @property
    def reach(self) -> float:
        """Largest angle that the detector sees all around its pixel n//2, mrad."""
        return self.detector_pixel * _radius(self.detector_shape)

    @property
    def frames(self) -> int:
        """Of all scans."""
        return len(self.defoci) * math.prod(self.scan_shape)

    @property
    def electrons_per_frame(self) -> float | None:
        """dose x step²."""
        return None if self.dose is None else self.dose * self.scan_step**2

    @property
    def electrons(self) -> float | None:
        """Of the whole series."""
        return None if self.dose is None else self.dose * self.scan_step**2 * self.frames

    @property
    def phase_noise(self) -> float | None:
        """What no method undercuts, rad: `phase_bound` of all scans in a pixel of lambda/(2 alpha).

        Depths share these electrons: a section between others has more noise.
        """
        if self.dose is None:
            return None
        cell = sampling.lateral_unit(self.semiangle, self.energy) / 2
        return phase_bound(self.dose * len(self.defoci), cell)

    @property
    def bytes(self) -> dict[str, float | None]:
        """The series as dense frames of 8 and 16 bits, and as electron events."""
        dense = float(self.frames * math.prod(self.detector_shape))
        events = None if self.electrons is None else EVENT_BYTES * self.electrons
        return {"uint8": dense, "uint16": 2 * dense, "events": events}

    @property
    def smatrix_bytes(self) -> float:
        """The S-matrix of the scanned field and half a window around it, in complex64."""
        window = self.window / self.binning
        length = [(n - 1) * self.scan_step + window for n in self.scan_shape]
        return 8.0 * self.components * math.prod(length) / math.prod(self.sampling)

    @property
    def seconds(self) -> float | None:
        """Time under the beam, flyback and settling aside."""
        return None if self.dwell is None else self.dwell * self.frames

    @property
    def current(self) -> float | None:
        """Beam current in pA that gives the dose in the dwell time."""
        if self.dwell is None or self.electrons_per_frame is None:
            return None
        return self.electrons_per_frame * ELEMENTARY_CHARGE / self.dwell * 1e12


def phase_bound(dose: float, length: float) -> float:
    """Least standard error (rad) of the phase of an element of `length` Å: 1/(2 sqrt(N)).

    The quantum Cramér-Rao bound of N = `dose` x `length`² electrons (Helstrom 1976; Dwyer, Phys.
    Rev. Lett. 130, 056101, 2023).
    """
    return 0.5 / math.sqrt(dose * length**2)


def window_angle(pixels: int, focal_range: float, energy: float) -> float:
    """Largest semi-angle (mrad) at which `pixels` hold probe and dark field together.

    A detector that reaches 1.25 alpha around its pixel n//2 has a window of (pixels - 1)
    lambda/(2.5 alpha), which must hold the cone alpha x `focal_range` and three lambda/alpha; 0
    where it never does.
    """
    units = (pixels - 1) / (2 * DARK_FIELD) - AIRY_MARGIN
    return 1e3 * math.sqrt(max(units, 0.0) * wavelength(energy) / focal_range)


def specimen_limits(
    energy: float,
    thickness: float | None = None,
    detector_shape: tuple[int, int] | None = None,
    detector_pixel: float | None = None,
) -> tuple[Limit, ...]:
    """What camera and thickness allow: detector edge, pixels for the window, and tilt polynomials.

    Angles beyond are no use: the dark field is missed, the probe at the specimen's ends is cut off,
    or no polynomial of order 40 follows a layer there. Told besides: the angle at which the whole
    specimen is within one depth of focus, and sections show nothing that one image does not.
    """
    limits = []
    if detector_shape is not None and detector_pixel is not None:
        edge = detector_pixel * _radius(detector_shape) / DARK_FIELD
        limits.append(Limit("detector", edge, f"its edge at {DARK_FIELD:g} α"))
    if detector_shape is not None and thickness:
        angle = window_angle(min(detector_shape), thickness, energy)
        limits.append(Limit("detector pixels", angle, "window holds the probes"))
    if thickness:
        angle = (ORDER_MOST - 2) / (math.pi * thickness * HIGHEST_TRANSFER) * 1e3
        limits.append(Limit("tilt modes", angle, f"order {ORDER_MOST} at the specimen's ends"))
        flat = 1e3 * math.sqrt(1.7718 * wavelength(energy) / thickness)
        limits.append(Limit("projection", flat, "thickness = depth of focus", counts=False))
    return tuple(sorted(limits, key=lambda limit: limit.semiangle))


def plan(
    *,
    energy: float,
    semiangle: float,
    thickness: float | None = None,
    scans: int = SCANS,
    detector_shape: tuple[int, int] | None = None,
    detector_pixel: float | None = None,
    representation: str = "modes",
    scan_step: float | None = None,
    field: tuple[float, float] | None = None,
    dose: float | None = None,
    dwell: float | None = None,
) -> Plan:
    """The series that recovers S of a specimen `thickness` Å thick (default: lambda/alpha²).

    What is given is kept, even where `design.check` will object. Foci lie symmetrically about the
    specimen's middle over 7 lambda/alpha² or its thickness; the detector is as fine as the window
    needs and reaches 2 alpha or alpha + 0.7 lambda/Å; the step is lambda/(2 alpha) or the limit of
    tilt modes; the `field` (y, x) Å is two windows wide, so that the middle one is seen whole.

    **Raises:** ValueError for a number that is not positive, or another `representation`.
    """
    if representation not in ("modes", "beams"):
        raise ValueError(f"`representation` = {representation!r}: must be 'modes' or 'beams'.")
    _require_positive(
        energy=energy, semiangle=semiangle, thickness=thickness, scans=scans, dose=dose,
        detector_pixel=detector_pixel, scan_step=scan_step, dwell=dwell,
        **{f"detector_shape[{i}]": n for i, n in enumerate(detector_shape or ())},
        **{f"field[{i}]": length for i, length in enumerate(field or ())},
    )  # fmt: skip
    unit, lateral = (f(semiangle, energy) for f in (sampling.depth_unit, sampling.lateral_unit))
    thick = unit if thickness is None else thickness
    defoci = series(semiangle, energy, thick, scans)
    needed = sampling.required_window(semiangle, energy, defoci, thick / 2)
    pixel, shape = _detector(semiangle, energy, needed, detector_pixel, detector_shape)
    window, reach = sampling.window_of(pixel, energy), pixel * _radius(shape)
    beyond = max(reach - semiangle, 0.0) * 1e-3 / wavelength(energy)
    transfer = min(HIGHEST_TRANSFER, beyond)
    order = sampling.needed_order(semiangle, thick, transfer)
    order = min(max(order, ORDER_LEAST), ORDER_MOST)
    binning = max(1, math.floor(window / needed + 1e-9))
    kept = window / binning
    coarsest, components = lateral / 2, sampling.beams_in_aperture(semiangle, energy, kept)
    if representation == "modes":
        components = sampling.modes_of_order(order)
        by_data = sampling.largest_scan_step_of_modes(kept, scans, order)
        coarsest = min(by_data, min(kept, needed) / 2)
    step = scan_step or significant_below(min(lateral / 2, coarsest))
    length = field or (2 * kept, 2 * kept)
    return Plan(
        energy=energy, semiangle=semiangle, thickness=thick, defoci=defoci,
        depth_of_focus=sampling.depth_of_field(semiangle, energy),
        lateral_resolution=wavelength(energy) / (reach * 1e-3),
        axial_resolution=2 * wavelength(energy) / (reach * 1e-3) ** 2,
        depth_range=(-unit / 2, thick + unit / 2), window=window, detector_pixel=pixel,
        detector_shape=shape, binning=binning,
        sampling=(window / shape[0], window / shape[1]),
        representation=representation, order=order, components=components, scan_step=step,
        step_limit=coarsest,
        scan_shape=(math.ceil(length[0] / step) + 1, math.ceil(length[1] / step) + 1),
        dose=dose, least_dose=sampling.least_dose(semiangle, energy, scans), dwell=dwell,
    )  # fmt: skip


def series(
    semiangle: float, energy: float, thickness: float, scans: int = SCANS
) -> tuple[float, ...]:
    """Defoci (Å) about the middle of the specimen, over 7 lambda/alpha² or its thickness.

    Evenly spaced, rounded away from the middle to a tenth of lambda/alpha² or less. One scan is
    focused behind the specimen, where its probe is wide enough everywhere for neighbours to
    overlap.
    """
    unit = sampling.depth_unit(semiangle, energy)
    step, middle = sampling.round_below(unit / 10), thickness / 2
    if scans == 1:
        return (step * math.ceil((thickness + unit) / step),)
    half = max(sampling.required_focal_range(semiangle, energy), thickness) / 2
    places = np.linspace(-half, half, scans)
    outwards = np.ceil(np.abs(places) / step) * np.sign(places)
    return tuple(float(step * (round(middle / step) + n)) for n in outwards)


def _detector(
    semiangle: float,
    energy: float,
    window: float,
    pixel: float | None,
    shape: tuple[int, int] | None,
) -> tuple[float, tuple[int, int]]:
    """Pixel (mrad) and shape: as fine as the window asks, reaching as far as there is signal."""
    # A thousandth finer, and further, than needed: rounding shall not undo it.
    finest = 0.999 * wavelength(energy) / window * 1e3
    signal = HIGHEST_TRANSFER * wavelength(energy) * 1e3
    least = 1.001 * DARK_FIELD * semiangle
    wanted = max(least, min(2 * semiangle, semiangle + signal))
    if shape is None:
        pixel = _rounded(finest) if pixel is None else pixel
        count = 2 * math.ceil(wanted / pixel + 0.5)
        return pixel, (count, count)
    if pixel is None:
        # Too few pixels for both: the window comes first, down to the least dark field.
        reach = np.clip(finest * _radius(shape), least, wanted)
        pixel = _rounded(float(reach) / _radius(shape))
    return pixel, shape


def _radius(shape: tuple[int, int]) -> float:
    """Pixels from the centre of pixel n//2 to the nearest edge."""
    return max(min(n - n // 2 for n in shape) - 0.5, 0.5)


def _rounded(value: float) -> float:
    return float(f"{value:.5g}")


def _require_positive(**values: float | int | None) -> None:
    for name, value in values.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"`{name}` = {value:g}: must be positive and finite.")


def significant_below(value: float) -> float:
    """`value` rounded down to two digits."""
    digits = 1 - math.floor(math.log10(value))
    return round(math.floor(value * 10.0**digits * (1 + 1e-9)) * 10.0**-digits, digits)


def findings(
    plan: Plan, spread: float | None = None, source: float | None = None
) -> list[design.Finding]:
    """What `design.check` says of a plan; `spread` and `source` are rms, Å."""
    electrons: Sequence[float] | None = None
    if plan.electrons_per_frame is not None:
        electrons = [plan.electrons_per_frame] * len(plan.defoci)
    return design.check(
        energy=plan.energy, semiangle=plan.semiangle, defoci=plan.defoci,
        scan_step=(plan.scan_step, plan.scan_step), scan_shape=plan.scan_shape,
        detector_pixel=plan.detector_pixel, detector_shape=plan.detector_shape,
        representation=plan.representation, order=plan.order, depth_range=plan.depth_range,
        plane=plan.plane, electrons=electrons, spread=spread, source=source,
    )  # fmt: skip

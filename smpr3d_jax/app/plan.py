"""The step before the experiment: what a user says of the microscope, made into a plan.

`design` completes what is said by the optimum of what is not, and asks of the result what `run`
would ask; `plan_tables` tells it.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..inverse import planning, transfer
from ..inverse.design import Finding
from ..inverse.planning import Plan
from ..inverse.sampling import depth_of_field, depth_unit, lateral_unit
from ..physics.limits import aperture_limits, balanced, binding, Lens, Limit
from ..physics.optics import chromatic_spread, FWHM, wavelength
from ..report.planned import planned
from .experiment import from_mapping


MM = 1e7  # Å
FEATURES = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Lateral periods in units of lambda/(2 alpha) at which the depth resolution is told."""


@dataclasses.dataclass(frozen=True)
class Microscope:
    """What is known of the instrument: eV, mm for lenses, Å for the rest.

    `energy_spread_ev` is a full width at half maximum, `source_size` an rms width; `residual` polar
    aberrations (Å, rad) that remain besides those balanced.
    """

    energy: float
    cc_mm: float | None = None
    energy_spread_ev: float | None = None
    c3_mm: float | None = None
    c5_mm: float | None = None
    source_size: float | None = None
    residual: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def spread(self) -> float | None:
        """Focal spread, rms, Å."""
        if self.cc_mm is None or self.energy_spread_ev is None:
            return None
        return chromatic_spread(self.cc_mm, self.energy, self.energy_spread_ev)

    @property
    def limits(self) -> tuple[Limit, ...]:
        """What the instrument allows the aperture."""
        return aperture_limits(
            self.energy,
            c3=None if self.c3_mm is None else self.c3_mm * MM,
            c5=None if self.c5_mm is None else self.c5_mm * MM,
            spread=None if self.spread is None else FWHM * self.spread,
            source=self.source_size,
            residual=self.residual,
        )

    def lens(self, semiangle: float) -> Lens | None:
        """The aberrations that flatten the wave best over an aperture."""
        if self.c5_mm is not None:
            return balanced(self.c5_mm * MM, semiangle)
        if self.c3_mm is None:
            return None
        c3 = self.c3_mm * MM
        return Lens(semiangle, -c3 * (semiangle * 1e-3) ** 2 / 2, c3)

    def wave_range(self, semiangle: float) -> float | None:
        """Range of the wave aberration over an aperture at its best focus, in wavelengths."""
        if (lens := self.lens(semiangle)) is None:
            return None
        edge, lam = semiangle * 1e-3, wavelength(self.energy)
        return (lens.c50 * edge**6 / 96 if lens.c50 else lens.c30 * edge**4 / 16) / lam


@dataclasses.dataclass(frozen=True)
class Design:
    """A plan, what limits its aperture, and what `run` would say of it."""

    microscope: Microscope
    limits: tuple[Limit, ...]
    plan: Plan
    findings: tuple[Finding, ...]

    @property
    def binding(self) -> Limit | None:
        """The limit that is met first."""
        return binding(self.limits)


def design(
    microscope: Microscope,
    semiangle: float | None = None,
    *,
    thickness: float | None = None,
    detector_shape: tuple[int, int] | None = None,
    detector_pixel: float | None = None,
    **choices: Any,
) -> Design:
    """The plan at `semiangle` (mrad), or at the widest aperture that nothing speaks against.

    `choices` are the other arguments of `planning.plan`.

    **Raises:** ValueError for numbers that cannot be meant, and where nothing says how wide the
    aperture may be.
    """
    _questioned(microscope, semiangle, detector_pixel, choices.get("scan_step"))
    camera = {"detector_shape": detector_shape, "detector_pixel": detector_pixel}
    specimen = planning.specimen_limits(microscope.energy, thickness, **camera)
    limits = tuple(sorted(microscope.limits + specimen, key=lambda limit: limit.semiangle))
    best = binding(limits)
    if semiangle is None:
        if best is None or best.semiangle <= 0:
            raise ValueError(
                "what limits the aperture is not known: give --semiangle to judge one, or --cc "
                "with --energy-spread, --c3 or --c5, --source, --aberration, or --detector with "
                "--detector-pixel"
                if best is None
                else f"{min(detector_shape or (0,))} detector pixels hold no window at any "
                "semi-angle; use more"
            )
        semiangle = planning.significant_below(best.semiangle)
    found = planning.plan(
        energy=microscope.energy, semiangle=semiangle, thickness=thickness, **camera, **choices
    )
    said = planning.findings(found, microscope.spread, microscope.source_size)
    return Design(microscope, limits, found, tuple(said))


def _questioned(
    microscope: Microscope, semiangle: float | None, pixel: float | None, step: float | None
) -> None:
    """Ask of each number what an experiment file would be asked."""
    beam = {"semiangle_mrad": semiangle, **_beam(microscope)}
    geometry = {"detector_pixel_mrad": pixel, "scan_step": step}
    known = lambda section: {k: v for k, v in section.items() if v is not None}
    scans = [{"file": "scan_0.h5"}]
    from_mapping({"beam": known(beam), "scans": scans, "geometry": known(geometry)}, "design")


def _beam(microscope: Microscope) -> dict[str, Any]:
    return {
        "energy_ev": microscope.energy,
        "aberrations": dict(microscope.residual),
        "source_size_A": microscope.source_size,
        "cc_mm": microscope.cc_mm,
        "energy_spread_ev": microscope.energy_spread_ev,
    }


# --- what sections will show ---------------------------------------------------------------------


def depth_resolution(found: Plan) -> list[dict[str, float]]:
    """For lateral periods (Å): how thick a layer appears, and the shortest periods in depth (Å).

    `sections`: full width at half maximum of the phase of confocal sections, outgoing waves as the
    detector sees them; `period` and `period_tcbf`: of sections and of tilt-corrected bright field.
    """
    periods = np.asarray(FEATURES) * lateral_unit(found.semiangle, found.energy) / 2
    periods = periods[periods > wavelength(found.energy) / (found.reach * 1e-3)]
    q, lens = 1 / periods, (found.semiangle, found.energy)
    widths = transfer.depth_width(q, *lens, collector=found.reach)
    cut = transfer.axial_cutoff_of_sections(q, *lens, found.reach)
    tcbf = transfer.axial_cutoff(q, *lens)
    rows = zip(periods, widths, cut, tcbf, strict=True)
    return [
        {
            "lateral_A": float(d), "sections_A": float(width), "period_A": float(1 / own),
            "period_tcbf_A": float(1 / other) if other > 0 else math.inf,
        }
        for d, width, own, other in rows
    ]  # fmt: skip


def picture(found: Design) -> Figure:
    """The figure of a design: axial transfer, depth resolution, depth of focus against angle."""
    plan, lens = found.plan, (found.plan.semiangle, found.plan.energy)
    edge = plan.semiangle * 1e-3 / wavelength(plan.energy)
    unit = depth_unit(*lens)
    q = np.linspace(0.02, min(2.5, plan.reach / plan.semiangle), 80) * edge
    distances = np.linspace(-3, 3, 121) * unit
    shown = transfer.transfer(q, distances, *lens, "confocal", plan.reach)
    with np.errstate(divide="ignore"):
        widths = {
            "sections, full width at half maximum": transfer.depth_width(
                q, *lens, collector=plan.reach
            ),
            "sections, shortest period": 1
            / transfer.axial_cutoff_of_sections(q, *lens, plan.reach),
            "tcBF, annular: shortest period": 1 / transfer.axial_cutoff(q, *lens),
        }
    limits = {limit.name: limit.semiangle for limit in found.limits}
    most = max([plan.semiangle, *(a for a in limits.values() if a < 4 * plan.semiangle)])
    angles = np.geomspace(plan.semiangle / 4, 1.3 * most, 200)
    focus = np.asarray([depth_of_field(float(a), plan.energy) for a in angles])
    spread = found.microscope.spread
    return planned(
        q, distances, shown, widths, angles, focus, limits, plan.semiangle,
        thickness=plan.thickness, spread=None if spread is None else FWHM * spread,
    )  # fmt: skip

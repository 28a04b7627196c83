"""A design told: tables for people, facts for programs, and what it leaves in a folder.

The folder holds a picture, the facts and an experiment file that waits for its data.
"""

import dataclasses
import math
import pathlib
from typing import Any

from ..inverse.planning import Plan
from ..inverse.sampling import depth_unit, round_below
from ..physics.optics import FWHM
from ..report import store
from ..report.figures import png_bytes
from .experiment import from_mapping, to_yaml
from .plan import depth_resolution, Design, picture


Rows = list[tuple[str, ...]]


DEPTHS = ("lateral period", "width of a layer", "shortest period", "shortest period of tcBF")


def tables(found: Design) -> list[tuple[str, tuple[str, ...], Rows]]:
    """Title, heads and rows of each table."""
    return [
        ("Aperture", ("limit", "mrad", "rule", ""), _limits(found)),
        ("Series", ("", "", "why"), _series(found)),
        ("Cost", ("", "", "why"), _cost(found)),
        ("Depth", DEPTHS, _depths(found.plan)),
    ]


def _limits(found: Design) -> Rows:
    rows: Rows = []
    for limit in found.limits:
        mark = "for comparison" if not limit.counts else "binds" if limit == found.binding else ""
        rows.append((limit.name, f"{limit.semiangle:.3g}", limit.rule, mark))
    chosen = found.plan.semiangle
    beyond = found.binding is not None and chosen > found.binding.semiangle
    rows.append(("planned", f"{chosen:.3g}", "", "beyond the limit" if beyond else ""))
    lens, waves = found.microscope.lens(chosen), found.microscope.wave_range(chosen)
    if lens is not None and waves is not None:
        state = f"C1 = {lens.c10:.3g} Å" + (f", C3 = {lens.c30 / 1e4:.3g} µm" if lens.c50 else "")
        rows.append(("", "", f"best with {state}: {waves:.2g} λ of aberration", ""))
    return rows


def _series(found: Design) -> Rows:
    plan, spread = found.plan, found.microscope.spread
    foci = ", ".join(f"{value:g}" for value in plan.defoci)
    ny, nx = plan.detector_shape
    binned = f"; may be binned by {plan.binning}" if plan.binning > 1 else ""
    kept = plan.window / plan.binning
    modes = f"modes of order {plan.order}" if plan.representation == "modes" else "beams"
    focus = f"{plan.depth_of_focus:.3g} Å"
    why = "1.77 λ/α²" + ("" if spread is None else f"; focal spread {FWHM * spread:.3g} Å")
    return [
        ("depth of focus", focus, why),
        ("defoci", f"{foci} Å", "7 λ/α² or the thickness, about the specimen's middle"),
        ("depths", f"{plan.depth_range[0]:.4g} to {plan.depth_range[1]:.4g} Å",
         f"specimen of {plan.thickness:.4g} Å below z = 0"),
        ("detector", f"{ny} x {nx} pixels of {plan.detector_pixel:.4g} mrad",
         f"reaches {plan.reach:.3g} mrad = {plan.reach / plan.semiangle:.2g} α{binned}"),
        ("window", f"{kept:.3g} Å, pixels of {min(plan.sampling):.3g} Å",
         "λ/detector pixel; λ/detector width"),
        ("scan step", f"{plan.scan_step:.3g} Å",
         f"λ/2α; {plan.representation} need {plan.step_limit:.3g} Å or less"),
        ("scan", f"{plan.scan_shape[0]} x {plan.scan_shape[1]} positions",
         f"field of {(plan.scan_shape[0] - 1) * plan.scan_step:.3g} x "
         f"{(plan.scan_shape[1] - 1) * plan.scan_step:.3g} Å"),
        ("S-matrix", f"{plan.components} {modes}", f"{_bytes(plan.smatrix_bytes)} in float32"),
        ("resolution", f"{plan.lateral_resolution:.3g} Å, in depth {plan.axial_resolution:.3g} Å",
         "λ/θ and 2λ/θ² at the detector's edge θ: the shortest periods"),
    ]  # fmt: skip


def _cost(found: Design) -> Rows:
    plan = found.plan
    rows: Rows = [("frames", f"{plan.frames:,}", f"{len(plan.defoci)} scans")]
    least = f"{plan.least_dose:.3g} e/Å² a scan"
    rows.append(("least dose", least, "fewest that a retrieval was tried with"))
    if plan.dose is not None:
        total = f"{plan.dose * len(plan.defoci):.3g} in all"
        electrons = f"{plan.electrons_per_frame:.3g} a frame"
        rows += [
            ("dose", f"{plan.dose:.3g} e/Å² a scan", total),
            ("electrons", electrons, f"{plan.electrons:.3g} in all"),
            ("phase noise", f"{plan.phase_noise:.2g} rad", "1/(2√N) in a pixel of λ/2α: a bound"),
        ]  # fmt: skip
    size = plan.bytes
    rows.append(("data", _bytes(size["uint8"]), f"uint8; {_bytes(size['uint16'])} as uint16"))
    if size["events"] is not None:
        rows.append(("", _bytes(size["events"]), "as electron events"))
    if plan.seconds is not None:
        rows.append(("time", f"{plan.seconds:.3g} s", "under the beam, without flyback"))
    if plan.current is not None:
        rows.append(("beam current", f"{plan.current:.3g} pA", "dose x step²/dwell"))
    return rows


def _depths(plan: Plan) -> Rows:
    number = lambda value: f"{value:.3g} Å" if math.isfinite(value) else "none"
    return [tuple(number(value) for value in row.values()) for row in depth_resolution(plan)]


def _bytes(count: float | None) -> str:
    value, units = float(count or 0), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.3g} {units[0]}"


def facts(found: Design) -> dict[str, Any]:
    """The whole design as plain numbers, for JSON; what is infinite is null."""
    derived = (
        "plane", "reach", "frames", "electrons_per_frame", "electrons", "phase_noise", "bytes",
        "smatrix_bytes", "seconds", "current",
    )  # fmt: skip
    plan = dataclasses.asdict(found.plan)
    plan |= {name: getattr(found.plan, name) for name in derived}
    finite = lambda value: value if math.isfinite(value) else None
    return {
        "limits": [limit._asdict() for limit in found.limits],
        "binding": None if found.binding is None else found.binding.name,
        "focal_spread_A": found.microscope.spread,
        "wave_aberration": found.microscope.wave_range(found.plan.semiangle),
        "plan": plan,
        "depth_resolution": [
            {name: finite(value) for name, value in row.items()}
            for row in depth_resolution(found.plan)
        ],
        "findings": [finding._asdict() for finding in found.findings],
    }


def experiment(found: Design) -> str:
    """An experiment file that is valid once its data files stand beside it."""
    plan = found.plan
    short = lambda value: float(f"{value:.5g}")
    step = round_below(depth_unit(plan.semiangle, plan.energy) / 10)
    low, high = plan.depth_range
    method: dict[str, Any] = {"representation": plan.representation}
    if plan.representation == "modes":
        method["order"] = plan.order
    content = {
        "title": f"planned: {plan.energy / 1e3:g} kV, {plan.semiangle:g} mrad",
        "beam": {"energy_ev": plan.energy, "semiangle_mrad": plan.semiangle},
        "scans": [
            {"file": f"scan_{i}.h5", "defocus": value} for i, value in enumerate(plan.defoci)
        ],
        "geometry": {
            "scan_step": plan.scan_step, "detector_pixel_mrad": short(plan.detector_pixel),
        },
        "method": method,
        "sections": {
            "start": step * math.floor(low / step), "stop": step * math.ceil(high / step),
            "step": step,
        },
    }  # fmt: skip
    return _preamble(found) + to_yaml(from_mapping(content, "design"), comments=True)


def _preamble(found: Design) -> str:
    """What to record, as the comment at the head of the experiment file."""
    plan, lens = found.plan, found.microscope.lens(found.plan.semiangle)
    dose = plan.least_dose if plan.dose is None else plan.dose
    lines = [
        "Planned by smpr3d design. Record it so, correct below what came out otherwise, put the",
        "files beside this one, and: smpr3d run experiment.yaml -o results",
        "",
        f"The specimen is {plan.thickness:.4g} Å thick; a scan of defocus 0 is focused on its",
        "entrance surface, and a positive defocus lies deeper.",
        f"Each scan: {plan.scan_shape[0]} x {plan.scan_shape[1]} positions, "
        f"{'at least ' if plan.dose is None else ''}{dose:.3g} e/Å²; frames of "
        f"{plan.detector_shape[0]} x {plan.detector_shape[1]} pixels.",
    ]
    if lens is not None:
        lines.append(
            f"Sharpest with C1 = {lens.c10:.3g} Å beyond the defocus and C3 = {lens.c30 / 1e4:.3g} "
            "µm; what else is measured belongs into beam.aberrations."
        )
    if found.microscope.spread is not None:
        lines.append(
            f"Focal spread {found.microscope.spread:.3g} Å rms: as beam.defocus_spread_A it is "
            "modelled, at several times the cost."
        )
    if found.microscope.source_size is not None:
        lines.append(
            f"Source {found.microscope.source_size:.3g} Å rms: as beam.source_size_A it is "
            "modelled, at several times the cost."
        )
    lines += [f"{f.severity}: {f.key}: {f.message}" for f in found.findings]
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)


FILES = ("experiment.yaml", "design.png", "design.json")


def write(found: Design, folder: pathlib.Path) -> tuple[pathlib.Path, ...]:
    """Leave experiment file, picture and facts in `folder`.

    **Raises:** ValueError where there is an experiment file already: it may have been corrected.
    """
    paths = tuple(folder / name for name in FILES)
    if paths[0].exists():
        raise ValueError(f"{paths[0]} exists; choose another folder, or take the file away.")
    folder.mkdir(parents=True, exist_ok=True)
    with store.replacing(paths[1]) as temporary:
        temporary.write_bytes(png_bytes(picture(found)))
    store.write_json(paths[2], facts(found))
    with store.replacing(paths[0]) as temporary:
        temporary.write_text(experiment(found), encoding="utf-8")
    return paths

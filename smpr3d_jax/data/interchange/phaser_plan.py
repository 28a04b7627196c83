"""phaser's plans (YAML, JSON): `raw_data`, `init`, `slices` and `engines`.

Positions are columns (y, x): numbers of the raster times `step_size`, then `affine`, then the
rotation [[cos, -sin], [sin, cos]]. `det_flips` are [flip y, flip x, transpose]; an EMPAD is flipped
along y where nothing else is said. Tilts are the negative of ours, `bwlim_frac` is 2/3 by default.
"""

import math
import pathlib
from typing import Any

import numpy as np

from ...physics.optics import PLANCK_TIMES_C, REST_ENERGY
from ..counts import InputError
from .aberrations import from_phaser
from .recipe import centre, detector, geometry, lens, Matrix, Recipe, Section


LOSSES = {"poisson": "poisson", "amplitude": "amplitude", "anscombe": "shifted_amplitude"}


def recognises(tree: dict[str, Any]) -> bool:
    """Whether a tree is of phaser."""
    return tree.get("file_type", "phaser_plan") == "phaser_plan" and "raw_data" in tree


def read(path: pathlib.Path, tree: dict[str, Any]) -> Recipe:
    """The recipe in a tree of a plan.

    **Raises:** InputError naming the file and the key that is missing or amiss.
    """
    plan = Section(path, "", tree)
    raw, init = plan.section("raw_data"), plan.section("init", {})
    kind = raw.text("type")
    flips = raw.numbers("det_flips", 3, [1, 0, 0] if kind == "empad" else [0, 0, 0])
    seen = detector(flips)
    beam, defocus = _beam(plan, raw, init.section("probe", {}), seen)
    known, notes = _geometry(raw, init.section("scan", {}), seen, flips)
    last, run = _engines(plan)
    thicknesses = _thicknesses(last if last.has("slices") else plan)
    if raw.text("path").endswith(".json"):
        notes += (f"{raw.text('path')} says more, which is not read",)
    notes += tuple(
        f"phaser changes the frames first ({key})"
        for key in ("post_load", "post_init") if plan.has(key) and plan.tree[key]
    )  # fmt: skip
    several = len(thicknesses) > 1
    experiment: dict[str, Any] = {
        "title": plan.text("name", path.stem),
        "beam": beam,
        "scans": [_file(raw, init.section("scan", {})) | {"defocus": defocus}],
        "geometry": known,
        "method": {"name": "multislice" if several else "singleslice"} | run,
    }
    if several:
        experiment["sections"] = {"start": 0.0, "stop": float(thicknesses.sum())}
    limit = last.tree.get("bwlim_frac", 2 / 3)
    return Recipe(
        experiment,
        thicknesses,
        last.count("probe_modes", 1),
        tilt=_tilt(init.section("tilt", {})),
        band_limit=None if limit is None else float(limit),
        notes=notes,
    )


def _beam(
    plan: Section, raw: Section, probe: Section, seen: Matrix
) -> tuple[dict[str, Any], float]:
    beam: dict[str, Any] = {}
    if raw.has("kv"):
        beam["energy_ev"] = raw.number("kv") * 1e3
    elif raw.has("wavelength") or plan.has("wavelength"):
        lam = (raw if raw.has("wavelength") else plan).number("wavelength")
        beam["energy_ev"] = float(np.hypot(PLANCK_TIMES_C / lam, REST_ENERGY) - REST_ENERGY)
    if probe.has("conv_angle"):
        beam["semiangle_mrad"] = probe.number("conv_angle")
    listed = probe.tree.get("aberrations") or []
    if not isinstance(listed, list):
        raise InputError(f"{probe.at('aberrations')} = {listed!r}: a list is needed.")
    defocus, others = lens(from_phaser(probe.number("defocus", 0.0), listed), seen)
    return beam | {"aberrations": others}, defocus


def _geometry(
    raw: Section, scan: Section, seen: Matrix, flips: list[float]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    known: dict[str, Any] = {}
    notes: tuple[str, ...] = ()
    if scan.has("step_size"):
        known, notes = geometry(_scan(scan), seen)
    if raw.has("diff_step"):
        known["detector_pixel_mrad"] = raw.number("diff_step")
    shape = [128.0, 128.0] if raw.text("type") == "empad" else None
    if raw.has("det_shape") or shape:
        rows, columns = raw.numbers("det_shape", 2, shape)
        # It is that after the flips.
        size = (int(columns), int(rows)) if flips[2] else (int(rows), int(columns))
        middle = centre(size, flips)
        known |= {} if middle is None else {"center": middle}
    elif any(flips[:2]):
        notes += ("det_flips move the pixel n//2 of an even detector by one: give the `center`",)
    return known, notes


def _scan(scan: Section) -> Matrix:
    """From (slow, fast) numbers to (y, x) Å."""
    turn = math.radians(scan.number("rotation", 0.0))
    cos, sin = math.cos(turn), math.sin(turn)
    affine = np.asarray(scan.tree.get("affine") or np.eye(2), float)
    if affine.shape != (2, 2):
        raise InputError(f"{scan.at('affine')} has shape {affine.shape}; (2, 2) is needed.")
    return np.array([[cos, -sin], [sin, cos]]) @ affine @ np.diag(scan.numbers("step_size", 2))


def _file(raw: Section, scan: Section) -> dict[str, Any]:
    named: dict[str, Any] = {"file": raw.text("path")}
    if raw.has("key"):
        named["dataset"] = raw.text("key")
    if scan.has("shape"):
        named["scan_shape"] = [int(n) for n in scan.numbers("shape", 2)]
    return named


def _engines(plan: Section) -> tuple[Section, dict[str, Any]]:
    """The last engine, and all iterations with its noise model."""
    engines = plan.tree.get("engines")
    if not isinstance(engines, list) or not engines:
        raise InputError(f"{plan.at('engines')} = {engines!r}: a list of engines is needed.")
    each = [Section(plan.path, f"engines[{i}]", one) for i, one in enumerate(engines)]
    noise = each[-1].tree.get("noise_model") or {}
    name = noise if isinstance(noise, str) else noise.get("type", "poisson")
    run = {"loss": LOSSES.get(str(name), "poisson")}
    return each[-1], run | {"iterations": sum(one.count("niter", 10) for one in each)}


def _thicknesses(plan: Section) -> np.ndarray:
    if not plan.has("slices"):
        return np.zeros(1)
    given = plan.section("slices")
    if given.has("thicknesses"):
        listed = given.tree["thicknesses"]
        count = len(listed) if isinstance(listed, list) else 0
        return np.array(given.numbers("thicknesses", count) if count else [0.0])
    count = given.count("n")
    if given.has("slice_thickness"):
        return np.full(count, given.number("slice_thickness"))
    return np.full(count, given.number("total_thickness") / count)


def _tilt(tilt: Section) -> tuple[float, float]:
    if tilt.tree.get("type") != "global":
        return (0.0, 0.0)
    y, x = tilt.numbers("tilt", 2)
    return (0.0 - y, 0.0 - x)

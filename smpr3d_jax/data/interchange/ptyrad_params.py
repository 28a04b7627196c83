"""PtyRAD's parameter files (YAML, JSON, TOML): `init_params` and what belongs to them.

Angles of aberrations are in degrees, tilts the negative of ours. Positions are rows (y, x), numbers
of the raster times the step, first flipped by `pos_scan_flipT`, then multiplied from the right by
the matrix of `pos_scan_affine` = [scale, asymmetry, rotation, shear]:
scale diag(1 + a/2, 1 - a/2) [[cos r, sin r], [-sin r, cos r]] [[1, 0], [tan s, 1]].
`meas_flipT` flips the frames before anything else.
"""

import math
import pathlib
from typing import Any

import numpy as np

from ...physics.optics import wavelength
from .aberrations import from_ptyrad
from .recipe import centre, detector, geometry, lens, Matrix, Recipe, Section, SWAP


OLD = "probe_defocus", "probe_c3", "probe_c5"
CHANGED = {
    "meas_permute": "exchanges axes of", "meas_crop": "crops", "meas_pad": "pads",
    "meas_resample": "resamples", "meas_add_source_size": "blurs",
    "meas_add_detector_blur": "blurs", "meas_add_poisson_noise": "adds noise to",
}  # fmt: skip


def recognises(tree: dict[str, Any]) -> bool:
    """Whether a tree is of PtyRAD."""
    return "init_params" in tree


def read(path: pathlib.Path, tree: dict[str, Any]) -> Recipe:
    """The recipe in a tree of parameters.

    **Raises:** InputError naming the file and the key that is missing or amiss.
    """
    init = Section(path, "init_params", tree.get("init_params"))
    energy, semiangle = init.number("probe_kv") * 1e3, init.number("probe_conv_angle")
    flips = init.numbers("meas_flipT", 3, [0, 0, 0])
    seen, pixels = detector(flips), init.count("meas_Npix")
    given = dict(init.section("probe_aberrations", {}).tree)
    given |= {key: init.tree[key] for key in OLD if init.has(key)}
    defocus, others = lens(from_ptyrad(given), seen)
    known, notes = geometry(_scan(init), seen)
    angle = _pixel(init, energy, semiangle, pixels)
    known |= {} if angle is None else {"detector_pixel_mrad": angle}
    middle = centre((pixels, pixels), flips)
    known |= {} if middle is None else {"center": middle}
    slices = init.count("obj_Nlayer", 1)
    thickness = init.number("obj_slice_thickness") if slices > 1 else 0.0
    notes += tuple(
        f"PtyRAD {does} the frames ({key})" for key, does in CHANGED.items() if init.has(key)
    )
    experiment: dict[str, Any] = {
        "title": path.stem,
        "beam": {"energy_ev": energy, "semiangle_mrad": semiangle, "aberrations": others},
        "scans": [_file(init) | {"defocus": defocus}],
        "geometry": known,
        "method": _method(path, tree, slices),
    }
    if slices > 1:
        experiment["sections"] = {"start": 0.0, "stop": slices * thickness}
    tilt = _tilt(init)
    return Recipe(
        experiment,
        np.full(slices, thickness),
        init.count("probe_pmode_max", 4),
        init.count("obj_omode_max", 1),
        tilt,
        notes=notes,
    )


def _file(init: Section) -> dict[str, Any]:
    data = init.section("meas_params")
    shape = [init.count("pos_N_scan_slow"), init.count("pos_N_scan_fast")]
    named: dict[str, Any] = {"file": data.text("path"), "scan_shape": shape}
    return named | ({"dataset": data.text("key")} if data.has("key") else {})


def _scan(init: Section) -> Matrix:
    """From (slow, fast) numbers to (y, x) Å."""
    step = init.number("pos_scan_step_size")
    flips = init.numbers("pos_scan_flipT", 3, [0, 0, 0])
    scale, asymmetry, turn, shear = init.numbers("pos_scan_affine", 4, [1, 0, 0, 0])
    cos, sin = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    rows = scale * np.diag([1 + asymmetry / 2, 1 - asymmetry / 2])
    rows = rows @ [[cos, sin], [-sin, cos]] @ [[1, 0], [math.tan(math.radians(shear)), 1]]
    placed = np.diag([-1.0 if flip else 1.0 for flip in flips[:2]])
    return step * rows.T @ (SWAP @ placed if flips[2] else placed)


def _pixel(init: Section, energy: float, semiangle: float, pixels: int) -> float | None:
    """Angle of a detector pixel, mrad; None where PtyRAD fits the disc."""
    how = init.section("meas_calibration", {"mode": "fitRBF"})
    mode = how.text("mode", "fitRBF")
    if mode == "fitRBF":
        return None
    value, mrad = how.number("value"), wavelength(energy) * 1e3
    return {
        "dx": mrad / (pixels * value), "dk": mrad * value, "kMax": 2 * mrad * value / pixels,
        "da": value, "angleMax": 2 * value / pixels, "RBF": semiangle / value,
        "n_alpha": 2 * value * semiangle / pixels,
    }.get(mode)  # fmt: skip


def _tilt(init: Section) -> tuple[float, float]:
    """Of the specimen, where it is given in the file."""
    given = init.section("tilt_params", {}).tree.get("init_tilts")
    if init.tree.get("tilt_source", "simu") != "simu" or not given:
        return (0.0, 0.0)
    y, x = (float(v) for v in np.mean(np.asarray(given, float), axis=0))
    return (0.0 - y, 0.0 - x)


def _method(path: pathlib.Path, tree: dict[str, Any], slices: int) -> dict[str, Any]:
    losses = Section(path, "loss_params", tree.get("loss_params") or {})
    poisson = losses.section("loss_poissn", {}).tree.get("state") is True
    run = Section(path, "recon_params", tree.get("recon_params") or {})
    return {
        "name": "multislice" if slices > 1 else "singleslice",
        "loss": "poisson" if poisson else "amplitude",
        "iterations": run.count("NITER", 200),
    }

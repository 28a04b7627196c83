"""The HDF5 models of PtyRAD (1.0; also those of 0.1 that keep the same keys).

`optimizable_tensors` hold amplitude and phase of the object (states, slices, y, x), the probe
(states, y, x; zero of space on pixel n//2), tilts in mrad, the negative of ours, one thickness for
all slices, and shifts in pixels to be added to `model_attributes/crop_pos`, the corner of each
window. Detectors and windows are square. Intensities are those of patterns that were divided by
the largest value of their mean. The propagator is that of the square root, which differs from ours
by the phase pi lambda³ k⁴ dz/4; before 1.0 its grid was half a pixel off, which is a tilt of
lambda dk/2 along both axes: the stored `H` says which one it was, and the tilt is added.
"""

import pathlib
from typing import Any

import h5py
import numpy as np

from ...physics.optics import PLANCK_TIMES_C, REST_ENERGY, wavelength
from ..counts import InputError
from ..readers.hdf5 import is_hdf5, opened, text, written
from .aberrations import from_ptyrad, to_ptyrad
from .layout import (
    array_at,
    common,
    COMPLEX,
    covering,
    group_at,
    number_at,
    place,
    refuse,
    text_at,
    waves,
)
from .record import Exchange, from_first


NONE = "__NONE__"
TENSORS, ATTRIBUTES = "optimizable_tensors", "model_attributes"


def recognises(path: pathlib.Path) -> bool:
    """Whether the file has the groups of a PtyRAD model."""
    if not is_hdf5(path):
        return False
    with opened(path) as file:
        return all(isinstance(file.get(name), h5py.Group) for name in (TENSORS, ATTRIBUTES))


def read(path: pathlib.Path) -> Exchange:
    """The model in a file that PtyRAD wrote.

    **Raises:** InputError if it is of X-rays, or something in it is missing or amiss.
    """
    with opened(path) as file:
        return _exchange(file)


def _exchange(file: h5py.File) -> Exchange:
    tensors, known = group_at(file, TENSORS), group_at(file, ATTRIBUTES)
    given = _given(file)
    energy = _energy(known, given)
    pixel = number_at(known, "dx")
    probes = array_at(tensors, "probe", 3, COMPLEX)
    planes = _transmission(tensors)
    corners = array_at(known, "crop_pos", 2).astype(float)
    shifts = array_at(tensors, "probe_pos_shifts", 2).astype(float)
    if corners.shape != shifts.shape or corners.shape[1] != 2:
        raise InputError(
            f"{place(known, 'crop_pos')} has shape {corners.shape}, but "
            f"{TENSORS}/probe_pos_shifts {shifts.shape}; both are (frames, 2)."
        )
    positions = corners + shifts + np.array(probes.shape[1:]) // 2
    thickness = _thickness(tensors, known)
    tilts, notes = _tilts(tensors, known, probes.shape[-1], pixel, energy)
    return Exchange(
        energy=energy,
        sampling=(pixel, pixel),
        transmission=planes,
        thicknesses=np.full(planes.shape[1], thickness),
        probes=waves(probes),
        **from_first(positions * pixel, np.zeros(2)),
        weights=_weights(known, len(planes)),
        tilts=tilts,
        unit="relative",
        semiangle=given.get("probe_conv_angle"),
        aberrations=given.get("aberrations", {}),
        scan_shape=_scan_shape(known, len(positions)),
        losses=_losses(file),
        facts=_facts(file, known),
        notes=notes + _notes(known),
    )


def _transmission(tensors: h5py.Group) -> np.ndarray:
    amplitude, phase = (array_at(tensors, key, 4) for key in ("obja", "objp"))
    if amplitude.shape != phase.shape:
        raise InputError(
            f"{place(tensors, 'obja')} has shape {amplitude.shape}, but `objp` {phase.shape}."
        )
    return waves(amplitude * np.exp(1j * phase))


def _given(file: h5py.File) -> dict[str, Any]:
    """What `params/init_params` say of the lens, as far as they are there."""
    group = file.get("params/init_params")
    if not isinstance(group, h5py.Group):
        return {}
    if text_at(group, "probe_illum_type") == "xray":
        raise InputError(f"{place(group, 'probe_illum_type')}: X-rays are not read.")
    found: dict[str, Any] = {}
    for key in ("probe_kv", "probe_conv_angle", "pos_scan_step_size"):
        if key in group and text_at(group, key) != NONE:
            found[key] = number_at(group, key)
    lens = group.get("probe_aberrations")
    if isinstance(lens, h5py.Group):
        found["aberrations"] = from_ptyrad({str(key): number_at(lens, str(key)) for key in lens})
    return found


def _energy(known: h5py.Group, given: dict[str, Any]) -> float:
    """eV: the one that was given, or that of the wavelength, which has single precision."""
    lam = number_at(known, "lambd")
    if not 1e-3 < lam < 1:
        raise InputError(f"{place(known, 'lambd')} is {lam} Å, which no electron microscope has.")
    stated = given.get("probe_kv", 0.0) * 1e3
    if stated > 0 and abs(wavelength(stated) / lam - 1) < 1e-5:
        return stated
    return float(np.hypot(PLANCK_TIMES_C / lam, REST_ENERGY) - REST_ENERGY)


def _thickness(tensors: h5py.Group, known: h5py.Group) -> float:
    key = "slice_thickness"
    return number_at(tensors if key in tensors else known, key)


def _weights(known: h5py.Group, states: int) -> np.ndarray:
    if "omode_occu" not in known:
        return np.full(states, 1 / states)
    return array_at(known, "omode_occu", 1).astype(float)


def _scan_shape(known: h5py.Group, frames: int) -> tuple[int, int] | None:
    keys = "N_scan_slow", "N_scan_fast"
    if any(key not in known for key in keys):
        return None
    slow, fast = (int(number_at(known, key)) for key in keys)
    return (slow, fast) if slow * fast == frames else None


def _tilts(tensors, known, window, pixel, energy) -> tuple[np.ndarray, tuple[str, ...]]:
    """Ours, with that of a propagator on a grid that is half a pixel off."""
    tilts, notes = np.zeros((1, 2)), ()
    if "obj_tilts" in tensors:
        tilts = 0.0 - array_at(tensors, "obj_tilts", 2).astype(float)
    if "H" in known:
        stored = array_at(known, "H", (2, 3), COMPLEX)
        stored = stored.reshape(-1, *stored.shape[-2:])[0]
        thickness = number_at(known, "slice_thickness")
        if stored.shape == (window, window) and _half_off(stored, pixel, thickness, energy):
            slope = wavelength(energy) / (2 * window * pixel)
            tilts = np.arctan(np.tan(tilts * 1e-3) + slope) * 1e3
            notes = (
                f"PtyRAD's propagator was half a pixel off: tilts have {slope * 1e3:.3g} mrad more",
            )
    return tilts, notes


def propagator(window: int, pixel: float, distance: float, energy: float, off: float = 0.0):
    """PtyRAD's H, zero frequency in the corner, on a grid that is `off` pixels off."""
    lam = wavelength(energy)
    k = np.fft.ifftshift(np.arange(window) - window // 2 + off) / (window * pixel)
    return np.exp(2j * np.pi * distance * np.sqrt(lam**-2 - k[:, None] ** 2 - k[None] ** 2))


def _half_off(stored: np.ndarray, pixel: float, distance: float, energy: float) -> bool:
    """Whether the stored propagator is that of a grid half a pixel off."""
    scores = [
        abs(np.vdot(propagator(len(stored), pixel, distance, energy, off), stored))
        for off in (0.0, 0.5)
    ]
    return bool(scores[1] > scores[0] * (1 + 1e-7) and scores[1] > 0.99 * stored.size)


def _losses(file: h5py.File) -> dict[str, np.ndarray]:
    """`loss_iters` are pairs of iteration and loss."""
    stored = file.get("loss_iters")
    if not isinstance(stored, h5py.Dataset) or stored.ndim != 2 or not stored.size:
        return {}
    return {"loss": array_at(file, "loss_iters", 2)[:, -1].astype(float)}


def _facts(file: h5py.File, known: h5py.Group) -> dict[str, Any]:
    facts: dict[str, Any] = {"ptyrad_version": text(file.get("ptyrad_version"))}
    if isinstance(file.get("niter"), h5py.Dataset):
        facts["iterations"] = int(number_at(file, "niter"))
    if "detector_blur_std" in known and text_at(known, "detector_blur_std") != NONE:
        facts["detector_blur_std"] = number_at(known, "detector_blur_std")
    return facts


def _notes(known: h5py.Group) -> tuple[str, ...]:
    notes = []
    mode = text_at(known, "simu_match_mode")
    if mode not in (None, NONE, ""):
        notes.append(f"PtyRAD made patterns by the mode {mode!r} of waves in a larger window")
    if "detector_blur_std" in known and text_at(known, "detector_blur_std") != NONE:
        notes.append("PtyRAD blurred the patterns of its model (detector_blur_std, pixels)")
    return tuple(notes)


def write(path: pathlib.Path, exchange: Exchange) -> None:
    """A model from which PtyRAD starts.

    In its parameters: `obj_source`, `probe_source`, `pos_source` and `tilt_source: PtyRAD`, each
    with this path; `meas_calibration: {mode: dx, value: ...}` with the sampling;
    `pos_scan_rand_std: null`, or positions are moved at random; and `probe_normalization`.

    **Raises:** InputError for pixels or windows that are not square, slices of different
    thicknesses, or a band limit.
    """
    one = covering(exchange)
    window = one.probes.shape[1:]
    if window[0] != window[1]:
        refuse(path, f"windows of {window} pixels", "PtyRAD's are square")
    pixel = common(path, one.sampling, "pixel size", "PtyRAD")
    gaps = one.thicknesses[:-1] if len(one.thicknesses) > 1 else one.thicknesses
    thickness = common(path, gaps, "slice thickness", "PtyRAD")
    if one.band_limit is not None:
        refuse(path, "a band limit", "set it to None if it may be left out")
    corners = one.corners
    whole = np.rint(corners).astype(np.int32)
    with written(path) as file:
        tensors = file.create_group(TENSORS)
        tensors["obja"] = np.abs(one.transmission).astype(np.float32)
        tensors["objp"] = np.angle(one.transmission).astype(np.float32)
        tensors["probe"] = one.probes.astype(np.complex64)
        tensors["obj_tilts"] = (0.0 - one.tilts).astype(np.float32)
        tensors["slice_thickness"] = np.float32(thickness)
        tensors["probe_pos_shifts"] = (corners - whole).astype(np.float32)
        known = file.create_group(ATTRIBUTES)
        known["crop_pos"], known["omode_occu"] = whole, one.weights.astype(np.float32)
        known["dx"], known["dk"], known["lambd"] = pixel, 1 / (window[0] * pixel), one.wavelength
        known["slice_thickness"] = thickness
        known["meas_Npix"] = known["simu_Npix"] = window[0]
        known["H"] = propagator(window[0], pixel, thickness, one.energy).astype(np.complex64)
        scan = one.scan_shape or (1, len(one))
        known["N_scan_slow"], known["N_scan_fast"] = scan
        _write_given(file.create_group("params/init_params"), one)
        losses = next(iter(one.losses.values()), np.zeros(0))
        file["loss_iters"] = np.stack([np.arange(1, len(losses) + 1), losses], axis=1)
        file["niter"], file["ptyrad_version"] = len(losses), "1.0.0"


def _write_given(group: h5py.Group, one: Exchange) -> None:
    group["probe_illum_type"], group["probe_kv"] = "electron", one.energy / 1e3
    group["probe_conv_angle"] = NONE if one.semiangle is None else one.semiangle
    lens = group.create_group("probe_aberrations")
    for name, value in to_ptyrad(one.aberrations).items():
        lens[name] = value

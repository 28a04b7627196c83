"""The HDF5 state of phaser (files of version 0.1 and 0.2, phaserEM up to 0.3.1).

Waves have the zero of space on pixel n//2, the object a `corner` (Å, y and x) where pixel (0, 0)
lies. A position is the middle of the window, (n - 1)/2 pixels from its first: half a pixel before
the probe's centre where n is even. Tilts are the negative of ours, exp(+2 pi i dz k.tan(tilt)). The
transform is unitary and probes are in electrons. What is not in the file: the aberrations, and the
fraction `bwlim_frac` of the Nyquist frequency, 2/3 by default, beyond which the engine's free
propagation let nothing pass.
"""

import json
import pathlib
from typing import Any

import h5py
import numpy as np

from ...physics.optics import PLANCK_TIMES_C, REST_ENERGY
from ..counts import InputError
from ..readers.hdf5 import is_hdf5, opened, written
from .layout import (
    array_at,
    COMPLEX,
    covering,
    group_at,
    number_at,
    place,
    single_object,
    text_at,
    waves,
)
from .record import Exchange, from_first


KIND, VERSIONS = "phaser_state", ("0.1", "0.2")


def recognises(path: pathlib.Path) -> bool:
    """Whether the file says that it is a phaser state."""
    if not is_hdf5(path):
        return False
    with opened(path) as file:
        return text_at(file, "type") == KIND


def read(path: pathlib.Path) -> Exchange:
    """The state in a file that phaser wrote.

    **Raises:** InputError if it is of another kind or version, or something in it is amiss.
    """
    with opened(path) as file:
        kind, version = text_at(file, "type"), text_at(file, "version")
        if kind != KIND or version not in VERSIONS:
            raise InputError(
                f"{path}: `type` and `version` are {kind!r} and {version!r}; known are {KIND!r} "
                f"and {VERSIONS}."
            )
        return _exchange(file)


def _exchange(file: h5py.File) -> Exchange:
    thing, lens = group_at(file, "object"), group_at(file, "probe")
    sampling = _pair(thing, "sampling")
    probes = array_at(lens, "data", 3, COMPLEX)
    shape = np.array(probes.shape[1:])
    planes = array_at(thing, "data", 3, COMPLEX)
    if not np.allclose(_pair(lens, "extent") / shape, sampling, rtol=1e-4):
        raise InputError(
            f"{place(lens, 'extent')}: pixels of {_pair(lens, 'extent') / shape} Å, but those of "
            f"the object are {sampling} Å; let phaser resample one of them first."
        )
    scan, tilts = _scan(file)
    positions = scan.reshape(-1, 2) + _half(shape) * sampling
    tilts = np.zeros((1, 2)) if tilts is None else -tilts.reshape(-1, 2)
    if not np.ptp(tilts, axis=0).any():
        tilts = tilts[:1]
    lam = number_at(file, "wavelength")
    return Exchange(
        energy=_energy(lam),
        sampling=(float(sampling[0]), float(sampling[1])),
        transmission=waves(planes)[None],
        thicknesses=_thicknesses(thing, len(planes)),
        probes=waves(probes),
        **from_first(positions, _pair(thing, "corner")),
        weights=np.ones(1),
        tilts=tilts,
        scan_shape=(scan.shape[0], scan.shape[1]) if scan.ndim == 3 else None,
        losses=_losses(file),
        facts=_facts(file, positions),
        notes=("phaser's files do not say which `band_limit` (bwlim_frac, by default 2/3) it had",)
        if len(planes) > 1
        else (),
    )


def _half(shape: np.ndarray) -> np.ndarray:
    """From the middle of a window to the pixel n//2, in pixels."""
    return shape // 2 - (shape - 1) / 2


def _energy(lam: float) -> float:
    """eV of electrons of this wavelength (Å)."""
    if not 1e-3 < lam < 1:
        raise InputError(f"`wavelength` is {lam} Å, which no electron microscope has.")
    return float(np.hypot(PLANCK_TIMES_C / lam, REST_ENERGY) - REST_ENERGY)


def _pair(group: h5py.Group, key: str) -> np.ndarray:
    values = array_at(group, key, 1).astype(float)
    if values.shape != (2,):
        raise InputError(f"{place(group, key)} has {len(values)} values; expected y and x.")
    return values


def _scan(file: h5py.File) -> tuple[np.ndarray, np.ndarray | None]:
    """Positions and tilts, (..., 2); version 0.1 has them beside each other."""
    stored = file.get("scan")
    group, name = file, "scan"
    if isinstance(stored, h5py.Group):
        group, name = stored, "data"
    scan = array_at(group, name, (2, 3)).astype(float)
    tilt = group.get("tilt")
    has = isinstance(tilt, h5py.Dataset) and tilt.shape is not None
    tilts = array_at(group, "tilt", (2, 3)).astype(float) if has else None
    if scan.shape[-1] != 2 or (tilts is not None and tilts.shape != scan.shape):
        raise InputError(
            f"{place(group, name)} has shape {scan.shape}; it and `tilt`, if any, are (..., 2)."
        )
    return scan, tilts


def _thicknesses(thing: h5py.Group, slices: int) -> np.ndarray:
    """One for each slice; a single slice may have none."""
    stored = thing.get("thicknesses")
    if slices == 1 and isinstance(stored, h5py.Dataset) and stored.size == 0:
        return np.zeros(1)
    return array_at(thing, "thicknesses", 1).astype(float)


def _losses(file: h5py.File) -> dict[str, np.ndarray]:
    stored = file.get("progress")
    if not isinstance(stored, h5py.Group):
        return {}
    if "detector_errors" in stored:
        return {"total_loss": array_at(stored, "detector_errors", 1).astype(float)}
    groups = {str(name): item for name, item in stored.items() if isinstance(item, h5py.Group)}
    sizes = {name: item.get("values") for name, item in groups.items()}
    filled = [n for n, item in sizes.items() if isinstance(item, h5py.Dataset) and item.size]
    return {name: array_at(groups[name], "values", 1).astype(float) for name in filled}


def _facts(file: h5py.File, positions: np.ndarray) -> dict[str, Any]:
    """phaser's frame, and at which iteration it was left."""
    facts: dict[str, Any] = {"first_position_A": [float(v) for v in positions[0]]}
    done = file.get("iter")
    if isinstance(done, h5py.Group) and "total_iter" in done:
        facts["iterations"] = int(number_at(done, "total_iter"))
    return facts


def write(path: pathlib.Path, exchange: Exchange) -> None:
    """A state from which phaser starts: `init: {state: path}` in its plan.

    Positions are counted from the middle of the scan, as phaser counts them. Tell its engines
    `probe_modes`, and `bwlim_frac: null` where the exchange has no band limit.

    **Raises:** InputError for a mixed object.
    """
    one = covering(single_object(path, exchange))
    shape, sampling = np.array(one.probes.shape[1:]), np.array(one.sampling)
    middle = (one.positions.min(axis=0) + one.positions.max(axis=0)) / 2
    positions = one.positions - middle - _half(shape) * sampling
    scan = one.scan_shape or (len(one),)
    with written(path) as file:
        file["type"], file["version"] = KIND, VERSIONS[-1]
        file["wavelength"] = one.wavelength
        lens = file.create_group("probe")
        lens["type"], lens["data"] = "pixelated", one.probes
        lens["sampling"], lens["extent"] = sampling, sampling * shape
        _write_object(file.create_group("object"), one, middle, positions)
        group = file.create_group("scan")
        group["data"] = group["initial"] = positions.reshape(*scan, 2)
        if np.any(one.tilts):
            tilts = np.broadcast_to(-one.tilts, positions.shape)
            group["tilt"] = tilts.reshape(*scan, 2)
        rows, columns = np.indices(scan if len(scan) == 2 else (1, *scan)).reshape(2, *scan)
        facts = {"type": "raster", "raster_rows": rows.tolist(), "raster_cols": columns.tolist()}
        if one.scan_shape is not None:
            group["meta"] = json.dumps(facts)
        _write_progress(file, one)


def _write_object(group: h5py.Group, one: Exchange, middle: np.ndarray, positions) -> None:
    slices, field = one.transmission.shape[1], np.array(one.transmission.shape[2:])
    group["type"], group["data"] = "pixelated", one.transmission[0]
    group["thicknesses"] = one.thicknesses if slices > 1 else np.zeros(0)
    group["zs"] = one.depths
    sampling = np.array(one.sampling)
    group["sampling"], group["extent"] = sampling, sampling * field
    group["corner"] = one.origin - middle
    group["region_min"], group["region_max"] = positions.min(axis=0), positions.max(axis=0)


def _write_progress(file: h5py.File, one: Exchange) -> None:
    count = max((len(values) for values in one.losses.values()), default=0)
    done = file.create_group("iter")
    for name, value in {"engine_num": 0, "engine_iter": 0, "total_iter": count}.items():
        done[name] = np.uint64(value)
    progress = file.create_group("progress")
    for name, values in one.losses.items():
        group = progress.create_group(name)
        group["iters"], group["values"] = np.arange(1, len(values) + 1), np.asarray(values, float)

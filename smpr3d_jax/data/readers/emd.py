"""EMD 1.0 datacubes, as py4DSTEM writes them: dense frames with a calibration.

The array is (slow scan, fast scan, detector row, detector column), which the format calls Rx, Ry,
Qx, Qy. What is known of the experiment stands twice, in the axes `dim0` to `dim3` and in the group
`calibration`, which wins. Of an axis only the step is used: its first entry may be in other units.
`QR_rotation` turns a vector from the detector's axes to the scan's, after exchanging its components
if `QR_flip` (as py4DSTEM applies it to Bragg vectors); our rotation turns positions the other way,
exchanging first.
"""

import contextlib
import math
import os
import pathlib
import uuid
from collections.abc import Iterator, Mapping
from typing import Any

import h5py
import numpy as np
from jaxtyping import UInt

from ..counts import InputError
from .dense import Append, appending
from .hdf5 import (
    attribute,
    dataset_at,
    frames_of,
    is_hdf5,
    listing,
    number,
    opened,
    storage_notes,
    text,
    together,
    written,
)
from .source import layout, numeric, Source
from .units import sampling, Space


PROBE = (
    ("semiangle_mrad", "convergence_semiangle_mrad"),
    ("semiangle_pixels", "convergence_semiangle_pixels"),
    # It is in pixels, whatever its name suggests.
    ("semiangle_pixels", "probe_semiangle"),
    ("energy_ev", "energy_ev"),
)


SAMPLINGS: dict[str, tuple[Space, str]] = {
    "scan_step_A": ("R", "A"),
    "detector_pixel_mrad": ("Q", "mrad"),
    "detector_pixel_inv_A": ("Q", "A^-1"),
}


def recognises(path: pathlib.Path) -> bool:
    """Whether the file is HDF5 and calls itself an EMD 1.0 file."""
    if not is_hdf5(path):
        return False
    with opened(path) as file:
        return text(attribute(file, "emd_group_type")) == "file"


def open_source(
    path: pathlib.Path,
    dataset: str | None = None,
    scan_shape: tuple[int, int] | None = None,
    frame_shape: tuple[int, int] | None = None,
) -> Source:
    """Describe the datacube of an EMD file, `dataset` if there are several.

    **Raises:** InputError if there is no datacube, more than one and no `dataset`, or its shape or
    type is not that of counts.
    """
    with opened(path) as file:
        cube, data = _find(path, file, dataset, 3 if scan_shape is not None else 4)
        label = f"{path}: dataset '{cube.name}/data'"
        dtype = numeric(label, data.dtype)
        scan, frame = layout(label, data.shape, scan_shape, frame_shape)
        dims = [cube.get(f"dim{i}") for i in range(data.ndim)]
        facts, notes = facts_of(_calibration(cube), dims)
        notes += storage_notes(path, data)
        name, stored = f"{cube.name}/data", together(data)
    load = frames_of(path, name)
    return Source(
        path, "emd", name, scan, frame, dtype, "dense", load, facts, notes, together=stored
    )


def _find(
    path: pathlib.Path, file: h5py.File, dataset: str | None, axes: int
) -> tuple[h5py.Group, h5py.Dataset]:
    """The one datacube, or the one that was asked for, and its data."""
    found: dict[str, tuple[h5py.Group, h5py.Dataset]] = {}

    def visit(name: str, item: object) -> None:
        if isinstance(item, h5py.Group) and "emd_group_type" in item.attrs:
            data = dataset_at(item, "data")
            if data is not None and data.ndim >= 3:
                found[f"/{name}"] = item, data

    file.visititems(visit)
    if dataset is not None:
        wanted = "/" + dataset.strip("/").removesuffix("/data")
        chosen = [name for name in found if name == wanted or name.endswith(wanted)]
    else:
        chosen = [name for name, (_, data) in found.items() if axes <= data.ndim <= 4]
    if len(chosen) == 1:
        return found[chosen[0]]
    if chosen:
        raise InputError(
            f"{path}: has {len(chosen)} datacubes: {', '.join(chosen)}; say which with `dataset`."
        )
    wanted = "no 4D datacube (scan_y, scan_x, ky, kx)" if dataset is None else f"no {dataset!r}"
    raise InputError(
        f"{path}: has {wanted}; it has {listing(file)}. Name one with `dataset`; a stack of frames "
        "also needs a `scan_shape`."
    )


def _calibration(cube: h5py.Group) -> dict[str, Any]:
    """The calibration nearest to the datacube: its own, or that of a group around it."""
    group: Any = cube
    while True:
        bundle = group.get("metadatabundle")
        for item in bundle.values() if isinstance(bundle, h5py.Group) else ():
            calls_itself = text(attribute(item, "python_class"))
            if isinstance(item, h5py.Group) and calls_itself == "Calibration":
                return dict(item.items())
        if group.name == "/":
            return {}
        group = group.parent


def facts_of(known: dict[str, Any], dims: list[Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What a calibration and the axes say, in our units, and where they contradict each other.

    `known` has a dataset or a value for each key; `dims` are the axes of four, or of a stack.
    """
    facts: dict[str, Any] = {}
    notes: list[str] = []
    # In a stack of frames no axis has the step of the scan.
    scan: list[Any] = dims[:2] if len(dims) == 4 else []
    spaces: dict[Space, list[Any]] = {"R": scan, "Q": dims[-2:]}
    for kind, axes in spaces.items():
        size, units = (known.get(f"{kind}_pixel_{what}") for what in ("size", "units"))
        said = sampling(kind, number(size), text(units))
        drawn = [step for dim in axes if (step := _axis(kind, dim)) is not None]
        if said is not None:
            name, value = said
            facts[name] = (value, value)
            notes += [
                f"{name} is {value:g} in the calibration, which is used, but {step:g} along an axis"
                for axis, step in drawn
                if axis == name and not math.isclose(step, value, rel_tol=1e-3)
            ]
        elif len(drawn) == 2 and drawn[0][0] == drawn[1][0]:
            facts[drawn[0][0]] = (drawn[0][1], drawn[1][1])
    facts |= _orientation(known) | _probe(known)
    return facts, tuple(dict.fromkeys(notes))


def _axis(kind: Space, dim: Any) -> tuple[str, float] | None:
    """Sampling along an axis, from its first two entries."""
    if not isinstance(dim, h5py.Dataset) or dim.dtype.kind not in "iuf":
        return None
    if dim.ndim != 1 or len(dim) < 2:
        return None
    first, second = dim[:2].astype(float)
    return sampling(kind, float(second - first), text(attribute(dim, "units")))


def _orientation(known: dict[str, Any]) -> dict[str, Any]:
    """Rotation and transposition of the scan; a bare `QR_flip = False` is only a default."""
    angle, degrees = number(known.get("QR_rotation")), number(known.get("QR_rotation_degrees"))
    flip = bool(number(known.get("QR_flip")) or 0)
    if angle is not None:
        degrees = math.degrees(angle)
    facts: dict[str, Any] = {}
    if degrees is not None:
        facts["rotation_deg"] = -degrees if flip else degrees
    if degrees is not None or flip:
        facts["transpose"] = flip
    return facts


def _probe(known: dict[str, Any]) -> dict[str, Any]:
    """Centre of the detector, aperture and energy, as far as they were written down."""
    facts: dict[str, Any] = {}
    y, x = (number(known.get(f"{name}_mean", known.get(name))) for name in ("qx0", "qy0"))
    if y is not None and x is not None:
        facts["center"] = (y, x)
    for fact, key in PROBE:
        value = number(known.get(key))
        if value is not None and value > 0:
            facts.setdefault(fact, value)
    return facts


def write_emd(
    path: str | os.PathLike,
    frames: UInt[np.ndarray, "scan_y scan_x ky kx"],
    scan_step: float | tuple[float, float],
    detector_pixel_mrad: float,
    energy: float | None = None,
) -> None:
    """Write counts as an EMD 1.0 datacube that py4DSTEM reads.

    `scan_step` in Å (one, or slow and fast), detector pixel in mrad, energy in eV. The zero
    frequency belongs in the centre, n//2. The file appears under its name when it is complete.
    """
    steps = scan_step if isinstance(scan_step, tuple) else (scan_step, scan_step)
    facts: dict[str, Any] = {
        "scan_step_A": steps,
        "detector_pixel_mrad": (detector_pixel_mrad, detector_pixel_mrad),
    }
    if energy is not None:
        facts["energy_ev"] = energy
    scan_y, scan_x, ky, kx = frames.shape
    with writing(path, (scan_y, scan_x), (ky, kx), frames.dtype, facts) as append:
        append(frames.reshape(-1, ky, kx))


@contextlib.contextmanager
def writing(
    path: str | os.PathLike,
    scan_shape: tuple[int, int],
    frame_shape: tuple[int, int],
    dtype: np.dtype,
    facts: Mapping[str, Any] | None = None,
) -> Iterator[Append]:
    """Write a datacube in parts: gives a function that takes the frames of the next positions.

    `facts` are those of a `Source`; those that the format has no place for are left out.
    """
    known = facts or {}
    with written(path) as file:
        file.attrs.update(emd_group_type="file", version_major=1, version_minor=0)
        file.attrs.update(UUID=str(uuid.uuid4()), authoring_program="smpr3d_jax", authoring_user="")
        root = _group(file, "datacube_root", "root", "Root")
        cube = _group(root, "datacube", "array", "DataCube")
        data = cube.create_dataset("data", (*scan_shape, *frame_shape), dtype)
        data.attrs["units"] = "pixel intensity"
        for i, (name, (step, unit)) in enumerate(_axes(known)):
            dim = cube.create_dataset(f"dim{i}", data=np.arange(2) * step)
            dim.attrs.update(name=name, units=unit)
        bundle = _group(root, "metadatabundle", "metadatabundle")
        calibration = _group(bundle, "calibration", "metadata", "Calibration")
        for key, value in _calibrated(known).items():
            kind = {bool: "bool", str: "string"}.get(type(value), "number")
            calibration.create_dataset(key, data=value).attrs["type"] = kind
        yield appending(data)


def _steps(facts: Mapping[str, Any], kind: Space) -> tuple[tuple[float, float], str]:
    """Steps along the two axes of the scan or the detector, and their unit."""
    for name, (space, unit) in SAMPLINGS.items():
        if space == kind and name in facts:
            y, x = facts[name]
            return (float(y), float(x)), unit
    return (1.0, 1.0), "pixels"


def _axes(facts: Mapping[str, Any]) -> Iterator[tuple[str, tuple[float, str]]]:
    for kind in ("R", "Q"):
        steps, unit = _steps(facts, kind)
        yield from ((f"{kind}{axis}", (s, unit)) for axis, s in zip("xy", steps, strict=True))


def _calibrated(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The calibration that `facts_of` takes back to these facts."""
    known: dict[str, Any] = {}
    for kind in ("R", "Q"):
        (y, x), unit = _steps(facts, kind)
        if y == x and unit != "pixels":
            known |= {f"{kind}_pixel_size": y, f"{kind}_pixel_units": unit}
    flip = bool(facts.get("transpose", False))
    known["QR_flip"] = flip
    if "rotation_deg" in facts:
        degrees = float(facts["rotation_deg"])
        known["QR_rotation_degrees"] = -degrees if flip else degrees
    if "center" in facts:
        known["qx0"], known["qy0"] = (float(c) for c in facts["center"])
    for fact, key in PROBE:
        if fact in facts and fact not in (f for f, k in PROBE if k in known):
            known[key] = float(facts[fact])
    return known


def _group(parent: h5py.Group, name: str, kind: str, python_class: str | None = None) -> h5py.Group:
    group = parent.create_group(name)
    group.attrs["emd_group_type"] = kind
    if python_class is not None:
        group.attrs["python_class"] = python_class
    return group

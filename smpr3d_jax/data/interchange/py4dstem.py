"""What py4DSTEM (0.14) saves of single-slice, multislice and mixed-state ptychography: EMD 1.0.

A group whose `python_class` is one of `CLASSES` holds `_object_emd/data` ([slices,] y, x; complex,
or real phases where `object_type` is `potential`), `_probe_emd/data` ([states,] y, x; zero of
space in the corner), and in `metadatabundle` four dictionaries. py4DSTEM calls axis 0 x and axis 1
y: its `theta_x` is our tilt along y. Its signs are ours: exp(-i chi), exp(-i pi lambda dz k²),
exp(-2 pi i dz k.tan(tilt)), polar Krivanek names, C10 = -defocus. Its transform is not unitary, so
that a probe of n pixels holds 1/n of the counts. `positions_px` are the probes' centres in pixels
of the object. With `data_transpose` only positions are exchanged; the patterns stay.
"""

import pathlib
from typing import Any

import h5py
import numpy as np

from ...physics.optics import POLAR
from ..counts import InputError
from ..readers.hdf5 import attribute, is_hdf5, opened, text, written
from .aberrations import from_py4dstem, to_py4dstem
from .layout import (
    array_at,
    COMPLEX,
    covering,
    group_at,
    number_at,
    place,
    refuse,
    single_object,
    text_at,
    waves,
)
from .record import Exchange, from_first


CLASSES = (
    "SingleslicePtychography",
    "MultislicePtychography",
    "MixedstatePtychography",
    "MixedstateMultislicePtychography",
)
NONE = "_None"


def recognises(path: pathlib.Path) -> bool:
    """Whether the file holds a reconstruction of one of `CLASSES`."""
    if not is_hdf5(path):
        return False
    with opened(path) as file:
        return bool(_made_by(file, CLASSES))


def read(path: pathlib.Path) -> Exchange:
    """The reconstruction in a file that py4DSTEM wrote.

    **Raises:** InputError if there is none, or more than one, or something in it is amiss.
    """
    with opened(path) as file:
        found = _made_by(file, CLASSES)
        if len(found) != 1:
            raise InputError(
                f"{path}: holds {len(found)} ptychographic reconstructions, expected one of "
                f"{', '.join(CLASSES)}."
            )
        return _exchange(found[0])


def _made_by(file: h5py.File, classes: tuple[str, ...]) -> list[h5py.Group]:
    found: list[h5py.Group] = []

    def visit(_: str, item: object) -> None:
        if isinstance(item, h5py.Group) and text(attribute(item, "python_class")) in classes:
            found.append(item)

    file.visititems(visit)
    return found


def _exchange(group: h5py.Group) -> Exchange:
    bundle = group_at(group, "metadatabundle")
    known = group_at(bundle, "instantiation_metadata")
    before = group_at(bundle, "preprocess_metadata")
    sampling = array_at(before, "sampling", 1).astype(float)
    planes = _transmission(group_at(group, "_object_emd"), text_at(known, "object_type"))
    probes = array_at(group_at(group, "_probe_emd"), "data", (2, 3), COMPLEX)
    probes = np.fft.fftshift(probes.reshape(-1, *probes.shape[-2:]), axes=(-2, -1))
    positions = array_at(before, "positions_px", 2).astype(float)
    if positions.shape[1] != 2 or sampling.shape != (2,):
        raise InputError(f"{place(before, 'positions_px')}, `sampling`: two columns are expected.")
    planes, before_first, notes = _extended(planes, positions, probes.shape[1:])
    return Exchange(
        energy=number_at(known, "energy"),
        sampling=(float(sampling[0]), float(sampling[1])),
        transmission=planes[None],
        thicknesses=_thicknesses(known, len(planes)),
        probes=waves(probes * np.sqrt(probes[0].size)),
        **from_first(positions * sampling, -before_first * sampling),
        weights=np.ones(1),
        tilts=np.array([[_number(known, "theta_x"), _number(known, "theta_y")]]),
        unit="counts",
        semiangle=_number(known, "semiangle_cutoff") or None,
        aberrations=_aberrations(bundle),
        losses=_losses(bundle),
        facts=_facts(group, known, before),
        notes=notes + _notes(before, probes.shape[1:]),
    )


def _transmission(group: h5py.Group, kind: str | None) -> np.ndarray:
    """(slices, y, x) of a `complex` object, or of a `potential`, which is a phase in rad."""
    values = array_at(group, "data", (2, 3), COMPLEX)
    values = values.reshape(-1, *values.shape[-2:])
    if kind == "potential":
        return np.exp(1j * np.real(values))
    if kind != "complex":
        raise InputError(f"{place(group, 'data')}: objects of type {kind!r} are not known.")
    return waves(values)


def _thicknesses(known: h5py.Group, slices: int) -> np.ndarray:
    """py4DSTEM has a thickness for each gap; the last slice is given that of the one before."""
    if slices == 1:
        return np.zeros(1)
    gaps = array_at(known, "slice_thicknesses", 1).astype(float)
    if len(gaps) != slices - 1:
        raise InputError(
            f"{place(known, 'slice_thicknesses')} has {len(gaps)} values for {slices} slices."
        )
    return np.append(gaps, gaps[-1])


def _number(known: h5py.Group, key: str) -> float:
    """A number that may be None or missing: 0."""
    return 0.0 if text_at(known, key) == NONE or key not in known else number_at(known, key)


def _aberrations(bundle: h5py.Group) -> dict[str, float]:
    stored = group_at(bundle, "aberrations_metadata")
    return from_py4dstem({name: number_at(stored, name) for name in POLAR if name in stored})


def _losses(bundle: h5py.Group) -> dict[str, np.ndarray]:
    stored = bundle.get("reconstruction_metadata")
    key = "reconstruction_error"
    if not isinstance(stored, h5py.Group) or not isinstance(stored.get(key), h5py.Dataset):
        return {}
    return {key: array_at(stored, key, (0, 1)).astype(float).reshape(-1)}


def _facts(group: h5py.Group, known: h5py.Group, before: h5py.Group) -> dict[str, Any]:
    facts: dict[str, Any] = {"python_class": text(attribute(group, "python_class"))}
    facts["object_type"] = text_at(known, "object_type")
    if "rotation_angle_rad" in before and text_at(before, "rotation_angle_rad") != NONE:
        facts["rotation_deg"] = float(np.rad2deg(number_at(before, "rotation_angle_rad")))
    if "data_transpose" in before and text_at(before, "data_transpose") != NONE:
        facts["transpose"] = bool(number_at(before, "data_transpose"))
    return facts


def _extended(planes, positions, window) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """The object, periodic, with as many pixels more as windows reach beyond it, and where."""
    corners = np.rint(positions).astype(int) - np.array(window) // 2
    low = np.maximum(-corners.min(axis=0), 0)
    high = np.maximum((corners + window).max(axis=0) - planes.shape[1:], 0)
    if not low.any() and not high.any():
        return planes, low, ()
    note = (
        f"windows leave the object by up to {max(low.max(), high.max())} pixels; it was continued "
        "periodically, as py4DSTEM does"
    )
    pads = [(0, 0), *zip(low, high, strict=True)]
    return np.pad(planes, pads, mode="wrap"), low, (note,)


def _notes(before: h5py.Group, window: tuple[int, ...]) -> tuple[str, ...]:
    if "amplitudes_shape" not in before:
        return ()
    shape = tuple(int(n) for n in array_at(before, "amplitudes_shape", 1))
    if shape == tuple(window):
        return ()
    return (f"py4DSTEM compared waves of {tuple(window)} pixels with patterns of {shape}",)


def write(path: pathlib.Path, exchange: Exchange) -> None:
    """A file that `py4DSTEM.read` takes for one of its own.

    Positions are counted from object pixel (0, 0). To go on in py4DSTEM attach the datacube, then
    `preprocess(force_com_rotation=0, force_com_transpose=False, center_positions_in_fov=False)`.

    **Raises:** InputError for a mixed object, a tilt for each frame, or a band limit.
    """
    exchange = covering(single_object(path, exchange))
    if len(exchange.tilts) > 1 and np.ptp(exchange.tilts, axis=0).any():
        refuse(path, "a tilt for each frame", "give the mean as the only row of `tilts`")
    states, slices = len(exchange.probes), exchange.transmission.shape[1]
    name = CLASSES[(slices > 1) + 2 * (states > 1)]
    with written(path) as file:
        _stamp(file, emd_group_type="file", version_major=1, version_minor=0)
        _stamp(file, authoring_program="emdfile", authoring_user="")
        root = file.create_group("reconstruction_root")
        _stamp(root, emd_group_type="root", python_class="Root")
        group = root.create_group("reconstruction")
        _stamp(group, emd_group_type="custom", python_class=name)
        probes = np.fft.ifftshift(exchange.probes, axes=(-2, -1))
        probes = probes / np.sqrt(probes[0].size)
        planes = exchange.transmission[0]
        _write_array(group, "_object_emd", planes if slices > 1 else planes[0])
        _write_array(group, "_probe_emd", probes if states > 1 else probes[0])
        bundle = group.create_group("metadatabundle")
        _stamp(bundle, emd_group_type="metadatabundle")
        for title, facts in _dictionaries(exchange).items():
            _write_dictionary(bundle.create_group(title), facts)


def _stamp(item: h5py.Group | h5py.Dataset, **attributes: Any) -> None:
    item.attrs.update(attributes)


def _write_array(group: h5py.Group, name: str, values: np.ndarray) -> None:
    item = group.create_group(name)
    _stamp(item, emd_group_type="custom_array", python_class="Array")
    _stamp(item.create_dataset("data", data=values), units="")
    for axis in range(values.ndim):
        dim = item.create_dataset(f"dim{axis}", data=np.arange(2))
        _stamp(dim, name=f"dim{axis}", units="pixels")


def _dictionaries(exchange: Exchange) -> dict[str, dict[str, Any]]:
    """The four of `metadatabundle`, under the names that py4DSTEM gives them."""
    sampling, window = np.array(exchange.sampling), np.array(exchange.probes.shape[1:])
    positions = exchange.positions - exchange.origin
    slices = exchange.transmission.shape[1]
    theta_x, theta_y = (float(v) for v in exchange.tilts.mean(axis=0))
    known: dict[str, Any] = {
        "energy": exchange.energy, "semiangle_cutoff": exchange.semiangle, "rolloff": 2.0,
        "object_padding_px": np.zeros((2, 2)), "object_fov_ang": None, "object_type": "complex",
        "verbose": True, "device": "cpu", "storage": "cpu", "clear_fft_cache": True,
        "name": "reconstruction", "vacuum_probe_intensity": None, "positions": positions,
    }  # fmt: skip
    if len(exchange.probes) > 1:
        known["num_probes"] = len(exchange.probes)
    if slices > 1:
        known |= {"num_slices": slices, "slice_thicknesses": exchange.thicknesses[:-1]}
        known |= {"theta_x": theta_x, "theta_y": theta_y}
    before = {
        "rotation_angle_rad": 0.0, "data_transpose": False,
        "positions_px": positions / sampling, "region_of_interest_shape": window,
        "amplitudes_shape": window, "num_diffraction_patterns": len(positions),
        "sampling": sampling, "positions_mask": None,
        "angular_sampling": exchange.wavelength * 1e3 / (window * sampling),
    }  # fmt: skip
    errors = next(iter(exchange.losses.values()), np.zeros(1))
    lens = dict.fromkeys(POLAR, 0.0) | to_py4dstem(exchange.aberrations)
    return {
        "instantiation_metadata": known,
        "preprocess_metadata": before,
        "reconstruction_metadata": {"reconstruction_error": list(errors)},
        "aberrations_metadata": lens,
    }


TUPLES = "sampling", "angular_sampling"


def _write_dictionary(group: h5py.Group, facts: dict[str, Any]) -> None:
    """Entries as emdfile writes them, each with the name of its type."""
    _stamp(group, emd_group_type="metadata", python_class="Metadata")
    for key, value in facts.items():
        if key == "object_padding_px":
            item = group.create_group(key)
            _stamp(item, type="tuple_of_arrays", length=len(value))
            for i, row in enumerate(value):
                item.create_dataset(str(i), data=row)
            continue
        kind = _kind(key, value)
        stored = NONE if value is None else value
        _stamp(group.create_dataset(key, data=stored), type=kind)


def _kind(key: str, value: Any) -> str:
    if value is None:
        return "None"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, str):
        return "string"
    if isinstance(value, int | float):
        return "number"
    return "tuple" if key in TUPLES else "list" if isinstance(value, list) else "array"

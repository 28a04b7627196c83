"""NeXus files: the signal of an NXdata group, with its axes.

Which group: the one that `default` leads to, from the root through the entry; otherwise the only
one whose signal has enough axes. Which dataset: the attribute `signal` of the group, in old files
the dataset with `signal = 1`. The axes of the signal are (scan_y, scan_x, ky, kx) or (frames, ky,
kx); steps and units come from the datasets that `axes` names, or in old files from those with
`axis = n`. A detector axis that passes through zero gives the centre.
"""

import pathlib
from typing import Any

import h5py
import numpy as np

from ..counts import InputError
from .hdf5 import (
    attribute,
    dataset_at,
    FEW,
    frames_of,
    is_hdf5,
    listing,
    number,
    opened,
    storage_notes,
    text,
    together,
)
from .source import layout, numeric, Source
from .turned import in_order, places
from .units import axes_facts, check_order, ENERGIES, scaled, step_of, zero_of


def recognises(path: pathlib.Path) -> bool:
    """Whether the file is HDF5 with an NXdata group whose signal could be frames."""
    if not is_hdf5(path):
        return False
    with opened(path) as file:
        return any(signal.ndim >= 3 for _, signal in _signals(file).values())


def open_source(
    path: pathlib.Path,
    dataset: str | None = None,
    scan_shape: tuple[int, int] | None = None,
    frame_shape: tuple[int, int] | None = None,
    order: str | None = None,
) -> Source:
    """Describe the signal of a NeXus file; `dataset` names its NXdata group, if there are several.

    `order` names the axes of the signal, such as "ky kx y x", if they are not (y, x, ky, kx).

    **Raises:** InputError if there is no such signal, or several and no default, or its first axes
    belong to the detector.
    """
    with opened(path) as file:
        group, signal = _chosen(path, file, dataset, 3 if scan_shape is not None else 4)
        name = str(signal.name)
        label = f"{path}: dataset {name!r}"
        dtype = numeric(label, signal.dtype)
        turned = places(label, signal.shape, order) if order is not None else None
        shape = tuple(in_order(signal.shape, turned))
        scan, frame = layout(label, shape, scan_shape, frame_shape)
        axes = in_order(_axes(group, signal), turned)
        check_order(label, [unit for _, unit, _ in axes])
        facts = axes_facts([(step, unit) for step, unit, _ in axes])
        facts |= zero_of(
            [
                (first, step, n)
                for (step, _, first), n in zip(axes[-2:], frame, strict=True)
                if first is not None
            ]
        )
        facts |= _energy(file)
        notes, stored = storage_notes(path, signal), together(signal, turned)
    load = frames_of(path, name, turned)
    return Source(
        path, "nexus", name, scan, frame, dtype, "dense", load, facts, notes, together=stored
    )


def _signals(file: h5py.File) -> dict[str, tuple[h5py.Group, h5py.Dataset]]:
    """Every NXdata group with a signal, by its full name."""
    found: dict[str, tuple[h5py.Group, h5py.Dataset]] = {}

    def visit(name: str, item: object) -> None:
        if isinstance(item, h5py.Group) and text(attribute(item, "NX_class")) == "NXdata":
            signal = _signal(item)
            if signal is not None:
                found[f"/{name}"] = item, signal

    file.visititems(visit)
    return found


def _signal(group: h5py.Group) -> h5py.Dataset | None:
    name = text(attribute(group, "signal"))
    if name is not None:
        return dataset_at(group, name)
    datasets = [item for item in group.values() if isinstance(item, h5py.Dataset)]
    marked = [item for item in datasets if "signal" in item.attrs]
    return marked[0] if marked else dataset_at(group, "data")


def _chosen(
    path: pathlib.Path, file: h5py.File, dataset: str | None, axes: int
) -> tuple[h5py.Group, h5py.Dataset]:
    """The group and signal that were asked for, the default, or the only one with enough axes."""
    found = _signals(file)
    if dataset is not None:
        wanted = "/" + dataset.strip("/")
        chosen = [n for n, (_, s) in found.items() if wanted in (n, s.name) or n.endswith(wanted)]
    else:
        chosen = [name for name, (_, s) in found.items() if axes <= s.ndim <= 4]
        default = _default(file)
        if default in chosen:
            chosen = [default]
    if len(chosen) == 1:
        return found[chosen[0]]
    if chosen:
        raise InputError(
            f"{path}: has {len(chosen)} NXdata groups with frames: {', '.join(chosen)}; say which "
            "with `dataset`."
        )
    wanted = "no NXdata with a 4D signal" if dataset is None else f"no NXdata group {dataset!r}"
    raise InputError(
        f"{path}: has {wanted}; it has {listing(file)}. Name one with `dataset`; a stack of frames "
        "also needs a `scan_shape`."
    )


def _default(file: h5py.File) -> str | None:
    """Where the attributes `default` lead from the root."""
    group: Any = file
    # The chain has two links, root to entry to data; a longer one is followed, a circle is not.
    for _ in range(8):
        name = text(attribute(group, "default"))
        if name is None or not isinstance(group.get(name), h5py.Group):
            break
        group = group[name]
    return group.name


def _axes(
    group: h5py.Group, signal: h5py.Dataset
) -> list[tuple[float | None, str | None, float | None]]:
    """Step, unit and first value along each axis of the signal, as far as they are there."""
    names: list[Any] = [None] * signal.ndim
    said = attribute(group, "axes")
    said = attribute(signal, "axes") if said is None else said
    if said is not None:
        listed = [text(name) or "." for name in np.atleast_1d(said)]
        if len(listed) == 1:
            listed = listed[0].strip("[]").replace(",", ":").split(":")
        names[: len(listed)] = listed[: signal.ndim]
    else:
        for name, item in group.items():
            place = number(attribute(item, "axis")) if isinstance(item, h5py.Dataset) else None
            if place is not None and 1 <= place <= signal.ndim:
                names[int(place) - 1] = name
    places = {name: number(attribute(group, f"{name}_indices")) for name in names if name}
    moved = {name: int(place) % signal.ndim for name, place in places.items() if place is not None}
    names = [None if name in moved else name for name in names]
    for name, place in moved.items():
        names[place] = name
    pairs = zip(names, signal.shape, strict=True)
    return [_axis(dataset_at(group, name) if name else None, n) for name, n in pairs]


def _axis(item: h5py.Dataset | None, length: int) -> tuple[float | None, str | None, float | None]:
    if item is None or item.dtype.kind not in "iuf" or not 0 < (item.size or 0) <= FEW:
        return None, None, None
    values = np.asarray(item[()], float).ravel()
    unit = text(attribute(item, "units"))
    # An axis of bin edges is one longer.
    if len(values) not in (length, length + 1):
        return None, unit, None
    return step_of(values), unit, float(values[0])


def _energy(file: h5py.File) -> dict[str, Any]:
    """The energy of the first beam in the file that has one."""
    found: list[float] = []

    def visit(name: str, item: object) -> None:
        if not found and isinstance(item, h5py.Dataset) and name.endswith("incident_energy"):
            unit = text(attribute(item, "units"))
            value = scaled(number(item), unit, ENERGIES, "eV")
            found.extend([value] if value is not None else [])

    file.visititems(visit)
    return {"energy_ev": found[0]} if found else {}

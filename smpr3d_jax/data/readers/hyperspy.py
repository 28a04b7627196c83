"""HyperSpy signals: .hspy files (HDF5) and .zspy stores (zarr), the same tree in both.

`/Experiments/<title>` holds `data`, with the scan's axes before the signal's, a group `axis-n` for
each of them (scale, offset, units, navigate), and `metadata`, of which the microscope's settings
are used: beam energy in keV and convergence angle in mrad. A detector axis that passes through zero
gives the centre.
"""

import math
import pathlib
from typing import Any

import h5py
import numpy as np

from ..counts import InputError
from . import hdf5, stores
from .chunked import tiles_of
from .source import layout, Load, numeric, Source
from .units import axes_facts, check_order, scaled, zero_of


MICROSCOPES = "TEM", "SEM"


def recognises(path: pathlib.Path) -> bool:
    """Whether a file, or a folder, says that HyperSpy wrote it."""
    if path.is_file() and hdf5.is_hdf5(path):
        with hdf5.opened(path) as file:
            return _is_signal(file)
    if not stores.is_store(path):
        return False
    with stores.opened(path) as root:
        return _is_signal(root)


def open_source(
    path: pathlib.Path,
    dataset: str | None = None,
    scan_shape: tuple[int, int] | None = None,
    frame_shape: tuple[int, int] | None = None,
) -> Source:
    """Describe a signal; `dataset` is its title, if there are several.

    **Raises:** InputError if there is no signal of frames, or several and no `dataset`, or it is
    ragged, or its axes are not those of frames.
    """
    in_hdf5 = path.is_file() and hdf5.is_hdf5(path)
    with hdf5.opened(path) if in_hdf5 else stores.opened(path) as root:
        title, group = _chosen(path, root, dataset, 3 if scan_shape is not None else 4)
        item, name = _get(group, "data"), f"Experiments/{title}/data"
        label = f"{path}: signal {title!r}"
        dtype = numeric(label, item.dtype)
        axes = _axes(label, group, item.ndim)
        scan, frame = layout(label, item.shape, scan_shape, frame_shape)
        settings = _get(group, "metadata", "Acquisition_instrument")
        microscopes = [_attributes(_get(settings, name)) for name in MICROSCOPES]
        facts = signal_facts(label, axes, microscopes, frame)
        notes = hdf5.storage_notes(path, item) if in_hdf5 else stores.storage_notes(path, item)
        stored = hdf5.together(item) if in_hdf5 else tiles_of(item.shape, item.chunks)
    load: Load = hdf5.frames_of(path, name) if in_hdf5 else stores.frames_of(path, name)
    kind = "hspy" if in_hdf5 else "zspy"
    return Source(
        path, kind, name, scan, frame, dtype, "dense", load, facts, notes, together=stored
    )


def _is_signal(root: Any) -> bool:
    form = hdf5.text(_attributes(root).get("file_format"))
    return (form or "").lower() in ("hyperspy", "zspy")


def _attributes(item: Any) -> dict[str, Any]:
    """All attributes of a group in either format; of nothing, none."""
    if item is None:
        return {}
    if isinstance(item, h5py.Group | h5py.Dataset):
        return hdf5.attributes(item)
    return stores.attributes(item)


def _get(group: Any, *names: str) -> Any:
    """What is under these names inside one another, None where one is missing."""
    for name in names:
        if group is None:
            return None
        group = group.get(name) if isinstance(group, h5py.Group) else stores.child(group, name)
    return group


def _chosen(path: pathlib.Path, root: Any, dataset: str | None, axes: int) -> tuple[str, Any]:
    """Title and group of the signal that was asked for, or of the only one of frames."""
    experiments = _get(root, "Experiments")
    titles: list[str] = []
    if experiments is not None and not hasattr(experiments, "shape"):
        titles = [str(title) for title in experiments]
    found = {title: _get(experiments, title) for title in titles}
    shapes = {t: getattr(_get(group, "data"), "shape", None) for t, group in found.items()}
    have = ", ".join(f"{title!r} {shape}" for title, shape in shapes.items()) or "none"
    if dataset is not None:
        wanted = dataset.strip("/").removeprefix("Experiments/").removesuffix("/data")
        chosen = [title for title, shape in shapes.items() if title == wanted and shape is not None]
    else:
        chosen = [t for t, shape in shapes.items() if shape and axes <= len(shape) <= 4]
        # One that cannot be used says why, when it is described.
        chosen = chosen or [t for t, shape in shapes.items() if shape is not None][:1]
    if len(chosen) != 1:
        raise InputError(
            f"{path}: has the signals {have}; name one of them with `dataset`"
            + ("." if dataset is None else f", not {dataset!r}.")
        )
    return chosen[0], found[chosen[0]]


def _axes(label: str, group: Any, count: int) -> list[dict[str, Any]]:
    """The description of each axis of the array, of a signal that is not ragged."""
    said = _attributes(_get(group, "attributes"))
    if _get(group, "ragged_shapes") is not None or said.get("ragged"):
        raise InputError(
            f"{label} is ragged: it holds lists of different lengths, not frames; convert it to "
            "an array (scan_y, scan_x, ky, kx)."
        )
    return [_attributes(_get(group, f"axis-{i}")) for i in range(count)]


def signal_facts(
    label: str,
    axes: list[dict[str, Any]],
    microscopes: list[dict[str, Any]],
    frame: tuple[int, int],
) -> dict[str, Any]:
    """What the axes of a signal and the settings of its microscope say, in our units.

    **Raises:** InputError if the last two axes are not those of the frames.
    """
    navigate = [bool(axis["navigate"]) for axis in axes if "navigate" in axis]
    scans = len(axes) - 2
    if len(navigate) == len(axes) and navigate != [True] * scans + [False] * 2:
        signal = navigate.count(False)
        raise InputError(
            f"{label} has {len(axes) - signal} scan axes and {signal} signal axes; frames have two "
            "of the signal, after those of the scan: use s.transpose(signal_axes=2) and save again."
        )
    uniform = [axis.get("_type", "UniformDataAxis") == "UniformDataAxis" for axis in axes]
    steps = [
        (_number(axis, "scale") if even else None, hdf5.text(axis.get("units")))
        for axis, even in zip(axes, uniform, strict=True)
    ]
    check_order(label, [unit for _, unit in steps])
    pairs = zip(axes[-2:], steps[-2:], frame, strict=True)
    facts = axes_facts(steps)
    if facts.keys() & {"detector_pixel_mrad", "detector_pixel_inv_A"}:
        facts |= zero_of([(_number(a, "offset") or 0.0, s, n) for a, (s, _), n in pairs])
    for said in microscopes:
        for fact, key, unit in (
            ("energy_ev", "beam_energy", 1e3),
            ("semiangle_mrad", "convergence_angle", 1.0),
        ):
            value = scaled(_number(said, key), "", {"": unit}, "")
            if value is not None:
                facts.setdefault(fact, value)
    return facts


def _number(said: dict[str, Any], key: str) -> float | None:
    value = said.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        return None
    return float(value) if math.isfinite(value) else None

"""Dense frames in zarr arrays, alone or in groups, and the measurements of abTEM among them.

An array has four axes (scan_y, scan_x, ky, kx), or three and a `scan_shape`. It is the only such
array in the store, or the one that `dataset` names. abTEM describes `array0` in the group's
attribute `metadata0`, with the sampling of each axis, the energy and the semi-angle; what it calls
x is the first axis. Its intensities are fractions of one electron.
"""

import pathlib
import re
from typing import Any

from ..counts import InputError
from .chunked import tiles_of
from .source import kept_facts, layout, numeric, Source
from .stores import (
    array_at,
    arrays,
    attributes,
    frames_of,
    is_array,
    is_store,
    listing,
    opened,
    storage_notes,
)
from .units import axes_facts, check_order, ENERGIES, scaled, zero_of


def recognises(path: pathlib.Path) -> bool:
    """Whether a folder or a zip file is a zarr store."""
    return is_store(path)


def open_source(
    path: pathlib.Path,
    dataset: str | None = None,
    scan_shape: tuple[int, int] | None = None,
    frame_shape: tuple[int, int] | None = None,
) -> Source:
    """Describe the array of frames in a zarr store.

    **Raises:** InputError if there is none, or more than one and no `dataset`, or its shape or type
    is not that of counts.
    """
    with opened(path) as root:
        name = _chosen(path, root, dataset, 3 if scan_shape is not None else 4)
        item = array_at(path, root, name)
        label = f"{path}: array {name!r}"
        dtype = numeric(label, item.dtype)
        scan, frame = layout(label, item.shape, scan_shape, frame_shape)
        facts, notes = _measurement(label, root, name, item.shape)
        facts = kept_facts(attributes(item)) | facts
        notes += storage_notes(path, item)
        stored = tiles_of(item.shape, item.chunks)
    load = frames_of(path, name)
    return Source(
        path, "zarr", name, scan, frame, dtype, "dense", load, facts, notes, together=stored
    )


def _chosen(path: pathlib.Path, root: Any, dataset: str | None, axes: int) -> str:
    """Name of the array that was asked for, or of the only one with enough axes."""
    if dataset is not None or is_array(root):
        return (dataset or "").strip("/")
    shapes = {name: array_at(path, root, name).shape for name in arrays(path)}
    found = [name for name, shape in shapes.items() if axes <= len(shape) <= 4]
    if len(found) == 1:
        return found[0]
    which = (
        f"{len(found)} arrays that could be frames: {', '.join(found)}" if found else "no 4D array"
    )
    raise InputError(
        f"{path}: has {which}; the store has {listing(path)}. Name one with `dataset`; a stack of "
        "frames also needs a `scan_shape`."
    )


def _measurement(
    label: str, root: Any, name: str, shape: tuple[int, ...]
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What abTEM says about an array of its own."""
    numbered = re.fullmatch(r"array(\d+)", name)
    said = attributes(root).get(f"metadata{numbered[1]}") if numbered else None
    if not isinstance(said, dict) or "abTEM" not in str(said.get("data_origin", "abTEM")):
        return {}, ()
    listed = said.get("axes")
    axes = [
        (listed if isinstance(listed, dict) else {}).get(f"axis_{i}") for i in range(len(shape))
    ]
    known = [axis if isinstance(axis, dict) else {} for axis in axes]
    steps = [(_number(a, "sampling"), _word(a, "units")) for a in known]
    check_order(label, [unit for _, unit in steps])
    pairs = zip(known[-2:], steps[-2:], shape[-2:], strict=True)
    facts = axes_facts(steps) | zero_of(
        [(_number(a, "offset") or 0.0, s, n) for a, (s, _), n in pairs]
    )
    facts |= {
        name: value
        for name, key, units in (
            ("energy_ev", "energy", ENERGIES),
            ("semiangle_mrad", "semiangle_cutoff", {"mrad": 1.0}),
        )
        if (value := scaled(_number(said, key), None, units, next(iter(units)))) is not None
    }
    notes = ("written by abTEM: intensities are fractions of one electron",)
    if any(axis.get("fftshift") is False for axis in known[-2:]):
        notes += ("the zero frequency is in the corner of the frames: fftshift is false",)
    return facts, notes


def _number(said: dict[str, Any], key: str) -> float | None:
    value = said.get(key)
    return float(value) if isinstance(value, int | float) else None


def _word(said: dict[str, Any], key: str) -> str | None:
    value = said.get(key)
    return value if isinstance(value, str) else None

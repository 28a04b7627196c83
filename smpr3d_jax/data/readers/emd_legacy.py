"""What came before EMD 1.0: the Berkeley layout (0.2) and py4DSTEM up to 0.13.

A group whose attribute `emd_group_type` is the number 1 holds `data` (in py4DSTEM before 0.9 also
`datacube`) with the axes (slow scan, fast scan, detector row, detector column), described in `dim1`
to `dim4`, from 0.13 on `dim0` to `dim3`. py4DSTEM keeps its calibration beside the data: to 0.12 in
`metadata/calibration` and `metadata/microscope` of the file's top group, in 0.13 in a group of the
datacube. There `convergence_semiangle_mrad` holds pixels if those were set, so it is not used.
Before 0.13 the rotation has no documented sense, and is not used either. RosettaSciIO writes EMD
0.2 with all axes reversed: order="kx ky x y".
"""

import pathlib
from typing import Any

import h5py
import numpy as np

from ..counts import InputError
from .emd import facts_of
from .hdf5 import (
    attribute,
    attributes,
    dataset_at,
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
from .units import check_order


ARRAYS = "data", "datacube"
# Names that came and went -> those of EMD 1.0.
RENAMED = {
    "R_pix_size": "R_pixel_size",
    "R_pix_units": "R_pixel_units",
    "R_pixel_size_units": "R_pixel_units",
    "K_pix_size": "Q_pixel_size",
    "K_pix_units": "Q_pixel_units",
    "Q_pixel_size_units": "Q_pixel_units",
    "accelerating_voltage": "beam_energy",
}
NOT_USED = "QR_rotation", "QR_rotation_degrees", "QR_flip"
# No microscope has a beam of so few eV: these are keV.
KEV = 3000


def recognises(path: pathlib.Path) -> bool:
    """Whether the file is HDF5 with frames in a group of the older EMD kind."""
    if not is_hdf5(path):
        return False
    with opened(path) as file:
        return bool(_cubes(file))


def open_source(
    path: pathlib.Path,
    dataset: str | None = None,
    scan_shape: tuple[int, int] | None = None,
    frame_shape: tuple[int, int] | None = None,
    order: str | None = None,
) -> Source:
    """Describe the datacube of an older EMD file, `dataset` if there are several.

    `order` names the axes of the array, such as "kx ky x y", if they are not (y, x, ky, kx).

    **Raises:** InputError if there is no datacube, more than one and no `dataset`, or its shape or
    type is not that of counts.
    """
    with opened(path) as file:
        cube, data = _chosen(path, file, dataset, 3 if scan_shape is not None else 4)
        name = str(data.name)
        label = f"{path}: dataset {name!r}"
        dtype = numeric(label, data.dtype)
        turned = places(label, data.shape, order) if order is not None else None
        shape = tuple(in_order(data.shape, turned))
        scan, frame = layout(label, shape, scan_shape, frame_shape)
        first = 0 if "dim0" in cube else 1
        dims = in_order([cube.get(f"dim{i + first}") for i in range(data.ndim)], turned)
        check_order(label, [_unit(dim) for dim in dims])
        facts, notes = facts_of(_known(file, cube), dims)
        notes += storage_notes(path, data)
        stored = together(data, turned)
    load = frames_of(path, name, turned)
    return Source(
        path, "emd_legacy", name, scan, frame, dtype, "dense", load, facts, notes, together=stored
    )


def _cubes(file: h5py.File) -> dict[str, tuple[h5py.Group, h5py.Dataset]]:
    """Every group of the older kind that could hold frames, by its full name."""
    found: dict[str, tuple[h5py.Group, h5py.Dataset]] = {}

    def visit(name: str, item: object) -> None:
        kind = attribute(item, "emd_group_type") if isinstance(item, h5py.Group) else None
        if isinstance(item, h5py.Group) and number(kind) == 1:
            for array in ARRAYS:
                data = dataset_at(item, array)
                if data is not None and data.ndim >= 3:
                    found[f"/{name}"] = item, data

    file.visititems(visit)
    return found


def _chosen(
    path: pathlib.Path, file: h5py.File, dataset: str | None, axes: int
) -> tuple[h5py.Group, h5py.Dataset]:
    """The datacube that was asked for, or the only one with enough axes."""
    found = _cubes(file)
    if dataset is not None:
        wanted = "/" + dataset.strip("/")
        chosen = [n for n, (_, data) in found.items() if n.endswith(wanted) or data.name == wanted]
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


def _unit(dim: Any) -> str | None:
    return text(attribute(dim, "units")) if isinstance(dim, h5py.Dataset) else None


def _known(file: h5py.File, cube: h5py.Group) -> dict[str, Any]:
    """The calibration under the names of EMD 1.0, without what cannot be relied on."""
    own = cube.get("calibration")
    if isinstance(own, h5py.Group):
        known: dict[str, Any] = _entries(own)
        known.pop("convergence_semiangle_mrad", None)
        return known
    top = str(cube.name).strip("/").split("/")[0]
    known = {}
    for group in ("microscope", "calibration"):
        item = file.get(f"{top}/metadata/{group}")
        known |= _entries(item) if isinstance(item, h5py.Group) else {}
    kept = [key for key in known if key not in NOT_USED]
    known = {RENAMED.get(key, key): known[key] for key in kept}
    energy = number(known.get("beam_energy"))
    if energy is not None and energy > 0:
        known["energy_ev"] = energy * (1e3 if energy < KEV else 1.0)
    return known


def _entries(group: h5py.Group) -> dict[str, Any]:
    """The values in a group, whether datasets or attributes, that are numbers or words."""
    found = attributes(group)
    found |= {str(key): item for key, item in group.items() if isinstance(item, h5py.Dataset)}
    wanted = (h5py.Dataset, np.generic, np.ndarray, str, bytes, int, float)
    return {str(key): value for key, value in found.items() if isinstance(value, wanted)}

"""Gatan DigitalMicrograph 3 and 4: .dm3 and .dm4 files with frames in them.

Dimensions are listed from the one that runs fastest. Newer files list those of the detector first
and say so (`Meta Data.Data Order Swapped`): each frame stands in one piece. Older ones list the
scan first: each pixel of the detector has its counts at all positions together, and a block of
frames is spread over the whole file. Without that tag the units of the axes decide, then the size
of the scan in the tags; where they leave it open, `data_order_swapped` must. Thumbnails and
pictures are passed over. A stack of frames needs a `scan_shape`, unless the tags have it.

The centre is not taken from the origins of the axes, which are mostly left as they were.
"""

import math
import pathlib
from typing import Any, NamedTuple

import numpy as np

from ..counts import InputError
from .binary import Planes, Records
from .dm_tags import Array, is_dm, read_tags, tag, Tags
from .source import layout, numeric, Source
from .units import sampling


TYPES = {1: "i2", 2: "f4", 6: "u1", 7: "i4", 9: "i1", 10: "u2", 11: "u4", 12: "f8", 14: "u1"}
SAMPLING = ("SI", "Acquisition", "Spatial Sampling")
SEMIANGLE = (
    ("EELS", "Experimental Conditions", "Convergence semi-angle (mrad)"),
    ("EELS", "Convergence semi-angle (mrad)"),
    ("Microscope Info", "Convergence semi-angle (mrad)"),
)
EXPOSURE = (
    ("SI", "Acquisition", "Pixel time (s)"),
    ("Acquisition", "Parameters", "High Level", "Exposure (s)"),
    ("Acquisition", "Parameters", "Detector", "exposure (s)"),
)


class Item(NamedTuple):
    """An array of three or four dimensions (fastest first), its tags and its calibrations."""

    name: str
    dims: tuple[int, ...]
    dtype: np.dtype
    data: Array
    tags: Tags
    calibrations: Tags


def recognises(path: pathlib.Path) -> bool:
    """Whether it begins as a file of DigitalMicrograph 3 or 4."""
    return is_dm(path)


def open_source(
    path: pathlib.Path,
    dataset: str | None = None,
    scan_shape: tuple[int, int] | None = None,
    frame_shape: tuple[int, int] | None = None,
    data_order_swapped: bool | None = None,
) -> Source:
    """Describe the frames of a file, `dataset` (number or name) if there are several.

    **Raises:** InputError if there are none, more than one and no `dataset`, the tags are damaged,
    or nothing tells the scan from the detector.
    """
    item = _chosen(path, _items(path, read_tags(path)), dataset)
    notes: list[str] = []
    swapped = len(item.dims) == 3 or _swapped(
        path, item, scan_shape, frame_shape, data_order_swapped, notes
    )
    shape = item.dims[::-1] if swapped else (*item.dims[1::-1], *item.dims[:1:-1])
    if len(shape) == 3 and scan_shape is None:
        scan_shape = _tagged_shape(item.tags, notes)
    label = f"{path}: image {item.name}"
    scan, frame = layout(label, shape, scan_shape, frame_shape)
    dtype = numeric(label, item.dtype)
    if swapped:
        length = math.prod(frame) * dtype.itemsize
        load: Any = Records(path, item.data.start, length, frame, dtype)
    else:
        load = Planes(path, item.data.start, frame, math.prod(scan), dtype)
        notes.append(
            "the file keeps pixel after pixel, each at all positions: frames are slow to read; "
            "convert it before long work"
        )
    facts = _facts(item, swapped, notes)
    native = dtype.newbyteorder("=")
    stored = 1 if swapped else math.prod(scan)
    return Source(
        path, "dm", item.name, scan, frame, native, "dense", load, facts, tuple(notes),
        together=stored,
    )  # fmt: skip


def _items(path: pathlib.Path, tags: Tags) -> list[Item]:
    """The arrays of three or four dimensions that hold numbers, with where they are."""
    found = []
    images = tag(tags, "ImageList")
    for number, image in (images if isinstance(images, dict) else {}).items():
        sizes, data = tag(image, "ImageData", "Dimensions"), tag(image, "ImageData", "Data")
        dims = tuple(sizes.values()) if isinstance(sizes, dict) else ()
        if len(dims) not in (3, 4) or not all(isinstance(n, int) and n > 0 for n in dims):
            continue
        kind = tag(image, "ImageData", "DataType")
        if not isinstance(data, Array) or data.dtype is None or kind not in TYPES:
            continue
        dtype = np.dtype(TYPES[kind]).newbyteorder(data.dtype.byteorder)
        size, there = math.prod(dims) * dtype.itemsize, data.length * data.dtype.itemsize
        if size != there:
            raise InputError(
                f"{path}: image {number} should have {' × '.join(map(str, dims))} numbers {dtype}, "
                f"{size} bytes, but has {there}. The file is damaged: save it again."
            )
        if tag(image, "ImageTags", "Meta Data", "Format") and _is_spectra(image):
            continue
        name, more = _text(tag(image, "Name")), tag(image, "ImageTags")
        known = tag(image, "ImageData", "Calibrations")
        found.append(
            Item(
                f"{number} {name}".strip(),
                dims,
                dtype,
                data,
                more if isinstance(more, dict) else {},
                known if isinstance(known, dict) else {},
            )
        )
    return found


def _is_spectra(image: Tags) -> bool:
    return _text(tag(image, "ImageTags", "Meta Data", "Format")).lower().startswith("spectrum")


def _text(value: Any) -> str:
    return value.text() if isinstance(value, Array) else ""


def _number(tags: Any, *names: str) -> float | None:
    """A positive number in the tags."""
    value = tag(tags, *names)
    if isinstance(value, Array):
        try:
            value = float(value.text())
        except ValueError:
            return None
    good = isinstance(value, int | float) and math.isfinite(value) and value > 0
    return float(value) if good else None


def _chosen(path: pathlib.Path, items: list[Item], dataset: str | None) -> Item:
    """The image asked for, or the only one of four dimensions, or the only one of three."""
    listing = ", ".join(f"{item.name!r} {item.dims[::-1]} {item.dtype}" for item in items[:8])
    if dataset is not None:
        named = [item for item in items if dataset in (item.name, *item.name.split(" ", 1))]
    else:
        named = [item for item in items if len(item.dims) == 4] or items
    if len(named) == 1:
        return named[0]
    if named:
        raise InputError(
            f"{path}: has {len(named)} images of frames: {listing}; say which with `dataset`."
        )
    wanted = "no image of three or four dimensions" if dataset is None else f"no image {dataset!r}"
    raise InputError(
        f"{path}: has {wanted}; it has {listing or 'none of them'}. Frames need four dimensions, "
        "or three and a `scan_shape`; other images and spectra are not read."
    )


def _swapped(
    path: pathlib.Path,
    item: Item,
    scan_shape: tuple[int, int] | None,
    frame_shape: tuple[int, int] | None,
    hint: bool | None,
    notes: list[str],
) -> bool:
    """Whether the first two of four dimensions are those of the detector.

    **Raises:** InputError if nothing tells.
    """
    said = tag(item.tags, "Meta Data", "Data Order Swapped")
    if isinstance(said, Array):
        said = {"true": True, "1": True, "false": False, "0": False}.get(said.text().lower())
    by_units = _by_units(item)
    if hint is None and said is not None and by_units not in (None, bool(said)):
        notes.append(
            f"the tag 'Data Order Swapped' is {bool(said)}, which is believed, but the units of "
            "the axes say the opposite; if they are right, give `data_order_swapped`"
        )
    sizes = {True: item.dims[3:1:-1], False: item.dims[1::-1]}
    tagged = tuple(
        _number(item.tags, *SAMPLING, f"{side} (pixels)") for side in ("Height", "Width")
    )
    asked = [(scan_shape, sizes), (frame_shape, {k: sizes[not k] for k in sizes}), (tagged, sizes)]
    by_size = (
        next(key for key in fits if tuple(want) == fits[key])
        for want, fits in asked
        if want is not None and sum(tuple(want) == size for size in fits.values()) == 1
    )
    for answer in (hint, said, by_units, next(by_size, None)):
        if answer is not None:
            return bool(answer)
    raise InputError(
        f"{path}: image {item.name} has the dimensions {item.dims[::-1]} (slowest first), and "
        "nothing says whether the detector is the first pair or the last. Give "
        f"data_order_swapped=True for a scan of {sizes[True]}, False for one of {sizes[False]}."
    )


def _by_units(item: Item) -> bool | None:
    """Whether lengths belong to the last two dimensions and angles to the first two."""
    spaces = []
    for i in range(4):
        known = _sampling(item, i)
        spaces.append(known and known[0])
    pairs = [spaces[:2], spaces[2:]]
    is_scan = [pair == ["scan_step_A"] * 2 for pair in pairs]
    is_detector = [any(s and s.startswith("detector") for s in pair) for pair in pairs]
    if is_scan[1] and not is_scan[0] and not is_detector[1]:
        return True
    if is_scan[0] and not is_scan[1] and not is_detector[0]:
        return False
    return None


def _sampling(item: Item, dimension: int) -> tuple[str, float] | None:
    """Name of the fact and the step along a dimension in our units, if they are known."""
    axes = tag(item.calibrations, "Dimension")
    axis = list(axes.values())[dimension:][:1] if isinstance(axes, dict) else []
    scale = _number(axis[0], "Scale") if axis else None
    unit = _text(tag(axis[0], "Units")) if axis else None
    return sampling("R", scale, unit) or sampling("Q", scale, unit)


def _tagged_shape(tags: Tags, notes: list[str]) -> tuple[int, int] | None:
    """The scan shape that some microscopes note in the tags of a stack."""
    found = (_number(tags, "4D STEM Tags", f"Scan shape {axis}") for axis in "YX")
    slow, fast = (int(n) if n is not None and n == int(n) else None for n in found)
    if slow is None or fast is None:
        return None
    notes.append("scans of this microscope (TitanX) are known to be late by two positions")
    return slow, fast


def _facts(item: Item, swapped: bool, notes: list[str]) -> dict[str, Any]:
    """What the tags say, in our units."""
    facts: dict[str, Any] = {}
    pairs = (
        {"scan": (3, 2), "detector": (1, 0)} if swapped else {"scan": (1, 0), "detector": (3, 2)}
    )
    for what, (y, x) in pairs.items():
        if max(y, x) >= len(item.dims):
            continue
        steps = _sampling(item, y), _sampling(item, x)
        if steps[0] and steps[1] and steps[0][0] == steps[1][0] and steps[0][0].startswith(what):
            facts[steps[0][0]] = (steps[0][1], steps[1][1])
    for fact, places in (
        ("energy_ev", [("Microscope Info", "Voltage")]),
        ("semiangle_mrad", SEMIANGLE),
        ("exposure_s", EXPOSURE),
    ):
        value = next((v for place in places if (v := _number(item.tags, *place))), None)
        if value is not None:
            facts[fact] = value
    brightness = tag(item.calibrations, "Brightness")
    scale = _number(brightness, "Scale")
    if scale is not None and _text(tag(brightness, "Units")).strip() in ("e-", "e", "electrons"):
        facts["counts_per_electron"] = 1 / scale
    length = _number(item.tags, "Microscope Info", "STEM Camera Length")
    if length is not None and not any(name.startswith("detector") for name in facts):
        notes.append(f"the detector is not calibrated; the nominal camera length is {length:g} mm")
    return facts

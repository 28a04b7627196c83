"""EMPAD (first generation): frames in a .raw file and what is known of them in an .xml file.

Either file can be opened, the .xml file finds the .raw file by the name it holds, and the .raw file
an .xml file that names it. A frame is 130 × 128 little-endian float32, of which the last two rows
are no counts and cut away; frames follow one another row after row of the scan. Without .xml file
the scan shape is in the name, `scan_x256_y128.raw`, or in the hint `scan_shape`.

Values are digital units: how many of them make an electron is not in the files. NaNs do occur. The
scan step is (field of view / scale factor) / larger side of the scan, as software 1.2 writes them
(https://github.com/hyperspy/rosettasciio/pull/495), or field of view / side in older files. Readers
disagree whether it is to be multiplied by `scan_size`: unless that is 1, no scan step is given, but
a note with both.
"""

import math
import pathlib
import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import numpy as np

from ..counts import InputError
from .binary import complete_records, Records
from .source import layout, Source


FRAME, ROWS = (128, 128), 130
BYTES = 4 * ROWS * FRAME[1]
NAME = re.compile(r"_x(\d{1,9})_y(\d{1,9})\.raw$", re.IGNORECASE)
# Those of the instrument have a few thousand bytes.
XML_BYTES = 2**22
GAIN = "values are digital units of the EMPAD; the file does not say how many make an electron"


def recognises(path: pathlib.Path) -> bool:
    """Whether it is EMPAD's description, or a .raw file of whole frames or of EMPAD's name."""
    if path.suffix.lower() == ".raw":
        size = path.stat().st_size
        return bool(size) and (size % BYTES == 0 or NAME.search(path.name) is not None)
    with open(path, "rb") as file:
        start = file.read(XML_BYTES)
    return start.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"<") and b"<raw_file" in start


def open_source(
    path: pathlib.Path,
    dataset: str | None = None,
    scan_shape: tuple[int, int] | None = None,
    frame_shape: tuple[int, int] | None = None,
) -> Source:
    """Describe the frames of a .raw file, or of the one that an .xml file names.

    **Raises:** InputError if the .raw file is missing or cut short, the .xml file is not EMPAD's,
    or the scan shape is neither known nor fits the number of frames.
    """
    if dataset is not None:
        raise InputError(f"{path}: an EMPAD file has one dataset; leave out dataset={dataset!r}.")
    raw, root = _pair(path)
    frames, rest = complete_records(raw, 0, BYTES)
    if rest or not frames:
        raise InputError(
            f"{raw}: has {frames * BYTES + rest} bytes, which is not a whole number of EMPAD "
            f"frames ({ROWS} × {FRAME[1]} float32, {BYTES} bytes). The file is cut short, or of "
            "another kind: copy it again, or name its kind with `format`."
        )
    notes = [GAIN]
    shape = _scan_shape(raw, root, frames, notes) if scan_shape is None else scan_shape
    scan, frame = layout(str(raw), (frames, *FRAME), shape, frame_shape)
    facts = {} if root is None else _facts(root, scan, notes)
    load = Records(raw, 0, BYTES, FRAME, np.dtype("<f4"))
    dtype = np.dtype(np.float32)
    return Source(
        raw, "empad", "", scan, frame, dtype, "dense", load, facts, tuple(notes), together=1
    )


def _pair(path: pathlib.Path) -> tuple[pathlib.Path, ElementTree.Element | None]:
    """The .raw file and the root of the .xml file, from either."""
    if path.suffix.lower() != ".raw":
        root = _parsed(path)
        raw = path.with_name(_raw_name(root) or f"{path.stem}.raw")
        if not raw.is_file():
            raise InputError(
                f"{path}: its frames should be in {raw}, which does not exist. Put the two files "
                "into one folder, or open the .raw file with its `scan_shape`."
            )
        return raw, root
    beside = sorted(p for p in path.parent.glob("*") if p.suffix.lower() == ".xml")
    own = [p for p in beside if p.stem == path.stem]
    for candidate in own + [p for p in beside if p not in own]:
        try:
            root = _parsed(candidate)
        except InputError:
            continue
        if _raw_name(root) == path.name:
            return path, root
    return path, None


def _parsed(path: pathlib.Path) -> ElementTree.Element:
    """The root of an .xml file of EMPAD.

    **Raises:** InputError if it is not one.
    """
    with open(path, "rb") as file:
        text = file.read(XML_BYTES + 1)
    if len(text) > XML_BYTES or b"<!" in text.replace(b"<!--", b""):
        raise InputError(
            f"{path}: is no description of an EMPAD scan: it is longer than {XML_BYTES} bytes or "
            "declares a document type. Open the .raw file with its `scan_shape`."
        )
    try:
        root = ElementTree.fromstring(text)
    # An unknown encoding is a LookupError, a wrong one a ValueError.
    except (ElementTree.ParseError, LookupError, ValueError) as error:
        raise InputError(
            f"{path}: cannot be read as XML ({error}). Copy it again, or open the .raw file with "
            "its `scan_shape`."
        ) from error
    if root.find("raw_file") is None and root.find("scan_parameters") is None:
        raise InputError(
            f"{path}: is XML, but describes no scan of a first-generation EMPAD (no `raw_file`, no "
            "`scan_parameters`). Frames of later generations need their own calibration: convert "
            "them to electrons first."
        )
    return root


def _raw_name(root: ElementTree.Element) -> str | None:
    """Name of the .raw file, without the folder it had on the instrument."""
    item = root.find("raw_file")
    name = "" if item is None else item.get("filename", "")
    name = pathlib.PureWindowsPath(name).name
    return name if name not in ("", "..") and "\0" not in name else None


def _scan_shape(
    raw: pathlib.Path, root: ElementTree.Element | None, frames: int, notes: list[str]
) -> tuple[int, int]:
    """The first scan shape that is said somewhere and has as many positions as there are frames."""
    # The name first: the instrument may have used either of its two sets of parameters.
    said = _named_shapes(raw.name) | _named_shapes((root is not None and _raw_name(root)) or "")
    for where, item in _places(root):
        ny, nx = (_number(item, f"scan_resolution_{axis}", f"pix_{axis}") for axis in "yx")
        if ny is not None and nx is not None and ny == int(ny) > 0 and nx == int(nx) > 0:
            said[f"in the .xml file ({where})"] = (int(ny), int(nx))
    for where, shape in said.items():
        if math.prod(shape) == frames:
            # The parameters of a search differ from those of a scan as a rule.
            notes += [
                f"the scan is {shape} {where}, but {other} {place}"
                for place, other in said.items()
                if other != shape and "search" not in place
            ]
            return shape
    known = "; ".join(f"{shape} {where}" for where, shape in said.items())
    raise InputError(
        f"{raw}: has {frames} frames, and "
        + (f"no scan shape that fits: {known}. " if known else "nothing says its scan shape. ")
        + f"Give `scan_shape` (slow, fast), whose product is {frames}."
    )


def _named_shapes(name: str) -> dict[str, tuple[int, int]]:
    """The scan shape that a file's name says."""
    found = NAME.search(name)
    return {} if found is None else {f"by the name {name}": (int(found[2]), int(found[1]))}


def _places(root: ElementTree.Element | None) -> list[tuple[str, ElementTree.Element]]:
    """Where an .xml file may keep the size of the scan, the likely place first."""
    if root is None:
        return []
    modes = {item.get("mode", ""): item for item in root.findall("scan_parameters")}
    found = [(mode, modes[mode]) for mode in ("acquire", "search") if mode in modes]
    return [*found, ("pix_x, pix_y", root)]


def _number(item: ElementTree.Element, *names: str) -> float | None:
    """The number in the first of these elements that has one."""
    for name in names:
        try:
            value = float(item.findtext(name) or "")
        except ValueError:
            continue
        if math.isfinite(value):
            return value
    return None


def _positive(item: ElementTree.Element, *names: str) -> float | None:
    value = _number(item, *names)
    return value if value is not None and value > 0 else None


def _facts(root: ElementTree.Element, scan: tuple[int, int], notes: list[str]) -> dict[str, Any]:
    """What the .xml file says, in our units."""
    facts: dict[str, Any] = {}
    measured = root.find("iom_measurements")
    if measured is not None:
        energy = _positive(measured, "high_voltage", "source.get_voltage")
        if energy is not None:
            facts["energy_ev"] = energy
        # In 1/nm per pixel times 1e-9, as all readers of it agree.
        pixel = _positive(measured, "calibrated_pixelsize")
        if pixel is not None:
            facts["detector_pixel_inv_A"] = (pixel * 1e8, pixel * 1e8)
        angle = _positive(measured, "calibrated_diffraction_angle")
        if angle is not None:
            facts["detector_pixel_mrad"] = (angle * 1e3, angle * 1e3)
        step = _scan_step(measured, scan)
        if step is not None:
            _judge_step(root, scan, step, facts, notes)
    milliseconds = _positive(root, "exposure_time")
    if milliseconds is not None:
        facts["exposure_s"] = milliseconds * 1e-3
    return facts


def _scan_step(measured: ElementTree.Element, scan: tuple[int, int]) -> tuple[float, float] | None:
    """Scan step (y, x) in Å, if the scan covered the whole field of view."""
    view = measured.find("full_scan_field_of_view")
    if view is not None:
        length, factor = _positive(view, "x"), _positive(view, "scale_factor")
        if length is None or factor is None:
            return None
        step = 1e10 * length / factor / max(scan)
        return step, step
    text = (measured.findtext("optics.get_full_scan_field_of_view") or "").strip("[]() \n")
    try:
        x, y = (float(word) for word in text.split(","))
    except ValueError:
        return None
    step = (1e10 * y / scan[0], 1e10 * x / scan[1])
    return step if all(math.isfinite(s) and s > 0 for s in step) else None


def _judge_step(root, scan, step, facts: dict[str, Any], notes: list[str]) -> None:
    """Keep the scan step if its meaning is beyond doubt, else say what it may be."""
    sizes = [
        _positive(item, "scan_size")
        for _, item in _places(root)[:-1]
        if (_number(item, "scan_resolution_y"), _number(item, "scan_resolution_x")) == scan
    ]
    part = next((size for size in sizes if size is not None), 1.0)
    words = " × ".join(f"{s:g}" for s in dict.fromkeys(step))
    if part != 1:
        smaller = " × ".join(f"{s * part:g}" for s in dict.fromkeys(step))
        notes.append(
            f"the scan step is {smaller} Å if the scan covered the part {part:g} (`scan_size`) of "
            f"the field of view, {words} Å if the field of view is that of the scan: give it"
        )
    elif not math.isclose(*step, rel_tol=1e-3):
        notes.append(
            f"the field of view and the scan differ in shape, which makes a step of {words} Å (y, "
            "x): give the scan step"
        )
    else:
        facts["scan_step_A"] = step

"""Units as files write them, and the facts that follow from the axes of an array.

An axis is (size of a step, unit). A length belongs to the scan (R), an angle or an inverse length
to the detector (Q); pixels and unknown units say nothing.
"""

import math
import re
from collections.abc import Sequence
from typing import Any, Literal

from jaxtyping import Float
from numpy import ndarray

from ..counts import InputError


Space = Literal["R", "Q"]
Axis = tuple[float | None, str | None]
"""Step along an axis, and its unit, as far as they are known."""
LENGTHS = {"A": 1.0, "pm": 1e-2, "nm": 10.0, "um": 1e4, "mm": 1e7, "m": 1e10}
ANGLES = {"mrad": 1.0, "rad": 1e3, "urad": 1e-3, "deg": math.radians(1) * 1e3}
ENERGIES = {"eV": 1.0, "keV": 1e3, "kV": 1e3, "V": 1.0, "MeV": 1e6}
SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
WRITTEN = {
    "å": "A",
    "Å": "A",
    "angstroms": "A",
    "angstrom": "A",
    "ang": "A",
    "a": "A",
    "nanometer": "nm",
    "nanometers": "nm",
    "micron": "um",
    "meter": "m",
    "meters": "m",
    "metre": "m",
    "degree": "deg",
    "degrees": "deg",
    "seconds": "s",
    "second": "s",
    "sec": "s",
    "ev": "eV",
    "kev": "keV",
    "kv": "kV",
    "v": "V",
}
"""Lower case -> the name used here."""


def plain(unit: str | None) -> str:
    """A unit without brackets, markup and the many ways to write micro, ångström and a power."""
    said = (unit or "").strip()
    for sign in "[]${}() _":
        said = said.replace(sign, "")
    said = said.replace("⁻", "^-").replace("¹", "1").replace("−", "-").replace("\\AA", "A")
    said = said.replace("µ", "u").replace("μ", "u").replace("\N{ANGSTROM SIGN}", "Å")
    inverse = re.fullmatch(r"1/(.+)|(.+?)\^?-1", said)
    if inverse:
        return "1/" + _named(inverse[1] or inverse[2])
    return _named(said)


def _named(unit: str) -> str:
    return WRITTEN.get(unit.lower(), unit)


def sampling(space: Space, step: float | None, unit: str | None) -> tuple[str, float] | None:
    """Name of the fact and its value in our units; None for pixels and unknown units."""
    if step is None or not math.isfinite(step) or step <= 0:
        return None
    name = plain(unit)
    if space == "R":
        return ("scan_step_A", step * LENGTHS[name]) if name in LENGTHS else None
    if name in ANGLES:
        return "detector_pixel_mrad", step * ANGLES[name]
    if name.startswith("1/") and name[2:] in LENGTHS:
        return "detector_pixel_inv_A", step / LENGTHS[name[2:]]
    return None


def axes_facts(axes: Sequence[Axis]) -> dict[str, Any]:
    """Scan step and detector pixel from the axes (scan_y, scan_x, ky, kx), or without a scan's."""
    facts: dict[str, Any] = {}
    pairs: tuple[tuple[Space, list[Axis]], ...] = (("Q", list(axes[-2:])),)
    if len(axes) == 4:
        pairs = (("R", list(axes[:2])), *pairs)
    for space, pair in pairs:
        y, x = (sampling(space, *axis) for axis in pair)
        if y is not None and x is not None and y[0] == x[0]:
            facts[y[0]] = (y[1], x[1])
    return facts


def check_order(label: str, units: list[str | None]) -> None:
    """Refuse an array whose scan axes come after those of the detector, as far as units tell.

    **Raises:** InputError saying how to turn the array.
    """
    spaces = "".join(_space(unit) for unit in units)
    if len(units) == 4 and spaces in ("QQRR", "QQ??", "??RR"):
        raise InputError(
            f"{label} has axes in {', '.join(str(unit) for unit in units)}: the detector seems to "
            "come before the scan; name its axes with `order` where the format has this hint "
            '("ky kx y x"), or write it again as (scan_y, scan_x, ky, kx).'
        )


def _space(unit: str | None) -> str:
    """R for a length, Q for an angle or an inverse length, ? for anything else."""
    name = plain(unit)
    if name in ANGLES or (name.startswith("1/") and name[2:] in LENGTHS):
        return "Q"
    return "R" if name in LENGTHS else "?"


def step_of(values: Float[ndarray, " n"]) -> float | None:
    """The step of evenly spaced values; None if they are not, or are only one."""
    if len(values) < 2:
        return None
    steps = values[1:] - values[:-1]
    mean = float((values[-1] - values[0]) / (len(values) - 1))
    even = abs(steps - mean).max() <= 1e-3 * abs(mean)
    return mean if even and math.isfinite(mean) else None


def zero_of(pair: list[tuple[float, float | None, int]]) -> dict[str, Any]:
    """The centre of the detector, from (offset, step, length) of ky and kx, if it is inside."""
    center: list[float] = []
    for offset, step, length in pair:
        if not step or not math.isfinite(offset / step):
            return {}
        center.append(-offset / step)
        if not 0 < center[-1] < length - 1:
            return {}
    return {"center": (center[0], center[1])} if len(center) == 2 else {}


def scaled(value: float | None, unit: str | None, known: dict[str, float], usual: str) -> Any:
    """A positive quantity in our unit; without a unit it is in the `usual` one; None if unknown."""
    name = plain(unit) or usual
    if value is None or not math.isfinite(value) or value <= 0 or name not in known:
        return None
    return value * known[name]

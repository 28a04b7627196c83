"""The aberrations of other packages in ours: polar Krivanek coefficients, Å and rad.

All write a probe as exp(-i chi), so that positive C10 is overfocus and defocus = -C10, and measure
angles from x (the last axis) towards y, but for py4DSTEM, whose angles begin at axis 0. phaser
transforms the aperture with the other sign of k, which turns the probe by 180°: aberrations of
even order n (coma, three-fold, ...) have the opposite sign there. PtyRAD and phaser also take
Haider's names, each with factors of its own to Krivanek's coefficients, which are kept here.
"""

import cmath
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ...physics.optics import cartesian, POLAR, polar
from ..counts import InputError


Named = Mapping[str, float | int]

PTYRAD_HAIDER = {
    "C1": ("10", 1), "A1": ("12", 1), "B2": ("21", 3), "A2": ("23", 1), "C3": ("30", 1),
    "S3": ("32", 4), "A3": ("34", 1), "B4": ("41", 4), "D4": ("43", 4), "A4": ("45", 1),
    "C5": ("50", 1), "S5": ("52", 6), "R5": ("54", 6), "A5": ("56", 1),
}  # fmt: skip
"""PtyRAD's name -> (order, times Haider's coefficient is Krivanek's). (B4, D4: 5 by Haider.)"""
PHASER_HAIDER = {
    "c1": ("10", 1), "a1": ("12", 1), "b2": ("21", 3), "a2": ("23", 1), "c3": ("30", 1),
    "s3": ("32", 3), "a3": ("34", 1), "b4": ("41", 4), "d4": ("43", 4), "a4": ("45", 1),
    "c5": ("50", 1),
}  # fmt: skip
"""The same for phaser (by Haider: S3 4, B4 and D4 5)."""
PY4DSTEM_ALIASES = {
    "defocus": "C10", "astigmatism": "C12", "astigmatism_angle": "phi12", "coma": "C21",
    "coma_angle": "phi21", "Cs": "C30", "C5": "C50",
}  # fmt: skip
_ORDERS = {name[1:] for name in POLAR if name[0] == "C"}


def from_ptyrad(named: Named) -> dict[str, float]:
    """Ours from PtyRAD's `probe_aberrations`: any of its names, angles in degrees.

    Known are Krivanek's (`C12` and `phi12`, or `C12a` and `C12b`), Haider's (`A1` and `A1phi`),
    `defocus`, `Cs`, and of older files `probe_defocus`, `probe_c3`, `probe_c5`.

    **Raises:** InputError for a name that PtyRAD does not know, or a coefficient given twice.
    """
    old = {"probe_defocus": "defocus", "probe_c3": "C30", "probe_c5": "C50", "Cs": "C30"}
    parts: dict[str, dict[str, float]] = {}
    for given, value in named.items():
        order, part, factor = _ptyrad_name(old.get(given, given))
        if part in parts.setdefault(order, {}):
            raise InputError(f"PtyRAD's {given!r} gives coefficient C{order} a second time.")
        parts[order][part] = float(value) * factor
    found: dict[str, float] = {}
    for order, values in parts.items():
        if values.keys() & {"a", "b"} and values.keys() & {"", "phi"}:
            raise InputError(f"PtyRAD's C{order} is given both as polar and as Cartesian numbers.")
        if order[1] == "0":
            found[f"C{order}"] = values[""]
        elif values.keys() & {"a", "b"}:
            value = complex(values.get("a", 0.0), values.get("b", 0.0))
            found |= _polar(order, value)
        else:
            angle = math.radians(values.get("phi", 0.0)) * int(order[1])
            found |= _polar(order, cmath.rect(values.get("", 0.0), angle))
    return found


def _ptyrad_name(name: str) -> tuple[str, str, float]:
    """Order, part ("", "phi", "a" or "b") and factor of one of PtyRAD's names."""
    if name == "defocus":
        return "10", "", -1.0
    haider = PTYRAD_HAIDER.get(name.removesuffix("phi"))
    if haider:
        order, factor = haider
        if not name.endswith("phi"):
            return order, "", float(factor)
        if order[1] != "0":
            return order, "phi", 1.0
    match = re.fullmatch(r"(C|phi)(\d\d)(a|b|)", name)
    if match and match[2] in _ORDERS:
        kind, order, part = match.groups()
        bare = kind == "C" and not part
        if bare or (order[1] != "0" and not (kind == "phi" and part)):
            return order, "phi" if kind == "phi" else part, 1.0
    raise InputError(
        f"{name!r} is no aberration that PtyRAD knows; it has C10, C12 and phi12 (degrees), C12a, "
        f"..., defocus, Cs, and {', '.join(PTYRAD_HAIDER)}."
    )


def to_ptyrad(coefficients: Named) -> dict[str, float]:
    """PtyRAD's `probe_aberrations` from ours: Krivanek's names, angles in degrees."""
    return {
        name: math.degrees(value) if name.startswith("phi") else value
        for name, value in _canonical(coefficients).items()
    }


def from_phaser(
    defocus: float | int = 0.0, aberrations: Iterable[Mapping[str, Any]] = ()
) -> dict[str, float]:
    """Ours from the `defocus` and the `aberrations` of phaser's focused probe.

    An aberration is `{name: value}`, name one of Haider's, or `{n, m, value}`; a value is complex
    (`val` in the second form), `re` and `im`, or `mag` and `angle` in degrees, which phaser takes
    for the phase of the complex number, m times our angle. Several of one order add.

    **Raises:** InputError for a name or an order that phaser does not know.
    """
    total = {"10": complex(defocus)}
    for one in aberrations:
        for order, value in _phaser_values(one):
            # e^(i m phi): real part times cos(m phi), imaginary part times sin(m phi).
            total[order] = total.get(order, 0j) + value * (-1) ** (int(order[0]) + 1)
    found = {"C10": total.pop("10").real}
    for order, value in total.items():
        round_ = order[1] == "0"
        found |= ({f"C{order}": value.real} if value else {}) if round_ else _polar(order, value)
    return found


def _phaser_values(one: Mapping[str, Any]) -> Iterable[tuple[str, complex]]:
    if "n" in one and "m" in one:
        order = f"{one['n']}{one['m']}"
        if order not in _ORDERS:
            raise InputError(f"There is no aberration of phaser's order n, m = {one}.")
        rest = {key: value for key, value in one.items() if key not in ("n", "m", "scale_factor")}
        yield order, _complex(rest.get("val", rest))
        return
    for name, value in one.items():
        if name.lower() not in PHASER_HAIDER:
            raise InputError(
                f"{name!r} is no aberration that phaser knows; it has {', '.join(PHASER_HAIDER)}, "
                "and orders n, m."
            )
        order, factor = PHASER_HAIDER[name.lower()]
        yield order, factor * _complex(value)


def _complex(value: Any) -> complex:
    if isinstance(value, Mapping):
        if "re" in value:
            return complex(value["re"], value.get("im", 0.0))
        if "mag" in value:
            return cmath.rect(value["mag"], math.radians(value.get("angle", 0.0)))
        raise InputError(f"An aberration has `re` and `im`, or `mag` and `angle`; got {value}.")
    return complex(value)


def to_phaser(coefficients: Named) -> dict[str, Any]:
    """`defocus` and `aberrations` of phaser's focused probe from ours."""
    parts = cartesian({name: float(value) for name, value in coefficients.items()})
    defocus, others = parts.pop("C10", 0.0), []
    for order in dict.fromkeys(name[1:3] for name in parts):
        n, m = int(order[0]), int(order[1])
        sign = (-1) ** (n + 1)
        real = parts[f"C{order}" if m == 0 else f"C{order}a"]
        imaginary = parts.get(f"C{order}b", 0.0)
        others.append({"n": n, "m": m, "re": sign * real, "im": sign * imaginary})
    return {"defocus": defocus, "aberrations": others}


def from_py4dstem(named: Named) -> dict[str, float]:
    """Ours from py4DSTEM's (and abTEM's) polar parameters, angles in rad from axis 0 to axis 1.

    **Raises:** InputError for a name that py4DSTEM does not know.
    """
    found: dict[str, float] = {}
    for given, value in named.items():
        name = PY4DSTEM_ALIASES.get(given, given)
        if name not in POLAR:
            raise InputError(
                f"{given!r} is no aberration that py4DSTEM knows; it has {', '.join(POLAR)} and "
                f"{', '.join(PY4DSTEM_ALIASES)}."
            )
        found[name] = -float(value) if given == "defocus" else float(value)
    return _mirrored(found)


def to_py4dstem(coefficients: Named) -> dict[str, float]:
    """py4DSTEM's polar parameters from ours."""
    return _mirrored({name: float(value) for name, value in coefficients.items()})


def _mirrored(named: Mapping[str, float]) -> dict[str, float]:
    """With angles counted from the other axis: phi -> pi/2 - phi."""
    found = {}
    for name, value in _canonical(named).items():
        angle = name.startswith("phi")
        period = 2 * math.pi / int(name[4]) if angle else 1.0
        found[name] = (math.pi / 2 - value) % period if angle else value
    return found


def _canonical(named: Named) -> dict[str, float]:
    """Every magnitude with its angle; magnitudes that are not there or 0 are left out."""
    found: dict[str, float] = {}
    for order in sorted({name.lstrip("Cphi") for name in named}):
        value = float(named.get(f"C{order}", 0.0))
        if value:
            found[f"C{order}"] = value
            if order[1] != "0":
                found[f"phi{order}"] = float(named.get(f"phi{order}", 0.0))
    return found


def _polar(order: str, value: complex) -> dict[str, float]:
    """C_nm and phi_nm of C_nma + i C_nmb."""
    return polar({f"C{order}a": value.real, f"C{order}b": value.imag}) if value else {}

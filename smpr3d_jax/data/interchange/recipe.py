"""What a parameter file says of the experiment, in the keys of our experiment file.

Flips of the detector are not done to the frames: they are told as the scan's transposition and
rotation against the detector of the file, with the aberrations and the centre seen there.
"""

import dataclasses
import json
import math
import pathlib
import tomllib
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from ..counts import InputError


Matrix = Float[np.ndarray, "2 2"]
SWAP = np.array([[0.0, 1.0], [1.0, 0.0]])
# A shear or a difference of scale that a rotation and two steps do not explain.
SHEAR = 1e-3


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How another package was told to reconstruct.

    `experiment` has the keys of our experiment file; what it lacks the file did not say. The
    thicknesses (Å), `tilt` (y, x; mrad) and `band_limit` are those of `Exchange`; `probes` and
    `objects` count the states. `notes`: what was left out.
    """

    experiment: dict[str, Any]
    thicknesses: Float[np.ndarray, " slices"]
    probes: int = 1
    objects: int = 1
    tilt: tuple[float, float] = (0.0, 0.0)
    band_limit: float | None = None
    notes: tuple[str, ...] = ()


def load(path: pathlib.Path) -> dict[str, Any]:
    """The tree of a YAML, JSON or TOML file.

    **Raises:** InputError if it is none.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".toml":
            tree = tomllib.loads(text)
        else:
            tree = json.loads(text) if path.suffix == ".json" else YAML(typ="safe").load(text)
    except (OSError, UnicodeDecodeError, ValueError, YAMLError) as error:
        what = " ".join(str(error).split())
        raise InputError(f"{path}: cannot be read as a file of parameters: {what}") from error
    if not isinstance(tree, dict):
        raise InputError(f"{path}: holds {type(tree).__name__}, not keys with values.")
    return tree


class Section:
    """A part of a tree, which names itself when it is not as expected."""

    def __init__(self, path: pathlib.Path, name: str, tree: Any):
        self.path, self.name, self.tree = path, name, tree
        if not isinstance(tree, Mapping):
            raise InputError(f"{path}: {name} is missing, or holds {tree!r} instead of keys.")

    def at(self, key: str) -> str:
        """The file, and the place of a key in it."""
        return f"{self.path}: {self.name}.{key}" if self.name else f"{self.path}: {key}"

    def section(self, key: str, default: Any = None) -> "Section":
        """The keys below this one."""
        value = self.tree.get(key)
        name = f"{self.name}.{key}" if self.name else key
        return Section(self.path, name, default if value is None else value)

    def number(self, key: str, default: float | int | None = None) -> float:
        """A finite number; without a default it must be there."""
        value = self.tree.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise InputError(f"{self.at(key)} = {value!r}: a number is needed.")
        if not math.isfinite(value):
            raise InputError(f"{self.at(key)} = {value!r}: a finite number is needed.")
        return float(value)

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 1."""
        value = self.number(key, default)
        if value < 1 or value != int(value):
            raise InputError(f"{self.at(key)} = {value!r}: a whole number is needed.")
        return int(value)

    def numbers(self, key: str, length: int, default: Any = None) -> list[float]:
        """So many numbers; one number stands for all."""
        value = self.tree.get(key)
        value = default if value is None else value
        values = [value] * length if isinstance(value, int | float) else value
        if not isinstance(values, list | tuple) or len(values) != length:
            raise InputError(f"{self.at(key)} = {value!r}: {length} numbers are needed.")
        if not all(isinstance(v, int | float) and math.isfinite(v) for v in values):
            raise InputError(f"{self.at(key)} = {value!r}: {length} numbers are needed.")
        return [float(v) for v in values]

    def text(self, key: str, default: str | None = None) -> str:
        """A word."""
        value = self.tree.get(key)
        value = default if value is None else value
        if not isinstance(value, str):
            raise InputError(f"{self.at(key)} = {value!r}: text is needed.")
        return value

    def has(self, key: str) -> bool:
        """Whether something other than null is there."""
        return self.tree.get(key) is not None


def detector(flips: list[float]) -> Matrix:
    """From (y, x) on the detector of the file to that after [flip y, flip x, transpose]."""
    turned = np.diag([-1.0 if flip else 1.0 for flip in flips[:2]])
    return SWAP @ turned if flips[2] else turned


def geometry(scan: Matrix, seen: Matrix) -> tuple[dict[str, Any], tuple[str, ...]]:
    """`scan_step`, `rotation_deg` and `transpose` in the file's detector frame.

    `scan` takes (slow, fast) numbers of a position to (y, x) Å, `seen` is that of `detector`.
    """
    matrix = np.linalg.inv(seen) @ scan
    steps = np.hypot(*matrix)
    transpose = bool(np.linalg.det(matrix) < 0)
    # Where our raster's slow and fast directions point for a rotation of 0, as y + i x.
    unit = (matrix[0] + 1j * matrix[1]) / steps
    turned = unit / (np.array([1j, 1]) if transpose else np.array([1, 1j]))
    skew = float(np.angle(turned[0] / turned[1]))
    rotation = -math.degrees(np.angle(turned.sum())) % 360
    rotation = rotation - 360 if rotation > 180 else rotation
    notes = ()
    if abs(skew) > SHEAR:
        notes = (
            f"the axes of the scan are {90 - math.degrees(abs(skew)):.2f}° apart; 90° was taken",
        )
    found = {
        "scan_step": [float(s) for s in steps],
        "rotation_deg": round(rotation, 9) + 0.0,
        "transpose": transpose,
    }
    return found, notes


def centre(shape: tuple[int, int] | None, flips: list[float]) -> list[int] | None:
    """Where in the file the pixel n//2 after flips was; None where it is n//2 as well."""
    if shape is None or not any(flips[:2]):
        return None
    found = [n - 1 - n // 2 if flip else n // 2 for n, flip in zip(shape, flips, strict=False)]
    return None if found == [n // 2 for n in shape] else found


def lens(coefficients: Mapping[str, float], seen: Matrix) -> tuple[float, dict[str, float]]:
    """Defocus, and the other aberrations, in the file's detector frame."""
    others = {}
    for name, value in coefficients.items():
        if name.startswith("phi"):
            y, x = np.linalg.inv(seen) @ [math.sin(value), math.cos(value)]
            value = math.atan2(y, x) % (2 * math.pi / int(name[4]))
        if name != "C10":
            others[name] = float(value)
    return -float(coefficients.get("C10", 0.0)), others

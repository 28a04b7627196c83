"""What a ptychographic reconstruction is, in our conventions, whoever made it.

The pattern of a frame is the sum over probe states p and object states o of `weights[o]` |F psi|²,
F unitary with the zero frequency in the corner. psi begins as the probe p at the frame's position;
slice s multiplies it by `transmission[o, s]`, and from slice s to s + 1 it crosses
`thicknesses[s]` of free space, exp(-i pi lambda dz k²) exp(-2 pi i dz k.tan(tilt)). Nothing
follows the last slice. The first slice lies at z = 0, and `probes` are the waves that enter it.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Complex, Float

from ...physics.optics import POLAR, wavelength
from ..counts import InputError


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Object, probe and positions of a reconstruction; numpy arrays on the host.

    **Fields:**

    - `energy`: eV. `sampling`: Å (y, x) of a pixel of object and probe.
    - `transmission`: what each slice multiplies the wave by, exp(i sigma V), 1 for vacuum; the
      states of a mixed object first (one for most), each with its share in `weights`.
    - `thicknesses`: Å from a slice to the next one; the last is what the slice itself is thick, no
      wave crosses it (where the file does not say: that of the slice before, 0 for a single one).
    - `origin`: Å (y, x) of object pixel (0, 0) where `positions` are counted from.
    - `probes`: waves on entering the first slice, centred on pixel n//2. The sum of |probe|² over
      states and pixels is that of a frame from which nothing is lost, in `unit`.
    - `positions`: Å (y, x) of the probes' centre, in the order of the frames and along the axes of
      the detector as the reconstruction took it. Files are read with the first frame at (0, 0).
    - `tilts`: mrad (y, x) of the specimen, as in `physics.propagation`; one row for all frames, or
      one for each.
    - `unit`: what is counted: `electrons`, `counts` (those of the data) or `relative`.
    - `semiangle`: mrad of the aperture. `aberrations`: polar Krivanek coefficients (Å, rad) as in
      experiment files. Both are what the reconstruction began with, `probes` is what became of it.
    - `band_limit`: fraction of the smaller Nyquist frequency beyond which free propagation lets
      nothing pass; None where it does, or where the file does not say.
    - `scan_shape`: (slow, fast), where frames are a raster and the file says so.
    - `losses`: by name, one value an iteration. `facts`: what else the file says, by the names of
      its maker. `notes`: what deserves a second look.
    """

    energy: float
    sampling: tuple[float, float]
    transmission: Complex[np.ndarray, "objects slices y x"]
    thicknesses: Float[np.ndarray, " _slices"]
    origin: tuple[float, float]
    probes: Complex[np.ndarray, "probes py px"]
    positions: Float[np.ndarray, "frames 2"]
    weights: Float[np.ndarray, " _objects"]
    tilts: Float[np.ndarray, "tilts 2"]
    unit: str = "electrons"
    semiangle: float | None = None
    aberrations: Mapping[str, float] = dataclasses.field(default_factory=dict)
    band_limit: float | None = None
    scan_shape: tuple[int, int] | None = None
    losses: Mapping[str, Float[np.ndarray, " _"]] = dataclasses.field(default_factory=dict)
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def __post_init__(self):
        _check_shapes(self)
        _check_numbers(self)

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def wavelength(self) -> float:
        """Å."""
        return wavelength(self.energy)

    @property
    def depths(self) -> Float[np.ndarray, " slices"]:
        """Å of each slice along the beam, the first at 0."""
        return np.concatenate([[0.0], np.cumsum(self.thicknesses[:-1])])

    @property
    def corners(self) -> Float[np.ndarray, "frames 2"]:
        """Object pixel (y, x) on which pixel (0, 0) of each frame's window would lie, unrounded."""
        middle = np.array(self.probes.shape[1:]) // 2
        return (self.positions - self.origin) / self.sampling - middle


UNITS = "electrons", "counts", "relative"


def _check_shapes(one: Exchange) -> None:
    """**Raises:** InputError for arrays that do not belong together."""
    wanted = {"transmission": 4, "probes": 3, "positions": 2, "thicknesses": 1, "weights": 1}
    for name, axes in {**wanted, "tilts": 2}.items():
        array = getattr(one, name)
        if array.ndim != axes or not array.size:
            raise InputError(
                f"`{name}` of an exchange has {axes} axes and is not empty, got {array.shape}."
            )
    objects, slices, *_ = one.transmission.shape
    frames = len(one.positions)
    lengths = {
        "thicknesses": (one.thicknesses.shape, [(slices,)], f"{slices} slices"),
        "weights": (one.weights.shape, [(objects,)], f"{objects} object states"),
        "positions": (one.positions.shape, [(frames, 2)], "y and x"),
        "tilts": (one.tilts.shape, [(1, 2), (frames, 2)], f"{frames} frames"),
    }
    for name, (shape, known, what) in lengths.items():
        if shape not in known:
            raise InputError(f"`{name}` of an exchange has shape {shape}, but there are {what}.")
    if one.scan_shape is not None and math.prod(one.scan_shape) != frames:
        raise InputError(f"A scan of {one.scan_shape} positions does not have {frames} frames.")


def _check_numbers(one: Exchange) -> None:
    """**Raises:** InputError for numbers that cannot be."""
    for name in ("transmission", "probes", "positions", "thicknesses", "weights", "tilts"):
        if not np.isfinite(getattr(one, name)).all():
            raise InputError(f"`{name}` of an exchange holds values that are not finite numbers.")
    if not 1e3 <= one.energy <= 1e7:
        raise InputError(f"A beam of {one.energy:g} eV is not one of an electron microscope.")
    if not all(0 < d < math.inf for d in one.sampling):
        raise InputError(f"A pixel of {one.sampling} Å is not one.")
    if min(one.weights) < 0 or not any(one.weights):
        raise InputError(f"Shares of object states must not be negative, got {one.weights}.")
    if min(one.thicknesses) < 0:
        raise InputError(f"Slices cannot be {one.thicknesses} Å thick.")
    if one.unit not in UNITS:
        raise InputError(f"`unit` is one of {UNITS}, got {one.unit!r}.")
    unknown = [name for name in one.aberrations if name not in POLAR]
    if unknown:
        raise InputError(f"{unknown[0]!r} is no aberration coefficient; known are {POLAR}.")


def from_first(
    positions: Float[np.ndarray, "frames 2"], origin: Float[np.ndarray, "2"]
) -> dict[str, Any]:
    """`positions` and `origin` of an exchange counted from the first frame."""
    first = positions[0]
    y, x = (float(v) for v in origin - first)
    return {"positions": positions - first, "origin": (y, x)}

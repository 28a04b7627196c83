"""The scan step from a crystal whose lattice spacing is known."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Num

from ..counts import InputError


ABOVE_NOISE = 20.0
"""Power of a lattice peak over the median power of its distance from the middle, at least."""


class ScanStep(NamedTuple):
    """Step (slow, fast) in Å with its standard errors, and the `peaks` (y, x) in turns a step.

    `separate` says whether the peaks tell the two steps apart; otherwise they are equal. `height`
    is the power of the highest peak over the noise around it.
    """

    step: tuple[float, float]
    sigma: tuple[float, float]
    peaks: Float[np.ndarray, "peaks 2"]
    separate: bool
    height: float


def step_from_lattice(
    image: Num[np.ndarray, "scan_y scan_x"],
    spacing: float,
    nominal: float | None = None,
    tolerance: float = 0.2,
) -> ScanStep:
    """Step of a scan from the peaks that a lattice `spacing` (Å) makes in an image's spectrum.

    The `nominal` step (Å), right to within `tolerance`, says which peaks belong to this spacing;
    without it, the strongest one and all as far from the middle. A deflection is given as the
    complex image y + ix. A peak at (u, v) turns a step obeys (u/s_y)² + (v/s_x)² = 1/d², linear in
    the inverse squares of the steps: two directions of the lattice give both.

    **Raises:** InputError if no peak of that spacing stands out of the noise.
    """
    if not 0 < spacing < np.inf or not (nominal is None or 0 < nominal < np.inf):
        raise InputError(
            f"A lattice of {spacing} Å and a step of {nominal} Å cannot be: lengths are positive."
        )
    power = power_spectrum(image)
    places, heights = _peaks(power)
    radius = np.hypot(*places.T)
    if nominal is None and len(places):
        expected = float(radius[np.argmax(heights)])
    else:
        expected = (nominal or 0.0) / spacing
    if expected >= 0.7:
        raise InputError(
            f"A lattice of {spacing:g} Å repeats every {1 / expected:.3g} steps of "
            f"{nominal:g} Å; it needs more than two steps a period to be seen."
        )
    near = np.abs(radius - expected) < tolerance * expected
    ours = places[near]
    if not len(ours):
        at = "" if nominal is None else f", {expected:.3g} turns a step of {nominal:g} Å,"
        raise InputError(
            f"No peak of a lattice of {spacing:g} Å{at} stands out of the noise; {len(places)} "
            "others do. Check the spacing, the nominal step, and that the image shows the lattice."
        )
    squares, value = ours**2, 1 / spacing**2
    separate = len(ours) > 1 and np.linalg.cond(squares) < 10
    basis = squares if separate else squares.sum(1, keepdims=True)
    inverse, *_ = np.linalg.lstsq(basis, np.full(len(ours), value), rcond=None)
    if inverse.min() <= 0:
        raise InputError(
            f"The {len(ours)} peaks near a lattice of {spacing:g} Å belong to no lattice of one "
            "spacing. Check the spacing and the nominal step."
        )
    steps = 1 / np.sqrt(np.broadcast_to(inverse, 2))
    # A peak is placed to about a tenth of the width that the field gives it.
    width = 0.1 / np.asarray(image.shape, float)
    errors = np.sqrt((2 * np.abs(ours) * width) ** 2 @ np.ones(2)) * value / np.sum(squares, 1)
    covariance = np.linalg.pinv(basis.T @ (basis / errors[:, None] ** 2))
    sigma = np.sqrt(np.broadcast_to(np.diag(covariance), 2)) * steps**3 / 2
    pair = lambda v: (float(v[0]), float(v[1]))
    return ScanStep(pair(steps), pair(sigma), ours, bool(separate), float(heights[near].max()))


def power_spectrum(
    image: Num[np.ndarray, "scan_y scan_x"],
) -> Float[np.ndarray, "scan_y scan_x"]:
    """Power spectrum of the windowed image, zero frequency in the middle."""
    if min(image.shape) < 8:
        raise InputError(f"A lattice is looked for in 8 × 8 positions or more, not {image.shape}.")
    window = np.hanning(image.shape[0])[:, None] * np.hanning(image.shape[1])
    return np.abs(np.fft.fftshift(np.fft.fft2((image - image.mean()) * window))) ** 2


def _peaks(power) -> tuple[Float[np.ndarray, "peaks 2"], Float[np.ndarray, " peaks"]]:
    """Maxima (y, x) of half of the spectrum in turns a step, and their heights over the noise.

    They are placed by a parabola of logarithms.
    """
    ny, nx = power.shape
    middle = (ny // 2, nx // 2)
    y, x = np.arange(ny) - middle[0], np.arange(nx) - middle[1]
    turns = np.hypot(y[:, None] / ny, x / nx)
    ring = np.minimum((turns * min(ny, nx)).astype(int), min(ny, nx))
    level = np.array([np.median(power[ring == r]) if (ring == r).any() else np.inf
                      for r in range(ring.max() + 1)])[ring]  # fmt: skip
    around = [np.roll(power, (i, j), (0, 1)) for i in (-1, 0, 1) for j in (-1, 0, 1) if i or j]
    top = (power > np.max(around, axis=0)) & (power > ABOVE_NOISE * level)
    # Beyond the window's own width, one of each pair, not on the border.
    top &= turns * min(ny, nx) > 3
    top &= (y[:, None] > 0) | ((y[:, None] == 0) & (x > 0))
    top[[0, -1]] = False
    top[:, [0, -1]] = False
    places, heights = [], []
    logarithm = np.log(np.maximum(power, 1e-300))
    for i, j in zip(*np.nonzero(top), strict=True):
        fine = []
        for line, n, at in ((logarithm[:, j], ny, i), (logarithm[i], nx, j)):
            below, here, above = line[at - 1 : at + 2]
            fine.append((at - n // 2 + (below - above) / (2 * (below + above - 2 * here))) / n)
        places.append(fine)
        heights.append(power[i, j] / level[i, j])
    return np.array(places, float).reshape(-1, 2), np.array(heights, float)

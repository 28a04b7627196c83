"""Defocus, astigmatism and rotation from how far the bright-field images are displaced.

The image of the detector point k shows the specimen displaced by s(k) = grad chi / 2 pi, turned
into the axes of the raster. The displacements are measured by cross-correlation with the mean of
all aligned images; the polar decomposition of a linear fit gives the rotation and a symmetric
matrix, C1 and the two-fold astigmatism. It needs images that resemble each other, so a defocus of
several lambda/alpha² and a specimen with contrast; `overlap` does not.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from ..counts import InputError
from .robust import biweight
from .signals import Signals


ROUNDS = 6


class Shifts(NamedTuple):
    """Displacement (y, x) in Å of each cell's image in the raster, and which ones were used.

    `cells` are the scattering angles (y, x) of the cells, mrad.
    """

    cells: Float[np.ndarray, "cells 2"]
    moved: Float[np.ndarray, "cells 2"]
    used: Bool[np.ndarray, " cells"]


class ShiftFit(NamedTuple):
    """What the displacements say: `rotation` (rad, 0 to pi), `transpose`, defocus and C12, Å.

    The opposite lens (rotation + pi, defocus and astigmatism reversed) displaces images alike.
    `residual` is the rms distance (Å) between measured and fitted displacements of used cells, and
    the `sigma`s are standard errors.
    """

    rotation: float
    transpose: bool
    defocus: float
    C12a: float
    C12b: float
    residual: float
    rotation_sigma: float
    defocus_sigma: float


def measure_shifts(
    signals: Signals,
    step: tuple[float, float],
    pixel: float,
    start: Float[np.ndarray, "2 2"] | None = None,
) -> Shifts:
    """Displacement of the image of each cell against the mean of all, aligned in a few rounds.

    `step` (slow, fast) Å, `pixel` mrad; `start` is the displacement (Å) per angle (mrad) from which
    the first round begins, for images that differ too much to be recognised. After each round
    a linear fit of all cells takes the place of the measured displacements, which keeps a noisy one
    from running away.
    """
    angles = signals.cells * pixel
    images = signals.images / np.maximum(signals.images.mean((0, 1)), 1e-9) - 1
    shape = images.shape[:2]
    window = np.hanning(shape[0] + 2)[1:-1, None] * np.hanning(shape[1] + 2)[1:-1]
    spectra = np.fft.fft2(images * window[..., None], axes=(0, 1))
    axes = (np.fft.fftfreq(n, d) for n, d in zip(shape, step, strict=True))
    q = np.meshgrid(*axes, indexing="ij")
    smooth = np.exp(-((q[0] * step[0]) ** 2 + (q[1] * step[1]) ** 2) / (2 * 0.2**2))
    linear = np.zeros((2, 2)) if start is None else np.asarray(start, float)
    moved, used = angles @ linear.T, np.ones(len(angles), bool)
    for _ in range(ROUNDS):
        guess = angles @ linear.T
        ramp = np.exp(2j * np.pi * (q[0][..., None] * guess[:, 0] + q[1][..., None] * guess[:, 1]))
        aligned = spectra * ramp
        reference = aligned.mean(-1, keepdims=True)
        cross = (aligned - aligned / aligned.shape[-1]) * reference.conj() * smooth[..., None]
        peak = _peaks(np.fft.ifft2(cross, axes=(0, 1)).real)
        moved = guess + peak * np.asarray(step)
        linear, used = _robust_linear(angles, moved)
    return Shifts(angles, moved, used)


def _peaks(maps: Float[np.ndarray, "y x cells"]) -> Float[np.ndarray, "cells 2"]:
    """Place of the maximum of each map in pixels, by a parabola through its neighbours."""
    shape = maps.shape[:2]
    flat = maps.reshape(-1, maps.shape[-1])
    top = np.unravel_index(flat.argmax(0), shape)
    cell = np.arange(maps.shape[-1])
    place = []
    for axis in (0, 1):
        neighbours = []
        for d in (-1, 0, 1):
            index = [np.array(t) for t in top]
            index[axis] = (index[axis] + d) % shape[axis]
            neighbours.append(maps[index[0], index[1], cell])
        below, here, above = neighbours
        bend = np.minimum(below + above - 2 * here, -1e-30)
        whole = (top[axis] + shape[axis] // 2) % shape[axis] - shape[axis] // 2
        place.append(whole + np.clip((below - above) / (2 * bend), -0.5, 0.5))
    return np.stack(place, -1)


def _robust_linear(angles, moved):
    """The matrix D in moved = D angle + constant, and the cells that it describes."""
    fit, weight, _ = biweight(np.concatenate([angles, np.ones((len(angles), 1))], 1), moved)
    return fit[:2].T, weight > 0.1


def fit_shifts(shifts: Shifts) -> ShiftFit:
    """Rotation, transposition, defocus and astigmatism in closed form.

    The displacement in the raster is d = -R^T s with s = (C1 + A1) theta, so that -D of the linear
    fit d = D theta is an orthogonal times a symmetric matrix; a negative determinant means
    transposition, since |C1| exceeds |A1| where displacements are of use.

    **Raises:** InputError for fewer than six displacements that agree.
    """
    if int(shifts.used.sum()) < 6:
        raise InputError(
            f"Only {int(shifts.used.sum())} of {len(shifts.used)} bright-field images could be "
            "aligned; too few for a fit. The scan is in focus, or too small or too noisy."
        )
    angles, moved = shifts.cells[shifts.used] * 1e-3, shifts.moved[shifts.used]
    basis = np.concatenate([angles, np.ones((len(angles), 1))], 1)
    fit, *_ = np.linalg.lstsq(basis, moved, rcond=None)
    matrix = -fit[:2].T
    transpose = bool(np.linalg.det(matrix) < 0)
    if transpose:
        matrix = matrix[::-1]
    left, size, right = np.linalg.svd(matrix)
    turn, lens = left @ right, right.T @ np.diag(size) @ right
    # From raster to detector it is [[cos, sin], [-sin, cos]], and `turn` is its transpose.
    rotation = math.atan2(turn[1, 0], turn[0, 0])
    c1, a, b = (lens[0, 0] + lens[1, 1]) / 2, (lens[1, 1] - lens[0, 0]) / 2, lens[0, 1]
    if not 0 <= rotation < math.pi:
        rotation, c1, a, b = rotation % math.pi, -c1, -a, -b
    left_over = np.linalg.norm(moved - basis @ fit, axis=1)
    residual = float(np.sqrt(np.mean(left_over**2)))
    # Each of the four slopes has this error; C1 and the rotation are means of two of them.
    slope = residual / math.sqrt(2) / math.sqrt(float(np.sum(angles**2)) / 2)
    sigma = slope / math.sqrt(2)
    numbers = (-float(c1), float(a), float(b), residual)
    return ShiftFit(rotation, transpose, *numbers, sigma / max(abs(float(c1)), 1e-9), sigma)

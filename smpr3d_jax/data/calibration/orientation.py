"""How the scan lies to the detector, from the deflection of the beam: a field without curl."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from ..counts import InputError


class Orientation(NamedTuple):
    """Rotation (rad, from 0 to pi) and transposition of the scan, as in `physics.scan.raster`.

    The curl does not tell a rotation from its opposite (plus pi). `curl` is the part of the
    deflection that is curl at this orientation, and `other` the least part with the other
    transposition: the smaller one against the other, the better the choice.
    """

    rotation: float
    transpose: bool
    sigma: float
    curl: float
    other: float


def find_orientation(
    com: Float[np.ndarray, "scan_y scan_x 2"], step: tuple[float, float]
) -> Orientation:
    """Rotation and transposition that leave the least curl in the centres of mass, closed form.

    The centre of mass of a frame is, for a thin specimen and any aberrations, the gradient of its
    phase averaged over the probe, so it has no curl in the detector's axes. With the field's
    longitudinal and transverse parts c_q = q·v and d_q = q × v in the raster's axes (|q| = 1), a
    rotation by t leaves sum |d cos t - c sin t|², quadratic in (cos t, sin t): its least
    eigenvector is the answer. Each frequency counts with its power beyond the noise,
    the level of the highest frequencies. `com` (y, x) in any unit, `step` (slow, fast) in Å.

    **Raises:** InputError for a scan of fewer than 4 positions along an axis.
    """
    if min(com.shape[:2]) < 4:
        raise InputError(
            f"A rotation is found from the curl of 4 × 4 positions or more, not of "
            f"{com.shape[0]} × {com.shape[1]}; give geometry.rotation_deg."
        )
    best = {transpose: _least_curl(com, step, transpose) for transpose in (False, True)}
    transpose = best[True][2] < best[False][2]
    rotation, sigma, curl = best[transpose]
    return Orientation(rotation, transpose, sigma, curl, best[not transpose][2])


def _least_curl(com, step, transpose):
    """Angle, its standard error, and the part of curl for one transposition."""
    field, spacing = com, step
    if transpose:
        field, spacing = np.swapaxes(com, 0, 1), step[::-1]
    window = np.hanning(field.shape[0] + 2)[1:-1, None] * np.hanning(field.shape[1] + 2)[1:-1]
    centred = field - field.mean((0, 1))
    spectrum = np.fft.fft2(centred * window[..., None], axes=(0, 1))
    qy, qx = (np.fft.fftfreq(n, d) for n, d in zip(field.shape[:2], spacing, strict=True))
    q = np.hypot(qy[:, None], qx)
    safe = np.where(q > 0, q, 1.0)
    along = (spectrum[..., 0] * qy[:, None] + spectrum[..., 1] * qx) / safe
    across = (spectrum[..., 1] * qy[:, None] - spectrum[..., 0] * qx) / safe
    power = np.abs(along) ** 2 + np.abs(across) ** 2
    high = q > 0.8 * q.max()
    noise = float(np.median(power[high])) / math.log(2) / 1.5
    weight = np.clip(power / max(noise, 1e-30) - 2, 0, None)
    weight = weight / (1 + weight) * (q > 0)
    products = [
        float(np.sum(weight * np.real(a * np.conj(b))))
        for a, b in ((across, across), (across, along), (along, along))
    ]
    matrix = np.array([[products[0], products[1]], [products[1], products[2]]])
    values, vectors = np.linalg.eigh(matrix)
    # curl of the turned field: across cos t + along sin t, t the angle from detector to raster
    rotation = math.atan2(vectors[1, 0], vectors[0, 0]) % math.pi
    share = float(values[0] / max(values.sum(), 1e-30))
    waves = max(float(np.sum(weight)) / 2, 1.0)
    sigma = math.sqrt(max(values[0], 0) * values[1] / waves) / max(values[1] - values[0], 1e-30)
    return rotation, sigma, share

"""Where the bright-field disc lies on the detector, how large it is, and how round."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from ..counts import InputError
from .robust import biweight


RAYS = 180
STEP = 0.25
"""Directions, and pixels between samples along them, in which the edge is looked for."""


class Disc(NamedTuple):
    """The bright-field disc: lengths in pixels, (y, x) counted from the centre of pixel 0.

    `ellipse` is (e cos 2φ0, e sin 2φ0) of the radius r(φ) = R (1 + e cos 2(φ - φ0)), φ from the
    x towards the y axis. The `sigma`s are standard errors; `edge` are the points of half intensity
    along the rays, and `used` says which of them the fit did not reject.
    """

    center: tuple[float, float]
    radius: float
    ellipse: tuple[float, float]
    center_sigma: float
    radius_sigma: float
    ellipse_sigma: float
    edge: Float[np.ndarray, "points 2"]
    used: Bool[np.ndarray, " points"]


def find_disc(
    pattern: Float[np.ndarray, "ky kx"], mask: Bool[np.ndarray, "ky kx"] | None = None
) -> Disc:
    """Fit the edge of the bright-field disc of a mean pattern, to a small part of a pixel.

    Along each ray the edge is where the intensity has fallen half-way from inside to outside, and a
    circle with a two-fold distortion is fitted to these points, bad ones rejected (Tukey's
    biweight). Inside and outside are levels of each ray, so that an unevenly lit disc does no
    harm. `mask` is False where a pixel cannot be trusted; rays that need it are left out.

    **Raises:** InputError if there is no disc that ends inside the detector.
    """
    good = np.ones(pattern.shape, bool) if mask is None else mask
    center, radius = _first_guess(pattern, good)
    fit, edge = np.zeros(5), np.zeros((0, 2))
    used, covariance = np.zeros(0, bool), np.eye(5)
    for _ in range(4):
        angle, distance = _edge(pattern, good, center, radius)
        if len(angle) < RAYS // 2:
            raise InputError(
                f"The edge of the bright-field disc was found in {len(angle)} of {RAYS} directions "
                f"only (near {center[0]:.1f}, {center[1]:.1f} with a radius of {radius:.1f} of "
                f"{pattern.shape} pixels). The disc must end inside the detector: check the mask "
                "and the camera length, or give its centre and radius."
            )
        fit, covariance, used = _robust(angle, distance)
        moved = (center[0] + fit[1], center[1] + fit[2])
        edge = np.stack([np.sin(angle), np.cos(angle)], -1) * distance[:, None] + center
        center, radius = moved, float(fit[0])
    sigma = np.sqrt(np.diag(covariance))
    return Disc(
        (float(center[0]), float(center[1])), radius,
        (float(fit[3] / radius), float(fit[4] / radius)),
        float(np.sqrt(np.mean(sigma[1:3] ** 2))), float(sigma[0]),
        float(np.sqrt(np.mean(sigma[3:] ** 2)) / radius), edge, used,
    )  # fmt: skip


def _first_guess(pattern, good) -> tuple[tuple[float, float], float]:
    """Middle and radius of what is brighter than half of the level that most electrons see."""
    values = np.where(good, pattern, 0.0)
    if not np.isfinite(values).all() or values.max(initial=0) <= 0:
        raise InputError(
            "The bright-field disc cannot be found in a pattern without electrons, or with values "
            "that are not numbers; mask those pixels."
        )
    ranked = np.sort(values.ravel())
    plateau = ranked[np.searchsorted(np.cumsum(ranked), ranked.sum() / 2)]
    y, x = np.nonzero(values > plateau / 2)
    # The median is not drawn away by bright pixels elsewhere.
    return (float(np.median(y)), float(np.median(x))), math.sqrt(len(y) / math.pi)


def _edge(pattern, good, center, radius):
    """Direction and distance of the outermost fall to half intensity along each ray."""
    angle = 2 * np.pi * np.arange(RAYS) / RAYS
    away = np.arange(0.3 * radius, 1.5 * radius + 2, STEP)
    y = center[0] + np.sin(angle)[:, None] * away
    x = center[1] + np.cos(angle)[:, None] * away
    profile = np.where(good, pattern, np.nan)
    profile = _bilinear(profile, y, x)
    bright = (away > 0.6 * radius) & (away < 0.88 * radius)
    rays = np.isfinite(profile[:, bright]).sum(1) > 2
    rays &= np.isfinite(profile[:, away > 1.2 * radius]).sum(1) > 2
    angle, profile = angle[rays], profile[rays]
    inside = np.nanmedian(profile[:, bright], axis=1)
    half = (inside + np.nanmedian(profile[:, away > 1.2 * radius], axis=1)) / 2
    near = (away > 0.75 * radius) & (away < 1.3 * radius)
    falls = (profile[:, :-1] >= half[:, None]) & (profile[:, 1:] < half[:, None]) & near[:-1]
    found = np.flatnonzero(falls.any(1))
    last = falls.shape[1] - 1 - np.argmax(falls[found, ::-1], axis=1)
    above, below = profile[found, last], profile[found, last + 1]
    return angle[found], away[last] + STEP * (above - half[found]) / (above - below)


def _bilinear(pattern, y, x):
    """Values between pixels; NaN outside of the pattern."""
    i, j = np.floor(y).astype(int), np.floor(x).astype(int)
    u, v = y - i, x - j
    padded = np.pad(pattern, 2, constant_values=np.nan)
    i, j = (np.clip(a, -2, n) + 2 for a, n in zip((i, j), pattern.shape, strict=True))
    top = padded[i, j] * (1 - v) + padded[i, j + 1] * v
    return top * (1 - u) + (padded[i + 1, j] * (1 - v) + padded[i + 1, j + 1] * v) * u


def _robust(angle, distance):
    """Radius, shift (y, x) and two-fold distortion, their covariance, and which points were used.

    Neighbouring rays share pixels, so that a ray counts as the part of a pixel's width along the
    edge that it owns.
    """
    terms = [
        np.ones_like(angle),
        np.sin(angle),
        np.cos(angle),
        np.cos(2 * angle),
        np.sin(2 * angle),
    ]
    basis = np.stack(terms, -1)
    fit, weight, residual = biweight(basis, distance[:, None])
    spread = float(np.sum(weight * residual**2) / max(np.sum(weight) - 5, 1))
    pixels_a_ray = min(1.0, 2 * np.pi * abs(float(fit[0, 0])) / len(angle))
    covariance = np.linalg.pinv(basis.T @ (basis * weight[:, None])) * spread / pixels_a_ray
    return fit[:, 0], covariance, weight > 0

"""An elliptical camera: measured on a disc or ring, removed electron by electron.

Counts may be moved, dropped and added up, not interpolated: each electron goes from one pixel to
one other, so that Poisson counts stay Poisson counts and independent. The forward model takes
square pixels and has no place for an ellipse, which is why it is removed here or, where it is
small (a ratio of 1.01 moves the edge of a disc of 50 pixels by a quarter of one), let be.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Integer, UInt64

from .counts import Frames, InputError
from .electrons import Electrons
from .events import event_rows, EventRows, merge, to_events, to_frames


class Ellipse(NamedTuple):
    """The edge of a disc, or a ring, that ought to be a circle, in pixels.

    `ratio` is the longer over the shorter half-axis, the longer lies at `angle` (rad, from x
    towards y), `radius` is the geometric mean of both. `errors` are standard errors of center y,
    x, radius, ratio and angle, `residual` is the rms distance of the edge from the ellipse.
    """

    center: tuple[float, float]
    radius: float
    ratio: float
    angle: float
    errors: tuple[float, float, float, float, float]
    residual: float

    @property
    def circular(self) -> Float[np.ndarray, "2 2"]:
        """The matrix that makes the ellipse a circle of `radius` about its centre, on (y, x).

        Symmetric, with determinant 1. Its inverse is the camera's distortion.
        """
        along = np.array([math.sin(self.angle), math.cos(self.angle)])
        stretch = math.sqrt(self.ratio)
        outer = np.outer(along, along)
        return outer / stretch + (np.eye(2) - outer) * stretch


def ellipse_of_disc(
    pattern: Float[np.ndarray, "ky kx"],
    center: tuple[float, float],
    radius: float,
    mask: Bool[np.ndarray, "ky kx"] | None = None,
    rays: int = 180,
) -> Ellipse:
    """An ellipse through the edge of the bright-field disc of a mean pattern.

    The edge is where the pattern, along rays from `center` (y, x), falls to half of what it is
    inside; `radius` is a guess to a third. For a pattern of about one level inside, such as the
    mean of a scan; rays that meet masked pixels or no edge are left out.

    **Raises:** InputError if the edge is found in fewer than 12 directions.
    """
    angles = 2 * np.pi * np.arange(rays) / rays
    reach = radius * np.linspace(0.5, 1.5, max(40, int(8 * radius)))
    good = np.where(np.ones(pattern.shape, bool) if mask is None else mask, pattern, np.nan)
    y = center[0] + np.sin(angles)[:, None] * reach
    x = center[1] + np.cos(angles)[:, None] * reach
    found = np.array([_edge(row, reach) for row in _between(good, y, x)])
    return _fitted(found, angles, center)


def ellipse_of_ring(
    pattern: Float[np.ndarray, "ky kx"],
    center: tuple[float, float],
    radius: float,
    width: float,
    mask: Bool[np.ndarray, "ky kx"] | None = None,
    rays: int = 180,
) -> Ellipse:
    """An ellipse through a ring near `radius`, of which `width` pixels on each side are looked at.

    Along each ray the centre of mass of what rises above the ends of that window.

    **Raises:** InputError if the ring is found in fewer than 12 directions.
    """
    angles = 2 * np.pi * np.arange(rays) / rays
    reach = width * np.linspace(-1, 1, max(20, int(8 * width)))
    good = np.where(np.ones(pattern.shape, bool) if mask is None else mask, pattern, np.nan)
    found = np.full(rays, radius)
    # The window follows the ring: a part of it beyond an end would pull its centre back.
    for _ in range(5):
        line = found[:, None] + reach
        y = center[0] + np.sin(angles)[:, None] * line
        x = center[1] + np.cos(angles)[:, None] * line
        rows = _between(good, y, x)
        rise = np.maximum(rows - np.linspace(rows[:, 0], rows[:, -1], len(reach), axis=1), 0)
        total = rise.sum(axis=1)
        found = (rise * line).sum(axis=1) / np.where(total > 0, total, np.nan)
        found = np.where(np.abs(found - radius) <= 2 * width, found, np.nan)
    return _fitted(found, angles, center)


def _between(image, y, x):
    """Linear interpolation, for measuring alone; not a number outside."""
    ky, kx = image.shape
    wide = np.pad(image, 1, constant_values=np.nan)
    y, x = (np.nan_to_num(v, nan=-9.0) for v in (y, x))
    y0, x0 = (np.floor(v).astype(int) for v in (y, x))
    fy, fx = y - y0, x - x0
    at = lambda i, j: wide[(y0 + i + 1).clip(0, ky + 1), (x0 + j + 1).clip(0, kx + 1)]
    above = at(0, 0) * (1 - fx) + at(0, 1) * fx
    return above * (1 - fy) + (at(1, 0) * (1 - fx) + at(1, 1) * fx) * fy


def _edge(row, reach) -> float:
    """Where a falling profile crosses half of its level inside."""
    inner = row[: len(row) // 5]
    if not np.isfinite(row).all() or inner.mean() <= 0:
        return math.nan
    outer = row[-(len(row) // 5) :].mean()
    half = (inner.mean() + outer) / 2
    below = np.flatnonzero(row < half)
    if inner.mean() < 2 * outer or not len(below) or below[0] == 0:
        return math.nan
    i = int(below[0])
    return float(np.interp(half, [row[i], row[i - 1]], [reach[i], reach[i - 1]]))


def _fitted(found, angles, center) -> Ellipse:
    """The ellipse nearest to points at `found` pixels from `center`, outliers left out."""
    use = np.isfinite(found)
    if np.count_nonzero(use) < 12:
        raise InputError(
            f"the edge was found in {np.count_nonzero(use)} of {len(angles)} directions, 12 are "
            "needed; check centre and radius."
        )
    angles, found = angles[use], found[use]
    start = float(np.median(found))
    parameters = np.array([0.0, 0.0, start, 0.0, 0.0])
    keep = np.ones(len(found), bool)
    covariance, sigma = np.eye(5), 0.0
    for _ in range(12):
        misfit, slopes = _misfit(parameters, found[keep], angles[keep])
        covariance = np.linalg.inv(slopes.T @ slopes)
        parameters = parameters - covariance @ slopes.T @ misfit
        misfit = _misfit(parameters, found, angles)[0]
        sigma = 1.4826 * float(np.median(np.abs(misfit)))
        keep = np.abs(misfit) <= 3.5 * max(sigma, 1e-9)
        if np.count_nonzero(keep) < 12:
            keep[:] = True
    rms = float(np.sqrt(np.mean(_misfit(parameters, found[keep], angles[keep])[0] ** 2)))
    dof = max(1, np.count_nonzero(keep) - 5)
    # Rays closer than two pixels see the same pixels.
    alike = max(1.0, np.count_nonzero(keep) / (math.pi * start))
    errors = np.sqrt(np.diag(covariance) * rms**2 * alike * np.count_nonzero(keep) / dof)
    dy, dx, radius, c, s = (float(p) for p in parameters)
    e = math.hypot(c, s)
    ratio_error = 2 * float(errors[3:].mean()) / (1 - e) ** 2
    angle_error = float(errors[3:].mean()) / (2 * e) if e > 0 else math.pi / 2
    return Ellipse(
        (center[0] + dy, center[1] + dx), radius, (1 + e) / (1 - e),
        math.atan2(s, c) / 2 % math.pi,
        (float(errors[0]), float(errors[1]), float(errors[2]), ratio_error,
         min(angle_error, math.pi / 2)), rms,
    )  # fmt: skip


def _misfit(parameters, found, angles):
    """Distance of each point from the ellipse, and its slopes with the five parameters.

    The ellipse is where |B (p - d)| = R; B = [[1 - c, -s], [-s, 1 + c]] / sqrt(1 - c² - s²) on
    (x, y) has the determinant 1 and shrinks the direction of angle atan2(s, c)/2.
    """
    x, y = found * np.cos(angles), found * np.sin(angles)

    def distance(p):
        u, v = x - p[1], y - p[0]
        c, s = p[3], p[4]
        inner = np.hypot((1 - c) * u - s * v, (1 + c) * v - s * u)
        return inner / math.sqrt(max(1e-6, 1 - c**2 - s**2)) - p[2]

    steps = np.diag([1e-4, 1e-4, 1e-4, 1e-6, 1e-6])
    slopes = [(distance(parameters + h) - distance(parameters - h)) / (2 * h.max()) for h in steps]
    return distance(parameters), np.stack(slopes, axis=1)


def moved_electrons(
    counts: Electrons,
    matrix: Float[np.ndarray, "2 2"],
    center: tuple[float, float],
    shape: tuple[int, int] | None = None,
    seed: int = 0,
    first: int = 0,
) -> tuple[Electrons, Integer[np.ndarray, " frames"]]:
    """Each electron moved from p to `matrix` (p - center) + n//2 on a grid of `shape`, and lost.

    An electron is put anywhere within its pixel by chance, then into the pixel in which its image
    lies: Poisson counts stay Poisson counts, independent, their means shared out by area. Nothing
    is interpolated, and no electron is lost but over the edges. With `Ellipse.circular` as the
    `matrix` discs become round. The same electrons go the same way whatever the size of a block,
    if `first` is the number of its first frame.

    **Arguments:** `matrix` and `center` on (y, x) in pixels; `shape` is that of the frames unless
    given; `seed` of the chance. What was never seen is dark in the result, see `moved_mask`.
    """
    rows = counts if isinstance(counts, EventRows) else event_rows(counts)
    rows = merge(rows)
    number = np.asarray(rows.multiplicity, np.int64)
    pixels, indptr = np.repeat(np.asarray(rows.pixels), number), np.asarray(rows.indptr)
    ends = np.append(0, np.cumsum(number))[indptr]
    ky, kx = shape or rows.shape
    frame = np.repeat(np.arange(len(rows)), np.diff(ends))
    chance = _chance(seed, frame + first, np.arange(len(pixels)) - ends[frame])
    place = np.stack(np.divmod(pixels, rows.shape[1]), axis=1) + chance - 0.5
    where = (place - np.asarray(center)) @ np.asarray(matrix).T + [ky // 2, kx // 2]
    y, x = np.floor(where + 0.5).astype(np.int64).T
    inside = (y >= 0) & (y < ky) & (x >= 0) & (x < kx)
    kept = np.append(0, np.cumsum(inside))[ends]
    moved = merge(EventRows(kept, (y * kx + x)[inside].astype(np.int32), (ky, kx)))
    lost = np.diff(ends) - np.diff(kept)
    if isinstance(counts, Frames):
        return to_frames(moved), lost
    return (moved if isinstance(counts, EventRows) else to_events(moved)), lost


def moved_mask(
    mask: Bool[np.ndarray, "ky kx"],
    matrix: Float[np.ndarray, "2 2"],
    center: tuple[float, float],
    shape: tuple[int, int] | None = None,
) -> Bool[np.ndarray, "new_ky new_kx"]:
    """Pixels of the new grid whose every electron would have come from a usable pixel."""
    ky, kx = shape or mask.shape
    back = np.linalg.inv(matrix)
    # The borders of a pixel are its own by a hair.
    parts = (np.arange(5) - 2) / 4.000001
    y, x = (np.arange(n)[:, None] - n // 2 + parts for n in (ky, kx))
    grid = np.stack(np.broadcast_arrays(y[:, :, None, None], x[None, None]), axis=-1)
    where = np.floor(grid @ back.T + np.asarray(center) + 0.5).astype(int)
    wide = np.pad(mask, 1)
    at = [(where[..., i] + 1).clip(0, n + 1) for i, n in enumerate(mask.shape)]
    return np.asarray(wide[at[0], at[1]].all(axis=(1, 3)))


def _chance(
    seed: int, frame: Int[np.ndarray, " electrons"], electron: Int[np.ndarray, " electrons"]
) -> Float[np.ndarray, "electrons 2"]:
    """Numbers in 0 to 1 that depend on nothing but the seed, the frame and its electron."""
    with np.errstate(over="ignore"):
        key = _scrambled(np.asarray([seed], np.uint64) + np.uint64(0x9E3779B97F4A7C15))
        key = _scrambled(key ^ frame.astype(np.uint64))
        key = _scrambled(key ^ (electron.astype(np.uint64) * np.uint64(2)))
        both = key, _scrambled(key ^ np.uint64(0xD1B54A32D192ED03))
    return np.stack([(k >> np.uint64(11)).astype(float) / 2**53 for k in both], axis=1)


def _scrambled(key: UInt64[np.ndarray, " keys"]) -> UInt64[np.ndarray, " keys"]:
    """splitmix64's finaliser (Steele et al., OOPSLA 2014)."""
    key = (key + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
    key = (key ^ (key >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    key = (key ^ (key >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return key ^ (key >> np.uint64(31))

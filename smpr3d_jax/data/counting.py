"""From raw frames of a camera to single electrons.

Where electrons are rare, each leaves a bright spot on a background of noise. They are counted as
4D Camera data are: dark subtracted, a threshold above the background's Gaussian, another below
X-rays, and local maxima between the two. All of it is done in floating point, where a dark frame
cannot wrap around, and the thresholds are values of dark-corrected pixels, nothing else. Figures of
what was lost come along. Where electrons overlap use an integrating camera's `gain` instead
(`to_electrons`).
"""

import math
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Integer, Real

from .counts import InputError
from .events import EventRows


STEPS = 0.1
"""Width of a bin of the histogram, in standard deviations of the background."""
BEHIND = 1.25
"""Standard deviations above the mean to which the background is fitted; electrons lie beyond."""


def corrected(
    raw: Real[np.ndarray, "frames ky kx"],
    dark: Real[np.ndarray, "dark_ky dark_kx"] | None = None,
    gain: Real[np.ndarray, "gain_ky gain_kx"] | None = None,
) -> Float[np.ndarray, "frames ky kx"]:
    """(raw - dark) × gain in float32: values to count electrons in, and no counts themselves.

    Noise of such frames is not Poisson's. Pixels with a gain of 0 are lost: mask them.

    **Raises:** InputError for references of another shape.
    """
    for name, image in (("dark", dark), ("gain", gain)):
        if image is not None and image.shape != raw.shape[1:]:
            raise InputError(
                f"`corrected`: the {name} reference has {image.shape} pixels, the frames have "
                f"{raw.shape[1:]}."
            )
    values = raw.astype(np.float32)
    values = values if dark is None else values - dark.astype(np.float32)
    return values if gain is None else values * gain.astype(np.float32)


class Background(NamedTuple):
    """The Gaussian of pixels without an electron: its mean and width, and their standard errors.

    `part` of all pixels belong to it.
    """

    mean: float
    sigma: float
    mean_error: float
    sigma_error: float
    part: float


def background_of(
    values: Float[np.ndarray, "frames ky kx"], mask: Bool[np.ndarray, "ky kx"] | None = None
) -> Background:
    """A Gaussian fitted to the peak of the histogram of dark-corrected frames.

    Only the side away from the electrons is taken, up to `BEHIND` standard deviations above the
    mean: weighted least squares of the histogram's logarithm, a parabola, again and again until
    the range stays (Guo, IEEE Signal Proc. Mag. 28 (2011) 134).

    **Raises:** InputError where there is no such peak, as when most pixels hold electrons.
    """
    flat = values[:, mask].ravel() if mask is not None else values.ravel()
    flat = flat[np.isfinite(flat)]
    mean, sigma = _first_guess(flat)
    whole = np.array_equal(flat, np.rint(flat))
    for _ in range(20):
        bins = _bins(mean, sigma, whole)
        found = _parabola(np.histogram(flat, bins)[0], bins)
        if found is None:
            break
        moved = abs(found.mean - mean) + abs(found.sigma - sigma)
        mean, sigma = found.mean, found.sigma
        # The bins follow, and the pixels in them change.
        if moved < 0.2 * (found.mean_error + found.sigma_error):
            return found._replace(part=found.part / len(flat))
    raise InputError(
        "`background_of`: the histogram of the frames has no Gaussian peak of pixels without an "
        "electron. Subtract the dark reference, or, if most pixels hold electrons, do not count "
        "but divide by the counts that an electron makes."
    )


def _bins(mean: float, sigma: float, whole: bool) -> Float[np.ndarray, " edges"]:
    """Edges of the histogram to be fitted; each bin holds as many whole numbers as any other."""
    if not whole:
        return mean + sigma * np.arange(-3, BEHIND + STEPS / 2, STEPS)
    step = math.ceil(STEPS * sigma)
    first, last = math.floor(mean - 3 * sigma), math.ceil(mean + BEHIND * sigma)
    return np.arange(first, last + step + 1, step) - 0.5


def _first_guess(flat: Float[np.ndarray, " pixels"]) -> tuple[float, float]:
    """The fullest of narrow bins, and the width of what lies below it."""
    low, middle = np.quantile(flat, (0.005, 0.5))
    width = max(float(middle - low), 1e-6)
    numbers, edges = np.histogram(flat, 60, (float(low), float(middle + width)))
    top = int(np.argmax(np.convolve(numbers, np.ones(5), "same")))
    mode = float(edges[top] + edges[top + 1]) / 2
    below = mode - flat[flat < mode]
    if len(below) < 100:
        return mode, width / 2.5
    return mode, float(np.quantile(below, 0.6827))


def _parabola(numbers: Integer[np.ndarray, " bins"], edges: Float[np.ndarray, " edges"]):
    """The Gaussian of a histogram, None where it has none; `part` counts pixels."""
    centre, unit = edges.mean(), (edges[-1] - edges[0]) / 2
    x = ((edges[1:] + edges[:-1]) / 2 - centre) / unit
    use = numbers > 4
    if np.count_nonzero(use) < 5:
        return None
    x, weight = x[use], numbers[use].astype(float)
    design = np.stack([np.ones_like(x), x, x**2], axis=1)
    y = np.log(weight)
    covariance = np.linalg.inv(design.T @ (design * weight[:, None]))
    a, b, c = covariance @ design.T @ (weight * y)
    if c >= 0:
        return None
    mean, variance = -b / (2 * c), -1 / (2 * c)
    to_mean = np.array([0, -1 / (2 * c), b / (2 * c**2)])
    to_sigma = np.array([0, 0, math.sqrt(variance) / (-2 * c)])
    errors = [math.sqrt(d @ covariance @ d) * unit for d in (to_mean, to_sigma)]
    sigma = math.sqrt(float(variance)) * unit
    height = math.exp(a - b**2 / (4 * c)) / (edges[1] - edges[0])
    all_of_it = height * sigma * math.sqrt(2 * math.pi)
    return Background(float(mean * unit + centre), sigma, errors[0], errors[1], float(all_of_it))


class Thresholds(NamedTuple):
    """An electron's pixel lies above `lower` and below `upper`, in dark-corrected units."""

    lower: float
    upper: float
    background: Background


def thresholds_of(
    values: Float[np.ndarray, "frames ky kx"],
    lower_sigma: float = 4.0,
    upper_pulses: float = 10.0,
    mask: Bool[np.ndarray, "ky kx"] | None = None,
) -> Thresholds:
    """Thresholds from some dark-corrected frames of a scan, a few million pixels of them.

    `lower_sigma` widths of the background above its mean; against X-rays `upper_pulses` times the
    median pulse of the electrons above it. (stempy puts the upper one at ten standard deviations
    of all pixels, which cuts into the electrons where they are rarer than one pixel in a hundred.)

    **Raises:** InputError as `background_of`, or if nothing lies above the lower threshold.
    """
    background = background_of(values, mask)
    lower = background.mean + lower_sigma * background.sigma
    pulses = _peaks(values, lower, math.inf, mask)[1]
    if len(pulses) == 0:
        raise InputError(
            f"`thresholds_of`: none of {len(values)} frames has a pixel above {lower:.4g}, "
            f"{lower_sigma:g} widths above the background; take more frames."
        )
    upper = background.mean + upper_pulses * (float(np.median(pulses)) - background.mean)
    return Thresholds(lower, upper, background)


class Counted(NamedTuple):
    """Electrons of raw frames, and figures of how many were missed and how many were made up.

    Per pixel and frame: `rate` of the events, and of events that noise alone makes, `false_rate`.
    Parts of the electrons: `overlap`, those lost since another was too near, and `faint`, those
    whose pixel stayed below the threshold, as a power law through the beginning of their spectrum
    has it (None where there are too few electrons to tell).
    """

    events: EventRows
    rate: float
    false_rate: float
    overlap: float
    faint: float | None


def count_electrons(
    values: Float[np.ndarray, "frames ky kx"],
    thresholds: Thresholds,
    mask: Bool[np.ndarray, "ky kx"] | None = None,
) -> Counted:
    """One electron at each local maximum of its 8 neighbours between the thresholds.

    `values` are dark-corrected frames (`corrected`). Of equal neighbours the first is taken, so
    that an electron on two pixels is not lost. Masked pixels neither hold electrons nor outshine
    their neighbours.
    """
    frames, ky, kx = values.shape
    place, own = _peaks(values, thresholds.lower, thresholds.upper, mask)
    frame, pixels = np.divmod(place, ky * kx)
    indptr = np.append(0, np.cumsum(np.bincount(frame, minlength=frames)))
    events = EventRows(indptr, pixels.astype(np.int32), (ky, kx))
    used = ky * kx if mask is None else int(np.count_nonzero(mask))
    return Counted(events, *_figures(own, thresholds, frames, used))


def _peaks(values, lower: float, upper: float, mask):
    """Flat places of local maxima between two values, and what they are."""
    frames, ky, kx = values.shape
    wide = np.full((frames, ky + 2, kx + 2), -np.inf, np.float32)
    wide[:, 1:-1, 1:-1] = values if mask is None else np.where(mask, values, -np.inf)
    flat, row = wide.reshape(-1), kx + 2
    # Pixels above the threshold are few: only their neighbours are looked up.
    place = np.flatnonzero((flat > lower) & (flat < upper))
    own, highest = flat[place], np.ones(len(place), bool)
    for move in (-row - 1, -row, -row + 1, -1):
        highest &= own > flat[place + move]
        highest &= own >= flat[place - move]
    place, own = place[highest], own[highest]
    frame, inside = np.divmod(place, (ky + 2) * row)
    y, x = np.divmod(inside, row)
    return (frame * ky + y - 1) * kx + x - 1, own


def _figures(own, thresholds: Thresholds, frames: int, pixels: int):
    """Rate, false rate, overlap and faint part of `Counted`."""
    lower, mean, sigma = thresholds.lower, *thresholds.background[:2]
    rate, chance = len(own) / (frames * pixels), NormalDist().cdf((mean - lower) / sigma)
    false = chance * thresholds.background.part
    height = (own - mean) / (lower - mean)
    near = np.count_nonzero(height < 1.5) - false * frames * pixels
    next_to = np.count_nonzero((height >= 1.5) & (height < 2))
    faint = None
    if min(near, next_to) >= 30:
        below = near / (1.5 ** (_power(next_to / near) + 1) - 1)
        faint = below / (below + len(own))
    return rate, false, overlap(max(rate - false, 0.0)), faint


def _power(ratio: float) -> float:
    """The power p of a spectrum x**p with `ratio` times as much in 1.5 to 2 as in 1 to 1.5."""
    low, high = 0.0, 12.0
    for _ in range(50):
        p = (low + high) / 2
        low, high = (
            (p, high) if 2 ** (p + 1) - 1.5 ** (p + 1) < ratio * (1.5 ** (p + 1) - 1) else (low, p)
        )
    return (low + high) / 2


def overlap(rate: float, area: float = 9.0) -> float:
    """Part of the electrons that is lost because another, with a higher pulse, fell nearby.

    Of electrons that fall at random, one is the highest of those within `area` pixels of it with
    probability (1 - exp(-x))/x, x = area × electrons per pixel; `rate` of those counted is that
    times the electrons', so that area × rate = 1 - exp(-x). Where a pulse spreads over several
    pixels the area is larger.
    """
    seen = area * rate
    if seen >= 1:
        return 1.0
    expected = -math.log1p(-seen)
    return 1 - seen / expected if expected > 0 else 0.0

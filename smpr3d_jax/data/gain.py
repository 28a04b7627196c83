"""Electrons from cameras that integrate charge: what one electron is worth, and whole numbers.

A camera that reads g counts an electron, with read noise s, has the variance g mean + s² where the
beam is constant (photon transfer). Rounding frames divided by g gives the electrons back exactly
only while s is small against g: then the counts are Poisson's again. Otherwise they are refused,
for rounded noise looks like electrons.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Integer, Real

from .counts import InputError


CLEAR = 0.17
"""Read noise, in electrons, with which one pixel in 300 is rounded to a wrong number."""
CHANCE = 5.0
"""Standard errors by which few pixels may be farther from whole numbers than `CLEAR`."""
PARTS = 4
"""Independent parts of a scan: for the variance, the mean, its square, and the sorting by it."""
GROUP = 50
"""Pixels of about one mean whose variances are averaged."""
FEW = 4.5
"""Electrons up to which the distance from whole numbers is read noise and not an error of g."""


class Gain(NamedTuple):
    """Counts that an electron makes, the rms noise of a dark pixel in counts, and their errors."""

    counts_per_electron: float
    read_noise: float
    error: float
    read_noise_error: float


class PairStatistics(NamedTuple):
    """Mean and variance of each pixel (or block of pixels) in `PARTS` independent parts of a scan.

    `pairs` of frames that follow each other are dealt out to the parts in turn.
    """

    pairs: Int[np.ndarray, " parts"]
    mean: Float[np.ndarray, "parts ky kx"]
    variance: Float[np.ndarray, "parts ky kx"]


def pair_statistics(
    blocks: Iterable[Real[np.ndarray, "_ ky kx"]], block: int = 1
) -> PairStatistics:
    """Mean and variance of each pixel, from differences of frames that follow each other.

    Differences leave out most of how the signal changes over a scan. `block` sums as many pixels
    along each axis before: a charge that spreads over several pixels makes each of them look less
    noisy, their sum not. A frame without a partner at the end of a block is left out.

    **Raises:** InputError if there is no pair of frames.
    """
    pairs, mean, variance = np.zeros(PARTS, int), [0.0] * PARTS, [0.0] * PARTS
    for raw in blocks:
        frames = _summed(raw[: len(raw) // 2 * 2].astype(float), block)
        first, second, done = frames[::2], frames[1::2], int(pairs.sum())
        for start in range(min(PARTS, len(first))):
            part = (done + start) % PARTS
            a, b = first[start::PARTS], second[start::PARTS]
            mean[part] = mean[part] + (a + b).sum(axis=0) / 2
            variance[part] = variance[part] + ((a - b) ** 2).sum(axis=0) / 2
            pairs[part] += len(a)
    if pairs.min() == 0:
        raise InputError(
            f"`pair_statistics`: {pairs.sum()} pairs of frames are too few to compare; {PARTS} are "
            "the least, hundreds are better."
        )
    number = pairs[:, None, None]
    return PairStatistics(pairs, np.stack(mean) / number, np.stack(variance) / number)


def _summed(frames, block: int):
    ky, kx = (n // block for n in frames.shape[1:])
    cut = frames[:, : ky * block, : kx * block].reshape(len(frames), ky, block, kx, block)
    return cut.sum(axis=(2, 4))


def photon_transfer(
    seen: PairStatistics, mask: Bool[np.ndarray, "ky kx"] | None = None, changing: bool = True
) -> Gain:
    """The line variance = read noise² + g mean (+ c mean² if the beam is `changing`) over pixels.

    Weighted least squares over groups of pixels. A pixel's group, mean, mean square and variance
    come from independent parts of the frames, in turn, so that noise of the mean does not flatten
    the line. Pixels must cover a range of means, as disc and dark field do. Errors are scaled up
    where the fit does not reach the expected scatter.

    **Raises:** InputError where there are too few pixels, or the line does not rise.
    """
    use = np.ones(seen.mean.shape[1:], bool) if mask is None else mask
    groups = max(1, np.count_nonzero(use) // GROUP)
    means, variances = seen.mean[:, use], seen.variance[:, use]
    unit, rows = float(np.abs(means).max()), []
    if groups < 10 or np.ptp(means) == 0:
        raise InputError(
            f"`photon_transfer`: {np.count_nonzero(use)} pixels with means from "
            f"{means.min(initial=0):.3g} to {means.max(initial=0):.3g} do not determine a line; "
            f"take bright and dark ones, {10 * GROUP} or more."
        )
    for part in range(PARTS):
        variance, mean = variances[part], means[(part + 1) % PARTS] / unit
        square = mean * means[(part + 2) % PARTS] / unit
        order = np.argsort(means[(part + 3) % PARTS], kind="stable")
        for group in np.array_split(order, groups):
            averages = [float(v[group].mean()) for v in (variance, mean, square)]
            rows.append([*averages, len(group) * seen.pairs[part]])
    variance, mean, square, number = np.asarray(rows).T
    design = np.stack([np.ones_like(mean), mean, square][: 3 if changing else 2], axis=1)
    found, errors = _line(design, variance, number, unit)
    if found[1] <= 0:
        raise InputError(
            f"`photon_transfer`: the variance does not rise with the mean (slope "
            f"{found[1] / unit:.3g} ± {errors[1] / unit:.3g}); the frames are not raw, or the beam "
            "changed from frame to frame."
        )
    noise = math.sqrt(max(found[0], 0.0))
    noise_error = errors[0] / (2 * noise) if noise > 0 else math.sqrt(errors[0])
    return Gain(float(found[1] / unit), noise, float(errors[1] / unit), float(noise_error))


def _line(design, variance, number, unit: float):
    """Coefficients and their errors, variances being weighted by what the line itself expects."""
    weight = number / (2 * variance.mean() ** 2 + 1e-30)
    found, covariance = _least_squares(design, weight, variance)
    for _ in range(10):
        # A variance that came out small by chance must not weigh more.
        expected = np.maximum(design @ found, 1e-3 * np.median(variance) + 1e-12)
        # Of the square of a difference; the second part is that of rare electrons.
        rare = max(found[1] / unit, 0.0) ** 3 * np.maximum(design[:, 1] * unit, 0) / 2
        weight = number / (2 * expected**2 + rare)
        found, covariance = _least_squares(design, weight, variance)
    chi = float(np.sum(weight * (variance - design @ found) ** 2) / (len(variance) - len(found)))
    return found, np.sqrt(np.diag(covariance) * max(chi, 1.0))


def _least_squares(design, weight, values):
    """Coefficients, and their covariance for weights that are inverse variances."""
    covariance = np.linalg.inv(design.T @ (design * weight[:, None]))
    return covariance @ design.T @ (weight * values), covariance


def rounding_noise(frames: Real[np.ndarray, "frames ky kx"], counts_per_electron: float) -> float:
    """How far pixels of one to four electrons, or dark ones if worse, lie from whole numbers, rms.

    In electrons: near 0 for a counted camera, 0.29 (uniform) where nothing is left of whole
    numbers. There are no negative electrons: below 0 the distance is that from 0, 1 at most.
    """
    return max(noise for noise, _ in _distances(frames, counts_per_electron))


def _distances(frames, counts_per_electron: float) -> list[tuple[float, int]]:
    """Of pixels that are hit and of dark ones: rms distance from whole numbers, and how many."""
    electrons = frames.astype(np.float64) / counts_per_electron
    electrons = electrons[np.isfinite(electrons) & (electrons < FEW)]
    # Dark pixels are near 0 whatever an electron is worth: they must not outvote the others.
    hit = electrons > 0.4
    # A broken pixel far below 0 is one wrong pixel, not a thousand.
    away = (electrons - np.rint(electrons).clip(0, None)).clip(-1, None)
    parts = (away[hit], away[~hit])
    return [(float(np.sqrt(np.mean(p**2))) if len(p) else 0.0, len(p)) for p in parts]


def to_electrons(
    frames: Real[np.ndarray, "frames ky kx"], counts_per_electron: float
) -> Integer[np.ndarray, "frames ky kx"]:
    """Whole electrons: frames over `counts_per_electron`, rounded to the nearest, 0 at least.

    Rounded only where that restores what the camera has counted: pixels of few electrons must lie
    within `CLEAR` (rms) of whole numbers, and no farther below 0. Above them a wrong
    `counts_per_electron` by a part q changes counts by that part, as it does the dose.

    **Raises:** InputError for a factor that is not positive, values that are not numbers, and
    frames in which noise has washed out the single electron.
    """
    if not 0 < counts_per_electron < math.inf:
        raise InputError(
            f"`counts_per_electron` is {counts_per_electron}; a positive number is needed."
        )
    if frames.dtype.kind == "f" and not np.isfinite(frames).all():
        raise InputError(
            "frames have pixels that are not a number or infinite: mask them before dividing by "
            "the counts of an electron."
        )
    # Of few pixels, as in a single frame, some lie farther away by chance.
    parts = _distances(frames, counts_per_electron)
    noise = max((n for n, size in parts if n > CLEAR * (1 + CHANCE / math.sqrt(2 * size + 1))),
                default=0.0)  # fmt: skip
    if noise > 0:
        raise InputError(
            f"divided by counts_per_electron = {counts_per_electron:g}, pixels of few electrons "
            f"lie {noise:.2f} electrons (rms) from whole numbers, more than {CLEAR}: either the "
            "factor or the dark reference is wrong (see `photon_transfer`), or read noise hides "
            "single electrons and Poisson statistics do not hold. Leave the frames as they are and "
            "choose a loss of amplitudes."
        )
    electrons = np.rint(frames.astype(np.float64) / counts_per_electron).clip(0, None)
    kind = np.uint16 if electrons.max(initial=0) <= np.iinfo(np.uint16).max else np.uint32
    if electrons.max(initial=0) > np.iinfo(np.uint32).max:
        raise InputError(
            f"a pixel would hold {electrons.max():.3g} electrons: `counts_per_electron` = "
            f"{counts_per_electron:g} is too small."
        )
    return electrons.astype(kind)

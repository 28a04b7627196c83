"""Pixels of a camera that do not tell the truth, found in a whole scan; the answer is a mask.

Each pixel is compared with its neighbours, by Poisson statistics: a hot one has more counts than
any of the others can explain, a dead one fewer, a flickering one the right number with a larger
variance. What is left in doubt is left alone: a pixel that would hardly be hit cannot be called
dead. A pattern finer than two pixels, such as a beam focused onto one, looks like a hot pixel.
"""

from collections.abc import Iterable
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from .counts import Frames, InputError
from .electrons import Electrons, sum_frames
from .events import event_rows, EventRows, merge


REACH = 2
"""Neighbours are at most so many pixels away along each axis."""
ROUNDS = 5
"""How often pixels are compared anew without those already found."""
TOP, USUAL, BOTTOM = 21 / 23, 8 / 23, 2 / 23
"""The third largest of 24 neighbours, one that a dead line cannot be, and the third smallest."""
WEAK = 4.0
"""What a pixel in a dead line or cluster may have left of its neighbours' counts."""
SEEN = 20
"""Electrons below which the variance of a pixel is not judged."""


class PixelStatistics(NamedTuple):
    """Of each pixel over `frames` frames: the sum of its counts and that of their squares."""

    frames: int
    total: Float[np.ndarray, "ky kx"]
    square: Float[np.ndarray, "ky kx"]

    @property
    def fano(self) -> Float[np.ndarray, "ky kx"]:
        """Variance over mean of each pixel: 1 of Poisson counts at one rate, 0 of no counts."""
        mean = self.total / self.frames
        variance = (self.square / self.frames - mean**2) * (self.frames / max(1, self.frames - 1))
        return variance / np.where(mean > 0, mean, 1.0)


class BadPixels(NamedTuple):
    """Pixels that must not be used, by what is wrong with them."""

    hot: Bool[np.ndarray, "ky kx"]
    dead: Bool[np.ndarray, "ky kx"]
    flickering: Bool[np.ndarray, "ky kx"]

    @property
    def mask(self) -> Bool[np.ndarray, "ky kx"]:
        """True at the good pixels."""
        return ~(self.hot | self.dead | self.flickering)


def pixel_statistics(blocks: Iterable[Electrons]) -> PixelStatistics:
    """The sums over all frames, block by block: `pixel_statistics(s.host(p) for p in s.blocks())`.

    **Raises:** InputError if there are no frames.
    """
    frames, total, square = 0, np.zeros(()), np.zeros(())
    for counts in blocks:
        frames += len(counts)
        total = total + np.asarray(sum_frames(counts), float)
        square = square + _squares(counts)
    if not frames:
        raise InputError("`pixel_statistics`: there are no frames to look at.")
    return PixelStatistics(frames, total, square)


def _squares(counts: Electrons) -> Float[np.ndarray, "ky kx"]:
    if isinstance(counts, Frames):
        values = np.asarray(counts.values)
        return np.einsum("fyx,fyx->yx", values, values, dtype=float)
    rows = merge(counts if isinstance(counts, EventRows) else event_rows(counts))
    number = np.asarray(rows.multiplicity, float)
    ky, kx = rows.shape
    return np.bincount(rows.pixels, number**2, ky * kx).reshape(ky, kx)


def bad_pixels(
    seen: PixelStatistics,
    mask: Bool[np.ndarray, "ky kx"] | None = None,
    excess: float = 1.5,
    false_alarms: float = 0.01,
) -> BadPixels:
    """The pixels that differ from their neighbours by more than noise and `excess` explain.

    A hot pixel has more than `excess` times the third largest count of the 24 pixels around it, a
    dead one less than the third smallest over `excess`, or, as in a dead line, than a quarter of
    the ninth smallest; cameras whose pixels differ much in gain want a larger `excess`. Clusters
    more than three pixels wide are not found. `mask` is False at pixels known to be bad, which are
    left out. `false_alarms` is how many good pixels of a frame may be found by the chance of
    Poisson statistics.

    **Raises:** InputError for an `excess` that is not above 1.
    """
    if not excess > 1:
        raise InputError(f"`bad_pixels`: `excess` is a ratio above 1, such as 1.5, not {excess}.")
    known = np.zeros(seen.total.shape, bool) if mask is None else ~mask
    limit = -NormalDist().inv_cdf(false_alarms / known.size)
    hot, dead, flickering = (np.zeros(known.shape, bool) for _ in range(3))
    for _ in range(ROUNDS):
        around = _neighbours(np.where(known, np.nan, seen.total))
        high = excess * np.maximum(_ranked(around, TOP), 1)
        low, usual = _ranked(around, BOTTOM) / excess, _ranked(around, USUAL)
        usual = usual / np.where(seen.total > 0, WEAK, excess)
        new_hot = ~known & (_surprise(seen.total - 0.5, high) > limit)
        new_dead = ~known & (_surprise(seen.total + 0.5, np.maximum(low, usual)) < -limit)
        new_flickering = ~known & ~new_hot & ~new_dead & _flickers(seen, known, excess, limit)
        hot, dead = hot | new_hot, dead | new_dead
        flickering = flickering | new_flickering
        found = new_hot | new_dead | new_flickering
        known = known | found
        if not found.any():
            break
    return BadPixels(hot, dead, flickering)


def _flickers(
    seen: PixelStatistics, known: Bool[np.ndarray, "ky kx"], excess: float, limit: float
) -> Bool[np.ndarray, "ky kx"]:
    """Whether variance over mean exceeds what that of the neighbours explains."""
    own, mean = seen.fano, seen.total / seen.frames
    most = excess * np.maximum(_ranked(_neighbours(np.where(known, np.nan, own)), TOP), 1)
    # The variance of a variance, of Poisson counts at least.
    error = np.sqrt((2 * most**2 + most / np.maximum(mean, 1e-30)) / seen.frames)
    return (seen.total >= SEEN) & (own - most > limit * error)


def _surprise(
    count: Float[np.ndarray, "ky kx"], mean: Float[np.ndarray, "ky kx"]
) -> Float[np.ndarray, "ky kx"]:
    """How far Poisson counts are from their mean, in standard deviations of a normal variable.

    The signed root of the deviance, whose tails are those of the counts to a factor of two.
    """
    count, mean = np.maximum(count, 1e-9), np.maximum(mean, 1e-9)
    deviance = 2 * (mean - count + count * np.log(count / mean))
    return np.sign(count - mean) * np.sqrt(np.maximum(deviance, 0.0))


def _neighbours(image: Float[np.ndarray, "ky kx"]) -> Float[np.ndarray, "around ky kx"]:
    """The pixels around each, sorted; those that are missing, not a number, come last."""
    ky, kx = image.shape
    wide = np.pad(image, REACH, constant_values=np.nan)
    every = [(y, x) for y in range(2 * REACH + 1) for x in range(2 * REACH + 1)]
    around = [wide[y : y + ky, x : x + kx] for y, x in every if (y, x) != (REACH, REACH)]
    return np.sort(np.stack(around), axis=0)


def _ranked(around: Float[np.ndarray, "around ky kx"], part: float) -> Float[np.ndarray, "ky kx"]:
    """The neighbour below which this part of all lies; 0 where there are none."""
    number = np.count_nonzero(~np.isnan(around), axis=0)
    place = np.rint(part * (number - 1)).astype(int).clip(0)
    chosen = np.take_along_axis(around, place[None], axis=0)[0]
    return np.where(number > 0, chosen, 0.0)

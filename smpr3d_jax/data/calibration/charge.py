"""What an electron makes of a camera's counts, as the frames tell: one, a number, or who knows.

Two witnesses are heard. The noise: where the beam is steady, variance over mean is the counts of an
electron (`gain.photon_transfer`), in blocks of pixels too unless its charge spreads over several.
The values: pixels of few electrons lie on multiples of an electron's counts, unless read noise
washes that out. Whole numbers with the noise of Poisson's are electrons. Otherwise both witnesses
must agree; where they do not, nothing is guessed.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Real

from ..alignment import binned_mask
from ..counts import Frames, InputError
from ..gain import (
    CLEAR,
    GROUP,
    pair_statistics,
    PairStatistics,
    PARTS,
    photon_transfer,
    rounding_noise,
)
from ..readers.source import Source


RUN, FRAMES, BYTES = 16, 1024, 2**27
"""Neighbouring frames looked at together, at most how many in all, and how much of memory."""
VALUES = 2**21
"""Pixels at most whose values are looked at."""
UNSTEADY = 0.1
"""Excess of variance over mean that a specimen may make as the probe moves, in Poisson's counts."""
APART = 0.2
"""Part by which noise and values may differ for the same reason."""
DETERMINED = 0.02
"""Part to which a line must be determined, if what a changing beam adds is to be fitted as well."""
SPREAD = 0.15
"""Part by which noise in blocks may exceed that of pixels before charge is said to spread."""


class Charge(NamedTuple):
    """Counts that an electron makes, with standard error, and how that is known.

    `counted`: frames hold electrons. `integrating`: frames divided by `counts_per_electron` are
    whole electrons. `unclear`: neither; the number is what the noise alone says (nan if nothing),
    and `whole` whether the counts are whole numbers. `reason` says it in words. For a picture:
    `points` (mean, variance) of groups of pixels, and `values` (count, pixels with it).
    """

    kind: Literal["counted", "integrating", "unclear"]
    counts_per_electron: float
    error: float
    whole: bool
    reason: str
    points: Float[np.ndarray, "groups 2"]
    values: Float[np.ndarray, "bins 2"]


class _Noise(NamedTuple):
    """Variance over mean with its error: of pixels, and of an electron that may cover several."""

    slope: float
    error: float
    whole: float
    whole_error: float
    spreads: bool


def find_charge(sources: Sequence[Source]) -> Charge:
    """Look at up to 1024 frames of a series in runs of neighbours, and judge.

    Events are electrons. Positions must lie closer than the specimen changes much: what the beam
    gains or loses as a whole is allowed for, its pattern may change the variance by a tenth.
    """
    nothing = np.zeros((0, 2))
    dense = [source for source in sources if source.kind == "dense"]
    if not dense:
        return Charge("counted", 1.0, 0.0, True, "electron events", nothing, nothing)
    runs = [run for source in dense for run in _runs(source, len(dense))]
    mask = _common(dense)
    sample = _sample(runs, mask)
    if not np.isfinite(sample).all():
        reason = "pixels are not a number: mask them"
        return Charge("unclear", math.nan, math.nan, False, reason, nothing, nothing)
    whole = bool(np.array_equal(sample, np.rint(sample)))
    noise, points = _noise(runs, mask), _points(runs, mask)
    kind, number, error, reason = _judged(noise, whole, sample)
    return Charge(kind, number, error, whole, reason, points, _histogram(sample, whole, number))


def whole_electrons(sources: Sequence[Source], counts_per_electron: float) -> bool:
    """Whether frames divided by this are whole electrons, as far as a sample of them tells."""
    runs = [run for source in sources for run in _runs(source, len(sources))]
    return rounding_noise(_sample(runs, _common(sources))[None, None], counts_per_electron) <= CLEAR


def _runs(source: Source, share: int) -> list[Real[np.ndarray, "frames ky kx"]]:
    """Some frames of a scan, of which `share` have to fit into memory."""
    frame = math.prod(source.frame_shape) * source.dtype.itemsize
    wanted = int(min(FRAMES, max(2 * RUN, BYTES / frame)) / share)
    length = min(RUN, len(source))
    number = max(1, min(wanted, len(source)) // length)
    starts = np.linspace(0, len(source) - length, number).astype(int)
    found = []
    for start in starts:
        counts = source.usable(np.arange(start, start + length))
        assert isinstance(counts, Frames)  # for the kind is dense
        found.append(np.asarray(counts.values))
    return found


def _common(sources: Sequence[Source]) -> Bool[np.ndarray, "ky kx"]:
    masks = [source.mask for source in sources if source.mask is not None]
    return np.all([np.ones(sources[0].frame_shape, bool), *masks], axis=0)


def _sample(runs, mask) -> Float[np.ndarray, " pixels"]:
    """Values of good pixels, regularly taken."""
    used = int(np.count_nonzero(mask)) * sum(len(run) for run in runs)
    stride = -(-used // VALUES)
    return np.concatenate([run[:, mask].ravel()[::stride] for run in runs]).astype(float)


def _noise(runs, mask) -> _Noise | None:
    """What the noise says of an electron, None if nothing."""
    pixels = _slope(runs, mask, 1)
    if pixels is None:
        return None
    slope, error = pixels
    blocks = [found for b in (2, 4) if (found := _slope(runs, mask, b, pooled=False))]
    wider = blocks[0] if blocks else pixels
    more = SPREAD * slope + 3 * math.hypot(error, wider[1])
    if wider[0] - slope < more:
        return _Noise(slope, error, slope, error, False)
    # A block of b loses what spreads across its sides, a part that goes as 1/b.
    smaller, larger = ([pixels, *blocks])[-2:]
    error_of_all = math.hypot(2 * larger[1], smaller[1])
    return _Noise(slope, error, 2 * larger[0] - smaller[0], error_of_all, True)


def _slope(runs, mask, block: int, pooled: bool = True) -> tuple[float, float] | None:
    """Variance over mean of blocks of pixels, and its error; of all together if they are few."""
    ky, kx = (n - n % block for n in mask.shape)
    good = binned_mask(mask[:ky, :kx], block)
    if sum(len(run) // 2 for run in runs) < PARTS or not good.any():
        return None
    seen = pair_statistics(runs, block)
    if np.count_nonzero(good) < 10 * GROUP or np.ptp(seen.mean[:, good]) == 0:
        return _pooled(seen, good) if pooled else None
    found = None
    for changing in (True, False):
        try:
            found = photon_transfer(seen, good, changing)
        except InputError:
            continue
        # What a changing beam adds is told from the line only where means are of many sizes.
        if found.error < DETERMINED * found.counts_per_electron:
            break
    return None if found is None else (found.counts_per_electron, found.error)


def _pooled(seen: PairStatistics, good) -> tuple[float, float] | None:
    number = float(seen.pairs.sum()) * np.count_nonzero(good)
    mean, variance = (float(of[:, good].mean()) for of in (seen.mean, seen.variance))
    if not number or mean <= 0 or variance <= 0:
        return None
    slope = variance / mean
    return slope, slope * math.sqrt((2 + slope / mean) / number)


def _judged(
    noise: _Noise | None, whole: bool, sample: Float[np.ndarray, " pixels"]
) -> tuple[Literal["counted", "integrating", "unclear"], float, float, str]:
    """Kind, counts of an electron, their error, and why."""
    if noise is None:
        what = "whole numbers, but " * whole
        why = f"{what}too few frames, or noise that does not follow the mean, to say more"
        return "unclear", math.nan, math.nan, why
    slope = f"the variance of pixels is {noise.slope:.3g} ± {noise.error:.1g} times their mean"
    if whole and not noise.spreads and abs(noise.slope - 1) < UNSTEADY + 3 * noise.error:
        return "counted", 1.0, 0.0, f"whole numbers, and {slope}: single electrons"
    spacing = _spacing(sample, noise.slope)
    if spacing is not None and not noise.spreads and not (whole and spacing[0] < 1.5):
        number, error = spacing
        off = abs(number - noise.slope)
        clear = rounding_noise(sample[None, None], number) <= CLEAR
        if clear and off < APART * number + 3 * noise.error:
            return (
                "integrating",
                number,
                error,
                f"values lie on multiples of {number:.4g}, and {slope}",
            )
        return "unclear", noise.whole, noise.whole_error, (
            f"values lie on multiples of {number:.4g}, but {slope}"
        )  # fmt: skip
    why = ("whole numbers, but " if whole else "values lie on no multiples, and ") + slope
    if noise.spreads:
        why += (
            f", growing with the size of blocks to about {noise.whole:.2g}: an electron makes "
            "about so many counts, in several pixels"
        )
    elif whole:
        why += (
            ": an electron makes more than one count, or the patterns change much from one "
            "position to the next" if noise.slope > 1 else ": counts were lost, or averaged"
        )  # fmt: skip
    return "unclear", noise.whole, noise.whole_error, why


def _spacing(sample: Float[np.ndarray, " pixels"], near: float) -> tuple[float, float] | None:
    """The number near `near` on whose multiples small values lie, and its error; None without."""
    small = sample[(sample > 0.5 * near) & (sample < 5 * near)][: 2**16]
    if len(small) < 100:
        return None
    trials = near * np.geomspace(0.6, 1.6, 200)
    contrast = [float(np.mean(np.cos(2 * np.pi * small / trial))) for trial in trials]
    if max(contrast) < 0.5:
        return None
    # Of trials that do about as well the largest: an electron is not two halves.
    best = float(trials[np.flatnonzero(np.asarray(contrast) > 0.9 * max(contrast))[-1]])
    number = np.ones_like(small)
    for _ in range(10):
        # Cut between multiples: half a peak would draw to its side.
        small = sample[(sample > 0.5 * best) & (sample < 4.5 * best)][: 2**16]
        number = np.rint(small / best)
        best = float(small @ number / (number @ number))
    away = float(np.sqrt(np.mean((small - best * number) ** 2)))
    return best, away / math.sqrt(float(number @ number))


def _points(runs, mask) -> Float[np.ndarray, "groups 2"]:
    """Mean and variance of groups of pixels that are alike."""
    try:
        seen = pair_statistics(runs)
    except InputError:
        return np.zeros((0, 2))
    mean, variance = (of.mean(axis=0)[mask] for of in (seen.mean, seen.variance))
    groups = np.array_split(np.argsort(mean, kind="stable"), max(1, min(100, len(mean) // 20)))
    return np.array([(mean[group].mean(), variance[group].mean()) for group in groups])


def _histogram(sample, whole: bool, number: float) -> Float[np.ndarray, "bins 2"]:
    """How many pixels hold which count, up to some electrons."""
    electron = number if math.isfinite(number) else max(float(np.std(sample)), 1e-6)
    low, high = float(np.quantile(sample, 1e-3)), max(8 * electron, 30.0 if whole else 0.0)
    width = max((high - low) / 200, 1.0 if whole else 0.0)
    width = math.ceil(width) if whole else width
    start = math.floor(low) - 0.5 if whole else low
    numbers, edges = np.histogram(sample, start + width * np.arange((high - start) // width + 2))
    return np.stack([(edges[1:] + edges[:-1]) / 2, numbers], -1).astype(float)

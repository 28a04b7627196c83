"""How wide an aperture may be opened: what each imperfection of the microscope allows.

Numbers in, numbers out: energies in eV, semi-angles in mrad, aberrations and spreads in Å. The
measure of a wave aberration W = chi lambda/2 pi is its range over the aperture, of which Rayleigh's
rule allows a quarter wavelength. It is a rule for sharp probes: a retrieval that knows the
aberrations of its probe takes them out, and needs a larger window in return. What spreads focus or
source is lost to either.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

from .optics import cartesian, FWHM, wavelength


RAYLEIGH = 1 / 4
"""Range of the wave aberration over a good aperture, in wavelengths."""


class Limit(NamedTuple):
    """The largest semi-angle (mrad) that `name` allows, by which `rule`.

    What does not `count` is told for comparison: a stricter or a laxer rule than the others.
    """

    name: str
    semiangle: float
    rule: str
    counts: bool = True


class Lens(NamedTuple):
    """An aperture (mrad) and the aberrations (Å) that go with it, in the signs of `optics`."""

    semiangle: float
    c10: float
    c30: float
    c50: float = 0.0


def scherzer(c3: float, energy: float) -> Lens:
    """The sharpest probe of an uncorrected lens: (4 lambda/C3)^(1/4) at C10 = -sqrt(C3 lambda).

    W falls to -lambda/4 and is back at 0 at the edge (Scherzer 1949, Crewe 1970); the probe is
    0.43 C3^(1/4) lambda^(3/4) wide.
    """
    lam = wavelength(energy)
    return Lens(1e3 * (4 * lam / c3) ** 0.25, -math.sqrt(c3 * lam), c3)


def extended_scherzer(c3: float, energy: float) -> Lens:
    """The broadest pass band of an image: (6 lambda/C3)^(1/4) at C10 = -sqrt(3/2 C3 lambda).

    W falls to -3 lambda/8 and is back at 0 at the edge; the rounded 1.2 sqrt(C3 lambda) is this.
    """
    lam = wavelength(energy)
    return Lens(1e3 * (6 * lam / c3) ** 0.25, -math.sqrt(1.5 * c3 * lam), c3)


def balanced(c5: float, semiangle: float) -> Lens:
    """The C3 and C10 that flatten C5 best over an aperture: C3 = -C5 alpha², C10 = 3/16 C5 alpha⁴.

    W is then the Chebyshev polynomial of third order in theta², of range C5 alpha⁶/96, which no
    other choice of C3 and C10 undercuts.
    """
    edge = semiangle * 1e-3
    return Lens(semiangle, 3 / 16 * c5 * edge**4, -c5 * edge**2, c5)


def c5_limited(c5: float, energy: float, waves: float = RAYLEIGH) -> Lens:
    """The aperture of a corrected lens whose W ranges over `waves` wavelengths, see `balanced`.

    (24 lambda/C5)^(1/6) for a quarter wave, (12 lambda/C5)^(1/6) for an eighth (a phase of pi/4).
    """
    return balanced(c5, 1e3 * (96 * waves * wavelength(energy) / c5) ** (1 / 6))


def chromatic_angle(spread: float, energy: float, strict: bool = False) -> float:
    """Semi-angle at which the depth of focus 2 lambda/alpha² is the focal spread.

    `spread` is the full width at half maximum, 2.355 times `optics.chromatic_spread`; `strict` asks
    for half of that depth, lambda/alpha².
    """
    return 1e3 * math.sqrt((1 if strict else 2) * wavelength(energy) / spread)


def source_angle(source: float, energy: float) -> float:
    """Semi-angle at which the source's image is as wide as the Airy disc: 0.5145 lambda/alpha.

    `source` is the rms size along an axis, as in `optics`; both widths are full at half maximum.
    Waves of the aperture that are alpha/lambda apart have then lost exp(-0.94) = 0.39 of their
    interference.
    """
    return 1e3 * 0.5145 * wavelength(energy) / (FWHM * source)


def residual_angle(coefficient: float, order: int, fold: int, energy: float) -> float:
    """Semi-angle at which one coefficient C_nm that nothing balances makes W range over lambda/4.

    W = C theta^(n+1)/(n+1) cos(m phi) ranges over twice its height where m > 0.
    """
    height = RAYLEIGH * wavelength(energy) / (2 if fold else 1)
    return 1e3 * ((order + 1) * height / abs(coefficient)) ** (1 / (order + 1))


def aperture_limits(
    energy: float,
    c3: float | None = None,
    c5: float | None = None,
    spread: float | None = None,
    source: float | None = None,
    residual: Mapping[str, float] | None = None,
) -> tuple[Limit, ...]:
    """Every limit that these imperfections set, smallest first.

    `c3` (Å) of a lens without corrector, or `c5` (Å) of one with, whose C3 and C10 are free;
    `spread`, the full width at half maximum of the focal spread (Å); `source`, rms (Å); `residual`,
    polar coefficients (Å) that are there besides.

    **Raises:** ValueError for a length that is not positive, both `c3` and `c5`, or a coefficient
    that does not exist.
    """
    for name, value in {"c3": c3, "c5": c5, "spread": spread, "source": source}.items():
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"`{name}` = {value:g} Å: must be positive; leave out what is not so.")
    if c3 is not None and c5 is not None:
        raise ValueError(
            f"`c3` = {c3:g} Å and `c5` = {c5:g} Å: give c3 of a lens without corrector or c5 of "
            "one with, whose C3 is chosen to balance it; a C3 that stays besides is `residual`."
        )
    limits = [*_of_spherical(energy, c3, c5)]
    if spread is not None:
        usual, strict = (chromatic_angle(spread, energy, s) for s in (False, True))
        limits += [
            Limit("chromatic", usual, "focal spread = 2λ/α²"),
            Limit("chromatic, strict", strict, "focal spread = λ/α²", counts=False),
        ]
    if source is not None:
        limits.append(Limit("source", source_angle(source, energy), "source = Airy disc"))
    limits += _of_residual(energy, residual or {})
    return tuple(sorted(limits, key=lambda limit: limit.semiangle))


def _of_spherical(energy: float, c3: float | None, c5: float | None) -> list[Limit]:
    if c3 is not None:
        sharp, wide = scherzer(c3, energy), extended_scherzer(c3, energy)
        return [
            Limit("C3", sharp.semiangle, "Scherzer, λ/4"),
            Limit("C3, extended", wide.semiangle, "extended Scherzer, 3λ/8", counts=False),
        ]
    if c5 is not None:
        sharp, strict = c5_limited(c5, energy), c5_limited(c5, energy, RAYLEIGH / 2)
        return [
            Limit("C5", sharp.semiangle, "balanced by C3 and C1, λ/4"),
            Limit("C5, strict", strict.semiangle, "balanced by C3 and C1, π/4", counts=False),
        ]
    return []


def _of_residual(energy: float, residual: Mapping[str, float]) -> list[Limit]:
    cartesian(residual)  # refuses names that do not exist
    return [
        Limit(name, residual_angle(value, int(name[1]), int(name[2]), energy), "λ/4, unbalanced")
        for name, value in residual.items()
        if name.startswith("C") and value
    ]


def binding(limits: tuple[Limit, ...]) -> Limit | None:
    """The limit that is met first; None where nothing limits."""
    counted = [limit for limit in limits if limit.counts]
    return min(counted, key=lambda limit: limit.semiangle, default=None)

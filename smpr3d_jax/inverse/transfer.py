"""What depth sections show of a weak layer, by frequency and by distance, in closed form.

A layer phi at depth z1 appears in the section at z as phi * H(q, z1 - z). The S-matrix of a weak
layer is s_h = 1 + i phi exp(i pi lambda (z1 - plane)(q² + 2 q.h)) for the tilt h; sections turn
that phase back and average it over the aperture, and what is left is the mean of a phase factor
over the tilts whose outgoing wave q + h is kept:

    H(q, d) = mean_h [ |q + h| <= collector ] exp(i pi lambda d (q² + 2 q.h))

which without a collector is exp(i pi lambda d q²) 2 J1(x)/x, x = 2 pi alpha q d. H has inversion
symmetry and phi is real, so the phase of a section transfers Re H, its intensity -2 Im H. Along d,
H holds the axial frequencies |k_z - lambda q²/2| <= alpha q: the missing cone.

Frequencies q in 1/Å, distances in Å, angles in mrad, energies in eV; float64 on the host.
"""

import math
from functools import lru_cache

import numpy as np
from jaxtyping import Complex, Float

from ..physics.optics import wavelength
from .priors import ridge_amplitudes


def confocal_transfer(
    frequencies: Float[np.ndarray, " q"],
    distances: Float[np.ndarray, " z"],
    semiangle: float,
    energy: float,
    collector: float | None = None,
) -> Complex[np.ndarray, "z q"]:
    """H of confocal sections; `distances` are those of the layer behind the section.

    `collector` (mrad) is the largest outgoing angle: that of the sections, or the detector's edge.
    """
    lam, a = wavelength(energy), semiangle * 1e-3 / wavelength(energy)
    turn = 2 * math.pi * lam * np.outer(distances, frequencies)
    if collector is None:
        mean = ridge_amplitudes(0, turn * a)[..., 0]
    else:
        b = collector * 1e-3 / lam
        mean = np.stack(
            [_disc_overlap(turn[:, i], a, b, float(q)) for i, q in enumerate(frequencies)], axis=1
        )
    return mean * np.exp(0.5j * turn * frequencies)


def transfer(
    frequencies: Float[np.ndarray, " q"],
    distances: Float[np.ndarray, " z"],
    semiangle: float,
    energy: float,
    mode: str = "confocal",
    collector: float | None = None,
) -> Float[np.ndarray, "z q"]:
    """What a section of `mode` shows of a layer at these distances, per radian of its phase.

    "confocal" and "tilt_mean": the phase, Re H. "scem": the intensity, -2 Im H, nothing in focus.
    "annular": the intensity at high angles, for which the layer's scattering power (not its phase)
    is blurred by the intensity of the probe; relative to that at frequency 0.

    **Raises:** ValueError for another mode.
    """
    if mode in ("confocal", "tilt_mean", "scem"):
        h = confocal_transfer(frequencies, distances, semiangle, energy, collector)
        return -2 * np.imag(h) if mode == "scem" else np.real(h)
    if mode == "annular":
        return incoherent_transfer(frequencies, distances, semiangle, energy)
    raise ValueError(
        f"`mode` {mode!r} has no closed form; known: confocal, tilt_mean, scem, annular."
    )


def incoherent_transfer(
    frequencies: Float[np.ndarray, " q"],
    distances: Float[np.ndarray, " z"],
    semiangle: float,
    energy: float,
) -> Float[np.ndarray, "z q"]:
    """Transfer of the probe's intensity: of annular dark field, and the support of tcBF.

    The overlap of two discs of radius alpha, q apart, weighted by the phase that defocus gives them
    (Hopkins 1955).
    """
    lam, a = wavelength(energy), semiangle * 1e-3 / wavelength(energy)
    turn = 2 * math.pi * lam * np.outer(distances, frequencies)
    columns = [
        # The wave h interferes with q + h; seen from the middle between them the phase is real.
        _disc_overlap(turn[:, i], a, a, float(q)) * np.exp(0.5j * turn[:, i] * q)
        for i, q in enumerate(frequencies)
    ]
    return np.real(np.stack(columns, axis=1))


def transfer_of_modes(
    frequencies: Float[np.ndarray, " q"],
    layer: float,
    sections: Float[np.ndarray, " z"],
    plane: float,
    order: int,
    semiangle: float,
    energy: float,
) -> Complex[np.ndarray, "z q"]:
    """H of an S-matrix in tilt modes up to radial `order`, which hold distant layers only in part.

    With a_n(x) = 2 (n+1) J_{n+1}(x)/x, of the layer and of the section at their distances from the
    reference `plane` (Å): sum_n a_n(x_layer) a_n(x_section), by which 2 J1/x is their difference's
    for all orders (Gegenbauer's addition theorem).
    """
    lam, edge = wavelength(energy), semiangle * 1e-3
    x = 2 * math.pi * edge * frequencies
    there = ridge_amplitudes(order, x * (layer - plane))
    here = ridge_amplitudes(order, np.outer(sections - plane, x))
    turn = math.pi * lam * np.outer(layer - sections, frequencies**2)
    return np.sum(here * there[None], axis=-1) * np.exp(1j * turn)


def _disc_overlap(
    turn: Float[np.ndarray, " z"], a: float, b: float, q: float
) -> Complex[np.ndarray, " z"]:
    """Mean of exp(i turn u) over |h| <= a, nothing counted where |h + q| > b; u = h along q.

    Along u the overlap is as wide as the chord of the one disc up to where their edges cross, of
    the other from there.
    """
    low, high = max(-a, -b - q), min(a, b - q)
    if low >= high:
        return np.zeros(len(turn), complex)
    cross = (b**2 - a**2 - q**2) / (2 * q) if q else math.copysign(math.inf, b - a)
    total = _half_disc(turn, a, low, min(high, cross))
    total = total + _half_disc(turn, b, max(low, cross) + q, high + q) * np.exp(-1j * turn * q)
    return total / (math.pi * a**2)


def _half_disc(turn: Float[np.ndarray, " z"], radius: float, start: float, stop: float):
    """Integral of exp(i turn u) over the part start < u < stop of a disc about 0.

    Angles for nodes make it smooth to the disc's edge.
    """
    if stop <= start:
        return np.zeros(len(turn), complex)
    first, last = np.arcsin(np.clip(np.array([start, stop]) / radius, -1, 1))
    phase = float(np.abs(turn).max(initial=0.0)) * radius
    nodes, weights = _legendre(32 * math.ceil((24 + phase) / 32))
    angle = (first + last) / 2 + (last - first) / 2 * nodes
    area = 2 * radius**2 * np.cos(angle) ** 2 * weights * (last - first) / 2
    return np.exp(1j * np.outer(turn, radius * np.sin(angle))) @ area


@lru_cache(maxsize=64)
def _legendre(count: int) -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.legendre.leggauss(count)


def depth_width(
    frequencies: Float[np.ndarray, " q"],
    semiangle: float,
    energy: float,
    mode: str = "confocal",
    collector: float | None = None,
) -> Float[np.ndarray, " q"]:
    """Full width at half maximum (Å) in depth of what a section shows at each frequency.

    About 0.7051/(alpha q) for low frequencies, less for high ones, whose phase turns as well; inf
    at frequency 0, which is not sectioned, and nan where nothing is transferred.

    **Raises:** ValueError for "scem", which shows nothing in focus.
    """
    if mode == "scem":
        raise ValueError("`depth_width`: 'scem' shows nothing in focus; it has no width there.")
    widths = []
    for q in np.atleast_1d(frequencies):
        if q <= 0:
            widths.append(math.inf)
            continue
        one, step = np.array([float(q)]), 0.02 / (semiangle * 1e-3 * q)
        profile = transfer(one, step * np.arange(600), semiangle, energy, mode, collector)[:, 0]
        below = np.flatnonzero(profile < profile[0] / 2)
        if profile[0] < 1e-6 or not len(below):
            widths.append(math.nan)
            continue
        i = int(below[0])
        share = (profile[i - 1] - profile[0] / 2) / (profile[i - 1] - profile[i])
        widths.append(2 * step * (i - 1 + float(share)))
    return np.asarray(widths)


def axial_cutoff(
    frequencies: Float[np.ndarray, " q"], semiangle: float, energy: float
) -> Float[np.ndarray, " q"]:
    """Highest axial frequency (1/Å) of incoherent images and tcBF: alpha q - lambda q²/2.

    Largest, alpha²/(2 lambda), at q = alpha/lambda; 0 beyond 2 alpha/lambda (Frieden 1967).
    """
    edge, lam = semiangle * 1e-3, wavelength(energy)
    return np.maximum(edge * frequencies - lam * frequencies**2 / 2, 0.0)


def axial_cutoff_of_sections(
    frequencies: Float[np.ndarray, " q"], semiangle: float, energy: float, detector: float
) -> Float[np.ndarray, " q"]:
    """Highest axial frequency (1/Å) of sections of S with outgoing waves up to `detector` (mrad).

    lambda (|q+h|² - h²)/2 at its largest: alpha q + lambda q²/2, or theta q - lambda q²/2 where the
    detector's edge theta cuts first; theta²/(2 lambda) at best, the cap of Ewald's sphere.
    """
    edge, theta, lam = semiangle * 1e-3, detector * 1e-3, wavelength(energy)
    curve = lam * frequencies**2 / 2
    cut = np.minimum(edge * frequencies + curve, theta * frequencies - curve)
    return np.where(frequencies <= (edge + theta) / lam, np.maximum(cut, 0.0), 0.0)


def best_axial_resolution(largest: float, energy: float) -> float:
    """Shortest period in depth (Å) that waves within the angle `largest` (mrad) tell: 2 lambda/θ².

    `largest` is the aperture's for incoherent images and tcBF, the detector's for S-matrix and
    ptychography.
    """
    return 2 * wavelength(energy) / (largest * 1e-3) ** 2

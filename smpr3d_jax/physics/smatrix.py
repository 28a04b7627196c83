"""What each plane wave of the aperture becomes: the scattering matrix, in beams or in tilt modes.

Both representations hold the same thing: s_h(r), the exit wave for the incident plane wave
exp(2 pi i h.r) divided by that plane wave, with both sides referred to one plane (`plane`, the
middle of the specimen). In vacuum s_h = 1. `Beams` keeps s_h for every h of the grid of the
window; `TiltModes` keeps the coefficients sigma_p of s_h(r) = sum_p Q_p(h) sigma_p(r), with Q_p the
Zernike polynomials of h over the aperture, orthonormal under its mean. One attribute, `waves`,
holds the unknowns of either.

A layer of phase phi at depth z contributes i phi(q) exp(i pi lambda (z - plane)(q² + 2 q.h)) to
s_h(q), q the transfer; hence the smoothness in h that makes few modes enough.
"""

import math
from typing import Protocol, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float, Int

from .fourier import EXACT
from .grid import Grid
from .propagation import multislice, Pair
from .specimen import Slices
from .zernike import mode_count, tilt_polynomials


class Tilts(eqx.Module):
    """Points h (y, x) in 1/Å inside the aperture with weights that make sums over them means."""

    points: Float[np.ndarray, "points 2"]
    weights: Float[np.ndarray, " points"]


def disc_quadrature(cutoff: float, phase: float = 0.0, order: int = 8) -> Tilts:
    """Tilts at which sums equal means over the disc of radius `cutoff`, to rounding.

    Gauss-Legendre in the squared radius times equal angles; exact for products of polynomials up
    to `order` each, and for exp(i x.h) of at most `phase` rad at the edge.
    """
    rings = order // 2 + 2 + math.ceil(0.4 * phase + 3)
    spokes = 2 * order + 3 + 2 * math.ceil(1.1 * phase + 4)
    nodes, weights = np.polynomial.legendre.leggauss(rings)
    radius = cutoff * np.sqrt((nodes + 1) / 2)
    angle = 2 * np.pi * np.arange(spokes) / spokes
    points = radius[:, None, None] * np.stack([np.sin(angle), np.cos(angle)], -1)
    return Tilts(points.reshape(-1, 2), np.repeat(weights / 2 / spokes, spokes))


def window_beams(window: Grid, cutoff: float) -> Float[np.ndarray, "beams 2"]:
    """Every plane wave h = n/L (1/Å) of the window's grid inside the aperture."""
    ky, kx = np.broadcast_arrays(*window.frequencies())
    inside = np.hypot(ky, kx) <= cutoff * (1 + 1e-9)
    return np.stack([ky[inside], kx[inside]], -1)


class TiltModes(eqx.Module):
    """An S-matrix as coefficients of polynomials of the tilt; `waves` are sigma_p(r).

    `grid` is the field's; `origin` (y, x) Å is the place of pixel (0, 0) in the scan's frame;
    `plane` Å is the depth to which both sides are referred; `cutoff` the aperture's radius in 1/Å.
    """

    waves: Complex[Array, "modes y x"]
    grid: Grid
    origin: tuple[float, float] = eqx.field(static=True)
    plane: float = eqx.field(static=True)
    cutoff: float = eqx.field(static=True)

    @property
    def order(self) -> int:
        """Highest radial order."""
        return (math.isqrt(8 * self.waves.shape[0] + 1) - 3) // 2

    def tilts(self, phase: float = 0.0) -> Tilts:
        """Quadrature over the aperture for functions that turn by `phase` rad at its edge."""
        return disc_quadrature(self.cutoff, phase, self.order)

    def basis(self, tilts: Tilts) -> Float[np.ndarray, "modes points"]:
        """Q_p at `tilts`: s_h = sum_p Q_p(h) waves_p."""
        return tilt_polynomials(self.order, tilts.points, self.cutoff)


class Beams(eqx.Module):
    """An S-matrix as one wave s_h(r) for every plane wave h of the window inside the aperture.

    `window` is the window's grid, whose frequencies are the beams. The other fields are those of
    `TiltModes`.
    """

    waves: Complex[Array, "beams y x"]
    grid: Grid
    window: Grid
    origin: tuple[float, float] = eqx.field(static=True)
    plane: float = eqx.field(static=True)
    cutoff: float = eqx.field(static=True)

    @property
    def points(self) -> Float[np.ndarray, "beams 2"]:
        """h of each beam, 1/Å."""
        return window_beams(self.window, self.cutoff)

    def tilts(self, phase: float = 0.0) -> Tilts:
        """The beams themselves, equally weighted, however fast a function turns."""
        count = self.waves.shape[0]
        return Tilts(self.points, np.full(count, 1 / count))

    def basis(self, tilts: Tilts) -> Float[np.ndarray, "beams points"]:
        """The identity: `tilts` must be those of `Beams.tilts`."""
        return np.eye(self.waves.shape[0], len(tilts.weights))


SMatrix = TiltModes | Beams


def field(
    positions: Float[np.ndarray, "frames 2"], window: Grid, margin: int = 1
) -> tuple[Grid, tuple[float, float]]:
    """The field seen by windows centred on `positions`, and its origin (y, x) in Å.

    A pixel's centre lies on the first of the lowest positions; sizes are even and have small
    prime factors.
    """
    shape, origin = [], []
    for axis, (count, step) in enumerate(zip(window.shape, window.sampling, strict=True)):
        low, high = float(positions[:, axis].min()), float(positions[:, axis].max())
        size = count + math.ceil((high - low) / step) + 1 + 2 * margin
        shape.append(next(n for n in range(size, 2 * size + 8) if n % 2 == 0 and smooth(n)))
        origin.append(low - (count // 2 + margin) * step)
    return Grid((shape[0], shape[1]), window.sampling), (origin[0], origin[1])


def smooth(n: int) -> bool:
    """Whether `n` has no prime factor above 7, and so is fast to transform."""
    for prime in (2, 3, 5, 7):
        while n % prime == 0:
            n //= prime
    return n == 1


def unscattered_modes(
    grid: Grid, origin: tuple[float, float], plane: float, cutoff: float, order: int = 8, dtype=None
) -> TiltModes:
    """Vacuum in tilt modes: sigma_0 = 1, the others 0."""
    dtype = dtype or np.result_type(jnp.result_type(float), np.complex64)
    waves = np.zeros((mode_count(order), *grid.shape), dtype)
    waves[0] = 1
    return TiltModes(jnp.asarray(waves), grid, origin, float(plane), cutoff)


def unscattered_beams(
    grid: Grid, window: Grid, origin: tuple[float, float], plane: float, cutoff: float, dtype=None
) -> Beams:
    """Vacuum in beams: s_h = 1."""
    dtype = dtype or np.result_type(jnp.result_type(float), np.complex64)
    count = len(window_beams(window, cutoff))
    return Beams(jnp.ones((count, *grid.shape), dtype), grid, window, origin, float(plane), cutoff)


def vacuum(specimen: SMatrix) -> Complex[Array, "components"]:
    """`waves` of vacuum, the same at every pixel."""
    count = specimen.waves.shape[0]
    if isinstance(specimen, Beams):
        return jnp.ones(count, specimen.waves.dtype)
    return jnp.asarray(np.arange(count) == 0, specimen.waves.dtype)


@runtime_checkable
class Placed(Protocol):
    """What has its pixel (0, 0) at `origin` (y, x) Å of the scan's frame."""

    @property
    def origin(self) -> tuple[float, float]:
        """(y, x) in Å."""
        ...


def place(
    specimen: Placed, positions: Float[Array, "frames 2"], window: Grid
) -> tuple[Int[Array, "frames 2"], Float[Array, "frames 2"]]:
    """Window corners (pixels of the field) and what is left of each position (Å).

    The remainder is within half a pixel of the window's centre, pixel n//2; derivatives with
    respect to positions go through it, the corner being held.
    """
    step = jnp.asarray(window.sampling, positions.dtype)
    origin = jnp.asarray(specimen.origin, positions.dtype)
    pixel = (positions - origin[None]) / step[None]
    # A raster often hits half pixels exactly; the small bias makes rounding choose one side.
    nearest = jnp.floor(pixel + jnp.asarray(0.5 + 1e-3, pixel.dtype))
    half = jnp.asarray([n // 2 for n in window.shape], jnp.int32)
    return nearest.astype(jnp.int32) - half[None], (pixel - nearest) * step[None]


def scatter(
    slices: Slices,
    window: Grid,
    energy: float,
    cutoff: float,
    plane: float,
    dtype: jax.typing.DTypeLike | None = None,
    tilt: Pair = (0.0, 0.0),
) -> Beams:
    """The S-matrix of `slices` by multislice of every plane wave inside the aperture.

    Both sides are referred to `plane`: a plane wave is carried from there, through free space,
    before the first slice, through all slices, and back from behind the last.

    **Raises:** ValueError where the slices' cell is not a whole number of windows, so that the
    plane waves would not be periodic in it.
    """
    ratio = [n / m for n, m in zip(slices.grid.shape, window.shape, strict=True)]
    same = np.allclose(slices.grid.sampling, window.sampling, rtol=1e-9)
    if not same or any(r != int(r) for r in ratio):
        raise ValueError(
            f"`scatter`: slices of {slices.grid} do not hold a whole number of windows {window}; "
            "make the cell a multiple of the window at the same sampling."
        )
    dtype = dtype or np.result_type(slices.potential.dtype, np.complex64)
    points = window_beams(window, cutoff)
    y, x = slices.grid.coordinates()
    turns = [np.outer(points[:, i], c.ravel()) % 1.0 for i, c in enumerate((y, x))]
    ramps = tuple(jnp.exp(2j * np.pi * t).astype(dtype) for t in turns)

    def one(ramp):
        incident = ramp[0][:, None] * ramp[1][None, :]
        return multislice(incident, slices, energy, plane, plane, tilt) * incident.conj()

    waves = jax.lax.map(one, ramps)
    return Beams(waves, slices.grid, window, slices.origin, float(plane), cutoff)


def to_modes(beams: Beams, order: int) -> TiltModes:
    """The tilt modes that fit `beams` best, by least squares over the beams."""
    basis = tilt_polynomials(order, beams.points, beams.cutoff)
    inverse = jnp.asarray(np.linalg.pinv(basis), beams.waves.dtype)
    waves = jnp.einsum("bp,byx->pyx", inverse, beams.waves, precision=EXACT)
    return TiltModes(waves, beams.grid, beams.origin, beams.plane, beams.cutoff)


def to_beams(modes: TiltModes, window: Grid) -> Beams:
    """The waves s_h at every plane wave of `window`."""
    basis = tilt_polynomials(modes.order, window_beams(window, modes.cutoff), modes.cutoff)
    basis = jnp.asarray(basis, modes.waves.dtype)
    waves = jnp.einsum("pb,pyx->byx", basis, modes.waves, precision=EXACT)
    return Beams(waves, modes.grid, window, modes.origin, modes.plane, modes.cutoff)

"""Electrostatic potentials of independent atoms, projected along the beam.

Scattering factors are those of I. Lobato and D. Van Dyck, Acta Cryst. A70 (2014) 636, neutral atoms
H to Lr: f_e(g) = sum_i a_i (2 + b_i g²)/(1 + b_i g²)², with g in 1/Å (no 2 pi). A projected atom is
V(k) = 47.878 V Å² f_e(k) in Fourier space; there it is moved to its exact position by a phase, so
the lattice of pixels needs no interpolation. Everything here runs once, on the host, in float64.
"""

import functools
import math
import pathlib

import numpy as np
from jaxtyping import Float, Int

from .grid import Grid


POTENTIAL_UNIT = 47.87764725
"""h²/(2 pi m0 e) in V Å²: projected potential (V Å³ in Fourier space) per Å of f_e."""

_TABLE = pathlib.Path(__file__).with_name("lobato.csv")


@functools.cache
def _table() -> Float[np.ndarray, "elements 2 5"]:
    """Coefficients (a, b) of Z = 1, 2, ... in rows."""
    values = np.loadtxt(_TABLE, delimiter=",", skiprows=3, usecols=range(2, 12))
    return values.reshape(-1, 2, 5)


def lobato(number: int) -> tuple[Float[np.ndarray, " 5"], Float[np.ndarray, " 5"]]:
    """Coefficients a (Å) and b (Å²) of the element of atomic `number`.

    **Raises:** ValueError for an element outside the table.
    """
    table = _table()
    if not 1 <= number <= len(table):
        raise ValueError(
            f"No scattering factor for atomic number {number}; the table holds 1 (H) to "
            f"{len(table)} (Lr)."
        )
    return table[number - 1, 0], table[number - 1, 1]


def scattering_factor(
    number: int, frequency: Float[np.ndarray, "*shape"]
) -> Float[np.ndarray, "*shape"]:
    """Electron scattering factor in Å at spatial `frequency` in 1/Å."""
    square = np.square(frequency)
    a, b = lobato(number)
    terms = (ai * (2 + bi * square) / (1 + bi * square) ** 2 for ai, bi in zip(a, b, strict=True))
    return np.asarray(sum(terms), float)


def atom_potential(number: int, radius: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Projected potential in V Å of one atom at `radius` > 0 in Å, in closed form.

    V(r) = 2 sum_i [2 a'/b' K0(b' r) + a' r K1(b' r)], a' = 47.878 pi² a/b^(3/2), b' = 2 pi/b^(1/2).
    """
    a, b = lobato(number)
    slope = 2 * math.pi / np.sqrt(b)
    height = POTENTIAL_UNIT * math.pi**2 * a / b**1.5
    r = np.asarray(radius, float)[..., None]
    k0, k1 = (_bessel_k(order, slope * r) for order in (0, 1))
    return np.asarray(2 * np.sum(2 * height / slope * k0 + height * r * k1, axis=-1), float)


def _bessel_k(order: int, x: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    """Modified Bessel function K_order(x) = int_0^inf exp(-x cosh t) cosh(order t) dt.

    The integrand falls double-exponentially, so the trapezoidal rule at this step is exact to
    rounding for x > 1e-6.
    """
    t = np.arange(0, 22, 0.2)
    weight = np.where(t > 0, 0.2, 0.1) * np.cosh(order * t)
    return np.exp(-x[..., None] * np.cosh(t)) @ weight


def projected_potential(
    numbers: Int[np.ndarray, " atoms"],
    positions: Float[np.ndarray, "atoms 3"],
    grid: Grid,
    edges: Float[np.ndarray, " edges"],
) -> Float[np.ndarray, "slices y x"]:
    """Projected potential in V Å of atoms on a laterally periodic `grid`, slice by slice.

    `positions` are (y, x, z) in Å; slice i holds, whole, the atoms with
    edges[i] <= z < edges[i + 1]. The values are those of the potential limited to the frequencies
    of the grid, at exact sub-pixel positions.

    **Raises:** ValueError for edges that do not increase and for an atom outside them.
    """
    edges = np.asarray(edges, float)
    if edges.size < 2 or np.any(np.diff(edges) <= 0):
        raise ValueError(f"`edges` of slices must increase and be two or more, got {edges} Å.")
    z = positions[:, 2]
    if z.size and (z.min() < edges[0] or z.max() >= edges[-1]):
        raise ValueError(
            f"Atoms lie at z = {z.min():.4g} to {z.max():.4g} Å, not all inside the slices' edges "
            f"{edges[0]:.4g} <= z < {edges[-1]:.4g} Å."
        )
    layer = np.searchsorted(edges, z, side="right") - 1
    factors = {int(n): _half_plane_factor(int(n), grid) for n in np.unique(numbers)}
    slices = np.zeros((edges.size - 1, *grid.shape))
    for index in np.unique(layer):
        spectrum = 0
        for number, factor in factors.items():
            inside = positions[(layer == index) & (numbers == number)]
            if len(inside):
                spectrum = spectrum + factor * _structure_factor(inside, grid)
        slices[index] = np.fft.irfft2(spectrum, grid.shape) / grid.pixel_area
    return slices


def _half_plane_factor(number: int, grid: Grid) -> Float[np.ndarray, "ky half"]:
    """V(k) of one atom in V Å³ on the frequencies that a real transform keeps."""
    ky, kx = grid.frequencies()
    radius = np.hypot(ky, kx[:, : grid.shape[1] // 2 + 1])
    return POTENTIAL_UNIT * scattering_factor(number, radius)


def _structure_factor(positions: Float[np.ndarray, "atoms 3"], grid: Grid):
    """Sum over atoms of exp(-2 pi i k.r), a product of a (ky, atom) and an (atom, kx) matrix."""
    phases = []
    for axis, k in enumerate(grid.frequencies()):
        k = k.ravel()
        factor = np.exp(-2j * np.pi * np.outer(k, positions[:, axis]))
        if k.size % 2 == 0:
            # The Nyquist frequency stands for +k and -k alike: their mean keeps the sum real.
            factor[k.size // 2] = factor[k.size // 2].real
        phases.append(factor)
    phase_y, phase_x = phases
    return phase_y @ phase_x[: grid.shape[1] // 2 + 1].T

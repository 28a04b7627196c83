"""A partially coherent probe as a few incoherent states: their weights, and how they differ.

A source of finite size moves the probe, an energy spread defocuses it, an unsteady or partly
coherent lens gives it several shapes; the intensities of all cases add up. The Gaussian
distributions are replaced by a few nodes, scaled by a width that may be refined: what is wrong is
how exp(-u²/2) is met by the nodes' sum of cosines, u the phase by which two waves of the aperture
differ at one standard deviation.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float

from .fourier import phase_factor


def gaussian_line(
    nodes: int,
) -> tuple[Float[np.ndarray, " nodes"], Float[np.ndarray, " nodes"]]:
    """Nodes and weights of the normal distribution on a line, by Gauss and Hermite.

    Exact for polynomials of degree 2 `nodes` - 1.
    """
    place, weight = np.polynomial.hermite_e.hermegauss(nodes)
    return place, weight / weight.sum()


def gaussian_plane(
    rings: int,
) -> tuple[Float[np.ndarray, "nodes 2"], Float[np.ndarray, " nodes"]]:
    """Nodes (y, x) and weights of the normal distribution in a plane: a centre and `rings`.

    Gauss-Radau in the squared radius, and on the n rings 2n + 4 equal angles, staggered from ring
    to ring: 7, 17, 31, 49 nodes, exact to degree 2n + 3. Inversion leaves the rule as it
    is, so that the sign of a width has no meaning.
    """
    k = np.arange(rings)
    beside = np.sqrt(k[1:] * (k[1:] + 1.0))
    # Roots of the Laguerre polynomials L_n^(1), as eigenvalues of their recurrence (Golub, Welsch).
    half_square, vectors = np.linalg.eigh(
        np.diag(2.0 * k + 2) + np.diag(beside, 1) + np.diag(beside, -1)
    )
    share = vectors[0] ** 2 / half_square
    spokes = 2 * rings + 4
    angle = 2 * np.pi * (np.arange(spokes)[None] + 0.5 * (k[:, None] % 2)) / spokes
    ring = np.sqrt(2 * half_square)[:, None, None] * np.stack([np.sin(angle), np.cos(angle)], -1)
    nodes = np.concatenate([np.zeros((1, 2)), ring.reshape(-1, 2)])
    return nodes, np.concatenate([[1 - share.sum()], np.repeat(share / spokes, spokes)])


def enough_nodes(spread: float, wavelength: float, cutoff: float) -> int:
    """Nodes of `gaussian_line` for a defocus spread of `spread` Å, at least 3.

    Of what the spread changes in a diffraction pattern they then leave 2 % wrong; measured by the
    phase of one standard deviation at the aperture's edge (80 kV, 25 mrad: 3 nodes to 30 Å, error
    1e-3 of the pattern; 5 to 60 Å, 3e-3).
    """
    return max(3, math.ceil(1 + 1.41 * math.pi * wavelength * spread * cutoff**2))


def enough_rings(source: float, cutoff: float) -> int:
    """Rings of `gaussian_plane` for a source of `source` Å rms, in the sense of `enough_nodes`.

    80 kV, 25 mrad: 1 to 0.3 Å, error 1e-3 of the pattern; 3 to 0.8 Å, 4e-3.
    """
    return max(1, math.ceil(1.06 * 2 * math.pi * source * cutoff - 0.2))


def focal_states(
    spread: Float[Array, ""], nodes: int, wavelength: float, square: Float[Array, "*shape"]
) -> Complex[Array, "nodes *shape"]:
    """Probes defocused by a normal distribution of rms `spread` Å; `square` is k² in 1/Å²."""
    place, weight = gaussian_line(nodes)
    defocus = _column(spread * jnp.asarray(place, square.dtype), square.ndim)
    wave = phase_factor(-math.pi * wavelength * defocus * square[None])
    return wave * _column(jnp.asarray(np.sqrt(weight), wave.dtype), square.ndim)


def source_nodes(
    source: Float[Array, ""], rings: int
) -> tuple[Float[Array, "nodes 2"], Float[Array, " nodes"]]:
    """Where the probe stands, (y, x) Å beside its place, and how often."""
    place, weight = gaussian_plane(rings)
    return source * jnp.asarray(place, source.dtype), jnp.asarray(weight, source.dtype)


def source_states(
    source: Float[Array, ""], rings: int, ky: Float[Array, "*shape"], kx: Float[Array, "*shape"]
) -> Complex[Array, "nodes *shape"]:
    """Probes moved by a normal distribution of rms `source` Å along each axis."""
    around, weight = source_nodes(source, rings)
    y, x = (_column(around[:, axis], ky.ndim) for axis in (0, 1))
    wave = phase_factor(-2 * math.pi * (y * ky[None] + x * kx[None]))
    return wave * _column(jnp.sqrt(weight).astype(wave.dtype), ky.ndim)


def mixed_states(
    probes: Complex[Array, "probes polynomials"],
    polynomials: Float[Array, "polynomials *shape"],
    weight: Float[Array, "*shape"] | None = None,
) -> Complex[Array, "probes *shape"]:
    """sum_j probes[k, j] Q_j(h), scaled so that the mean squares of all k add up to 1.

    The mean is that over the disc, or over the samples with `weight`.
    """
    wave = jnp.tensordot(probes, polynomials.astype(probes.dtype), 1, precision="highest")
    if weight is None:
        power = jnp.sum(probes.real**2 + probes.imag**2)
    else:
        density = jnp.sum(wave.real**2 + wave.imag**2, axis=0)
        power = jnp.sum(density * weight) / jnp.sum(weight)
    return wave / jnp.sqrt(power).astype(wave.dtype)


def _column(values, axes: int):
    return values.reshape(values.shape + (1,) * axes)


def orthogonal_probes(
    probes: Complex[Array, "probes polynomials"],
) -> tuple[Complex[Array, "probes polynomials"], Float[Array, " probes"]]:
    """The same mixed state in orthogonal modes of falling share, and these shares, of sum 1.

    Intensities see `probes` only through probes^H probes, so that any unitary mixture of its rows
    is the same beam; the singular vectors are the mixture whose modes are orthogonal over the
    aperture. The largest coefficient of each mode is made real and positive.
    """
    _, size, modes = jnp.linalg.svd(probes, full_matrices=False)
    largest = jnp.take_along_axis(modes, jnp.argmax(jnp.abs(modes), axis=1)[:, None], axis=1)
    modes = modes * (size[:, None] / jnp.abs(largest)).astype(modes.dtype) * jnp.conj(largest)
    missing = probes.shape[0] - modes.shape[0]
    share = jnp.pad(size**2 / jnp.sum(size**2), (0, missing))
    return jnp.pad(modes, ((0, missing), (0, 0))), share

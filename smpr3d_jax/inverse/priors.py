"""What is believed before any count is seen: projections and penalties on arrays."""

import math
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex

from ..physics.fourier import fft, ifft
from ..physics.optics import wavelength
from ..physics.smatrix import TiltModes, vacuum


def depth_range_basis(
    specimen: TiltModes,
    energy: float,
    depths: tuple[float, float],
    planes: int = 25,
    tolerance: float = 0.03,
) -> Complex[Array, "directions modes ky kx"]:
    """For each transfer q, orthonormal directions that span what layers within `depths` scatter.

    A layer at depth z puts exp(2 pi i lambda (z - plane) q.h), times a factor common to all tilts,
    into s_h(q). The span of `planes` layers keeps the directions whose power exceeds `tolerance` of
    the largest; unused directions are zero. It assumes single scattering per transfer for S - 1.
    """
    ky, kx = np.broadcast_arrays(*specimen.grid.frequencies())
    radius, angle = np.hypot(ky, kx), np.arctan2(ky, kx)
    heights = np.linspace(*depths, planes) - specimen.plane
    edge = 2 * math.pi * wavelength(energy) * np.abs(heights).max() * specimen.cutoff
    # The span depends on |q| alone but for a rotation, and slowly: 0.01 rad of it is one rung.
    rungs = max(2, math.ceil(edge * radius.max() / 0.01) + 1)
    ladder = np.linspace(0, radius.max(), rungs)
    radial = _radial_span(specimen, wavelength(energy), heights, ladder, tolerance)
    rung = np.rint(radius / ladder[1]).astype(int)
    directions = [
        radial[rung, component] * turn[..., None]
        for component, turn in _azimuthal(specimen.order, angle)
    ]
    return jnp.asarray(np.stack(directions).transpose(3, 0, 1, 2), specimen.waves.dtype)


def _azimuthal(order: int, angle):
    """For each polynomial: that of its cosine partner, and its share when q is turned by `angle`."""
    position = 0
    for n in range(order + 1):
        for m in range(n % 2, n + 1, 2):
            yield position, np.cos(m * angle)
            if m:
                yield position, np.sin(m * angle)
            position += 1 + (m > 0)


def _radial_span(specimen: TiltModes, lam: float, heights, ladder, tolerance: float):
    """Orthonormal directions (rung, mode, direction) for q along x, where sines vanish."""
    phase = 2 * math.pi * lam * ladder.max() * np.abs(heights).max() * specimen.cutoff
    tilts = specimen.tilts(phase)
    turns = lam * np.outer(heights, tilts.points[:, 1])
    weighted = (specimen.basis(tilts) * tilts.weights).T
    layers = np.stack([np.exp(2j * np.pi * q * turns) @ weighted for q in ladder])
    values, vectors = np.linalg.eigh(layers @ layers.conj().swapaxes(1, 2))
    keep = values > tolerance * values[:, -1:]
    size = int(keep.sum(axis=1).max())
    scale = np.where(keep, 1 / np.sqrt(np.where(keep, values, 1.0)), 0.0)[:, -size:]
    combine = vectors.conj()[:, :, -size:] * scale[:, None, :]
    return layers.swapaxes(1, 2) @ combine


def depth_range(
    specimen: TiltModes, basis: Complex[Array, "directions modes ky kx"], weight: float = 1.0
) -> Callable[[Complex[Array, "modes y x"]], Complex[Array, "modes y x"]]:
    """Projection of `waves` - vacuum onto `basis`, transfer by transfer.

    `weight` 1 keeps only what layers within the depth range scatter once; smaller weights leave
    that fraction less of the remainder removed, for specimens that scatter more strongly.
    """
    still = vacuum(specimen)[:, None, None]

    def project(waves):
        scattered = fft(waves - still)
        share = jnp.einsum("rpyx,pyx->ryx", basis.conj(), scattered)
        inside = jnp.einsum("rpyx,ryx->pyx", basis, share)
        return still + ifft(scattered + weight * (inside - scattered))

    return project

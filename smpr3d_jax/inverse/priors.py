"""What is believed before any count is seen: projections and penalties on arrays.

A layer's factor exp(i x h.u), u = q/|q| and h in units of the aperture, varies with the tilt along
q alone. Of all polynomials of the tilt up to radial order N it therefore holds only the N + 1 ridge
polynomials i^n U_n(h.u) (Chebyshev, of the second kind), with the real amplitudes
2 (n+1) J_{n+1}(x)/x.
"""

import math
from collections.abc import Callable, Iterator

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float, Int

from ..physics.fourier import EXACT, fft, ifft
from ..physics.optics import wavelength
from ..physics.smatrix import TiltModes, vacuum


def mode_orders(order: int) -> Iterator[tuple[int, int, bool]]:
    """Radial and azimuthal order of each of `tilt_polynomials`, and whether it is the sine."""
    for n in range(order + 1):
        for m in range(n % 2, n + 1, 2):
            yield from ((n, m, False), (n, m, True)) if m else ((n, 0, False),)


def ridge_shares(order: int, turn: Complex[Array, "*shape"]) -> Complex[Array, "modes *shape"]:
    """Coefficient of each mode in the ridge polynomial of its radial order, along u.

    i^n sqrt(2/(n+1)) cos or sin(m angle), without the 2 for m = 0, where `turn` = exp(i angle of
    u). Summed over the modes of an order their squares are 1.
    """
    powers = [jnp.ones_like(turn)]
    for _ in range(order):
        powers.append(powers[-1] * turn)
    rows = [
        (powers[m].imag if sine else powers[m].real).astype(turn.dtype)
        * (1j**n * math.sqrt((2 if m else 1) / (n + 1)))
        for n, m, sine in mode_orders(order)
    ]
    return jnp.stack(rows)


def ridge_quadrature(
    order: int, phase: float
) -> tuple[Float[np.ndarray, " nodes"], Float[np.ndarray, "2 ridges nodes"]]:
    """Nodes t and weights (of cosines, of sines) that give the ridge amplitudes up to x = `phase`.

    2 (n+1) J_{n+1}(x)/x = sum_t w_n(t) cos(x t), or sin(x t) for odd n, to rounding, by
    Gauss-Chebyshev quadrature of the second kind.
    """
    count = order + math.ceil(abs(phase)) + 20
    angle, n = np.pi * np.arange(1, count + 1) / (count + 1), np.arange(order + 1)[:, None]
    weights = 2 / (count + 1) * np.sin(angle) * np.sin((n + 1) * angle) * (-1) ** (n // 2)
    return np.cos(angle), np.stack([weights * (n % 2 == 0), weights * (n % 2 == 1)])


def ridge_amplitudes(
    order: int, phase: Float[np.ndarray, "*shape"]
) -> Float[np.ndarray, "*shape ridges"]:
    """2 (n+1) J_{n+1}(x)/x at x = `phase` for n up to `order`."""
    nodes, (even, odd) = ridge_quadrature(order, float(np.abs(phase).max(initial=0.0)))
    turns = phase[..., None] * nodes
    return np.cos(turns) @ even.T + np.sin(turns) @ odd.T


class DepthBasis(eqx.Module):
    """What layers within a depth range can scatter, for each transfer q, in ridge polynomials.

    `projectors` project ridge amplitudes onto the span of the layers; they depend on |q|, tabulated
    as `rung` says for each q, and `turn` = exp(i angle of q) takes modes to ridge polynomials.
    Directions for each q and mode at once would be larger than S.
    """

    projectors: Float[Array, "rungs ridges ridges"]
    rung: Int[Array, "ky kx"]
    turn: Complex[Array, "ky kx"]


def depth_range_basis(
    specimen: TiltModes,
    energy: float,
    depths: tuple[float, float],
    planes: int = 25,
    tolerance: float = 0.03,
) -> DepthBasis:
    """For each transfer q, the span of what layers within `depths` (Å) scatter.

    A layer at depth z puts exp(2 pi i lambda (z - plane) q.h), times a factor common to all tilts,
    into s_h(q). The span of `planes` layers keeps the directions whose power exceeds `tolerance` of
    the largest. It assumes single scattering per transfer for S - 1.
    """
    ky, kx = np.broadcast_arrays(*specimen.grid.frequencies())
    radius = np.hypot(ky, kx)
    heights = np.linspace(*depths, planes) - specimen.plane
    edge = 2 * math.pi * wavelength(energy) * np.abs(heights).max() * specimen.cutoff
    # The span varies slowly with |q|: 0.01 rad at the aperture's edge is one rung.
    rungs = max(2, math.ceil(edge * radius.max() / 0.01) + 1)
    ladder = np.linspace(0, radius.max(), rungs)
    phases = 2 * math.pi * wavelength(energy) * specimen.cutoff * np.outer(ladder, heights)
    layers = ridge_amplitudes(specimen.order, phases)
    values, vectors = np.linalg.eigh(layers.swapaxes(1, 2) @ layers)
    kept = vectors * (values > tolerance * values[:, -1:])[:, None, :]
    dtype = specimen.waves.dtype
    return DepthBasis(
        jnp.asarray(kept @ vectors.swapaxes(1, 2), specimen.waves.real.dtype),
        jnp.asarray(np.rint(radius / ladder[1]), jnp.int32),
        jnp.asarray(np.exp(1j * np.arctan2(ky, kx)), dtype),
    )


def depth_range(
    specimen: TiltModes, basis: DepthBasis, weight: float = 1.0
) -> Callable[[Complex[Array, "modes y x"]], Complex[Array, "modes y x"]]:
    """Projection of `waves` - vacuum onto `basis`, transfer by transfer.

    `weight` is the fraction of the remainder that is removed: 1 keeps only what layers within the
    depth range scatter once, less leaves room for specimens that scatter more strongly.
    """
    still = vacuum(specimen)[:, None, None]
    ridge = np.asarray([n for n, _, _ in mode_orders(specimen.order)])

    def row(arguments):
        rung, turn, scattered = arguments
        shares = ridge_shares(specimen.order, turn)
        along = jax.ops.segment_sum(shares.conj() * scattered, ridge, specimen.order + 1)
        inside = basis.projectors[rung].astype(along.dtype)
        kept = jnp.einsum("xnm,mx->nx", inside, along, precision=EXACT)
        return shares * kept[ridge]

    def project(waves):
        scattered = fft(waves - still)
        rows = (basis.rung, basis.turn, scattered.swapaxes(0, 1))
        inside = jax.lax.map(row, rows).swapaxes(0, 1)
        return still + ifft(scattered + weight * (inside - scattered))

    return project

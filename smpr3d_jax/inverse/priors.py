"""What is believed before any count is seen, as projections of the S-matrix.

A projection is a function `waves -> waves` for `updates.nesterov(project=...)` or after any step;
beliefs that are scalars are in `penalties`. None is on unless asked for, and each says what it
biases, for each biases something.

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
from ..physics.smatrix import Beams, SMatrix, TiltModes, vacuum


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
    """What layers within a depth range can scatter, for each transfer q.

    `projectors` act on ridge amplitudes, or on all modes in the frame of q where double scattering
    is allowed for; they depend on |q|, tabulated as `rung` says for each q, and `turn` =
    exp(i angle of q) takes modes there. Directions for each q and mode at once would be larger
    than S.
    """

    projectors: Float[Array, "rungs rows rows"]
    rung: Int[Array, "ky kx"]
    turn: Complex[Array, "ky kx"]


def depth_range_basis(
    specimen: TiltModes,
    energy: float,
    depths: tuple[float, float],
    planes: int = 25,
    tolerance: float = 0.03,
    soft: bool = False,
    double: float = 0.0,
    transfer: float = 0.5,
) -> DepthBasis:
    """For each transfer q, the span of what layers within `depths` (Å) scatter.

    A layer at depth z puts exp(2 pi i lambda (z - plane) q.h), times a factor common to all tilts,
    into s_h(q). The span of `planes` layers keeps the directions whose power v exceeds `tolerance`
    of the largest; `soft` gives each the weight v/(v + `tolerance` largest) instead, the proximal
    step of a Gaussian prior of these variances. `double` adds to the power what two layers scatter
    in turn (see `_twice`), as that fraction of what one scatters, with `transfer` (1/Å) the rms
    transfer of one layer.

    **Biases:** what lies outside the range is lost or ascribed to layers inside, and with `double`
    = 0 so is what is scattered more than once. Of the power of a simulated S - 1 (300 kV, 22 mrad,
    120 Å, q below 0.9/Å, 45 modes) the default keeps 0.997 for two sheets of light atoms with some
    of gold, 0.93 for two dense layers of 0.5 rad rms each, 0.84 for six of 0.6 rad, and no smaller
    tolerance adds a hundredth; `double` 0.3 with `tolerance` 0.01 keeps 0.999, 0.98 and 0.97, and
    the noise of 15 modes in place of 5. It fits the data of dense specimens better, six layers of
    0.3 rad with a held-out deviance of 0.93 for 1.32, but their sections gain nothing, for those
    are of single scattering. `soft` also weakens what it keeps, most where few electrons tell.
    """
    heights = np.linspace(*depths, planes) - specimen.plane
    ky, kx = np.broadcast_arrays(*specimen.grid.frequencies())
    radius, order = np.hypot(ky, kx), specimen.order
    scale = 2 * math.pi * wavelength(energy) * specimen.cutoff
    edge = scale * np.abs(heights).max() * radius.max()
    # The span varies slowly with |q|: 0.01 rad at the aperture's edge is one rung.
    ladder = np.linspace(0, radius.max(), max(2, math.ceil(edge / (0.05 if double else 0.01)) + 1))
    layers = ridge_amplitudes(order, scale * np.outer(ladder, heights))
    power = layers.swapaxes(1, 2) @ layers / planes
    if double:
        ends = (heights[0], heights[-1])
        power = _over_modes(order, power) + double * _twice(order, scale, ladder, ends, transfer)
    values, vectors = np.linalg.eigh(power)
    values = np.maximum(values / values[:, -1:], 0)
    share = values / (values + tolerance) if soft else values > tolerance
    dtype = specimen.waves.dtype
    return DepthBasis(
        jnp.asarray((vectors * share[:, None]) @ vectors.swapaxes(1, 2), specimen.waves.real.dtype),
        jnp.asarray(np.rint(radius / ladder[1]), jnp.int32),
        jnp.asarray(np.exp(1j * np.arctan2(ky, kx)), dtype),
    )


def _over_modes(
    order: int, power: Float[np.ndarray, "rungs ridges ridges"]
) -> Float[np.ndarray, "rungs modes modes"]:
    """The same power in modes in the frame of q, where ridges have no sines."""
    n = np.asarray([n for n, _, _ in mode_orders(order)])
    along = np.asarray([_real_shares(order, np.zeros(1))[:, 0]])
    return power[:, n][:, :, n] * along[..., None] * along[:, None]


def _real_shares(
    order: int, angle: Float[np.ndarray, " ramps"]
) -> Float[np.ndarray, "modes ramps"]:
    """`ridge_shares` without i^n."""
    rows = [
        math.sqrt((2 if m else 1) / (n + 1)) * (np.sin(m * angle) if sine else np.cos(m * angle))
        for n, m, sine in mode_orders(order)
    ]
    return np.stack(rows)


def _twice(
    order: int,
    scale: float,
    ladder: Float[np.ndarray, " rungs"],
    ends: tuple[float, float],
    transfer: float,
) -> Float[np.ndarray, "rungs modes modes"]:
    """Mean power, in modes in the frame of q, of what pairs of layers scatter in turn.

    A transfer q' at z1 and q - q' at z2 put exp(2 pi i lambda h.(z1 q' + z2 (q - q'))) into s_h(q):
    with q' = q/2 + p a ramp along (z1 + z2)/2 q + (z1 - z2) p, in any direction. Heights are spread
    evenly between `ends`, and p as layers of power spectrum exp(-(q/`transfer`)²) scatter.
    """
    z = np.linspace(*ends, 7)
    first, second = (z[i] for i in np.triu_indices(7, 1))
    p, weights = np.polynomial.hermite.hermgauss(8)
    p = np.stack(np.meshgrid(p, p, indexing="ij"), -1).reshape(-1, 2) * transfer / math.sqrt(2)
    weights = np.outer(weights, weights).ravel() / math.pi
    aside = (first - second)[:, None] * (p[:, 0] + 1j * p[:, 1])
    root = np.sqrt(np.broadcast_to(weights, aside.shape).ravel() / len(first))
    middle = np.broadcast_to((first + second)[:, None] / 2, aside.shape)
    # Coarser than the ladder: a covariance needs no more, and mixtures of two stay positive.
    count = math.ceil(2 * scale * np.abs(ends).max() * ladder[-1]) + 2
    nodes, n = np.linspace(0, ladder[-1], count), [n for n, _, _ in mode_orders(order)]
    power = []
    for q in nodes:
        ramp = (middle * q + aside).ravel()
        shares = _real_shares(order, np.angle(ramp))
        waves = ridge_amplitudes(order, scale * np.abs(ramp)).T[n] * shares * root
        power.append(waves @ waves.T)
    below = np.minimum((ladder / nodes[1]).astype(int), count - 2)
    part = (ladder / nodes[1] - below)[:, None, None]
    return (1 - part) * np.stack(power)[below] + part * np.stack(power)[below + 1]


def depth_range(
    specimen: TiltModes, basis: DepthBasis, weight: float = 1.0
) -> Callable[[Complex[Array, "modes y x"]], Complex[Array, "modes y x"]]:
    """Projection of `waves` - vacuum onto `basis`, transfer by transfer.

    `weight` is the fraction of the remainder that is removed: 1 keeps only what `basis` holds,
    less leaves room for what it does not.
    """
    still, order = vacuum(specimen)[:, None, None], specimen.order
    into = _to_ridges if basis.projectors.shape[-1] == order + 1 else _to_frame

    def row(arguments):
        rung, turn, scattered = arguments
        seen, back = into(order, turn, scattered)
        inside = basis.projectors[rung].astype(seen.dtype)
        return back(jnp.einsum("xnm,mx->nx", inside, seen, precision=EXACT))

    def project(waves):
        scattered = fft(waves - still)
        rows = (basis.rung, basis.turn, scattered.swapaxes(0, 1))
        inside = jax.lax.map(row, rows).swapaxes(0, 1)
        return still + ifft(scattered + weight * (inside - scattered))

    return project


def _to_ridges(order: int, turn, scattered):
    """Ridge amplitudes along q of a row of modes, and the way back."""
    ridge = np.asarray([n for n, _, _ in mode_orders(order)])
    shares = ridge_shares(order, turn)
    along = jax.ops.segment_sum(shares.conj() * scattered, ridge, order + 1)
    return along, lambda kept: shares * kept[ridge]


def _to_frame(order: int, turn, scattered):
    """A row of modes, without i^n, as seen along q, and the way back."""
    modes = list(mode_orders(order))
    # The cosine of a pair is followed by its sine.
    other = np.asarray([i + (m > 0) * (1 - 2 * sine) for i, (_, m, sine) in enumerate(modes)])
    azimuth = np.asarray([m for _, m, _ in modes])
    powers = [jnp.ones_like(turn)]
    for _ in range(order):
        powers.append(powers[-1] * turn)
    powers = jnp.stack(powers)[azimuth]
    sign = jnp.asarray([-1.0 if sine else 1.0 for _, _, sine in modes], turn.real.dtype)
    cos, sin = powers.real.astype(turn.dtype), (powers.imag * sign[:, None]).astype(turn.dtype)
    phase = jnp.asarray([1j**n for n, _, _ in modes], turn.dtype)[:, None]
    seen = phase.conj() * (cos * scattered + sin * scattered[other])

    def back(kept):
        return phase * (cos * kept - sin * kept[other])

    return seen, back


def tilt_energies(specimen: SMatrix) -> Float[Array, " tilts"]:
    """Energy of the wave of each of `specimen.tilts()`: mean over the field of |s_h|², 1 in vacuum.

    At most 1 for any specimen, since it only redirects electrons, and less where they leave what is
    reconstructed.
    """
    if isinstance(specimen, Beams):
        return jnp.mean(jnp.abs(specimen.waves) ** 2, axis=(1, 2))
    basis = jnp.asarray(specimen.basis(specimen.tilts()), specimen.waves.real.dtype)
    return _energies(basis, _gram(specimen.waves))


def _gram(waves: Complex[Array, "modes y x"]) -> Float[Array, "modes modes"]:
    """Mean over the field of conj(sigma_p) sigma_q; real tilts see its real part alone."""
    flat = waves.reshape(len(waves), -1)
    product = jnp.matmul(flat.conj(), flat.T, precision=EXACT)
    return product.real / flat.shape[1]


def _energies(basis, gram) -> Float[Array, " tilts"]:
    return jnp.sum(basis * jnp.matmul(gram, basis, precision=EXACT), axis=0)


def unit_energy(
    specimen: SMatrix, tolerance: float = 1e-4, sweeps: int = 50
) -> Callable[[Complex[Array, "components y x"]], Complex[Array, "components y x"]]:
    """Projection of `waves` onto S-matrices of which no tilt carries more than unit energy.

    The set is convex: mean over the field of |s_h|² <= 1 for each beam, or for the tilts of
    `specimen.tilts()`. Beams above it are scaled down, each alone. In tilt modes s_h = Q(h).sigma,
    and the nearest point is (1 + sum_h w_h mu_h Q(h) Q(h)^T)^-1 sigma with multipliers mu >= 0 of
    the tilts above it, found from the modes' Gram matrix by `sweeps` of 1 + mu <- (1 + mu)
    sqrt(energy), or until none exceeds `tolerance`; a last scaling takes off what is left. The
    result is in the set to rounding, and nearest to some per cent of its distance.

    **Biases:** noise carries energy too, so noisy waves are weakened as wholes, scattered part and
    all. It does the same where the dose is taken too small. Nearby tilts share energy and one
    part of the field lends it to another, so that it says little of any one pixel.
    """
    if isinstance(specimen, Beams):

        def scale(waves):
            energy = jnp.mean(jnp.abs(waves) ** 2, axis=(1, 2), keepdims=True)
            return waves / jnp.sqrt(jnp.maximum(energy, 1)).astype(waves.dtype)

        return scale
    tilts, real = specimen.tilts(), specimen.waves.real.dtype
    basis = jnp.asarray(specimen.basis(tilts), real)
    weights = jnp.asarray(tilts.weights, real)

    def project(waves):
        gram, unit = _gram(waves), jnp.eye(len(waves), dtype=real)

        def tighten(state):
            sweep, strain, energy, _ = state
            strain = jnp.maximum(strain * jnp.sqrt(energy), 1)
            stiff = jnp.matmul(basis * (weights * strain)[None], basis.T, precision=EXACT)
            shrink = jnp.linalg.inv(stiff)
            after = jnp.matmul(jnp.matmul(shrink, gram, precision=EXACT), shrink, precision=EXACT)
            return sweep + 1, strain, _energies(basis, after), shrink

        def above(state):
            return (state[0] < sweeps) & (jnp.max(state[2]) > 1 + tolerance)

        start = jnp.int32(0), jnp.ones_like(weights), _energies(basis, gram), unit
        _, _, energy, shrink = jax.lax.while_loop(above, tighten, start)
        shrink = shrink / jnp.sqrt(jnp.maximum(jnp.max(energy), 1))
        return jnp.einsum("pq,qyx->pyx", shrink.astype(waves.dtype), waves, precision=EXACT)

    return project

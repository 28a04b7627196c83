"""Differential phase contrast: the phase from the centre of mass of each frame.

A thin phase object phi deflects a frame's centre of mass <k> by the mean of its gradient under the
probe, whatever its strength: 2 pi <k> = grad phi correlated with |probe|², if the camera holds all
electrons. The phases of this file are therefore phi correlated with |probe|², in rad; `transfer`
is what that correlation leaves of each spatial frequency. `integrated` is the closed form for a
periodic scan (integrated centre of mass, iCoM), `fitted` the weighted least-squares solution, which
needs neither periodic edges nor all positions, `differentiated` the divergence (dCoM), for a thin
specimen the projected charge.
"""

import itertools
import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float

from ..data.counts import InputError
from ..data.dataset import Dataset
from ..physics.detector import Detector
from ..physics.grid import Grid
from ..physics.optics import aberration_shift, Optics, spectra, wavelength
from ..physics.smatrix import smooth
from .rasters import counts_of, on_raster, Raster, raster_of
from .virtual import angles, weighted_sums


class Deflection(eqx.Module):
    """Mean scattering angle (y, x) of each frame, mrad in the detector's frame, and its electrons.

    Frames without electrons have no deflection: 0 there.
    """

    angle: Float[Array, "slow fast 2"]
    electrons: Float[Array, "slow fast"]
    raster: Raster


def deflection(
    dataset: Dataset,
    detector: Detector,
    mask: Float[Array, "ky kx"] | None = None,
    scan: int = 0,
) -> Deflection:
    """Centre of mass of each frame of one scan.

    `mask`: the weight of each pixel of the detector, 0 on those that are not to be used; zero
    frequency in the corner.

    **Raises:** InputError if the detector, the mask and the frames differ in shape.
    """
    if detector.shape != dataset.counts.frame_shape:
        raise InputError(
            f"The detector has {detector.shape} pixels (ky, kx), the frames "
            f"{dataset.counts.frame_shape}."
        )
    real, raster = dataset.scan.positions.dtype, raster_of(dataset, scan)
    y, x = np.broadcast_arrays(*angles(detector))
    weights = jnp.asarray(np.stack([np.ones_like(y), y, x]), real)
    if mask is not None:
        weights = weights * mask.astype(real)[None]
    sums = on_raster(weighted_sums(counts_of(dataset, scan), weights), raster)
    electrons = sums[..., 0]
    safe = jnp.where(electrons > 0, electrons, 1.0)
    return Deflection(sums[..., 1:] / safe[..., None], electrons, raster)


def levelled(field: Deflection, plane: bool = False) -> Deflection:
    """Without the mean deflection, or without a `plane` that is linear in the position.

    The fit weighs each frame by its electrons. It takes away descan that is left, and with it a
    real slope of the phase (`plane`: a parabola).
    """
    index = np.stack(np.meshgrid(*map(np.arange, field.raster.shape), indexing="ij"), -1)
    terms = [np.ones(field.raster.shape)] + ([index[..., 0], index[..., 1]] if plane else [])
    columns = np.stack(terms, -1).reshape(-1, len(terms))
    weights = np.sqrt(np.asarray(field.electrons, float)).reshape(-1, 1)
    values = np.asarray(field.angle, float).reshape(-1, 2)
    fit = np.linalg.lstsq(columns * weights, values * weights, rcond=None)[0]
    left = (values - columns @ fit).reshape(field.angle.shape) * (np.asarray(field.electrons) > 0)[
        ..., None
    ]
    return Deflection(jnp.asarray(left, field.angle.dtype), field.electrons, field.raster)


def _gradient(field: Deflection, energy: float) -> Float[Array, "2 slow fast"]:
    """grad phi in rad/Å, axis first."""
    return jnp.moveaxis(field.angle, -1, 0) * (2e-3 * math.pi / wavelength(energy))


def integrated(field: Deflection, energy: float, damping: float = 0.0) -> Float[Array, "slow fast"]:
    """Phase (rad, mean 0) whose gradient is nearest to the deflection; the scan taken as periodic.

    phi(Q) = Q.g(Q)/(2 pi i (Q² + damping²)) for the gradient g; `damping` (1/Å) suppresses slower
    variations, which noise makes large.
    """
    q = jnp.asarray(field.raster.frequencies(half=True, odd=True), field.angle.dtype)
    return _integrated(_gradient(field, energy), q, jnp.asarray(damping, q.dtype))


@jax.jit
def _integrated(gradient, q, damping):
    square = jnp.sum(q**2, axis=0)
    whole = jnp.where(square > 0, 2 * math.pi * (square + damping**2), jnp.inf)
    return _summed(gradient, -q / whole[None])


def _summed(vectors, along):
    """Image of sum_a i along_a(Q) vectors_a(Q)."""
    kernel = jax.lax.complex(jnp.zeros_like(along), along)
    return jnp.fft.irfft2(jnp.sum(kernel * jnp.fft.rfft2(vectors), axis=0), vectors.shape[1:])


def differentiated(field: Deflection, energy: float) -> Float[Array, "slow fast"]:
    """Laplacian of the phase, rad/Å²: the divergence of the deflection, the scan taken as periodic.

    Of a thin specimen it is proportional to the projected charge, electrons included.
    """
    q = jnp.asarray(field.raster.frequencies(half=True, odd=True), field.angle.dtype)
    return jax.jit(_summed)(_gradient(field, energy), 2 * math.pi * q)


def fitted(
    field: Deflection,
    energy: float,
    weights: Float[Array, "slow fast"] | None = None,
    outside: float = 1e-3,
    margin: int = 8,
    tolerance: float = 1e-4,
    iterations: int = 300,
) -> Float[Array, "slow fast"]:
    """Phase (rad) whose gradient fits the deflection in weighted least squares, edges free.

    Minimises sum w |grad phi - g|² by conjugate gradients over a raster `margin` points wider on
    each side. `weights` (default: the electrons, in units of their mean) are 0 where the deflection
    is not to be used; there and in the margin the gradient itself is kept small with weight
    `outside`, so that the phase is continued smoothly. The gradient is spectral: every frequency
    keeps its amplitude. The weighted mean is 0.

    **Raises:** InputError for weights of another shape, negative, or all zero.
    """
    shape, real = field.raster.shape, field.angle.dtype
    w = field.electrons if weights is None else weights
    if w.shape != shape or bool(jnp.any(w < 0)) or not bool(jnp.any(w > 0)):
        raise InputError(
            f"`weights` must be one number a position, shape {shape}, none negative and not all 0; "
            f"they have shape {w.shape}, from {float(jnp.min(w)):.3g} to {float(jnp.max(w)):.3g}."
        )
    wide = field.raster.wider((margin, margin))
    pad = [(o := (m - n) // 2, m - n - o) for m, n in zip(wide.shape, shape, strict=True)]
    scaled = (w / (jnp.mean(w) if weights is None else 1.0)).astype(real)
    q = jnp.asarray(wide.frequencies(half=True, odd=True), real)
    limits = jnp.asarray([outside, tolerance], real)
    phase = _fit(jnp.pad(jnp.where(scaled[None] > 0, _gradient(field, energy), 0), [(0, 0), *pad]),
                 jnp.pad(scaled, pad), q, limits, iterations)  # fmt: skip
    phase = phase[pad[0][0] : pad[0][0] + shape[0], pad[1][0] : pad[1][0] + shape[1]]
    return phase - jnp.sum(phase * scaled) / jnp.sum(scaled)


@jax.jit
def _fit(gradient, weights, q, limits, iterations):
    """Conjugate gradients for u, phi(Q) = u(Q)/(2 pi |Q|): in u all frequencies weigh the same."""
    outside, tolerance = limits
    weights = jnp.maximum(weights, outside)[None]
    length = jnp.sqrt(jnp.sum(q**2, axis=0))
    inverse = jnp.where(length > 0, 1 / jnp.where(length > 0, length, 1.0), 0.0)
    kernel = jax.lax.complex(jnp.zeros_like(q), q * inverse[None])
    shape = gradient.shape[1:]
    forward = lambda u: jnp.fft.irfft2(kernel * jnp.fft.rfft2(u)[None], shape)
    adjoint = lambda v: _summed(v, -q * inverse[None])
    solution, _ = jax.scipy.sparse.linalg.cg(
        lambda u: adjoint(weights * forward(u)),
        adjoint(weights * gradient),
        tol=tolerance,
        maxiter=iterations,
    )
    scale = (inverse / (2 * math.pi)).astype(kernel.dtype)
    return jnp.fft.irfft2(jnp.fft.rfft2(solution) * scale, shape)


def transfer(optics: Optics, raster: Raster, scan: int = 0) -> Complex[np.ndarray, "slow half"]:
    """What is left of each frequency of the phase by its correlation with |probe|².

    sum_k P(k) conj(P(k + Q)) over the probe's spectrum, at the frequencies of
    `raster.frequencies(half=True)`; 1 at Q = 0.
    """
    one = optics.of_scan(jnp.asarray(scan))
    grid = _probe_grid(one)
    spectrum = np.asarray(spectra(one, grid)[0], np.complex128)
    intensity = np.sum(np.abs(np.fft.ifft2(spectrum)) ** 2, axis=0)
    # The intensity is limited in frequency, so that its transform can be read anywhere.
    y, x = (np.fft.fftfreq(n) * e for n, e in zip(grid.shape, grid.extent, strict=True))
    qy, qx = raster.frequencies(half=True)
    rows = np.exp(2j * np.pi * qy.reshape(-1, 1) * y) @ intensity
    value = np.sum(rows * np.exp(2j * np.pi * qx.reshape(-1, 1) * x), axis=1)
    return (value / intensity.sum()).reshape(qy.shape)


def _probe_grid(optics: Optics) -> Grid:
    """A plane that holds the probe of one scan, sampled for its intensity."""
    k = np.linspace(-1, 1, 33) * optics.cutoff
    ky, kx = (jnp.asarray(a, float) for a in np.meshgrid(k, k, indexing="ij"))
    rays = aberration_shift(optics.aberrations, ky, kx, optics.energy)
    extent = 4 * float(jnp.abs(rays).max()) + 48 / optics.cutoff
    pixels = next(n for n in itertools.count(math.ceil(4 * optics.cutoff * extent)) if smooth(n))
    return Grid((pixels, pixels), (1 / (4 * optics.cutoff), 1 / (4 * optics.cutoff)))

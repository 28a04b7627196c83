"""Wigner distribution deconvolution (WDD): the transmission of a specimen of any strength.

The spectrum of all frames over the scan is a convolution over the detector,
    G(k, Q) = sum_q X(q, Q) Y(k - q, Q),  X = T(q) conj T(q - Q),  Y = P(k) conj P(k + Q),
with the object's spectrum T and the probe's P. Divided by Y in the conjugate space of k, with
Wiener's constant, G gives X smeared by what the probe does not reach. X is read where it holds
T(0): u at q = 0, v at q = Q, and the smear of each into the other is undone by a matrix of two by
two, so that the phase of a weak object comes out whole. The scan is taken as periodic.
"""

import math
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex

from ..data.counts import Counts, InputError
from ..data.dataset import Dataset
from ..physics.detector import Detector
from ..physics.fourier import EXACT, phase_factor
from ..physics.optics import Optics
from .brightfield import probe_wave
from .rasters import counts_of, Raster, raster_of
from .virtual import angles


BLOCK, IN_CACHE = 2**23, 2**17
"""Numbers that a block of frequencies holds, and that are transformed at once."""


class Deconvolved(NamedTuple):
    """The transmission at the positions of a raster; its phase is the image."""

    wave: Complex[Array, "slow fast"]
    raster: Raster


def wdd(
    dataset: Dataset,
    optics: Optics,
    detector: Detector,
    scan: int = 0,
    depth: float = 0.0,
    epsilon: float = 1e-3,
) -> Deconvolved:
    """The transmission of a thin specimen at `depth` (Å) from one scan of a series.

    `epsilon`: Wiener's constant, in units of the largest |Y|² in the space conjugate to k, and of
    the separation of u and v. Frames are transformed in blocks of frequencies, decoded row by row.

    **Raises:** InputError for detector and frames that differ, an `epsilon` that is not positive,
    and a partially coherent probe.
    """
    if detector.shape != dataset.counts.frame_shape:
        raise InputError(
            f"The detector has {detector.shape} pixels (ky, kx), the frames "
            f"{dataset.counts.frame_shape}."
        )
    if not epsilon > 0 or optics.states > 1:
        raise InputError(
            f"`wdd` needs `epsilon` above 0 and a coherent probe, got {epsilon} and a probe of "
            f"{optics.states} states."
        )
    raster, real = raster_of(dataset, scan), dataset.scan.positions.dtype
    lens = optics.of_scan(jnp.asarray(scan))
    lens = eqx.tree_at(lambda o: o.aberrations["C10"], lens, lens.aberrations["C10"] + depth)
    width = jnp.asarray(detector.pixel * 1e-3 / optics.wavelength, real)
    k = [np.broadcast_to(a * 1e-3 / optics.wavelength, detector.shape) for a in angles(detector)]
    plane = jnp.asarray(np.stack(k), real)
    counts, shape = counts_of(dataset, scan), raster.shape
    rows = jax.tree.map(lambda a: a.reshape(*shape, *a.shape[1:]), counts)
    q = jnp.asarray(raster.frequencies(half=True), real)
    turns = 2 * np.pi * np.outer(np.arange(shape[1]), np.arange(q.shape[2])) / shape[1]
    waves = jnp.asarray(np.stack([np.cos(turns), -np.sin(turns)]) / math.prod(shape), real)
    size = max(1, BLOCK // (shape[0] * math.prod(detector.shape)))
    blocks = [slice(first, first + size) for first in range(0, q.shape[2], size)]
    found = [
        _deconvolved(
            rows, waves[:, :, b], q[:, :, b], plane, lens, width, jnp.asarray(epsilon, real)
        )
        for b in blocks
    ]
    u, v = (jnp.concatenate(part, axis=1) for part in zip(*found, strict=True))
    electrons = jnp.mean(counts.total()).astype(real)
    return Deconvolved(_wave(u, v, electrons, plane, lens, width, shape), raster)


@eqx.filter_jit
def _wave(u, v, electrons, k, lens: Optics, width, shape: tuple[int, int]):
    """The object from u = T(0) conj T(-Q) and v = T(Q) conj T(0), T(0) real."""
    beam = electrons / jnp.sum(jnp.abs(probe_wave(lens, k[0], k[1], width)) ** 2)
    # At Q = 0 both are the same number, of which each holds a part.
    still = (u[0, 0] + v[0, 0]).real
    scale = 1 / jnp.sqrt(jnp.maximum(still * beam, jnp.finfo(still.dtype).tiny))
    ahead, behind = (a * scale.astype(a.dtype) for a in (v, jnp.conj(u)))
    rows = -jnp.arange(shape[0]) % shape[0]
    columns = -jnp.arange(u.shape[1]) % shape[1]
    whole = jnp.zeros(shape, u.dtype).at[rows[:, None], columns[None]].set(behind)
    whole = whole.at[:, : u.shape[1]].set(ahead)
    whole = whole.at[0, 0].set((still * scale).astype(u.dtype))
    return jnp.fft.ifft2(whole) * math.prod(shape)


@eqx.filter_jit
def _deconvolved(rows: Counts, waves, q, k, lens: Optics, width, epsilon):
    """u and v of the frequencies of some columns of the raster's half plane."""
    shape, fast = k.shape[1:], waves.shape[1]

    def row(counts):
        pixels = counts.dense(k.dtype).reshape(fast, -1)
        parts = jnp.matmul(jnp.swapaxes(waves, 1, 2), pixels[None], precision=EXACT)
        return jax.lax.complex(parts[0], parts[1])

    spectrum = jnp.fft.fft(jax.lax.map(row, rows), axis=0)
    here = probe_wave(lens, k[0], k[1], width)
    floor = epsilon * jnp.sum(jnp.abs(here) ** 2) ** 2
    y, x = (jnp.asarray(np.fft.fftfreq(n), k.dtype) / width for n in shape)

    def one(frequency_and_plane):
        (qy, qx), plane = frequency_and_plane
        beyond = probe_wave(lens, k[0] + qy, k[1] + qx, width)
        before = probe_wave(lens, k[0] - qy, k[1] - qx, width)
        parts = jnp.stack([here * jnp.conj(beyond), before * jnp.conj(here), plane.reshape(shape)])
        parts = jnp.fft.fft2(parts)
        kernel = jnp.conj(parts[0]) / (jnp.abs(parts[0]) ** 2 + floor).astype(parts.dtype)
        ramp = (
            phase_factor(2 * math.pi * qy * y)[:, None] * phase_factor(2 * math.pi * qx * x)[None]
        )
        (a, b, s), (c, d, t) = (
            jnp.mean(parts * f[None], axis=(1, 2)) for f in (kernel, kernel * ramp)
        )
        a, d = a + epsilon.astype(a.dtype), d + epsilon.astype(d.dtype)
        return (d * s - b * t) / (a * d - b * c), (a * t - c * s) / (a * d - b * c)

    pairs = jnp.moveaxis(q, 0, -1).reshape(-1, 2), spectrum.reshape(-1, math.prod(shape))
    u, v = jax.lax.map(one, pairs, batch_size=max(1, IN_CACHE // math.prod(shape)))
    return u.reshape(q.shape[1:]), v.reshape(q.shape[1:])

"""What each pixel of the bright-field disc sees of a weak phase.

Over a scan, pixel k of the disc records an image. Of a weak phase phi its spectrum is, in units of
the beam's intensity per pixel,
    G(k, Q) = i phi(Q) Gamma(k, Q),  Gamma = conj P(k) P(k - Q) - P(k) conj P(k + Q),
with the probe's spectrum P(k) = A(k) exp(-i chi(k)): light is found only where the disc overlaps
itself shifted by ±Q. To first order in Q it is an image shifted by s(k) = grad chi/2 pi (position r
shows the object at r + s), which is all that parallax uses. A specimen at depth z sees chi with C10
larger by z, so that Gamma changes by factors that are products over the two axes of the raster.
"""

import math
from functools import partial
from typing import NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float, Num

from ..data.counts import Counts, Frames, InputError
from ..data.dataset import Dataset
from ..physics.detector import Detector
from ..physics.fourier import phase_factor
from ..physics.optics import aberration_phase, aberration_shift, Optics
from .rasters import counts_of, Raster, raster_of
from .virtual import angles


Scalar = float | Float[Array, ""]


class BrightField(eqx.Module):
    """The counts of one scan in the bright-field disc, an image a pixel, in the stored type.

    `k` (y, x) in 1/Å are the pixels' centres, `level` the mean counts of a pixel wholly inside the
    disc, `pixel` the width of one, 1/Å. `optics` are those of this scan alone.
    """

    images: Num[Array, "pixels slow fast"]
    k: Float[Array, "pixels 2"]
    level: Float[Array, ""]
    raster: Raster
    optics: Optics
    pixel: float = eqx.field(static=True)


def bright_field(
    dataset: Dataset,
    optics: Optics,
    detector: Detector,
    scan: int = 0,
    mask: Float[Array, "ky kx"] | None = None,
) -> BrightField:
    """Gather the pixels of the disc of one scan of a series.

    `mask`: pixels with weight 0 are left out. The optics are those of the whole series.

    **Raises:** InputError for detector and frames that differ, a disc that the detector does not
    hold, and a mixed-state probe.
    """
    if detector.shape != dataset.counts.frame_shape:
        raise InputError(
            f"The detector has {detector.shape} pixels (ky, kx), the frames "
            f"{dataset.counts.frame_shape}."
        )
    if optics.probes is not None:
        raise InputError("Bright-field methods need one coherent probe; `optics.probes` is mixed.")
    width = detector.pixel * 1e-3 / optics.wavelength
    y, x = (a * 1e-3 / optics.wavelength for a in np.broadcast_arrays(*angles(detector)))
    inside = fraction_inside(np.hypot(y, x), optics.cutoff, width)
    reach = [n // 2 * width for n in detector.shape]
    if min(reach) < optics.cutoff - width:
        raise InputError(
            f"A disc of {optics.semiangle} mrad is wider than the detector, which ends at "
            f"{[round(r * optics.wavelength * 1e3, 3) for r in reach]} mrad (y, x)."
        )
    chosen = inside * (1 if mask is None else np.asarray(mask) > 0)
    pixels = np.flatnonzero(chosen)
    raster, real = raster_of(dataset, scan), dataset.scan.positions.dtype
    images = _gathered(counts_of(dataset, scan), jnp.asarray(pixels))
    whole = inside.ravel()[pixels] >= np.max(chosen, initial=0.0)
    level = jnp.mean(_means(images, real)[np.flatnonzero(whole)])
    k = jnp.asarray(np.stack([y, x], -1).reshape(-1, 2)[pixels], real)
    lens = optics.of_scan(jnp.asarray(scan))
    images = images.reshape(len(pixels), *raster.shape)
    return BrightField(images, k, level, raster, lens, width)


def fraction_inside(radius, cutoff, width):
    """The fraction of a pixel inside the disc, as `optics.aperture` has it."""
    part = (cutoff - radius) / width + 0.5
    return jnp.clip(part, 0.0, 1.0) if isinstance(part, jax.Array) else np.clip(part, 0.0, 1.0)


@partial(jax.jit, static_argnums=1)
def _means(images, dtype):
    return jax.lax.map(lambda row: jnp.mean(row.astype(dtype)), images)


@eqx.filter_jit
def _gathered(counts: Counts, pixels) -> Num[Array, "pixels frames"]:
    if isinstance(counts, Frames):
        return jnp.asarray(counts.values).reshape(len(counts), -1)[:, pixels].T
    ky, kx = counts.frame_shape
    slot = jnp.full(ky * kx, len(pixels)).at[pixels].set(jnp.arange(len(pixels)))

    def frame(hits):
        where, number = hits
        return jnp.zeros(len(pixels) + 1, number.dtype).at[slot[where]].add(number)[:-1]

    return jax.lax.map(frame, (counts.pixels, counts.multiplicity), batch_size=64).T


class Waves(NamedTuple):
    """What each pixel's model is made of.

    Gamma is the difference of the sidebands conj P(k) P(k - Q), `left`, and P(k) conj P(k + Q),
    `right`; `shift` is the aperture's amplitude times exp(2 pi i Q.s).
    """

    left: Complex[Array, "pixels folds slow half"]
    right: Complex[Array, "pixels folds slow half"]
    shift: Complex[Array, "pixels folds slow half"]


def probe_wave(
    optics: Optics, ky: Float[Array, "*shape"], kx: Float[Array, "*shape"], width: Scalar
) -> Complex[Array, "*shape"]:
    """The spectrum of the first scan's probe, 1 inside a disc whose edge is `width` (1/Å) wide."""
    chi = aberration_phase(optics.aberrations, ky, kx, optics.energy)[0]
    turned = phase_factor(-chi)
    return fraction_inside(jnp.hypot(ky, kx), optics.cutoff, width).astype(turned.dtype) * turned


def sidebands(
    lens: Optics,
    width: Scalar,
    k: Float[Array, "pixels 2"],
    q: Float[Array, "2 folds slow half"],
) -> Waves:
    """The waves of some pixels for a specimen at depth 0.

    A spread of the defocus damps each sideband by its own path, a source both alike.
    """
    lam = lens.wavelength
    ky, kx = (k[:, axis, None, None, None] for axis in range(2))
    qy, qx = q[0][None], q[1][None]
    wave = partial(probe_wave, lens, width=width)
    here = wave(ky, kx)
    left = jnp.conj(here) * wave(ky - qy, kx - qx)
    right = here * jnp.conj(wave(ky + qy, kx + qx))
    square, along = qy**2 + qx**2, 2 * (ky * qy + kx * qx)
    if (spread := lens.spread) is not None:
        damped = lambda path: jnp.exp(-((math.pi * lam * spread * path) ** 2) / 2)
        left = left * damped(square - along).astype(left.dtype)
        right = right * damped(square + along).astype(left.dtype)
    if lens.source is not None:
        blurred = jnp.exp(-2 * (math.pi * lens.source) ** 2 * square).astype(left.dtype)
        left, right = left * blurred, right * blurred
    moved = aberration_shift(lens.aberrations, ky, kx, lens.energy)[0]
    shift = phase_factor(2 * math.pi * (moved[..., 0] * qy + moved[..., 1] * qx))
    return Waves(left, right, jnp.abs(here).astype(left.dtype) * shift)


def refocused(
    waves: Waves,
    depth: Float[Array, ""],
    wavelength: float,
    square: Float[Array, "folds slow half"],
    tilt: tuple[Float[Array, "pixels folds slow"], Float[Array, "pixels folds half"]],
) -> Waves:
    """The waves for a specimen at `depth`, which sees C10 larger by it.

    `square` is Q² and the sum of the two `tilt` is k.Q, 1/Å²: the part of each axis of the raster.
    """
    curve = phase_factor(math.pi * wavelength * depth * square)[None]
    along = [phase_factor(2 * math.pi * wavelength * depth * t) for t in tilt]
    ramp = along[0][..., :, None] * along[1][..., None, :]
    return Waves(
        waves.left * (ramp * jnp.conj(curve)), waves.right * (ramp * curve), waves.shift * ramp
    )

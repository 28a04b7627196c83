"""Parallax, or tilt-corrected bright field: the bright-field pixels' images shifted and added.

Out of focus each pixel of the disc shows the specimen from its own direction, moved by where its
ray lands. Moved back and added, the images give bright-field contrast at the dose of the whole
disc; their depth is that for which they were moved, and their disagreement about where the raster's
points lie resolves what is finer than the raster. The sum transfers a weak phase with
T(Q) = mean_k exp(-2 pi i Q.s) i Gamma(k, Q): far from focus about -2 sin(pi lambda defocus Q²)
times the overlap of the discs; `correction` deals with its signs and zeros.
"""

import jax.numpy as jnp

from ..data.counts import InputError
from .brightfield import BrightField, Waves
from .unfolding import Depths, Focused, image, normal_equations, prepared, solved


def aligned(waves: Waves):
    """Every image moved back by its shift, as bright as the disc is at its pixel."""
    return waves.shift, waves.shift


def parallax(
    bright: BrightField,
    depths: Depths = (0.0,),
    correction: str = "none",
    upsample: int = 1,
    epsilon: float = 1e-2,
    margin: tuple[int, int] | None = None,
) -> Focused:
    """Tilt-corrected bright field of a specimen at each of `depths` (Å).

    `correction`: "none" gives intensities, 1 in vacuum; "flip" turns every frequency by the phase
    of the transfer, so that all have the contrast of the phase, "wiener" divides by the transfer
    as well and gives the phase of a weak specimen in rad; both have mean 0. `epsilon` is that of
    the division and of the separation of frequencies that the raster folds (`upsample` image
    pixels per scan step). `margin` is that of `ssb`, whose weights leave less noise.

    **Raises:** InputError for settings that make no image.
    """
    if correction not in ("none", "flip", "wiener"):
        raise InputError(f"`correction` {correction!r} is not one of none, flip, wiener.")
    planes, wide = prepared("parallax", bright, depths, upsample, epsilon, margin)
    sums = normal_equations(bright, planes, aligned, upsample, wide)
    # Without folds there is nothing to separate, and the sum stays what it is.
    spectrum = sums.vector if upsample == 1 else solved(sums, epsilon)
    if correction == "none":
        found = image(spectrum, planes, bright, wide, upsample)
        return found._replace(images=1 + found.images)
    size = jnp.abs(sums.transfer)
    scale = jnp.maximum(size, 1e-6) if correction == "flip" else size**2 + epsilon
    spectrum = spectrum * jnp.conj(sums.transfer) / scale.astype(spectrum.dtype)
    return image(spectrum, planes, bright, wide, upsample)

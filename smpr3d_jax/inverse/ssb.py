"""Single sideband: a weak object's phase from the overlaps of the bright-field disc with itself.

Aberrations are corrected exactly, for each overlap by its own phase; transfer reaches twice the
aperture. Depth needs no more than another defocus, so that a whole series costs one transform of
the data.
"""

import jax.numpy as jnp

from ..data.counts import InputError
from .brightfield import BrightField, Waves
from .unfolding import Depths, Focused, image, normal_equations, prepared, solved


def matched(waves: Waves):
    """Every overlap weighted by what it transfers: the least-squares, best signal-to-noise sum."""
    model = 1j * (waves.left - waves.right)
    return model, model


def plain(waves: Waves):
    """The overlaps of two discs with weight 1, those of three discs left out."""
    model = 1j * (waves.left - waves.right)
    left, right = (jnp.abs(side) > 0 for side in (waves.left, waves.right))
    size = jnp.abs(model)
    alone = (left != right) & (size > 0)
    unit = model / jnp.where(alone, size, 1.0).astype(model.dtype)
    return jnp.where(alone, unit, 0), model


WEIGHTS = {"snr": matched, "plain": plain}


def ssb(
    bright: BrightField,
    depths: Depths = (0.0,),
    weights: str = "snr",
    upsample: int = 1,
    epsilon: float = 1e-3,
    margin: tuple[int, int] | None = None,
) -> Focused:
    """Phase (rad, mean 0) of a weak specimen as if it lay at each of `depths` (Å).

    `weights`: "snr" (all overlaps, by least squares) or "plain" (double overlaps, equal weight).
    The Wiener constant `epsilon` halves frequencies where the mean |Gamma|² is as small ("plain":
    the mean |Gamma|); Gamma of one open sideband is 1. `upsample`: image pixels per scan step, for
    frequencies beyond the raster's, which defocus tells apart. `margin`: positions by which the
    scan is continued on each side (default: as far as the images move; (0, 0) for periodic scans).

    **Raises:** InputError for settings that make no image.
    """
    if weights not in WEIGHTS:
        raise InputError(f"`weights` {weights!r} is not one of {sorted(WEIGHTS)}.")
    planes, wide = prepared("ssb", bright, depths, upsample, epsilon, margin)
    sums = normal_equations(bright, planes, WEIGHTS[weights], upsample, wide)
    return image(solved(sums, epsilon), planes, bright, wide, upsample)

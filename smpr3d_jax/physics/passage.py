"""Many frames' waves through plates: each in its own window of a field, shifted, cropped, carried.

What frames share is not copied for each: on a CPU frame follows frame, so that its waves stay in
cache, and the reverse pass, which computes them again, adds into the field in place. Accelerators
take all frames together.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float, Int

from .fourier import fft, ifft, phase_factor
from .grid import Grid
from .smatrix import smooth
from .windows import inset, window_of


GUARD = 4
"""Pixels beyond each side of the window in which the probe fades, so that it can be shifted."""


def padded(window: Grid) -> Grid:
    """The window with a margin of `GUARD` pixels or more on each side."""
    shape = [next(n for n in range(m + 2 * GUARD, 3 * m + 16) if n % 2 == m % 2 and smooth(n))
             for m in window.shape]  # fmt: skip
    return Grid((shape[0], shape[1]), window.sampling)


def fade(large: Grid, window: Grid) -> Float[np.ndarray, "y x"]:
    """1 in the window, falling as cos² to nothing at the borders of the padded window."""
    profiles = []
    for n, m in zip(large.shape, window.shape, strict=True):
        beyond = np.abs(np.arange(n) - n // 2 + (1 - m % 2) / 2) - m / 2
        profiles.append(np.cos(np.pi / 2 * np.clip(beyond / ((n - m) / 2), 0, 1)) ** 2)
    return profiles[0][:, None] * profiles[1][None, :]


def shift_ramps(
    large: Grid, rest: Float[Array, "frames 2"]
) -> tuple[Complex[Array, "frames ky"], Complex[Array, "frames kx"]]:
    """exp(-2 pi i k.rest), a factor an axis."""
    ky, kx = (
        phase_factor(-2 * math.pi * rest[:, axis, None] * jnp.asarray(k.ravel(), rest.dtype)[None])
        for axis, k in enumerate(large.frequencies())
    )
    return ky, kx


def shifted(
    spectra: Complex[Array, "frames *waves large_ky large_kx"],
    ramps: tuple[Complex[Array, "frames large_ky"], Complex[Array, "frames large_kx"]],
    shape: tuple[int, int],
) -> Complex[Array, "frames *waves y x"]:
    """Waves moved by Fourier phases and cropped to `shape` pixels around the centre."""
    spread = lambda ramp: ramp.reshape(-1, *[1] * (spectra.ndim - 3), ramp.shape[-1])
    along_y, along_x = map(spread, ramps)
    wave = ifft(spectra * along_y[..., None] * along_x[..., None, :])
    top, left = inset(shape, wave.shape[-2:])
    return wave[..., top : top + shape[0], left : left + shape[1]]


@jax.custom_vjp
def through_layers(
    spectra: Complex[Array, "scans states modes large_ky large_kx"],
    plates: Complex[Array, "layers fy fx"],
    steps: Complex[Array, "steps ky kx"],
    along_y: Complex[Array, "frames large_ky"],
    along_x: Complex[Array, "frames large_kx"],
    series: Int[Array, " frames"],
    corner: Int[Array, "frames 2"],
) -> Complex[Array, "frames states waves ky kx"]:
    """Shift each frame's probe, crop it to the window, and carry it through plates and free space.

    A step more than there are plates carries the first mode past all of them: one wave more.
    """
    return _through(spectra, plates, steps, along_y, along_x, series, corner)


def _through(*operands):
    return jax.lax.platform_dependent(*operands, cpu=one_by_one, default=all_together)


def carry(spectrum, plates, steps, along_y, along_x):
    """The exit waves of one frame, whose `plates` are cropped already."""
    wave = shifted(spectrum[None], (along_y[None], along_x[None]), plates.shape[1:])[0]

    def cross(wave, layer):
        plate, step = layer
        return ifft(fft(wave * plate[None, None]) * step[None, None]), None

    count = plates.shape[0]
    carried, _ = jax.lax.scan(cross, wave, (plates, steps[:count]), unroll=4)
    if steps.shape[0] == count:
        return carried
    free = ifft(fft(wave[:, :1]) * steps[count][None, None])
    return jnp.concatenate([carried, free], axis=1)


def one_by_one(spectra, plates, steps, along_y, along_x, series, corner):
    """`through_layers` in a loop over frames."""

    def frame(given):
        along_y, along_x, scan, at = given
        return carry(spectra[scan], window_of(plates, at, steps.shape[1:]), steps, along_y, along_x)

    return jax.lax.map(frame, (along_y, along_x, series, corner))


def all_together(spectra, plates, steps, along_y, along_x, series, corner):
    """`through_layers` for all frames at once, derivable."""
    windows = crops(plates, corner, steps.shape[1:])
    one = lambda spectrum, window, y, x: carry(spectrum, window, steps, y, x)
    return jax.vmap(one)(spectra[series], windows, along_y, along_x)


def _through_reverse(saved, cotangent):
    reverse = partial(jax.lax.platform_dependent, cotangent, *saved)
    return *reverse(cpu=pull_one_by_one, default=pull_together), None, None


def pull_together(cotangent, spectra, plates, steps, along_y, along_x, series, corner):
    """Reverse pass of `all_together`."""
    function = lambda a, b, c, d, e: all_together(a, b, c, d, e, series, corner)
    return jax.vjp(function, spectra, plates, steps, along_y, along_x)[1](cotangent)


def pull_one_by_one(cotangent, spectra, plates, steps, along_y, along_x, series, corner):
    """Reverse pass of `one_by_one`."""
    shape = steps.shape[1:]

    def frame(totals, given):
        to_spectra, to_plates, to_steps = totals
        to, along_y, along_x, scan, at = given
        window = window_of(plates, at, shape)
        pull = jax.vjp(carry, spectra[scan], window, steps, along_y, along_x)[1]
        to_spectrum, to_window, to_step, to_y, to_x = pull(to)
        start = (jnp.zeros((), at.dtype), at[0], at[1])
        patch = window_of(to_plates, at, shape) + to_window
        to_plates = jax.lax.dynamic_update_slice(to_plates, patch, start)
        to_spectra = to_spectra.at[scan].add(to_spectrum)
        return (to_spectra, to_plates, to_steps + to_step), (to_y, to_x)

    totals = tuple(jnp.zeros_like(a) for a in (spectra, plates, steps))
    frames = (cotangent, along_y, along_x, series, corner)
    totals, (to_y, to_x) = jax.lax.scan(frame, totals, frames)
    return *totals, to_y, to_x


through_layers.defvjp(lambda *operands: (_through(*operands), operands), _through_reverse)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def crops(
    planes: Complex[Array, "planes fy fx"], corner: Int[Array, "frames 2"], shape: tuple[int, int]
) -> Complex[Array, "frames planes y x"]:
    """The windows of `shape` pixels that begin at `corner`.

    The derived reverse pass would write the whole field once a frame; the rule adds in place.
    """
    return jax.vmap(lambda at: window_of(planes, at, shape))(corner)


def _crops_reverse(shape, saved, cotangent):
    corner, like = saved

    def add(total, frame):
        at, part = frame
        start = (jnp.zeros((), at.dtype), at[0], at[1])
        patch = window_of(total, at, shape) + part
        return jax.lax.dynamic_update_slice(total, patch, start), None

    return jax.lax.scan(add, jnp.zeros_like(like), (corner, cotangent))[0], None


crops.defvjp(lambda planes, corner, shape: (crops(planes, corner, shape), (corner, planes)),
             _crops_reverse)  # fmt: skip

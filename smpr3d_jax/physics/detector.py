"""From exit waves to what a camera counts."""

from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float

from .fourier import EXACT, fft
from .grid import Grid


IN_CACHE = 32
"""Waves whose finer patterns a CPU computes at once."""


class Detector(eqx.Module):
    """A camera in the far field: `shape` (y, x) pixels of `pixel` mrad.

    `integration` = f models a pixel's finite width by a box of f samples of the f times finer
    pattern (1: the pattern is sampled at the centre of each pixel, 2: enough for real cameras).
    `offset` (y, x) is where the zero frequency lies beside the centre of its pixel, in pixels.
    `halo`: the finer pattern is that of a window f times larger, in whose rim the probe goes on,
    as refined optics need; otherwise waves end at the window, which is a quarter faster.
    What spoils the counts is None where it is off: `blur`, the rms width in pixels by which the
    camera spreads a point along each axis, and `background`, electrons per pixel and frame that do
    not come from the beam. `blur` acts by its size and has no slope at 0.
    """

    shape: tuple[int, int] = eqx.field(static=True)
    pixel: float = eqx.field(static=True)
    integration: int = eqx.field(static=True, default=2)
    offset: tuple[float, float] = eqx.field(static=True, default=(0.0, 0.0))
    halo: bool = eqx.field(static=True, default=False)
    background: Float[Array, ""] | None = None
    blur: Float[Array, ""] | None = None

    def window(self, wavelength: float) -> Grid:
        """The window in real space that this camera sees: sampling lambda/(n pixel)."""
        step = [wavelength / (n * self.pixel * 1e-3) for n in self.shape]
        return Grid(self.shape, (step[0], step[1]))

    def wide_window(self, wavelength: float) -> Grid | None:
        """The window of the finer pattern, None where waves end at the other."""
        if not self.halo or self.integration == 1:
            return None
        y, x = (self.integration * n for n in self.shape)
        return Grid((y, x), self.window(wavelength).sampling)

    def __call__(self, exit_waves: Complex[Array, "*batch y x"]) -> Float[Array, "*batch ky kx"]:
        """Electrons per pixel that arrive, zero frequency in the corner.

        Waves fill the window or the wide window.
        """
        if self.offset != (0.0, 0.0):
            turns = [
                np.arange(m) * o / n
                for m, n, o in zip(exit_waves.shape[-2:], self.shape, self.offset, strict=True)
            ]
            ramp = np.exp(2j * np.pi * (turns[0][:, None] + turns[1][None, :]))
            batch = (1,) * (exit_waves.ndim - 2)
            exit_waves = exit_waves * jnp.asarray(ramp, exit_waves.dtype).reshape(
                *batch, *ramp.shape
            )
        return intensity(exit_waves, self.integration, exit_waves.shape[-2:] != self.shape)

    def readout(self, arriving: Float[Array, "*batch ky kx"]) -> Float[Array, "*batch ky kx"]:
        """Expected counts where electrons arrive: blurred by the camera, over a background.

        Given the sum of all states, for a background belongs to a frame. Never negative where
        `arriving` is not: the background acts by its size.
        """
        if self.blur is not None:
            y, x = (point_spread(self.blur, n) for n in arriving.shape[-2:])
            blurred = jnp.einsum("...yx,xk->...yk", arriving, x, precision=EXACT)
            arriving = jnp.einsum("jy,...yk->...jk", y, blurred, precision=EXACT)
        return arriving if self.background is None else arriving + jnp.abs(self.background)


def intensity(
    exit_waves: Complex[Array, "*batch y x"], integration: int = 1, wide: bool = False
) -> Float[Array, "*batch ky kx"]:
    """Expected electrons per detector pixel, zero frequency in the corner.

    With `integration` f > 1 the pattern is sampled f times finer, as padding the wave f times
    does, and each pixel sums the samples within its width, those on its border by half. The finer
    pattern is computed as f² patterns shifted by fractions of a pixel: small transforms instead
    of a large one, and neighbours in the finer pattern lie in different arrays. `wide` waves fill
    a window f times larger than the pixels see.
    """
    batch = exit_waves.shape[:-2]
    waves = exit_waves.reshape(-1, *exit_waves.shape[-2:])
    every = partial(_intensity, f=integration, wide=wide)
    # On a CPU the finer patterns of a few waves stay in cache: twice as fast as all at once.
    some = lambda waves: jax.lax.map(lambda wave: every(wave[None])[0], waves, batch_size=IN_CACHE)
    few = waves.shape[0] <= 2 * IN_CACHE
    pattern = every(waves) if few else jax.lax.platform_dependent(waves, cpu=some, default=every)
    return pattern.reshape(*batch, *pattern.shape[-2:])


def _intensity(waves: Complex[Array, "waves y x"], f: int, wide: bool):
    if f == 1:
        return _power(waves)
    blocks = _folded(waves, f) if wide else waves[:, None, None]
    my, mx = blocks.shape[-2:]
    ramps = [np.exp(-2j * np.pi * np.outer(np.arange(f) / f, np.arange(n) / n)) for n in (my, mx)]
    shift = ramps[0][:, None, :, None] * ramps[1][None, :, None, :] / f
    fine = _power(blocks * jnp.asarray(shift, waves.dtype)[None])
    return _box(_box(fine, -4, -2), -3, -1)


def _folded(waves: Complex[Array, "waves Y X"], f: int) -> Complex[Array, "waves f f y x"]:
    """What each comb of samples of a wide wave's transform sees of it, in the smaller window.

    Sample f k + a of the transform of f n points is that of n points, shifted by a/f, of
    sum_q exp(-2 pi i a q/f) wave(n q + j).
    """
    for axis in (-1, -2):
        n = waves.shape[axis] // f
        cut = [jax.lax.slice_in_dim(waves, q * n, q * n + n, axis=axis) for q in range(f)]
        combs = [
            sum((_turned(part, a * q % f / f) for q, part in enumerate(cut[1:], 1)), cut[0])
            for a in range(f)
        ]
        # Combs of x lie before those of y, which come second.
        waves = jnp.stack(combs, axis=-3 if axis == -1 else -4)
    return waves


def _turned(wave, turns: float):
    """exp(-2 pi i turns) wave; the signs of two combs cost no product."""
    if turns in (0.0, 0.5):
        return wave if turns == 0 else -wave
    return wave * jnp.asarray(np.exp(-2j * np.pi * turns), wave.dtype)


def point_spread(width: Float[Array, ""], pixels: int) -> Float[Array, "pixels pixels"]:
    """What each pixel of a periodic axis gives to each, for an rms `width` in pixels.

    The discrete Gaussian exp(-w²) I_j(w²), a random walk's: unlike samples of a Gaussian's
    transform its values are positive and their variance is w², however narrow it is. Its transform
    is exp(-2 w² sin²(pi m/n)); columns sum to 1.
    """
    m = np.arange(pixels)
    transfer = jnp.exp(-(width**2) * jnp.asarray(2 * np.sin(np.pi * m / pixels) ** 2, width.dtype))
    cosines = jnp.asarray(np.cos(2 * np.pi * (np.outer(m, m) % pixels) / pixels), width.dtype)
    kernel = jnp.matmul(cosines, transfer / pixels, precision=EXACT)
    # Rounding may leave a tail below zero, on which a logarithm or a root would fail.
    return jnp.maximum(kernel, 0.0)[(m[:, None] - m[None, :]) % pixels]


@jax.custom_jvp
def _power(wave):
    """|fft(wave)|²; derived, its reverse pass would take real and imaginary parts in turn."""
    spectrum = fft(wave)
    return spectrum.real**2 + spectrum.imag**2


@_power.defjvp
def _power_derivative(primals, tangents):
    spectrum, change = fft(primals[0]), fft(tangents[0])
    return spectrum.real**2 + spectrum.imag**2, 2 * (jnp.conj(spectrum) * change).real


def bin_centred(image: Float[Array, "*shape"], factor: int, axis: int) -> Float[Array, "*binned"]:
    """Sum boxes of `factor` samples centred on every factor-th sample of a periodic axis."""
    axis = axis % image.ndim
    shape = (*image.shape[:axis], image.shape[axis] // factor, factor, *image.shape[axis + 1 :])
    return _box(image.reshape(shape), axis + 1, axis)


def _box(samples, fractions: int, axis: int):
    """Sum the samples within half a pixel of each pixel of the periodic `axis`.

    Entry j of the axis `fractions`, which is summed away, lies j/f of a pixel beyond the pixel.
    """
    factor, fractions = samples.shape[fractions], fractions % samples.ndim
    part = lambda j: jax.lax.index_in_dim(samples, j % factor, fractions, keepdims=False)
    total = part(0)
    for j in range(1, factor // 2 + 1):
        weight = 0.5 if 2 * j == factor else 1.0
        total = total + weight * (part(j) + jnp.roll(part(factor - j), 1, axis))
    return total


def annulus(
    detector: Detector, outer: float, inner: float = 0.0, center: tuple[float, float] = (0.0, 0.0)
) -> Float[Array, "ky kx"]:
    """Weights of a virtual detector between `inner` and `outer` mrad from `center` (y, x) mrad.

    1 on pixels whose centre is inside, zero frequency in the corner; `inner` 0 is a disc.
    """
    ky, kx = (np.fft.fftfreq(n, 1 / n) * detector.pixel for n in detector.shape)
    radius = np.hypot(ky[:, None] - center[0], kx[None, :] - center[1])
    return jnp.asarray((radius <= outer) & ((radius >= inner) | (inner == 0)), float)

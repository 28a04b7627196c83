"""Noise models of one pixel, and the losses they make.

A noise model is a function `(intensity, count) -> float` of one pixel; anything scalar that JAX can
differentiate will do. A loss is a function `(model, batch) -> float`, a mean over frames.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..data.counts import compare
from ..data.dataset import Batch


Noise = Callable[[Float[Array, ""], Float[Array, ""]], Float[Array, ""]]
Loss = Callable[..., Float[Array, ""]]


def poisson(background: float = 0.002) -> Noise:
    """Negative log-likelihood of counts, less that of a perfect fit: half the deviance.

    I - n - n ln((I + e)/(n + e)); `background` e (electrons per pixel) must stay far below the
    dark field's mean, or it biases like the amplitude loss.
    """

    def noise(intensity, count):
        # The difference of logarithms keeps float32 sums small near the solution.
        return intensity - count - count * jnp.log((intensity + background) / (count + background))

    return noise


def amplitude() -> Noise:
    """(sqrt(I) - sqrt(n))²/2, the published loss.

    Where less than an electron a pixel is expected it fits E[sqrt(n)] instead of sqrt(E[n]), so
    that the scattered wave comes out too weak.
    """
    return lambda intensity, count: (jnp.sqrt(intensity + 1e-9) - jnp.sqrt(count)) ** 2 / 2


def shifted_amplitude(shift: float = 0.375) -> Noise:
    """(sqrt(I + c) - sqrt(n + c))²/2 with Anscombe's c = 3/8, nearly normal for Poisson counts."""
    return lambda intensity, count: (jnp.sqrt(intensity + shift) - jnp.sqrt(count + shift)) ** 2 / 2


def truncated_amplitude(threshold: float = 0.1) -> Noise:
    """The amplitude loss, continued linearly in I where sqrt(I) < `threshold` sqrt(n).

    With eps the threshold it is (1 - eps)/2 (n - I/eps) there: value and slope are continuous, and
    the gradient stays finite at I = 0.
    """

    def noise(intensity, count):
        far = intensity >= threshold**2 * count
        safe = jnp.where(far, intensity, jnp.ones_like(intensity))
        above = (jnp.sqrt(safe + 1e-12) - jnp.sqrt(count)) ** 2 / 2
        below = (1 - threshold) / 2 * (count - intensity / threshold)
        return jnp.where(far, above, below)

    return noise


NOISES: dict[str, Callable[..., Noise]] = {
    "poisson": poisson,
    "amplitude": amplitude,
    "shifted_amplitude": shifted_amplitude,
    "truncated_amplitude": truncated_amplitude,
}


def objective(noise: Noise) -> Loss:
    """The loss of a noise model: its sum over pixels, averaged over the frames of the batch."""
    return lambda model, batch: jnp.mean(compare(noise, model(batch.index), batch.counts))


def curvature(noise: Noise) -> float:
    """Bound of d²noise/d|Z|² at the expected count, I = |Z|² = n: 4 for Poisson, 1 for amplitudes.

    Times the largest eigenvalue of the forward model's A^H A it bounds the curvature of the loss
    summed over frames, so that 1/(curvature eigenvalue) is a safe step; for the mean over frames
    it is that times their number.

    **Raises:** ValueError for a noise model that is not curved there: choose the step by hand.
    """
    bend = jax.jit(jax.vmap(jax.grad(jax.grad(lambda a, n: noise(a**2, n)))))
    counts = jnp.asarray([1.0, 4.0, 16.0, 64.0, 256.0])
    largest = float(jnp.max(bend(jnp.sqrt(counts), counts)))
    if not 0 < largest < math.inf:
        raise ValueError(
            f"`curvature`: the noise model has curvature {largest} at the expected count; a safe "
            "step follows only from a positive one. Give the step yourself."
        )
    return largest


def deviance(intensity: Float[Array, "*s"], count: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Poisson deviance 2 (I - n + n ln(n/I)) of each pixel, 0 where both vanish."""
    floor = jnp.maximum(intensity, 1e-9)
    ratio = jnp.where(count > 0, count / floor, 1.0)
    return 2 * (intensity - count + count * jnp.log(ratio))


def figures_of_merit(model, batch: Batch) -> dict[str, Float[Array, " frames"]]:
    """Of each frame: sums over pixels of the deviance, of | sqrt(I) - sqrt(n) | and of sqrt(n).

    The ratio of the last two, summed over frames, is the R-factor.
    """
    intensity = model(batch.index)
    count = batch.counts.dense(intensity.dtype)
    root = jnp.sqrt(count)
    misfit = jnp.abs(jnp.sqrt(intensity) - root)
    pixels = (1, 2)
    return {
        "deviance": jnp.sum(deviance(intensity, count), axis=pixels),
        "misfit": jnp.sum(misfit, axis=pixels),
        "amplitude": jnp.sum(root, axis=pixels),
    }

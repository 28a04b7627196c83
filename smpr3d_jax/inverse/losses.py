"""Noise models of one pixel, and the losses they make.

A noise model is a function `(intensity, count) -> float` of one pixel; anything scalar that JAX can
differentiate will do. A loss is a function `(model, batch) -> float`, a mean over frames.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from ..data.counts import compare, Events, only
from ..data.dataset import Batch


Noise = Callable[[Float[Array, ""], Float[Array, ""]], Float[Array, ""]]
Loss = Callable[..., Float[Array, ""]]
Penalty = Callable[[PyTree], Float[Array, ""]]


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
    misfit = lambda intensity, counts, mask: compare(noise, intensity, counts, mask)

    def loss(model, batch):
        # A model may know a faster way to the same mean.
        if hasattr(model, "mean"):
            return model.mean(misfit, batch.index, batch.counts, batch.mask)
        return jnp.mean(misfit(model(batch.index), batch.counts, batch.mask))

    return loss


def event_poisson(background: float = 0.002) -> Loss:
    """The loss `objective(poisson(background))`, from single electrons without a dense frame.

    The sum of I over all pixels, less that of n + n ln((I + e)/(n + e)) over those that were hit.
    It asks the model for `model.at(index, pixels)`: the totals (frames) and the intensities at
    the hits (frames hits), as `physics.sparse.pattern_at` gives them. Where counts are dense, some
    pixels masked or a model has no `at`, the same number is computed from whole frames. Totals
    cancel, so that the value (not its gradient) is rounded to 1e-7 of a frame's electrons in
    float32.
    """
    whole = objective(poisson(background))

    def loss(model, batch):
        sparse = isinstance(batch.counts, Events) and hasattr(model, "at")
        # The total of a frame is that of all pixels.
        if not sparse or batch.mask is not None:
            return whole(model, batch)
        total, hit = model.at(batch.index, batch.counts.pixels)
        n = batch.counts.multiplicity.astype(hit.dtype)
        misfit = n + n * jnp.log((hit + background) / (n + background))
        return jnp.mean(total - jnp.sum(misfit, axis=1))

    return loss


class Penalised(eqx.Module):
    """A loss of the data and a penalty of the model alone, which no batch changes."""

    data: Loss
    penalty: Penalty

    def __call__(self, model: PyTree, batch: Batch) -> Float[Array, ""]:
        return self.data(model, batch) + self.penalty(model)


def penalised(loss: Loss, penalty: Penalty, *more: Penalty) -> Penalised:
    """`loss` plus penalties `model -> scalar`, such as those of `priors`.

    With `objective(poisson())` the loss is the negative log-likelihood divided by the number of
    frames N, in natural units. A penalty w R therefore states the prior probability exp(-N w R):
    w is what one unit of R costs in each frame, and its pull does not change with the batch.

    **Arguments:** `updates.accelerated` does not know the curvature of penalties; where a weight
    is so large that the loss rises, take a smaller step.
    """

    def total(model):
        return sum((further(model) for further in more), penalty(model))

    return Penalised(loss, total if more else penalty)


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


_FEW = 10.0
"""Electrons below which the mean logarithm of Poisson counts is taken from a polynomial."""


@functools.cache
def _mean_logarithm() -> tuple[float, ...]:
    """Chebyshev coefficients of E[ln(1 + n)], n ~ Poisson(I), an entire function of I, to _FEW."""
    n = np.arange(80)
    steps = np.log(np.maximum(n, 1))

    def exact(x):
        mean = np.maximum(_FEW / 2 * (1 + x[:, None]), 1e-300)
        return np.exp(n * np.log(mean) - mean - np.cumsum(steps)) @ np.log1p(n)

    return tuple(np.polynomial.chebyshev.chebinterpolate(exact, 20).tolist())


def expected_deviance(intensity: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Mean `deviance` of counts that were drawn with means `intensity`: what noise alone allows.

    2 I (E[ln(1 + n)] - ln I) for n ~ Poisson(I), since E[n f(n)] = I E[f(n + 1)]: -2 I ln I in the
    dark, 1.16 at most (near 1.35 electrons a pixel), 1 + 1/(6 I) + ... where it is bright. A
    polynomial up to ten electrons, a series above; to 6e-5 of its value.
    """
    few = jnp.clip(intensity, 1e-30, _FEW)
    # Clenshaw's recurrence: one pass over the pixels, where summing the counts would need fifty.
    x, above, logarithm = few * (2 / _FEW) - 1, jnp.zeros_like(few), jnp.zeros_like(few)
    first, *others = _mean_logarithm()
    for coefficient in reversed(others):
        above, logarithm = logarithm, 2 * x * logarithm - above + coefficient
    logarithm = x * logarithm - above + first
    dark = 2 * jnp.minimum(intensity, _FEW) * (logarithm - jnp.log(few))
    x = 1 / jnp.maximum(intensity, _FEW)
    # Moments of (n - I)/I in the Taylor series of n ln n.
    tail = 19 / 60 + x * (9 / 10 + x * (863 / 252))
    return jnp.where(intensity < _FEW, dark, 1 + x * (1 / 6 + x * (1 / 6 + x * tail)))


def figures_of_merit(model, batch: Batch) -> dict[str, Float[Array, " frames"]]:
    """Of each frame: deviance, noise, | sqrt(I) - sqrt(n) | and sqrt(n), summed over pixels.

    Masked pixels are left out.
    "noise" is the `expected_deviance` of the model's own intensities: a true model's "deviance"
    equals it on average. The ratio of the last two sums, over frames, is the R-factor.
    """
    seen = None if batch.mask is None else batch.mask[None]
    intensity = only(model(batch.index), seen)
    count = only(batch.counts.dense(intensity.dtype), seen)
    root = jnp.sqrt(count)
    misfit = jnp.abs(jnp.sqrt(intensity) - root)
    pixels = (1, 2)
    return {
        "deviance": jnp.sum(deviance(intensity, count), axis=pixels),
        "noise": jnp.sum(expected_deviance(intensity), axis=pixels),
        "misfit": jnp.sum(misfit, axis=pixels),
        "amplitude": jnp.sum(root, axis=pixels),
    }


def summary(mean: dict[str, Any], pixels: Any) -> dict[str, Any]:
    """Deviance and noise per pixel, and the R-factor, of frames of whose figures this is the mean.

    `pixels` of a frame count; "r_factor" is the ratio of sums over all of the frames.
    """
    return {
        "deviance": mean["deviance"] / pixels,
        "noise": mean["noise"] / pixels,
        "r_factor": mean["misfit"] / mean["amplitude"],
    }

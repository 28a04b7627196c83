"""Orthonormal polynomials of the tilt over a round aperture."""

import math
from typing import overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def mode_count(order: int) -> int:
    """Number of polynomials up to the radial `order`."""
    return (order + 1) * (order + 2) // 2


@overload
def tilt_polynomials(
    order: int, points: Float[np.ndarray, "*shape 2"], cutoff: float
) -> Float[np.ndarray, "modes *shape"]: ...


@overload
def tilt_polynomials(
    order: int, points: Float[Array, "*shape 2"], cutoff: float
) -> Float[Array, "modes *shape"]: ...


def tilt_polynomials(
    order: int, points: Float[np.ndarray, "*shape 2"] | Float[Array, "*shape 2"], cutoff: float
) -> Float[np.ndarray, "modes *shape"] | Float[Array, "modes *shape"]:
    """Zernike polynomials of h/cutoff up to radial `order`, of mean square 1 over the disc.

    Real; ordered by radial order n, then azimuthal order, cosine before sine; the first is 1.
    """
    y, x = points[..., 0] / cutoff, points[..., 1] / cutoff
    square = x**2 + y**2
    turns = [(square**0, 0.0 * square)]
    for _ in range(order):
        cosine, sine = turns[-1]
        turns.append((cosine * x - sine * y, cosine * y + sine * x))
    result = []
    for n in range(order + 1):
        for m in range(n % 2, n + 1, 2):
            radial = 0.0 * square
            for k in range((n - m) // 2 + 1):
                sign = (-1) ** k * math.comb(n - k, k) * math.comb(n - 2 * k, (n - m) // 2 - k)
                radial = radial + sign * square ** ((n - m) // 2 - k)
            radial = radial * math.sqrt((n + 1) * (2 if m else 1))
            result += [turn * radial for turn in (turns[m] if m else turns[m][:1])]
    return jnp.stack(result) if isinstance(points, jax.Array) else np.stack(result)

"""How a wave moves: free space, tilt, slices.

Free propagation by dz multiplies the spectrum by exp(-i pi lambda dz k²); a specimen tilted by
theta walks sideways as it is crossed, exp(-2 pi i dz (k_y tan theta_y + k_x tan theta_x)); a slice
multiplies the wave by exp(i sigma V). All are differentiable in every number that is not static.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Complex, Float

from .fourier import convolve, phase_factor
from .grid import Grid
from .optics import interaction_parameter, wavelength
from .specimen import Slices


Scalar = float | Float[Array, ""]
Pair = tuple[float, float] | Float[Array, "2"]


def fresnel(
    grid: Grid, energy: float, distance: Scalar, tilt: Pair = (0.0, 0.0)
) -> Complex[Array, "ky kx"]:
    """Propagator over `distance` (Å) through a specimen tilted by `tilt` (y, x) in mrad.

    Its precision is that of `distance` and `tilt` where they are arrays.
    """
    given = [v for v in (distance, tilt) if isinstance(v, jax.Array)]
    dtype = jnp.result_type(*given) if given else jnp.result_type(float)
    distance, slopes = jnp.asarray(distance, dtype), jnp.tan(jnp.asarray(tilt, dtype) * 1e-3)
    factors = []
    # Parabola and tilt are sums over the axes, so that their phase factor is a product.
    for slope, k in zip(slopes, grid.frequencies(), strict=True):
        parabola = jnp.asarray(math.pi * wavelength(energy) * k**2, dtype)
        walk = slope * jnp.asarray(2 * math.pi * k, dtype)
        factors.append(phase_factor(-distance * (parabola + walk)))
    return factors[0] * factors[1]


def transmission(
    potential: Float[Array, "*batch y x"], energy: float
) -> Complex[Array, "*batch y x"]:
    """exp(i sigma V) of projected `potential` in V Å."""
    return phase_factor(interaction_parameter(energy) * potential)


def band_mask(grid: Grid, fraction: float) -> Float[Array, "ky kx"]:
    """1 inside a circle of `fraction` of the smaller Nyquist frequency, 0 outside.

    Two thirds on wave and transmission keep their product free of aliases.
    """
    ky, kx = grid.frequencies()
    nyquist = 0.5 / max(grid.sampling)
    return jnp.asarray(ky**2 + kx**2 <= (fraction * nyquist) ** 2, float)


def multislice(
    wave: Complex[Array, "*batch y x"],
    slices: Slices,
    energy: float,
    start: Scalar,
    stop: Scalar,
    tilt: Pair = (0.0, 0.0),
    band_limit: float | None = None,
) -> Complex[Array, "*batch y x"]:
    """Carry `wave` from the plane z = `start` through all slices to z = `stop` (Å).

    Planes before the first slice or behind the last are reached through free space, backwards
    where need be. `band_limit`: fraction of the Nyquist frequency kept of the wave and of each
    transmission (2/3 against aliasing; None, the default, is unitary). The wave sets the
    precision. Only the wave before each slice is stored for the gradient.

    **Raises:** ValueError for a wave that is not sampled as the slices are.
    """
    grid, real = slices.grid, jnp.finfo(wave.dtype).dtype
    if wave.shape[-2:] != grid.shape:
        raise ValueError(
            f"The wave has {wave.shape[-2:]} pixels (y, x) but the slices have {grid.shape}."
        )
    ends = [jnp.asarray(z, real) for z in (start, *slices.depths, stop)]
    gaps = jnp.stack([b - a for a, b in zip(ends, ends[1:], strict=False)])
    angle = jnp.asarray(tilt, real)
    mask = None if band_limit is None else band_mask(grid, band_limit).astype(wave.dtype)

    def move(wave, gap):
        kernel = fresnel(grid, energy, gap, angle)
        return convolve(wave, kernel if mask is None else kernel * mask)

    def cross(wave, layer):
        potential, gap = layer
        plate = transmission(potential, energy)
        plate = plate if mask is None else convolve(plate, mask)
        return move(wave, gap) * plate.reshape((1,) * (wave.ndim - 2) + grid.shape), None

    layers = slices.potential.astype(real), gaps[:-1]
    wave, _ = jax.lax.scan(jax.checkpoint(cross), wave, layers)
    return move(wave, gaps[-1])

"""What several test files share: the shared data, random arrays, finite differences."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smpr3d_jax.physics.grid import Grid
from smpr3d_jax.physics.specimen import Slices


SHARED = pathlib.Path(__file__).parents[2] / "shared" / "data"


def shared_data(*parts: str) -> pathlib.Path:
    """A path in the shared data folder; skips the test where it is absent."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"shared test data not present: {path}")
    return path


def random_complex(seed: int, shape, dtype=np.complex128):
    """Complex normal numbers."""
    rng = np.random.default_rng(seed)
    return jnp.asarray((rng.normal(size=shape) + 1j * rng.normal(size=shape)).astype(dtype))


def inner(a, b) -> complex:
    """<a, b> = sum conj(a) b over two arrays of the same shape."""
    return complex(np.vdot(np.asarray(a), np.asarray(b)))


def directional_derivative(function, at, direction, step):
    """Central difference of a real `function` of a pytree along `direction`."""
    move = lambda s: jax.tree.map(lambda a, d: a + s * d, at, direction)
    return (float(function(move(step))) - float(function(move(-step)))) / (2 * step)


def random_slices(shape, sampling, depths, strength=10.0, seed=3):
    """Smooth random projected potential of rms `strength` V Å on planes at `depths`."""
    rng = np.random.default_rng(seed)
    grid = Grid(shape, sampling)
    ky, kx = grid.frequencies()
    envelope = np.exp(-(ky**2 + kx**2) / (2 * 0.25**2))
    noise = np.fft.fft2(rng.normal(size=(len(depths), *shape))) * envelope
    potential = np.fft.ifft2(noise).real
    return Slices(jnp.asarray(strength * potential / potential.std()), tuple(depths), grid)

"""A phase image becomes the specimen that gives it."""

import jax.numpy as jnp
import numpy as np
import pytest

from smpr3d_jax.data.counts import InputError
from smpr3d_jax.inverse.rasters import Raster
from smpr3d_jax.inverse.seeds import slices_from_phase
from smpr3d_jax.physics.grid import Grid
from smpr3d_jax.physics.propagation import transmission


WHERE = Raster((24, 30), (1.0, -2.0), (0.5, 0.2), (-0.15, 0.4))
FIELD = Grid((70, 80), (0.25, 0.2))
ENERGY = 80e3


def wave(points):
    return 0.8 * np.sin(2 * np.pi * (points[..., 0] / 5 + points[..., 1] / 7))


@pytest.mark.parametrize("depths", [(0.0,), (-10.0, 0.0, 30.0)])
def test_transmission_has_the_phase(x64, depths):
    origin = (-4.0, -1.0)
    slices = slices_from_phase(
        jnp.asarray(wave(WHERE.positions())), WHERE, ENERGY, FIELD, origin, depths
    )
    assert slices.depths == depths and slices.origin == origin and slices.grid == FIELD
    total = jnp.angle(jnp.prod(transmission(slices.potential, ENERGY), axis=0))
    y, x = FIELD.coordinates()
    points = np.stack(np.broadcast_arrays(y + origin[0], x + origin[1]), -1)
    index = WHERE.index(points)
    inside = ((index > 1) & (index < np.array(WHERE.shape) - 2)).all(-1)
    outside = ((index < -2) | (index > np.array(WHERE.shape) + 1)).any(-1)
    assert inside.sum() > 1000 and outside.sum() > 100
    assert np.abs(total - wave(points))[inside].max() < 0.02
    assert not total[outside].any()


def test_points_of_the_raster_are_kept(x64):
    where = Raster((6, 8), (0.0, 0.0), (0.5, 0.0), (0.0, 0.4))
    phase = jnp.asarray(np.random.default_rng(0).normal(size=(6, 8)) * 0.1)
    slices = slices_from_phase(phase, where, ENERGY, Grid((12, 16), (0.25, 0.2)))
    found = jnp.angle(transmission(slices.potential[0], ENERGY))
    np.testing.assert_allclose(found[:12:2, :16:2], phase, atol=1e-12)


def test_refusals():
    with pytest.raises(InputError, match=r"\(24, 30\).*\(3, 4\)"):
        slices_from_phase(jnp.ones((3, 4)), WHERE, ENERGY, FIELD)
    with pytest.raises(InputError, match="at least one depth"):
        slices_from_phase(jnp.ones(WHERE.shape), WHERE, ENERGY, FIELD, depths=())

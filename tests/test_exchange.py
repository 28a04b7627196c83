"""Other packages' reconstructions as models: the same frames, there and back."""

import dataclasses

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest

import smpr3d_jax as sj
from smpr3d_jax.inverse.exchange import exchange_of, model_of

from .helpers import random_complex


def record(tilts=1, **changes):
    """A mixed object and probe on windows that reach beyond the object, in square angles."""
    rng = np.random.default_rng(0)
    y, x = np.meshgrid(np.arange(4) * 0.93, np.arange(5) * 0.71, indexing="ij")
    whole = {
        "energy": 80e3, "sampling": (0.4, 0.3), "thicknesses": np.array([12.0, 7.0, 5.0]),
        "transmission": np.exp(0.3j * rng.normal(size=(2, 3, 30, 40))), "origin": (-4.1, -4.4),
        "probes": np.asarray(random_complex(1, (2, 24, 32))),
        "positions": np.stack([y, x], axis=-1).reshape(-1, 2), "weights": np.array([0.7, 0.3]),
        "tilts": rng.normal(0, 3, (tilts, 2)), "semiangle": 25.0,
        "aberrations": {"C10": -60.0, "C12": 20.0, "phi12": 0.5},
    }  # fmt: skip
    return sj.interchange.Exchange(**(whole | changes))


@pytest.mark.parametrize("tilts", [1, 20])
@pytest.mark.parametrize("limit", [None, 0.7])
def test_the_same_frames(x64, tilts, limit):
    one = record(tilts, band_limit=limit)
    model = model_of(one, dtype=np.float64)
    truth = sj.interchange.patterns(one)
    np.testing.assert_allclose(model(jnp.arange(20)), truth, rtol=1e-9, atol=1e-9)
    again = exchange_of(model)
    np.testing.assert_allclose(sj.interchange.patterns(again), truth, rtol=1e-9, atol=1e-9)
    assert again.aberrations == pytest.approx(one.aberrations)
    np.testing.assert_allclose(again.thicknesses, [12, 7, 7])


def test_one_scan_of_a_series(x64):
    model = model_of(record(), dtype=np.float64)
    series = jnp.asarray([0] * 12 + [1] * 8, jnp.int32)
    assert model.illumination is not None
    modes = model.illumination.modes
    both = jnp.concatenate([modes, 2 * modes])
    model = eqx.tree_at(lambda m: (m.scan.series, m.illumination.modes), model, (series, both))
    lens = sj.focal_series(80e3, 25.0, [60.0, 10.0])
    model = dataclasses.replace(model, optics=lens, dose=jnp.ones(2))
    second = exchange_of(model, 1)
    assert len(second) == 8
    np.testing.assert_allclose(
        sj.interchange.patterns(second), model(jnp.arange(12, 20)), rtol=1e-9, atol=1e-9
    )


def test_what_cannot_be():
    with pytest.raises(ValueError, match="no semi-angle; give `semiangle`"):
        model_of(record(semiangle=None))
    with pytest.raises(ValueError, match="mrad .* are not square"):
        model_of(record(sampling=(0.4, 0.4)))
    model = model_of(record(semiangle=None), 25.0)
    with pytest.raises(ValueError, match="needs `ObjectSlices` lit by"):
        exchange_of(dataclasses.replace(model, illumination=None))
    varied = sj.Illumination(
        jnp.ones((1, 2, 24, 32), complex), jnp.ones((1, 24, 32), complex), jnp.ones((20, 1))
    )
    with pytest.raises(ValueError, match="changes from frame to frame"):
        exchange_of(dataclasses.replace(model, illumination=varied))

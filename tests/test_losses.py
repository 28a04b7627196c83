"""Noise models against closed forms, and the losses they make."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array, Complex, Float
from scipy.stats import poisson as poisson_law

from smpr3d_jax.data.counts import Events, events_from_frames, Frames
from smpr3d_jax.data.dataset import Batch
from smpr3d_jax.inverse.losses import (
    amplitude,
    curvature,
    deviance,
    event_poisson,
    expected_deviance,
    figures_of_merit,
    NOISES,
    objective,
    penalised,
    poisson,
    shifted_amplitude,
    truncated_amplitude,
)
from smpr3d_jax.physics.detector import Detector
from smpr3d_jax.physics.sparse import pattern_at

from .helpers import random_complex


PAIRS = [(0.0, 0.0), (0.3, 0.0), (0.3, 2.0), (7.0, 7.0), (900.0, 1000.0)]


class Table(eqx.Module):
    """A model whose frames are its only leaf."""

    frames: Float[Array, "frames ky kx"]

    def __call__(self, index):
        return self.frames[index]


def table(seed=0, frames=5, dtype=float):
    """A model, and counts that it might have drawn, as the bytes a camera writes."""
    rng = np.random.default_rng(seed)
    intensity = rng.gamma(0.4, 3.0, (frames, 6, 4))
    counts = Frames(jnp.asarray(rng.poisson(intensity).astype(np.uint8)))
    return Table(jnp.asarray(intensity, dtype)), counts


def lifted(noise):
    """The noise model and its slope over a list of pixels."""
    return jax.jit(jax.vmap(jax.value_and_grad(noise)))


def test_values(x64):
    i, n = jnp.asarray(PAIRS).T
    e, c = 0.002, 0.375
    truth = i - n - n * np.log((i + e) / (n + e))
    np.testing.assert_allclose(lifted(poisson(e))(i, n)[0], truth, atol=1e-9)
    truth = (np.sqrt(i + c) - np.sqrt(n + c)) ** 2 / 2
    np.testing.assert_allclose(lifted(shifted_amplitude(c))(i, n)[0], truth, atol=1e-12)
    truth = (np.sqrt(i) - np.sqrt(n)) ** 2 / 2
    for noise in (amplitude(), truncated_amplitude(0.1)):
        np.testing.assert_allclose(lifted(noise)(i, n)[0], truth, atol=1e-4)


@pytest.mark.parametrize("name", NOISES)
def test_least_at_the_count_and_finite_slope_in_the_dark(x64, name):
    noise = lifted(NOISES[name]())
    n = jnp.asarray([0.0, 1.0, 5.0, 300.0])
    at = noise(n, n)[0]
    np.testing.assert_allclose(at, 0.0, atol=1e-8)
    assert np.all(noise(n * 1.05 + 0.01, n)[0] > at)
    assert np.all(noise(n * 0.95, n)[0][1:] > at[1:])
    for dtype in (np.float32, np.float64):
        count = n.astype(dtype)
        slope = noise(jnp.zeros_like(count), count)[1]
        assert slope.dtype == dtype
        assert np.all(np.isfinite(slope))


def test_poisson_is_half_the_deviance_without_background(x64):
    model, counts = table()
    n = counts.dense()
    misfit = lifted(poisson(1e-9))(model.frames.ravel(), n.ravel())[0]
    np.testing.assert_allclose(2 * misfit, deviance(model.frames, n).ravel(), atol=1e-6)


def test_truncated_amplitude_is_continued_smoothly(x64):
    eps, n = 0.1, jnp.asarray([0.0, 1.0, 40.0])
    noise, step = lifted(truncated_amplitude(eps)), 1e-7
    below, above = (noise(eps**2 * n * (1 + sign * step), n) for sign in (-1, 1))
    np.testing.assert_allclose(below[0], above[0], atol=1e-5)
    np.testing.assert_allclose(below[1], above[1], rtol=1e-6)
    dark = noise(jnp.zeros_like(n), n)[1]
    np.testing.assert_allclose(dark, [0.5, (1 - 1 / eps) / 2, (1 - 1 / eps) / 2])


@pytest.mark.parametrize(
    ("noise", "expected"),
    [(poisson(), 4), (amplitude(), 1), (truncated_amplitude(), 1), (shifted_amplitude(), 1)],
)
def test_curvature(noise, expected):
    found = curvature(noise)
    assert found <= expected + 1e-4
    assert found == pytest.approx(expected, rel=5e-3)


def test_curvature_bounds_that_of_the_shifted_amplitude_everywhere(x64):
    noise = shifted_amplitude()
    bend = jax.jit(jax.vmap(jax.grad(jax.grad(lambda a, n: noise(a**2, n)))))
    a, n = (v.ravel() for v in jnp.meshgrid(jnp.linspace(0, 9, 91), jnp.arange(50.0)))
    assert float(jnp.max(bend(a, n))) <= 1.0


def test_curvature_refuses_what_gives_no_step():
    with pytest.raises(ValueError, match="Give the step yourself"):
        curvature(lambda intensity, count: -intensity * count)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_deviance(x64, dtype):
    i, n = jnp.asarray([0.0, 2.0, 3.0, 5.0], dtype), jnp.asarray([0.0, 0.0, 3.0, 8.0], dtype)
    found = deviance(i, n)
    assert found.dtype == dtype
    truth = [0, 4, 0, 2 * (5 - 8 + 8 * np.log(8 / 5))]
    np.testing.assert_allclose(found, truth, rtol=1e-5, atol=1e-6)


def test_deviance_of_a_true_model_is_one_a_pixel(x64):
    rng = np.random.default_rng(1)
    mean = np.full(20000, 30.0)
    found = deviance(jnp.asarray(mean), jnp.asarray(rng.poisson(mean).astype(float)))
    assert float(jnp.mean(found)) == pytest.approx(1.0, abs=0.03)


def summed_deviance(mean):
    """E[2 (I - n + n ln(n/I))] by brute force."""
    n = np.arange(int(mean + 40 * np.sqrt(mean) + 60))
    term = 2 * (mean - n + n * np.log(np.maximum(n, 1) / mean))
    return np.sum(poisson_law.pmf(n, mean) * term)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_expected_deviance_equals_the_sum_over_all_counts(x64, dtype):
    mean = np.concatenate([np.geomspace(1e-6, 1e4, 90), [9.99, 10.0, 10.01]])
    found = jax.jit(expected_deviance)(jnp.asarray(mean.reshape(31, 3), dtype))
    assert found.dtype == dtype
    truth = np.array([summed_deviance(m) for m in mean]).reshape(31, 3)
    np.testing.assert_allclose(found, truth, rtol=1e-4)
    slope = jax.jit(jax.grad(lambda i: jnp.sum(expected_deviance(i))))
    assert np.all(np.isfinite(slope(jnp.asarray([0.0, 3.0, 1e6], dtype))))


def test_expected_deviance_where_nothing_or_everything_arrives():
    np.testing.assert_array_equal(expected_deviance(jnp.zeros((2, 3))), 0)
    np.testing.assert_allclose(expected_deviance(jnp.asarray([1e8])), 1, rtol=1e-6)


def heavy_tailed(intensity, count):
    """A noise model that a user might write."""
    return jnp.log1p((jnp.sqrt(intensity + 1e-6) - jnp.sqrt(count)) ** 2)


@pytest.mark.parametrize(
    ("noise", "dtype"),
    [(poisson(), np.float32), (heavy_tailed, np.float32), (poisson(), np.float64)],
)
def test_objective_is_the_mean_over_frames_dense_or_sparse(x64, noise, dtype):
    model, counts = table(dtype=dtype)
    index = jnp.asarray([3, 0, 4], jnp.int32)
    batches = Batch(counts[index], index), Batch(events_from_frames(counts)[index], index)
    pixels = model.frames[index].ravel(), counts[index].dense(dtype).ravel()
    expected, slopes = lifted(noise)(*pixels)[0].sum(), []
    slope_of = jax.jit(jax.value_and_grad(objective(noise)))
    for batch in batches:
        value, slope = slope_of(model, batch)
        assert value.dtype == dtype
        np.testing.assert_allclose(value, expected / 3, rtol=1e-5)
        slopes.append(slope.frames)
    np.testing.assert_allclose(slopes[0], slopes[1], rtol=1e-4, atol=1e-6)


def darkness(model):
    """A prior that a user might state."""
    return jnp.mean(model.frames**2)


def test_a_penalty_is_added_to_the_loss_of_any_batch(x64):
    model, counts = table()
    data = objective(poisson())
    loss = penalised(data, darkness, lambda m: 0.5 * darkness(m))
    assert loss.data is data
    np.testing.assert_allclose(loss.penalty(model), 1.5 * darkness(model))
    slope_of = jax.jit(jax.grad(lambda m, b: loss(m, b)))
    for index in (jnp.asarray([0, 3], jnp.int32), jnp.asarray([4], jnp.int32)):
        batch = Batch(counts[index], index)
        np.testing.assert_allclose(loss(model, batch), data(model, batch) + 1.5 * darkness(model))
        expected = jax.grad(data)(model, batch).frames + 3 * model.frames / model.frames.size
        np.testing.assert_allclose(slope_of(model, batch).frames, expected, rtol=1e-9)
    assert penalised(data, darkness).penalty is darkness


class Far(eqx.Module):
    """Waves seen by a camera: what hits it can be asked of all pixels or of some."""

    waves: Complex[Array, "frames states y x"]
    detector: Detector

    def __call__(self, index):
        return jnp.sum(self.detector(self.waves[index]), axis=1)

    def at(self, index, pixels):
        camera = self.detector
        return pattern_at(self.waves[index], pixels, camera.integration, camera.offset)


def far(electrons, dtype: Any, shape=(12, 10), frames=5, states=2):
    """A model of `electrons` a frame, and counts that a slightly other one might have drawn."""
    detector = Detector(shape, 1.0, 2, (0.2, -0.4))
    y, x = np.mgrid[: shape[0], : shape[1]]
    spot = np.exp(-((y - shape[0] / 2) ** 2 + (x - shape[1] / 2) ** 2) / 12)
    waves = spot * (1 + 0.3 * np.asarray(random_complex(1, (frames, states, *shape))))
    waves = waves * np.sqrt(electrons / np.sum(np.abs(waves) ** 2, (1, 2, 3), keepdims=True))
    expected = jnp.sum(detector(jnp.asarray(waves, np.complex64)), axis=1)
    drawn = np.random.default_rng(6).poisson(np.asarray(expected))
    waves = waves * (1 + 0.1 * np.asarray(random_complex(2, waves.shape)))
    return Far(jnp.asarray(waves, dtype), detector), Frames(jnp.asarray(drawn, jnp.int32))


@pytest.mark.parametrize(
    ("electrons", "dtype", "tolerance"),
    [(6.0, np.complex128, 1e-12), (40.0, np.complex64, 1e-5), (3000.0, np.complex64, 1e-5)],
)
def test_events_and_frames_have_one_likelihood(x64, electrons, dtype, tolerance):
    model, counts = far(electrons, dtype)
    index, events = jnp.asarray([3, 0, 4], jnp.int32), events_from_frames(counts)
    assert int(events.multiplicity.min()) == 0, "some frames are padded"
    truth = jax.jit(jax.value_and_grad(objective(poisson(0.01))))(
        model, Batch(counts[index], index)
    )
    found = jax.jit(jax.value_and_grad(event_poisson(0.01)))(model, Batch(events[index], index))
    assert found[0].dtype == truth[0].dtype
    np.testing.assert_allclose(found[0], truth[0], rtol=tolerance)
    error = jnp.linalg.norm(found[1].waves - truth[1].waves)
    assert float(error) < tolerance * float(jnp.linalg.norm(truth[1].waves))


def test_padding_and_empty_frames_count_nothing(x64):
    model, counts = far(6.0, np.complex128)
    empty = eqx.tree_at(lambda m: m.waves, model, model.waves.at[1].set(0))
    counts = Frames(jnp.asarray(counts.values).at[2].set(0))
    events, index = events_from_frames(counts), jnp.arange(5, dtype=jnp.int32)
    pad = lambda a: jnp.pad(a, ((0, 0), (0, 7)))
    longer = Events(pad(events.pixels), pad(events.multiplicity), events.shape)
    slope_of = jax.jit(jax.value_and_grad(event_poisson()))
    short, long = (slope_of(empty, Batch(kept, index)) for kept in (events, longer))
    np.testing.assert_allclose(long[0], short[0], rtol=1e-12)
    np.testing.assert_allclose(long[1].waves, short[1].waves, atol=1e-12)
    assert np.all(np.isfinite(short[1].waves))
    # Without electrons the misfit is all that was expected.
    alone = jax.jit(event_poisson())(model, Batch(longer[2:3], index[2:3]))
    np.testing.assert_allclose(alone, jnp.sum(jnp.abs(model.waves[2]) ** 2), rtol=1e-12)


@pytest.mark.parametrize(("special", "sparse"), [(False, True), (True, False)])
def test_events_need_no_special_model_nor_frames_a_special_loss(x64, special, sparse):
    model, counts = far(40.0, np.complex128) if special else table()
    counts = events_from_frames(counts) if sparse else counts
    index = jnp.asarray([3, 0], jnp.int32)
    batch = Batch(counts[index], index)
    values = [jax.jit(loss)(model, batch) for loss in (event_poisson(), objective(poisson()))]
    assert values[0] == values[1]


@pytest.mark.parametrize("sparse", [False, True])
def test_figures_of_merit_of_each_frame(x64, sparse):
    model, counts = table()
    index = jnp.asarray([1, 2], jnp.int32)
    kept = events_from_frames(counts) if sparse else counts
    found = jax.jit(figures_of_merit)(model, Batch(kept[index], index))
    i, n = np.asarray(model.frames[index]), np.asarray(counts.dense()[index])
    misfit = np.abs(np.sqrt(i) - np.sqrt(n)).sum((1, 2))
    np.testing.assert_allclose(found["misfit"], misfit)
    np.testing.assert_allclose(found["amplitude"], np.sqrt(n).sum((1, 2)))
    truth = deviance(jnp.asarray(i), jnp.asarray(n)).sum((1, 2))
    np.testing.assert_allclose(found["deviance"], truth)
    noise = np.array([[summed_deviance(mean) for mean in frame.ravel()] for frame in i]).sum(1)
    np.testing.assert_allclose(found["noise"], noise, rtol=1e-4)

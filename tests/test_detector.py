"""What a camera adds to the electrons that arrive: its point spread and a background."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import ive

from smpr3d_jax.physics.detector import Detector, point_spread

from .helpers import directional_derivative


SHAPE = (18, 25)


def arriving(frames=2, dtype=float):
    """A bright disc on almost nothing, as in a diffraction pattern."""
    rng = np.random.default_rng(4)
    y, x = (np.fft.fftfreq(n, 1 / n) for n in SHAPE)
    disc = np.hypot(y[:, None] - 1, x[None, :] + 2) < 5
    return jnp.asarray(50 * disc * rng.uniform(0.5, 1, (frames, *SHAPE)) + 1e-9, dtype)


def camera(blur=None, background=None):
    leaf = lambda value: None if value is None else jnp.asarray(value, float)
    return Detector(SHAPE, 2.0, 1, background=leaf(background), blur=leaf(blur))


def test_a_perfect_camera_hands_back_what_arrives():
    frames = arriving()
    assert camera().readout(frames) is frames


@pytest.mark.parametrize("pixels", [7, 18, 25])
@pytest.mark.parametrize("width", [0.0, 0.2, 0.6, 1.5])
def test_point_spread_is_the_discrete_gaussian(x64, width, pixels):
    """exp(-w²) I_j(w²), wrapped round the axis; its variance is w² where nothing wraps."""
    found = np.asarray(point_spread(jnp.asarray(width), pixels))
    j = np.arange(-60, 61)
    values = ive(np.abs(j), width**2)
    expected = np.zeros(pixels)
    np.add.at(expected, j % pixels, values)
    np.testing.assert_allclose(found[:, 0], expected, atol=1e-15)
    np.testing.assert_allclose(found.sum(axis=0), 1, rtol=1e-14)
    for column in range(pixels):
        np.testing.assert_array_equal(found[:, column], np.roll(found[:, 0], column))
    assert np.sum(values * j**2) == pytest.approx(width**2, abs=1e-12)


@pytest.mark.parametrize("width", [0.1, 0.3, 0.7, 3.0])
def test_no_pixel_falls_below_zero(width):
    """Where a Gaussian cut off in the frequencies would swing, in single precision too."""
    blurred = camera(blur=width).readout(arriving(dtype=jnp.float32))
    assert blurred.dtype == jnp.float32
    assert float(jnp.min(blurred)) >= 0


@pytest.mark.parametrize("width", [0.3, 0.6])
def test_blur_keeps_electrons_and_their_centre(x64, width):
    frames = arriving()
    blurred = camera(blur=width).readout(frames)
    np.testing.assert_allclose(blurred.sum((1, 2)), frames.sum((1, 2)), rtol=1e-13)
    y, x = (np.fft.fftfreq(n, 1 / n) ** 2 for n in SHAPE)
    for squares in (y[:, None], x[None, :]):
        before, after = (
            np.sum(np.asarray(image) * squares, (1, 2)) / np.sum(np.asarray(image), (1, 2))
            for image in (frames, blurred)
        )
        # The tails that walk round the far edge are all that is missing.
        np.testing.assert_allclose(after - before, width**2, rtol=1e-3)


def test_two_blurs_add_in_square(x64):
    twice = camera(blur=0.4).readout(camera(blur=0.9).readout(arriving()))
    once = camera(blur=np.hypot(0.4, 0.9)).readout(arriving())
    np.testing.assert_allclose(twice, once, atol=1e-12)


def test_the_sign_of_a_width_means_nothing(x64):
    frames = arriving()
    np.testing.assert_array_equal(
        camera(blur=-0.5).readout(frames), camera(blur=0.5).readout(frames)
    )


def test_background_is_added_to_what_the_camera_blurred(x64):
    frames = arriving()
    both = camera(blur=0.8, background=0.25).readout(frames)
    np.testing.assert_array_equal(both, camera(blur=0.8).readout(frames) + 0.25)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_any_number_of_frames(x64, batch):
    frames = jnp.broadcast_to(arriving(1)[0], (*batch, *SHAPE))
    whole = camera(0.7, 0.1)
    found = whole.readout(frames)
    assert found.shape == frames.shape
    np.testing.assert_allclose(found.reshape(-1, *SHAPE)[-1], whole.readout(arriving(1))[0])


@pytest.mark.parametrize("name", ["blur", "background"])
def test_gradients_of_the_readout(x64, name):
    frames, whole = arriving(), camera(0.7, 0.1)
    counts = jnp.asarray(np.random.default_rng(0).poisson(frames), float)

    def loss(value):
        seen = eqx.tree_at(lambda c: getattr(c, name), whole, value).readout(frames)
        return jnp.sum(seen - counts * jnp.log(seen + 0.01))

    at = getattr(whole, name)
    expected = directional_derivative(loss, at, jnp.asarray(1.0), 1e-6)
    assert float(jax.grad(loss)(at)) == pytest.approx(expected, rel=1e-6)
    arrived = jax.grad(lambda f: jnp.sum(whole.readout(f) ** 2))(frames)
    assert arrived.shape == frames.shape


@pytest.mark.parametrize("name", ["blur", "background"])
def test_a_readout_recovers_its_own_parameters(x64, name):
    """Newton's steps on the Poisson loss from a value half as large."""
    frames, truth = arriving(), camera(0.7, 0.3)
    counts = truth.readout(frames)

    def loss(value):
        seen = eqx.tree_at(lambda c: getattr(c, name), truth, value).readout(frames)
        return jnp.sum(seen - counts * jnp.log(seen))

    step = jax.jit(lambda value: jax.grad(loss)(value) / jnp.abs(jax.hessian(loss)(value)))
    value = 0.5 * getattr(truth, name)
    for _ in range(12):
        value = value - step(value)
    assert float(value) == pytest.approx(float(getattr(truth, name)), rel=1e-6)

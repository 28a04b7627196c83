"""Intensity at hits alone against the whole pattern: values, derivatives, memory."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smpr3d_jax.physics.detector import Detector
from smpr3d_jax.physics.sparse import costs, METHODS, pattern_at

from .helpers import directional_derivative, inner, random_complex


SHAPE, FRAMES = (10, 14), 3
NONE, SOME = (0.0, 0.0), (0.3, -0.2)
KINDS = [(1, 1, NONE), (1, 3, SOME), (2, 3, SOME), (3, 2, SOME), (4, 1, NONE)]
"""Integration, states, offset."""


def sample(states=1, dtype: Any = np.complex128, shape=SHAPE, frames=FRAMES, hits=9):
    """Waves, hit pixels of which the last are padding, and a slope for each number found there."""
    rng = np.random.default_rng(4)
    pixels = np.stack([rng.permutation(shape[0] * shape[1])[:hits] for _ in range(frames)])
    pixels[0, :4] = [0, shape[1] - 1, (shape[0] - 1) * shape[1], shape[0] * shape[1] - 1]
    pixels[1, -3:] = 0
    real = np.zeros(0, dtype).real.dtype
    slopes = rng.normal(size=frames).astype(real), rng.normal(size=(frames, hits)).astype(real)
    waves = random_complex(7, (frames, states, *shape), dtype)
    return waves, jnp.asarray(pixels, jnp.int32), tuple(map(jnp.asarray, slopes))


def look_up(waves, pixels, integration, offset):
    """The plain way."""
    detector = Detector(waves.shape[2:], 1.0, integration, offset)
    flat = jnp.sum(detector(waves), axis=1).reshape(waves.shape[0], -1)
    return jnp.sum(flat, axis=1), jnp.take_along_axis(flat, pixels, axis=1)


def pulled(way, slopes):
    """A real number made of what `way` answers, and what it answers."""

    def function(waves):
        total, hit = way(waves)
        return jnp.sum(slopes[0] * total) + jnp.sum(slopes[1] * hit), (total, hit)

    return function


@cache
def plain(integration, states, offset, dtype):
    """Totals, hits and gradient of the plain way."""
    waves, pixels, slopes = sample(states, dtype)
    way = pulled(lambda w: look_up(w, pixels, integration, offset), slopes)
    (_, found), gradient = jax.jit(jax.value_and_grad(way, has_aux=True))(waves)
    return *found, gradient


def difference(method, integration, states, offset, dtype):
    """Relative differences from the plain way: of totals, of hits, of the gradient."""
    waves, pixels, slopes = sample(states, dtype)
    way = pulled(lambda w: pattern_at(w, pixels, integration, offset, method), slopes)
    (_, found), gradient = jax.jit(jax.value_and_grad(way, has_aux=True))(waves)
    pairs = list(zip((*found, gradient), plain(integration, states, offset, dtype), strict=True))
    assert all(a.dtype == b.dtype for a, b in pairs)
    return [float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in pairs]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("integration", "states", "offset"), KINDS)
def test_the_same_as_the_whole_pattern(x64, method, integration, states, offset):
    assert max(difference(method, integration, states, offset, np.complex128)) < 1e-12


@pytest.mark.parametrize("method", METHODS)
def test_the_same_in_single_precision(method):
    assert max(difference(method, 2, 3, SOME, np.complex64)) < 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_derivatives_are_those_of_finite_differences(x64, method):
    waves, pixels, slopes = sample(2)
    function = lambda w: pulled(lambda w: pattern_at(w, pixels, 2, SOME, method), slopes)(w)[0]
    both = jax.jit(jax.value_and_grad(function))
    direction = random_complex(8, waves.shape)
    truth = directional_derivative(lambda w: both(w)[0], waves, direction, 1e-4)
    gradient = both(waves)[1]
    assert inner(jnp.conj(gradient), direction).real == pytest.approx(truth, rel=1e-9)
    forward = jax.jit(lambda w, d: jax.jvp(function, (w,), (d,))[1])(waves, direction)
    assert float(forward) == pytest.approx(truth, rel=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_frames_that_are_taken_together(x64, method):
    waves, pixels, _ = sample(3)
    one = lambda w, p: pattern_at(w[None], p[None], 2, SOME, method)
    total, hit = jax.jit(jax.vmap(one))(waves, pixels)
    truth = plain(2, 3, SOME, np.complex128)
    np.testing.assert_allclose(total[:, 0], truth[0])
    np.testing.assert_allclose(hit[:, 0], truth[1])


def test_a_tilted_wave_falls_on_one_pixel(x64):
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    turns = (3 + SOME[0]) * y / SHAPE[0] + (5 + SOME[1]) * x / SHAPE[1]
    wave = jnp.asarray(np.exp(2j * np.pi * turns))[None, None]
    pixels = jnp.asarray([[3 * SHAPE[1] + 5, 4 * SHAPE[1] + 5]], jnp.int32)
    for method in METHODS:
        offset = (-SOME[0], -SOME[1])
        total, hit = pattern_at(wave, pixels, 1, offset, method)
        np.testing.assert_allclose(total, [140.0])
        np.testing.assert_allclose(hit, [[140.0, 0.0]], atol=1e-10)


@pytest.mark.parametrize(
    ("hits", "method"), [(4, "dft"), (25, "lines"), (150, "fft"), (900, "pattern")]
)
def test_the_cheapest_method_follows_from_the_number_of_hits(hits, method):
    price = costs((50, 50), hits, 2)
    assert min(price, key=lambda name: price[name]) == method
    assert set(price) == set(METHODS)


def test_auto_is_the_cheapest(x64):
    waves, pixels, _ = sample()
    text = lambda method: jax.jit(lambda w: pattern_at(w, pixels, 2, NONE, method)).lower(waves)
    price = costs(SHAPE, pixels.shape[1], 2)
    best = min(METHODS, key=lambda name: price[name])
    assert text("auto").as_text() == text(best).as_text()
    assert text("auto").as_text() != text(max(METHODS, key=lambda name: price[name])).as_text()


def test_refuses_what_it_does_not_know():
    waves, pixels, _ = sample(dtype=np.complex64)
    with pytest.raises(ValueError, match="no method is called 'nufft'.*auto, pattern, fft"):
        pattern_at(waves, pixels, 2, NONE, "nufft")
    with pytest.raises(ValueError, match="integration 0"):
        pattern_at(waves, pixels, 0)


def memory(method, shape, frames, hits, integration=2):
    """Bytes that value and gradient need beside what goes in and comes out."""
    waves = jax.ShapeDtypeStruct((frames, 1, *shape), jnp.complex64)
    pixels = jax.ShapeDtypeStruct((frames, hits), jnp.int32)

    def loss(waves, pixels):
        total, hit = pattern_at(waves, pixels, integration, NONE, method)
        return jnp.sum(total) - jnp.sum(jnp.log(hit + 0.002))

    compiled = jax.jit(jax.value_and_grad(loss)).lower(waves, pixels).compile()
    assert (analysis := compiled.memory_analysis()) is not None
    return analysis.temp_size_in_bytes


def test_memory_grows_with_hits_and_not_with_the_detector():
    frames, shape = 256, (24, 32)
    few, many = (memory("dft", shape, frames, hits) for hits in (20, 80))
    assert 3 < many / few < 5
    assert many < 2 * frames * 80 * 9 * 8
    larger = memory("dft", (48, 64), frames, 80)
    assert larger - many < frames * 8 * 3 * 24 * 32 / 8, (
        "an eighth of what the waves themselves grow"
    )


@pytest.mark.parametrize("method", ["pattern", "fft", "lines"])
def test_one_finer_pattern_at_a_time(method):
    frames, hits, fine = 256, 20, 4 * 8 * 24 * 32
    kept = 0 if method == "pattern" else frames * hits * 9 * 8
    assert memory(method, (24, 32), frames, hits) < kept + 10 * fine < frames * fine / 10


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("offset", [NONE, SOME])
def test_waves_of_the_wider_window(x64, method, offset):
    camera = Detector((6, 10), 1.0, 2, offset)
    waves = random_complex(11, (3, 2, 12, 20))
    pixels = jnp.asarray(np.random.default_rng(4).integers(0, 60, (3, 7)), jnp.int32)
    whole = jnp.sum(camera(waves), axis=1).reshape(3, -1)
    total, hit = pattern_at(waves, pixels, 2, offset, method, shape=camera.shape)
    np.testing.assert_allclose(total, jnp.sum(whole, axis=1), rtol=1e-12)
    np.testing.assert_allclose(hit, jnp.take_along_axis(whole, pixels, axis=1), rtol=1e-10)

"""Sparse equals dense, whatever is done to the counts."""

import itertools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from smpr3d_jax.data.counts import (
    compare,
    crop,
    Events,
    events_from_csr,
    events_from_frames,
    Frames,
    InputError,
    join,
    to_corner,
)


FRAMES, SHAPE = 7, (6, 9)


def some_frames(seed=0, frames=FRAMES, shape=SHAPE, mean=0.4, dtype: Any = np.uint8):
    values = np.random.default_rng(seed).poisson(mean, (frames, *shape)).astype(dtype)
    values[0, 0, 0], values[1], values[2, -1, -1] = 3, 0, 5
    return Frames(jnp.asarray(values))


def poisson(intensity, count):
    return intensity - count * jnp.log(intensity)


def amplitude(intensity, count):
    return (jnp.sqrt(intensity) - jnp.sqrt(count)) ** 2


def own(intensity, count):
    return jnp.log1p(jnp.abs(intensity - count)) + 0.1 * intensity


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float32])
def test_frames_keep_their_type(dtype):
    frames = some_frames(dtype=dtype)
    assert frames.values.dtype == dtype
    assert frames.dense().dtype == jnp.zeros(0).dtype
    assert frames.dense(jnp.float16).dtype == jnp.float16
    assert len(frames) == FRAMES
    assert frames.frame_shape == SHAPE
    np.testing.assert_array_equal(frames.total(), np.asarray(frames.values).sum((1, 2)))


def test_total_of_many_small_counts_does_not_wrap():
    frames = Frames(jnp.full((2, 30, 40), 255, jnp.uint8))
    np.testing.assert_array_equal(frames.total(), [306000, 306000])
    np.testing.assert_array_equal(events_from_frames(frames).total(), [306000, 306000])


def test_events_are_the_same_electrons():
    frames = some_frames()
    events = events_from_frames(frames)
    assert events.multiplicity.dtype == jnp.uint8
    assert (len(events), events.frame_shape) == (FRAMES, SHAPE)
    np.testing.assert_array_equal(events.dense(), frames.dense())
    np.testing.assert_array_equal(events.dense(jnp.uint8), frames.values)
    np.testing.assert_array_equal(events.total(), frames.total())
    padded = np.asarray(events.multiplicity) == 0
    assert padded.any() and not np.asarray(events.pixels)[padded].any()


@pytest.mark.parametrize("index", [np.array([3, 0, 3]), jnp.array([6]), slice(1, 5, 2)])
def test_indexing_keeps_the_kind(index):
    frames = some_frames()
    events = events_from_frames(frames)
    expected = np.asarray(frames.values)[index]
    np.testing.assert_array_equal(frames[index].values, expected)
    assert isinstance(events[index], Events)
    np.testing.assert_array_equal(events[index].dense(), expected)


def test_indexing_inside_jit_and_refusal_of_a_scalar():
    frames = some_frames()
    for counts in (frames, events_from_frames(frames)):
        decode = eqx.filter_jit(lambda c, i: c[i].dense())
        np.testing.assert_array_equal(decode(counts, jnp.array([4, 2])), frames.values[4:1:-2])
        with pytest.raises((ValueError, jaxtyping.TypeCheckError)):
            counts[jnp.asarray(3)]


@pytest.mark.parametrize("noise", [poisson, amplitude, own])
def test_compare_sparse_equals_dense(x64, noise):
    frames = some_frames()
    events = events_from_frames(frames)
    rng = np.random.default_rng(1)
    intensity = jnp.asarray(rng.uniform(0.1, 2.0, (FRAMES, *SHAPE)))
    dense = compare(noise, intensity, frames)
    direct = noise(intensity, frames.dense()).sum((1, 2))
    np.testing.assert_allclose(dense, direct, rtol=1e-12)
    np.testing.assert_allclose(compare(noise, intensity, events), dense, rtol=1e-10)
    gradient = lambda counts: jax.grad(lambda i: compare(noise, i, counts).sum())(intensity)
    np.testing.assert_allclose(gradient(events), gradient(frames), rtol=1e-10, atol=1e-10)


def test_padding_counts_nothing():
    events = events_from_frames(some_frames())
    pad = lambda a: jnp.pad(a, ((0, 0), (0, 50)))
    longer = Events(pad(events.pixels), pad(events.multiplicity), events.shape)
    intensity = jnp.asarray(np.random.default_rng(1).uniform(0.1, 2, (FRAMES, *SHAPE)), jnp.float32)
    at_padding = jax.jit(lambda i, c: compare(own, i, c))
    np.testing.assert_allclose(at_padding(intensity, longer), at_padding(intensity, events), 1e-6)
    np.testing.assert_array_equal(longer.dense(), events.dense())
    nothing = Events(longer.pixels, jnp.zeros_like(longer.multiplicity), longer.shape)
    zeros = Frames(jnp.zeros((FRAMES, *SHAPE), jnp.uint8))
    np.testing.assert_allclose(at_padding(intensity, nothing), at_padding(intensity, zeros), 1e-6)


def test_events_from_csr_merges_repeated_pixels():
    indptr, pixels = np.array([0, 4, 4, 6]), np.array([7, 2, 7, 7, 53, 0], np.uint32)
    events = events_from_csr(indptr, pixels, SHAPE)
    assert events.pixels.dtype == jnp.int32
    expected = np.zeros((3, 54))
    expected[0, [2, 7]], expected[2, [0, 53]] = [1, 3], 1
    np.testing.assert_array_equal(events.dense().reshape(3, -1), expected)
    assert events.pixels.shape == (3, 2)
    weighted = events_from_csr(indptr, pixels, SHAPE, np.array([0, 300, 1, 1, 2, 2]))
    assert weighted.multiplicity.dtype == jnp.uint16
    expected[0, [2, 7]], expected[2] = [300, 2], 2 * expected[2]
    np.testing.assert_array_equal(weighted.dense().reshape(3, -1), expected)


def test_events_without_any():
    events = events_from_csr(np.zeros(4, int), np.zeros(0, int), SHAPE)
    np.testing.assert_array_equal(events.dense(), np.zeros((3, *SHAPE)))
    assert events_from_csr(np.zeros(1, int), np.zeros(0, int), SHAPE).dense().shape == (0, *SHAPE)


@pytest.mark.parametrize("pixel", [54, -1])
def test_event_outside_the_frame(pixel):
    with pytest.raises(InputError, match=rf"index {pixel} in frame 1 .* 6 × 9 .*\(0 to 53\)"):
        events_from_csr(np.array([0, 1, 2]), np.array([3, pixel]), SHAPE)


@pytest.mark.parametrize("value", [-1.0, 0.5])
def test_events_need_electrons(value):
    with pytest.raises(InputError, match="whole, non-negative"):
        events_from_frames(Frames(jnp.full((1, 2, 3), value)))


@pytest.mark.parametrize("kinds", list(itertools.product("de", repeat=2)))
def test_join(kinds):
    parts = [some_frames(0, mean=0.1), some_frames(1, frames=4, mean=2.0, dtype=np.uint16)]
    both = [events_from_frames(p) if k == "e" else p for p, k in zip(parts, kinds, strict=True)]
    joined = join(both)
    assert isinstance(joined, Events if set(kinds) == {"e"} else Frames)
    expected = np.concatenate([np.asarray(p.values, float) for p in parts])
    np.testing.assert_array_equal(joined.dense(), expected)


def test_join_refuses_different_frames():
    with pytest.raises(InputError, match=r"\(6, 9\), \(5, 9\)"):
        join([some_frames(), some_frames(shape=(5, 9))])
    with pytest.raises(InputError, match="if there are some"):
        join([])


@pytest.mark.parametrize("shape", [(6, 9), (7, 8), (1, 5)])
@pytest.mark.parametrize("sparse", [False, True])
def test_corner_is_ifftshift(shape, sparse):
    frames = some_frames(shape=shape)
    counts = events_from_frames(frames) if sparse else frames
    expected = np.fft.ifftshift(np.asarray(frames.values), axes=(1, 2))
    np.testing.assert_array_equal(to_corner(counts).dense(), expected)
    marked = np.zeros((1, *shape), np.uint8)
    marked[0, shape[0] // 2, shape[1] // 2] = 1
    assert to_corner(Frames(jnp.asarray(marked))).dense()[0, 0, 0] == 1


@pytest.mark.parametrize("center", [(2, 3), (4, 6), (0, 8)])
@pytest.mark.parametrize("sparse", [False, True])
def test_corner_around_another_centre(center, sparse):
    frames = some_frames()
    counts = events_from_frames(frames) if sparse else frames
    moved = np.asarray(to_corner(counts, center).dense())
    values = np.asarray(frames.values)
    for dy, dx in [(0, 0), (-1, 1), (1, -1), (0, 2)]:
        y, x = center[0] + dy, center[1] + dx
        inside = abs(dy) <= (moved.shape[1] - 1) // 2 and abs(dx) <= (moved.shape[2] - 1) // 2
        if inside:
            np.testing.assert_array_equal(moved[:, dy, dx], values[:, y, x])
    np.testing.assert_array_equal(moved[:, 0, 0], values[:, *center])


@pytest.mark.parametrize("sparse", [False, True])
def test_crop_keeps_the_centre(sparse):
    frames = some_frames(mean=1.0)
    counts = events_from_frames(frames) if sparse else frames
    window = crop(counts, (3, 4), (2, 5))
    assert window.frame_shape == (3, 4)
    np.testing.assert_array_equal(window.dense(), np.asarray(frames.values)[:, 1:4, 3:7])
    if isinstance(window, Events):
        assert window.pixels.shape[1] <= 12
    assert crop(counts) is counts


def test_crop_refuses_what_does_not_fit():
    with pytest.raises(InputError, match="window of 6 pixels around pixel 1 .* 9 pixels"):
        crop(some_frames(), (3, 6), (3, 1))
    with pytest.raises(InputError, match="around pixel 9"):
        to_corner(some_frames(), (3, 9))

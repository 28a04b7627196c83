"""A dataset holds a series together: joined, divided, and partly kept aside."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smpr3d_jax.data.counts import Events, events_from_frames, Frames, InputError
from smpr3d_jax.data.dataset import batch, Dataset, hold_out, join, subset
from smpr3d_jax.physics.scan import raster, Scan


def some_dataset(*shapes, seed=0, sparse=False):
    size = sum(a * b for a, b in shapes)
    frames = Frames(jnp.asarray(np.random.default_rng(seed).poisson(1, (size, 3, 4)), jnp.uint8))
    positions = np.concatenate([raster(s, (0.5, 0.4)) for s in shapes])
    series = np.repeat(np.arange(len(shapes)), [a * b for a, b in shapes])
    scan = Scan(jnp.asarray(positions, float), jnp.asarray(series, jnp.int32))
    return Dataset(events_from_frames(frames) if sparse else frames, scan, shapes)


def test_a_frame_needs_a_position():
    data = some_dataset((3, 5))
    with pytest.raises(InputError, match="15 frames but 30 probe positions"):
        Dataset(data.counts, some_dataset((3, 5), (3, 5)).scan, ((3, 5),))


@pytest.mark.parametrize("sparse", [False, True])
def test_join_and_subset(sparse):
    parts = [some_dataset((3, 5), seed=1, sparse=sparse), some_dataset((2, 4), (3, 2), seed=2)]
    data = join(parts)
    assert data.scan_shapes == ((3, 5), (2, 4), (3, 2))
    np.testing.assert_array_equal(data.scan.series, np.repeat([0, 1, 2], [15, 8, 6]))
    second = subset(data, np.arange(15, 29))
    np.testing.assert_array_equal(second.counts.dense(), parts[1].counts.dense())
    np.testing.assert_array_equal(second.scan.positions, parts[1].scan.positions)
    assert second.scan_shapes == data.scan_shapes


@pytest.mark.parametrize("sparse", [False, True])
def test_batch(sparse):
    data = some_dataset((3, 5), sparse=sparse)
    index = np.array([7, 2])
    some = batch(data, index)
    assert isinstance(some.counts, Events if sparse else Frames)
    np.testing.assert_array_equal(some.index, index)
    np.testing.assert_array_equal(some.counts.dense(), data.counts.dense()[index])
    traced = jax.jit(lambda d, i: batch(d, i).counts.dense())(data, jnp.asarray(index))
    np.testing.assert_array_equal(traced, some.counts.dense())


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.3, 0.7, 0.999])
def test_hold_out_divides_the_frames(fraction):
    data = some_dataset((7, 12), (7, 12), (5, 3))
    training, aside = hold_out(data, fraction)
    np.testing.assert_array_equal(np.sort(np.concatenate([training, aside])), np.arange(len(data)))
    first, second, third = (aside[np.asarray(data.scan.series)[aside] == s] for s in range(3))
    np.testing.assert_array_equal(first, second - 84)
    assert len(first) == min(83, max(1, round(84 * fraction)))
    assert len(third) == min(14, max(1, round(15 * fraction)))
    np.testing.assert_array_equal(hold_out(data, fraction)[1], aside)


def test_hold_out_changes_with_the_seed():
    data = some_dataset((20, 30))
    assert not np.array_equal(hold_out(data, 0.1, seed=0)[1], hold_out(data, 0.1, seed=1)[1])


@pytest.mark.parametrize("shape", [(40, 40), (25, 64), (1, 300)])
def test_hold_out_is_spread_evenly(shape):
    data = some_dataset(shape)
    for seed in range(5):
        aside = hold_out(data, 0.05, seed)[1]
        points = np.stack(np.divmod(aside, shape[1]), -1)
        distance = np.abs(points[:, None] - points).max(-1)
        np.fill_diagonal(distance, 99)
        assert distance.min() >= 2, "two held-out positions are neighbours"
        every = np.stack(np.divmod(np.arange(len(data)), shape[1]), -1)
        hole = np.abs(every[:, None] - points).max(-1).min(-1).max()
        # Twenty positions for each held out: a square of 4.5, a line of 20.
        assert hole <= (6 if min(shape) > 1 else 25), "a large part of the scan is never tested"


def test_hold_out_of_nothing():
    data = some_dataset((3, 5))
    training, aside = hold_out(data, 0.0)
    assert len(aside) == 0
    np.testing.assert_array_equal(training, np.arange(15))


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_hold_out_refuses_a_fraction(fraction):
    with pytest.raises(InputError, match="0 <= fraction < 1"):
        hold_out(some_dataset((3, 5)), fraction)


def test_hold_out_needs_positions_and_whole_rasters():
    with pytest.raises(InputError, match="1 position"):
        hold_out(some_dataset((1, 1)), 0.5)
    data = some_dataset((3, 5))
    with pytest.raises(InputError, match="before taking a subset"):
        hold_out(subset(data, np.arange(4)), 0.5)

"""The order of frames: nothing lost, neighbours close, epochs drawn fairly."""

import functools

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest

from smpr3d_jax.data.counts import Frames
from smpr3d_jax.data.dataset import Dataset
from smpr3d_jax.inverse.batches import chunks, draw, each, ordered
from smpr3d_jax.physics.beamlets import Beamlets, Table
from smpr3d_jax.physics.detector import Detector
from smpr3d_jax.physics.forward import Blocks, Scattering
from smpr3d_jax.physics.optics import focal_series
from smpr3d_jax.physics.scan import raster, Scan, series_of
from smpr3d_jax.physics.smatrix import field, unscattered_beams, unscattered_modes


@functools.cache
def model(representation, shape=(9, 21), step=(0.5, 0.7), plan=True):
    """Two scans whose positions differ by a jitter, and a plan that shares what it may."""
    optics = focal_series(80e3, 25.0, [-20.0, 30.0])
    detector = Detector((12, 10), 8.0, 1)
    window = detector.window(optics.wavelength)
    rng = np.random.default_rng(0)
    scan = series_of([raster(shape, step) + rng.uniform(-0.05, 0.05, 2) for _ in range(2)])
    grid, origin = field(np.asarray(scan.positions), window)
    if representation == "modes":
        specimen = unscattered_modes(grid, origin, 5.0, optics.cutoff, 1)
    else:
        specimen = unscattered_beams(grid, window, origin, 5.0, optics.cutoff)
    entry = jnp.asarray(rng.integers(0, 7, len(scan.positions)), jnp.int32)
    table = Beamlets(Table(jnp.zeros((7, 3, 12, 10), jnp.complex64), None), entry)
    shared = (table if representation == "modes" else Blocks((9, 9))) if plan else None
    return Scattering(optics, specimen, scan, detector, jnp.asarray([1e3, 1e3]), shared)


@pytest.mark.parametrize(
    ("representation", "shape"),
    [("modes", (9, 21))] + [("beams", shape) for shape in ((9, 21), (1, 30), (30, 1), (1, 1))],
)
def test_ordered_is_a_permutation(representation, shape):
    world = model(representation, shape)
    index = np.flatnonzero(np.random.default_rng(1).random(len(world.scan.positions)) < 0.8)
    np.testing.assert_array_equal(np.sort(ordered(world, index)), index)
    assert len(ordered(world, index[:0])) == 0


def test_neighbours_in_the_order_are_neighbours_in_space():
    world = model("beams")
    order = ordered(world, np.arange(len(world.scan.positions)))
    where = np.asarray(world.scan.positions)[order]
    steps = np.hypot(*np.diff(where, axis=0).T)
    # A strip is eight positions wide: no step is longer than a strip is.
    assert steps.max() < 8 * 0.7 + 0.6
    assert np.median(steps) < 0.75
    rows, _ = chunks(order, 64)
    spread = np.ptp(np.asarray(world.scan.positions)[rows], axis=1)
    assert spread.max() < 2 * 8 * 0.7
    # Both scans of a position come together.
    series = np.asarray(world.scan.series)[order]
    assert np.mean(series[1:] != series[:-1]) > 0.8


def test_frames_of_one_table_entry_come_together():
    world = model("modes")
    assert isinstance(world.plan, Beamlets)
    entry = np.asarray(world.plan.entry)
    order = ordered(world, np.arange(len(entry)))
    assert np.all(np.diff(entry[order]) >= 0)


def test_models_of_other_kinds_keep_the_order():
    index = np.asarray([3, 1, 2])
    np.testing.assert_array_equal(ordered(eqx.nn.Identity(), index), index)
    np.testing.assert_array_equal(ordered(model("modes", plan=False), index), index)


@pytest.mark.parametrize(("count", "size"), [(12, 4), (13, 4), (3, 4), (0, 4)])
def test_chunks(count, size):
    index = np.arange(count)[::-1]
    rows, rest = chunks(index, size)
    assert rows.shape == (count // size, size)
    np.testing.assert_array_equal(np.concatenate([rows.ravel(), rest]), index)


@pytest.mark.parametrize("representation", ["modes", "beams", "other"])
def test_an_epoch_is_drawn_without_replacement(representation):
    world = eqx.nn.Identity() if representation == "other" else model(representation)
    order = ordered(world, np.random.default_rng(2).permutation(90))
    epochs = [draw(world, order, 8, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[0], epochs[2])
    seen, count = np.unique(epochs[0], return_counts=True)
    assert np.all(np.isin(seen, order))
    place = np.empty(90, int)
    place[order] = np.arange(90)
    assert np.all(np.diff(place[epochs[0]], axis=1) > 0)
    if representation == "beams":
        # Blocks of neighbours; the last takes six frames of the one before, so that all are seen.
        assert epochs[0].shape == (12, 8)
        assert len(seen) == 90
        assert np.all(np.diff(place[epochs[0]], axis=1) == 1)
    else:
        assert epochs[0].shape == (11, 8)
        assert count.max() == 1


def test_all_frames_take_part_in_time():
    order, rng = np.arange(90), np.random.default_rng(0)
    seen = [draw(eqx.nn.Identity(), order, 40, rng) for _ in range(12)]
    assert len(np.unique(seen)) == 90


@pytest.mark.parametrize("chunk", [1, 4, 7, 20])
def test_each_frame_gets_its_own_answer(chunk):
    """Seven frames fill no chunk of 4 or 20; what fills it up is not handed back."""
    counts = Frames(jnp.asarray(np.arange(10)[:, None, None] * np.ones((1, 3, 2), int)))
    scan = Scan(jnp.zeros((10, 2)), jnp.zeros(10, jnp.int32))
    data, index = Dataset(counts, scan, ((1, 10),)), np.asarray([9, 2, 2, 0, 5, 7, 1])
    sizes = []

    def function(factor, part):
        sizes.append(len(part.index))
        values = part.counts.dense(jnp.float32)
        return {"sum": factor * values.sum(axis=(1, 2)), "number": part.index}

    found = each(function, 2.0, data, index, chunk)
    np.testing.assert_array_equal(found["number"], index)
    np.testing.assert_array_equal(found["sum"], 12 * index)
    assert set(sizes) == {chunk}

"""The raster that the positions make, in the detector's frame."""

import jax.numpy as jnp
import numpy as np
import pytest

from smpr3d_jax.data.counts import Frames, InputError
from smpr3d_jax.data.dataset import Dataset, subset
from smpr3d_jax.inverse.rasters import counts_of, frames_of, raster_of
from smpr3d_jax.physics.scan import raster, series_of


def dataset(shapes, steps=(0.7, 0.4), rotation=0.0, transpose=False, jitter=0.0, shift=(0.0, 0.0)):
    rng = np.random.default_rng(0)
    places = [raster(s, steps, rotation, transpose) + shift for s in shapes]
    places = [p + jitter * rng.normal(size=p.shape) for p in places]
    frames = jnp.arange(sum(map(len, places)), dtype=jnp.int32)[:, None, None] * jnp.ones(
        (1, 2, 3), jnp.int32
    )
    return Dataset(Frames(frames), series_of(places), tuple(shapes))


@pytest.mark.parametrize("rotation", [0.0, 0.4, 2.0, -1.1])
@pytest.mark.parametrize("transpose", [False, True])
def test_raster_is_recovered(x64, rotation, transpose):
    data = dataset([(5, 7), (3, 4)], (0.7, 0.4), rotation, transpose, shift=(3.0, -2.0))
    for scan, shape in enumerate([(5, 7), (3, 4)]):
        found = raster_of(data, scan)
        assert found.shape == shape
        np.testing.assert_allclose(found.step, (0.7, 0.4), rtol=1e-9)
        places = np.asarray(data.scan.positions[frames_of(data, scan)]).reshape(*shape, 2)
        np.testing.assert_allclose(found.positions(), places, atol=1e-9)
        index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
        np.testing.assert_allclose(found.index(places), index, atol=1e-9)


@pytest.mark.parametrize("shape", [(6, 7), (5, 8)])
def test_frequencies_are_those_of_plane_waves(x64, shape):
    """exp(2 pi i Q.r) over the raster has its whole spectrum in the entry of Q."""
    where = raster_of(dataset([shape], rotation=0.4, transpose=True, shift=(1.0, 2.0)))
    q = where.frequencies()
    for entry in [(1, 2), (shape[0] - 1, 3), (2, shape[1] - 1)]:
        wave = np.exp(2j * np.pi * where.positions() @ q[:, *entry])
        spectrum = np.abs(np.fft.fft2(wave)) / wave.size
        assert np.isclose(spectrum[entry], 1) and np.isclose(spectrum.sum(), 1)
    half = where.frequencies(half=True)
    assert half.shape == (2, shape[0], shape[1] // 2 + 1)
    known = q[:, :, : (shape[1] + 1) // 2]
    np.testing.assert_allclose(half[:, :, : known.shape[2]], known, atol=1e-12)


def test_nyquist_has_no_slope(x64):
    where = raster_of(dataset([(6, 8)]))
    odd = where.frequencies(half=True, odd=True)
    np.testing.assert_allclose(odd[:, :, 4], 0, atol=1e-12)
    np.testing.assert_allclose(odd[:, 3], 0, atol=1e-12)
    np.testing.assert_array_equal(odd[:, :3, :4], where.frequencies(half=True)[:, :3, :4])


def test_finer_and_wider_are_the_same_lattice(x64):
    where = raster_of(dataset([(5, 7)], rotation=0.3, shift=(1.0, 0.5)))
    fine, wide = where.finer(3), where.wider((2, 3.5))
    np.testing.assert_allclose(fine.positions()[::3, ::3], where.positions(), atol=1e-12)
    assert wide.shape[0] >= 9 and wide.shape[1] >= 15
    top, left = ((m - n) // 2 for m, n in zip(wide.shape, where.shape, strict=True))
    inner = wide.positions()[top : top + 5, left : left + 7]
    np.testing.assert_allclose(inner, where.positions(), atol=1e-9)


def test_small_errors_of_positions_are_averaged(x64):
    found = raster_of(dataset([(20, 30)], jitter=0.05))
    np.testing.assert_allclose(found.step, (0.7, 0.4), rtol=0.01)


@pytest.mark.parametrize("shape", [(1, 6), (6, 1)])
def test_a_line_is_a_raster(x64, shape):
    found = raster_of(dataset([shape], rotation=0.3))
    np.testing.assert_allclose(
        found.positions().reshape(-1, 2)[1], raster(shape, (0.7, 0.4), 0.3)[1]
    )
    assert np.isclose(*found.step) and np.isclose(np.dot(found.slow, found.fast), 0)


def test_counts_of_one_scan():
    data = dataset([(2, 3), (3, 2)])
    np.testing.assert_array_equal(counts_of(data, 1).dense()[:, 0, 0], np.arange(6, 12))
    assert counts_of(dataset([(2, 3)])) is not None


def test_refusals():
    data = dataset([(3, 4)])
    with pytest.raises(InputError, match="0 to 0"):
        raster_of_scan = frames_of(data, 1)
        assert raster_of_scan
    with pytest.raises(InputError, match="whole scans"):
        raster_of(subset(data, np.arange(7)))
    with pytest.raises(InputError, match="one position"):
        raster_of(dataset([(1, 1)]))
    wrong = Dataset(data.counts, data.scan, ((4, 3),))
    with pytest.raises(InputError, match="from any raster"):
        raster_of(wrong)

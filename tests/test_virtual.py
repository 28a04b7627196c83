"""Virtual detectors count what fell on them, dense or sparse."""

import jax.numpy as jnp
import numpy as np
import pytest

from smpr3d_jax.data.counts import events_from_frames, Frames, InputError
from smpr3d_jax.data.dataset import Dataset
from smpr3d_jax.inverse import virtual
from smpr3d_jax.inverse.rasters import raster_of
from smpr3d_jax.physics.detector import Detector
from smpr3d_jax.physics.scan import raster, series_of


CAMERA = Detector((10, 14), 2.0, offset=(0.2, -0.4))
SHAPES = ((3, 5), (4, 2))


def some_data(sparse=False):
    counts = np.random.default_rng(0).poisson(0.7, (23, *CAMERA.shape)).astype(np.uint8)
    frames = Frames(jnp.asarray(counts))
    scan = series_of([raster(s, (0.5, 0.4), 0.3) for s in SHAPES])
    return Dataset(events_from_frames(frames) if sparse else frames, scan, SHAPES), counts


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("scan", [0, 1])
def test_images_are_weighted_sums(sparse, scan):
    data, counts = some_data(sparse)
    weights = jnp.asarray(np.random.default_rng(1).normal(size=(3, *CAMERA.shape)), jnp.float32)
    images = virtual.images(data, weights, scan)
    part = counts[:15] if scan == 0 else counts[15:]
    expected = np.einsum("fyx,dyx->df", part, weights).reshape(3, *SHAPES[scan])
    np.testing.assert_allclose(images, expected, atol=1e-4)


@pytest.mark.parametrize("sparse", [False, True])
def test_counts_of_bright_pixels_stay_exact(sparse):
    """Sums above 255 do not wrap in the stored type."""
    frames = Frames(jnp.full((4, *CAMERA.shape), 200, jnp.uint8))
    scan = series_of([raster((2, 2), (1.0, 1.0))])
    data = Dataset(events_from_frames(frames) if sparse else frames, scan, ((2, 2),))
    np.testing.assert_array_equal(virtual.images(data, jnp.ones((1, 10, 14))), 28000)


def test_angles_are_those_of_the_beam():
    y, x = virtual.angles(CAMERA)
    assert (y.shape, x.shape) == ((10, 1), (1, 14))
    np.testing.assert_allclose([y[0, 0], y[3, 0], y[-1, 0]], [-0.4, 5.6, -2.4])
    np.testing.assert_allclose([x[0, 0], x[0, 3], x[0, -1]], [0.8, 6.8, -1.2])
    radius = np.hypot(y, x)
    np.testing.assert_array_equal(virtual.ring(CAMERA, 6.0, 3.0), (radius >= 3) & (radius <= 6))
    np.testing.assert_array_equal(virtual.ring(CAMERA, 6.0), radius <= 6)


def test_standard_detectors():
    masks = {k: np.asarray(v, bool) for k, v in virtual.standard(CAMERA, 7.0).items()}
    radius = np.hypot(*virtual.angles(CAMERA))
    assert list(masks) == ["bf", "abf", "adf"]
    np.testing.assert_array_equal(masks["bf"], radius <= 7)
    assert (masks["abf"] <= masks["bf"]).all() and masks["abf"].any()
    np.testing.assert_array_equal(masks["adf"], radius >= 8.4)


@pytest.mark.parametrize("sectors, start", [(1, 0.0), (4, 0.0), (4, np.pi / 4), (6, -1.0)])
def test_segments_share_out_every_pixel_once(sectors, start):
    edges = [0, 4.0, 9]
    parts = virtual.segments(CAMERA, edges, sectors, start)
    assert parts.shape == (2 * sectors, *CAMERA.shape)
    radius = np.hypot(*virtual.angles(CAMERA))
    np.testing.assert_array_equal(parts.sum(0), radius < 9)
    np.testing.assert_array_equal(parts[:sectors].sum(0), radius < 4)


def test_first_segment_lies_between_x_and_y():
    parts = virtual.segments(CAMERA, [0, 9.0], 4)
    y, x = np.broadcast_arrays(*virtual.angles(CAMERA))
    inside = np.hypot(y, x) < 9
    np.testing.assert_array_equal(np.asarray(parts[0], bool), inside & (y >= 0) & (x > 0))


def test_refusals():
    data, _ = some_data()
    with pytest.raises(InputError, match=r"\(3, 4\).*\(10, 14\)"):
        virtual.images(data, jnp.ones((1, 3, 4)))
    for edges, sectors in (([3.0], 4), ([3.0, 2.0], 4), ([0.0, 2.0], 0), ([-1.0, 2.0], 4)):
        with pytest.raises(InputError, match="`segments`"):
            virtual.segments(CAMERA, edges, sectors)
    assert raster_of(data, 1).shape == (4, 2)

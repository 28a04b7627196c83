"""What the pixels of the disc record, and frequencies that a raster folds."""

import jax.numpy as jnp
import numpy as np
import pytest

from smpr3d_jax.data.counts import events_from_frames, Frames, InputError
from smpr3d_jax.data.dataset import Dataset, join
from smpr3d_jax.inverse.brightfield import bright_field, sidebands
from smpr3d_jax.inverse.rasters import Raster
from smpr3d_jax.inverse.unfolding import Focused, folding, image, prepared
from smpr3d_jax.physics.detector import Detector
from smpr3d_jax.physics.optics import focal_series
from smpr3d_jax.physics.scan import raster, series_of

from . import scenes


PIXELS = (28, 30)


def some_data(sparse=False, shape=(5, 7), seed=0):
    counts = np.random.default_rng(seed).poisson(3.0, (35, *PIXELS)).astype(np.uint8)
    frames = Frames(jnp.asarray(counts))
    scan = series_of([raster(shape, (0.4, 0.5), 0.3)])
    return Dataset(events_from_frames(frames) if sparse else frames, scan, (shape,)), counts


def lens(defocus=80.0, **more):
    astigmatism = {"C12": 60.0, "phi12": 0.4}
    return focal_series(scenes.ENERGY, scenes.SEMIANGLE, [float(defocus)], astigmatism, **more)


@pytest.mark.parametrize("sparse", [False, True])
def test_pixels_of_the_disc(sparse):
    data, counts = some_data(sparse)
    camera = Detector(PIXELS, 3.0, offset=(0.25, -0.5))
    bright = bright_field(data, lens(), camera)
    assert bright.images.dtype == jnp.uint8 and bright.images.shape[1:] == (5, 7)
    y, x = (np.fft.fftfreq(n, 1 / n) - o for n, o in zip(PIXELS, camera.offset, strict=True))
    radius = np.hypot(y[:, None], x[None]) * 3.0
    inside = radius < scenes.SEMIANGLE + 1.5
    np.testing.assert_array_equal(bright.images.reshape(-1, 35), counts[:, inside].T)
    angles = np.asarray(bright.k) * bright.optics.wavelength * 1e3
    np.testing.assert_allclose(np.hypot(*angles.T), radius[inside], rtol=1e-4)
    whole = radius <= scenes.SEMIANGLE - 1.5
    np.testing.assert_allclose(bright.level, counts[:, whole].mean(), rtol=1e-5)


def test_masked_pixels_are_left_out():
    data, counts = some_data()
    mask = np.ones(PIXELS)
    mask[1, 2] = 0
    camera = Detector(PIXELS, 3.0)
    every, some = (bright_field(data, lens(), camera, mask=m) for m in (None, jnp.asarray(mask)))
    assert len(some.k) == len(every.k) - 1
    assert not np.any(
        np.all(np.isclose(some.k, [3e-3 / lens().wavelength, 6e-3 / lens().wavelength]), 1)
    )


def test_each_scan_has_its_own_lens_and_counts():
    first, second = some_data(seed=1)[0], some_data(seed=2)[0]
    both = join([first, second])
    series = focal_series(scenes.ENERGY, scenes.SEMIANGLE, [80.0, -40.0])
    for number, alone in enumerate((first, second)):
        bright = bright_field(both, series, Detector(PIXELS, 3.0), number)
        expected = bright_field(alone, series, Detector(PIXELS, 3.0)).images
        np.testing.assert_array_equal(bright.images, expected)
        assert float(bright.optics.defocus[0]) == (80.0, -40.0)[number]


@pytest.mark.parametrize("factor, shape", [(1, (5, 6)), (2, (5, 6)), (2, (4, 7)), (3, (4, 5))])
def test_folded_frequencies_are_put_back(x64, factor, shape):
    """A raster sees the sum of the frequencies that fold; unfolded they make the finer image."""
    where = Raster(shape, (1.0, 2.0), (0.3, 0.1), (-0.05, 0.4))
    fine = tuple(n * factor for n in shape)
    values = np.random.default_rng(0).normal(size=fine)
    fold = folding(where, factor)
    # A spectrum without the frequencies that stand for two.
    spectrum = np.fft.fft2(values)
    for axis, n in enumerate(fine):
        if n % 2 == 0:
            np.moveaxis(spectrum, axis, 0)[n // 2] = 0
    values = np.fft.ifft2(spectrum).real
    entries = [
        np.round(t * n).astype(int) for t, n in zip((fold.slow, fold.fast), shape, strict=True)
    ]
    parts = spectrum[entries[0][:, :, None], entries[1][:, None, :]] / factor**2
    coarse = np.fft.rfft2(values[::factor, ::factor])
    np.testing.assert_allclose(parts.sum(0), coarse, atol=1e-9)
    waves = np.exp(2j * np.pi * np.einsum("ajsf,a->jsf", fold.q, np.asarray(where.slow)))
    np.testing.assert_allclose(
        waves, np.exp(2j * np.pi * fold.slow)[:, :, None] + 0 * waves, atol=1e-9
    )
    bright = bright_field(*some_bright(where))
    found = image(jnp.asarray(parts)[None], jnp.zeros(1), bright, where, factor)
    assert isinstance(found, Focused) and found.raster.shape == fine
    np.testing.assert_allclose(found.images[0], values, atol=1e-9)


def some_bright(where: Raster):
    count = where.shape[0] * where.shape[1]
    scan = series_of([where.positions().reshape(-1, 2)])
    data = Dataset(Frames(jnp.ones((count, *PIXELS))), scan, (where.shape,))
    return data, lens(), Detector(PIXELS, 3.0)


@pytest.fixture
def some_frequencies(x64):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.uniform(-0.4, 0.4, (6, 2))), jnp.asarray(
        rng.uniform(-0.5, 0.5, (2, 1, 3, 4))
    )


NODES, WEIGHTS = np.polynomial.hermite_e.hermegauss(24)
SHARES = WEIGHTS / WEIGHTS.sum()


@pytest.mark.parametrize("side", ["left", "right"])
def test_spread_is_the_mean_over_foci(some_frequencies, side):
    wide = sidebands(lens(spread=25.0), 0.05, *some_frequencies)
    total = 0
    for node, share in zip(NODES, SHARES, strict=True):
        one = sidebands(lens(defocus=80.0 + 25.0 * node), 0.05, *some_frequencies)
        total = total + share * np.asarray(getattr(one, side))
    np.testing.assert_allclose(getattr(wide, side), total, atol=1e-9)


@pytest.mark.parametrize("side", ["left", "right"])
def test_source_is_the_mean_over_places(some_frequencies, side):
    wide = sidebands(lens(source=0.3), 0.05, *some_frequencies)
    still = sidebands(lens(), 0.05, *some_frequencies)
    moved = [np.exp(2j * np.pi * 0.3 * np.multiply.outer(NODES, q)) for q in some_frequencies[1]]
    blur = [np.tensordot(SHARES, m, 1) for m in moved]
    expected = getattr(still, side) * (blur[0] * blur[1])[None]
    np.testing.assert_allclose(getattr(wide, side), expected, atol=1e-9)


def test_refusals():
    data, _ = some_data()
    with pytest.raises(InputError, match=r"\(9, 9\)"):
        bright_field(data, lens(), Detector((9, 9), 3.0))
    with pytest.raises(InputError, match="wider than the detector"):
        bright_field(data, lens(), Detector(PIXELS, 1.0))
    mixed = lens(probes=np.ones((1, 1), complex))
    with pytest.raises(InputError, match="one coherent probe"):
        bright_field(data, mixed, Detector(PIXELS, 3.0))
    bright = bright_field(data, lens(), Detector(PIXELS, 3.0))
    for depths, upsample, epsilon in (([], 1, 0.1), ([0.0], 0, 0.1), ([0.0], 1, 0.0)):
        with pytest.raises(InputError, match="`ssb` needs"):
            prepared("ssb", bright, depths, upsample, epsilon, None)

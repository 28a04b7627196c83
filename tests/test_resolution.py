"""Fourier ring correlation: against noise whose correlation is known."""

import numpy as np
import pytest

from smpr3d_jax.inverse.resolution import ring_correlation


SHAPE, SAMPLING = (96, 128), (0.25, 0.2)


def noise(seed, width=None):
    """White noise, or noise whose spectrum falls as a Gaussian of rms `width` 1/Å."""
    white = np.random.default_rng(seed).normal(size=SHAPE)
    if width is None:
        return white
    ky, kx = (np.fft.fftfreq(n, d) for n, d in zip(SHAPE, SAMPLING, strict=True))
    fall = np.exp(-(ky[:, None] ** 2 + kx[None] ** 2) / (4 * width**2))
    return np.fft.ifft2(np.fft.fft2(white) * fall).real


def test_the_same_image_agrees_with_itself():
    found = ring_correlation(noise(0), noise(0), SAMPLING)
    np.testing.assert_allclose(found.correlation, 1)
    assert found.resolution is None
    np.testing.assert_allclose(found.radius[-1], 2.0, atol=0.05)


def test_noise_does_not_agree():
    curves = [ring_correlation(noise(2 * i), noise(2 * i + 1), SAMPLING) for i in range(20)]
    mean = np.mean([c.correlation for c in curves], axis=0)
    assert abs(mean[5:]).max() < 0.12 and abs(mean[5:].mean()) < 0.02
    assert all((c.correlation < c.half_bit)[3:].mean() > 0.95 for c in curves)


@pytest.mark.parametrize("signal", [0.5, 2.0])
def test_a_ring_correlates_by_its_signal_to_noise(signal):
    half = lambda i, j: np.sqrt(signal) * noise(i) + noise(100 + 2 * i + j)
    curves = [ring_correlation(half(i, 0), half(i, 1), SAMPLING).correlation for i in range(20)]
    np.testing.assert_allclose(np.mean(curves, axis=0)[5:].mean(), signal / (1 + signal), atol=0.02)


def test_resolution_is_where_noise_takes_over():
    # exp(-q²/2 w²) of signal against noise of power s: half a bit is a ratio of 0.2071/half.
    scene, level = noise(0, 0.5), 0.1
    first, second = (scene + level * noise(i) for i in (1, 2))
    expected = 0.5 * np.sqrt(2 * np.log(1 / (0.2071 * level**2)))
    found = ring_correlation(first, second, SAMPLING).resolution
    assert found is not None
    np.testing.assert_allclose(1 / found, expected, rtol=0.12)


def test_images_that_cannot_be_compared():
    with pytest.raises(ValueError, match=r"one shape, of 8 pixels"):
        ring_correlation(np.ones((9, 9)), np.ones((9, 8)), SAMPLING)

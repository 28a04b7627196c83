"""Tilt-corrected bright field: known transfer, depth, and points between those of the raster."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smpr3d_jax.data.counts import InputError
from smpr3d_jax.inverse.brightfield import bright_field
from smpr3d_jax.inverse.parallax import parallax
from smpr3d_jax.inverse.ssb import ssb
from smpr3d_jax.physics.optics import aberration_phase, focal_series

from . import scenes


POINTS, PIXELS = (12, 10), (40, 42)
"""Steps of 2.5 and 3 Å over the cell: Nyquist frequencies of 0.2 and 0.167 1/Å."""
CAMERA = scenes.detector(PIXELS)
DEFOCUS = 250.0


def optics(defocus=DEFOCUS):
    return focal_series(
        scenes.ENERGY, scenes.SEMIANGLE, [defocus], {"C12": 30.0, "phi12": 0.4, "C30": 2e4}
    )


def bright_of(cutoff, depth=0.0, turns=0, transpose=False, strength=0.02):
    phase = scenes.waves(cutoff, strength)
    shape, positions = scenes.over_cell(POINTS, turns, transpose)
    data = scenes.scanned(scenes.slices(phase, (depth,)), optics(), shape, positions, PIXELS)
    return phase, bright_field(data, optics(), CAMERA)


@pytest.fixture(scope="module")
def fine():
    with jax.enable_x64(True):
        return bright_of(0.3)


def transfer_by_hand(q):
    """Mean over the disc of i Gamma exp(-2 pi i Q.s), pixel by pixel, s by finite differences."""
    lens, step = optics(), 1e-5
    y, x = (np.fft.fftfreq(n, 1 / n) * CAMERA.pixel * 1e-3 / lens.wavelength for n in PIXELS)
    ky, kx = np.meshgrid(y, x, indexing="ij")
    width = CAMERA.pixel * 1e-3 / lens.wavelength

    def chi(ky, kx):
        k = jnp.asarray(ky), jnp.asarray(kx)
        return np.asarray(aberration_phase(lens.aberrations, *k, lens.energy))[0]

    def wave(ky, kx):
        inside = np.clip((lens.cutoff - np.hypot(ky, kx)) / width + 0.5, 0, 1)
        return inside * np.exp(-1j * chi(ky, kx))

    shift = [
        (chi(ky + a * step, kx + b * step) - chi(ky - a * step, kx - b * step)) / (4 * np.pi * step)
        for a, b in ((1, 0), (0, 1))
    ]
    here = wave(ky, kx)
    result = []
    for qy, qx in q:
        gamma = np.conj(here) * wave(ky - qy, kx - qx) - here * np.conj(wave(ky + qy, kx + qx))
        back = np.exp(-2j * np.pi * (shift[0] * qy + shift[1] * qx)) * np.abs(here)
        result.append(np.sum(1j * gamma * back) / np.sum(np.abs(here) ** 2))
    return np.array(result)


@pytest.mark.parametrize("turns, transpose", [(0, False), (1, True), (3, False)])
def test_contrast_has_the_known_transfer(x64, turns, transpose):
    phase, bright = bright_of(0.16, turns=turns, transpose=transpose)
    found = parallax(bright, margin=(0, 0))
    assert abs(found.images.mean() - 1) < 1e-9
    spectrum = np.fft.rfft2(np.asarray(found.images[0]) - 1)
    truth = np.fft.rfft2(scenes.at(phase, found.raster.positions()))
    strong = np.abs(truth) > 0.05 * np.abs(truth).max()
    strong[:, -1] = False
    q = found.raster.frequencies(half=True)[:, strong].T
    ratio, expected = spectrum[strong] / truth[strong], transfer_by_hand(q)
    np.testing.assert_allclose(ratio, expected, atol=0.03)
    # Underfocus: bright field shows a phase dark, as far as the lens does not turn it.
    slow = np.linalg.norm(q, axis=1) < 0.08
    lam = optics().wavelength
    simple = -2 * np.sin(np.pi * lam * DEFOCUS * np.sum(q[slow] ** 2, axis=1))
    assert (ratio[slow].real < 0).all() and np.abs(ratio[slow] - simple).max() < 0.3


@pytest.mark.parametrize("method", ["parallax", "ssb"])
def test_upsampling_shows_what_the_raster_folds(x64, fine, method):
    phase, bright = fine
    function = partial(parallax, correction="wiener") if method == "parallax" else ssb
    run = lambda n: function(bright, upsample=n, epsilon=1e-3, margin=(0, 0))
    coarse, found = run(1), run(2)
    assert found.raster.shape == (24, 20)
    truth = scenes.at(phase, found.raster.positions())
    assert scenes.slope(found.images[0], truth)[1] < {"parallax": 0.25, "ssb": 0.05}[method]
    # Beyond the Nyquist frequency of the raster, where no single image has anything.
    beyond = np.abs(np.fft.fftfreq(24))[:, None] > 0.26
    spectra = [
        np.fft.fft2(np.asarray(a))[np.broadcast_to(beyond, (24, 20))]
        for a in (found.images[0], truth)
    ]
    alike = np.vdot(*spectra).real / np.linalg.norm(spectra[0]) / np.linalg.norm(spectra[1])
    assert alike > {"parallax": 0.75, "ssb": 0.95}[method]
    there = scenes.at(phase, coarse.raster.positions())
    assert scenes.slope(coarse.images[0], there)[1] > 0.4


def test_flip_gives_all_frequencies_one_sign(x64):
    phase, bright = bright_of(0.16)
    plain, flipped, whole = (
        parallax(bright, correction=c, epsilon=1e-4, margin=(0, 0)).images[0]
        for c in ("none", "flip", "wiener")
    )
    truth = np.fft.rfft2(scenes.at(phase, bright.raster.positions()))
    strong = np.abs(truth) > 0.05 * np.abs(truth).max()
    turned = np.fft.rfft2(np.asarray(flipped))[strong] / truth[strong]
    assert (turned.real > -1e-3).all() and np.abs(turned.imag).max() < 0.05
    np.testing.assert_allclose(
        np.abs(np.fft.rfft2(np.asarray(plain) - 1)),
        np.abs(np.fft.rfft2(np.asarray(flipped))),
        atol=1e-5,
    )
    assert scenes.slope(whole, np.fft.irfft2(truth, POINTS))[1] < 0.1


@pytest.mark.parametrize("depth", [-100.0, 0.0, 100.0])
def test_depth_series_is_sharpest_at_the_depth(x64, depth):
    phase, bright = bright_of(0.3, depth)
    planes = np.arange(-200.0, 201.0, 50.0)
    found = parallax(bright, planes, correction="wiener", upsample=2, margin=(0, 0))
    truth = scenes.at(phase, found.raster.positions())
    factors = [scenes.slope(plane, truth)[0] for plane in found.images]
    assert planes[int(np.argmax(factors))] == depth


def test_refusals(fine):
    with pytest.raises(InputError, match="none, flip, wiener"):
        parallax(fine[1], correction="sign")
    with pytest.raises(InputError, match="`parallax` needs"):
        parallax(fine[1], upsample=0)

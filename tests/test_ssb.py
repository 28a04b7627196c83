"""Phases of weak objects by single sideband, against phases that are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smpr3d_jax.data.counts import events_from_frames, Frames, InputError
from smpr3d_jax.data.dataset import Dataset
from smpr3d_jax.inverse.brightfield import bright_field
from smpr3d_jax.inverse.ssb import ssb
from smpr3d_jax.physics.optics import focal_series
from smpr3d_jax.physics.scan import raster

from . import scenes


FINE = scenes.Grid((32, 32), (0.375, 0.375))
POINTS, PIXELS = (30, 32), (28, 30)
"""Scan positions over the fine cell, finer than half a wavelength of 2 alpha; detector pixels."""
ABERRATIONS = {"C12": 60.0, "phi12": 0.4, "C21": 800.0, "phi21": 1.0, "C30": 2e4}
CAMERA = scenes.detector(PIXELS, grid=FINE)


def optics(defocus=80.0, aberrations=ABERRATIONS, **more):
    return focal_series(scenes.ENERGY, scenes.SEMIANGLE, [defocus], aberrations, **more)


def scan_of(specimen, lens, turns=0, transpose=False, **more):
    shape, positions = scenes.over_cell(POINTS, turns, transpose, FINE)
    return scenes.scanned(specimen, lens, shape, positions, PIXELS, **more)


def weak(strength=0.02, seed=0, depths=(0.0,), cutoff=1.1):
    phase = scenes.waves(cutoff, strength, seed, FINE)
    return phase, scenes.slices(phase, depths, FINE)


def against(found, phase, plane=0):
    return scenes.slope(found.images[plane], scenes.at(phase, found.raster.positions(), FINE))


@pytest.mark.parametrize("turns, transpose", scenes.ORIENTATIONS)
def test_weak_phase_is_exact_in_all_orientations(x64, turns, transpose):
    """Frequencies up to nearly twice the aperture; aberrations stay in the detector's frame."""
    phase, specimen = weak()
    data = scan_of(specimen, optics(), turns, transpose)
    found = ssb(bright_field(data, optics(), CAMERA), epsilon=1e-5, margin=(0, 0))
    factor, left = against(found, phase)
    assert abs(factor - 1) < 2e-3 and left < 2e-2


def test_any_rotation_and_unequal_steps(x64):
    """A small object in an empty cell, under a turned raster that leaves most of the cell out."""
    cell = scenes.Grid((50, 50), (0.4, 0.4))
    y, x = (c - 10 for c in cell.coordinates())
    phase = 0.03 * np.exp(-(y**2 + x**2) / 4) * np.cos(2 * np.pi * (0.4 * y + 0.3 * x))
    shape, step = (26, 34), (0.5, 0.4)
    places = raster(shape, step, 0.6, True)
    places = places - places.mean(axis=0) + 10
    data = scenes.scanned(scenes.slices(phase, grid=cell), optics(), shape, places, (36, 36))
    bright = bright_field(data, optics(), scenes.detector((36, 36), grid=cell))
    found = ssb(bright, epsilon=1e-4)
    truth = scenes.at(phase, found.raster.positions(), cell)
    factor, left = scenes.slope(found.images[0], truth)
    assert abs(factor - 1) < 0.03 and left < 0.15


@pytest.mark.parametrize("weights", ["snr", "plain"])
def test_aberrations_must_be_known(x64, weights):
    phase, specimen = weak()
    data = scan_of(specimen, optics())
    right, wrong = (
        against(
            ssb(bright_field(data, lens, CAMERA), weights=weights, epsilon=1e-5, margin=(0, 0)),
            phase,
        )
        for lens in (optics(), optics(0.0, {}))
    )
    assert abs(right[0] - 1) < 2e-3 and right[1] < 2e-2
    assert wrong[0] < 0.5 and wrong[1] > 0.5


def test_no_frequency_is_favoured(x64):
    """Every frequency of a weak phase below twice the aperture comes out with its amplitude."""
    phase, specimen = weak(0.01)
    data = scan_of(specimen, optics())
    found = ssb(bright_field(data, optics(), CAMERA), epsilon=1e-7, margin=(0, 0))
    truth = np.fft.rfft2(scenes.at(phase, found.raster.positions(), FINE))
    q = np.linalg.norm(found.raster.frequencies(half=True), axis=0)
    strong = (np.abs(truth) > 0.02 * np.abs(truth).max()) & (q < 1.0)
    ratio = np.fft.rfft2(np.asarray(found.images[0]))[strong] / truth[strong]
    assert strong.sum() > 50
    assert np.abs(ratio.mean() - 1) < 5e-3 and np.abs(ratio - 1).max() < 0.1


@pytest.fixture(scope="module")
def noisy():
    phase, specimen = weak(0.05)
    data = scan_of(specimen, optics(), dose=3000.0, key=jax.random.key(1))
    return phase, data


def test_weighting_by_transfer_leaves_less_noise(noisy):
    phase, data = noisy
    bright = bright_field(data, optics(), CAMERA)
    snr, plain = (
        against(ssb(bright, weights=w, epsilon=1e-2, margin=(0, 0)), phase)[1]
        for w in ("snr", "plain")
    )
    assert snr < 0.8 * plain


def test_events_and_dense_give_the_same(noisy):
    _, data = noisy
    sparse = Dataset(events_from_frames(Frames(data.counts.dense())), data.scan, data.scan_shapes)
    a, b = (ssb(bright_field(d, optics(), CAMERA)).images for d in (data, sparse))
    np.testing.assert_allclose(a, b, atol=1e-6)


def test_single_precision(noisy):
    _, data = noisy
    single = ssb(bright_field(data, optics(), CAMERA)).images
    assert single.dtype == jnp.float32
    with jax.enable_x64(True):
        double = ssb(bright_field(scenes.double(data), optics(), CAMERA)).images
        assert double.dtype == jnp.float64
    np.testing.assert_allclose(single, double, atol=1e-3 * np.abs(double).max())


def test_each_layer_is_sharp_at_its_depth(x64):
    """Two layers, 200 Å or three depths of field apart, are found where they are."""
    depths, planes = (0.0, 200.0), np.arange(-80.0, 281.0, 40.0)
    phases = [scenes.waves(0.9, 0.03, seed, FINE) for seed in (3, 4)]
    specimen = scenes.slices(phases, depths, FINE)
    data = scan_of(specimen, optics(60.0))
    found = ssb(bright_field(data, optics(60.0), CAMERA), planes, epsilon=1e-4, margin=(0, 0))
    np.testing.assert_allclose(found.depths, planes)
    for phase, depth in zip(phases, depths, strict=True):
        factors = [against(found, phase, plane)[0] for plane in range(len(planes))]
        assert abs(planes[int(np.argmax(factors))] - depth) <= 40
        assert factors[int(np.argmin(np.abs(planes - depth)))] > 0.9


def test_a_depth_is_another_defocus(x64):
    _, specimen = weak(depths=(90.0,))
    data = scan_of(specimen, optics())
    deep = ssb(bright_field(data, optics(), CAMERA), [90.0], margin=(0, 0))
    nearer = ssb(bright_field(data, optics(-10.0), CAMERA), margin=(0, 0))
    np.testing.assert_allclose(deep.images, nearer.images, atol=1e-9)


def test_a_margin_keeps_the_middle(x64):
    phase, specimen = weak()
    data = scan_of(specimen, optics())
    found = ssb(bright_field(data, optics(), CAMERA), epsilon=1e-4)
    truth = scenes.at(phase, found.raster.positions(), FINE)
    inner = slice(8, -8)
    factor, left = scenes.slope(found.images[0][inner, inner], truth[inner, inner])
    assert abs(factor - 1) < 0.05 and left < 0.2


def test_refusals():
    _, specimen = weak()
    bright = bright_field(scan_of(specimen, optics()), optics(), CAMERA)
    with pytest.raises(InputError, match="'plain', 'snr'"):
        ssb(bright, weights="wiener")
    with pytest.raises(InputError, match="`ssb` needs"):
        ssb(bright, [])

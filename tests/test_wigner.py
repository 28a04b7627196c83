"""Wigner distribution deconvolution of phases that are known, weak and strong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smpr3d_jax.data.counts import events_from_frames, Frames, InputError
from smpr3d_jax.data.dataset import Dataset
from smpr3d_jax.inverse import wigner
from smpr3d_jax.inverse.brightfield import bright_field
from smpr3d_jax.inverse.ssb import ssb
from smpr3d_jax.inverse.wigner import wdd

from . import scenes
from .test_ssb import CAMERA, FINE, optics, scan_of, weak


def against(found, phase):
    return scenes.slope(jnp.angle(found.wave), scenes.at(phase, found.raster.positions(), FINE))


@pytest.mark.parametrize("turns, transpose", [(0, False), (1, False), (2, True), (3, True)])
def test_weak_phase(x64, turns, transpose):
    phase, specimen = weak()
    data = scan_of(specimen, optics(), turns, transpose)
    factor, left = against(wdd(data, optics(), CAMERA, epsilon=1e-4), phase)
    assert abs(factor - 1) < 2e-3 and left < 1e-2
    assert against(wdd(data, optics(0.0, {}), CAMERA, epsilon=1e-4), phase)[1] > 0.5


def test_strong_phase(x64):
    """Where the single sideband's first order fails, the deconvolution still holds."""
    phase, specimen = weak(0.6, cutoff=0.7)
    data = scan_of(specimen, optics())
    found = wdd(data, optics(), CAMERA, epsilon=1e-5)
    factor, left = against(found, phase)
    assert abs(factor - 1) < 0.02 and left < 0.05
    np.testing.assert_allclose(np.abs(found.wave).mean(), 1, atol=0.01)
    first = ssb(bright_field(data, optics(), CAMERA), epsilon=1e-4, margin=(0, 0)).images[0]
    assert scenes.slope(first, scenes.at(phase, found.raster.positions(), FINE))[1] > 0.2


def test_depth(x64):
    phase, specimen = weak(depths=(90.0,))
    data = scan_of(specimen, optics())
    assert abs(against(wdd(data, optics(), CAMERA, depth=90.0), phase)[0] - 1) < 0.01
    assert against(wdd(data, optics(), CAMERA), phase)[0] < 0.7


def test_blocks_are_parts_of_the_whole(x64, monkeypatch):
    _, specimen = weak(0.2)
    data = scan_of(specimen, optics())
    whole = wdd(data, optics(), CAMERA).wave
    monkeypatch.setattr(wigner, "BLOCK", 5 * 30 * 28 * 30)
    np.testing.assert_allclose(wdd(data, optics(), CAMERA).wave, whole, atol=1e-9)


def test_events_and_precision():
    _, specimen = weak(0.2)
    data = scan_of(specimen, optics(), dose=3000.0, key=jax.random.key(0))
    frames = Frames(data.counts.dense())
    dense, sparse = (
        wdd(Dataset(c, data.scan, data.scan_shapes), optics(), CAMERA).wave
        for c in (frames, events_from_frames(frames))
    )
    assert dense.dtype == jnp.complex64
    np.testing.assert_allclose(dense, sparse, atol=1e-5)
    with jax.enable_x64(True):
        fine = wdd(scenes.double(data), optics(), CAMERA).wave
        assert fine.dtype == jnp.complex128
    np.testing.assert_allclose(dense, fine, atol=1e-3)


def test_refusals():
    _, specimen = weak()
    data = scan_of(specimen, optics())
    with pytest.raises(InputError, match="`epsilon` above 0"):
        wdd(data, optics(), CAMERA, epsilon=0.0)
    with pytest.raises(InputError, match="coherent probe"):
        wdd(data, optics(spread=20.0), CAMERA)
    with pytest.raises(InputError, match="detector has"):
        wdd(data, optics(), scenes.detector((20, 20), grid=FINE))

"""Direct methods on the shared data: what is known to be there is seen, where it is known to be."""

import h5py
import jax.numpy as jnp
import numpy as np
import pytest

import smpr3d_jax as sj

from . import scenes
from .helpers import shared_data


CENTRE, PIXEL = (62.82, 63.54), 0.03308
"""Of the disc of the experiment, in pixels, and mrad."""


def experiment(rotation):
    path = shared_data("defocused_probe_300kV", "scan.h5")
    data = sj.read_series([path], 31.25, np.deg2rad(rotation), False, CENTRE)
    offset = [float(c - round(c)) for c in CENTRE]
    return data, sj.Detector(data.counts.frame_shape, PIXEL, offset=(offset[0], offset[1]))


def contrast(image):
    return float(jnp.std(image))


def test_parallax_of_the_experiment_is_sharp_at_its_defocus():
    """13.5 µm of underfocus go with a rotation near 118°, not with its opposite."""
    lens = sj.focal_series(300e3, 1.03, [135000.0])
    data, camera = experiment(118)
    depths = np.array([-30000.0, -15000.0, 0.0, 15000.0, 30000.0])
    found = sj.parallax(sj.bright_field(data, lens, camera), depths)
    assert int(np.argmax([contrast(i) for i in found.images])) == 2
    data, camera = experiment(-62)
    opposite = sj.parallax(sj.bright_field(data, lens, camera), depths)
    assert contrast(opposite.images[2]) < 0.5 * contrast(found.images[2])
    assert float(found.images[2].min()) < 0.7, "the small dots are dark in bright field"


def test_phases_of_the_experiment_agree():
    """Particles that refract alike by their centre of mass and by their sidebands."""
    data, camera = experiment(118)
    field = sj.dpc.levelled(sj.dpc.deflection(data, camera))
    slow = sj.dpc.fitted(field, 300e3)
    lens = sj.focal_series(300e3, 1.03, [135000.0])
    fine = sj.ssb(sj.bright_field(data, lens, camera), epsilon=1e-2).images[0]
    q = np.linalg.norm(field.raster.frequencies(half=True), axis=0)
    band = (q > 1 / 1500) & (q < 1 / 400)
    limited = [np.fft.irfft2(np.fft.rfft2(np.asarray(i)) * band, i.shape) for i in (slow, fine)]
    assert likeness(*limited, rim=6) > 0.7


@pytest.mark.parametrize("scan", [1, 2])
def test_one_scan_shows_two_nanotubes_at_their_depths(scan):
    paths = [shared_data("nanotubes_series", f"scan_{i}.h5") for i in range(4)]
    data = sj.read_series(paths, 0.4)
    lens = sj.focal_series(80e3, 25.0, [-150.0, 0.0, 100.0, 250.0])
    bright = sj.bright_field(data, lens, sj.Detector((50, 50), 1.7399), scan)
    found = sj.ssb(bright, np.arange(-40.0, 181.0, 20.0), epsilon=1e-2)
    alike = np.array([[likeness(image, tube) for image in found.images] for tube in tubes(scan)])
    peaks = [float(found.depths[int(np.argmax(a))]) for a in alike]
    # Their true depths are 16 and 106 Å; each tube fades the other's image between them.
    assert abs(peaks[0] - 16.07) < 25 and abs(peaks[1] - 106.07) < 25
    assert alike.max(axis=1).min() > 0.8
    assert alike[0, np.argmax(alike[1])] < 0.4 and alike[1, np.argmax(alike[0])] < 0.4


def tubes(scan):
    """The phases of the two tubes below 1 1/Å, at the positions."""
    with h5py.File(shared_data("nanotubes_series", "truth.h5")) as file:
        potential, z = np.asarray(file["slices_V_A"]), np.asarray(file["slice_z_A"])
        positions = np.asarray(file["positions_A"])[scan].reshape(40, 40, 2)
    grid = sj.Grid(potential.shape[1:], (48 / potential.shape[1], 48 / potential.shape[2]))
    ky, kx = grid.frequencies()
    for part in (z < 61, z > 61):
        spectrum = np.fft.fft2(potential[part].sum(0)) * (np.hypot(ky, kx) < 1)
        yield scenes.at(np.fft.ifft2(spectrum).real, positions, grid)


def likeness(image, truth, rim=4):
    inner = slice(rim, -rim)
    return np.corrcoef(np.asarray(image)[inner, inner].ravel(), truth[inner, inner].ravel())[0, 1]

"""Depth sections against closed forms: weak layers, gauge, virtual detectors."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import j1

from smpr3d_jax.inverse.sections import (
    confocal,
    depth_sections,
    diagonal_gauge,
    focus,
    Gauge,
    section_blocks,
    unwrap,
    virtual_images,
)
from smpr3d_jax.physics.detector import annulus, Detector
from smpr3d_jax.physics.forward import Scattering
from smpr3d_jax.physics.grid import Grid
from smpr3d_jax.physics.optics import focal_series, wavelength
from smpr3d_jax.physics.scan import series_of
from smpr3d_jax.physics.smatrix import (
    Beams,
    disc_quadrature,
    scatter,
    tilt_polynomials,
    TiltModes,
    to_modes,
    unscattered_beams,
    unscattered_modes,
    window_beams,
)

from .helpers import random_complex, random_slices


ENERGY, CUTOFF, PLANE, DEPTH = 80e3, 0.55, 30.0, 55.0
LAMBDA = wavelength(ENERGY)
GRID, WINDOW = Grid((20, 24), (0.7, 0.8)), Grid((20, 24), (0.7, 0.8))
ORDER = 8


def phase_of_layer(strength=1e-3, seed=0):
    """A random real phase without mean, of no transfer above 0.5 1/Å."""
    ky, kx = GRID.frequencies()
    spectrum = np.fft.fft2(np.random.default_rng(seed).normal(size=GRID.shape))
    square = ky**2 + kx**2
    phase = np.fft.ifft2(spectrum * (square < 0.5**2) * (square > 0)).real
    return strength * phase / phase.std()


def turned(phase, h, depth):
    """s_h - 1 of a weak layer `phase` at `depth`, for all tilts `h`."""
    ky, kx = np.broadcast_arrays(*GRID.frequencies())
    turn = ky**2 + kx**2 + 2 * np.tensordot(h, np.stack([ky, kx]), 1)
    spectrum = 1j * np.fft.fft2(phase) * np.exp(1j * np.pi * LAMBDA * (depth - PLANE) * turn)
    return np.fft.ifft2(spectrum)


def weak(representation, phase, depth=DEPTH):
    """The S-matrix of one weak layer, by its closed form."""
    if representation == "beams":
        waves = 1 + turned(phase, window_beams(WINDOW, CUTOFF), depth)
        return Beams(jnp.asarray(waves), GRID, WINDOW, (0.0, 0.0), PLANE, CUTOFF)
    tilts = disc_quadrature(CUTOFF, 20.0, ORDER)
    basis = tilt_polynomials(ORDER, tilts.points, CUTOFF) * tilts.weights
    waves = np.tensordot(basis, turned(phase, tilts.points, depth), 1)
    waves[0] += 1
    return TiltModes(jnp.asarray(waves), GRID, (0.0, 0.0), PLANE, CUTOFF)


def transfer(representation, away):
    """H(q) of the module's docstring; for beams the mean over the beams that there are."""
    ky, kx = np.broadcast_arrays(*GRID.frequencies())
    parabola = np.exp(1j * np.pi * LAMBDA * away * (ky**2 + kx**2))
    if representation == "beams":
        h = window_beams(WINDOW, CUTOFF)
        turns = LAMBDA * away * np.tensordot(h, np.stack([ky, kx]), 1)
        return parabola * np.exp(2j * np.pi * turns).mean(0)
    x = 2 * np.pi * LAMBDA * CUTOFF * np.hypot(ky, kx) * away + 1e-9
    return parabola * 2 * j1(x) / x


confocal_at = jax.jit(confocal)


@pytest.mark.parametrize("mode", ["confocal", "tilt_mean", "scem"])
@pytest.mark.parametrize("make", ["modes", "beams"])
def test_vacuum_has_no_phase(make, mode):
    place = (0.0, 0.0), PLANE, CUTOFF
    modes = make == "modes"
    beams = unscattered_beams(GRID, WINDOW, *place)
    specimen = unscattered_modes(GRID, *place, 2) if modes else beams
    found = depth_sections(specimen, ENERGY, np.asarray([0.0, 80.0]), mode)
    assert found.shape == (2, *GRID.shape)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, 1.0 if mode == "scem" else 0.0, atol=2e-5)


@pytest.mark.parametrize("representation", ["modes", "beams"])
def test_a_weak_layer_has_its_closed_form(x64, representation):
    """C = 1 + i phi * H, and |C|² accordingly."""
    phase = phase_of_layer()
    prepared = focus(weak(representation, phase), ENERGY, 60.0)
    found, depth = None, DEPTH
    for depth in (DEPTH, DEPTH - 20.0, DEPTH + 35.0, PLANE):
        response = np.fft.ifft2(np.fft.fft2(phase) * transfer(representation, DEPTH - depth))
        found = confocal_at(prepared, jnp.asarray(depth))
        np.testing.assert_allclose(found, 1 + 1j * response, atol=3e-6)
    intensity = depth_sections(weak(representation, phase), ENERGY, np.asarray([depth]), "scem")
    np.testing.assert_allclose(intensity[0], np.abs(np.asarray(found)) ** 2, rtol=1e-12)


def test_the_sum_along_ridges_is_the_sum_over_tilts(x64):
    """A strong random S-matrix; the collector that forces the second takes everything."""
    shape = weak("modes", phase_of_layer()).waves.shape
    waves = random_complex(0, shape).at[0].add(10)
    specimen = TiltModes(waves, GRID, (0.0, 0.0), PLANE, CUTOFF)
    one = focus(specimen, ENERGY, 90.0)
    two = focus(specimen, ENERGY, 90.0, collector=1e4)
    assert one.ridges is not None
    assert two.ridges is None
    for depth in (-60.0, PLANE, 88.0):
        a, b = (confocal_at(prepared, jnp.asarray(depth)) for prepared in (one, two))
        np.testing.assert_allclose(a, b, atol=1e-10)


def test_at_focus_the_section_is_the_phase(x64):
    phase = phase_of_layer()
    for representation in ("modes", "beams"):
        prepared = focus(weak(representation, phase), ENERGY, 60.0)
        found = jnp.angle(confocal_at(prepared, jnp.asarray(DEPTH)))
        np.testing.assert_allclose(found, phase, atol=4e-6)


def test_a_thin_layer_is_brightest_at_its_depth(x64):
    """Made by multislice, in both representations, each mode within 3 Å."""
    layer = random_slices(GRID.shape, GRID.sampling, (47.0,), strength=5.0)
    beams = scatter(layer, WINDOW, ENERGY, CUTOFF, PLANE)
    depths = np.arange(20.0, 75.0, 3.0)
    for specimen in (beams, to_modes(beams, ORDER)):
        for mode in ("confocal", "tilt_mean"):
            found = depth_sections(specimen, ENERGY, depths, mode)
            best = depths[int(jnp.argmax(jnp.std(found, axis=(1, 2))))]
            assert abs(best - 47.0) <= 3.0


@pytest.mark.parametrize("representation", ["modes", "beams"])
def test_tilt_mean_agrees_with_confocal_for_weak_specimens(x64, representation):
    specimen = weak(representation, phase_of_layer(1e-4))
    depths = np.asarray([DEPTH, 20.0])
    a, b = (depth_sections(specimen, ENERGY, depths, mode) for mode in ("tilt_mean", "confocal"))
    np.testing.assert_allclose(a, b, atol=2e-7)


@pytest.mark.parametrize("representation", ["modes", "beams"])
def test_linear_in_the_waves_but_for_the_norm(x64, representation):
    """Sections of the mean of two S-matrices are the mean of the sections."""
    one, two = (weak(representation, phase_of_layer(0.1, s), d) for s, d in ((0, 20.0), (1, 50.0)))
    both = eqx.tree_at(lambda s: s.waves, one, (one.waves + two.waves) / 2)
    a, b, c = (confocal_at(focus(s, ENERGY, 60.0), jnp.asarray(40.0)) for s in (one, two, both))
    np.testing.assert_allclose((a + b) / 2, c, atol=1e-12)


@pytest.mark.parametrize("representation", ["modes", "beams"])
def test_collector_keeps_outgoing_waves_within_its_angle(x64, representation):
    phase, away, edge = phase_of_layer(), 25.0, 0.7
    angle = edge * LAMBDA * 1e3
    prepared = focus(weak(representation, phase), ENERGY, 60.0, collector=angle)
    ky, kx = GRID.frequencies()
    h, weights = np.asarray(prepared.points), np.asarray(prepared.weights)
    k = np.hypot(ky + h[:, :1, None], kx + h[:, 1:, None])
    turn = ky**2 + kx**2 + 2 * (ky * h[:, :1, None] + kx * h[:, 1:, None])
    pupil = (k <= edge) * np.exp(1j * np.pi * LAMBDA * away * turn)
    response = np.fft.ifft2(np.fft.fft2(phase) * np.tensordot(weights, pupil, 1))
    found = confocal_at(prepared, jnp.asarray(DEPTH - away))
    np.testing.assert_allclose(found, 1 + 1j * response, atol=5e-6)
    wide = focus(weak(representation, phase), ENERGY, 60.0, collector=1e4)
    free = focus(weak(representation, phase), ENERGY, 60.0)
    depth = jnp.asarray(40.0)
    np.testing.assert_allclose(confocal_at(wide, depth), confocal_at(free, depth), atol=1e-14)


def moved(beams, depth, shift):
    """The same beams with a Fresnel distance and a shift left on the output side."""
    ky, kx = np.broadcast_arrays(*GRID.frequencies())
    k = np.stack([ky, kx])[:, None] + beams.points.T[:, :, None, None]
    turn = np.pi * LAMBDA * depth * (k**2).sum(0) + 2 * np.pi * np.tensordot(shift, k, 1)
    spectrum = np.fft.fft2(np.asarray(beams.waves)) * np.exp(-1j * turn)
    return eqx.tree_at(lambda s: s.waves, beams, jnp.asarray(np.fft.ifft2(spectrum)))


@pytest.mark.parametrize("representation", ["beams", "modes"])
def test_gauge_finds_and_removes_what_was_left_on_the_output_side(x64, representation):
    layers = random_slices(GRID.shape, GRID.sampling, (10.0, 50.0), strength=5.0)
    clean = scatter(layers, WINDOW, ENERGY, CUTOFF, PLANE)
    shifted = moved(clean, 18.0, (0.3, -0.2))
    if representation == "modes":
        clean, shifted = to_modes(clean, 10), to_modes(shifted, 10)
    before, gauge = (diagonal_gauge(s, ENERGY) for s in (clean, shifted))
    # The specimen's own unscattered waves have a small curvature; what was added is exact.
    assert abs(before.depth) < 3
    np.testing.assert_allclose(gauge.depth - before.depth, 18.0, atol=0.1)
    added = np.subtract(gauge.shift, before.shift)
    np.testing.assert_allclose(added, [0.3, -0.2], atol=0.01)
    assert gauge.residual == pytest.approx(before.residual, abs=0.01)
    assert gauge.residual < 0.1
    depths = np.asarray([10.0, 50.0])
    known = Gauge(18.0, (0.3, -0.2))
    a = depth_sections(shifted, ENERGY, depths, gauge=known)
    b = depth_sections(clean, ENERGY, depths)
    # Few modes hold the phase of a shift and a distance only approximately.
    limit = 1e-10 if representation == "beams" else 0.02
    assert float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) < limit


@pytest.mark.parametrize("peak", [0.5, 3.5])
def test_unwrap_of_a_smooth_phase(x64, peak):
    grid = Grid((32, 40), (0.5, 0.4))
    y, x = (2 * np.pi * c / e for c, e in zip(grid.coordinates(), grid.extent, strict=True))
    phase = peak * (np.sin(y) + 0.5 * np.cos(x + 2 * y))
    ky, kx = (jnp.asarray(k) for k in grid.frequencies())
    found = unwrap(jnp.asarray(3.0 * np.exp(1j * phase)), (ky, kx))
    np.testing.assert_allclose(found, phase - phase.mean(), atol=1e-6 if peak < 1 else 1e-3)


def test_blocks_hold_all_planes_in_order():
    specimen = weak("modes", phase_of_layer())
    specimen = eqx.tree_at(lambda s: s.waves, specimen, specimen.waves.astype(jnp.complex64))
    depths = np.arange(0.0, 70.0, 10.0)
    whole = depth_sections(specimen, ENERGY, depths)
    parts = list(section_blocks(specimen, ENERGY, depths, block=3))
    assert [len(z) for z, _ in parts] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate([z for z, _ in parts]), depths)
    np.testing.assert_allclose(jnp.concatenate([image for _, image in parts]), whole, atol=1e-7)


def test_what_does_not_exist_is_refused():
    specimen = unscattered_modes(GRID, (0.0, 0.0), PLANE, CUTOFF, 2)
    with pytest.raises(ValueError, match="'confocl' .*known: .'confocal', 'scem', 'tilt_mean'"):
        depth_sections(specimen, ENERGY, np.zeros(2), "confocl")
    with pytest.raises(ValueError, match="`depths` is empty"):
        depth_sections(specimen, ENERGY, np.zeros(0))


OPTICS, CAMERA = focal_series(ENERGY, 25.0, [0.0]), Detector((10, 12), 7.0, 1)


@pytest.fixture(scope="module")
def specimens():
    """Two layers in a field four times the window, in beams and in modes."""
    window = CAMERA.window(OPTICS.wavelength)
    layers = random_slices((20, 24), window.sampling, (10.0, 50.0), strength=40.0)
    beams = scatter(layers, window, ENERGY, OPTICS.cutoff, PLANE, np.complex64)
    beams = Beams(beams.waves, beams.grid, window, (-3.0, 2.0), PLANE, beams.cutoff)
    return {"beams": beams, "modes": to_modes(beams, 4)}


def test_every_electron_of_vacuum_is_seen(specimens):
    whole = jnp.ones(CAMERA.shape)
    for name, specimen in specimens.items():
        value = jnp.zeros_like(specimen.waves).at[0].set(1)
        value = jnp.ones_like(value) if name == "beams" else value
        empty = eqx.tree_at(lambda s: s.waves, specimen, value)
        found = virtual_images(empty, OPTICS, CAMERA, np.asarray([PLANE]), whole)
        assert found.images.shape == (1, 11, 13)
        # In modes the window loses the tails of the probe.
        np.testing.assert_allclose(found.images, 1.0, atol=1e-5 if name == "beams" else 0.1)
        np.testing.assert_allclose(found.images, found.images[0, 0, 0], rtol=1e-4)


@pytest.mark.parametrize("name", ["beams", "modes"])
def test_an_annulus_equals_direct_simulation(specimens, name):
    specimen = specimens[name]
    mask, depths = annulus(CAMERA, 33.0, 20.0), np.asarray([20.0, 70.0])
    found = virtual_images(specimen, OPTICS, CAMERA, depths, mask)
    step = np.asarray(specimen.grid.sampling)
    np.testing.assert_allclose(found.origin, np.asarray([-3.0, 2.0]) + step * [5, 6])
    pixels = np.asarray([[0, 0], [3, 11], [10, 12]])
    scan = series_of([np.asarray(found.origin) + pixels * step] * 2)
    lens = focal_series(ENERGY, 25.0, list(depths))
    model = Scattering(lens, specimen, scan, CAMERA, jnp.ones(2))
    frames = eqx.filter_jit(model)(jnp.arange(6, dtype=jnp.int32))
    expected = jnp.sum(frames * mask[None], axis=(1, 2)).reshape(2, 3)
    at = found.images[:, pixels[:, 0], pixels[:, 1]]
    assert float(expected.min()) > 0.01
    np.testing.assert_allclose(at, expected, rtol=2e-4)


def test_output_gauge_drops_out(specimens):
    """A phase over outgoing waves changes no intensity where the window is the field."""
    beams = specimens["beams"]
    grid, window = beams.grid, beams.grid
    camera = Detector(grid.shape, CAMERA.pixel / 2, 1)
    layers = random_slices(grid.shape, grid.sampling, (10.0, 50.0), strength=40.0)
    full = scatter(layers, window, ENERGY, beams.cutoff, PLANE, np.complex64)
    ky, kx = np.broadcast_arrays(*grid.frequencies())
    k = np.stack([ky, kx])[:, None] + full.points.T[:, :, None, None]
    turn = np.pi * LAMBDA * 40.0 * (k**2).sum(0)
    # Tilted waves live on the grid's frequencies: beyond them k wraps around.
    inside = (abs(k) < np.asarray([abs(ky).max(), abs(kx).max()])[:, None, None, None]).all(0)
    spectrum = np.fft.fft2(np.asarray(full.waves)) * inside
    spectra = spectrum, spectrum * np.exp(-1j * turn)
    kept, moved = (np.fft.ifft2(spectrum).astype(np.complex64) for spectrum in spectra)
    mask, depth = annulus(camera, 33.0, 20.0), np.asarray([20.0])
    images = [
        virtual_images(
            Beams(jnp.asarray(w), grid, window, (0.0, 0.0), PLANE, full.cutoff),
            OPTICS, camera, depth, mask,
        ).images
        for w in (kept, moved)
    ]  # fmt: skip
    np.testing.assert_allclose(images[0], images[1], rtol=1e-4)


def test_what_does_not_fit_is_refused(specimens):
    call = lambda detector, mask: virtual_images(
        specimens["modes"], OPTICS, detector, np.zeros(1), mask
    )
    with pytest.raises(ValueError, match="one weight a pixel"):
        call(CAMERA, jnp.ones((12, 10)))
    with pytest.raises(ValueError, match="sampled as the specimen is"):
        call(Detector((10, 12), 6.0, 1), jnp.ones((10, 12)))

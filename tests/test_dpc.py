"""The phase from the centre of mass, in radians, against phases that are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smpr3d_jax.data.counts import events_from_frames, Frames, InputError
from smpr3d_jax.data.dataset import Dataset
from smpr3d_jax.inverse import dpc
from smpr3d_jax.inverse.rasters import Raster, raster_of
from smpr3d_jax.physics.optics import focal_series, probe
from smpr3d_jax.physics.scan import raster, series_of
from smpr3d_jax.physics.simulation import count_electrons

from . import scenes


POINTS, PIXELS = (15, 18), (58, 46)
"""Scan positions over the cell and detector pixels, all (y, x)."""


def optics(**aberrations):
    return focal_series(
        scenes.ENERGY, scenes.SEMIANGLE, [60.0], {"C12": 40.0, "phi12": 0.4, **aberrations}
    )


def under_the_probe(phase, lens, where: Raster):
    """The phase correlated with |probe|² of the cell, read at the positions of a raster."""
    wave = np.asarray(probe(lens, scenes.CELL, jnp.zeros(2)))[0, 0]
    spectrum = np.fft.fft2(phase) * np.conj(np.fft.fft2(np.abs(wave) ** 2))
    return scenes.at(np.fft.ifft2(spectrum).real, where.positions())


@pytest.fixture(scope="module")
def scene():
    phase = scenes.waves(0.24, 0.5)
    with jax.enable_x64(True):
        shape, positions = scenes.over_cell(POINTS)
        data = scenes.scanned(scenes.slices(phase), optics(), shape, positions, PIXELS)
    return phase, data


def test_transfer_is_the_autocorrelation_of_the_disc(x64):
    """In focus it is the overlap of two discs, whatever the aberrations of even order do."""
    lens = focal_series(scenes.ENERGY, scenes.SEMIANGLE, [0.0])
    where = Raster((8, 10), (0.0, 0.0), (0.5, 0.1), (-0.2, 0.6))
    q = np.linalg.norm(where.frequencies(half=True), axis=0) / (2 * lens.cutoff)
    q = np.minimum(q, 1.0)
    overlap = 2 / np.pi * (np.arccos(q) - q * np.sqrt(1 - q**2))
    np.testing.assert_allclose(dpc.transfer(lens, where), overlap, atol=8e-3)


@pytest.mark.parametrize("turns, transpose", scenes.ORIENTATIONS)
def test_phase_in_radians_in_all_orientations(x64, turns, transpose):
    phase = scenes.waves(0.24, 0.5)
    shape, positions = scenes.over_cell(POINTS, turns, transpose)
    data = scenes.scanned(scenes.slices(phase), optics(), shape, positions, PIXELS)
    field = dpc.deflection(data, scenes.detector(PIXELS))
    expected = under_the_probe(phase, optics(), field.raster)
    factor, left = scenes.slope(dpc.integrated(field, scenes.ENERGY), expected)
    assert abs(factor - 1) < 2e-3 and left < 5e-3
    factor, left = scenes.slope(dpc.fitted(field, scenes.ENERGY), expected)
    assert abs(factor - 1) < 5e-3 and left < 3e-2


def test_transfer_says_what_the_probe_leaves(x64, scene):
    phase, data = scene
    field = dpc.deflection(data, scenes.detector(PIXELS))
    thin = np.fft.rfft2(scenes.at(phase, field.raster.positions()))
    expected = np.fft.irfft2(thin * dpc.transfer(optics(), field.raster), field.raster.shape)
    factor, left = scenes.slope(dpc.integrated(field, scenes.ENERGY), expected)
    assert abs(factor - 1) < 1e-2 and left < 2e-2


def test_laplacian_is_that_of_the_phase(x64, scene):
    phase, data = scene
    field = dpc.deflection(data, scenes.detector(PIXELS))
    ky, kx = scenes.CELL.frequencies()
    square = -4 * np.pi**2 * (ky**2 + kx**2)
    curved = np.fft.ifft2(np.fft.fft2(phase) * square).real
    expected = under_the_probe(curved, optics(), field.raster)
    factor, left = scenes.slope(dpc.differentiated(field, scenes.ENERGY), expected)
    assert abs(factor - 1) < 5e-3 and left < 2e-2


def bump(points):
    """A phase without periodicity, and its gradient (y, x) in rad/Å."""
    y, x = points[..., 0], points[..., 1]
    waves = [(0.9, 21.0, 9.0, 0.3), (0.6, -14.0, 17.0, 1.0), (1.5, 60.0, 35.0, 2.0)]
    phase, slope = 0.01 * y, np.zeros(points.shape) + [0.01, 0.0]
    for strength, py, px, start in waves:
        turn = 2 * np.pi * (y / py + x / px) + start
        phase = phase + strength * np.sin(turn)
        for axis, period in enumerate((py, px)):
            slope[..., axis] += strength * np.cos(turn) * 2 * np.pi / period
    return phase, slope


def known_field(shape=(30, 24), step=(1.2, 0.9), rotation=0.5, transpose=True, noise=0.0):
    """The exact deflection by `bump` on a turned raster with unequal steps."""
    scan = series_of([raster(shape, step, rotation, transpose)])
    where = raster_of(Dataset(Frames(jnp.zeros((len(scan.positions), 2, 2))), scan, (shape,)))
    phase, slope = bump(where.positions())
    mrad = slope * scenes.wavelength(scenes.ENERGY) / 2e-3 / np.pi
    mrad = mrad + noise * np.random.default_rng(0).normal(size=mrad.shape)
    return phase, dpc.Deflection(jnp.asarray(mrad), jnp.full(shape, 100.0), where)


@pytest.mark.parametrize("rotation, transpose", [(0.0, False), (0.5, False), (2.2, True)])
def test_edges_need_not_be_periodic(x64, rotation, transpose):
    phase, field = known_field(rotation=rotation, transpose=transpose)
    periodic = scenes.slope(dpc.integrated(field, scenes.ENERGY), phase)
    free = scenes.slope(dpc.fitted(field, scenes.ENERGY), phase)
    assert abs(free[0] - 1) < 3e-3 and free[1] < 1e-2
    assert periodic[1] > 10 * free[1]


def test_masked_positions_say_nothing(x64):
    phase, field = known_field()
    weights = np.ones(phase.shape)
    weights[6:13, 4:11], weights[:5, -6:] = 0, 0
    wrong = np.where(weights[..., None] > 0, field.angle, 5.0)
    broken = dpc.Deflection(jnp.asarray(wrong), field.electrons, field.raster)
    fit = dpc.fitted(broken, scenes.ENERGY, jnp.asarray(weights))
    factor, left = scenes.slope(fit, phase, weights)
    assert abs(factor - 1) < 5e-3 and left < 1e-2
    assert abs(np.sum(fit * weights)) < 1e-9
    assert scenes.slope(dpc.fitted(broken, scenes.ENERGY), phase, weights)[1] > 0.1
    other = dpc.fitted(dpc.Deflection(jnp.asarray(wrong * 3), field.electrons, field.raster),
                       scenes.ENERGY, jnp.asarray(weights))  # fmt: skip
    assert scenes.slope(other, phase, weights)[1] > 1
    unseen = np.where(weights[..., None] > 0, field.angle, -70.0)
    same = dpc.fitted(dpc.Deflection(jnp.asarray(unseen), field.electrons, field.raster),
                      scenes.ENERGY, jnp.asarray(weights))  # fmt: skip
    np.testing.assert_allclose(same, fit, atol=1e-12)


def test_weights_are_the_electrons(x64):
    """Frames with few electrons count less: noise falls there, and the fit is the better for it."""
    phase, field = known_field()
    rng = np.random.default_rng(1)
    electrons = np.where(rng.random(phase.shape) < 0.3, 4.0, 400.0)
    spread = 40.0 / np.sqrt(electrons)[..., None]
    noisy = field.angle + 0.02 * spread * rng.normal(size=field.angle.shape)
    given = dpc.Deflection(jnp.asarray(noisy), jnp.asarray(electrons), field.raster)
    by_electrons = scenes.slope(dpc.fitted(given, scenes.ENERGY), phase)[1]
    equal = scenes.slope(dpc.fitted(given, scenes.ENERGY, jnp.ones(phase.shape)), phase)[1]
    assert by_electrons < 0.7 * equal


def test_damping_suppresses_what_is_slow(x64, scene):
    _, data = scene
    field = dpc.deflection(data, scenes.detector(PIXELS))
    plain, damped = (np.fft.rfft2(dpc.integrated(field, scenes.ENERGY, d)) for d in (0.0, 0.1))
    square = np.sum(field.raster.frequencies(half=True, odd=True) ** 2, axis=0)
    np.testing.assert_allclose(damped, plain * square / (square + 0.01), atol=1e-9)


@pytest.mark.parametrize("method", [dpc.integrated, dpc.fitted])
def test_noise_makes_no_chequers(x64, method):
    """Terms at the Nyquist frequencies have no slope: noise in the deflection cannot feed them."""
    _, field = known_field(noise=0.0)
    noise = np.random.default_rng(0).normal(size=field.angle.shape)
    image = method(dpc.Deflection(jnp.asarray(noise), field.electrons, field.raster), scenes.ENERGY)
    window = np.outer(*map(np.hanning, image.shape))
    power = np.abs(np.fft.fft2(window * np.asarray(image))) ** 2
    fast = np.hypot(*np.meshgrid(*map(np.fft.fftfreq, image.shape), indexing="ij")) > 0.35
    nyquist = np.zeros(image.shape, bool)
    nyquist[image.shape[0] // 2], nyquist[:, image.shape[1] // 2] = True, True
    assert power[nyquist].mean() < 3 * power[fast & ~nyquist].mean()


def test_levelled(x64):
    _, field = known_field()
    index = np.stack(np.meshgrid(*map(np.arange, field.raster.shape), indexing="ij"), -1)
    tilt = np.array([0.3, -0.2]) + index @ np.array([[0.01, 0.02], [-0.03, 0.005]])
    plane = dpc.Deflection(jnp.asarray(tilt), field.electrons, field.raster)
    np.testing.assert_allclose(dpc.levelled(plane, plane=True).angle, 0, atol=1e-12)
    flat = dpc.levelled(plane)
    np.testing.assert_allclose(flat.angle.mean((0, 1)), 0, atol=1e-12)
    np.testing.assert_allclose(flat.angle - plane.angle, -tilt.mean((0, 1)) + 0 * tilt, atol=1e-12)


def test_events_and_dense_and_empty_frames(scene):
    data = scenes.single(scene[1])
    shape, counts = data.scan_shapes, count_electrons(40 * data.counts.dense(), jax.random.key(0))
    counts[7] = 0
    frames = Frames(jnp.asarray(counts))
    dense = Dataset(frames, data.scan, shape)
    sparse = Dataset(events_from_frames(frames), data.scan, shape)
    a, b = (dpc.deflection(d, scenes.detector(PIXELS)) for d in (dense, sparse))
    np.testing.assert_array_equal(a.electrons, b.electrons)
    np.testing.assert_allclose(a.angle, b.angle, atol=1e-5)
    assert not a.angle[0, 7].any() and np.isfinite(a.angle).all()
    rows, columns = np.nonzero(counts[11])
    y, x = (np.fft.fftfreq(n, 1 / n) for n in PIXELS)
    n, pixel = counts[11][rows, columns], scenes.detector(PIXELS).pixel
    by_hand = [(n * y[rows]).sum() / n.sum() * pixel, (n * x[columns]).sum() / n.sum() * pixel]
    np.testing.assert_allclose(a.angle[0, 11], by_hand, rtol=1e-5)


def test_mask_and_offset(x64, scene):
    _, data = scene
    camera = scenes.detector(PIXELS)
    mask = np.random.default_rng(2).random(PIXELS)
    field = dpc.deflection(data, camera, jnp.asarray(mask))
    frame = np.asarray(data.counts.dense())[20] * mask
    y = np.fft.fftfreq(PIXELS[0], 1 / PIXELS[0])[:, None] * camera.pixel
    np.testing.assert_allclose(field.angle[1, 2, 0], (y * frame).sum() / frame.sum(), rtol=1e-10)
    moved = type(camera)(PIXELS, camera.pixel, offset=(0.3, -0.2))
    shift = dpc.deflection(data, moved).angle - dpc.deflection(data, camera).angle
    np.testing.assert_allclose(shift[..., 0], -0.3 * camera.pixel, rtol=1e-9)
    np.testing.assert_allclose(shift[..., 1], 0.2 * camera.pixel, rtol=1e-9)


def test_single_precision(scene):
    _, data = scene
    camera = scenes.detector(PIXELS)
    with jax.enable_x64(True):
        fine = [f(dpc.deflection(data, camera), scenes.ENERGY)
                for f in (dpc.integrated, dpc.fitted, dpc.differentiated)]  # fmt: skip
    single = scenes.single(data)
    for f, expected in zip((dpc.integrated, dpc.fitted, dpc.differentiated), fine, strict=True):
        image = f(dpc.deflection(single, camera), scenes.ENERGY)
        assert image.dtype == jnp.float32
        np.testing.assert_allclose(image, expected, atol=2e-4 * np.abs(expected).max())


def test_refusals(scene):
    data = scenes.single(scene[1])
    field = dpc.deflection(data, scenes.detector(PIXELS))
    with pytest.raises(InputError, match="detector has"):
        dpc.deflection(data, scenes.detector((50, 46)))
    for weights in (-jnp.ones(field.raster.shape), jnp.zeros(field.raster.shape), jnp.ones((2, 2))):
        with pytest.raises(InputError, match="`weights`"):
            dpc.fitted(field, scenes.ENERGY, weights)

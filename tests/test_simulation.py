"""Simulated frames against numpy, and against an independent simulation with shared truth."""

import math

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smpr3d_jax.physics.grid import Grid
from smpr3d_jax.physics.optics import focal_series, wavelength
from smpr3d_jax.physics.scan import Scan
from smpr3d_jax.physics.simulation import count_electrons, simulate_series
from smpr3d_jax.physics.specimen import Slices

from .helpers import random_slices, shared_data


ENERGY = 80e3
GRID = Grid((36, 48), (0.4, 0.35))
DEPTHS = (4.0, 20.0)
ABERRATIONS = {"C12": 40.0, "phi12": 0.5, "C21": 500.0, "phi21": 1.0}
DEFOCUS = [-60.0, 25.0]


def optics():
    return focal_series(ENERGY, 25.0, DEFOCUS, ABERRATIONS)


def scan(positions=((5.1, 6.3), (7.77, 2.0), (0.2, 9.9)), series=(0, 1, 1)):
    return Scan(jnp.asarray(positions), jnp.asarray(series, jnp.int32))


def specimen(origin=(0.0, 0.0)):
    slices = random_slices(GRID.shape, GRID.sampling, DEPTHS, strength=200.0)
    return Slices(slices.potential, DEPTHS, GRID, origin)


def frame_by_hand(potential, position, defocus, factor, shape):
    """numpy alone, the detector's boxes summed sample by sample."""
    lam = wavelength(ENERGY)
    ky, kx = np.meshgrid(
        *(np.fft.fftfreq(n, d) for n, d in zip(GRID.shape, GRID.sampling, strict=True)),
        indexing="ij",
    )
    theta, phi = lam * np.hypot(ky, kx), np.arctan2(ky, kx)
    surface = -defocus * theta**2 / 2 + 40.0 * theta**2 / 2 * np.cos(2 * (phi - 0.5))
    surface += 500.0 * theta**3 / 3 * np.cos(phi - 1.0)
    inside = theta <= 0.025
    spectrum = inside / math.sqrt(inside.sum()) * np.exp(-2j * np.pi / lam * surface)
    spectrum *= np.exp(-2j * np.pi * (ky * position[0] + kx * position[1]))
    here, sigma = 0.0, 1.0087066e-3
    for depth, layer in zip(DEPTHS, potential, strict=True):
        spectrum = spectrum * np.exp(-1j * np.pi * lam * (depth - here) * (ky**2 + kx**2))
        spectrum = np.fft.fft2(np.fft.ifft2(spectrum) * np.exp(1j * sigma * layer))
        here = depth
    fine = np.abs(spectrum) ** 2
    frame = np.zeros(shape)
    half = factor / 2
    for row in range(shape[0]):
        for column in range(shape[1]):
            centre = [
                (i if i < (n + 1) // 2 else i - n) * factor
                for i, n in zip((row, column), shape, strict=True)
            ]
            for dy in range(-factor, factor + 1):
                for dx in range(-factor, factor + 1):
                    weight = 1.0
                    for d in (abs(dy), abs(dx)):
                        weight *= 1.0 if d < half else 0.5 if d == half else 0.0
                    frame[row, column] += weight * fine[centre[0] + dy, centre[1] + dx]
    return frame


@pytest.mark.parametrize("factor, shape", [(1, (10, 14)), (2, (10, 13)), (3, (9, 10))])
@pytest.mark.parametrize("chunk", [1, 2])
def test_frames_agree_with_numpy(factor, shape, chunk, x64):
    slices, where = specimen(), scan()
    frames = simulate_series(
        slices, optics(), where, shape, factor, chunk=chunk, band_limit=None, soft=False
    )
    assert frames.shape == (3, *shape)
    for i in range(3):
        series = int(where.series[i])
        expected = frame_by_hand(
            np.asarray(slices.potential),
            np.asarray(where.positions[i]),
            DEFOCUS[series],
            factor,
            shape,
        )
        np.testing.assert_allclose(frames[i], expected, rtol=1e-6, atol=1e-12)


def test_single_precision_is_close_and_kept():
    frames = simulate_series(specimen(), optics(), scan(), (18, 24), 2)
    assert frames.dtype == jnp.float32
    with jax.enable_x64(True):
        precise = simulate_series(specimen(), optics(), scan(), (18, 24), 2)
        assert precise.dtype == jnp.float64
    np.testing.assert_allclose(frames, precise, atol=1e-6)


def test_no_electron_is_lost_by_the_whole_detector(x64):
    frames = simulate_series(specimen(), optics(), scan(), (18, 24), 2, band_limit=None)
    np.testing.assert_allclose(frames.sum(axis=(1, 2)), 1.0, rtol=1e-12)


@pytest.mark.parametrize("dose", [300.0, (100.0, 700.0)])
def test_dose_is_electrons_per_frame_of_each_scan(dose, x64):
    given = jnp.asarray(dose) if isinstance(dose, tuple) else dose
    frames = simulate_series(specimen(), optics(), scan(), (18, 24), 2, dose=given, band_limit=None)
    per_scan = np.broadcast_to(dose, (2,))
    np.testing.assert_allclose(frames.sum(axis=(1, 2)), per_scan[[0, 1, 1]], rtol=1e-12)


def test_origin_and_positions_are_in_one_frame(x64):
    shift = np.array([2.3, -1.7])
    here = simulate_series(specimen(), optics(), scan(), (18, 24), 2)
    moved = scan(np.asarray(scan().positions) + shift)
    there = simulate_series(specimen((2.3, -1.7)), optics(), moved, (18, 24), 2)
    np.testing.assert_allclose(there, here, atol=1e-13)


def test_counts_are_seeded_small_and_poisson():
    where = scan(np.zeros((200, 2)), np.zeros(200, int))
    arguments = (specimen(), optics(), where, (10, 13), 2)
    expected = np.asarray(simulate_series(*arguments, dose=500.0), float)
    counts = simulate_series(*arguments, key=jax.random.key(3), dose=500.0)
    assert counts.dtype == np.uint8
    np.testing.assert_array_equal(
        counts, simulate_series(*arguments, key=jax.random.key(3), dose=500.0)
    )
    assert np.any(counts != simulate_series(*arguments, key=jax.random.key(4), dose=500.0))
    bright = expected > 0.5
    error = ((counts - expected) / np.sqrt(expected))[bright]
    assert abs(error.mean()) < 0.05
    assert error.std() == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("mean, kind", [(3.0, np.uint8), (3e3, np.uint16), (1e6, np.uint32)])
def test_counts_take_the_smallest_type(mean, kind):
    counts = count_electrons(jnp.full((4, 5), mean), jax.random.key(0))
    assert counts.dtype == kind
    assert counts.mean() == pytest.approx(mean, rel=0.5)


def test_an_aperture_that_the_band_limit_would_cut_is_refused():
    cell, nyquist = specimen(), 0.5 / max(GRID.sampling)
    lens = focal_series(ENERGY, 0.8 * nyquist * wavelength(ENERGY) * 1e3, DEFOCUS)
    with pytest.raises(ValueError, match="that a band limit of 0.667 keeps"):
        simulate_series(cell, lens, scan(), (8, 8), 2)
    simulate_series(cell, lens, scan(), (8, 8), 2, band_limit=None)


@pytest.mark.parametrize(
    "semiangle, shape, factor, message",
    [
        (80.0, (8, 8), 2, "aperture of 80.0 mrad"),
        (25.0, (19, 8), 2, "36 pixels of the cell along y.*19"),
        (25.0, (8, 8), 5, "multiple of 5"),
    ],
)
def test_what_the_cell_cannot_hold_is_refused(semiangle, shape, factor, message):
    lens = focal_series(ENERGY, semiangle, DEFOCUS)
    with pytest.raises(ValueError, match=message):
        simulate_series(specimen(), lens, scan(), shape, factor)


def test_counts_need_a_dose():
    with pytest.raises(ValueError, match="dose"):
        simulate_series(specimen(), optics(), scan(), (8, 8), 2, key=jax.random.key(0))


def shared_case(name, positions):
    """Slices, positions and counts (zero frequency in the corner) of an independent simulation."""
    arrays = {}
    with h5py.File(shared_data(name, "truth.h5")) as file:
        for key in ("slices_V_A", "slice_z_A", "positions_A"):
            item = file[key]
            assert isinstance(item, h5py.Dataset)
            arrays[key] = np.asarray(item[()])
        pixel = float(np.asarray(file.attrs["pixel_A"]))
    potential, ends = arrays["slices_V_A"], arrays["slice_z_A"]
    chosen = np.linspace(0, arrays["positions_A"].shape[1] - 1, positions).astype(int)
    counts = []
    for i in range(4):
        with h5py.File(shared_data(name, f"scan_{i}.h5")) as file:
            data = file["datacube_root/datacube/data"]
            assert isinstance(data, h5py.Dataset)
            columns = data.shape[1]
            counts += [data[n // columns, n % columns] for n in chosen]
    # abTEM transmits at the entrance of a slice and labels it by its exit.
    depths = tuple(float(z) for z in ends - ends[0])
    slices = Slices(jnp.asarray(potential), depths, Grid(potential.shape[1:], (pixel, pixel)))
    where = Scan(
        jnp.asarray(arrays["positions_A"][:, chosen].reshape(-1, 2), jnp.float32),
        jnp.repeat(jnp.arange(4, dtype=jnp.int32), positions),
    )
    return slices, where, np.fft.ifftshift(np.asarray(counts, float), axes=(1, 2))


def deviance(expected, counts):
    """Mean of 2 (I - n + n ln(n/I)) per pixel."""
    hits = np.maximum(counts, 1)
    return 2 * np.mean(expected - counts + counts * np.log(hits / expected))


CASES = {
    "nanotubes_series": (80e3, 25.0, [-150.0, 0.0, 100.0, 250.0], {}, 1e5 * 0.4**2),
    "nanotubes_misaligned": (
        80e3,
        25.0,
        [-150.0, 14.0, 88.0, 268.0],
        # Stated with phi from the first array axis to the second: ours is pi/2 - phi.
        {"C12": 30.0, "phi12": math.pi / 2 - 0.6, "C21": 300.0, "phi21": math.pi / 2 - 0.2},
        1e5 * 0.4**2,
    ),
    "heavy_series": (300e3, 22.0, [-110.0, 30.0, 130.0, 270.0], {}, 2e5 * 0.35**2),
}


@pytest.mark.parametrize("name", list(CASES))
def test_an_independent_simulation_differs_by_its_noise_only(name):
    """The counts lie as far from our intensities as our own counts do."""
    energy, semiangle, defocus, aberrations, dose = CASES[name]
    slices, where, counts = shared_case(name, 5)
    expected = simulate_series(
        slices,
        focal_series(energy, semiangle, defocus, aberrations),
        where,
        counts.shape[1:],
        2,
        dose=dose,
    )
    expected = np.asarray(expected, float)
    own = [deviance(expected, np.random.default_rng(s).poisson(expected)) for s in range(20)]
    assert deviance(expected, counts) == pytest.approx(np.mean(own), abs=float(4 * np.std(own)))
    assert counts.sum() == pytest.approx(expected.sum(), abs=4 * math.sqrt(expected.sum()))

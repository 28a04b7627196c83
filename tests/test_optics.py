"""Wavelength, aberrations in both notations, the aperture and the probe."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smpr3d_jax.physics.fourier import convolve
from smpr3d_jax.physics.grid import Grid
from smpr3d_jax.physics.optics import (
    aberration_phase,
    aberration_shift,
    aperture,
    CARTESIAN,
    cartesian,
    focal_series,
    interaction_parameter,
    Optics,
    POLAR,
    polar,
    probe,
    wavelength,
)
from smpr3d_jax.physics.propagation import fresnel


ENERGY = 80e3
GRID = Grid((48, 60), (0.25, 0.3))
ORDERS = sorted({v[:2] for v in CARTESIAN.values()})


def random_polar(seed):
    """All 25 numbers with sizes that give phases of order one at 25 mrad."""
    rng = np.random.default_rng(seed)
    values = {}
    for n, m in ORDERS:
        size = rng.uniform(0.5, 2) * wavelength(ENERGY) / 0.025 ** (n + 1)
        values[f"C{n}{m}"] = size if m else size * rng.choice([-1, 1])
        if m:
            values[f"phi{n}{m}"] = rng.uniform(0, 2 * math.pi / m)
    return values


def polar_surface(values, ky, kx):
    """chi as the table of coefficients defines it."""
    lam = wavelength(ENERGY)
    theta, phi = lam * np.hypot(ky, kx), np.arctan2(ky, kx)
    terms = (
        values[f"C{n}{m}"]
        * theta ** (n + 1)
        / (n + 1)
        * np.cos(m * (phi - values.get(f"phi{n}{m}", 0.0)))
        for n, m in ORDERS
    )
    return 2 * math.pi / lam * sum(terms)


def as_leaves(coefficients, dtype=float):
    return {name: jnp.asarray([value], dtype) for name, value in coefficients.items()}


@pytest.mark.parametrize(
    "energy, length, sigma",
    [
        (30e3, 0.069790816, 1.543269909e-3),
        (60e3, 0.048660605, 1.135690533e-3),
        (80e3, 0.041757161, 1.008706600e-3),
        (120e3, 0.033492153, 8.638113196e-4),
        (200e3, 0.025079340, 7.288401044e-4),
        (300e3, 0.019687489, 6.526161424e-4),
    ],
)
def test_wavelength_and_interaction_parameter(energy, length, sigma):
    assert wavelength(energy) == pytest.approx(length, rel=2e-8)
    assert interaction_parameter(energy) == pytest.approx(sigma, rel=1e-9)


def test_all_coefficients_to_fifth_order_are_known():
    assert len(CARTESIAN) == 25
    assert len(POLAR) == 25
    assert {n for n, _ in ORDERS} == {1, 2, 3, 4, 5}
    assert all((n + m) % 2 == 1 and m <= n + 1 for n, m in ORDERS)


@pytest.mark.parametrize("seed", range(4))
def test_polar_to_cartesian_and_back(seed):
    values = random_polar(seed)
    there = cartesian(values)
    assert sorted(there) == sorted(CARTESIAN)
    back = polar(there)
    assert sorted(back) == sorted(POLAR)
    for name, value in values.items():
        assert back[name] == pytest.approx(value, rel=1e-12, abs=1e-12), name
    again = cartesian(back)
    for name, value in there.items():
        assert again[name] == pytest.approx(value, rel=1e-12, abs=1e-9), name


@pytest.mark.parametrize("name", list(CARTESIAN))
def test_one_coefficient_alone_survives_the_round_trip(name):
    """Angles on the axes, where a and b change sign or vanish."""
    for value in (7.0, -7.0):
        back = cartesian(polar({name: value}))
        assert back.pop(name) == pytest.approx(value)
        assert all(abs(other) < 1e-12 for other in back.values())


def test_an_unknown_coefficient_names_the_nearest():
    with pytest.raises(ValueError, match="phi12"):
        cartesian({"phi_12": 1.0})


@pytest.mark.parametrize("seed", range(3))
def test_phase_follows_the_polar_formula(seed, x64):
    values = random_polar(seed)
    ky, kx = (k * np.ones(GRID.shape) for k in GRID.frequencies())
    chi = aberration_phase(as_leaves(cartesian(values)), jnp.asarray(ky), jnp.asarray(kx), ENERGY)
    assert chi.shape == (1, *GRID.shape)
    expected = polar_surface(values, ky, kx)
    np.testing.assert_allclose(chi[0], expected, rtol=1e-11, atol=1e-9 * np.abs(expected).max())


def test_phase_in_single_precision():
    values = random_polar(7)
    ky, kx = np.random.default_rng(0).uniform(-0.6, 0.6, (2, 50))
    leaves = as_leaves(cartesian(values), jnp.float32)
    single = [jnp.asarray(k, jnp.float32) for k in (ky, kx)]
    chi = aberration_phase(leaves, single[0], single[1], ENERGY)
    assert chi.dtype == jnp.float32
    np.testing.assert_allclose(chi[0], polar_surface(values, ky, kx), atol=2e-4)
    assert aberration_shift(leaves, single[0], single[1], ENERGY).dtype == jnp.float32


@pytest.mark.parametrize("name", list(CARTESIAN))
def test_shift_is_the_gradient_of_the_phase(name, x64):
    rng = np.random.default_rng(3)
    ky, kx = rng.uniform(-0.6, 0.6, (2, 9))
    ky[0] = kx[0] = 0.0
    n = CARTESIAN[name][0]
    leaves = as_leaves({name: 1 / 0.025**n})
    turns = lambda y, x: (
        np.asarray(aberration_phase(leaves, jnp.asarray(y), jnp.asarray(x), ENERGY))[0]
        / (2 * math.pi)
    )
    shift = aberration_shift(leaves, jnp.asarray(ky), jnp.asarray(kx), ENERGY)
    assert shift.shape == (1, 9, 2)
    h = 1e-5
    slope_y = (turns(ky + h, kx) - turns(ky - h, kx)) / (2 * h)
    slope_x = (turns(ky, kx + h) - turns(ky, kx - h)) / (2 * h)
    scale = max(np.abs(slope_y).max(), np.abs(slope_x).max())
    np.testing.assert_allclose(shift[0, :, 0], slope_y, rtol=1e-6, atol=1e-7 * scale)
    np.testing.assert_allclose(shift[0, :, 1], slope_x, rtol=1e-6, atol=1e-7 * scale)


def test_every_scan_has_its_own_value():
    optics = focal_series(ENERGY, 25.0, [-100.0, 0.0, 50.0], {"C12": 30.0, "phi12": 0.4})
    np.testing.assert_allclose(optics.defocus, [-100.0, 0.0, 50.0])
    assert {v.shape for v in optics.aberrations.values()} == {(3,)}
    assert polar({k: float(v[0]) for k, v in optics.aberrations.items()})["C12"] == pytest.approx(
        30
    )
    k = jnp.asarray([0.3])
    chi = aberration_phase(optics.aberrations, k, k, ENERGY)
    steps = -math.pi * wavelength(ENERGY) * 0.18 * np.array([100.0, 50.0])
    np.testing.assert_allclose(np.diff(chi[:, 0]), steps, rtol=1e-4)


@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("cutoff", [0.35, 0.5987])
def test_aperture_has_the_area_of_a_disc(cutoff, soft):
    grid = Grid((400, 480), (0.5, 0.4))
    amplitude = aperture(*grid.frequencies(), cutoff, soft)
    area = amplitude.sum() / (grid.extent[0] * grid.extent[1])
    assert area == pytest.approx(math.pi * cutoff**2, rel=2e-4 if soft else 3e-3)
    assert amplitude.min() == 0
    assert amplitude.max() == 1
    if not soft:
        assert set(np.unique(amplitude)) == {0.0, 1.0}


def test_soft_aperture_grows_smoothly():
    """Its area follows pi cutoff² between pixels too, where the hard one jumps."""
    cutoffs = np.linspace(0.5, 0.52, 21)
    areas = {}
    for soft in (True, False):
        counts = np.array([aperture(*GRID.frequencies(), c, soft).sum() for c in cutoffs])
        areas[soft] = np.abs(np.diff(counts)).max()
    assert areas[True] < 3
    assert areas[False] >= 2 * areas[True]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("position", [(0.0, 0.0), (3.1, 7.77)])
def test_probe_holds_one_electron(dtype, position):
    with jax.enable_x64(dtype is np.float64):
        optics = focal_series(ENERGY, 25.0, [-80.0, 40.0], {"C30": 1e5, "C21": 200.0})
        waves = probe(optics, GRID, jnp.asarray(position, dtype))
        assert waves.shape == (2, 1, *GRID.shape)
        assert waves.dtype == (np.complex128 if dtype is np.float64 else np.complex64)
        np.testing.assert_allclose(
            np.sum(np.abs(waves) ** 2, axis=(1, 2, 3)),
            1.0,
            rtol=1e-5 if dtype is np.float32 else 1e-12,
        )


def test_probe_stands_where_it_is_put(x64):
    optics = focal_series(ENERGY, 25.0, [0.0])
    at = (12 * GRID.sampling[0], 31 * GRID.sampling[1])
    intensity = np.abs(probe(optics, GRID, jnp.asarray(at))[0, 0]) ** 2
    assert np.unravel_index(intensity.argmax(), GRID.shape) == (12, 31)
    np.testing.assert_allclose(
        intensity, np.roll(intensity[::-1, ::-1], (25, 63), (0, 1)), atol=1e-12
    )


@pytest.mark.parametrize("defocus", [-120.0, 60.0, 150.0])
def test_positive_defocus_focuses_further_along_the_beam(defocus, x64):
    """The brightest plane is z = defocus, and the wave there is that of a probe in focus."""
    grid = Grid((96, 80), (0.25, 0.3))
    optics = focal_series(ENERGY, 25.0, [defocus])
    position = jnp.asarray((12.0, 12.0))
    wave = probe(optics, grid, position)[0, 0]
    depths = defocus + np.arange(-40.0, 41.0, 5.0)
    at = lambda z: convolve(wave, fresnel(grid, ENERGY, float(z)))
    peaks = [float(jnp.max(jnp.abs(at(z)))) for z in depths]
    assert depths[int(np.argmax(peaks))] == defocus
    focused = probe(focal_series(ENERGY, 25.0, [0.0]), grid, position)[0, 0]
    np.testing.assert_allclose(at(defocus), focused, atol=1e-12)


def test_depth_of_field():
    optics = Optics(200e3, 25.0, as_leaves({"C10": 0.0}))
    assert 1.7718 * optics.depth_of_field == pytest.approx(71.1, abs=0.05)
    assert optics.cutoff * optics.wavelength == pytest.approx(0.025)

"""S-matrix: modes and beams, against multislice and closed forms."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smpr3d_jax.physics.grid import Grid
from smpr3d_jax.physics.optics import wavelength
from smpr3d_jax.physics.smatrix import (
    disc_quadrature,
    field,
    mode_count,
    place,
    scatter,
    tilt_polynomials,
    to_beams,
    to_modes,
    unscattered_beams,
    unscattered_modes,
    vacuum,
    window_beams,
)
from smpr3d_jax.physics.specimen import Slices

from .helpers import random_complex, random_slices


ENERGY, CUTOFF, ORDER = 80e3, 0.5, 6
WINDOW = Grid((24, 32), (0.5, 0.45))


def test_polynomials_are_orthonormal_over_the_disc():
    tilts = disc_quadrature(CUTOFF, order=ORDER)
    q = tilt_polynomials(ORDER, tilts.points, CUTOFF)
    assert q.shape[0] == mode_count(ORDER)
    np.testing.assert_allclose((q * tilts.weights) @ q.T, np.eye(len(q)), atol=1e-12)


@pytest.mark.parametrize("phase", [0.5, 5.0, 40.0])
def test_quadrature_gives_the_airy_function(phase):
    from scipy.special import j1

    tilts = disc_quadrature(CUTOFF, phase)
    sum_ = np.sum(tilts.weights * np.exp(1j * phase * tilts.points[:, 0] / CUTOFF))
    np.testing.assert_allclose(sum_, 2 * j1(phase) / phase, atol=1e-10)


def test_window_beams_fill_the_aperture():
    points = window_beams(WINDOW, CUTOFF)
    area = WINDOW.extent[0] * WINDOW.extent[1] * np.pi * CUTOFF**2
    assert abs(len(points) - area) < 0.1 * area
    assert np.hypot(*points.T).max() <= CUTOFF * (1 + 1e-8)
    assert any(np.all(p == 0) for p in points)


def test_field_holds_every_window_and_places_the_first_position_on_a_pixel():
    positions = np.random.default_rng(0).uniform(-3, 9, (50, 2)) * [1.0, 0.7]
    grid, origin = field(positions, WINDOW)
    specimen = unscattered_modes(grid, origin, 10.0, CUTOFF, 2)
    corner, rest = place(specimen, jnp.asarray(positions, jnp.float32), WINDOW)
    assert np.all(np.asarray(corner) >= 0)
    assert np.all(np.asarray(corner) + WINDOW.shape <= grid.shape)
    assert np.all(np.abs(rest) <= 0.5011 * np.asarray(WINDOW.sampling))
    centre = (np.asarray(corner) + [12, 16]) * WINDOW.sampling + origin + np.asarray(rest)
    np.testing.assert_allclose(centre, positions, atol=2e-5)


def test_vacuum_is_one_in_both_representations(x64):
    grid = Grid((48, 64), WINDOW.sampling)
    modes = unscattered_modes(grid, (0.0, 0.0), 5.0, CUTOFF, ORDER)
    beams = unscattered_beams(grid, WINDOW, (0.0, 0.0), 5.0, CUTOFF)
    assert modes.order == ORDER
    np.testing.assert_allclose(to_beams(modes, WINDOW).waves, beams.waves, atol=1e-12)
    for specimen in (modes, beams):
        still = jnp.broadcast_to(vacuum(specimen)[:, None, None], specimen.waves.shape)
        np.testing.assert_array_equal(still, specimen.waves)


@pytest.mark.parametrize("plane", [0.0, 37.0])
def test_free_space_scatters_nothing(x64, plane):
    grid = Grid((48, 64), WINDOW.sampling)
    empty = Slices(jnp.zeros((2, 48, 64)), (10.0, 60.0), grid)
    found = scatter(empty, WINDOW, ENERGY, CUTOFF, plane)
    np.testing.assert_allclose(found.waves, 1.0, atol=1e-10)


def test_a_weak_layer_has_the_phase_of_its_depth(x64):
    """s_h(q) = i phi(q) exp(i pi lambda (z - plane)(q² + 2 q.h)) for one weak layer at z."""
    slices = random_slices((48, 64), WINDOW.sampling, (55.0,), strength=1e-3)
    beams = scatter(slices, WINDOW, ENERGY, CUTOFF, 20.0)
    ky, kx = slices.grid.frequencies()
    from smpr3d_jax.physics.optics import interaction_parameter

    phase = np.fft.fft2(interaction_parameter(ENERGY) * np.asarray(slices.potential[0]))
    found = np.fft.fft2(np.asarray(beams.waves) - 1)
    for h, wave in list(zip(beams.points, found, strict=True))[::17]:
        turn = np.pi * wavelength(ENERGY) * 35.0 * (ky**2 + kx**2 + 2 * (ky * h[0] + kx * h[1]))
        expected = 1j * phase * np.exp(1j * turn)
        # Beyond the grid's highest frequency the outgoing wave wraps around.
        inside = (abs(ky + h[0]) < 0.5 / 0.5) & (abs(kx + h[1]) < 0.5 / 0.45)
        np.testing.assert_allclose(wave[inside], expected[inside], atol=1e-5 * abs(phase).max())


def test_each_beam_keeps_its_energy(x64):
    slices = random_slices((48, 64), WINDOW.sampling, (0.0, 25.0, 60.0), strength=30.0)
    beams = scatter(slices, WINDOW, ENERGY, CUTOFF, 30.0)
    np.testing.assert_allclose(jnp.mean(jnp.abs(beams.waves) ** 2, (1, 2)), 1.0, atol=1e-10)


def test_modes_converge_to_the_beams(x64):
    slices = random_slices((48, 64), WINDOW.sampling, (10.0, 50.0), strength=5.0)
    beams = scatter(slices, WINDOW, ENERGY, CUTOFF, 30.0)
    scattered = float(jnp.linalg.norm(beams.waves - 1))
    errors = [
        float(jnp.linalg.norm(to_beams(to_modes(beams, n), WINDOW).waves - beams.waves)) / scattered
        for n in (0, 4, 8)
    ]
    assert errors[0] > 0.3 > errors[1] > errors[2]
    assert errors[2] < 0.05


def test_scatter_refuses_a_cell_that_is_not_whole_windows():
    slices = random_slices((40, 64), WINDOW.sampling, (0.0,))
    with pytest.raises(ValueError, match="whole number of windows"):
        scatter(slices, WINDOW, ENERGY, CUTOFF, 0.0)


def test_scatter_is_differentiable_in_potential_and_tilt(x64):
    slices = random_slices((24, 32), WINDOW.sampling, (0.0, 20.0), strength=5.0)
    target = random_complex(1, (24, 32))

    @jax.jit
    @partial(jax.value_and_grad, argnums=(0, 1))
    def f(potential, tilt):
        moved = Slices(potential, slices.depths, slices.grid)
        waves = scatter(moved, WINDOW, ENERGY, 0.2, 10.0, tilt=tilt).waves
        return jnp.sum(jnp.abs(waves - target[None]) ** 2)

    tilt = jnp.asarray([3.0, -2.0])
    _, gradient = f(slices.potential, tilt)
    rng = np.random.default_rng(2)
    d = (jnp.asarray(rng.normal(size=(2, 24, 32))), jnp.asarray(rng.normal(size=2)))
    e = 1e-5
    up, _ = f(slices.potential + e * d[0], tilt + e * d[1])
    down, _ = f(slices.potential - e * d[0], tilt - e * d[1])
    expected = float(jnp.sum(gradient[0] * d[0]) + jnp.sum(gradient[1] * d[1]))
    np.testing.assert_allclose((up - down) / (2 * e), expected, rtol=1e-6)

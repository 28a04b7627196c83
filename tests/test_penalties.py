"""Penalties against closed forms, and their slopes against finite differences."""

import types

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smpr3d_jax.inverse.penalties import (
    excess_energy,
    gradient_overlaps,
    negative_part,
    small_offsets,
    smooth_drift,
    tilt_roughness,
    total_variation,
)
from smpr3d_jax.inverse.priors import unit_energy
from smpr3d_jax.inverse.sections import depth_sections
from smpr3d_jax.physics.grid import Grid
from smpr3d_jax.physics.optics import wavelength
from smpr3d_jax.physics.scan import Scan
from smpr3d_jax.physics.smatrix import (
    disc_quadrature,
    tilt_polynomials,
    TiltModes,
    to_beams,
    unscattered_beams,
    unscattered_modes,
)

from .helpers import directional_derivative, random_complex


ENERGY, CUTOFF, PLANE = 80e3, 0.6, 30.0
GRID, WINDOW = Grid((12, 18), (0.8, 0.7)), Grid((12, 18), (0.8, 0.7))


def modes(order=4, amplitude=0.1, seed=0):
    """Noisy waves on a grid that is square in nothing."""
    holder = unscattered_modes(GRID, (0.0, 0.0), PLANE, CUTOFF, order, np.complex128)
    noise = amplitude * random_complex(seed, holder.waves.shape)
    return eqx.tree_at(lambda s: s.waves, holder, holder.waves + noise)


def slopes_agree(function, at, direction):
    """Derived against finite differences along `direction`, for real and complex leaves."""
    gradient = jax.jit(jax.grad(function))(at)
    derived = jnp.sum((gradient * direction).real)  # JAX's gradient is the conjugate one
    expected = directional_derivative(jax.jit(function), at, direction, 1e-6)
    assert float(derived) == pytest.approx(expected, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize(
    "penalty",
    [
        excess_energy,
        tilt_roughness,
        lambda s: total_variation(depth_sections(s, ENERGY, np.array([20.0, 45.0])), (0.8, 0.7)),
        lambda s: negative_part(depth_sections(s, ENERGY, np.array([20.0, 45.0])), -0.1),
        lambda s: total_variation(depth_sections(s, ENERGY, np.array([33.0]), "tilt_mean")),
    ],
    ids=["energy", "roughness", "variation", "positivity", "tilt_mean"],
)
@pytest.mark.parametrize("representation", ["modes", "beams"])
def test_slopes_equal_finite_differences(x64, penalty, representation):
    """Through `depth_sections` as well, inside jit."""
    specimen = modes(2)
    if representation == "beams":
        specimen = to_beams(specimen, Grid((6, 9), (0.8, 0.7)))
    function = lambda waves: penalty(eqx.tree_at(lambda s: s.waves, specimen, waves))
    slopes_agree(function, specimen.waves, random_complex(5, specimen.waves.shape))


def test_overlaps_of_gradients_are_those_of_the_polynomials():
    """By central differences, exact for parabolas and nearly so for small steps."""
    order, step = 6, 1e-4
    tilts = disc_quadrature(1.0, 0.0, order)
    slopes = [
        tilt_polynomials(order, tilts.points + move, 1.0)
        - tilt_polynomials(order, tilts.points - move, 1.0)
        for move in step * np.eye(2)
    ]
    slopes = np.stack(slopes) / (2 * step)
    expected = np.einsum("aph,aqh,h->pq", slopes, slopes, tilts.weights)
    np.testing.assert_allclose(gradient_overlaps(order), expected, atol=1e-4)


@pytest.mark.parametrize("depth", [PLANE, 60.0])
def test_roughness_of_a_layer(x64, depth):
    """Mean |lambda z cutoff grad phi|²: nothing where the layer lies in the plane."""
    ky, kx = GRID.frequencies()
    spectrum = np.fft.fft2(np.random.default_rng(0).normal(size=GRID.shape))
    spectrum = spectrum * (ky**2 + kx**2 < 0.4**2)
    tilts = disc_quadrature(CUTOFF, 40.0, 8)
    turn = np.tensordot(tilts.points, np.stack(np.broadcast_arrays(ky, kx)), 1)
    waves = 0.01j * np.exp(2j * np.pi * wavelength(ENERGY) * (depth - PLANE) * turn) * spectrum
    basis = tilt_polynomials(8, tilts.points, CUTOFF) * tilts.weights
    layer = np.fft.ifft2(np.tensordot(basis, waves, 1))
    specimen = TiltModes(jnp.asarray(layer), GRID, (0.0, 0.0), PLANE, CUTOFF)
    slope = [np.fft.ifft2(2j * np.pi * k * spectrum).real for k in (ky, kx)]
    reach = wavelength(ENERGY) * (depth - PLANE) * CUTOFF * 0.01
    expected = np.mean(slope[0] ** 2 + slope[1] ** 2) * reach**2
    np.testing.assert_allclose(tilt_roughness(specimen), expected, rtol=1e-6, atol=1e-12)
    # Differences of neighbouring beams, a twentieth of the aperture apart, are a little coarser.
    wide = Grid((40, 60), (0.8, 0.7))
    found = tilt_roughness(to_beams(specimen, wide))
    np.testing.assert_allclose(found, expected, rtol=0.05, atol=1e-12)


def test_vacuum_is_smooth_and_has_the_energy_that_came_in(x64):
    beams = unscattered_beams(GRID, WINDOW, (0.0, 0.0), PLANE, CUTOFF, np.complex64)
    for specimen in (unscattered_modes(GRID, (0.0, 0.0), PLANE, CUTOFF, 4, np.complex64), beams):
        for penalty in (excess_energy, tilt_roughness):
            found = jax.jit(penalty)(specimen)
            assert found.dtype == np.float32
            assert float(found) == pytest.approx(0, abs=1e-10)


def test_excess_energy_is_nothing_inside_the_set(x64):
    specimen = modes(3, 0.2)
    assert float(excess_energy(specimen)) > 0.01
    bounded = unit_energy(specimen)(specimen.waves)
    inside = eqx.tree_at(lambda s: s.waves, specimen, bounded)
    assert float(excess_energy(inside)) == pytest.approx(0, abs=1e-20)
    only = eqx.tree_at(lambda s: s.waves, specimen, jnp.zeros_like(specimen.waves).at[0].set(1.2))
    assert float(excess_energy(only)) == pytest.approx((1.2**2 - 1) ** 2)


def test_variation_of_a_ramp_and_of_nothing(x64):
    y, x = np.mgrid[:7, :9]
    ramp = jnp.asarray(np.stack([0.3 * y - 0.4 * x, 5 + 0 * y]))
    size = np.hypot(0.3 / 0.5, 0.4 / 0.25)
    expected = (np.sqrt(size**2 + 1e-6) - 1e-3) / 2
    assert float(total_variation(ramp, (0.5, 0.25))) == pytest.approx(expected, rel=1e-9)
    assert float(total_variation(ramp[1])) == pytest.approx(0, abs=1e-15)
    assert np.all(np.isfinite(jax.grad(total_variation)(ramp)))


def test_negative_part_of_positive_images_is_nothing():
    images = jnp.asarray([[1.0, 0.0], [-2.0, 3.0]])
    assert float(negative_part(images)) == pytest.approx(1.0)
    assert float(negative_part(images, -1.0)) == pytest.approx(0.25)
    assert float(negative_part(jnp.abs(images))) == 0


SERIES = np.array([0, 0, 0, 1, 1], np.int32)
NOMINAL = np.array([[0.0, 0], [0, 1], [1, 0], [0, 0], [0, 1]])


def placed(offsets, dtype=float):
    positions = jnp.asarray(NOMINAL + offsets, dtype)
    return types.SimpleNamespace(scan=Scan(positions, jnp.asarray(SERIES)))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_position_priors_are_those_of_their_laws(x64, dtype):
    """The logarithm of the normal density, less that of its peak, over the frames."""
    u = np.random.default_rng(3).normal(size=(5, 2)) * 0.2
    model = placed(u, dtype)
    found = small_offsets(NOMINAL, 0.3)(model)
    assert found.dtype == dtype
    assert float(found) == pytest.approx(np.sum(u**2) / (2 * 0.3**2) / 5, rel=1e-5)
    steps = np.stack([u[1] - u[0], u[2] - u[1], u[4] - u[3]])
    found = smooth_drift(jnp.asarray(NOMINAL), 0.05)(model)
    assert found.dtype == dtype
    assert float(found) == pytest.approx(np.sum(steps**2) / (2 * 0.05**2) / 5, rel=1e-5)


def test_drift_does_not_mind_a_shift_of_a_scan(x64):
    shift = np.where(SERIES[:, None] == 0, [[0.4, -0.1]], [[-0.3, 0.2]])
    assert float(smooth_drift(NOMINAL, 0.1)(placed(shift))) == pytest.approx(0, abs=1e-25)
    assert float(small_offsets(NOMINAL, 0.1)(placed(0 * shift))) == 0


@pytest.mark.parametrize("make", [small_offsets, smooth_drift])
def test_slopes_of_position_priors(x64, make):
    penalty = make(NOMINAL, 0.3)
    function = lambda p: penalty(types.SimpleNamespace(scan=Scan(p, jnp.asarray(SERIES))))
    at = jnp.asarray(NOMINAL + 0.1 * np.arange(10.0).reshape(5, 2) ** 1.5)
    slopes_agree(function, at, jnp.asarray(np.random.default_rng(1).normal(size=(5, 2))))
    for sigma in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="positive `sigma` in Å"):
            make(NOMINAL, sigma)

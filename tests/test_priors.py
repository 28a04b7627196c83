"""The depth-range subspace: a projection, what it keeps and what it removes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import jv

from smpr3d_jax.inverse.priors import (
    depth_range,
    depth_range_basis,
    ridge_amplitudes,
    ridge_shares,
)
from smpr3d_jax.physics.fourier import fft, ifft
from smpr3d_jax.physics.grid import Grid
from smpr3d_jax.physics.optics import wavelength
from smpr3d_jax.physics.smatrix import (
    disc_quadrature,
    tilt_polynomials,
    unscattered_modes,
    vacuum,
)

from .helpers import inner, random_complex


ENERGY, CUTOFF, ORDER, PLANE = 80e3, 0.6, 5, 30.0
GRID = Grid((12, 18), (0.8, 0.7))
RANGE = (10.0, 60.0)
LAMBDA = wavelength(ENERGY)


def specimen(dtype: type = np.complex128):
    """Vacuum on a grid that is square in nothing."""
    return unscattered_modes(GRID, (0.0, 0.0), PLANE, CUTOFF, ORDER, dtype)


def layer(depth, seed=0):
    """Spectrum of the modes of a weak random layer at `depth`, by the direct sum over tilts."""
    ky, kx = np.broadcast_arrays(*GRID.frequencies())
    tilts = disc_quadrature(CUTOFF, 40.0, ORDER)
    h = tilts.points
    turn = 2 * np.pi * LAMBDA * (depth - PLANE) * np.tensordot(h, np.stack([ky, kx]), 1)
    basis = tilt_polynomials(ORDER, h, CUTOFF) * tilts.weights
    factor = np.tensordot(basis, np.exp(1j * turn), 1)
    common = np.pi * LAMBDA * (depth - PLANE) * (ky**2 + kx**2)
    spectrum = 0.05j * np.fft.fft2(np.random.default_rng(seed).normal(size=GRID.shape))
    return factor * np.exp(1j * common) * spectrum


@pytest.fixture(scope="module")
def project():
    """Projections of three weights, compiled once, in float64."""
    with jax.enable_x64(True):
        basis = depth_range_basis(specimen(), ENERGY, RANGE)
        return {w: jax.jit(depth_range(specimen(), basis, w)) for w in (0.0, 0.3, 1.0)}


def test_ridge_amplitudes_are_bessel_functions():
    x = np.linspace(-30, 30, 61)[None] + 1e-3
    expected = np.stack([2 * (n + 1) * jv(n + 1, x) / x for n in range(9)], -1)
    np.testing.assert_allclose(ridge_amplitudes(8, x), expected, atol=1e-12)
    np.testing.assert_allclose(ridge_amplitudes(3, np.zeros(1)), [[1, 0, 0, 0]], atol=1e-14)


def test_basis_is_orthonormal(x64):
    """Projectors are orthogonal ones of few directions, and modes of an order share unit length."""
    basis = depth_range_basis(specimen(), ENERGY, RANGE)
    p = np.asarray(basis.projectors)
    np.testing.assert_allclose(p @ p, p, atol=1e-12)
    np.testing.assert_allclose(p, p.swapaxes(1, 2), atol=1e-12)
    rank = np.trace(p, axis1=1, axis2=2)
    np.testing.assert_allclose(rank, np.rint(rank), atol=1e-10)
    assert rank[0] == pytest.approx(1)
    assert rank.max() <= ORDER + 1
    assert np.all(np.diff(np.rint(rank)) >= 0)
    ridges = np.abs(np.asarray(ridge_shares(ORDER, basis.turn))) ** 2
    order = np.repeat(np.arange(ORDER + 1), np.arange(ORDER + 1) + 1)
    for n in range(ORDER + 1):
        np.testing.assert_allclose(ridges[order == n].sum(0), 1.0, atol=1e-12)


@pytest.mark.parametrize("depth", [0.0, 44.0])
def test_ridge_polynomials_equal_the_direct_sum_over_tilts(x64, depth):
    """sum_h w Q_p(h) exp(2 pi i lambda dz q.h), at q in all directions of a grid not square."""
    basis = depth_range_basis(specimen(), ENERGY, RANGE)
    ky, kx = np.broadcast_arrays(*GRID.frequencies())
    phase = 2 * np.pi * LAMBDA * (depth - PLANE) * CUTOFF * np.hypot(ky, kx)
    amplitudes = np.repeat(ridge_amplitudes(ORDER, phase), np.arange(ORDER + 1) + 1, axis=-1)
    found = np.asarray(ridge_shares(ORDER, basis.turn)) * np.moveaxis(amplitudes, -1, 0)
    tilts = disc_quadrature(CUTOFF, 40.0, ORDER)
    polynomials = tilt_polynomials(ORDER, tilts.points, CUTOFF) * tilts.weights
    for y, x in [(0, 0), (0, 5), (5, 0), (3, 4), (-2, 7), (4, -8), (-1, -1), (6, 9)]:
        turn = 2 * np.pi * LAMBDA * (depth - PLANE) * (tilts.points @ [ky[y, x], kx[y, x]])
        np.testing.assert_allclose(found[:, y, x], polynomials @ np.exp(1j * turn), atol=1e-10)


def test_projection_is_idempotent_and_self_adjoint(x64, project):
    a, b = (random_complex(s, specimen().waves.shape) for s in (0, 1))
    still = vacuum(specimen())[:, None, None]
    linear = lambda v: project[1.0](still + v) - still
    once = linear(a)
    np.testing.assert_allclose(linear(once), once, atol=1e-12)
    np.testing.assert_allclose(inner(linear(b), a), inner(b, once), atol=1e-10)
    assert 0.05 < float(jnp.linalg.norm(once) / jnp.linalg.norm(a)) < 0.8


def test_vacuum_stays(x64, project):
    waves = specimen().waves
    np.testing.assert_allclose(project[1.0](waves), waves, atol=1e-14)


def kept(project, scattered):
    """The scattered wave after the projection, and what that removed of its norm."""
    scattered = jnp.asarray(scattered)
    found = fft(project(specimen().waves + ifft(scattered)) - specimen().waves)
    return found, float(jnp.linalg.norm(found - scattered) / jnp.linalg.norm(scattered))


def test_a_layer_inside_the_range_stays(x64, project):
    """Up to 0.01 rad between rungs with a small tolerance; by default less so at the ends."""
    exact = depth_range_basis(specimen(), ENERGY, RANGE, tolerance=1e-6)
    exact = jax.jit(depth_range(specimen(), exact))
    for depth, loss in [(10.0, 0.2), (30.0, 0.1), (47.3, 0.1), (60.0, 0.2)]:
        assert kept(exact, layer(depth))[1] < 1e-3
        assert kept(project[1.0], layer(depth))[1] < loss


@pytest.mark.parametrize("depth", [-90.0, 150.0])
def test_a_layer_far_outside_goes(x64, project, depth):
    """But for the transfers that see no depth."""
    scattered = layer(depth) * (np.hypot(*GRID.frequencies()) > 0.3)
    found, loss = kept(project[1.0], scattered)
    assert 0.95 < loss <= 1
    assert float(jnp.linalg.norm(found) / np.linalg.norm(scattered)) < 0.3


def test_weight_is_the_share_that_is_removed(x64, project):
    waves = random_complex(3, specimen().waves.shape)
    inside = project[1.0](waves)
    np.testing.assert_allclose(project[0.3](waves), 0.7 * waves + 0.3 * inside, atol=1e-12)
    np.testing.assert_allclose(project[0.0](waves), waves, atol=1e-12)


def test_single_precision(x64, project):
    small = specimen(np.complex64)
    basis = depth_range_basis(small, ENERGY, RANGE)
    waves = random_complex(4, small.waves.shape)
    found = jax.jit(depth_range(small, basis))(waves.astype(np.complex64))
    assert found.dtype == np.complex64
    np.testing.assert_allclose(found, project[1.0](waves), atol=1e-5)


def test_a_range_of_one_depth_at_the_plane_keeps_no_tilt(x64):
    basis = depth_range_basis(specimen(), ENERGY, (PLANE, PLANE))
    waves = random_complex(5, specimen().waves.shape)
    found = jax.jit(depth_range(specimen(), basis))(waves)
    np.testing.assert_allclose(found[1:], 0, atol=1e-12)
    np.testing.assert_allclose(found[0], waves[0], atol=1e-12)

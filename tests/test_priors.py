"""The depth-range subspace: a projection, what it keeps and what it removes."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import jv

from smpr3d_jax.inverse.priors import (
    depth_range,
    depth_range_basis,
    DepthBasis,
    ridge_amplitudes,
    ridge_shares,
    tilt_energies,
    unit_energy,
)
from smpr3d_jax.physics.fourier import fft, ifft
from smpr3d_jax.physics.grid import Grid
from smpr3d_jax.physics.optics import wavelength
from smpr3d_jax.physics.smatrix import (
    Beams,
    disc_quadrature,
    scatter,
    tilt_polynomials,
    to_modes,
    unscattered_beams,
    unscattered_modes,
    vacuum,
)

from .helpers import inner, random_complex, random_slices


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


TWICE: dict[str, Any] = {"double": 0.3, "soft": True, "tolerance": 0.01}


def test_the_frame_of_a_transfer_is_left_as_it_was_entered(x64):
    """Projectors that keep all modes keep S, whatever the direction of q."""
    basis = depth_range_basis(specimen(), ENERGY, RANGE, **TWICE)
    everything = jnp.broadcast_to(jnp.eye(21), basis.projectors.shape)
    basis = DepthBasis(everything, basis.rung, basis.turn)
    waves = random_complex(6, specimen().waves.shape)
    found = jax.jit(depth_range(specimen(), basis))(waves)
    np.testing.assert_allclose(found, waves, atol=1e-12)


def test_scattering_twice_a_little_changes_little(x64, project):
    """Through all modes, in the frame of q, as through the ridges alone."""
    basis = depth_range_basis(specimen(), ENERGY, RANGE, double=1e-9)
    waves = random_complex(7, specimen().waves.shape)
    found, expected = jax.jit(depth_range(specimen(), basis))(waves), project[1.0](waves)
    scattered = expected - specimen().waves
    # The rungs are coarser; where a direction is at the tolerance, one rung may not have it.
    assert jnp.linalg.norm(found - expected) < 0.1 * jnp.linalg.norm(scattered)


def test_soft_weights_are_those_of_a_gaussian_prior(x64):
    """v/(v + eps) of the powers that the cut compares with its tolerance."""
    basis = depth_range_basis(specimen(), ENERGY, RANGE, tolerance=0.02, soft=True)
    found = np.linalg.eigvalsh(np.asarray(basis.projectors))
    assert found.max() == pytest.approx(1 / 1.02)
    assert found.min() > -1e-12
    hard = depth_range_basis(specimen(), ENERGY, RANGE, tolerance=0.02)
    np.testing.assert_array_equal((found > 0.5).sum(1), np.rint(np.trace(hard.projectors.T)))


def ramp(turn):
    """Modes of exp(2 pi i lambda h.turn) for each transfer, `turn` (y, x) being depth times 1/Å."""
    tilts = disc_quadrature(CUTOFF, 40.0, ORDER)
    basis = tilt_polynomials(ORDER, tilts.points, CUTOFF) * tilts.weights
    return np.tensordot(basis, np.exp(2j * np.pi * LAMBDA * np.tensordot(tilts.points, turn, 1)), 1)


def test_two_layers_in_turn_are_kept_only_where_asked_for(x64, project):
    """A transfer q' at z1 and q - q' at z2, as the Fresnel factors between them say."""
    first, second = 12.0 - PLANE, 58.0 - PLANE
    q = np.stack(np.broadcast_arrays(*GRID.frequencies()))
    part = q / 2 + np.array([0.2, -0.1])[:, None, None]
    scattered = ramp(first * part + second * (q - part)) * (np.hypot(*q) < 0.5)
    basis = depth_range_basis(specimen(), ENERGY, RANGE, **TWICE)
    twice = jax.jit(depth_range(specimen(), basis))
    assert kept(project[1.0], scattered)[1] > 0.5
    assert kept(twice, scattered)[1] < 0.25
    assert kept(twice, layer(20.0))[1] < 0.1  # and one layer as before


def test_more_of_a_strong_specimen_is_kept(x64):
    """Four dense layers of 0.5 rad rms by multislice of every beam."""
    grid, window = Grid((36, 40), (0.5, 0.5)), Grid((18, 20), (0.5, 0.5))
    slices = random_slices(grid.shape, grid.sampling, (10.0, 30.0, 50.0, 70.0), strength=500.0)
    strong = to_modes(scatter(slices, window, ENERGY, CUTOFF, 40.0), 6)
    share = []
    trials: list[dict[str, Any]] = [{}, {"tolerance": 1e-4}, TWICE]
    for options in trials:
        basis = depth_range_basis(strong, ENERGY, (10.0, 70.0), **options)
        found = jax.jit(depth_range(strong, basis))(strong.waves)
        left = jnp.linalg.norm(found - strong.waves) ** 2
        share.append(
            float(left / jnp.linalg.norm(strong.waves - vacuum(strong)[:, None, None]) ** 2)
        )
    assert share[0] > share[1] > 0.6 * share[0]  # no tolerance helps much
    assert share[2] < 0.6 * share[1]


def with_waves(holder, waves):
    return eqx.tree_at(lambda s: s.waves, holder, waves)


def noisy(holder, amplitude, seed=0):
    noise = random_complex(seed, holder.waves.shape).astype(holder.waves.dtype)
    return holder.waves + (amplitude / len(holder.waves) ** 0.5) * noise


BEAMS = unscattered_beams(GRID, GRID, (0.0, 0.0), PLANE, CUTOFF, np.complex64)


@pytest.mark.parametrize("dtype", [np.complex64, np.complex128])
@pytest.mark.parametrize("amplitude", [0.02, 0.5])
def test_unit_energy_ends_in_the_set_and_stays_there(x64, dtype, amplitude):
    tight = 2e-6 if dtype == np.complex64 else 1e-12
    for holder in (specimen(dtype), with_waves(BEAMS, BEAMS.waves.astype(dtype))):
        bound, waves = jax.jit(unit_energy(holder)), noisy(holder, amplitude)
        assert float(tilt_energies(with_waves(holder, waves)).max()) > 1.0005
        found = bound(waves)
        assert found.dtype == dtype
        energy = tilt_energies(with_waves(holder, found))
        assert float(energy.max()) == pytest.approx(1, abs=tight)
        np.testing.assert_allclose(bound(found), found, atol=2 * tight)
        np.testing.assert_array_equal(bound(0.9 * found), 0.9 * found)


def test_unit_energy_finds_the_nearest_point(x64):
    """Seen from there, no point of the convex set lies on the side of what was projected."""
    holder = specimen()
    waves = noisy(holder, 0.3)
    found = jax.jit(unit_energy(holder, 1e-9, 4000))(waves)
    quick = jax.jit(unit_energy(holder))(waves)
    away = waves - found
    assert jnp.linalg.norm(waves - quick) < 1.05 * jnp.linalg.norm(away)
    for other in [holder.waves, 0.0 * holder.waves, *(noisy(holder, 1.0, s) for s in range(5))]:
        other = other / max(1.0, float(tilt_energies(with_waves(holder, other)).max()) ** 0.5)
        cosine = inner(away, other - found).real / float(
            jnp.linalg.norm(away) * jnp.linalg.norm(other - found)
        )
        assert cosine < 2e-3


def test_unit_energy_scales_each_beam_alone(x64):
    beams = with_waves(BEAMS, random_complex(1, BEAMS.waves.shape))
    energy = np.mean(np.abs(np.asarray(beams.waves)) ** 2, axis=(1, 2))
    expected = np.asarray(beams.waves) / np.sqrt(np.maximum(energy, 1))[:, None, None]
    np.testing.assert_allclose(unit_energy(beams)(beams.waves), expected, rtol=1e-12)


def test_no_specimen_has_more_than_unit_energy(x64):
    grid = Grid((24, 28), (0.5, 0.5))
    slices = random_slices(grid.shape, grid.sampling, (10.0, 40.0), strength=500.0)
    beams = scatter(slices, Grid((12, 14), (0.5, 0.5)), ENERGY, CUTOFF, 25.0)
    assert isinstance(beams, Beams)
    np.testing.assert_allclose(tilt_energies(beams), 1, rtol=1e-9)
    assert float(jnp.max(tilt_energies(to_modes(beams, 2)))) < 1.2

"""Free space, tilt and slices: unitarity, adjoints, derivatives, an independent multislice."""

import math

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smpr3d_jax.physics.fourier import convolve
from smpr3d_jax.physics.grid import Grid
from smpr3d_jax.physics.optics import interaction_parameter, wavelength
from smpr3d_jax.physics.propagation import band_mask, fresnel, multislice, transmission
from smpr3d_jax.physics.specimen import Slices

from .helpers import directional_derivative, inner, random_complex


ENERGY = 80e3
GRID = Grid((24, 30), (0.31, 0.27))
DEPTHS = (3.0, 7.5, 30.0)
TILT = (11.0, -17.0)
RUN = eqx.filter_jit(multislice)


def specimen(dtype: type = float, seed=0):
    rng = np.random.default_rng(seed)
    potential = rng.uniform(0, 400, (len(DEPTHS), *GRID.shape))
    return Slices(jnp.asarray(potential, dtype), DEPTHS, GRID)


def numpy_multislice(wave, potential, depths, start, stop, tilt, limit):
    """Written again with numpy alone, kernel by kernel in the plane."""
    lam, sigma = wavelength(ENERGY), interaction_parameter(ENERGY)
    ky, kx = np.meshgrid(
        *(np.fft.fftfreq(n, d) for n, d in zip(GRID.shape, GRID.sampling, strict=True)),
        indexing="ij",
    )
    keep = np.ones(GRID.shape)
    if limit is not None:
        keep = (np.hypot(ky, kx) <= limit * 0.5 / max(GRID.sampling)).astype(float)
    drift = ky * math.tan(tilt[0] * 1e-3) + kx * math.tan(tilt[1] * 1e-3)
    here = start
    for depth, layer in [*zip(depths, potential, strict=True), (stop, None)]:
        distance = depth - here
        phase = -math.pi * lam * distance * (ky**2 + kx**2) - 2 * math.pi * distance * drift
        wave = np.fft.ifft2(np.fft.fft2(wave) * np.exp(1j * phase) * keep)
        if layer is not None:
            plate = np.exp(1j * sigma * layer)
            wave = wave * (plate if limit is None else np.fft.ifft2(np.fft.fft2(plate) * keep))
        here = depth
    return wave


@pytest.mark.parametrize("tilt", [(0.0, 0.0), TILT])
@pytest.mark.parametrize("limit", [None, 2 / 3])
@pytest.mark.parametrize("start, stop", [(0.0, 35.0), (20.0, 12.0), (3.0, 30.0)])
def test_multislice_agrees_with_numpy(start, stop, limit, tilt, x64):
    wave = random_complex(1, (2, 3, *GRID.shape))
    slices = specimen()
    ends = jnp.asarray(start), jnp.asarray(stop)
    mine = RUN(wave, slices, ENERGY, *ends, jnp.asarray(tilt), limit)
    assert mine.shape == wave.shape
    expected = numpy_multislice(
        np.asarray(wave), np.asarray(slices.potential), DEPTHS, start, stop, tilt, limit
    )
    np.testing.assert_allclose(mine, expected, atol=1e-10)


def test_single_precision_is_kept_and_close():
    wave = random_complex(1, GRID.shape)
    mine = multislice(wave, specimen(np.float32), ENERGY, -100.0, 200.0, TILT)
    assert mine.dtype == jnp.complex64
    expected = numpy_multislice(
        np.asarray(wave), np.asarray(specimen().potential), DEPTHS, -100.0, 200.0, TILT, None
    )
    np.testing.assert_allclose(mine, expected, atol=1e-3)


@pytest.mark.parametrize("precision", [np.float32, np.float64])
def test_the_wave_sets_the_precision(precision, x64):
    kind = np.complex64 if precision is np.float32 else np.complex128
    wave = random_complex(1, GRID.shape).astype(kind)
    for potential in (np.float32, np.float64):
        assert multislice(wave, specimen(potential), ENERGY, 0.0, 40.0, TILT, 0.6).dtype == kind
    distance = jnp.asarray(3.0, precision)
    assert fresnel(GRID, ENERGY, distance).dtype == kind
    assert fresnel(GRID, ENERGY, distance, jnp.asarray(TILT, precision)).dtype == kind


def test_power_is_conserved(x64):
    wave = random_complex(2, (4, *GRID.shape))
    exit_wave = multislice(wave, specimen(), ENERGY, -20.0, 90.0, TILT)
    power = lambda w: np.sum(np.abs(w) ** 2, axis=(1, 2))
    np.testing.assert_allclose(power(exit_wave), power(wave), rtol=1e-12)


def test_there_and_back_is_nothing(x64):
    wave = random_complex(3, GRID.shape)
    away = convolve(wave, fresnel(GRID, ENERGY, 123.0, TILT))
    np.testing.assert_allclose(
        convolve(away, fresnel(GRID, ENERGY, -123.0, TILT)), wave, atol=1e-12
    )
    halves = fresnel(GRID, ENERGY, 50.0, TILT) * fresnel(GRID, ENERGY, 73.0, TILT)
    np.testing.assert_allclose(halves, fresnel(GRID, ENERGY, 123.0, TILT), atol=1e-12)


def test_conjugate_kernel_is_the_adjoint(x64):
    one, other = random_complex(4, GRID.shape), random_complex(5, GRID.shape)
    kernel = fresnel(GRID, ENERGY, 40.0, TILT)
    left = inner(one, convolve(other, kernel))
    assert left == pytest.approx(inner(convolve(one, jnp.conj(kernel)), other), rel=1e-12)


def test_derived_adjoint_of_multislice_is_its_inverse(x64):
    """Unitary, so the transpose in the wave carries an exit wave back to where it came from."""
    wave = random_complex(6, GRID.shape)
    slices = specimen()
    exit_wave, back = jax.vjp(lambda w: multislice(w, slices, ENERGY, 0.0, 40.0, TILT), wave)
    (returned,) = back(jnp.conj(exit_wave))
    np.testing.assert_allclose(jnp.conj(returned), wave, atol=1e-11)


def test_free_space_follows_a_gaussian_beam(x64):
    """Width and curvature of a paraxial Gaussian in closed form."""
    grid, lam, waist, z = Grid((128, 144), (0.25, 0.22)), wavelength(ENERGY), 1.5, 100.0
    y, x = grid.coordinates()
    square = (y - 16.0) ** 2 + (x - 16.5) ** 2
    parameter = lambda distance: 1 / (waist**2 + 1j * lam * distance / math.pi)
    gaussian = lambda d: waist**2 * parameter(d) * np.exp(-square * parameter(d))
    moved = convolve(jnp.asarray(gaussian(0.0) + 0j), fresnel(grid, ENERGY, z))
    np.testing.assert_allclose(moved, gaussian(z), atol=1e-8)


@pytest.mark.parametrize("tilt", [(8.0, 0.0), (0.0, 8.0), TILT])
def test_a_tilted_specimen_walks_sideways(tilt, x64):
    """Behind distance z the wave of the straight kernel is shifted by z tan theta."""
    grid, z = Grid((60, 72), (0.25, 0.25)), 125.0
    y, x = grid.coordinates()
    wave = jnp.asarray(np.exp(-((y - 7.0) ** 2 + (x - 9.0) ** 2) / 4) + 0j)
    straight = convolve(wave, fresnel(grid, ENERGY, z))
    tilted = convolve(wave, fresnel(grid, ENERGY, z, tilt))
    ky, kx = grid.frequencies()
    shift = [z * math.tan(t * 1e-3) for t in tilt]
    ramp = jnp.asarray(np.exp(-2j * np.pi * (ky * shift[0] + kx * shift[1])))
    np.testing.assert_allclose(tilted, convolve(straight, ramp), atol=1e-12)
    centre = [
        float(np.sum(np.abs(tilted) ** 2 * axis) / np.sum(np.abs(tilted) ** 2)) for axis in (y, x)
    ]
    assert centre == pytest.approx([7.0 + shift[0], 9.0 + shift[1]], abs=1e-3)


@pytest.mark.parametrize("what", ["potential", "tilt", "start", "stop", "wave"])
@pytest.mark.parametrize("limit", [None, 2 / 3])
def test_derivatives_agree_with_differences(what, limit, x64):
    weights = jnp.asarray(np.random.default_rng(8).uniform(0, 1, GRID.shape))
    values = {
        "potential": specimen().potential,
        "tilt": jnp.asarray(TILT),
        "start": jnp.asarray(-3.0),
        "stop": jnp.asarray(55.0),
        "wave": random_complex(9, GRID.shape),
    }

    @jax.jit
    def loss(value):
        now = values | {what: value}
        slices = Slices(now["potential"], DEPTHS, GRID)
        wave = multislice(
            now["wave"], slices, ENERGY, now["start"], now["stop"], now["tilt"], limit
        )
        return jnp.sum(weights * (wave.real**2 + wave.imag**2)) + jnp.sum(weights * wave.imag)

    rng = np.random.default_rng(10)
    shape = values[what].shape
    direction = random_complex(11, shape) if what == "wave" else jnp.asarray(rng.normal(size=shape))
    slope = jax.grad(loss)(values[what])
    derived = float(jnp.sum(slope * direction).real)
    measured = directional_derivative(loss, values[what], direction, 1e-5)
    assert derived == pytest.approx(measured, rel=1e-5, abs=1e-7)


def test_distance_of_the_kernel_is_differentiable(x64):
    target = random_complex(12, GRID.shape)
    loss = lambda z: jnp.sum(fresnel(GRID, ENERGY, z, jnp.asarray(TILT)) * target).real
    slope = jax.grad(loss)(jnp.asarray(20.0))
    measured = directional_derivative(loss, jnp.asarray(20.0), 1.0, 1e-4)
    assert float(slope) == pytest.approx(measured, rel=1e-6)


def test_it_compiles_once_over_a_batch_of_specimens(x64):
    """vmap over potentials: a patch of a larger field for each probe."""
    potentials = jnp.stack([specimen(seed=s).potential for s in range(3)])
    waves = random_complex(13, (3, *GRID.shape))
    run = eqx.filter_jit(
        jax.vmap(lambda w, v: multislice(w, Slices(v, DEPTHS, GRID), ENERGY, 0.0, 30.0))
    )
    together = run(waves, potentials)
    for i in range(3):
        alone = multislice(waves[i], Slices(potentials[i], DEPTHS, GRID), ENERGY, 0.0, 30.0)
        np.testing.assert_allclose(together[i], alone, atol=1e-12)


def test_band_limit_removes_aliases(x64):
    """With two thirds kept, no frequency outside the circle is ever occupied."""
    mask = band_mask(GRID, 2 / 3)
    wave = convolve(random_complex(14, GRID.shape), mask.astype(complex))
    exit_wave = multislice(wave, specimen(), ENERGY, 0.0, 40.0, TILT, 2 / 3)
    outside = np.fft.fft2(exit_wave)[np.asarray(mask) == 0]
    assert np.abs(outside).max() < 1e-10
    assert 0 < float(mask.sum()) < mask.size


def test_transmission_is_a_pure_phase(x64):
    plate = transmission(specimen().potential, ENERGY)
    np.testing.assert_allclose(np.abs(plate), 1.0)
    weak = transmission(jnp.asarray([[1e-3]]), ENERGY)
    assert float(weak[0, 0].imag) == pytest.approx(1.0087066e-6, rel=1e-6)


def test_a_wave_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"\(24, 29\).*\(24, 30\)"):
        multislice(random_complex(0, (24, 29)), specimen(np.float32), ENERGY, 0.0, 1.0)

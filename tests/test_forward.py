"""The forward model against multislice; adjoints, gradients, plans."""

from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smpr3d_jax.physics.beamlets import Beamlets
from smpr3d_jax.physics.detector import Detector, intensity
from smpr3d_jax.physics.forward import Blocks, exit_waves, prepare, Scattering
from smpr3d_jax.physics.fourier import fft, ifft, phase_factor
from smpr3d_jax.physics.optics import aberration_phase, focal_series
from smpr3d_jax.physics.propagation import multislice
from smpr3d_jax.physics.scan import raster, series_of
from smpr3d_jax.physics.smatrix import Beams, field, scatter, to_modes, unscattered_modes

from .helpers import directional_derivative, inner, random_complex, random_slices


ENERGY, SEMIANGLE, DEFOCI = 80e3, 25.0, [-60.0, 20.0, 110.0]
DETECTOR = Detector((24, 32), 3.2, 1)
ABERRATIONS = {"C12": 20.0, "phi12": 0.4, "C21": 250.0, "phi21": 1.0, "C30": 1e4}

frames_of = eqx.filter_jit(lambda model, index: model(index))
exit_waves_of = eqx.filter_jit(exit_waves)


@cache
def world(representation="beams", dtype=None, integration=1, order=4):
    """A strongly scattering model: three scans, sub-pixel positions, non-square everywhere."""
    detector = Detector(DETECTOR.shape, DETECTOR.pixel, integration)
    optics = focal_series(ENERGY, SEMIANGLE, DEFOCI, ABERRATIONS)
    window = detector.window(optics.wavelength)
    slices, specimen = scattered()
    rng = np.random.default_rng(5)
    steps = np.asarray(window.sampling) * [5, 4]
    positions = [
        np.asarray(window.extent) / 2 + raster((4, 7), tuple(steps)) + rng.normal(0, 0.1, (28, 2))
        for _ in DEFOCI
    ]
    if representation == "modes":
        specimen = to_modes(specimen, order)
    dose = jnp.asarray([1e3, 2e3, 1.5e3])
    model = Scattering(optics, specimen, series_of(positions), detector, dose)
    if dtype is not None:
        kinds = {"f": np.dtype(dtype), "c": np.result_type(dtype, np.complex64)}
        model = jax.tree.map(
            lambda a: a.astype(kinds[a.dtype.kind]) if eqx.is_inexact_array(a) else a, model
        )
    return model, slices


@cache
def scattered():
    """A cell of two by two windows and its S-matrix in beams, made once, in float64."""
    optics = focal_series(ENERGY, SEMIANGLE, DEFOCI)
    window = DETECTOR.window(optics.wavelength)
    slices = random_slices((48, 64), window.sampling, (5.0, 40.0, 70.0), strength=60.0)
    return slices, scatter(slices, window, ENERGY, optics.cutoff, 35.0)


def periodised_multislice(model, slices, index):
    """Direct multislice of the probe repeated with the window's period, cropped to the window."""
    window, specimen, grid = model.window, model.specimen, slices.grid
    through = jax.jit(lambda probe: multislice(probe, slices, ENERGY, 0.0, specimen.plane))
    h = specimen.points
    chi = aberration_phase(
        model.optics.aberrations, jnp.asarray(h[:, 0]), jnp.asarray(h[:, 1]), ENERGY
    )
    y, x = grid.coordinates()
    chi, y, x, waves = np.asarray(chi), np.asarray(y), np.asarray(x), []
    for i in np.asarray(index):
        scan, rho = int(model.scan.series[i]), np.asarray(model.scan.positions[i], float)
        size = float(np.sqrt(float(model.dose[scan]) / (len(h) * np.prod(window.shape))))
        turns = h[:, :1, None] * (y - rho[0])[None] + h[:, 1:, None] * (x - rho[1])[None]
        probe = np.sum(size * np.exp(2j * np.pi * turns - 1j * chi[scan][:, None, None]), 0)
        wave = through(jnp.asarray(probe))
        nearest = (
            np.floor(rho / window.sampling + 0.501).astype(int) - np.asarray(window.shape) // 2
        )
        rows, columns = (slice(n, n + size) for n, size in zip(nearest, window.shape, strict=True))
        waves.append(np.asarray(wave)[rows, columns])
    return np.stack(waves)


INDEX = jnp.asarray([0, 5, 40, 83, 60])


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-5), (np.float64, 1e-10)])
@pytest.mark.parametrize("together", [False, True])
def test_smatrix_equals_multislice_of_the_periodised_probe(x64, dtype, tolerance, together):
    model, slices = world(dtype=dtype)
    if together:
        model = prepare(model, chunk=np.asarray(INDEX)[None])
    found = np.asarray(exit_waves_of(model, INDEX)[:, 0])
    assert found.dtype == np.result_type(dtype, np.complex64)
    exact, _ = world(dtype=np.float64)
    expected = periodised_multislice(exact, slices, INDEX)
    assert np.linalg.norm(found - expected) < tolerance * np.linalg.norm(expected)


def test_vacuum_holds_the_dose_in_the_window(x64):
    model, _ = world("modes")
    empty = unscattered_modes(*field(np.asarray(model.scan.positions), model.window), 35.0,
                              model.optics.cutoff, 4)  # fmt: skip
    model = eqx.tree_at(lambda m: m.specimen, model, empty)
    total = np.sum(frames_of(model, INDEX), axis=(1, 2))
    np.testing.assert_allclose(total, model.dose[model.scan.series[INDEX]], rtol=0.1)
    assert np.all(np.asarray(total) < np.asarray(model.dose[model.scan.series[INDEX]]))


def test_beams_hold_exactly_the_dose_in_vacuum(x64):
    model, _ = world("beams")
    model = eqx.tree_at(lambda m: m.specimen.waves, model, jnp.ones_like(model.specimen.waves))
    total = np.sum(frames_of(model, INDEX), axis=(1, 2))
    np.testing.assert_allclose(total, model.dose[model.scan.series[INDEX]], rtol=1e-10)


def test_modes_agree_with_beams_but_for_the_probe_tails(x64):
    """With enough modes only the beams' periodic repetition of the probe is left."""
    beams, _ = world("beams")
    modes, _ = world("modes", order=10)
    a, b = (np.asarray(exit_waves_of(m, INDEX)) for m in (beams, modes))
    assert np.linalg.norm(a - b) / np.linalg.norm(a) < 0.25


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.complex64, 1e-5), (np.complex128, 1e-12)])
@pytest.mark.parametrize("representation", ["modes", "modes planned", "beams", "beams planned"])
def test_adjoint_of_the_exit_wave(x64, representation, dtype, tolerance):
    model, _ = world(representation.split()[0], dtype=np.finfo(dtype).dtype)
    if representation.endswith("planned"):
        model = prepare(model, chunk=np.asarray(INDEX)[None])

    def forward(waves):
        return exit_waves(eqx.tree_at(lambda m: m.specimen.waves, model, waves), INDEX)

    @jax.jit
    def both(waves, other):
        image, pull = jax.vjp(forward, waves)
        # A vjp transposes without conjugation; the adjoint conjugates on both sides.
        return image, jnp.conj(pull(jnp.conj(other))[0])

    waves = random_complex(0, model.specimen.waves.shape, dtype)
    other = random_complex(1, (len(INDEX), 1, *model.window.shape), dtype)
    image, back = both(waves, other)
    scale = float(np.linalg.norm(image) * np.linalg.norm(other))
    assert abs(inner(other, image) - inner(back, waves)) < tolerance * scale


@pytest.mark.parametrize("integration", [1, 2, 3])
def test_adjoint_of_the_detector_gradient(x64, integration):
    wave = random_complex(2, (2, 24, 32))
    weight = jnp.asarray(np.random.default_rng(0).normal(size=(2, 24, 32)))
    f = jax.jit(lambda w: jnp.sum(weight * intensity(w, integration)))
    direction = random_complex(3, wave.shape)
    gradient = jnp.conj(jax.jit(jax.grad(f))(wave))
    expected = directional_derivative(f, wave, direction, 1e-6)
    np.testing.assert_allclose(inner(gradient, direction).real, expected, rtol=1e-7)


@pytest.mark.parametrize("integration", [1, 2, 3, 4])
def test_pixel_integration_keeps_the_electrons(x64, integration):
    wave = random_complex(4, (3, 24, 30))
    total = jnp.sum(intensity(wave, integration), axis=(1, 2))
    np.testing.assert_allclose(total, jnp.sum(jnp.abs(wave) ** 2, axis=(1, 2)), rtol=1e-12)


def test_pixel_integration_is_a_box_over_the_finer_pattern(x64):
    wave = random_complex(5, (8, 6))
    padded = jnp.zeros((16, 12), complex).at[:8, :6].set(wave)
    fine = np.abs(np.asarray(fft(padded))) ** 2
    box = np.zeros_like(fine)
    for i, a in ((-1, 0.5), (0, 1.0), (1, 0.5)):
        for j, b in ((-1, 0.5), (0, 1.0), (1, 0.5)):
            box += a * b * np.roll(fine, (-i, -j), (0, 1))
    np.testing.assert_allclose(intensity(wave, 2), box[::2, ::2], rtol=1e-12)


def test_fourier_transform_is_unitary(x64):
    a, b = random_complex(6, (5, 7, 9)), random_complex(7, (5, 7, 9))
    np.testing.assert_allclose(inner(a, fft(b)), inner(ifft(a), b), rtol=1e-12)
    plane = phase_factor(2 * np.pi * jnp.broadcast_to(jnp.arange(9.0)[None] * 2 / 9, (7, 9)))
    assert int(jnp.argmax(jnp.abs(fft(plane)))) == 2


LEAVES = [
    ("specimen.waves", lambda m: m.specimen.waves, 1e-4),
    ("C10", lambda m: m.optics.aberrations["C10"], 1e-3),
    ("C12a", lambda m: m.optics.aberrations["C12a"], 1e-3),
    ("C21b", lambda m: m.optics.aberrations["C21b"], 1e-2),
    ("C30", lambda m: m.optics.aberrations["C30"], 1.0),
    ("positions", lambda m: m.scan.positions, 1e-5),
    ("dose", lambda m: m.dose, 1e-3),
]


@eqx.filter_jit
@eqx.filter_value_and_grad
def likelihood(model, target):
    """And its gradient to all leaves at once, so that one compiled function does for all."""
    intensity = model(INDEX)
    return jnp.sum(intensity - target * jnp.log(intensity + 0.01))


@cache
def slope(representation):
    """A model, frames it does not explain, and the gradient there."""
    model, _ = world(representation, integration=2)
    noise = np.random.default_rng(8).uniform(0.5, 1.5, (5, 24, 32))
    target = frames_of(model, INDEX) * jnp.asarray(noise)
    return model, target, likelihood(model, target)[1]


@pytest.mark.parametrize("representation", ["modes", "beams"])
@pytest.mark.parametrize(("name", "where", "step"), LEAVES, ids=[leaf[0] for leaf in LEAVES])
def test_gradients_agree_with_finite_differences(x64, representation, name, where, step):
    model, target, gradient = slope(representation)
    leaf = where(model)
    direction = random_complex(9, leaf.shape)
    direction = direction if jnp.iscomplexobj(leaf) else direction.real
    value = lambda leaf: likelihood(eqx.tree_at(where, model, leaf), target)[0]
    expected = directional_derivative(value, leaf, direction, step)
    found = inner(jnp.conj(where(gradient)), direction).real
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_planned_modes_agree_with_exact_ones(x64):
    """A commensurate raster is tabulated exactly; others are rounded to an eighth of a pixel."""
    model, _ = world("modes")
    d = np.asarray(model.window.sampling)
    regular = series_of([np.asarray(model.window.extent) / 2 + raster((4, 7), tuple(d * 1.25))] * 3)
    model = eqx.tree_at(lambda m: m.scan, model, regular)
    planned = prepare(model)
    assert isinstance(planned.plan, Beamlets)
    assert planned.plan.table.values.shape[0] == 3 * 4 * 4
    waves = lambda m: np.asarray(exit_waves_of(m, INDEX))
    np.testing.assert_allclose(waves(planned), waves(model), atol=1e-9)
    irregular, _ = world("modes")
    a, b = waves(irregular), waves(prepare(irregular))
    assert 1e-6 < np.linalg.norm(a - b) / np.linalg.norm(a) < 0.1


def test_neighbours_together_equal_each_alone(x64):
    model, _ = world("beams")
    assert isinstance(model.specimen, Beams)
    near = np.asarray([0, 1, 7, 8, 28, 36])
    planned = prepare(model, chunk=near[None])
    assert isinstance(planned.plan, Blocks) and max(planned.plan.reach) < 20
    for index in (near, np.asarray(INDEX)):  # the second lies outside the reach
        a, b = (exit_waves_of(m, jnp.asarray(index)) for m in (planned, model))
        np.testing.assert_allclose(a, b, atol=1e-10)

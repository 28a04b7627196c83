"""Layers as the specimen of the forward model: against multislice and S-matrix; gradients."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smpr3d_jax.physics.detector import Detector
from smpr3d_jax.physics.forward import exit_waves, prepare, Scattering
from smpr3d_jax.physics.fourier import fft
from smpr3d_jax.physics.grid import Grid
from smpr3d_jax.physics.layers import (
    empty_layers,
    Layers,
    probes_of,
    propagators,
    to_smatrix,
)
from smpr3d_jax.physics.optics import focal_series
from smpr3d_jax.physics.passage import (
    carry,
    crops,
    padded,
    pull_one_by_one,
    pull_together,
)
from smpr3d_jax.physics.propagation import multislice, transmission
from smpr3d_jax.physics.scan import raster, series_of
from smpr3d_jax.physics.simulation import simulate_series
from smpr3d_jax.physics.smatrix import scatter, unscattered_modes
from smpr3d_jax.physics.specimen import Slices

from .helpers import directional_derivative, inner, random_complex, random_slices


ENERGY, SEMIANGLE, DEFOCI = 80e3, 25.0, [-40.0, 20.0, 90.0]
ABERRATIONS = {"C12": 20.0, "phi12": 0.4, "C21": 250.0, "phi21": 1.0, "C30": 1e4}
DEPTHS, PLANE = (5.0, 40.0, 70.0), 38.0
TILT = (6.0, -4.0)
DOSE = (1e3, 2e3, 1.5e3)


def world(shape=(24, 32), pixel=3.2, cell=2, strength=60.0, tilt=TILT, order=None, **detector: Any):
    """Three scans of a strong specimen of three layers; everything is square in nothing."""
    settings: dict[str, Any] = {"integration": 1} | detector
    camera = Detector(shape, pixel, **settings)
    optics = focal_series(ENERGY, SEMIANGLE, DEFOCI, ABERRATIONS)
    window = camera.window(optics.wavelength)
    big = (cell * shape[0], cell * shape[1])
    slices = random_slices(big, window.sampling, DEPTHS, strength)
    grid = slices.grid
    layers = empty_layers(grid, (0.0, 0.0), np.asarray(DEPTHS), PLANE, optics.cutoff, order)
    layers = eqx.tree_at(
        lambda s: (s.potential, s.tilt), layers, (slices.potential, jnp.asarray(tilt))
    )
    if order is not None:
        correction = 0.1 * smooth_waves(7, layers.correction.shape)
        layers = eqx.tree_at(lambda s: s.correction, layers, correction)
    rng = np.random.default_rng(5)
    middle = np.asarray(grid.extent) / 2
    scan = series_of([middle + raster((3, 4), (0.7, 0.5)) + rng.normal(0, 0.1, (12, 2))] * 3)
    return Scattering(optics, layers, scan, camera, jnp.asarray(DOSE)), slices


def smooth_waves(seed, shape):
    """Complex noise of the lowest frequencies, of about size 1."""
    few = np.zeros(shape, complex)
    few[..., :3, :3] = np.asarray(random_complex(seed, (*shape[:-2], 3, 3)))
    return jnp.asarray(np.fft.ifft2(few) * shape[-1] * shape[-2] / 3)


INDEX = jnp.asarray([0, 5, 17, 35, 30])
waves_of = eqx.filter_jit(exit_waves)
frames_of = eqx.filter_jit(lambda model, index: model(index))


def distance(a, b):
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


@pytest.mark.parametrize("stretch", [None, 1.01])
def test_a_wave_is_carried_as_by_multislice(x64, stretch):
    """Where window and cell are one, there is no difference at all."""
    model, slices = world(cell=1)
    scale = 1.0 if stretch is None else stretch
    # The same physics in nominal lengths, which are `stretch` times the true ones.
    y, x = (d / scale for d in slices.grid.sampling)
    true = Grid(slices.grid.shape, (y, x))
    layers, wave = model.specimen, random_complex(1, (2, 3, *true.shape))
    steps = propagators(layers, slices.grid, ENERGY, stretch and jnp.asarray(stretch))
    ones = (jnp.ones(n, complex) for n in true.shape)
    found = carry(fft(wave), transmission(slices.potential, ENERGY), steps, *ones)
    there = Slices(slices.potential, slices.depths, true)
    expected = multislice(wave, there, ENERGY, DEPTHS[0], PLANE, TILT)
    np.testing.assert_allclose(found, expected, atol=1e-10)


@pytest.mark.parametrize(
    ("strength", "halo", "limit"), [(10.0, True, 1e-3), (60.0, True, 6e-3), (60.0, False, 0.07)]
)
def test_frames_of_a_true_probe_in_a_large_cell(x64, strength, halo, limit):
    """What is left is what scatters outside the window, and, cut off there, the probe's tails."""
    model, slices = world(cell=4, strength=strength, integration=4, halo=halo)
    # The simulator's specimen turns about z = 0, the model's about its plane.
    away = PLANE * np.tan(np.asarray(TILT) * 1e-3)
    scan = eqx.tree_at(lambda s: s.positions, model.scan, model.scan.positions - away[None])
    few = jax.tree.map(lambda a: a[INDEX], scan)
    expected = simulate_series(
        slices, model.optics, few, (24, 32), 4, dose=model.dose, tilt=TILT, band_limit=None
    )
    found = frames_of(model, INDEX)
    off = jnp.sum(jnp.abs(found - expected), (1, 2)) / jnp.sum(expected, (1, 2))
    assert float(off.max()) < limit, off


def test_layers_scatter_as_their_s_matrix(x64):
    """Of waves that no edge of the band is near, in tilt modes and in beams."""
    model, slices = world(shape=(32, 48), strength=8.0)
    fine = Grid(slices.grid.shape, (0.33, 0.3))
    small = Grid((32, 48), fine.sampling)
    thin = Slices(slices.potential, slices.depths, fine)
    layers = model.specimen
    layers = Layers(thin.potential, layers.depths, layers.tilt, None, fine, (0.0, 0.0), PLANE, 0.4)
    expected = jax.jit(lambda: scatter(thin, small, ENERGY, 0.4, PLANE, tilt=TILT).waves)()
    found = to_smatrix(layers, ENERGY, window=small).waves
    assert distance(found - 1, expected - 1) < 1e-3


@pytest.mark.parametrize("order", [None, 1])
def test_exit_waves_are_those_of_the_s_matrix_in_modes(x64, order):
    """But for high orders of the tilt, and the tails of the probe; with a correction as without."""
    model, _ = world((40, 48), 2.0, strength=20.0, order=order)
    modes = to_smatrix(model.specimen, ENERGY, order=8)
    through_modes = eqx.tree_at(lambda m: m.specimen, model, modes)
    assert distance(waves_of(model, INDEX), waves_of(through_modes, INDEX)) < 0.05


def test_without_potential_the_probe_comes_out_as_it_went_in(x64):
    model, _ = world((40, 48), 2.0, strength=0.0, tilt=(0.0, 0.0))
    layers = model.specimen
    empty = unscattered_modes(layers.grid, (0.0, 0.0), PLANE, layers.cutoff, 0)
    free = eqx.tree_at(lambda m: m.specimen, model, empty)
    assert distance(waves_of(model, INDEX), waves_of(free, INDEX)) < 0.05
    dose = model.dose[model.scan.series[INDEX]]
    np.testing.assert_allclose(jnp.sum(frames_of(model, INDEX), (1, 2)), dose, rtol=0.02)
    # In the wide window no wave ends where the small one does.
    wide = lambda m: eqx.tree_at(lambda m: m.detector, m, Detector((40, 48), 2.0, 2, halo=True))
    assert distance(waves_of(wide(model), INDEX), waves_of(wide(free), INDEX)) < 2e-3


def test_a_correction_of_nothing_changes_nothing(x64):
    plain, _ = world()
    model, _ = world(order=1)
    nothing = jnp.zeros_like(model.specimen.correction)
    still = eqx.tree_at(lambda m: m.specimen.correction, model, nothing)
    np.testing.assert_allclose(waves_of(still, INDEX), waves_of(plain, INDEX), atol=1e-10)
    # A constant c_0 multiplies every wave.
    twice = eqx.tree_at(lambda m: m.specimen.correction, model, nothing.at[0].set(1j))
    expected = (1 + 1j) * waves_of(plain, INDEX)
    np.testing.assert_allclose(waves_of(twice, INDEX), expected, atol=1e-10)


def test_adjoint_of_the_correction(x64):
    model, _ = world(order=1)
    forward = lambda c: waves_of(eqx.tree_at(lambda m: m.specimen.correction, model, c), INDEX)
    still = forward(jnp.zeros_like(model.specimen.correction))
    change = random_complex(1, model.specimen.correction.shape)
    image, pull = jax.vjp(forward, change)
    other = random_complex(2, image.shape)
    back = jnp.conj(pull(jnp.conj(other))[0])
    image = image - still
    scale = float(jnp.linalg.norm(image) * jnp.linalg.norm(other))
    assert abs(inner(other, image) - inner(back, change)) < 1e-12 * scale


LEAVES = [
    ("potential", lambda m: m.specimen.potential, 1e-4),
    ("depths", lambda m: m.specimen.depths, 1e-4),
    ("tilt", lambda m: m.specimen.tilt, 1e-4),
    ("correction", lambda m: m.specimen.correction, 1e-5),
    ("C10", lambda m: m.optics.aberrations["C10"], 1e-3),
    ("C12a", lambda m: m.optics.aberrations["C12a"], 1e-3),
    ("positions", lambda m: m.scan.positions, 1e-5),
    ("dose", lambda m: m.dose, 1e-3),
    ("stretch", lambda m: m.stretch, 1e-6),
]


@pytest.fixture(scope="module")
def losses():
    """A loss of one leaf, by the leaf's name, and its derivative, of a model with everything."""
    with jax.enable_x64(True):
        model, _ = world(order=1, integration=2, cell=3)
        model = eqx.tree_at(
            lambda m: m.stretch, model, jnp.asarray(1.01), is_leaf=lambda x: x is None
        )
        noise = jnp.asarray(np.random.default_rng(8).uniform(0.5, 1.5, (5, 24, 32)))
        target = frames_of(model, INDEX) * noise
        where = lambda m: tuple(get(m) for _, get, _ in LEAVES)

        @jax.jit
        def loss(leaves):
            intensity = eqx.tree_at(where, model, leaves)(INDEX)
            return jnp.sum(intensity - target * jnp.log(intensity + 0.01))

        return loss, where(model), jax.jit(jax.grad(loss))(where(model))


@pytest.mark.parametrize(("number", "step"), [(i, leaf[2]) for i, leaf in enumerate(LEAVES)],
                         ids=[leaf[0] for leaf in LEAVES])  # fmt: skip
def test_gradients_agree_with_finite_differences(x64, losses, number, step):
    loss, leaves, gradients = losses
    one = lambda leaf: loss((*leaves[:number], leaf, *leaves[number + 1 :]))
    direction = random_complex(9, leaves[number].shape)
    direction = direction if jnp.iscomplexobj(leaves[number]) else direction.real
    expected = directional_derivative(one, leaves[number], direction, step)
    found = inner(jnp.conj(gradients[number]), direction).real
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_handwritten_rules_equal_the_derived_ones(x64):
    spectra, plates = random_complex(1, (2, 1, 3, 10, 12)), random_complex(2, (2, 20, 22))
    steps = random_complex(3, (2, 6, 8))
    along_y, along_x = random_complex(4, (3, 10)), random_complex(5, (3, 12))
    series = jnp.asarray([0, 1, 1], jnp.int32)
    corner = jnp.asarray([[0, 0], [14, 14], [3, 9]], jnp.int32)
    to = random_complex(6, (3, 1, 3, 6, 8))
    operands = (to, spectra, plates, steps, along_y, along_x, series, corner)
    pulled = (jax.jit(pull)(*operands) for pull in (pull_one_by_one, pull_together))
    for a, b in zip(*pulled, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)
    cut: Any = crops
    windows, pull = jax.vjp(lambda planes: cut(planes, corner, (6, 8)), plates)
    for (y, x), window in zip(np.asarray(corner), windows, strict=True):
        np.testing.assert_array_equal(window, plates[:, y : y + 6, x : x + 8])
    other = random_complex(7, windows.shape)
    assert abs(inner(other, windows) - inner(pull(other.conj())[0].conj(), plates)) < 1e-12


def test_a_plan_holds_the_probes_exactly_and_follows_what_moves(x64):
    model, _ = world()
    planned = prepare(model)
    np.testing.assert_allclose(waves_of(planned, INDEX), waves_of(model, INDEX), atol=1e-12)
    still = jax.tree.map(lambda _: False, planned)
    kept = planned.refreshed(still)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (planned, kept)), strict=True))
    for where in (lambda m: m.optics.aberrations["C10"], lambda m: m.specimen.depths):
        moved = eqx.tree_at(where, planned, where(planned) + 7.0)
        fresh = moved.refreshed(eqx.tree_at(where, still, True))
        expected = waves_of(eqx.tree_at(where, model, where(model) + 7.0), INDEX)
        np.testing.assert_allclose(waves_of(fresh, INDEX), expected, atol=1e-12)
        assert distance(waves_of(moved, INDEX), expected) > 1e-3


def test_states_of_a_source_carry_the_dose(x64):
    model, _ = world((40, 48), 2.0, strength=20.0)
    optics = focal_series(ENERGY, SEMIANGLE, DEFOCI, ABERRATIONS, source=0.3)
    several = eqx.tree_at(lambda m: m.optics, model, optics)
    waves = waves_of(several, INDEX)
    assert waves.shape[1] == optics.states > 1
    dose = model.dose[model.scan.series[INDEX]]
    np.testing.assert_allclose(jnp.sum(jnp.abs(waves) ** 2, (1, 2, 3)), dose, rtol=0.02)


def test_single_precision_is_enough(x64):
    model, _ = world(order=1)
    exact = waves_of(model, INDEX)
    kinds = {"f": np.float32, "c": np.complex64}
    single = lambda a: a.astype(kinds[a.dtype.kind]) if eqx.is_inexact_array(a) else a
    found = waves_of(jax.tree.map(single, model), INDEX)
    assert found.dtype == np.complex64
    assert distance(found.astype(complex), exact) < 3e-5


def test_the_margin_has_the_parity_of_the_window():
    for shape in ((24, 31), (50, 42)):
        large = padded(Grid(shape, (0.4, 0.5)))
        for n, m in zip(large.shape, shape, strict=True):
            assert m + 8 <= n <= 2 * m and (n - m) % 2 == 0


@pytest.mark.parametrize("depths", [[], [1.0, 1.0], [3.0, 2.0]])
def test_depths_must_increase(depths):
    with pytest.raises(ValueError, match="must increase"):
        empty_layers(Grid((4, 6), (1.0, 1.0)), (0.0, 0.0), np.asarray(depths), 0.0, 0.5)


@pytest.mark.parametrize("given", [{}, {"order": 2, "window": Grid((4, 6), (1.0, 1.0))}])
def test_an_s_matrix_is_in_modes_or_in_beams(given):
    layers = empty_layers(Grid((8, 12), (1.0, 1.0)), (0.0, 0.0), np.ones(1), 0.0, 0.4)
    with pytest.raises(ValueError, match="`order` for tilt modes or `window` for beams"):
        to_smatrix(layers, ENERGY, **given)


def test_probes_are_made_at_the_first_layer(x64):
    """All depths and defoci moved together change nothing but the plane they are counted from."""
    model, _ = world(tilt=(0.0, 0.0))
    moved = eqx.tree_at(
        lambda m: (m.specimen.depths, m.optics.aberrations["C10"]),
        model,
        (model.specimen.depths + 30.0, model.optics.aberrations["C10"] - 30.0),
    )
    arguments = (model.window, None), model.dose
    found = probes_of(moved.optics, moved.specimen, *arguments).spectra
    expected = probes_of(model.optics, model.specimen, *arguments).spectra
    np.testing.assert_allclose(found, expected, atol=1e-10)

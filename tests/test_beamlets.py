"""Ladders and halos: positions and probes that move, and the probe beyond its window."""

from functools import cache
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smpr3d_jax.physics.beamlets import Ladder, ladder
from smpr3d_jax.physics.detector import Detector
from smpr3d_jax.physics.forward import prepare, Scattering, settled, trimmed
from smpr3d_jax.physics.layers import empty_layers
from smpr3d_jax.physics.optics import focal_series
from smpr3d_jax.physics.scan import series_of
from smpr3d_jax.physics.simulation import simulate_series
from smpr3d_jax.physics.smatrix import field, scatter, to_modes, unscattered_modes

from .helpers import random_complex, random_slices


ENERGY, SEMIANGLE, DEFOCI = 80e3, 25.0, [-50.0, 60.0]
SHAPE, PIXEL, DOSE = (16, 20), 6.0, [1e3, 2e3]
ABERRATIONS = {"C12": 20.0, "phi12": 0.4, "C30": 1e4}
FRAMES = 4
INDEX = jnp.arange(2 * FRAMES, dtype=jnp.int32)
NONE = {"is_leaf": lambda leaf: leaf is None}

frames_of = eqx.filter_jit(lambda model, index=INDEX: model(index))


def lens(**coherence):
    return focal_series(ENERGY, SEMIANGLE, DEFOCI, ABERRATIONS, **coherence)


def camera(halo=True, integration=2, **spoilt):
    leaves: dict[str, Any] = {k: jnp.asarray(v, float) for k, v in spoilt.items()}
    return Detector(SHAPE, PIXEL, integration, halo=halo, **leaves)


def middle(window, spread):
    """Positions of two scans around the middle of a cell of four windows."""
    rng = np.random.default_rng(7)
    each = 2 * np.asarray(window.extent) + rng.uniform(-spread, spread, (2, FRAMES, 2))
    return series_of(list(each))


def world(detector=None, *, order=2, spread=1.5, specimen=None, **coherence):
    """A small model of a strong object in a cell of four windows, in tilt modes."""
    detector, optics = detector or camera(), lens(**coherence)
    window = detector.window(optics.wavelength)
    if specimen is None:
        specimen = to_modes(scattered(), order)
    return Scattering(optics, specimen, middle(window, spread), detector, jnp.asarray(DOSE))


@cache
def slices():
    window = camera().window(lens().wavelength)
    shape = (4 * window.shape[0], 4 * window.shape[1])
    return random_slices(shape, window.sampling, (5.0, 35.0), 40.0)


def corrected_layers():
    """Two thin layers, and a little of every tilt polynomial."""
    made = slices()
    layers = empty_layers(made.grid, (0.0, 0.0), np.asarray([5.0, 35.0]), 20.0, lens().cutoff, 1)
    some = 0.05 * random_complex(5, (3, *made.grid.shape))
    return eqx.tree_at(lambda s: (s.potential, s.correction), layers, (made.potential, some))


@cache
def scattered():
    """The S-matrix in beams, made once, in float64."""
    optics = lens()
    return scatter(slices(), camera().window(optics.wavelength), ENERGY, optics.cutoff, 20.0)


def on_rungs(model, per_pixel):
    """The model with every probe on the nearest rung, counted by hand."""
    step, origin = np.asarray(model.window.sampling), np.asarray(model.specimen.origin)
    scale = 1.0 if model.stretch is None else float(model.stretch)
    centre = origin + step * model.specimen.grid.shape / 2
    probes = centre + (np.asarray(model.scan.positions) - centre) * scale
    rung = np.floor((probes - origin) / step * per_pixel + per_pixel / 2)
    probes = origin + step * ((rung + 0.5) / per_pixel - 0.5)
    positions = jnp.asarray(centre + (probes - centre) / scale)
    return eqx.tree_at(lambda m: m.scan.positions, model, positions)


def with_ladder(model, per_pixel):
    windows = (model.window, model.halo)
    plan = eqx.filter_jit(ladder)(
        model.optics.of_point(), model.specimen, *windows, model.dose, model.stretch, per_pixel
    )
    return eqx.tree_at(lambda m: m.plan, model, plan, **NONE)


def slope(model, where, target):
    """Gradient of a likelihood with respect to a leaf."""

    @eqx.filter_jit
    def gradient(model, target):
        def loss(leaf):
            frames = eqx.tree_at(where, model, leaf)(INDEX)
            return jnp.sum(frames - target * jnp.log(frames + 0.01))

        return jax.grad(loss)(where(model))

    return gradient(model, target)


# --- ladders -------------------------------------------------------------------------------------


@pytest.mark.parametrize("halo", [False, True])
@pytest.mark.parametrize("stretch", [None, 1.02])
def test_a_ladder_is_exact_on_its_rungs(x64, halo, stretch):
    model = world(camera(halo))
    if stretch is not None:
        model = eqx.tree_at(lambda m: m.stretch, model, jnp.asarray(stretch), **NONE)
    planned = prepare(model, moving=("scan.positions", "optics"))
    assert isinstance(planned.plan, Ladder) and planned.plan.per_pixel == 6
    found = frames_of(planned)
    np.testing.assert_allclose(found, frames_of(on_rungs(model, 6)), rtol=1e-10, atol=1e-10)
    assert float(jnp.max(jnp.abs(found - frames_of(model)))) > 1e-3


def test_the_derivative_along_a_ladder_is_of_second_order(x64):
    """Rungs three times as dense contain the old ones, and are nine times as good."""
    model = on_rungs(world(), 4)
    where = lambda m: m.scan.positions
    target = frames_of(model) * jnp.asarray(np.random.default_rng(1).uniform(0.5, 1.5, (8, *SHAPE)))
    exact = slope(model, where, target)
    errors = []
    for per_pixel in (4, 12):
        planned = with_ladder(model, per_pixel)
        np.testing.assert_allclose(frames_of(planned), frames_of(model), rtol=1e-9, atol=1e-9)
        errors.append(float(jnp.linalg.norm(slope(planned, where, target) - exact)))
    assert errors[0] < 0.1 * float(jnp.linalg.norm(exact))
    assert errors[0] / errors[1] == pytest.approx(9, rel=0.1)


@pytest.mark.parametrize("halo", [False, True])
def test_gradients_to_the_specimen_are_those_without_a_plan(x64, halo):
    model = on_rungs(world(camera(halo)), 6)
    planned = prepare(model, moving=("scan.positions",))
    target = 1.3 * frames_of(model)[::-1]
    where = lambda m: m.specimen.waves
    exact = slope(model, where, target)
    np.testing.assert_allclose(slope(planned, where, target), exact, atol=1e-9 * abs(exact).max())


def test_a_source_moves_probes_along_the_ladder(x64):
    """Its states are as far off as the rungs are apart, and there are as many frames as before."""
    model = world(source=0.6)
    exact = frames_of(model)
    size = lambda frames: float(jnp.linalg.norm(frames - exact) / jnp.linalg.norm(exact))
    errors = [size(frames_of(with_ladder(model, n))) for n in (3, 18)]
    # What is left is that of windows which begin at other pixels.
    assert errors[1] < errors[0] < 0.2 * size(frames_of(world()))
    assert prepare(model).plan.table.values.shape[0] == 2 * 6 * 6


def test_a_refreshed_table_is_that_of_a_new_plan(x64):
    model = prepare(world(), moving=("optics",))
    other = eqx.tree_at(lambda m: m.optics.aberrations["C10"], model, replace_fn=lambda c: c + 9.0)
    none = jax.tree.map(lambda leaf: False, other)
    assert other.refreshed(none) is other
    only = lambda where: eqx.tree_at(where, none, True)
    assert other.refreshed(only(lambda m: m.scan.positions)) is other
    fresh = other.refreshed(only(lambda m: m.optics.aberrations["C10"]))
    exact = eqx.tree_at(lambda m: m.plan, other, None, **NONE)
    wanted = frames_of(on_rungs(exact, 6))
    np.testing.assert_allclose(frames_of(fresh), wanted, atol=1e-9)
    assert float(jnp.max(jnp.abs(frames_of(other) - wanted))) > 0.1


# --- the halo ------------------------------------------------------------------------------------


def test_the_halo_brings_frames_nearer_to_a_true_probe(x64):
    """Far out of focus the probe's tails leave the window; measured against a large cell."""
    optics, grid = lens(), slices()
    scan = middle(camera().window(optics.wavelength), 1.0)
    truth = simulate_series(grid, optics, scan, SHAPE, 4, dose=jnp.asarray(DOSE), band_limit=None)
    errors = []
    for halo in (False, True):
        model = world(camera(halo), order=8, spread=1.0)
        errors.append(float(jnp.linalg.norm(frames_of(model) - truth) / jnp.linalg.norm(truth)))
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize("planned", [False, True])
def test_vacuum_keeps_the_dose_in_the_halo(x64, planned):
    lost = []
    for halo in (False, True):
        detector = camera(halo)
        scan = middle(detector.window(lens().wavelength), 1.0)
        seen = detector.wide_window(lens().wavelength) or detector.window(lens().wavelength)
        empty = unscattered_modes(*field(np.asarray(scan.positions), seen), 20.0, lens().cutoff, 2)
        model = world(detector, spread=1.0, specimen=empty)
        model = prepare(model) if planned else model
        share = jnp.sum(frames_of(model), axis=(1, 2)) / model.dose[model.scan.series]
        assert float(jnp.max(share)) < 1
        lost.append(1 - np.asarray(share))
    assert np.all(lost[1] < 0.5 * lost[0])


@pytest.mark.parametrize(
    ("how", "exposed", "planned"),
    [
        ({"halo": False}, False, False),
        ({}, True, True),
        ({"integration": 1}, True, False),
        ({"background": 0.3}, True, True),
        ({"blur": 0.6, "background": 0.1}, True, False),
    ],
    ids=["window", "halo", "samples", "background", "blur"],
)
def test_single_pixels_are_those_of_the_frames(x64, how, exposed, planned):
    model = world(camera(**how))
    if planned:
        model = prepare(model, moving=("scan.positions",))
    if exposed:
        share = jnp.linspace(0.5, 1.5, 2 * FRAMES)
        model = eqx.tree_at(lambda m: m.exposure, model, share, **NONE)
    some, rng = INDEX[jnp.asarray([6, 1, 3])], np.random.default_rng(2)
    pixels = rng.integers(0, SHAPE[0] * SHAPE[1], (3, 11))
    total, hit = eqx.filter_jit(lambda m, *where: m.at(*where))(
        model, some, jnp.asarray(pixels, jnp.int32)
    )
    frames = frames_of(model, some).reshape(3, -1)
    np.testing.assert_allclose(total, frames.sum(axis=1), rtol=1e-10)
    np.testing.assert_allclose(hit, np.take_along_axis(frames, pixels, 1), rtol=1e-9)


# --- views ---------------------------------------------------------------------------------------


def test_a_trimmed_model_is_the_same_one_without_a_halo(x64):
    model = world()
    small = trimmed(model)
    assert small.halo is None
    assert all(a < b for a, b in zip(small.specimen.grid.shape, (64, 80), strict=True))
    assert small.specimen.waves.shape[1:] == small.specimen.grid.shape
    bare = eqx.tree_at(lambda m: m.detector, model, camera(False))
    np.testing.assert_allclose(frames_of(small), frames_of(bare), atol=1e-9)
    assert trimmed(small) is small


@pytest.mark.parametrize("representation", ["modes", "beams", "layers"])
@pytest.mark.parametrize("stretch", [0.97, 1.03])
def test_a_settled_model_makes_the_frames_of_the_stretched(x64, representation, stretch):
    model = world()
    if representation == "beams":
        model = eqx.tree_at(lambda m: m.specimen, model, scattered())
    if representation == "layers":
        model = eqx.tree_at(lambda m: m.specimen, model, corrected_layers())
    assert settled(model) is model
    model = eqx.tree_at(lambda m: m.stretch, model, jnp.asarray(stretch), **NONE)
    true = settled(model)
    np.testing.assert_allclose(frames_of(true), frames_of(model), rtol=1e-8, atol=1e-8)
    assert true.stretch is None and true.plan is None
    assert true.detector.pixel == pytest.approx(stretch * PIXEL)
    np.testing.assert_allclose(true.window.sampling, true.specimen.grid.sampling, rtol=1e-12)
    centre = lambda s: np.add(s.origin, np.multiply(s.grid.shape, s.grid.sampling) / 2)
    np.testing.assert_allclose(centre(true.specimen), centre(model.specimen), rtol=1e-12)

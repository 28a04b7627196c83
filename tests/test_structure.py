"""From an S-matrix to layers of potential: closed forms, retrieval, refinement through layers."""

from functools import cache

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from smpr3d_jax.data.counts import Frames
from smpr3d_jax.data.dataset import batch, Dataset
from smpr3d_jax.inverse.losses import objective, poisson
from smpr3d_jax.inverse.reconstruction import make_evaluation, reconstruct
from smpr3d_jax.inverse.structure import (
    fit_structure,
    illumination,
    layers_from_sections,
    overlaps,
    structure_model,
    structure_updates,
    unmixing,
)
from smpr3d_jax.inverse.updates import accelerated
from smpr3d_jax.physics.detector import Detector
from smpr3d_jax.physics.forward import exit_waves, prepare, Scattering, unscattered
from smpr3d_jax.physics.grid import Grid
from smpr3d_jax.physics.layers import empty_layers, Layers, to_smatrix
from smpr3d_jax.physics.optics import cartesian, focal_series, wavelength
from smpr3d_jax.physics.scan import raster, series_of
from smpr3d_jax.physics.simulation import simulate_series
from smpr3d_jax.physics.smatrix import disc_quadrature, place
from smpr3d_jax.physics.specimen import Slices

from .helpers import random_slices


ENERGY, SEMIANGLE, CUTOFF = 80e3, 30.0, 0.7
DEFOCI = (-60.0, 40.0, 150.0)
DEPTHS = (10.0, 45.0, 80.0)
GRID = Grid((24, 32), (0.6, 0.5))
MIDDLE = 45.0
FINER = 2


def correlation(a, b):
    return float(np.corrcoef(np.ravel(a), np.ravel(b))[0, 1])


def test_overlaps_are_means_over_the_tilts():
    depths, radius = np.asarray([0.0, 13.0, 50.0]), np.asarray([0.0, 0.2, 0.9])
    found = overlaps(depths, radius, ENERGY, CUTOFF)
    tilts = disc_quadrature(CUTOFF, 30.0)
    for q, overlap in zip(radius, found, strict=True):
        turn = np.pi * wavelength(ENERGY) * (q**2 + 2 * q * tilts.points[:, 1])
        waves = np.exp(1j * np.outer(depths, turn))
        expected = np.real((waves * tilts.weights) @ waves.conj().T)
        np.testing.assert_allclose(overlap, expected, atol=1e-10)


def test_unmixing_undoes_what_out_of_focus_layers_add(x64):
    depths = np.asarray([0.0, 40.0])
    planes = random_slices(GRID.shape, GRID.sampling, (0.0, 40.0)).potential
    ky, kx = np.broadcast_arrays(*GRID.frequencies())
    overlap = overlaps(depths, np.hypot(ky, kx).ravel(), ENERGY, CUTOFF)
    spectra = np.fft.fft2(planes).reshape(2, -1)
    mixed = np.fft.ifft2(np.einsum("qlm,mq->lq", overlap, spectra).reshape(2, *GRID.shape)).real
    unmix = unmixing(GRID, depths, ENERGY, CUTOFF, 1e-4)
    found = unmix(jnp.asarray(mixed))
    # The lowest transfers are those that depth does not separate.
    away = np.fft.ifft2(np.fft.fft2(found - planes) * (np.hypot(ky, kx) > 0.15)).real
    assert np.linalg.norm(away) < 0.02 * np.linalg.norm(planes)
    assert np.linalg.norm(mixed - planes) > 0.3 * np.linalg.norm(planes)


def layered(strength=60.0, depths=(10.0, 80.0), grid=GRID):
    """Layers of weak random potential."""
    slices = random_slices(grid.shape, grid.sampling, depths, strength)
    layers = empty_layers(grid, (0.0, 0.0), np.asarray(depths), MIDDLE, CUTOFF)
    return eqx.tree_at(lambda s: s.potential, layers, slices.potential)


def test_layers_are_found_from_the_sections_of_their_s_matrix(x64):
    truth = layered()
    modes = to_smatrix(truth, ENERGY, order=8)
    found = layers_from_sections(modes, ENERGY, DEPTHS).potential
    for layer, true in ((0, 0), (2, 1)):
        assert correlation(found[layer], truth.potential[true]) > 0.95
    # The lowest transfers, which depth does not separate, are shared by all.
    assert float(jnp.std(found[1])) < 0.4 * float(jnp.std(truth.potential[0]))


def test_one_layer_seen_in_many_sections_counts_once(x64):
    """Five layers within the depth of focus hold together what the one behind them holds."""
    truth = layered(depths=(MIDDLE,))
    modes = to_smatrix(truth, ENERGY, order=6)
    found = layers_from_sections(modes, ENERGY, np.linspace(25.0, 65.0, 5))
    total, true = jnp.sum(found.potential, axis=0), truth.potential[0]
    assert correlation(total, true) > 0.98
    scale = float(jnp.sum(total * true) / jnp.sum(true**2))
    assert 0.8 < scale < 1.1


def experiment(positions, halo=True, wrong=0.0, astigmatism=0.0):
    """Counts of three scans over two layers of a periodic cell, and the cell.

    The cell is finer than the model's field: the simulator keeps two thirds of its frequencies,
    which must hold the aperture and what is scattered beside it.
    """
    shape, dose = (24, 28), 2e4
    camera, optics = Detector(shape, 3.2, halo=halo), focal_series(ENERGY, SEMIANGLE, DEFOCI)
    window = camera.window(optics.wavelength)
    step = (window.sampling[0] / FINER, window.sampling[1] / FINER)
    cell = Grid((2 * FINER * shape[0], 2 * FINER * shape[1]), step)
    slices = random_slices(cell.shape, cell.sampling, (10.0, 80.0), 300.0)
    # The first position lies on a pixel of the field, so that its pixels are some of the cell's.
    low = (np.asarray(cell.extent) - 0.5 * np.asarray(positions)) / 2
    regular = np.round(low / window.sampling) * window.sampling + raster(positions, (0.5, 0.5))
    rng = np.random.default_rng(1)
    told = series_of([regular] * len(DEFOCI))
    true = series_of([regular + rng.normal(0, wrong, regular.shape) for _ in DEFOCI])
    lens = focal_series(ENERGY, SEMIANGLE, DEFOCI, {"C12": astigmatism, "phi12": 0.5})
    counts = simulate_series(
        slices, lens, true, shape, 2, jax.random.key(2), jnp.asarray([dose] * 3), chunk=4
    )
    data = Dataset(Frames(jnp.asarray(counts)), told, (positions,) * 3)
    return data, slices, unscattered(optics, camera, told, data.dose, MIDDLE, 6, 1.0), true


def as_seen(slices: Slices, layers: Layers) -> np.ndarray:
    """The cell's potential on the field of `layers`."""
    first = np.rint(np.asarray(layers.origin) / layers.grid.sampling).astype(int)
    index = [np.arange(n) + f for n, f in zip(layers.grid.shape, first, strict=True)]
    rows, columns = (FINER * i % n for i, n in zip(index, slices.grid.shape, strict=True))
    return np.asarray(slices.potential)[:, rows[:, None], columns[None, :]]


def require_both_layers(layers: Layers, slices: Slices):
    """Layers 0 and 2 look like the truth where the scan went, and between them there is little."""
    middle = tuple(slice(n // 2 - 6, n // 2 + 6) for n in layers.grid.shape)
    truth, found = as_seen(slices, layers), np.asarray(layers.potential)
    for layer, true in ((0, 0), (2, 1)):
        assert correlation(found[layer][middle], truth[true][middle]) > 0.9
    assert found[1][middle].std() < 0.4 * truth[0][middle].std()


def s_matrix(model: Scattering, data: Dataset, steps: int) -> Scattering:
    """The model with an S-matrix fitted to the data."""
    updates = accelerated(model, poisson(), (0.5, 0.5), len(data))
    return reconstruct(prepare(model), data, objective(poisson()), updates, steps=steps).model


def test_true_layers_explain_the_counts():
    """Nothing is misplaced between simulator and model; outside the window little is scattered."""
    data, slices, model, _ = experiment(positions=(4, 3))
    seen = model.specimen
    layers = empty_layers(seen.grid, seen.origin, np.asarray(slices.depths), MIDDLE, CUTOFF)
    truth = jnp.asarray(as_seen(slices, layers), layers.potential.dtype)
    layers = eqx.tree_at(lambda s: s.potential, layers, truth)
    model = eqx.tree_at(lambda m: m.specimen, model, layers)
    found = make_evaluation()(prepare(model), batch(data, np.arange(len(data))))
    assert 0.95 < float(found["deviance"] / found["noise"]) < 1.15


def test_two_layers_come_out_of_a_focal_series():
    data, slices, model, _ = experiment(positions=(12, 10), halo=False)
    result = fit_structure(s_matrix(model, data, 8), data, DEPTHS, steps=4)
    require_both_layers(result.model.specimen, slices)
    assert result.history["loss"][-1] < result.history["loss"][0]


@pytest.mark.slow
def test_positions_and_astigmatism_are_found_through_layers():
    """0.2 Å rms and 30 Å wrong, with nothing but Adam on the leaves."""
    data, slices, model, true = experiment(positions=(18, 16), wrong=0.2, astigmatism=30.0)
    lens = focal_series(ENERGY, SEMIANGLE, DEFOCI, {"C12": 1e-3})
    model = eqx.tree_at(lambda m: m.optics, model, lens)
    also = {
        "scan.positions": optax.adam(0.02),
        "optics.aberrations.C12a": common(optax.adam(2.0)),
        "optics.aberrations.C12b": common(optax.adam(2.0)),
    }
    found = fit_structure(s_matrix(model, data, 8), data, DEPTHS, steps=30, also=also).model
    wrong = np.asarray(found.scan.positions - true.positions)
    assert np.sqrt(np.mean((wrong - wrong.mean(axis=0)) ** 2)) < 0.1
    expected = cartesian({"C12": 30.0, "phi12": 0.5})
    for name in ("C12a", "C12b"):
        np.testing.assert_allclose(found.optics.aberrations[name], expected[name], atol=10.0)
    require_both_layers(found.specimen, slices)


def common(optimiser):
    """All entries of a leaf moved alike, by their mean gradient."""
    mean = lambda gradient, _: jnp.full_like(gradient, jnp.mean(gradient))
    return optax.chain(optax.stateless_with_tree_map(mean), optimiser)


@cache
def small_model(order, depths=DEPTHS):
    """Layers of random potential seen by a few frames, and the frames they would give."""
    camera, optics = Detector((24, 28), 3.2, 1), focal_series(ENERGY, SEMIANGLE, DEFOCI)
    window = camera.window(optics.wavelength)
    steps = np.asarray(window.sampling)
    scan = series_of([raster((4, 6), tuple(steps)) + 20.0 * steps] * len(DEFOCI))
    model = unscattered(optics, camera, scan, jnp.asarray([1e3, 2e3, 3e3]), MIDDLE, 0)
    layers = structure_model(model, depths, order=order).specimen
    potential = random_slices(layers.grid.shape, layers.grid.sampling, depths, 200.0).potential
    layers = eqx.tree_at(lambda s: s.potential, layers, potential.astype(layers.potential.dtype))
    return eqx.tree_at(lambda m: m.specimen, model, layers)


def test_illumination_is_what_the_frames_send_through_each_layer():
    model = small_model(None)
    found = illumination(model)
    frames = jnp.arange(len(model.scan.series), dtype=jnp.int32)
    for layer, depth in list(enumerate(DEPTHS))[::2]:
        empty = empty_layers(
            model.specimen.grid, model.specimen.origin, np.ones(1) * depth, depth, CUTOFF
        )
        free = eqx.tree_at(lambda m: m.specimen, model, empty)
        waves = np.asarray(eqx.filter_jit(exit_waves)(free, frames))[:, 0]
        corner, _ = place(empty, model.scan.positions, model.window)
        expected = np.zeros(empty.grid.shape)
        for (y, x), wave in zip(np.asarray(corner), waves, strict=True):
            expected[y : y + wave.shape[0], x : x + wave.shape[1]] += np.abs(wave) ** 2
        close = np.linalg.norm(found[layer] - expected) / np.linalg.norm(expected)
        assert close < 0.02


@pytest.mark.parametrize("order", [None, 0])
def test_the_step_is_safe(order):
    """The loss falls from the first step on, from nothing as the start."""
    model = small_model(order)
    frames = jnp.arange(len(model.scan.series), dtype=jnp.int32)
    counts = Frames(eqx.filter_jit(lambda m: m(frames))(model))
    data = Dataset(counts, model.scan, ((4, 6),) * 3)
    empty = eqx.tree_at(lambda m: m.specimen.potential, model, 0 * model.specimen.potential)
    updates = structure_updates(empty, poisson(), len(data))
    result = reconstruct(prepare(empty), data, objective(poisson()), updates, steps=6)
    loss = result.history["loss"]
    assert np.all(np.diff(loss) < 0) and loss[-1] < 0.6 * loss[0]
    moved = result.model.specimen.correction
    assert order is None or float(jnp.abs(moved).max()) > 0


def test_layers_are_wanted_where_layers_are_meant():
    model = small_model(None)
    with pytest.raises(ValueError, match="wants an S-matrix"):
        structure_model(model, DEPTHS)
    whole = unscattered(model.optics, model.detector, model.scan, model.dose, MIDDLE, 0)
    with pytest.raises(ValueError, match="must be `Layers`, got TiltModes"):
        structure_updates(whole, poisson(), 10)

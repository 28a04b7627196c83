"""Parameters of the microscope: what they move, what is held, gradients, recovery."""

import math
from functools import cache
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from smpr3d_jax.data.counts import Frames
from smpr3d_jax.data.dataset import Batch, Dataset
from smpr3d_jax.inverse.losses import objective, poisson
from smpr3d_jax.inverse.reconstruction import make_step, start
from smpr3d_jax.inverse.refinement import (
    coordinates,
    directions,
    Joint,
    joint,
    look_around,
    moving_leaves,
    REFINABLE,
    refine,
)
from smpr3d_jax.inverse.updates import named_leaves, per_leaf
from smpr3d_jax.physics.detector import Detector
from smpr3d_jax.physics.forward import prepare, Scattering
from smpr3d_jax.physics.layers import empty_layers
from smpr3d_jax.physics.optics import aberration_phase, focal_series
from smpr3d_jax.physics.scan import raster, series_of
from smpr3d_jax.physics.smatrix import disc_quadrature, field, scatter, to_modes
from smpr3d_jax.physics.zernike import tilt_polynomials

from .helpers import random_slices


pytestmark = pytest.mark.usefixtures("x64")

ENERGY, SEMIANGLE, DEFOCI = 80e3, 25.0, [-50.0, 20.0, 80.0]
SHAPE, PIXEL, RASTER = (16, 20), 6.0, (2, 3)
STEP = (0.9, 0.7)
FRAMES = len(DEFOCI) * math.prod(RASTER)
INDEX = jnp.arange(FRAMES, dtype=jnp.int32)
ABERRATIONS = {"C12": 25.0, "phi12": 0.4, "C30": 1e4}


@cache
def strong(order):
    """Tilt modes of a strong object in a cell of three windows, in float64."""
    optics = focal_series(ENERGY, SEMIANGLE, DEFOCI)
    window = Detector(SHAPE, PIXEL).window(optics.wavelength)
    shape = (3 * window.shape[0], 3 * window.shape[1])
    slices = random_slices(shape, window.sampling, (5.0, 35.0), 300.0)
    return to_modes(scatter(slices, window, ENERGY, optics.cutoff, 20.0), order)


def world(scans=3, *, specimen=None, grid=RASTER, order=2, **parts):
    """A small model: scans of 2 x 3 positions in the middle of the cell, all leaves there are."""
    optics = focal_series(
        ENERGY, SEMIANGLE, DEFOCI[:scans], ABERRATIONS, source=parts.get("source"),
        spread=parts.get("spread"), source_rings=1, spread_nodes=2,
    )  # fmt: skip
    leaf = lambda name: jnp.asarray(parts[name], float) if name in parts else None
    detector = Detector(SHAPE, PIXEL, 1, background=leaf("background"), blur=leaf("blur"))
    specimen = specimen or strong(order)
    extent = np.multiply(specimen.grid.shape, specimen.grid.sampling)
    corner = np.asarray(specimen.origin) + extent / 2 - np.multiply(np.subtract(grid, 1), STEP) / 2
    rng = np.random.default_rng(3)
    where = [corner + raster(grid, STEP) + rng.normal(0, 0.03, (math.prod(grid), 2))] * scans
    dose = jnp.asarray([1e3, 2e3, 1.5e3][:scans])
    return Scattering(optics, specimen, series_of(where), detector, dose)


def layered():
    """Two thin layers instead of S, with something in them."""
    model = world()
    window = model.window
    grid, origin = field(np.asarray(model.scan.positions), window, 2)
    slices = random_slices(grid.shape, window.sampling, (0.0, 30.0), 300.0)
    layers = empty_layers(grid, origin, np.asarray([0.0, 30.0]), 15.0, model.optics.cutoff)
    layers = eqx.tree_at(lambda s: s.potential, layers, slices.potential)
    return world(specimen=layers)


PARTS: dict[str, Any] = {"source": 0.3, "spread": 20.0, "background": 0.1, "blur": 0.5}
NEEDS_LAYERS = ("tilt", "depths")


def _part(name) -> dict[str, Any]:
    return {name: PARTS[name]} if name in PARTS else {}


def ready(name):
    """A model that has what the parameter needs, refined."""
    if name in NEEDS_LAYERS:
        return refine(layered(), [name])
    part = {"source_size": "source", "defocus_spread": "spread"}.get(name, name)
    return refine(world(**_part(part)), [name])


def moved(model, changes):
    """The model with `changes`, by path, added to its leaves."""
    leaves = named_leaves(model)
    assert set(changes) <= set(leaves)
    new = [leaf + changes[path] if path in changes else leaf for path, leaf in leaves.items()]
    return jax.tree.unflatten(jax.tree.structure(model), new)


def updates_of(parameters, optimiser=lambda p: optax.sgd(1.0), frames=FRAMES):
    return per_leaf({moving_leaves(parameters): joint(parameters, optimiser, frames)})


def changed_leaves(before, after):
    old, new = named_leaves(before), named_leaves(after)
    differs = lambda path: eqx.is_array(old[path]) and not np.array_equal(old[path], new[path])
    return {path for path in old if differs(path)}


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["position"], "'position' cannot be refined. Did you mean 'positions'"),
        (["C12", "camera_lenght"], "Did you mean 'camera_length'"),
        (["C10"], "'C10' cannot be refined.*defocus"),
        (["dose", "C12", "dose"], "twice"),
        (["tilt"], "'tilt' cannot be refined with an S-matrix"),
        (["depths"], "'depths' cannot be refined with an S-matrix"),
        (["source_size"], "'source_size' needs a model that has it: .*`source`"),
        (["defocus_spread"], "'defocus_spread' needs .*`spread`"),
        (["background"], "'background' needs .*`background`"),
        (["blur"], "'blur' needs .*`blur`"),
    ],
)
def test_what_cannot_be_refined_is_refused(names, message):
    with pytest.raises(ValueError, match=message):
        refine(world(), names)


def test_the_defocus_of_one_scan_is_not_to_be_known():
    with pytest.raises(ValueError, match="'defocus' of a single scan"):
        refine(world(1), ["defocus"])


# --- each parameter ------------------------------------------------------------------------------


ONLY = {
    "positions": {"scan.positions"}, "shift": {"scan.positions"}, "rotation": {"scan.positions"},
    "affine": {"scan.positions"}, "camera_length": {"stretch"}, "dose": {"dose"},
    "exposure": {"exposure"}, "source_size": {"optics.source"},
    "defocus_spread": {"optics.spread"}, "background": {"detector.background"},
    "blur": {"detector.blur"}, "tilt": {"specimen.tilt"}, "depths": {"specimen.depths"},
    "defocus": {"optics.aberrations.C10"},
    "C12": {"optics.aberrations.C12a", "optics.aberrations.C12b"},
    "C21": {"optics.aberrations.C21a", "optics.aberrations.C21b", "scan.positions"},
    "C23": {"optics.aberrations.C23a", "optics.aberrations.C23b"},
    "C30": {"optics.aberrations.C30", "optics.aberrations.C10"},
    "C32": {f"optics.aberrations.{c}{e}" for c in ("C32", "C12") for e in "ab"},
}  # fmt: skip
TOLD = (*ONLY, *(f"{name}_per_scan" for name in ("C12", "C21", "C30")))


def random_coordinates(parameter, seed=0, size=1.0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(size * parameter.scale * rng.normal(size=parameter.shape))


def all_changes(parameters, seed=0, size=1.0):
    total = {}
    for p in parameters:
        for leaf, change in p.spread(random_coordinates(p, seed, size)).items():
            total[leaf] = total.get(leaf, 0.0) + change
    return total


def test_every_parameter_is_told_here():
    assert set(ONLY) <= set(REFINABLE)
    assert {n for n in REFINABLE if not n.startswith("C")} <= set(ONLY)


@pytest.mark.parametrize("name", TOLD)
def test_spread_is_linear_and_moves_what_it_says(name):
    model, parameters = ready(name)
    leaves = named_leaves(model)
    assert set(moving_leaves(parameters)) == ONLY[name.removesuffix("_per_scan")]
    for p in parameters:
        a, b = (random_coordinates(p, seed) for seed in (1, 2))
        together, one, other = (p.spread(c) for c in (2 * a - b, a, b))
        assert set(one) == set(p.leaves())
        for leaf, change in together.items():
            assert change.shape == leaves[leaf].shape
            wanted = 2 * one[leaf] - other[leaf]
            np.testing.assert_allclose(change, wanted, atol=1e-12 * float(jnp.abs(change).max()))


HELD = {
    "positions": lambda m: m.scan.positions.mean(axis=0),
    "shift": lambda m: m.scan.positions.mean(axis=0),
    "defocus": lambda m: m.optics.aberrations["C10"].mean(),
    "exposure": lambda m: m.exposure.mean(),
    "depths": lambda m: m.specimen.depths.mean(),
}


@pytest.mark.parametrize("name", HELD)
def test_what_is_held_stays(name):
    """Whatever the gradient: Adam's steps are equal for all, whose mean would otherwise move."""
    model, parameters = ready(name)
    updates = updates_of(parameters, lambda p: optax.adam(0.5))
    free = eqx.filter(model, updates.free(model))
    state, after = updates.init(model), model
    rng = np.random.default_rng(4)
    for _ in range(3):
        slope = jax.tree.map(lambda leaf: jnp.asarray(rng.uniform(1, 2, leaf.shape)), free)
        with jax.numpy_dtype_promotion("standard"):  # as in a compiled step
            move, state = updates.update(slope, state, free, 1.0, lambda tree: 1.0)
        after = eqx.apply_updates(after, move)
    assert changed_leaves(model, after) == set(moving_leaves(parameters))
    np.testing.assert_allclose(HELD[name](after), HELD[name](model), rtol=1e-12, atol=1e-12)
    # The coordinates are the way that was gone.
    (p,), found = parameters, coordinates(state)
    again = moved(model, p.spread(jnp.asarray(found[p.name])))
    for leaf in p.leaves():
        np.testing.assert_allclose(named_leaves(again)[leaf], named_leaves(after)[leaf], rtol=1e-10)


SOME = INDEX[::3]


def likelihood(model, target):
    frames = model(SOME)
    return jnp.mean(jnp.sum(frames - target * jnp.log(frames + 0.01), axis=(1, 2)))


OF_S = [n for n in TOLD if n not in (*NEEDS_LAYERS, "C23", "C32", "C12_per_scan")]


@pytest.mark.parametrize("names", [OF_S, list(NEEDS_LAYERS)], ids=["S", "layers"])
def test_gradients_of_coordinates_are_those_of_finite_differences(names):
    """The step of plain descent, as `joint` makes it, against differences of the loss."""
    model, parameters = refine(layered() if "tilt" in names else world(**PARTS), names)
    noise = jnp.asarray(np.random.default_rng(5).uniform(0.8, 1.4, (len(SOME), *SHAPE)))
    target = noise * eqx.filter_jit(lambda m: m(SOME))(model)
    loss = lambda m, batch: likelihood(m, batch.counts.dense(float))
    updates = updates_of(parameters)
    step, data = make_step(loss, updates, len(SOME)), Batch(Frames(target), SOME)
    _, state, _ = step(model, start(model, updates), data)
    # Leaves of a model that stand still, so that one compiled function does for all parameters.
    leaves = named_leaves(model)
    still = {leaf: jnp.zeros_like(leaves[leaf]) for leaf in moving_leaves(parameters)}
    value = eqx.filter_jit(lambda changes: likelihood(moved(model, changes), target))
    for p in parameters:
        along = random_coordinates(p, 6)
        # Descent in units of the scale: the coordinates move by -scale² gradient.
        slope = -coordinates(state)[p.name] / p.scale**2
        rise = [float(value(still | p.spread(s * along))) for s in (1e-4, -1e-4)]
        wanted = (rise[0] - rise[1]) / 2e-4
        assert abs(wanted) > 1e-6, p.name
        np.testing.assert_allclose(
            np.sum(slope * np.asarray(along)), wanted, rtol=2e-5, err_msg=p.name
        )


@pytest.mark.parametrize("name", ["C12", "C21", "C23", "C30", "C32", "C41", "C50"])
def test_balanced_aberrations_are_zernike_polynomials(name):
    """chi and the plane wave of a shifted probe together, orthogonal to all lower polynomials."""
    model, parameters = refine(world(), [name])
    tilts = disc_quadrature(model.optics.cutoff, order=12)
    ky, kx = (jnp.asarray(tilts.points[:, axis]) for axis in (0, 1))
    order = int(name[1]) + 1
    basis = tilt_polynomials(order, tilts.points, model.optics.cutoff)
    for p in parameters:
        changes = p.spread(jnp.asarray(p.scale))
        aberrations = {
            path.split(".")[-1]: change for path, change in changes.items() if "optics" in path
        }
        surface = np.array(aberration_phase(aberrations, ky, kx, ENERGY)[0])
        if "scan.positions" in changes:
            shift = np.asarray(changes["scan.positions"])
            assert np.ptp(shift, axis=0).max() < 1e-12
            # exp(-i chi) exp(-2 pi i h.rho)
            surface += 2 * np.pi * tilts.points @ shift[0]
        parts = basis @ (tilts.weights * surface)
        rms = math.sqrt(np.sum(tilts.weights * surface**2))
        # Nothing but one polynomial of the highest order, beside a constant.
        assert np.sum(np.abs(parts[1:]) > 1e-9 * rms) == 1
        assert np.abs(parts[-(order + 1) :]).max() > 0.1 * rms
        assert abs(name == "C12") or np.abs(parts[1 : -(order + 1)]).max() < 1e-9 * rms


def test_scales_turn_the_edge_of_the_aperture_by_a_radian():
    model, parameters = refine(world(), ["C12", "C21", "C30", "defocus"])
    edge = jnp.asarray([model.optics.cutoff]), jnp.asarray([0.0])
    for p in parameters:
        leaf = "C10" if p.name == "defocus" else p.name
        at = edge[::-1] if leaf.endswith("a") or leaf[-1] == "0" else _turned(edge, leaf)
        chi = aberration_phase({leaf: jnp.asarray([p.scale])}, at[0], at[1], ENERGY)
        assert abs(float(chi[0, 0])) == pytest.approx(1, rel=1e-6)


def _turned(edge, leaf):
    """Where the sine of an aberration is largest."""
    angle = math.pi / 2 / int(leaf[2])
    return edge[0] * math.sin(angle), edge[0] * math.cos(angle)


def test_directions_are_unit_changes():
    model, parameters = refine(world(), ["rotation", "defocus", "C12", "dose", "camera_length"])
    found = directions(model, parameters)
    assert list(found) == [
        "rotation", "defocus[0]", "defocus[1]", "defocus[2]", "C12a", "C12b",
        "dose[0]", "dose[1]", "dose[2]", "camera_length",
    ]  # fmt: skip
    for name, tree in found.items():
        leaves = named_leaves(tree)
        nonzero = {path for path, leaf in leaves.items() if np.any(np.asarray(leaf))}
        base = name.split("[")[0].removesuffix("a").removesuffix("b")
        assert nonzero <= ONLY[base] and nonzero
    np.testing.assert_allclose(
        found["defocus[1]"].optics.aberrations["C10"], [1 / 3, -2 / 3, 1 / 3]
    )
    np.testing.assert_allclose(found["dose[2]"].dose, [0, 0, 1.5e3])
    # One degree from x towards y, about the middle.
    turn, xy = found["rotation"].scan.positions, np.asarray(model.scan.positions)
    centre = (xy.min(axis=0) + xy.max(axis=0)) / 2
    np.testing.assert_allclose(turn, np.deg2rad((xy - centre)[:, ::-1] * [1, -1]), atol=1e-12)


def test_a_parameter_tells_its_value():
    _, (defocus, dose, positions) = refine(world(), ["defocus", "dose", "positions"])
    np.testing.assert_allclose(defocus.value(np.asarray([3.0, 0.0, 0.0])), [-48.0, 19.0, 79.0])
    np.testing.assert_allclose(dose.value(np.asarray([0.1, 0.0, -0.2])), [1.1, 1.0, 0.8])
    assert positions.of_frames and not defocus.of_frames
    offsets = np.random.default_rng(0).normal(1.0, 1.0, (FRAMES, 2))
    np.testing.assert_allclose(positions.value(offsets).mean(axis=0), 0, atol=1e-12)


def test_rotation_is_about_the_nominal_raster():
    nominal = np.tile(raster(RASTER, STEP), (3, 1)) + 100.0
    _, (p,) = refine(world(), ["rotation"], nominal)
    change = np.asarray(p.spread(jnp.asarray(1.0))["scan.positions"])
    # At right angles to the way from the middle, and none of the model's own offsets in it.
    away = nominal - (nominal.min(axis=0) + nominal.max(axis=0)) / 2
    np.testing.assert_allclose(np.sum(change * away, axis=1), 0, atol=1e-6)
    np.testing.assert_allclose(
        np.hypot(*change.T), np.deg2rad(np.hypot(*away.T)), rtol=1e-5, atol=1e-7
    )


# --- priors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.05, 0.3])
def test_a_prior_shrinks_as_the_closed_form_says(sigma):
    """Minimum of a/2 (x - t)² + x²/(2 N sigma²): x = t / (1 + 1/(a N sigma²))."""
    model, (p,) = refine(world(), ["exposure"])
    p = p._replace(sigma=sigma)
    target, bend = np.random.default_rng(8).normal(0, 0.2, FRAMES), 3.0
    target = jnp.asarray(target - target.mean())
    loss = lambda m, batch: bend / 2 * jnp.sum((m.exposure - 1 - target) ** 2)
    rate = 0.6 / (bend + 1 / (FRAMES * sigma**2))
    updates = updates_of((p,), lambda p: optax.sgd(rate / p.scale**2))
    step, state = make_step(loss, updates, FRAMES), start(model, updates)
    data = Batch(Frames(jnp.zeros((FRAMES, 1, 1))), INDEX)
    for _ in range(40):
        model, state, _ = step(model, state, data)
    wanted = target / (1 + 1 / (bend * FRAMES * sigma**2))
    assert model.exposure is not None
    np.testing.assert_allclose(model.exposure - 1, wanted, atol=1e-8)
    np.testing.assert_allclose(coordinates(state)["exposure"], wanted, atol=1e-8)


# --- recovery ------------------------------------------------------------------------------------


RIGHT = {
    "rotation": 2.0, "defocus": [12.0, -8.0, -4.0], "C12a": 9.0, "C12b": -6.0,
    "camera_length": 0.01,
}  # fmt: skip


def wrong(names):
    """A model, its true state, and the parameters in which they differ."""
    model, parameters = refine(world(grid=(3, 4)), names)
    offsets = np.random.default_rng(11).normal(0, 0.2, model.scan.positions.shape)
    right = RIGHT | {"positions": offsets - offsets.mean(axis=0)}
    changes = {}
    for p in parameters:
        for leaf, change in p.spread(jnp.asarray(right[p.name])).items():
            changes[leaf] = changes.get(leaf, 0.0) + change
    return model, moved(model, changes), tuple(p._replace(sigma=None) for p in parameters)


@pytest.mark.parametrize(
    ("planned", "place", "along", "misfit"),
    [(False, 0.01, 0.15, 0.01), (True, 0.04, 0.4, 0.1)],
    ids=["exact", "ladder"],
)
def test_what_is_wrong_with_the_microscope_is_found(planned, place, along, misfit):
    """S is known; positions, defoci, C12, rotation and camera length are not.

    A turn of the raster is in the positions as well; only their sum is determined. On a ladder
    positions are rounded to a sixth of a pixel, which is 0.02 Å rms.
    """
    names = ["positions", "rotation", "defocus", "C12", "camera_length"]
    model, true, parameters = wrong(names)
    index = jnp.arange(len(model.scan.series), dtype=jnp.int32)
    data = Batch(Frames(eqx.filter_jit(lambda m: m(index))(true)), index)
    if planned:
        model = prepare(model, moving=moving_leaves(parameters))
    decay = lambda rate: optax.cosine_decay_schedule(rate, 150, 0.01)
    adam = lambda p: optax.adam(decay(0.2 if p.of_frames else 0.1), b2=0.95)
    updates = updates_of(parameters, adam, len(index))
    step, state, values = make_step(objective(poisson()), updates, 64), start(model, updates), []
    before = np.asarray(model.scan.positions - true.scan.positions)
    for _ in range(150):
        model, state, value = step(model, state, data)
        values.append(float(value))
    after = np.asarray(model.scan.positions - true.scan.positions)
    assert np.sqrt(np.mean(before**2)) > 0.1 and np.sqrt(np.mean(after**2)) < place
    for name, values_of in true.optics.aberrations.items():
        np.testing.assert_allclose(model.optics.aberrations[name], values_of, atol=along)
    assert np.asarray(model.stretch) == pytest.approx(1.01, abs=4e-4)
    assert values[-1] < misfit * values[0]
    # What was found is the sum of what moved.
    found = coordinates(state)
    assert set(found) == set(RIGHT) | {"positions"}
    defocus = next(p for p in parameters if p.name == "defocus").value(found["defocus"])
    np.testing.assert_allclose(defocus, model.optics.defocus, rtol=1e-9)


# --- other valleys -------------------------------------------------------------------------------


LOST = 7


def misplaced(offset, which: int | slice = LOST):
    """Frames of a known S; the model with `which` of them at `offset` Å, and Adam's state there."""
    true, (positions,) = refine(world(), ["positions"])
    frames = eqx.filter_jit(lambda m: m(INDEX))(true)
    data = Dataset(Frames(frames), true.scan, (RASTER,) * len(DEFOCI))
    offsets = np.zeros((FRAMES, 2))
    offsets[which] = offset
    updates = updates_of((positions,), lambda p: optax.adam(0.1))
    # The offsets count from their mean, as the parameter does.
    model = moved(true, positions.spread(jnp.asarray(offsets)))

    def placed(node):
        inner = jax.tree.map(lambda leaf: jnp.ones_like(leaf), node.inner)
        return Joint(inner, {"positions": jnp.asarray(offsets)})

    state = start(model, updates)
    state = jax.tree.map(placed, state, is_leaf=lambda node: isinstance(node, Joint))
    return true, model, state, data, positions


def memory(state):
    """Of every frame, whatever the optimiser keeps of its two coordinates."""
    (part,) = (n for n in jax.tree.leaves(state, is_leaf=lambda n: isinstance(n, Joint)))
    kept = [leaf for leaf in jax.tree.leaves(part.inner) if leaf.shape == (FRAMES, 2)]
    return np.stack(kept)


def test_a_frame_more_than_a_valley_away_is_brought_back():
    sigma = 0.6
    true, model, state, data, positions = misplaced([2 * sigma, -2 * sigma])
    positions = positions._replace(sigma=sigma)
    found, after, count = look_around(model, state, data, poisson(), positions, chunk=5)
    assert count == 1
    np.testing.assert_allclose(coordinates(after)["positions"], 0, atol=1e-12)
    np.testing.assert_allclose(found.scan.positions, true.scan.positions, atol=1e-9)
    # Others keep what their optimiser has learned; this one begins anew.
    assert np.all(memory(after)[:, LOST] == 0)
    np.testing.assert_array_equal(np.delete(memory(after), LOST, 1), 1)


def test_frames_that_fit_are_left_alone():
    _, model, state, data, positions = misplaced([0.0, 0.0])
    found, after, count = look_around(model, state, data, poisson(), positions, chunk=5)
    assert count == 0
    np.testing.assert_allclose(found.scan.positions, model.scan.positions, atol=1e-12)
    for one, other in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(one, other)


def test_only_the_worst_of_each_scan_are_tried():
    """All are misplaced, to either side, so that their mean is nothing."""
    sigma, sides = 0.6, np.resize([1, -1], FRAMES)[:, None]
    _, model, state, data, positions = misplaced(2 * sigma * sides * [1, -1], slice(None))
    _, after, count = look_around(
        model, state, data, poisson(), positions._replace(sigma=sigma), share=0.3, chunk=5
    )
    # 0.3 of six frames, rounded up.
    assert count == 2 * len(DEFOCI)
    moved_back = np.any(coordinates(after)["positions"] != coordinates(state)["positions"], axis=1)
    assert moved_back.reshape(len(DEFOCI), -1).sum(axis=1).tolist() == [2, 2, 2]


def test_without_data_the_prior_decides():
    _, model, state, data, positions = misplaced([1.2, -1.2])
    positions, blind = positions._replace(sigma=0.6), lambda intensity, count: 0 * intensity
    _, after, count = look_around(model, state, data, blind, positions, share=1.0, chunk=5)
    assert count == 1
    np.testing.assert_array_equal(coordinates(after)["positions"], 0)

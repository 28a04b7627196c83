"""Errors as claimed and as made: dense algebra, thinning, experiments done again and again."""

import functools
from functools import partial

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smpr3d_jax.data.counts import Events, events_from_frames, Frames, InputError, thin
from smpr3d_jax.data.dataset import Dataset
from smpr3d_jax.inverse.fisher import fisher_product
from smpr3d_jax.inverse.priors import depth_range, depth_range_basis
from smpr3d_jax.inverse.uncertainty import bootstrap, laplace, position_errors
from smpr3d_jax.physics.detector import Detector
from smpr3d_jax.physics.forward import prepare, unscattered
from smpr3d_jax.physics.fourier import fft, ifft
from smpr3d_jax.physics.optics import focal_series
from smpr3d_jax.physics.scan import raster, Scan, series_of
from smpr3d_jax.physics.smatrix import TiltModes

from .helpers import random_complex


BACKGROUND = 0.002
DEPTHS = (-20.0, 60.0)
WAVES = "specimen.waves"


@functools.cache
def world(scan=(2, 3), step=(0.9, 0.7), defoci=(-60.0, 110.0), dtype=np.float64, dose=3e3):
    """A model with S within a depth range, sub-pixel positions, non-square everywhere."""
    optics = focal_series(80e3, 25.0, list(defoci), {"C12": 20.0, "phi12": 0.4})
    detector = Detector((6, 8), 12.8, 1)
    rng, count = np.random.default_rng(2), scan[0] * scan[1]
    positions = [raster(scan, step) + rng.normal(0, 0.1, (count, 2)) for _ in defoci]
    model = unscattered(
        optics, detector, series_of(positions), jnp.full(len(defoci), dose), 20.0, order=2
    )
    specimen = model.specimen
    assert isinstance(specimen, TiltModes)
    ky, kx = specimen.grid.frequencies()
    smooth = jnp.asarray(np.exp(-(ky**2 + kx**2) / (2 * 0.4**2)))[None]
    noise = random_complex(4, specimen.waves.shape).astype(specimen.waves.dtype)
    noise = ifft(fft(noise) * smooth.astype(noise.dtype))
    noise = noise * (0.4 / jnp.std(jnp.abs(noise))).astype(noise.dtype)
    waves = within(model)(specimen.waves + noise)
    return cast(eqx.tree_at(lambda m: m.specimen.waves, model, waves), dtype)


def cast(model, dtype):
    kinds = {"f": dtype, "c": np.result_type(dtype, np.complex64)}
    return jax.tree.map(
        lambda a: a.astype(kinds[a.dtype.kind]) if eqx.is_inexact_array(a) else a, model
    )


def within(model):
    """The projection of waves onto what layers within `DEPTHS` scatter: affine."""
    return depth_range(model.specimen, depth_range_basis(model.specimen, 80e3, DEPTHS))


@functools.cache
def case():
    """The model of twelve frames and its projection, the same objects for one compilation."""
    model = world()
    return model, {WAVES: within(model)}


def tangent(model, where, value):
    """Zero but for one leaf."""
    zeros = jax.tree.map(jnp.zeros_like, model)
    return eqx.tree_at(where, zeros, jnp.asarray(value, where(model).dtype))


def aberration(model, name, per_scan):
    return tangent(model, lambda m: m.optics.aberrations[name], per_scan)


def rotation(model, unit=1e-2):
    """All positions turned by `unit` rad about their centre."""
    positions = np.asarray(model.scan.positions)
    y, x = (positions - positions.mean(0)).T
    return tangent(model, lambda m: m.scan.positions, unit * np.stack([x, -y], -1))


def directions(model):
    """Defocus of the last scan, both parts of the common C12, rotation."""
    scans = model.dose.shape[0]
    return {
        "C10": aberration(model, "C10", np.eye(scans)[-1]),
        "C12a": aberration(model, "C12a", np.ones(scans)),
        "C12b": aberration(model, "C12b", np.ones(scans)),
        "rotation": rotation(model),
    }


def moved(model, move, size):
    """The model `size` along a tangent."""
    step = lambda a, d: a + jnp.asarray(size, a.dtype) * d if eqx.is_inexact_array(a) else a
    return jax.tree.map(step, model, move)


@eqx.filter_jit
def expected(model, index):
    return model(index)


def everything(model):
    return jnp.arange(model.scan.series.shape[0], dtype=jnp.int32)


def slope(model, move, size=1e-4):
    """J v of all frames by central differences, flat."""
    index = everything(model)
    ends = [np.asarray(expected(moved(model, move, s), index)).ravel() for s in (size, -size)]
    return (ends[0] - ends[1]) / (2 * size)


@functools.cache
def waves_of_the_case():
    return wave_jacobian(case()[0])


def wave_jacobian(model):
    """Derivative of all pixels with respect to real and imaginary parts of the waves."""
    waves = model.specimen.waves

    def flat(parts):
        new = jax.lax.complex(parts[0], parts[1])
        return eqx.tree_at(lambda m: m.specimen.waves, model, new)(everything(model)).ravel()

    jacobian = jax.jit(jax.jacrev(flat))(jnp.stack([waves.real, waves.imag]))
    return np.asarray(jacobian).reshape(-1, 2 * waves.size)


def weight(model):
    return 1 / (np.asarray(expected(model, everything(model))).ravel() + BACKGROUND)


def parts(waves):
    """Real and imaginary parts, flat."""
    return jnp.stack([jnp.real(waves), jnp.imag(waves)]).ravel()


@pytest.mark.parametrize("planned", [False, True])
def test_information_equals_that_of_a_dense_jacobian(x64, planned):
    model, _ = case()
    assert model.dose.dtype == np.float64
    noise = random_complex(1, model.specimen.waves.shape)
    move = tangent(model, lambda m: m.specimen.waves, noise)
    for part in (aberration(model, "C12a", [0.3, -0.2]), rotation(model)):
        move = jax.tree.map(lambda a, b: a + b, move, part)
    mask = jax.tree.map(lambda _: False, model)
    named = lambda m: (m.specimen.waves, m.optics.aberrations["C12a"], m.scan.positions)
    move = eqx.filter(move, eqx.tree_at(named, mask, (True, True, True)))
    weighted = weight(model) * slope(model, eqx.combine(move, jax.tree.map(jnp.zeros_like, model)))
    given = prepare(model) if planned else model
    if planned:
        move = eqx.tree_at(lambda m: m.plan, move, given.plan, is_leaf=lambda x: x is None)
    # Five frames at a time do not divide twelve.
    product = fisher_product(given, everything(model), move, chunk=5)
    assert product.dose is None and product.plan is None
    expected = weighted @ waves_of_the_case()
    near = 1e-6 * np.abs(expected).max()
    np.testing.assert_allclose(parts(product.specimen.waves), expected, atol=near)
    single = slope(model, aberration(model, "C12a", [1.0, 0.0]))
    np.testing.assert_allclose(product.optics.aberrations["C12a"][0], weighted @ single, rtol=1e-6)


def dense_covariance(model, jacobian, moves, deviation, project=None):
    """That of the coordinates along `moves`, from the inverse of the whole information."""
    waves = model.specimen.waves
    jacobian = jacobian * deviation
    if project is not None:
        unit = np.eye(2 * waves.size).reshape(-1, 2, *waves.shape)
        still = project(jnp.zeros_like(waves))
        linear = jax.jit(jax.vmap(lambda u: project(jax.lax.complex(u[0], u[1])) - still))
        columns = np.asarray(jax.vmap(parts)(linear(jnp.asarray(unit))))
        jacobian = jacobian @ columns
    both = np.concatenate([np.stack([slope(model, m) for m in moves], 1), jacobian], 1)
    belief = np.r_[np.zeros(len(moves)), np.ones(jacobian.shape[1])]
    whole = both.T @ (weight(model)[:, None] * both) + np.diag(belief)
    return np.linalg.inv(whole)[: len(moves), : len(moves)]


@pytest.mark.parametrize("projected", [False, True])
def test_what_the_waves_explain_is_taken_out_as_by_the_whole_inverse(x64, projected):
    model, project = case()
    project = project if projected else {}
    moves = directions(model)
    found = laplace(
        model, everything(model), moves, nuisance=(WAVES,), project=project,
        prior={WAVES: 0.3}, chunk=5, iterations=2000, tolerance=1e-9,
    )  # fmt: skip
    jacobian = waves_of_the_case()
    expected = dense_covariance(model, jacobian, list(moves.values()), 0.3, project.get(WAVES))
    near = 1e-5 * np.diag(expected).min()
    np.testing.assert_allclose(found.matrix, expected, rtol=1e-4, atol=near)
    errors = [found.standard_errors[name] for name in moves]
    np.testing.assert_allclose(errors, np.sqrt(np.diag(expected)), rtol=1e-4)
    assert found.names == tuple(moves) and not found.undetermined and not found.unfinished
    alone = laplace(model, everything(model), moves, chunk=5)
    assert all(alone.standard_errors[n] < found.standard_errors[n] for n in moves)


def test_an_early_end_errs_by_little_and_on_the_known_side(x64):
    model, project = case()
    run = partial(
        laplace, model, everything(model), directions(model), nuisance=(WAVES,), project=project,
        prior={WAVES: 0.3}, chunk=5,
    )  # fmt: skip
    exact, usual, hasty = run(iterations=2000, tolerance=1e-9), run(), run(iterations=3)
    assert hasty.unfinished == exact.names and not usual.unfinished and not exact.unfinished
    for n in exact.names:
        assert hasty.standard_errors[n] < usual.standard_errors[n] <= exact.standard_errors[n]
        assert usual.standard_errors[n] > 0.98 * exact.standard_errors[n]


def test_a_plan_is_set_aside_and_float32_is_enough(x64):
    model, project = case()
    run = partial(laplace, nuisance=(WAVES,), project=project, prior={WAVES: 0.3}, chunk=5)
    expected = run(model, everything(model), directions(model)).matrix
    single = prepare(cast(model, np.float32))
    found = run(single, everything(model), directions(single), project={WAVES: within(single)})
    np.testing.assert_allclose(found.matrix, expected, rtol=0.02, atol=1e-3)


def test_beliefs_add_to_what_the_data_say(x64):
    model, _ = case()
    run = partial(laplace, model, everything(model), directions(model), chunk=5)
    both = run(prior={"C12a": 0.1, "rotation": 2.0}).matrix
    expected = np.linalg.inv(run().matrix) + np.diag([0, 100.0, 0, 0.25])
    np.testing.assert_allclose(np.linalg.inv(both), expected, rtol=1e-6, atol=1e-6)


def test_a_gauge_is_named_and_differences_along_it_are_kept():
    # Where S does not depend on the tilt it takes up any phase over the aperture to first order.
    model = world((4, 5), (0.6, 0.5), (-60.0, 20.0, 110.0), np.float32)
    model = eqx.tree_at(lambda m: m.specimen.waves, model, model.specimen.waves.at[1:].set(0))
    focus = {f"C10 of {i}": aberration(model, "C10", np.eye(3)[i]) for i in range(3)}
    moves = {**focus, "C12a": aberration(model, "C12a", np.ones(3)), "rotation": rotation(model)}
    run = partial(laplace, model, everything(model), nuisance=(WAVES,), chunk=30)
    found = run(moves)
    infinite = [name for name, error in found.standard_errors.items() if error == np.inf]
    assert infinite == [*focus, "C12a"]
    assert len(found.undetermined) == 2
    for combination in found.undetermined:
        common = [combination.get(name, 0.0) for name in focus]
        np.testing.assert_allclose(common, np.mean(common), atol=0.02)
    # The difference of two foci, asked for by itself, has the same error.
    step = np.asarray([-1, 1, 0, 0, 0])
    known = np.sqrt(step @ found.matrix @ step)
    pair = {
        "difference": aberration(model, "C10", [-0.5, 0.5, 0.0]),
        "common": aberration(model, "C10", np.ones(3)),
    }
    again = run({**pair, **{n: moves[n] for n in ("C10 of 2", "C12a", "rotation")}})
    assert again.standard_errors["difference"] == pytest.approx(known, rel=0.05)
    assert again.standard_errors["common"] == np.inf


def test_a_direction_that_the_data_do_not_feel_is_undetermined(x64):
    model, _ = case()
    moves = directions(model)
    found = laplace(model, everything(model), {**moves, "C56a": moves["C10"]}, chunk=5)
    assert found.standard_errors["C10"] == found.standard_errors["C56a"] == np.inf
    assert np.isfinite([found.standard_errors[n] for n in ("C12a", "C12b", "rotation")]).all()
    (combination,) = found.undetermined
    assert combination == pytest.approx({"C10": 1.0, "C56a": -1.0}, abs=1e-6) or (
        combination == pytest.approx({"C10": -1.0, "C56a": 1.0}, abs=1e-6)
    )


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"directions": {}}, "at least one direction"),
        ({"directions": {"C10": None}}, "'C10'.* must be shaped as the model"),
        ({"directions": {"still": 0}}, "'still' moves no leaf"),
        ({"nuisance": ("specimen.wave",)}, "'specimen.wave' matches no leaf"),
        ({"prior": {"C30": 1.0}}, "`prior` names 'C30'; known: .*C10"),
        ({"prior": {"C10": 0.0}}, "'C10' must be positive and finite, got 0.0"),
        ({"project": {"specimen.waves": abs}}, "`project` names 'specimen.waves'"),
        ({"index": []}, "at least one frame.* got 0 frames"),
    ],
)
def test_what_cannot_be_answered_is_refused(change, complaint):
    model = world(dtype=np.float32)
    still = {"still": jax.tree.map(jnp.zeros_like, model)}
    moves = still if "still" in change.get("directions", {}) else None
    given = {"index": everything(model), "directions": directions(model)} | change
    given["directions"] = moves or given["directions"]
    given["index"] = np.asarray(given["index"], int)
    with pytest.raises(ValueError, match=complaint):
        laplace(model, **given)


def test_position_errors_equal_those_of_differences(x64):
    model, _ = case()
    index = np.asarray([3, 0, 11, 7, 5, 9, 1])
    found = position_errors(model, index, chunk=3)
    frames = np.asarray(expected(model, jnp.asarray(index))).reshape(7, -1)
    unit = np.ones((12, 1)) * np.eye(2)[:, None]
    moves = [tangent(model, lambda m: m.scan.positions, u) for u in unit]
    each = np.stack([slope(model, m).reshape(12, -1)[index] for m in moves], 1)
    information = np.einsum("fap,fbp->fab", each / (frames + BACKGROUND)[:, None], each)
    np.testing.assert_allclose(found, np.linalg.inv(information), rtol=1e-5)
    believed = position_errors(prepare(model), index, chunk=64, prior=0.01)
    belief = np.eye(2) / 0.01**2
    np.testing.assert_allclose(believed, np.linalg.inv(information + belief), rtol=1e-5)


class Stripes(eqx.Module):
    """Frames that change with y alone."""

    scan: Scan

    def __call__(self, index):
        y = self.scan.positions[index, 0]
        return 10 + y[:, None, None] * jnp.ones((1, 3, 4), y.dtype)


def test_a_direction_left_open_by_a_frame_has_infinite_error():
    model = Stripes(Scan(jnp.zeros((5, 2)), jnp.zeros(5, jnp.int32)))
    open_ended = position_errors(model, np.arange(5))
    assert np.all(np.diagonal(open_ended, axis1=1, axis2=2) == np.inf)
    held = position_errors(model, np.arange(5), background=0.0, prior=3.0)
    expected = np.diag([1 / (1.2 + 1 / 9), 9.0])
    np.testing.assert_allclose(held, np.tile(expected, (5, 1, 1)), rtol=1e-5)
    with pytest.raises(ValueError, match="'prior' must be positive and finite, got -1.0"):
        position_errors(model, np.arange(5), prior=-1.0)


def some_counts(dtype=np.uint16, mean=3.0, shape=(50, 6, 9)):
    values = np.random.default_rng(7).poisson(mean, shape)
    values[1] = 0
    return Frames(jnp.asarray(values.astype(dtype)))


@jax.jit
def dense(counts):
    return counts.dense(int)


def whole(counts):
    """The number of electrons in each pixel."""
    return np.asarray(dense(counts))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_thinning_loses_no_electron(dtype):
    frames = some_counts(dtype)
    for counts in (frames, events_from_frames(frames)):
        parts = thin(counts, 0.3, 5)
        assert all(type(part) is type(counts) for part in parts)
        types = lambda c: [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(c)]
        assert all(types(part) == types(counts) for part in parts)
        kept, rest = (whole(part) for part in parts)
        np.testing.assert_array_equal(kept + rest, whole(counts))
        again, other = (whole(thin(counts, 0.3, s)[0]) for s in (5, 6))
        assert np.array_equal(kept, again) and not np.array_equal(kept, other)


def test_thinned_events_stay_tidy():
    kept, _ = thin(events_from_frames(some_counts()), 0.3, 5)
    assert isinstance(kept, Events)
    empty = np.asarray(kept.multiplicity) == 0
    assert np.all(np.asarray(kept.pixels)[empty] == 0)


@pytest.mark.parametrize("stored", ["frames", "events"])
def test_thinning_is_binomial_and_its_parts_are_independent(stored):
    fraction, number = 0.3, 40
    fixed = Frames(jnp.full((200, 10, 12), number, jnp.uint8))
    fixed = events_from_frames(fixed) if stored == "events" else fixed
    kept = whole(thin(fixed, fraction, 1)[0]).ravel()
    variance = number * fraction * (1 - fraction)
    assert kept.mean() == pytest.approx(number * fraction, abs=5 * np.sqrt(variance / kept.size))
    assert kept.var() == pytest.approx(variance, rel=5 * np.sqrt(2 / kept.size))
    counts = some_counts(shape=(200, 10, 12))
    counts = events_from_frames(counts) if stored == "events" else counts
    first, second = (whole(p)[2:].ravel() for p in thin(counts, fraction, 2))
    near = 5 / np.sqrt(first.size)
    assert np.corrcoef(first, second)[0, 1] == pytest.approx(0, abs=near)
    # Each is Poisson: variance and mean agree.
    assert first.var() / first.mean() == pytest.approx(1, abs=2 * near)


def test_thinning_to_nothing_or_everything():
    counts = some_counts()
    none, everything = thin(counts, 0.0, 1)
    assert not np.any(whole(none))
    np.testing.assert_array_equal(whole(everything), whole(counts))


def test_what_cannot_be_thinned_is_refused():
    with pytest.raises(InputError, match="`fraction` must lie between 0 and 1, got 1.5"):
        thin(some_counts(), 1.5, 0)
    with pytest.raises(InputError, match="float32 counts are not whole"):
        thin(Frames(jnp.full((2, 3, 4), 0.5, jnp.float32)), 0.5, 0)
    with pytest.raises(InputError, match="negative .smallest -1"):
        thin(Frames(jnp.full((2, 3, 4), -1, jnp.int32)), 0.5, 0)


@pytest.mark.parametrize("stored", ["frames", "events"])
def test_the_bootstrap_finds_the_error_of_a_linear_result(stored):
    counts = some_counts(shape=(60, 6, 9))
    held = events_from_frames(counts) if stored == "events" else counts
    scan = Scan(jnp.zeros((60, 2)), jnp.zeros(60, jnp.int32))
    weights = np.random.default_rng(3).normal(size=(6, 9)) + 2

    def run(dataset):
        # Linear in the counts per dose, as a weak phase is.
        return whole(dataset.counts) * weights / 3.0 / dose(dataset)

    def dose(dataset):
        return float(dataset.counts.total().sum()) / float(counts.total().sum())

    found = bootstrap(run, Dataset(held, scan, ((6, 10),)), draws=20, seed=4)
    n = whole(counts)
    assert found.mean.shape == found.standard_error.shape == n.shape
    # Halves differ from half the electrons by some 1/sqrt(n).
    np.testing.assert_allclose(found.mean, n * weights / 3.0, rtol=0.01, atol=1e-6)
    expected = weights**2 * n / 9
    ratio = (found.standard_error**2)[expected > 0] / expected[expected > 0]
    assert ratio.mean() == pytest.approx(1, abs=5 * np.sqrt(2 / 20 / ratio.size))
    # A binomial with few trials scatters less than a normal number.
    assert ratio.std() == pytest.approx(np.sqrt(2 / 20 * np.mean(1 - 1 / n[n > 0])), rel=0.1)
    again = bootstrap(run, Dataset(held, scan, ((6, 10),)), draws=20, seed=4)
    np.testing.assert_array_equal(again.standard_error, found.standard_error)
    with pytest.raises(ValueError, match="at least one draw, got `draws` = 0"):
        bootstrap(run, Dataset(held, scan, ((6, 10),)), draws=0)


DRAWS = 64


def repeated(model, index, seed):
    """Frames as they are recorded again and again."""
    mean = np.asarray(expected(model, index))
    return jnp.asarray(np.random.default_rng(seed).poisson(mean, (DRAWS, *mean.shape)), mean.dtype)


def misfit(model, index, counts):
    """Sum over pixels of the Poisson loss."""
    intensity = model(index) + BACKGROUND
    return jnp.sum(intensity - counts * jnp.log(intensity))


def require_calibrated(found, covariance):
    """As many of the true values (0) within one and two standard errors as there should be."""
    errors = np.asarray(list(covariance.standard_errors.values()))
    away = np.abs(np.asarray(found)) / errors
    assert len(away) > 50
    assert 0.60 <= (away < 1).mean() <= 0.76
    assert (away < 2).mean() >= 0.87
    # The whole matrix: squared distances are distributed as chi squared.
    inverse = np.linalg.inv(covariance.matrix)
    distance = np.einsum("di,ij,dj->d", found, inverse, found)
    freedom = len(errors)
    assert distance.mean() == pytest.approx(freedom, abs=4 * np.sqrt(2 * freedom / DRAWS))


def test_errors_of_optics_and_scan_are_as_often_exceeded_as_they_should():
    model = world((4, 5), (0.6, 0.5), (-60.0, 20.0, 110.0), np.float32)
    index, moves = everything(model), directions(model)
    claimed = laplace(model, index, moves, chunk=30)
    step = jnp.asarray(claimed.matrix, jnp.float32)
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *moves.values())

    def at(sizes):
        go = lambda a, d: a + jnp.tensordot(sizes.astype(a.dtype), d, 1)
        return jax.tree.map(lambda a, d: go(a, d) if eqx.is_inexact_array(a) else a, model, stacked)

    def fit(counts):
        slope = jax.grad(lambda sizes: misfit(at(sizes), index, counts))
        scoring = lambda _, sizes: sizes - jnp.matmul(step, slope(sizes), precision="highest")
        return jax.lax.fori_loop(0, 5, scoring, jnp.zeros(len(moves)))

    found = jax.jit(lambda counts: jax.lax.map(fit, counts))(repeated(model, index, 11))
    require_calibrated(found, claimed)


def test_errors_are_calibrated_where_the_waves_are_fitted_along():
    model = world((4, 5), (0.6, 0.5), (-60.0, 20.0, 110.0), np.float32)
    index, moves, project = everything(model), directions(model), within(model)
    deviation = 0.1
    claimed = laplace(
        model, index, moves, nuisance=(WAVES,), project={WAVES: project}, prior={WAVES: deviation},
        chunk=30,
    )  # fmt: skip
    waves = model.specimen.waves
    linear = lambda tangent: project(tangent) - project(jnp.zeros_like(tangent))
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *moves.values())
    scale = jnp.asarray(list(claimed.standard_errors.values()), jnp.float32)

    def at(point):
        """Four coordinates in their errors, and the change of waves in what is believed of it."""
        sizes, change = point[:4] * scale, point[4:].reshape(2, *waves.shape)
        go = lambda a, d: a + jnp.tensordot(sizes.astype(a.dtype), d, 1)
        there = jax.tree.map(
            lambda a, d: go(a, d) if eqx.is_inexact_array(a) else a, model, stacked
        )
        change = linear(deviation * jax.lax.complex(change[0], change[1]))
        return eqx.tree_at(lambda m: m.specimen.waves, there, waves + change)

    nowhere = jnp.zeros(4 + 2 * waves.size)
    one = jax.jacrev(lambda point, frame: at(point)(frame[None]).ravel())
    jacobian = jax.jit(lambda p: jax.lax.map(lambda frame: one(p, frame), index))(nowhere)
    jacobian = np.asarray(jacobian).reshape(-1, len(nowhere))
    belief = np.diag(np.arange(len(nowhere)) >= 4).astype(np.float32)
    step = jnp.asarray(np.linalg.inv(jacobian.T @ (weight(model)[:, None] * jacobian) + belief))

    @jax.grad
    def slope(point, counts, centre):
        return misfit(at(point), index, counts) + jnp.sum((point[4:] - centre) ** 2) / 2

    # The step is an argument: the compiler would take long over a constant of that size.
    @jax.jit
    def fit(step, counts, centres):
        def scoring(_, points):
            slopes = jax.lax.map(lambda drawn: slope(*drawn), (points, counts, centres))
            return points - jnp.matmul(slopes, step, precision="highest")

        return jax.lax.fori_loop(0, 6, scoring, jnp.zeros((DRAWS, len(nowhere))))[:, :4]

    centres = np.random.default_rng(5).normal(size=(DRAWS, 2 * waves.size)).astype(np.float32)
    found = fit(step, repeated(model, index, 12), jnp.asarray(centres))
    require_calibrated(np.asarray(found) * np.asarray(scale), claimed)

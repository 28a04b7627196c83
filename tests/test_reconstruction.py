"""The loop: chunks, held-out frames, patience, continuation, and a small problem solved."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import Array, Float

from smpr3d_jax.data.counts import Frames
from smpr3d_jax.data.dataset import Batch, batch, Dataset, hold_out
from smpr3d_jax.inverse import reconstruction
from smpr3d_jax.inverse.losses import objective, poisson, shifted_amplitude
from smpr3d_jax.inverse.reconstruction import (
    make_evaluation,
    make_step,
    mean_over_chunks,
    reconstruct,
    start,
)
from smpr3d_jax.inverse.updates import largest_eigenvalue, nesterov, per_leaf
from smpr3d_jax.physics.detector import Detector
from smpr3d_jax.physics.forward import prepare, Scattering
from smpr3d_jax.physics.optics import focal_series
from smpr3d_jax.physics.scan import raster, Scan, series_of
from smpr3d_jax.physics.smatrix import scatter, to_modes, vacuum

from .helpers import random_slices


class Level(eqx.Module):
    """A model of one number: every pixel of every frame has that mean."""

    level: Float[Array, ""]
    shape: tuple[int, int] = eqx.field(static=True, default=(3, 2))

    def __call__(self, index):
        return jnp.broadcast_to(self.level, (index.shape[0], *self.shape))


def constant(values, dtype: type = np.uint8):
    """Frames that hold one count each in every pixel."""
    counts = np.broadcast_to(np.asarray(values, dtype)[:, None, None], (len(values), 3, 2))
    scan = Scan(jnp.zeros((len(values), 2)), jnp.zeros(len(values), jnp.int32))
    return Dataset(Frames(jnp.asarray(counts)), scan, ((1, len(values)),))


def squared(model, batch):
    """Mean over frames of the squared misfit, a pixel."""
    return jnp.mean((model(batch.index) - batch.counts.dense(model.level.dtype)) ** 2)


LEVEL = Level(jnp.asarray(1.0))
DESCENT = per_leaf({"level": optax.sgd(0.1)})
FRAMES = constant(range(13))


@pytest.mark.parametrize("own", [(), ("level",)])
def test_frames_are_sorted_anew_where_what_is_their_own_moves(monkeypatch, own):
    """What frames share, by which they are sorted, changes only as their own leaves do."""
    seen = []
    monkeypatch.setattr(
        reconstruction, "ordered", lambda model, index: (seen.append(float(model.level)), index)[1]
    )
    updates = per_leaf({"level": optax.sgd(0.1)}, own=own)
    levels = []
    follow = lambda step: levels.append(float(step.model.level))
    reconstruct(LEVEL, FRAMES, squared, updates, steps=3, callback=follow)
    assert levels[0] != levels[1]
    assert seen[-1] == (levels[1] if own else 1.0)
    assert set(seen) == ({1.0, *levels[:2]} if own else {1.0})


@pytest.mark.parametrize("chunk", [1, 4, 13, 50])
def test_mean_over_chunks_is_the_mean(chunk):
    """13 frames in chunks of 4 leave one over, which counts as one frame."""
    frames = batch(FRAMES, np.arange(13))
    mean = lambda part: {"n": jnp.mean(part.counts.dense(jnp.float32)), "one": jnp.ones(2)}
    found = jax.jit(lambda frames: mean_over_chunks(mean, frames, chunk))(frames)
    np.testing.assert_allclose(found["n"], 6.0, rtol=1e-6)
    np.testing.assert_allclose(found["one"], 1.0, rtol=1e-6)


def test_the_step_descends_along_the_mean_over_frames():
    frames = batch(FRAMES, np.asarray([2, 3, 7]))
    for chunk in (2, 64):
        model, _, value = make_step(squared, DESCENT, chunk)(LEVEL, start(LEVEL, DESCENT), frames)
        np.testing.assert_allclose(value, (1 + 4 + 36) / 3, rtol=1e-6)
        np.testing.assert_allclose(model.level, 1 - 0.1 * 2 * (1 - 4), rtol=1e-6)


def test_evaluation_is_a_pixels_deviance_and_the_r_factor():
    frames = batch(FRAMES, np.asarray([0, 1, 4]))
    found = make_evaluation(2)(LEVEL, frames)
    np.testing.assert_allclose(found["r_factor"], (1 + 0 + 1) / (0 + 1 + 2), rtol=1e-6)
    expected = 2 * (1 + 0 + (1 - 4 + 4 * np.log(4))) / 3
    np.testing.assert_allclose(found["deviance"], expected, rtol=1e-5)


def test_patience_stops_and_returns_the_best_model():
    """Fitted to 12 from 1, the level passes the held-out 5 on its way; it stays best there."""
    data = constant([12, 12, 12, 5])
    seen = []
    result = reconstruct(
        LEVEL, data, squared, DESCENT, steps=40, held_out=np.asarray([3]), patience=4,
        callback=lambda step: seen.append((step.number, float(step.model.level))),
    )  # fmt: skip
    deviance = result.history["deviance_held_out"]
    best = int(np.argmin(deviance))
    assert len(seen) == len(deviance) == best + 1 + 4 < 40
    assert [number for number, _ in seen] == list(range(1, len(seen) + 1))
    assert float(result.model.level) == seen[best][1]
    assert abs(float(result.model.level) - 5) < 1


def test_the_best_model_is_returned_also_when_the_steps_are_done():
    data = constant([12, 12, 12, 5])
    keep = {"steps": 10, "held_out": np.asarray([3])}
    best = reconstruct(LEVEL, data, squared, DESCENT, patience=100, **keep)
    last = reconstruct(LEVEL, data, squared, DESCENT, **keep)
    assert abs(float(best.model.level) - 5) < 1 < 4 < float(last.model.level) - 5


def test_held_out_frames_never_influence_the_fit():
    held_out = np.asarray([1, 7])
    other = np.asarray(range(13))
    other[held_out] = 250
    runs = [
        reconstruct(LEVEL, data, squared, DESCENT, steps=5, held_out=held_out, batch_size=size)
        for size in (None, 3)
        for data in (FRAMES, constant(other))
    ]
    for a, b in (runs[:2], runs[2:]):
        assert float(a.model.level) == float(b.model.level)
        assert a.history["loss"] == b.history["loss"]
        assert a.history["deviance_held_out"] != b.history["deviance_held_out"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"held_out": np.asarray([3, 4]), "training": np.asarray([4, 5])}, "1 frames .*first: 4"),
        ({"training": np.asarray([12, 13])}, "from 0 to 12"),
        ({"training": np.asarray([], int)}, "at least one is needed"),
        ({"patience": 3}, "needs `held_out`"),
        ({"batch_size": 0}, "`batch_size` 0"),
    ],
)
def test_what_cannot_be_done_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        reconstruct(LEVEL, FRAMES, squared, DESCENT, steps=2, **changes)


def test_a_loss_that_is_no_number_stops_the_run():
    data = constant([1.0, np.nan, 2.0], np.float32)
    with pytest.raises(ValueError, match="loss became nan at step 1.*frames that hold NaN"):
        reconstruct(LEVEL, data, squared, DESCENT, steps=3)
    fast = per_leaf({"level": optax.sgd(1e30)})
    with pytest.raises(ValueError, match="loss became (inf|nan) at step 2.*smaller step"):
        reconstruct(LEVEL, FRAMES, squared, fast, steps=9)


@pytest.mark.parametrize("batch_size", [None, 4])
def test_continuing_equals_an_uninterrupted_run_to_the_bit(batch_size):
    updates = per_leaf({"level": optax.adam(0.3)})
    keep = {"batch_size": batch_size, "seed": 5}
    whole = reconstruct(LEVEL, FRAMES, squared, updates, steps=7, **keep)
    first = reconstruct(LEVEL, FRAMES, squared, updates, steps=4, **keep)
    numbers = []
    second = reconstruct(
        first.model, FRAMES, squared, updates, steps=3, state=first.state, done=4,
        callback=lambda step: numbers.append(step.number), **keep,
    )  # fmt: skip
    assert numbers == [5, 6, 7]
    assert first.history["loss"] + second.history["loss"] == whole.history["loss"]
    assert float(second.model.level) == float(whole.model.level)


def test_batches_are_reproducible_from_their_seed():
    run = lambda seed: reconstruct(
        LEVEL, FRAMES, squared, DESCENT, steps=6, batch_size=3, seed=seed
    )
    losses = [run(seed).history["loss"] for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(("stored", "real"), [(np.uint8, np.float32), (np.uint16, np.float64)])
def test_counts_take_the_model_s_precision(x64, stored, real):
    data = constant([0, 3, 9], stored)
    model = Level(jnp.asarray(1, real))
    state = start(model, DESCENT)
    model, _, value = make_step(objective(poisson()), DESCENT, 2)(
        model, state, batch(data, np.arange(3))
    )
    assert model.level.dtype == value.dtype == real


ENERGY, SEMIANGLE = 80e3, 25.0


@pytest.fixture(scope="module")
def experiment():
    """Two strong layers, three scans without noise; and the vacuum to start from.

    The truth is in tilt modes: what the same few modes cannot hold is not asked for.
    """
    optics = focal_series(ENERGY, SEMIANGLE, [-80.0, 20.0, 110.0])
    detector = Detector((16, 20), 5.0, 1)
    window = detector.window(optics.wavelength)
    layers = random_slices((32, 40), window.sampling, (5.0, 35.0), strength=60.0)
    made = jax.jit(lambda: scatter(layers, window, ENERGY, optics.cutoff, 20.0, np.complex64))
    truth = to_modes(made(), 2)
    step = (0.8, 0.7)
    first = np.asarray(window.extent) / 2
    scan = series_of([first + raster((13, 15), step)] * 3)
    model = prepare(Scattering(optics, truth, scan, detector, jnp.full(3, 1e3)))
    index = jnp.arange(len(scan.positions), dtype=jnp.int32)
    data = Dataset(Frames(jax.jit(lambda model: model(index))(model)), scan, ((13, 15),) * 3)
    still = jnp.broadcast_to(vacuum(truth)[:, None, None], truth.waves.shape)
    return data, eqx.tree_at(lambda m: m.specimen.waves, model, still), truth, step


def test_gradient_in_chunks_equals_the_whole(experiment):
    """Sixty frames in chunks of 25 leave ten over."""
    data, model, _, _ = experiment
    frames = batch(data, np.arange(60) * 9)
    updates = per_leaf({"specimen.waves": optax.sgd(1.0), "dose": optax.sgd(1.0)})
    loss, state = objective(shifted_amplitude()), start(model, updates)
    (a, _, u), (b, _, v) = (
        make_step(loss, updates, chunk)(model, state, frames) for chunk in (60, 25)
    )
    np.testing.assert_allclose(u, v, rtol=1e-5)
    scale = float(jnp.abs(a.specimen.waves - model.specimen.waves).max())
    assert scale > 0
    np.testing.assert_allclose(a.specimen.waves, b.specimen.waves, atol=2e-5 * scale)
    np.testing.assert_allclose(a.dose - model.dose, b.dose - model.dose, rtol=1e-2, atol=1e-4)


def test_a_small_problem_is_solved(experiment):
    data, model, truth, step = experiment
    training, held_out = hold_out(data)
    noise = shifted_amplitude()
    size = len(training) / largest_eigenvalue(model, step)
    updates = per_leaf({"specimen.waves": nesterov(size)})
    frames = len(data)
    result = reconstruct(
        model, data, objective(noise), updates, steps=40, training=training, held_out=held_out,
        chunk=64,
    )  # fmt: skip
    history = result.history
    assert set(history) == {
        "loss", "deviance", "noise", "r_factor",
        "deviance_held_out", "noise_held_out", "r_factor_held_out",
    }  # fmt: skip
    assert frames == len(training) + len(held_out)
    assert history["loss"][-1] < 0.02 * history["loss"][0]
    assert history["deviance_held_out"][-1] < 0.1 * history["deviance_held_out"][0]
    assert history["r_factor_held_out"][-1] < 0.3 * history["r_factor_held_out"][0]
    # Plain descent at this step never rises; momentum may, and restarts.
    assert np.mean(np.diff(history["loss"]) < 0) > 0.8
    inside = (slice(None), slice(8, 24), slice(10, 30))
    unit = lambda waves: np.asarray(waves[inside]).ravel()
    found, wanted = unit(result.model.specimen.waves), unit(truth.waves)
    overlap = abs(np.vdot(found, wanted)) / np.linalg.norm(found) / np.linalg.norm(wanted)
    assert overlap > 0.95


def test_the_same_loss_is_compiled_once():
    count = []

    def loss(model, batch):
        count.append(1)
        return squared(model, batch)

    for _ in range(3):
        reconstruct(LEVEL, FRAMES, loss, DESCENT, steps=2)
    traced = len(count)
    make_step(loss, DESCENT)(LEVEL, start(LEVEL, DESCENT), batch(FRAMES, np.arange(13)))
    assert len(count) == traced
    assert isinstance(batch(FRAMES, np.arange(2)), Batch)

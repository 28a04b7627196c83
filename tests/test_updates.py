"""Which leaves move and how fast: partitions, Nesterov's method, steps, optax's own."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jaxtyping import Array, Complex, Float, Int

from smpr3d_jax.data.counts import Frames
from smpr3d_jax.data.dataset import Batch, Dataset
from smpr3d_jax.inverse.losses import objective, penalised, poisson
from smpr3d_jax.inverse.reconstruction import make_step, reconstruct, start
from smpr3d_jax.inverse.updates import Beat, largest_eigenvalue, named_leaves, nesterov, per_leaf
from smpr3d_jax.physics.detector import Detector
from smpr3d_jax.physics.forward import exit_waves, prepare, Scattering, unscattered
from smpr3d_jax.physics.optics import focal_series
from smpr3d_jax.physics.scan import raster, Scan, series_of
from smpr3d_jax.physics.smatrix import field, unscattered_beams, unscattered_modes

from .helpers import random_complex


class Lens(eqx.Module):
    """Some leaves that move and one that cannot."""

    aberrations: dict[str, Float[Array, " scans"]]
    count: Int[Array, ""]


class Model(eqx.Module):
    """Leaves two levels deep, of all kinds."""

    waves: Complex[Array, " n"]
    lens: Lens
    name: str = eqx.field(static=True, default="toy")


TARGET = random_complex(0, (6,)).astype(np.complex64)
WEIGHTS = jnp.arange(1.0, 7.0, dtype=jnp.float32)
BATCH = Batch(Frames(jnp.zeros((1, 1, 1), jnp.uint8)), jnp.zeros(1, jnp.int32))


def toy():
    """A model far from the least of `bowl`."""
    numbers = {"C10": jnp.asarray([3.0, -1.0]), "C12a": jnp.asarray([2.0, 2.0])}
    return Model(jnp.zeros(6, jnp.complex64), Lens(numbers, jnp.asarray(4)))


def bowl(model, batch):
    """A quadratic with its least at waves = TARGET, all aberrations 1."""
    away = model.waves - TARGET
    square = sum(jnp.sum((v - 1) ** 2) for v in model.lens.aberrations.values())
    return jnp.sum(WEIGHTS * (away.real**2 + away.imag**2)) + square


def run(updates, model, steps, loss=bowl):
    """Steps of one compiled function, and the losses before each."""
    step, state, values = make_step(loss, updates), start(model, updates), []
    for _ in range(steps):
        model, state, value = step(model, state, BATCH)
        values.append(float(value))
    return model, state, values


@pytest.mark.parametrize("name", ["wave", "lens.aberrations.C1", "lens.count", "name", "lens.C10"])
def test_a_name_that_matches_nothing_raises(name):
    updates = per_leaf({name: optax.sgd(0.1)})
    with pytest.raises(ValueError, match=f"'{name}' matches no leaf.*(waves|aberrations)"):
        start(toy(), updates)


def test_the_nearest_name_is_told():
    with pytest.raises(ValueError, match="nearest: .'lens.aberrations.C10'"):
        start(toy(), per_leaf({"lens.aberration.C10": optax.sgd(0.1)}))


def test_what_is_not_named_stands_still():
    before = toy()
    after, _, values = run(per_leaf({"lens.aberrations.C10": optax.sgd(0.1)}), before, 3)
    assert values[-1] < values[0]
    np.testing.assert_array_equal(after.waves, before.waves)
    np.testing.assert_array_equal(after.lens.aberrations["C12a"], [2.0, 2.0])
    # The gradient is 2 (x - 1).
    left = 0.8**3 * np.asarray([2, -2])
    np.testing.assert_allclose(after.lens.aberrations["C10"] - 1, left, rtol=1e-6)
    assert int(after.lens.count) == 4


def test_each_leaf_has_its_optimiser_and_the_longer_name_wins():
    updates = per_leaf(
        {
            "lens.aberrations.C12a": optax.sgd(0.5),
            "lens": optax.sgd(0.1),
            "waves": nesterov(1 / 12),
        }
    )
    after, state, _ = run(updates, toy(), 1)
    np.testing.assert_allclose(after.lens.aberrations["C12a"], 1.0, atol=1e-6)
    np.testing.assert_allclose(after.lens.aberrations["C10"], [2.6, -0.6], rtol=1e-6)
    np.testing.assert_allclose(after.waves, np.asarray(TARGET) * np.asarray(WEIGHTS) / 6, rtol=1e-5)
    assert set(state) == {"lens.aberrations.C12a", "lens", "waves"}


@pytest.mark.parametrize(
    ("optimiser", "steps", "left"),
    [
        (optax.adam(0.1), 60, 0.1),
        (optax.chain(optax.clip_by_global_norm(5.0), optax.sgd(0.07)), 60, 1e-3),
    ],
    ids=["adam", "chain"],
)
def test_optax_moves_complex_leaves(optimiser, steps, left):
    after, _, values = run(per_leaf({"waves": optimiser}), toy(), steps)
    rest = bowl(after, BATCH) - bowl(eqx.tree_at(lambda m: m.waves, toy(), TARGET), BATCH)
    assert float(rest) < left * values[0]


def test_a_line_search_beside_another_optimiser():
    updates = per_leaf({"waves": optax.lbfgs(), "lens.aberrations": optax.adam(0.1)})
    after, _, _ = run(updates, toy(), 12)
    np.testing.assert_allclose(after.waves, TARGET, atol=1e-3)
    assert np.all(np.abs(after.lens.aberrations["C10"] - 1) < [1.2, 1.2])


def descend(step, value, length, project=None, cap=0.95, count=400, real=False):
    """Nesterov's method alone on f = sum w |x - t|²/2 with t random; losses and last state."""
    weights = jnp.asarray(np.geomspace(1e-3, 1.0, length))
    target = random_complex(3, (length,))
    target = target.real if real else target
    optimiser: Any = nesterov(step, project, cap)

    def one(carry, _):
        x, state = carry
        away = x - target
        loss = jnp.sum(weights * jnp.abs(away) ** 2) / 2
        move, state = optimiser.update(weights.astype(x.dtype) * away, state, x, value=value(loss))
        return (x + move, state), loss

    x = jnp.zeros_like(target)
    (x, state), losses = jax.lax.scan(one, (x, optimiser.init(x)), length=count)
    return x, state, np.asarray(losses), target, weights


def test_nesterov_keeps_its_bound_on_a_convex_quadratic(x64):
    """f_k - f* <= 2 L |x_0 - x*|²/(k+1)², and with restarts far below plain descent."""
    _, state, losses, target, weights = descend(1.0, lambda v: v, 40, cap=1.0)
    k, distance = np.arange(len(losses)), float(jnp.sum(jnp.abs(target) ** 2))
    assert np.all(losses <= 2 * distance / (k + 1) ** 2)
    plain = jnp.sum(weights * (1 - weights) ** 798 * jnp.abs(target) ** 2) / 2
    assert losses[-1] < 1e-3 * float(plain)
    assert int(state.restarts) >= 1
    # The counter grows by half a step a step since the last restart.
    assert 1 < float(state.theta) < 200


def test_momentum_is_capped(x64):
    """theta settles the momentum of the first steps, `cap` that of the others."""
    thetas = [1.0]
    for _ in range(60):
        thetas.append((1 + np.sqrt(1 + 4 * thetas[-1] ** 2)) / 2)
    flat = lambda loss: jnp.zeros_like(loss)
    x, state, _, target, weights = descend(0.5, flat, 5, cap=0.6, count=60, real=True)
    y = s = np.zeros(5)
    for old, new in zip(thetas, thetas[1:], strict=False):
        point = y - 0.5 * np.asarray(weights) * (y - np.asarray(target))
        y, s = point + min((old - 1) / new, 0.6) * (point - s), point
    np.testing.assert_allclose(x, y, rtol=1e-10)
    np.testing.assert_allclose(state.point, s, rtol=1e-10)


def test_momentum_restarts_when_the_loss_rises():
    optimiser: Any = nesterov(0.1)
    x = jnp.asarray([1.0, 2.0])
    state, gradient = optimiser.init(x), jnp.asarray([1.0, -1.0])
    for value in (3.0, 2.0, 1.0):
        move, state = optimiser.update(gradient, state, x, value=value)
        x = x + move
    assert int(state.restarts) == 0
    assert float(state.theta) > 2
    move, state = optimiser.update(gradient, state, x, value=1.5)
    # No momentum: a plain step from the extrapolated point.
    np.testing.assert_allclose(move, -0.1 * gradient, rtol=1e-6)
    assert int(state.restarts) == 1
    assert float(state.theta) == pytest.approx((1 + np.sqrt(5)) / 2)
    assert state.value.dtype == jnp.float32


def test_projection_is_applied_to_each_step(x64):
    """A linear projection holds for the extrapolated point also; the result is the least in it."""
    keep = np.arange(8) % 2 == 1
    project = lambda leaf: jnp.where(keep, leaf, 0)
    x, state, _, target, _ = descend(1.0, lambda v: v, 8, project, count=1500)
    np.testing.assert_array_equal(x[~keep], 0)
    np.testing.assert_array_equal(state.point[~keep], 0)
    np.testing.assert_allclose(x[keep], target[keep], atol=1e-3)


def test_nesterov_asks_for_the_loss():
    optimiser = nesterov(0.1)
    x = jnp.ones(2)
    with pytest.raises(ValueError, match="value=loss"):
        optimiser.update(x, optimiser.init(x), x)


ENERGY, SEMIANGLE = 80e3, 25.0


@pytest.mark.parametrize(
    ("representation", "step", "tight"),
    [("modes", 0.7, 0.6), ("beams", 1.0, 0.5)],
)
def test_largest_eigenvalue_bounds_power_iteration(representation, step, tight):
    """lambda/(2 alpha) is 0.84 Å: at 0.7 Å no two tilts are tied, at 1 Å some are."""
    optics = focal_series(ENERGY, SEMIANGLE, [-20.0, 30.0])
    detector = Detector((16, 20), 6.0, 1)
    window = detector.window(optics.wavelength)
    scan = series_of([raster((14, 12), (step, step))] * 2)
    grid, origin = field(np.asarray(scan.positions), window)
    if representation == "modes":
        specimen = unscattered_modes(grid, origin, 5.0, optics.cutoff, 2)
    else:
        specimen = unscattered_beams(grid, window, origin, 5.0, optics.cutoff)
    model = Scattering(optics, specimen, scan, detector, jnp.asarray([100.0, 200.0]))
    index = jnp.arange(len(scan.positions), dtype=jnp.int32)

    @jax.jit
    def normal(waves):
        forward = lambda w: exit_waves(eqx.tree_at(lambda m: m.specimen.waves, model, w), index)
        image, pull = jax.vjp(forward, waves)
        result = jnp.conj(pull(jnp.conj(image))[0])
        size = jnp.linalg.norm(result)
        return result / size.astype(result.dtype), size

    waves = random_complex(0, specimen.waves.shape).astype(np.complex64)
    waves, size = normal(waves)
    for _ in range(12):
        waves, size = normal(waves)
    bound = largest_eigenvalue(model, (step, step))
    assert tight * bound < float(size) < 1.05 * bound


# --- beats, what frames have of their own, tables ------------------------------------------------


@jax.custom_vjp
def forbidden(x):
    """The identity, whose derivative is not a number."""
    return x


forbidden.defvjp(lambda x: (x, None), lambda _, to: (jnp.full_like(to, jnp.nan),))


def guarded(model, batch):
    """`bowl`, in which only the waves may be differentiated."""
    numbers = {name: forbidden(v) for name, v in model.lens.aberrations.items()}
    return bowl(eqx.tree_at(lambda m: m.lens.aberrations, model, numbers), batch)


def test_what_is_not_due_rests_and_costs_no_gradient():
    """Every second step from the second; derived, what is not due would make NaN."""
    name = ("lens.aberrations.C10", "lens.aberrations.C12a")
    updates = per_leaf({"waves": optax.sgd(0.01), name: optax.adam(0.1)}, {name: Beat(2, 2)})
    assert [updates.at(n).moving == updates.moving for n in range(1, 7)] == [False, True] * 3
    model = toy()
    state = start(model, updates)
    rested = make_step(guarded, updates.at(1))
    first, kept, _ = rested(model, state, BATCH)
    assert np.all(np.isfinite(np.asarray(first.waves)))
    assert not np.array_equal(first.waves, model.waves)
    for leaf, old in zip(
        jax.tree.leaves((first.lens, kept[" ".join(name)])),
        jax.tree.leaves((model.lens, state[" ".join(name)])),
        strict=True,
    ):
        np.testing.assert_array_equal(leaf, old)
    second, after, _ = make_step(guarded, updates.at(2))(first, kept, BATCH)
    assert np.all(np.isnan(np.asarray(second.lens.aberrations["C10"])))
    assert int(jax.tree.leaves(after[" ".join(name)])[0]) == 1


def test_a_beat_comes_again_and_again():
    assert [n for n in range(1, 12) if Beat(2, 3).due(n)] == [2, 5, 8, 11]


def test_a_leaf_may_rest_while_those_move_that_share_its_optimiser():
    """Clipped together, so that one that moves feels whether the gradient of the other counts."""
    C12a = "lens.aberrations.C12a"
    clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0))
    updates = per_leaf({"lens": clipped, "waves": optax.sgd(0.01)}, {C12a: Beat(1, 2)})
    assert [updates.at(n).resting for n in range(1, 6)] == [(), (C12a,), (), (C12a,), ()]
    assert all(updates.at(n).moving == updates.moving for n in range(1, 6))
    model = toy()
    free = updates.at(2).free(model)
    assert free.waves and free.lens.aberrations == {"C10": True, "C12a": False}
    state = start(model, updates)

    def only_c10(model, batch):
        rest = {**model.lens.aberrations, "C12a": forbidden(model.lens.aberrations["C12a"])}
        return bowl(eqx.tree_at(lambda m: m.lens.aberrations, model, rest), batch)

    after, _, _ = make_step(only_c10, updates.at(2))(model, state, BATCH)
    np.testing.assert_array_equal(after.lens.aberrations["C12a"], [2.0, 2.0])
    # Its gradient, 2 (x - 1) = (4, -4), is clipped to length 1 by itself.
    np.testing.assert_allclose(
        after.lens.aberrations["C10"],
        np.asarray([3, -1]) - np.sqrt([0.5, 0.5]) * [1, -1],
        rtol=1e-5,
    )
    both, _, _ = make_step(bowl, updates.at(3))(model, state, BATCH)
    moves = [
        np.asarray(both.lens.aberrations[n] - model.lens.aberrations[n]) for n in ("C10", "C12a")
    ]
    assert np.linalg.norm(moves) == pytest.approx(1, rel=1e-5) and np.all(moves[1] < 0)


def test_a_whole_subtree_may_rest_but_not_its_namesake():
    """`lens.aberrations.C1` would be the beginning of both names."""
    updates = per_leaf({"lens": optax.sgd(0.1)}, {"lens.aberrations": Beat(5, 1)})
    assert not any(jax.tree.leaves(updates.at(4).free(toy())))
    assert updates.at(5).free(toy()).lens.aberrations == {"C10": True, "C12a": True}
    other = per_leaf({"lens": optax.sgd(0.1)}, {"lens.aberrations.C1": Beat(5, 1)})
    assert other.at(4).free(toy()).lens.aberrations == {"C10": True, "C12a": True}


def test_a_tuple_of_names_shares_one_optimiser():
    """A common clip by the norm of both is less than one for each."""
    clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0))
    names = ("lens.aberrations.C10", "lens.aberrations.C12a")
    together, state, _ = run(per_leaf({names: clipped}), toy(), 1)
    assert list(state) == [" ".join(names)]
    away = lambda m: np.concatenate([m.lens.aberrations[k] for k in ("C10", "C12a")])
    assert np.linalg.norm(away(together) - away(toy())) == pytest.approx(1, rel=1e-5)
    apart, _, _ = run(per_leaf(dict.fromkeys(names, clipped)), toy(), 1)
    assert np.linalg.norm(away(apart) - away(toy())) == pytest.approx(np.sqrt(2), rel=1e-5)


def test_a_penalty_is_weighed_once_a_step_however_many_chunks():
    """Its value and gradient are added to those of the mean over the frames."""
    calls = []

    def penalty(model):
        jax.debug.callback(lambda: calls.append(1))
        return 0.5 * jnp.sum(model.lens.aberrations["C10"] ** 2)

    updates = per_leaf({"lens.aberrations": optax.sgd(0.1)})
    frames = Batch(Frames(jnp.zeros((6, 1, 1), jnp.uint8)), jnp.arange(6, dtype=jnp.int32))
    state = start(toy(), updates)
    step = make_step(penalised(bowl, penalty), updates, 2)
    with_it, _, value = step(toy(), state, frames)
    jax.effects_barrier()
    assert len(calls) == 1
    without, _, bare = make_step(bowl, updates, 2)(toy(), state, frames)
    assert float(value - bare) == pytest.approx(5.0, rel=1e-5)
    more = with_it.lens.aberrations["C10"] - without.lens.aberrations["C10"]
    np.testing.assert_allclose(more, -0.1 * np.asarray([3.0, -1.0]), rtol=1e-5)
    np.testing.assert_array_equal(
        with_it.lens.aberrations["C12a"], without.lens.aberrations["C12a"]
    )


class Gains(eqx.Module):
    """Every frame has its gain, and all frames share a level."""

    gain: Float[Array, " frames"]
    level: Float[Array, ""]

    def __call__(self, index):
        mean = self.gain[index] * self.level
        return jnp.broadcast_to(mean[:, None, None], (index.shape[0], 3, 2))


def misfit(model, batch):
    return jnp.mean((model(batch.index) - batch.counts.dense(model.level.dtype)) ** 2)


DESCENT = per_leaf({"gain": optax.sgd(0.05), "level": optax.sgd(0.005)})


def gains(own, held_out=(1, 4), steps=60, counts=(4, 8, 4, 2, 6)):
    """A reconstruction of gains and level from frames of constant counts."""
    cube = np.broadcast_to(np.asarray(counts, np.uint8)[:, None, None], (len(counts), 3, 2))
    scan = Scan(jnp.zeros((len(counts), 2)), jnp.zeros(len(counts), jnp.int32))
    data = Dataset(Frames(jnp.asarray(cube)), scan, ((1, len(counts)),))
    model = Gains(jnp.ones(len(counts)), jnp.asarray(3.0))
    updates, held_out = DESCENT._replace(own=own), np.asarray(held_out, int)
    return reconstruct(model, data, misfit, updates, steps=steps, held_out=held_out)


def test_own_leaves_of_held_out_frames_follow_them_and_nothing_else_does():
    followed, left = gains(("gain",)), gains(())
    np.testing.assert_array_equal(left.model.gain[np.asarray([1, 4])], 1.0)
    frames = np.asarray(followed.model.gain) * float(followed.model.level)
    np.testing.assert_allclose(frames, [4, 8, 4, 2, 6], atol=1e-3)
    # Neither what is common nor what belongs to training frames knows of them.
    assert float(followed.model.level) == float(left.model.level)
    training = np.asarray([0, 2, 3])
    np.testing.assert_array_equal(followed.model.gain[training], left.model.gain[training])
    assert followed.history["loss"] == left.history["loss"]
    other = gains(("gain",), counts=(4, 200, 4, 2, 9), steps=3)
    same = gains(("gain",), steps=3)
    assert float(other.model.level) == float(same.model.level)
    np.testing.assert_array_equal(other.model.gain[training], same.model.gain[training])
    assert not np.array_equal(other.model.gain, same.model.gain)


def test_held_out_frames_are_followed_as_fast_as_they_would_be_fitted():
    """A frame's own gradient does not depend on whether it is among those that are fitted."""
    once = gains(("gain",), held_out=(1,), steps=1).model.gain
    # The mean over four frames instead of five.
    other = gains(("gain",), held_out=(), steps=1).model.gain
    np.testing.assert_allclose(once - 1, (other - 1) * 5 / 4, rtol=1e-5)


def test_a_table_hands_gradients_on_to_what_it_is_made_of(x64):
    """In chunks through the table, and without a plan on the same rungs: one gradient."""
    optics = focal_series(80e3, 25.0, [-20.0, 30.0], {"C12": 10.0, "phi12": 0.3})
    detector = Detector((16, 20), 6.0, 1)
    window = detector.window(optics.wavelength)
    scan = series_of([raster((2, 4), tuple(2 * np.asarray(window.sampling)))] * 2)
    model = unscattered(optics, detector, scan, jnp.asarray([100.0, 200.0]), 5.0, 1)
    waves = model.specimen.waves + 0.2 * random_complex(1, model.specimen.waves.shape)
    # An even ladder has no rung at the centre of a pixel: a twelfth beside it there is one.
    beside = scan.positions + jnp.asarray(window.sampling)[None] / 12
    model = eqx.tree_at(lambda m: (m.specimen.waves, m.scan.positions), model, (waves, beside))
    planned = prepare(model, moving=("optics", "dose"))
    index = jnp.arange(16, dtype=jnp.int32)
    noise = jnp.asarray(np.random.default_rng(2).uniform(0.5, 1.5, (16, 16, 20)))
    data = Batch(Frames(noise * eqx.filter_jit(planned)(index)), index)
    rates = {"optics.aberrations.C10": 3.0, "optics.aberrations.C12b": 5.0, "dose": 1.0}
    updates = per_leaf({name: optax.sgd(rate) for name, rate in rates.items()})
    loss, after = objective(poisson()), []
    for one, chunk in ((model, 16), (planned, 1)):
        moved, _, value = make_step(loss, updates, chunk)(one, start(one, updates), data)
        after.append((moved, float(value)))
    (exact, value), (found, same) = after
    assert same == pytest.approx(value, rel=1e-9)
    for name in rates:
        a, b, c = (named_leaves(m)[name] for m in (exact, found, model))
        assert np.all(np.abs(a - c) > 1e-5)
        np.testing.assert_allclose(b - c, a - c, rtol=1e-6)
    # What is stored is what the moved leaves make.
    fresh = prepare(eqx.tree_at(lambda m: m.plan, found, None), moving=("optics",))
    np.testing.assert_allclose(found.plan.table.values, fresh.plan.table.values, atol=1e-12)
    assert float(jnp.max(jnp.abs(found.plan.table.values - planned.plan.table.values))) > 1e-4

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
from smpr3d_jax.data.dataset import Batch
from smpr3d_jax.inverse.reconstruction import make_step, start
from smpr3d_jax.inverse.updates import largest_eigenvalue, nesterov, per_leaf
from smpr3d_jax.physics.detector import Detector
from smpr3d_jax.physics.forward import exit_waves, Scattering
from smpr3d_jax.physics.optics import focal_series
from smpr3d_jax.physics.scan import raster, series_of
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

"""Waves through slices: against a loop over frames and slices, forwards and backwards."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smpr3d_jax.physics import crossing
from smpr3d_jax.physics.fourier import fft, ifft

from .helpers import random_complex


Y, X = 6, 8
FRAMES = 5
ROW = np.array([0, 2, 1, 2, 2], np.int32)
CORNER = np.random.default_rng(0).integers(0, 7, (FRAMES, 2)).astype(np.int32)
PLACES = (jnp.asarray(ROW), jnp.asarray(CORNER))


def operands(slices, states, swaying) -> Any:
    """Waves, plates, propagators and, if asked for, each frame's own factors of these."""
    sway = None
    if swaying:
        shapes = ((FRAMES, slices - 1, Y), (FRAMES, slices - 1, X))
        sway = crossing.Sway(*(jnp.asarray(random_complex(i, s)) for i, s in enumerate(shapes)))
    shapes = ((3, states, Y, X), (slices, 14, 15), (slices - 1, Y, X))
    waves, plates, steps = (jnp.asarray(random_complex(3 + i, s)) for i, s in enumerate(shapes))
    return waves, plates, steps, sway


def in_words(waves, plates, steps, sway):
    """The same, frame by frame and slice by slice."""
    found = []
    for j in range(FRAMES):
        wave = waves[ROW[j]]
        for s in range(len(plates)):
            wave = wave * jax.lax.dynamic_slice(plates[s], CORNER[j], (Y, X))[None]
            if s < len(plates) - 1:
                step = steps[s]
                if sway is not None:
                    step = step * sway.along_y[j, s][:, None] * sway.along_x[j, s][None]
                wave = ifft(fft(wave) * step[None])
        found.append(wave)
    return jnp.stack(found)


def require_same(found, truth, tolerance=1e-11):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(truth), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * float(1 + np.abs(b).max(initial=0)))


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize(
    ("slices", "states", "swaying"), [(3, 2, True), (3, 2, False), (1, 1, False), (2, 1, True)]
)
def test_waves_and_their_cotangents(x64, slices, states, swaying, keep):
    given = operands(slices, states, swaying)
    coming = jnp.asarray(random_complex(9, (FRAMES, states, Y, X)))
    truth, pull = jax.vjp(in_words, *given)
    ours = lambda w, p, h, s: crossing.through_slices(w, p, h, s, *PLACES, keep)
    found, back = jax.vjp(ours, *given)
    require_same(found, truth)
    require_same(back(coming), pull(coming))


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("keep", [True, False])
def test_both_orders_of_the_loops(x64, alone, keep):
    # Which of them runs depends on the platform; both must run anywhere.
    w, p, h, s = given = operands(3, 2, True)
    coming = jnp.asarray(random_complex(9, (FRAMES, 2, Y, X)))
    truth, pull = jax.vjp(in_words, *given)
    leave, before = crossing._forward_groups(keep, alone, w, p, h, s, ROW, CORNER)
    require_same(leave, truth)
    wanted = crossing._Wanted(True, True, True)
    back = crossing._reverse_groups(
        wanted, alone, coming, before, w, p, h, s, jnp.asarray(ROW), jnp.asarray(CORNER)
    )
    require_same(back, pull(coming))


def test_only_what_is_asked_for_is_differentiated(x64):
    given = operands(3, 1, False)
    ours = lambda w, p, h, s: crossing.through_slices(w, p, h, s, *PLACES)
    coming = jnp.asarray(random_complex(9, (FRAMES, 1, Y, X)))
    whole = jax.vjp(ours, *given)[1](coming)
    for at in range(3):
        one = lambda value, at=at: ours(*(*given[:at], value, *given[at + 1 :]))
        require_same(jax.vjp(one, given[at])[1](coming), (whole[at],))


def see(given, wave, own):
    """Any number of a frame that depends on all it is given."""
    power = jnp.sum(jnp.abs(fft(wave)) ** 2, axis=0) * own[1] + given**2
    return jnp.sum(power - own[0] * jnp.log(power))


@pytest.mark.parametrize(("slices", "states", "swaying"), [(3, 2, True), (1, 1, False)])
def test_there_and_back_in_one_loop(x64, slices, states, swaying):
    rng = np.random.default_rng(5)
    counts, shares = rng.poisson(4, (FRAMES, Y, X)), jnp.asarray(rng.uniform(0.5, 1, FRAMES))
    given, floor = operands(slices, states, swaying), jnp.asarray(0.3)

    def ours(floor, shares, waves, plates, steps, sway):
        own = (jnp.asarray(counts, float), shares)
        return crossing.mean_seen(see, floor, waves, plates, steps, sway, *PLACES, own)

    def truth(floor, shares, *given):
        waves = in_words(*given)
        return jnp.mean(jnp.stack([
            see(floor, waves[j], (jnp.asarray(counts[j], float), shares[j])) for j in range(FRAMES)
        ]))  # fmt: skip

    everything = (floor, shares, *given)
    which = tuple(range(len(everything) - (0 if swaying else 1)))
    value, slopes = jax.value_and_grad(ours, which)(*everything)
    expected, right = jax.value_and_grad(truth, which)(*everything)
    np.testing.assert_allclose(ours(*everything), expected, rtol=1e-12)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    require_same(slopes, right)
    # A function of the mean: the loop's slopes are scaled by what follows it.
    twice = jax.grad(lambda p: ours(floor, shares, given[0], p, *given[2:]) ** 2)(given[1])
    require_same(twice, 2 * float(expected) * right[3])


def test_what_a_frame_is_seen_with_may_close_over_what_moves(x64):
    waves, plates, steps, _ = operands(2, 1, False)
    own = jnp.ones((FRAMES, Y, X))

    def mean(level):
        look = lambda _, wave, own: jnp.sum(own * jnp.abs(wave[0]) ** 2) * level
        return crossing.mean_seen(look, None, waves, plates, steps, None, *PLACES, own)

    np.testing.assert_allclose(jax.grad(mean)(2.0), mean(1.0), rtol=1e-12)


def test_single_precision_stays_single():
    given = jax.tree.map(lambda a: jnp.asarray(a, jnp.complex64), operands(3, 2, True))
    ours = lambda w, p, h, s: crossing.through_slices(w, p, h, s, *PLACES)
    found, back = jax.vjp(ours, *given)
    kinds = {leaf.dtype for leaf in jax.tree.leaves((found, back(jnp.ones_like(found))))}
    assert kinds == {jnp.dtype(jnp.complex64)}


def test_moved_waves(x64):
    spectra, scan = jnp.asarray(random_complex(0, (2, 3, Y, X))), jnp.asarray([0, 1, 1, 0])
    ramps = (jnp.asarray(random_complex(1, (4, Y))), jnp.asarray(random_complex(2, (4, X))))
    words = lambda s, y, x: ifft(s[scan] * y[:, None, :, None] * x[:, None, None, :])
    ours = lambda s, y, x: crossing.moved(s, y, x, scan)
    truth, pull = jax.vjp(words, spectra, *ramps)
    found, back = jax.vjp(ours, spectra, *ramps)
    coming = jnp.asarray(random_complex(3, truth.shape))
    require_same(found, truth)
    require_same(back(coming), pull(coming))

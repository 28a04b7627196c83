"""Sums of modes times windows: the rules for the reverse passes against the derived ones."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smpr3d_jax.physics.windows import (
    exit_sum,
    frame_by_frame,
    frames_together,
    Layout,
    slopes,
    slopes_in_turn,
)

from .helpers import random_complex


CORNER = jnp.asarray([[5, 6], [12, 9], [7, 8]], jnp.int32)
LADDER = Layout((6, 8), 1, 3, 2, (0.3, 0.2))
"""Two scans on three rungs a pixel, with a margin of one pixel."""


def tables(layout, modes, halo):
    """A field, the beamlets of 18 rows, and what goes on around them in a window twice as large."""
    m = 2 * layout.margin
    waves = random_complex(10, (modes, 24, 26))
    values = random_complex(11, (18, modes, 6 + m, 8 + m))
    return waves, values, random_complex(12, (18, 1, 12 + m, 16 + m)) if halo else None


@pytest.mark.parametrize("halo", [False, True])
@pytest.mark.parametrize("modes", [1, 6])
@pytest.mark.parametrize("layout", [Layout((6, 8)), LADDER], ids=["table", "ladder"])
def test_handwritten_rules_equal_the_derived_ones(x64, layout, modes, halo):
    waves, values, around = tables(layout, modes, halo)
    entry = jnp.asarray([1, 1, 10], jnp.int32)
    image: Any
    image, pull = jax.vjp(
        lambda a, b, c: exit_sum(layout, a, b, c, CORNER, entry, None), waves, values, around
    )
    together = lambda a, b, c: frames_together(layout, a, b, c, CORNER, entry)
    expected, derived = jax.vjp(together, waves, values, around)
    m, (y, x) = layout.margin, layout.shape
    alone = [
        waves[:, a : a + y, b : b + x] * values[e, :, m : m + y, m : m + x]
        for (a, b), e in zip(CORNER, entry, strict=True)
    ]
    inner = image[:, 3:9, 4:12] if halo else image
    np.testing.assert_allclose(inner, jnp.sum(jnp.stack(alone), axis=1), atol=1e-12)
    np.testing.assert_allclose(image, expected, atol=1e-12)
    seed = random_complex(13, image.shape)
    found, wanted = pull(seed), derived(seed)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)


@pytest.mark.parametrize("halo", [False, True])
@pytest.mark.parametrize("rung", [(1, 1), (0, 2), (2, 0)], ids=["inside", "first", "last"])
def test_slopes_are_differences_of_the_rungs_beside(x64, rung, halo):
    """Beyond the ends of a pixel too: there the rungs are those of a neighbour, a pixel further."""
    operands = tables(LADDER, 6, halo)
    series = jnp.asarray([0, 1, 1], jnp.int32)

    def beside(axis, by):
        """The waves with all probes a rung further, by hand from a table without a margin."""
        place = np.asarray(rung)
        place[axis] += by
        pixels, place = place // 3, place % 3
        entry = int(place[0] * 3 + place[1]) * 2 + series
        a, b = (None if t is None else jnp.roll(t, pixels, (-2, -1)) for t in operands[1:])
        return frame_by_frame(LADDER, operands[0], a, b, CORNER, entry)

    entry = (rung[0] * 3 + rung[1]) * 2 + series
    function = partial(exit_sum, LADDER, *operands, CORNER, entry)
    image: Any
    image, pull = jax.vjp(function, jnp.zeros((3, 2)))
    np.testing.assert_allclose(image, frame_by_frame(LADDER, *operands, CORNER, entry), atol=1e-12)
    seed = random_complex(14, image.shape)
    (to_rest,) = pull(seed)
    for axis in (0, 1):
        rise = (beside(axis, 1) - beside(axis, -1)) / (2 * LADDER.spacing[axis])
        wanted = jnp.sum((seed * rise).real, axis=(1, 2))
        np.testing.assert_allclose(to_rest[:, axis], wanted, rtol=1e-12)


@pytest.mark.parametrize("halo", [False, True])
@pytest.mark.parametrize("entry", [(4, 4, 4), (4, 17, 4), (0, 0, 9)])
def test_slopes_in_turn_are_those_of_each_frame_alone(x64, halo, entry):
    """Frames on one rung after each other, and not."""
    operands = tables(LADDER, 6, halo)
    seed = random_complex(15, (3, 12, 16) if halo else (3, 6, 8))
    entry = jnp.asarray(entry, jnp.int32)
    found = slopes_in_turn(LADDER, seed, *operands, CORNER, entry)
    wanted = slopes(LADDER, seed, *operands, CORNER, entry)
    np.testing.assert_allclose(found, wanted, rtol=1e-12)

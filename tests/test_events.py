"""Events of a whole scan as compressed rows: the same electrons as every other way to keep them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smpr3d_jax.data.counts import events_from_frames, Frames, InputError
from smpr3d_jax.data.events import (
    event_rows,
    EventRows,
    merge,
    on_device,
    on_host,
    to_events,
    to_frames,
)


FRAMES, SHAPE = 7, (6, 9)


def some_values(seed=0, frames=FRAMES, shape=SHAPE, mean=0.4):
    values = np.random.default_rng(seed).poisson(mean, (frames, *shape)).astype(np.uint8)
    values[0, 0, 0], values[1], values[-1], values[2, -1, -1] = 3, 0, 0, 5
    return values


def shuffled(values, seed=1):
    """An entry for each electron, in no order: what a camera writes."""
    rng, flat = np.random.default_rng(seed), values.reshape(len(values), -1)
    entries = [rng.permutation(np.repeat(np.arange(flat.shape[1]), frame)) for frame in flat]
    indptr = np.append(0, np.cumsum([len(e) for e in entries]))
    return EventRows(indptr, np.concatenate(entries).astype(np.uint32), values.shape[1:])


def test_rows_are_the_same_electrons():
    values = some_values()
    for rows in (shuffled(values), event_rows(Frames(values)), merge(shuffled(values))):
        assert (len(rows), rows.frame_shape) == (FRAMES, SHAPE)
        np.testing.assert_array_equal(rows.dense(), values)
        np.testing.assert_array_equal(rows.dense(np.uint8), values)
        np.testing.assert_array_equal(rows.total(), values.sum((1, 2)))
        np.testing.assert_array_equal(to_events(rows).dense(), values)
        np.testing.assert_array_equal(to_frames(rows).values, values)
        np.testing.assert_array_equal(jax.jit(lambda r: r.dense())(on_device(rows)), values)
        np.testing.assert_array_equal(on_host(on_device(rows)).pixels, rows.pixels)
    padded = events_from_frames(Frames(jnp.asarray(values)))
    np.testing.assert_array_equal(event_rows(padded).dense(), values)


def test_merged_rows_name_a_pixel_once_and_in_order():
    rows = merge(shuffled(some_values()))
    assert rows.multiplicity is not None and rows.multiplicity.dtype == np.uint8
    assert len(rows.pixels) == np.count_nonzero(some_values())
    for i in range(FRAMES):
        pixels = rows.pixels[rows.indptr[i] : rows.indptr[i + 1]]
        assert np.all(np.diff(pixels.astype(int)) > 0)


@pytest.mark.parametrize(
    "index", [slice(None), slice(1, 6, 2), slice(4, 1, -1), np.array([3, 0, 3, 6]), slice(5, 5)]
)
def test_indexing(index):
    values = some_values()
    for rows in (shuffled(values), merge(shuffled(values))):
        np.testing.assert_array_equal(rows[index].dense(), values[index])
        np.testing.assert_array_equal(on_device(rows)[index].dense(), values[index])
    with pytest.raises((ValueError, TypeError)):
        shuffled(values)[np.array(3)]


def test_neighbouring_rows_are_not_copied():
    rows = shuffled(some_values())
    assert np.shares_memory(rows[2:5].pixels, rows.pixels)


def test_types_grow_with_the_counts():
    indptr, pixels = np.array([0, 2, 3]), np.array([4, 4, 0])
    rows = EventRows(indptr, pixels, (2, 3), np.array([200, 100, 7], np.uint8))
    assert to_frames(rows).values.dtype == np.uint16
    expected = np.zeros((2, 2, 3))
    expected[0, 1, 1], expected[1, 0, 0] = 300, 7
    np.testing.assert_array_equal(to_frames(rows).values, expected)
    np.testing.assert_array_equal(to_events(rows).dense(), expected)
    np.testing.assert_array_equal(rows.total(), [300, 7])
    assert to_frames(rows[1:]).values.dtype == np.uint8
    with pytest.raises(InputError, match="a count of 300 does not fit into uint8"):
        to_frames(rows, np.uint8)


def test_no_electrons_and_no_frames():
    nothing = EventRows(np.zeros(4, int), np.zeros(0, int), SHAPE)
    np.testing.assert_array_equal(nothing.dense(), np.zeros((3, *SHAPE)))
    np.testing.assert_array_equal(to_events(nothing).dense(), np.zeros((3, *SHAPE)))
    assert to_frames(nothing[:0]).values.shape == (0, *SHAPE)
    assert len(merge(nothing).pixels) == 0


@pytest.mark.parametrize(
    "indptr, pixels, number, message",
    [
        ([0, 2, 3], [3, 1, 54], None, r"event index 54 in frame 1 .* 6 × 9 pixels \(0 to 53\)"),
        ([0, 0, 3], [3, -1, 5], None, "event index -1 in frame 1"),
        ([0, 2, 4], [3, 1, 5], None, "0 to 4.*end with the number of entries, 3"),
        ([1, 2, 3], [3, 1, 5], None, "must begin with 0"),
        ([0, 4, 3], [3, 1, 5], None, "never decrease"),
        ([], [], None, "0 limits"),
        ([0, 3], [3, 1, 5], [1, 1], "3 pixels but 2 multiplicities"),
    ],
)
def test_rows_that_cannot_be(indptr, pixels, number, message):
    given = None if number is None else np.array(number)
    with pytest.raises((InputError, TypeError), match=message if number is None else None):
        EventRows(np.array(indptr, int), np.array(pixels, int), SHAPE, given)


def test_only_whole_counts_become_events():
    with pytest.raises(InputError, match="whole, non-negative"):
        event_rows(Frames(np.full((1, 2, 3), 0.5)))
    np.testing.assert_array_equal(event_rows(Frames(np.full((1, 2, 3), 2.0))).total(), [12])

"""What is done to events equals, electron for electron, what numpy does to frames."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from smpr3d_jax.data import electrons
from smpr3d_jax.data.counts import events_from_frames, Frames, InputError
from smpr3d_jax.data.events import EventRows, merge, on_device

from .test_events import shuffled, some_values


SCAN = (4, 6)
VALUES = some_values(frames=24, mean=0.5)


KINDS = {
    "frames in numpy": Frames,
    "frames in JAX": lambda v: Frames(jnp.asarray(v)),
    "padded events": lambda v: events_from_frames(Frames(v)),
    "rows": shuffled,
    "merged rows": lambda v: merge(shuffled(v)),
    "rows in JAX": lambda v: on_device(shuffled(v)),
    "merged rows in JAX": lambda v: on_device(merge(shuffled(v))),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def check(found, counts, expected):
    """The same kind as before, with the expected electrons."""
    assert type(found) is type(counts)
    assert found.frame_shape == expected.shape[1:]
    np.testing.assert_array_equal(found.dense(), expected)


@each_kind
@pytest.mark.parametrize("shape, center", [((3, 4), (2, 5)), (None, None), ((4, 7), None)])
def test_crop(kind, shape, center):
    counts = KINDS[kind](VALUES)
    y, x = {None: (0, 0), (3, 4): (1, 3), (4, 7): (1, 1)}[shape]
    height, width = shape or VALUES.shape[1:]
    expected = VALUES[:, y : y + height, x : x + width]
    check(electrons.crop(counts, shape, center), counts, expected)


@each_kind
@pytest.mark.parametrize("turns", [0, 1, 2, 3, -1])
@pytest.mark.parametrize("transpose", [False, True])
def test_orientations(kind, turns, transpose):
    counts = KINDS[kind](VALUES)
    swapped = VALUES.swapaxes(1, 2) if transpose else VALUES
    # numpy turns from the first axis, y, towards the second.
    expected = np.rot90(swapped, -turns, axes=(1, 2))
    check(electrons.orient(counts, turns, transpose), counts, expected)


def test_a_quarter_turn_takes_x_to_y():
    values = np.zeros((1, 5, 5), np.uint8)
    values[0, 2, 3] = 1
    assert electrons.orient(Frames(values), 1).values[0, 3, 2] == 1


@each_kind
def test_flips(kind):
    counts = KINDS[kind](VALUES)
    check(electrons.flip(counts, y=True), counts, VALUES[:, ::-1])
    check(electrons.flip(counts, x=True), counts, VALUES[:, :, ::-1])


@each_kind
def test_mask(kind):
    counts = KINDS[kind](VALUES)
    mask = np.random.default_rng(3).random(VALUES.shape[1:]) < 0.6
    check(electrons.masked(counts, mask), counts, VALUES * mask)
    with pytest.raises((InputError, TypeError), match="mask of shape"):
        electrons.masked(counts, mask[:-1])


def test_a_mask_hides_what_is_no_number():
    values = np.array([[[1.0, np.nan]]])
    found = electrons.masked(Frames(values), np.array([[True, False]]))
    np.testing.assert_array_equal(found.values, [[[1, 0]]])


@each_kind
def test_bin_detector(kind):
    counts = KINDS[kind](VALUES)
    expected = VALUES.reshape(24, 2, 3, 3, 3).sum((2, 4))
    check(electrons.bin_detector(counts, 3), counts, expected)
    assert electrons.bin_detector(counts, 1) is counts
    with pytest.raises(InputError, match="6 × 9 pixels cannot be divided by 2.* 6 × 8 first"):
        electrons.bin_detector(counts, 2)


@pytest.mark.parametrize("shape", [(8, 8), (4, 6), (6, 6), (2, 10)])
def test_binning_keeps_the_centre_at_its_index(shape):
    values = np.zeros((1, *shape), np.uint8)
    values[0, shape[0] // 2, shape[1] // 2] = 1
    binned = electrons.bin_detector(Frames(values), 2).values
    assert binned[0, shape[0] // 4, shape[1] // 4] == 1


@pytest.mark.parametrize("dtype, wide", [("u1", "u2"), ("u2", "u4"), ("i2", "i4"), ("f4", "f4")])
@pytest.mark.parametrize("jax_array", [False, True])
def test_sums_do_not_overflow(dtype, wide, jax_array):
    largest = 1000 if dtype == "f4" else np.iinfo(dtype).max
    values = np.full((4, 2, 4), largest, dtype)
    frames = Frames(jnp.asarray(values) if jax_array else values)
    for found in (electrons.bin_detector(frames, 2), electrons.bin_scan(frames, (2, 2), 2)):
        assert found.values.dtype == wide
        np.testing.assert_array_equal(found.values, 4 * int(largest))
    np.testing.assert_array_equal(electrons.sum_frames(frames), 4 * int(largest))


def test_sums_that_the_device_cannot_hold_are_refused():
    frames = Frames(jnp.full((1, 2, 2), 2**32 - 1, jnp.uint32))
    with pytest.raises(InputError, match="4 counts of up to 4294967295 do not fit into uint32"):
        electrons.bin_detector(frames, 2)
    host = Frames(np.asarray(frames.values))
    assert electrons.bin_detector(host, 2).values.item() == 4 * (2**32 - 1)


@each_kind
def test_shift(kind):
    counts = KINDS[kind](VALUES)
    shifts = np.random.default_rng(4).integers(-4, 5, (24, 2))
    shifts[5] = 100, -100
    expected = np.zeros_like(VALUES)
    padded = np.pad(VALUES, ((0, 0), (6, 6), (9, 9)))
    for i, (dy, dx) in enumerate(shifts.clip(-6, 6)):
        expected[i] = padded[i, 6 - dy : 12 - dy, 9 - dx : 18 - dx]
    expected[5] = 0
    moved, lost = electrons.shift(counts, shifts)
    check(moved, counts, expected)
    np.testing.assert_array_equal(lost, VALUES.sum((1, 2)) - expected.sum((1, 2)))
    with pytest.raises((InputError, TypeError), match="23 shifts were given for 24 frames"):
        electrons.shift(counts, shifts[:-1])


@each_kind
def test_center(kind):
    """A spot that wanders comes to rest at index n//2."""
    values = np.zeros((24, 6, 9), np.uint8)
    at = np.random.default_rng(5).integers(0, (6, 9), (24, 2))
    values[np.arange(24), at[:, 0], at[:, 1]] = 2
    counts = KINDS[kind](values)
    found, lost = electrons.center(counts, at + 0.3)
    expected = np.zeros_like(values)
    expected[:, 3, 4] = 2
    check(found, counts, expected)
    assert not np.any(lost)


@each_kind
def test_scan(kind):
    counts = KINDS[kind](VALUES)
    scan = VALUES.reshape(*SCAN, 6, 9)
    expected = scan[1:3, 2:6:3].reshape(-1, 6, 9)
    check(electrons.crop_scan(counts, SCAN, np.s_[1:3], np.s_[2:6:3]), counts, expected)
    expected = scan.reshape(2, 2, 3, 2, 6, 9).sum((1, 3)).reshape(-1, 6, 9)
    check(electrons.bin_scan(counts, SCAN, 2), counts, expected)
    with pytest.raises(InputError, match="4 × 6 positions cannot be divided by 4"):
        electrons.bin_scan(counts, SCAN, 4)
    with pytest.raises(InputError, match="5 × 5 positions does not belong to 24 frames"):
        electrons.bin_scan(counts, (5, 5), 5)


@each_kind
def test_sums(kind):
    """Compiled and not, over frames, over detectors and over the pixels' places."""
    counts, mask = KINDS[kind](VALUES), np.random.default_rng(6).random((6, 9)) < 0.7
    run: list[Any] = [lambda f: f]
    if not isinstance(getattr(counts, "pixels", getattr(counts, "values", None)), np.ndarray):
        run.append(eqx.filter_jit)
    weights = np.random.default_rng(7).normal(size=(3, 6, 9))
    y, x = np.indices((6, 9))
    for compiled in run:
        total = compiled(electrons.sum_frames)(counts)
        assert np.issubdtype(total.dtype, np.integer)
        np.testing.assert_array_equal(total, VALUES.sum(0))
        images = compiled(electrons.virtual_images)(counts, weights)
        expected = np.einsum("fyx,iyx->if", VALUES, weights)
        np.testing.assert_allclose(images, expected, rtol=1e-5, atol=1e-5)
        one = compiled(electrons.virtual_images)(counts, mask)
        np.testing.assert_array_equal(one, (VALUES * mask).sum((1, 2)))
        for seen in (None, mask):
            masked = VALUES * (True if seen is None else seen)
            n = masked.sum((1, 2))
            some = n > 0
            center = np.asarray(compiled(electrons.center_of_mass)(counts, seen))
            expected = np.stack([(masked * i).sum((1, 2)) for i in (y, x)], axis=1)[some]
            np.testing.assert_allclose(center[some], expected / n[some, None], rtol=1e-5)
            assert np.isnan(center[~some]).all() and not some.all()
    with pytest.raises((InputError, TypeError), match="weights of shape"):
        electrons.virtual_images(counts, weights[:, :5])


def test_sums_in_double_precision(x64):
    weights = np.random.default_rng(7).normal(size=(3, 6, 9))
    expected = np.einsum("fyx,iyx->if", VALUES, weights)
    for make in KINDS.values():
        images = electrons.virtual_images(make(VALUES), weights)
        assert images.dtype == np.float64
        np.testing.assert_allclose(images, expected, rtol=1e-12, atol=1e-12)


def test_frames_can_be_compiled():
    values = jnp.asarray(VALUES)
    shifts = jnp.asarray(np.random.default_rng(4).integers(-4, 5, (24, 2)))

    @jax.jit
    def chain(values, shifts):
        moved, lost = electrons.shift(Frames(values), shifts)
        return electrons.bin_detector(electrons.orient(moved, 1), 3).values, lost

    found, lost = chain(values, shifts)
    moved, expected = electrons.shift(shuffled(VALUES), np.asarray(shifts))
    assert isinstance(moved, EventRows)
    rows = electrons.bin_detector(electrons.orient(moved, 1), 3)
    np.testing.assert_array_equal(found, rows.dense())
    np.testing.assert_array_equal(lost, expected)

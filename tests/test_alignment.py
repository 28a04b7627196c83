"""Frames moved, padded and binned as whole electrons; distortion measured and removed."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from smpr3d_jax.data.alignment import (
    binned_mask,
    descan_of,
    padded,
    seen_by_all,
    without_descan,
)
from smpr3d_jax.data.counts import events_from_frames, Frames, InputError
from smpr3d_jax.data.distortion import (
    ellipse_of_disc,
    ellipse_of_ring,
    moved_electrons,
    moved_mask,
)
from smpr3d_jax.data.electrons import bin_detector, masked
from smpr3d_jax.data.events import event_rows


KINDS = {
    "frames": Frames,
    "rows": lambda values: event_rows(Frames(values)),
    "events": lambda values: events_from_frames(Frames(jnp.asarray(values))),
}
kinds = pytest.mark.parametrize("kind", KINDS)


def cube(frames=6, shape=(9, 12), seed=0, mean=1.5):
    return np.random.default_rng(seed).poisson(mean, (frames, *shape)).astype(np.uint8)


# --- descan ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "order, scan", [(0, (7, 9)), (1, (7, 9)), (2, (7, 9)), (3, (8, 9)), (1, (1, 40))]
)
def test_descan_is_the_smooth_part(order, scan):
    rng = np.random.default_rng(order)
    y, x = (np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in scan)
    terms = [(i, j) for i in range(4) for j in range(4) if i + j <= order]
    parts = [rng.normal(0, 2, 2) * (y[:, None] ** i * x[None] ** j)[..., None] for i, j in terms]
    truth = np.sum(parts, axis=0).reshape(-1, 2) + [31.4, 40.2]
    exact = descan_of(truth, scan, order)
    np.testing.assert_allclose(exact.centers, truth, atol=1e-9)
    noisy = truth + rng.normal(0, 0.1, truth.shape)
    noisy[3] = np.nan
    noisy[[10, 17, 22]] += 30
    found = descan_of(noisy, scan, order)
    assert np.sqrt(np.mean((found.centers - truth) ** 2)) < 0.12
    assert found.residual == pytest.approx((0.1, 0.1), rel=0.6)
    rest = truth + exact.shifts - exact.mean
    assert np.all(np.abs(rest) <= 0.5 + 1e-9)


def test_descan_needs_frames():
    with pytest.raises(InputError, match="8 centres for a scan of 3 × 3"):
        descan_of(np.zeros((8, 2)), (3, 3))
    with pytest.raises(InputError, match="use a lower order"):
        descan_of(np.zeros((9, 2)), (3, 3), 3)


@kinds
def test_frames_without_descan(kind):
    """A disc that wanders is brought to one place, and the mask tells what all frames saw."""
    base, scan = cube(1, (12, 15))[0], (4, 5)
    shifts = np.stack(np.meshgrid([-2, -1, 0, 1], [0, 1, 2, 3, 3], indexing="ij"), -1).reshape(
        -1, 2
    )
    wide = np.pad(base, 4)
    frames = np.stack([wide[4 + a : 16 + a, 4 + b : 19 + b] for a, b in shifts])
    moved, mask, lost = without_descan(KINDS[kind](frames), shifts)
    assert type(moved) is type(KINDS[kind](frames))
    dense = np.asarray(moved.dense(int))
    np.testing.assert_array_equal(mask, seen_by_all((12, 15), shifts))
    assert mask.sum() == (12 - 3) * (15 - 3)
    for frame in dense:
        np.testing.assert_array_equal(frame[mask], base[mask])
    np.testing.assert_array_equal(dense.sum((1, 2)) + lost, frames.sum((1, 2), dtype=int))
    assert descan_of(-1.0 * shifts, scan).centers.shape == (20, 2)


# --- padding and binning --------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("shape", [(9, 12), (10, 12), (16, 17)])
def test_padded(kind, shape):
    values = cube()
    wide, mask = padded(KINDS[kind](values), shape)
    assert type(wide) is type(KINDS[kind](values))
    dense = np.asarray(wide.dense(int))
    assert mask.shape == shape == dense.shape[1:] and mask.sum() == 9 * 12
    np.testing.assert_array_equal(dense[:, mask].reshape(values.shape), values)
    assert dense.sum() == values.sum(dtype=int)
    np.testing.assert_array_equal(dense[:, shape[0] // 2, shape[1] // 2], values[:, 4, 6])
    with pytest.raises(InputError, match="smaller than the frames"):
        padded(KINDS[kind](values), (9, 11))


def test_binned_mask_lets_through_only_whole_sums():
    mask = np.random.default_rng(0).random((6, 9)) > 0.2
    found = binned_mask(mask, 3)
    values = cube(4, (6, 9), mean=5)
    whole = bin_detector(Frames(values), 3).dense(int)
    usable = bin_detector(masked(Frames(values), mask), 3).dense(int)
    np.testing.assert_array_equal(np.asarray(whole)[:, found], np.asarray(usable)[:, found])
    assert found.sum() == sum(mask[i : i + 3, j : j + 3].all() for i in (0, 3) for j in (0, 3, 6))
    with pytest.raises(InputError, match="cannot be divided by 4"):
        binned_mask(mask, 4)


# --- ellipses -------------------------------------------------------------------------------------


def stretched(ratio, angle, center, shape=(84, 96)):
    """Distance from `center` in the coordinates in which the ellipse is a circle."""
    along = np.array([math.sin(angle), math.cos(angle)])
    outer = np.outer(along, along)
    matrix = outer / math.sqrt(ratio) + (np.eye(2) - outer) * math.sqrt(ratio)
    y, x = np.indices(shape)
    place = np.stack([y - center[0], x - center[1]], -1) @ matrix.T
    return np.hypot(place[..., 0], place[..., 1]), matrix


@pytest.mark.parametrize("what", ["disc", "ring"])
@pytest.mark.parametrize("ratio, angle", [(1.0, 0.0), (1.03, 0.4), (1.2, 2.5), (1.08, 1.57)])
def test_ellipse(what, ratio, angle):
    center = (41.3, 47.8)
    r, matrix = stretched(ratio, angle, center)
    radius = 22.4 if what == "disc" else 29.7
    shape = (
        50 * (radius + 0.5 - r).clip(0, 1)
        if what == "disc"
        else 30 * np.exp(-((r - radius) ** 2) / 8)
    )
    counts = np.random.default_rng(2).poisson(100 * (shape + 2)).astype(float)
    counts[30:34, 60:63] = 1e6
    mask = np.ones(counts.shape, bool)
    mask[30:34, 60:63] = mask[44] = False
    if what == "disc":
        found = ellipse_of_disc(counts, (40.0, 49.0), 20.5, mask)
    else:
        found = ellipse_of_ring(counts, (41.0, 48.0), 30.0, 6.0, mask)
    assert found.center == pytest.approx(center, abs=0.03)
    assert found.radius == pytest.approx(radius, abs=0.03)
    assert abs(found.ratio - ratio) < max(5 * found.errors[3], 2e-3)
    np.testing.assert_allclose(found.circular, matrix, atol=1.5e-3)
    assert np.linalg.det(found.circular) == pytest.approx(1)
    if ratio > 1:
        assert abs((found.angle - angle + math.pi / 2) % math.pi - math.pi / 2) < max(
            5 * found.errors[4], 0.01
        )


def test_an_ellipse_needs_an_edge():
    with pytest.raises(InputError, match="edge was found in 0 of 180 directions"):
        ellipse_of_disc(np.ones((40, 50)), (20.0, 25.0), 10.0)


@kinds
def test_moved_electrons_are_all_there(kind):
    values = cube(5, (24, 28), mean=0.5)
    turn = np.array([[0.9, 0.15], [0.15, 1.1]])
    counts = KINDS[kind](values)
    found, lost = moved_electrons(counts, turn, (11.5, 13.2), (20, 36), seed=4)
    assert type(found) is type(counts) and found.frame_shape == (20, 36)
    dense = np.asarray(found.dense(int))
    np.testing.assert_array_equal(dense.sum((1, 2)) + lost, values.sum((1, 2), dtype=int))
    again, _ = moved_electrons(KINDS["rows"](values[3:]), turn, (11.5, 13.2), (20, 36), 4, 3)
    np.testing.assert_array_equal(again.dense(int), dense[3:])
    other, _ = moved_electrons(counts, turn, (11.5, 13.2), (20, 36), seed=5)
    assert np.any(np.asarray(other.dense(int)) != dense)


def test_nothing_moves_without_a_reason():
    values = cube(5, (24, 28))
    found, lost = moved_electrons(Frames(values), np.eye(2), (12.0, 14.0))
    np.testing.assert_array_equal(found.dense(int), values)
    assert not lost.any()
    assert moved_mask(np.ones((24, 28), bool), np.eye(2), (12.0, 14.0)).all()


def test_moved_counts_are_poisson_and_round():
    """Mean and variance of every pixel agree, neighbours are independent, the disc is a circle."""
    center, ratio, angle = (15.3, 17.6), 1.15, 0.7
    r, matrix = stretched(ratio, angle, center, (32, 36))
    mean = 3.0 * (9.5 - r).clip(0, 1)
    values = (
        np.random.default_rng(0).poisson(np.broadcast_to(mean, (3000, 32, 36))).astype(np.uint8)
    )
    found, _ = moved_electrons(Frames(values), matrix, center, seed=1)
    dense = np.asarray(found.dense(float))
    average, variance = dense.mean(0), dense.var(0, ddof=1)
    bright = average > 0.5
    assert np.mean(variance[bright] / average[bright]) == pytest.approx(1, abs=0.006)
    pairs = np.stack([dense[:, 16, 12:24], dense[:, 16, 13:25], dense[:, 17, 12:24]])
    pairs = pairs - pairs.mean(1, keepdims=True)
    for other in pairs[1:]:
        assert abs(np.mean(pairs[0] * other)) < 4 * 3.0 / math.sqrt(3000 * 12)
    left = ellipse_of_disc(average, (16.0, 18.0), 9.0)
    assert left.ratio == pytest.approx(1, abs=0.02)
    assert left.center == pytest.approx((16, 18), abs=0.05)
    assert ellipse_of_disc(values.mean(0), center, 9.0).ratio == pytest.approx(ratio, abs=0.02)


def test_moved_mask_covers_what_was_never_seen():
    _, matrix = stretched(1.2, 0.5, (11.0, 14.0))
    mask = np.ones((24, 28), bool)
    mask[5, 9] = False
    found = moved_mask(mask, matrix, (11.0, 14.0), (30, 34))
    values = np.full((40, 24, 28), 20, np.uint8)
    clean, _ = moved_electrons(masked(Frames(values), mask), matrix, (11.0, 14.0), (30, 34))
    mean = np.asarray(clean.dense(float)).mean(0)
    np.testing.assert_allclose(mean[found], 20, atol=4)
    assert 0.8 * 24 * 28 < found.sum() < 24 * 28
    assert mean[~found].min() < 5

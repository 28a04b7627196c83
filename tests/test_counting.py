"""Simulated raw frames with known electrons: thresholds, events, and what was lost."""

import math

import numpy as np
import pytest

from smpr3d_jax.data.counting import (
    background_of,
    corrected,
    count_electrons,
    overlap,
    Thresholds,
    thresholds_of,
)
from smpr3d_jax.data.counts import InputError


def raw(rate, frames=30, shape=(90, 110), sigma=10.0, pedestal=0.0, seed=0):
    """Frames with `rate` electrons a pixel, each of about 180 units, and how many there are."""
    rng = np.random.default_rng(seed)
    number = rng.poisson(rate, (frames, *shape))
    pulses = np.where(number > 0, rng.gamma(6.0 * np.maximum(number, 1), 30.0), 0.0)
    noise = rng.normal(pedestal, sigma, number.shape)
    return number, (pulses + noise).astype(np.float32)


def test_corrected_is_in_floating_point():
    frames = np.array([[[5, 200], [7, 9]]], np.uint16)
    dark, gain = np.array([[9, 100], [7, 0]], np.uint16), np.array([[1.0, 0.5], [2.0, 0.0]])
    np.testing.assert_array_equal(corrected(frames, dark, gain)[0], [[-4, 50], [0, 0]])
    assert corrected(frames).dtype == np.float32
    with pytest.raises(InputError, match=r"dark reference has \(2, 1\) pixels"):
        corrected(frames, dark[:, :1], None)


@pytest.mark.parametrize("pedestal", [0.0, 512.0])
@pytest.mark.parametrize("rate", [0.0, 0.002, 0.03])
def test_background(rate, pedestal):
    number, values = raw(rate, pedestal=pedestal)
    found = background_of(values)
    assert abs(found.mean - pedestal) < 4 * found.mean_error + 0.02 * (rate > 0)
    assert abs(found.sigma - 10) < 4 * found.sigma_error + 0.02 * (rate > 0)
    assert found.mean_error < 0.1 and found.sigma_error < 0.1
    assert found.part == pytest.approx(np.mean(number == 0), abs=0.004)


def test_background_of_whole_numbers_and_of_masked_pixels():
    _, values = raw(0.01)
    values[:, 3, 4] = 1e6
    values[:, :, 7] = np.nan
    mask = np.ones(values.shape[1:], bool)
    mask[3, 4] = mask[:, 7] = False
    for scale, error in ((1.0, 0.1), (0.15, 0.03), (7.3, 0.7)):
        found = background_of(np.rint(scale * values), mask)
        assert (found.mean, found.sigma) == pytest.approx((0, 10 * scale), abs=error)


def test_there_may_be_no_background():
    rng = np.random.default_rng(0)
    with pytest.raises(InputError, match="no Gaussian peak"):
        background_of(rng.uniform(0, 1, (5, 40, 50)).astype(np.float32))
    with pytest.raises(InputError, match="take more frames"):
        thresholds_of(raw(0.0, 10, (40, 50))[1], lower_sigma=8.0)


@pytest.mark.parametrize("rate", [0.002, 0.01, 0.03])
def test_electrons_are_counted_and_those_missed_are_told(rate):
    number, values = raw(rate, seed=1)
    limits = thresholds_of(values)
    assert limits.lower == pytest.approx(40, abs=0.5)
    assert 1500 < limits.upper < 2100
    found = count_electrons(values, limits)
    true = number.mean()
    expected = true * (1 - math.exp(-9 * true)) / (9 * true)
    error = 4 * math.sqrt(true / number.size)
    assert found.rate == pytest.approx(expected, abs=error + 0.006 * true)
    assert found.rate / (1 - found.overlap) == pytest.approx(true, rel=0.02)
    assert found.overlap == pytest.approx(1 - expected / true, rel=0.05)
    assert found.false_rate == pytest.approx(3.2e-5 * np.mean(number == 0), rel=0.1)
    # Of pulses drawn from a Gamma law with noise, 0.5 % stay below the threshold.
    assert found.faint is None or 0.001 < found.faint < 0.02
    assert (found.faint is None) == (rate == 0.002)
    hit = found.events.dense(int) > 0
    assert np.mean(number[hit] > 0) > 0.97


def recipe(values, lower, upper, mask):
    """The strict local maxima of 8 neighbours, written out."""
    values = np.where(mask, values, -np.inf)
    found = []
    for f, y, x in np.argwhere((values > lower) & (values < upper)):
        around = values[f, max(0, y - 1) : y + 2, max(0, x - 1) : x + 2]
        if values[f, y, x] == around.max() and np.count_nonzero(around == around.max()) == 1:
            found.append((f, y * values.shape[2] + x))
    return found


def test_events_are_strict_maxima_between_the_thresholds():
    _, values = raw(0.05, 6, (13, 17), seed=2)
    values[2, 5, 5] = 5000.0
    mask = np.random.default_rng(3).random((13, 17)) > 0.1
    limits = Thresholds(40.0, 300.0, background_of(raw(0.01)[1]))
    rows = count_electrons(values, limits, mask).events
    frame = np.repeat(np.arange(6), np.diff(rows.indptr))
    assert list(zip(frame, rows.pixels, strict=True)) == recipe(values, 40.0, 300.0, mask)


def test_of_equal_neighbours_one_is_taken():
    values = np.zeros((4, 5, 6), np.float32)
    values[0, 2, 2:4] = 100
    values[1, 2:4, 3] = 100
    values[2, 1:3, 4:6] = 100
    values[3, 0, 0] = values[3, 4, 5] = 100
    limits = Thresholds(40.0, 300.0, background_of(raw(0.01)[1]))
    rows = count_electrons(values, limits).events
    np.testing.assert_array_equal(np.diff(rows.indptr), [1, 1, 1, 2])
    np.testing.assert_array_equal(rows.pixels[3:], [0, 29])


def test_overlap():
    assert overlap(0.0) == 0 and overlap(1.0) == 1
    for x in (0.01, 0.3, 2.0):
        assert overlap((1 - math.exp(-x)) / 9) == pytest.approx(1 - (1 - math.exp(-x)) / x)

"""What an electron makes of the counts, judged on cameras whose truth is known."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from smpr3d_jax.data.calibration import find_charge, whole_electrons
from smpr3d_jax.data.counts import events_from_frames, Frames
from smpr3d_jax.data.readers import read, with_mask, write_stempy


SHAPE = (46, 52)


def pattern(dose=4.0):
    """A disc over a dark field; one pixel in five is hit outside."""
    y, x = np.indices(SHAPE)
    inside = (14.5 - np.hypot(y - 23, x - 25.5)).clip(0, 1)
    return dose * (inside + 0.05)


def electrons(scan=(12, 14), dose=4.0, seed=0, unsteady=0.1):
    """Whole electrons of a beam whose strength and pattern change a little over the scan."""
    rng = np.random.default_rng(seed)
    ramp = 1 + unsteady * np.sin(np.arange(np.prod(scan)) / 3.0)
    tilt = 1 + 0.2 * unsteady * np.cos(np.arange(SHAPE[1]) / 4.0)
    mean = ramp.reshape(*scan, 1, 1) * tilt * pattern(dose)
    return rng.poisson(mean)


def source(folder, values):
    np.save(folder / "scan.npy", values)
    return read(folder / "scan.npy")


@pytest.mark.parametrize("dose", [0.05, 4.0, 60.0])
@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_electrons_are_known_as_such(tmp_path, dose, dtype):
    found = find_charge([source(tmp_path, electrons(dose=dose).astype(dtype))])
    assert found.kind == "counted" and found.counts_per_electron == 1 and found.whole
    assert "single electrons" in found.reason


def test_few_pixels_are_taken_together(tmp_path):
    counts = np.random.default_rng(0).poisson(0.7, (7, 9, 8, 11)).astype(np.uint8)
    assert find_charge([source(tmp_path, counts)]).kind == "counted"
    # Two frames say nothing of their noise.
    assert find_charge([source(tmp_path, counts[:1, :2])]).kind == "unclear"


@pytest.mark.parametrize(
    ("gain", "noise", "dtype"),
    [(12.5, 0.8, np.float32), (37.0, 4.0, np.int32), (0.31, 0.01, np.float32),
     (2.0, 0.0, np.uint16), (1.0, 0.1, np.float64)],
)  # fmt: skip
def test_an_integrating_camera(tmp_path, gain, noise, dtype):
    """The values tell the gain far better than the noise, and within their error."""
    values = gain * electrons() + np.random.default_rng(1).normal(0, noise, (12, 14, *SHAPE))
    values = np.rint(values) if np.dtype(dtype).kind in "iu" else values
    found = find_charge([source(tmp_path, values.astype(dtype))])
    assert found.kind == "integrating"
    assert found.counts_per_electron == pytest.approx(gain, abs=max(4 * found.error, 1e-3 * gain))
    assert found.error < 2e-3 * gain
    assert f"multiples of {found.counts_per_electron:.4g}" in found.reason
    mean, variance = found.points.T
    bright = mean > mean.max() / 2
    assert np.mean(variance[bright] / mean[bright]) == pytest.approx(gain, rel=0.1)
    assert whole_electrons([source(tmp_path, values.astype(dtype))], found.counts_per_electron)


def test_read_noise_that_hides_the_electron(tmp_path):
    values = 20 * electrons() + np.random.default_rng(1).normal(0, 9, (12, 14, *SHAPE))
    found = find_charge([source(tmp_path, values)])
    assert found.kind == "unclear" and not found.whole and "no multiples" in found.reason
    assert found.counts_per_electron == pytest.approx(20, abs=4 * found.error + 1)


def test_charge_in_several_pixels(tmp_path):
    """An electron that makes a count in each of 2 × 2 pixels: whole numbers, and no electrons.

    Each pixel by itself has the noise of single electrons.
    """
    one = np.pad(electrons(dose=8.0), ((0, 0), (0, 0), (0, 1), (0, 1)))
    counts = one[..., 1:, 1:] + one[..., :-1, 1:] + one[..., 1:, :-1] + one[..., :-1, :-1]
    found = find_charge([source(tmp_path, counts.astype(np.uint16))])
    assert found.kind == "unclear" and found.whole and "several pixels" in found.reason
    assert "the variance of pixels is 1" in found.reason or "is 0.99" in found.reason
    assert found.counts_per_electron == pytest.approx(4, rel=0.25)


def test_noise_and_values_that_disagree(tmp_path):
    """Electrons that come alone or in pairs are no Poisson's, whatever a count is called."""
    rng = np.random.default_rng(2)
    pairs = electrons(dose=2.0) + 2 * rng.poisson(np.broadcast_to(pattern(1.0), (12, 14, *SHAPE)))
    found = find_charge([source(tmp_path, (1.7 * pairs).astype(np.float32))])
    assert found.kind == "unclear" and "multiples of 1.7, but the variance" in found.reason
    found = find_charge([source(tmp_path, pairs.astype(np.uint16))])
    assert found.kind == "unclear" and found.whole and "whole numbers, but" in found.reason


def test_events_are_electrons(tmp_path):
    frames = Frames(jnp.asarray(electrons((2, 3)).reshape(-1, *SHAPE).astype(np.uint8)))
    write_stempy(tmp_path / "scan.h5", events_from_frames(frames), (2, 3))
    found = find_charge([read(tmp_path / "scan.h5", frame_shape=SHAPE)])
    assert found.kind == "counted" and found.reason == "electron events"


def test_pixels_that_are_no_numbers_are_left_out(tmp_path):
    values = 12.5 * electrons()
    values[..., 3, 4], values[..., 20, 20] = np.nan, 1e6
    broken = source(tmp_path, values)
    assert "mask them" in find_charge([broken]).reason
    mask = np.ones(SHAPE, bool)
    mask[3, 4] = mask[20, 20] = False
    found = find_charge([with_mask(broken, mask)])
    assert found.counts_per_electron == pytest.approx(12.5, rel=1e-3)


def test_a_part_of_a_long_series_is_read(tmp_path):
    one = source(tmp_path, electrons((50, 60)).astype(np.uint8))
    read_so_far = []

    def load(positions):
        read_so_far.extend(positions.tolist())
        return one.load(positions)

    found = find_charge([dataclasses.replace(one, load=load)] * 2)
    assert found.kind == "counted"
    assert len(read_so_far) <= 1024 and max(read_so_far) > 2900 and np.ptp(read_so_far[:16]) == 15

"""Plans of focal series: what they keep, what follows, and that the checks accept them."""

import itertools
import math

import numpy as np
import pytest

from smpr3d_jax.inverse import planning, sampling
from smpr3d_jax.inverse.planning import plan
from smpr3d_jax.physics.optics import wavelength


@pytest.mark.parametrize(
    "energy, semiangle, width, double, lateral",
    [
        (80e3, 30.0, 82.2, 92.8, 0.85),
        (200e3, 20.0, 111.1, 125.4, 0.77),
        (200e3, 25.0, 71.1, 80.3, 0.61),
        (300e3, 20.0, 87.2, 98.4, 0.60),
        (300e3, 25.0, 55.8, 63.0, 0.48),
        (300e3, 30.0, 38.8, 43.7, 0.40),
    ],
)
def test_depths_of_focus_of_the_literature(energy, semiangle, width, double, lateral):
    """The whole table, to 1 %."""
    assert plan(energy=energy, semiangle=semiangle).depth_of_focus == pytest.approx(width, rel=0.01)
    assert 2 * sampling.depth_unit(semiangle, energy) == pytest.approx(double, rel=0.01)
    assert 0.61 * sampling.lateral_unit(semiangle, energy) == pytest.approx(lateral, rel=0.015)


@pytest.mark.parametrize("energy, semiangle", [(60e3, 31.0), (200e3, 12.0), (300e3, 30.0)])
@pytest.mark.parametrize("thickness", [None, 40.0, 300.0])
@pytest.mark.parametrize("representation, scans", [("modes", 4), ("modes", 1), ("beams", 3)])
def test_a_free_plan_needs_no_word(energy, semiangle, thickness, representation, scans):
    found = plan(
        energy=energy, semiangle=semiangle, thickness=thickness, scans=scans,
        representation=representation, dose=2e5, dwell=1e-4,
    )  # fmt: skip
    assert planning.findings(found) == []
    unit = sampling.depth_unit(semiangle, energy)
    low, high = found.depth_range
    assert low < 0 < found.thickness < high
    assert found.plane == pytest.approx(found.thickness / 2)
    assert found.scan_step <= sampling.largest_scan_step(semiangle, energy)
    assert found.reach > 1.25 * semiangle
    if scans > 1:
        span = max(found.defoci) - min(found.defoci)
        assert max(7 * unit, found.thickness) <= span <= max(7 * unit, found.thickness) + unit / 2
        # symmetrical about the middle, to the rounding
        assert sum(found.defoci) / scans == pytest.approx(found.plane, abs=unit / 10)
        steps = np.diff(found.defoci)
        assert np.ptp(steps) <= 0.21 * unit
    needed = sampling.required_window(semiangle, energy, found.defoci, found.plane)
    assert found.window >= needed


@pytest.mark.parametrize("shape", [(192, 256), (576, 576)])
def test_a_large_camera_is_binned_and_changes_nothing_else(shape):
    free = plan(energy=300e3, semiangle=20.0, thickness=100.0)
    large = plan(energy=300e3, semiangle=20.0, thickness=100.0, detector_shape=shape)
    assert large.binning == math.floor(large.window / free.window + 0.01) > 1
    assert large.reach == pytest.approx(free.reach, rel=0.07)
    assert (large.defoci, large.order) == (free.defoci, free.order)
    assert large.smatrix_bytes == pytest.approx(free.smatrix_bytes, rel=0.6)
    assert large.sampling[1] == pytest.approx(large.sampling[0] * shape[0] / shape[1])
    assert planning.findings(large) == []


def test_too_few_pixels_are_found_out():
    few = plan(energy=300e3, semiangle=30.0, thickness=400.0, detector_shape=(48, 40))
    assert few.reach == pytest.approx(1.25 * 30, rel=2e-3)
    assert [f.key for f in planning.findings(few) if f.severity == "error"] == ["scans.defocus"]
    # The angle that `specimen_limits` allows this detector is the one at which they just suffice.
    limits = {x.name: x for x in planning.specimen_limits(300e3, 400.0, (48, 40))}
    angle = limits["detector pixels"].semiangle
    assert angle < 30
    window = 39 * wavelength(300e3) / (2.5 * angle * 1e-3)
    half = [0.0, 400.0]
    assert sampling.required_window(angle, 300e3, half, 200.0) == pytest.approx(window)
    assert planning.window_angle(7, 100.0, 300e3) == 0.0


def test_what_is_given_is_kept():
    found = plan(
        energy=80e3, semiangle=25.0, thickness=90.0, scans=2, detector_shape=(50, 64),
        detector_pixel=1.74, scan_step=0.4, field=(15.6, 20.0), dose=1e5, dwell=1e-3,
    )  # fmt: skip
    assert (found.detector_shape, found.detector_pixel) == ((50, 64), 1.74)
    assert found.scan_step == 0.4 and found.scan_shape == (40, 51)
    assert found.window == pytest.approx(24.0, abs=0.01)
    assert found.sampling == pytest.approx((0.48, 0.375), abs=1e-3)
    assert found.frames == 2 * 40 * 51
    assert found.electrons_per_frame == pytest.approx(16e3)
    assert found.electrons == pytest.approx(16e3 * found.frames)
    assert found.bytes["uint8"] == found.frames * 50 * 64
    assert found.bytes["uint16"] == 2 * found.frames * 50 * 64
    assert found.bytes["events"] == pytest.approx(4 * 16e3 * found.frames)
    assert found.seconds == pytest.approx(4.08)
    # 16,000 electrons in a millisecond
    assert found.current == pytest.approx(2.5635, rel=1e-3)
    field = (15.6 + 24) * (20 + 24)
    assert found.smatrix_bytes == pytest.approx(8 * found.components * field / 0.18, rel=0.01)


def test_what_is_not_known_is_none():
    found = plan(energy=80e3, semiangle=25.0)
    assert found.electrons_per_frame is None and found.electrons is None
    assert found.seconds is None and found.current is None and found.phase_noise is None
    assert found.bytes["events"] is None
    assert plan(energy=80e3, semiangle=25.0, dwell=1e-3).current is None


def test_the_phase_bound_is_that_of_counting():
    """A Mach-Zehnder of N electrons at its best: 1/sqrt(N); all in one arm's phase: half of it."""
    assert planning.phase_bound(100.0, 2.0) == pytest.approx(0.5 / 20)
    found = plan(energy=80e3, semiangle=25.0, scans=4, dose=1e5)
    cell = wavelength(80e3) / 0.05
    assert found.phase_noise == pytest.approx(0.5 / math.sqrt(4e5 * cell**2))


def test_least_dose_is_where_the_warning_begins():
    for energy, scans in itertools.product((80e3, 300e3), (1, 4)):
        least = sampling.least_dose(25.0, energy, scans)
        for factor, words in ((0.99, 1), (1.01, 0)):
            found = plan(energy=energy, semiangle=25.0, scans=scans, dose=factor * least)
            assert found.least_dose == least
            assert [f.key for f in planning.findings(found)] == ["scans.file"] * words
    # A finer scan of the same dose has fewer electrons a frame and is as good.
    fine = plan(
        energy=80e3, semiangle=25.0, scan_step=0.2, dose=1.01 * sampling.least_dose(25.0, 80e3, 4)
    )
    assert planning.findings(fine) == []


def test_one_scan_is_focused_behind_the_specimen():
    found = plan(energy=300e3, semiangle=25.0, thickness=150.0, scans=1)
    assert found.defoci[0] >= 150 + sampling.depth_unit(25.0, 300e3)


def test_limits_of_camera_and_specimen():
    limits = {x.name: x for x in planning.specimen_limits(300e3, 200.0, (128, 96), 0.5)}
    assert limits["detector"].semiangle == pytest.approx(23.75 / 1.25)
    assert sampling.depth_of_field(limits["projection"].semiangle, 300e3) == pytest.approx(200)
    assert not limits["projection"].counts
    angle = limits["tilt modes"].semiangle
    assert sampling.needed_order(angle * 0.999, 200.0, 0.7) == 40
    assert planning.specimen_limits(300e3) == ()


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"energy": 0.0}, "`energy` = 0"),
        ({"semiangle": -1.0}, "`semiangle` = -1"),
        ({"thickness": float("inf")}, "`thickness` = inf"),
        ({"scans": 0}, "`scans` = 0"),
        ({"detector_shape": (0, 64)}, r"`detector_shape\[0\]` = 0"),
        ({"field": (10.0, -2.0)}, r"`field\[1\]` = -2"),
        ({"dose": 0.0}, "`dose` = 0"),
        ({"dwell": 0.0}, "`dwell` = 0"),
        ({"representation": "slices"}, "`representation` = 'slices'"),
    ],
)
def test_impossible_plans_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        plan(**({"energy": 80e3, "semiangle": 25.0} | wrong))


@pytest.mark.parametrize(
    "value, below", [(0.83497, 0.83), (0.49, 0.49), (1234.0, 1200.0), (9.99, 9.9)]
)
def test_significant_below(value, below):
    assert planning.significant_below(value) == below

"""The numbers of experiment design, and the questions asked of the shared series."""

import math

import numpy as np
import pytest
from scipy.special import jv

from smpr3d_jax.inverse import design
from smpr3d_jax.physics.optics import wavelength


NANOTUBES = {
    "energy": 80e3,
    "semiangle": 25.0,
    "defoci": [-150.0, 0.0, 100.0, 250.0],
    "scan_step": (0.4, 0.4),
    "scan_shape": (40, 40),
    "detector_pixel": 1.7399,
    "detector_shape": (50, 50),
}
HEAVY = {
    "energy": 300e3,
    "semiangle": 22.0,
    "defoci": [-110.0, 30.0, 130.0, 270.0],
    "scan_step": (0.35, 0.35),
    "scan_shape": (32, 32),
    "detector_pixel": 1.2305,
    "detector_shape": (64, 64),
}
MISALIGNED = NANOTUBES | {
    "scan_shape": (32, 32),
    "detector_pixel": 2.0879,
    "detector_shape": (42, 42),
}
PTYCHOGRAPHY = {
    "energy": 300e3,
    "semiangle": 1.03,
    "defoci": [135e3],
    "scan_step": (31.25, 31.25),
    "scan_shape": (64, 64),
    "detector_pixel": 0.03308,
    "detector_shape": (128, 128),
}


def errors(**experiment):
    return [f for f in design.check(**experiment) if f.severity == "error"]


@pytest.mark.parametrize(
    "energy, semiangle, width",
    [(80e3, 30.0, 82.2), (200e3, 20.0, 111.1), (300e3, 25.0, 55.8), (300e3, 30.0, 38.8)],
)
def test_depth_of_field_of_the_literature(energy, semiangle, width):
    assert design.depth_of_field(semiangle, energy) == pytest.approx(width, abs=0.06)
    z = design.depth_of_field(semiangle, energy) / 2
    argument = (semiangle * 1e-3) ** 2 * z / (2 * wavelength(energy))
    assert np.sinc(argument) ** 2 == pytest.approx(0.5, abs=1e-3)


def test_window_and_beams_of_the_nanotubes():
    window = design.window_of(1.7399, 80e3)
    assert window == pytest.approx(24.0, abs=0.01)
    assert design.beams_in_aperture(25.0, 80e3, 24.0) == 657
    assert design.beams_in_aperture(25.0, 80e3, 0.1) == 1
    needed = design.required_window(25.0, 80e3, [-150.0, 250.0], plane=50.0)
    assert needed == pytest.approx(2 * 0.025 * 200 + 3 * 0.041757 / 0.025, rel=1e-4)
    # symmetric about the reference plane is best
    assert needed < design.required_window(25.0, 80e3, [-150.0, 250.0], plane=0.0)


def test_scan_step_limits():
    assert design.largest_scan_step(25.0, 80e3) == pytest.approx(0.835, abs=1e-3)
    step = design.largest_scan_step_of_modes(24.0, scans=4, order=8)
    assert 4 * (24.0 / step) ** 2 == pytest.approx(5 * 45)
    assert design.largest_scan_step_of_modes(24.0, 1, 8) == pytest.approx(step / 2)


@pytest.mark.parametrize(
    "scans, step, works", [(3, 1.0, True), (2, 1.0, True), (1, 1.0, False), (3, 2.0, False)]
)
def test_steps_of_modes_as_measured(scans, step, works):
    """28 modes in a window of 8 Å: which coarse scans were recovered and which were not."""
    foci = [50.0, -50.0, 150.0][:scans]
    found = errors(
        energy=300e3,
        semiangle=19.0,
        defoci=foci,
        scan_step=(step, step),
        scan_shape=(16, 16),
        detector_pixel=wavelength(300e3) / 12 * 1e3 * 12 / 7.95,
        detector_shape=(48, 48),
        order=6,
        depth_range=(0.0, 100.0),
    )
    assert (not any("modes of order 6" in f.message for f in found)) == works


@pytest.mark.parametrize(
    "defoci, fails",
    [
        ([50.0], "needs 3 different foci"),
        ([-200.0, 300.0], "needs 3 different foci"),
        ([-50.0, 50.0, 150.0], "too close"),
        ([20.0, 40.0, 60.0, 80.0, 100.0], "too close"),
        ([50.0, 51.0, 52.0], "of which 1 differ"),
        ([-150.0, 50.0, 250.0], None),
        ([-200.0, -50.0, 50.0, 150.0, 300.0], None),
    ],
)
def test_foci_for_beams_as_measured(defoci, fails):
    """300 kV, 19 mrad, two layers 100 Å apart: which series determined S and which did not."""
    found = errors(
        energy=300e3,
        semiangle=19.0,
        defoci=defoci,
        scan_step=(0.5, 0.5),
        scan_shape=(64, 48),
        detector_pixel=1.0,
        detector_shape=(64, 48),
        representation="beams",
    )
    assert (not found) == (fails is None), found
    if fails:
        (finding,) = found
        assert fails in finding.message and "382 Å (7 λ/α²)" in finding.message
        assert f"{max(defoci) - min(defoci):g} Å" in finding.message
        assert finding.key == "scans.defocus"
        assert "set method.representation to 'modes'" in finding.message


@pytest.mark.parametrize("defoci", [[0.0, 5.0, 10.0, 15.0], [-15.0, 0.0, 10.0, 25.0], [100.0] * 3])
def test_a_series_that_is_as_good_as_one_scan_is_questioned(defoci):
    (finding,) = design.check(**NANOTUBES | {"defoci": defoci})
    assert (finding.severity, finding.key) == ("error", "scans.defocus")
    for words in ("too close to determine S", f"over {max(defoci) - min(defoci):g} Å", "468 Å"):
        assert words in finding.message
    assert design.check(**NANOTUBES | {"defoci": defoci[:1]}) == []


def test_close_foci_are_one():
    unit = design.depth_unit(25.0, 80e3)
    assert design.distinct_foci(25.0, 80e3, [0.0, 0.4 * unit]) == 1
    assert design.distinct_foci(25.0, 80e3, [0.6 * unit, 0.0]) == 2
    assert design.required_focal_range(25.0, 80e3) == pytest.approx(7 * unit)


def test_overdetermination():
    assert design.overdetermination(19.0, 300e3, 3, 0.5) == pytest.approx(2.05, abs=0.05)
    assert design.overdetermination(19.0, 300e3, 2, 0.05) == 4.0


@pytest.mark.parametrize("thickness, order", [(100.0, 7), (150.0, 9), (200.0, 11)])
def test_needed_order(thickness, order):
    assert design.needed_order(19.0, thickness, 0.7) == order
    assert design.tilt_coverage(order, 19.0, thickness, 0.7) > 0.99
    assert design.tilt_coverage(order // 2, 19.0, thickness, 0.7) < 0.85


@pytest.mark.parametrize("order, x", [(0, 0.5), (3, 2.0), (8, 9.7), (40, 60.0)])
def test_tilt_coverage_is_the_projection_on_polynomials(order, x):
    thickness = x / (math.pi * 0.02 * 0.5)
    covered = design.tilt_coverage(order, 20.0, thickness, 0.5)
    k = np.arange(1, order + 2)
    assert covered == pytest.approx(np.sum((2 * k * jv(k, x) / x) ** 2), abs=1e-12)
    if order <= 8:  # and by brute force: least squares over a disc
        y, u = np.meshgrid(*[np.linspace(-1, 1, 121)] * 2, indexing="ij")
        inside = np.hypot(y, u) <= 1
        y, u = y[inside], u[inside]
        basis = np.stack([y**i * u**j for i in range(order + 1) for j in range(order + 1 - i)], 1)
        basis, _ = np.linalg.qr(basis)
        wave = np.exp(1j * x * u)
        assert covered == pytest.approx(np.sum(np.abs(basis.T @ wave) ** 2) / len(wave), abs=0.01)


def test_coverage_of_nothing_to_cover():
    assert design.tilt_coverage(0, 25.0, 0.0, 0.7) == 1.0


@pytest.mark.parametrize(
    "experiment",
    [
        NANOTUBES,
        NANOTUBES | {"defoci": [-150.0, 250.0]},
        NANOTUBES | {"defoci": [100.0]},
        NANOTUBES | {"scan_step": (0.8, 0.8), "scan_shape": (20, 20)},
        NANOTUBES | {"depth_range": (-40.0, 180.0)},
        HEAVY,
        HEAVY | {"depth_range": (-25.0, 175.0)},
        MISALIGNED,
        PTYCHOGRAPHY,
    ],
    ids=["tubes", "two", "one", "coarse", "wide", "heavy", "heavy-wide", "misaligned", "micron"],
)
def test_shared_series_need_no_word_in_modes(experiment):
    assert design.check(**experiment) == []


@pytest.mark.parametrize("experiment", [NANOTUBES, HEAVY, MISALIGNED])
def test_shared_series_pass_in_beams(experiment):
    assert errors(**experiment, representation="beams") == []


@pytest.mark.parametrize(
    "change, severity, key, words",
    [
        (
            {"defoci": [-2000.0, 0.0, 2000.0]},
            "error",
            "scans.defocus",
            ["24 Å", "needs 105 Å", "at most 0.398 mrad", "within 380 Å"],
        ),
        ({"defoci": [-330.0, 0.0, 450.0]}, "warning", "scans.defocus", ["needs 24.5 Å"]),
        (
            {"detector_shape": (50, 28)},
            "error",
            "geometry.detector_pixel_mrad",
            ["reaches 23.5 mrad", "radius of 25 mrad", "geometry.center"],
        ),
        ({"center": (25.0, 11.0)}, "error", "geometry.detector_pixel_mrad", ["reaches 20 mrad"]),
        ({"detector_shape": (34, 50)}, "warning", "geometry.detector_pixel_mrad", ["dark field"]),
        ({"scan_step": (0.4, 30.0)}, "error", "geometry.scan_step", ["30 Å", "apart"]),
        (
            {"scan_step": (7.0, 7.0), "defoci": [-250.0]},
            "error",
            "geometry.scan_step",
            ["a step of 7 Å", "0.26 positions", "45 modes of order 8", "at most 1.6 Å"],
        ),
        (
            {"depth_range": (-200.0, 300.0)},
            "warning",
            "method.order",
            ["-200 to 300 Å", "order 8", "support 165 Å", "raise method.order to 19"],
        ),
        (
            {"representation": "beams", "scan_step": (0.4, 0.9)},
            "error",
            "geometry.scan_step",
            ["0.9 Å", "λ/(2α) = 0.835 Å", "'modes'"],
        ),
        (
            {"representation": "beams"},
            "warning",
            "method.representation",
            ["16 x 16 Å", "window of 24 Å"],
        ),
        ({"representation": "beams"}, "warning", "scans.defocus", ["400 Å (6 λ/α²)", "468 Å"]),
    ],
)
def test_findings_name_the_value_and_the_remedy(change, severity, key, words):
    found = [
        f for f in design.check(**(NANOTUBES | change)) if (f.severity, f.key) == (severity, key)
    ]
    text = " ".join(f.message for f in found)
    assert found
    for word in words:
        assert word in text, text


def test_errors_come_first():
    found = design.check(**(NANOTUBES | {"representation": "beams", "scan_step": (1.0, 1.0)}))
    assert [f.severity for f in found] == sorted(f.severity for f in found)
    assert found[0].severity == "error" and found[-1].severity == "warning"


@pytest.mark.parametrize(
    "defoci, low, high",
    [([-150.0, 0.0, 100.0, 250.0], -50.0, 150.0), ([-150.0, 250.0], -50.0, 150.0)],
)
def test_default_depth_range_is_the_middle_half(defoci, low, high):
    assert design.default_depth_range(25.0, 80e3, defoci) == (low, high)


@pytest.mark.parametrize("defocus", [0.0, 100.0, -80.0, 5e4])
def test_default_depth_range_of_one_scan(defocus):
    unit = design.depth_unit(25.0, 80e3)
    low, high = design.default_depth_range(25.0, 80e3, [defocus])
    assert 2 * unit <= (high - low) * (1 + 1e-12) <= 3 * unit * (1 + 1e-9)
    assert low < 0 < high
    if abs(defocus) <= 2 * unit:
        assert low < defocus < high

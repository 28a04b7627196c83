"""Refined parameters and offsets: read strictly, drawn where they are."""

import numpy as np
import pytest
from matplotlib.quiver import Quiver

from smpr3d_jax.report import figures, refined


DEFOCUS = {"name": "defocus", "unit": "Å", "start": [0.0, 100.0], "found": [5.0, 90.0]}
PATH = [[2.0, 96.0], [4.0, 92.0], [5.0, 90.0]]


def offsets(frames=40, scans=3):
    """Offsets of rms 0.1 Å about a shift of each scan."""
    rng = np.random.default_rng(0)
    series = np.arange(frames) % scans
    positions = rng.uniform(0, 8, (frames, 2)) * (1, 2)
    return positions, 0.1 * rng.normal(size=(frames, 2)) + series[:, None] * (0.5, -1.0), series


def test_a_number_is_an_entry_and_a_list_several():
    one = refined.parameter({"name": "C12", "start": 0, "found": 29.3, "error": 1.2})
    assert (one.labels, one.title, one.error) == (["C12"], "C12", [1.2])
    assert one.path.shape == (0, 1)
    two = refined.parameter(DEFOCUS | {"error": 0.5, "history": PATH})
    assert two.labels == ["defocus 0", "defocus 1"]
    assert two.error is not None
    np.testing.assert_array_equal(two.error, [0.5, 0.5])
    # Of several entries the path is their change.
    np.testing.assert_array_equal(two.path, [[0, 0], [2, -4], [4, -8], [5, -10]])
    alone = refined.parameter({"name": "C12", "start": 1, "found": 3, "history": [2, 3]})
    np.testing.assert_array_equal(alone.path, [[1], [2], [3]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": 3}, r"not known \['value'\]"),
        ({"start": [1.0, 2.0, 3.0]}, r"'defocus': `start` of shape \(3,\), but 2 values found"),
        ({"error": [1.0, 2.0, 3.0]}, "`error` of shape"),
        ({"history": [1.0, 2.0, 3.0]}, r"\(iterations, 2\)"),
        ({"found": np.ones((2, 2))}, "not one axis"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        refined.parameter(DEFOCUS | change)


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ((0.0, 29.34, 1.23), ("0.0", "29.3", "1.2")),
        ((0.0, 312.4, 41.0), ("0", "312", "41")),
        ((0.0, -0.6118, 0.0214), ("0.000", "−0.612", "0.021")),
        ((100.0, 88.123456, float("nan")), ("100", "88.12", "–")),
        ((float("nan"), 8.0, 0.0), ("–", "8", "–")),
    ],
)
def test_numbers_have_the_digits_that_their_error_leaves(numbers, text):
    assert refined.rounded(*numbers) == text


def test_charts_begin_at_the_start_and_are_thinned():
    long = {"name": "C21", "unit": "Å", "start": 0, "found": 9, "history": np.linspace(1, 9, 1000)}
    without = {"name": "C10", "start": 0, "found": 9}
    (chart,) = refined.charts([refined.parameter(long), refined.parameter(without)])
    points = chart["series"][0]["points"]
    assert len(points) == 300
    assert (points[0], points[-1]) == ((0, 0.0), (1000, 9.0))
    assert chart["summary"] == "C21 from 0 to 9"


def test_offsets_are_judged_about_the_mean_of_their_scan():
    positions, moved, series = offsets()
    found = refined.position_offsets({"positions": positions, "offsets": moved, "series": series})
    for scan in range(3):
        np.testing.assert_allclose(found.local[series == scan].mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(np.diff(found.local - moved, axis=0)[0], [-0.5, 1.0], atol=0.2)
    svg = refined.pictures(found)
    assert svg.count("<figure>") == 4
    assert svg.count("h0") == svg.count("L") - svg.count("Length") == 40
    with pytest.raises(ValueError, match=r"`series` \(2,\)"):
        refined.position_offsets({"positions": positions, "offsets": moved, "series": [0, 1]})
    with pytest.raises(ValueError, match=r"missing \['offsets'\]"):
        refined.position_offsets({"positions": positions})


def test_figures_of_a_refinement():
    figure = refined.parameter_paths([DEFOCUS | {"error": 1.0, "history": PATH}, DEFOCUS])
    (axis,) = figure.axes
    assert axis.get_ylabel() == "defocus, change (Å)"
    np.testing.assert_array_equal(np.asarray(axis.lines[0].get_ydata()), [0, 2, 4, 5])
    positions, moved, series = offsets()
    arrows = refined.offset_map(positions, moved, series)
    assert len(arrows.axes) == 4
    assert arrows.axes[0].yaxis_inverted()
    (quiver,) = [c for c in arrows.axes[1].collections if isinstance(c, Quiver)]
    own = series == 1
    factor = float(arrows.axes[1].get_title().split("×")[1])
    np.testing.assert_allclose(
        np.asarray(quiver.U), factor * (moved[own] - moved[own].mean(0))[:, 1]
    )
    np.testing.assert_allclose(np.asarray(quiver.XY)[:, 1], positions[own, 0])
    for made in (figure, arrows, refined.parameter_paths([])):
        assert figures.png_bytes(made, 40).startswith(b"\x89PNG")


def test_no_offset_at_all_can_be_drawn():
    positions, moved, _ = offsets()
    assert refined.offset_map(positions, 0 * moved).axes
    found = refined.position_offsets({"positions": positions, "offsets": 0 * moved})
    assert "rms 0.000 Å" in refined.pictures(found)

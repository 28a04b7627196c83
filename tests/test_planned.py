"""The picture of a plan: three panels, every curve and every limit in its place."""

import numpy as np
import pytest

from smpr3d_jax.report.figures import png_bytes
from smpr3d_jax.report.planned import planned


Q, Z, ANGLES = np.linspace(0.1, 2, 30), np.linspace(-50, 50, 21), np.geomspace(5, 80, 50)
WIDTHS = {"sections": 30 / Q, "tcBF": np.where(Q < 1.5, 60 / Q, np.inf)}
LIMITS = {"C5": 40.0, "chromatic": 38.0, "source": 12.0, "far away": 900.0}


def picture(**lines):
    shown = np.exp(-np.abs(Z)[:, None] * Q[None, :] / 20)
    return planned(Q, Z, shown, WIDTHS, ANGLES, 3e4 / ANGLES**2, LIMITS, 25.0, **lines)


def test_panels_and_curves():
    figure = picture(thickness=200.0, spread=15.0)
    left, middle, right = figure.axes[:3]
    assert "lateral frequency" in left.get_xlabel() and left.yaxis_inverted()
    curves = {line.get_label(): line for line in middle.lines}
    assert set(WIDTHS) <= set(curves)
    # what is infinite is not drawn
    assert np.asarray(curves["tcBF"].get_xdata()).max() < 1.5
    point = next(line for line in right.lines if "25 mrad, 48 Å" in str(line.get_label()))
    assert np.asarray(point.get_ydata())[0] == pytest.approx(48.0, rel=1e-3)
    legend = right.get_legend()
    assert legend is not None
    labels = [text.get_text() for text in legend.get_texts()]
    assert "specimen, 200 Å" in labels and "focal spread, 15 Å" in labels
    assert png_bytes(figure, dpi=40)[:4] == b"\x89PNG"


def test_limits_are_named_without_standing_on_each_other():
    named = {text.get_text().strip(): text.get_position() for text in picture().axes[2].texts}
    assert set(named) == {"C5", "chromatic", "source"}
    assert {name: place[0] for name, place in named.items()} == {
        name: LIMITS[name] for name in named
    }
    assert named["C5"][1] < named["chromatic"][1] == named["source"][1]

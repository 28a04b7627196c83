"""Figures: they draw what they are given, in place and to scale, and touch no global state."""

import io
import pathlib

import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from smpr3d_jax.report import figures


DEPTHS = np.arange(-20.0, 60.0, 5.0)


def volume(planes=16, shape=(12, 20)):
    return np.random.default_rng(0).normal(size=(planes, *shape)).astype(np.float32)


def drawn(figure):
    return [axis for axis in figure.axes if axis.images]


def test_pyplot_and_its_state_are_not_used():
    for source in pathlib.Path(figures.__file__).parent.glob("*.py"):
        assert "matplotlib.pyplot" not in source.read_text(encoding="utf-8")
        assert "rcParams" not in source.read_text(encoding="utf-8")


def test_every_figure_can_be_drawn():
    wave = (volume(1)[0] + 1j * volume(2)[1]).astype(np.complex64)
    made = [
        figures.sections(jnp.asarray(volume()), jnp.asarray(DEPTHS), 0.4, scan_box=(0, 0, 2, 4)),
        figures.sections(volume(), list(DEPTHS)),
        figures.sections(volume(1), [0]),
        figures.depth_profile(volume(), DEPTHS, (0.4, 0.5), origin=(-1, -2)),
        figures.depth_profile(volume(1), [0.0]),
        figures.convergence({"loss": [3.0, 2.0], "R-factor": [[1, 0.2], [5, 0.1]]}),
        figures.convergence({}),
        figures.frames(abs(volume(3)), abs(volume(3)), ["a", "b", "c"], scale="log"),
        figures.complex_image(wave, 0.2, "probe"),
    ]
    for figure in made:
        assert isinstance(figure, Figure)
        assert figures.png_bytes(figure, dpi=40).startswith(b"\x89PNG")


def test_sections_share_one_scale_and_name_their_depths():
    figure = figures.sections(volume(), DEPTHS, 0.4, max_panels=5)
    panels = drawn(figure)
    assert len(panels) == 5
    assert len({panel.images[0].get_clim() for panel in panels}) == 1
    texts = [panel.texts[0].get_text() for panel in panels]
    assert (texts[0], texts[-1]) == ("−20 Å", "55 Å")
    assert panels[0].texts[-1].get_text() == "2 Å"  # the scale bar: 8 Å wide images


def test_the_grey_scale_is_judged_inside_the_scan():
    images = volume() * 1e-2
    images[:, :, 10:] += 1e3  # nonsense outside
    panel = drawn(figures.sections(images, DEPTHS, 0.5, scan_box=(0, 0, 6, 4.5)))[0]
    assert max(map(abs, panel.images[0].get_clim())) < 0.1


def test_pixels_lie_where_their_coordinates_say():
    panel = drawn(figures.sections(volume(), DEPTHS, (0.5, 0.4), origin=(-2, -3)))[0]
    left, right, bottom, top = panel.images[0].get_extent()
    np.testing.assert_allclose([left, right, bottom, top], [-3.2, 4.8, 3.75, -2.25])
    boxed = figures.sections(volume(), DEPTHS, 0.4, scan_box=(0, 1, 2, 4))
    frames = [p for p in drawn(boxed)[0].patches if isinstance(p, Rectangle) and not p.fill]
    np.testing.assert_allclose(frames[0].get_bbox().extents, [1, 0, 4, 2])


def test_the_profile_peaks_where_the_contrast_is():
    images = volume() * 0.01
    images[7, ::2] += 1
    axis = figures.depth_profile(images, DEPTHS).axes[0]
    contrast, depth = axis.lines[0].get_data()
    assert np.asarray(depth)[np.argmax(contrast)] == DEPTHS[7]
    assert axis.yaxis_inverted()  # down is along the beam


def test_series_with_the_same_meaning_share_a_panel():
    history = {
        "loss": [3.0, np.nan, 1.0],
        "R-factor": [0.2],
        "r_factor_held_out": np.array([[10, 0.3], [20, 0.2]]),
        "deviance loss": [1.0],
        "empty": [],
        "noise": [0.9, 0.9, 0.9],
        "noise_held_out": [0.9, 0.9, 0.9],
    }
    groups = figures.grouped(history)
    assert {name: list(series) for name, series in groups.items()} == {
        "loss": ["loss"],
        "r_factor": ["R-factor", "r_factor_held_out"],
        "deviance": ["deviance loss"],
    }
    np.testing.assert_array_equal(groups["loss"]["loss"], [[1, 3], [3, 1]])
    with pytest.raises(ValueError, match=r"history\['loss'\] has shape \(2, 3\)"):
        figures.grouped({"loss": np.ones((2, 3))})


def test_a_loss_over_decades_gets_a_logarithmic_axis():
    figure = figures.convergence({"loss": 10.0 ** -np.arange(5), "R-factor": [0.3, 0.2]})
    assert [axis.get_yscale() for axis in figure.axes] == ["log", "linear"]


def test_the_deviance_is_shown_against_what_noise_allows():
    history = {"loss": [3.0, 2.0], "deviance_held_out": [0.6, 0.5, 0.52]}
    loss, deviance = figures.convergence(history, noise=0.4, stopped=2).axes
    assert len(loss.lines) == 1
    _, level, kept = deviance.lines
    np.testing.assert_array_equal(np.asarray(level.get_ydata()), [0.4, 0.4])
    np.testing.assert_array_equal(np.asarray(kept.get_xdata()), [2, 2])
    assert deviance.get_ylim()[0] < 0.4
    legend = deviance.get_legend()
    assert legend is not None
    assert [t.get_text() for t in legend.texts][1:] == ["noise alone: 0.4", "kept: 2"]


@pytest.mark.parametrize("shape", [(5, 8), (6, 7)])
def test_frames_are_centred_once(shape):
    data = np.zeros(shape)
    data[0, 0] = 9
    (picture, _), high = figures.frame_pair(data, data)
    assert picture[shape[0] // 2, shape[1] // 2] == 3
    (picture, _), _ = figures.frame_pair(data, data, "linear", centred=True)
    assert picture[0, 0] == 9
    assert high > 0
    with pytest.raises(ValueError, match="scale='cube'"):
        figures.frame_pair(data, data, "cube")
    with pytest.raises((ValueError, TypeError)):  # whichever looks first
        figures.frames(data[None], data[None, 1:])


def test_a_png_of_an_array_holds_its_pixels():
    image = np.arange(12.0).reshape(3, 4)
    png = matplotlib.image.imread(io.BytesIO(figures.array_png(image, 0, 11)))
    np.testing.assert_allclose(png[..., 0], image / 11, atol=1 / 200)


@pytest.mark.parametrize(
    ("extent", "bar"), [(24.0, 5.0), (8.0, 2.0), (4.0, 1.0), (1000.0, 200.0), (0.9, 0.2)]
)
def test_scale_bars_are_round(extent, bar):
    assert figures.nice_length(extent) == pytest.approx(bar)


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        (None, (slice(None), slice(None))),
        ((0, 0, 1.0, 2.0), (slice(2, 5), slice(4, 9))),
        ((-9, -9, 99, 99), (slice(0, 10), slice(0, 12))),
        ((50, 50, 60, 60), (slice(None), slice(None))),
    ],
)
def test_the_pixels_inside_a_box(box, expected):
    assert figures.inside((3, 10, 12), box, 0.5, (-1, -2)) == expected


@pytest.mark.parametrize(("count", "limit"), [(1, 5), (5, 5), (45, 12), (7, 1)])
def test_chosen_planes_are_even_and_unique(count, limit):
    chosen = figures.evenly(count, limit)
    assert len(chosen) == min(count, limit)
    assert chosen[0] == 0
    assert limit == 1 or chosen[-1] == count - 1


def test_volumes_and_depths_must_agree():
    with pytest.raises(ValueError, match="one depth a plane, got 15"):
        figures.sections(volume(), DEPTHS[:-1])


def test_constant_and_empty_volumes_have_a_scale():
    assert figures.robust_range(np.full((2, 3, 4), 5.0)) == (4.5, 5.5)
    assert figures.robust_range(np.full((2, 3, 4), np.nan)) == (0.0, 1.0)

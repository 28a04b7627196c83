"""What `calibrate` is given, what frames and files say, and which of them is believed."""

import numpy as np
import pytest

from smpr3d_jax.app.calibration_steps import electrons_of, step_of
from smpr3d_jax.data.calibration import Signals
from smpr3d_jax.data.counts import InputError

from .test_calibration import lattice_image
from .test_charge import electrons, source as source_in


def source(folder, name, values):
    (folder / name).mkdir()
    return source_in(folder / name, values)


@pytest.fixture
def integrating(tmp_path):
    noise = np.random.default_rng(1).normal(0, 0.8, (12, 14, 46, 52))
    return source(tmp_path, "integrating", (12.5 * electrons() + noise).astype(np.float32))


@pytest.fixture
def counted(tmp_path):
    return source(tmp_path, "counted", electrons().astype(np.uint8))


@pytest.fixture
def washed(tmp_path):
    """Too noisy for single electrons; everything above is a multiple of none."""
    noise = np.random.default_rng(1).normal(0, 9, (12, 14, 46, 52))
    return source(tmp_path, "washed", 20 * electrons() + noise)


def values(sources):
    return np.asarray(sources[0].host().values)


def test_frames_are_divided_by_what_they_say(integrating):
    sources, found, notes = electrons_of([integrating])
    assert found.divided_by == pytest.approx(12.5, rel=1e-3) and found.sure and not notes
    assert found.error < 0.01
    np.testing.assert_array_equal(values(sources), electrons().reshape(-1, 46, 52))


@pytest.mark.parametrize("given", [None, 1.0])
def test_counted_frames_are_left_alone(counted, given):
    sources, found, notes = electrons_of([counted], given)
    assert found.divided_by is None and found.sure and not notes and sources == (counted,)


def test_what_is_given_wins_if_it_is_possible(integrating, counted):
    found = electrons_of([integrating], 12.5)[1]
    assert found.divided_by == 12.5 and np.isnan(found.error)
    with pytest.raises(InputError, match="17 counts per electron make no whole electrons.*12.5"):
        electrons_of([integrating], 17.0)
    for wrong in (0.0, -2.0, float("nan")):
        with pytest.raises(InputError, match="a positive number"):
            electrons_of([counted], wrong)
    found, notes = electrons_of([counted], 0.5)[1:]
    assert found.divided_by == 0.5 and "the frames look like 1" in notes[0]


def test_what_the_files_say(integrating, counted, washed):
    assert electrons_of([integrating], None, 12.4)[1].divided_by == pytest.approx(12.5, rel=1e-3)
    with pytest.raises(InputError, match="the files say 25 counts.*multiples of 12.5"):
        electrons_of([integrating], None, 25.0)
    found, notes = electrons_of([counted], None, 25.0)[1:]
    assert found.divided_by is None and "nothing is divided" in notes[0]
    # Noise alone must not be rounded, whoever says so.
    found, notes = electrons_of([washed], None, 20.0)[1:]
    assert found.divided_by is None and not found.sure and "amplitudes" in notes[0]
    with pytest.raises(InputError, match="make no whole electrons"):
        electrons_of([washed], 20.0)


def signals(dark, bright, com):
    """Of one scan, with what a lattice may be seen in."""
    none = np.zeros((1, 2))
    return Signals(dark, dark, com, bright[..., None], none, np.ones(1), none, 9.0)


def noisy(seed=0, shape=(60, 70)):
    return np.random.default_rng(seed).normal(size=shape)


TRUE, SPACING = (0.42, 0.37), 2.13


def crystal(step=TRUE, noise=1.0, seed=0):
    return lattice_image((60, 70), step, SPACING, np.deg2rad([10, 70, 130]), noise, seed)


@pytest.mark.parametrize("where", ["outside the disc", "bright field", "centre of mass"])
@pytest.mark.parametrize("nominal", [(0.4, 0.4), None])
def test_the_step_from_the_image_that_shows_the_lattice(where, nominal):
    names = ("outside the disc", "bright field", "centre of mass")
    of = {name: crystal() if name == where else noisy() for name in names}
    com = np.stack([of["centre of mass"], noisy(3)], -1)
    found, notes = step_of(
        [signals(of["outside the disc"], of["bright field"], com)], SPACING, nominal
    )
    assert [one.name for one in found.lattices] == [where]
    for step, true, sigma in zip(found.step, TRUE, found.sigma, strict=True):
        assert abs(step - true) < 4 * sigma < 0.05 * true
    assert ("strongest peaks" if nominal is None else "is used, not the 0.4 Å given") in notes[0]


def test_scans_of_a_series_share_one_step():
    com = np.stack([noisy(3), noisy(4)], -1)
    scans = [signals(crystal((0.4, 0.4), seed=i), noisy(i), com) for i in (5, 6, 7)]
    one = step_of(scans[:1], SPACING, (0.4, 0.4))[0]
    found, notes = step_of([*scans, signals(noisy(1), noisy(2), com)], SPACING, (0.4, 0.4))
    assert [lattice.scan for lattice in found.lattices] == [0, 1, 2]
    assert found.step[0] == found.step[1] == pytest.approx(0.4, abs=4 * found.sigma[0])
    assert found.sigma[0] < one.sigma[0] and "agrees with the 0.4 Å given" in notes[0]


def test_fringes_of_one_direction():
    fringes = lattice_image((60, 70), (0.4, 0.4), SPACING, [0.3], 0.5)
    com = np.stack([noisy(3), noisy(4)], -1)
    found, notes = step_of([signals(fringes, noisy(), com)], SPACING, (0.4, 0.4))
    assert found.step[0] == found.step[1] and "one direction only" in notes[1]


def test_no_lattice_is_said():
    com = np.stack([noisy(3), noisy(4)], -1)
    with pytest.raises(InputError, match=r"--lattice\): No peak of a lattice of 2.13 Å"):
        step_of([signals(noisy(), noisy(1), com)], SPACING, (0.4, 0.4))
    with pytest.raises(InputError, match="lengths are positive"):
        step_of([signals(crystal(), noisy(1), com)], -2.0, (0.4, 0.4))
    few = noisy()[:5]
    small = signals(few, few, np.stack([few, few], -1))
    with pytest.raises(InputError, match="8 × 8"):
        step_of([small], SPACING)

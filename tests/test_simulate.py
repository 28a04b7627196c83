"""Made-up experiments: the tubes, the record, and the files, read back by our own readers."""

import json
import math

import ase
import ase.build
import h5py
import numpy as np
import pytest

from smpr3d_jax.app.experiment import load
from smpr3d_jax.app.simulate import (
    Acquisition,
    read_structure,
    simulate,
    two_nanotubes,
    write_series,
)
from smpr3d_jax.data.readers.emd import open_source
from smpr3d_jax.physics.optics import wavelength

from .helpers import SHARED, shared_data


ACQUISITION = Acquisition(
    defocus=(-40.0, 30.0),
    aberrations={"C12": 20.0, "phi12": 0.5},
    scan_shape=(3, 4),
    jitter=0.2,
    detector_angle=30.0,
    sampling=0.25,
    seed=5,
)


def crossed_tubes():
    return two_nanotubes(cell=16.0, upper=(3, 3), lower=(4, 0), separation=40.0, margin=5.0)


@pytest.fixture(scope="module")
def series():
    return simulate(crossed_tubes(), ACQUISITION)


def nearest_neighbours(atoms):
    """Distance of each atom to its nearest."""
    difference = atoms.positions[:, None] - atoms.positions[None]
    distance = np.linalg.norm(difference, axis=-1)
    return np.min(distance + 10 * np.eye(len(atoms)), axis=1)


@pytest.mark.parametrize("separation, angle", [(90.0, 70.0), (30.0, 25.0)])
def test_tubes_cross_and_lie_apart(separation, angle):
    atoms = two_nanotubes(separation=separation, angle=angle)
    upper, lower = (atoms[atoms.get_tags() == tag] for tag in (0, 1))
    assert isinstance(upper, ase.Atoms)
    assert isinstance(lower, ase.Atoms)
    gap = lower.positions[:, 2].mean() - upper.positions[:, 2].mean()
    assert gap == pytest.approx(separation)
    for tube, turn in ((upper, 0.0), (lower, math.radians(angle))):
        x, y = (tube.positions[:, :2] - 20.0).T
        along = math.sin(turn) * x + math.cos(turn) * y
        across = math.cos(turn) * x - math.sin(turn) * y
        assert np.ptp(along) > 36
        assert np.abs(across).max() < 4.2
        middle = tube[np.abs(along) < 15]
        assert isinstance(middle, ase.Atoms)
        assert np.all(np.abs(nearest_neighbours(middle) - 1.42) < 0.05)
    assert atoms.positions.min() >= 0
    assert np.all(atoms.positions < np.diag(np.asarray(atoms.cell)))


def handedness(atoms, axis, centre):
    """Mean over atoms of the sum over bonds of rise³ times turn about the axis: odd in mirrors."""
    values = []
    for here in atoms.positions:
        away = atoms.positions - here
        length = np.linalg.norm(away, axis=1)
        near = away[(length > 0.1) & (length < 1.6)]
        radius = here - centre
        around = np.cross(axis, radius - axis * (radius @ axis))
        if len(near) == 3:
            values.append(float(np.sum((near @ axis) ** 3 * (near @ around))))
    return np.mean(values)


def test_a_chiral_tube_keeps_its_hand():
    mine = two_nanotubes(cell=60.0, upper=(4, 2), angle=90.0)
    upper = mine[mine.get_tags() == 0]
    theirs = ase.build.nanotube(4, 2, length=5)
    assert isinstance(upper, ase.Atoms)
    middle = np.array([30.0, 0.0, 12.0 + np.ptp(upper.positions[:, 2]) / 2])
    ours = handedness(upper, np.array([0.0, 1.0, 0.0]), middle)
    reference = handedness(theirs, np.array([0.0, 0.0, 1.0]), np.zeros(3))
    assert abs(reference) > 0.01
    assert ours == pytest.approx(reference, rel=0.02)


def test_default_tubes_are_those_of_the_shared_series():
    with h5py.File(shared_data("nanotubes_series", "truth.h5")) as file:
        levels = [float(np.asarray(file.attrs[f"z_{name}_A"])) for name in ("upper", "lower")]
        depth = float(np.asarray(file.attrs["cell_z_A"]))
    atoms = two_nanotubes(cell=48.0)
    mine = [atoms.positions[atoms.get_tags() == tag, 2].mean() for tag in (0, 1)]
    assert mine == pytest.approx(levels)
    assert np.asarray(atoms.cell)[2, 2] == pytest.approx(depth)


def test_frames_are_counts_with_the_beam_in_the_centre(series):
    assert len(series.frames) == 2
    pixel = series.detector_pixel
    assert pixel == pytest.approx(1e3 * wavelength(80e3) * 2 / 16.0)
    side = 2 * math.ceil(30.0 / pixel)
    for frames in series.frames:
        assert frames.shape == (3, 4, side, side)
        assert frames.dtype == np.uint16
        mean = frames.mean(axis=(0, 1))
        angle = (np.arange(side) - side // 2) * pixel
        disc = np.hypot(angle[:, None], angle[None, :]) < 25 - pixel
        assert mean[disc].mean() > 10 * mean[np.hypot(angle[:, None], angle[None, :]) > 27].mean()
        # 1e5 electrons per Å² and 0.4 Å steps
        assert 0.9 * 16000 < frames.sum() / 12 < 16000


def test_positions_are_a_raster_in_the_middle_with_jitter(series):
    assert series.positions.shape == (2, 12, 2)
    exact = simulate(crossed_tubes(), Acquisition(defocus=(0.0,), scan_shape=(2, 3), sampling=0.4))
    np.testing.assert_allclose(exact.positions[0].mean(axis=0), [8.0, 8.0])
    np.testing.assert_allclose(exact.positions[0, 4] - exact.positions[0, 0], [0.4, 0.4])
    nominal = (8.0 - 0.4) + 0.4 * np.arange(3)
    off = series.positions.reshape(2, 3, 4, 2)[..., 0] - nominal[None, :, None]
    assert 0.1 < off.std() < 0.3
    assert not np.allclose(off[0], off[1])


def test_the_seed_repeats_the_experiment(series):
    again = simulate(crossed_tubes(), ACQUISITION)
    for one, other in zip(series.frames, again.frames, strict=True):
        np.testing.assert_array_equal(one, other)


def test_written_files_are_read_back(series, tmp_path):
    path = write_series(tmp_path / "new" / "demo", series, "crossed")
    experiment = load(path)
    assert experiment.title == "crossed"
    assert [s.defocus for s in experiment.scans] == [-40.0, 30.0]
    assert experiment.beam.energy_ev == 80e3
    assert experiment.beam.aberrations == {"C12": 20.0, "phi12": 0.5}
    assert experiment.geometry.scan_step == (0.4, 0.4)
    assert experiment.geometry.detector_pixel_mrad == pytest.approx(series.detector_pixel)
    z = series.atoms.positions[:, 2]
    assert experiment.sections.start is not None
    assert experiment.sections.stop is not None
    assert experiment.sections.start < z.min() - 15
    assert experiment.sections.stop > z.max() + 15
    for entry, frames in zip(experiment.scans, series.frames, strict=True):
        source = open_source(entry.file)
        assert source.scan_shape == (3, 4)
        with h5py.File(entry.file) as file:
            data = file["datacube_root/datacube/data"]
            assert isinstance(data, h5py.Dataset)
            np.testing.assert_array_equal(data[()], frames)


def test_truth_has_the_keys_of_the_shared_data(series, tmp_path):
    write_series(tmp_path, series)
    with h5py.File(tmp_path / "truth.h5") as file:
        if (SHARED / "nanotubes_series" / "truth.h5").exists():
            with h5py.File(SHARED / "nanotubes_series" / "truth.h5") as shared:
                assert set(file) == set(shared)
                assert set(file.attrs) == set(shared.attrs)
        values = {k: np.asarray(v[()]) for k, v in file.items() if isinstance(v, h5py.Dataset)}
        aberrations = str(file.attrs["aberrations"])
        numbers = {
            k: float(np.asarray(file.attrs[k])) for k in ("extent_A", "z_upper_A", "z_lower_A")
        }
    atoms = series.atoms
    np.testing.assert_allclose(values["atoms_xyz_A"][:, 0], atoms.positions[:, 1])
    np.testing.assert_allclose(values["atoms_xyz_A"][:, 1], atoms.positions[:, 0])
    np.testing.assert_array_equal(values["layer"], atoms.get_tags())
    np.testing.assert_allclose(values["positions_A"], series.positions)
    assert numbers["extent_A"] == pytest.approx(16.0)
    assert numbers["z_lower_A"] - numbers["z_upper_A"] == pytest.approx(40.0)
    assert json.loads(aberrations) == {"C12": 20.0, "phi12": 0.5}
    # Every atom's slice is filled, and the slices between the tubes are there and empty.
    ends, filled = values["slice_z_A"], values["slices_V_A"].any(axis=(1, 2))
    np.testing.assert_allclose(ends, 3.0 * np.arange(1, len(ends) + 1))
    expected = {math.floor(z / 3.0) for z in atoms.positions[:, 2]}
    assert set(np.flatnonzero(filled)) == expected
    assert values["slices_V_A"].sum() == pytest.approx(
        float(series.slices.potential.sum()), rel=1e-5
    )


def test_the_experiment_may_state_something_else(series, tmp_path):
    path = write_series(
        tmp_path, series, stated_defocus=[-45.0, 45.0], stated_aberrations={"C30": 1e4}
    )
    experiment = load(path)
    assert [s.defocus for s in experiment.scans] == [-45.0, 45.0]
    assert experiment.beam.aberrations == {"C30": 1e4}
    with pytest.raises(ValueError, match="3 values for 2 scans"):
        write_series(tmp_path, series, stated_defocus=[1.0, 2.0, 3.0])


def test_structures_come_from_files(tmp_path):
    path = tmp_path / "tubes.xyz"
    crossed_tubes().write(path)
    back = read_structure(path)
    np.testing.assert_allclose(back.positions, crossed_tubes().positions, atol=1e-6)
    np.testing.assert_allclose(np.asarray(back.cell), np.asarray(crossed_tubes().cell))


def test_unreadable_structures_name_the_file(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.cif: no such"):
        read_structure(tmp_path / "nowhere.cif")
    broken = tmp_path / "broken.xyz"
    broken.write_text("not a structure\n")
    with pytest.raises(ValueError, match=r"broken\.xyz: ASE cannot read"):
        read_structure(broken)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"defocus": ()}, "defocus"),
        ({"aberrations": {"C10": 5.0}}, "C10 = 5.0"),
        ({"dose": 0.0}, "dose.*0.0"),
        ({"jitter": -0.1}, "-0.1"),
        ({"scan_shape": (0, 3)}, r"\(0, 3\)"),
    ],
)
def test_impossible_acquisitions_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Acquisition(**changes)


def test_cells_that_do_not_suit_are_refused():
    atoms = ase.Atoms("C", [[1.0, 1.0, 1.0]], cell=[8.0, 10.0, 5.0])
    with pytest.raises(ValueError, match="10 Å along y and 8 Å along x"):
        simulate(atoms)
    atoms.set_cell([8.0, 8.0, 5.0])
    with pytest.raises(ValueError, match="does not fit into a cell of 8 Å"):
        simulate(atoms)

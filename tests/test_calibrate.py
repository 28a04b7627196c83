"""From files to an experiment that runs: on real data, and on simulated ones with the truth."""

import json
import pathlib
import re

import jax
import numpy as np
import pytest

import smpr3d_jax as sj
from smpr3d_jax.app import calibration_page, workflow
from smpr3d_jax.app.calibrate import calibrate
from smpr3d_jax.app.experiment import load
from smpr3d_jax.data.counts import InputError
from smpr3d_jax.data.readers import read

from . import scenes, tiny
from .helpers import shared_data


SERIES = [f"scan_{i}.h5" for i in range(4)]
DEFOCI = np.array([-150.0, 0.0, 100.0, 250.0])


def away(angle, expected):
    """Difference of two directions in degrees."""
    return abs((angle - expected + 180) % 360 - 180)


def test_the_real_scan_from_its_nominal_settings(tmp_path):
    scan, file = shared_data("defocused_probe_300kV", "scan.h5"), tmp_path / "new.yaml"
    options = ("--energy", "300e3", "--semiangle", "1.03", "--scan-step", "31.25")
    answer = tiny.smpr3d("calibrate", scan, *options, "-o", file)
    assert answer.exit_code == 0, answer.output
    found = load(file)
    # What its README states: 13.5 µm underfocus, and -126° or 126° by the sense of rotation; a fit
    # of bright-field shifts gave 121° there.
    assert found.scans[0].defocus == pytest.approx(135e3, rel=0.05)
    assert away(found.geometry.rotation_deg, 121) < 3 and not found.geometry.transpose
    pattern = np.asarray(read(scan).read().dense()).mean(0, dtype=float)
    bright = pattern > pattern[55:70, 55:70].mean() / 2
    assert found.geometry.center is not None
    for center, index in zip(found.geometry.center, np.nonzero(bright), strict=True):
        assert center == pytest.approx(index.mean(), abs=0.3)
    assert workflow.prepare(found).sources
    page = (tmp_path / "new_calibration.html").read_text(encoding="utf-8")
    assert page.count("data:image/png") == 5 and "nominal semi-angle" in page
    # Whole numbers, but an electron lights up several pixels: nothing is divided.
    assert found.preprocess.counts_per_electron is None and "in several pixels" in answer.output
    assert "counts/Å² a scan; about" in answer.output and found.method.loss == "poisson"


@pytest.fixture(scope="module")
def nanotubes():
    files = [shared_data("nanotubes_series", name) for name in SERIES]
    return calibrate(files, energy=80e3, semiangle=25, scan_step=0.4, defoci=DEFOCI.tolist())


def test_a_series_with_its_truth(nanotubes, tmp_path):
    """Where z = 0 lies the data do not say: the nominal defoci do."""
    np.testing.assert_allclose(nanotubes.defoci, DEFOCI, atol=10)
    geometry = nanotubes.experiment.geometry
    assert away(geometry.rotation_deg, 0) < 0.5 and not geometry.transpose
    np.testing.assert_allclose(geometry.center, 25, atol=0.05)
    assert nanotubes.aberrations.get("C12", 0.0) < 1
    # The curl alone says the same, within its error.
    surest = min(nanotubes.orientations, key=lambda found: found.sigma)
    assert abs(np.sin(surest.rotation)) < 4 * surest.sigma and not surest.transpose
    # In the phase from the centre of mass matter is bright.
    phase = calibration_page.deflection_phase(nanotubes, 1)
    dark = nanotubes.signals[1].dark
    assert np.corrcoef(phase.ravel(), dark.ravel())[0, 1] > 0.4
    calibration_page.write(nanotubes, tmp_path / "series.yaml")
    prepared = workflow.prepare(load(tmp_path / "series.yaml"))
    assert [round(scan.defocus or 0) for scan in prepared.experiment.scans] == [
        round(f) for f in nanotubes.defoci
    ]


ORIENTATIONS = [(turns, transpose) for transpose in (False, True) for turns in range(4)]


@pytest.mark.slow
@pytest.mark.parametrize(("turns", "transpose"), ORIENTATIONS)
def test_all_orientations_of_the_detector(turns, transpose, tmp_path):
    """Frames of two scans turned and flipped: what a camera mounted otherwise would record.

    Transposing the frames exchanges the detector's axes: the same positions are then those of
    a raster with its axes exchanged, and turning the frames turns the raster the other way.
    """
    files = []
    for name in ("scan_0.h5", "scan_3.h5"):
        source = read(shared_data("nanotubes_series", name))
        frames = np.asarray(source.read().dense(np.uint8)).reshape(40, 40, 50, 50)[..., 1:, 1:]
        frames = np.swapaxes(frames, 2, 3) if transpose else frames
        frames = np.rot90(frames, turns, axes=(2, 3))
        files.append(tmp_path / f"{name}.npy")
        np.save(files[-1], frames)
    found = calibrate(files, energy=80e3, semiangle=25, scan_step=0.4).experiment
    # np.rot90 turns from the second axis (x) to the first (y) counter-clockwise as displayed:
    # a vector (y, x) becomes (-x, y).
    matrix = np.linalg.matrix_power(np.array([[0, -1], [1, 0]]), turns)
    matrix = matrix[:, ::-1] if transpose else matrix
    turn = matrix[:, ::-1] if found.geometry.transpose else matrix
    assert np.linalg.det(turn) > 0, "the transposition is right if a rotation is left"
    assert away(found.geometry.rotation_deg, np.degrees(np.arctan2(turn[0, 1], turn[0, 0]))) < 0.5
    defoci = [scan.defocus or 0.0 for scan in found.scans]
    assert defoci[1] - defoci[0] == pytest.approx(400, abs=20)
    assert np.mean(defoci) == pytest.approx(50 - 61, abs=20)


@pytest.mark.slow
@pytest.mark.parametrize("data", ["nanotubes_events", "nanotubes_misaligned"])
def test_events_and_a_misaligned_microscope(data):
    files = [shared_data(data, name) for name in SERIES]
    found = calibrate(files, energy=80e3, semiangle=25, scan_step=0.4, order=2)
    true = DEFOCI if data == "nanotubes_events" else np.array([-150.0, 14.0, 88.0, 268.0])
    defoci = np.array(found.defoci)
    np.testing.assert_allclose(defoci - defoci.mean(), true - true.mean(), atol=10)
    assert away(found.experiment.geometry.rotation_deg, 0) < 1.5
    if data == "nanotubes_misaligned":
        assert found.aberrations["C12"] == pytest.approx(30, abs=5)
        assert found.aberrations["phi12"] == pytest.approx(np.pi / 2 - 0.6, abs=0.1)
        assert found.aberrations["C21"] == pytest.approx(300, abs=100)


STEP, GAIN, SPACING = 0.93, 12.5, 3.0


@pytest.fixture(scope="module")
def crystal():
    """Counts (30, 34, ky, kx) of a crystal with something else on it, at 6000 electrons a frame."""
    y, x = np.indices(scenes.CELL.shape) * np.reshape(scenes.CELL.sampling, (2, 1, 1))
    planes = np.cos(2 * np.pi * y / SPACING) + np.cos(2 * np.pi * x / SPACING)
    phase = 0.15 * planes + scenes.waves(0.25, 0.08)
    optics = sj.focal_series(scenes.ENERGY, scenes.SEMIANGLE, defocus=[50.0])
    data = scenes.scanned(
        scenes.slices([phase]), optics, (30, 34), sj.raster((30, 34), (STEP, STEP), 0.5), (40, 44),
        6000.0, jax.random.key(0),
    )  # fmt: skip
    frames = np.asarray(data.counts.dense())
    return np.fft.fftshift(frames, axes=(1, 2)).reshape(30, 34, 40, 44)


def calibrated(folder, *options):
    """The answer of `calibrate` for one file with what is known of the crystal's scan."""
    known = ("--energy", scenes.ENERGY, "--semiangle", scenes.SEMIANGLE, "--defocus", 50)
    file = folder / "new.yaml"
    return tiny.smpr3d("calibrate", folder / "scan.npy", *known, *options, "-o", file), file


def test_an_integrating_camera_and_a_known_lattice(crystal, tmp_path):
    """Neither the counts of an electron nor the scan step are given, and `run` takes the file."""
    noise = np.random.default_rng(0).normal(0, 0.6, crystal.shape)
    np.save(tmp_path / "scan.npy", (GAIN * crystal + noise).astype(np.float32))
    answer, file = calibrated(tmp_path, "--lattice", SPACING)
    assert answer.exit_code == 0, answer.output
    found = load(file)
    assert found.preprocess.counts_per_electron == pytest.approx(GAIN, rel=1e-3)
    assert found.geometry.scan_step == pytest.approx((STEP, STEP), rel=5e-3)
    assert away(found.geometry.rotation_deg, np.degrees(0.5)) < 2
    assert found.scans[0].defocus == pytest.approx(50, abs=15)
    prepared = workflow.prepare(found)
    data = workflow.load(prepared)
    frames = np.fft.fftshift(np.asarray(data.counts.dense()), axes=(1, 2))
    np.testing.assert_array_equal(frames, crystal.reshape(-1, 40, 44))
    page = (tmp_path / "new_calibration.html").read_text(encoding="utf-8")
    assert page.count("data:image/png") >= 5 and "Lattice" in page
    dose, area = crystal.sum((2, 3)).mean(), crystal.sum((2, 3)).mean() / STEP**2
    told = re.search(r"dose (\S+) ± \S+ electrons a frame, (\S+) ± \S+ electrons/Å²", answer.output)
    assert told and float(told[1]) == pytest.approx(dose, rel=1e-3)
    assert float(told[2]) == pytest.approx(area, rel=0.01)
    assert "counts per electron" in answer.output and "from the lattice" in answer.output
    assert "from the lattice" in file.read_text(encoding="utf-8")


def test_steps_and_counts_that_are_given(crystal, tmp_path):
    np.save(tmp_path / "scan.npy", crystal.astype(np.uint16))
    answer, file = calibrated(tmp_path, "--scan-step", STEP)
    assert answer.exit_code == 0, answer.output
    assert "counts are electrons" in answer.output
    assert "preprocess" not in file.read_text(encoding="utf-8")
    answer, file = calibrated(tmp_path, "--scan-step", 0.88, "--lattice", SPACING)
    assert answer.exit_code == 0 and "which is used, not the 0.88 Å given" in answer.output
    assert load(file).geometry.scan_step == pytest.approx((STEP, STEP), rel=5e-3)
    for options, message in (
        (("--scan-step", STEP, "--lattice", 4.1), r"--lattice\): No peak of a lattice of 4.1 Å"),
        (("--scan-step", STEP, "--counts-per-electron", 7), "make no whole electrons"),
        ((), "--scan-step or --lattice"),
    ):
        answer = calibrated(tmp_path, *options)[0]
        assert answer.exit_code == 2 and re.search(message, answer.output.replace("\n", " "))


def test_frames_whose_electrons_are_lost_in_noise(crystal, tmp_path):
    """The experiment compares amplitudes then, and runs."""
    noise = np.abs(np.random.default_rng(0).normal(0, 6, crystal.shape))
    np.save(tmp_path / "scan.npy", (GAIN * crystal + noise).astype(np.float32))
    answer, file = calibrated(tmp_path, "--scan-step", STEP)
    assert answer.exit_code == 0 and "what an electron is worth is not clear" in answer.output
    found = load(file)
    assert found.method.loss == "amplitude" and found.preprocess.counts_per_electron is None
    assert workflow.prepare(found).sources


def test_what_nobody_says_is_asked_for(tmp_path):
    np.save(tmp_path / "scan.npy", np.ones((4, 4, 8, 8), np.uint8))
    with pytest.raises(InputError, match=r"energy.*scan step.*semi-angle or the detector pixel"):
        calibrate([tmp_path / "scan.npy"])
    with pytest.raises(InputError, match="2 nominal defoci for 1 scans"):
        calibrate([tmp_path / "scan.npy"], defoci=[1.0, 2.0])
    answer = tiny.smpr3d("calibrate", tmp_path / "scan.npy", "-o", tmp_path / "no" / "new.yaml")
    assert answer.exit_code == 2 and "does not exist" in answer.output
    answer = tiny.smpr3d("calibrate", tmp_path / "none.npy", "-o", tmp_path / "new.yaml")
    assert answer.exit_code == 2 and not (tmp_path / "new.yaml").exists()


def test_the_file_and_the_nominal_angle_disagree(tmp_path):
    """The camera's calibration wins, and the note says how to have it the other way round."""
    scan = shared_data("defocused_probe_300kV", "scan.h5")
    found = calibrate([scan], energy=300e3, semiangle=1.03, detector_pixel=0.034, order=1)
    assert found.pixel == 0.034 and found.semiangle == pytest.approx(1.03, rel=0.01)
    assert not any("nominal semi-angle" in note for note in found.notes)
    assert json.dumps(found.content) and pathlib.Path(found.content["scans"][0]["file"])

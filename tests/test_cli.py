"""The commands: what they answer, what they leave, and what they refuse before they begin."""

import hashlib
import json
import re
import subprocess
import sys

import h5py
import jax.numpy as jnp
import numpy as np
import pytest
import tifffile

import smpr3d_jax as sj
from smpr3d_jax.app import cli, workflow
from smpr3d_jax.app.experiment import load
from smpr3d_jax.data.readers import write_emd, write_stempy
from smpr3d_jax.report import store

from . import tiny
from .tiny import smpr3d


METRICS = {
    "r_factor", "r_factor_held_out", "deviance_held_out", "r_factor_per_scan", "loss_history",
    "iterations", "seconds", "peak_memory_bytes", "gauge_plane_A",
}  # fmt: skip
DEPTHS = np.arange(-15.0, 56.0, 5.0)


def sections(path):
    """Planes, depths and the attributes of a volume."""
    volume = store.load(path, "sections")
    return volume["phase"], volume["z"], store.attributes(path, "sections/phase")


# --- run -----------------------------------------------------------------------------------------


def test_run_succeeds_and_prints_its_metrics(finished):
    answer, folder = finished
    assert answer.exit_code == 0, answer.output
    metrics = json.loads(answer.stdout)
    assert metrics == json.loads((folder / "metrics.json").read_text())
    assert set(metrics) >= METRICS
    assert metrics["iterations"] == len(metrics["loss_history"]) == 3
    assert len(metrics["r_factor_per_scan"]) == 3
    assert metrics["loss_history"][-1] < metrics["loss_history"][0]
    assert 0 < metrics["r_factor"] < 1 and 0 < metrics["r_factor_held_out"] < 1
    assert metrics["deviance_held_out"] > 0 and metrics["seconds"] > 0
    assert metrics["peak_memory_bytes"] > 2**20
    assert {p.name for p in folder.iterdir()} == {
        "result.h5", "metrics.json", "sections.tif", "report.html",
    }  # fmt: skip
    assert "3/3" in answer.stderr and "report.html" in answer.stderr


def test_result_holds_sections_and_what_made_them(finished, experiment_file):
    path = finished[1] / "result.h5"
    phase, z, about = sections(path)
    np.testing.assert_allclose(z, DEPTHS)
    assert phase.dtype == np.float32 and phase.shape[0] == len(z)
    assert phase.shape[1] < phase.shape[2]  # 3 rows, 6 columns
    assert np.isfinite(phase).all() and phase.std() > 1e-3
    wavelength = sj.wavelength(80e3)
    window = wavelength / 4.175716e-3
    assert about["pixel_size_A"] == pytest.approx(window / 24, rel=1e-6)
    assert about["units"] == "rad" and about["mode"] == "confocal"
    # The window reaches beyond the first position by half its length and a pixel or two.
    assert all(-window / 2 - 2 < o < -window / 2 for o in about["origin_A"])
    tree = store.load(path)
    specimen, provenance = tree["specimen"], tree["provenance"]
    assert specimen["waves"].shape == (45, *phase.shape[1:])
    assert specimen["waves"].dtype == np.complex64
    assert specimen["reference_plane_A"] == 20.0
    assert tree["optics"]["energy_ev"] == 80e3 and tree["optics"]["semiangle_mrad"] == 30.0
    np.testing.assert_allclose(tree["optics"]["aberrations_A"]["C10"], [80, -20, -120])
    assert tree["scan"]["positions_A"].shape == (54, 2)
    np.testing.assert_allclose(tree["scan"]["positions_A"][7], [0.5, 0.5])
    assert len(tree["scan"]["held_out"]) == 3
    assert provenance["seed"] == 0 and "iterations: 3" in provenance["config"]
    assert set(provenance["versions"]) >= {"smpr3d_jax", "jax", "numpy"}
    scan = experiment_file.parent / "scan_0.h5"
    digest = hashlib.sha256(scan.read_bytes()).hexdigest()
    assert provenance["inputs"][0] == {"file": str(scan), "sha256": digest}


def test_the_tiff_is_the_volume_with_its_spacings(finished):
    phase, _, about = sections(finished[1] / "result.h5")
    with tifffile.TiffFile(finished[1] / "sections.tif") as file:
        np.testing.assert_array_equal(file.asarray(), phase)
        known = file.imagej_metadata
        assert known is not None
        assert known["spacing"] == 5.0 and known["unit"] in ("angstrom", "Å")
        tags = file.pages[0].tags  # pyright: ignore[reportAttributeAccessIssue]
        many, one = tags["XResolution"].value
    assert one / many == pytest.approx(about["pixel_size_A"], rel=1e-4)


def test_the_report_needs_no_other_file(finished):
    page = (finished[1] / "report.html").read_text(encoding="utf-8")
    assert "two layers" in page and "held out" in page and "semiangle_mrad" in page
    assert not re.search(r"""(src|href)\s*=\s*(?!["']?(data:|#))""", page)
    assert not re.search(r"@import|url\((?!['\"]?data:)|fetch\(", page)
    assert 'type="range"' in page


def test_same_seed_same_result_and_quiet_says_nothing(finished, experiment_file, tmp_path):
    words = ("run", experiment_file, *tiny.FEW, "--quiet", "--seed", 0)
    again = smpr3d(*words, "-o", tmp_path)
    assert (again.exit_code, again.output) == (0, "")
    first, same = (store.load(folder / "result.h5") for folder in (finished[1], tmp_path))
    np.testing.assert_array_equal(same["sections"]["phase"], first["sections"]["phase"])
    np.testing.assert_array_equal(same["scan"]["held_out"], first["scan"]["held_out"])


def test_the_process_ends_with_the_exit_status(tmp_path):
    code = "from smpr3d_jax.app.cli import main; main()"
    command = [sys.executable, "-c", code, "run", str(tmp_path / "nowhere.yaml"), "-o"]
    done = subprocess.run([*command, str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == "" and "nowhere.yaml: no such experiment file" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_interrupted_command_says_so_by_its_status(monkeypatch, experiment_file, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(workflow, "fit", interrupt)
    assert smpr3d("run", experiment_file, "-o", tmp_path / "out", "--quiet").exit_code == 130
    assert not (tmp_path / "out").exists()


# --- refinement -----------------------------------------------------------------------------------


REFINE = {
    "refine": ["positions", "defocus", "C12", "camera_length"],
    "refinement.first": 2, "refinement.every": 1, "refinement.optics_every": 1,
    "method.iterations": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def refined(experiment_file, tmp_path_factory):
    """What a run that refines the microscope answers, and its folder."""
    folder = tmp_path_factory.mktemp("refined")
    tree = tiny.content(experiment_file) | {"refinement": {}}
    file = tiny.write(folder, tiny.changed(tree, REFINE))
    return smpr3d("run", file, "-o", folder / "out", "--json"), folder / "out"


def test_what_is_refined_is_in_metrics_result_and_report(refined):
    answer, folder = refined
    assert answer.exit_code == 0, answer.output
    metrics = json.loads(answer.stdout)
    found = metrics["refined"]
    assert set(found) == {"defocus", "C12a", "C12b", "camera_length"}
    assert len(found["defocus"]) == 3 and np.mean(found["defocus"]) == pytest.approx(20, abs=1e-4)
    assert metrics["noise_deviance"] > 0 and metrics["noise_deviance_held_out"] > 0
    tree = store.load(folder / "result.h5")
    parts = tree["refined"]
    assert set(parts) == {"positions", *found}
    assert parts["positions"]["value"].shape == (54, 2)
    assert parts["positions"]["path"].shape == (1, 54, 2)
    assert parts["defocus"]["path"].shape == (4, 3) and parts["C12a"]["path"].shape == (4,)
    assert parts["defocus"]["unit"] == "Å" and "mean" in parts["defocus"]["held"]
    # Nothing moves in the first iteration; the last is what was kept.
    np.testing.assert_allclose(parts["defocus"]["path"][0], [-80, 20, 120], atol=1e-4)
    np.testing.assert_allclose(parts["defocus"]["path"][-1], found["defocus"], atol=1e-4)
    assert np.abs(parts["defocus"]["path"][-1] - [-80, 20, 120]).max() > 0.1
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "camera_length" in page and "C12a" in page and "noise allows" in page


def test_the_result_holds_the_microscope_that_was_found(refined, finished):
    tree, before = (store.load(folder / "result.h5") for folder in (refined[1], finished[1]))
    found = tree["refined"]
    c10, c12a = (tree["optics"]["aberrations_A"][name] for name in ("C10", "C12a"))
    np.testing.assert_allclose(-c10, found["defocus"]["value"], atol=1e-4)
    np.testing.assert_allclose(c12a, np.full(3, found["C12a"]["value"]), atol=1e-5)
    moved = tree["scan"]["positions_A"] - before["scan"]["positions_A"]
    np.testing.assert_allclose(moved, found["positions"]["value"], atol=1e-5)
    np.testing.assert_allclose(moved.mean(axis=0), 0, atol=1e-5)
    # Held-out frames are followed too.
    assert np.abs(moved[tree["scan"]["held_out"]]).max() > 1e-3
    # Pixels of the sections are those of the camera length that was found.
    ratio = 1 + found["camera_length"]["value"]
    sizes = [store.attributes(f / "result.h5", "sections/phase")["pixel_size_A"]
             for f in (finished[1], refined[1])]  # fmt: skip
    assert sizes[0] / sizes[1] == pytest.approx(ratio, rel=1e-5)
    assert abs(ratio - 1) > 1e-6


def test_without_refine_nothing_is(finished):
    metrics, tree = json.loads(finished[0].stdout), store.load(finished[1] / "result.h5")
    assert metrics["refined"] == {} and not tree.get("refined")
    page = (finished[1] / "report.html").read_text(encoding="utf-8")
    assert "noise allows" in page and "C12a" not in page


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["position"], "refine.*'position' cannot be refined.*did you mean 'positions'"),
        (["positions", "C12", "positions"], "refine.*names 'positions' twice"),
        (["tilt"], "tilt cannot be refined with an S-matrix"),
    ],
)
def test_what_cannot_be_refined_is_refused(experiment_file, tmp_path, names, message):
    tree = tiny.changed(tiny.content(experiment_file), {"refine": names})
    answer = smpr3d("run", tiny.write(tmp_path, tree), "-o", tmp_path / "out", "--quiet")
    assert answer.exit_code == 2, answer.output
    assert re.search(message, answer.stderr.replace("\n", " "))
    assert not (tmp_path / "out").exists()


# --- section -------------------------------------------------------------------------------------


def test_confocal_sections_made_later_are_those_of_the_run(finished, tmp_path):
    result, out = finished[1] / "result.h5", tmp_path / "again.h5"
    before = result.read_bytes()
    answer = smpr3d("section", result, "--from", -15, "--to", 55, "--step", 5, "-o", out)
    assert answer.exit_code == 0, answer.output
    (phase, z, about), (first, depths, facts) = sections(out), sections(result)
    np.testing.assert_array_equal(z, depths)
    np.testing.assert_allclose(phase, first, atol=2e-6)
    assert about == facts
    with tifffile.TiffFile(tmp_path / "again.tif") as file:
        assert file.asarray().shape == phase.shape
    assert result.read_bytes() == before


@pytest.mark.parametrize(
    "mode, options, units",
    [
        ("tilt_mean", ("--collector", 40), "rad"),
        ("scem", (), "1"),
        ("bright_field", ("--outer", 10), "fraction of the beam"),
        ("annular", ("--inner", 33, "--outer", 44), "fraction of the beam"),
    ],
)
def test_every_mode_comes_from_the_result(finished, tmp_path, mode, options, units):
    words = ("--from", 5, "--to", 36, "--step", 30, "--mode", mode, *options)
    answer = smpr3d("section", finished[1] / "result.h5", *words, "-o", tmp_path / "s.h5")
    assert answer.exit_code == 0, answer.output
    images, z, about = sections(tmp_path / "s.h5")
    _, _, facts = sections(finished[1] / "result.h5")
    np.testing.assert_array_equal(z, [5, 35])
    assert (about["mode"], about["units"]) == (mode, units)
    assert about["pixel_size_A"] == facts["pixel_size_A"]
    assert np.isfinite(images).all() and images.std() > 0
    if units == "fraction of the beam":
        # Only where whole windows fit: the scanned area, begun about half a window later.
        assert images.min() > 0 and images.max() < 1
        assert all(-2.0 < o < 0.5 for o in about["origin_A"])
        shift = np.subtract(about["origin_A"], facts["origin_A"]) / facts["pixel_size_A"]
        np.testing.assert_allclose(shift, 12, atol=1e-4)
    else:
        np.testing.assert_allclose(about["origin_A"], facts["origin_A"])


@pytest.mark.parametrize(
    "options, message",
    [
        (("--mode", "confokal"), "sections.mode = confokal: must be one of.*'confocal'"),
        (("--step", 0), "sections.step = 0.*greater than 0"),
        (("--from", 60), "sections.stop = 55.*lies above start = 60"),
        (("--inner", 30), "inner_mrad = 30.*no meaning with mode 'confocal'"),
        (("-o", "s.tif"), r"-o s\.tif: name an HDF5 file other than"),
    ],
)
def test_impossible_sections_are_refused(finished, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    usual = {"--from": -15, "--to": 55, "--step": 5, "-o": "s.h5"}
    usual |= dict([options])
    words = [word for pair in usual.items() for word in pair]
    answer = smpr3d("section", finished[1] / "result.h5", *words)
    assert answer.exit_code == 2, answer.output
    assert re.search(message, answer.stderr)
    assert list(tmp_path.iterdir()) == []


def test_sections_need_a_result_and_leave_it_alone(finished, experiment_file, tmp_path):
    planes = ("--from", 0, "--to", 10, "--step", 5)
    result = finished[1] / "result.h5"
    scan = experiment_file.parent / "scan_0.h5"
    for file, out, message in (
        (tmp_path / "no.h5", tmp_path / "s.h5", "There is no file"),
        (scan, tmp_path / "s.h5", "a result.h5 written by `smpr3d run` is needed"),
        (result, result, "name an HDF5 file other than"),
        (result, tmp_path / "no" / "s.h5", "does not exist"),
    ):
        answer = smpr3d("section", file, *planes, "-o", out)
        assert answer.exit_code == 2, answer.output
        assert message in answer.stderr
    assert list(tmp_path.iterdir()) == []


# --- info, simulate, template ---------------------------------------------------------------------


def test_info_describes_frames(experiment_file, series):
    path = experiment_file.parent / "scan_1.h5"
    answer = smpr3d("info", path, "--json")
    assert answer.exit_code == 0
    known = json.loads(answer.stdout)
    assert known["format"] == "emd" and known["kind"] == "dense"
    assert known["scan_shape"] == [3, 6] and known["frame_shape"] == [24, 24]
    assert known["total_counts"] == series.frames[1].sum()
    assert known["facts"]["energy_ev"] == 80e3
    words = smpr3d("info", path)
    assert "scan shape: 3, 6" in words.stdout and "electrons per frame" in words.stdout


def test_info_describes_events_and_stacks(series, tmp_path):
    frames = series.frames[0].reshape(-1, 24, 24)
    events = sj.events_from_frames(sj.Frames(jnp.asarray(frames)))
    write_stempy(tmp_path / "events.h5", events, tiny.SCAN)
    known = json.loads(smpr3d("info", tmp_path / "events.h5", "--json").stdout)
    assert (known["format"], known["kind"]) == ("stempy", "events")
    assert known["total_counts"] == frames.sum() and known["scan_shape"] == [3, 6]
    np.save(tmp_path / "stack.npy", frames)
    refused = smpr3d("info", tmp_path / "stack.npy")
    assert refused.exit_code == 2 and "give its `scan_shape`" in refused.stderr
    known = json.loads(
        smpr3d("info", tmp_path / "stack.npy", "--scan-shape", 3, 6, "--json").stdout
    )
    assert known["scan_shape"] == [3, 6]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("no.h5", None, "does not exist"),
        ("text.h5", b"hello world", "none of the known formats"),
        ("cut.h5", b"\x89HDF\r\n\x1a\n" + bytes(40), "cannot be read as HDF5"),
    ],
)
def test_info_refuses_what_is_no_data(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    answer = smpr3d("info", tmp_path / name)
    assert answer.exit_code == 2
    assert name in answer.stderr and message in answer.stderr


def test_simulate_writes_what_run_takes(tmp_path):
    tiny.specimen().write(tmp_path / "atoms.xyz")
    how = tiny.ACQUISITION
    foci = [word for value in how.defocus[:2] for word in ("--defocus", value)]
    answer = smpr3d(
        "simulate", "-o", tmp_path / "series", "--structure", tmp_path / "atoms.xyz", *foci,
        "--semiangle", 30, "--scan", 3, 4, "--step", 0.5, "--dose", 2e4, "--jitter", 0.1,
        "--aberration", "C12=20", "--aberration", "phi12=0.4", "--detector-angle", 40, "--seed", 4,
    )  # fmt: skip
    assert answer.exit_code == 0, answer.output
    file = tmp_path / "series" / "experiment.yaml"
    assert str(file) in answer.stderr
    experiment = load(file)
    assert experiment.beam.aberrations == {"C12": 20.0, "phi12": 0.4}
    assert experiment.title == "atoms, simulated"
    with h5py.File(tmp_path / "series" / "truth.h5") as truth:
        assert "slices_V_A" in truth
    words = ("--iterations", 1, "--seed", 7, "--quiet")
    run = smpr3d("run", file, "-o", tmp_path / "out", *words)
    assert run.exit_code == 0, run.output
    tree = store.load(tmp_path / "out" / "result.h5")
    assert len(tree["scan"]["series"]) == 24 and len(tree["history"]["loss"]) == 1
    assert tree["provenance"]["seed"] == 7


@pytest.mark.parametrize(
    "options, message",
    [
        (("--aberration", "C12"), "--aberration C12: write NAME=VALUE"),
        (("--aberration", "C13=5"), "C13"),
        (("--structure", "no.cif"), "no.cif: no such structure file"),
        (("--dose", -1), "dose.*must be positive"),
        (("--scan", 400, 4), "does not fit into"),
    ],
)
def test_impossible_simulations_are_refused(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    answer = smpr3d("simulate", "-o", "new", *options)
    assert answer.exit_code == 2, answer.output
    assert re.search(message, answer.stderr)
    assert list(tmp_path.iterdir()) == []


def test_the_template_is_an_experiment(tmp_path):
    answer = smpr3d("template")
    assert answer.exit_code == 0
    for name in ("scan_0.h5", "scan_1.h5"):
        (tmp_path / name).touch()
    (tmp_path / "experiment.yaml").write_text(answer.stdout, encoding="utf-8")
    assert len(load(tmp_path / "experiment.yaml").scans) == 2


@pytest.mark.parametrize(
    "command", ["demo", "run", "design", "info", "section", "simulate", "template"]
)
def test_every_command_explains_itself(command):
    answer = smpr3d(command, "--help")
    assert answer.exit_code == 0
    assert f"smpr3d {command}" in answer.stdout and "Example" in answer.stdout


# --- bad input ------------------------------------------------------------------------------------


def frames_of(series, scan=0):
    return series.frames[scan].copy()


def damaged(kind):
    """Writes a scan file with something wrong in it."""

    def write(path, frames):
        number = frames.astype(np.float32)
        if kind == "empty":
            frames[:] = 0
        elif kind in ("nan", "negative"):
            number[1, 2, 3, 4] = np.nan if kind == "nan" else -1
            return np.savez(path.with_suffix(".npz"), frames=number)
        elif kind == "scan":
            frames = frames[:2]
        elif kind == "frame":
            frames = frames[..., 1:-1, 1:-1]
        write_emd(path, frames, 0.5, 4.175716, 80e3)
        if kind == "truncated":
            whole = path.read_bytes()
            path.write_bytes(whole[: len(whole) // 2])
        elif kind == "energy":
            write_emd(path, frames, 0.5, 4.175716, 60e3)
        return None

    return write


def refused(tmp_path, tree, *options):
    """Run an experiment that cannot be run; nothing may be written. Returns the message."""
    file, out = tiny.write(tmp_path, tree), tmp_path / "out"
    answer = smpr3d("run", file, "-o", out, *options)
    assert answer.exit_code == 2, answer.output
    assert answer.stdout == "" and "Traceback" not in answer.stderr
    assert not out.exists()
    return answer.stderr


@pytest.fixture
def no_long_work(monkeypatch):
    """Fails the test if the reconstruction begins."""

    def begun(*_):
        raise AssertionError("the long computation was begun")

    monkeypatch.setattr(workflow, "fit", begun)


BEAMS = {"method.representation": "beams"}
UNIT_SLIPS = [
    ({"beam.semiangle_mrad": 0.03}, "beam.semiangle_mrad = 0.03.*did you write rad. That is 30 mr"),
    ({"beam.energy_ev": 80}, "beam.energy_ev = 80.*did you write kV. That is 80000 eV"),
    ({"geometry.detector_pixel_mrad": 0.0042}, "detector_pixel_mrad = 0.0042.*write rad"),
    ({"scans.0.defocus": -8e-9}, r"scans\[0\].defocus = -8e-09.*did you write m. That is -80 Å"),
]
KEYS = [
    ({"scans.1.file": "scan_7.h5"}, r"scans\[1\].file = scan_7.h5: no such file"),
    ({"scans.1.defocs": 3}, r"scans\[1\].defocs = 3: unknown key; nearest valid key 'defocus'"),
    ({"beam.energy_kev": 80}, "beam.energy_kev.*nearest valid key 'energy_ev'"),
    ({"object": {"slices": 3}}, "object: belongs to multislice and singleslice, not to smatrix"),
    ({"scans.2.defocus": None}, r"scans\[2\].defocus: missing.*0 if in focus"),
    ({"method.iterations": 0}, "method.iterations = 0"),
]
PHYSICS = [
    (
        {**BEAMS, "scans.0.defocus": -30, "scans.2.defocus": 70},
        r"scans.defocus: the defoci are too close to determine S.*over 100 Å.*record at least 3",
    ),
    (
        {**BEAMS, "scans.2": None},
        r"scans.defocus: 'beams' needs 3 different foci.*record at least 3 foci.*over \d+ Å",
    ),
    (
        {**BEAMS, "geometry.scan_step": 0.8},
        r"geometry.scan_step: a step of 0.8 Å is above the limit of 'beams'.*0.696 Å.*scan finer",
    ),
    (
        {"geometry.scan_step": 5.0},
        r"geometry.scan_step: with a step of 5 Å there are.*5 are needed: a step of at most",
    ),
    (
        {"scans.2.defocus": 400},
        r"scans.defocus: the window behind a frame.*10 Å.*defocus 400 Å.*needs.*Bin the detector",
    ),
    (
        {"beam.semiangle_mrad": 45},
        r"geometry.detector_pixel_mrad: the detector reaches.*bright-field disc.*45 mrad",
    ),
]


@pytest.mark.parametrize("changes, message", UNIT_SLIPS + KEYS + PHYSICS)
def test_wrong_experiments_are_refused(experiment_file, tmp_path, no_long_work, changes, message):
    told = refused(tmp_path, tiny.changed(tiny.content(experiment_file), changes))
    assert re.search(message, told, re.DOTALL), told
    assert "experiment.yaml:" in told


@pytest.mark.parametrize(
    "kind, message",
    [
        ("truncated", "cannot be read as HDF5.*cut short or damaged: copy it again"),
        ("empty", "18 of 18 frames have no counts at all"),
        ("nan", r"1 of 18 frames have pixels that are not a number.*frame 8 .scan position 1, 2"),
        ("negative", "1 of 18 frames have negative counts.*Undo the subtraction"),
        ("scan", r"scan_shape is \(2, 6\), but that of .*scan_0.h5 is \(3, 6\)"),
        ("frame", r"frame_shape is \(22, 22\), but that of .*scan_0.h5 is \(24, 24\)"),
        ("energy", r"energy_ev is 60000.*in .*scan_0.h5 it is 80000"),
    ],
)
def test_wrong_data_are_refused(experiment_file, series, tmp_path, no_long_work, kind, message):
    path = tmp_path / "scan_1.h5"
    damaged(kind)(path, frames_of(series, 1))
    path = next(tmp_path.iterdir())
    told = refused(
        tmp_path, tiny.changed(tiny.content(experiment_file), {"scans.1.file": str(path)})
    )
    assert re.search(f"{re.escape(path.name)}.*{message}", told, re.DOTALL), told


def test_an_empty_frame_among_full_ones_is_refused_unless_accepted(
    experiment_file, series, tmp_path
):
    frames = frames_of(series)
    frames[2, 1] = 0
    write_emd(tmp_path / "gap.h5", frames, 0.5, 4.175716, 80e3)
    changes = {"scans.0.file": str(tmp_path / "gap.h5")}
    tree = tiny.changed(tiny.content(experiment_file), changes)
    said = "1 of 18 frames have no counts at all, the first is frame 13"
    assert said in refused(tmp_path, tree)
    file = tiny.write(tmp_path, tree | {"accept_implausible": True})
    assert any(f"gap.h5: {said}" in note for note in workflow.prepare(load(file)).notes)


def test_a_scan_of_one_position_has_none_to_hold_out(experiment_file, series, tmp_path):
    tree = tiny.content(experiment_file)
    for i, scan in enumerate(tree["scans"]):
        write_emd(tmp_path / f"{i}.h5", series.frames[i][:1, :1], 0.5, 4.175716, 80e3)
        scan["file"] = str(tmp_path / f"{i}.h5")
    assert "held-out fraction" in refused(tmp_path, tree)


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_output_that_cannot_be_written_is_refused(experiment_file, tmp_path, no_long_work, place):
    (tmp_path / "file").write_text("mine")
    for words in (("run", experiment_file), ("demo",), ("simulate",)):
        answer = smpr3d(*words, "-o", tmp_path / place)
        assert answer.exit_code == 2, answer.output
        assert str(tmp_path / place) in answer.stderr and "choose another" in answer.stderr
    assert (tmp_path / "file").read_text() == "mine"


def test_a_refused_run_leaves_older_results_alone(experiment_file, tmp_path, no_long_work):
    for name in ("result.h5", "metrics.json"):
        (tmp_path / name).write_text("precious")
    tree = tiny.changed(tiny.content(experiment_file), {"beam.energy_ev": 80})
    (tmp_path / "bad").mkdir()
    answer = smpr3d("run", tiny.write(tmp_path / "bad", tree), "-o", tmp_path)
    assert answer.exit_code == 2
    assert (tmp_path / "result.h5").read_text() == "precious"
    assert {p.name for p in tmp_path.iterdir()} == {"bad", "result.h5", "metrics.json"}


def test_a_failing_run_leaves_older_results_alone(experiment_file, tmp_path, monkeypatch):
    (tmp_path / "result.h5").write_text("precious")

    def fail(*_):
        raise cli.InputError("no such luck")

    monkeypatch.setattr(workflow, "fit", fail)
    answer = smpr3d("run", experiment_file, "-o", tmp_path)
    assert answer.exit_code == 2 and "no such luck" in answer.stderr
    assert (tmp_path / "result.h5").read_text() == "precious"

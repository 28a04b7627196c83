"""`smpr3d design`, and what `info` and `run` say of a series before anything is computed."""

import json

import numpy as np
import pytest

from smpr3d_jax.app import workflow
from smpr3d_jax.app.experiment import from_mapping, load, section_depths
from smpr3d_jax.data.readers import survey, write_emd
from smpr3d_jax.inverse import planning, sampling, transfer

from . import tiny
from .helpers import shared_data
from .tiny import smpr3d


LENS = ("--energy", 300e3, "--cc", 1.2, "--energy-spread", 0.4, "--c5", 5)


def designed(*words):
    """The numbers of a design."""
    answer = smpr3d("design", *words, "--json")
    assert answer.exit_code == 0, answer.output
    return json.loads(answer.stdout)


# --- design --------------------------------------------------------------------------------------


def test_every_limit_is_named_and_one_binds():
    found = designed(*LENS, "--thickness", 200, "--detector", 96, 128, "--source", 0.1)
    angles = {limit["name"]: limit["semiangle"] for limit in found["limits"]}
    assert angles["C5"] == pytest.approx(1e3 * (24 * 0.019687 / 5e7) ** (1 / 6), rel=1e-4)
    assert angles["chromatic"] == pytest.approx(1e3 * (2 * 0.019687 / 19.63) ** 0.5, rel=1e-3)
    assert set(angles) == {
        "C5", "C5, strict", "chromatic", "chromatic, strict", "source", "detector pixels",
        "tilt modes", "projection",
    }  # fmt: skip
    assert found["binding"] == "source"
    assert found["plan"]["semiangle"] == planning.significant_below(angles["source"])
    assert found["focal_spread_A"] == pytest.approx(8.336, rel=1e-3)
    # At an eighth of the sixth power of the limit, an eighth of its quarter wave.
    share = (found["plan"]["semiangle"] / angles["C5"]) ** 6
    assert found["wave_aberration"] == pytest.approx(share / 4, rel=1e-3)


@pytest.mark.parametrize(
    "words, binding, angle",
    [
        (("--energy", 200e3, "--c3", 1.2), "C3", 9.5),
        (("--energy", 200e3, "--c5", 5), "C5", 47),
        (("--energy", 80e3, "--cc", 1.2, "--energy-spread", 0.4), "chromatic", 36),
        (("--energy", 200e3, "--aberration", "C12=20", "--aberration", "phi12=1"), "C12", 17),
        (("--energy", 80e3, "--detector", 64, 49, "--detector-pixel", 1), "detector", 19),
    ],
)
def test_the_optimum_is_where_the_first_limit_is_met(words, binding, angle):
    found = designed(*words)
    assert found["binding"] == binding
    assert found["plan"]["semiangle"] == angle


def test_the_table_says_what_the_numbers_say():
    words = (*LENS, "--thickness", 200, "--semiangle", 25, "--dose", 2e4, "--dwell", 1e-4)
    answer = smpr3d("design", *words, "--detector", 576, 576)
    assert answer.exit_code == 0, answer.output
    found = designed(*words, "--detector", 576, 576)
    for text in (
        "chromatic", "binds", "55.8 Å", "576 x 576", f"binned by {found['plan']['binning']}",
        "beam current", f"{found['plan']['current']:.3g} pA", "uint16", "events", "λ/2α",
        "least dose", f"{found['plan']['frames']:,}", "width of a layer",
    ):  # fmt: skip
        assert text in answer.stdout, text
    assert "error" not in answer.stdout and "warning" not in answer.stdout


def test_depth_resolution_is_that_of_the_closed_forms():
    found = designed("--energy", 80e3, "--semiangle", 25)
    rows = found["depth_resolution"]
    periods = np.array([row["lateral_A"] for row in rows])
    assert np.all(np.diff(periods) > 0)
    widths = transfer.depth_width(1 / periods, 25.0, 80e3, collector=found["plan"]["reach"])
    np.testing.assert_allclose([row["sections_A"] for row in rows], widths)
    # coarse detail: a layer looks as thick as the cone makes it
    assert rows[-1]["sections_A"] == pytest.approx(0.7051 * periods[-1] / 0.025, rel=0.02)
    # beyond 2 alpha/lambda tcBF has none, and JSON no infinity
    assert rows[0]["period_tcbf_A"] is None or rows[0]["period_tcbf_A"] > rows[0]["period_A"]


def test_a_given_angle_is_judged():
    words = (*LENS, "--semiangle", 60, "--source", 0.3)
    found = designed(*words)
    assert found["plan"]["semiangle"] == 60
    assert {f["key"] for f in found["findings"]} == {"beam.semiangle_mrad", "beam.source_size_A"}
    answer = smpr3d("design", *words)
    assert "beyond the limit" in answer.stdout
    assert "warning: beam.semiangle_mrad: the focal spread" in answer.stdout


@pytest.mark.parametrize("representation, scans", [("modes", 3), ("beams", 3), ("modes", 1)])
def test_the_template_is_valid_once_the_data_are_there(tmp_path, representation, scans):
    """`run` would take a recorded series of that plan, without a word."""
    folder = tmp_path / "new"
    words = ("--energy", 80e3, "--semiangle", 25, "--thickness", 90, "--dose", 1e5)
    words += ("--representation", representation, "--scans", scans, "--field", 17, 18, "-o", folder)
    answer = smpr3d("design", *words)
    assert answer.exit_code == 0, answer.output
    assert {p.name for p in folder.iterdir()} == {"experiment.yaml", "design.png", "design.json"}
    assert all(name in answer.stderr for name in ("experiment.yaml", "design.png"))
    plan = json.loads((folder / "design.json").read_text())["plan"]
    text = (folder / "experiment.yaml").read_text()
    assert text.startswith("# Planned by smpr3d design") and "entrance surface" in text
    refused = smpr3d("run", folder / "experiment.yaml", "-o", tmp_path / "out")
    assert refused.exit_code == 2 and "no such file" in refused.stderr
    frames = np.ones((*plan["scan_shape"], *plan["detector_shape"]), np.uint8)
    frames *= round(plan["electrons_per_frame"] / frames[0, 0].size)
    for i in range(scans):
        write_emd(folder / f"scan_{i}.h5", frames, plan["scan_step"], plan["detector_pixel"], 80e3)
    experiment = load(folder / "experiment.yaml")
    assert [scan.defocus for scan in experiment.scans] == plan["defoci"]
    prepared = workflow.prepare(experiment)
    assert not [note for note in prepared.notes if "step" in note or "window" in note], prepared
    depths = section_depths(experiment)
    assert depths[0] <= plan["depth_range"][0] < plan["depth_range"][1] <= depths[-1]
    assert experiment.geometry.detector_pixel_mrad == pytest.approx(plan["detector_pixel"])


def test_an_experiment_file_is_not_overwritten(tmp_path):
    words = ("design", "--energy", 80e3, "--semiangle", 25, "-o", tmp_path)
    assert smpr3d(*words).exit_code == 0
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    answer = smpr3d(*words, "--thickness", 50)
    assert answer.exit_code == 2 and "exists; choose another folder" in answer.stderr
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    "words, message",
    [
        (("--energy", 300), "did you write kV"),
        (("--energy", 300e3), "what limits the aperture is not known"),
        (("--energy", 300e3, "--semiangle", 0.02), "did you write rad"),
        (("--energy", 300e3, "--cc", 1.2), "only together"),
        (("--energy", 300e3, "--c3", 1, "--c5", 1), "give c3 of a lens without corrector"),
        (("--energy", 300e3, "--c5", -1), "`c5` = -1e+07 Å"),
        (("--energy", 300e3, "--semiangle", 20, "--aberration", "C13=2"), "unknown key"),
        (("--energy", 300e3, "--semiangle", 20, "--dose", 0), "`dose` = 0"),
        (("--energy", 300e3, "--semiangle", 20, "--representation", "x"), "'modes' or 'beams'"),
        (("--energy", 300e3, "--thickness", 90, "--detector", 6, 6), "hold no window"),
        (("--energy", 300e3, "--semiangle", 20, "--step", 1e-5), "plausible"),
    ],
)
def test_impossible_designs_are_refused(tmp_path, words, message):
    answer = smpr3d("design", *words, "-o", tmp_path / "new")
    assert answer.exit_code == 2, answer.output
    assert message in answer.stderr
    assert list(tmp_path.iterdir()) == []


# --- info and run --------------------------------------------------------------------------------


def scans_of(experiment_file):
    return sorted(experiment_file.parent.glob("scan_*.h5"))


def test_info_says_which_numbers_are_missing(experiment_file):
    file = scans_of(experiment_file)[0]
    answer = smpr3d("info", file)
    assert answer.exit_code == 0
    for word in (
        "not judged",
        "beam.semiangle_mrad (--semiangle in mrad",
        "scans[0].defocus (--def",
    ):
        assert word in answer.stdout
    assert "--energy" not in answer.stdout.split("not judged")[1]
    known = json.loads(smpr3d("info", file, "--json").stdout)
    assert known["missing"] == ["beam.semiangle_mrad", "scans[0].defocus"]
    assert known["findings"] == [] and known["judged"] is False
    assert known["scan_shape"] == [3, 6]


def test_info_judges_a_series_as_run_does(experiment_file):
    files, how = scans_of(experiment_file), tiny.ACQUISITION
    foci = [word for value in how.defocus for word in ("--defocus", value)]
    known = json.loads(smpr3d("info", *files, *foci, "--semiangle", 30, "--json").stdout)
    assert known["judged"] and known["missing"] == []
    assert [one["scan_shape"] for one in known["files"]] == [[3, 6]] * 3
    tree = tiny.content(experiment_file)
    plain = {"beam": tree["beam"], "scans": tree["scans"]}
    assert sorted(f["message"] for f in known["findings"]) == sorted(
        finding.message for finding in findings_of_run(plain)
    )
    # What is given wins over what the file says, and the findings follow.
    coarse = json.loads(
        smpr3d("info", *files, *foci, "--semiangle", 30, "--scan-step", 20, "--json").stdout
    )
    assert [f["severity"] for f in coarse["findings"]].count("error") >= 1
    words = smpr3d("info", *files, *foci, "--semiangle", 30, "--scan-step", 20).stdout
    assert "error: geometry.scan_step: a step of 20 Å" in words


def findings_of_run(tree):
    """What `workflow` asks of the same files."""
    experiment = workflow.prepare(from_mapping(tree), check_frames=False)
    sources = experiment.sources
    electrons = [float(survey(source).electrons.mean()) for source in sources]
    return workflow.findings(experiment.experiment, sources, electrons)


def test_info_refuses_what_cannot_be_meant(experiment_file):
    files = scans_of(experiment_file)
    answer = smpr3d("info", *files, "--defocus", 5)
    assert answer.exit_code == 2 and "given 1 times for 3 files" in answer.stderr
    answer = smpr3d("info", files[0], "--semiangle", 0.03)
    assert answer.exit_code == 2 and "did you write rad" in answer.stderr


def test_info_says_why_files_make_no_series(experiment_file, tmp_path):
    write_emd(tmp_path / "other.h5", np.ones((3, 6, 20, 20), np.uint8), 0.5, 4.0, 80e3)
    answer = smpr3d("info", scans_of(experiment_file)[0], tmp_path / "other.h5")
    assert answer.exit_code == 0
    assert "cannot be judged" in answer.stdout and "frame_shape" in answer.stdout


def test_run_warns_of_too_few_electrons(experiment_file, tmp_path, series):
    """A hundredth of the electrons, in the same files otherwise."""
    tree = tiny.content(experiment_file)
    for i, frames in enumerate(series.frames):
        rng = np.random.default_rng(i)
        thinned = rng.binomial(frames, 0.01).astype(np.uint8)
        path = tmp_path / f"scan_{i}.h5"
        write_emd(path, thinned, 0.5, series.detector_pixel, 80e3)
        tree["scans"][i]["file"] = str(path)
    tree["accept_implausible"] = True
    notes = workflow.prepare(from_mapping(tree)).notes
    assert any("electrons per frame" in note and "4000" in note for note in notes), notes
    full = workflow.prepare(load(experiment_file)).notes
    assert not any("electrons per frame" in note for note in full)


def test_shared_series_have_electrons_enough():
    """The nanotubes at a twentieth of the dose are the least of them, and near the edge."""
    folder = shared_data("nanotubes_events")
    files = sorted(folder.glob("scan_*.h5"))
    foci = [word for value in (-150, 0, 100, 250) for word in ("--defocus", value)]
    facts = ("--energy", 80e3, "--semiangle", 25, "--scan-step", 0.4, "--detector-pixel", 1.7399)
    known = json.loads(smpr3d("info", *files, *foci, *facts, "--json").stdout)
    assert known["judged"] and known["findings"] == []
    electrons = [one["mean_electrons_per_frame"] for one in known["files"]]
    cell = sampling.electrons_per_cell(25.0, 80e3, (0.4, 0.4), electrons)
    assert cell == pytest.approx(13.9e3, rel=0.02)
    assert sampling.electrons_per_cell(25.0, 80e3, (0.4, 0.4), electrons[:1]) < 4000

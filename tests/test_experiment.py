"""The experiment file: what it says, what is refused and where, what the data files add."""

import json
import re

import numpy as np
import pytest
from ruamel.yaml import YAML

from smpr3d_jax.app import experiment as ex
from smpr3d_jax.app.facts import merge_facts
from smpr3d_jax.app.schema import Experiment
from smpr3d_jax.data.readers.emd import open_source
from smpr3d_jax.physics.optics import wavelength

from .helpers import shared_data


DESIGN = """\
title: two nanotubes
beam: {energy_ev: 80000, semiangle_mrad: 25, aberrations: {C12: 10, phi12: 0.3}}
scans:
  - {file: scan_0.h5, defocus: -150}
  - {file: scan_1.h5, defocus: 250, shift: [1, 2.5], aberrations: {C21: 300}}
geometry: {scan_step: 0.4, rotation_deg: 0, transpose: false, detector_pixel_mrad: 1.74}
method: {name: smatrix, representation: modes}
sections: {start: -40, stop: 180, step: 5}
"""
LEAST = {"scans": [{"file": "a.h5"}]}
FACTS = {
    "energy_ev": 80e3,
    "semiangle_mrad": 25.0,
    "scan_step_A": (0.4, 0.5),
    "detector_pixel_mrad": 1.74,
    "center": np.array([25.0, 24.0]),
    "defocus_A": 100.0,
    "instrument": "anything",
}


@pytest.fixture
def folder(tmp_path):
    """A folder with two data files and a way to write the experiment beside them."""
    for name in ("scan_0.h5", "scan_1.h5"):
        (tmp_path / name).touch()
    return tmp_path


def write(folder, text):
    path = folder / "exp.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def complaint(folder, text):
    """The message without the folder."""
    with pytest.raises(ex.ExperimentError) as error:
        ex.load(write(folder, text))
    return str(error.value).replace(str(folder) + "/", "")


def test_the_file_of_the_design(folder):
    e = ex.load(write(folder, DESIGN))
    assert e.beam.energy_ev == 80e3 and e.beam.aberrations == {"C12": 10.0, "phi12": 0.3}
    assert [scan.defocus for scan in e.scans] == [-150.0, 250.0]
    assert e.scans[1].file == folder / "scan_1.h5" and e.scans[1].shift == (1.0, 2.5)
    assert e.geometry.scan_step == (0.4, 0.4) and e.geometry.center is None
    assert (e.method.order, e.method.iterations, e.method.loss) == (8, 60, "poisson")
    assert (e.method.held_out, e.method.background, e.method.stop) == (0.05, 0.002, None)
    assert ex.depth_range(e) == (-40.0, 180.0)
    np.testing.assert_allclose(ex.section_depths(e), np.arange(-40, 181, 5))
    assert ex.where(e, "geometry.scan_step") == f"{folder}/exp.yaml:6: geometry.scan_step"
    assert ex.where(e, "scans[1].defocus").endswith("exp.yaml:5: scans[1].defocus")
    assert ex.where(e, "scans.defocus").endswith("exp.yaml:3: scans.defocus")
    assert ex.where(e, "method.plane").endswith("exp.yaml:7: method.plane")


@pytest.mark.parametrize(
    "old, new, message",
    [
        (
            "energy_ev: 80000",
            "energy_kev: 80",
            "exp.yaml:2: beam.energy_kev = 80: unknown key; nearest valid key 'energy_ev'",
        ),
        (
            "defocus: 250",
            "defocs: 250",
            "exp.yaml:5: scans[1].defocs = 250: unknown key; nearest valid key 'defocus'",
        ),
        ("geometry:", "geometri:", "exp.yaml:6: geometri = {'scan_step': 0.4"),
        ("geometry:", "geometri:", "nearest valid key 'geometry'"),
        (
            "method: {",
            "method: {scan_step: 3, ",
            "exp.yaml:7: method.scan_step = 3: unknown key here; nearest valid key "
            "'geometry.scan_step'",
        ),
        (
            "method: {",
            "method: {xyzzy: 3, ",
            "exp.yaml:7: method.xyzzy = 3: unknown key; valid keys are name, representation, order",
        ),
        ("C12: 10", "C13: 10", "beam.aberrations.C13 = 10: unknown key; nearest valid key 'C12'"),
        ("C12: 10", "astig: 10", "beam.aberrations.astig = 10: unknown key; valid keys are C12"),
        ("C12: 10", "C1O: 10", "beam.aberrations.C1O = 10: the defocus belongs to each scan"),
        ("C12: 10", "C10: 10", "beam.aberrations.C10 = 10: the defocus belongs to each scan"),
        ("80000", "80", "exp.yaml:2: beam.energy_ev = 80: 1000 to 2000000 eV would be plausible; "
         "did you write kV? That is 80000 eV"),
        ("80000", "3e6", "beam.energy_ev = 3000000: 1000 to 2000000 eV would be plausible; if it "
         "is right, add `accept_implausible: true`"),
        ("80000", "-80000", "beam.energy_ev = -80000: must be greater than 0"),
        ("80000", ".nan", "beam.energy_ev = nan: must be a finite number"),
        ("80000", "'80000'", "beam.energy_ev = 80000: must be a number"),
        ("mrad: 25", "mrad: 0.025", "exp.yaml:2: beam.semiangle_mrad = 0.025: 0.2 to 200 mrad "
         "would be plausible; did you write rad? That is 25 mrad"),
        ("mrad: 25", "mrad: 25000", "did you write µrad? That is 25 mrad"),
        ("mrad: 1.74", "mrad: 0.00174", "exp.yaml:6: geometry.detector_pixel_mrad = 0.00174: "
         "0.005 to 20 mrad would be plausible; did you write rad? That is 1.74 mrad"),
        ("step: 0.4", "step: 4e-3", "geometry.scan_step = 0.004: 0.01 to 10000 Å would be "
         "plausible; did you write nm? That is 0.04 Å"),
        ("step: 0.4", "step: [0.4, 40000]", "geometry.scan_step = [0.4, 40000]: 0.01 to 10000 Å"),
        ("step: 0.4", "step: wide", "geometry.scan_step = wide: must be one number or [y, x]"),
        ("step: 0.4", "step: [0.4]", "geometry.scan_step[1]: missing"),
        ("defocus: 250", "defocus: 2.5e-8", "scans[1].defocus = 2.5e-08: 0.001 to 1000000 Å would "
         "be plausible in size; did you write m? That is 250 Å"),
        ("defocus: 250", "defocus: 2.5e6", "exp.yaml:5: scans[1].defocus = 2500000: 0.001 to "),
        ("phi12: 0.3", "phi12: 30", "exp.yaml:2: beam.aberrations.phi12 = 30: 0 to 6.28318531 rad "
         "would be plausible; did you write degrees? That is 0.523599 rad"),
        ("C21: 300", "C21: 3e-8", "scans[1].aberrations.C21 = 3e-08: 0.001 to"),
        ("scan_1.h5", "scan_7.h5", "exp.yaml:5: scans[1].file = scan_7.h5: no such file: "
         "scan_7.h5; nearest file 'scan_0.h5'"),
        ("scan_1.h5", "scan_0.h5", "exp.yaml:5: scans[1].file = scan_0.h5: the same data as "
         "scans[0]"),
        ("file: scan_1.h5, ", "", "exp.yaml:5: scans[1].file: missing: data file"),
        ("transpose: false", "transpose: yes", "geometry.transpose = yes: must be true or false"),
        ("name: smatrix", "name: smatix", "exp.yaml:7: method.name = smatix: must be one of "
         "smatrix, multislice, singleslice; nearest valid value 'smatrix'"),
        ("name: smatrix", "order: 8.5", "method.order = 8.5: must be a whole number"),
        ("name: smatrix", "depth_range: [90, 0]", "method.depth_range = [90, 0]: the first depth "
         "must lie above the second: [0, 90]?"),
        ("name: smatrix", "subspace_weight: 2", "method.subspace_weight = 2: must be less than or "
         "equal to 1"),
        ("start: -40", "start: 400", "exp.yaml:8: sections.stop = 180: lies above start = 400"),
        ("start: -40", "inner_mrad: 30", "exp.yaml:8: sections.inner_mrad = 30: has no meaning "
         "with mode 'confocal'; it belongs to annular"),
        ("start: -40", "mode: annular, inner_mrad: 30, outer_mrad: 20",
         "sections.outer_mrad = 20: must be larger than inner_mrad = 30"),
        ("step: 5}", "step: 5}\nstructure: {depths: [60, 0]}",
         "exp.yaml:9: structure.depths = [60, 0]: must increase: [0.0, 60.0]?"),
        ("step: 5}", "step: 5}\nstructure: {depths: []}", "must name at least one depth"),
        ("step: 5}", "step: 5}\nstructure: {steps: 4}", "structure.depths: missing: [0, 90, ...]"),
        ("{start: -40, stop: 180, step: 5}", "", "exp.yaml:8: sections = null: must hold keys with "
         "values: start, stop, step, mode"),
    ],
)  # fmt: skip
def test_problems_name_file_line_key_value_and_remedy(folder, old, new, message):
    text = DESIGN.replace(old, new)
    assert text != DESIGN
    found = complaint(folder, text)
    assert message in found
    assert len(found.splitlines()) == 1


def test_every_problem_is_listed_in_order(folder):
    text = DESIGN.replace("80000", "80").replace("shift", "shft").replace("order", "ordr")
    text = text.replace("name: smatrix", "iterations: 0").replace("transpose", "transposed")
    lines = complaint(folder, text).splitlines()
    assert [line.split(": ")[0] for line in lines] == [f"exp.yaml:{n}" for n in (2, 5, 6, 7)]


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "exp.yaml: is empty"),
        ("# nothing\n", "exp.yaml: is empty"),
        ("- 1\n- 2\n", "exp.yaml: holds CommentedSeq"),
        ("title: x\nbeam: {energy_ev: 80000\nscans: 3\n", "exp.yaml:3: not valid YAML"),
        ("title: x\ntitle: y\n", "exp.yaml:2: not valid YAML: found duplicate key"),
        ("title: a\tb\n\tbeam: 3\n", "not valid YAML"),
        ("title: x\n", "exp.yaml:1: scans: missing: a focal series"),
        ("title: x\nscans: []\n", "exp.yaml:2: scans = []: must have at least one scan"),
        ("title: x\nscans: scan.h5\n", "exp.yaml:2: scans = scan.h5: must be a list"),
        ("scans: [scan.h5]\n", "exp.yaml:1: scans[0] = scan.h5: must hold keys with values: file"),
    ],
)
def test_files_that_are_no_experiment(folder, text, message):
    assert message in complaint(folder, text)


def test_scans_may_share_keys_by_an_anchor(folder):
    scans = "scans:\n  - &a {file: scan_0.h5, defocus: 3, shift: [1, 0]}\n"
    e = ex.load(write(folder, scans + "  - {<<: *a, file: scan_1.h5}\n"))
    assert e.scans[1].defocus == 3.0 and e.scans[1].file.name == "scan_1.h5"
    assert ex.where(e, "scans[1].defocus").endswith("exp.yaml:3: scans[1].defocus")


def test_files_that_cannot_be_read(folder):
    with pytest.raises(ex.ExperimentError, match="nowhere.yaml: no such experiment file"):
        ex.load(folder / "nowhere.yaml")
    with pytest.raises(ex.ExperimentError, match="cannot be read"):
        ex.load(folder)
    (folder / "exp.yaml").write_bytes(b"\x89HDF\r\n\x1a\n\xff\xfe")
    with pytest.raises(ex.ExperimentError, match="cannot be read"):
        ex.load(folder / "exp.yaml")


def test_implausible_values_pass_when_asked(folder):
    text = DESIGN.replace("80000", "80").replace("mrad: 25", "mrad: 0.1")
    e = ex.load(write(folder, text + "accept_implausible: true\n"))
    assert (e.beam.energy_ev, e.beam.semiangle_mrad) == (80.0, 0.1)
    text = text.replace("80,", "-80,") + "accept_implausible: true\n"
    assert "must be greater than 0" in complaint(folder, text)


@pytest.mark.parametrize(
    ("name", "more", "said"),
    [
        ("singleslice", "object: {slices: 3}", "object.slices = 3: singleslice has one"),
        ("multislice", "structure: {depths: [0, 90]}", "slices are a structure already"),
        ("smatrix", "object: {slices: 3}", "object: belongs to multislice and singleslice"),
    ],
)
def test_what_cannot_go_together(folder, name, more, said):
    e = ex.load(write(folder, DESIGN.replace("name: smatrix", f"name: {name}") + more + "\n"))
    with pytest.raises(ex.ExperimentError, match=said):
        ex.require_available(e)
    ex.require_available(ex.from_mapping(LEAST))


def test_a_constraint_is_known_by_its_name(folder):
    text = DESIGN + "object: {constraints: [positive_phse]}\n"
    assert "'positive_phse' is no constraint; did you mean 'positive_phase'?" in complaint(
        folder, text
    )


def test_overrides_are_checked_and_keep_their_place(folder):
    e = ex.load(write(folder, DESIGN))
    changed = ex.override(e, {"method.iterations": 5, "method.stop.patience": 3})
    assert changed.method.iterations == 5 and changed.method.stop.patience == 3  # type: ignore[union-attr]
    assert e.method.iterations == 60 and changed.scans == e.scans
    with pytest.raises(ex.ExperimentError, match=r"yaml:7: method.iterations = 0: must be gre"):
        ex.override(e, {"method.iterations": 0})


# --- facts ---------------------------------------------------------------------------------------


def test_facts_fill_what_is_missing():
    e, notes = merge_facts(ex.from_mapping(LEAST), [FACTS])
    assert (e.beam.energy_ev, e.beam.semiangle_mrad) == (80e3, 25.0)
    assert e.geometry.scan_step == (0.4, 0.5) and e.geometry.center == (25.0, 24.0)
    assert e.scans[0].defocus == 100.0
    assert "geometry.scan_step = [0.4, 0.5] Å is taken from a.h5" in notes
    assert len(notes) == 6


def test_the_experiment_wins_and_says_so(folder):
    e = ex.load(write(folder, DESIGN))
    said = FACTS | {"scan_step_A": 0.5, "energy_ev": 80.5e3, "rotation_deg": 30.0}
    said |= {"semiangle_mrad": None, "defocus_A": 250.4, "transpose": np.True_}
    merged, notes = merge_facts(e, [said | {"defocus_A": -100.0}, said])
    notes = [note.replace(f"{folder}/", "") for note in notes]
    assert notes == [
        "exp.yaml:6: geometry.scan_step = [0.4, 0.4] Å is used, not 0.5 as in scan_0.h5, scan_1.h5",
        "geometry.center = [25, 24] pixels is taken from scan_0.h5, scan_1.h5",
        "exp.yaml:6: geometry.rotation_deg = 0 degrees is used, not 30 as in scan_0.h5, scan_1.h5",
        "exp.yaml:6: geometry.transpose = false is used, not true as in scan_0.h5, scan_1.h5",
        "exp.yaml:4: scans[0].defocus = -150 Å is used, not -100 as in scan_0.h5",
    ]
    assert merged.geometry.scan_step == (0.4, 0.4) and merged.beam.energy_ev == 80e3
    assert merged.scans[0].defocus == -150.0 and merged.geometry.rotation_deg == 0


def test_facts_in_the_units_of_other_programs():
    said = {"detector_pixel_inv_A": (0.05, 0.05), "semiangle_pixels": 12.0, "energy_ev": 80e3}
    said |= {"scan_step_A": 0.4, "defocus_A": 0.0}
    e, _ = merge_facts(ex.from_mapping(LEAST), [said])
    pixel = 0.05 * wavelength(80e3) * 1e3
    assert e.geometry.detector_pixel_mrad == pytest.approx(pixel)
    assert e.beam.semiangle_mrad == pytest.approx(12 * pixel)
    with pytest.raises(
        ex.ExperimentError, match=r"pixels in a.h5 are not square, \[1.7, 1.9\] mrad"
    ):
        merge_facts(ex.from_mapping(LEAST), [FACTS | {"detector_pixel_mrad": (1.7, 1.9)}])


@pytest.mark.parametrize("series", ["nanotubes_series", "heavy_series", "nanotubes_misaligned"])
def test_facts_of_the_shared_files(series):
    paths = [shared_data(series, f"scan_{i}.h5") for i in range(4)]
    entries = [{"file": str(path), "defocus": 10 * i} for i, path in enumerate(paths)]
    e = ex.from_mapping({"beam": {"energy_ev": 80e3}, "scans": entries})
    e, notes = merge_facts(e, [open_source(path).facts for path in paths])
    assert e.geometry.scan_step is not None and 0.3 < e.geometry.scan_step[0] < 0.5
    assert e.beam.semiangle_mrad in (25.0, 22.0)
    assert not any("is used, not" in note for note in notes)


def test_a_default_is_no_opinion():
    e, notes = merge_facts(ex.from_mapping(LEAST), [FACTS | {"rotation_deg": 30.0}])
    assert e.geometry.rotation_deg == 30.0
    assert "geometry.rotation_deg = 30 degrees is taken from a.h5" in notes


def test_facts_still_missing(folder):
    text = "title: x\nscans:\n  - file: scan_0.h5\n  - {file: scan_1.h5, defocus: 3}\n"
    e = ex.load(write(folder, text))
    with pytest.raises(ex.ExperimentError) as error:
        merge_facts(e, [{}, {"energy_ev": 80e3}])
    lines = str(error.value).replace(f"{folder}/", "").splitlines()
    assert lines == [
        "exp.yaml:1: beam.semiangle_mrad: missing, and the data files do not say; add "
        "`semiangle_mrad` (mrad, such as 25)",
        "exp.yaml:1: geometry.scan_step: missing, and the data files do not say; add `scan_step` "
        "(Å, such as 0.4)",
        "exp.yaml:1: geometry.detector_pixel_mrad: missing, and the data files do not say; add "
        "`detector_pixel_mrad` (mrad, such as 1.74)",
        "exp.yaml:3: scans[0].defocus: missing, and the data files do not say; add `defocus` (Å, 0 "
        "if in focus)",
    ]


def test_facts_that_contradict_each_other_or_reason():
    two = ex.from_mapping({"scans": [{"file": "a.h5"}, {"file": "b.h5"}]})
    with pytest.raises(ex.ExperimentError, match=r"disagree: a.h5 says 80000, b.h5 says 60000"):
        merge_facts(two, [FACTS, FACTS | {"energy_ev": 60e3}])
    with pytest.raises(ex.ExperimentError, match="did you write kV"):
        merge_facts(ex.from_mapping(LEAST), [FACTS | {"energy_ev": 80.0}])
    with pytest.raises(ValueError, match="1 sets of facts for 2 scans"):
        merge_facts(two, [FACTS])


# --- depths --------------------------------------------------------------------------------------


def with_foci(*defoci, **sections):
    scans = [{"file": f"{i}.h5", "defocus": f} for i, f in enumerate(defoci)]
    beam = {"energy_ev": 80e3, "semiangle_mrad": 25}
    return ex.from_mapping({"beam": beam, "scans": scans, **sections})


def test_depths_from_the_foci():
    e = with_foci(-150, 250)
    assert ex.depth_range(e) == (-50.0, 150.0)
    np.testing.assert_allclose(ex.section_depths(e), np.arange(-50, 151, 5))
    depths = ex.section_depths(with_foci(100))
    assert depths[0] <= 0 and depths[-1] >= 106 and np.allclose(np.diff(depths), 5)
    assert np.all(np.round(depths / 5) == depths / 5)


def test_depths_as_given():
    e = with_foci(-150, 250, method={"depth_range": [0, 122]}, sections={"stop": 200, "step": 7})
    assert ex.depth_range(e) == (0.0, 122.0)
    depths = ex.section_depths(e)
    assert depths[0] == 0 and depths[-1] == 196 and np.allclose(np.diff(depths), 7)
    single = with_foci(0, sections={"start": 30, "stop": 30})
    np.testing.assert_allclose(ex.section_depths(single), [30.0])


def test_depths_need_the_optics():
    with pytest.raises(ex.ExperimentError, match="energy_ev and semiangle_mrad must be known"):
        ex.section_depths(ex.from_mapping(LEAST))


# --- writing -------------------------------------------------------------------------------------


def test_written_and_read_again(folder):
    e = ex.load(write(folder, DESIGN))
    again = ex.load(write(folder, ex.to_yaml(e, comments=True, folder=folder)))
    assert again.model_dump() == e.model_dump()
    assert "file: scan_0.h5" in ex.to_yaml(e, folder=folder)


def test_template_explains_every_key(folder):
    text = ex.template()
    e = ex.load(write(folder, text))
    assert e.beam.energy_ev == 80e3 and len(e.scans) == 2
    for name in ("scan_step", "subspace_weight", "collector_mrad", "defocus"):
        assert re.search(rf"\b{name}:.*#", text), name
    assert "smatrix | multislice | singleslice" in text
    assert YAML(typ="safe").load(text)["method"]["order"] == 8


def test_json_schema():
    schema = json.loads(json.dumps(Experiment.model_json_schema()))
    assert schema["$defs"]["Beam"]["properties"]["energy_ev"]["description"] == "beam energy, eV"
    assert schema["required"] == ["scans"]


def test_records_are_frozen():
    e = ex.from_mapping(LEAST)
    with pytest.raises(ValueError, match="frozen"):
        e.method.iterations = 3  # type: ignore[misc]
    assert e.method.subspace_tolerance is None
